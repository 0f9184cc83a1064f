"""Training runs as their users start them, in processes that tests signal, kill and starve."""

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.state import AcceleratorState

from phi3v.cli import main
from phi3v.config import TrainConfig
from phi3v.runlog import RunDirectory

HANGS_AFTER_S = 100
"""Time after which a run that is still going says where it is."""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


class Command:
    """``phi3v train`` in one process, or in several under torchrun; its output goes to a file.

    Args:
        config: of the run.
        num_processes: more than one: torchrun starts them.
    """

    def __init__(self, config: TrainConfig, num_processes: int = 1) -> None:
        file = config.output_dir.with_name(f"{config.output_dir.name}.yaml")
        file.write_text(config.to_yaml())
        launcher = [*TORCHRUN, f"--nproc_per_node={num_processes}"] if num_processes > 1 else []
        self.run = RunDirectory(config.output_dir)
        self.output_path = config.output_dir.with_name(f"{config.output_dir.name}.txt")
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "phi3v", "train", str(file)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._num_processes = num_processes

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def wait(self, timeout_s: float = 120) -> int:
        """Waits for the end; returns the exit code. What is left of the command is killed."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout_s} s:\n{self.output[-3000:]}") from None
        finally:
            self.kill()

    def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> bool:
        """Waits for a condition; returns False when the command ends before."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline, f"nothing happened within {timeout_s} s:\n{self.output[-3000:]}"
            time.sleep(0.005)
        return False

    def until_step(self, step: int) -> bool:
        """Waits for an optimizer step to be logged."""
        return self.until(lambda: any(line["step"] >= step for line in self.run.steps()))

    def ranks(self) -> list[int]:
        """Returns the training processes' ids: the command's own, or torchrun's children's."""
        if self._num_processes == 1:
            return [self.process.pid]
        return [pid for pid in children(self.process.pid) if "phi3v" in command_line(pid)]

    def workers(self) -> list[int]:
        """Returns the ids of the processes that prepare samples."""
        return [pid for rank in self.ranks() for pid in children(rank) if "phi3v" in command_line(pid)]

    def kill(self) -> None:
        """Kills everything that the command has started, as ``kill -9`` does."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            kill(pid)
        self.process.wait()


class Forked:
    """``phi3v train`` in forked processes, without an interpreter's start: for tests that start hundreds of runs.

    Args:
        config: of the run.
        num_processes: more than one: they find each other as torchrun's would, but nobody watches over them.
    """

    def __init__(self, config: TrainConfig, num_processes: int = 1) -> None:
        file = config.output_dir.with_name(f"{config.output_dir.name}.yaml")
        file.write_text(config.to_yaml())
        self.run = RunDirectory(config.output_dir)
        self.output_path = config.output_dir.with_name(f"{config.output_dir.name}.txt")
        self.output_path.write_bytes(b"")
        port = free_port()
        self._codes: dict[int, int | None] = {}
        for rank in range(num_processes):
            pid = os.fork()
            if pid == 0:
                self._train(file, rank, num_processes, port)
            self._codes[pid] = None

    @property
    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Returns the processes' ids, by rank."""
        return list(self._codes)

    def workers(self) -> list[int]:
        """Returns the ids of the processes that prepare samples, by rank."""
        return [worker for pid in self._codes for worker in children(pid)]

    def codes(self) -> list[int | None]:
        """Returns the exit codes, by rank, or minus the signal; None of one that runs."""
        for pid, code in self._codes.items():
            if code is None:
                waited, status = os.waitpid(pid, os.WNOHANG)
                self._codes[pid] = os.waitstatus_to_exitcode(status) if waited else None
        return list(self._codes.values())

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Waits for the end of all; returns their exit codes, or minus the signal."""
        deadline = time.monotonic() + timeout_s
        while any(code is None for code in self.codes()):
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end within {timeout_s} s:\n{self.output[-3000:]}")
            time.sleep(0.01)
        return [code for code in self.codes() if code is not None]

    def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> bool:
        """Waits for a condition; returns False when a process ends before."""
        deadline = time.monotonic() + timeout_s
        while all(code is None for code in self.codes()):
            if condition():
                return True
            assert time.monotonic() < deadline, f"nothing happened within {timeout_s} s:\n{self.output[-3000:]}"
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        """Kills all processes and those that they have started."""
        for pid, code in self._codes.items():
            if code is None:
                for one in [*descendants(pid), pid]:
                    kill(one)
                os.waitpid(pid, 0)
                self._codes[pid] = -signal.SIGKILL

    def _train(self, file: Path, rank: int, num_processes: int, port: int) -> NoReturn:
        code = 1
        try:
            output = os.open(self.output_path, os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            # pytest has put something else in their place.
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
            faulthandler.dump_traceback_later(HANGS_AFTER_S, file=sys.stderr)
            if num_processes > 1:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
            AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test left in this process
            torch.set_num_threads(1)
            code = main(["train", str(file)])
        except BaseException:  # noqa: BLE001  a child must never return into pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signals a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Returns the ids of a process's children, oldest first; none of one that has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield from descendants(child)
        yield child


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mounts a file system of this size in memory.

    Raises:
        PermissionError: this user may not mount.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        raise PermissionError("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
