"""What a model says to real samples: logits at the answers' positions, and greedy answers.

As a program (``python -m phi3v.export.readings REQUEST.json``) it reads a folder in a process that knows nothing but
the folder and the samples: what the writing process still holds in memory cannot help a file that is wrong.
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..data.dataset import ConversationDataset
from ..data.encode import Encoded, SampleEncoder
from ..data.schema import SampleError
from ..errors import CheckpointError
from ..eval.engine import Engine
from ..eval.generate import prompt_of
from ..eval.prompts import Prompt
from ..model.checkpoint import load_model, load_processor
from ..model.processing_phi3_v import Phi3VProcessor

logger = logging.getLogger(__name__)

MOST_POSITIONS = 128
"""Answer tokens of one sample whose logits are compared, from the first: 16 MB in float32 at 32,064 tokens."""

GREEDY_TOKENS = 32
"""Longest greedy answer that is compared, tokens."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Which samples both sides read.

    Attributes:
        files: JSONL files.
        image_dir: their image folder, or None for the default.
        positions: of the samples, among all lines.
        skipped: why samples that were tried before these could not be used.
    """

    files: tuple[Path, ...]
    image_dir: Path | None
    positions: tuple[int, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSample:
    """One sample, ready for a model.

    Attributes:
        id: the sample's id.
        batch: arguments of a forward pass of one row, whose logits are those that predict an answer token.
        prompt: its last question.
        question: the same, as arguments of a forward pass.
        digest: SHA-256 of ids and pixels.
    """

    id: str
    batch: dict[str, torch.Tensor]
    prompt: Prompt
    question: dict[str, torch.Tensor]
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """What a model says to some samples.

    Attributes:
        logits: (positions of all samples, vocab_size) float32, on the CPU.
        greedy: each sample's greedy answer, tokens without the one that stops it.
        digests: each sample's, of what the model was given.
    """

    logits: torch.Tensor
    greedy: list[list[int]]
    digests: list[str] = field(default_factory=list)


def choose_samples(
    processor: Phi3VProcessor, files: Sequence[Path], image_dir: Path | None, num_samples: int
) -> Samples:
    """Chooses samples that can be read, spread evenly over the data.

    A sample that cannot be used makes room for another and is named in the log.

    Raises:
        DataError: a file is missing, or no sample can be used.
    """
    dataset = ConversationDataset(list(files), image_dir)
    wanted = min(num_samples, len(dataset))
    spread = {number * len(dataset) // wanted for number in range(wanted)}
    encoder = SampleEncoder(processor)
    chosen: list[int] = []
    skipped: list[str] = []
    first_error: SampleError | None = None
    for position in chain(sorted(spread), (other for other in range(len(dataset)) if other not in spread)):
        if len(chosen) == wanted:
            break
        try:
            _encode(encoder, dataset, position)
        except SampleError as error:
            first_error = first_error or error
            skipped.append(str(error))
            logger.warning("A sample is left out of the comparison: %s", error)
            continue
        chosen.append(position)
    if not chosen and first_error is not None:
        raise first_error
    return Samples(tuple(files), image_dir, tuple(sorted(chosen)), tuple(skipped))


def encode_samples(processor: Phi3VProcessor, samples: Samples) -> list[EncodedSample]:
    """Encodes samples with a model's processor, one a batch."""
    dataset = ConversationDataset(list(samples.files), samples.image_dir)
    encoder = SampleEncoder(processor)
    return [_encode(encoder, dataset, position) for position in samples.positions]


def _encode(encoder: SampleEncoder, dataset: ConversationDataset, position: int) -> EncodedSample:
    sample = dataset[position]
    images = dataset.load_images(sample)
    encoded = _tensors(encoder.encode(sample, images))
    labels = encoded.pop("labels")
    predicting = (labels[1:] != -100).nonzero()[:MOST_POSITIONS, 0]
    asked = encoder.encode_prompt(sample, images, turn=len(sample.turns) - 1)
    question = _tensors(asked)
    digest = hashlib.sha256()
    for name, tensor in sorted(encoded.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return EncodedSample(
        id=sample.id,
        batch={**encoded, "input_ids": encoded["input_ids"][None], "logits_to_keep": predicting},
        prompt=prompt_of(asked, encoder.processor.image_processor.crop_px, name=digest.hexdigest()),
        question={**question, "input_ids": question["input_ids"][None]},
        digest=digest.hexdigest(),
    )


def _tensors(encoded: Encoded) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in encoded.items() if isinstance(tensor, torch.Tensor)}


