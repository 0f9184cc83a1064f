import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.convert.hateful_memes import convert_hateful_memes
from phi3v.errors import ConfigError, DataError
from sources import CAULDRON, hateful_memes_rows, picture, write_cauldron, write_hateful_memes_release

CAULDRON_QUESTION = "Is this meme hateful?\nAnswer yes or no."
QUESTION = "Is this meme hateful? Answer Yes or No."


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sample(name: str, image: str, user: str, answer: str, labels: list[str]) -> dict[str, Any]:
    turn = {"images": [image], "user": user, "assistant": answer, "labels": labels}
    return {"id": name, "source": "hateful_memes", "conversations": [turn]}


def cauldron_sample(name: str, row: int, answer: str) -> dict[str, Any]:
    image = hashlib.sha256(picture(row)).hexdigest()[:32] + ".png"
    return sample(f"hateful_memes-{name}", image, CAULDRON_QUESTION, answer, ["Yes.", "No."])


# --- from the hub ----------------------------------------------------------------------------------------------------


def test_the_first_500_rows_are_held_out(hub, tmp_path, read_back):
    write_cauldron(hub, "hateful_memes", hateful_memes_rows(503))
    conversion = convert_hateful_memes(None, tmp_path / "out", progress=False)
    assert conversion.samples == {"val": 500, "train": 3}
    val = lines(conversion.files["val"])
    assert val[:2] == [cauldron_sample("val-0", 0, "No."), cauldron_sample("val-1", 1, "Yes.")]
    assert val[-1]["id"] == "hateful_memes-val-499"
    assert lines(conversion.files["train"]) == [
        cauldron_sample("train-500", 500, "No."),
        cauldron_sample("train-501", 501, "Yes."),
        cauldron_sample("train-502", 502, "No."),
    ]


def test_a_limit_and_another_share(hub, tmp_path, read_back):
    write_cauldron(hub, "hateful_memes", hateful_memes_rows(9))
    conversion = convert_hateful_memes(None, tmp_path / "out", num_val_rows=4, limit=1, progress=False)
    samples = read_back(conversion)
    assert [one.id for split in ("val", "train") for one in samples[split]] == [
        "hateful_memes-val-0",
        "hateful_memes-train-4",
    ]
    assert samples["val"][0].turns[0].labels == ("Yes.", "No."), "of all rows, not of those taken"


def test_a_rows_first_question_is_taken(hub, tmp_path):
    rows = [(images, [*texts, ("Why?", "Because.")]) for images, texts in hateful_memes_rows(3)]
    write_cauldron(hub, "hateful_memes", rows)
    conversion = convert_hateful_memes(str(hub / CAULDRON), tmp_path / "out", num_val_rows=1, progress=False)
    assert [one["conversations"][0]["user"] for one in lines(conversion.files["train"])] == [CAULDRON_QUESTION] * 2


