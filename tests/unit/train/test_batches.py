"""Windows follow from seed, epoch and costs alone; every micro-batch holds what its plan says."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3v.data.check import check_dataset
from phi3v.data.collate import PackCollator
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.packing import Budget, CostRecorder, MicroBatch, Packing, SampleCosts, load_of
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train import batches
from phi3v.train.batches import TrainingSamples, WindowReader, Windows
from phi3v.train.order import Shuffled, StemsTogether
from training import TOKENS_PER_SIDE, unpack, write_shared_data, write_training_data


def costs_of(num: int) -> SampleCosts:
    """Text-only samples of 10 to 14 positions, of which 1 to 3 are supervised."""
    number = np.arange(num, dtype=np.int32)
    nothing = np.zeros(num, dtype=np.int32)
    return SampleCosts(10 + number % 5, 1 + number % 3, nothing, nothing, nothing, nothing.astype(np.uint64))


def windows(num: int = 11, batch: int = 4, micro: int = 1, seed: int = 0, rank: int = 0, ranks: int = 1) -> Windows:
    packing = Packing(Budget(samples=micro), num_ranks=ranks)
    return Windows(Shuffled(num, seed), costs_of(num), batch_size=batch, packing=packing, rank=rank)


def drawn(batches: tuple[MicroBatch, ...]) -> list[int]:
    return [index for batch in batches if batch.counts for group in batch.groups for index in group]


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    order = windows().order.of(3).tolist()
    torch.manual_seed(5)
    assert windows(micro=4).order.of(3).tolist() == order
    assert windows().order.of(2).tolist() != order
    assert windows(seed=1).order.of(3).tolist() != order
    assert sorted(order) == list(range(11))


def test_a_step_knows_its_samples() -> None:
    one = windows(micro=2)
    assert [*one.window(3), *one.window(4), *one.window(5)] == one.order.of(1).tolist()
    assert len(one.window(5)) == 3
    for step in range(6):
        plan = one.plan(step)
        window = one.window(step)
        assert sorted(drawn(plan.micro_batches)) == sorted(window)
        assert plan.samples == len(window)
        assert plan.tokens == plan.computed_tokens == sum(10 + index % 5 for index in window)
        assert plan.supervised == sum(1 + index % 3 for index in window)


def test_a_step_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Counter()
    plan_window = batches.plan_window

    def counted(costs: SampleCosts, window: list[int], packing: Packing) -> list[list[MicroBatch]]:
        planned[tuple(window)] += 1
        return plan_window(costs, window, packing)

    monkeypatch.setattr(batches, "plan_window", counted)
    one = windows()
    plans = [one.plan(step) for _ in range(3) for step in range(6)]
    assert plans[:6] == plans[6:12] == plans[12:]
    assert set(planned.values()) == {1} and len(planned) == 6


@given(num=st.integers(1, 40), micro=st.integers(1, 4), ranks=st.integers(1, 4), batch=st.integers(1, 13))
def test_ranks_share_each_window_whole_and_stay_in_step(num: int, micro: int, ranks: int, batch: int) -> None:
    shares = [windows(num, batch, micro, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(2 * len(shares[0])):
        plans = [share.plan(step) for share in shares]
        assert len({len(plan.micro_batches) for plan in plans}) == 1
        counted = [index for plan in plans for index in drawn(plan.micro_batches)]
        assert Counter(counted) == Counter(shares[0].window(step))
        assert len({(plan.samples, plan.supervised, plan.tokens, plan.computed_tokens) for plan in plans}) == 1
        assert plans[0].computed_tokens == plans[0].tokens


@pytest.fixture
def samples(processor: Phi3VProcessor, tmp_path: Path) -> tuple[TrainingSamples, SampleCosts]:
    """Mixed data, five of whose samples are about one image, and what they cost."""
    dataset = ConversationDataset(write_shared_data(tmp_path / "data") / "train.jsonl")
    encoder, recorder = SampleEncoder(processor), CostRecorder()
    check_dataset(dataset, encoder, progress=False, recorder=recorder)
    collator = PackCollator(processor.image_token_id, tokens_per_side=TOKENS_PER_SIDE, short_positions=4096)
    return TrainingSamples(dataset, encoder, collator), recorder.costs()


def test_a_micro_batch_is_as_planned(samples: tuple[TrainingSamples, SampleCosts]) -> None:
    """What the planner knows from headers is what comes out: positions, crops, samples, supervised positions."""
    source, costs = samples
    order = StemsTogether([0] * len(costs), most=99, seed=0)
    packing = Packing(Budget(tokens=120), shared_questions=3)
    one = Windows(order, costs, batch_size=len(costs), packing=packing)
    plan = one.plan(0)
    batches = [source[batch] for batch in plan.micro_batches]
    assert len(batches) > 1 and any(batch.layout.stems for batch in batches)
    for batch, planned in zip(batches, plan.micro_batches, strict=True):
        assert batch.layout.num_tokens == len(batch.input_ids) == planned.load.tokens
        assert batch.layout.num_sequences == batch.num_samples == planned.load.samples
        assert (0 if batch.crops is None else len(batch.crops)) <= planned.load.crops
        assert sum(len(group) > 1 for group in planned.groups) == len(batch.layout.stems)
    assert sum(batch.num_positions for batch in batches) == plan.tokens
    assert sum(len(batch.target_ids) for batch in batches) == plan.supervised
    assert sum(batch.layout.num_tokens for batch in batches) == plan.computed_tokens < plan.tokens


def test_a_packed_sample_is_the_encoded_one(samples: tuple[TrainingSamples, SampleCosts]) -> None:
    source, costs = samples
    indices = tuple(range(len(costs)))
    batch = source[MicroBatch(tuple((index,) for index in indices), load_of(costs, indices))]
    for index, sequence in enumerate(unpack(batch)):
        sample = source.dataset[index]
        encoded = source.encoder.encode(sample, source.dataset.load_images(sample))
        assert torch.equal(sequence["input_ids"][0], encoded["input_ids"])
        assert torch.equal(sequence["labels"][0], encoded["labels"])
        assert ("pixel_values" in sequence) == ("pixel_values" in encoded)
        for key in ("pixel_values", "image_sizes"):
            assert key not in encoded or torch.equal(sequence[key], encoded[key])


def test_every_image_is_opened_and_computed_once(
    samples: tuple[TrainingSamples, SampleCosts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its samples share their beginning or not, and wherever in them it stands."""
    source, costs = samples
    opened: list[str] = []
    load = ConversationDataset.load_image
    monkeypatch.setattr(
        ConversationDataset, "load_image", lambda self, *args: opened.append(args[1]) or load(self, *args)
    )
    indices = tuple(range(len(costs)))
    batch = source[MicroBatch(tuple((index,) for index in indices), load_of(costs, indices))]
    shown = [name for index in indices for name in source.dataset[index].images]
    assert len(shown) > len(set(shown)) == len(opened) == len(batch.image_keys) == len(batch.grids)
    assert batch.crops is not None and len(batch.crops) == sum(rows * columns + 1 for rows, columns in batch.grids)


