from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3v.data.collate import Collator
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.batches import Draw, TrainingSamples, WindowSampler
from phi3v.train.order import Shuffled
from training import write_training_data


def sampler(
    num: int = 11, batch: int = 4, micro: int = 1, seed: int = 0, rank: int = 0, ranks: int = 1
) -> WindowSampler:
    return WindowSampler(Shuffled(num, seed), batch_size=batch, micro_batch_size=micro, rank=rank, num_ranks=ranks)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    order = sampler().order.of(3).tolist()
    torch.manual_seed(5)
    assert sampler(micro=4).order.of(3).tolist() == order
    assert sampler().order.of(2).tolist() != order
    assert sampler(seed=1).order.of(3).tolist() != order
    assert sorted(order) == list(range(11))


def test_a_step_knows_its_samples() -> None:
    one = sampler(micro=2)
    one.set_epoch(1)
    drawn = [draw.index for batch in one for draw in batch]
    assert [*one.window(3), *one.window(4), *one.window(5)] == drawn
    assert len(one.window(5)) == 3


@given(
    num=st.integers(1, 40),
    micro=st.integers(1, 4),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_ranks_share_each_window_whole_and_stay_in_step(
    num: int, micro: int, ranks: int, accumulation: int, epoch: int
) -> None:
    batch = micro * ranks * accumulation
    shares = [sampler(num, batch, micro, rank=rank, ranks=ranks) for rank in range(ranks)]
    for share in shares:
        share.set_epoch(epoch)
    drawn = [list(share) for share in shares]
    assert {len(batches) for batches in drawn} == {len(share) for share in shares} == {len(drawn[0])}
    first_step = epoch * shares[0].num_windows
    for number in range(shares[0].num_windows):
        window = shares[0].window(first_step + number)
        pieces = [one[number * accumulation : (number + 1) * accumulation] for one in drawn]
        counted = [draw.index for one in pieces for piece in one for draw in piece if draw.counts]
        assert Counter(counted) == Counter(window)
        assert all(1 <= len(piece) <= micro for one in pieces for piece in one)


def test_a_batch_that_does_not_split_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="do not split"):
        sampler(batch=4, micro=3)


def test_a_filler_weighs_nothing(processor: Phi3VProcessor, tmp_path: Path) -> None:
    dataset = ConversationDataset(write_training_data(tmp_path / "data") / "train.jsonl")
    samples = TrainingSamples(dataset, SampleEncoder(processor))
    sample, filler = samples[Draw(1)], samples[Draw(1, counts=False)]
    assert torch.equal(sample["input_ids"], filler["input_ids"]) and "pixel_values" in filler
    batch = Collator(processor.tokenizer.pad_token_id)([filler])
    assert (batch["labels"] == -100).all()
