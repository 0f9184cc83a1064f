"""Evaluation's configuration."""

# ruff: noqa: RUF009 - `setting` returns a dataclasses.field, which the rule cannot see

from dataclasses import dataclass
from pathlib import Path

from phi3v.config.run import RunConfig, check_labels
from phi3v.config.words import (
    EVALUATION,
    LABELS_DOC,
    MAX_SEED,
    MODEL_AND_DATA,
    SCORING_DOC,
    Metric,
    Scoring,
)
from phi3v.settings import setting


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RunConfig):
    """Everything that decides a score; `phi3v eval` reads it."""

    data: list[Path] = setting(MODEL_AND_DATA, "Samples whose questions are asked: JSONL files.")
    metric: Metric = setting(
        EVALUATION, "How an answer is scored.", default="accuracy", familiar_names=("eval_metric",)
    )
    scoring: Scoring = setting(EVALUATION, SCORING_DOC, default="generate", familiar_names=("eval_scoring",))
    labels: list[str] = setting(EVALUATION, LABELS_DOC, default=[], familiar_names=("eval_labels",))
    batch_size: int | None = setting(
        EVALUATION, "Most questions answered at once. None: as many as the memory holds.", default=None, at_least=1
    )
    max_new_tokens: int = setting(EVALUATION, "Longest generated answer, tokens.", default=64, at_least=1)
    seed: int = setting(
        EVALUATION, "Seed of the confidence interval's resampling.", default=0, at_least=0, at_most=MAX_SEED
    )
    limit: int | None = setting(EVALUATION, "Samples used, from the first. None: all.", default=None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels("labels", self.labels)
