"""The run directory: what a run leaves on disk, who may read it, and how it survives a kill.

Whole files (``config.yaml``, every ``.json``, every predictions file) appear complete or not at all: they are written
to a temporary sibling, synced and renamed. Logs (``steps.jsonl``, ``spikes.jsonl``, ``eval.jsonl``) grow by one line a
call; a kill can leave a partial last line, which readers skip and the next append removes. Only one process may write:
rank 0.

Every file's fields and units are in ``docs/run-directory.md``.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from phi3v.credentials import plain_without_secrets, without_secrets
from phi3v.errors import ConfigError, DataError
from phi3v.settings import read_plain_yaml

EvalMoment = Literal["before", "during", "after"]

EVAL_MOMENTS: tuple[EvalMoment, ...] = ("before", "during", "after")

PACKAGES_ON_RECORD = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
    "triton",
)
"""Packages whose versions can change a run's numbers or speed; those not installed are left out of the record."""


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
        write_atomically(self.config_path, _encode(without_secrets(config_yaml)))
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
        _append_line(self.steps_path, line, is_synced=False)

    def append_spike(self, line: Mapping[str, Any]) -> None:
        """Adds one line to ``spikes.jsonl``; numbers that are not finite become null.

        Raises:
            ValueError: ``line`` has no whole-numbered ``step``.
        """
        _check_step(line)
        _append_line(self.spikes_path, line, is_synced=False)

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
        _append_line(self.evals_path, line, is_synced=True)
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

    def write_best(self, best: Mapping[str, Any]) -> None:
        write_json(self.best_path, best)

    def truncate_after(self, step: int) -> None:
        """Takes the logs back to ``step``, so that a resumed run's end up equal to an uninterrupted run's.

        Dropped: step lines, spikes and evaluations beyond ``step``; every evaluation from after training, which the
        resumed run takes again; predictions whose evaluation is dropped. Kept: the evaluation from before training.
        """
        for path in (self.steps_path, self.spikes_path):
            if path.exists():
                kept_lines = [line for line in _read_lines(path) if _step_of(line) <= step]
                write_atomically(path, b"".join(map(_json_line, kept_lines)))
        kept_evals = [
            line
            for line in self.evals()
            if line.get("when") == "before" or (line.get("when") == "during" and _step_of(line) <= step)
        ]
        if self.evals_path.exists():
            write_atomically(self.evals_path, b"".join(map(_json_line, kept_evals)))
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
        return _read_lines(self.steps_path)

    def spikes(self) -> list[dict[str, Any]]:
        """Reads ``spikes.jsonl``; empty when there is none."""
        return _read_lines(self.spikes_path)

    def evals(self) -> list[dict[str, Any]]:
        """Reads ``eval.jsonl``; empty when there is none."""
        return _read_lines(self.evals_path)

    def evaluation(self, when: Literal["before", "after"]) -> dict[str, Any] | None:
        """Reads ``eval_before.json`` or ``eval_after.json``; None when that evaluation has not been taken."""
        return _read_json(self.evaluation_path(when))

    def prediction_steps(self) -> list[int]:
        """Lists the steps that have predictions, in order."""
        names = (path.name for path in self.predictions_dir.glob("step-*.jsonl"))
        numbers = (name.removeprefix("step-").removesuffix(".jsonl") for name in names)
        return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())

    def predictions(self, step: int) -> list[dict[str, Any]]:
        """Reads the predictions made at ``step``; empty when there are none."""
        return _read_lines(self.predictions_path(step))

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
        return _read_json(self.environment_path)

    def data(self) -> dict[str, Any] | None:
        """Reads ``data.json``; None when there is none."""
        return _read_json(self.data_path)

    def audit(self) -> dict[str, Any] | None:
        """Reads ``audit.json``; None when there is none."""
        return _read_json(self.audit_path)

    def best(self) -> dict[str, Any] | None:
        """Reads ``best.json``; None when there is none."""
        return _read_json(self.best_path)


def environment(gpus: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Describes the software and the machine, importing none of the packages it names.

    Environment variables, the command line, host and user names stay out: they hold secrets.

    Args:
        gpus: what training found out about its accelerators, recorded as it is.
    """
    return {
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "phi3v": _version("phi3v"),
        "git": _git_state(Path(__file__)),
        "packages": {name: version for name in PACKAGES_ON_RECORD if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": [dict(gpu) for gpu in gpus],
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_atomically(path, _encode(text))


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one line of JSON a row, whole or not at all; numbers that are not finite become null."""
    write_atomically(path, b"".join(_json_line(row) for row in rows))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a kill or a power cut leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Makes a rename in ``directory`` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _append_line(path: Path, line: Mapping[str, Any], *, is_synced: bool) -> None:
    """Appends one JSON line. It reaches the operating system before the call returns, so a kill cannot lose it."""
    encoded = _json_line(line)
    with path.open("ab+") as file:
        _repair_tail(file)
        file.write(encoded)
        if is_synced:
            file.flush()
            os.fsync(file.fileno())


def _repair_tail(file: BinaryIO) -> None:
    """Ends the file with a whole line: completes a last one that lacks its newline only, removes a partial one."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start_of_tail = content.rfind(b"\n") + 1
    if _parse_object(content[start_of_tail:]) is None:
        file.truncate(start_of_tail)
    else:
        file.write(b"\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    # Split at newline bytes only: str.splitlines would also split at separators that JSON strings may hold.
    *whole_lines, tail = content.split(b"\n")
    rows = []
    for number, line in enumerate(whole_lines, start=1):
        if not line.strip():
            continue
        row = _parse_object(line)
        if row is None:
            raise DataError(f"{path}:{number}: not a JSON object: {_excerpt(line)}; remove that line")
        rows.append(row)
    last_row = _parse_object(tail)
    return rows if last_row is None else [*rows, last_row]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    loaded = _parse_object(content)
    if loaded is None:
        raise DataError(f"{path}: not a JSON object: {_excerpt(content)}; remove it or restore the file the run wrote")
    return loaded


def _parse_object(content: bytes) -> dict[str, Any] | None:
    """Reads a JSON object; None for anything else. A part of an object is never one: it lacks its last brace."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _excerpt(content: bytes) -> str:
    return repr(content[:80].decode("utf-8", errors="replace"))


def _json_line(row: Mapping[str, Any]) -> bytes:
    return _encode(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")


def _encode(text: str) -> bytes:
    # A lone surrogate, which UTF-8 cannot hold, becomes \udXXX: within a JSON string that is its own escape.
    return text.encode("utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """Turns numpy scalars, paths and tuples into what JSON has, and numbers that are not finite into None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _check_step(line: Mapping[str, Any]) -> None:
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"a log line's `step` is {step!r}, must be a whole number")


def _step_of(line: Mapping[str, Any]) -> int:
    """A read line's step; -1 for a line that has none, which therefore is older than any step."""
    step = line.get("step")
    return step if isinstance(step, int) else -1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(source_file: Path) -> dict[str, Any] | None:
    """The commit ``source_file`` is at; None for an installed copy, also for one inside somebody else's repository."""
    if _git(source_file, "ls-files", "--error-unmatch", source_file.name) is None:
        return None
    commit = _git(source_file, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "has_changes": bool(_git(source_file, "status", "--porcelain", "--", "."))}


def _git(source_file: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(source_file.parent), *arguments]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_bytes() -> int | None:
    """The machine's main memory, bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
