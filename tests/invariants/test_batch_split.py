"""However work is split - micro-batches, accumulation, processes - losses, gradients, weights and scores are equal."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import RunDirectory
from phi3v.train.order import Shuffled
from phi3v.train.run import run_training
from training import alone, final_weights, largest_difference, make_config, write_training_data

WEIGHTINGS = ("sample_mean", "token_mean")
SPLITS = (8, 1, 2)
"""Micro-batch sizes of a window of 8: 1x8, 8x1, 4x2."""

# Windows of 8 and 3 samples. AdamW's large epsilon keeps its updates proportional to the gradients, so that rounding
# in a gradient near zero stays rounding in the weight.
SETTINGS: dict[str, Any] = {"batch_size": 8, "num_train_epochs": 2, "save_steps": None, "adam_epsilon": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("split") / "data")


@pytest.fixture(scope="module", params=WEIGHTINGS)
def runs(request: pytest.FixtureRequest, tiny_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A weighting, and the run directories of all splits under it."""
    folder = tmp_path_factory.mktemp(request.param)
    configs = [
        make_config(
            tiny_dir, data, folder / str(split), micro_batch_size=split, loss_weighting=request.param, **SETTINGS
        )
        for split in SPLITS
    ]
    return request.param, [run_training(config) for config in configs]


def test_losses_gradients_and_weights_are_equal(runs: Any) -> None:
    _, (first, *others) = runs
    for other in others:
        assert_close_runs(first, other)


def test_loss_is_the_plain_mean(runs: Any, tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, data: Path) -> None:
    """The first step's loss against the model's own loss, sample by sample."""
    weighting, (path, *_) = runs
    dataset = ConversationDataset(data / "train.jsonl")
    means, counts = [], []
    for index in range(len(dataset)):
        encoded = SampleEncoder(processor).encode(dataset[index], dataset.load_images(dataset[index]))
        counts.append(int((encoded["labels"] != -100).sum()))
        means.append(tiny_model(**alone(encoded)).loss.item())
    first = Shuffled(len(dataset), seed=0).of(0)[:8].tolist()
    if weighting == "sample_mean":
        expected = sum(means[index] for index in first) / 8
    else:
        expected = sum(means[index] * counts[index] for index in first) / sum(counts[index] for index in first)
    assert RunDirectory(path).steps()[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "eval_limit"), [("full", None), ("lora", 1), ("qlora", None)])
def test_two_processes_equal_one(
    method: str, eval_limit: int | None, wide_dir: Path, data: Path, tmp_path: Path
) -> None:
    """Of one question alone, the second process has none to answer."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    lines = map(json.loads, (data / "eval.jsonl").read_text().splitlines())
    settings = {
        **SETTINGS,
        "batch_size": 10,
        "method": method,
        "eval_data": [data / "eval.jsonl"],
        "eval_max_new_tokens": 2,
        "eval_scoring": "both",
        "eval_labels": [line["conversations"][0]["assistant"] for line in lines],
        "eval_limit": eval_limit,
    }
    one = make_config(wide_dir, data, tmp_path / "one", micro_batch_size=2, **settings)
    run_training(one)
    # The epoch's last window is one sample: the first process takes it, the second has a filler.
    two = make_config(wide_dir, data, tmp_path / "two", micro_batch_size=None, **{**settings, "save_steps": 1})
    (tmp_path / "two.yaml").write_text(two.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"]
    subprocess.run(
        [*command, "-m", "phi3v", "train", str(tmp_path / "two.yaml")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert_close_scores(tmp_path / "one", tmp_path / "two")


def assert_close_scores(one: Path, other: Path) -> None:
    """The same answers before and after training, and the same probabilities but for float32's rounding."""
    runs = [RunDirectory(path) for path in (one, other)]
    assert runs[0].prediction_steps() == runs[1].prediction_steps() == [0, 4]
    for step in (0, 4):
        for left, right in zip(*(run.predictions(step) for run in runs), strict=True):
            assert left.pop("probabilities") == pytest.approx(right.pop("probabilities"), abs=1e-5)
            assert left == right
    for left, right in zip(*(run.evals() for run in runs), strict=True):
        assert {name: left[name] for name in ("step", "when", "score", "low", "high", "n")}.items() <= right.items()
        assert left["classes"]["groups"] == right["classes"]["groups"]


def assert_close_runs(one: Path, other: Path) -> None:
    """float32 sums in another order: 1e-6 of the loss, 1e-5 of the gradient's norm."""
    steps = [RunDirectory(path).steps() for path in (one, other)]
    assert len(steps[0]) == len(steps[1]) == 4
    for left, right in zip(*steps, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-6)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-5)
    assert largest_difference(final_weights(one), final_weights(other)) < 1e-6
