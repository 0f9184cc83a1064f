"""Command lines made from signatures, and the exit codes of programs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from phi3v.arguments import Parser, add_signature, exit_code, with_underscores
from phi3v.errors import ConfigError, DataError


def plant(
    source: str | None,
    output_dir: Path,
    *,
    num_trees: int = 3,
    spacing_m: float = 0.0,
    order: Literal["rows", "groves"] = "rows",
    names: list[str] | None = None,
    is_fast: bool = True,
    limit: int | None = None,
) -> None:
    """Plants trees.

    Args:
        source: where the seeds are; none: the shop, at 100 %.
        output_dir: the field, which
            may have a fence.
        num_trees: how many.
        spacing_m: metres between them.
        order: how they stand.
        names: what they are called.
        is_fast: hurry.
        limit: most seeds.

    Raises:
        DataError: rain.
    """


def parsed(function: Callable[..., Any], *arguments: str) -> dict[str, Any]:
    parser = Parser(prog="plant", allow_abbrev=False)
    add_signature(parser, function)
    return vars(parser.parse_args(with_underscores(arguments)))


def test_defaults_are_those_of_the_signature() -> None:
    assert parsed(plant, "--output_dir", "field") == {
        "source": None,
        "output_dir": Path("field"),
        "num_trees": 3,
        "spacing_m": 0.0,
        "order": "rows",
        "names": None,
        "is_fast": True,
        "limit": None,
    }


def test_values_get_their_types() -> None:
    arguments = "seeds --output-dir f --num-trees 5 --spacing_m=1.5 --order groves --names a b --no-is-fast --limit 7"
    assert parsed(plant, *arguments.split()) == {
        "source": "seeds",
        "output_dir": Path("f"),
        "num_trees": 5,
        "spacing_m": 1.5,
        "order": "groves",
        "names": ["a", "b"],
        "is_fast": False,
        "limit": 7,
    }


def test_several_files_stand_first() -> None:
    def look(data: Sequence[Path], *, is_deep: bool = False) -> None:
        """Looks.

        Args:
            data: files.
            is_deep: to the ground.
        """

    assert parsed(look, "a", "b", "--is_deep") == {"data": [Path("a"), Path("b")], "is_deep": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--output_dir"),
        ("--output_dir f --num_trees x", "invalid int value: 'x'"),
        ("--output_dir f --order wild", "invalid choice: 'wild'"),
        ("--output_dir f --nun_trees 3", "unrecognized arguments: --nun_trees"),
    ],
)
def test_mistakes_are_named(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(plant, *arguments.split())


def test_help_says_what_the_docstring_says() -> None:
    parser = argparse.ArgumentParser(prog="plant")
    add_signature(parser, plant)
    text = " ".join(parser.format_help().split())
    for part in ("the shop, at 100 %", "which may have a fence", "how many (default: 3)", "one of rows, groves"):
        assert part in text
    assert "rain" not in text


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Callable[[], None]:
        def program() -> None:
            raise error

        return program

    assert exit_code(lambda: None) == 0
    assert exit_code(fail(ConfigError("a"))) == 2
    assert exit_code(fail(DataError("b"))) == 1
    assert exit_code(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: a\nerror: b\ninterrupted\n"
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)
