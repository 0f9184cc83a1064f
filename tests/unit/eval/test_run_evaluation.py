"""`phi3v eval` on a folder: its files say what was scored, and a second evaluation never overwrites a first."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from phi3v.config import EvalConfig
from phi3v.errors import ConfigError, DataError
from phi3v.eval.run import run_evaluation


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
