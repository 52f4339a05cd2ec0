"""Pairs scored under contexts: equal to separate passes, without leaks, independent of the other pairs."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from nextquill.data import HistoryItem
from nextquill.errors import BudgetError, RecordError
from nextquill.models.tiny_models import ScratchSize, build_model, build_tokenizer
from nextquill.popi import evaluation
from nextquill.popi.evaluation import (
    CONTEXTS,
    PairEvaluation,
    PairScore,
    measure,
    placebo_summaries,
    score_pairs,
)
from nextquill.popi.objective import PreferenceLoss
from nextquill.popi.prompts import GeneratorPrompts
from nextquill.popi.roles import Role, Roles
from nextquill.popi.users import Draw, Pair, User, held_out

pytestmark = pytest.mark.filterwarnings(  # PEFT still uses the old names
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
SIZE = ScratchSize(vocabulary=320, hidden_size=32, layers=2, heads=2, intermediate_size=48, positions=1024)
COLOURS = ("red", "green", "blue")


def users(count=3, pairs=4):
    return [
        User(
            f"u{i}",
            tuple(
                Pair(
                    f"Which {noun} for number {i}{k}?",
                    f"The {COLOURS[i % 3]} {noun} {i}{k}.",
                    f"A plain {noun} {i}{k}!",
                )
                for k, noun in enumerate(("hat", "house", "boat", "lamp", "cup", "door")[:pairs])
            ),
            (HistoryItem(f"I painted {i} again."),),
        )
        for i in range(count)
    ]


def draws(count=3, pairs=4):
    return [held_out(user, num_signals=3) for user in users(count, pairs)]


def summaries(drawn):
    return {draw.user_id: f"Likes {COLOURS[i % 3]} things {i}." for i, draw in enumerate(drawn)}


@pytest.fixture(scope="module")
def words():
    texts = [f"{p.query} {p.chosen} {p.rejected} [About the user]: Likes" for u in users() for p in u.pairs]
    return build_tokenizer(texts, SIZE.vocabulary)


def new_model(words, seed=0):
    model = build_model(SIZE, seed, vocabulary=len(words)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # else all responses are alike
    return model


@pytest.fixture(scope="module")
def model(words):
    return new_model(words)


@pytest.fixture(scope="module")
def prompts(words):
    return GeneratorPrompts(words, max_length=1024)


@dataclasses.dataclass
class Trained:
    """A generator and its initial state, as two models."""

    now: object
    before: object
    tokenizer: object

    def active(self):
        return nullcontext(self.now)

    def initial(self):
        return nullcontext(self.before)


@pytest.fixture(scope="module")
def trained(words, model):
    return Trained(model, new_model(words, seed=1), words)


def log_prob(model, branch):
    """The log p of a branch's response, from a forward of it alone without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([branch.input_ids])).logits[0].double()
    start = branch.prompt_length
    return -float(cross_entropy(logits[start - 1 : -1], torch.tensor(branch.response_ids), reduction="sum"))


def context_of(name, draw, own, others):
    given = {"signals": {"signals": draw.signals}, "summary": {"summary": own}, "placebo": {"summary": others}}
    return {
        key: value[draw.user_id] if isinstance(value, dict) else value for key, value in given.get(name, {}).items()
    }


