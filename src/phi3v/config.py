"""The configurations of a run: typed fields, each with its default, range and meaning.

``python -m phi3v.cli.configuration_page`` prints docs/configuration.md from them.
"""

# ruff: noqa: RUF009 - `setting` returns a dataclasses.field, which the rule cannot see

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from phi3v.errors import ConfigError
from phi3v.settings import Setting, describe_field, expand_home, read_file, read_overrides, setting, write_yaml

Part = Literal["vision", "projector", "decoder", "embeddings", "head"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of the model that a run freezes, adapts or gives a learning rate of its own."""

LORA_PARTS: tuple[Part, ...] = ("vision", "projector", "decoder", "head")
"""Where adapters stand unless `TrainConfig.lora_parts` says otherwise."""

FOUR_BIT_PARTS: tuple[Part, ...] = ("vision", "projector", "decoder")
"""Parts that can be held in 4 bit."""

Metric = Literal["accuracy", "exact_match", "anls", "vqa_accuracy", "relaxed_accuracy", "f1"]
Scoring = Literal["generate", "likelihood", "both"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RopeMode = Literal["auto", "short", "long"]
Device = Literal["auto", "cpu", "cuda"]

MODEL_AND_DATA = "model and data"
METHOD = "method"
OPTIMISATION = "optimisation"
HARDWARE = "hardware"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
LOGGING = "logging"
SECTIONS = (MODEL_AND_DATA, METHOD, OPTIMISATION, HARDWARE, CHECKPOINTS, EVALUATION, LOGGING)

MAX_SEED = 2**32 - 1
"""The largest seed that every random generator in use takes."""


_SCORING_DOC = (
    "Where answers come from. Generate: greedy generation. Likelihood: the likeliest label, for questions with a "
    "closed set of labels; gives probabilities. Both: generated answers are scored, and probabilities taken besides."
)
_LABELS_DOC = "Closed set of answers of every question that names none itself (docs/data.md). None: open questions."


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What training and evaluation share. Constructing one checks it; relative paths are the working directory's."""

    model: str = setting(
        MODEL_AND_DATA,
        "The model: a folder in the published layout, or a hub id such as microsoft/Phi-3.5-vision-instruct. "
        "Evaluation also takes the folder of a PEFT adapter.",
        familiar_names=("model_name_or_path", "model_path"),
    )
    output_dir: Path = setting(MODEL_AND_DATA, "Folder of the run: everything that it writes goes there.")
    image_dir: Path | None = setting(
        MODEL_AND_DATA,
        "Folder that image paths start from. None: images/ beside the JSONL file if there, else that file's folder.",
        default=None,
        familiar_names=("image_folder",),
    )
    num_crops: int | None = setting(
        MODEL_AND_DATA,
        "Most crops an image is cut into, the global view not counted. None: the model's own (4 in the published 3.5 "
        "files). 16 is recommended for single images.",
        default=None,
        at_least=1,
    )
    on_bad_sample: Literal["error", "skip"] = setting(
        MODEL_AND_DATA,
        "A sample that cannot be used (broken line, missing image, wrong image tags): stop and name it, or leave it "
        "out and count it.",
        default="error",
    )
    rope_mode: RopeMode = setting(
        MODEL_AND_DATA,
        "LongRoPE factors: by each sequence's own length, or fixed to match the server that will run the model.",
        default="auto",
    )
    precision: Precision = setting(
        HARDWARE,
        "Number format of the computation. Auto: bf16 on a GPU that has it, else fp32.",
        default="auto",
        familiar_names=("bf16", "fp16"),
    )
    device: Device = setting(HARDWARE, "Where to run. Auto: the GPU if there is one.", default="auto")
    progress: bool = setting(LOGGING, "Show progress bars.", default=True, familiar_names=("disable_tqdm", "no_tqdm"))

    def __post_init__(self) -> None:
        settings = settings_of(type(self))
        for name, one in settings.items():
            object.__setattr__(self, name, one.read(getattr(self, name)))
        if self.model.startswith("~"):
            object.__setattr__(self, "model", str(expand_home(self.model) or self.model))
        for name, one in settings.items():
            if getattr(self, name) != one.default:
                _refuse_unread(one, settings, vars(self))

    def to_yaml(self) -> str:
        """Returns the configuration as YAML that `load_config` reads back to an equal one.

        Fields that nothing would read in this run (such as ``lora_rank`` without ``method: lora``) are left out.
        """
        settings = settings_of(type(self))
        blocks = []
        for section in SECTIONS:
            values = {
                one.name: getattr(self, one.name)
                for one in settings.values()
                if one.section == section and not one.unmet(settings, vars(self))
            }
            if values:
                blocks.append(f"# {section}\n{write_yaml(values)}")
        return "\n".join(blocks)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides a training run; `phi3v train` reads it and writes it to ``RUN/config.yaml``."""

    train_data: list[Path] = setting(
        MODEL_AND_DATA, "Training samples: JSONL files.", familiar_names=("dataset", "data", "data_path")
    )
    eval_data: list[Path] = setting(
        MODEL_AND_DATA, "Evaluation samples: JSONL files. None: the run takes no scores.", default=[]
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
    )
    micro_batch_crops: int | None = setting(
        HARDWARE,
        "Most crops a device computes at once. None: what fits the device's memory.",
        default=None,
        at_least=1,
    )
    micro_batch_size: int | None = setting(
        HARDWARE,
        "Most samples a device computes at once. None: as many as the other limits allow.",
        default=None,
        at_least=1,
        familiar_names=("per_device_train_batch_size",),
    )
    checkpointing: Literal["auto", "off", "selective", "full"] = setting(
        HARDWARE,
        "What is computed again in the backward pass to save memory: nothing, norms and activations, or every layer "
        "(about a third more time). Auto: as little as the device's memory allows.",
        default="auto",
        familiar_names=("gradient_checkpointing",),
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
    )
    cpu_offload: bool = setting(
        HARDWARE,
        "Keep what processes hold shares of in the machine's memory, and not in the GPUs'.",
        default=False,
        needs=("parallel=fsdp2|zero2|zero3",),
    )
    vision_cache: Path | None = setting(
        HARDWARE,
        "Folder in which the features of a frozen vision encoder are kept, so that an image is computed once and not "
        "in every epoch. None: they are not kept.",
        default=None,
    )
    num_workers: int = setting(
        HARDWARE, "Processes a device that prepare samples. 0: the training process does.", default=2, at_least=0
    )

    save_steps: int | None = setting(
        CHECKPOINTS,
        "Optimizer steps between checkpoints to resume from. None: no regular ones; see keep_best.",
        default=100,
        at_least=1,
    )
    keep_checkpoints: int = setting(
        CHECKPOINTS,
        "Newest checkpoints kept; older ones are deleted, the best one aside.",
        default=2,
        at_least=1,
        familiar_names=("save_total_limit",),
    )
    keep_best: bool = setting(
        CHECKPOINTS,
        "Save at every new best mid-run score, keep that checkpoint, and end with its weights in model/.",
        default=True,
        needs=("eval_data", "eval_steps"),
    )
    resume: Literal["auto", "never"] = setting(
        CHECKPOINTS,
        "A run directory with checkpoints in it: go on from the newest complete one, or refuse.",
        default="auto",
        familiar_names=("resume_from_checkpoint",),
    )

    eval_before: bool = setting(EVALUATION, "Take the score before training too.", default=True, needs=("eval_data",))
    eval_steps: int | None = setting(
        EVALUATION,
        "Optimizer steps between scores taken during training. None: at the end only.",
        default=None,
        at_least=1,
        needs=("eval_data",),
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
        _SCORING_DOC,
        default="generate",
        needs=("eval_data",),
        familiar_names=("scoring",),
    )
    eval_labels: list[str] = setting(
        EVALUATION,
        _LABELS_DOC,
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
    )

    logging_steps: int = setting(LOGGING, "Optimizer steps between lines of steps.jsonl.", default=1, at_least=1)
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        LOGGING, "Where the curves go besides steps.jsonl.", default=["tensorboard"]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_labels("eval_labels", self.eval_labels)
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


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RunConfig):
    """Everything that decides a score; `phi3v eval` reads it."""

    data: list[Path] = setting(MODEL_AND_DATA, "Samples whose questions are asked: JSONL files.")
    metric: Metric = setting(
        EVALUATION, "How an answer is scored.", default="accuracy", familiar_names=("eval_metric",)
    )
    scoring: Scoring = setting(EVALUATION, _SCORING_DOC, default="generate", familiar_names=("eval_scoring",))
    labels: list[str] = setting(EVALUATION, _LABELS_DOC, default=[], familiar_names=("eval_labels",))
    batch_size: int | None = setting(
        EVALUATION, "Most questions answered at once. None: as many as the memory holds.", default=None, at_least=1
    )
    max_new_tokens: int = setting(EVALUATION, "Longest generated answer, tokens.", default=64, at_least=1)
    seed: int = setting(
        EVALUATION, "Seed of the confidence interval's resampling.", default=0, at_least=0, at_most=MAX_SEED
    )
    limit: int | None = setting(EVALUATION, "Samples used, from the first. None: all.", default=None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_labels("labels", self.labels)


ConfigT = TypeVar("ConfigT", bound=RunConfig)


@cache
def settings_of(cls: type[RunConfig]) -> dict[str, Setting]:
    """Returns the fields of ``cls`` by name, in the order of `SECTIONS`, required ones first in theirs."""
    hints = get_type_hints(cls)
    settings = [describe_field(field, hints[field.name]) for field in dataclasses.fields(cls)]
    settings.sort(key=lambda one: (SECTIONS.index(one.section), not one.is_required))
    return {one.name: one for one in settings}


def describe_fields(cls: type[RunConfig]) -> list[Setting]:
    """Returns the rows of ``--help`` and of docs/configuration.md: one for each field of ``cls``, by section."""
    return list(settings_of(cls).values())


def load_config(cls: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a configuration from a YAML file and command-line overrides, which win.

    Overrides are ``--field value``, ``--field=value`` and, for true or false, ``--field`` and ``--no-field``; dashes
    and underscores are the same in names. A list is written ``--field a b``, ``--field a,b``, ``--field a --field b``
    or ``--field "[a, b]"`` and replaces the file's; a mapping is ``--field key=value,key=value``. ``none`` clears a
    field. Relative paths, in the file too, are relative to the working directory; ``~`` is the home directory.

    A field that nothing would read in this run is refused, except when the file sets it and an override has switched
    off what it belongs to (a LoRA recipe run with ``--method full``).

    Raises:
        ConfigError: an unreadable file, an unknown or repeated key, a wrong type, a value out of range, a missing
            field, or values that cannot go together.
    """
    settings = settings_of(cls)
    from_file = {} if path is None else read_file(path, settings)
    from_line = {name: (raw, "command line") for name, raw in read_overrides(overrides, settings).items()}
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, (raw, place) in (from_file | from_line).items():
        try:
            values[name] = settings[name].read(raw)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        places[name] = place
    missing = [one.name for one in settings.values() if one.is_required and one.name not in values]
    if missing:
        options = " ".join(f"--{name} ..." for name in missing)
        where = "on the command line" if path is None else f"in {path} or on the command line"
        raise ConfigError(f"{', '.join(missing)} must be set, {where}: {options}")
    for name in list(values):
        one = settings[name]
        if one.unmet(settings, values):
            is_switched_off = any(need.partition("=")[0] in from_line for need in one.needs)
            if name in from_line or not is_switched_off:
                _refuse_unread(one, settings, values, f"{places[name]}: ")
            del values[name]
    return cls(**values)


def _check_labels(name: str, labels: Sequence[str]) -> None:
    if len(labels) == 1 or len(set(labels)) < len(labels):
        raise ConfigError(f"{name} is {', '.join(map(repr, labels))}; a closed set has at least two different answers")


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


def _refuse_unread(one: Setting, settings: Mapping[str, Setting], values: Mapping[str, Any], place: str = "") -> None:
    unmet = one.unmet(settings, values)
    if unmet:
        raise ConfigError(f"{place}{one.name} is set, but nothing would read it: it needs {' and '.join(unmet)}")
