"""Samples packed into one row, their beginnings shared or not, train as each of them alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from phi3v.data.check import check_dataset
from phi3v.data.collate import LossWeighting, PackCollator
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.packing import Budget, CostRecorder, MicroBatch, Packing, load_of, plan_window
from phi3v.model import packed
from phi3v.model.checkpoint import load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import RunDirectory
from phi3v.train.batches import TrainingSamples
from phi3v.train.run import run_training
from phi3v.train.tuning import select_trainable, wrap_lora
from training import TOKENS_PER_SIDE, alone, final_weights, largest_difference, make_config, write_shared_data

SHORT_POSITIONS = 90
"""LongRoPE's short factors reach this far in the model of these tests: some samples are longer."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text only, one image, several, several turns, several questions on one image and on two, short and long."""
    return write_shared_data(tmp_path_factory.mktemp("packing") / "data")


@pytest.fixture(scope="module")
def short_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a near end of LongRoPE's short factors."""
    folder = tmp_path_factory.mktemp("short") / "model"
    folder.mkdir()
    for file in tiny_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    settings["original_max_position_embeddings"] = SHORT_POSITIONS
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


class Window:
    """A window of all samples: packed under a budget, and one by one.

    Args:
        data: its folder.
        processor: encodes.
        weighting: of the loss.
    """

    def __init__(self, data: Path, processor: Phi3VProcessor, weighting: LossWeighting) -> None:
        dataset, encoder = ConversationDataset(data / "train.jsonl"), SampleEncoder(processor)
        recorder = CostRecorder()
        check_dataset(dataset, encoder, progress=False, recorder=recorder)
        self.costs = recorder.costs()
        collator = PackCollator(
            processor.image_token_id,
            tokens_per_side=TOKENS_PER_SIDE,
            short_positions=SHORT_POSITIONS,
            loss_weighting=weighting,
        )
        self.samples = TrainingSamples(dataset, encoder, collator)
        self.encoded = [encoder.encode(sample, dataset.load_images(sample)) for sample in dataset]
        self.weighting = weighting

    def packed(self, budget: Budget, shared_questions: int) -> list[PackedBatch]:
        """Returns the micro-batches."""
        packing = Packing(budget, shared_questions, SHORT_POSITIONS)
        (batches,) = plan_window(self.costs, range(len(self.costs)), packing)
        return [self.samples[batch] for batch in batches]

    def loss_alone(self, model: Any) -> torch.Tensor:
        """Adds up the plain losses of all samples, each through the padded forward, and runs them backward."""
        total = torch.zeros(())
        for encoded in self.encoded:
            loss = model(**alone(encoded)).loss
            if self.weighting == "token_mean":
                loss = loss * (encoded["labels"] != -100).sum()
            loss.backward()
            total += loss.detach()
        return total


def loss_packed(model: Any, batches: list[PackedBatch]) -> torch.Tensor:
    """Adds up the losses of the micro-batches, and runs them backward."""
    total = torch.zeros(())
    for batch in batches:
        loss = model(packed=batch).loss
        loss.backward()
        total += loss.detach()
    return total


def prepared(folder: Path, method: str) -> Phi3VForCausalLM | PeftModel:
    model = load_model(folder)
    assert isinstance(model, Phi3VForCausalLM)
    config = make_config(
        folder, folder, folder / "run", method=method, **({"lora_rank": 4, "lora_alpha": 4} if method == "lora" else {})
    )
    select_trainable(model, config)
    if method != "lora":
        return model.train()
    torch.manual_seed(0)
    wrapped = wrap_lora(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped.train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Takes the gradients out of a model."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name], parameter.grad = parameter.grad, None
    return found


def largest_relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Compares tensors of the same names by the norm of their difference.

    The bias of CLIP's keys has no effect, softmax being what it is: its gradient is rounding and nothing else.
    """
    assert left.keys() == right.keys()
    return max(
        float((left[name] - right[name]).norm() / right[name].norm()) for name in left if "k_proj.bias" not in name
    )


PACKINGS = {
    "one by one": (Budget(samples=1), 1),
    "packed": (Budget(tokens=300), 1),
    "all in one row": (Budget(), 1),
    "shared": (Budget(tokens=300), 3),
    "shared in one row": (Budget(), 8),
}


@pytest.mark.parametrize("weighting", ["sample_mean", "token_mean"])
@pytest.mark.parametrize("method", ["full", "frozen_vision", "lora"])
def test_losses_and_gradients_are_those_of_the_samples_alone(
    method: str, weighting: LossWeighting, short_dir: Path, processor: Phi3VProcessor, data: Path
) -> None:
    """float32: 1e-6 of the loss, 1e-5 of every tensor's gradient."""
    window = Window(data, processor, weighting)
    lengths = [len(encoded["input_ids"]) for encoded in window.encoded]
    assert min(lengths) < SHORT_POSITIONS < max(lengths)
    model = prepared(short_dir, method)
    expected = window.loss_alone(model)
    expected_gradients = gradients(model)
    for name, (budget, shared_questions) in PACKINGS.items():
        batches = window.packed(budget, shared_questions)
        assert any(batch.layout.stems for batch in batches) == (shared_questions > 1)
        assert sum(batch.num_samples for batch in batches) == len(lengths)
        loss = loss_packed(model, batches)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), name
        assert largest_relative_difference(gradients(model), expected_gradients) < 1e-5, name


