"""Every option does something, is documented, and names things as the rooms that read it do."""

import ast
from pathlib import Path
from typing import get_args

import pytest

import phi3v
from phi3v.cli.configuration_page import configuration_page
from phi3v.config import PARTS, EvalConfig, Metric, RunConfig, TrainConfig, describe_fields
from phi3v.eval.metrics import METRICS
from phi3v.model import parts

SOURCE = Path(phi3v.__file__).parent
ROOT = Path(__file__).parents[2]


def attributes_read_from_a_config(folder: Path) -> set[str]:
    """Names that the modules below ``folder`` read as ``config.NAME``, whatever stands before ``config``."""
    read = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base = node.value
                name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
                if name.endswith("config"):
                    read.add(node.attr)
    return read


@pytest.mark.parametrize(
    ("cls", "room", "through"),
    [
        (TrainConfig, "train", {"trained_parts": {"freeze", "lora_parts"}}),
        (EvalConfig, "eval", {}),
    ],
)
def test_every_field_is_read_by_its_room(cls: type[RunConfig], room: str, through: dict[str, set[str]]) -> None:
    read = attributes_read_from_a_config(SOURCE / room)
    for derived, sources in through.items():
        if derived in read:
            read |= sources
    assert {one.name for one in describe_fields(cls)} - read == set()


@pytest.mark.parametrize("cls", [TrainConfig, EvalConfig])
def test_every_field_says_what_it_does(cls: type[RunConfig]) -> None:
    for one in describe_fields(cls):
        assert one.doc.endswith("."), one.name
        assert "|" not in one.doc + one.allowed + one.default_text, f"{one.name}: would break the table"
        if one.is_optional and one.default is None:
            assert "None:" in one.doc, f"{one.name}: says not what none means"


def test_the_documentation_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run `python -m phi3v.cli.configuration_page > docs/configuration.md`"


def test_parts_and_metrics_have_the_names_of_the_rooms_that_hold_them() -> None:
    assert parts.PARTS == PARTS
    assert set(METRICS) == set(get_args(Metric))
