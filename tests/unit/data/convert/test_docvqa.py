import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from phi3v.data.convert.docvqa import convert_docvqa
from phi3v.data.convert.writer import NativeWriter
from phi3v.errors import ConfigError, DataError
from sources import (
    CAULDRON,
    IMAGE_TYPE,
    MINI_DOCVQA,
    PUBLISHED_DOCVQA,
    docvqa_rows,
    picture,
    write_cauldron,
    write_docvqa_release,
    write_mini_docvqa,
    write_published_docvqa,
    write_table,
)


def named(content: bytes, suffix: str = "png") -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sample(name: str, page: str, user: str, *answers: str) -> dict[str, Any]:
    turn = {"images": [page], "user": user, "assistant": answers[0], "answers": list(answers)}
    return {"id": name, "source": "docvqa", "conversations": [turn]}


# --- from the hub ----------------------------------------------------------------------------------------------------


def test_the_mini_set_is_what_is_read_unless_told_otherwise(hub, tmp_path, read_back):
    write_mini_docvqa(hub, num_train=4, num_test=1)
    conversion = convert_docvqa(None, tmp_path / "out", progress=False)
    read_back(conversion)
    assert {split: lines(path) for split, path in conversion.files.items()} == {
        "train": [
            sample("docvqa-train-0", named(picture(0)), "What is number 0?\nAnswer briefly.", "0", "number 0"),
            sample("docvqa-train-1", named(picture(0)), "What is number 1?\nAnswer briefly.", "1", "number 1"),
            sample("docvqa-train-2", named(picture(1)), "What is number 2?\nAnswer briefly.", "2", "number 2"),
            sample("docvqa-train-3", named(picture(1)), "What is number 3?\nAnswer briefly.", "3", "number 3"),
        ],
        "val": [sample("docvqa-val-0", named(picture(1000)), "What is number 0?\nAnswer briefly.", "0", "number 0")],
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()} == {
        named(picture(number)): picture(number) for number in (0, 1, 1000)
    }, "a page is one file, as it was stored, whatever the number of its questions"


def test_the_full_set_keeps_the_collections_own_instructions(hub, tmp_path, read_back):
    write_mini_docvqa(hub)
    write_cauldron(hub, "docvqa", docvqa_rows(2))
    conversion = convert_docvqa(None, tmp_path / "out", subset="full", progress=False)
    assert read_back(conversion)["val"][0].turns[0].user == "What is number 0?\nAnswer briefly."
    first = "What is the date on page {}?\nProvide a short and direct response."
    second = "Who signed page {}?\nGive a very brief answer."
    assert lines(conversion.files["train"]) == [
        sample("docvqa-train-0-0", named(picture(0)), first.format(0), "May 1."),
        sample("docvqa-train-0-1", named(picture(0)), second.format(0), "Ann."),
        sample("docvqa-train-1-0", named(picture(1)), first.format(1), "May 2."),
        sample("docvqa-train-1-1", named(picture(1)), second.format(1), "Ann."),
    ]


def test_the_published_validation_set_can_take_the_small_ones_place(hub, tmp_path, read_back):
    write_mini_docvqa(hub)
    write_published_docvqa(hub)
    conversion = convert_docvqa(None, tmp_path / "out", validation="full", suffix="In a word.", progress=False)
    assert read_back(conversion)["train"][0].turns[0].user == "What is number 0?\nIn a word."
    assert lines(conversion.files["val"])[1:] == [
        sample("docvqa-val-101", named(picture(100)), "Who wrote page 1?\nIn a word.", "Ann", "Ann B."),
        sample("docvqa-val-102", named(picture(100)), "Who wrote page 2?\nIn a word.", "Ann", "Ann B."),
    ]
    assert not conversion.skipped, "the test split is not looked at"


