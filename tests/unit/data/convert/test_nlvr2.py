import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.convert.nlvr2 import convert_nlvr2
from phi3v.errors import DataError
from sources import nlvr2_rows, picture, write_cauldron, write_nlvr2_release

QUESTION = "Is this true of the two images? Answer True or False."


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sample(name: str, images: list[str], user: str, answer: str, **keys: Any) -> dict[str, Any]:
    turn = {"images": images, "user": user, "assistant": answer, **keys}
    return {"id": f"nlvr2-{name}", "source": "nlvr2", "conversations": [turn]}


def conversation(name: str, images: list[str], *questions: tuple[str, str]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"user": user, "assistant": answer} for user, answer in questions]
    turns[0]["images"] = images
    return {"id": f"nlvr2-{name}", "source": "nlvr2", "conversations": turns}


def pair(row: int) -> list[str]:
    sides = (picture(2 * row), "png"), (picture(2 * row + 1, "JPEG"), "jpg")
    return [f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}" for content, suffix in sides]


# --- from the hub ----------------------------------------------------------------------------------------------------


def test_a_training_row_is_a_conversation_and_a_held_out_one_its_first_question(hub, tmp_path, read_back):
    write_cauldron(hub, "nlvr2", nlvr2_rows(4))
    conversion = convert_nlvr2(None, tmp_path / "out", num_val_rows=2, progress=False)
    read_back(conversion)
    dogs, cats = "Are there {} dogs?\nAnswer yes or no.", "Is it true that {} cats sit?\nAnswer yes or no."
    assert lines(conversion.files["val"]) == [
        sample("val-0", pair(0), dogs.format(0), "No."),
        sample("val-1", pair(1), dogs.format(1), "Yes."),
    ]
    assert lines(conversion.files["train"]) == [
        conversation("train-2", pair(2), (dogs.format(2), "No."), (cats.format(2), "No.")),
        conversation("train-3", pair(3), (dogs.format(3), "Yes."), (cats.format(3), "No.")),
    ]


def test_500_rows_are_held_out_unless_told_otherwise(hub, tmp_path):
    write_cauldron(hub, "nlvr2", nlvr2_rows(502))
    assert convert_nlvr2(None, tmp_path / "a", limit=1, progress=False).samples == {"val": 1, "train": 1}
    assert convert_nlvr2(None, tmp_path / "b", progress=False).samples == {"val": 500, "train": 2}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_row_with_other_than_two_images_is_named_or_left_out(hub, tmp_path, count):
    rows = nlvr2_rows(4)
    rows[2] = ([picture(number) for number in range(count)], rows[2][1])
    write_cauldron(hub, "nlvr2", rows)
    with pytest.raises(DataError, match=rf"nlvr2/train row 2: it has {count} image\(s\), not 2"):
        convert_nlvr2(None, tmp_path / "out", num_val_rows=1, progress=False)
    conversion = convert_nlvr2(None, tmp_path / "out", num_val_rows=1, on_bad_sample="skip", progress=False)
    assert (conversion.samples, conversion.skipped) == ({"val": 1, "train": 2}, {"number of images": 1})


# --- from the original release ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "train", "dev", "test1"),
    [("flat", "images/train", "dev", "test1"), ("repository", "train", "dev", "test1")],
)
def test_a_release_is_found_however_it_lies(tmp_path, read_back, layout, train, dev, test1):
    release = write_nlvr2_release(tmp_path / "release", layout)
    conversion = convert_nlvr2(str(release), tmp_path / "out", progress=False)
    read_back(conversion)
    labels = ["True", "False"]
    shown = [f"{train}/39/train-10171-0-img0.png", f"{train}/39/train-10171-0-img1.png"]
    assert lines(conversion.files["train"]) == [
        sample("train-10171-0-0", shown, f"There are two dogs.\n{QUESTION}", "False", labels=labels),
        sample("train-10171-0-1", shown, f"One dog sleeps.\n{QUESTION}", "True", labels=labels),
    ]
    shown = [f"{dev}/dev-850-0-img0.png", f"{dev}/dev-850-0-img1.png"]
    assert lines(conversion.files["val"]) == [
        sample("dev-850-0-0", shown, f"Both birds fly.\n{QUESTION}", "True", labels=labels)
    ]
    shown = [f"{test1}/test1-1-3-img0.png", f"{test1}/test1-1-3-img1.png"]
    assert lines(conversion.files["test"]) == [
        sample("test1-1-3-1", shown, f"A cup is red.\n{QUESTION}", "False", labels=labels)
    ]
    assert (tmp_path / "out" / "images").is_symlink()


