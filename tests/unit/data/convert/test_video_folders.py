"""Trees of clips sorted by class: both layouts, the split by clip and by group, and names of every kind."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clips import frame_number, write_clip
from phi3v.data.convert import converter
from phi3v.data.convert.video_folders import convert_video_folders
from phi3v.data.schema import SampleError, parse_sample
from phi3v.errors import ConfigError, DataError


def convert(source: Path, output_dir: Path, **options):
    return convert_video_folders(str(source), output_dir, **{"num_workers": 1, "progress": False, **options})


def write_tree(folder: Path, *names: str, num_frames: int = 3) -> Path:
    for name in names:
        write_clip(folder / name, num_frames)
    return folder


def samples(output_dir: Path, split: str, name: str = "in") -> dict[str, dict]:
    """The only turn of every line, by id."""
    found = {}
    for line in (output_dir / f"{name}_{split}.jsonl").read_text("utf-8").splitlines():
        parse_sample(line, "here")
        record = json.loads(line)
        (found[record["id"]],) = record["conversations"]
    return found


def test_class_folders(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "wave/a.mp4", "wave/b.avi", "jump/c.mkv", num_frames=21)
    conversion = convert(folder, tmp_path / "out", num_frames=4)
    assert conversion.samples == {"train": 3}
    found = samples(tmp_path / "out", "train")
    assert list(found) == ["jump/c", "wave/a", "wave/b"]
    assert found["wave/a"] == {
        "images": [f"wave/a.{index}.jpg" for index in range(4)],
        "user": "Classify the video into one of the following classes: jump, wave.",
        "assistant": "wave",
        "labels": ["jump", "wave"],
    }
    for turn in found.values():
        numbers = [frame_number(Image.open(conversion.image_dir / name)) for name in turn["images"]]
        assert numbers == np.arange(0, 21, 21 / 4).astype(int).tolist()


def test_folders_of_splits_and_classes_over_all_of_them(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "train/wave/a.mp4", "validation/jump/b.mp4", "test/sit/c.mp4")
    assert convert(folder, tmp_path / "out").samples == {"test": 1, "train": 1, "val": 1}
    (turn,) = samples(tmp_path / "out", "val").values()
    assert turn["labels"] == ["jump", "sit", "wave"]
    assert turn["images"][0] == "validation/jump/b.0.jpg"


@pytest.mark.parametrize("ending", ["avi", "MP4", "mkv", "Mov", "webm", "mpg", "mpeg", "m4v", "flv", "wmv", "gif"])
def test_every_ending_is_found(tmp_path: Path, ending: str) -> None:
    write_clip(tmp_path / "clip.mkv", 3).rename(tmp_path / f"clip.{ending}")  # the content decides how it is read
    folder = write_tree(tmp_path / "in", "wave/a.mp4", "jump/b.mp4")
    (tmp_path / f"clip.{ending}").rename(folder / "wave" / f"c.{ending}")
    assert convert(folder, tmp_path / "out").samples == {"train": 3}


def test_an_own_question_and_the_folder_s_name(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "moves_train", "wave/a.mp4", "jump/b.mp4")
    convert(folder, tmp_path / "out", question="Which of {classes}? As {json}.")
    assert samples(tmp_path / "out", "train", "moves")["jump/b"]["user"] == "Which of jump, wave? As {json}."
    assert '"source": "moves"' in (tmp_path / "out" / "moves_train.jsonl").read_text()


def test_names_with_spaces_and_of_other_scripts(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "apply lipstick/clip 1.mp4", "плавание/клип.mp4", "柔道/v.1.2%d.mp4")
    assert convert(folder, tmp_path / "out", num_frames=1).samples == {"train": 3}
    found = samples(tmp_path / "out", "train")
    assert found["柔道/v.1.2%d"]["images"] == ["柔道/v.1.2%d.0.jpg"]
    assert {turn["assistant"] for turn in found.values()} == {"apply lipstick", "плавание", "柔道"}
    assert all((tmp_path / "out" / "images" / turn["images"][0]).is_file() for turn in found.values())


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    write_tree(tmp_path / "elsewhere", "a.mp4")
    folder = write_tree(tmp_path / "in", "jump/b.mp4")
    (folder / "wave").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert convert(folder, tmp_path / "out").samples == {"train": 2}


def split_of(tmp_path: Path, names: list[str], **options) -> dict[str, set[str]]:
    """Converts clips that are all the same file and returns the ids of each split."""
    clip = write_clip(tmp_path / "clip.avi", 1)
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(clip)
    conversion = convert(tmp_path / "in", tmp_path / "out", num_frames=1, **options)
    return {split: set(samples(tmp_path / "out", split)) for split in conversion.samples}


def test_val_share_takes_its_share_of_every_class(tmp_path: Path) -> None:
    names = [
        f"{label}/{k:03}.avi" for label, count in (("a", 40), ("b", 20), ("c", 10), ("d", 10)) for k in range(count)
    ]
    split = split_of(tmp_path, names, val_share=0.15)
    assert len(split["val"]) == 12 and len(split["train"]) == 68
    assert not split["val"] & split["train"]
    by_class = Counter(clip[0] for clip in split["val"])
    assert by_class["a"] == 6 and by_class["b"] == 3 and {by_class["c"], by_class["d"]} == {1, 2}


def test_val_share_of_many_small_classes(tmp_path: Path) -> None:
    split = split_of(tmp_path, [f"{label:02}/{k}.avi" for label in range(30) for k in range(3)], val_share=0.1)
    assert len(split["val"]) == 9
    assert {clip[:2] for clip in split["train"]} == {f"{label:02}" for label in range(30)}


def test_the_split_depends_on_the_clips_alone(tmp_path: Path) -> None:
    names = [f"{label}/{k:03}.avi" for label in "ab" for k in range(20)]
    first = split_of(tmp_path / "one", names, val_share=0.25)
    random.Random(0).shuffle(names)
    assert split_of(tmp_path / "two", names, val_share=0.25) == first


def test_val_share_takes_from_train_where_there_is_a_test_split(tmp_path: Path) -> None:
    names = [f"{split}/{label}/{k}.avi" for split in ("train", "test") for label in "ab" for k in range(4)]
    split = split_of(tmp_path, names, val_share=0.25)
    assert {part: len(clips) for part, clips in split.items()} == {"test": 8, "train": 6, "val": 2}
    assert {clip.split("/")[1] for clip in split["val"]} == {"a", "b"}


def test_groups_are_not_split(tmp_path: Path) -> None:
    names = [f"{label}/v_{label}_g{group:02}_c{k}.avi" for label in ("x", "y") for group in range(10) for k in range(4)]
    split = split_of(tmp_path, names, val_share=0.2, group_pattern=r"_g(\d+)_")
    groups = {part: {clip.split("_g")[1][:2] for clip in clips} for part, clips in split.items()}
    assert not groups["train"] & groups["val"]
    assert (len(groups["val"]), len(split["val"])) == (2, 16)
    assert {clip[0] for clip in split["val"]} == {"x", "y"}


@pytest.mark.parametrize(("share", "num_val"), [(0.08, 4), (0.22, 8), (0.28, 12), (0.9, 36)])
def test_groups_come_as_near_to_the_share_as_they_can(tmp_path: Path, share: float, num_val: int) -> None:
    names = [f"{label}/g{group}_{k}.avi" for label in ("x", "y") for group in range(10) for k in range(2)]
    assert len(split_of(tmp_path, names, val_share=share, group_pattern=r"(g\d)")["val"]) == num_val


def test_a_changed_share_decodes_nothing_again(tmp_path: Path) -> None:
    split_of(tmp_path, [f"{label}/{k:03}.avi" for label in "ab" for k in range(10)])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.jpg")}
    convert(tmp_path / "in", tmp_path / "out", num_frames=1, val_share=0.3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.jpg")} == before


def test_unreadable_clips_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "wave/a.mp4", "jump/b.mp4")
    (folder / "wave" / "bad.mp4").write_text("no clip")
    assert convert(folder, tmp_path / "out").skipped == {"not a video": 1}
    assert str(folder / "wave" / "bad.mp4") in (tmp_path / "out" / "unreadable.txt").read_text()


def test_other_files_are_counted(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "wave/a.mp4", "jump/b.mp4")
    (folder / "labels.csv").touch()
    (folder / "labels\udcff.csv").touch()
    (folder / ".DS_Store").touch()
    conversion = convert(folder, tmp_path / "out", on_bad_sample="error")
    assert conversion.skipped == {"no video file": 2}
    assert f"{folder}/labels.csv: the file is no video by its name" in str(conversion)
    print(conversion)  # also where a name is not UTF-8


def test_frames_are_not_written_through_a_link(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "wave/a.mp4", "jump/b.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "out" / "images").symlink_to(tmp_path / "photos", target_is_directory=True)
    with pytest.raises(DataError, match=r"out/images is a link.*Take the link away"):
        convert(folder, tmp_path / "out")
    assert list((tmp_path / "photos").iterdir()) == []


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        ([], {}, DataError, "in: no such folder. Give one that is laid out as CLASS/CLIP or SPLIT/CLASS/CLIP"),
        (["clip.mp4"], {}, DataError, "in/clip.mp4: stands in no class folder"),
        (["train/a.mp4", "test/b.mp4"], {}, DataError, "in/test/b.mp4: stands in no class folder"),
        (["sport/wave/a.mp4", "sport/jump/b.mp4"], {}, DataError, "in a folder within a class folder"),
        (["train/sport/wave/a.mp4"], {}, DataError, "in a folder within a class folder"),
        (["train/wave/a.mp4", "jump/b.mp4"], {}, DataError, "train/wave/a.mp4: is in a folder within a class folder"),
        (["wave/a.mp4"], {}, DataError, "its class, 'wave', is the only one"),
        (["wave/a.mp4", "wave/a.avi", "jump/b.mp4"], {}, DataError, "wave/a.mp4: a.avi stands beside it"),
        (["a<|end|>/a.mp4", "b/b.mp4"], {}, SampleError, "special token"),
        (["a/a.mp4", "b/b.mp4"], {"question": "<|image_1|>?"}, SampleError, "image tags"),
        (["a/a.mp4", "b/b.mp4"], {"val_share": 1.0}, ConfigError, "val_share is 1; give a share from 0 to below 1"),
        (
            ["a/a.mp4", "b/b.mp4"],
            {"val_share": 0.5},
            ConfigError,
            "val_share is 0.5 of 2 clips, which is no whole clip",
        ),
        (["train/a/a.mp4", "val/b/b.mp4"], {"val_share": 0.5}, ConfigError, "has validation clips already"),
        (["a/a.mp4", "b/b.mp4"], {"group_pattern": "(.)"}, ConfigError, "val_share is 0; give both or none"),
        (
            ["a/a.mp4", "b/b.mp4"],
            {"group_pattern": "(", "val_share": 0.5},
            ConfigError,
            "no regular expression: missing",
        ),
        (["a/a.mp4", "b/b.mp4"], {"group_pattern": "g", "val_share": 0.5}, ConfigError, "has no group; put"),
        (
            ["a/a_g1.mp4", "b/b.mp4"],
            {"group_pattern": r"_g(\d)", "val_share": 0.5},
            ConfigError,
            "finds nothing in b/b.mp4",
        ),
        (["a/g1.mp4", "b/g1.mp4"], {"group_pattern": "(g1)", "val_share": 0.5}, ConfigError, "is no whole group"),
        (["a/a.mp4", "b/b.mp4"], {"num_frames": 0}, ConfigError, "num_frames is 0"),
    ],
)
def test_what_cannot_be_converted_is_said(
    tmp_path: Path, names: list[str], options: dict[str, object], error: type[Exception], message: str
) -> None:
    write_tree(tmp_path / "in", *names)
    with pytest.raises(error) as raised:
        convert(tmp_path / "in", tmp_path / "out", **options)
    assert message in str(raised.value)
    assert not list(tmp_path.rglob("*.jpg"))


def test_a_name_that_is_not_utf8_is_said(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "in", "wave/a.mp4", "jump/b.mp4")
    (folder / "jump").rename(folder / "jump\udcff")
    with pytest.raises(DataError, match=r"the name 'jump\\udcff/b.mp4' is not UTF-8. Rename"):
        convert(folder, tmp_path / "out")


def test_the_name_of_the_command_line_is_this_converter() -> None:
    assert converter("video-folders") is convert_video_folders
