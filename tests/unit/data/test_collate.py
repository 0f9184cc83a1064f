from collections.abc import Sequence

import pytest
import torch
from torch.utils.data import DataLoader

from phi3v.data.collate import Collator
from phi3v.data.encode import Encoded

PAD = 9


def encoded(length: int, num_supervised: int = 0, crops: tuple[int, ...] = (), value: float = 1.0) -> Encoded:
    """Ids are ``PAD`` throughout, as a mask made by comparing ids would get them wrong."""
    sample = Encoded(input_ids=torch.full((length,), PAD))
    if num_supervised:
        sample["labels"] = torch.tensor([-100] * (length - num_supervised) + [PAD] * num_supervised)
    if crops:
        sample["pixel_values"] = torch.zeros(len(crops), max(crops), 3, 4, 4)
        for row, count in enumerate(crops):
            sample["pixel_values"][row, :count] = value + row
        sample["image_sizes"] = torch.tensor([[4, 4 * (count - 1)] for count in crops])
    return sample


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_and_masked_by_length(side):
    lengths = [3, 5, 1]
    batch = Collator(0, side)([encoded(length, 1) for length in lengths])
    for row, length in enumerate(lengths):
        own = slice(0, length) if side == "right" else slice(5 - length, 5)
        mask = torch.zeros(5, dtype=torch.int64)
        mask[own] = 1
        assert torch.equal(batch["attention_mask"][row], mask)
        assert torch.equal(batch["input_ids"][row], mask * PAD)
        assert batch["labels"][row].tolist() == [PAD if j == range(5)[own][-1] else -100 for j in range(5)]


def test_a_pad_token_inside_a_sample_stays_visible():
    assert Collator(PAD)([encoded(3), encoded(2)])["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_sample_mean_weights_make_the_summed_loss_a_sum_of_sample_means():
    batch = Collator(0, loss_weighting="sample_mean")([encoded(6, 4), encoded(3, 1)])
    token_losses = torch.rand(2, 6)
    expected = token_losses[0, 2:].mean() + token_losses[1, 2]
    assert torch.isclose((batch["loss_weights"] * token_losses).sum(), expected)
    assert torch.equal(batch["loss_weights"] > 0, batch["labels"] != -100)


def test_token_mean_weights_are_one_on_every_answer_token():
    batch = Collator(0, loss_weighting="token_mean")([encoded(6, 4), encoded(3, 1)])
    assert torch.equal(batch["loss_weights"], (batch["labels"] != -100).float())


def test_images_of_all_samples_follow_one_another():
    samples = [encoded(2, 1, (3, 2), value=1), encoded(2, 1), encoded(2, 1, (5,), value=7)]
    batch = Collator(0)(samples)
    assert batch["pixel_values"].shape == (3, 5, 3, 4, 4)
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[1, 1, 1, 0, 0], [2, 2, 0, 0, 0], [7] * 5]
    assert batch["image_sizes"].tolist() == [[4, 8], [4, 4], [4, 16]]


def collate_and_tell(samples: Sequence[Encoded]) -> tuple[dict[str, torch.Tensor], bool]:
    batch = Collator(0)(samples)
    return batch, batch["pixel_values"].is_shared()


def test_a_loaders_worker_writes_images_to_the_memory_that_it_shares():
    samples = [encoded(2, 1, (3, 2)), encoded(4, 1, (5,), value=7), encoded(3, 1)]
    loader = DataLoader(samples, batch_size=3, num_workers=1, collate_fn=collate_and_tell)  # pyright: ignore[reportArgumentType]
    [(batch, was_shared)] = loader
    assert was_shared  # otherwise the loader copies the whole batch once more
    here, is_shared_here = collate_and_tell(samples)
    assert not is_shared_here
    assert batch.keys() == here.keys()
    assert all(torch.equal(batch[key], here[key]) for key in here)


def test_only_what_is_there_enters_the_batch():
    assert set(Collator(0)([encoded(2)])) == {"input_ids", "attention_mask"}
    assert set(Collator(0)([encoded(2, 1)])) == {"input_ids", "attention_mask", "labels", "loss_weights"}
    assert set(Collator(0)([encoded(2, crops=(1,))])) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_sizes",
    }


def test_types():
    batch = Collator(0)([encoded(2, 1, (1,)), encoded(3, 1)])
    whole = ("input_ids", "attention_mask", "labels", "image_sizes")
    assert {batch[key].dtype for key in whole} == {torch.int64}
    assert {batch[key].dtype for key in ("loss_weights", "pixel_values")} == {torch.float32}


def test_prompts_and_training_samples_do_not_mix():
    with pytest.raises(ValueError, match="collate prompts and training samples apart"):
        Collator(0)([encoded(2), encoded(2, 1)])
    with pytest.raises(ValueError, match="at least one"):
        Collator(0)([])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="must be right or left"):
        Collator(0, "centre")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must be sample_mean or token_mean"):
        Collator(0, loss_weighting="sum")  # pyright: ignore[reportArgumentType]
