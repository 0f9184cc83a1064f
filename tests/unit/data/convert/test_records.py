import pytest

from phi3v.data.convert.records import SourceRecord, check_counts, release_files, release_records
from phi3v.data.convert.writer import NativeWriter
from phi3v.data.schema import SampleError
from phi3v.errors import ConfigError, DataError

NAMES = {"train": ("train.jsonl",), "val": ("dev_seen.jsonl", "dev.jsonl")}


def test_fields_are_returned_as_they_are_but_for_space_around_answers():
    record = SourceRecord({"a": " text ", "n": 7, "l": [1], "answers": [" 12 ", "twelve"]}, "x.json:3")
    assert (record.get("a", str), record.get("n", int), record.get("l", list)) == (" text ", 7, [1])
    assert (record.get_id("a"), record.get_id("n")) == (" text ", "7")
    assert record.get_answers("answers") == ["12", "twelve"]


@pytest.mark.parametrize(
    ("values", "key", "kind", "message"),
    [
        ({"id": 1, "img": "a"}, "label", int, r"x.json:3: there is no 'label' among 'id', 'img'\. Convert the release"),
        ({}, "label", int, "there is no 'label' among no fields at all"),
        ({"label": "1"}, "label", int, r"x.json:3: 'label' is '1'\. It must be a whole number"),
        ({"label": True}, "label", int, r"'label' is True\. It must be a whole number"),
        ({"text": None}, "text", str, r"'text' is None\. It must be text"),
        ({"text": "w" * 500}, "text", list, r"'text' is 'w{59}\.\.\. It must be a list"),
    ],
)
def test_what_is_not_there_is_named_with_its_place(values, key, kind, message):
    with pytest.raises(SampleError, match=message):
        SourceRecord(values, "x.json:3").get(key, kind)


@pytest.mark.parametrize(
    ("answers", "reason", "message"),
    [
        ([], "empty answer", "'answers' is empty"),
        (["a", " "], "empty answer", "'answers' holds an empty answer"),
        (["a", 3], "wrong type", "'answers' holds 3"),
        ("a", "wrong type", "It must be a list"),
    ],
)
def test_answers_must_be_text(answers, reason, message):
    with pytest.raises(SampleError, match=f"x.json:3: .*{message}") as caught:
        SourceRecord({"answers": answers}, "x.json:3").get_answers("answers")
    assert caught.value.reason == reason


def test_a_release_is_its_folder_or_one_of_its_files(tmp_path):
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).touch()
    assert release_files(str(tmp_path), NAMES) == {"train": tmp_path / "train.jsonl", "val": tmp_path / "dev.jsonl"}
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "dev_seen.jsonl").touch()
    assert release_files(str(tmp_path), NAMES, (".", "lists"))["val"] == tmp_path / "lists" / "dev_seen.jsonl"
    assert release_files(str(tmp_path / "dev.jsonl"), NAMES) == {"val": tmp_path / "dev.jsonl"}


def test_anything_else_is_a_hub_data_set(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    assert release_files(str(tmp_path), NAMES) == {}
    assert release_files("owner/name", NAMES) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}", r"the release's files are not there \(train.jsonl, dev_seen.jsonl, dev.jsonl\), nor any Parquet file"),
        ("{}/other.jsonl", "other.jsonl: not a file of the release. Its files are named train.jsonl, dev_seen.jsonl"),
        ("{}/gone", "gone: no such file or folder. Name the release's folder, or a data set as owner/name"),
        ("./gone/away", "gone/away: no such file or folder"),
        ("gone", "gone: no such file or folder"),
    ],
)
def test_a_source_that_is_neither_is_refused(tmp_path, source, message):
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(DataError, match=message):
        release_files(source.format(tmp_path), NAMES)


def test_lines_are_read_up_to_the_limit_and_bad_ones_are_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": 1}\n{"id": 2\n[3]\n\n{"id": 5}\n{"id": 6}\n')
    writer = NativeWriter(tmp_path, "x", on_bad_sample="skip")
    found = list(release_records(path, writer, limit=3, progress=False))
    assert found == [SourceRecord({"id": 1}, f"{path}:1"), SourceRecord({"id": 5}, f"{path}:5")]
    assert [problem.partition(". ")[0] for problem in writer.conversion.problems] == [
        f"{path}:2: broken JSON: Expecting ',' delimiter: line 2 column 1 (char 9)",
        f"{path}:3: the record is no JSON object",
    ]
    strict = NativeWriter(tmp_path, "x")
    with pytest.raises(SampleError, match=r"train.jsonl:2: broken JSON"):
        list(release_records(path, strict, limit=None, progress=False))


@pytest.mark.parametrize("count", [0, -1])
def test_counts_start_at_one(count):
    check_counts(limit=None, num_val_rows=1)
    with pytest.raises(ConfigError, match=f"limit is {count}; give a whole number, at least 1"):
        check_counts(limit=count)
