"""A merge is called done only when the merged folder answers as its adapter does."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phi3v.errors import CheckpointError, ConfigError
from phi3v.export.merge import merge_and_verify
from phi3v.model.checkpoint import load_model, save_model
from phi3v.model.processing_phi3_v import Phi3VProcessor

DECODER = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = [*DECODER, "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "img_projection.0", "lm_head"]


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path) -> Path:
    """A LoRA adapter, or whatever variant of it a test asks for; DoRA's rows have other lengths than the base's."""
    torch.manual_seed(0)
    variant = getattr(request, "param", {})
    settings = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **variant)
    model = get_peft_model(load_model(tiny_dir), settings)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.8, 1.2)
    return save_model(model, processor, tmp_path / "adapter")


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"use_rslora": True}], indirect=True, ids=str)
def test_a_merge_equals_its_adapter(adapter: Path, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    report = merge_and_verify(adapter, tmp_path / "merged", data=[data])
    assert report.dtype == "float32"
    assert report.num_samples == 2
    assert report.relative_difference < 1e-5 < report.adapter_effect
    assert report.same_top_token == 1
    base, merged = load_file(tiny_dir / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    ids = torch.tensor([[1, 32010, 29871, 13, 1170]])
    with torch.no_grad():
        difference = load_model(tmp_path / "merged")(ids).logits - load_model(adapter)(ids).logits
    assert difference.abs().max() < 1e-4


def test_a_16_bit_merge_is_within_its_rounding(adapter: Path, data: Path, tmp_path: Path) -> None:
    report = merge_and_verify(adapter, tmp_path / "merged", data=[data], dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert 1e-4 < report.relative_difference < report.tolerance
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_merge_that_lost_the_adapter_is_removed(
    adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: merging leaves one adapted matrix out."""
    from phi3v.export import writing

    def forgetful(model: object, dtype: torch.dtype) -> object:
        merged = real(model, dtype)
        with torch.no_grad():
            merged.lm_head.weight += 0.3
        return merged

    real = writing.merge_adapter
    monkeypatch.setattr(writing, "merge_adapter", forgetful)
    with pytest.raises(CheckpointError, match=r"does not answer as .*adapter does and was removed"):
        merge_and_verify(adapter, tmp_path / "merged", data=[data])
    assert not (tmp_path / "merged").exists()


def test_an_effect_below_the_rounding_is_not_called_merged(adapter: Path, data: Path, tmp_path: Path) -> None:
    """An adapter that barely changes anything vanishes in bfloat16: the message says what to do."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 2e-2 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="--dtype float32"):
        merge_and_verify(adapter, tmp_path / "merged", data=[data], dtype="bfloat16")
    assert merge_and_verify(adapter, tmp_path / "merged", data=[data], dtype="float32").relative_difference < 1e-4


def test_the_data_of_the_run_is_the_default(adapter: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "model")
    with pytest.raises(ConfigError, match="--data"):
        merge_and_verify(run / "model", tmp_path / "merged")
    (run / "config.yaml").write_text(f"train_data: [{data}]\n")
    assert merge_and_verify(run / "model", tmp_path / "merged").num_samples == 2


@pytest.mark.parametrize("mode", ["short", "long"])
def test_factors_that_the_run_fixed_stay_fixed(mode: str, adapter: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "model")
    (run / "config.yaml").write_text(f"train_data: [{data}]\nrope_mode: {mode}\n")
    assert merge_and_verify(run / "model", tmp_path / "merged").relative_difference < 1e-5
    factors = json.loads((tmp_path / "merged" / "config.json").read_text())["rope_scaling"]
    assert factors["short_factor"] == factors["long_factor"]
    ids = torch.tensor([[1, 32010, 29871, 13, 1170]])
    with torch.no_grad():
        trained, merged = load_model(run / "model", rope_mode=mode), load_model(tmp_path / "merged")
        assert (trained(ids).logits - merged(ids).logits).abs().max() < 1e-4


def test_what_is_not_checked_has_no_name(
    adapter: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3v.export import merge

    seen: list[Path] = []

    def interrupted(folder: Path, *_: object) -> object:
        seen.extend(path for path in tmp_path.iterdir() if path.name == "merged")
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(merge, "read_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_and_verify(adapter, tmp_path / "merged", data=[data])
    assert seen == [] and sorted(tmp_path.iterdir()) == before


def test_an_adapter_without_a_processor_takes_that_of_the_base_that_is_named(
    adapter: Path, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (adapter / name).unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merged = merge_and_verify(adapter, tmp_path / "merged", base=str(tiny_dir), data=[data])
    assert merged.same_inputs and merged.relative_difference < 1e-5


def test_what_cannot_be_merged_is_named(adapter: Path, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        merge_and_verify(tiny_dir, tmp_path / "merged", data=[data])
    with pytest.raises(ConfigError, match="not empty"):
        merge_and_verify(adapter, data.parent, data=[data])
    with pytest.raises(CheckpointError, match="no such folder"):
        merge_and_verify(adapter, tmp_path / "merged", base=str(tmp_path / "nowhere"), data=[data])
