"""The published scripts' flags, their YAML twins, and the published rows."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from help_pages import help_of
from phi3v.config import TrainConfig, load_config
from phi3v.errors import ConfigError, DataError
from phi3v.recipes import DOCVQA, HATEFUL_MEMES, NLVR2, UCF101, Recipe, configuration, prepare_data, read_flags

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
ALL = [DOCVQA, HATEFUL_MEMES, NLVR2, UCF101]
OF_UCF101 = ("--data_dir", "data/ucf101")


def configured(recipe: Recipe, *arguments: str, has_gpu: bool = True) -> TrainConfig:
    own = OF_UCF101 if recipe is UCF101 else ()
    return configuration(recipe, *read_flags(recipe, [*own, *arguments]), has_gpu=has_gpu)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_read(path: Path) -> None:
    assert load_config(TrainConfig, path).output_dir == Path(
        "output" if path.parent == RECIPES else f"runs/{path.stem}"
    )


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_the_twin_is_what_the_script_runs(recipe: Recipe) -> None:
    assert load_config(TrainConfig, RECIPES / f"{recipe.name}.yaml") == configured(recipe)


PUBLISHED_ROWS = [
    ("docvqa", "--full_train --bf16 --learning_rate 5e-6 --num_train_epochs 2", "full"),
    ("docvqa", "--full_train --bf16 --freeze_vision_model --learning_rate 1e-4 --num_train_epochs 2", "frozen-vision"),
    (
        "docvqa",
        "--full_train --bf16 --use_lora --lora_rank 32 --lora_alpha_ratio 0.5 --learning_rate 2e-4 "
        "--num_train_epochs 2",
        "lora",
    ),
    ("hateful_memes", "--bf16 --use_qlora --lora_rank 128 --learning_rate 2e-4 --num_train_epochs 2", "qlora"),
    ("nlvr2", "--bf16 --learning_rate 1e-5 --num_train_epochs 3", "full"),
]


@pytest.mark.parametrize(("name", "command", "row"), PUBLISHED_ROWS)
def test_a_published_row_is_what_its_command_runs(name: str, command: str, row: str) -> None:
    (recipe,) = (one for one in ALL if one.name == name)
    path = RECIPES / "published" / f"{name}-{row}-bf16.yaml".replace("_", "-")
    in_file = load_config(TrainConfig, path)
    by_flags = configured(recipe, "--batch_size", "64", *command.split())
    assert replace(by_flags, output_dir=in_file.output_dir) == in_file


def test_expectations_in_the_files_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    in_page = {file: score for score, file in re.findall(r"\| (\w+ [\d.]+) \| `([\w-]+\.yaml)` \|", page)}
    in_files = {}
    for path in (RECIPES / "published").glob("*.yaml"):
        (score,) = re.findall(r"^# Published by Microsoft for these settings: (\w+ [\d.]+)\.", path.read_text(), re.M)
        in_files[path.name] = score
    assert in_page == in_files
    assert len(in_files) == 18


FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("--model_name_or_path here", {"model": "here"}),
    ("--output_dir there", {"output_dir": Path("there")}),
    ("--batch_size 32", {"batch_size": 32}),
    ("--batch_size_per_gpu 4", {"micro_batch_size": 4}),
    ("--num_crops 9", {"num_crops": 9}),
    ("--num_train_epochs 3", {"num_train_epochs": 3.0}),
    ("--learning_rate 1e-3", {"learning_rate": 1e-3}),
    ("--wd 0.5", {"weight_decay": 0.5}),
    ("--bf16", {"precision": "bf16"}),
    ("--use_flash_attention", {"precision": "bf16"}),
    ("--use_lora", {"method": "lora", "lora_rank": 64, "lora_alpha": 128.0, "lora_dropout": 0.0}),
    ("--use_qlora --lora_rank 8", {"method": "qlora", "lora_rank": 8, "lora_alpha": 16.0}),
    ("--use_lora --lora_alpha_ratio 0.5", {"lora_alpha": 32.0}),
    ("--use_lora --lora_rank 3 --lora_alpha_ratio 0.5", {"lora_rank": 3, "lora_alpha": 1.5}),
    ("--use_lora --lora_dropout 0.1", {"lora_dropout": 0.1}),
    ("--freeze_vision_model", {"method": "frozen_vision"}),
    ("--use_lora --freeze_vision_model", {"method": "lora", "frozen_parts": ("vision", "projector")}),
    ("--no-tqdm", {"progress": False}),
    ("--data_dir elsewhere", {"train_data": [Path("elsewhere/nlvr2_train.jsonl")]}),
    ("--data_dir \U0001f333", {"train_data": [Path("\U0001f333/nlvr2_train.jsonl")]}),
    ("--data_dir a,b", {"train_data": [Path("a,b/nlvr2_train.jsonl")], "eval_data": [Path("a,b/nlvr2_val.jsonl")]}),
    ("--save_steps 7", {"save_steps": 7}),
]


@pytest.mark.parametrize(("arguments", "fields"), FLAGS)
def test_a_flag_does_what_it_says(arguments: str, fields: dict[str, Any]) -> None:
    config = configured(NLVR2, *arguments.split())
    assert {name: getattr(config, name) for name in fields} == fields
    if not arguments.startswith("--use_flash"):
        assert {name: getattr(configured(NLVR2), name) for name in fields} != fields


def test_the_full_set_draws_one_question_of_every_page() -> None:
    full = configured(DOCVQA, "--full_train")
    assert (full.sampling, full.train_data) == ("one_per_image", [Path("data/docvqa-full/docvqa_train.jsonl")])


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert configured(NLVR2, has_gpu=False).precision == "fp32"
    assert configured(NLVR2, "--bf16", has_gpu=False).precision == "bf16"


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (NLVR2, ["--use_flash_attention"], "--use_flash_attention needs a GPU, and there is none here"),
        (NLVR2, ["--use_lora", "--lora_alpha_ratio", "0"], "--lora_alpha_ratio is 0"),
        (NLVR2, ["--lora_rank", "64"], "--lora_rank would do nothing without adapters; add --use_lora"),
        (NLVR2, ["--lora_rank", "8", "--lora_dropout", "0.1"], "--lora_rank and --lora_dropout would do nothing"),
        (NLVR2, ["--batch_size", "no"], "'no' is not a whole number"),
        (NLVR2, ["--bathc_size", "4"], "bathc_size.*batch_size"),
        (NLVR2, ["--full_train"], "full_train"),
        (UCF101, [], "--data_dir is missing: .*convert_ucf101.py --out_dir DIR"),
    ],
)
def test_what_cannot_be_met_is_refused_with_the_reason(recipe: Recipe, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(recipe, *read_flags(recipe, arguments), has_gpu=False)


def test_missing_clips_say_how_to_make_them(tmp_path: Path) -> None:
    flags, _ = read_flags(UCF101, ["--data_dir", str(tmp_path)])
    with pytest.raises(DataError, match=r"ucf101_train.jsonl is missing.*phi3v data convert ucf101"):
        prepare_data(UCF101, flags)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_scripts_are_short_and_describe_their_flags(recipe: Recipe) -> None:
    script = RECIPES / f"finetune_hf_trainer_{recipe.name}.py"
    assert len(script.read_text().splitlines()) < 20
    page = help_of((str(script),))
    assert "--use_flash_attention" in page
    assert ("--full_train" in page) == (recipe is DOCVQA)
