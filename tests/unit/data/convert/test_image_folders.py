import json
from pathlib import Path

import pytest
from PIL import Image

from phi3v.data.check import check_dataset
from phi3v.data.convert import image_folders
from phi3v.data.convert.image_folders import convert_image_folders
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import ConfigError, DataError


def natives(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def tree(tmp_path):
    """Makes a folder of these files, small images unless their names say otherwise."""

    def make(*paths):
        folder = tmp_path / "pets"
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if Path(path).suffix.lower() in (".png", ".jpeg", ".webp"):
                Image.new("RGB", (20, 30)).save(folder / path)
            else:
                (folder / path).write_text("x")
        return folder

    return make


@pytest.fixture
def convert(tmp_path, tree):
    def run(*paths, output="out", **options):
        return convert_image_folders(str(tree(*paths)), tmp_path / output, **{"progress": False, **options})

    return run


def native(path, answer, *labels, user="Classify the image."):
    turn = {"images": [path], "user": user, "assistant": answer}
    return {"id": path, "conversations": [{**turn, "labels": list(labels)} if labels else turn]}


PETS = ("tabby_cat/b.png", "tabby_cat/a.JPEG", "dog/z.webp")


def test_class_folders_become_these_records(convert, tmp_path):
    conversion = convert(*PETS)
    assert natives(tmp_path / "out" / "pets_train.jsonl") == [
        native("dog/z.webp", "dog", "dog", "tabby_cat"),
        native("tabby_cat/a.JPEG", "tabby_cat", "dog", "tabby_cat"),
        native("tabby_cat/b.png", "tabby_cat", "dog", "tabby_cat"),
    ]
    assert conversion.image_dir.resolve() == tmp_path / "pets"
    assert str(conversion).splitlines() == [
        f"{tmp_path}/out/pets_train.jsonl: 3 samples",
        f"images: {tmp_path}/out/images",
    ]


def test_split_folders_become_splits_with_the_same_labels(convert, tmp_path):
    conversion = convert(
        "Train/dog/1.png", "Train/cat/2.png", "valid/cat/3.png", "validation/dog/4.png", "test/fox/5.png", split="other"
    )
    labels = ("cat", "dog", "fox")
    assert {split: natives(path) for split, path in conversion.files.items()} == {
        "train": [native("Train/cat/2.png", "cat", *labels), native("Train/dog/1.png", "dog", *labels)],
        "test": [native("test/fox/5.png", "fox", *labels)],
        "val": [native("valid/cat/3.png", "cat", *labels), native("validation/dog/4.png", "dog", *labels)],
    }


def test_the_question_lists_the_classes_and_names_are_readable(convert, tmp_path):
    question = "Which {one}? Answer with one of: {classes}."
    convert(*PETS, question=question, underscores_to_spaces=True, labels=False, split="test")
    user = "Which {one}? Answer with one of: dog, tabby cat."
    assert natives(tmp_path / "out" / "pets_test.jsonl") == [
        native("dog/z.webp", "dog", user=user),
        native("tabby_cat/a.JPEG", "tabby cat", user=user),
        native("tabby_cat/b.png", "tabby cat", user=user),
    ]


def test_the_data_check_takes_it(convert, processor):
    conversion = convert(*PETS, copy_images=True)
    dataset = ConversationDataset(conversion.files["train"])
    summary = check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1)
    assert (summary.samples, summary.images) == (3, 3)
    assert not conversion.image_dir.is_symlink()


def test_a_share_is_held_out_the_same_one_every_time(convert):
    paths = [f"{animal}/{number}.png" for animal in ("cat", "dog") for number in range(20)]
    first = convert(*paths, val_share=0.3)
    held_out = {sample["id"] for sample in natives(first.files["val"])}
    assert 0 < len(held_out) < 40 and sum(first.samples.values()) == 40
    again = convert(*paths, "cat/new.png", val_share=0.3, output="again")
    assert {sample["id"] for sample in natives(again.files["val"])} - {"cat/new.png"} == held_out


def test_only_training_images_are_held_out_of_a_tree_with_splits(convert):
    paths = [f"{split}/{animal}/{number}.png" for split in ("train", "test") for animal in "ab" for number in range(9)]
    conversion = convert(*paths, val_share=0.5)
    assert conversion.samples["test"] == 18
    assert conversion.samples["train"] + conversion.samples["val"] == 18
    assert all(sample["id"].startswith("train/") for sample in natives(conversion.files["val"]))
    with pytest.raises(ConfigError, match="has a folder of validation images already"):
        convert("val/a/1.png", val_share=0.5)


