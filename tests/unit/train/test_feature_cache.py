"""Rows come back bit by bit or not at all, whoever wrote them and whatever happened to the files."""

import json
import multiprocessing
import os
import pickle
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.config import TrainConfig
from phi3v.data.check import check_dataset
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.packing import CostRecorder, SampleCosts
from phi3v.errors import CapacityError, ConfigError
from phi3v.geometry import num_image_tokens
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch, PackLayout
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.feature_cache import (
    ABOUT_FILE,
    FeatureCache,
    compute_missing,
    count_image_rows,
    fingerprint_of,
    most_image_rows,
    open_cache,
    require_frozen,
    require_room,
)
from training import write_shared_data

WIDTH = 24


def open_one(folder: Path, **changes: object) -> FeatureCache:
    return FeatureCache(folder, **{"vision_weights": "w", "width": WIDTH, "dtype": torch.bfloat16, **changes})  # pyright: ignore


def rows_of(number: int, num_rows: int = 13, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)


def key_of(number: int) -> str:
    return f"{number:064x}"


def is_same(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Bit by bit: a NaN equals itself, and -0.0 is not 0.0."""
    if found is None or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    writer = open_one(tmp_path, dtype=dtype)
    stored = {key_of(number): rows_of(number, num_rows=1 + 7 * number, dtype=dtype) for number in range(5)}
    stored[key_of(3)][0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    for key, rows in stored.items():
        assert writer.find(key, len(rows)) is None
        writer.store(key, rows)
    for cache in (writer, open_one(tmp_path, dtype=dtype), pickle.loads(pickle.dumps(writer))):
        assert all(is_same(cache.find(key, len(rows)), rows) for key, rows in stored.items())
        assert cache.counts.hits == 5
    assert (writer.counts.misses, writer.counts.stored) == (5, 5)
    assert writer.counts.stored_bytes == sum(rows.nbytes for rows in stored.values())
    assert writer.row_bytes == WIDTH * dtype.itemsize
    assert writer.stored_bytes() < writer.counts.stored_bytes + 5 * 64


def test_a_transposed_or_sliced_tensor_is_stored_by_its_values(tmp_path: Path) -> None:
    cache = open_one(tmp_path)
    wide = rows_of(0, num_rows=40)
    cache.store(key_of(0), wide[::2])
    cache.store(key_of(1), rows_of(1, num_rows=WIDTH).t())
    assert is_same(cache.find(key_of(0), 20), wide[::2].clone())
    assert is_same(cache.find(key_of(1), WIDTH), rows_of(1, num_rows=WIDTH).t().contiguous())


def test_writing_to_what_was_found_does_not_reach_the_file(tmp_path: Path) -> None:
    cache = open_one(tmp_path)
    cache.store(key_of(0), rows_of(0))
    found = cache.find(key_of(0), 13)
    assert found is not None
    found.zero_()
    assert is_same(cache.find(key_of(0), 13), rows_of(0))


def test_what_is_there_is_not_stored_again(tmp_path: Path) -> None:
    first, second = open_one(tmp_path), open_one(tmp_path)
    first.store(key_of(0), rows_of(0))
    second.store(key_of(0), rows_of(0))
    first.store(key_of(0), rows_of(0))
    assert (first.counts.stored, second.counts.stored) == (1, 0)
    assert first.stored_bytes() == 13 * first.row_bytes


def test_a_reader_finds_what_was_stored_after_it_was_opened(tmp_path: Path) -> None:
    reader, writer = open_one(tmp_path), open_one(tmp_path)
    for number in range(3):
        assert reader.find(key_of(number), 13) is None
        writer.store(key_of(number), rows_of(number))
        assert is_same(reader.find(key_of(number), 13), rows_of(number))


@pytest.mark.parametrize(
    "changes", [{"vision_weights": "other"}, {"dtype": torch.float16}, {"width": 12}, {"cutting": {"crop_px": 28}}]
)
def test_nothing_that_was_computed_otherwise_is_found(tmp_path: Path, changes: dict[str, object]) -> None:
    open_one(tmp_path).store(key_of(0), rows_of(0))
    other = open_one(tmp_path, **changes)
    assert other.find(key_of(0), 13) is None and len(other) == 0
    assert is_same(open_one(tmp_path).find(key_of(0), 13), rows_of(0))
    assert json.loads((other.folder / ABOUT_FILE).read_text())["hidden_size"] == changes.get("width", WIDTH)


def test_a_key_is_of_the_content_and_the_crops_and_not_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one image")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    key = FeatureCache.key_of(tmp_path / "a.png", 4)
    assert FeatureCache.key_of(tmp_path / "b.png", 4) == key
    assert FeatureCache.key_of(tmp_path / "a.png", 16) != key
    (tmp_path / "a.png").write_bytes(b"two images")
    assert FeatureCache.key_of(tmp_path / "a.png", 4) != key


def write_many(folder: Path, worker: int, start: "multiprocessing.Barrier") -> None:  # pyright: ignore
    cache = open_one(folder)
    start.wait()
    for number in range(40):
        own = number if number % 2 else 1000 * worker + number
        cache.store(key_of(own), rows_of(own, num_rows=1 + own % 9))
        found = cache.find(key_of(own), 1 + own % 9)
        assert is_same(found, rows_of(own, num_rows=1 + own % 9))


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    workers = [context.Process(target=write_many, args=(tmp_path, number, start)) for number in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    cache = open_one(tmp_path)
    numbers = {number if number % 2 else 1000 * worker + number for worker in range(1, 5) for number in range(40)}
    assert len(cache) == len(numbers) == 20 + 4 * 20
    for number in numbers:
        assert is_same(cache.find(key_of(number), 1 + number % 9), rows_of(number, num_rows=1 + number % 9))


def test_a_forked_process_writes_files_of_its_own(tmp_path: Path) -> None:
    cache = open_one(tmp_path)
    cache.store(key_of(0), rows_of(0))
    process = multiprocessing.get_context("fork").Process(target=lambda: cache.store(key_of(1), rows_of(1)))
    process.start()
    process.join()
    assert process.exitcode == 0
    cache.store(key_of(2), rows_of(2))
    assert len(list(cache.folder.glob("*.rows"))) == 2
    for number in range(3):
        assert is_same(open_one(tmp_path).find(key_of(number), 13), rows_of(number))


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def cut_entry(folder: Path) -> None:
    path = only(folder, "*.index")
    os.truncate(path, path.stat().st_size - 10)


def cut_rows(folder: Path) -> None:
    path = only(folder, "*.rows")
    os.truncate(path, path.stat().st_size - 1)


def lose_rows(folder: Path) -> None:
    """As after a power cut: the file is as long as it was, its last blocks are empty."""
    path = only(folder, "*.rows")
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))


def take_rows_away(folder: Path) -> None:
    only(folder, "*.rows").unlink()


@pytest.mark.parametrize("damage", [cut_entry, cut_rows, lose_rows])
def test_a_torn_or_damaged_record_counts_as_never_computed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = open_one(tmp_path)
    for number in range(3):
        cache.store(key_of(number), rows_of(number))
    damage(cache.folder)
    later = open_one(tmp_path)
    assert is_same(later.find(key_of(0), 13), rows_of(0))
    assert is_same(later.find(key_of(1), 13), rows_of(1))
    assert later.find(key_of(2), 13) is None
    later.store(key_of(2), rows_of(2))
    assert is_same(later.find(key_of(2), 13), rows_of(2))
    reopened = open_one(tmp_path)
    assert all(is_same(reopened.find(key_of(number), 13), rows_of(number)) for number in range(3))


def test_a_damaged_entry_does_not_give_rows_to_another_image(tmp_path: Path) -> None:
    cache = open_one(tmp_path)
    cache.store(key_of(0), rows_of(0))
    path = only(cache.folder, "*.index")
    content = bytearray(path.read_bytes())
    content[31] ^= 1  # the last byte of the key
    path.write_bytes(content)
    later = open_one(tmp_path)
    assert later.find(key_of(1), 13) is None and later.find(key_of(0), 13) is None


def test_a_damaged_record_that_is_read_last_does_not_hide_the_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["f", "0"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    first, second = open_one(tmp_path), open_one(tmp_path)
    first.store(key_of(0), rows_of(0))
    cut_rows(first.folder)
    assert second.find(key_of(0), 13) is None
    second.store(key_of(0), rows_of(0))
    assert [file.stem[-1] for file in sorted(first.folder.glob("*.index"))] == ["0", "f"]
    assert is_same(open_one(tmp_path).find(key_of(0), 13), rows_of(0))


def test_rows_without_their_file_count_as_never_computed(tmp_path: Path) -> None:
    open_one(tmp_path).store(key_of(0), rows_of(0))
    cache = open_one(tmp_path)
    take_rows_away(cache.folder)
    assert cache.find(key_of(0), 13) is None
    assert cache.counts.damaged == cache.counts.misses == 1


def test_another_number_of_rows_than_the_image_has_is_not_given(tmp_path: Path) -> None:
    cache = open_one(tmp_path)
    cache.store(key_of(0), rows_of(0))
    assert cache.find(key_of(0), 14) is None


def test_a_full_disk_stops_storing_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_one(tmp_path)
    cache.store(key_of(0), rows_of(0))

    class Full:
        """A file that takes half of what it is given, then nothing."""

        def __init__(self, file) -> None:
            self.file, self.is_full = file, False

        def write(self, content: memoryview) -> int:
            if self.is_full:
                raise OSError(28, "No space left on device")
            self.is_full = True
            return self.file.write(content[: len(content) // 2])

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    writer = cache._writer
    assert writer is not None
    size = cache.stored_bytes()
    monkeypatch.setattr(writer, "_rows", Full(writer._rows))
    for number in (1, 2):
        cache.store(key_of(number), rows_of(number))
        assert cache.find(key_of(number), 13) is None
    assert caplog.text.count("No space left on device") == 1
    assert cache.stored_bytes() == size
    assert is_same(open_one(tmp_path).find(key_of(0), 13), rows_of(0))


def test_a_run_that_trains_the_encoder_is_refused() -> None:
    def parts(**changes: object) -> tuple[str, ...]:
        return TrainConfig(model="any", output_dir="any", train_data=["any"], **changes).trained_parts  # pyright: ignore

    for allowed in ({"method": "frozen_vision"}, {"method": "lora", "freeze": ["vision", "projector"]}):
        require_frozen(parts(**allowed))
    for refused in ({}, {"method": "lora"}, {"freeze": ["vision"]}, {"method": "qlora", "lora_parts": ["projector"]}):
        with pytest.raises(ConfigError, match="vision_cache"):
            require_frozen(parts(**refused))


def test_changed_weights_have_another_name(tiny_model: Phi3VForCausalLM) -> None:
    vision = tiny_model.model.vision_embed_tokens
    name = fingerprint_of(vision)
    assert fingerprint_of(vision) == name
    with torch.no_grad():
        tiny_model.lm_head.weight += 1
        assert fingerprint_of(vision) == name
        vision.sub_GN[0, 0, 0, 0] += 1e-6
    assert fingerprint_of(vision) != name
    with torch.no_grad():
        vision.sub_GN[0, 0, 0, 0] -= 1e-6
    assert fingerprint_of(vision.to(torch.bfloat16)) != name


@pytest.fixture
def shared(tmp_path: Path, processor: Phi3VProcessor) -> tuple[ConversationDataset, SampleEncoder, SampleCosts]:
    dataset = ConversationDataset(write_shared_data(tmp_path / "data") / "train.jsonl")
    encoder, recorder = SampleEncoder(processor), CostRecorder()
    check_dataset(dataset, encoder, progress=False, recorder=recorder)
    return dataset, encoder, recorder.costs()


def test_rows_of_a_data_set_are_counted_image_by_image(
    shared: tuple[ConversationDataset, SampleEncoder, SampleCosts], processor: Phi3VProcessor
) -> None:
    dataset, encoder, costs = shared
    paths = {
        dataset.image_path(sample, name)
        for sample in map(dataset.__getitem__, range(len(dataset)))
        for name in sample.images
    }
    expected = 0
    for path in paths:
        with Image.open(path) as image:
            expected += processor.image_processor.image_token_count(image.height, image.width)
    assert count_image_rows(dataset, encoder) == expected
    assert expected <= most_image_rows(costs, processor.image_processor.tokens_per_side)


def test_no_grid_has_more_rows_a_crop_than_the_bound_takes() -> None:
    for side in (2, 12):
        most = num_image_tokens((1, 1), side) / 2
        for rows in range(1, 17):
            for columns in range(1, 17):
                assert num_image_tokens((rows, columns), side) <= most * (rows * columns + 1)


def test_too_small_a_disk_is_found_before_the_first_step(
    tmp_path: Path,
    shared: tuple[ConversationDataset, SampleEncoder, SampleCosts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, encoder, costs = shared
    cache = open_one(tmp_path / "cache")
    needed = count_image_rows(dataset, encoder) * cache.row_bytes
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            require_room(cache, dataset, encoder, costs)
        else:
            with pytest.raises(CapacityError, match="rows of all images take"):
                require_room(cache, dataset, encoder, costs)
    cache.store(key_of(0), rows_of(0, num_rows=1))  # one row less to write
    require_room(cache, dataset, encoder, costs)


def batch_of(model: Phi3VForCausalLM, grids: tuple[tuple[int, int], ...], keys: tuple[str, ...]) -> PackedBatch:
    """Returns a row of images and nothing but images, then one token."""
    per_side = model.config.tokens_per_side
    num_rows = sum(num_image_tokens(grid, per_side) for grid in grids)
    generator = torch.Generator().manual_seed(0)
    return PackedBatch(
        layout=PackLayout(wholes=(num_rows + 1,)),
        input_ids=torch.arange(num_rows + 1),
        position_ids=torch.arange(num_rows + 1),
        is_long=torch.zeros(num_rows + 1, dtype=torch.bool),
        target_positions=torch.tensor([num_rows - 1]),
        target_ids=torch.tensor([5]),
        target_weights=torch.ones(1),
        image_positions=torch.arange(num_rows),
        image_rows=torch.arange(num_rows),
        crops=torch.randn(sum(r * c + 1 for r, c in grids), 3, *[model.config.crop_px] * 2, generator=generator),
        grids=grids,
        image_keys=keys,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_with_cached_rows_has_the_loss_of_one_with_crops(
    tmp_path: Path, tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dtype: torch.dtype
) -> None:
    """What is kept is what the forward pass would compute: the same bits, for the same images in a batch."""
    cache = open_cache(tmp_path, tiny_model, processor.image_processor, dtype)
    grids, keys = ((1, 2), (1, 1)), (key_of(1), key_of(2))
    batch = batch_of(tiny_model, grids, keys)

    def loss(packed: PackedBatch) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return tiny_model(packed=packed).loss

    filled = compute_missing(batch, cache, tiny_model)
    assert filled.crops is None and filled.features is not None and filled.features.dtype == dtype
    assert torch.equal(loss(filled), loss(batch))
    # A later batch finds one of the images, and computes the other.
    counts = [num_image_tokens(grid, tiny_model.config.tokens_per_side) for grid in grids]
    found = cache.find(keys[1], counts[1])
    assert found is not None and batch.crops is not None
    half = replace(batch, crops=batch.crops[:3], grids=grids[:1], image_keys=keys[:1], features=found)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # a product of fewer rows may round otherwise
    torch.testing.assert_close(loss(half), loss(batch), rtol=tolerance, atol=0)
    torch.testing.assert_close(loss(compute_missing(half, cache, tiny_model)), loss(batch), rtol=tolerance, atol=0)
    assert cache.counts.stored == 2
    assert compute_missing(filled, cache, tiny_model) is filled


def test_other_weights_or_cutting_open_another_cache(
    tmp_path: Path, tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor
) -> None:
    first = open_cache(tmp_path, tiny_model, processor.image_processor, torch.float32)
    assert open_cache(tmp_path, tiny_model, processor.image_processor, torch.float32).folder == first.folder
    with torch.no_grad():
        tiny_model.model.vision_embed_tokens.glb_GN += 1
    assert open_cache(tmp_path, tiny_model, processor.image_processor, torch.float32).folder != first.folder


def test_published_cost_of_a_page() -> None:
    """docs/tuning.md: 15.4 MB for a page of 16 tiles in 16 bit."""
    assert num_image_tokens((4, 4)) * 3072 * 2 == 15_415_296
    assert np.isclose(10_194 * 15.415296, 157_144, rtol=1e-3)  # MB, DocVQA's training pages
