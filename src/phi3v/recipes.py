"""The four published recipes: their scripts' flags, turned into a run's configuration, and their data.

``recipes/finetune_hf_trainer_*.py`` are a few lines each over this module, ``recipes/*.yaml`` the configurations that
the flags stand for. Flag names and defaults are those of the scripts published with the model.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phi3v.arguments import Parser, exit_code, is_first_process, positive
from phi3v.config import Metric, Scoring, TrainConfig, load_config
from phi3v.data.convert import converter
from phi3v.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Recipe:
    """One published recipe.

    Attributes:
        name: what its data files' names start with.
        title: for the help text.
        model: the published script's default model.
        num_crops: the published script's default.
        metric: how its answers are scored.
        scoring: where answers and probabilities come from.
        source: converter that makes its data from the hub; None: the user makes them first.
        has_mini_set: whether it trains on a small set unless ``--full_train`` is given.
    """

    name: str
    title: str
    model: str
    num_crops: int
    metric: Metric
    scoring: Scoring = "generate"
    source: str | None = None
    has_mini_set: bool = False


PHI_3 = "microsoft/Phi-3-vision-128k-instruct"
PHI_3_5 = "microsoft/Phi-3.5-vision-instruct"

DOCVQA = Recipe("docvqa", "DocVQA (ANLS)", PHI_3, 16, "anls", source="docvqa", has_mini_set=True)
HATEFUL_MEMES = Recipe(
    "hateful_memes", "Hateful Memes (accuracy, AUROC)", PHI_3, 16, "accuracy", scoring="both", source="hateful-memes"
)
NLVR2 = Recipe("nlvr2", "NLVR2 (accuracy), two images a question", PHI_3_5, 16, "accuracy", source="nlvr2")
UCF101 = Recipe("ucf101", "UCF-101 (accuracy), eight frames a clip", PHI_3_5, 4, "accuracy")


_ADAPTER_FLAGS: dict[str, tuple[Callable[[str], float], float, str]] = {
    "lora_rank": (positive, 64, "rank of the adapters"),
    "lora_alpha_ratio": (float, 2.0, "lora_alpha / lora_rank"),
    "lora_dropout": (float, 0.0, "dropout before the adapters"),
}
"""Flags that only adapters read: their type, the published default, and what they are."""


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Does what a published script does: score, train, score again; with plain python or under torchrun.

    Args:
        recipe: which.
        arguments: the flags; the process's own when None.

    Returns:
        The exit code, as ``phi3v train`` gives it.
    """

    def run() -> None:
        flags, fields = read_flags(recipe, sys.argv[1:] if arguments is None else arguments)
        config = configuration(recipe, flags, fields, has_gpu=_has_gpu())
        prepare_data(recipe, flags)
        from phi3v.train.run import run_training

        path = run_training(config)
        if is_first_process():
            print(f"run directory: {path}")

    return exit_code(run)


