"""The examination: every planted problem is found once, and every number is that of the plain way to get it."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from planted import as_jpeg, picture, sample, write_jsonl

from phi3v.data.check import check_dataset
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.images import read_image
from phi3v.doctor import Diagnosis, examine, reading
from phi3v.doctor.diagnosis import WIDTH, Finding, Split
from phi3v.errors import ConfigError, DataError
from phi3v.model.checkpoint import load_processor
from phi3v.model.processing_phi3_v import Phi3VProcessor


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """Reads each processor once: its tokenizer alone takes half a second."""
    cached = cache(load_processor)
    with (
        mock.patch.object(sys.modules[examine.__module__], "load_processor", cached),
        mock.patch.object(reading, "load_processor", cached),
    ):
        yield


@pytest.fixture(scope="module")
def check(tiny_dir: Path) -> Callable[..., Diagnosis]:
    """Examines files with the small model's processor, without bars."""

    def run(*data: Path, **options: object) -> Diagnosis:
        return examine(list(data), model=str(tiny_dir), progress=False, **options)  # pyright: ignore[reportArgumentType]

    return run


def found(findings: tuple[Finding, ...], title: str) -> Finding:
    (finding,) = [finding for finding in findings if title in finding.title]
    return finding


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a validation file with one problem of each kind, among samples without any."""
    tmp_path = tmp_path_factory.mktemp("planted")
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(12):
        picture(seed, 300, 400).save(images / f"good-{seed}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    (images / "turned.jpg").write_bytes(as_jpeg(picture(20), exif=exif))
    (images / "print.jpg").write_bytes(as_jpeg(picture(21).convert("CMYK")))
    (images / "cut.jpg").write_bytes(as_jpeg(picture(22, 300, 400))[:-900])
    whole = images / "cut.png"
    picture(23).save(whole)
    whole.write_bytes(whole.read_bytes()[:-900])
    (images / "copy.png").write_bytes((images / "good-0.png").read_bytes())
    (images / "again.jpg").write_bytes(as_jpeg(picture(1, 300, 400).resize((203, 152)), quality=60))
    for name in ("white-1", "white-2"):
        Image.new("RGB", (60 + len(name), 80), "white").save(images / f"{name}.png")
    Image.new("RGB", (61, 80), "white").save(images / "white-2.png")
    train = write_jsonl(
        tmp_path / "train.jsonl",
        *(sample(f"good-{seed}", [f"good-{seed}.png"]) for seed in range(8)),  # lines 1 to 8
        '{"id": "broken", "conversations": [',
        sample("missing", ["nowhere.png"]),
        sample("cut", ["cut.jpg"]),
        sample("cut too", ["cut.png", "good-0.png"]),
        sample("special", ["good-0.png"], user="Hello <s>"),
        sample("outside", ["../../secret.png"]),
        "",
        sample("turned", ["turned.jpg"]),  # line 16
        sample("print", ["print.jpg"]),
        sample("good-3", ["good-3.png"], user="Another question?"),  # an id that stands above
        sample("other", ["good-4.png"], assistant="Another thing."),  # another answer than line 5
        sample("same", ["good-5.png"]),  # line 20, the same sample as line 6
        sample("white", ["white-1.png"]),
    )
    val = write_jsonl(
        tmp_path / "val.jsonl",
        *(sample(f"val-{seed}", [f"good-{seed}.png"]) for seed in (8, 9, 10, 11)),
        sample("leaked", ["copy.png"], user="Is it?"),
        sample("leaked too", ["again.jpg"]),
        sample("leaked whole", ["good-2.png"]),
        sample("white", ["white-2.png"]),
    )
    return train, val


def test_every_planted_problem_is_found_once(planted: tuple[Path, Path], check: Callable[..., Diagnosis]) -> None:
    diagnosis = check(*planted)
    train, val = diagnosis.splits
    assert (train.num_samples, train.num_usable) == (20, 14)
    assert (val.num_samples, val.num_usable, val.bad) == (8, 8, ())
    assert {finding.title: finding.count for finding in train.bad} == {
        "broken JSON": 1,
        "missing image": 1,
        "corrupt image": 2,
        "special token in the text": 1,
        "image outside the image folder": 1,
    }
    assert f"{planted[0]}:9: broken JSON" in found(train.bad, "broken JSON").examples[0]
    assert (
        f"{planted[0]}:10: sample 'missing': image 'nowhere.png' does not exist"
        in (found(train.bad, "missing image").examples[0])
    )
    cut = found(train.bad, "corrupt image").examples
    assert [f"{planted[0]}:{line}: sample" in message for line, message in zip((11, 12), cut, strict=True)] == [
        True
    ] * 2

    turned, printed = found(train.notes, "EXIF"), found(train.notes, "CMYK")
    assert (turned.count, turned.examples) == (1, (f"{planted[0]}:16: turned.jpg",))
    assert (printed.count, printed.examples) == (1, (f"{planted[0]}:17: print.jpg",))
    assert found(train.notes, "corrupt image (files)").count == 2
    assert found(train.notes, "blank").count == found(val.notes, "blank").count == 1
    assert not [finding for finding in val.notes if "EXIF" in finding.title or "CMYK" in finding.title]

    copies = found(diagnosis.across, "images of val are the same in train")
    assert copies.examples == (
        f"{planted[1]}:5: copy.png = {planted[0]}:1: good-0.png",
        f"{planted[1]}:7: good-2.png = {planted[0]}:3: good-2.png",
    )
    near = found(diagnosis.across, "images of val are nearly the same in train")
    assert near.examples == (f"{planted[1]}:6: again.jpg ~ {planted[0]}:2: good-1.png",)
    assert "1 of its samples" in near.title
    assert found(diagnosis.across, "samples of val stand in train too").examples == (
        f"{planted[1]}:7: sample 'leaked whole' and {planted[0]}:3: sample 'good-2'",
    )
    assert len(diagnosis.across) == 3

    assert [(finding.title, finding.count) for finding in train.repeats] == [
        ("ids that an earlier sample has", 1),
        ("samples that repeat an earlier one", 1),
        ("samples that answer an earlier question otherwise", 1),
    ]
    assert train.repeats[0].examples == (f"{planted[0]}:18: sample 'good-3' and {planted[0]}:4: sample 'good-3'",)
    assert train.repeats[1].examples == (f"{planted[0]}:20: sample 'same' and {planted[0]}:6: sample 'good-5'",)
    assert train.repeats[2].examples == (f"{planted[0]}:19: sample 'other' and {planted[0]}:5: sample 'good-4'",)
    assert val.repeats == ()
    assert not diagnosis.is_usable
    assert "Not usable" in str(diagnosis)


def test_training_leaves_out_the_same_samples_for_the_same_reasons(
    planted: tuple[Path, Path], check: Callable[..., Diagnosis], processor: Phi3VProcessor
) -> None:
    summary = check_dataset(
        ConversationDataset(planted[0]), SampleEncoder(processor), on_bad_sample="skip", progress=False
    )
    split = check(planted[0]).splits[0]
    assert {finding.title: finding.count for finding in split.bad} == summary.skipped
    assert {message for finding in split.bad for message in finding.examples} == set(summary.problems)
    assert split.num_usable == summary.samples
    assert round(split.turns.mean * split.num_usable) == summary.turns
    assert split.lengths[4].tokens.most == summary.max_tokens
    assert round(split.lengths[4].tokens.mean * split.num_usable) == summary.tokens
    assert round(split.lengths[4].crops.mean * split.num_usable) == summary.crops
    assert round(split.supervised.mean * split.num_usable) == summary.supervised_tokens


def test_headers_alone_are_enough_for_all_but_copies_and_damage_inside(
    planted: tuple[Path, Path], check: Callable[..., Diagnosis]
) -> None:
    quick, thorough = check(*planted, hashes=False), check(*planted)
    for one, other in zip(quick.splits, thorough.splits, strict=True):
        assert one.bad == other.bad
        assert one.lengths == other.lengths
        assert [note for note in other.notes if note.title != "blank"] == list(one.notes)
    (shared, sample_twice) = quick.across  # the file that both name
    assert shared.count == sample_twice.count == 1
    assert "not compared by content" in str(quick)
    plain = write_jsonl(planted[0].with_name("plain.jsonl"), sample("1", []))
    assert "headers" in check(plain, hashes=False).verdict


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 40 samples of text, several turns, several images of all shapes, and numbers of crops of their own."""
    tmp_path = tmp_path_factory.mktemp("mixed")
    records = []
    for k in range(40):
        names = [f"{k}-{j}.png" for j in range(k % 4)]
        for j, name in enumerate(names):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("L", (20 + 91 * (k + j) % 700, 20 + 37 * k % 400)).save(tmp_path / "images" / name)
        record = sample(f"s{k}", names[:2], user="word " * (1 + 7 * k % 31), assistant="yes " * (1 + k % 5))
        if len(names) > 2:
            record["conversations"].append({"images": names[2:], "user": "And <|image_3|> here?", "assistant": "No"})
        if k % 6 == 5:
            record["num_crops"] = 2
        if k % 7 == 6:
            record["system"] = "Be brief."
        records.append(record)
    return write_jsonl(tmp_path / "mixed.jsonl", *records)


