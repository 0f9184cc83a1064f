"""The configuration readers on hostile YAML: the values of a plain reading, or an error that names the file."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi3v.config import TrainConfig, load_config, settings_of
from phi3v.errors import ConfigError
from phi3v.report import write_report
from phi3v.runlog import RunDirectory
from phi3v.settings import MAX_YAML_BYTES, read_file, read_plain_yaml

FUZZ = settings.get_profile("phi3v-fuzz")
LONGEST_S = 20.0
"""Reading the largest file takes a second or two; a bomb takes for ever."""

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{k}: &m{k} {{<<: [{', '.join([f'*m{k - 1}'] * 9)}]}}\n" for k in range(1, 12))
BOMBS = {
    "billion laughs": LAUGHS,
    "billion merges": MERGES,
    "alias of itself": "a: &a [*a]\n",
    "alias as key": "? &a [b]\n: 1\n? *a\n: 2\n",
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{b: " * 50_000,
    "deep blocks": "".join(" " * k + f"a{k}:\n" for k in range(1000)),
    "deep dashes": "a:\n" + "- " * 100_000 + "b\n",
    "base sixty": "a: " + ":".join(["1"] * 100_000) + "\n",
    "long number": "a: " + "9" * 200_000 + "\n",
    "long float": "a: 1" + "0" * 200_000 + ".5e7\n",
    "many keys": "".join(f"k{k}: 1\n" for k in range(5_000)),
    "one key again and again": "k: 1\n" * 5_000,
    "python object": "a: !!python/object/apply:os.system [echo hostile]\n",
    "python name": "a: !!python/name:os.system\n",
    "own tag": "a: !evil 1\n",
    "many documents": "---\na: 1\n" * 5000,
    "directives": "%YAML 9.9\n" * 3 + "---\na: 1\n",
    "huge": "a: " + "x" * (MAX_YAML_BYTES + 1),
    "huge escapes": 'a: "' + "\\U0010FFFF" * 20_000 + '"\n',
}


def read_within_time(read: Any, path: Path) -> Any:
    started = time.perf_counter()
    try:
        return read(path)
    except ConfigError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return None
    finally:
        assert time.perf_counter() - started < LONGEST_S


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_or_harmless(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BOMBS[name])
    assert read_within_time(lambda path: read_file(path, settings_of(TrainConfig)), path) is None
    values = read_within_time(read_plain_yaml, path)
    if values is not None:
        assert set(map(type, values.values())) <= {str, int, float}


@pytest.mark.parametrize("name", ["billion laughs", "billion merges", "alias of itself", "base sixty", "deep blocks"])
def test_a_report_of_a_run_with_such_a_configuration_says_so(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    run.config_path.write_text(f"model: x\n{BOMBS[name]}")
    started = time.perf_counter()
    page = write_report(tmp_path).read_text()
    assert time.perf_counter() - started < LONGEST_S
    assert name == "base sixty" or "could not be read and is left out" in page


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
SNIPPETS = st.sampled_from(
    [
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!binary ",
        "!!set {a}",
        "? ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "|",
        ">",
        "'",
        '"',
        "%",
        "---\n",
    ]
)


@FUZZ
@given(values=st.dictionaries(st.text(max_size=6), VALUE, max_size=4), style=st.sampled_from([None, True, False]))
def test_what_plain_yaml_says_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], style: bool | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.yaml"
    path.write_text(yaml.safe_dump(values, default_flow_style=style, allow_unicode=True), encoding="utf-8")
    read = read_within_time(read_plain_yaml, path)
    if read is not None:
        assert repr(read) == repr(yaml.safe_load(path.read_text("utf-8")))


@FUZZ
@given(pieces=st.lists(SNIPPETS | st.text(alphabet="ab:-[]{}&*!'\"|>%@#, \n\t\\x0Uf?1.", max_size=8), max_size=10))
@example(pieces=["!!timestamp 2024-99-99"])
@example(pieces=["a: !!int x"])
@example(pieces=["a: !!float x"])
@example(pieces=["a: !!bool x"])  # PyYAML's KeyError
@example(pieces=["? [1]\n: 2"])
@example(pieces=["? {a: 1}\n: 2"])
@example(pieces=['a: "\\UFFFFFFFF"'])
@example(pieces=["a: !!omap [1]"])
@example(pieces=["<<: 1"])
@example(pieces=["!!set {a}"])  # would be a set where a mapping is promised
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, pieces: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("".join(pieces), encoding="utf-8")
    values = read_within_time(read_plain_yaml, path)
    assert values is None or isinstance(values, dict)
    read_within_time(lambda path: read_file(path, settings_of(TrainConfig)), path)


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(b"model: m\n" + content)
    read_within_time(lambda path: load_config(TrainConfig, path), path)
    read_within_time(read_plain_yaml, path)