def read_flags(recipe: Recipe, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the published flags; returns them, and what is left: fields of ``phi3v train``.

    Raises:
        ConfigError: a flag without its value, or with a wrong one.
    """
    parser = Parser(
        prog=f"finetune_hf_trainer_{recipe.name}.py",
        description=f"Fine-tune on {recipe.title}. Other options are fields of `phi3v train`: --save_steps 50.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "--model_name_or_path", default=recipe.model, metavar="PATH", help="hub id or folder of the model (%(default)s)"
    )
    if recipe.has_mini_set:
        flag("--full_train", action="store_true", help="train on the full set, one question of every page an epoch")
    flag("--data_dir", type=Path, metavar="PATH", default=None, help=_data_help(recipe))
    flag("--use_flash_attention", action="store_true", help="flash attention (needs a GPU); turns --bf16 on")
    flag("--bf16", action="store_true", help="compute in bf16 rather than fp16")
    flag("--use_lora", action="store_true", help="train adapters")
    flag("--use_qlora", action="store_true", help="train adapters on a model held in 4 bit")
    flag("--output_dir", type=Path, default=Path("output"), metavar="PATH", help="folder of the run (%(default)s)")
    flag("--batch_size", type=positive, default=16, metavar="N", help="samples an optimizer step (%(default)s)")
    flag("--batch_size_per_gpu", type=positive, metavar="N", help="most samples computed at once (as many as fit)")
    flag("--num_crops", type=positive, default=recipe.num_crops, metavar="N", help="most crops an image (%(default)s)")
    flag(
        "--num_train_epochs", type=positive, default=1, metavar="N", help="passes over the training data (%(default)s)"
    )
    flag("--learning_rate", type=float, default=4e-5, metavar="X", help="highest learning rate (%(default)s)")
    flag("--wd", type=float, default=0.01, metavar="X", help="weight decay (%(default)s)")
    flag("--no-tqdm", dest="tqdm", action="store_false", help="show no progress bars")
    for name, (kind, default, purpose) in _ADAPTER_FLAGS.items():
        metavar = "N" if kind is positive else "X"
        flag(f"--{name}", type=kind, metavar=metavar, help=f"{purpose} ({default}); needs --use_lora or --use_qlora")
    flag("--freeze_vision_model", action="store_true", help="leave vision tower and projector as they are")
    flags, fields = parser.parse_known_args(arguments)
    if flags.data_dir is None:
        if recipe.source is None:
            raise ConfigError(f"--data_dir is missing: {_data_help(recipe)}")
        flags.data_dir = _data_dir(recipe, recipe.has_mini_set and flags.full_train)
    return flags, fields


def configuration(
    recipe: Recipe, flags: argparse.Namespace, fields: Sequence[str] = (), *, has_gpu: bool = True
) -> TrainConfig:
    """Returns the configuration of ``phi3v train`` that the flags stand for.

    Args:
        recipe: which.
        flags: as ``read_flags`` returns them.
        fields: ``--field value`` tokens that win over the flags.
        has_gpu: on a CPU there is no fp16, which the flags ask for by default: float32 takes its place.

    Raises:
        ConfigError: flags that cannot be met, with the reason.
    """
    if flags.use_flash_attention and not has_gpu:
        raise ConfigError("--use_flash_attention needs a GPU, and there is none here; leave it out")
    given = {name: getattr(flags, name) for name in _ADAPTER_FLAGS if getattr(flags, name) is not None}
    has_adapters = flags.use_lora or flags.use_qlora
    if given and not has_adapters:
        raise ConfigError(
            f"--{' and --'.join(given)} would do nothing without adapters; add --use_lora or --use_qlora, or leave it "
            "out"
        )
    adapter = {name: default for name, (_, default, _) in _ADAPTER_FLAGS.items()} | given
    if adapter["lora_alpha_ratio"] <= 0:
        raise ConfigError(f"--lora_alpha_ratio is {adapter['lora_alpha_ratio']:g}; give a number above 0")
    is_bf16 = flags.bf16 or flags.use_flash_attention
    values: dict[str, object] = {
        "model": flags.model_name_or_path,
        # As lists in brackets: a comma in a folder's name would part one without.
        "train_data": json.dumps([str(flags.data_dir / f"{recipe.name}_train.jsonl")], ensure_ascii=False),
        "eval_data": json.dumps([str(flags.data_dir / f"{recipe.name}_val.jsonl")], ensure_ascii=False),
        "image_dir": flags.data_dir / "images",
        "output_dir": flags.output_dir,
        "num_crops": flags.num_crops,
        "precision": "bf16" if is_bf16 else "fp16" if has_gpu else "fp32",
        "batch_size": flags.batch_size,
        "micro_batch_size": flags.batch_size_per_gpu or "none",
        "num_train_epochs": flags.num_train_epochs,
        "learning_rate": flags.learning_rate,
        "weight_decay": flags.wd,
        "warmup_steps": 50,
        "num_workers": 4,
        "logging_steps": 10,
        "eval_metric": recipe.metric,
        "eval_scoring": recipe.scoring,
        "progress": flags.tqdm,
    }
    if recipe.has_mini_set and flags.full_train:
        values["sampling"] = "one_per_image"
    if has_adapters:
        values["method"] = "qlora" if flags.use_qlora else "lora"
        values["lora_rank"] = adapter["lora_rank"]
        values["lora_alpha"] = adapter["lora_rank"] * adapter["lora_alpha_ratio"]
        values["lora_dropout"] = adapter["lora_dropout"]
        if flags.freeze_vision_model:
            values["freeze"] = "[vision, projector]"
    elif flags.freeze_vision_model:
        values["method"] = "frozen_vision"
    tokens = [f"--{name}={value}" for name, value in values.items()]
    return load_config(TrainConfig, None, [*tokens, *fields])


def prepare_data(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Makes the recipe's data from the hub where ``--data_dir`` does not hold them yet.

    Processes of one machine wait for the first that gets there.

    Raises:
        DataError: there are no data and they cannot be made.
    """
    files = [flags.data_dir / f"{recipe.name}_{split}.jsonl" for split in ("train", "val")]
    if all(file.is_file() for file in files):
        return
    if recipe.source is None:
        missing = next(file for file in files if not file.is_file())
        raise DataError(f"{missing} is missing. --data_dir: {_data_help(recipe)}")
    options: dict[str, object] = {"progress": flags.tqdm}
    if recipe.has_mini_set:
        options["subset"] = "full" if flags.full_train else "mini"
    with _alone_in(flags.data_dir):
        if not all(file.is_file() for file in files):
            print(converter(recipe.source)(None, flags.data_dir, **options))


def _data_dir(recipe: Recipe, is_full: bool = False) -> Path:
    """Returns the folder that a recipe's data lie in unless ``--data_dir`` names another."""
    suffix = ("-full" if is_full else "-mini") if recipe.has_mini_set else ""
    return Path("data") / (recipe.name.replace("_", "-") + suffix)


def _data_help(recipe: Recipe) -> str:
    if recipe.source is None:
        return (
            "folder of the converted clips; make it with `python recipes/convert_ucf101.py --out_dir DIR` or "
            "`phi3v data convert ucf101 CLIPS --output_dir DIR`"
        )
    default = f"{_data_dir(recipe, False)} or, with --full_train, {_data_dir(recipe, True)}"
    return (
        "folder of the converted data, made from the hub where it is missing; `phi3v data convert "
        f"{recipe.source} RELEASE --output_dir DIR` makes it from the original release "
        f"({default if recipe.has_mini_set else _data_dir(recipe)})"
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine is in the same block."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
