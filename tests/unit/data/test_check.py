import shutil
import time

import pytest
from PIL import Image

from phi3v.data import check as check_module
from phi3v.data.check import check_dataset
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import DataError
from records import ids_of, record


@pytest.fixture
def encoder(processor) -> SampleEncoder:
    return SampleEncoder(processor)


def check(dataset, encoder, **options):
    return check_dataset(dataset, encoder, **({"progress": False, "num_threads": 2} | options))


def test_a_good_dataset_is_summed_up(write_jsonl, image_folder, encoder):
    turns = [{"user": "q", "assistant": "yes"}, {"user": "q", "assistant": "no", "images": ["blue.jpg"]}]
    path = write_jsonl(record(images=["red.png"]), {"id": "t", "conversations": turns}, record())
    dataset = ConversationDataset(path)
    summary = check(dataset, encoder)
    encoded = [encoder.encode(sample, dataset.load_images(sample)) for sample in dataset]
    assert summary.samples == len(dataset) == 3
    assert (summary.turns, summary.images, summary.crops) == (4, 2, 4)
    assert summary.tokens == sum(len(one["input_ids"]) for one in encoded)
    assert summary.max_tokens == max(len(one["input_ids"]) for one in encoded)
    assert summary.supervised_tokens == sum(int((one["labels"] != -100).sum()) for one in encoded)
    assert (summary.skipped, summary.dropped, summary.cut, summary.problems) == ({}, 0, 0, [])
    assert summary.to_dict()["samples"] == 3


BAD = {
    "broken JSON": ('{"id": ', "one object a line"),
    "unknown key": (record(systm="x"), "Did you mean 'system'"),
    "empty answer": (record(assistant=""), "take the sample out"),
    "wrong image tags": (record(user="<|image_2|>", images=["red.png"]), "Number tags from 1"),
    "missing image": (record(images=["none.png"]), "Correct the path"),
    "corrupt image": (record(images=["cut.png"]), "Fetch or write the file again"),
    "not an image": (record(images=["page.png"]), "Replace it"),
    "decompression bomb": (record(images=["bomb.png"]), "Scale it down"),
    "image outside the image folder": (record(images=["../train.jsonl"]), "set image_dir"),
    "elongated image": (record(images=["line.png"]), "Crop or pad"),
    "special token in the text": (record(user="<s>"), "Take it out"),
}


