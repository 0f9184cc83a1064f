"""`phi3v eval` on a folder: its files say what was scored, and a second evaluation never overwrites a first."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from phi3v.config import EvalConfig, load_config
from phi3v.data.dataset import ConversationDataset
from phi3v.errors import CheckpointError, ConfigError, DataError
from phi3v.eval.answer import EvalSettings
from phi3v.eval.run import evaluate_model, run_evaluation
from phi3v.model.processing_phi3_v import Phi3VProcessor


@pytest.fixture
def config(tiny_dir: Path, tmp_path: Path) -> EvalConfig:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 70), "orange").save(tmp_path / "images" / "a.png")
    rows = [{"images": ["a.png"], "user": "Colour?", "assistant": "orange"}, {"user": "Hi", "assistant": "Hello."}]
    lines = [json.dumps({"id": str(index), "conversations": [row]}) for index, row in enumerate(rows)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return EvalConfig(
        model=str(tiny_dir),
        data=[tmp_path / "data.jsonl"],
        output_dir=tmp_path / "out",
        metric="anls",
        max_new_tokens=3,
        device="cpu",
    )


def test_files_hold_score_and_predictions(config: EvalConfig) -> None:
    result = run_evaluation(config)
    scores = json.loads((config.output_dir / "eval.json").read_text())
    rows = [json.loads(line) for line in (config.output_dir / "predictions.jsonl").read_text().splitlines()]
    assert scores["metric"] == "anls"
    assert scores["n"] == 2
    assert scores["score"] == result.score.score
    assert scores["low"] <= scores["score"] <= scores["high"]
    assert [row["id"] for row in rows] == ["0", "1"]
    assert rows[0]["answers"] == ["orange"]
    assert Path(rows[0]["images"][0]).is_file()
    assert sum(row["score"] for row in rows) / 2 == pytest.approx(scores["score"])


def test_an_evaluation_is_not_overwritten(config: EvalConfig) -> None:
    run_evaluation(config)
    with pytest.raises(ConfigError, match="already holds an evaluation"):
        run_evaluation(config)


def test_bad_samples_stop_before_the_model_is_loaded_or_are_counted(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with config.data[0].open("a") as file:
        file.write('\n{"id": "2", "conversations": [{"images": ["gone.png"], "user": "?", "assistant": "x"}]}')
    from phi3v.eval import run

    with monkeypatch.context() as patched:
        patched.setattr(run, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
        with pytest.raises(DataError, match=r"data\.jsonl:3.*gone\.png"):
            run_evaluation(config)
    assert run_evaluation(replace(config, on_bad_sample="skip")).score.n == 2
    assert json.loads((config.output_dir / "eval.json").read_text())["skipped"] == {"missing image": 1}


@pytest.mark.parametrize("asked", ["auto", "short"])
def test_a_runs_model_answers_with_the_factors_it_was_trained_with(
    config: EvalConfig, asked: Literal["auto", "short"], tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from phi3v.eval import run

    folder = config.output_dir.parent / "run"
    shutil.copytree(tiny_dir, folder / "model")
    (folder / "config.yaml").write_text("rope_mode: long\n")
    modes: list[str] = []

    def load(*_: object, rope_mode: str, **__: object) -> None:
        modes.append(rope_mode)
        raise ConfigError("seen")

    with pytest.MonkeyPatch.context() as patched, pytest.raises(ConfigError, match="seen"):
        patched.setattr(run, "load_model", load)
        run_evaluation(replace(config, model=str(folder / "model"), rope_mode=asked))
    used = "long" if asked == "auto" else asked
    assert modes == [used] == [load_config(EvalConfig, config.output_dir / "config.yaml").rope_mode]
    assert ("answers with rope_mode long" in caplog.text) == (asked == "auto")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3v.eval import run

    monkeypatch.setattr(run, "load_processor", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(ConfigError, match=r"output_dir .*data\.jsonl/out: cannot be written"):
        run_evaluation(replace(config, output_dir=config.data[0] / "out"))


def test_what_was_answered_before_a_kill_is_kept(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v.eval.engine import Engine

    whole = run_evaluation(replace(config, output_dir=config.output_dir.parent / "whole", batch_size=1)).rows
    answer, calls = Engine.answer, []

    def killed_at_the_second(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Engine, "answer", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(replace(config, batch_size=1))
    (line,) = (config.output_dir / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line) in json.loads(json.dumps(whole))
    monkeypatch.undo()
    assert run_evaluation(config).rows == whole  # no score is there yet, so it may be taken again


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_a_full_disk_is_told_as_one(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if path.name == "predictions.jsonl" else path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ConfigError, match=r"output_dir .*out: cannot be written \(No space left on device\)"):
        run_evaluation(config)


def test_kept_answers_are_written_as_the_final_ones_are(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts as they are, and null for what is no number."""
    from phi3v.eval import run

    def one_row(*_: Any, keep: Callable[[dict[str, Any]], object], **__: Any) -> None:
        keep({"prediction": "größe", "score": float("nan")})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "evaluate_model", one_row)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(config)
    assert (config.output_dir / "predictions.jsonl").read_text("utf-8") == '{"prediction": "größe", "score": null}\n'


