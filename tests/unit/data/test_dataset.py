import multiprocessing
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from phi3v.data import check as check_module
from phi3v.data.check import check_dataset
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.schema import SampleError
from phi3v.errors import DataError


def record(name="s", *, images=(), user="What colour?", assistant="Red", **keys):
    return {"id": name, "conversations": [{"user": user, "assistant": assistant, "images": list(images)}], **keys}


def ids_of(dataset) -> list[str]:
    return [dataset[index].id for index in range(len(dataset))]


@pytest.fixture
def encoder(processor) -> SampleEncoder:
    return SampleEncoder(processor)


def check(dataset, encoder, **options):
    return check_dataset(dataset, encoder, **({"progress": False, "num_threads": 2} | options))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_samples_are_read_in_file_order_with_their_line_numbers(tmp_path, write_jsonl):
    first = write_jsonl("", record("a"), "  ", "", record("b"), name="one.jsonl")
    second = write_jsonl(record("c"), name="two.jsonl")
    second.write_bytes(second.read_bytes().rstrip())
    dataset = ConversationDataset([first, second])
    assert ids_of(dataset) == ["a", "b", "c"]
    assert [dataset[k].where for k in range(3)] == [f"{first}:2", f"{first}:5", f"{second}:1"]
    assert [sample.id for sample in dataset] == ["a", "b", "c"]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]


def test_windows_files_are_read(write_jsonl):
    path = write_jsonl(record("ä"), "", record("b"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    dataset = ConversationDataset(path)
    assert ids_of(dataset) == ["ä", "b"]
    assert dataset[1].where == f"{path}:3"


def test_memory_does_not_grow_with_the_lines(write_jsonl):
    short = ConversationDataset(write_jsonl(*[record()] * 1000, name="short.jsonl"))
    long = ConversationDataset(write_jsonl(*[record(user="word " * 400)] * 1000, name="long.jsonl"))
    assert len(pickle.dumps(long)) <= len(pickle.dumps(short)) + 10
    assert len(pickle.dumps(long)) < 1000 * 8 + 1000


def ids_in_process(pickled, connection):
    connection.send(ids_of(pickle.loads(pickled)))


def test_threads_and_processes_may_share_a_dataset(write_jsonl):
    dataset = ConversationDataset(write_jsonl(*[record(str(k)) for k in range(300)]))
    expected = [str(k) for k in range(300)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda k: dataset[k].id, range(300))) == expected
    dataset.leave_out([0])
    pickled = pickle.dumps(dataset)  # all that a spawned process gets
    assert ids_of(pickle.loads(pickled)) == expected[1:]
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=ids_in_process, args=(pickled, theirs))
        process.start()
        assert ours.recv() == ids_of(dataset)
        process.join()


def test_missing_files_and_empty_files_are_refused(tmp_path, write_jsonl):
    with pytest.raises(DataError, match=r"none\.jsonl: .*Name an existing"):
        ConversationDataset(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="Name an existing"):
        ConversationDataset(tmp_path)
    with pytest.raises(DataError, match=r"empty\.jsonl: no sample found\. Write"):
        ConversationDataset(write_jsonl("", " ", name="empty.jsonl"))
    with pytest.raises(DataError, match="Name at least one"):
        ConversationDataset([])
    with pytest.raises(DataError, match=r"nowhere: the image folder is not there\. Set image_dir"):
        ConversationDataset(write_jsonl(record()), tmp_path / "nowhere")


def test_a_file_that_changes_under_a_run_is_refused(write_jsonl):
    path = write_jsonl(record("a"), record("b"))
    dataset = ConversationDataset(path)
    write_jsonl(record("longer"), record("b"))
    with pytest.raises(DataError, match=r"train\.jsonl:2: the file was changed.*Start again"):
        dataset[1]
    path.unlink()
    with pytest.raises(DataError, match=r"train\.jsonl:1: cannot be read any more.*Put the file back"):
        dataset[0]


