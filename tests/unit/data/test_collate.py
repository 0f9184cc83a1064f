"""Training samples are packed into one row, from which they can be read back."""

from collections.abc import Sequence

import pytest
import torch
from torch.utils.data import DataLoader

from phi3v.data.collate import PackCollator, PackSample
from phi3v.data.encode import EncodedText
from phi3v.data.packing import Stem
from phi3v.geometry import num_image_tokens
from phi3v.model.packed import PackedBatch, PackLayout
from training import unpack

IMAGE, SIDE, SHORT = 7, 2, 60
GRIDS = {"a": (1, 1), "b": (1, 2)}
"""Of 13 and 17 rows."""


def sample(images: str, question: int, answer: int, counts: bool = True, first_id: int = 100) -> PackSample:
    """A sample of the published form: ``<s>``, opening, images, a question and an answer of so many tokens."""
    ids = [1, 2]
    for image in images:
        ids += [IMAGE] * num_image_tokens(GRIDS[image], SIDE)
    stem = Stem(len(ids), len(images), sum(r * c + 1 for r, c in map(GRIDS.get, images)), b"") if images else Stem()
    ids += range(first_id, first_id + question + answer)
    labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
    grids = tuple(GRIDS[image] for image in images)
    text = EncodedText(torch.tensor(ids), torch.tensor(labels), grids, tuple(range(len(images))), stem)
    return PackSample(text, tuple(images), counts)


def crops() -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3, 4, 4), 1.0), "b": torch.full((3, 3, 4, 4), 2.0)}


def pack(*groups: Sequence[PackSample], **options) -> PackedBatch:
    return PackCollator(IMAGE, tokens_per_side=SIDE, short_positions=SHORT, **options)(groups, crops())


def test_every_sample_can_be_read_back_from_the_row():
    groups = [
        [sample("a", 3, 2), sample("a", 1, 4, first_id=200)],
        [sample("", 5, 1)],
        [sample("ab", 2, 2)],
        [sample("ab", 2, 3), sample("ab", 4, 1, first_id=300)],
        [sample("b", 2, 1)],
    ]
    batch = pack(*groups)
    wholes = [groups[1][0], groups[2][0], groups[4][0]]
    order = [*wholes, *groups[0], *groups[3]]
    for sequence, one in zip(unpack(batch), order, strict=True):
        ids, labels = one.text.input_ids, one.text.labels
        assert torch.equal(sequence["input_ids"][0], ids) and torch.equal(sequence["labels"][0], labels)
        is_supervised = (labels != -100).float()
        torch.testing.assert_close(sequence["loss_weights"][0], is_supervised / is_supervised.sum())
        assert ("pixel_values" in sequence) == bool(one.image_keys)
        for pixels, key in zip(sequence.get("pixel_values", []), one.image_keys, strict=True):
            assert torch.equal(pixels[: len(crops()[key])], crops()[key])
    assert (batch.num_samples, batch.num_positions) == (7, sum(len(one.text.input_ids) for one in order))


def test_what_begins_alike_is_there_once_and_so_is_every_image():
    batch = pack([sample("a", 3, 2), sample("a", 1, 4)], [sample("", 5, 1)], [sample("a", 9, 1)])
    assert batch.layout == PackLayout(stems=(15,), wholes=(8, 25), branches=((5, 5),))
    assert batch.image_keys == ("a",) and batch.grids == ((1, 1),)
    assert batch.crops is not None and batch.crops.shape == (2, 3, 4, 4)
    assert batch.image_rows.tolist() == [*range(13), *range(13)]
    assert batch.image_positions.tolist() == [*range(2, 15), *range(15 + 8 + 2, 15 + 8 + 15)]
    assert batch.position_ids.tolist() == [*range(15), *range(8), *range(25), *range(15, 20), *range(15, 20)]


def test_an_image_whose_rows_are_at_hand_is_not_computed():
    """Its rows come behind those that are computed."""
    groups = [[sample("a", 3, 2)], [sample("ab", 1, 4)]]
    collate = PackCollator(IMAGE, tokens_per_side=SIDE, short_positions=SHORT)
    rows = torch.arange(13.0)[:, None]
    batch = collate(groups, {"b": crops()["b"]}, {"a": rows})
    assert batch.image_keys == ("b",) and batch.grids == ((1, 2),)
    assert batch.crops is not None and torch.equal(batch.crops, crops()["b"])
    assert torch.equal(batch.features, rows)
    assert batch.image_rows.tolist() == [*range(17, 30), *range(17, 30), *range(17)]


