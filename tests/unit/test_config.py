"""A configuration is read as written, or refused with the place, the finding and what is allowed."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi3v.config import EvalConfig, TrainConfig, describe_fields, load_config
from phi3v.errors import ConfigError

REQUIRED: dict[str, Any] = {"model": "some/model", "output_dir": Path("runs/a"), "train_data": [Path("train.jsonl")]}
REQUIRED_YAML = "model: some/model\noutput_dir: runs/a\ntrain_data: train.jsonl\n"
REQUIRED_OPTIONS = ["--model", "some/model", "--output_dir", "runs/a", "--train_data", "train.jsonl"]


def constructed(**changes: Any) -> TrainConfig:
    return TrainConfig(**(REQUIRED | changes))


def from_yaml(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(REQUIRED_YAML + text, encoding="utf-8")
    return load_config(TrainConfig, path, overrides)


def from_options(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, [*REQUIRED_OPTIONS, *overrides])


def test_defaults_are_the_published_common_settings() -> None:
    config = constructed()
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.95, 1e-7)
    assert (config.weight_decay, config.warmup_steps, config.lr_scheduler) == (0.01, None, "linear")
    assert (config.max_grad_norm, config.batch_size, config.loss_weighting) == (1.0, 64, "sample_mean")
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (64, 128, 0)
    assert config.eval_max_new_tokens == 64


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", "+1E-4", "1e-4  # warm"])
def test_numbers_in_yaml_are_read_however_they_are_spelled(tmp_path: Path, text: str) -> None:
    assert from_yaml(tmp_path, f"learning_rate: {text}\n").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("output_dir: 2024", "output_dir", Path("2024")),
        ("output_dir: 2024-01-31", "output_dir", Path("2024-01-31")),
        ("model: 010", "model", "010"),
        ("model: yes", "model", "yes"),
        ("eval_data: [a.jsonl, 'b,c.jsonl']", "eval_data", [Path("a.jsonl"), Path("b,c.jsonl")]),
        ("eval_data:\n- a.jsonl\n- b.jsonl", "eval_data", [Path("a.jsonl"), Path("b.jsonl")]),
        ("report_to: none", "report_to", []),
        ("save_steps: none", "save_steps", None),
        ("save_steps: null", "save_steps", None),
        ("save_steps:", "save_steps", None),
        ("progress: off", "progress", False),
        ("checkpointing: off", "checkpointing", "off"),
        ("part_learning_rates: {vision: 1e-5}", "part_learning_rates", {"vision": 1e-5}),
        ("image_dir: 'none'", "image_dir", Path("none")),
    ],
)
def test_yaml_text_takes_the_type_of_its_field(tmp_path: Path, text: str, name: str, value: object) -> None:
    path = tmp_path / "recipe.yaml"
    options = [f"--{key}={one}" for key, one in (("model", "m"), ("output_dir", "o")) if key != name]
    path.write_text(text, encoding="utf-8")
    found = getattr(load_config(TrainConfig, path, [*options, "--train_data=t"]), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "learning_rate", 1e-4),
        (["--max_steps", "none"], "max_steps", None),
        (["--no-progress"], "progress", False),
        (["--eval_data", "e", "--no-eval-before"], "eval_before", False),
        (["--fp8", "--seed", "3"], "fp8", True),
        (["--progress", "false"], "progress", False),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--freeze", "vision,projector"], "freeze", ["vision", "projector"]),
        (["--freeze", "vision", "projector", "--seed=1"], "freeze", ["vision", "projector"]),
        (["--freeze", "vision", "--freeze=projector"], "freeze", ["vision", "projector"]),
        (["--freeze", "[vision, projector]"], "freeze", ["vision", "projector"]),
        (["--report_to", "none"], "report_to", []),
        (["--eval_data", '["a,b.jsonl"]'], "eval_data", [Path("a,b.jsonl")]),
        (
            ["--part_learning_rates", "vision=1e-5,projector=1e-4"],
            "part_learning_rates",
            {"vision": 1e-5, "projector": 1e-4},
        ),
        (["--part_learning_rates", "vision=1", "head=2"], "part_learning_rates", {"vision": 1.0, "head": 2.0}),
        (["--part_learning_rates", "{vision: 1e-5}"], "part_learning_rates", {"vision": 1e-5}),
    ],
)
def test_every_spelling_of_an_option_is_read(options: list[str], name: str, value: object) -> None:
    assert getattr(from_options(*options), name) == value


def test_the_command_line_wins_over_the_file_and_replaces_its_lists(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "seed: 1\nfreeze: [vision]\nweight_decay: 0\n", "--seed", "2", "--freeze", "head")
    assert (config.seed, config.freeze, config.weight_decay) == (2, ["head"], 0)


def test_paths_stay_relative_and_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = from_yaml(tmp_path, "image_dir: ~/images\n", "--model", "~/phi")
    assert (config.output_dir, config.image_dir, config.model) == (
        Path("runs/a"),
        Path("/home/me/images"),
        "/home/me/phi",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "recipe.yaml:4: unknown field 'learning_rat' - did you mean 'learning_rate'?"),
        ("seed: 1\nlr: 1", "recipe.yaml:5: unknown field 'lr' - did you mean 'learning_rate'?"),
        ("zzz: 1", "recipe.yaml:4: unknown field 'zzz'"),
        ("seed: 1\nseed: 2", "recipe.yaml:5: 'seed' is set twice; first at"),
        ("model: b", "recipe.yaml:4: 'model' is set twice; first at"),
        ("batch_size: fast", "recipe.yaml:4: batch_size is 'fast'; allowed: a whole number, at least 1"),
        ("batch_size: 6.5", "batch_size is '6.5'; allowed: a whole number"),
        ("batch_size: 0", "batch_size is '0'; allowed: a whole number, at least 1"),
        ("batch_size:", "batch_size is none; allowed: a whole number, at least 1"),
        ("batch_size: [1]", "batch_size is ['1']; allowed"),
        ("learning_rate: .nan", "learning_rate is '.nan'; allowed: a number, above 0"),
        ("learning_rate: inf", "learning_rate is 'inf'; allowed: a number, above 0"),
        ("learning_rate: 0", "learning_rate is '0'; allowed: a number, above 0"),
        ("adam_beta2: 1", "adam_beta2 is '1'; allowed: a number, at least 0 and below 1"),
        ("seed: 4294967296", "seed is '4294967296'; allowed: a whole number, at least 0 and at most 4294967295"),
        ("progress: 1", "progress is '1'; allowed: true or false"),
        ("method: lorra", "method is 'lorra'; allowed: full, frozen_vision, lora or qlora - did you mean 'lora'?"),
        (
            "freeze: [visoin]",
            "freeze holds 'visoin'; allowed: a list of vision, projector, decoder, embeddings or head",
        ),
        ("freeze: [head, head]", "freeze names 'head' twice"),
        ("freeze: {head: 1}", "freeze holds {'head': '1'}; allowed: a list of"),
        ("part_learning_rates: {visoin: 1}", "part_learning_rates has the key 'visoin'"),
        ("part_learning_rates: {vision: 0}", "part_learning_rates holds '0'"),
        ("part_learning_rates: 1", "part_learning_rates is '1'; allowed: part=number pairs"),
        ("part_learning_rates: {head: 1, head: 2}", "recipe.yaml:4: 'head' is set twice"),
        ('image_dir: ""', "image_dir is ''; allowed: a path, or none"),
        ('image_dir: "a\\0b"', "image_dir is 'a\\x00b'; allowed: a path, or none"),
        ("freeze: [[vision]]", "recipe.yaml:4: lists and mappings cannot hold further ones"),
        ("model2: !!python/object/apply:os.system [ls]", "recipe.yaml:4: unknown field 'model2'"),
        ("image_dir: !mine x", "recipe.yaml:4: the tag !mine is not supported"),
        ("? [a]\n: b", "recipe.yaml:4: a list or mapping stands where a name is expected"),
        ("seed: [1", "recipe.yaml:4: not valid YAML"),
        ('image_dir: "\\UFFFFFFFF"', "recipe.yaml: not valid YAML"),
        ('image_dir: "\x07"', "recipe.yaml: not valid YAML"),
        ("image_dir: " + "[" * 3000, "recipe.yaml:4: not valid YAML: nested too deeply"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rat", "1"], "unknown option '--learning-rat' - did you mean 'learning_rate'?"),
        (["--epochs=3"], "unknown option '--epochs' - did you mean 'num_train_epochs'?"),
        (["--no-seed"], "unknown option '--no-seed'"),
        (["--no-keep_best=1"], "unknown option '--no-keep_best'"),
        (["--seed"], "--seed is given without a value; allowed: a whole number"),
        (["--seed", "--batch_size", "64"], "--seed is given without a value"),
        (["--seed", "1", "2"], "unexpected '2' on the command line"),
        (["--fp8", "recipe.yaml"], "unexpected 'recipe.yaml' on the command line"),
        (["-s", "1"], "unexpected '-s' on the command line"),
        (["--learning_rate", "-1e-4"], "command line: learning_rate is '-1e-4'; allowed: a number, above 0"),
        (["--freeze", "vision,"], "freeze holds ''; allowed"),
        (["--part_learning_rates", "vision"], "--part_learning_rates holds 'vision'; allowed: part=number pairs"),
        (["--model", "none"], "model is none; allowed: text"),
        (["--train_data", "none"], "train_data is none; allowed: a list of paths"),
        (["--train_data", "none", "--train_data", "[]"], "train_data is empty; allowed: a list of paths"),
        (["--freeze", "[vision"], "--freeze:1: not valid YAML"),
        (["--on_overlong", "cut"], "on_overlong is set, but nothing would read it: it needs max_length"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_options(*options)
    assert message in str(error.value)


def test_missing_fields_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output_dir, train_data must be set, on the command line: --output_dir"):
        load_config(TrainConfig, None, ["--model", "m"])
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"model, output_dir, data must be set, in .*empty\.yaml or on the command"):
        load_config(EvalConfig, tmp_path / "empty.yaml")


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"text\n", b"\xff\xfe\xfa", b"a: 1\n---\nb: 2\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_config(TrainConfig, tmp_path / "odd.yaml")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(TrainConfig, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "frozen_vision", "freeze": ["decoder", "embeddings", "head"]},
            "nothing is left to train",
        ),
        ({"method": "lora", "lora_parts": []}, "nothing is left to train"),
        ({"method": "lora", "lora_parts": ["vision"], "freeze": ["vision"]}, "lora_parts names 'vision', which freeze"),
        (
            {"method": "frozen_vision", "part_learning_rates": {"vision": 1e-5}},
            "part_learning_rates names 'vision', which this run does not train; it trains decoder, embeddings, head",
        ),
        ({"method": "lora", "part_learning_rates": {"embeddings": 1e-5}}, "part_learning_rates names 'embeddings'"),
        ({"eval_data": ["e"], "eval_labels": ["yes"]}, "eval_labels is 'yes'; a closed set has at least two different"),
        ({"eval_data": ["e"], "eval_labels": ["a", "b", "a"]}, "a closed set has at least two different answers"),
        ({"lora_rank": 8}, "lora_rank is set, but nothing would read it: it needs method=lora or qlora"),
        ({"use_dora": True}, "use_dora is set, but nothing would read it: it needs method=lora or qlora"),
        ({"use_rslora": True}, "use_rslora is set, but nothing would read it: it needs method=lora or qlora"),
        ({"method": "lora", "four_bit_parts": ["vision"]}, "four_bit_parts is set, but nothing would read it"),
        ({"method": "qlora", "four_bit_parts": []}, "four_bit_parts is empty; allowed: vision, projector, decoder"),
        ({"method": "qlora", "four_bit_parts": ["embeddings"]}, "which are looked up, and 4-bit layers only multiply"),
        (
            {"method": "qlora", "four_bit_parts": ["decoder", "head"]},
            "whose rounding would fall on every logit",
        ),
        ({"method": "qlora", "fp8": True}, "fp8 is set, but nothing would read it: it needs method=full"),
        ({"eval_steps": 8}, "eval_steps is set, but nothing would read it: it needs eval_data"),
        (
            {"eval_data": ["a"], "early_stopping_patience": 2},
            "early_stopping_patience is set, but nothing would read it: it needs eval_steps",
        ),
    ],
)
def test_values_that_cannot_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        constructed(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, "vision projector decoder embeddings head"),
        ({"freeze": ["head"]}, "vision projector decoder embeddings"),
        ({"method": "frozen_vision", "freeze": ["head"]}, "decoder embeddings"),
        ({"method": "lora"}, "vision projector decoder head"),
        ({"method": "lora", "freeze": ["vision"]}, "projector decoder head"),
        ({"method": "lora", "lora_parts": ["decoder", "vision"]}, "vision decoder"),
    ],
)
def test_method_and_freeze_decide_what_is_trained(changes: dict[str, Any], trained: str) -> None:
    assert constructed(**changes).trained_parts == tuple(trained.split())


def test_a_setting_that_nothing_would_read_is_refused_even_at_its_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml:4: lora_rank is set, but nothing would read it"):
        from_yaml(tmp_path, "lora_rank: 64\n")
    with pytest.raises(ConfigError, match="command line: lora_rank is set"):
        from_yaml(tmp_path, "method: lora\n", "--method", "full", "--lora_rank", "64")


def test_a_file_s_setting_falls_away_when_the_command_line_switches_off_what_it_belongs_to(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "method: lora\nlora_rank: 8\n", "--method", "full")
    assert config == constructed(method="full")
    text = "eval_data: a.jsonl\neval_steps: 5\nearly_stopping_patience: 2\nkeep_best: true\n"
    assert from_yaml(tmp_path, text, "--eval_data", "none") == constructed()


def test_python_values_are_read_as_text_is() -> None:
    config = constructed(output_dir="runs/a", train_data="train.jsonl", num_train_epochs=2)
    assert config == constructed(output_dir=Path("runs/a"), train_data=[Path("train.jsonl")], num_train_epochs=2.0)
    for wrong in ({"seed": 1.0}, {"seed": True}, {"model": 3}, {"fp8": 1}, {"max_steps": 10**400}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            constructed(**wrong)
    with pytest.raises(ConfigError, match="batch_size"):
        dataclasses.replace(config, batch_size=0)


def test_defaults_are_not_shared_between_configurations() -> None:
    constructed().report_to.append("wandb")
    assert constructed().report_to == ["tensorboard"]


def test_the_written_configuration_leaves_out_what_nothing_reads() -> None:
    written = yaml.safe_load(constructed().to_yaml())
    assert written["learning_rate"] == 4e-5  # a float for any YAML reader, not the text '4e-05'
    assert written["train_data"] == ["train.jsonl"]
    assert "lora_rank" not in written
    assert "eval_metric" not in written
    assert "lora_rank" in yaml.safe_load(constructed(method="lora").to_yaml())


ANY_TEXT = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@settings(deadline=None)
@given(
    model=ANY_TEXT.filter(lambda text: not text.startswith("~")),
    paths=st.lists(ANY_TEXT.filter(lambda text: not text.startswith("~")).map(Path), min_size=1),
    rate=POSITIVE,
    rates=st.dictionaries(st.sampled_from(["decoder", "head"]), POSITIVE),
    lora=st.booleans(),
)
@example(model="none", paths=[Path("null")], rate=1e-7, rates={}, lora=False)
@example(model="\x85", paths=[Path("0")], rate=1.0, rates={}, lora=False)
@example(model="\x85 a\u2028", paths=[Path(" a\n b ")], rate=1.0, rates={}, lora=False)
@example(model="\ud800", paths=[Path("~"), Path("1e-4")], rate=5e-324, rates={}, lora=True)
def test_what_is_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    paths: list[Path],
    rate: float,
    rates: dict[str, float],
    lora: bool,
) -> None:
    method: dict[str, Any] = (
        {"method": "lora", "lora_alpha": rate} if lora else {"method": "full", "freeze": ["vision"]}
    )
    given_paths = {"eval_data": paths, "image_dir": paths[0]}
    config = constructed(model=model, learning_rate=rate, part_learning_rates=rates, **given_paths, **method)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(TrainConfig, path) == config
    assert config.to_yaml() == load_config(TrainConfig, path).to_yaml()


NAMES = [one.name for one in describe_fields(TrainConfig)]
VALUES = [
    "1",
    "-1",
    "1e-4",
    "9" * 5000,
    "nan",
    "2024-13-45",
    "none",
    "~",
    "true",
    "",
    "lora",
    "vision",
    "vision=1",
    "a,b",
]
VALUES += ["[vision]", "{vision: 1}", "[[a", "'", "&a [*a]", "!!int x", "<<"]


VALUE = st.sampled_from(VALUES) | st.text(max_size=8)
NOISE = st.text(alphabet="abc:-[]{}&*!'\"|>%@#, \n\t\\x0Uf?", max_size=12)
OPTION = st.sampled_from([f"--{prefix}{name}" for prefix, name in itertools.product(("", "no-"), NAMES)])


@settings(deadline=None, max_examples=200)
@given(lines=st.lists(st.tuples(st.sampled_from(NAMES), VALUE), max_size=3), tail=st.just("") | NOISE)
def test_any_file_gives_a_configuration_or_a_configuration_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], tail: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    text = "".join(f"{name}: {value}\n" for name, value in lines) + tail
    path.write_text(text, encoding="utf-8", errors="replace")
    check_that_it_loads_or_is_refused(tmp_path_factory, path, REQUIRED_OPTIONS)


@settings(deadline=None, max_examples=200)
@given(pairs=st.lists(st.tuples(OPTION, VALUE), max_size=3), tail=st.lists(OPTION | VALUE, max_size=1))
def test_any_command_line_gives_a_configuration_or_a_configuration_error(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], tail: list[str]
) -> None:
    tokens = [token for pair in pairs for token in pair] + tail
    check_that_it_loads_or_is_refused(tmp_path_factory, None, [*REQUIRED_OPTIONS, *tokens])


def check_that_it_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, path: Path | None, tokens: list[str]
) -> None:
    try:
        config = load_config(TrainConfig, path, tokens)
    except ConfigError as error:
        assert str(error)
    else:
        written = tmp_path_factory.getbasetemp() / "written.yaml"
        written.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(TrainConfig, written) == config
