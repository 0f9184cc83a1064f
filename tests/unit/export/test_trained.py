"""What an export finds out about its source."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from phi3v.errors import CheckpointError, ConfigError
from phi3v.export.trained import find_trained, published_name


def test_a_run_its_model_and_its_adapter_are_found(lora_run: Path, tiny_dir: Path) -> None:
    for source in (lora_run, lora_run / "model"):
        trained = find_trained(source)
        assert trained.folder.resolve() == (lora_run / "model").resolve()
        assert trained.run is not None and trained.settings["method"] == "lora"
        assert trained.base == trained.weights_folder == str(tiny_dir)
        files, _ = trained.samples_files([], None)
        assert [file.name for file in files] == ["eval.jsonl"]


def test_a_copy_of_a_runs_model_knows_no_run(lora_run: Path, tmp_path: Path) -> None:
    trained = find_trained(Path(shutil.copytree(lora_run / "model", tmp_path / "copy")))
    assert trained.run is None and trained.rope_mode == "auto"
    with pytest.raises(ConfigError, match="--data"):
        trained.samples_files([], None)


def test_the_run_knows_how_it_was_trained(lora_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run / "model", run / "model")
    (run / "config.yaml").write_text("rope_mode: short\ntrain_data: [a.jsonl]\nimage_dir: pictures\n")
    assert find_trained(run, rope_mode="long").rope_mode == "short"
    assert find_trained(tiny_dir, rope_mode="long").rope_mode == "long"
    assert find_trained(run).samples_files([], None) == ([Path("a.jsonl")], Path("pictures"))
    assert find_trained(run).samples_files([Path("b.jsonl")], None) == ([Path("b.jsonl")], None)


def test_a_checkpoint_has_its_runs_settings_but_is_not_its_result(lora_run: Path, tmp_path: Path) -> None:
    """What the run says of its end, such as its scores, is not the checkpoint's."""
    shutil.copytree(lora_run / "model", tmp_path / "run" / "checkpoints" / "checkpoint-2")
    (tmp_path / "run" / "config.yaml").write_text("rope_mode: short\ntrain_data: [a.jsonl]\n")
    trained = find_trained(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    assert trained.run is None and trained.rope_mode == "short" and trained.is_rope_mode_known
    assert trained.samples_files([], None) == ([Path("a.jsonl")], None)


def test_what_cannot_be_exported_is_named(lora_run: Path, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_trained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        find_trained(tmp_path)
    with pytest.raises(ConfigError, match="whole model"):
        find_trained(tiny_dir, base="elsewhere")
    shutil.copy(lora_run / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match="no result yet"):
        find_trained(tmp_path)


def hold_in_cache(repo_id: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a model into the hub's cache, as far as names are concerned."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    for name, content in {"refs/main": "c0ffee", "snapshots/c0ffee/config.json": "{}"}.items():
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_the_base_is_named_where_its_folder_says_so(
    tiny_dir: Path, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hold_in_cache("me/downloaded", tmp_path / "cache", monkeypatch)
    assert published_name("microsoft/Phi-3.5-vision-instruct") == "microsoft/Phi-3.5-vision-instruct"
    assert published_name(str(golden_dir)) == "microsoft/Phi-3-vision-128k-instruct"
    assert published_name(str(tiny_dir)) is None
    assert published_name("models/deleted") is None  # a folder that was there, not a hub id
    assert published_name("me/downloaded") == "me/downloaded" and published_name("a/b c") is None
    exported = Path(shutil.copytree(tiny_dir, tmp_path / "exported"))
    (exported / "README.md").write_text("---\nbase_model: me/mine\n---\n# Mine\n")
    assert published_name("exported") == "me/mine"
    (exported / "README.md").write_text("---\n: [\n---\n# Mine\n")
    assert published_name("exported") is None
    settings = json.loads((exported / "config.json").read_text()) | {"_name_or_path": "/disk/Phi-3.5-vision-instruct"}
    (exported / "config.json").write_text(json.dumps(settings))
    assert published_name("exported") == "microsoft/Phi-3.5-vision-instruct"
