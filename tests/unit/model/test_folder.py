"""Model folders from elsewhere: no pickle is loaded, no code of theirs runs, and messages say what to do instead."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from phi3v.errors import CheckpointError
from phi3v.model.checkpoint import load_config, load_model, load_processor, save_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

IDS = torch.tensor([[1, 15, 300]])


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.proof), "w")


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """The file that exists once something hostile has run; that it would is checked first."""
    path = tmp_path / "has run"
    pickle.loads(pickle.dumps(Hostile(path))).close()
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def folder(tiny_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dir, tmp_path / "model")


@pytest.fixture
def adapter(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path) -> Path:
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))  # pyright: ignore
    return save_model(adapted, processor, tmp_path / "adapter")  # pyright: ignore[reportArgumentType]


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


PICKLES = {
    "zip": lambda hostile, path: torch.save(hostile, path),
    "old": lambda hostile, path: torch.save(hostile, path, _use_new_zipfile_serialization=False),
    "plain": lambda hostile, path: path.write_bytes(pickle.dumps(hostile)),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_model_that_is_a_pickle_is_refused(folder: Path, proof: Path, name: str, kind: str) -> None:
    (folder / "model.safetensors").unlink()
    PICKLES[kind](Hostile(proof), folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=rf"model {folder}: .*pickle \({name}\).*safe_serialization=True"):
        load_model(folder)
    assert not proof.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_an_adapter_that_is_a_pickle_is_refused(adapter: Path, proof: Path, kind: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    PICKLES[kind](Hostile(proof), adapter / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=rf"adapter {adapter}: .*pickle \(adapter_model\.bin\).*safe_serialization"
    ):
        load_model(adapter)
    assert not proof.exists()


def test_honest_pickles_are_refused_too(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only as a pickle"):
        load_model(folder)


def test_a_pickle_beside_safetensors_is_not_touched(folder: Path, adapter: Path, proof: Path) -> None:
    for place in (folder, adapter):
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
            torch.save(Hostile(proof), place / name)
        load_model(place)
        load_processor(place)
    assert not proof.exists()


def test_a_safetensors_name_does_not_make_a_pickle_loadable(folder: Path, proof: Path) -> None:
    torch.save(Hostile(proof), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=str(folder)):
        load_model(folder)
    assert not proof.exists()


# --- code


CODE = """
from pathlib import Path
Path({proof!r}).touch()
class Hostile:
    def __init__(self, *a, **k): pass
    from_pretrained = classmethod(lambda cls, *a, **k: cls())
"""


def make_hostile(folder: Path, proof: Path) -> None:
    """Puts code beside the weights, and every pointer to it that transformers knows."""
    for name in (
        "hostile.py",
        "modeling_phi3_v.py",
        "processing_phi3_v.py",
        "conftest.py",
        "sitecustomize.py",
        "setup.py",
    ):
        (folder / name).write_text(CODE.format(proof=str(proof)))
    kinds = ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer"]
    pointers = dict.fromkeys(kinds, "hostile.Hostile")
    if (folder / "config.json").exists():
        change(folder / "config.json", auto_map=pointers)
    change(folder / "preprocessor_config.json", auto_map=pointers)
    change(
        folder / "tokenizer_config.json",
        auto_map={**pointers, "AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]},
        chat_template="{{ cycler.__init__.__globals__.os.mknod('" + str(proof) + "') }}",
    )
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": pointers}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(proof=str(proof)))


@pytest.fixture
def _no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on the terminal whether code may run; nobody is there, and nobody must be asked."""

    def ask(*_: object) -> str:
        raise AssertionError("asked whether to run remote code")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.usefixtures("_no_answer")
def test_code_in_a_folder_never_runs(folder: Path, adapter: Path, tiny_dir: Path, proof: Path) -> None:
    expected = load_model(tiny_dir)(input_ids=IDS).logits
    make_hostile(folder, proof)
    make_hostile(adapter, proof)
    model = load_model(folder)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    change(
        adapter / "adapter_config.json",
        base_model_name_or_path=str(folder),
        auto_mapping={"base_model_class": "Hostile", "parent_library": "hostile"},
    )
    load_model(adapter)
    for place in (folder, adapter):
        processor = load_processor(place)
        assert processor.encode("Hello") == Phi3VProcessor.from_pretrained(tiny_dir).encode("Hello")
    load_config(folder)
    assert not proof.exists()
    assert str(folder) not in sys.path and "hostile" not in sys.modules