def test_answers_that_are_not_two_are_named(hub, tmp_path):
    rows = [*hateful_memes_rows(5), ([picture(0)], [(CAULDRON_QUESTION, "Maybe.")])]
    write_cauldron(hub, "hateful_memes", rows)
    with pytest.raises(
        DataError, match=r"must be two, and they are 3: 'No\.' \(3 x\), 'Yes\.' \(2 x\), 'Maybe\.' \(1 x\)"
    ):
        convert_hateful_memes(None, tmp_path / "out", num_val_rows=1, progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_too_few_rows_to_train_on(hub, tmp_path):
    write_cauldron(hub, "hateful_memes", hateful_memes_rows(5))
    with pytest.raises(DataError, match=r"the source has 5 rows, and the first 500 are held out.*lower num_val_rows"):
        convert_hateful_memes(None, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="the first 5 are held out"):
        convert_hateful_memes(None, tmp_path / "out", num_val_rows=5, progress=False)
    with pytest.raises(ConfigError, match="num_val_rows is 0"):
        convert_hateful_memes(None, tmp_path / "out", num_val_rows=0, progress=False)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_bad_rows_are_named_or_left_out(hub, tmp_path):
    rows = hateful_memes_rows(6)
    rows[1] = ([b"no image"], rows[1][1])
    rows[4] = (rows[4][0], [])
    write_cauldron(hub, "hateful_memes", rows)
    with pytest.raises(DataError, match="hateful_memes/train row 1: an image of 8 bytes cannot be read"):
        convert_hateful_memes(None, tmp_path / "out", num_val_rows=2, progress=False)
    conversion = convert_hateful_memes(None, tmp_path / "out", num_val_rows=2, on_bad_sample="skip", progress=False)
    assert (conversion.samples, conversion.skipped) == (
        {"val": 1, "train": 3},
        {"missing key": 1, "not an image": 1},
    )


# --- from the original release ----------------------------------------------------------------------------------------


def test_a_release_is_asked_in_words_of_our_own(tmp_path, read_back):
    release = write_hateful_memes_release(tmp_path / "release")
    conversion = convert_hateful_memes(str(release), tmp_path / "out", progress=False)
    read_back(conversion)
    assert conversion.samples == {"train": 3, "val": 2, "val_unseen": 2, "test": 2, "test_unseen": 2}
    assert (tmp_path / "out" / "images").is_symlink()
    assert lines(conversion.files["train"]) == [
        sample("hateful_memes-train-00001", "img/00001.png", QUESTION, "Yes", ["Yes", "No"]),
        sample("hateful_memes-train-00002", "img/00002.png", QUESTION, "No", ["Yes", "No"]),
        sample("hateful_memes-train-00003", "img/00003.png", QUESTION, "Yes", ["Yes", "No"]),
    ]
    assert lines(conversion.files["val"])[0] == sample(
        "hateful_memes-val-4", "img/00004.png", QUESTION, "No", ["Yes", "No"]
    )
    assert [lines(conversion.files[split])[0]["id"] for split in ("val_unseen", "test", "test_unseen")] == [
        "hateful_memes-val_unseen-6",
        "hateful_memes-test-8",
        "hateful_memes-test_unseen-10",
    ]


def test_the_words_on_a_meme_are_read_out_where_that_is_asked_for(tmp_path, read_back):
    release = write_hateful_memes_release(tmp_path / "release")
    conversion = convert_hateful_memes(str(release), tmp_path / "out", use_text=True, limit=1, progress=False)
    assert read_back(conversion)["train"][0].turns[0].user == f'The words on it: "words 1"\n{QUESTION}'
    assert set(conversion.samples.values()) == {1}


def test_the_first_phases_files_and_a_test_split_without_labels(tmp_path, read_back):
    release = write_hateful_memes_release(tmp_path / "release")
    for name in ("dev_unseen", "test_unseen", "test_seen"):
        (release / f"{name}.jsonl").unlink()
    (release / "dev_seen.jsonl").rename(release / "dev.jsonl")
    memes = [{"id": number, "img": f"img/0000{number}.png", "text": "x"} for number in (8, 9)]
    (release / "test.jsonl").write_text("\n".join(map(json.dumps, memes)))
    conversion = convert_hateful_memes(str(release), tmp_path / "out", copy_images=True, progress=False)
    read_back(conversion)
    assert (conversion.samples, conversion.skipped) == ({"train": 3, "val": 2}, {"no published answer": 2})
    assert "test.jsonl:1: no label was published with it" in str(conversion)
    assert sorted(path.name for path in (tmp_path / "out/images/img").iterdir()) == [
        f"0000{number}.png" for number in range(1, 6)
    ]


def test_one_file_with_its_images_elsewhere(tmp_path, read_back):
    release = write_hateful_memes_release(tmp_path / "release")
    file = (release / "train.jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl:1: image 'img/00001.png' does not exist .*set image_dir"):
        convert_hateful_memes(str(file), tmp_path / "out", progress=False)
    conversion = convert_hateful_memes(str(file), tmp_path / "out", image_dir=release, progress=False)
    assert list(read_back(conversion)) == ["train"]


MEME = {"id": 1, "img": "img/00001.png", "label": 1, "text": "words"}


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        ('{"id": 1, "img"', r"train.jsonl:4: broken JSON: Expecting ':' delimiter", "broken JSON"),
        ("[1]", "train.jsonl:4: the record is no JSON object", "wrong type"),
        ({"label": None}, "train.jsonl:4: 'label' is None. It must be a whole number", "wrong type"),
        ({"label": "1"}, "train.jsonl:4: 'label' is '1'. It must be a whole number", "wrong type"),
        ({"label": 2}, "train.jsonl:4: 'label' is 2. It must be 0 or 1", "wrong label"),
        ({"img": "img/gone.png"}, "train.jsonl:4: image 'img/gone.png' does not exist", "missing image"),
        ({"img": 7}, "train.jsonl:4: 'img' is 7. It must be text", "wrong type"),
        ({"text": "<|end|>"}, "train.jsonl:4: .* holds the special token", "special token in the text"),
    ],
)
def test_bad_memes_are_named_or_left_out(tmp_path, line, message, reason):
    release = write_hateful_memes_release(tmp_path / "release")
    with (release / "train.jsonl").open("a") as file:
        file.write(line if isinstance(line, str) else json.dumps({**MEME, **line}))
    with pytest.raises(DataError, match=message):
        convert_hateful_memes(str(release), tmp_path / "out", use_text=True, progress=False)
    conversion = convert_hateful_memes(
        str(release), tmp_path / "out", use_text=True, on_bad_sample="skip", progress=False
    )
    assert (conversion.samples["train"], conversion.skipped) == (3, {reason: 1})


@pytest.mark.parametrize("key", ["id", "img", "label"])
def test_a_missing_field_is_named(tmp_path, key):
    release = write_hateful_memes_release(tmp_path / "release")
    (release / "train.jsonl").write_text(json.dumps({name: value for name, value in MEME.items() if name != key}))
    with pytest.raises(DataError, match=f"train.jsonl:1: .*'{key}'"):
        convert_hateful_memes(str(release), tmp_path / "out", progress=False)


def test_a_folder_without_the_releases_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"the release's files are not there \(train.jsonl, dev_seen.jsonl, dev.jsonl"):
        convert_hateful_memes(str(tmp_path), tmp_path / "out", progress=False)
