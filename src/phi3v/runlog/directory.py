"""The run directory: what a run leaves on disk, who may read it, and how it survives a kill.

Whole files (``config.yaml``, every ``.json``, every predictions file) appear complete or not at all: they are written
to a temporary sibling, synced and renamed. Logs (``steps.jsonl``, ``spikes.jsonl``, ``eval.jsonl``) grow by one line a
call; a kill can leave a partial last line, which readers skip and the next append removes. Only one process may write:
rank 0.

Every file's fields and units are in ``docs/run-directory.md``.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from phi3v.credentials import plain_without_secrets, without_secrets
from phi3v.errors import ConfigError, DataError
from phi3v.files import encode, json_line, write_atomically, write_json, write_json_lines
from phi3v.runlog.lines import append_line, read_json, read_lines
from phi3v.settings import read_plain_yaml

EvalMoment = Literal["before", "during", "after"]

EVAL_MOMENTS: tuple[EvalMoment, ...] = ("before", "during", "after")


class RunDirectory:
    """One run's folder: its paths, its writers and its readers. Making the object touches nothing on disk.

    >>> import tempfile
    >>> run = RunDirectory(tempfile.mkdtemp()).create("model: tiny\\n", {"python": "3.11"})
    >>> run.append_step({"step": 1, "loss": 2.5})
    >>> run.append_step({"step": 2, "loss": float("nan")})
    >>> run.steps()
    [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': None}]
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def identity_path(self) -> Path:
        """What the run is; beside the checkpoints and not among them, which a user may delete."""
        return self.path / "identity.json"

    @property
    def result_path(self) -> Path:
        """Which step's weights lie in ``model``."""
        return self.path / "result.json"

    @property
    def data_path(self) -> Path:
        return self.path / "data.json"

    @property
    def audit_path(self) -> Path:
        return self.path / "audit.json"

    @property
    def steps_path(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def spikes_path(self) -> Path:
        return self.path / "spikes.jsonl"

    @property
    def evals_path(self) -> Path:
        return self.path / "eval.jsonl"

    @property
    def predictions_dir(self) -> Path:
        return self.path / "predictions"

    @property
    def best_path(self) -> Path:
        return self.path / "best.json"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def predictions_path(self, step: int) -> Path:
        return self.predictions_dir / f"step-{step:08d}.jsonl"

    def evaluation_path(self, when: Literal["before", "after"]) -> Path:
        return self.path / f"eval_{when}.json"

    def create(self, config_yaml: str, environment: Mapping[str, Any]) -> Self:
        """Makes the folder and writes ``config.yaml`` and ``environment.json``; logs already there stay.

        A run that starts where another has been calls ``clear_logs`` (a new run) or ``truncate_after`` (the same
        run, resumed) as well. Passwords and access tokens are not written; a configuration refuses them beforehand.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_path, encode(without_secrets(config_yaml)))
        write_json(self.environment_path, plain_without_secrets(environment))
        return self

    def open(self) -> Self:
        """Checks that the folder holds a run.

        Raises:
            DataError: no such folder, or nothing in it that a run writes.
        """
        if not self.path.is_dir():
            raise DataError(f"{self.path}: there is no such run directory; give the output_dir of a run")
        if not (self.config_path.exists() or self.has_logs):
            raise DataError(
                f"{self.path}: no config.yaml, steps.jsonl, eval.jsonl or predictions here, so this is not a run "
                "directory; give the output_dir of a run"
            )
        return self

    @property
    def has_logs(self) -> bool:
        """Whether a run has logged anything here."""
        return self.steps_path.exists() or self.evals_path.exists() or self.predictions_dir.exists()

    @property
    def holds_training(self) -> bool:
        """Whether a training run is or was here; an evaluation's folder looks otherwise."""
        own = (self.environment_path, self.identity_path, self.checkpoints_dir)
        return self.has_logs or any(path.exists() for path in own)

    def clear_logs(self) -> None:
        """Removes what an earlier run logged here. Checkpoints, the final model and tensorboard files stay."""
        for path in (
            self.steps_path,
            self.spikes_path,
            self.evals_path,
            self.evaluation_path("before"),
            self.evaluation_path("after"),
            self.data_path,
            self.audit_path,
            self.best_path,
            self.report_path,
        ):
            path.unlink(missing_ok=True)
        for step in self.prediction_steps():
            self.predictions_path(step).unlink()

    def append_step(self, line: Mapping[str, Any]) -> None:
        """Adds one line to ``steps.jsonl``; numbers that are not finite become null.

        Raises:
            ValueError: ``line`` has no whole-numbered ``step``.
        """
        _check_step(line)
        append_line(self.steps_path, line, is_synced=False)

    def append_spike(self, line: Mapping[str, Any]) -> None:
        """Adds one line to ``spikes.jsonl``; numbers that are not finite become null.

        Raises:
            ValueError: ``line`` has no whole-numbered ``step``.
        """
        _check_step(line)
        append_line(self.spikes_path, line, is_synced=False)

    def append_eval(self, line: Mapping[str, Any]) -> None:
        """Adds one line to ``eval.jsonl``, and writes it to ``eval_before.json`` or ``eval_after.json`` if it is one.

        Raises:
            ValueError: ``line`` has no whole-numbered ``step``, or its ``when`` is none of ``EVAL_MOMENTS``.
        """
        _check_step(line)
        when = line.get("when")
        if when not in EVAL_MOMENTS:
            raise ValueError(f"an eval line's `when` is {when!r}, must be one of {', '.join(EVAL_MOMENTS)}")
        # An evaluation costs minutes to hours, so its line is worth a sync to the disk; a step's is not.
        append_line(self.evals_path, line, is_synced=True)
        if when == "before" or when == "after":
            write_json(self.evaluation_path(when), line)

    def write_predictions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes the predictions made at ``step``, one line a question, in place of any written there before."""
        path = self.predictions_path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(path, rows)
        return path

    def write_data(self, summary: Mapping[str, Any]) -> None:
        write_json(self.data_path, summary)

    def write_audit(self, audit: Mapping[str, Any]) -> None:
        write_json(self.audit_path, audit)

    def write_best(self, best: Mapping[str, Any] | None) -> None:
        """Writes ``best.json``; None removes it."""
        if best is None:
            self.best_path.unlink(missing_ok=True)
        else:
            write_json(self.best_path, best)

    def truncate_after(self, step: int) -> None:
        """Takes the logs back to ``step``, so that a resumed run's end up equal to an uninterrupted run's.

        Dropped: step lines, spikes and evaluations beyond ``step``; every evaluation from after training, which the
        resumed run takes again; predictions whose evaluation is dropped. Kept: the evaluation from before training.
        """
        for path in (self.steps_path, self.spikes_path):
            if path.exists():
                kept_lines = [line for line in read_lines(path) if _step_of(line) <= step]
                write_atomically(path, b"".join(map(json_line, kept_lines)))
        kept_evals = [
            line
            for line in self.evals()
            if line.get("when") == "before" or (line.get("when") == "during" and _step_of(line) <= step)
        ]
        if self.evals_path.exists():
            write_atomically(self.evals_path, b"".join(map(json_line, kept_evals)))
        self.evaluation_path("after").unlink(missing_ok=True)
        evaluated_steps = {_step_of(line) for line in kept_evals}
        for prediction_step in self.prediction_steps():
            if prediction_step not in evaluated_steps:
                self.predictions_path(prediction_step).unlink()

    def steps(self) -> list[dict[str, Any]]:
        """Reads ``steps.jsonl``; empty when there is none.

        Raises:
            DataError: a line other than a partial last one is not a JSON object. So do all readers of ``.jsonl``.
        """
        return read_lines(self.steps_path)

    def spikes(self) -> list[dict[str, Any]]:
        """Reads ``spikes.jsonl``; empty when there is none."""
        return read_lines(self.spikes_path)

    def evals(self) -> list[dict[str, Any]]:
        """Reads ``eval.jsonl``; empty when there is none."""
        return read_lines(self.evals_path)

    def evaluation(self, when: Literal["before", "after"]) -> dict[str, Any] | None:
        """Reads ``eval_before.json`` or ``eval_after.json``; None when that evaluation has not been taken."""
        return read_json(self.evaluation_path(when))

    def prediction_steps(self) -> list[int]:
        """Lists the steps that have predictions, in order."""
        names = (path.name for path in self.predictions_dir.glob("step-*.jsonl"))
        numbers = (name.removeprefix("step-").removesuffix(".jsonl") for name in names)
        return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())

    def predictions(self, step: int) -> list[dict[str, Any]]:
        """Reads the predictions made at ``step``; empty when there are none."""
        return read_lines(self.predictions_path(step))

    def config(self) -> dict[str, Any] | None:
        """Reads ``config.yaml``; None when there is none.

        Raises:
            ConfigError: it is not a YAML mapping as a run writes it.
        """
        if not self.config_path.exists():
            return None
        try:
            return read_plain_yaml(self.config_path)
        except ConfigError as error:
            raise ConfigError(f"{error}; restore the file the run wrote") from error

    def config_text(self) -> str | None:
        """Reads ``config.yaml`` as it was written; None when there is none."""
        try:
            return self.config_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def environment(self) -> dict[str, Any] | None:
        """Reads ``environment.json``; None when there is none."""
        return read_json(self.environment_path)

    def data(self) -> dict[str, Any] | None:
        """Reads ``data.json``; None when there is none."""
        return read_json(self.data_path)

    def audit(self) -> dict[str, Any] | None:
        """Reads ``audit.json``; None when there is none."""
        return read_json(self.audit_path)

    def best(self) -> dict[str, Any] | None:
        """Reads ``best.json``; None when there is none."""
        return read_json(self.best_path)


def _check_step(line: Mapping[str, Any]) -> None:
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"a log line's `step` is {step!r}, must be a whole number")


def _step_of(line: Mapping[str, Any]) -> int:
    """A read line's step; -1 for a line that has none, which therefore is older than any step."""
    step = line.get("step")
    return step if isinstance(step, int) else -1