@pytest.fixture(scope="module")
def mixed_split(mixed: Path, check: Callable[..., Diagnosis]) -> Split:
    return check(mixed, num_crops=16, max_length=60, hashes=False).splits[0]


@pytest.mark.parametrize("num_crops", [1, 4, 9, 16])
def test_lengths_are_those_of_the_encoder_at_every_number_of_crops(
    mixed: Path, mixed_split: Split, processor: Phi3VProcessor, num_crops: int
) -> None:
    split = mixed_split
    dataset = ConversationDataset(mixed)
    at_crops = copy(processor)
    at_crops.image_processor = copy(processor.image_processor)
    at_crops.image_processor.num_crops = num_crops
    encoder = SampleEncoder(at_crops)
    measured = [
        encoder.measure(
            dataset[k], [read_image(mixed.parent / "images" / name).size[::-1] for name in dataset[k].images]
        )
        for k in range(40)
    ]
    tokens = sorted(one.tokens for one in measured)
    lengths = split.lengths[num_crops]
    assert (lengths.tokens.p50, lengths.tokens.p90, lengths.tokens.most) == (tokens[19], tokens[35], tokens[39])
    assert lengths.tokens.mean == pytest.approx(sum(tokens) / 40)
    assert lengths.crops.most == max(one.crops for one in measured)
    assert sum(crops * count for crops, count in lengths.image_crops.items()) == sum(one.crops for one in measured)
    assert lengths.num_over == sum(one.tokens > 60 for one in measured)
    assert lengths.supervised_share == pytest.approx(sum(one.supervised for one in measured) / sum(tokens))
    assert split.own_num_crops == {2: 6}
    assert split.num_text_only == 10


