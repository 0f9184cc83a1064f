"""Another rounding of a model moves its answers as far as the real one does."""

import pytest
import torch

from phi3v.export.rounding import move_within_rounding, names_to_round, spacing
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    """The reference walks one bit pattern up."""
    magnitudes = torch.logspace(-9, 4, 2000).to(dtype)
    values = torch.cat([magnitudes, torch.tensor([0.0, 1.0, 1.9921875, 2.0, 6e-8], dtype=dtype)])
    above = (values.view(torch.int16) + 1).view(dtype)
    expected = above.float() - values.float()
    assert torch.equal(spacing(values.float(), dtype), expected)
    assert torch.equal(spacing(-values.float(), dtype), expected)


def test_only_what_the_format_cannot_hold_is_rounded(tiny_model: Phi3VForCausalLM) -> None:
    tiny_model.to(torch.bfloat16).to(torch.float32)
    assert names_to_round(tiny_model, torch.bfloat16) == []
    with torch.no_grad():
        tiny_model.lm_head.weight[3, 3] = 1 + 2**-20
    assert names_to_round(tiny_model, torch.bfloat16) == ["lm_head.weight"]
    assert names_to_round(tiny_model, torch.float32) == []


@torch.no_grad()
def test_weights_stay_within_half_a_spacing(tiny_model: Phi3VForCausalLM) -> None:
    tiny_model.to(torch.bfloat16).to(torch.float32)
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    move_within_rounding(tiny_model, ["lm_head.weight"], torch.bfloat16)
    moved = (tiny_model.lm_head.weight - before["lm_head.weight"]).abs() / spacing(
        before["lm_head.weight"], torch.bfloat16
    )
    assert moved.max() <= 0.5 + 1e-6
    assert moved.mean() == pytest.approx(0.25, abs=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.named_parameters() if "lm_" not in name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_rounding_moves_the_logits_as_far_as_the_real_one(
    tiny_model: Phi3VForCausalLM, dtype: torch.dtype
) -> None:
    ids = torch.tensor([[1, 32010, 29871, 13, 1170, 500, 7000, 32007]])
    exact = tiny_model(ids).logits
    names = names_to_round(tiny_model, dtype)
    rounded = tiny_model.to(dtype).to(torch.float32)
    of_rounded = rounded(ids).logits
    move_within_rounding(rounded, names, dtype)
    real, other = (of_rounded - exact).norm(), (rounded(ids).logits - of_rounded).norm()
    assert 0.6 < other / real < 1.6
