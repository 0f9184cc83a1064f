"""A run's samples, checked once: a later start of the same run takes over what the first one found out."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from phi3v import __version__
from phi3v.config import TrainConfig
from phi3v.data.check import check_dataset
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.packing import (
    Budget,
    CostRecorder,
    Packing,
    SampleCosts,
    Saving,
    plan_window,
    saving_of,
    stem_groups,
)
from phi3v.eval.questions import check_labels
from phi3v.files import write_atomically, write_json
from phi3v.model.checkpoint import load_config
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.batches import Windows
from phi3v.train.order import StemsTogether

logger = logging.getLogger(__name__)

COSTS_FILE = "data-costs.npz"
"""What every training sample costs, beside the findings."""

SHARED_QUESTIONS = 8
"""Samples with one beginning that are trained side by side where ``shared_questions`` leaves it open. Twice as many
would save a sixteenth of the beginnings more, and make an optimizer step see fewer different images."""

LEAST_SAVING = 0.1
"""Share of the positions that sharing must save to be chosen: it keeps questions about an image in one step."""

PLANNED_SAMPLES = 4096
"""Samples of an epoch that are planned to see what sharing saves: a quarter of a second, at every start."""


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Samples that training and evaluation can use without a surprise.

    Attributes:
        train: training samples; bad and over-long ones are left out as the configuration says.
        eval: evaluation samples, or None.
        encoder: encodes the training samples.
        costs: of the training samples.
        shared_questions: most samples that are trained side by side where they begin alike.
        num_ranks: processes that share each step.
        summaries: what the check found, by split: the content of ``data.json``.
    """

    train: ConversationDataset
    eval: ConversationDataset | None
    encoder: SampleEncoder
    costs: SampleCosts
    shared_questions: int
    num_ranks: int
    summaries: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which samples are trained side by side, so that what they begin with is computed once.

    Attributes:
        shared_questions: most samples of a group; 1: nothing is shared.
        group_of: (n,) number of the training samples that begin alike, as ``stem_groups`` gives it.
        saving: in an epoch of every sample once.
    """

    shared_questions: int
    group_of: np.ndarray
    saving: Saving


def check_data(
    config: TrainConfig,
    processor: Phi3VProcessor,
    record: Path,
    args: TrainingArguments,
    kept_sharing: int | None = None,
) -> CheckedData:
    """Opens and checks the run's samples.

    The first process checks, and tells the others which samples stay out and what the others cost. A later start with
    the same samples and settings takes the findings from ``record`` and opens no image.

    Args:
        config: data files and what to do about bad samples.
        processor: gives the lengths.
        record: JSON file for the findings; ``COSTS_FILE`` lies beside it.
        args: says which process this is.
        kept_sharing: what ``shared_questions`` came to in the run that goes on; None: chosen anew. The first process's
            counts.

    Raises:
        ConfigError: ``config.eval_labels`` is no closed set of answers.
        DataError: a sample cannot be used and may not be left out, or a question lacks the labels of its scoring.
    """
    model = load_config(config.model)
    encoder = SampleEncoder(
        processor,
        max_length=config.max_length,
        max_positions=model.max_position_embeddings,
        on_overlong=config.on_overlong,
    )
    train = ConversationDataset(config.train_data, config.image_dir)
    evaluation = ConversationDataset(config.eval_data, config.image_dir) if config.eval_data else None
    findings: list[Any] = [{}, b"", 1]
    if args.process_index == 0:
        record.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        costs_file = record.with_name(COSTS_FILE)
        known_costs = costs_file.read_bytes() if costs_file.is_file() else b""
        found_train, costs = _check_train(train, encoder, config, known.get("train"), known_costs)
        found = {"train": found_train}
        if evaluation is not None:
            found["eval"] = _check_eval(evaluation, SampleEncoder(processor), config, known.get("eval"))
        if costs != known_costs:
            write_atomically(costs_file, costs)
        if found != known:
            write_json(record, found)
        shared_questions = config.shared_questions or kept_sharing
        if shared_questions is None:
            shared_questions = _choose_sharing(
                config, SampleCosts.from_bytes(costs), model.original_max_position_embeddings, args.world_size
            )
        findings = [found, costs, shared_questions]
    if args.world_size > 1:
        broadcast_object_list(findings)
    found, costs, shared_questions = findings
    train.leave_out(found["train"]["left_out"])
    if evaluation is not None:
        evaluation.leave_out(found["eval"]["left_out"])
    if evaluation is not None:
        check_labels(
            evaluation, processor, scoring=config.eval_scoring, labels=config.eval_labels, limit=config.eval_limit
        )
    return CheckedData(
        train,
        evaluation,
        encoder,
        SampleCosts.from_bytes(costs),
        shared_questions,
        args.world_size,
        {
            name: {**found[name]["summary"], "image_dirs": dataset.image_dirs}
            for name, dataset in (("train", train), ("eval", evaluation))
            if dataset is not None
        },
    )


def choose_sharing(config: TrainConfig, data: CheckedData, short_positions: int) -> Sharing:
    """Finds what the samples that are trained side by side save; notes it in the log and in ``summaries``.

    Args:
        config: says what a step draws, and what is computed at once as far as the user sets it.
        data: checked samples.
        short_positions: longest sequence that the short LongRoPE factors reach.
    """
    group_of = stem_groups(data.costs, short_positions)
    most = data.shared_questions
    is_planned = config.sampling == "shuffle"
    saving = (
        planned_saving(config, data.costs, group_of, most, short_positions, data.num_ranks)
        if is_planned
        else saving_of(data.costs, group_of, most)
    )
    data.summaries["train"]["sharing"] = {
        "shared_questions": most,
        "tokens": saving.tokens,
        "crops": saving.crops,
        "computed_tokens": saving.shared_tokens if is_planned else None,
        "computed_crops": saving.shared_crops if is_planned else None,
    }
    if most == 1:
        why = ": too few that begin with the same images are computed at once"
        logger.info("Samples share nothing%s.", "" if config.shared_questions else why)
    elif is_planned:
        logger.info(
            "Up to %d samples that begin with the same images share that beginning: an epoch computes %s%d of %d "
            "decoder positions (%.0f %% less) and %d of %d crops.",
            most, "" if saving.is_exact else "about ", saving.shared_tokens, saving.tokens, 100 * saving.token_share,
            saving.shared_crops, saving.crops,
        )  # fmt: skip
    else:
        logger.info("Up to %d samples share their beginning where a step draws several on the same images.", most)
    return Sharing(most, group_of, saving)


def planned_saving(
    config: TrainConfig, costs: SampleCosts, group_of: np.ndarray, most: int, short_positions: int, num_ranks: int
) -> Saving:
    """Returns what groups of at most ``most`` samples save in the steps of a shuffled epoch.

    The first steps are planned as training plans them, ``PLANNED_SAMPLES`` samples of them, and stand for the others.
    Of the budgets those count that the configuration sets: what memory allows is chosen later, knowing the saving.

    Args:
        config: batch size, budgets and seed.
        costs: of the training samples.
        group_of: (n,) as ``stem_groups`` returns it.
        most: samples of a group.
        short_positions: longest sequence that the short LongRoPE factors reach.
        num_ranks: processes that share each step.
    """
    whole = saving_of(costs, group_of, 1)
    if most == 1:
        return whole
    packing = Packing(
        Budget(config.micro_batch_tokens, config.micro_batch_crops, config.micro_batch_size),
        shared_questions=most,
        short_positions=short_positions,
        num_ranks=num_ranks,
    )
    order = StemsTogether(group_of, most=most, seed=config.seed)
    windows = Windows(order, costs, batch_size=config.batch_size, packing=packing)
    num_steps = min(len(windows), -(-PLANNED_SAMPLES // config.batch_size))
    tokens = crops = shared_tokens = shared_crops = 0
    for step in range(num_steps):
        window = windows.window(step)
        tokens += int(costs.tokens[window].sum())
        crops += int(costs.crops[window].sum())
        for batch in (batch for rank in plan_window(costs, window, packing) for batch in rank if batch.counts):
            shared_tokens += batch.load.tokens
            shared_crops += batch.load.crops
    return whole._replace(
        shared_tokens=round(whole.tokens * shared_tokens / tokens),
        shared_crops=round(whole.crops * shared_crops / crops) if crops else 0,
        is_exact=num_steps == len(windows),
    )


def _choose_sharing(config: TrainConfig, costs: SampleCosts, short_positions: int, num_ranks: int) -> int:
    group_of = stem_groups(costs, short_positions)
    saving = saving_of(costs, group_of, SHARED_QUESTIONS)
    if config.sampling == "shuffle" and saving.token_share >= LEAST_SAVING:
        saving = planned_saving(config, costs, group_of, SHARED_QUESTIONS, short_positions, num_ranks)
    return SHARED_QUESTIONS if saving.token_share >= LEAST_SAVING else 1


def _check_train(
    dataset: ConversationDataset,
    encoder: SampleEncoder,
    config: TrainConfig,
    known: dict[str, Any] | None,
    known_costs: bytes,
) -> tuple[dict[str, Any], bytes]:
    """Returns the findings on the training samples and their costs, old ones if they answer the same question."""
    question = _question(dataset, encoder, config)
    if known is not None and known["question"] == question and known.get("costs") == _digest(known_costs):
        return known, known_costs
    recorder = CostRecorder()
    found = _check(dataset, encoder, config, question, recorder)
    costs = recorder.costs().to_bytes()
    return {**found, "costs": _digest(costs)}, costs


def _check_eval(
    dataset: ConversationDataset, encoder: SampleEncoder, config: TrainConfig, known: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the findings on the evaluation samples, old ones if they answer the same question."""
    question = _question(dataset, encoder, config)
    return known if known is not None and known["question"] == question else _check(dataset, encoder, config, question)


