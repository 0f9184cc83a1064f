"""A run's mid-run scores, as its log history holds them: which is the best, and whether better ones still come."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SCORE_KEY = "eval_score"
"""Name of a mid-run score in Trainer's log history."""


class Best(NamedTuple):
    """The best mid-run score so far; the earliest of equals."""

    step: int
    score: float

    def record(self, metric: str) -> dict[str, Any]:
        """Returns what ``best.json`` holds."""
        return {"step": self.step, "score": self.score, "metric": metric}


def scores_in(log_history: Iterable[Mapping[str, Any]]) -> list[Best]:
    """Returns the mid-run scores of a run's log history, in order."""
    return [Best(entry["step"], entry[SCORE_KEY]) for entry in log_history if SCORE_KEY in entry]


def best_of(log_history: Iterable[Mapping[str, Any]], lost: Collection[int] = ()) -> Best | None:
    """Returns the best mid-run score, or None before the first.

    Args:
        log_history: Trainer's.
        lost: steps whose checkpoint is no longer there: their scores do not count.

    >>> best_of([{"step": 1, "loss": 2.0}, {"step": 1, "eval_score": 0.5}, {"step": 2, "eval_score": 0.5}])
    Best(step=1, score=0.5)
    """
    kept = (best for best in scores_in(log_history) if best.step not in lost)
    return max(kept, key=lambda best: best.score, default=None)


def is_out_of_patience(log_history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Says whether the last ``patience`` mid-run scores brought no new best."""
    best = best_of(log_history)
    if best is None or patience is None:
        return False
    return sum(score.step > best.step for score in scores_in(log_history)) >= patience
