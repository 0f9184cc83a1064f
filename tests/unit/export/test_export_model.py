"""``phi3v export``: complete and checked under its name, or not there, with the reason."""

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3v.errors import CapacityError, CheckpointError, ConfigError, Phi3VError
from phi3v.export import run, writing
from phi3v.export.comparison import Comparison
from phi3v.export.readings import read_folder
from phi3v.export.run import export_model
from phi3v.model.checkpoint import load_processor, save_model
from phi3v.model.processing_phi3_v import Phi3VProcessor


@pytest.fixture(scope="module")
def exported(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """The run, exported in bf16 with another number of crops and the pointers; read in a fresh process."""
    folder = tmp_path_factory.mktemp("exported") / "mine"
    comparison = export_model(lora_run, folder, dtype="bfloat16", num_crops=2, use_auto_map=True)
    return folder, comparison


@pytest.fixture
def _reads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults show in this process too, and sooner."""
    monkeypatch.setattr(run, "read_in_fresh_process", read_folder)


def test_the_folder_holds_what_others_load(exported: tuple[Path, Comparison], lora_run: Path) -> None:
    folder, _ = exported
    published = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    names = {file.name for file in folder.iterdir()}
    assert names == published | tokenizer | {"model.safetensors", "README.md", "export_check.json"}
    assert load_processor(folder).num_crops == 2 and load_processor(lora_run / "model").num_crops == 3
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [32000, 32007]
    assert "## Scores" in (folder / "README.md").read_text()


def test_the_check_is_on_record(exported: tuple[Path, Comparison], lora_run: Path) -> None:
    folder, comparison = exported
    record = json.loads((folder / "export_check.json").read_text())
    assert record["verdict"] == "passed"
    assert record["samples"] == {"files": ["eval.jsonl"], "ids": ["sample-0", "sample-1", "sample-2"], "skipped": 0}
    assert record["comparison"]["relative_difference"] == comparison.relative_difference
    assert 1e-4 < comparison.relative_difference < comparison.tolerance < 0.2
    assert comparison.merge_difference is not None and comparison.merge_difference < 1e-5
    assert comparison.reload_difference < 1e-5 and comparison.greedy.samples == 3
    modes = [record["comparison"][f"{which}_rope_mode"] for which in ("trained", "written")]
    assert modes == ["auto", "auto"]
    assert record["versions"]["torch"] == torch.__version__
    others = sorted(file for file in folder.iterdir() if file.name != "export_check.json")
    assert record["files"] == {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in others
    }
    assert str(lora_run.parent) not in json.dumps(record)


@pytest.mark.usefixtures("_reads_here")
def test_a_whole_model_needs_no_merging(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    comparison = export_model(tiny_dir, tmp_path / "out", data=[data])
    assert (comparison.merge_difference, comparison.adapter_effect, comparison.rounded_tensors) == (None, None, 0)
    assert comparison.relative_difference < 1e-6 and comparison.greedy.same == 2
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(tiny_dir / "model.safetensors").keys()


@pytest.mark.usefixtures("_reads_here")
def test_large_weights_are_sharded(tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_SIZE", "5MB")
    (tmp_path / "out").mkdir()  # an empty folder may be there
    assert export_model(tiny_dir, tmp_path / "out", data=[data]).relative_difference < 1e-6
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def spoil_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:2] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_crops(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"num_crops": 1}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def spoil_layout(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.usefixtures("_reads_here")
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_weights, "do not hold the model"),
        (spoil_crops, "other ids or pixels"),
        (spoil_layout, r"config\.json"),
    ],
)
def test_a_folder_that_does_not_match_is_not_left(
    spoil: Any, told: str, tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_spoiled(*arguments: Any, **options: Any) -> Path:
        folder = save_model(*arguments, **options)
        spoil(folder)
        return folder

    monkeypatch.setattr(writing, "save_model", save_spoiled)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=told):
        export_model(tiny_dir, tmp_path / "out", data=[data])
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def early_long_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """The small model, whose long factors begin within the samples."""
    copied = Path(shutil.copytree(tiny_dir, tmp_path / "early"))
    settings = json.loads((copied / "config.json").read_text()) | {"original_max_position_embeddings": 16}
    (copied / "config.json").write_text(json.dumps(settings))
    return copied


@pytest.mark.usefixtures("_reads_here")
def test_another_rope_mode_than_trained_is_refused_where_it_shows(
    early_long_dir: Path, data: Path, tmp_path: Path
) -> None:
    rundir = tmp_path / "run"
    rundir.mkdir()
    early_long_dir.rename(rundir / "model")
    (rundir / "config.yaml").write_text(f"rope_mode: auto\ntrain_data: [{data}]\n")
    with pytest.raises(CheckpointError, match="trained with rope_mode auto and was to be written with short"):
        export_model(rundir, tmp_path / "out", rope_mode="short")
    assert not (tmp_path / "out").exists()
    (rundir / "config.yaml").write_text(f"rope_mode: short\ntrain_data: [{data}]\n")
    assert export_model(rundir, tmp_path / "out").relative_difference < 1e-6  # trained short, exported short
    comparison = json.loads((tmp_path / "out" / "export_check.json").read_text())["comparison"]
    assert (comparison["trained_rope_mode"], comparison["written_rope_mode"]) == ("short", "short")


@pytest.mark.usefixtures("_reads_here")
def test_a_full_disk_is_told_before_anything_is_written(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(writing, "save_model", lambda *arguments, **options: pytest.fail("something was written"))
    with pytest.raises(CapacityError, match="are free"):
        export_model(tiny_dir, tmp_path / "out", data=[data])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_reads_here")
def test_a_disk_that_fills_while_it_is_written_is_told_and_nothing_stays(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "tokenizer.json")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Phi3VProcessor, "save_pretrained", fail)
    with pytest.raises(CapacityError, match=r"out was not written: the disk is full.*Make room"):
        export_model(tiny_dir, tmp_path / "out", data=[data])
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_in_use_is_left_alone(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        export_model(tiny_dir, data.parent, data=[data])
    with pytest.raises(ConfigError, match="not empty"):
        export_model(tiny_dir, data, data=[data])


@pytest.mark.usefixtures("_reads_here")
def test_only_a_checked_folder_is_uploaded(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the upload itself does is tested in test_hub_upload.py; here, when it is called."""
    events: list[Any] = []

    class Repository:
        def __init__(self, repo_id: str, *, is_private: bool) -> None:
            self.repo_id = repo_id
            events.append((repo_id, is_private))

        def upload(self, folder: Path, say: object) -> str:
            events.append(sorted(file.name for file in folder.iterdir())[:2])
            return "there"

    monkeypatch.setattr(run, "HubRepository", Repository)
    export_model(tiny_dir, tmp_path / "out", data=[data], push_to_hub="me/mine", is_private=True)
    assert events == [("me/mine", True), ["README.md", "config.json"]]
    assert (tmp_path / "out" / "README.md").read_text().count('from_pretrained("me/mine"') == 2
    events.clear()
    monkeypatch.setattr(run, "read_in_fresh_process", lambda *arguments: _raise(CheckpointError("damaged")))
    with pytest.raises(Phi3VError, match="damaged"):
        export_model(tiny_dir, tmp_path / "again", data=[data], push_to_hub="me/mine")
    assert events == [("me/mine", False)]


def _raise(error: Exception) -> Any:
    raise error