def read_model(model: Any, processor: Phi3VProcessor, encoded: Sequence[EncodedSample]) -> Readings:
    """Returns what a model says to encoded samples."""
    return Readings(
        logits_of(model, encoded), greedy_answers(model, processor, encoded), [one.digest for one in encoded]
    )


@torch.inference_mode()
def logits_of(model: Any, encoded: Sequence[EncodedSample]) -> torch.Tensor:
    """Returns the logits that predict answer tokens: (positions of all samples, vocab_size) float32."""
    return torch.cat([_forward(model, one.batch) for one in encoded])


def greedy_answers(
    model: Any, processor: Phi3VProcessor, encoded: Sequence[EncodedSample], max_new_tokens: int = GREEDY_TOKENS
) -> list[list[int]]:
    """Returns the greedy answer to each sample's last question, tokens without the one that stops it."""
    engine = Engine(model, stop_token_ids=processor.stop_token_ids, max_new_tokens=max_new_tokens)
    answers = engine.answer(engine.group([one.prompt for one in encoded]))
    return [list(answers[one.prompt].tokens) for one in encoded]


@torch.inference_mode()
def logits_along(model: Any, encoded: Sequence[EncodedSample], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Returns the logits behind a question and behind each token of an answer: (tokens + 1, vocab_size) a sample."""
    rows = []
    for one, answer in zip(encoded, answers, strict=True):
        question = one.question["input_ids"]
        ids = torch.cat([question, torch.tensor([list(answer)], dtype=torch.int64)], dim=1)
        positions = torch.arange(question.shape[1] - 1, ids.shape[1])
        rows.append(_forward(model, {**one.question, "input_ids": ids, "logits_to_keep": positions}))
    return rows


def _forward(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items()}).logits[0].float().cpu()


def read_folder(folder: Path, samples: Samples, device: str) -> Readings:
    """Loads a model folder with its own processor and reads it, computing in float32."""
    processor = load_processor(folder)
    model = load_model(folder, dtype="float32", device=device)
    return read_model(model, processor, encode_samples(processor, samples))


def read_in_fresh_process(folder: Path, samples: Samples, device: str) -> Readings:
    """Does ``read_folder`` in a new Python process.

    Raises:
        CheckpointError: that process failed; its last lines are told.
    """
    with tempfile.TemporaryDirectory(prefix="phi3v-reading-") as name:
        exchange = Path(name)
        request = {
            "folder": str(folder.resolve()),
            "files": [str(file.resolve()) for file in samples.files],
            "image_dir": str(samples.image_dir.resolve()) if samples.image_dir else None,
            "positions": samples.positions,
            "device": device,
        }
        (exchange / "request.json").write_text(json.dumps(request), "utf-8")
        command = [sys.executable, "-m", "phi3v.export.readings", str(exchange / "request.json")]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            last_lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
            raise CheckpointError(f"{folder}: cannot be read in a fresh process:\n{last_lines}")
        answer = json.loads((exchange / "answer.json").read_text("utf-8"))
        logits = load_file(exchange / "logits.safetensors")["logits"]
    return Readings(logits, answer["greedy"], answer["digests"])


def main(request_file: Path) -> None:
    """Answers a request of ``read_in_fresh_process``: writes ``answer.json`` and ``logits.safetensors`` beside it."""
    request = json.loads(request_file.read_text("utf-8"))
    samples = Samples(
        files=tuple(Path(file) for file in request["files"]),
        image_dir=Path(request["image_dir"]) if request["image_dir"] else None,
        positions=tuple(request["positions"]),
    )
    readings = read_folder(Path(request["folder"]), samples, request["device"])
    save_file({"logits": readings.logits}, request_file.with_name("logits.safetensors"))
    answer = {"greedy": readings.greedy, "digests": readings.digests}
    request_file.with_name("answer.json").write_text(json.dumps(answer), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
