"""The JSONL reader on hostile bytes: a sample as a plain reading gives it, or an error that names the file and line."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phi3v.data.dataset import ConversationDataset
from phi3v.data.schema import Sample, SampleError, parse_sample
from phi3v.errors import DataError
from phi3v.geometry import MAX_NUM_CROPS

FUZZ = settings.get_profile("phi3v-fuzz")
WHERE = "data.jsonl:1"
MOST_MESSAGE_CHARS = 4000
"""An error quotes a line in part: a message goes to logs and into reports."""

TAGS = st.sampled_from(
    ["<|image_1|>", "<|image_2|>", "<|image_01|>", "<|image_٣|>", "<|Image_1|>", "<|end|>", "<|", "|>"]
)
TEXT = st.text(max_size=12) | st.lists(TAGS | st.text(max_size=4), max_size=4).map("".join)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["a.png", "b.png", "../a.png", "/etc/passwd", "", "a\0b", "\ud800.png"])


def a_turn() -> st.SearchStrategy[Any]:
    good = st.fixed_dictionaries(
        {"user": TEXT, "assistant": TEXT},
        optional={"images": st.lists(NAMES, max_size=3), "answers": st.lists(TEXT, max_size=3), "labels": JUNK},
    )
    return good | st.dictionaries(st.sampled_from(["user", "assistant", "images", "answers", "x"]), JUNK, max_size=4)


RECORDS = st.fixed_dictionaries(
    {"id": TEXT, "conversations": st.lists(a_turn(), min_size=1, max_size=3)},
    optional={"system": TEXT | JUNK, "num_crops": st.integers() | JUNK, "source": TEXT},
)


def plain_reading(record: Any) -> tuple[list[str], list[str], list[str]]:
    """What the format says, in three lines: the answers, the images, and the users' texts without tags' numbers."""
    turns = record["conversations"]
    images = [name for turn in turns for name in turn.get("images") or []]
    return [turn["assistant"] for turn in turns], images, [turn["user"] for turn in turns]


def check_sample(sample: Sample, line: str) -> None:
    answers, images, users = plain_reading(json.loads(line))
    assert [turn.assistant for turn in sample.turns] == answers
    assert sorted(sample.images) == sorted(images)
    assert sample.num_crops is None or 1 <= sample.num_crops <= MAX_NUM_CROPS
    for turn, user in zip(sample.turns, users, strict=True):
        assert len(turn.user.split("<|image_")) == len(user.split("<|image_"))
        assert turn.assistant in turn.answers
        assert not turn.labels or turn.assistant in turn.labels


def read(line: str) -> Sample | None:
    try:
        sample = parse_sample(line, WHERE)
    except SampleError as error:
        assert str(error).startswith(WHERE) and str(error).endswith(".")
        assert len(str(error)) < MOST_MESSAGE_CHARS and error.reason
        return None
    check_sample(sample, line)
    return sample


@FUZZ
@given(record=RECORDS)
def test_any_record_is_a_sample_or_a_named_error(record: Any) -> None:
    read(json.dumps(record))


@FUZZ
@given(line=st.text(max_size=60) | RECORDS.map(json.dumps), cut=st.integers(0, 400), put=st.text(max_size=4))
@example(line='{"id": "1", "conversations": ' + "[" * 100_000, cut=400, put="")
@example(line='{"id": ' + "9" * 5000 + "}", cut=9999, put="")
@example(line='{"id": "1", "id": "2"}', cut=400, put="")
@example(line='{"id": NaN, "conversations": [Infinity]}', cut=400, put="")
def test_any_text_is_a_sample_or_a_named_error(line: str, cut: int, put: str) -> None:
    read(line[:cut] + put + line[cut + len(put) :])


@pytest.mark.parametrize("depth", [100, 300, 900, 960, 980, 990])
@pytest.mark.parametrize("key", ["system", "num_crops", "id", "conversations", "source"])
def test_values_nested_as_deep_as_python_reads_are_named(key: str, depth: int) -> None:
    turn = {"user": "u", "assistant": "a"}
    record = {"id": "1", "conversations": [turn], key: "HERE"}
    assert read(json.dumps(record).replace('"HERE"', "[" * depth + "]" * depth)) is None


@pytest.mark.parametrize(
    "record",
    [
        {"id": "x" * 10**6, "conversations": [{"user": "u"}]},
        {"x" * 10**6: 1, "id": "1", "conversations": []},
        {"id": "1", "conversations": [{"user": "u", "assistant": "a" * 10**6, "labels": ["b", "c"]}]},
        {"id": "1", "conversations": [{"user": "u", "assistant": "a", "labels": [str(k) for k in range(10**5)]}]},
        {"id": "1", "conversations": [{"user": "<|image_1|>" * 10**5, "assistant": "a"}]},
        {"id": "1", "conversations": [{"user": "u", "assistant": "a", "images": ["a"] * 10**5 + [1]}]},
    ],
    ids=["id", "key", "answer", "labels", "tags", "images"],
)
def test_messages_about_megabytes_are_short(record: Any) -> None:
    assert read(json.dumps(record)) is None


@FUZZ
@given(content=st.binary(max_size=80) | st.lists(RECORDS.map(json.dumps), max_size=3).map("\n".join).map(str.encode))
@example(content=b"\xef\xbb\xbf\n\r\n\xff\xfe")
@example(content=b"\x00" * 40)
@example(content=b'{"id": "1", "conversations": [{"user": "u", "assistant": "a"}]}\r\n\x0b\n')
def test_any_file_is_samples_or_a_named_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(content)
        # Plain reading: lines end at line feeds, one that holds nothing but white space is none.
        lines = [
            (k, line) for k, line in enumerate(content.split(b"\n"), 1) if line.removeprefix(b"\xef\xbb\xbf").strip()
        ]
        try:
            dataset = ConversationDataset(path)
        except DataError as error:
            assert str(path) in str(error) and not lines
            return
        assert len(dataset) == len(lines)
        for index, (number, line) in enumerate(lines):
            try:
                sample = dataset[index]
            except SampleError as error:
                assert str(error).startswith(f"{path}:{number}: ")
                continue
            assert sample.where == f"{path}:{number}"
            check_sample(sample, line.removeprefix(b"\xef\xbb\xbf").decode())
            for name in sample.images:
                try:
                    assert dataset.image_path(sample, name).is_relative_to(Path(folder).resolve())
                except SampleError as error:
                    assert str(error).startswith(f"{path}:{number}: ")


def test_a_line_without_an_end_is_refused_before_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.data.jsonl.MAX_LINE_BYTES", 2**20)
    path = tmp_path / "array.jsonl"
    path.write_bytes(b"{}\n[" + b" " * 2**21)
    with pytest.raises(DataError, match=r"array\.jsonl:2: the line is longer than 1 MiB.*phi3v data convert"):
        ConversationDataset(path)
