"""Block masks against the dense mask they stand for, and attention under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import create_block_mask

from nextquill.errors import BackendUnavailableError
from nextquill.tree import TreeLayout, build_prefix_tree, flex, tree_attention, visibility_mask
from nextquill.tree.flex import flex_tree_attention, tree_block_mask
from tests.helpers import FLOAT32_RELATIVE, FLOAT64_RELATIVE, assert_close
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, grown_tree

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
TREE = build_prefix_tree(SMALL)
GROWN = grown_tree(150)
OPTIONS = [{}, {"window": 3}, {"window": 20}, {"softcap": 1.5}, {"window": 3, "softcap": 2.0}]
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)
# Without torch.compile, flex_attention writes the scores out, which is what tests on a CPU want, and says so.
uncompiled_warns = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def inputs(rows, heads=4, kv_heads=2, size=16, dtype=torch.float32):
    return [torch.randn(1, h, rows, size, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads)]


def tile_kinds(mask):
    """For each tile 0 if skipped, 1 if partial, 2 if whole. Every tile is in at most one list."""
    count = mask.kv_indices.shape[-1]
    kinds = torch.zeros(mask.kv_indices.shape[-2], count, dtype=torch.long)
    lists = ((mask.kv_num_blocks, mask.kv_indices, 1), (mask.full_kv_num_blocks, mask.full_kv_indices, 2))
    for numbers, indices, kind in lists:
        for row, number in enumerate(numbers[0, 0].tolist()):
            for tile in indices[0, 0, row, :number].tolist():
                assert kinds[row, tile] == 0
                kinds[row, tile] = kind
    return kinds


def expanded(mask, rows):
    """The visible entries: all of whole tiles, partial tiles by the mask, none of skipped ones."""
    block, kinds = mask.BLOCK_SIZE[0], tile_kinds(mask)
    q, k = torch.arange(rows)[:, None], torch.arange(rows)[None]
    entries = mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    kind = kinds[q // block, k // block]
    return (kind == 2) | ((kind == 1) & entries)


@few
@given(
    branches=branch_lists(),
    window=st.none() | st.integers(1, 12),
    block=st.integers(1, 9),
    padding=st.integers(0, 5),
)
def test_any_tree_in_tiles_of_any_size(branches, window, block, padding):
    tree = build_prefix_tree(branches)
    rows = len(tree)
    depth = torch.cat([tree.position_ids, torch.zeros(padding, dtype=torch.long)])
    end = torch.cat([tree.subtree_end, torch.arange(rows, rows + padding)])
    mask = tree_block_mask(depth, end, "cpu", window=window, block_size=block)
    assert torch.equal(expanded(mask, rows + padding), visibility_mask(depth, end, window))


@pytest.mark.covering(1)
@pytest.mark.parametrize("block", [1, 4, 8, 16])
@pytest.mark.parametrize("tree", [GROWN, build_prefix_tree([list(range(100))])], ids=["grown", "chain"])
def test_every_window(tree, block):
    """Some windows end on a tile's edge, where whole and partial tiles differ by one row."""
    for window in range(1, 70):
        mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cpu", window=window, block_size=block)
        assert torch.equal(expanded(mask, len(tree)), visibility_mask(tree.position_ids, tree.subtree_end, window))


@pytest.mark.parametrize("block", [1, 5, 16, 64])
def test_tiles_are_as_few_and_as_whole_as_they_can_be(block):
    """Without a window the rule is exact, except that tiles on the diagonal are partial."""
    mask = tree_block_mask(GROWN.position_ids, GROWN.subtree_end, "cpu", block_size=block)
    rows = len(GROWN)
    exact = create_block_mask(mask.mask_mod, None, None, rows, rows, "cpu", BLOCK_SIZE=block)
    expected = tile_kinds(exact)
    expected.fill_diagonal_(1)
    assert torch.equal(tile_kinds(mask), expected)
    assert rows % block == 0 or block > 1


def test_a_window_skips_what_depths_prove_unseen_and_keeps_whole_tiles():
    tree = build_prefix_tree([list(range(320))])
    mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cpu", window=64, block_size=32)
    kinds = tile_kinds(mask)
    # Queries [m, m + 32) see 64 keys back: the tile before is whole, the one before that and the own are partial.
    distance = torch.arange(10)[:, None] - torch.arange(10)
    expected = torch.where(distance == 1, 2, torch.where((distance == 0) | (distance == 2), 1, 0))
    assert torch.equal(kinds, expected)