def test_a_filler_weighs_nothing(samples: tuple[TrainingSamples, SampleCosts]) -> None:
    source, costs = samples
    batch = source[MicroBatch(((1,),), load_of(costs, (1,)), counts=False)]
    assert batch.num_samples == batch.num_positions == 0
    assert len(batch.target_weights) > 0 and not batch.target_weights.any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_gives_every_step_its_micro_batches(
    samples: tuple[TrainingSamples, SampleCosts], num_workers: int
) -> None:
    """Over the end of an epoch, and from any step on."""
    source, costs = samples
    one = Windows(Shuffled(len(costs), 0), costs, batch_size=4, packing=Packing(Budget(samples=3)))
    num_steps = len(one) + 2
    reader = WindowReader(one, source, num_workers=num_workers, pin_memory=False)
    for step in (*range(num_steps), 1, 2):
        found = list(reader.read(step, num_steps))
        expected = [source[batch] for batch in one.plan(step).micro_batches]
        assert [batch.layout for batch in found] == [batch.layout for batch in expected]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(found, expected, strict=True))
    reader.close()


def test_one_sample_may_come_twice(processor: Phi3VProcessor, tmp_path: Path) -> None:
    """As ``class_balanced`` draws it."""
    dataset = ConversationDataset(write_training_data(tmp_path / "data") / "train.jsonl")
    collator = PackCollator(processor.image_token_id, tokens_per_side=TOKENS_PER_SIDE, short_positions=4096)
    batch = TrainingSamples(dataset, SampleEncoder(processor), collator)[MicroBatch(((1, 1),), None)]  # pyright: ignore
    first, second = unpack(batch)
    assert torch.equal(first["input_ids"], second["input_ids"]) and len(batch.layout.stems) == 1