@pytest.mark.usefixtures("_no_answer")
def test_the_auto_classes_take_ours_and_ask_nothing(folder: Path, proof: Path) -> None:
    make_hostile(folder, proof)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), Phi3VForCausalLM)
    if "image_processor_type" in (folder / "preprocessor_config.json").read_text():
        assert isinstance(AutoProcessor.from_pretrained(folder), Phi3VProcessor)
        AutoTokenizer.from_pretrained(folder)
    assert not proof.exists()


def test_a_chat_template_of_a_folder_cannot_reach_the_system(folder: Path, proof: Path) -> None:
    make_hostile(folder, proof)
    processor = load_processor(folder)
    with pytest.raises(Exception, match=r"unsafe|undefined|not safe"):  # jinja's own error, out of its sandbox
        processor.apply_chat_template([{"role": "user", "content": "x"}])
    assert not proof.exists()


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_folder_cannot_name_kernels_to_fetch(folder: Path, where: str) -> None:
    change(folder / "config.json", **{where: "kernels-community/hostile"})
    model: Any = load_model(folder, attention="sdpa")
    towers = [model.config, model.config.vision_config]
    assert [tower._attn_implementation for tower in towers] == ["sdpa", "sdpa"]


def test_a_library_that_an_adapter_names_is_not_imported(
    adapter: Path, tmp_path: Path, proof: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_megatron.py").write_text(CODE.format(proof=str(proof)))
    monkeypatch.syspath_prepend(tmp_path)
    change(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="hostile_megatron")
    with pytest.raises(CheckpointError, match="megatron_config is set, which is not supported"):
        load_model(adapter)
    assert not proof.exists()


def test_patterns_that_never_end_are_not_tried(adapter: Path) -> None:
    change(adapter / "adapter_config.json", exclude_modules="(([a-z0-9_.])+)+X")
    with pytest.raises(CheckpointError, match=r"exclude_modules holds .* which is not a module's name"):
        load_model(adapter)


@pytest.mark.parametrize("pattern", [r".*\.qkv_proj", "(([a-z0-9_.])+)+X", "(", "all-linear"])
def test_a_pattern_of_target_modules_stands_for_what_it_found_and_is_not_run(adapter: Path, pattern: str) -> None:
    ids = torch.tensor([[1, 32010, 29871, 13, 1170]])
    with torch.no_grad():
        expected = load_model(adapter)(ids).logits
        change(adapter / "adapter_config.json", target_modules=pattern)
        assert torch.equal(load_model(adapter)(ids).logits, expected)


def test_an_adapter_on_an_adapter_is_refused(adapter: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(CheckpointError, match="is an adapter itself; merge that one first"):
        load_model(adapter)


# --- files that do not belong together


def test_fewer_layers_than_weights_are_refused(folder: Path) -> None:
    """A model that lacks its last layer answers, and wrongly."""
    change(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"config\.json says 1 decoder layers, its weights hold 2"):
        load_model(folder)


def test_more_layers_than_memory_are_refused_at_once(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match=r"says 1,000,000,000 decoder layers, its weights hold 2"):
        load_model(folder)


def test_an_adapter_with_half_its_matrices_is_refused(adapter: Path) -> None:
    """PEFT only warns, and the missing ones do nothing."""
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1." not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 2 of the tensors .*layers\.1\..*lora_A"):
        load_model(adapter)


def test_an_adapter_of_a_larger_base_is_refused(adapter: Path, wide_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter {adapter}: .*size mismatch"):
        load_model(adapter, base=str(wide_dir))


def test_weights_may_lie_in_parts(folder: Path, tiny_dir: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / part, metadata={"format": "pt"})
    weight_map = {name: part for part, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_model(folder)(input_ids=IDS).logits, load_model(tiny_dir)(input_ids=IDS).logits)
    os.rename(folder / "b.safetensors", folder.parent / "b.safetensors")  # noqa: PTH104
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is not there"):
        load_model(folder)
    weight_map |= dict.fromkeys(parts["b.safetensors"], "../b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="only safetensors files beside it are read"):
        load_model(folder)


def test_a_default_rank_that_no_module_has(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path, tiny_dir: Path
) -> None:
    """``rank_pattern`` gives every module another one."""
    settings = LoraConfig(r=16, target_modules=["qkv_proj", "o_proj"], rank_pattern={"qkv_proj": 2, "o_proj": 3})
    model: Any = get_peft_model(tiny_model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = save_model(model, processor, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(load_model(folder, base=str(tiny_dir))(IDS).logits, expected)
    change(folder / "adapter_config.json", r=10**9)
    with pytest.raises(CheckpointError, match="says rank 1000000000"):
        load_model(folder, base=str(tiny_dir))