def test_filled_up_lengths_change_nothing(
    short_dir: Path, processor: Phi3VProcessor, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU whose attention wants pieces of one length, however much filling that takes."""
    monkeypatch.setattr(packed, "MOST_ALIGNING_SHARE", 100)
    window = Window(data, processor, "sample_mean")
    model = prepared(short_dir, "full")
    expected = window.loss_alone(model)
    expected_gradients = gradients(model)
    window.samples.collator.alignment = 16
    batches = window.packed(Budget(tokens=300), 3)
    lengths = {length for batch in batches for length in batch.layout.wholes}
    assert all(length % 16 == 0 for length in lengths) and any(len(set(b.layout.wholes)) == 1 for b in batches)
    assert loss_packed(model, batches).item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_relative_difference(gradients(model), expected_gradients) < 1e-5


def test_bf16_gradients_agree_as_far_as_bf16_does(short_dir: Path, processor: Phi3VProcessor, data: Path) -> None:
    """Under autocast, packed and shared lies no farther from float32 than one by one does, give or take a half.

    Loss: 1 %. Gradients: a few percent of each tensor's norm in both.
    """
    window = Window(data, processor, "sample_mean")
    model = prepared(short_dir, "full")
    exact = window.loss_alone(model)
    exact_gradients = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone_loss = window.loss_alone(model)
        alone_gradients = gradients(model)
        packed_loss = loss_packed(model, window.packed(Budget(), 8))
    packed_gradients = gradients(model)
    assert alone_loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert packed_loss.item() == pytest.approx(exact.item(), rel=0.01)
    assert largest_relative_difference(alone_gradients, exact_gradients) < 0.1
    for name, gradient in exact_gradients.items():
        away = float((alone_gradients[name] - gradient).norm())
        assert float((packed_gradients[name] - gradient).norm()) < 1.5 * away + 0.005 * float(gradient.norm()), name


def test_no_sample_sees_another(short_dir: Path, processor: Phi3VProcessor, data: Path) -> None:
    """Changing one sample of a row changes no other one's logits: what reaches the changed positions is their own."""
    window = Window(data, processor, "token_mean")
    model = prepared(short_dir, "full").eval()
    (batch,) = window.packed(Budget(), 8)
    starts = batch.layout.starts
    for piece in range(len(batch.layout.pieces)):
        own = (batch.target_positions >= starts[piece]) & (batch.target_positions < starts[piece + 1])
        if piece < len(batch.layout.stems):
            continue
        weights, ids = batch.target_weights.clone(), batch.input_ids.clone()
        batch.target_weights[own] = 0
        with torch.no_grad():
            before = model(packed=batch).loss
            batch.input_ids[starts[piece] : starts[piece + 1]] = 5
            assert torch.equal(model(packed=batch).loss, before), piece
        batch.target_weights, batch.input_ids = weights, ids


def test_a_filler_reaches_every_parameter_with_nothing(short_dir: Path, processor: Phi3VProcessor, data: Path) -> None:
    window = Window(data, processor, "sample_mean")
    model = prepared(short_dir, "full")
    index = int(window.costs.crops.argmax())
    batch = window.samples[MicroBatch(((index,),), load_of(window.costs, (index,)), counts=False)]
    loss = model(packed=batch).loss
    loss.backward()
    assert loss == 0 and not any(gradient.any() for gradient in gradients(model).values())


RUNS: dict[str, dict[str, Any]] = {
    "separate": {"micro_batch_size": 1, "shared_questions": 1},
    "packed": {"micro_batch_size": None, "micro_batch_tokens": 300, "shared_questions": 1},
    "one row": {"micro_batch_size": None, "shared_questions": 1},
}


def test_packed_runs_equal_separate_ones(short_dir: Path, data: Path, tmp_path: Path) -> None:
    """Whole runs, optimizer included. float32: 1e-6 of the loss, 1e-5 of the gradient's norm.

    AdamW's large epsilon keeps its updates proportional to the gradients, so that rounding in a gradient near zero
    stays rounding in the weight.
    """
    settings: dict[str, Any] = {"batch_size": 8, "num_train_epochs": 2, "save_steps": None, "adam_epsilon": 1e-3}
    runs = [
        run_training(make_config(short_dir, data, tmp_path / name, **{**settings, **changes}))
        for name, changes in RUNS.items()
    ]
    assert_equal_runs(runs)


def test_shared_runs_equal_separate_ones(short_dir: Path, data: Path, tmp_path: Path) -> None:
    """Sharing decides about the order too; the same order, computed one by one, gives the same run."""
    settings: dict[str, Any] = {"batch_size": 8, "num_train_epochs": 2, "save_steps": None, "adam_epsilon": 1e-3}
    shared, separate = (
        run_training(
            make_config(
                short_dir, data, tmp_path / name, shared_questions=8, micro_batch_size=micro_batch_size, **settings
            )
        )
        for name, micro_batch_size in (("shared", None), ("separate", 1))
    )
    assert_equal_runs([shared, separate])
    saved = [[line["sharing"] for line in RunDirectory(run).steps()] for run in (shared, separate)]
    assert max(saved[0]) > 1.2 and set(saved[1]) == {1.0}


def assert_equal_runs(runs: list[Path]) -> None:
    first, *others = [RunDirectory(run).steps() for run in runs]
    assert len(first) == 4
    for other, run in zip(others, runs[1:], strict=True):
        for left, right in zip(first, other, strict=True):
            assert right["loss"] == pytest.approx(left["loss"], rel=1e-6)
            assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-5)
        assert largest_difference(final_weights(runs[0]), final_weights(run)) < 1e-6
