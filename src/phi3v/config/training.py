"""Training's configuration."""

# ruff: noqa: RUF009 - `setting` returns a dataclasses.field, which the rule cannot see

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phi3v.config.run import RunConfig, check_labels
from phi3v.config.words import (
    CHECKPOINTS,
    EVALUATION,
    FOUR_BIT_PARTS,
    HARDWARE,
    LABELS_DOC,
    LOGGING,
    LORA_PARTS,
    MAX_SEED,
    METHOD,
    MODEL_AND_DATA,
    OPTIMISATION,
    PARTS,
    SCORING_DOC,
    Metric,
    Part,
    Scoring,
)
from phi3v.errors import ConfigError
from phi3v.settings import setting


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides a training run; `phi3v train` reads it and writes it to ``RUN/config.yaml``."""

    train_data: list[Path] = setting(
        MODEL_AND_DATA,
        "Training samples: JSONL files.",
        familiar_names=("dataset", "data", "data_path"),
        on_resume="free",
    )
    eval_data: list[Path] = setting(
        MODEL_AND_DATA,
        "Evaluation samples: JSONL files. None: the run takes no scores.",
        default=[],
        on_resume="free",
    )
    max_length: int | None = setting(
        MODEL_AND_DATA,
        "Longest sample, tokens, its image tokens counted. None: no limit.",
        default=None,
        at_least=2,
        familiar_names=("max_seq_length",),
    )
    on_overlong: Literal["error", "drop", "cut"] = setting(
        MODEL_AND_DATA,
        "A sample longer than max_length: stop and name it, leave it out, or cut its text. The last two are counted.",
        default="error",
        needs=("max_length",),
    )
    check_images: Literal["decode", "header"] = setting(
        MODEL_AND_DATA,
        "How far images are read before training starts: whole, or headers and file ends only, which is faster and "
        "misses damage inside a file.",
        default="decode",
        on_resume="free",
    )

    method: Literal["full", "frozen_vision", "lora", "qlora"] = setting(
        METHOD,
        "What is trained: every weight, every weight but the vision encoder's and its projector's, adapters (LoRA), or "
        "adapters on a model of which four_bit_parts are held in 4 bit (QLoRA; needs the package bitsandbytes).",
        default="full",
        familiar_names=("use_lora", "use_qlora", "freeze_vision_model"),
    )
    freeze: list[Part] = setting(METHOD, "Parts left untrained, besides those that the method freezes.", default=[])
    part_learning_rates: dict[Part, float] = setting(
        METHOD, "Learning rates of single parts; the others take learning_rate.", default={}, above=0
    )
    lora_rank: int = setting(
        METHOD,
        "Rank of the adapters, dimensions.",
        default=64,
        at_least=1,
        needs=("method=lora|qlora",),
        familiar_names=("lora_r",),
    )
    lora_alpha: float = setting(
        METHOD,
        "Strength of the adapters: their output is scaled by lora_alpha / lora_rank, or as use_rslora says.",
        default=128.0,
        above=0,
        needs=("method=lora|qlora",),
    )
    lora_dropout: float = setting(
        METHOD,
        "Share of the adapters' inputs that is dropped while training.",
        default=0.0,
        at_least=0,
        below=1,
        needs=("method=lora|qlora",),
    )
    lora_parts: list[Part] | None = setting(
        METHOD,
        f"Parts that get adapters. None: {', '.join(LORA_PARTS)}, less the frozen ones.",
        default=None,
        needs=("method=lora|qlora",),
    )
    use_rslora: bool = setting(
        METHOD,
        "Scale the adapters' output by lora_alpha / the square root of lora_rank (rsLoRA): its strength then does not "
        "fall with the rank.",
        default=False,
        needs=("method=lora|qlora",),
    )
    use_dora: bool = setting(
        METHOD,
        "Train the length of every row of the adapted weights apart from its direction (DoRA).",
        default=False,
        needs=("method=lora|qlora",),
    )
    four_bit_parts: list[Part] = setting(
        METHOD,
        f"Parts whose linear layers are held in 4 bit, of {', '.join(FOUR_BIT_PARTS)}.",
        default=["decoder"],
        needs=("method=qlora",),
    )

    learning_rate: float = setting(
        OPTIMISATION,
        "Highest learning rate. Published runs took 5e-6 to 5e-5 for full, 2e-5 to 1e-4 for frozen_vision and 2e-4 for "
        "lora and qlora.",
        default=4e-5,
        above=0,
        familiar_names=("lr",),
    )
    batch_size: int = setting(
        OPTIMISATION,
        "Samples an optimizer step, over all devices; cut into as many micro-batches as the devices need.",
        default=64,
        at_least=1,
        familiar_names=("global_batch_size",),
    )
    shared_questions: int | None = setting(
        OPTIMISATION,
        "Most samples that begin with the same images and are trained side by side, images and common beginning "
        "computed once: the same loss and gradients for less work. 1: never. None: 8 where that saves at least a tenth "
        "of the positions, else 1.",
        default=None,
        at_least=1,
    )
    num_train_epochs: float = setting(
        OPTIMISATION,
        "Passes over the training samples; may be a fraction.",
        default=1.0,
        above=0,
        familiar_names=("epochs",),
    )
    max_steps: int | None = setting(
        OPTIMISATION, "Optimizer steps to stop after. None: as num_train_epochs says.", default=None, at_least=1
    )
    lr_scheduler: Literal["linear", "cosine", "constant"] = setting(
        OPTIMISATION,
        "Course of the learning rate after warm-up: falls to 0 on a line or a cosine, or stays.",
        default="linear",
        familiar_names=("lr_scheduler_type",),
    )
    warmup_steps: int | None = setting(
        OPTIMISATION,
        "Optimizer steps over which the learning rate rises from 0. None: 50, or a tenth of the run's steps where that "
        "is fewer.",
        default=None,
        at_least=0,
    )
    weight_decay: float = setting(
        OPTIMISATION, "AdamW's weight decay.", default=0.01, at_least=0, familiar_names=("wd",)
    )
    adam_beta1: float = setting(
        OPTIMISATION, "AdamW's decay of the gradient average, per step.", default=0.9, at_least=0, below=1
    )
    adam_beta2: float = setting(
        OPTIMISATION, "AdamW's decay of the squared-gradient average, per step.", default=0.95, at_least=0, below=1
    )
    adam_epsilon: float = setting(OPTIMISATION, "AdamW's epsilon.", default=1e-7, above=0)
    max_grad_norm: float = setting(
        OPTIMISATION, "Gradients are scaled down to this norm. 0: never.", default=1.0, at_least=0
    )
    sampling: Literal["shuffle", "class_balanced", "one_per_image"] = setting(
        OPTIMISATION,
        "What an epoch draws, always in random order: every sample once; as many samples, every last answer equally "
        "often; or for every image (or set of images) one of its samples.",
        default="shuffle",
    )
    loss_weighting: Literal["sample_mean", "token_mean"] = setting(
        OPTIMISATION,
        "Every sample weighs the same (mean over samples of each one's token mean), or every answer token does.",
        default="sample_mean",
    )
    on_loss_spike: Literal["warn", "stop"] = setting(
        OPTIMISATION,
        "A step whose loss or gradient norm is far above those before (docs/faults.md): record it with its samples and "
        "go on, or end the run before the step is taken.",
        default="warn",
        on_resume="free",
    )
    seed: int = setting(
        OPTIMISATION,
        "Seed of everything random: data order, adapter initialisation, dropout, confidence intervals.",
        default=0,
        at_least=0,
        at_most=MAX_SEED,
    )

    micro_batch_tokens: int | None = setting(
        HARDWARE,
        "Most decoder positions a device computes at once; samples are packed up to it without padding, and a longer "
        "one stands alone. None: what fits the device's memory (on a CPU 4096).",
        default=None,
        at_least=1,
        on_resume="rounds",
    )
    micro_batch_crops: int | None = setting(
        HARDWARE,
        "Most crops a device computes at once. None: what fits the device's memory.",
        default=None,
        at_least=1,
        on_resume="rounds",
    )
    micro_batch_size: int | None = setting(
        HARDWARE,
        "Most samples a device computes at once. None: as many as the other limits allow.",
        default=None,
        at_least=1,
        familiar_names=("per_device_train_batch_size",),
        on_resume="rounds",
    )
    checkpointing: Literal["auto", "off", "selective", "full"] = setting(
        HARDWARE,
        "What is computed again in the backward pass to save memory: nothing, norms and activations, or every layer "
        "(about a third more time). Auto: as little as the device's memory allows.",
        default="auto",
        familiar_names=("gradient_checkpointing",),
        on_resume="rounds",
    )
    fp8: bool = setting(
        HARDWARE,
        "Multiply the decoder's linear layers in float8: faster on GPUs that have it, and no longer exact.",
        default=False,
        needs=("method=full|frozen_vision|lora",),
    )
    parallel: Literal["ddp", "fsdp2", "zero2", "zero3"] = setting(
        HARDWARE,
        "How processes work together. Ddp: each holds everything. Fsdp2: torch's, each holds a share of everything. "
        "Zero2, zero3: DeepSpeed's, each holds a share of optimizer and gradients, with zero3 of the weights too.",
        default="ddp",
        familiar_names=("fsdp", "deepspeed", "deepspeed_config"),
        on_resume="rounds",
    )
    cpu_offload: bool = setting(
        HARDWARE,
        "Keep what processes hold shares of in the machine's memory, and not in the GPUs'.",
        default=False,
        needs=("parallel=fsdp2|zero2|zero3",),
        on_resume="rounds",
    )
    vision_cache: Path | None = setting(
        HARDWARE,
        "Folder in which the features of a frozen vision encoder are kept, so that an image is computed once and not "
        "in every epoch. None: they are not kept.",
        default=None,
        on_resume="free",
    )
    num_workers: int = setting(
        HARDWARE,
        "Processes a device that prepare samples. 0: the training process does.",
        default=2,
        at_least=0,
        on_resume="free",
    )

    save_steps: int | None = setting(
        CHECKPOINTS,
        "Optimizer steps between checkpoints to resume from. None: no regular ones; see keep_best.",
        default=100,
        at_least=1,
        on_resume="free",
    )
    keep_checkpoints: int = setting(
        CHECKPOINTS,
        "Newest checkpoints kept; older ones are deleted, the best one aside.",
        default=2,
        at_least=1,
        familiar_names=("save_total_limit",),
        on_resume="free",
    )
    keep_best: bool = setting(
        CHECKPOINTS,
        "Save at every new best mid-run score, keep that checkpoint, and end with its weights in model/.",
        default=True,
        needs=("eval_data", "eval_steps"),
        on_resume="free",
    )
    resume: Literal["auto", "never"] = setting(
        CHECKPOINTS,
        "A run directory with checkpoints in it: go on from the newest complete one, or refuse.",
        default="auto",
        familiar_names=("resume_from_checkpoint",),
        on_resume="free",
    )

    eval_before: bool = setting(
        EVALUATION,
        "Take the score before training too.",
        default=True,
        needs=("eval_data",),
        on_resume="free",
    )
    eval_steps: int | None = setting(
        EVALUATION,
        "Optimizer steps between scores taken during training. None: at the end only.",
        default=None,
        at_least=1,
        needs=("eval_data",),
        on_resume="free",
    )
    eval_metric: Metric = setting(
        EVALUATION,
        "How an answer is scored.",
        default="accuracy",
        needs=("eval_data",),
        familiar_names=("metric",),
    )
    eval_scoring: Scoring = setting(
        EVALUATION,
        SCORING_DOC,
        default="generate",
        needs=("eval_data",),
        familiar_names=("scoring",),
    )
    eval_labels: list[str] = setting(
        EVALUATION,
        LABELS_DOC,
        default=[],
        needs=("eval_data",),
        familiar_names=("labels",),
    )
    eval_batch_size: int | None = setting(
        EVALUATION,
        "Most questions answered at once. None: as many as the memory holds.",
        default=None,
        at_least=1,
        needs=("eval_data",),
        familiar_names=("per_device_eval_batch_size",),
        on_resume="free",
    )
    eval_max_new_tokens: int = setting(
        EVALUATION, "Longest generated answer, tokens.", default=64, at_least=1, needs=("eval_data",)
    )
    eval_limit: int | None = setting(
        EVALUATION,
        "Evaluation samples used, from the first. None: all.",
        default=None,
        at_least=1,
        needs=("eval_data",),
    )
    early_stopping_patience: int | None = setting(
        EVALUATION,
        "Mid-run scores in a row without a new best after which training stops. None: never.",
        default=None,
        at_least=1,
        needs=("eval_data", "eval_steps"),
        on_resume="free",
    )

    logging_steps: int = setting(
        LOGGING,
        "Optimizer steps between lines of steps.jsonl.",
        default=1,
        at_least=1,
        on_resume="free",
    )
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        LOGGING,
        "Where the curves go besides steps.jsonl.",
        default=["tensorboard"],
        on_resume="free",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels("eval_labels", self.eval_labels)
        for part in self.lora_parts or []:
            if part not in LORA_PARTS:
                raise ConfigError(
                    f"lora_parts names {part!r}, which takes no adapters; allowed: {', '.join(LORA_PARTS)}"
                )
            if part in self.frozen_parts:
                raise ConfigError(
                    f"lora_parts names {part!r}, which freeze leaves untrained; take it out of one of them"
                )
        _check_four_bit_parts(self.four_bit_parts)
        if not self.trained_parts:
            raise ConfigError("nothing is left to train: freeze and method leave out every part; free at least one")
        for part in self.part_learning_rates:
            if part not in self.trained_parts:
                raise ConfigError(
                    f"part_learning_rates names {part!r}, which this run does not train; "
                    f"it trains {', '.join(self.trained_parts)}"
                )

    @property
    def trains_adapters(self) -> bool:
        """Whether low-rank adapters are trained and every weight of the model itself stays as it is."""
        return self.method in ("lora", "qlora")

    @property
    def frozen_parts(self) -> tuple[Part, ...]:
        """The parts whose own weights ``freeze`` and ``method=frozen_vision`` leave untrained, adapters or not."""
        by_method = ("vision", "projector") if self.method == "frozen_vision" else ()
        return tuple(part for part in PARTS if part in self.freeze or part in by_method)

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """The parts that the run changes: their own weights, or their adapters'."""
        reached = (LORA_PARTS if self.lora_parts is None else self.lora_parts) if self.trains_adapters else PARTS
        return tuple(part for part in PARTS if part in reached and part not in self.frozen_parts)


def _check_four_bit_parts(parts: Sequence[Part]) -> None:
    allowed = f"allowed: {', '.join(FOUR_BIT_PARTS)}"
    if not parts:
        raise ConfigError(f"four_bit_parts is empty; {allowed}. With nothing in 4 bit, use method: lora")
    if "embeddings" in parts:
        raise ConfigError(
            f"four_bit_parts names 'embeddings', which are looked up, and 4-bit layers only multiply; {allowed}"
        )
    if "head" in parts:
        raise ConfigError(
            "four_bit_parts names 'head', whose rounding would fall on every logit with nothing behind it to make up "
            f"for it, to save 5 % of the weights' memory; {allowed}"
        )
