"""What tests of engines share: an optimizer, micro-batches, and two processes that exchange."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from packs import Pack, Question
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.packed import PackedBatch

LEARNING_RATE = 1e-3


def adamw(model: nn.Module) -> torch.optim.AdamW:
    # A large epsilon keeps updates proportional to the gradients: rounding stays rounding.
    trained = [one for one in model.parameters() if one.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=1e-2)


def packs_of(config: Phi3VConfig) -> list[PackedBatch]:
    """One micro-batch for each of two processes."""
    questions = [Question((0,), 9, 3), Question((), 7, 2)]
    return [Pack(config, [(1, 1)], wholes=questions, seed=rank).packed() for rank in range(2)]


def in_two_processes(work: Callable[[int], dict[str, torch.Tensor]], folder: Path) -> list[dict[str, torch.Tensor]]:
    """Forks two processes that talk through gloo; returns what each found."""
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                store = distributed.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]
                distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)  # pyright: ignore[reportPrivateImportUsage]
                save_file(work(rank), folder / f"{rank}.safetensors")
                distributed.barrier()
                code = 0
            except BaseException:  # noqa: BLE001  a child must never return into pytest
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
