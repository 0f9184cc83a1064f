"""The packed forward's GPU paths equal the padded float32 forward: cuDNN and flash attention, stems and branches."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from packs import Pack, Question
from phi3v.model import packed_attention
from phi3v.model.compute import Compute
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import is_never_used

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 6e-3}
"""Relative error of the whole gradient against float32; the padded forward under autocast has 0.4 of it."""

FLOAT8_TOLERANCE = 0.15

LORA = r".*\.(qkv_proj|o_proj|gate_up_proj|down_proj|q_proj|k_proj|v_proj|out_proj|fc1|fc2|img_projection.(0|2))"


@pytest.fixture
def model() -> Phi3VForCausalLM:
    """Published head sizes, crops and vocabulary; narrow and shallow."""
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Phi3VConfig(
        dtype="float32",
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vision_config={**vision, "image_size": 336, "patch_size": 14},
    )
    return freeze_unused(Phi3VForCausalLM(config).cuda().train())


def freeze_unused(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if is_never_used(name, 3):
            parameter.requires_grad_(False)
    return model


def pack_of(kind: str, config: Phi3VConfig) -> Pack:
    pages = [(4, 4), (4, 4)]
    if kind == "equal pages":  # cuDNN
        return Pack(config, pages, wholes=[Question((0,), 40, 5), Question((1,), 40, 3)])
    if kind == "shared pages":  # cuDNN for the stems, flash for the branches
        groups = [[Question((0,), 40, 5), Question((0,), 30, 5)], [Question((1,), 20, 5), Question((1,), 300, 7)]]
        return Pack(config, pages, stems=groups)
    return Pack(  # flash
        config,
        [(1, 1), (1, 2), (2, 1)],
        stems=[[Question((0,), 9, 3), Question((0,), 4, 2)], [Question((1, 2), 5, 4), Question((1, 2), 6, 1)]],
        wholes=[Question((), 7, 2), Question((1,), 8, 3), Question((2, 0), 5, 2)],
    )


def gradients(model: Any, loss: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: one.grad.float().clone() for name, one in model.named_parameters() if one.grad is not None}


def separate(model: Any, pack: Pack) -> torch.Tensor:
    singles = [{key: value.cuda() for key, value in single.items()} for single in pack.padded()]
    return torch.stack([model(**single, supervised_only=True, use_cache=False).loss for single in singles]).sum()


def relative(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    off = sum(float((found[name] - exact[name]).pow(2).sum()) for name in exact)
    return (off / sum(float(one.pow(2).sum()) for one in exact.values())) ** 0.5


def packed_loss(model: Any, pack: Pack, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cuda", dtype):
        return model(packed=pack.packed().to("cuda")).loss


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["equal pages", "shared pages", "mixed"])
def test_gradients(model: Phi3VForCausalLM, kind: str, dtype: torch.dtype) -> None:
    pack = pack_of(kind, model.config)
    exact = gradients(model, lambda: separate(model, pack))
    for compute in (
        Compute(),
        Compute(accumulates_in_place=True),
        Compute(checkpointing="selective"),
        Compute(checkpointing="full", accumulates_in_place=True),
    ):
        model.compute = compute
        assert relative(gradients(model, lambda: packed_loss(model, pack, dtype)), exact) < TOLERANCE[dtype], compute
    model.compute = Compute(fp8=True)
    assert relative(gradients(model, lambda: packed_loss(model, pack, dtype)), exact) < FLOAT8_TOLERANCE


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["equal pages", "shared pages", "mixed"])
def test_adapters_gradients(model: Phi3VForCausalLM, kind: str, use_dora: bool) -> None:
    """On a bf16 base: the columns of B lie beside the weights, and W's memory is theirs."""
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=LORA + "|lm_head", use_dora=use_dora)
    wrapped = freeze_unused(get_peft_model(model, settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.9, 1.1)
        elif "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    pack = pack_of(kind, model.config)
    exact = gradients(wrapped, lambda: separate(wrapped, pack))
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    for compute in (Compute(), Compute(accumulates_in_place=True), Compute(checkpointing="full")):
        model.compute = compute
        found = gradients(wrapped, lambda: packed_loss(wrapped, pack, torch.bfloat16))
        assert relative(found, exact) < TOLERANCE[torch.bfloat16], compute
    model.compute = Compute(fp8=True)
    found = gradients(wrapped, lambda: packed_loss(wrapped, pack, torch.bfloat16))
    assert relative(found, exact) < FLOAT8_TOLERANCE


def test_more_shapes_than_plans(model: Phi3VForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash and powers of two give what cuDNN's own plans give."""
    pack = pack_of("shared pages", model.config)
    planned = gradients(model, lambda: packed_loss(model, pack, torch.bfloat16))
    monkeypatch.setattr(packed_attention, "MOST_PLANS", 0)
    monkeypatch.setattr(packed_attention, "_planned_shapes", {True: set(), False: set()})
    assert relative(gradients(model, lambda: packed_loss(model, pack, torch.bfloat16)), planned) < 1e-2
