import json
import random
import tracemalloc

import pytest

from phi3v.data.convert import json_records
from phi3v.data.convert.json_records import read_json_records
from phi3v.errors import DataError


def refuse(error):
    raise error


def read(path):
    return list(read_json_records(path, refuse))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_an_array_is_read_as_json_load_reads_it_whatever_the_chunks(tmp_path, monkeypatch, indent, chunk_bytes):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk_bytes)
    choose = random.Random(chunk_bytes)
    words = ['a "quoted" word', "\\", "naïve ☃ 😀", "line\nfeed", "", "[{,}]", "tab\t", "\x7f"]
    records = [
        {"id": k, "x": choose.choice([-1.5e-30, True, None, 12345]), "text": [choose.choice(words) for _ in range(4)]}
        for k in range(40)
    ]
    path = tmp_path / "array.json"
    path.write_bytes(b"\xef\xbb\xbf\n \n" + json.dumps(records, indent=indent, ensure_ascii=chunk_bytes > 7).encode())
    found = read(path)
    assert [value for _, value in found] == json.loads(path.read_bytes().decode("utf-8-sig"))
    lines = path.read_text("utf-8-sig").split("\n")
    starts = [number for number, line in enumerate(lines, start=1) if line == "  {"] if indent else [3] * 40
    assert [where for where, _ in found] == [f"{path}:{number}" for number in starts]


@pytest.mark.parametrize("content", [b"[]", b" [\n] \n", b"", b"\n\n"])
def test_empty_files_have_no_records(tmp_path, content):
    path = tmp_path / "empty.json"
    path.write_bytes(content)
    assert read(path) == []


def test_elements_that_are_no_objects_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", 3)
    path = tmp_path / "mixed.json"
    path.write_text('[12345678, "text", null, [1, [2]], {}, -1.25e3]')
    assert [value for _, value in read(path)] == [12345678, "text", None, [1, [2]], {}, -1250.0]


def test_lines_are_numbered_with_blank_ones_counted(tmp_path):
    path = tmp_path / "lines.json"  # the name says nothing
    path.write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n  {"b": "\xc3\xa4"}')
    assert read(path) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"b": "ä"})]


def test_a_bad_line_is_reported_and_the_next_one_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    errors = []
    assert list(read_json_records(path, errors.append)) == [(f"{path}:1", {"a": 1}), (f"{path}:5", {"a": 2})]
    assert [error.reason for error in errors] == ["broken JSON", "broken text", "broken JSON"]
    assert str(errors[0]).startswith(f"{path}:2: broken JSON: Expecting value")
    assert str(errors[1]) == f"{path}:3: byte 8 of the line is not UTF-8. Save the file as UTF-8."


@pytest.mark.parametrize("chunk_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b'[\n{"a": 1},\n{"a": 2}\n', 4, "the array has no end"),
        (b'[\n{"a": 1},\n', 3, "the array has no end"),
        (b'[\n{"a": 1},\n{"a": "cut', 3, "broken JSON: Unterminated string"),
        (b'[\n{"a": 1},\n{"a": 2', 3, "broken JSON: Expecting ',' delimiter"),
        (b'[\n{"a": 1}\n{"a": 2}]', 3, "'{' follows a record, not a comma or ]"),
        (b'[\n{"a": 1},\n{\n"a": two\n}, {"a": 3}, {"a": 4}, {"a": 5}\n]', 4, "broken JSON: Expecting value"),
        (b'[\n{"a": 1},\n]', 3, "broken JSON: Expecting value"),
        (b'[{"a": 1}]\n\n{"a": 2}', 3, "'{' follows the end of the array"),
        (b'[\n{"a": "b\nc"}]', 2, "broken JSON: Invalid control character"),
        (b'[\n{"a": 1},\n{"a": "\xff"}]', 3, "a byte is not UTF-8"),
        (b'[\n{"a": 1},\n{"a": "\xc3', 3, "a byte is not UTF-8"),
        (b"[\n" + b"[" * 100_000, 2, "broken JSON"),
    ],
)
def test_a_broken_array_names_the_line(tmp_path, monkeypatch, content, line, found, chunk_bytes):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "array.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: {found}")
    assert "what follows this place cannot be read" in str(caught.value)


def test_a_broken_record_is_found_without_reading_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", 1000)
    path = tmp_path / "array.json"
    path.write_text('[{"a" 1}, ' + '{"a": "some text"}, ' * 50_000 + "{}]")
    tracemalloc.start()
    with pytest.raises(DataError, match="Expecting ':'"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK_BYTES", 10_000)
    path = tmp_path / "array.json"
    path.write_text("[" + ", ".join(['{"text": "' + "word " * 100 + '"}'] * 4000) + "]")
    assert path.stat().st_size > 2_000_000
    tracemalloc.start()
    num_records = sum(1 for _ in read_json_records(path, refuse))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_records == 4000
    assert peak_bytes < 200_000


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: cannot be read: No such file"):
        read(tmp_path / "gone.json")
