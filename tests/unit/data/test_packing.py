"""Micro-batches hold every sample once, within their budgets, and share what begins alike."""

from collections import Counter
from pathlib import Path

import numpy as np
import plain_packing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packs import document_costs
from phi3v.data.packing import (
    Budget,
    CostRecorder,
    Lengths,
    Load,
    MicroBatch,
    Packing,
    SampleCosts,
    Stem,
    load_of,
    plan_window,
    saving_of,
    stem_groups,
)


def costs_of(*samples: tuple[int, int, int, int, str]) -> SampleCosts:
    """Costs of samples given as (tokens, crops, stem tokens, stem crops, image)."""
    recorder = CostRecorder()
    for tokens, crops, stem_tokens, stem_crops, image in samples:
        stem = Stem(stem_tokens, 1, stem_crops, str(stem_tokens).encode()) if stem_tokens else Stem()
        recorder.add(Lengths(tokens, 2, crops, False, stem), [Path(image)])
    return recorder.costs()


def page(image: str, question: int = 10) -> tuple[int, int, int, int, str]:
    """A question about an image of 100 positions and 5 crops."""
    return 100 + question, 5, 100, 5, image


@st.composite
def data_sets(draw: st.DrawFn) -> SampleCosts:
    samples = draw(
        st.lists(
            st.one_of(
                st.builds(page, st.sampled_from("abc"), st.integers(1, 60)),
                st.integers(1, 300).map(lambda tokens: (tokens, 0, 0, 0, "")),
            ),
            min_size=1,
            max_size=30,
        )
    )
    return costs_of(*samples)


budgets = st.builds(
    Budget,
    tokens=st.none() | st.integers(1, 400),
    crops=st.none() | st.integers(1, 12),
    samples=st.none() | st.integers(1, 5),
)
packings = st.builds(
    Packing, budgets, shared_questions=st.integers(1, 5), short_positions=st.just(130), num_ranks=st.integers(1, 4)
)


@given(data_sets(), packings, st.randoms(use_true_random=False))
def test_a_window_is_shared_out_whole_and_within_the_budget(costs: SampleCosts, packing: Packing, dice) -> None:
    window = [dice.randrange(len(costs)) for _ in range(dice.randint(1, 40))]
    ranks = plan_window(costs, window, packing)
    assert plan_window(costs, window, packing) == ranks
    assert len(ranks) == packing.num_ranks and {len(rank) for rank in ranks} == {len(ranks[0])}
    batches = [batch for rank in ranks for batch in rank]
    assert Counter(index for batch in batches if batch.counts for group in batch.groups for index in group) == Counter(
        window
    )
    for batch in batches:
        assert batch.load == reference_load(costs, batch)
        assert batch.load.fits(packing.budget) or batch.load.samples == 1
        assert batch.counts or len(batch.groups) == len(batch.groups[0]) == 1
        for group in batch.groups:
            assert len(group) <= packing.shared_questions
            if len(group) > 1:
                assert len({costs.stem_keys[index] for index in group}) == 1 and costs.stem_tokens[group[0]]
                assert len({costs.tokens[index] > packing.short_positions for index in group}) == 1


@given(data_sets(), packings, st.randoms(use_true_random=False))
def test_plans_are_those_of_the_plain_planner(costs: SampleCosts, packing: Packing, dice) -> None:
    window = [dice.randrange(len(costs)) for _ in range(dice.randint(1, 60))]
    assert plan_window(costs, window, packing) == plain_packing.plan_window(costs, window, packing)


@pytest.mark.parametrize(
    ("budget", "num_ranks"),
    [(Budget(16384), 1), (Budget(16384, 150), 8), (Budget(samples=4), 3), (Budget(samples=1), 1), (Budget(), 1)],
    ids=str,
)
def test_plans_of_large_windows_are_those_of_the_plain_planner(budget: Budget, num_ranks: int) -> None:
    costs = document_costs(400)
    packing = Packing(budget, shared_questions=8, num_ranks=num_ranks)
    window = range(400)
    assert plan_window(costs, window, packing) == plain_packing.plan_window(costs, window, packing)


def test_the_work_of_planning_grows_with_the_window_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    num_looks = 0
    fits = Load.fits

    def counted(self: Load, budget: Budget) -> bool:
        nonlocal num_looks
        num_looks += 1
        return fits(self, budget)

    monkeypatch.setattr(Load, "fits", counted)
    for budget in (Budget(samples=1), Budget(samples=4), Budget(16384)):
        num_looks = 0
        plan_window(document_costs(800), range(800), Packing(budget, shared_questions=8))
        assert num_looks < 10 * 800


def reference_load(costs: SampleCosts, batch: MicroBatch) -> Load:
    """Counts every different piece of the row once."""
    pieces = {}
    for number, group in enumerate(batch.groups):
        for place, index in enumerate(group):
            stem, stem_crops = (costs.stem_tokens[index], costs.stem_crops[index]) if len(group) > 1 else (0, 0)
            pieces[number, "stem"] = (stem, stem_crops)
            pieces[number, place] = (costs.tokens[index] - stem, costs.crops[index] - stem_crops)
    return Load(
        sum(tokens for tokens, _ in pieces.values()),
        sum(crops for _, crops in pieces.values()),
        sum(len(group) for group in batch.groups),
    )


