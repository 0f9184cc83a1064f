"""Scores taken by a training run: closed label sets, and what is refused before the model is loaded."""

import json
from pathlib import Path

import pytest

import phi3v.train.run as run
from phi3v.errors import ConfigError, DataError
from phi3v.runlog import RunDirectory
from phi3v.train.run import run_training
from training import make_config, write_training_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture
def labels(data: Path) -> list[str]:
    """The answers of the evaluation samples."""
    lines = map(json.loads, (data / "eval.jsonl").read_text().splitlines())
    return [line["conversations"][0]["assistant"] for line in lines]


def test_a_run_scores_by_likelihood_and_by_class(
    tiny_dir: Path, data: Path, labels: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"eval_data": [data / "eval.jsonl"], "eval_scoring": "likelihood", "eval_labels": labels}
    config = make_config(tiny_dir, data, tmp_path / "run", max_steps=1, progress=False, **settings)
    path = RunDirectory(run_training(config))
    after = path.evaluation("after")
    assert after is not None and after["scoring"] == "likelihood"
    (group,) = after["classes"]["groups"]
    assert group["labels"] == labels and group["n"] == 3 and group["other"] == 0
    assert after["score"] == pytest.approx(sum(group["confusion"][k][k] for k in range(3)) / 3)
    for row in path.predictions(1):
        assert row["prediction"] == row["labels"][row["probabilities"].index(max(row["probabilities"]))]
    assert "answering" not in capfd.readouterr().err


def test_labels_that_scoring_lacks_are_told_before_the_model_is_loaded(
    tiny_dir: Path, data: Path, labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build_model", lambda *args: pytest.fail("the model was loaded"))
    settings = {"eval_data": [data / "eval.jsonl"], "eval_scoring": "likelihood"}
    with pytest.raises(DataError, match=r"eval\.jsonl:1: sample 'sample-0', turn 1: scoring is likelihood"):
        run_training(make_config(tiny_dir, data, tmp_path / "run", **settings))
    with pytest.raises(ConfigError, match="at least two different answers"):
        run_training(make_config(tiny_dir, data, tmp_path / "run", **settings, eval_labels=labels[:1]))