def test_text_that_is_not_utf8_is_refused_with_its_place(write_jsonl):
    path = write_jsonl(record("a"), record("b"))
    path.write_bytes(path.read_bytes() + '{"id": "é"}'.encode("latin-1"))
    with pytest.raises(SampleError, match=r"train\.jsonl:3: byte 9 of the line is not UTF-8\. Save"):
        ConversationDataset(path)[2]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_lie_beside_the_file_unless_a_folder_is_named(tmp_path, write_jsonl, image_folder):
    beside = ConversationDataset(write_jsonl(record(images=["red.png"])))
    assert beside.image_path(beside[0], "red.png") == image_folder / "red.png"
    (tmp_path / "plain").mkdir()
    shutil.copy(image_folder / "red.png", tmp_path / "plain")
    own_folder = ConversationDataset(write_jsonl(record(images=["red.png"]), name="plain/train.jsonl"))
    assert own_folder.image_path(own_folder[0], "red.png") == tmp_path / "plain/red.png"
    named = ConversationDataset(write_jsonl(record(images=["images/red.png"])), tmp_path)
    assert named.image_path(named[0], "images/red.png") == image_folder / "red.png"


def test_several_files_have_their_own_image_folders(tmp_path, write_jsonl):
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "images/a.png")
    dataset = ConversationDataset([write_jsonl(record(images=["a.png"]), name=f"{d}/d.jsonl") for d in ("one", "two")])
    colours = [dataset.load_images(dataset[k])[0].getpixel((0, 0)) for k in range(2)]
    assert colours == [(255, 0, 0), (0, 0, 255)]


def test_images_are_loaded_in_turn_order(write_jsonl, image_folder):
    turns = [
        {"images": ["red.png"], "user": "q", "assistant": "a"},
        {"user": "q", "assistant": "a"},
        {"images": ["blue.jpg", "red.png"], "user": "q", "assistant": "a"},
    ]
    dataset = ConversationDataset(write_jsonl({"id": "s", "conversations": turns}))
    sample = dataset[0]
    assert dataset.image_sizes(sample) == [(20, 30), (40, 10), (20, 30)]
    assert [image.size for image in dataset.load_images(sample)] == [(30, 20), (10, 40), (30, 20)]
    assert [len(dataset.load_images(sample, upto_turn=k)) for k in range(3)] == [1, 1, 3]


def test_a_path_may_not_leave_the_image_folder(tmp_path, write_jsonl, image_folder):
    outside = tmp_path / "outside.png"
    shutil.copy(image_folder / "red.png", outside)
    (image_folder / "link.png").symlink_to(outside)
    (image_folder / "inner.png").symlink_to(image_folder / "red.png")
    (image_folder / "ring").symlink_to(image_folder / "ring")
    dataset = ConversationDataset(write_jsonl(record()))
    sample = dataset[0]
    for name in ("../outside.png", "x/../../outside.png", str(outside), "link.png", "/etc/passwd", ".."):
        with pytest.raises(SampleError, match=r"train\.jsonl:1: sample 's'.*outside the image folder.*set image_dir"):
            dataset.image_path(sample, name)
    for name in ("red.png", "x/../red.png", str(image_folder / "red.png"), "inner.png"):
        assert dataset.image_path(sample, name) == image_folder / "red.png"
    for name in ("ring", "a\0b"):
        with pytest.raises(SampleError, match=r"train\.jsonl:1: .*leads nowhere.*Correct the path"):
            dataset.image_path(sample, name)


def test_a_linked_image_folder_is_the_folder_it_leads_to(tmp_path, write_jsonl, image_folder):
    (tmp_path / "linked").symlink_to(image_folder)
    dataset = ConversationDataset(write_jsonl(record(images=["red.png"])), tmp_path / "linked")
    assert len(dataset.load_images(dataset[0])) == 1


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_content_and_not_place(tmp_path, write_jsonl):
    one = write_jsonl(record("a"), record("b"), name="one.jsonl")
    two = write_jsonl(record("c"), name="two.jsonl")
    copy = tmp_path / "elsewhere.jsonl"
    shutil.copy(one, copy)
    original = ConversationDataset([one, two])
    assert ConversationDataset([copy, two]).fingerprint() == original.fingerprint()
    assert ConversationDataset([two, one]).fingerprint() != original.fingerprint()
    other = write_jsonl(record("a"), record("B"), name="other.jsonl")
    assert ConversationDataset([other, two]).fingerprint() != original.fingerprint()
    left_out = ConversationDataset([one, two])
    left_out.leave_out([1])
    assert left_out.fingerprint() != original.fingerprint()


# --- the check -------------------------------------------------------------------------------------------------------


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