def test_fewest_micro_batches_and_balanced() -> None:
    costs = costs_of(*[(tokens, 0, 0, 0, "") for tokens in (60, 50, 50, 40, 30, 20)])
    (batches,) = plan_window(costs, range(6), Packing(Budget(tokens=130)))
    assert sorted(batch.load.tokens for batch in batches) == [120, 130]
    ranks = plan_window(costs, range(6), Packing(Budget(), num_ranks=3))
    assert sorted(sum(batch.load.tokens for batch in rank) for rank in ranks) == [80, 80, 90]


def test_samples_of_nearly_one_length_come_together() -> None:
    costs = costs_of(*[(tokens, 0, 0, 0, "") for tokens in (103, 100, 102, 101)])
    (batches,) = plan_window(costs, range(4), Packing(Budget(tokens=210)))
    assert sorted(sorted(index for (index,) in batch.groups) for batch in batches) == [[0, 2], [1, 3]]


def test_samples_that_begin_alike_are_computed_together() -> None:
    costs = costs_of(page("a"), page("b"), page("a"), (30, 0, 0, 0, ""), page("a"))
    (batches,) = plan_window(costs, range(5), Packing(Budget(), shared_questions=8))
    assert [sorted(batch.groups) for batch in batches] == [[(0, 2, 4), (1,), (3,)]]
    assert batches[0].load == Load(tokens=130 + 110 + 30, crops=10, samples=5)
    (pairs,) = plan_window(costs, range(5), Packing(Budget(), shared_questions=2))
    assert sorted(pairs[0].groups) == [(0, 2), (1,), (3,), (4,)]
    (alone,) = plan_window(costs, range(5), Packing(Budget()))
    assert sorted(alone[0].groups) == [(0,), (1,), (2,), (3,), (4,)]


def test_a_stem_is_not_shared_across_the_reach_of_the_short_factors() -> None:
    costs = costs_of(page("a", 20), page("a", 31), page("a", 30), page("a", 40))
    (batches,) = plan_window(costs, range(4), Packing(Budget(), shared_questions=8, short_positions=130))
    assert sorted(batches[0].groups) == [(0, 2), (1, 3)]
    assert stem_groups(costs, 130).tolist() == [0, 1, 0, 1]


def test_a_group_over_the_budget_is_split_and_a_long_sample_stands_alone() -> None:
    costs = costs_of(*[page("a")] * 4, (500, 0, 0, 0, ""))
    (batches,) = plan_window(costs, range(5), Packing(Budget(tokens=125), shared_questions=8))
    assert sorted(batch.groups for batch in batches) == [((0, 1),), ((2, 3),), ((4,),)]


def test_a_rank_is_not_left_idle_where_a_group_can_be_split() -> None:
    costs = costs_of(*[page("a")] * 4)
    ranks = plan_window(costs, range(4), Packing(Budget(), shared_questions=8, num_ranks=2))
    assert [rank[0].groups for rank in ranks] == [((0, 1),), ((2, 3),)]
    ranks = plan_window(costs, [0], Packing(Budget(), num_ranks=2))
    assert [rank[0].counts for rank in ranks] == [True, False]


def test_groups_are_numbered_as_the_data_stand_wherever_the_images_lie() -> None:
    samples = [page("b"), (9, 0, 0, 0, ""), page("a"), page("b"), (9, 0, 0, 0, "")]
    assert stem_groups(costs_of(*samples), 4096).tolist() == [0, 1, 2, 0, 3]
    moved = [(*sample[:4], f"/elsewhere/{sample[4]}") for sample in samples]
    assert stem_groups(costs_of(*moved), 4096).tolist() == [0, 1, 2, 0, 3]


def test_what_sharing_saves() -> None:
    costs = costs_of(*[page("a")] * 5, page("b"), (40, 0, 0, 0, ""))
    saving = saving_of(costs, stem_groups(costs, 4096), most=3)
    assert (saving.tokens, saving.shared_tokens) == (700, 400)  # two beginnings of "a" where there were five
    assert (saving.crops, saving.shared_crops) == (30, 15)
    assert saving.token_share == pytest.approx(3 / 7)
    assert saving_of(costs, stem_groups(costs, 4096), most=1).token_share == 0


def test_costs_survive_a_file() -> None:
    costs = costs_of(page("a"), (9, 0, 0, 0, ""))
    again = SampleCosts.from_bytes(costs.to_bytes())
    for name in ("tokens", "supervised", "crops", "stem_tokens", "stem_crops", "stem_keys"):
        assert np.array_equal(getattr(costs, name), getattr(again, name))
        assert getattr(costs, name).dtype == getattr(again, name).dtype
    assert load_of(again, (0, 0)) == Load(120, 5, 2)
