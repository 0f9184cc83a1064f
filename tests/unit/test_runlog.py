"""The run directory: what a kill may cost, what a resumed run's logs hold, and what stays out of the record."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import phi3v
from phi3v.errors import ConfigError, DataError
from phi3v.files import write_atomically
from phi3v.runlog import RunDirectory, environment
from phi3v.runlog.environment import _git_state


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run").create("model: tiny\nlearning_rate: 0.001\n", {"python": "3.11"})


def eval_line(step: int, when: str, score: float = 0.5) -> dict:
    return {"step": step, "when": when, "metric": "accuracy", "score": score, "low": 0.4, "high": 0.6, "n": 10}


def test_what_is_written_is_read_back(run: RunDirectory) -> None:
    run.append_step({"step": 1, "loss": 2.5})
    run.append_eval(eval_line(0, "before"))
    run.write_predictions(0, [{"id": "a", "prediction": "größer\u2028ß"}, {"id": "b", "prediction": ""}])
    run.write_data({"train": {"samples": 3}})
    run.write_audit({"trainable": 5})
    run.write_best({"step": 1, "score": 0.5})

    read = RunDirectory(run.path).open()
    assert read.config() == {"model": "tiny", "learning_rate": 0.001}
    assert read.config_text() == "model: tiny\nlearning_rate: 0.001\n"
    assert read.environment() == {"python": "3.11"}
    assert read.steps() == [{"step": 1, "loss": 2.5}]
    assert read.evals() == [eval_line(0, "before")]
    assert read.evaluation("before") == eval_line(0, "before")
    assert read.evaluation("after") is None
    assert read.prediction_steps() == [0]
    assert [row["prediction"] for row in read.predictions(0)] == ["größer\u2028ß", ""]
    assert (read.data(), read.audit()) == ({"train": {"samples": 3}}, {"trainable": 5})
    assert read.best() == {"step": 1, "score": 0.5}
    assert (run.path / "predictions" / "step-00000000.jsonl").is_file()


def test_what_is_not_there_yet_reads_as_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "nowhere")
    assert (run.steps(), run.evals(), run.predictions(3), run.prediction_steps()) == ([], [], [], [])
    assert [run.config(), run.environment(), run.data(), run.audit(), run.best()] == [None] * 5


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run directory"):
        RunDirectory(tmp_path / "nowhere").open()
    with pytest.raises(DataError, match="not a run directory"):
        RunDirectory(tmp_path).open()


def test_every_possible_cut_of_the_last_line_is_read_around_and_repaired(run: RunDirectory) -> None:
    run.append_step({"step": 1, "loss": 2.5})
    whole = run.steps_path.read_bytes()
    second = b'{"step": 2, "loss": {"a": "}"}}\n'
    for cut in range(len(second) + 1):
        run.steps_path.write_bytes(whole + second[:cut])
        # Without its newline a line is complete once its last brace is there.
        survivors = [1, 2] if cut >= len(second) - 1 else [1]
        assert [line["step"] for line in run.steps()] == survivors, cut
        run.append_step({"step": 3})
        assert [line["step"] for line in run.steps()] == [*survivors, 3], cut
        assert all(json.loads(line) for line in run.steps_path.read_text().splitlines()), cut


def test_a_log_cut_to_one_partial_line_starts_anew(run: RunDirectory) -> None:
    run.steps_path.write_bytes(b'{"st')
    run.append_step({"step": 1})
    assert run.steps_path.read_bytes() == b'{"step": 1}\n'


def test_kill_9_loses_no_line_that_was_appended(run: RunDirectory) -> None:
    writer = (
        "import itertools, sys\n"
        "from phi3v.runlog import RunDirectory\n"
        "run = RunDirectory(sys.argv[1])\n"
        "for step in itertools.count(1):\n"
        "    run.append_step({'step': step, 'filler': 'x' * 3000})\n"
        "    print(step, flush=True)\n"
    )
    # Started under the command's name: then importing the package does not load the model's dependencies.
    script = run.path / "phi3v.py"
    script.write_text(writer)
    source = Path(phi3v.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-P", str(script), str(run.path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    acknowledged = 20 + len(process.stdout.read().split())
    process.wait()
    steps = [line["step"] for line in run.steps()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= acknowledged - 1  # the last number printed may itself be cut


def test_a_broken_line_within_a_log_is_named(run: RunDirectory) -> None:
    run.steps_path.write_text('{"step": 1}\n\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"steps\.jsonl:3: not a JSON object: 'nonsense'; remove"):
        run.steps()


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1', "nul"])
def test_a_broken_json_file_is_named(run: RunDirectory, content: str) -> None:
    run.audit_path.write_text(content)
    with pytest.raises(DataError, match=r"audit\.json: not a JSON object"):
        run.audit()


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "when: 2026-99-99"])
def test_a_broken_configuration_is_named(run: RunDirectory, content: str) -> None:
    run.config_path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        run.config()


def test_logs_are_json_for_every_reader_whatever_a_run_measures(run: RunDirectory) -> None:
    run.append_step(
        {
            "step": 1,
            "loss": float("nan"),
            "grad_norm": np.float32("inf"),
            "learning_rate": np.float64(1e-5),
            "path": Path("a/b"),
            "shape": (1, np.int64(2)),
        }
    )
    run.write_predictions(1, [{"id": "a", "prediction": "\ud800"}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(run.steps_path.read_text(), parse_constant=refuse)
    assert line == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 1e-5,
        "path": "a/b",
        "shape": [1, 2],
    }
    assert run.predictions(1)[0]["prediction"] == "\ud800"


@pytest.mark.parametrize("line", [{}, {"step": "1"}, {"step": 1.0}, {"step": True}])
def test_a_step_line_needs_a_whole_numbered_step(run: RunDirectory, line: dict) -> None:
    with pytest.raises(ValueError, match="step"):
        run.append_step(line)


def test_an_eval_line_needs_a_known_moment(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="before, during, after"):
        run.append_eval({"step": 1, "when": "later"})


def log_run(run: RunDirectory, steps: range) -> None:
    """Logs what an uninterrupted run would in these steps: an evaluation every 4 steps."""
    for step in steps:
        run.append_step({"step": step, "loss": 1 / step})
        if step % 4 == 0:
            run.write_predictions(step, [{"id": "a", "prediction": str(step)}])
            run.append_eval(eval_line(step, "during", step / 100))


def finish_run(run: RunDirectory, step: int) -> None:
    run.write_predictions(step, [{"id": "a", "prediction": str(step)}])
    run.append_eval(eval_line(step, "after", 0.9))


def contents(run: RunDirectory) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("checkpoint", "reached"), [(0, 3), (0, 10), (3, 7), (4, 4), (4, 7), (6, 8), (7, 7), (8, 8), (8, 10), (10, 10)]
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_resumed_runs_logs_equal_an_uninterrupted_runs(
    tmp_path: Path, checkpoint: int, reached: int, is_finished: bool
) -> None:
    runs = [RunDirectory(tmp_path / name).create("model: tiny\n", {}) for name in ("straight", "resumed")]
    for run in runs:
        run.write_predictions(0, [{"id": "a", "prediction": "before"}])
        run.append_eval(eval_line(0, "before"))
    straight, resumed = runs
    log_run(straight, range(1, 11))
    finish_run(straight, 10)

    log_run(resumed, range(1, reached + 1))
    if is_finished:
        finish_run(resumed, reached)
    with resumed.steps_path.open("ab") as file:
        file.write(b'{"step": 9, "lo')
    resumed.truncate_after(checkpoint)
    assert resumed.evaluation("after") is None  # nobody may take the old end for the new one
    log_run(resumed, range(checkpoint + 1, 11))
    finish_run(resumed, 10)
    assert contents(resumed) == contents(straight)


def test_truncating_a_run_without_logs_does_nothing(run: RunDirectory) -> None:
    before = contents(run)
    run.truncate_after(5)
    assert contents(run) == before


def test_clearing_keeps_checkpoints_and_model(run: RunDirectory) -> None:
    log_run(run, range(1, 5))
    finish_run(run, 4)
    kept = [run.checkpoints_dir / "checkpoint-4" / "manifest.json", run.model_dir / "config.json"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    run.clear_logs()
    assert (run.steps(), run.evals(), run.prediction_steps(), run.evaluation("after")) == ([], [], [], None)
    assert all(path.exists() for path in kept)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.json"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new, but only in part")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_holds_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    monkeypatch.setenv("HOME", "/home/topsecret")
    monkeypatch.setattr(sys, "argv", ["phi3v", "--token", "topsecret"])
    recorded = environment(gpus=[{"name": "H200", "memory_bytes": 5}])
    text = json.dumps(recorded)
    assert "topsecret" not in text
    assert os.uname().nodename not in text
    assert recorded["gpus"] == [{"name": "H200", "memory_bytes": 5}]
    assert recorded["packages"]["numpy"] == np.__version__
    assert "deepspeed" not in recorded["packages"] or recorded["packages"]["deepspeed"]
    assert recorded["cpu_count"] == os.cpu_count()


def test_the_commit_recorded_is_the_sources_own_and_no_surrounding_repositorys(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    installed = tmp_path / "site-packages" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("")
    (tmp_path / "source.py").write_text("")
    for arguments in (["init", "-q"], ["add", "source.py"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    state = _git_state(tmp_path / "source.py")
    assert state is not None
    assert state["commit"] == head
    assert _git_state(installed) is None