def test_the_sentences_folder_is_enough(tmp_path, read_back):
    release = write_nlvr2_release(tmp_path / "release", "repository")
    for number, source in enumerate((release / "data", release / "data" / "dev.json")):
        read_back(convert_nlvr2(str(source), tmp_path / f"out{number}", progress=False))


def test_the_output_may_be_the_release_itself(tmp_path, read_back):
    release = write_nlvr2_release(tmp_path / "release", "repository")
    read_back(convert_nlvr2(str(release), release, progress=False))
    assert not (release / "images").is_symlink()


def test_images_elsewhere_and_copied(tmp_path, read_back):
    release = write_nlvr2_release(tmp_path / "release", "repository")
    (release / "images").rename(tmp_path / "photos")
    with pytest.raises(DataError, match=r"train.json: the folder of its images is not there \(looked for .*image_dir"):
        convert_nlvr2(str(release), tmp_path / "out", progress=False)
    read_back(
        convert_nlvr2(
            str(release), tmp_path / "out", image_dir=tmp_path / "photos", copy_images=True, limit=1, progress=False
        )
    )
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 6


def test_a_test_split_without_its_images_is_left_out_and_counted(tmp_path, read_back):
    release = write_nlvr2_release(tmp_path / "release")
    shutil.rmtree(release / "test1")
    conversion = convert_nlvr2(str(release), tmp_path / "out", progress=False)
    read_back(conversion)
    assert (conversion.samples, conversion.skipped) == ({"train": 2, "val": 1}, {"test split without its images": 1})
    assert "test1.json: the folder of its images is not there" in str(conversion)
    with pytest.raises(DataError, match=r"test1.json: the folder of its images is not there .* set image_dir"):
        convert_nlvr2(str(next(release.rglob("test1.json"))), tmp_path / "other", progress=False)


SENTENCE = {"identifier": "dev-850-0-1", "sentence": "They sit.", "label": "True"}


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        ('{"identifier"}', "dev.json:2: broken JSON", "broken JSON"),
        ({"label": "true"}, "dev.json:2: 'label' is 'true'. It must be True or False", "wrong label"),
        ({"label": True}, "dev.json:2: 'label' is True. It must be text", "wrong type"),
        ({"sentence": None}, "dev.json:2: 'sentence' is None. It must be text", "wrong type"),
        ({"identifier": "850"}, "dev.json:2: 'identifier' is '850'. It must be like dev-850-0-0", "wrong identifier"),
        ({"identifier": "dev-1-0-0"}, "dev.json:2: image 'dev/dev-1-0-img0.png' does not exist", "missing image"),
        ({"identifier": "../../x-0"}, "dev.json:2: .*leads outside the image folder", "image outside the image folder"),
        ({"directory": [1]}, r"dev.json:2: 'directory' is \[1\]. It must be a whole number", "wrong type"),
    ],
)
def test_bad_sentences_are_named_or_left_out(tmp_path, line, message, reason):
    release = write_nlvr2_release(tmp_path / "release")
    with (release / "dev.json").open("a") as file:
        file.write(line if isinstance(line, str) else json.dumps({**SENTENCE, **line}))
    with pytest.raises(DataError, match=message):
        convert_nlvr2(str(release), tmp_path / "out", progress=False)
    conversion = convert_nlvr2(str(release), tmp_path / "out", on_bad_sample="skip", progress=False)
    assert (conversion.samples["val"], conversion.skipped) == (1, {reason: 1})


@pytest.mark.parametrize("key", list(SENTENCE))
def test_a_missing_field_is_named(tmp_path, key):
    release = write_nlvr2_release(tmp_path / "release")
    (release / "dev.json").write_text(json.dumps({name: value for name, value in SENTENCE.items() if name != key}))
    with pytest.raises(DataError, match=f"dev.json:1: there is no '{key}' among"):
        convert_nlvr2(str(release), tmp_path / "out", progress=False)


def test_a_folder_without_the_releases_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"the release's files are not there \(train.json, dev.json, test1.json\)"):
        convert_nlvr2(str(tmp_path), tmp_path / "out", progress=False)