@pytest.mark.parametrize("sees", [False, True])
def test_margins_are_those_of_separate_passes(trained, prompts, sees):
    drawn = draws()
    own = summaries(drawn)
    loss = PreferenceLoss("ipo", 0.2)
    found = score_pairs(trained, prompts, drawn, own, reference_sees_context=sees, loss=loss)
    assert tuple(found) == CONTEXTS
    others = placebo_summaries(own)
    for name, scores in found.items():
        places = [(draw, k) for draw in drawn for k in range(len(draw.pairs))]
        assert [(s.user_id, s.index) for s in scores] == [(draw.user_id, k) for draw, k in places]
        for (draw, k), score in zip(places, scores, strict=True):
            pair, context = draw.pairs[k], context_of(name, draw, own, others)
            now = prompts.branches(pair, **context)
            before = prompts.branches(pair, **(context if sees else {}))
            policy, base = (
                [log_prob(m, b) for b in both] for m, both in ((trained.now, now), (trained.before, before))
            )
            ratios = [a - b for a, b in zip(policy, base, strict=True)]
            assert score.logprob_margin == pytest.approx(policy[0] - policy[1], rel=1e-4, abs=1e-4)
            per_token = [ratio / branch.response_length for ratio, branch in zip(ratios, now, strict=True)]
            assert score.margin == pytest.approx(per_token[0] - per_token[1], rel=1e-4, abs=1e-4)
            expected = (per_token[0] - per_token[1] - 1 / (2 * 0.2)) ** 2
            assert score.loss == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert score.context_tokens == now[0].prompt_length - prompts.branches(pair)[0].prompt_length
    assert len({tuple(s.margin for s in scores) for scores in found.values()}) == 4, "contexts change nothing"


def test_the_loss_is_the_runs_own(trained, prompts):
    found = score_pairs(trained, prompts, draws(), loss=PreferenceLoss("dpo", 0.3))
    for score in (score for scores in found.values() for score in scores):
        assert score.loss == pytest.approx(float(-logsigmoid(torch.tensor(0.3 * score.margin).double())), abs=2e-6)


def test_scores_do_not_depend_on_the_other_users(trained, prompts, monkeypatch):
    drawn = draws(count=5)
    own = summaries(drawn)
    whole = score_pairs(trained, prompts, drawn, own)
    changes = [{"attention": "padded"}, {"max_tokens": 400}, {"together": 1}, {"order": slice(None, None, -1)}]
    for change in changes:
        monkeypatch.setattr(evaluation, "_PAIRS_TOGETHER", change.get("together", 32))
        options = {name: value for name, value in change.items() if name in ("attention", "max_tokens")}
        other = score_pairs(trained, prompts, drawn[change.get("order", slice(None))], own, **options)
        for name in CONTEXTS:
            expected = {(s.user_id, s.index): s for s in whole[name]}
            for score in other[name]:
                wanted = expected[score.user_id, score.index]
                assert score.margin == pytest.approx(wanted.margin, abs=1e-4), (change, name)
                assert score.context_tokens == wanted.context_tokens


def test_a_model_that_is_its_own_reference_has_no_margin_without_context(model, words, prompts):
    """The margin is exactly 0, so that it counts as neither right nor wrong."""
    found = score_pairs(Role.untrained("generator", model, words), prompts, draws(), summaries(draws()))
    assert [score.margin for score in found["none"]] == [0.0] * len(found["none"])
    assert {score.accuracy for score in found["none"]} == {0.5}
    assert all(score.margin for score in found["summary"])
    for name in CONTEXTS[1:]:  # r is the effect of the context
        for score, bare in zip(found[name], found["none"], strict=True):
            assert score.margin == pytest.approx(score.logprob_margin - bare.logprob_margin, abs=2e-6)


def test_fresh_adapters_are_neither_right_nor_wrong_without_context(words, prompts):
    roles = Roles.shared(new_model(words), words)
    found = score_pairs(roles.generator, prompts, draws())
    assert {score.margin for score in found["none"]} == {0.0}
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if ".generator." in name and "lora_B" in name:
                parameter.normal_(std=0.5)
    trained = score_pairs(roles.generator, prompts, draws())
    assert all(score.margin for score in trained["none"])


