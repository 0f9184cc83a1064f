"""What ends a run from outside, in words that say what to do: a full disk, a process that died, an image that went."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from safetensors import SafetensorError
from torch import distributed

from phi3v.errors import CapacityError, DataError, Phi3VError, StoppedError
from phi3v.files import is_full_disk

_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")
_HANDED_ON = re.compile(r"\ACaught \w+ in DataLoader worker process .*\n[\w.]+Error: ", re.DOTALL)
_OUT_OF_MEMORY = re.compile(r"CUDA.*out of memory|NCCL.*out of memory|cublas.*ALLOC_FAILED", re.IGNORECASE | re.DOTALL)
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Read timeout|gloo|NCCL|Timed out waiting"
)


logger = logging.getLogger(__name__)


class DeadWorkerError(RuntimeError):
    """A process that prepares samples died while something of it was being fetched."""


@contextmanager
def explained(last_checkpoint: Callable[[], str]) -> Iterator[None]:
    """Turns what ends a run from outside into an error that says what was found and what to do.

    Args:
        last_checkpoint: describes the newest complete checkpoint.

    Raises:
        StoppedError: the run was asked to stop; the message says how to go on.
        CapacityError: the disk is full, or the GPU.
        DataError: a sample cannot be read any more, though the check before training could.
        Phi3VError: a process that prepares samples died, or another process of the run.
    """
    try:
        with _explained(last_checkpoint):
            yield
    except RuntimeError as error:
        # Of a dead worker torch raises at any place, once: also while that death is being explained.
        _raise_explained(error, last_checkpoint)


@contextmanager
def _explained(last_checkpoint: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("%s The same command goes on.", last_checkpoint())
        raise
    except StoppedError as error:
        raise StoppedError(f"{error}. {last_checkpoint()} The same command goes on.") from error
    except DataError as error:
        raise DataError(
            f"{_without_traceback(str(error))} The check before training found it good, so a file has changed since. "
            f"Put it back, and the same command goes on. {last_checkpoint()} To train without the sample, start a new "
            "run in another output_dir."
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        _raise_explained(error, last_checkpoint)


def _raise_explained(error: OSError | SafetensorError | RuntimeError, last_checkpoint: Callable[[], str]) -> NoReturn:
    explanation = _explanation(error)
    if explanation is None:
        raise error
    kind, text = explanation
    raise kind(f"{text} {last_checkpoint()}") from error


def _explanation(error: OSError | SafetensorError | RuntimeError) -> tuple[type[Phi3VError], str] | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        return CapacityError, (
            f"the GPU's memory did not suffice: {_first_line(text)} Lower micro_batch_tokens, or set checkpointing to "
            "full: both may be changed in a run that goes on. More GPUs with parallel fsdp2, or method lora or qlora, "
            "need less on each."
        )
    if is_full_disk(error):
        return CapacityError, f"the disk is full: {text}. Make room, and start the same command again."
    if isinstance(error, DeadWorkerError) or (isinstance(error, RuntimeError) and _DEAD_WORKER.search(text)):
        return Phi3VError, (
            f"a process that prepares samples died ({_first_line(text)}). Mostly the machine ran out of memory, and "
            "the system's log (dmesg) says so. Start the same command again; if it happens again, lower num_workers."
        )
    if isinstance(error, RuntimeError) and _is_of_peers(error):
        return Phi3VError, (
            f"another process of the run ended or cannot be reached ({_first_line(text)}). Its own message, further "
            "up or in its log, says why. Start the same command again."
        )
    return None


def _is_of_peers(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or (
        distributed.is_available() and distributed.is_initialized() and bool(_LOST_PEER.search(str(error)))
    )


def _without_traceback(text: str) -> str:
    """Returns an error's message without the traceback that torch puts before it when a worker handed it on."""
    return _HANDED_ON.sub("", text).strip()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
