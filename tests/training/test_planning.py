import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc_ros.errors import UserError
from rlrc_ros.vla.config import LayerWidths
from tests.conftest import bundle_config
from training.config import PruneConfig
from training.importance import GroupScores
from training.planning import best_plan, storage_cost, uniform_plan


def legacy(remove=0.8, keep_layers=3):
    return PruneConfig(remove=remove, keep_layers=keep_layers, ffn_multiple=16)


def decoder(layers=((4, 2, 64),) * 5):
    return bundle_config(layers).architecture.decoder


def random_scores(of, seed):
    torch.manual_seed(seed)
    scores = []
    for width in of.layers:
        heads = torch.rand(width.heads)
        groups = heads.view(width.kv_heads, -1).sum(1) + torch.rand(width.kv_heads)
        scores.append(GroupScores(groups, heads, torch.rand(width.ffn)))
    return scores


def test_a_share_that_cannot_be_removed_says_what_can():
    architecture = bundle_config(((4, 4, 128),) * 5).architecture
    with pytest.raises(UserError, match=r"99.0% .* cannot be removed .* at most 88.2% can"):
        uniform_plan(legacy(remove=0.99), architecture, [1.0] * 5)


def test_more_layers_than_there_are():
    architecture = bundle_config(((4, 4, 128),) * 5).architecture
    with pytest.raises(UserError, match="keep_layers is 9, and the policy has 5"):
        uniform_plan(legacy(keep_layers=9), architecture, [1.0] * 5)


def test_the_most_important_inner_layers_stay():
    architecture = bundle_config(((4, 4, 128),) * 5).architecture
    assert uniform_plan(legacy(), architecture, [0, 1, 3, 2, 0]).layers == (0, 2, 4)


@settings(max_examples=50)
@given(st.floats(0.3, 0.97), st.integers(2, 5))
def test_uniform_plans_meet_their_share_or_say_that_they_cannot(remove, keep):
    architecture = bundle_config(((4, 2, 128),) * 5).architecture
    try:
        plan = uniform_plan(legacy(remove, keep), architecture, [1.0] * 5)
    except UserError as error:
        assert "cannot be removed" in str(error)
        return
    assert plan.removed >= remove - 1e-9
    for widths in plan.widths:
        assert widths.ffn % 16 == 0 and widths.heads == 2 * widths.kv_heads


class WithOverhead:
    """As latency is: every layer has a price of its own, however narrow."""

    fixed, idle = 3.0, 0

    def attention(self, heads, kv_heads):
        return 1.0 + 0.3 * kv_heads + 0.05 * heads

    def channels(self, ffn):
        return 0.01 * ffn

    def shortfall(self, least):
        return f"at the least {least:.2f}"


@settings(max_examples=40)
@given(
    st.floats(7, 22),
    st.sampled_from(["width", "depth", "both"]),
    st.sampled_from(["groups", "heads"]),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_no_plan_within_the_budget_keeps_more(budget, granularity, attention, protect, seed):
    of = decoder()
    scores, cost = random_scores(of, seed), WithOverhead()
    config = PruneConfig(
        max_latency_ms=budget,
        latency_of="cpu",
        granularity=granularity,
        attention=attention,
        protect=protect,
        ffn_multiple=16,
    )
    inner = range(protect, 5 - protect)

    def kept(index, heads, kv, ffn):
        score = scores[index]
        channels = score.channels.sort(descending=True).values[:ffn].sum()
        if attention == "groups":
            return float(score.groups.sort(descending=True).values[:kv].sum() + channels)
        best = score.heads.view(2, 2).sort(1, descending=True).values[:, : heads // 2].sum()
        return float(score.groups.sum() - score.heads.sum() + best + channels)

    def price(heads, kv, ffn):
        return cost.attention(heads, kv) + cost.channels(ffn)

    ends = cost.fixed + price(4, 2, 64) * (5 - len(inner))
    shapes = [(2, 1), (4, 2)] if attention == "groups" else [(2, 2), (4, 2)]
    widths = [(h, kv, f) for (h, kv), f in itertools.product(shapes, (16, 32, 48, 64))]
    if granularity == "depth":
        widths = [(4, 2, 64)]
    fewest = len(inner) if granularity == "width" else int(protect == 0)
    best = max(
        (
            sum(sorted((kept(i, *w) for i in inner), reverse=True)[:count])
            for w in widths
            for count in range(fewest, len(inner) + 1)
            if ends + count * price(*w) <= budget
        ),
        default=None,
    )
    if best is None:
        with pytest.raises(UserError, match="at the least"):
            best_plan(config, of, scores, cost, budget)
        return
    plan = best_plan(config, of, scores, cost, budget)
    pairs = list(zip(plan.layers, plan.widths, strict=True))
    assert cost.fixed + sum(price(w.heads, w.kv_heads, w.ffn) for _, w in pairs) <= budget + 1e-9
    found = sum(kept(i, w.heads, w.kv_heads, w.ffn) for i, w in pairs if i in inner)
    assert found == pytest.approx(best)
    assert all(w == LayerWidths(4, 2, 64) for i, w in pairs if i not in inner)
    assert set(range(5)) - set(inner) <= set(plan.layers)


class OverheadAlone(WithOverhead):
    """As on a GPU that waits for launches: a narrow layer takes as long as a wide one."""

    def attention(self, heads, kv_heads):
        return 1.0

    def channels(self, ffn):
        return 0.0


def test_where_only_launches_count_layers_go_and_the_others_stay_wide():
    of = decoder(((4, 4, 64),) * 8)
    config = PruneConfig(granularity="both", max_latency_ms=8, latency_of="cpu", ffn_multiple=16)
    plan = best_plan(config, of, random_scores(of, 0), OverheadAlone(), 8.0)
    assert len(plan.layers) == 5 and set(plan.widths) == {LayerWidths(4, 4, 64)}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"remove_of_llm": 0.9}, r"90.0% of the LLM's parameters cannot be removed, at most 28.5%"),
        ({"remove": 0.9}, r"90.0% of the decoder's layers cannot be removed, at most 35.0%"),
        ({"max_bytes": 100_000}, r"cannot be cut to 100,000 bytes, at the least to 322,944"),
    ],
)
def test_a_target_out_of_reach_says_what_can_be_reached(target, message):
    of = decoder()
    config = PruneConfig(granularity="width", ffn_multiple=16, **target)
    with pytest.raises(UserError, match=message):
        best_plan(config, of, random_scores(of, 0), *storage_cost(config, of))


