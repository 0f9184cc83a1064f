"""The UCF-101 converter: the published tree and lines, archives that may be hostile, and runs that were killed."""

import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from clips import frame_number, write_clip
from phi3v.data.convert import clips as engine
from phi3v.data.convert import converter, ucf101
from phi3v.data.convert.ucf101 import convert_ucf101
from phi3v.data.schema import SampleError, parse_sample
from phi3v.errors import CapacityError, ConfigError, DataError

TREE = {
    "train/Archery/v_Archery_g01_c01.avi": 29,
    "train/Archery/v_Archery_g01_c02.avi": 40,
    "train/BabyCrawling/v_BabyCrawling_g02_c01.avi": 100,
    "val/BabyCrawling/v_BabyCrawling_g21_c04.avi": 61,
    "test/Archery/v_Archery_g05_c01.avi": 5,
}
"""Clips of the small subset and their frames."""


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    folder = tmp_path / "UCF101_subset"
    for name, num_frames in TREE.items():
        write_clip(folder / name, num_frames)
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that are decoded in this process."""
    names: list[str] = []
    read = engine.read_frames

    def read_and_note(path: Path, num_frames: int) -> list[Image.Image]:
        names.append(path.stem)
        return read(path, num_frames)

    monkeypatch.setattr(engine, "read_frames", read_and_note)
    return names


def convert(source: Path, output_dir: Path, **options):
    return convert_ucf101(str(source), output_dir, **{"num_workers": 1, "progress": False, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tables(image: Any) -> dict[int, list[int]]:
    """The quantization tables of a JPEG file, which its quality sets."""
    return image.quantization


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def pack(archive: Path, folder: Path, *others: tarfile.TarInfo, prefix: str = "UCF101_subset") -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, prefix)
        for member in others:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return archive


def test_the_lines_are_the_published_ones(subset: Path, tmp_path: Path) -> None:
    conversion = convert(subset, tmp_path / "out")
    stem = "val/BabyCrawling/v_BabyCrawling_g21_c04"
    assert lines(tmp_path / "out" / "ucf101_val.jsonl") == [
        {
            "id": "val-0000000003",
            "source": "ucf101",
            "conversations": [
                {
                    "images": [f"{stem}.{index}.jpg" for index in range(8)],
                    "user": "Classify the video into one of the following classes: Archery, BabyCrawling.",
                    "assistant": "BabyCrawling",
                    "labels": ["Archery", "BabyCrawling"],
                }
            ],
        }
    ]
    assert conversion.samples == {"train": 3, "val": 1, "test": 1}
    assert [line["id"] for line in lines(tmp_path / "out" / "ucf101_train.jsonl")] == [
        *("train-0000000000", "train-0000000001", "train-0000000002")
    ]
    assert lines(tmp_path / "out" / "ucf101_test.jsonl")[0]["id"] == "test-0000000004"


def test_the_tree_holds_eight_frames_a_clip_and_nothing_else(subset: Path, tmp_path: Path) -> None:
    convert(subset, tmp_path / "out")
    images = {f"images/{name[:-4]}.{index}.jpg" for name in TREE for index in range(8)}
    assert set(tree(tmp_path / "out")) == images | {f"ucf101_{split}.jsonl" for split in ("train", "val", "test")}


def test_frames_are_the_published_choice_in_default_jpeg(subset: Path, tmp_path: Path) -> None:
    convert(subset, tmp_path / "out")
    for name, total in TREE.items():
        stem = str(tmp_path / "out" / "images" / name[:-4])
        images = [Image.open(f"{stem}.{index}.jpg") for index in range(8)]
        assert [frame_number(image) for image in images] == np.arange(0, total, total / 8).astype(int).tolist()
        default = io.BytesIO()
        images[0].copy().save(default, "JPEG")
        assert tables(images[0]) == tables(Image.open(default))


def test_training_can_read_the_lines(subset: Path, tmp_path: Path) -> None:
    conversion = convert(subset, tmp_path / "out")
    for file in conversion.files.values():
        for line in file.read_text("utf-8").splitlines():
            for name in parse_sample(line, "here").images:
                assert (conversion.image_dir / name).is_file()


@pytest.mark.parametrize("above", ["", "UCF101_subset"])
def test_folder_and_archive_give_the_same(subset: Path, tmp_path: Path, above: str) -> None:
    convert(subset.parent if above else subset, tmp_path / "from-folder")
    archive = pack(tmp_path / "subset.tar.gz", subset, prefix=above or ".")
    convert(archive, tmp_path / "from-archive", tmp_dir=tmp_path / "unpacking")
    assert tree(tmp_path / "from-folder") == tree(tmp_path / "from-archive")
    assert list((tmp_path / "unpacking").iterdir()) == []


def test_several_processes_give_the_same(subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["phi3v"])  # or the processes would import the model's room too
    (subset / "train" / "Archery" / "v_Archery_g02_c01.avi").write_text("no clip")
    one = convert(subset, tmp_path / "one")
    two = convert(subset, tmp_path / "two", num_workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert (one.skipped, one.problems) == (two.skipped, two.problems)


def test_whole_clips_are_not_decoded_again(subset: Path, tmp_path: Path, decoded: list[str]) -> None:
    convert(subset, tmp_path / "out")
    assert len(decoded) == 5
    before = tree(tmp_path / "out")
    decoded.clear()
    convert(subset, tmp_path / "out")
    assert decoded == []
    assert tree(tmp_path / "out") == before


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [lose, cut, empty])
@pytest.mark.parametrize("index", [0, 5])
def test_a_clip_with_a_broken_frame_is_decoded_again(
    subset: Path, tmp_path: Path, decoded: list[str], damage: Callable[[Path], None], index: int
) -> None:
    convert(subset, tmp_path / "out")
    before = tree(tmp_path / "out")
    decoded.clear()
    damage(tmp_path / "out" / "images" / "train" / "Archery" / f"v_Archery_g01_c02.{index}.jpg")
    convert(subset, tmp_path / "out")
    assert decoded == ["v_Archery_g01_c02"]
    assert tree(tmp_path / "out") == before


def test_a_clip_newer_than_its_frames_is_decoded_again(subset: Path, tmp_path: Path, decoded: list[str]) -> None:
    convert(subset, tmp_path / "out")
    decoded.clear()
    clip = write_clip(subset / "val" / "BabyCrawling" / "v_BabyCrawling_g21_c04.avi", 8)
    in_a_minute = time.time() + 60
    os.utime(clip, (in_a_minute, in_a_minute))
    convert(subset, tmp_path / "out")
    assert decoded == ["v_BabyCrawling_g21_c04"]
    last = tmp_path / "out" / "images" / "val" / "BabyCrawling" / "v_BabyCrawling_g21_c04.7.jpg"
    assert frame_number(Image.open(last)) == 7


@pytest.mark.parametrize("first", [3, 12])
def test_another_number_of_frames_replaces_the_first(subset: Path, tmp_path: Path, first: int) -> None:
    convert(subset, tmp_path / "anew")
    convert(subset, tmp_path / "out", num_frames=first)
    convert(subset, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


KILLED = """
import os, signal, sys
sys.argv[0] = "phi3v"
from pathlib import Path
from phi3v.data.convert.ucf101 import convert_ucf101
replace, num_left = Path.replace, int(sys.argv[3])
def replace_or_die(path, target):
    global num_left
    num_left -= 1
    if num_left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)