def test_an_image_too_elongated_for_the_crops_is_found_at_that_number(
    tmp_path: Path, check: Callable[..., Diagnosis]
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sample("thread", ["thread.png"]), sample("good", []))
    Image.new("RGB", (1, 300)).save(tmp_path / "images" / "thread.png")
    split = check(path, num_crops=1, hashes=False).splits[0]
    assert [(finding.title, finding.count) for finding in split.bad] == [("elongated image", 1)]
    assert "too elongated" in split.bad[0].examples[0]
    assert (split.lengths[1].num_elongated, split.lengths[16].num_elongated) == (1, 0)
    assert check(path, num_crops=16, hashes=False).is_usable


def test_answers_are_counted_over_turns(tmp_path: Path, check: Callable[..., Diagnosis]) -> None:
    turns = [{"user": "q", "assistant": answer} for answer in ("a", "b", "a", "c")]
    path = write_jsonl(tmp_path / "t.jsonl", {"id": "1", "conversations": turns}, sample("2", [], assistant="a"))
    answers = check(path).splits[0].answers
    assert answers.top == (("a", 3), ("b", 1), ("c", 1))
    assert (answers.num_turns, answers.num_different, answers.majority_share) == (5, 3, 0.6)
    assert answers.entropy_bits == pytest.approx(1.37095, abs=1e-5)