@pytest.mark.parametrize("source", [PUBLISHED_DOCVQA, f"{PUBLISHED_DOCVQA}/DocVQA"])
def test_questions_whose_answers_are_secret_are_counted(hub, tmp_path, read_back, source):
    write_published_docvqa(hub, num_validation=3, num_test=2)
    conversion = convert_docvqa(source, tmp_path / "out", suffix="", progress=False)
    assert [one.turns[0].user for one in read_back(conversion)["val"]] == [f"Who wrote page {row}?" for row in range(3)]
    assert (conversion.samples, conversion.skipped) == ({"val": 3}, {"no published answer": 2})
    assert f"{PUBLISHED_DOCVQA}" in conversion.problems[0]
    assert "test row 0: the answers of this question are not public" in conversion.problems[0]


def test_a_test_split_is_written_as_far_as_its_answers_are_public(hub, tmp_path, read_back):
    write_published_docvqa(hub, num_validation=1, num_test=3, num_public=2)
    conversion = convert_docvqa(PUBLISHED_DOCVQA, tmp_path / "out", progress=False)
    assert [one.id for one in read_back(conversion)["test"]] == ["docvqa-test-200", "docvqa-test-201"]
    assert conversion.skipped == {"no published answer": 1}


@pytest.mark.parametrize(
    ("source", "samples"),
    [
        (MINI_DOCVQA, {"train": 4, "val": 1}),
        (CAULDRON, {"train": 4}),
        (f"{CAULDRON}/docvqa", {"train": 4}),
    ],
)
def test_a_source_may_be_a_data_set_or_a_folder_of_it(hub, tmp_path, read_back, source, samples):
    write_mini_docvqa(hub, num_train=4, num_test=1)
    write_cauldron(hub, "docvqa", docvqa_rows(2))
    write_cauldron(hub, "nlvr2", docvqa_rows(1))
    for place in (source, str(hub / source)):
        conversion = convert_docvqa(place, tmp_path / place.replace("/", "-"), progress=False)
        read_back(conversion)
        assert conversion.samples == samples


def test_a_limit_counts_rows_of_each_split(hub, tmp_path):
    write_mini_docvqa(hub, num_train=8, num_test=3)
    assert convert_docvqa(None, tmp_path / "a", limit=2, progress=False).samples == {"train": 2, "val": 2}
    write_cauldron(hub, "docvqa", docvqa_rows(3))
    assert convert_docvqa(CAULDRON, tmp_path / "b", limit=2, progress=False).samples == {"train": 4}
    with pytest.raises(ConfigError, match="limit is 0"):
        convert_docvqa(None, tmp_path / "c", limit=0, progress=False)


def test_another_data_set_is_refused_with_the_columns_needed(hub, tmp_path):
    write_table(hub / "me/other/train-0.parquet", [{"photo": "a"}], {"photo": pa.string()})
    with pytest.raises(DataError) as caught:
        convert_docvqa("me/other", tmp_path / "out", progress=False)
    assert str(caught.value).startswith(
        "me/other train: its columns are photo. Needed are images, texts; or image, questionId, question, answers; or "
        "image, query, answers."
    )


def test_bad_rows_are_named_or_left_out(hub, tmp_path, read_back):
    write_mini_docvqa(hub, num_train=4, pages=[picture(0), b"no image", picture(2), picture(3)])
    with pytest.raises(DataError, match=f"{MINI_DOCVQA} train row 1: an image of 8 bytes cannot be read"):
        convert_docvqa(None, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*.jsonl"))
    conversion = convert_docvqa(None, tmp_path / "out", on_bad_sample="skip", progress=False)
    assert [one.id for one in read_back(conversion)["train"]] == ["docvqa-train-0", "docvqa-train-2", "docvqa-train-3"]
    assert conversion.skipped == {"not an image": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([picture(0)], []), "docvqa/train row 0: 'texts' is empty"),
        (
            ([picture(0)], [("Date?", " ")]),
            "docvqa/train row 0: sample 'docvqa-train-0-0', turn 1: 'assistant' is empty",
        ),
        (([picture(0)], [("Date?", None)]), "docvqa/train row 0 text 0: 'assistant' is None. It must be text"),
        (([picture(0)], [("<|end|>", "a")]), "docvqa/train row 0: .* the user's text holds the special token"),
        (([], [("Date?", "May")]), r"docvqa/train row 0: it has 0 image\(s\), not 1"),
        (([picture(0), picture(1)], [("Date?", "May")]), r"docvqa/train row 0: it has 2 image\(s\), not 1"),
    ],
)
def test_rows_unlike_the_collections_are_named(hub, tmp_path, row, message):
    write_cauldron(hub, "docvqa", [row, *docvqa_rows(2)])
    with pytest.raises(DataError, match=message):
        convert_docvqa(CAULDRON, tmp_path / "out", progress=False)


