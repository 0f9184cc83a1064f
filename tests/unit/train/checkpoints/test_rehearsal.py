import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import phi3v.train.checkpoints.rehearsal as rehearsal
from phi3v.config import TrainConfig
from phi3v.errors import CapacityError, CheckpointError
from phi3v.model.checkpoint import load_model, save_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.checkpoints.rehearsal import most_checkpoints, rehearse_saving, require_disk_space
from phi3v.train.checkpoints.store import CheckpointStore
from phi3v.train.checkpoints.weights import require_equal_weights, restore_weights
from phi3v.train.tuning import select_trainable, wrap_lora


def config(model: Path | str = "m", **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"model": str(model), "output_dir": Path("r"), "train_data": [Path("t.jsonl")]}
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(params=["full", "lora"])
def model(request: pytest.FixtureRequest, tiny_model: Phi3VForCausalLM, tiny_dir: Path) -> Phi3VForCausalLM | PeftModel:
    settings = config(tiny_dir, method=request.param)
    select_trainable(tiny_model, settings)
    return wrap_lora(tiny_model, settings) if request.param == "lora" else tiny_model


def test_a_rehearsal_leaves_nothing(model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    rehearse_saving(model, processor, store)
    assert list(store.root.iterdir()) == []


def test_weights_come_back_bit_for_bit(model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path) -> None:
    folder = save_model(model, processor, tmp_path / "saved")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(1)
    with pytest.raises(CheckpointError, match="other values"):
        require_equal_weights(model, folder)
    restore_weights(model, folder)
    require_equal_weights(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_holds_its_matrices_and_nothing_of_the_base(
    tiny_model: Phi3VForCausalLM, tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    """PEFT would take the adapted lm_head for a resized vocabulary and save head and embeddings whole."""
    wrapped = wrap_lora(tiny_model, config(tiny_dir, method="lora", lora_rank=2))
    folder = save_model(wrapped, processor, tmp_path / "adapter")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    loaded = load_model(folder)
    assert isinstance(loaded, PeftModel)
    require_equal_weights(loaded, folder)


def change_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"x{name}": tensor for name, tensor in tensors.items()}


def leave_one_out(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def change_dtype(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("damage", [change_names, leave_one_out, change_dtype])
def test_weights_of_another_model_are_refused(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path, damage: Any
) -> None:
    folder = save_model(model, processor, tmp_path / "saved")
    (path,) = folder.glob("*.safetensors")
    save_file(damage(load_file(path)), path)
    with pytest.raises(CheckpointError, match=str(folder)):
        restore_weights(model, folder)


def test_a_save_that_writes_other_weights_is_found_out(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_rounded(model: Any, processor: Any, folder: Path) -> None:
        save_model(model, processor, folder)
        (path,) = folder.glob("*.safetensors")
        save_file({name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}, path)

    monkeypatch.setattr(rehearsal, "save_model", save_rounded)
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    with pytest.raises(CheckpointError, match="reads back with other values"):
        rehearse_saving(model, processor, store)
    assert not store.rehearsal.exists()


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rehearsal, "save_model", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        rehearse_saving(tiny_model, processor, CheckpointStore(tmp_path / "checkpoints", keep=2))


def test_too_small_a_disk_is_told_in_numbers(
    tiny_model: Phi3VForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 50_000_000))
    select_trainable(tiny_model, config())
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    # 8.5 MB of weights; with two optimizer averages a checkpoint takes three times that, and three lie there at once.
    with pytest.raises(CapacityError) as caught:
        require_disk_space(tiny_model, store, config())
    assert "3 checkpoints of 25.3 MB" in str(caught.value) and "50.0 MB are free" in str(caught.value)
    require_disk_space(tiny_model, store, config(save_steps=None))


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 3),
        ({"save_steps": None}, 0),
        ({"keep_checkpoints": 1}, 2),
        ({"eval_data": [Path("e.jsonl")], "eval_steps": 5}, 4),
        ({"eval_data": [Path("e.jsonl")], "eval_steps": 5, "save_steps": None}, 3),
    ],
)
def test_most_checkpoints_at_once(changes: dict[str, Any], most: int) -> None:
    assert most_checkpoints(config(**changes)) == most
