import json
from pathlib import Path

import pytest
from PIL import Image

from phi3v.data.check import check_dataset
from phi3v.data.convert.llava import convert_llava
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.schema import parse_sample, render
from phi3v.errors import ConfigError, DataError


def natives(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def sample(*turns, name="s", **keys):
    return {"id": name, "conversations": list(turns), **keys}


@pytest.fixture
def coco(tmp_path) -> Path:
    """An image folder of ten pictures in a subfolder, as LLaVA names them: ``coco/train2017/0.jpg``."""
    folder = tmp_path / "playground"
    (folder / "coco" / "train2017").mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (20 + number, 30), (25 * number, 0, 0)).save(folder / f"coco/train2017/{number}.jpg")
    return folder


@pytest.fixture
def convert(tmp_path, coco):
    """Writes records as LLaVA's file does, converts them and returns the conversion."""

    def run(*records, text=None, name="mix.json", output="out", **options):
        source = tmp_path / name
        source.write_text(json.dumps(records, indent=2) if text is None else text, "utf-8")
        return convert_llava(str(source), tmp_path / output, **{"image_dir": coco, "progress": False, **options})

    return run


RECORDS = (
    sample(
        human("<image>\nWhat is it?"), gpt(" A banner. "), human("Which colour?"), gpt("Red"),
        name=17, image="coco/train2017/0.jpg", model="",
    ),
    sample(
        {"from": "system", "value": "Be brief."},
        human("Is <image> older than <image>?"), gpt("Yes"),
        human("<image>\n<image>And these?"), gpt("No"),
        human("Then <image>"), gpt("Maybe"),
        name="many", image=[f"coco/train2017/{k}.jpg" for k in (5, 1, 2, 1, 9)],
    ),
    sample(human("Name a colour."), gpt("Blau — <b>bleu</b>"), name="text"),
    sample(human("What is it?\n<image>"), gpt("A tree"), name="behind", image="coco/train2017/3.jpg"),
    sample(human("What is it?"), gpt("A car"), name="unplaced", image="coco/train2017/4.jpg"),
    {"image": "coco/train2017/4.jpg", "conversations": [human("<image>"), gpt("A car in the street")]},
)  # fmt: skip

NATIVE = [
    {"id": "17", "conversations": [
        {"images": ["coco/train2017/0.jpg"], "user": "What is it?", "assistant": "A banner."},
        {"user": "Which colour?", "assistant": "Red"}]},
    {"id": "many", "system": "Be brief.", "conversations": [
        {"images": ["coco/train2017/5.jpg", "coco/train2017/1.jpg"],
         "user": "Is <|image_1|> older than <|image_2|>?", "assistant": "Yes"},
        {"images": ["coco/train2017/2.jpg", "coco/train2017/1.jpg"], "user": "And these?", "assistant": "No"},
        {"images": ["coco/train2017/9.jpg"], "user": "Then <|image_5|>", "assistant": "Maybe"}]},
    {"id": "text", "conversations": [{"user": "Name a colour.", "assistant": "Blau — <b>bleu</b>"}]},
    {"id": "behind", "conversations": [
        {"images": ["coco/train2017/3.jpg"], "user": "What is it?\n<|image_1|>", "assistant": "A tree"}]},
    {"id": "unplaced", "conversations": [
        {"images": ["coco/train2017/4.jpg"], "user": "What is it?", "assistant": "A car"}]},
    {"id": "mix-6", "conversations": [
        {"images": ["coco/train2017/4.jpg"], "user": "", "assistant": "A car in the street"}]},
]  # fmt: skip


# --- what is written -------------------------------------------------------------------------------------------------


def test_an_array_becomes_these_records(convert, tmp_path, coco):
    conversion = convert(*RECORDS)
    assert natives(tmp_path / "out" / "mix_train.jsonl") == NATIVE
    assert conversion.files == {"train": tmp_path / "out" / "mix_train.jsonl"}
    assert conversion.samples == {"train": 6}
    assert conversion.skipped == {}
    assert conversion.image_dir.resolve() == coco


def test_json_lines_become_the_same(convert, tmp_path):
    convert(text="\n".join(map(json.dumps, RECORDS)))
    assert natives(tmp_path / "out" / "mix_train.jsonl") == NATIVE


