"""The scores of a run, as the report states, tabulates and draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phi3v.report import charts
from phi3v.report.values import Json, by_step, in_duration, step_of, to_number, to_percent, to_text, to_whole

METRIC_NAMES = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "anls": "ANLS",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_accuracy": "relaxed accuracy",
    "f1": "F1",
}


@dataclass(frozen=True, slots=True)
class Headline:
    """A score as the report states it; numbers in percent of a full score."""

    label: str
    metric: str
    score: float
    low: float | None
    high: float | None
    confidence: float | None
    n: int | None


def headlines(before: Json | None, after: Json | None, evals: Sequence[Json]) -> list[Headline]:
    """The scores before and after; where the run has not ended, the last one so far."""
    named = [("Before training", before), ("After training", after)]
    if after is None:
        during = [line for line in evals if line.get("when") == "during" and step_of(line) is not None]
        if during:
            named.append((f"At step {during[-1]['step']:,}, the last score so far", during[-1]))
    return [headline for label, line in named if line is not None and (headline := _headline(label, line)) is not None]


def _headline(label: str, line: Json) -> Headline | None:
    score = to_number(line.get("score"))
    if score is None:
        return None
    return Headline(
        label=label,
        metric=metric_name(line.get("metric")),
        score=100 * score,
        low=to_percent(line.get("low")),
        high=to_percent(line.get("high")),
        confidence=to_percent(line.get("confidence")),
        n=to_whole(line.get("n")),
    )


def metric_name(metric: Any) -> str:
    """A metric in the report's words; one that it does not know as it is."""
    return METRIC_NAMES.get(metric, metric) if isinstance(metric, str) else "score"


def difference(headlines: Sequence[Headline]) -> float | None:
    """Points from the first score to the last; None unless both are of one metric over as many questions."""
    if len(headlines) != 2:
        return None
    first, last = headlines
    return last.score - first.score if (first.metric, first.n) == (last.metric, last.n) else None


def interval_names(headlines: Sequence[Headline]) -> str:
    """The coverage of the headlines' intervals; empty when none has one."""
    coverages = [headline.confidence for headline in headlines if headline.low != headline.high]
    return " and ".join(dict.fromkeys(f"{coverage:g} %" for coverage in coverages if coverage is not None))


def score_chart(evals: Sequence[Json]) -> charts.Chart | None:
    """The scores over the steps, with their intervals; None with fewer than two."""
    scored = {line["step"]: line for line in by_step(evals) if to_number(line.get("score")) is not None}
    intervals = [
        charts.Interval(value, to_percent(line.get("low")), to_percent(line.get("high")))
        for line in scored.values()
        if (value := to_percent(line.get("score"))) is not None
    ]
    if len(intervals) < 2:
        return None
    metric = metric_name(next(iter(scored.values())).get("metric"))
    return charts.scores(f"Evaluation: {metric}", list(scored), intervals)


def eval_rows(evals: Sequence[Json]) -> list[dict[str, str]]:
    """Every evaluation, as cells of a table."""
    rows = []
    for line in evals:
        score, low, high = (to_percent(line.get(key)) for key in ("score", "low", "high"))
        seconds, step, n = to_number(line.get("seconds")), step_of(line), to_whole(line.get("n"))
        rows.append(
            {
                "when": to_text(line.get("when")),
                "step": "" if step is None else f"{step:,}",
                "score": "none" if score is None else f"{score:.1f} %",
                "interval": "" if low is None or high is None else f"{low:.1f} to {high:.1f}",
                "n": "" if n is None else f"{n:,}",
                "seconds": "" if seconds is None else in_duration(seconds),
            }
        )
    return rows
