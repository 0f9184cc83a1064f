import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from phi3v.data.dataset import ConversationDataset
from phi3v.data.schema import SampleError
from phi3v.errors import DataError
from records import ids_of, record


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
