"""LongRoPE: transformers' own numbers, but chosen sequence by sequence."""

import math
from pathlib import Path

import pytest
import torch
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from phi3v.model.checkpoint import load_model
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.rope import Phi3VRotaryEmbedding

LIMIT = 4096
TOLERANCE = 1e-5
"""Absolute, on logits and on cosines and sines scaled to 1.2, float32."""


def positions(*lengths: int) -> torch.Tensor:
    """One row of ``sum(lengths)`` positions, restarting after each length."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(100, 30_000, (1, length), generator=torch.Generator().manual_seed(seed))


def upstream(config: Phi3VConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own LongRoPE, made anew: it remembers the longest batch that it has seen."""
    return Phi3RotaryEmbedding(config)(torch.zeros(1), position_ids)


@pytest.mark.parametrize("length", [1, 100, LIMIT, LIMIT + 1, 5000])
def test_equals_transformers_for_one_sequence(tiny_config: Phi3VConfig, length: int) -> None:
    for ours, theirs in zip(
        Phi3VRotaryEmbedding(tiny_config)(positions(length), torch.float32),
        upstream(tiny_config, positions(length)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_published_scaling(tiny_config: Phi3VConfig) -> None:
    scaling = math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))
    assert Phi3VRotaryEmbedding(tiny_config).scaling == scaling == pytest.approx(1.19024, abs=1e-5)
    cosines, _ = Phi3VRotaryEmbedding(tiny_config)(torch.zeros(1, 1, dtype=torch.int64), torch.float32)
    torch.testing.assert_close(cosines, torch.full_like(cosines, scaling))


@pytest.mark.parametrize(("mode", "length"), [("short", LIMIT), ("long", LIMIT + 1)])
def test_a_fixed_mode_holds_at_every_length(tiny_config: Phi3VConfig, mode: str, length: int) -> None:
    """The first positions of a sequence of the fixed kind are what any shorter or longer one gets."""
    fixed = Phi3VRotaryEmbedding(Phi3VConfig(**tiny_config.to_dict(), rope_mode=mode))
    expected = upstream(tiny_config, positions(length))
    for other in (50, LIMIT, LIMIT + 50):
        for ours, theirs in zip(fixed(positions(other), torch.float32), expected, strict=True):
            shared = min(other, length)
            torch.testing.assert_close(ours[:, :shared], theirs[:, :shared], atol=TOLERANCE, rtol=0)


def test_chosen_per_row_and_per_packed_sequence(tiny_config: Phi3VConfig) -> None:
    rope = Phi3VRotaryEmbedding(tiny_config)
    row = positions(100, LIMIT + 1, 30, LIMIT)
    expected = torch.cat([torch.full((length,), length > LIMIT) for length in (100, LIMIT + 1, 30, LIMIT)])
    assert torch.equal(rope.is_long(row)[0], expected)
    batch = torch.cat([positions(LIMIT + 1), positions(LIMIT - 99, 100)])
    assert torch.equal(rope.is_long(batch).all(dim=1), torch.tensor([True, False]))
    # One position of a sequence that goes on, as in generation; and left padding before a long row.
    assert rope.is_long(torch.tensor([[LIMIT], [LIMIT - 1]])).tolist() == [[True], [False]]
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), positions(LIMIT + 1)], dim=1)
    assert rope.is_long(padded)[0, 7:].all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_short_rows_logits_do_not_depend_on_a_long_neighbour(limited_dir: Path, attention: str) -> None:
    model = load_model(limited_dir, attention=attention)
    short, long = ids(20, 1), ids(80, 2)
    batch = torch.cat([torch.nn.functional.pad(short, (0, 60), value=32000), long])
    mask = torch.ones_like(batch)
    mask[0, 20:] = 0
    together = model(input_ids=batch, attention_mask=mask).logits
    torch.testing.assert_close(together[:1, :20], model(input_ids=short).logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(together[1:], model(input_ids=long).logits, atol=TOLERANCE, rtol=0)


def test_a_short_row_beside_one_of_4100_positions(tiny_model: Phi3VForCausalLM) -> None:
    short, long = ids(30, 1), ids(LIMIT + 4, 2)
    batch = torch.cat([torch.nn.functional.pad(short, (LIMIT - 26, 0), value=32000), long])
    mask = torch.ones_like(batch)
    mask[0, :-30] = 0
    with torch.no_grad():
        together = tiny_model(input_ids=batch, attention_mask=mask, logits_to_keep=5).logits
        for row, alone in enumerate((short, long)):
            expected = tiny_model(input_ids=alone, logits_to_keep=5).logits[0]
            torch.testing.assert_close(together[row], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_packed_row_is_its_sequences(limited_dir: Path, attention: str, use_cache: bool) -> None:
    """Also where the caller forgets to switch the cache off, which transformers' own models mix sequences by."""
    model = load_model(limited_dir, attention=attention)
    sequences = [ids(20, 1), ids(90, 2), ids(64, 3)]
    row = torch.cat(sequences, dim=1)
    packed = model(input_ids=row, position_ids=positions(20, 90, 64), use_cache=use_cache).logits
    expected = torch.cat([model(input_ids=sequence).logits for sequence in sequences], dim=1)
    torch.testing.assert_close(packed, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["short", "long"])
def test_mode_reaches_the_model(limited_dir: Path, mode: str) -> None:
    fixed, chosen = load_model(limited_dir, rope_mode=mode), load_model(limited_dir)
    matching, other = (ids(20), ids(80)) if mode == "short" else (ids(80), ids(20))
    torch.testing.assert_close(
        fixed(input_ids=matching).logits, chosen(input_ids=matching).logits, atol=TOLERANCE, rtol=0
    )
    assert (fixed(input_ids=other).logits - chosen(input_ids=other).logits).abs().max() > 0.01


def test_casting_the_model_does_not_round_the_frequencies(tiny_model: Phi3VForCausalLM) -> None:
    position_ids = positions(3000)
    before = tiny_model.model.rotary_emb(position_ids, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        after = tiny_model.to(dtype).model.rotary_emb(position_ids, torch.float32)
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)
    assert tiny_model.model.rotary_emb(position_ids, torch.float16)[0].dtype == torch.float16
