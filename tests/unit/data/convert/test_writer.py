import json
import os
from pathlib import Path

import pytest

from phi3v.data.convert.writer import NativeWriter
from phi3v.data.schema import SampleError, sample_error
from phi3v.errors import DataError


def record(name="1", assistant="Oak", **turn):
    return {"id": name, "conversations": [{"user": "Which tree?", "assistant": assistant, **turn}]}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_records_are_written_as_they_are_one_file_a_split(tmp_path):
    with NativeWriter(tmp_path / "deep" / "out", "trees") as writer:
        assert writer.add("train", record("ä"), where="list.csv:2")
        assert writer.add("val", record("b"), where="list.csv:3")
        assert writer.add("train", record("c", answers=["an oak"]), where="list.csv:4")
    train, val = (tmp_path / "deep" / "out" / f"trees_{split}.jsonl" for split in ("train", "val"))
    assert [json.loads(line) for line in train.read_text("utf-8").splitlines()] == [
        record("ä"),
        record("c", answers=["an oak"]),
    ]
    assert json.loads(val.read_text()) == record("b")
    assert writer.conversion.files == {"train": train, "val": val}
    assert str(writer.conversion) == f"{train}: 2 samples\n{val}: 1 samples\nimages: {tmp_path / 'deep/out/images'}"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_what_fails_leaves_the_earlier_conversion_and_a_rerun_completes(tmp_path, interruption):
    out, photos = tmp_path / "out", tmp_path / "photos"
    photos.mkdir()
    with NativeWriter(out, "trees") as writer:
        writer.add("train", record("earlier"), where="a:1")
    before = contents(out)
    with pytest.raises((KeyboardInterrupt, OSError)), NativeWriter(out, "trees") as writer:
        writer.use_images(photos)
        writer.add("train", record("new"), where="a:1")
        writer.add("val", record("new"), where="a:2")
        raise interruption
    assert contents(out) == before
    assert not (out / "images").is_symlink()
    (out / ".trees_train.jsonl.writing").write_text("what a killed conversion left")
    with NativeWriter(out, "trees") as writer:
        writer.use_images(photos)
        writer.add("train", record("new"), where="a:1")
    assert contents(out) == {"trees_train.jsonl": json.dumps(record("new")) + "\n"}
    assert (out / "images").resolve() == photos


