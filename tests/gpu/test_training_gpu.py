"""Training on a GPU: every precision and method learns like float32 on the CPU, and goes on after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.model.checkpoint import load_four_bit_model
from phi3v.runlog import RunDirectory
from phi3v.train.run import run_training
from phi3v.train.trainer import Phi3VTrainer
from training import final_weights, make_config, write_training_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference of a loss from float32's on the CPU: the format's rounding."""

LAST_STEP = 18
"""Six epochs: fp16's loss scale starts too high for this model, and the first steps are skipped until it fits."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("gpu") / "data")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunDirectory(run).steps()]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training(
    precision: str,
    method: str,
    request: pytest.FixtureRequest,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    base = request.getfixturevalue("wide_dir" if method == "qlora" else "tiny_dir")
    settings: dict[str, Any] = {
        "method": method,
        "checkpointing": "full",
        "shared_questions": None,
        "eval_data": [data / "eval.jsonl"],
        "num_train_epochs": 6,
        "eval_steps": 9,
        "eval_max_new_tokens": 2,
        "num_workers": 2,
        **({} if method == "full" else {"lora_rank": 2}),
    }
    reference = run_training(make_config(base, data, tmp_path / "cpu", **{**settings, "max_steps": 2}))
    on_gpu = {**settings, "device": "cuda", "precision": precision}
    whole = run_training(make_config(base, data, tmp_path / "whole", **on_gpu))
    num_comparable = 1 if precision == "fp16" else 2
    expected = pytest.approx(losses(reference)[:num_comparable], rel=TOLERANCE[precision])
    assert losses(whole)[:num_comparable] == expected
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    assert {tensor.dtype for tensor in final_weights(whole).values()} == {torch.float32}
    environment = RunDirectory(whole).environment()
    assert environment is not None and environment["gpus"]
    state = json.loads(
        (whole / "checkpoints" / f"checkpoint-{LAST_STEP}" / "training" / "state.json").read_text("utf-8")
    )
    assert bool(state["loss_scale"]) == (precision == "fp16")

    calls = iter(range(100))
    micro_step = Phi3VTrainer.micro_step

    def stop_in_step_four(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return micro_step(*args, **kwargs)

    stopped = make_config(base, data, tmp_path / "stopped", **on_gpu)
    monkeypatch.setattr(Phi3VTrainer, "micro_step", stop_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        run_training(stopped)
    monkeypatch.undo()
    run_training(stopped)
    assert losses(tmp_path / "stopped") == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-2), ("bfloat16", 5e-2), ("float16", 5e-2)])
@torch.no_grad()
def test_a_decoder_in_4_bit_is_that_of_the_cpu(dtype: str, tolerance: float, wide_dir: Path) -> None:
    """A number in the middle between two of the 16 values may go to either side: half precisions have many of them."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    on_cpu, on_gpu = (load_four_bit_model(wide_dir, dtype=dtype, device=device) for device in ("cpu", "cuda:0"))
    assert {parameter.device.type for parameter in on_gpu.parameters()} == {"cuda"}
    layers = [name for name, module in on_gpu.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 4
    for name in layers:
        here, there = on_cpu.get_submodule(name), on_gpu.get_submodule(name)
        identity = torch.eye(here.in_features, dtype=here.compute_dtype)
        expected, found = here(identity).float(), there(identity.cuda()).float().cpu()
        assert (found - expected).norm() < tolerance * expected.norm(), name
