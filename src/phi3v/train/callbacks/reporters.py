"""A run's speed and memory, its log and its progress line."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phi3v.runlog import RunDirectory
from phi3v.train.trainer import Phi3VTrainer

_STEP_FIELDS = (
    "loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "sharing", "memory_bytes", "elapsed_s",
)  # fmt: skip


class SpeedMeter(TrainerCallback):
    """Measures optimizer steps: data, forward, backward and update, but neither saving nor scoring.

    Args:
        trainer: whose windows are counted.
        earlier_s: seconds that the run trained before it was resumed.
    """

    def __init__(self, trainer: Phi3VTrainer, earlier_s: float) -> None:
        self._trainer = trainer
        self._elapsed_s = earlier_s
        self._samples = self._tokens = self._computed_tokens = 0
        self._seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        window = self._trainer.window
        assert window is not None
        seconds = time.perf_counter() - window.started_s
        self._samples += window.plan.samples
        self._tokens += window.plan.tokens
        self._computed_tokens += window.plan.computed_tokens
        self._seconds += seconds
        self._elapsed_s += seconds

    def read(self) -> dict[str, float]:
        """Returns speed and sharing since the last call, over all processes, and this process's peak memory."""
        speed = {
            "samples_per_s": self._samples / self._seconds,
            "tokens_per_s": self._tokens / self._seconds,
            "sharing": self._tokens / self._computed_tokens,
            "memory_bytes": peak_memory_bytes(self._trainer.args.device),
            "elapsed_s": self._elapsed_s,
        }
        self._samples = self._tokens = self._computed_tokens = 0
        self._seconds = 0.0
        return speed


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory held so far: a GPU's own, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class RunLog(TrainerCallback):
    """Writes ``steps.jsonl``.

    Args:
        run: the run directory; only the writing process has this callback.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            measured = {name: logs[name] for name in _STEP_FIELDS if name in logs}
            self._run.append_step({"step": state.global_step, "epoch": state.epoch, **measured})


class ProgressLine(TrainerCallback):
    """Shows loss, speed and memory.

    Args:
        has_bar: as a progress bar; else as plain lines.
    """

    def __init__(self, *, has_bar: bool) -> None:
        self._has_bar = has_bar
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", dynamic_ncols=True,
            disable=not self._has_bar,
        )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._bar is not None
        self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._bar is None:
            return
        text = (
            f"loss {logs['loss']:.4f}, {logs['samples_per_s']:.3g} samples/s, {logs['tokens_per_s']:,.0f} tokens/s, "
            f"{logs['memory_bytes'] / 1e9:.1f} GB"
        )
        if logs["sharing"] > 1:
            text += f", {logs['sharing']:.2f} x by sharing"
        if self._bar.disable:
            print(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._bar is not None
        self._bar.close()
