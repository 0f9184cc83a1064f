"""Drawn samples have the real layout, real ones their own lengths, and the same options give the same batches."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from phi3v.bench.model import bench_config
from phi3v.bench.options import ANSWER_TOKENS, BenchOptions
from phi3v.bench.workload import Workload, draw_samples, read_samples, work_of
from phi3v.data.encode import IGNORED_LABEL, SampleEncoder
from phi3v.data.packing import Budget
from phi3v.data.schema import parse_sample
from phi3v.errors import ConfigError
from phi3v.flops import Work
from phi3v.geometry import num_image_tokens
from phi3v.model.packed import PackedBatch
from phi3v.model.processing_phi3_v import Phi3VProcessor

PUBLISHED = bench_config(is_tiny=False)
TINY = bench_config(is_tiny=True)


def batches(budget: int = 200, **options: Any) -> list[PackedBatch]:
    chosen = BenchOptions(**{"tiny": True, "num_crops": 4, "questions_per_image": 2.0, **options})
    samples = draw_samples(chosen, TINY, 8)
    workload = Workload(samples, TINY, batch_size=8, budget=Budget(tokens=budget), shared_questions=8, seed=chosen.seed)
    return [workload.pack(planned) for planned in workload.plan(0)]


def test_the_published_sizes_are_measured() -> None:
    assert PUBLISHED.dims == type(PUBLISHED.dims).published()


def test_a_drawn_sample_is_a_page_a_question_and_an_answer() -> None:
    samples = draw_samples(BenchOptions(), PUBLISHED, 200)
    lengths = [len(sample.text.input_ids) for sample in samples]
    assert (min(lengths), max(lengths)) == (2530, 2554)
    assert sum(lengths) / len(lengths) == pytest.approx(2542, abs=2)
    for text, keys, _ in samples[:5]:
        is_image = text.input_ids == PUBLISHED.image_token_id
        assert text.grids == ((4, 4),) and len(keys) == 1
        assert int(is_image.sum()) == num_image_tokens((4, 4))
        assert is_image.nonzero()[[0, -1], 0].tolist() == [3, text.stem.tokens - 1]
        supervised = (text.labels != IGNORED_LABEL).nonzero()[:, 0]
        assert supervised.tolist() == list(range(len(text.labels) - ANSWER_TOKENS, len(text.labels)))
        assert torch.equal(text.labels[supervised], text.input_ids[supervised])
        # Ordinary words, but for <s> in front of the text and behind the image.
        assert text.input_ids[[0, text.stem.tokens]].tolist() == [1, 1]
        words = text.input_ids[~is_image][[1, 2, *range(4, 14)]]
        assert int(words.min()) >= 3 and int(words.max()) < 32000
    assert len({sample.image_keys for sample in samples}) == 200


def test_pages_have_three_or_four_questions() -> None:
    samples = draw_samples(BenchOptions(questions_per_image=3.87), PUBLISHED, 3870)
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.image_keys[0]] = counts.get(sample.image_keys[0], 0) + 1
    assert len(counts) == 1000 and set(counts.values()) == {3, 4}
    first, second = samples[0].text, samples[1].text
    assert torch.equal(first.input_ids[: first.stem.tokens], second.input_ids[: second.stem.tokens])
    assert first.stem == second.stem


def test_equal_options_give_equal_batches_and_another_seed_others() -> None:
    first, again, other = batches(), batches(), batches(seed=1)
    for left, right in zip(first, again, strict=True):
        assert left.layout == right.layout
        for name, value in vars(left).items():
            assert torch.equal(value, getattr(right, name)) if isinstance(value, torch.Tensor) else True, name
    assert [batch.layout for batch in first] != [batch.layout for batch in other]
    assert first[0].crops is not None and other[0].crops is not None
    assert not torch.equal(first[0].crops[0], other[0].crops[0])


def test_batches_share_pages_and_keep_within_the_budget() -> None:
    packed = batches()
    assert sum(batch.num_samples for batch in packed) == 8
    assert max(batch.layout.num_tokens for batch in packed) <= 200
    assert sum(len(batch.layout.stems) for batch in packed) == 4
    rows = num_image_tokens((2, 2), TINY.tokens_per_side)
    (work, batch) = (work_of(packed[0], TINY.tokens_per_side), packed[0])
    assert batch.crops is not None
    assert work == Work(
        stems=batch.layout.stems,
        wholes=batch.layout.wholes,
        branches=batch.layout.branches,
        crops=len(batch.crops),
        image_rows=rows * len(batch.grids),
        targets=ANSWER_TOKENS * batch.num_samples,
    )


def test_processes_that_share_a_window_show_what_one_would() -> None:
    samples = draw_samples(BenchOptions(tiny=True, num_crops=4), TINY, 6)
    settings: dict[str, Any] = {"batch_size": 6, "budget": Budget(), "shared_questions": 1, "seed": 0}

    def crops_of_images(**ranks: int) -> dict[str, torch.Tensor]:
        load = Workload(samples, TINY, **settings, **ranks)
        found: dict[str, torch.Tensor] = {}
        for batch in map(load.pack, load.plan(0)):
            assert batch.crops is not None
            parts = batch.crops.split([rows * columns + 1 for rows, columns in batch.grids])
            found |= dict(zip(batch.image_keys, parts, strict=True))
        return found

    alone = crops_of_images()
    shared = crops_of_images(rank=0, num_ranks=2) | crops_of_images(rank=1, num_ranks=2)
    assert shared.keys() == alone.keys() and len(alone) == 6
    for key, crops in alone.items():
        assert torch.equal(shared[key], crops), key


def test_cached_rows_stand_where_the_image_does() -> None:
    samples = draw_samples(BenchOptions(tiny=True, num_crops=4), TINY, 3)
    settings: dict[str, Any] = {"batch_size": 3, "budget": Budget(), "shared_questions": 8, "seed": 0}
    crops, features = (Workload(samples, TINY, **settings, feature_dtype=dtype) for dtype in (None, torch.bfloat16))
    (with_crops,), (cached,) = ([load.pack(planned) for planned in load.plan(0)] for load in (crops, features))
    assert cached.crops is None and cached.grids == () and cached.features is not None
    assert cached.features.dtype == torch.bfloat16
    assert torch.equal(cached.image_rows, with_crops.image_rows)
    assert cached.features.shape == (int(cached.image_rows.max()) + 1, TINY.hidden_size)
    assert work_of(cached, TINY.tokens_per_side).crops == work_of(cached, TINY.tokens_per_side).image_rows == 0


def test_real_samples_lend_their_lengths(tmp_path: Path, tiny_dir: Path, processor: Phi3VProcessor) -> None:
    dice = random.Random(0)
    (tmp_path / "images").mkdir()
    sizes = {"a.png": (40, 80), "b.png": (100, 30), "c.png": (50, 50)}
    for name, size in sizes.items():
        Image.frombytes("RGB", size[::-1], dice.randbytes(3 * size[0] * size[1])).save(tmp_path / "images" / name)
    turns = [
        {"images": ["a.png"], "user": "Why?", "assistant": "Because of it."},
        {"images": ["a.png", "b.png", "c.png"], "user": "Which of them?", "assistant": "None"},
        {"user": "No image at all?", "assistant": "No."},
    ]
    lines = [json.dumps({"id": str(number), "conversations": [turn]}) for number, turn in enumerate(turns)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    options = BenchOptions(tiny=True, num_crops=4, data=tmp_path / "data.jsonl", tokenizer=str(tiny_dir))
    samples = read_samples(options, TINY, 7)
    assert len(samples) == 3
    encoder = SampleEncoder(processor)
    for line, sample in zip(lines, samples, strict=True):
        parsed = parse_sample(line, "here")
        expected = encoder.encode_text(parsed, [sizes[name] for name in parsed.images])
        assert len(sample.text.input_ids) == len(expected.input_ids)
        assert sample.text.grids == expected.grids and sample.text.stem == expected.stem
        assert torch.equal(sample.text.labels != IGNORED_LABEL, expected.labels != IGNORED_LABEL)
        assert int(sample.text.input_ids.max()) < TINY.vocab_size
        at_image = expected.input_ids == processor.image_token_id
        assert torch.equal(sample.text.input_ids == TINY.image_token_id, at_image)
    assert samples[0].image_keys[0] == samples[1].image_keys[0]
    with pytest.raises(ConfigError, match="along a crop's edge"):
        read_samples(options, PUBLISHED, 1)
