"""A run on a 4-bit decoder: it learns, leaves the decoder as it was, and its result belongs to the whole base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import phi3v.train.run as run
from phi3v.config import EvalConfig
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import ConfigError
from phi3v.eval.run import run_evaluation
from phi3v.export.merge import merge_and_verify
from phi3v.model.checkpoint import load_four_bit_model, load_model, load_processor
from phi3v.runlog import RunDirectory
from phi3v.train.run import run_training
from training import alone, final_weights, logged, make_config, write_training_data

bitsandbytes = pytest.importorskip("bitsandbytes")

QLORA: dict[str, Any] = {"method": "qlora", "lora_rank": 2, "num_train_epochs": 4}
"""Twelve steps."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("four-bit") / "data")


@pytest.fixture(scope="module")
def scored(wide_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    """A run that generates answers before, during and after training, and its model as training left it."""
    folder = tmp_path_factory.mktemp("four-bit-run")
    scores = {"eval_data": [data / "eval.jsonl"], "eval_steps": 3, "eval_max_new_tokens": 2, "keep_best": False}
    models: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        build = run.build_model
        patch.setattr(run, "build_model", lambda *args: models.append(build(*args)) or models[-1])
        path = run_training(make_config(wide_dir, data, folder / "run", **QLORA, **scores))
    return path, models[0]


@pytest.fixture
def batch(wide_dir: Path, data: Path) -> dict[str, torch.Tensor]:
    """A sample with two images."""
    dataset, processor = ConversationDataset(data / "train.jsonl"), load_processor(wide_dir)
    return alone(SampleEncoder(processor).encode(dataset[2], dataset.load_images(dataset[2])))


def weights_in_4_bit(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The bytes, scales and code books of all 4-bit layers, by their names in the base."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".layers." in name and ("_proj.weight" in name or "_proj.base_layer.weight" in name)
    }


def test_a_run_learns_as_lora_does(scored: tuple[Path, PeftModel], wide_dir: Path, data: Path, tmp_path: Path) -> None:
    lora = run_training(make_config(wide_dir, data, tmp_path / "lora", **{**QLORA, "method": "lora"}))
    path, _ = scored
    losses, of_lora = ([line["loss"] for line in RunDirectory(one).steps()] for one in (path, lora))
    assert losses[-1] < losses[0] / 4
    assert losses[0] != of_lora[0] and losses[:6] == pytest.approx(of_lora[:6], rel=0.1)
    assert {name: tensor.shape for name, tensor in final_weights(path).items()} == {
        name: tensor.shape for name, tensor in final_weights(lora).items()
    }
    changed = [bool(tensor.any()) for name, tensor in final_weights(path).items() if "lora_B" in name]
    assert len(changed) == 12 + 2 + 8 + 1 and all(changed)
    configs = [json.loads((one / "model" / "adapter_config.json").read_text()) for one in (path, lora)]
    assert configs[0] == configs[1]
    names = [{file.name for file in (one / "model").iterdir()} for one in (path, lora)]
    assert names[0] == names[1]


def test_scores_leave_no_trace(scored: tuple[Path, PeftModel], wide_dir: Path, data: Path, tmp_path: Path) -> None:
    """bitsandbytes rearranges 4-bit weights at an evaluation on some CPUs; training would go on with other numbers."""
    path, _ = scored
    plain = run_training(make_config(wide_dir, data, tmp_path / "plain", **QLORA))
    assert [line for line in logged(path) if "loss" in line] == logged(plain)
    assert all(torch.equal(tensor, final_weights(path)[name]) for name, tensor in final_weights(plain).items())


def test_training_leaves_the_4_bit_weights_as_they_were(
    scored: tuple[Path, PeftModel], wide_dir: Path, batch: dict[str, torch.Tensor]
) -> None:
    _, trained = scored
    fresh = load_four_bit_model(wide_dir, dtype="float32")
    before, after = weights_in_4_bit(fresh), weights_in_4_bit(trained)
    assert len(before) >= 8 and before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad(), trained.disable_adapter():
        assert torch.equal(trained.eval()(**batch).logits, fresh(**batch).logits)


def test_checkpoints_hold_the_adapters_and_nothing_of_the_base(scored: tuple[Path, PeftModel]) -> None:
    path, _ = scored
    (newest, *_) = sorted(RunDirectory(path).checkpoints_dir.glob("checkpoint-*"), reverse=True)
    files = {file.name for file in newest.glob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}
    assert all(".lora_A." in name or ".lora_B." in name for name in final_weights(path))


@torch.no_grad()
def test_the_result_stands_on_the_base_in_its_own_precision(
    scored: tuple[Path, PeftModel], data: Path, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """What training scored is the adapter on 4 bit; what is loaded, evaluated and merged stands on the whole base."""
    path, trained = scored
    loaded = load_model(path / "model")
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in loaded.modules())
    in_4_bit, whole = trained.eval()(**batch), loaded(**batch)
    assert whole.loss.item() == pytest.approx(in_4_bit.loss.item(), rel=0.2)
    assert not torch.equal(whole.logits, in_4_bit.logits)
    report = merge_and_verify(path / "model", tmp_path / "merged", data=[data / "eval.jsonl"])
    assert report.relative_difference < 1e-5 < report.adapter_effect
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(**batch).logits, whole.logits, atol=1e-4, rtol=1e-4)
    settings = EvalConfig(
        model=str(path / "model"), data=[data / "eval.jsonl"], output_dir=tmp_path / "scores", max_new_tokens=2
    )
    assert run_evaluation(settings).score.n == 3


def test_every_part_in_4_bit_with_dora_and_rslora(wide_dir: Path, data: Path, tmp_path: Path) -> None:
    """It learns, magnitudes and all, every layer that may be in 4 bit is, and the result merges into the base."""
    asked = {"four_bit_parts": ["vision", "projector", "decoder"], "use_dora": True, "use_rslora": True}
    models: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        build = run.build_model
        patch.setattr(run, "build_model", lambda *args: models.append(build(*args)) or models[-1])
        path = run_training(make_config(wide_dir, data, tmp_path / "run", **QLORA, **asked, lora_alpha=90))
    layers = [one for one in models[0].modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 18 + 2 + 8, "CLIP's last layer among them"
    losses = [line["loss"] for line in RunDirectory(path).steps()]
    assert losses[-1] < losses[0] / 3
    settings = json.loads((path / "model" / "adapter_config.json").read_text())
    assert settings["use_dora"] and settings["use_rslora"]
    names = final_weights(path).keys()
    assert sum("lora_magnitude_vector" in name for name in names) == sum("lora_A" in name for name in names) == 23
    report = merge_and_verify(path / "model", tmp_path / "merged", data=[data / "eval.jsonl"])
    assert report.relative_difference < 1e-5 < report.adapter_effect


def test_a_missing_package_is_told_before_the_data_is_read(
    wide_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setattr(run, "check_data", lambda *args: pytest.fail("the data was read"))
    with pytest.raises(ConfigError, match=r'pip install "phi3v\[qlora\]"'):
        run_training(make_config(wide_dir, data, tmp_path / "run", **QLORA))