def test_a_loaded_generator_is_compared_with_its_base_model(words, prompts, tmp_path):
    base = new_model(words)
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    roles = Roles.shared(base, words)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if ".generator." in name and "lora_B" in name:
                parameter.normal_(std=0.5)
    roles.save(tmp_path, {})
    loaded = Roles.load(tmp_path)
    plain = build_model(SIZE, 0, vocabulary=len(words)).eval()
    plain.load_state_dict(expected)
    assert not loaded.generator.is_what_it_was
    for generator in (loaded.generator, loaded.generator.against(plain)):
        found = score_pairs(generator, prompts, draws())["none"]
        with loaded.generator.active() as now:
            pairs = [pair for draw in draws() for pair in draw.pairs]
            both = [[log_prob(m, branch) for branch in prompts.branches(p)] for p in pairs for m in (now, plain)]
        for score, a, b in zip(found, both[::2], both[1::2], strict=True):
            assert score.margin == pytest.approx((a[0] - b[0]) - (a[1] - b[1]), rel=1e-3, abs=1e-3)
        assert any(score.margin for score in found)


# ---- leaks -----------------------------------------------------------------------------------------


def test_no_evaluated_pair_is_among_the_signals_and_a_draw_that_leaks_is_refused(trained, prompts):
    draw = draws()[0]
    shown = " ".join(f"{item.title} {item.text}" for item in draw.signals)
    assert all(text not in shown for pair in draw.pairs for text in (pair.query, pair.chosen, pair.rejected))
    leaking = Draw(draw.user_id, (draw.pairs[0].as_item(),), draw.pairs)
    with pytest.raises(RecordError, match=r"'u0': .* gives away the pair"):
        score_pairs(trained, prompts, [*draws()[1:], leaking])


def test_prompts_hold_nothing_of_another_user_but_the_placebo(trained, prompts, words, monkeypatch):
    drawn = draws()
    own = summaries(drawn)
    asked = []
    real = GeneratorPrompts.branches

    def spy(self, pair, **context):
        found = real(self, pair, **context)
        asked.append((pair, context, words.decode(found[0].prompt_ids)))
        return found

    monkeypatch.setattr(GeneratorPrompts, "branches", spy)
    score_pairs(trained, prompts, drawn, own)
    owner = {pair: draw.user_id for draw in drawn for pair in draw.pairs}
    seen = set()
    for pair, context, text in asked:
        user = owner[pair]
        foreign = [own[other] for other in own if other != user and own[other] in text]
        if foreign:
            assert context == {"summary": placebo_summaries(own)[user]}
            assert own[user] not in text
        seen.add((own[user] in text, bool(foreign)))
        for other in drawn:
            if other.user_id != user:
                assert not any(item.text in text for item in other.signals)
    assert seen == {(False, False), (True, False), (False, True)}


def test_a_placebo_is_never_ones_own():
    own = {f"u{i}": f"summary {i}" for i in range(7)} | {"blank": "  "}
    for seed in range(20):
        found = placebo_summaries(own, seed)
        assert found.keys() == own.keys()
        assert all(text.strip() and text != own[user] for user, text in found.items())
        assert len({found[user] for user in own if user != "blank"}) == 7, "each serves once"
    assert len({tuple(placebo_summaries(own, seed).values()) for seed in range(20)}) > 10
    assert placebo_summaries(own, 3) == placebo_summaries(dict(reversed(own.items())), 3)
    assert placebo_summaries({"a": "x", "b": ""}) == {}


# ---- missing summaries and pairs -------------------------------------------------------------------


def test_an_empty_summary_gives_the_prompt_without_context(trained, prompts):
    drawn = draws()
    own = summaries(drawn) | {"u1": " \n"}
    found = score_pairs(trained, prompts, drawn, own)
    for summary, bare in zip(found["summary"], found["none"], strict=True):
        if summary.user_id == "u1":
            assert summary.context_tokens == 0
            assert summary.margin == pytest.approx(bare.margin, abs=1e-4)
        else:
            assert summary.context_tokens > 0


def test_without_summaries_or_a_second_user_there_are_fewer_contexts(trained, prompts):
    assert tuple(score_pairs(trained, prompts, draws())) == ("none", "signals")
    assert tuple(score_pairs(trained, prompts, draws(1), {"u0": "x"})) == ("none", "signals", "summary")