def test_an_untranslated_question_is_named(hub, tmp_path):
    schema = {"image": IMAGE_TYPE, "query": pa.struct({"en": pa.string()}), "answers": pa.list_(pa.string())}
    row = {"image": {"bytes": picture(0), "path": None}, "query": {"en": None}, "answers": ["a"]}
    write_table(hub / "me/mine/train-0.parquet", [row], schema)
    with pytest.raises(DataError, match=r"me/mine train row 0 'query': 'en' is None. It must be text"):
        convert_docvqa("me/mine", tmp_path / "out", progress=False)


# --- from the original release ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "train_pages", "val_pages"),
    [
        ("flat", "documents", "documents"),
        ("splits", "train/documents", "val/documents"),
        ("newer", "spdocvqa_images", "spdocvqa_images"),
    ],
)
def test_a_release_is_found_however_it_lies(tmp_path, read_back, layout, train_pages, val_pages):
    release = write_docvqa_release(tmp_path / "release", layout)
    conversion = convert_docvqa(str(release), tmp_path / "out", progress=False)
    read_back(conversion)
    page, other = f"{train_pages}/xnbl0037_1.png", f"{val_pages}/pybv0228_81.png"
    assert lines(conversion.files["train"]) == [
        sample("docvqa-train-337", page, "What is the date?\nAnswer briefly.", "1/8/93", "1-8-93"),
        sample("docvqa-train-338", page, "Who is it to?\nAnswer briefly.", "Paul"),
    ]
    assert lines(conversion.files["val"]) == [
        sample("docvqa-val-49153", other, "What is the total?\nAnswer briefly.", "0.28", "0.28")
    ]
    assert (tmp_path / "out" / "images").is_symlink()


def test_one_file_and_pages_elsewhere(tmp_path, read_back):
    release = write_docvqa_release(tmp_path / "release")
    (release / "documents").rename(tmp_path / "pages")
    file = str((release / "val_v1.0_withQT.json").rename(release / "val_v1.0.json"))
    with pytest.raises(
        DataError, match=r"val_v1.0.json: the folder of its pages is not there.*release/documents.*image_"
    ):
        convert_docvqa(file, tmp_path / "out", progress=False)
    conversion = convert_docvqa(file, tmp_path / "out", image_dir=tmp_path / "pages", progress=False)
    assert read_back(conversion)["val"][0].images == ("pybv0228_81.png",)
    assert list(conversion.samples) == ["val"]


def test_pages_are_copied_where_that_is_asked_for(tmp_path, read_back):
    release = write_docvqa_release(tmp_path / "release")
    conversion = convert_docvqa(str(release), tmp_path / "out", copy_images=True, progress=False)
    images = tmp_path / "out" / "images"
    assert not images.is_symlink()
    for page in ("documents/xnbl0037_1.png", "documents/pybv0228_81.png"):
        assert (images / page).read_bytes() == (release / page).read_bytes()
    (release / "documents").rename(tmp_path / "taken away")
    read_back(conversion)


def test_the_hubs_pages_are_not_written_into_a_release(hub, tmp_path):
    release = write_docvqa_release(tmp_path / "release")
    convert_docvqa(str(release), tmp_path / "out", progress=False)
    write_mini_docvqa(hub)
    with pytest.raises(DataError, match=r"out/images is a link, which an earlier conversion may have made"):
        convert_docvqa(None, tmp_path / "out", progress=False)


