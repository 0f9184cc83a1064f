"""A model, a data set and a metric: a score with its interval, a report by class, and every prediction."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import EvalConfig
from ..data.check import check_dataset
from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..errors import ConfigError
from ..files import json_line, write_atomically, write_json, write_json_lines
from ..model.checkpoint import load_model, load_processor
from ..model.downloads import local_folder
from ..model.placement import DTYPE_NAMES, resolve_device, resolve_precision
from ..model.processing_phi3_v import Phi3VProcessor
from ..runlog import RunDirectory
from .answer import ALONE, EvalSettings, Prediction, Share, answer_questions
from .classes import ClosedQuestion, ClosedReport, closed_report, find_label
from .metrics import Score, metric_named, score_predictions
from .origin import rope_mode_to_ask
from .questions import check_labels

PROBABILITY_DECIMALS = 6
"""Decimals of the probabilities in predictions files; scores are computed from all digits."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        score: mean over the questions with its bootstrap interval.
        rows: one a question, as written to predictions files.
        seconds: wall time of answering and scoring.
        classes: scores by class of the questions with labels; None when there are none.
    """

    score: Score
    rows: list[dict[str, Any]]
    seconds: float
    classes: ClosedReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the rows as plain JSON values, as ``eval.json`` and lines of ``eval.jsonl`` hold them."""
        classes = {} if self.classes is None else {"classes": self.classes.to_dict()}
        return {**asdict(self.score), "seconds": self.seconds, **classes}


def evaluate_model(
    model: Any,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    settings: EvalSettings,
    share: Share = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> EvalResult:
    """Answers every question and scores the answers; arguments as in ``answer_questions``, but for ``keep``.

    Draws no random numbers from torch, numpy or Python, so that it can stand in the middle of a training run. With
    several processes each one gets the whole result.

    Args:
        keep: gets each row of this process as soon as its question is answered.

    Raises:
        ConfigError: no metric of that name; before anything is asked.
        StoppedError: as ``answer_questions``.
    """
    started = time.monotonic()
    score_one = metric_named(settings.metric)

    def keep_scored(one: Prediction) -> None:
        if keep is not None:
            keep(_row(one, score_one(one.prediction, one.answers)))

    predictions = answer_questions(model, processor, dataset, settings, share, should_stop, keep_scored)
    score, values = score_predictions(
        settings.metric,
        [one.prediction for one in predictions],
        [one.answers for one in predictions],
        seed=settings.seed,
    )
    closed = [
        ClosedQuestion(one.labels, one.expected, find_label(one.prediction, one.labels), one.probabilities)
        for one in predictions
        if one.expected is not None
    ]
    classes = closed_report(closed, seed=settings.seed)
    rows = [_row(one, value) for one, value in zip(predictions, values, strict=True)]
    return EvalResult(score, rows, time.monotonic() - started, classes)


def _row(one: Prediction, score: float) -> dict[str, Any]:
    """Returns a line of a predictions file; what a question does not have is left out of it."""
    row = asdict(one)
    for name in ("labels", "expected", "probabilities"):
        del row[name]
    if one.expected is not None:
        row["expected"] = one.expected
    if one.probabilities is not None:
        row["labels"] = one.labels
        row["probabilities"] = [round(value, PROBABILITY_DECIMALS) for value in one.probabilities]
    return {**row, "score": score}


def run_evaluation(config: EvalConfig) -> EvalResult:
    """Does what ``phi3v eval`` says: writes ``config.yaml``, ``predictions.jsonl`` and, at the end, ``eval.json``.

    ``predictions.jsonl`` grows with the answers, in the order in which they are found; at the end it is put into the
    order of the data.

    Raises:
        ConfigError: the output folder already holds an evaluation or a training run, or cannot be written, or the
            configured labels are no closed set.
        DataError: bad samples, or questions without the labels that their scoring needs, before the model is loaded.
        CheckpointError: no model at that path.
    """
    output = Path(config.output_dir)
    if (output / "eval.json").exists():
        raise ConfigError(f"{output} already holds an evaluation (eval.json); give another output_dir")
    if RunDirectory(output).holds_training:
        raise ConfigError(f"{output} is a training run's directory; give another output_dir, such as {output / 'eval'}")
    config = replace(config, rope_mode=rope_mode_to_ask(config.model, config.rope_mode))
    with _told_of(output):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "config.yaml", config.to_yaml().encode())
        # Those that an evaluation without an end left were not asked for as this file says now.
        (output / "predictions.jsonl").unlink(missing_ok=True)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    folder = local_folder(config.model)
    processor = load_processor(folder, num_crops=config.num_crops)
    dataset = ConversationDataset(config.data, config.image_dir)
    summary = check_dataset(
        dataset,
        SampleEncoder(processor),
        on_bad_sample=config.on_bad_sample,
        decode_images=True,
        progress=config.progress,
    )
    check_labels(dataset, processor, scoring=config.scoring, labels=config.labels, limit=config.limit)
    model = load_model(
        folder,
        dtype=DTYPE_NAMES[precision],
        rope_mode=config.rope_mode,
        device=device,
    )
    settings = EvalSettings(
        metric=config.metric,
        scoring=config.scoring,
        labels=config.labels,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        limit=config.limit,
        seed=config.seed,
        progress=config.progress,
    )
    with _told_of(output):
        # Without a buffer, which closing would write again where the disk was full.
        answered = (output / "predictions.jsonl").open("wb", buffering=0)

    def keep(row: dict[str, Any]) -> None:
        with _told_of(output):
            answered.write(json_line(row))

    with answered:
        result = evaluate_model(model, processor, dataset, settings, keep=keep)
    with _told_of(output):
        write_json_lines(output / "predictions.jsonl", result.rows)
        write_json(output / "eval.json", {"scoring": config.scoring, **result.to_dict(), "skipped": summary.skipped})
    return result


@contextmanager
def _told_of(output: Path) -> Iterator[None]:
    """Turns an error of writing the output folder into one that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output_dir {output}: cannot be written ({error.strerror or error}); make room there, or give another one"
        ) from error
