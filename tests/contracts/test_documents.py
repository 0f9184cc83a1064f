"""What the documents tell a user to type is what the program takes."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from phi3v.config import TrainConfig, load_config
from phi3v.data.schema import parse_sample

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in [*blocks(page, ""), *blocks(page, "sh"), *blocks(page, "bash")]:
            joined = block.replace("\\\n", " ")
            found += [(page.name, line) for line in joined.splitlines() if line.startswith("phi3v ")]
    return found


@cache
def help_of(verb: str) -> str:
    command = [sys.executable, "-m", "phi3v", verb, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_use_verbs_and_options_that_exist(page: str, command: str) -> None:
    words = command.partition(" #")[0].split()
    known = help_of(words[1])
    for word in words[2:]:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1).replace("--no_", "--", 1)
            assert name in known, f"{page}: {command}: no option {word}"


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