def test_answers_to_an_earlier_configuration_do_not_stay(config: EvalConfig) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError):
        run_evaluation(replace(config, model="/nowhere"))
    assert [file.name for file in config.output_dir.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("own", ["steps.jsonl", "environment.json", "identity.json", "checkpoints"])
def test_a_training_runs_directory_is_not_written_into(config: EvalConfig, own: str) -> None:
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text("method: full\n")
    (config.output_dir / own).touch()
    with pytest.raises(ConfigError, match=r"out is a training run's directory; give .*out/eval"):
        run_evaluation(config)
    assert (config.output_dir / "config.yaml").read_text() == "method: full\n"


def test_a_metric_that_there_is_not_is_told_before_anything_is_asked(
    config: EvalConfig, processor: Phi3VProcessor
) -> None:
    settings = EvalSettings(metric="anl", max_new_tokens=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="there is no metric 'anl'; did you mean anls"):
        evaluate_model(None, processor, ConversationDataset(config.data, config.image_dir), settings)


def label_data(config: EvalConfig, **more: object) -> None:
    rows = [{"images": ["a.png"], "user": "Orange?", "assistant": "Yes"}, {"user": "Hi?", "assistant": "No"}]
    lines = [json.dumps({"id": str(k), "conversations": [{**row, **more}]}) for k, row in enumerate(rows)]
    config.data[0].write_text("\n".join(lines))


@pytest.mark.parametrize("scoring", ["likelihood", "both"])
def test_closed_questions_get_probabilities_and_a_report(
    config: EvalConfig, scoring: Literal["likelihood", "both"]
) -> None:
    label_data(config)
    settings = replace(config, metric="accuracy", scoring=scoring, labels=["Yes", "No"])
    result = run_evaluation(settings)
    rows = [json.loads(line) for line in (config.output_dir / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["labels"] == ["Yes", "No"] and sum(row["probabilities"]) == pytest.approx(1, abs=2e-6)
        if scoring == "likelihood":
            assert row["prediction"] == max(zip(row["probabilities"], row["labels"], strict=True))[1]
    assert [row["expected"] for row in rows] == ["Yes", "No"]
    found = json.loads((config.output_dir / "eval.json").read_text())
    assert found["scoring"] == scoring and found["score"] == result.score.score
    (group,) = found["classes"]["groups"]
    is_ranked = rows[0]["probabilities"][0] > rows[1]["probabilities"][0]
    assert group["labels"] == ["Yes", "No"] and group["auroc"]["value"] == is_ranked
    assert sum(map(sum, group["confusion"])) == 2 == group["n"]
    assert found["classes"]["calibration"]["n"] == 2
    assert load_config(EvalConfig, config.output_dir / "config.yaml") == settings


def test_closed_questions_are_reported_by_class_without_probabilities(config: EvalConfig) -> None:
    label_data(config, labels=["No", "Yes"])
    run_evaluation(config)
    found = json.loads((config.output_dir / "eval.json").read_text())
    assert found["classes"]["groups"][0]["auroc"] is None and found["classes"]["calibration"] is None
    assert found["classes"]["groups"][0]["other"] == 2, "three random tokens are no label"
    row = json.loads((config.output_dir / "predictions.jsonl").read_text().splitlines()[0])
    assert row["expected"] == "Yes" and "probabilities" not in row


def test_open_questions_have_no_report_by_class(config: EvalConfig) -> None:
    run_evaluation(config)
    assert "classes" not in json.loads((config.output_dir / "eval.json").read_text())


def test_missing_labels_are_told_before_the_model_is_loaded(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3v.eval import run

    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    with pytest.raises(DataError, match=r"data\.jsonl:1.*has no labels"):
        run_evaluation(replace(config, scoring="likelihood"))


@pytest.mark.parametrize("progress", [True, False])
def test_bars_are_shown_where_asked_for(config: EvalConfig, progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluation(replace(config, progress=progress))
    printed = capsys.readouterr().err
    assert ("answering" in printed) == ("checking data" in printed) == progress
