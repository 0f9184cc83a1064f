"""However processes share the work, the run is one process's, and checkpoints fit every engine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phi3v.runlog import RunDirectory
from training import final_weights, forget_after, largest_difference, make_config, train_in_child, write_shared_data

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")

# Windows of 5, 5 and 3 samples in packs that share images; some are text only, and with two processes the epoch's last
# window leaves one of them a pack without any image. AdamW's large epsilon keeps its updates proportional to the
# gradients, so that rounding in a gradient near zero stays rounding in the weight.
SETTINGS: dict[str, Any] = {
    "batch_size": 5,
    "shared_questions": 4,
    "num_train_epochs": 2,
    "save_steps": 2,
    "keep_checkpoints": 9,
    "adam_epsilon": 1e-3,
    "eval_steps": 3,
    "eval_max_new_tokens": 2,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "frozen_vision": {"method": "frozen_vision"},
    "lora": {"method": "lora", "lora_rank": 4, "learning_rate": 1e-2},
    "dora": {"method": "lora", "lora_rank": 4, "learning_rate": 1e-2, "use_dora": True, "use_rslora": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shared_data(tmp_path_factory.mktemp("engines") / "data")


def settings(data: Path, method: str, **changes: Any) -> dict[str, Any]:
    return {"eval_data": [data / "eval.jsonl"], **SETTINGS, **METHODS[method], **changes}


def run_two_processes(model: Path, data: Path, output_dir: Path, **changes: Any) -> None:
    config = make_config(model, data, output_dir, **changes)
    file = output_dir.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "phi3v"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", str(file)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]


def assert_close(one: Path, other: Path, *, first_step: int = 0) -> None:
    """float32 sums in another order: 3e-6 of the loss, 1e-4 of the gradient's norm, 1e-6 of the weights."""
    left, right = (RunDirectory(path).steps() for path in (one, other))
    assert len(left) == len(right) == 6
    for expected, found in zip(left[first_step:], right[first_step:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=3e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert largest_difference(checkpoint_weights(one), checkpoint_weights(other)) < 1e-6
    assert largest_difference(final_weights(one), final_weights(other)) < 1e-6
    scores = [
        [(line["step"], line["when"], line["score"]) for line in RunDirectory(run).evals()] for run in (one, other)
    ]
    assert scores[0] == scores[1]


def checkpoint_weights(run: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's float32 weights: they must not have gone through 16 bit."""
    folder = run / "checkpoints" / "checkpoint-6"
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    return weights


@pytest.mark.parametrize(
    "parallel", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))]
)
def test_one_process_needs_no_launcher(parallel: str, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    if parallel.startswith("zero"):
        pytest.importorskip("deepspeed")
    alone = make_config(tiny_dir, data, tmp_path / "alone", **settings(data, "full"))
    assert train_in_child(alone) == 0
    shared = make_config(tiny_dir, data, tmp_path / parallel, **settings(data, "full", parallel=parallel))
    assert train_in_child(shared) == 0
    assert_close(tmp_path / "alone", tmp_path / parallel)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    alone = make_config(tiny_dir, data, tmp_path / "alone", **settings(data, method))
    assert train_in_child(alone) == 0
    for parallel in ENGINES:
        run_two_processes(tiny_dir, data, tmp_path / parallel, **settings(data, method, parallel=parallel))
        assert_close(tmp_path / "alone", tmp_path / parallel)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp2", "zero3"])
def test_scores_leave_no_trace(parallel: str, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """A whole model is put together for each score; dropout draws what it would have drawn."""
    pytest.importorskip("deepspeed")
    dropout = {"lora_dropout": 0.5, "parallel": parallel}
    for name, changes in (("scored", {"eval_steps": 1, "keep_best": False}), ("plain", {"eval_steps": None})):
        config = make_config(tiny_dir, data, tmp_path / name, **settings(data, "lora", **dropout, **changes))
        assert train_in_child(config) == 0
    losses = [[line["loss"] for line in RunDirectory(tmp_path / name).steps()] for name in ("scored", "plain")]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp2", "zero2"])
def test_bf16_differs_by_its_rounding(parallel: str, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """1e-3 of the loss; masters stay float32, and move as they do alone but for a fifth."""
    pytest.importorskip("deepspeed")
    alone = make_config(tiny_dir, data, tmp_path / "alone", **settings(data, "full", precision="bf16"))
    assert train_in_child(alone) == 0
    run_two_processes(tiny_dir, data, tmp_path / "two", **settings(data, "full", precision="bf16", parallel=parallel))
    left, right = (RunDirectory(tmp_path / name).steps() for name in ("alone", "two"))
    assert [line["loss"] for line in right] == pytest.approx([line["loss"] for line in left], rel=1e-3)
    base = load_file(tiny_dir / "model.safetensors")
    moved = [
        torch.cat([(checkpoint_weights(tmp_path / name)[key] - base[key]).flatten() for key in sorted(base)])
        for name in ("alone", "two")
    ]
    assert (moved[1] - moved[0]).norm() < 0.2 * moved[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpoints_fit_every_engine_and_number_of_processes(
    method: str, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    """Two processes under ZeRO-3 to step 2, two under FSDP2 to step 4, one alone to the end: the undisturbed run's."""
    pytest.importorskip("deepspeed")
    alone = make_config(tiny_dir, data, tmp_path / "alone", **settings(data, method))
    assert train_in_child(alone) == 0
    run = tmp_path / "run"
    run_two_processes(tiny_dir, data, run, **settings(data, method, parallel="zero3"))
    forget_after(run, 2)
    run_two_processes(tiny_dir, data, run, **settings(data, method, parallel="fsdp2"))
    forget_after(run, 4)
    assert train_in_child(make_config(tiny_dir, data, run, **settings(data, method))) == 0
    assert_close(tmp_path / "alone", run)
    forget_after(run, 4)
    run_two_processes(tiny_dir, data, run, **settings(data, method, parallel="zero2"))
    assert_close(tmp_path / "alone", run)
