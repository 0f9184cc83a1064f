"""When a written model counts as the trained one, fault by fault."""

import re
from dataclasses import replace

import pytest
import torch

from phi3v.export.comparison import (
    ARITHMETIC,
    MOST_NEAR_TIE,
    MOST_ROUNDING,
    Comparison,
    Greedy,
    compare_greedy,
    near_tie_of,
    tolerance_of,
)

STOP = 9
PASSES = Comparison(
    dtype="bfloat16",
    trained_rope_mode="auto",
    written_rope_mode="auto",
    num_samples=2,
    num_logits=7,
    same_inputs=True,
    merge_difference=1e-6,
    reload_difference=0.0,
    relative_difference=0.02,
    max_logit_difference=0.1,
    rounded_tensors=3,
    rounding_difference=0.02,
    rounding_max_logit=0.1,
    tolerance=0.05,
    adapter_effect=0.3,
    same_top_token=1.0,
    greedy=Greedy(samples=2, same=1, tokens=9, near_tie=0.2, near_ties=(0.1,), mismatches=()),
)


def test_a_sound_one_passes() -> None:
    assert PASSES.problems() == []
    assert replace(PASSES, merge_difference=None, adapter_effect=None, rounded_tensors=0).problems() == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"same_inputs": False}, "other ids or pixels"),
        ({"merge_difference": 2e-4}, "before any rounding"),
        ({"reload_difference": 2e-4}, "do not hold the model"),
        ({"reload_difference": float("nan")}, "do not hold the model"),
        ({"reload_difference": 2e-4, "written_rope_mode": "long"}, "rope_mode auto and was to be written with long"),
        ({"relative_difference": 0.06}, "than rounding explains.*--dtype float32"),
        ({"relative_difference": float("nan")}, "than rounding explains"),
        ({"adapter_effect": 0.03}, "adapter's effect is lost.*--dtype float32"),
        ({"greedy": replace(PASSES.greedy, mismatches=(0.3,))}, "greedy answers differ.*--dtype float32"),
    ],
)
def test_each_fault_is_told(fault: dict[str, object], told: str) -> None:
    (problem,) = replace(PASSES, **fault).problems()  # pyright: ignore[reportArgumentType]
    assert re.search(told, problem)


def test_an_adapter_that_changes_nothing_is_not_lost() -> None:
    assert replace(PASSES, relative_difference=ARITHMETIC / 2, adapter_effect=0.0).problems() == []


def test_the_limit_is_what_another_rounding_does() -> None:
    assert tolerance_of(torch.float32, 0.0, 0) == ARITHMETIC
    assert tolerance_of(torch.bfloat16, 0.0, 0) == ARITHMETIC  # nothing was rounded: nothing is excused
    assert tolerance_of(torch.bfloat16, 0.001, 5) == 0.05
    assert tolerance_of(torch.bfloat16, 0.08, 5) == pytest.approx(0.16)
    assert tolerance_of(torch.float16, 0.5, 5) == MOST_ROUNDING


def test_near_ties_are_what_another_rounding_could_turn() -> None:
    logits = torch.tensor([[1.0, -8.0]])
    assert near_tie_of(logits, 0.0) == pytest.approx(8e-4)
    assert near_tie_of(logits, 0.3) == pytest.approx(0.6)
    assert near_tie_of(logits, 5.0) == MOST_NEAR_TIE


def greedy(trained: list[int], written: list[int], rows: torch.Tensor, most: int = 4) -> Greedy:
    return compare_greedy([trained], [written], [rows], stop_token_ids=(8, STOP), max_new_tokens=most, near_tie=0.5)


def rows_of(*best_and_other: tuple[int, int, float]) -> torch.Tensor:
    """One row a token: the trained model's choice has logit 3, another one ``gap`` less, the others -10."""
    rows = torch.full((len(best_and_other), 10), -10.0)
    for row, (best, other, gap) in zip(rows, best_and_other, strict=True):
        row[best], row[other] = 3.0, 3.0 - gap
    return rows


def test_greedy_answers_are_compared_token_for_token() -> None:
    rows = rows_of((1, 2, 0.1), (3, 4, 2.0), (STOP, 5, 0.2))
    assert greedy([1, 3], [1, 3], rows) == Greedy(1, 1, 3, 0.5, (), ())
    near = greedy([1, 3], [2, 7], rows)  # what follows a near tie is another text
    assert (near.same, near.tokens, near.mismatches) == (0, 1, ()) and near.near_ties == pytest.approx((0.1,))
    assert greedy([1, 3], [1, 4], rows).mismatches == pytest.approx((2.0,))
    assert greedy([1, 3], [1, 3, 5], rows).near_ties == pytest.approx((0.2,))  # goes on where the other stops
    assert greedy([1, 3], [1], rows).mismatches == pytest.approx((13.0,))  # stops where the other goes on


def test_an_answer_of_full_length_has_no_stop() -> None:
    rows = rows_of((1, 2, 0.1), (3, 4, 2.0), (STOP, 5, 0.2))
    assert greedy([1, 3], [1, 3], rows, most=2) == Greedy(1, 1, 2, 0.5, (), ())
    assert greedy([1, 3], [1], rows, most=2).mismatches == pytest.approx((13.0,))


@pytest.mark.parametrize("stop", [8, STOP])
def test_any_stop_token_ends_an_answer(stop: int) -> None:
    rows = rows_of((1, stop, 0.3))
    assert greedy([1], [], torch.cat([rows, rows])).near_ties == pytest.approx((0.3,))