def test_the_prompt_shows_the_images_where_the_placeholders_stood(convert, tmp_path):
    convert(*RECORDS)
    first, many, *_ = (tmp_path / "out" / "mix_train.jsonl").read_text().splitlines()
    text = "".join(segment.text for segment in render(parse_sample(first, "x:1")))
    assert text.startswith("<|user|>\n" + "<image>\nWhat is it?".replace("<image>", "<|image_1|>") + "<|end|>\n")
    text = "".join(segment.text for segment in render(parse_sample(many, "x:2")) if not segment.is_answer)
    assert text == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nIs <|image_1|> older than <|image_2|>?<|end|>\n<|assistant|>\n"
        "<|user|>\n<|image_3|>\n<|image_4|>\nAnd these?<|end|>\n<|assistant|>\n"
        "<|user|>\nThen <|image_5|><|end|>\n<|assistant|>\n"
    )


def test_the_data_check_takes_it(convert, processor):
    conversion = convert(*RECORDS)
    dataset = ConversationDataset(conversion.files["train"])
    summary = check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1)
    assert (summary.samples, summary.turns, summary.images) == (6, 9, 9)


def test_native_tags_of_the_author_stay(convert, tmp_path):
    convert(
        sample(human("<|image_2|> or <|image_1|>?"), gpt("a"), image=["coco/train2017/0.jpg", "coco/train2017/1.jpg"])
    )
    assert natives(tmp_path / "out" / "mix_train.jsonl")[0]["conversations"] == [
        {
            "images": ["coco/train2017/0.jpg", "coco/train2017/1.jpg"],
            "user": "<|image_2|> or <|image_1|>?",
            "assistant": "a",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "split", "written"),
    [("train.json", "train", "llava_train.jsonl"), ("a_val.json", "val", "a_val.jsonl"), ("b", "test", "b_test.jsonl")],
)
def test_files_are_named_after_the_source_and_the_split(convert, tmp_path, name, split, written):
    assert convert(RECORDS[2], name=name, split=split).files == {split: tmp_path / "out" / written}


# --- splits ----------------------------------------------------------------------------------------------------------


def questions(number):
    return [
        sample(human(f"<image>\nQuestion {k}?"), gpt("a"), name=f"{number}.{k}", image=f"coco/train2017/{number}.jpg")
        for k in range(3)
    ]


def test_all_questions_of_an_image_go_to_one_split_whatever_the_order(convert, tmp_path):
    records = [record for number in range(10) for record in questions(number)]
    convert(*records, val_share=0.5)
    convert(*records[::-1], val_share=0.5, output="again", name="other.json")
    sides = {}
    for output, stem in (("out", "mix"), ("again", "other")):
        for split in ("train", "val"):
            for record in natives(tmp_path / output / f"{stem}_{split}.jsonl"):
                sides.setdefault(record["conversations"][0]["images"][0], set()).add(split)
    assert len(sides) == 10
    assert all(len(splits) == 1 for splits in sides.values())
    assert {"val"} in sides.values() and {"train"} in sides.values()


def test_the_same_images_in_another_order_stay_on_one_side(convert):
    pairs = [[f"coco/train2017/{a}.jpg", f"coco/train2017/{b}.jpg"] for a in range(10) for b in range(a)]
    records = [
        sample(human("<image> or <image>?"), gpt("a"), name=f"{k} {names}", image=names)
        for k, pair in enumerate(pairs)
        for names in (pair, pair[::-1])
    ]
    conversion = convert(*records, val_share=0.5)
    numbers = [{record["id"].split()[0] for record in natives(path)} for path in conversion.files.values()]
    assert all(numbers) and not numbers[0] & numbers[1]


def test_the_share_is_about_what_was_asked_for_and_grows_by_adding(convert):
    records = [sample(human("Hello?"), gpt("a"), name=f"text {number}") for number in range(1000)]
    tenth, half = (convert(*records, val_share=share, output=str(share)) for share in (0.1, 0.5))
    assert tenth.samples["val"] == pytest.approx(100, abs=30)  # three standard deviations
    assert half.samples["val"] == pytest.approx(500, abs=50)
    held_out = [{record["id"] for record in natives(run.files["val"])} for run in (tenth, half)]
    assert held_out[0] < held_out[1]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"val_share": 1.0}, "val_share is 1.0. It must be at least 0 and below 1"),
        ({"val_share": float("nan")}, "val_share is nan"),
        ({"split": "../train"}, "split is '../train'"),
        ({"split": "val", "val_share": 0.1}, "Give one of the two"),
    ],
)
def test_splits_that_make_no_sense_are_refused_before_anything_is_written(convert, tmp_path, options, found):
    with pytest.raises(ConfigError, match=found):
        convert(*RECORDS, **options)
    assert not (tmp_path / "out").exists()


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_linked_or_copied(convert, tmp_path, coco):
    linked = convert(*RECORDS, output="linked").image_dir
    assert linked.is_symlink() and linked.resolve() == coco
    copied = convert(*RECORDS, output="copied", copy_images=True).image_dir
    assert not copied.is_symlink()
    files = sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*.*"))
    assert files == [f"coco/train2017/{k}.jpg" for k in (0, 1, 2, 3, 4, 5, 9)]
    assert (copied / files[0]).read_bytes() == (coco / files[0]).read_bytes()