def rewrite(release: Path, **changes: Any) -> None:
    """Changes the first training question; a field set to None is taken away."""
    path = release / "train_v1.0_withQT.json"
    content = json.loads(path.read_text())
    question = {**content["data"][0], **changes}
    content["data"][0] = {key: value for key, value in question.items() if value is not None}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"answers": []}, r"train_v1.0_withQT.json: data\[0\]: 'answers' is empty", "empty answer"),
        ({"answers": [""]}, r"data\[0\]: 'answers' holds an empty answer", "empty answer"),
        ({"answers": None}, r"data\[0\]: there is no 'answers' among 'questionId', 'question', ", "missing key"),
        ({"answers": "May"}, r"data\[0\]: 'answers' is 'May'. It must be a list", "wrong type"),
        ({"question": 3}, r"data\[0\]: 'question' is 3. It must be text", "wrong type"),
        ({"questionId": None}, r"data\[0\]: there is no 'questionId'", "missing key"),
        ({"image": "documents/gone.png"}, r"data\[0\]: image 'documents/gone.png' does not exist", "missing image"),
        (
            {"image": "documents/../../secret.png"},
            r"data\[0\]: image path .* leads outside the image folder",
            "image outside the image folder",
        ),
    ],
)
def test_bad_questions_are_named_or_left_out(tmp_path, changes, message, reason):
    release = write_docvqa_release(tmp_path / "release")
    (tmp_path / "secret.png").write_bytes(picture(0))
    rewrite(release, **changes)
    with pytest.raises(DataError, match=message):
        convert_docvqa(str(release), tmp_path / "out", progress=False)
    conversion = convert_docvqa(str(release), tmp_path / "out", on_bad_sample="skip", progress=False)
    assert (conversion.samples, conversion.skipped) == ({"train": 1, "val": 1}, {reason: 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"data": [\n{"questionId": 1,,}]}', r"train_v1.0.json:2: broken JSON: Expecting property name"),
        (b'{"data": ["\xff"]}', r"train_v1.0.json: broken JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"questions": []}', "train_v1.0.json: it holds an object with the keys questions; the release's has a list"),
        (b"[1, 2]", "train_v1.0.json: it holds no object; the release's has a list"),
        (b'{"data": [7]}', r"train_v1.0.json: data\[0\]: there is no 'questionId' among no fields at all"),
        (b'{"data": []}', "nothing to write to .*out: no usable record was found"),
    ],
)
def test_a_file_that_is_not_the_releases_is_named(tmp_path, content, message):
    (tmp_path / "release" / "documents").mkdir(parents=True)
    (tmp_path / "release" / "train_v1.0.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert_docvqa(str(tmp_path / "release"), tmp_path / "out", progress=False)


def test_a_folder_without_the_releases_files_is_refused(tmp_path):
    (tmp_path / "documents").mkdir()
    with pytest.raises(DataError, match=r"the release's files are not there \(train_v1.0_withQT.json, train_v1.0.json"):
        convert_docvqa(str(tmp_path), tmp_path / "out", progress=False)


def test_an_interrupted_conversion_leaves_the_earlier_one_and_a_rerun_completes(hub, tmp_path, monkeypatch, read_back):
    write_mini_docvqa(hub, num_train=8)
    out = tmp_path / "out"
    convert_docvqa(None, out, limit=1, progress=False)
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    write_image = NativeWriter.write_image

    def interrupt(self: NativeWriter, name: str, content: bytes) -> str:
        if content == picture(2):
            raise KeyboardInterrupt
        return write_image(self, name, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(NativeWriter, "write_image", interrupt)
        convert_docvqa(None, out, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    conversion = convert_docvqa(None, out, progress=False)
    read_back(conversion)
    assert conversion.samples == {"train": 8, "val": 3}
