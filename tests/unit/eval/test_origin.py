"""Which run a model folder is the result of, and what it says."""

from pathlib import Path

import pytest

from phi3v.cli import main
from phi3v.errors import ConfigError
from phi3v.eval.origin import rope_mode_to_ask, run_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("rope_mode: long\n")
    return tmp_path / "run"


def test_a_runs_own_model_folder_is_its_result_and_no_other(run: Path, tmp_path: Path) -> None:
    for name in ("checkpoints/checkpoint-1", "copy"):
        (run / name).mkdir(parents=True)
        assert run_of(run / name) is None
    (tmp_path / "link").symlink_to(run / "model")
    for folder in (run / "model", tmp_path / "link"):
        found = run_of(folder)
        assert found is not None and found.config_path.resolve() == run / "config.yaml"
    (run / "config.yaml").unlink()
    assert run_of(run / "model") is None


def test_a_result_that_lies_on_another_disk_is_still_its_runs(run: Path, tmp_path: Path) -> None:
    (run / "model").rename(tmp_path / "large-disk")
    (run / "model").symlink_to(tmp_path / "large-disk")
    assert run_of(run / "model") is not None and run_of(tmp_path / "large-disk") is None


def test_the_runs_factors_are_taken_unless_others_are_asked_for(run: Path, tmp_path: Path) -> None:
    model = str(run / "model")
    assert [rope_mode_to_ask(model, asked) for asked in ("auto", "short", "long")] == ["long", "short", "long"]
    assert rope_mode_to_ask("owner/name", "auto") == rope_mode_to_ask(str(tmp_path), "auto") == "auto"
    (run / "config.yaml").write_text("method: full\n")
    assert rope_mode_to_ask(model, "auto") == "auto"
    (run / "config.yaml").write_text("rope_mode: [long]\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: rope_mode is \"\['long'\]\""):
        rope_mode_to_ask(model, "auto")


def test_a_checkpoint_is_asked_with_its_runs_factors(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run / "checkpoints" / "checkpoint-20")
    for model in (run / "checkpoints" / "checkpoint-20", tmp_path / "link"):
        assert rope_mode_to_ask(str(model), "auto") == "long"
    for name in ("checkpoints/checkpoint-20.incomplete", "checkpoints/best", "copies/checkpoint-20"):
        (run / name).mkdir(parents=True)
        assert rope_mode_to_ask(str(run / name), "auto") == "auto"


def test_one_question_is_answered_with_them_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v.model import checkpoint

    modes: list[str] = []

    def load(*_: object, rope_mode: str, **__: object) -> None:
        modes.append(rope_mode)
        raise ConfigError("seen")

    monkeypatch.setattr(checkpoint, "load_processor", lambda *_, **__: None)
    monkeypatch.setattr(checkpoint, "load_model", load)
    for more in ([], ["--rope_mode", "short"]):
        assert main(["generate", "--model", str(run / "model"), "--prompt", "Hi", "--device", "cpu", *more]) == 2
    assert modes == ["long", "short"]