@pytest.mark.parametrize(
    ("drawn", "own", "message"),
    [
        ([], None, "at least one pair"),
        ([Draw("u", (HistoryItem("x"),), ())], None, "at least one pair"),
        (draws()[:1] * 2, None, "'u0' more often"),
        (draws(), {"u0": "x"}, "got none for 2, such as 'u1'"),
    ],
)
def test_draws_that_cannot_be_scored_are_refused(trained, prompts, drawn, own, message):
    with pytest.raises(RecordError, match=message):
        score_pairs(trained, prompts, drawn, own)


def test_a_pair_that_does_not_fit_is_refused(trained, words):
    with pytest.raises(BudgetError):
        score_pairs(trained, GeneratorPrompts(words, max_length=12), draws())


def test_progress_counts_every_pair_under_every_context(trained, prompts):
    seen = []

    def progress(things, *, total, desc):
        for thing in things:
            seen.append(thing)
            yield thing
        seen.append((total, desc))

    drawn = draws()
    score_pairs(trained, prompts, drawn, summaries(drawn), progress=progress)
    total = 5 * sum(len(draw.pairs) for draw in drawn)
    assert seen == [*range(total), (total, "Comparing pairs")]


# ---- measures --------------------------------------------------------------------------------------


def score(user, margin, tokens, logprob=1.0, loss=0.5):
    return PairScore(user, 0, margin, logprob, loss, tokens)


def test_measures_are_means_with_intervals_over_users():
    bare = [score("a", -1.0, 0), score("a", 0.0, 0), score("b", 2.0, 0), score("b", 0.0, 0)]
    told = [score("a", 1.0, 10), score("a", 1.0, 10), score("b", 2.0, 10), score("b", 3.0, 10)]
    raw = [score(s.user_id, s.margin, 40) for s in told]
    found = measure({"none": bare, "signals": raw, "summary": told, "placebo": bare})
    accuracy = found.contexts["none"].measures["accuracy"]
    assert accuracy.value == pytest.approx((0 + 0.5 + 1 + 0.5) / 4)
    assert (accuracy.low, accuracy.high) == (pytest.approx(0.25), pytest.approx(0.75)), "users are drawn, not pairs"
    assert found.contexts["summary"].measures["margin"].value == pytest.approx(7 / 4)
    assert (found.pairs, found.users, found.token_ratio) == (4, 2, 4.0)
    assert found.differences["none"]["accuracy"].difference == pytest.approx(1 - 2 / 4)
    assert found.differences["signals"]["margin"].difference == 0
    assert list(found.differences) == ["none", "signals", "placebo"]


def test_one_user_has_no_interval_and_json_says_so():
    found = measure({"none": [score("a", 1.0, 0)], "summary": [score("a", 1.0, 0)]})
    result = json.loads(
        PairEvaluation(model="folder", generator=found, transfer={"other": found}, empty_summaries=1).to_json()
    )
    assert result["generator"]["contexts"]["none"]["accuracy"] == {"value": 1.0, "low": None, "high": None}
    assert result["transfer"]["other"] == result["generator"]
    assert result["generator"]["signals_tokens_by_summary_tokens"] is None
    assert result["empty_summaries"] == 1
    assert not any(
        math.isinf(value) for value in result["generator"]["summary_minus"]["none"]["margin"].values() if value
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_probability_that_is_not_finite_is_an_error_and_not_a_wrong_answer(words, value):
    drawn, model = draws(2, 4), new_model(words)
    with torch.no_grad():
        model.lm_head.weight[5] = value
    generator = Role.untrained("generator", model, words)
    with pytest.raises(RecordError, match=r"user 'u0': expected finite log-probabilities of pairs\[0\] under 'none'"):
        score_pairs(generator, GeneratorPrompts(words, max_length=512), drawn, attention="padded")