def test_other_files_are_counted_and_listed_but_stop_nothing(convert, tmp_path):
    conversion = convert(*PETS, "README.md", "dog/notes", "dog/deep/er/list.txt", "dog/clip.mp4")
    assert conversion.samples == {"train": 3}
    assert conversion.skipped == {"no image file": 4}
    assert f"{tmp_path}/pets/dog/clip.mp4: the file is no image by its name. Images end in .apng, " in str(conversion)
    names = [f"{number}.txt" for number in range(30)]
    listed = str(convert(*names, output="more"))
    assert "left out: 34 x no image file" in listed and "and 24 more" in listed


def test_hidden_files_and_folders_are_neither_images_nor_classes(convert, tmp_path):
    hidden = (".ipynb_checkpoints/1-checkpoint.png", "dog/._z.png", "dog/.ipynb_checkpoints/z.png", "dog/.DS_Store")
    convert(*PETS)
    before = natives(tmp_path / "out" / "pets_train.jsonl")
    conversion = convert(*PETS, *hidden, output="again")
    assert (natives(conversion.files["train"]), conversion.skipped) == (before, {})


@pytest.mark.parametrize(("stray", "layout"), [("loose.png", "CLASS/IMAGE"), ("dog/puppies/1.png", "CLASS/IMAGE")])
def test_an_image_outside_a_class_folder_is_refused(convert, tmp_path, stray, layout):
    with pytest.raises(DataError) as caught:
        convert(*PETS, stray)
    assert str(caught.value) == (
        f"{tmp_path}/pets/{stray}: the image is not in a class folder. Move it so that its path is {layout}."
    )
    conversion = convert(*PETS, stray, on_bad_sample="skip")
    assert (conversion.samples, conversion.skipped) == ({"train": 3}, {"misplaced image": 1})


def test_in_a_tree_with_splits_too(convert):
    with pytest.raises(DataError, match=r"train/3\.png: the image is not in a class folder.*SPLIT/CLASS/IMAGE"):
        convert("train/a/1.png", "train/b/2.png", "train/3.png")


def test_a_class_may_be_called_like_a_split(convert, tmp_path):
    convert("train/1.png", "car/2.png")
    labels = ("car", "train")
    assert natives(tmp_path / "out" / "pets_train.jsonl") == [
        native("car/2.png", "car", *labels), native("train/1.png", "train", *labels)
    ]  # fmt: skip


def test_linked_classes_are_copied_and_circles_end(convert, tree, tmp_path):
    (tmp_path / "wolves").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "wolves" / "1.png")
    folder = tree(*PETS)
    (folder / "wolf").symlink_to(tmp_path / "wolves")
    with pytest.raises(DataError, match=r"wolf/1\.png' leads outside the image folder .* Set copy_images"):
        convert()
    assert convert(copy_images=True).samples == {"train": 4}
    (folder / "dog" / "back").symlink_to(folder)
    conversion = convert(copy_images=True, on_bad_sample="skip")
    assert conversion.samples == {"train": 4}
    assert conversion.skipped["misplaced image"] > 0


@pytest.mark.parametrize(
    ("paths", "options", "found"),
    [
        (("dog/1.png",), {}, "at least two class folders, and there is only dog"),
        (("1.png", "2.png"), {}, "at least two class folders, and there is none"),
        (("README.md",), {}, "there is none"),
        (("a_b/1.png", "a b/1.png"), {"underscores_to_spaces": True}, "two class folders are called 'a b'"),
        (("<|end|>/1.png", "b/1.png"), {}, r"<\|end\|>/1\.png.*the answer holds the special token"),
        (PETS, {"question": "Is it <|user|>?"}, r"dog/z\.webp: .*the user's text holds the special token"),
    ],
)
def test_trees_that_cannot_be_classified_are_refused(convert, paths, options, found):
    with pytest.raises(DataError, match=found):
        convert(*paths, **options)


def test_many_classes_go_without_labels(convert, monkeypatch):
    monkeypatch.setattr(image_folders, "MAX_LABELS", 1)
    with pytest.raises(
        DataError, match=r"2 classes are too many to repeat in every sample .* Convert it without labels"
    ):
        convert(*PETS)
    assert convert(*PETS, labels=False).samples == {"train": 3}


def test_folders_that_cannot_be_used_are_refused(tree, tmp_path):
    folder = tree(*PETS)
    with pytest.raises(DataError, match=r"is no folder\. Name the folder that holds the class folders"):
        convert_image_folders(str(folder / "dog" / "z.webp"), tmp_path / "out")
    for inside in (folder, folder / "out"):
        with pytest.raises(ConfigError, match=r"among the classes\. Choose a folder outside it"):
            convert_image_folders(str(folder), inside)