def test_queries_and_keys_agree_on_the_tiles():
    """The backward reads the lists by keys."""
    mask = tree_block_mask(GROWN.position_ids, GROWN.subtree_end, "cpu", block_size=16)
    dense = mask.to_dense()[0, 0].bool()
    by_keys = torch.zeros_like(dense)
    lists = ((mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices))
    for numbers, indices in lists:
        for tile, number in enumerate(numbers[0, 0].tolist()):
            by_keys[indices[0, 0, tile, :number].long(), tile] = True
    assert torch.equal(dense, by_keys)
    assert mask.seq_lengths == (len(GROWN), len(GROWN))


F64, F32 = torch.float64, torch.float32
CASES = [
    *((GROWN, F64, (4, 2), options) for options in OPTIONS),
    (GROWN, F64, (2, 2), {}),
    (GROWN, F32, (3, 1), OPTIONS[-1]),
    (TREE, F32, (4, 2), {}),
]


@uncompiled_warns
@pytest.mark.parametrize(("tree", "dtype", "heads", "options"), CASES)
def test_output(tree, dtype, heads, options, monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda _: flex._flex)
    tensors = inputs(len(tree), *heads, dtype=dtype)
    softcap, window = options.get("softcap"), options.get("window")
    mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cpu", window=window)
    out = flex_tree_attention(*tensors, mask, 0.3, softcap)
    relative = FLOAT64_RELATIVE if dtype == torch.float64 else FLOAT32_RELATIVE
    assert out.dtype == dtype
    assert_close(out, tree_attention(*tensors, TreeLayout.of_tree(tree), scale=0.3, **options), relative)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
def test_compiled_for_a_cpu():
    """Two lengths, in 20 s: PyTorch's compiled code for the mask, the cap, and lengths that do not fill a tile."""
    torch._dynamo.reset()
    for seed, (rows, opts) in enumerate([(150, {}), (300, {"window": 30, "softcap": 3.0})]):
        tree = grown_tree(rows, seed)
        tensors = inputs(len(tree), size=64)
        mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cpu", window=opts.get("window"))
        out = flex_tree_attention(*tensors, mask, 0.3, opts.get("softcap"))
        assert_close(out, tree_attention(*tensors, TreeLayout.of_tree(tree), scale=0.3, **opts))


@pytest.mark.covering(1)
@uncompiled_warns
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_two_graphs_serve_every_length_and_mask(window, softcap, monkeypatch):
    """As on a GPU. The first graph is for tile lists of the first length."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    with monkeypatch.context() as patch:
        compiled = torch.compile
        patch.setattr(torch, "compile", lambda function, **o: compiled(function, backend=counting, **o))
        dynamic = flex._compiled.__wrapped__(True)
    monkeypatch.setattr(flex, "_compiled", lambda _: dynamic)
    torch._dynamo.reset()
    for seed, rows in enumerate((140, 260, 333, 512, 700)):
        tree = grown_tree(rows, seed)
        mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cpu", window=window and window + seed)
        tensors = inputs(len(tree))
        expected = flex._flex(*tensors, mask, 0.3, softcap)
        assert_close(flex_tree_attention(*tensors, mask, 0.3, softcap), expected, 1e-6)
    assert len(graphs) <= 2
    torch._dynamo.reset()


@uncompiled_warns
def test_the_recompile_limit_is_an_error(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **o: compiled(function, backend="eager", **o))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    mask = tree_block_mask(TREE.position_ids, TREE.subtree_end, "cpu")
    with torch._dynamo.config.patch(recompile_limit=1):
        flex_tree_attention(*inputs(len(TREE)), mask, 0.3)
        with pytest.raises(FailOnRecompileLimitHit):
            flex_tree_attention(*inputs(len(TREE)), mask, 0.3, 2.0)
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def test_gradients_on_a_cpu_are_refused():
    mask = tree_block_mask(TREE.position_ids, TREE.subtree_end, "cpu")
    for which in range(3):
        tensors = inputs(len(TREE))
        tensors[which].requires_grad_()
        with pytest.raises(BackendUnavailableError, match="'flex' has no gradient on a CPU"):
            flex_tree_attention(*tensors, mask, 0.3)


@uncompiled_warns
def test_without_gradients_leaves_are_taken(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda _: flex._flex)
    mask = tree_block_mask(TREE.position_ids, TREE.subtree_end, "cpu")
    with torch.no_grad():
        assert not flex_tree_attention(*(t.requires_grad_() for t in inputs(len(TREE))), mask, 0.3).requires_grad