def test_paths_start_from_the_source_files_folder_unless_told(convert, tmp_path):
    record = sample(human("<image>\nWhat?"), gpt("a"), image="playground/coco/train2017/1.jpg")
    conversion = convert(record, image_dir=None)
    assert natives(conversion.files["train"])[0]["conversations"][0]["images"] == [record["image"]]
    assert (conversion.image_dir / record["image"]).is_file()


def test_absolute_paths_inside_the_image_folder_become_relative(convert, coco, tmp_path):
    (tmp_path / "alias").symlink_to(coco)
    names = [
        str(coco / "coco/train2017/1.jpg"),
        str(tmp_path / "alias" / "coco/train2017/2.jpg"),
        "coco/../coco/train2017/3.jpg",
    ]
    conversion = convert(sample(human("<image><image><image>?"), gpt("a"), image=names))
    shown = natives(conversion.files["train"])[0]["conversations"][0]["images"]
    assert shown == [f"coco/train2017/{k}.jpg" for k in (1, 2, 3)]


def test_linked_folders_inside_the_image_folder_need_copying(convert, coco, tmp_path, processor):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "elsewhere" / "a.png")
    (coco / "gqa").symlink_to(tmp_path / "elsewhere")
    record = sample(human("<image>\nWhat?"), gpt("a"), image="gqa/a.png")
    with pytest.raises(DataError, match=r"leads outside the image folder .* Set copy_images to copy what links lead"):
        convert(record)
    conversion = convert(record, copy_images=True)
    dataset = ConversationDataset(conversion.files["train"])
    assert check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1).samples == 1


def test_copies_are_not_written_through_a_link_of_an_earlier_conversion(convert, tmp_path):
    convert(*RECORDS)
    with pytest.raises(DataError, match=r"out/images is a link, .* not written through it. Take the link away"):
        convert(*RECORDS, copy_images=True)
    assert natives(tmp_path / "out" / "mix_train.jsonl") == NATIVE


