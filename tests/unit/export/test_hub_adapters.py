"""An adapter that is given as hub id, from the hub's cache on this machine: nothing is fetched in tests."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model

from phi3v.cli import main
from phi3v.errors import CheckpointError
from phi3v.model.checkpoint import load_model, save_model
from phi3v.model.downloads import local_folder
from phi3v.model.processing_phi3_v import Phi3VProcessor

COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def repo_id(tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter in the cache, beside the whole model, which is not there: who loads it asks for the adapter alone."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(tiny_dir), LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    repository = tmp_path / "cache" / "models--me--adapter"
    saved = save_model(model, processor, tmp_path / "saved")
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return "me/adapter"


def test_its_files_are_those_of_the_repository(repo_id: str, tmp_path: Path) -> None:
    folder = Path(local_folder(repo_id))
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "saved" / "adapter_model.safetensors"
    ).read_bytes()


def test_what_is_no_adapter_of_the_hub_comes_back_as_it_is(repo_id: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("saved", "./me/adapter", str(tmp_path / "saved"), "runs/gone", "a/b/c"):
        assert local_folder(name) == name
    assert local_folder("you/nothing") == "you/nothing"  # where it is loaded it is told that it is not there
    with pytest.raises(CheckpointError, match="you/nothing"):
        load_model(local_folder("you/nothing"))


def test_a_folder_named_as_its_owner_is_told_to_be_in_the_way(
    repo_id: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("me").mkdir()
    for verb in ("merge", "export"):
        assert main([verb, repo_id, "out", "--data", str(data)]) != 0
        assert "me/ is a folder here, so this was taken for a path in it" in capsys.readouterr().err


def test_every_verb_takes_it(repo_id: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", repo_id, "merged", "--data", str(data)]) == 0
    assert json.loads(Path("merged/config.json").read_text())["model_type"] == "phi3_v"
    scores = ["--data", str(data), "--output_dir", "scores", "--metric", "anls", "--max_new_tokens", "3"]
    assert main(["eval", "--model", repo_id, "--device", "cpu", *scores]) == 0
    capsys.readouterr()
    asked = ["--prompt", "Hi", "--max_new_tokens", "4", "--device", "cpu"]
    answers = []
    for model in (repo_id, str(tmp_path / "saved")):
        assert main(["generate", "--model", model, *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
