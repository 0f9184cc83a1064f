"""A run's samples, checked once: a later start of the same run takes over what the first one found out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from phi3v.config import TrainConfig
from phi3v.data.dataset import ConversationDataset, check_dataset
from phi3v.data.encode import SampleEncoder
from phi3v.eval.questions import check_labels
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import write_json


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Samples that training and evaluation can use without a surprise.

    Attributes:
        train: training samples; bad and over-long ones are left out as the configuration says.
        eval: evaluation samples, or None.
        encoder: encodes the training samples.
        summaries: what the check found, by split: the content of ``data.json``.
    """

    train: ConversationDataset
    eval: ConversationDataset | None
    encoder: SampleEncoder
    summaries: dict[str, dict[str, Any]]


def check_data(config: TrainConfig, processor: Phi3VProcessor, record: Path, args: TrainingArguments) -> CheckedData:
    """Opens and checks the run's samples.

    The first process checks, and tells the others which samples stay out. A later start with the same samples and
    settings takes the findings from ``record`` and opens no image.

    Args:
        config: data files and what to do about bad samples.
        processor: gives the lengths.
        record: JSON file for the findings.
        args: says which process this is.

    Raises:
        ConfigError: ``config.eval_labels`` is no closed set of answers.
        DataError: a sample cannot be used and may not be left out, or a question lacks the labels of its scoring.
    """
    encoder = SampleEncoder(processor, max_length=config.max_length, on_overlong=config.on_overlong)
    train = ConversationDataset(config.train_data, config.image_dir)
    evaluation = ConversationDataset(config.eval_data, config.image_dir) if config.eval_data else None
    splits = {"train": (train, encoder)}
    if evaluation is not None:
        splits["eval"] = (evaluation, SampleEncoder(processor))
    findings: list[dict[str, Any]] = [{}]
    if args.process_index == 0:
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        findings = [
            {
                name: _check_split(dataset, own_encoder, config, known.get(name))
                for name, (dataset, own_encoder) in splits.items()
            }
        ]
        if findings[0] != known:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, findings[0])
    if args.world_size > 1:
        broadcast_object_list(findings)
    for name, (dataset, _) in splits.items():
        dataset.leave_out(findings[0][name]["left_out"])
    if evaluation is not None:
        check_labels(
            evaluation, processor, scoring=config.eval_scoring, labels=config.eval_labels, limit=config.eval_limit
        )
    return CheckedData(train, evaluation, encoder, {name: found["summary"] for name, found in findings[0].items()})


def _check_split(
    dataset: ConversationDataset,
    encoder: SampleEncoder,
    config: TrainConfig,
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """Returns the findings on one split: those in ``known`` if they answer the same question, else new ones."""
    question = {
        "fingerprint": dataset.fingerprint(),
        "image_dir": None if config.image_dir is None else str(config.image_dir.resolve()),
        "num_crops": encoder.processor.num_crops,
        "max_length": encoder.max_length,
        "on_overlong": encoder.on_overlong,
        "on_bad_sample": config.on_bad_sample,
        "check_images": config.check_images,
    }
    if known is not None and known["question"] == question:
        return known
    summary = check_dataset(
        dataset,
        encoder,
        on_bad_sample=config.on_bad_sample,
        decode_images=config.check_images == "decode",
        progress=config.progress,
    )
    return {
        "question": question,
        "left_out": list(dataset.left_out),
        "summary": {**summary.to_dict(), "fingerprint": question["fingerprint"]},
    }