def test_a_file_that_cannot_be_completed_is_removed(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"), NativeWriter(tmp_path, "trees") as writer:
        writer.add("train", record(), where="a:1")
    assert contents(tmp_path) == {}


def test_a_bad_record_ends_the_conversion_with_its_place(tmp_path):
    with (
        pytest.raises(SampleError, match=r"list.csv:7: sample '1', turn 1: 'assistant' is empty\. Write its text"),
        NativeWriter(tmp_path, "trees") as writer,
    ):
        writer.add("train", record(assistant=" "), where="list.csv:7")
    assert contents(tmp_path) == {}


def test_bad_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    with NativeWriter(tmp_path, "trees", on_bad_sample="skip") as writer:
        for number in range(12):
            assert not writer.add("train", record(assistant=""), where=f"list.csv:{number}")
        writer.skip(sample_error("list.csv:20", "no such image", "Correct it.", "missing image"))
        assert writer.add("train", record(), where="list.csv:21")
    assert writer.conversion.samples == {"train": 1}
    assert writer.conversion.skipped == {"empty answer": 12, "missing image": 1}
    lines = str(writer.conversion).splitlines()
    assert lines[2] == "left out: 12 x empty answer, 1 x missing image"
    assert (len(lines), lines[3][:15], lines[-1]) == (14, "  list.csv:0: s", "  and 3 more")


def test_what_a_source_has_no_answer_to_is_counted_without_ending_the_conversion(tmp_path):
    with NativeWriter(tmp_path, "trees", on_bad_sample="error") as writer:
        writer.leave_out(sample_error("test:1", "no answer was published", "It cannot be scored.", "no answer"))
        writer.add("train", record(), where="train:1")
    assert "left out: 1 x no answer\n  test:1: no answer was published." in str(writer.conversion)


@pytest.mark.parametrize("place", ["assistant", "answers"])
def test_half_a_character_is_a_bad_record(tmp_path, place):
    bad = record(**({"assistant": "\ud83d"} if place == "assistant" else {"answers": ["\ud83d"]}))
    with (
        pytest.raises(SampleError, match=r"a:1: .*half of a surrogate pair"),
        NativeWriter(tmp_path, "trees") as writer,
    ):
        writer.add("train", bad, where="a:1")


def test_nothing_to_write_is_an_error_that_names_what_was_found(tmp_path):
    with (
        pytest.raises(DataError, match=r"no usable record was found[^$]*list.csv:7: sample '1'"),
        NativeWriter(tmp_path, "trees", on_bad_sample="skip") as writer,
    ):
        writer.add("train", record(assistant=""), where="list.csv:7")
    assert contents(tmp_path) == {}


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"out: the folder cannot be made: File exists. Choose another output_dir"):
        NativeWriter(tmp_path / "out", "trees").__enter__()


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_written_and_copied_once(tmp_path):
    source = tmp_path / "oak.png"
    source.write_bytes(b"oak")
    writer = NativeWriter(tmp_path / "out", "trees")
    assert writer.write_image("a/elm.png", b"elm") == "a/elm.png"
    assert writer.copy_image(source, "b/oak.png") == "b/oak.png"
    elm, oak = tmp_path / "out/images/a/elm.png", tmp_path / "out/images/b/oak.png"
    assert (elm.read_bytes(), oak.read_bytes()) == (b"elm", b"oak")
    times = elm.stat().st_mtime_ns, oak.stat().st_mtime_ns
    writer.write_image("a/elm.png", b"elm")
    writer.copy_image(source, "b/oak.png")
    assert (elm.stat().st_mtime_ns, oak.stat().st_mtime_ns) == times
    writer.write_image("a/elm.png", b"a whole elm, where one cut short was")
    assert elm.read_bytes() == b"a whole elm, where one cut short was"
    assert [path.name for path in elm.parent.iterdir()] == ["elm.png"]


def test_a_copy_follows_its_source_also_where_the_size_stays(tmp_path):
    source, copy = tmp_path / "oak.bmp", tmp_path / "out" / "images" / "oak.bmp"
    source.write_bytes(b"green")
    writer = NativeWriter(tmp_path / "out", "trees")
    writer.copy_image(source, "oak.bmp")
    first = copy.stat().st_ino
    writer.copy_image(source, "oak.bmp")
    assert copy.stat().st_ino == first
    source.write_bytes(b"brown")
    os.utime(source, (1_000, 1_000))  # an older file may take the place of a newer one
    writer.copy_image(source, "oak.bmp")
    assert copy.read_bytes() == b"brown"
    writer.write_image("oak.bmp", b"black")
    assert copy.read_bytes() == b"black"


SHOWN = {"images": ["oak.png"]}


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        (record("1", **SHOWN), record("1", **SHOWN)),
        (record("1", **SHOWN), {"id": "1", "conversations": [{"user": "And now?", "assistant": "Elm", **SHOWN}]}),
        (record("val-1", **SHOWN), record("train-1", **SHOWN)),
        (record("1"), record("1")),
    ],
    ids=["the same", "another question", "another id", "text"],
)
def test_a_sample_that_an_earlier_conversion_put_into_another_split_is_refused(tmp_path, earlier, now):
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("train", record("another"), where="a:1")
        writer.add("val", earlier, where="a:2")
    before = contents(tmp_path)
    with (
        pytest.raises(DataError, match=r"trees_val.jsonl is an earlier conversion's .* in train, such as '.*1'"),
        NativeWriter(tmp_path, "trees") as writer,
    ):
        writer.add("train", now, where="a:2")
    assert contents(tmp_path) == before


