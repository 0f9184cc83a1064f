"""What `phi3v bench` measures."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from phi3v.config import Device, TrainConfig
from phi3v.errors import ConfigError

Method = Literal["full", "frozen_vision", "lora", "qlora"]
Checkpointing = Literal["auto", "off", "selective", "full"]
Sweep = Literal["num_crops", "length", "micro_batch", "rank"]

FRAME_TOKENS = 8
"""Positions of a sample's frame: three in front of its image, the ``<s>`` behind it, four before the answer."""

ANSWER_TOKENS = 10
"""Supervised positions of a drawn sample."""

MIN_TEXT_TOKENS = 31
"""Least ``text_tokens``: the shortest sample, 5/8 of it, then still holds frame, question and answer."""


LEARNING_RATE = 1e-6
"""So small that random answers drive random weights nowhere."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured: the model, the work, and how the machine is used.

    Args:
        method: what is trained.
        lora_rank: rank of the adapters of lora and qlora.
        precision: number format; auto is bf16 on a GPU that has it, else fp32.
        batch_size: samples an optimizer step.
        micro_batch_tokens: most decoder positions at once; without it what fits the memory.
        checkpointing: what the backward pass computes again: nothing, norms and activations, every layer; auto is the
            least that fits.
        fp8: multiply the decoder's linear layers in float8.
        num_crops: most tiles that a page of 1100 x 850 px is cut into.
        text_tokens: positions of a sample besides its image, on average; drawn evenly from 5/8 to 11/8 of it. 33 gives
            2,530 to 2,554 positions at num_crops 16.
        questions_per_image: samples that share a page, on average; 3.87 is DocVQA's.
        shared_questions: most samples that are computed on one common beginning.
        cached_features: with frozen_vision, take the image's rows as computed before.
        data: take lengths from these samples instead of drawing them; needs tokenizer.
        tokenizer: folder or hub id of the processor that measures data.
        steps: timed optimizer steps.
        warmup_steps: optimizer steps before, which compile; timed apart.
        baseline: also measure the published recipe's choices, for a ratio.
        baseline_samples: samples that the baseline is timed on.
        table: measure all four methods, beside the published figures.
        sweep: measure again at several values of one thing.
        tiny: a small model, for tests of the bench itself.
        device: where to run; auto is the GPU if there is one.
        seed: of weights and samples.
        output: JSON file for everything that was measured.
    """

    method: Method = "full"
    lora_rank: int = 64
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_size: int = 64
    micro_batch_tokens: int | None = None
    checkpointing: Checkpointing = "auto"
    fp8: bool = False
    num_crops: int = 16
    text_tokens: int = 33
    questions_per_image: float = 1.0
    shared_questions: int = 8
    cached_features: bool = False
    data: Path | None = None
    tokenizer: str | None = None
    steps: int = 4
    warmup_steps: int = 2
    baseline: bool = False
    baseline_samples: int = 16
    table: bool = False
    sweep: Sweep | None = None
    tiny: bool = False
    device: Device = "auto"
    seed: int = 0
    output: Path | None = None

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1,
            "num_crops": 1,
            "text_tokens": MIN_TEXT_TOKENS,
            "questions_per_image": 1,
            "shared_questions": 1,
            "steps": 1,
            "warmup_steps": 0,
            "baseline_samples": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"--{name} is {getattr(self, name)}, must be at least {lowest}")
        if self.cached_features and self.method != "frozen_vision" and not self.table:
            raise ConfigError(f"--cached_features needs --method frozen_vision; the method is {self.method}")
        if (self.data is None) != (self.tokenizer is None):
            raise ConfigError("--data and --tokenizer need each other: lengths are measured with the model's tokenizer")
        if self.sweep == "rank" and self.method not in ("lora", "qlora"):
            raise ConfigError(f"--sweep rank needs --method lora or qlora; the method is {self.method}")
        if self.sweep is not None and (self.table or self.baseline):
            raise ConfigError("--sweep measures one method without a baseline; leave out --table and --baseline")

    def train_config(self) -> TrainConfig:
        """Returns the training run that is measured; its paths are not read."""
        adapters: dict[str, Any] = {}
        if self.method in ("lora", "qlora"):
            adapters = {"lora_rank": self.lora_rank, "lora_alpha": 2.0 * self.lora_rank}
        return TrainConfig(
            model="random weights",
            output_dir=Path("unused"),
            train_data=[Path("unused")],
            method=self.method,
            learning_rate=LEARNING_RATE,
            precision=self.precision,
            batch_size=self.batch_size,
            micro_batch_tokens=self.micro_batch_tokens,
            checkpointing=self.checkpointing,
            fp8=self.fp8,
            num_crops=self.num_crops,
            shared_questions=self.shared_questions,
            seed=self.seed,
            device=self.device,
            **adapters,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