def _question(dataset: ConversationDataset, encoder: SampleEncoder, config: TrainConfig) -> dict[str, Any]:
    """Returns what decides the findings."""
    return {
        "phi3v": __version__,
        "processor": _digest_of(encoder.processor),
        "fingerprint": dataset.fingerprint(),
        "image_dir": None if config.image_dir is None else str(config.image_dir.resolve()),
        "max_length": encoder.max_length,
        "max_positions": encoder.max_positions,
        "on_overlong": encoder.on_overlong,
        "on_bad_sample": config.on_bad_sample,
        "check_images": config.check_images,
    }


def _check(
    dataset: ConversationDataset,
    encoder: SampleEncoder,
    config: TrainConfig,
    question: dict[str, Any],
    recorder: CostRecorder | None = None,
) -> dict[str, Any]:
    summary = check_dataset(
        dataset,
        encoder,
        on_bad_sample=config.on_bad_sample,
        decode_images=config.check_images == "decode",
        progress=config.progress,
        recorder=recorder,
    )
    return {
        "question": question,
        "left_out": list(dataset.left_out),
        "summary": {**summary.to_dict(), "fingerprint": question["fingerprint"]},
    }


def _digest_of(processor: Phi3VProcessor) -> str:
    """Returns what is equal for processors that cut images and split text alike."""
    settings = json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
    return _digest(f"{settings}\0{processor.tokenizer.backend_tokenizer.to_str()}".encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
