"""Passwords and tokens are neither written down nor shown, wherever they stand."""

import json
import logging
from pathlib import Path

import pytest

from phi3v.arguments import exit_code
from phi3v.cli import main
from phi3v.config import EvalConfig, TrainConfig, load_config
from phi3v.credentials import HIDDEN, secret_in, without_secrets
from phi3v.errors import ConfigError, DataError
from phi3v.report import write_report
from phi3v.runlog import RunDirectory, environment
from phi3v.train.messages import show_messages

PLANTED = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "HUGGING_FACE_HUB_TOKEN": "my own long word",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjEXAMPLE",
    "DATABASE_PASSWORD": "correct horse",
}
BY_LOOKS = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "https://someone:opensesame1@huggingface.co/org/model",
    "https://hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345@huggingface.co/org/model",
    "s3://AKIAIOSFODNN7EXAMPLE/models",
    "https://bucket.example.org/model?X-Amz-Signature=0a1b2c3d4e5f60718293a4b5c6d7e8f9",
    "https://example.org/model?access_token=abcdef123456",
    "runs/ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "sk-" + "a1B2" * 8,
    "xoxb-" + "1234567890-" * 2,
]
ORDINARY = [
    "microsoft/Phi-3.5-vision-instruct", "runs/invoices-2024", "data/train.jsonl", "s3://bucket/model", "~/models/a_b",
    "sk-learn", "hf_cache", "tokens", "https://example.org/model?revision=main", "me@example.org", "key=value",
    "What is the password?", "C:\\models", "task-force-of-many-people-and-more",
]  # fmt: skip


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return PLANTED


def assert_clean(text: str) -> None:
    for secret in (*PLANTED.values(), "opensesame1"):
        assert secret not in text, secret


@pytest.mark.parametrize("text", BY_LOOKS)
def test_secrets_are_known_by_their_looks(text: str) -> None:
    assert secret_in(text)
    hidden = without_secrets(f"before {text} after")
    assert HIDDEN in hidden and hidden.startswith("before ") and hidden.endswith(" after")
    assert not secret_in(hidden)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_names_are_none(text: str) -> None:
    assert not secret_in(text) and without_secrets(text) == text


def test_values_of_secret_variables_are_known(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENIZER", "TOKENISER_NAME", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "models/phi35mine")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/someone/token")
    monkeypatch.setenv("SOME_SECRET", "short")
    for value in planted.values():
        assert secret_in(f"a{value}b"), value
        assert_clean(without_secrets(f"a{value}b"))
    assert not secret_in("models/phi35mine /home/someone/token short")


def test_by_what_a_secret_is_known_is_told_without_it(planted: dict[str, str]) -> None:
    assert secret_in("a correct horse b") == "as the value of the environment variable DATABASE_PASSWORD"
    assert secret_in(BY_LOOKS[1]) == "by its looks"
    assert secret_in("models/phi35mine") is None


@pytest.mark.parametrize("field", ["model", "output_dir", "train_data", "image_dir", "eval_labels"])
@pytest.mark.parametrize("value", [*BY_LOOKS, "correct horse"])
def test_a_configuration_refuses_them_and_does_not_show_them(
    planted: dict[str, str], tmp_path: Path, field: str, value: str
) -> None:
    fields = {"model": "m", "output_dir": "o", "train_data": "t.jsonl", field: value}
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {json.dumps(text)}\n" for name, text in fields.items()))
    with pytest.raises(
        ConfigError, match=rf"run\.yaml:\d: {field} holds a password or an access token.*HF_TOKEN"
    ) as error:
        load_config(TrainConfig, path)
    assert_clean(str(error.value))
    with pytest.raises(ConfigError, match="holds a password or an access token"):
        TrainConfig(**{"model": "m", "output_dir": Path("o"), "train_data": [Path("t")], field: value})


def test_what_a_run_writes_down_holds_none(planted: dict[str, str], tmp_path: Path) -> None:
    config = TrainConfig(model="m", output_dir=tmp_path, train_data=[Path("t.jsonl")])
    run = RunDirectory(tmp_path).create(config.to_yaml(), environment([{"name": "GPU"}]))
    for path in (run.config_path, run.environment_path):
        assert_clean(path.read_text())
    assert load_config(TrainConfig, run.config_path) == config
    assert EvalConfig(model="m", output_dir=tmp_path, data=[Path("t.jsonl")]).to_yaml()
    # Whatever else is handed to it: what comes through is hidden.
    run.create("model: " + BY_LOOKS[1] + "\n", {"gpus": [{"name": PLANTED["WANDB_API_KEY"]}], PLANTED["HF_TOKEN"]: 1})
    for path in (run.config_path, run.environment_path):
        assert HIDDEN in path.read_text()
        assert_clean(path.read_text())


def test_a_report_shows_none_that_somebody_wrote_in(planted: dict[str, str], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: m\n", {})
    run.config_path.write_text(
        f"model: {BY_LOOKS[1]}\nmethod: lora\n# {PLANTED['HF_TOKEN']}\nx: {PLANTED['WANDB_API_KEY']}\n"
    )
    run.environment_path.write_text(json.dumps({"cpu": PLANTED["AWS_SECRET_ACCESS_KEY"], PLANTED["HF_TOKEN"]: "x"}))
    run.write_data({"train": {"samples": 1, "problems": [f"a.jsonl:1: {BY_LOOKS[1]} is a URL"]}})
    run.audit_path.write_text(f"broken {PLANTED['HF_TOKEN']}")
    page = write_report(tmp_path).read_text()
    assert page.count(HIDDEN) >= 6
    assert_clean(page)


@pytest.mark.parametrize("error", [ConfigError, DataError])
def test_error_lines_show_none(
    planted: dict[str, str], capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def fail() -> None:
        raise error(f"model {BY_LOOKS[1]}: refused with {PLANTED['HF_TOKEN']} and {PLANTED['WANDB_API_KEY']}")

    assert exit_code(fail) in (1, 2)
    shown = capsys.readouterr().err
    assert_clean(shown)
    assert shown.count(HIDDEN) == 3


def test_the_command_line_shows_none(
    planted: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (
        ["train", "--model", BY_LOOKS[1], "--output_dir", str(tmp_path), "--train_data", "t.jsonl"],
        ["train", PLANTED["HF_TOKEN"]],
        ["train", "--model", "m", PLANTED["HF_TOKEN"]],
        ["eval", f"--token={PLANTED['HF_TOKEN']}"],
        ["report", PLANTED["HF_TOKEN"]],
    ):
        assert main(arguments) in (1, 2)
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert_clean(captured.out + captured.err)


def test_the_log_shows_none(planted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger("phi3v")
    handlers = package.handlers[:]
    try:
        package.handlers.clear()
        show_messages(is_writer=True)
        logging.getLogger("phi3v.train.run").warning("Loading %s with %s.", BY_LOOKS[1], PLANTED["HF_TOKEN"])
    finally:
        package.handlers[:] = handlers
    shown = capsys.readouterr().err
    assert shown.startswith("Loading https://") and shown.count(HIDDEN) == 2
    assert_clean(shown)