def test_other_splits_of_an_earlier_conversion_stay_and_are_told(tmp_path):
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("val", record("1"), where="val.csv:1")
        writer.add("val", record("2", images=["elm.png"]), where="val.csv:2")
    with NativeWriter(tmp_path, "trees_few") as writer:
        writer.add("train", record("1", **SHOWN), where="few.csv:1")
    before = contents(tmp_path)
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("train", record("1", **SHOWN), where="train.csv:1")
        writer.add("train", record("train-1"), where="train.csv:2")
    assert writer.conversion.others == [tmp_path / "trees_val.jsonl"]
    assert f"left as they were, of an earlier conversion: {tmp_path / 'trees_val.jsonl'}" in str(writer.conversion)
    assert before.items() <= contents(tmp_path).items()


def test_sets_to_score_may_overlap_and_other_files_are_somebodys_own(tmp_path):
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("val", record("1", **SHOWN), where="val.csv:1")
        writer.add("train", record("2"), where="train.csv:1")
    (tmp_path / "trees_small.jsonl").write_bytes((tmp_path / "trees_train.jsonl").read_bytes())
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("val_unseen", record("1", **SHOWN), where="unseen.csv:1")
        writer.add("train", record("2"), where="train.csv:1")
    assert writer.conversion.others == [tmp_path / "trees_val.jsonl"]


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_a_second_conversion_at_the_same_time_is_refused_and_harms_nothing(tmp_path):
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("train", record("1"), where="a:1")
        with (
            pytest.raises(DataError, match=r"another conversion is writing to this folder. Wait for its end"),
            NativeWriter(tmp_path, "trees") as other,
        ):
            other.add("train", record("2"), where="a:1")
        writer.add("train", record("3"), where="a:2")
    assert contents(tmp_path) == {"trees_train.jsonl": "".join(json.dumps(record(name)) + "\n" for name in ("1", "3"))}


def test_what_a_killed_conversion_has_begun_goes_with_the_next(tmp_path):
    (tmp_path / ".trees_train.jsonl.1.writing").write_text("half")
    with NativeWriter(tmp_path, "trees") as writer:
        writer.add("train", record("1"), where="a:1")
    assert list(contents(tmp_path)) == ["trees_train.jsonl"]


@pytest.mark.parametrize("name", ["../oak.png", "a/../../oak.png", "/oak.png"])
def test_no_image_is_written_outside_the_image_folder(tmp_path, name):
    source = tmp_path / "source.png"
    source.write_bytes(b"oak")
    writer = NativeWriter(tmp_path / "out", "trees")
    for write in (lambda: writer.write_image(name, b"oak"), lambda: writer.copy_image(source, name)):
        with pytest.raises(DataError, match="would be written outside"):
            write()


def test_no_image_is_written_into_a_folder_that_is_linked_to(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    with NativeWriter(tmp_path / "out", "trees") as writer:
        writer.use_images(photos)
        writer.use_images(photos)
        writer.add("train", record(), where="a:1")
        with pytest.raises(DataError, match=r"out/images is a link.*choose another output_dir"):
            writer.write_image("oak.png", b"oak")
    assert list(photos.iterdir()) == []


@pytest.mark.parametrize("in_the_way", ["folder", "link", "link to nothing"])
def test_another_image_folder_is_not_replaced_by_a_link(tmp_path, in_the_way):
    (tmp_path / "photos").mkdir()
    images = tmp_path / "out" / "images"
    if in_the_way == "folder":
        images.mkdir(parents=True)
    else:
        images.parent.mkdir()
        images.symlink_to(tmp_path / ("gone" if in_the_way == "link to nothing" else "."))
    with (
        pytest.raises(DataError, match=r"out/images is there already and is not .*photos. Take it away"),
        NativeWriter(tmp_path / "out", "trees") as writer,
    ):
        writer.use_images(tmp_path / "photos")
    assert images.is_symlink() == (in_the_way != "folder")


def test_a_folder_that_cannot_be_linked_to_is_named(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(DataError, match="photos: the image folder is not there"):
        NativeWriter(tmp_path, "trees").use_images(tmp_path / "photos")
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(DataError, match=r"images: no link can be made here: Operation not permitted. Set copy_images"):
        NativeWriter(tmp_path, "trees").use_images(tmp_path / "photos")
