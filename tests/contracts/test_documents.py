"""What the documents tell a user to type is what the program takes."""

import json
import re
from pathlib import Path

import pytest

from help_pages import help_of
from phi3v.config import TrainConfig, load_config
from phi3v.data.schema import parse_sample

ROOT = Path(__file__).parents[2]
STARTS = re.compile(r"phi3v |python recipes/|torchrun .*recipes/")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in [*blocks(page, ""), *blocks(page, "sh"), *blocks(page, "bash")]:
            joined = block.replace("\\\n", " ")
            found += [(page.name, line) for line in joined.splitlines() if STARTS.match(line)]
        inline = re.findall(r"`(phi3v data [^`]+|python recipes/[^`]+)`", page.read_text("utf-8"))
        found += [(page.name, line.replace("\n", " ")) for line in inline if "..." not in line]
    return found


def split_program(words: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Splits a command into what answers ``--help`` and the arguments that its help must name."""
    if words[0] == "phi3v":
        num_words = 1 + (words[1] == "data") + (words[1:3] == ["data", "convert"])
        return tuple(words[: 1 + num_words]), words[1 + num_words :]
    (script,) = (number for number, word in enumerate(words) if word.endswith(".py"))
    return (str(ROOT / words[script]),), words[script + 1 :]


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_use_verbs_and_options_that_exist(page: str, command: str) -> None:
    program, arguments = split_program(command.partition(" #")[0].split())
    known = help_of(program).replace("-", "_")
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("-", "_")
            is_field = program[0].endswith(".py") and name[2:] in TrainConfig.__dataclass_fields__
            assert is_field or name in known or name.replace("__no_", "__", 1) in known, f"{page}: no option {word}"


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 8


def test_the_readme_configuration_is_read(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "run.yaml").write_text(block)
    assert load_config(TrainConfig, tmp_path / "run.yaml").method == "lora"


def test_the_readme_sample_is_read() -> None:
    (block,) = blocks(ROOT / "README.md", "json")
    assert parse_sample(json.dumps(json.loads(block)), "README.md:1").images == ("17.png",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"^make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)
        assert set(named) <= targets, page.name
