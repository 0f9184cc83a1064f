"""A model, a data set and a metric: a score with its interval, and every prediction."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import EvalConfig
from ..data.dataset import ConversationDataset, check_dataset
from ..data.encode import SampleEncoder
from ..errors import ConfigError
from ..model.checkpoint import load_model, load_processor
from ..model.placement import DTYPE_NAMES, resolve_device, resolve_precision
from ..model.processing_phi3_v import Phi3VProcessor
from ..runlog import write_json, write_json_lines
from .generate import generate_predictions
from .metrics import Score, score_predictions


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        score: mean over the questions with its bootstrap interval.
        rows: one a question, as written to predictions files.
        seconds: wall time of generation and scoring.
    """

    score: Score
    rows: list[dict[str, Any]]
    seconds: float


def evaluate_model(
    model: Any,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    *,
    metric: str,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EvalResult:
    """Generates an answer to every question and scores them; arguments as in ``generate_predictions``.

    Draws no random numbers from torch, numpy or Python, so that it can stand in the middle of a training run.
    """
    started = time.monotonic()
    predictions = generate_predictions(
        model,
        processor,
        dataset,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
        progress=progress,
    )
    score, values = score_predictions(
        metric, [one.prediction for one in predictions], [one.answers for one in predictions], seed=seed
    )
    rows = [{**asdict(one), "score": value} for one, value in zip(predictions, values, strict=True)]
    return EvalResult(score, rows, time.monotonic() - started)


def run_evaluation(config: EvalConfig) -> EvalResult:
    """Does what ``phi3v eval`` says: writes ``eval.json``, ``predictions.jsonl`` and ``config.yaml``.

    Raises:
        ConfigError: the output folder already holds an evaluation.
        DataError: bad samples, before the model is loaded.
        CheckpointError: no model at that path.
    """
    output = Path(config.output_dir)
    if (output / "eval.json").exists():
        raise ConfigError(f"{output} already holds an evaluation (eval.json); give another output_dir")
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    processor = load_processor(config.model, num_crops=config.num_crops)
    dataset = ConversationDataset(config.data, config.image_dir)
    summary = check_dataset(dataset, SampleEncoder(processor), on_bad_sample=config.on_bad_sample, decode_images=True)
    model = load_model(
        config.model,
        dtype=DTYPE_NAMES[precision],
        attention=config.attention,
        rope_mode=config.rope_mode,
        device=device,
    )
    result = evaluate_model(
        model,
        processor,
        dataset,
        metric=config.metric,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        limit=config.limit,
        seed=config.seed,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json_lines(output / "predictions.jsonl", result.rows)
    (output / "config.yaml").write_text(config.to_yaml(), "utf-8")
    scores = {**asdict(result.score), "seconds": result.seconds, "skipped": summary.skipped}
    write_json(output / "eval.json", scores)
    return result
