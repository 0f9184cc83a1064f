"""What ends a run from outside is told with what to do; a fault of our own keeps its traceback."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from phi3v.data.schema import SampleError
from phi3v.errors import CapacityError, DataError, Phi3VError, StoppedError
from phi3v.train.faults import DeadWorkerError, explained


class Samples(Dataset[Any]):
    """Its second sample makes its worker do something."""

    def __init__(self, act: Any) -> None:
        self._act = act

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 1:
            self._act()
        return torch.zeros(2)

    def __len__(self) -> int:
        return 3


def die() -> None:
    os.kill(os.getpid(), 9)


def refuse() -> None:
    raise SampleError("data.jsonl:3: sample 'a': image 'a.png' does not exist. Correct the path.", "missing image")


def read_all(act: Any) -> None:
    with explained(lambda: "Checkpoint 3."):
        list(DataLoader(Samples(act), batch_size=None, num_workers=1))


def test_a_real_worker_that_dies() -> None:
    with pytest.raises(Phi3VError, match=r"samples died \(.*\)\. Mostly .* lower num_workers\. Checkpoint 3\."):
        read_all(die)


def test_a_worker_whose_death_torch_notices_while_it_is_explained() -> None:
    """torch raises in its signal handler, wherever the program is then, once."""
    noticed: list[str] = []

    def last_checkpoint() -> str:
        if not noticed:
            noticed.append("now")
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        return "The last checkpoint is c."

    died = r"a process that prepares samples died \(DataLoader worker \(pid 7\) .* The last checkpoint is c\."
    with pytest.raises(Phi3VError, match=died), explained(last_checkpoint):
        raise DeadWorkerError("Connection reset by peer")


def test_a_real_worker_that_meets_a_bad_sample() -> None:
    with pytest.raises(DataError) as caught:
        read_all(refuse)
    message = str(caught.value)
    assert message.startswith("data.jsonl:3: sample 'a': image 'a.png' does not exist. Correct the path. The check")
    assert "the same command goes on. Checkpoint 3." in message and "Traceback" not in message


def test_a_real_full_disk() -> None:
    told = r"the disk is full: .*No space left .*Make room, and start the same command again\. Checkpoint 3\."
    with pytest.raises(CapacityError, match=told), explained(lambda: "Checkpoint 3."):
        Path("/dev/full").write_text("a line")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), CapacityError, "the disk is full"),
        (DeadWorkerError("[Errno 104] Connection reset by peer"), Phi3VError, "lower num_workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), Phi3VError, "lower num_workers"),
        (torch.distributed.DistBackendError("NCCL error"), Phi3VError, "another process of the run ended"),
        (StoppedError("the run stopped"), StoppedError, "the run stopped. Checkpoint 3. The same command goes on."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_libraries_raise(error: Exception, kind: type[Phi3VError], told: str) -> None:
    with pytest.raises(kind) as caught, explained(lambda: "Checkpoint 3."):
        raise error
    assert told in str(caught.value) and "Checkpoint 3." in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("a shape is wrong"), FileNotFoundError("x"), KeyError("x")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(lambda: "Checkpoint 3."):
        raise error
    assert caught.value is error
