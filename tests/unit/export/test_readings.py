"""Both sides of a comparison read the same samples, one of them in a process of its own."""

import json
from pathlib import Path

import pytest
import torch

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import CheckpointError, DataError
from phi3v.export.readings import (
    choose_samples,
    encode_samples,
    greedy_answers,
    logits_along,
    logits_of,
    read_folder,
    read_in_fresh_process,
)
from phi3v.model.checkpoint import load_model, load_processor
from phi3v.model.processing_phi3_v import Phi3VProcessor
from training import alone, write_training_data


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven samples of every kind."""
    return write_training_data(tmp_path_factory.mktemp("eleven") / "data") / "train.jsonl"


def test_samples_are_spread_over_the_data(processor: Phi3VProcessor, eleven: Path) -> None:
    assert choose_samples(processor, [eleven], None, 4).positions == (0, 2, 5, 8)
    assert choose_samples(processor, [eleven], None, 99).positions == tuple(range(11))
    assert choose_samples(processor, [eleven, eleven], None, 2).positions == (0, 11)


def test_a_bad_sample_makes_room_and_is_counted(processor: Phi3VProcessor, data: Path) -> None:
    bad = {"id": "bad", "conversations": [{"images": ["gone.png"], "user": "?", "assistant": "!"}]}
    good = data.read_text().splitlines()
    data.write_text("\n".join([json.dumps(bad), *good]))
    samples = choose_samples(processor, [data], None, 2)
    assert samples.positions == (1, 2)
    (reason,) = samples.skipped
    assert "data.jsonl:1" in reason and "gone.png" in reason
    data.write_text(json.dumps(bad))
    with pytest.raises(DataError, match=r"gone\.png"):
        choose_samples(processor, [data], None, 2)


@torch.no_grad()
def test_logits_are_those_that_predict_the_answers(processor: Phi3VProcessor, eleven: Path, tiny_dir: Path) -> None:
    """The reference is the model's own forward with all logits, sample by sample."""
    model = load_model(tiny_dir)
    dataset, encoder = ConversationDataset(eleven), SampleEncoder(processor)
    expected = []
    for position in range(4):
        batch = alone(encoder.encode(dataset[position], dataset.load_images(dataset[position])))
        labels = batch.pop("labels")
        expected.append(model(**batch).logits[0, :-1][labels[0, 1:] != -100])
    chosen = choose_samples(processor, [eleven], None, 11)
    found = logits_of(model, encode_samples(processor, chosen)[:4])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_greedy_tokens_are_the_likeliest_along_their_own_answer(
    processor: Phi3VProcessor, eleven: Path, tiny_dir: Path
) -> None:
    model = load_model(tiny_dir)
    encoded = encode_samples(processor, choose_samples(processor, [eleven], None, 11))
    answers = greedy_answers(model, processor, encoded, max_new_tokens=5)
    rows = logits_along(model, encoded, answers)
    assert [len(one) for one in rows] == [len(answer) + 1 for answer in answers]
    for answer, logits in zip(answers, rows, strict=True):
        assert logits[: len(answer)].argmax(-1).tolist() == answer
    assert len({tuple(answer) for answer in answers}) > 5  # every sample is shown its own images


def test_a_fresh_process_reads_the_same(tiny_dir: Path, eleven: Path, processor: Phi3VProcessor) -> None:
    samples = choose_samples(processor, [eleven], None, 3)
    here, there = (read(tiny_dir, samples, "cpu") for read in (read_folder, read_in_fresh_process))
    torch.testing.assert_close(there.logits, here.logits, atol=1e-5, rtol=1e-5)
    assert (there.greedy, there.digests) == (here.greedy, here.digests)
    assert len(here.digests) == 3


@pytest.mark.slow
def test_what_a_fresh_process_cannot_read_is_told(tmp_path: Path, eleven: Path, processor: Phi3VProcessor) -> None:
    samples = choose_samples(processor, [eleven], None, 1)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read in a fresh process:.*no such folder"):
        read_in_fresh_process(tmp_path / "nowhere", samples, "cpu")


def test_digests_tell_other_pixels_and_other_ids(tiny_dir: Path, data: Path, processor: Phi3VProcessor) -> None:
    samples = choose_samples(processor, [data], None, 2)

    def digests(one: Phi3VProcessor) -> list[str]:
        return [encoded.digest for encoded in encode_samples(one, samples)]

    plain, fewer, darker = digests(processor), load_processor(tiny_dir, num_crops=1), load_processor(tiny_dir)
    darker.image_processor.image_mean = [0.5, 0.5, 0.5]
    for other in (digests(fewer), digests(darker)):
        assert [one == two for one, two in zip(plain, other, strict=True)] == [False, True]  # the second has no image
    data.write_text(data.read_text().replace("Hello.", "Hello!"))
    assert [one == two for one, two in zip(plain, digests(processor), strict=True)] == [True, False]
