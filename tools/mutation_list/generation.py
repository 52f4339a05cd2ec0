"""Mutations of generation: engines, guidance and the writer."""

from tools.mutation import Mutation

MUTATIONS = (
    Mutation(
        "generation-once",
        "nextquill/generation/transformers_engine.py",
        "        cache.reorder_cache(places)\n",
        "        cache.reorder_cache(places.flip(0))\n",
        "samples continue another prompt than theirs",
    ),
    Mutation(
        "guidance-sign",
        "nextquill/generation/guidance.py",
        "own = own + guidance * (own - against",
        "own = own + guidance * (against - own",
        "guidance makes texts less personal",
    ),
    Mutation(
        "guidance-plausible",
        "nextquill/generation/guidance.py",
        "own.amax(-1, keepdim=True) + math.log(plausibility)",
        "own.amax(-1, keepdim=True) - math.log(plausibility)",
        "only implausible tokens are left out less and less",
    ),
    Mutation(
        "guidance-positions",
        "nextquill/generation/guidance.py",
        ".clamp(min=0)",
        ".clamp(min=1)",
        "the other prompts begin at a wrong position",
    ),
    Mutation(
        "guidance-new-call",
        "nextquill/generation/guidance.py",
        "input_ids.shape[1] != self._width + 1",
        "input_ids.shape[1] == 0",
        "a second call of generate goes on from the first one's texts",
    ),
    Mutation(
        "tree-engine-subtree",
        "nextquill/generation/tree_engine.py",
        "(ends[:, None] < tree.subtree_end)",
        "(ends[:, None] <= tree.subtree_end)",
        "a prompt sees the token of a sibling",
    ),
    Mutation(
        "tree-engine-next",
        "nextquill/generation/tree_engine.py",
        "(tree.position_ids[ends] + 1)",
        "tree.position_ids[ends]",
        "generated tokens have the position before theirs",
    ),
    Mutation(
        "tree-engine-window",
        "nextquill/generation/tree_engine.py",
        "positions[:, None] - keys < window",
        "positions[:, None] - keys <= window",
        "a sliding window is one token too long",
    ),
    Mutation(
        "tree-engine-noise",
        "nextquill/generation/tree_engine.py",
        "                        noise.keep(going)",
        "                        noise.keep(range(len(going)))",
        "a response that ends gives its random numbers to another one",
    ),
    Mutation(
        "few-rows-bias",
        "nextquill/generation/few_rows.py",
        "return product if module.bias is None else product + module.bias",
        "return product",
        "biases are left out of a step on a CPU",
    ),
    Mutation(
        "few-rows-layout",
        "nextquill/generation/few_rows.py",
        ".t().contiguous().view(",
        ".t().reshape(",
        "a guided token takes twice the time on a CPU",
    ),
    Mutation(
        "keys-in-place",
        "nextquill/generation/few_rows.py",
        'device.type != "cpu" or',
        'device.type == "cpu" or',
        "a step on a CPU copies the whole cache for each head",
    ),
    Mutation(
        "writer-against",
        "nextquill/generation/writer.py",
        "guided = chosen.guidance > 0 and against != ids",
        "guided = False",
        "Writer ignores guidance",
    ),
    Mutation(
        "writer-order",
        "nextquill/generation/writer.py",
        'seed_of(f"{chosen.seed} {index}")',
        'seed_of(f"{chosen.seed}")',
        "all responses are sampled with the same random numbers",
    ),
)
