"""Folders in, folders out: published names and bytes, adapters, nothing half written, no code from elsewhere."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from phi3v.errors import CheckpointError
from phi3v.model.checkpoint import (
    base_of_adapter,
    dtype_of_folder,
    is_adapter,
    load_model,
    load_processor,
    merge_adapter,
    save_model,
)
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

PROMPT = "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n"

FULL_FOLDER = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def inputs_of(processor: Phi3VProcessor) -> dict[str, torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    return dict(processor(PROMPT, Image.fromarray(pixels)))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the published layout


def published_names(layers: int, vision_layers: int) -> set[str]:
    """Spec section 1, spelled out."""
    names = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    for layer in range(layers):
        for part in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ):
            names.add(f"model.layers.{layer}.{part}.weight")
    image = "model.vision_embed_tokens"
    names |= {f"{image}.glb_GN", f"{image}.sub_GN"}
    names |= {f"{image}.img_projection.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    tower = f"{image}.img_processor.vision_model"
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    names |= {f"{tower}.embeddings.{name}" for name in embeddings}
    both = [f"{tower}.{name}" for name in ("pre_layrnorm", "post_layernorm")]
    for layer in range(vision_layers):
        inner = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
        inner += ["mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"]
        both += [f"{tower}.encoder.layers.{layer}.{name}" for name in inner]
    return names | {f"{name}.{kind}" for name in both for kind in ("weight", "bias")}


def test_full_size_has_the_published_tensors() -> None:
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(rope_scaling=factors))
    state = model.state_dict()
    assert set(state) == published_names(layers=32, vision_layers=24)
    assert len(state) == 592
    assert sum(tensor.numel() for tensor in state.values()) == 4_146_621_440
    assert state["model.vision_embed_tokens.glb_GN"].shape == (1, 1, 4096)
    assert state["model.vision_embed_tokens.sub_GN"].shape == (1, 1, 1, 4096)
    assert state["model.layers.31.self_attn.qkv_proj.weight"].shape == (9216, 3072)
    assert state["model.layers.31.mlp.gate_up_proj.weight"].shape == (16384, 3072)
    assert state["model.vision_embed_tokens.img_projection.0.weight"].shape == (3072, 4096)


def test_a_saved_file_has_the_published_names(tiny_dir: Path) -> None:
    assert {path.name for path in tiny_dir.iterdir()} == FULL_FOLDER
    with safe_open(tiny_dir / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == published_names(layers=2, vision_layers=3)


@pytest.mark.parametrize("source", ["tiny", "golden"])
def test_loading_and_saving_again_changes_no_byte(
    source: str, tiny_dir: Path, golden_dir: Path, tmp_path: Path
) -> None:
    first = tiny_dir if source == "tiny" else golden_dir
    if source == "golden":  # a published folder once becomes ours, and then stays as it is
        first = save_model(load_model(golden_dir), load_processor(golden_dir), tmp_path / "first")
    second = save_model(load_model(first), load_processor(first), tmp_path / "second")
    assert bytes_of(second) == bytes_of(first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path, dtype: str) -> None:
    folder = save_model(load_model(tiny_dir, dtype=dtype), processor, tmp_path / "model")
    expected = getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {expected}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    assert dtype_of_folder(folder) == load_model(folder).dtype == expected
    assert load_model(folder, dtype="float32").dtype == torch.float32


def test_the_published_shared_embedding_is_accepted_and_not_written(
    tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "with_wte")
    state = load_file(folder / "model.safetensors")
    state["model.vision_embed_tokens.wte.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, loading = Phi3VForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "wte" not in caplog.text
    assert bytes_of(save_model(model, processor, tmp_path / "again")) == bytes_of(tiny_dir)


def test_export_says_where_generation_stops(golden_dir: Path, tmp_path: Path) -> None:
    folder = save_model(load_model(golden_dir), load_processor(golden_dir), tmp_path / "model")
    for name in ("generation_config.json", "config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [32000, 32007]


def test_no_file_points_to_code(golden_dir: Path, tmp_path: Path) -> None:
    folder = save_model(load_model(golden_dir), load_processor(golden_dir), tmp_path / "model")
    assert not [path.name for path in folder.glob("*.json") if "auto_map" in path.read_text("utf-8")]
    assert not list(folder.glob("*.py"))


# --- without code from elsewhere, without a network, without anyone to ask


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a loader asked the network or the user")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("builtins.input", refuse)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
@pytest.mark.parametrize("source", ["tiny", "golden"])
def test_auto_classes(source: str, options: dict[str, Any], tiny_dir: Path, golden_dir: Path) -> None:
    """The golden folder is published: its auto_map names code that is not there."""
    folder = tiny_dir if source == "tiny" else golden_dir
    assert ("auto_map" in (folder / "config.json").read_text()) == (source == "golden")
    assert type(AutoConfig.from_pretrained(folder, **options)) is Phi3VConfig
    model = AutoModelForCausalLM.from_pretrained(folder, **options, attn_implementation="eager", dtype="auto")
    assert type(model) is Phi3VForCausalLM
    assert model.config._attn_implementation == model.config.vision_config._attn_implementation == "eager"
    assert type(AutoModelForImageTextToText.from_pretrained(folder, **options)) is Phi3VForCausalLM
    processor = AutoProcessor.from_pretrained(folder, **options, num_crops=9)
    assert type(processor) is Phi3VProcessor
    assert (processor.num_crops, processor.image_processor.crop_px) == (9, 56 if source == "tiny" else 336)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("source", ["tiny", "golden"])
def test_auto_image_processor(source: str, tiny_dir: Path, golden_dir: Path) -> None:
    try:
        loaded = AutoImageProcessor.from_pretrained(tiny_dir if source == "tiny" else golden_dir, num_crops=9)
    except ImportError:
        pytest.skip("this transformers' AutoImageProcessor wants torchvision, whatever the class")
    assert type(loaded) is Phi3VImageProcessor
    assert (loaded.num_crops, loaded.crop_px) == (9, 56 if source == "tiny" else 336)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("source", ["tiny", "golden"])
def test_auto_tokenizer_gives_the_published_ids(
    source: str, tiny_dir: Path, golden_dir: Path, processor: Phi3VProcessor
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir if source == "tiny" else golden_dir)
    recorded = load_file(golden_dir / "tensors.safetensors")
    case = next(c for c in json.loads((golden_dir / "cases.json").read_text()) if c["name"] == "text_only")
    answer = tokenizer(case["answer"], add_special_tokens=False).input_ids
    assert tokenizer(case["prompt"]).input_ids + answer == recorded["text_only.input_ids"][0].tolist()
    for text in ("Hello  world \n<|end|>\n", " leading", "ümlaut 漢字 🙂", "<|user|>\n a <|assistant|> b"):
        assert tokenizer(text).input_ids == processor.encode(text)


HUB_SCRIPT = """
import socket, sys
def refuse(*arguments, **named): raise AssertionError("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
import phi3v, torch
from transformers import AutoModelForCausalLM, AutoProcessor
from phi3v import Phi3VProcessor
from phi3v.errors import CheckpointError
from phi3v.model.checkpoint import load_model, load_processor
model = load_model("org/name")
processor = Phi3VProcessor.from_pretrained("org/name", num_crops=2)
assert (processor.num_crops, processor.image_processor.crop_px) == (2, 56)
assert load_processor("org/name").encode("a<|image_1|>b", [3]) == processor.encode("a<|image_1|>b", [3])
assert sorted(processor._published_files) == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
same = AutoModelForCausalLM.from_pretrained("org/name")
assert AutoProcessor.from_pretrained("org/name").image_processor.crop_px == 56
ids = torch.tensor([processor.encode("Hello")])
assert torch.equal(model(input_ids=ids).logits, same(input_ids=ids).logits)
adapter = load_model(sys.argv[1])
assert adapter.peft_config["default"].base_model_name_or_path == "org/name"
try:
    load_model("org/another")
except CheckpointError as error:
    assert "model org/another:" in str(error), error
else:
    raise AssertionError("a model came from nowhere")
"""


def test_hub_ids_come_from_the_local_cache(tiny_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    adapter = shutil.copytree(adapter_dir, tmp_path / "adapter")
    set_base(adapter, "org/name")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {
        key: value for key, value in environment.items() if key not in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE")
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, str(adapter)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- adapters


def with_adapter(model: Any, targets: list[str] | str) -> PeftModel:
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as after training: B is zero at the start
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapted.eval()


TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "q_proj", "fc1", "img_projection.0"]
"""Some of every part; lm_head is the one that PEFT likes to save whole."""


@pytest.fixture
def adapter_dir(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path) -> Path:
    """An adapter on ``tiny_dir`` that changes a lot."""
    return save_model(with_adapter(tiny_model, TARGETS), processor, tmp_path / "run" / "model")


def set_base(adapter: Path, base: str | None) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))


def test_an_adapter_folder_is_the_adapter_model(
    tiny_model: Phi3VForCausalLM, tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    inputs = inputs_of(processor)
    of_base = tiny_model(**inputs).logits
    adapted = with_adapter(tiny_model, TARGETS)
    folder = save_model(adapted, processor, tmp_path / "adapter")
    loaded = load_model(folder)
    assert isinstance(loaded, PeftModel) and not loaded.training
    torch.testing.assert_close(loaded(**inputs).logits, adapted(**inputs).logits, atol=0, rtol=0)
    assert (loaded(**inputs).logits - of_base).abs().max() > 0.1

    assert is_adapter(folder) and not is_adapter(tiny_dir)
    assert Path(base_of_adapter(folder)) == tiny_dir
    names = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in names)
    assert {path.name for path in folder.iterdir()} == (FULL_FOLDER - {"config.json", "generation_config.json"}) - {
        "model.safetensors"
    } | {"adapter_config.json", "adapter_model.safetensors"}
    assert load_processor(folder, num_crops=3).num_crops == 3


def test_an_adapter_generates(adapter_dir: Path, processor: Phi3VProcessor) -> None:
    adapted = load_model(adapter_dir)
    inputs = inputs_of(processor)
    cached = adapted.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, adapted.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_the_adapter_model(
    adapter_dir: Path, tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path, dtype: str
) -> None:
    inputs = inputs_of(processor)
    adapted = load_model(adapter_dir, dtype="float32")
    expected = adapted(**inputs).logits
    merged = merge_adapter(adapted, getattr(torch, dtype))  # pyright: ignore[reportArgumentType]
    assert merged.config.dtype == merged.dtype == getattr(torch, dtype)
    folder = save_model(merged, processor, tmp_path / "merged")
    assert {path.name for path in folder.iterdir()} == FULL_FOLDER
    assert dtype_of_folder(folder) == getattr(torch, dtype)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == published_names(layers=2, vision_layers=3)
    reloaded = load_model(folder, dtype="float32")(**inputs).logits
    # Relative to all logits: bfloat16 rounds every weight by up to 1 / 256 of itself.
    limit = 1e-5 if dtype == "float32" else 3e-2
    assert (reloaded - expected).norm() < limit * expected.norm()
    if dtype == "bfloat16":  # one rounding of the exact sum, no other
        exact = load_model(adapter_dir, dtype="float32").merge_and_unload().state_dict()  # pyright: ignore
        for name, tensor in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(tensor, exact[name].bfloat16(), atol=0, rtol=0)


def test_an_adapters_matrices_stay_float32(adapter_dir: Path) -> None:
    adapted = load_model(adapter_dir, dtype="bfloat16")
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in adapted.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_an_adapters_base_may_have_moved(adapter_dir: Path, tiny_dir: Path, processor: Phi3VProcessor) -> None:
    expected = load_model(adapter_dir)(**inputs_of(processor)).logits
    set_base(adapter_dir, "/nowhere")
    with pytest.raises(CheckpointError, match=r"base model of adapter .*: /nowhere: no such folder"):
        load_model(adapter_dir)
    moved = load_model(adapter_dir, base=str(tiny_dir))
    torch.testing.assert_close(moved(**inputs_of(processor)).logits, expected, atol=0, rtol=0)
    set_base(adapter_dir, None)
    with pytest.raises(CheckpointError, match="base_model_name_or_path is missing"):
        load_model(adapter_dir)


def test_an_adapter_without_processor_files_uses_its_bases(adapter_dir: Path) -> None:
    (adapter_dir / "preprocessor_config.json").unlink()
    assert load_processor(adapter_dir).image_processor.crop_px == 56


# --- one piece or nothing


def test_a_failure_in_the_middle_leaves_the_old_folder(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tiny_model, processor, tmp_path / "model")
    before = bytes_of(folder)

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError("No space left on device")

    with torch.no_grad():
        tiny_model.lm_head.weight += 1
    for broken in ("image_processor", "rename"):
        with monkeypatch.context() as patch:
            if broken == "rename":
                patch.setattr(Path, "rename", fail)
            else:
                patch.setattr(processor.image_processor, "save_pretrained", fail)
            with pytest.raises(OSError, match="No space left"):
                save_model(tiny_model, processor, folder)
            with pytest.raises(OSError, match="No space left"):
                save_model(tiny_model, processor, tmp_path / "new")
        assert bytes_of(folder) == before
        assert not (tmp_path / "new").exists()

    save_model(tiny_model, processor, folder)
    assert bytes_of(folder)["model.safetensors"] != before["model.safetensors"]
    assert set(bytes_of(folder)) == FULL_FOLDER
    assert [path.name for path in tmp_path.iterdir() if path.name != ".new.writing"] == ["model"]


def test_a_failed_swap_puts_the_old_folder_back(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tiny_model, processor, tmp_path / "model")
    before = bytes_of(folder)
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == ".model.writing":
            raise OSError("Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output error"):
        save_model(tiny_model, processor, folder)
    assert bytes_of(folder) == before


def test_a_replaced_folder_keeps_nothing_old(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling_phi3_v.py").write_text("remote code")
    assert set(bytes_of(save_model(tiny_model, processor, folder))) == FULL_FOLDER


def test_files_are_as_readable_as_any(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tiny_dir.iterdir()} == dict.fromkeys(
        FULL_FOLDER, usual
    )


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    for load in (load_model, load_processor):
        with pytest.raises(CheckpointError, match=r"model .*missing: no such folder"):
            load(tmp_path / "missing")
        with pytest.raises(CheckpointError, match=r"holds neither config\.json nor adapter_config\.json"):
            load(tmp_path)
        with pytest.raises(CheckpointError, match="no such folder"):
            load("runs/of/mine/model")


def test_a_name_beside_folders_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking the hub, which would be asked again and again where there is no network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"runs/modle: no such folder; runs/ is a folder here, so .* a path"):
        load_model("runs/modle")
    for name in (str(tmp_path / "gone"), "./gone", "gone"):
        with pytest.raises(CheckpointError, match=r"no such folder$"):
            load_model(name)


def test_a_damaged_folder_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.vision_embed_tokens.glb_GN"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's tensors, such as .*glb_GN"):
        load_model(folder)
    content = (tiny_dir / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(folder)):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(folder)):
        load_model(folder)


# --- saving that is interrupted


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"]
)
def test_a_failed_save_leaves_nothing_behind(
    tiny_dir: Path,
    processor: Phi3VProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    before = bytes_of(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Phi3VProcessor, "save_pretrained", fail)
    with pytest.raises(type(error)):
        save_model(load_model(tiny_dir), processor, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert bytes_of(folder) == before


def interrupted_between_the_names(folder: Path) -> None:
    """As a kill leaves it: the former model has stepped aside, the new one has not its name yet."""
    folder.rename(folder.with_name(f".{folder.name}.replaced"))
    folder.with_name(f".{folder.name}.writing").mkdir()


def test_a_model_that_had_stepped_aside_comes_back_when_the_next_save_fails(
    tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    before = bytes_of(folder)
    interrupted_between_the_names(folder)
    model = load_model(tiny_dir)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Phi3VProcessor, "save_pretrained", fail)
        save_model(model, processor, folder)
    assert bytes_of(folder) == before
    save_model(model, processor, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_had_stepped_aside_is_named_when_it_is_looked_for(tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    interrupted_between_the_names(folder)
    with pytest.raises(CheckpointError, match=r"no such folder.*\.model\.replaced.*rename"):
        load_model(folder)