@pytest.fixture
def bad_folder(image_folder, monkeypatch):
    monkeypatch.setattr("phi3v.data.images.MAX_IMAGE_PIXELS", 10_000)
    content = (image_folder / "red.png").read_bytes()
    (image_folder / "cut.png").write_bytes(content[: len(content) // 2])
    (image_folder / "page.png").write_text("<html>")
    Image.new("1", (101, 100)).save(image_folder / "bomb.png")
    Image.new("1", (5000, 1)).save(image_folder / "line.png")
    return image_folder


@pytest.mark.parametrize("decode_images", [True, False], ids=["decode", "header"])
@pytest.mark.parametrize("reason", BAD)
def test_bad_input_is_an_error_with_place_and_remedy(write_jsonl, bad_folder, encoder, reason, decode_images):
    bad, remedy = BAD[reason]
    dataset = ConversationDataset(write_jsonl(record(images=["red.png"]), "", bad, record()))
    with pytest.raises(DataError) as caught:
        check(dataset, encoder, decode_images=decode_images)
    message = str(caught.value)
    assert f"{dataset.read_line(0).where.rpartition(':')[0]}:3: " in message.splitlines()[0]
    assert remedy in message.splitlines()[0]
    assert "Set on_bad_sample to skip" in message


@pytest.mark.parametrize("decode_images", [True, False], ids=["decode", "header"])
def test_bad_input_is_skipped_and_counted_on_request(write_jsonl, bad_folder, encoder, decode_images):
    bad = [text for text, _ in BAD.values()]
    path = write_jsonl(record("first", images=["red.png"]), *bad, bad[0], record("last"))
    dataset = ConversationDataset(path)
    summary = check(dataset, encoder, on_bad_sample="skip", decode_images=decode_images)
    assert summary.skipped == dict.fromkeys(sorted(BAD), 1) | {"broken JSON": 2}
    assert summary.samples == len(dataset) == 2
    assert ids_of(dataset) == ["first", "last"]
    assert dataset.left_out == tuple(range(1, len(BAD) + 2))
    assert len(summary.problems) == 10
    assert summary.problems[0].startswith(f"{path}:2: ")


def test_damage_inside_a_file_needs_decoding(write_jsonl, image_folder, encoder):
    content = bytearray((image_folder / "red.png").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    (image_folder / "red.png").write_bytes(content)
    dataset = ConversationDataset(write_jsonl(record(images=["red.png"])))
    assert check(dataset, encoder, decode_images=False).samples == 1
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*damaged or cut short"):
        check(dataset, encoder, decode_images=True)


def test_further_bad_samples_are_listed_up_to_a_number(write_jsonl, encoder):
    path = write_jsonl(*[record(assistant="")] * 3, record())
    with pytest.raises(DataError) as caught:
        check(ConversationDataset(path), encoder)
    lines = str(caught.value).splitlines()
    assert lines[1] == "2 further sample(s) cannot be used:"
    assert [line.split(": ")[0] for line in lines[2:4]] == [f"  {path}:2", f"  {path}:3"]
    with pytest.raises(DataError, match=r"10 further sample.* and there may be more"):
        check(ConversationDataset(write_jsonl(*[record(assistant="")] * 50, name="worse.jsonl")), encoder)


def test_the_report_does_not_depend_on_threads(write_jsonl, bad_folder, encoder):
    lines = [record(str(k), images=["red.png"]) if k % 3 else record(images=[f"none{k}.png"]) for k in range(60)]
    path = write_jsonl(*lines)
    reports = []
    for num_threads in (1, 7):
        dataset = ConversationDataset(path)
        summary = check(dataset, encoder, on_bad_sample="skip", num_threads=num_threads)
        with pytest.raises(DataError) as caught:
            check(ConversationDataset(path), encoder, num_threads=num_threads)
        reports.append((summary, dataset.left_out, str(caught.value)))
    assert reports[0] == reports[1]


def test_an_image_of_many_questions_is_read_once_by_all_threads(write_jsonl, image_folder, encoder, monkeypatch):
    opened = []
    check_image = check_module.check_image

    def slow(path, decode):
        opened.append(path.name)
        time.sleep(0.05)
        return check_image(path, decode)

    monkeypatch.setattr(check_module, "check_image", slow)
    (image_folder / "cut.png").write_bytes((image_folder / "red.png").read_bytes()[:60])
    dataset = ConversationDataset(write_jsonl(*[record(images=["red.png"]), record(images=["cut.png"])] * 20))
    summary = check(dataset, encoder, num_threads=8, on_bad_sample="skip")
    assert (summary.images, summary.skipped) == (20, {"corrupt image": 20})
    assert sorted(opened) == ["cut.png", "red.png"]


def test_only_so_many_images_are_remembered(write_jsonl, image_folder, encoder, monkeypatch):
    opened = []
    check_image = check_module.check_image
    monkeypatch.setattr(
        check_module, "check_image", lambda path, decode: opened.append(path.name) or check_image(path, decode)
    )
    monkeypatch.setattr(check_module, "REMEMBERED_IMAGES", 1)
    names = ["red.png", "red.png", "blue.jpg", "red.png"]
    check(ConversationDataset(write_jsonl(*[record(images=[name]) for name in names])), encoder, num_threads=1)
    assert opened == ["red.png", "blue.jpg", "red.png"]


def test_over_long_samples_are_dropped_with_a_count(write_jsonl, image_folder, processor):
    path = write_jsonl(record("a"), record("b", images=["red.png"]), record("c"))
    dataset = ConversationDataset(path)
    summary = check(dataset, SampleEncoder(processor, max_length=100, on_overlong="drop"))
    assert (summary.samples, summary.dropped, summary.cut, summary.images) == (2, 1, 0, 0)
    assert ids_of(dataset) == ["a", "c"]
    assert dataset.left_out == (1,)


def test_over_long_samples_are_cut_with_a_count(write_jsonl, processor):
    dataset = ConversationDataset(write_jsonl(record("a"), record("b", user="word " * 500)))
    summary = check(dataset, SampleEncoder(processor, max_length=100, on_overlong="cut"))
    assert (summary.samples, summary.dropped, summary.cut) == (2, 0, 1)
    assert summary.max_tokens <= 100
    assert len(dataset) == 2


def test_skipping_bad_samples_does_not_excuse_over_long_ones(write_jsonl, processor):
    dataset = ConversationDataset(write_jsonl(record("a"), record("b", user="word " * 500)))
    encoder = SampleEncoder(processor, max_length=100, on_overlong="error")
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*exceed max_length=100.*set on_overlong to drop") as caught:
        check(dataset, encoder, on_bad_sample="skip")
    assert "on_bad_sample" not in str(caught.value)


def test_a_dataset_with_nothing_left_is_refused(write_jsonl, processor):
    dataset = ConversationDataset(write_jsonl(record(assistant=""), record("b", user="word " * 500)))
    encoder = SampleEncoder(processor, max_length=100, on_overlong="drop")
    with pytest.raises(DataError, match=r"no sample is left to use: 1 x empty answer, 1 x over-long\. Mend"):
        check(dataset, encoder, on_bad_sample="skip")


def test_a_second_check_looks_at_every_sample_again(write_jsonl, image_folder, encoder):
    dataset = ConversationDataset(write_jsonl(record("a", images=["late.png"]), record("b")))
    assert check(dataset, encoder, on_bad_sample="skip").samples == 1
    shutil.copy(image_folder / "red.png", image_folder / "late.png")
    assert check(dataset, encoder, on_bad_sample="skip").samples == 2
    assert ids_of(dataset) == ["a", "b"]
    assert dataset.left_out == ()