def test_a_folder_that_is_not_there_is_named(convert, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: the image folder is not there\. Set image_dir"):
        convert(*RECORDS, image_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.json: does not exist\. Name the file"):
        convert_llava(str(tmp_path / "gone.json"), tmp_path / "out")
    with pytest.raises(DataError, match="is a folder"):
        convert_llava(str(tmp_path), tmp_path / "out")


# --- bad samples -----------------------------------------------------------------------------------------------------

IMAGE = "coco/train2017/0.jpg"
BAD = {
    "missing image": (
        sample(human("<image>\nWhat?"), gpt("a"), image="coco/train2017/x.jpg"),
        "sample 's': image 'coco/train2017/x.jpg' does not exist (looked for {coco}/coco/train2017/x.jpg). Correct the "
        "path, or set image_dir to the folder that image paths start from.",
    ),
    "backslashes": (
        sample(human("<image>\nWhat?"), gpt("a"), image="coco\\train2017\\0.jpg"),
        "Paths have / between folders, not \\.",
    ),
    "a folder": (sample(human("<image>\nWhat?"), gpt("a"), image="coco"), "image 'coco' is not a file"),
    "outside": (
        sample(human("<image>\nWhat?"), gpt("a"), image="../mix.json"),
        "image path '../mix.json' leads outside the image folder {coco}, to {coco.parent}/mix.json. Set image_dir to",
    ),
    "null byte": (sample(human("<image>\nWhat?"), gpt("a"), image="a\0b"), "image path 'a\\x00b' leads nowhere"),
    "half a character": (sample(human("<image>?"), gpt("a"), image="\ud800"), "leads nowhere"),
    "web": (
        sample(human("<image>\nWhat?"), gpt("a"), image="https://x.org/a.png"),
        "image 'https://x.org/a.png' is a URL, not a path. Nothing is fetched from a network: download it first",
    ),
    "data URL": (
        sample(human("<image>\nWhat?"), gpt("a"), image="data:image/png;base64," + "A" * 5000),
        ".. is a URL, not a path. `phi3v data convert openai` reads messages with such images",
    ),
    "too many placeholders": (
        sample(human("<image> and <image>?"), gpt("a"), image=IMAGE),
        "its texts hold 2 x <image> and it lists 1 image(s). Write one <image> for each image, or none at all.",
    ),
    "too few": (sample(human("<image>?"), gpt("a"), image=[IMAGE, IMAGE]), "1 x <image> and it lists 2 image(s)"),
    "placeholder without image": (sample(human("<image>?"), gpt("a")), "1 x <image> and it lists 0 image(s)"),
    "placeholder in the answer": (
        sample(human("<image>?"), gpt("see <image>"), image=[IMAGE, IMAGE]),
        "message 2: <image> stands in the assistant's text",
    ),
    "video": (
        sample(human("<video>?"), gpt("a"), video="a.mp4"),
        "it has 'video'. Convert clips with `phi3v data convert video-folders`",
    ),
    "special token": (
        sample(human("Say <|end|>"), gpt("a")),
        "turn 1: the user's text holds the special token '<|end|>'",
    ),
    "empty answer": (sample(human("Say"), gpt(" ")), "turn 1: 'assistant' is empty"),
    "no answer": (sample(human("a"), gpt("b"), human("c")), "its last question has no answer"),
    "answer first": (sample(gpt("b"), human("c"), gpt("d")), "message 1: an answer has no question before it"),
    "two answers": (sample(human("a"), gpt("b"), gpt("c")), "message 3: an answer has no question before it"),
    "late system": (
        sample(human("a"), gpt("b"), {"from": "system", "value": "x"}),
        "message 3: a system message follows others. It can only come first.",
    ),
    "unknown role": (
        sample({"from": "narrator", "value": "x"}),
        "message 1: 'from' is 'narrator'. Who speaks must be one of human, user, gpt, assistant, system.",
    ),
    "no text": (sample({"from": "human"}), "message 1: 'value' is missing or null. It must be a string."),
    "no conversation": ({"id": "s", "image": IMAGE}, "its conversation is missing or null. It must be a list"),
    "empty conversation": (sample(), "its conversation is []. It must be a list of at least one question"),
    "only a system message": (sample({"from": "system", "value": "x"}), "it has no question and answer"),
    "a message that is a text": (sample("hello"), "message 1: it is 'hello'. It must be an object"),
    "image of a wrong type": (
        sample(human("a"), gpt("b"), image=[1]),
        "'image' is [1]. It must be a path or a list of",
    ),
    "two keys of images": (
        sample(human("a"), gpt("b"), image=IMAGE, images=[IMAGE]),
        "it has both 'image' and 'images'",
    ),
    "id of a wrong type": (sample(human("a"), gpt("b"), name=[1]), "'id' is [1]. It must be text or a whole number."),
    "no object": ([1, 2], "the record is [1, 2]. It must be an object with messages."),
    "preference": (
        sample(human("a"), gpt("b"), rejected={"from": "gpt"}),
        "it has 'rejected'. Preferences are not trained",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_refused_at_its_line(convert, tmp_path, coco, kind):
    record, message = BAD[kind]
    with pytest.raises(DataError) as caught:
        convert(text=f"{json.dumps(RECORDS[2])}\n\n{json.dumps(record)}\n")
    assert str(caught.value).startswith(f"{tmp_path}/mix.json:3: ")
    assert message.replace("{coco}", str(coco)).replace("{coco.parent}", str(coco.parent)) in str(caught.value)
    assert len(str(caught.value)) < 800
    assert list((tmp_path / "out").glob("*.jsonl*")) == list((tmp_path / "out").glob(".*writing")) == []


def test_bad_samples_are_left_out_and_counted(convert, tmp_path):
    bad = [record for record, _ in BAD.values()]
    conversion = convert(
        text="\n".join([json.dumps(RECORDS[0]), '{"broken', *map(json.dumps, bad), json.dumps(RECORDS[2])]),
        on_bad_sample="skip",
    )
    assert natives(tmp_path / "out" / "mix_train.jsonl") == [NATIVE[0], NATIVE[2]]
    assert sum(conversion.skipped.values()) == len(bad) + 1
    assert conversion.skipped["broken JSON"] == 1
    assert conversion.skipped["image is a URL"] == 2
    assert f"{tmp_path}/mix.json:2: broken JSON" in str(conversion)


def test_nothing_usable_is_an_error(convert):
    with pytest.raises(DataError, match="no usable record was found"):
        convert(BAD["two answers"][0], on_bad_sample="skip")
    with pytest.raises(DataError, match="no usable record was found"):
        convert(text="[]")


def test_a_broken_array_ends_the_conversion_even_where_bad_samples_are_skipped(convert, tmp_path):
    with pytest.raises(DataError, match=r"mix\.json:1: broken JSON: Expecting property name"):
        convert(text=f"[{json.dumps(RECORDS[2])}, {{oops}}]", on_bad_sample="skip")
    assert not list((tmp_path / "out").glob("*.jsonl"))