def test_a_byte_budget_counts_weights_as_they_will_be_stored():
    of = decoder()
    sixteen = PruneConfig(granularity="width", ffn_multiple=16, max_bytes=360_000)
    four = PruneConfig(granularity="width", ffn_multiple=16, max_bytes=360_000, weight_bits=4.13)
    plans = [best_plan(c, of, random_scores(of, 0), *storage_cost(c, of)) for c in (sixteen, four)]
    assert plans[0].removed > plans[1].removed == 0
    layers = sum(64 * 32 * 2 * (w.heads + w.kv_heads) + 192 * w.ffn for w in plans[0].widths)
    assert 2 * (layers + (2 * 320 + 1 + 2 * 5) * 64) <= 360_000


def test_widths_are_multiples_of_what_is_asked():
    of = decoder(((8, 8, 100),) * 4)
    config = PruneConfig(granularity="width", remove=0.3, ffn_multiple=24, attention_multiple=64)
    plan = best_plan(config, of, random_scores(of, 1), *storage_cost(config, of))
    for width in plan.widths[1:-1]:
        assert width.kv_heads * 32 % 64 == 0 and (width.ffn % 24 == 0 or width.ffn == 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give exactly one of remove, remove_of_llm, max_bytes, max_latency_ms$"),
        ({"remove": 0.5, "max_bytes": 5}, "given: remove, max_bytes"),
        ({"remove": 0.5}, "'remove' also takes 'keep_layers' or 'granularity'"),
        ({"max_bytes": 5}, "'max_bytes' also takes 'granularity'"),
        ({"remove": 0.5, "keep_layers": 3, "protect": 1}, "'protect' also takes 'granularity'"),
        ({"remove": 0.5, "keep_layers": 3, "granularity": "both"}, "no 'keep_layers'"),
        ({"granularity": "both", "max_latency_ms": 5.0}, "belong together"),
        ({"granularity": "both", "remove": 0.5, "weight_bits": 4.0}, "is for 'max_bytes'"),
        ({"granularity": "both", "max_bytes": 0}, "'max_bytes' is 0"),
        ({"granularity": "both", "remove_of_llm": 1.0}, "'remove_of_llm' is a share"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        PruneConfig(**changes)


def test_layers_that_were_pruned_before_and_too_many_protected():
    config = PruneConfig(granularity="both", remove=0.5)
    mixed = decoder(((4, 2, 64), (4, 2, 64), (4, 2, 32), (4, 2, 64)))
    with pytest.raises(UserError, match="differ in width"):
        best_plan(config, mixed, random_scores(mixed, 0), *storage_cost(config, mixed))
    config = PruneConfig(granularity="both", remove=0.5, protect=3)
    with pytest.raises(UserError, match="'protect' is 3, and the policy has 5 layers"):
        best_plan(config, decoder(), random_scores(decoder(), 0), *storage_cost(config, decoder()))