def test_questions_answered_otherwise_in_another_split_are_found(
    tmp_path: Path, check: Callable[..., Diagnosis]
) -> None:
    picture(0).save((tmp_path / "images").mkdir() or tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())
    train = write_jsonl(tmp_path / "train.jsonl", sample("1", ["a.png"], assistant="yes"))
    val = write_jsonl(tmp_path / "val.jsonl", sample("2", ["b.png"], assistant="no"))
    conflict = found(check(train, val).across, "other answers")
    assert conflict.examples == (f"{val}:1: sample '2' and {train}:1: sample '1'",)


def test_pages_that_look_alike_in_one_split_are_grouped_but_frames_of_one_sample_are_not(
    tmp_path: Path, check: Callable[..., Diagnosis]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for k, quality in enumerate((90, 60, 40)):
        (folder / f"{k}.jpg").write_bytes(as_jpeg(picture(0, 300, 400), quality))
        (folder / f"frame-{k}.jpg").write_bytes(as_jpeg(picture(1, 300, 400), quality))
    path = write_jsonl(
        tmp_path / "train.jsonl",
        *(sample(f"page {k}", [f"{k}.jpg"]) for k in range(3)),
        sample("film", [f"frame-{k}.jpg" for k in range(3)]),
    )
    (repeat,) = check(path).splits[0].repeats
    assert repeat.count == 1
    assert "3 images" in repeat.title
    assert repeat.examples == (" ~ ".join(f"{path}:{k + 1}: {k}.jpg" for k in range(3)),)


def many(folder: Path, count: int = 1100) -> list[Path]:
    """Writes samples enough for several tasks, with 30 images, copies and bad lines among them."""
    (folder / "images").mkdir(parents=True)
    for seed in range(30):
        picture(seed % 25, 40 + seed, 60).save(folder / "images" / f"{seed}.png")
    records: list = [
        sample(f"id-{k % (count - 9)}", [f"{k * 7 % 31}.png"], user="why " * (k % 9 + 1), assistant=str(k % 13))
        for k in range(count)
    ]
    for k in range(5, count, 97):
        records[k] = '{"id": 5}' if k % 2 else "not JSON"
    return [
        write_jsonl(folder / "train.jsonl", *records[: count - 200]),
        write_jsonl(folder / "val.jsonl", *records[count - 200 :]),
    ]


def test_the_number_of_processes_does_not_show(tmp_path: Path, check: Callable[..., Diagnosis]) -> None:
    paths = many(tmp_path / "data")
    one, two = (check(*paths, num_workers=number) for number in (1, 3))
    assert one == two
    assert found(one.splits[0].bad, "missing image").count > 10  # image 30 is not there
    assert str(one) == str(two)


def test_memory_does_not_hold_the_samples(tmp_path: Path, check: Callable[..., Diagnosis]) -> None:
    line_bytes = 20_000
    peaks = []
    for count in (50, 350):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for k in range(count):
                file.write(json.dumps(sample(str(k), [], source="x" * line_bytes)) + "\n")
        check(path, num_workers=1)  # what is made once
        tracemalloc.start()
        check(path, num_workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 300 * 500, "bytes for 300 more samples of 20 kB"


def test_an_interruption_ends_all_processes_without_a_word_from_them(tmp_path: Path) -> None:
    program = tmp_path / "phi3v" / "__main__.py"  # as the command line, which leaves torch for later
    program.parent.mkdir()
    program.write_text(
        "import time\n"
        "from phi3v.data.processes import Workers\n"
        "def work(bench, task):\n"
        "    time.sleep(task)\n"
        "    return task\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2, dict) as workers:\n"
        "        for task in workers.map(work, [0, 0, 60]):\n"
        "            print(task, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["0\n", "0\n"]  # one process sleeps, the other waits
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode != 0
    assert errors.count("Traceback") == 1
    assert errors.strip().endswith("KeyboardInterrupt")
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        os.killpg(process.pid, 0)


def test_the_table_fits_the_page_and_obeys_no_name(tmp_path: Path, check: Callable[..., Diagnosis]) -> None:
    name = "evil\x1b[31m\u202e" + "x" * 80
    paths = [
        write_jsonl(tmp_path / f"{name}{k}.jsonl", sample("\x1b]0;title\x07", [f"{name}.png"], assistant="\x1b[2J\n"))
        for k in range(2)
    ]
    paths.append(write_jsonl(tmp_path / "good.jsonl", sample("1", [], assistant="\x1b[2J")))
    table = str(check(*paths))
    assert all(char.isprintable() for line in table.split("\n") for char in line)
    assert max(map(len, table.split("\n"))) == WIDTH
    assert "\\x1b" in table


def test_every_refusal_is_told_to_its_end_and_the_first_five_of_a_kind(
    tmp_path: Path, check: Callable[..., Diagnosis]
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", *(sample(f"{k}", [f"{k}.png"]) for k in range(7)))
    diagnosis = check(path)
    told = " ".join(str(diagnosis).split())
    messages = found(diagnosis.splits[0].bad, "missing image").examples
    assert len(messages) == 5
    for message in messages:
        assert message.endswith("or set image_dir to the right folder.")
        assert "".join(message.split()) in "".join(told.split())
    assert all(len(line) <= WIDTH for line in str(diagnosis).splitlines())


def test_samples_that_training_finds_over_long_are_named(
    tmp_path: Path, check: Callable[..., Diagnosis], processor: Phi3VProcessor
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sample("short", []), sample("long", [], user="word " * 90), "{")
    dataset = ConversationDataset(path)
    diagnosis = check(path, max_length=60)
    (split,) = diagnosis.splits
    assert (split.num_samples, split.num_usable, split.num_overlong) == (3, 2, 1)
    (message,) = found(split.bad, "over-long").examples
    with pytest.raises(DataError) as caught:
        check_dataset(dataset, SampleEncoder(processor, max_length=60), on_bad_sample="skip", progress=False)
    assert message == str(caught.value)
    assert not diagnosis.is_usable
    assert "1 bad sample(s) and 1 over-long sample(s)" in diagnosis.verdict
    assert "on_overlong: drop or cut" in diagnosis.verdict
    path = write_jsonl(tmp_path / "train.jsonl", sample("long", [], user="word " * 5000))
    beyond = check(path)  # the short factors' reach: told, and no obstacle
    assert (beyond.is_usable, beyond.limit, beyond.splits[0].lengths[4].num_over) == (True, 4096, 1)
    assert not check(path, max_length=4096).is_usable


def test_files_of_one_name_are_told_apart(tmp_path: Path, check: Callable[..., Diagnosis]) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_jsonl(tmp_path / folder / "data.jsonl", sample("1", [], user=folder)))
    assert [split.name for split in check(*paths).splits] == [str(path) for path in paths]


def test_data_without_one_usable_sample_are_examined_all_the_same(
    tmp_path: Path, check: Callable[..., Diagnosis]
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", "{", sample("1", ["a.png"]))
    diagnosis = check(path, html=tmp_path / "page.html")
    split: Split = diagnosis.splits[0]
    assert (split.num_samples, split.num_usable) == (2, 0)
    assert "Not usable" in str(diagnosis)
    assert "No sample can be used" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_examined_is_refused(tmp_path: Path, check: Callable[..., Diagnosis]) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        check(tmp_path / "nowhere.jsonl")
    path = write_jsonl(tmp_path / "train.jsonl", sample("1", []))
    for name in ("num_crops", "max_length", "num_workers"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            check(path, **{name: 0})
    for html, message in ((tmp_path, "is a folder"), (path / "page.html", "cannot be made")):
        with pytest.raises(ConfigError, match=message):
            check(path, html=html)