def test_a_group_that_does_not_begin_alike_after_all_shares_nothing():
    """Whoever planned it compared hashes."""
    other_text = sample("a", 1, 1)
    other_text.text.input_ids[1] = 3
    groups = [sample("a", 3, 2), sample("b", 3, 2)], [sample("a", 1, 1), other_text], [sample("", 2, 1)] * 2
    assert pack(*groups).layout.stems == ()
    long = sample("a", SHORT - 15, 1)
    assert len(long.text.input_ids) == SHORT + 1
    batch = pack([sample("a", SHORT - 16, 1), long, sample("a", 1, 1), long])
    assert batch.layout.stems == (15, 15) and batch.layout.branches == ((45, 2), (46, 46))
    assert batch.is_long.tolist() == [False] * 15 + [True] * 15 + [False] * 47 + [True] * 92


def test_token_mean_weights_are_one_and_a_filler_weighs_nothing():
    batch = pack([sample("", 2, 2)], [sample("", 3, 1)], loss_weighting="token_mean")
    assert batch.target_weights.tolist() == [1, 1, 1]
    batch = pack([sample("a", 3, 2, counts=False)])
    assert batch.target_weights.tolist() == [0, 0] and batch.target_positions.tolist() == [17, 18]
    assert (batch.num_samples, batch.num_positions) == (0, 0)


def test_wholes_of_nearly_one_length_are_filled_up_to_it():
    """A position's worth of filling on 99; behind the last token, seen by nobody, and no target."""
    shorter, longer = sample("", 46, 1), sample("", 47, 1, first_id=200)
    assert (len(shorter.text.input_ids), len(longer.text.input_ids)) == (49, 50)
    batch = pack([shorter], [longer], alignment=2)
    assert batch.layout == PackLayout(wholes=(50, 50))
    assert torch.equal(batch.input_ids[:49], shorter.text.input_ids)
    assert torch.equal(batch.input_ids[50:], longer.text.input_ids)
    assert batch.position_ids.tolist() == [*range(50), *range(50)]
    assert batch.target_positions.tolist() == [47, 98] and batch.num_positions == 99
    assert pack([shorter], [longer]).layout == PackLayout(wholes=(49, 50))
    uneven = pack([sample("", 46, 1)], [sample("", 40, 1)], alignment=2)
    assert uneven.layout == PackLayout(wholes=(49, 43))


def pack_and_tell(groups: list[list[PackSample]]) -> tuple[PackedBatch, bool]:
    batch = pack(*groups)
    assert batch.crops is not None
    return batch, batch.crops.is_shared()


def test_a_loaders_worker_writes_crops_to_the_memory_that_it_shares():
    groups = [[sample("a", 3, 2)], [sample("ab", 1, 1)]]
    loader = DataLoader(groups, batch_size=2, num_workers=1, collate_fn=pack_and_tell)  # pyright: ignore[reportArgumentType]
    [(batch, was_shared)] = loader
    assert was_shared  # otherwise the loader copies all crops once more
    here, is_shared_here = pack_and_tell(groups)
    assert not is_shared_here
    assert torch.equal(batch.crops, here.crops) and torch.equal(batch.input_ids, here.input_ids)


def test_text_only_has_no_crops():
    batch = pack([sample("", 2, 2)])
    assert batch.crops is None and batch.grids == () and batch.image_keys == ()
    assert batch.image_positions.shape == batch.image_rows.shape == (0,)


def test_types_of_a_packed_batch():
    batch = pack([sample("a", 2, 2)], [sample("", 2, 2)])
    whole = ("input_ids", "position_ids", "target_positions", "target_ids", "image_positions", "image_rows")
    assert {getattr(batch, name).dtype for name in whole} == {torch.int64}
    assert batch.is_long.dtype == torch.bool and batch.target_weights.dtype == torch.float32
    assert batch.crops is not None and batch.crops.dtype == torch.float32


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="must be sample_mean or token_mean"):
        pack([sample("", 1, 1)], loss_weighting="sum")