Path.replace = replace_or_die
convert_ucf101(sys.argv[1], Path(sys.argv[2]), num_workers=1, progress=False, num_frames=int(sys.argv[4]))
"""


@pytest.mark.parametrize(("num_written", "num_frames"), [(0, 8), (7, 8), (13, 8), (41, 8), (5, 4), (18, 4)])
def test_killed_and_started_again_equals_uninterrupted(
    subset: Path, tmp_path: Path, num_written: int, num_frames: int
) -> None:
    convert(subset, tmp_path / "uninterrupted", num_frames=num_frames)
    out = tmp_path / "out"
    if num_frames != 8:
        convert(subset, out, num_frames=8)  # frames of another choice stand where the killed one writes
    arguments = [str(subset), str(out), str(num_written), str(num_frames)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -9
    convert(subset, out, num_frames=num_frames)
    assert tree(out) == tree(tmp_path / "uninterrupted")


KILLED_WITH_WORKERS = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path
sys.argv[0] = "phi3v"
from phi3v.data.convert import clips
from phi3v.data.convert.ucf101 import convert_ucf101
class Bar(clips.tqdm):
    def update(self, n=1):
        print(*(child.pid for child in active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
clips.tqdm = Bar
convert_ucf101(sys.argv[1], Path(sys.argv[2]), num_workers=2, progress=False)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_a_killed_parent(subset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED_WITH_WORKERS, str(subset), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    workers = killed.stdout.readline().split()
    assert killed.wait(60) == -9 and len(workers) == 2
    killed.stdout.close()

    def is_running(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "the processes outlive their parent"
        time.sleep(0.05)
    convert(subset, out)
    convert(subset, tmp_path / "uninterrupted")
    assert tree(out) == tree(tmp_path / "uninterrupted")


def test_a_process_that_dies_is_explained(subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["phi3v"])
    monkeypatch.setattr(engine, "_write_frames_of", _die)
    with pytest.raises(DataError, match=r"a process that decodes died.*v_Archery_g01_c01.avi.*fewer num_workers"):
        convert(subset, tmp_path / "out", num_workers=2)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def _die(*_: object) -> None:
    os._exit(3)


def test_unreadable_clips_are_listed_and_keep_their_numbers(subset: Path, tmp_path: Path) -> None:
    bad = subset / "train" / "Archery" / "v_Archery_g01_c01.avi"
    bad.write_text("no clip")
    conversion = convert(subset, tmp_path / "out")
    assert conversion.skipped == {"not a video": 1}
    assert f"{bad}: is not a video that can be read" in str(conversion)
    path, _, reason = (tmp_path / "out" / "unreadable.txt").read_text("utf-8").strip().partition("\t")
    assert path == str(bad) and reason.startswith("is not a video that can be read")
    assert [line["id"] for line in lines(tmp_path / "out" / "ucf101_train.jsonl")] == [
        *("train-0000000001", "train-0000000002")
    ]
    assert not list((tmp_path / "out" / "images" / "train" / "Archery").glob("v_Archery_g01_c01.*"))
    write_clip(bad, 9)
    assert convert(subset, tmp_path / "out").skipped == {}
    assert not (tmp_path / "out" / "unreadable.txt").exists()


def test_many_unreadable_clips_are_all_in_the_file(subset: Path, tmp_path: Path) -> None:
    for number in range(15):
        (subset / "train" / "Archery" / f"bad{number:02}.avi").write_text("no clip")
    conversion = convert(subset, tmp_path / "out")
    assert conversion.skipped == {"not a video": 15}
    assert f"all 15 are in {tmp_path / 'out' / 'unreadable.txt'}" in str(conversion)
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 15


def test_an_unreadable_clip_of_an_archive_is_named_by_its_place_in_it(subset: Path, tmp_path: Path) -> None:
    (subset / "val" / "BabyCrawling" / "v_BabyCrawling_g21_c04.avi").write_text("no clip")
    archive = pack(tmp_path / "subset.tar.gz", subset)
    convert(archive, tmp_path / "out")
    assert f"{archive}/UCF101_subset/val/BabyCrawling/v_Baby" in (tmp_path / "out" / "unreadable.txt").read_text()


def test_unreadable_clips_can_end_the_conversion(subset: Path, tmp_path: Path) -> None:
    (subset / "train" / "Archery" / "v_Archery_g01_c01.avi").write_text("no clip")
    with pytest.raises(SampleError, match=r"v_Archery_g01_c01.avi: is not a video"):
        convert(subset, tmp_path / "out", on_bad_sample="error")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_no_readable_clip_is_an_error(subset: Path, tmp_path: Path) -> None:
    for name in TREE:
        (subset / name).write_text("no clip")
    with pytest.raises(DataError, match=r"no usable record was found.*\n.*is not a video"):
        convert(subset, tmp_path / "out")
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 5


def test_limit_takes_of_every_split_and_keeps_numbers_and_classes(subset: Path, tmp_path: Path) -> None:
    write_clip(subset / "train" / "BabyCrawling" / "v_BabyCrawling_g03_c01.avi", 10)
    conversion = convert(subset, tmp_path / "out", limit=2)
    assert conversion.samples == {"train": 2, "val": 1, "test": 1}
    train = lines(tmp_path / "out" / "ucf101_train.jsonl")
    assert [line["id"] for line in train] == ["train-0000000000", "train-0000000002"]
    assert [line["conversations"][0]["assistant"] for line in train] == ["Archery", "BabyCrawling"]
    convert(subset, tmp_path / "one", limit=1)
    assert lines(tmp_path / "one" / "ucf101_train.jsonl") == train[:1]


def test_hidden_files_are_no_clips(subset: Path, tmp_path: Path) -> None:
    (subset / "train" / "Archery" / "._v_Archery_g01_c01.avi").write_text("a Mac was here")
    (subset / "train" / "Archery" / "notes.txt").write_text("not a clip")
    assert convert(subset, tmp_path / "out").samples["train"] == 3


@pytest.mark.parametrize("name", ["../../outside.avi", "train/Archery/../../../outside.avi"])
def test_an_archive_that_leaves_its_folder_is_refused(subset: Path, tmp_path: Path, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = 10
    archive = pack(tmp_path / "bad.tar.gz", subset, member)
    with pytest.raises(DataError, match=r"bad.tar.gz: unsafe to unpack: .*outside"):
        convert(archive, tmp_path / "out", tmp_dir=tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("outside.avi"))
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_refused(subset: Path, tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("UCF101_subset/train/Archery/link.avi")
    member.type, member.linkname = kind, "v_Archery_g01_c01.avi"
    archive = pack(tmp_path / "bad.tar.gz", subset, member)
    with pytest.raises(DataError, match=r"bad.tar.gz: .*(link|device|special)"):
        convert(archive, tmp_path / "out", tmp_dir=tmp_path)


def test_an_absolute_name_in_an_archive_stays_inside(subset: Path, tmp_path: Path) -> None:
    member = tarfile.TarInfo(str(tmp_path / "outside.avi"))
    member.size = 10
    archive = pack(tmp_path / "bad.tar.gz", subset, member)
    convert(archive, tmp_path / "out", tmp_dir=tmp_path / "unpacking")
    assert not (tmp_path / "outside.avi").exists()


def test_a_full_disk_while_unpacking_is_said(subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    archive = pack(tmp_path / "subset.tar.gz", subset)
    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(CapacityError, match=r"no room to unpack .*--tmp_dir"):
        convert(archive, tmp_path / "out")


def test_a_full_disk_while_writing_frames_is_said(
    subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CapacityError, match=r"a frame cannot be written .*No space left.*goes on from here"):
        convert(subset, tmp_path / "out")


def test_a_damaged_archive_is_said(subset: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "subset.tar.gz", subset)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=r"is not a tar archive or is damaged .*Fetch it again"):
        convert(archive, tmp_path / "out")
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(DataError, match="is not a tar archive or is damaged"):
        convert(tmp_path / "text.tar.gz", tmp_path / "out")


def test_a_missing_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: no such file or folder. Give UCF101_subset.tar.gz"):
        convert(tmp_path / "gone", tmp_path / "out")


def test_another_layout_is_said(subset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no folder train, val or test.*video-folders.*--val_share"):
        convert(subset / "train", tmp_path / "out")
    write_clip(subset / "train" / "Archery" / "more" / "clip.avi", 3)
    with pytest.raises(DataError, match=r"train/Archery/more/clip.avi: stands in another place than train\|val\|test"):
        convert(subset, tmp_path / "out")


def test_a_tree_without_clips_is_said(tmp_path: Path) -> None:
    (tmp_path / "in" / "train" / "Archery").mkdir(parents=True)
    (tmp_path / "in" / "train" / "Archery" / "clip.ogv").touch()
    with pytest.raises(DataError, match=r"holds no video file \(.avi, .*\), and 1 other files, such as .*clip.ogv"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_single_class_is_said(tmp_path: Path) -> None:
    write_clip(tmp_path / "in" / "train" / "Archery" / "clip.avi", 3)
    with pytest.raises(DataError, match="its class, 'Archery', is the only one"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("option", ["num_frames", "num_workers", "limit"])
def test_a_number_below_one_is_said(subset: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is 0; give a whole number"):
        convert(subset, tmp_path / "out", **{option: 0})


def test_without_a_source_the_archive_comes_from_the_hub(
    subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "subset.tar.gz", subset)
    asked: list[tuple] = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert convert_ucf101(None, tmp_path / "out", progress=False).samples == {"train": 3, "val": 1, "test": 1}
    assert asked == [("sayakpaul/ucf101-subset", "UCF101_subset.tar.gz", "dataset")]


def test_a_hub_that_is_not_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file\non the Hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"sayakpaul/ucf101-subset \(LocalEntryNotFoundError: An error .*give its path"):
        convert_ucf101(None, tmp_path / "out")


def test_without_pyav_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(ConfigError, match=r"pip install 'phi3v\[video\]'"):
        convert_ucf101(None, tmp_path / "out")


def test_the_name_of_the_command_line_is_this_converter() -> None:
    assert converter("ucf101") is convert_ucf101


def test_the_published_script_takes_its_flags(
    subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(Path(__file__).parents[4] / "recipes" / "convert_ucf101.py")
    archive = str(pack(tmp_path / "subset.tar.gz", subset))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--out_dir", "out", "--tmp_dir", "unpacking", "--source", archive])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(script, run_name="__main__")
    assert "ucf101_train.jsonl: 3 samples" in capsys.readouterr().out
    convert(subset, tmp_path / "reference")
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_the_published_script_has_the_published_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        ucf101, "convert_ucf101", lambda source, output_dir, *, tmp_dir: asked.extend((source, output_dir, tmp_dir))
    )
    monkeypatch.setattr(sys, "argv", ["convert_ucf101.py"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(Path(__file__).parents[4] / "recipes" / "convert_ucf101.py"), run_name="__main__")
    assert asked == [None, Path("ucf101"), Path("/tmp/ucf101")]
