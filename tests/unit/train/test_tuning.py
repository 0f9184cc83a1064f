import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import Trainer

from phi3v.config import TrainConfig
from phi3v.errors import ConfigError
from phi3v.model.checkpoint import load_four_bit_model, load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import part_of
from phi3v.train.tuning import (
    choose_precision,
    parameter_groups,
    select_trainable,
    undecayed_names,
    wrap_lora,
)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", output_dir=Path("r"), train_data=[Path("t.jsonl")], **changes)


def trainable_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


UNUSED = ("encoder.layers.2.", "post_layernorm")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {"vision", "projector", "decoder", "embeddings", "head"}),
        ({"method": "frozen_vision"}, {"decoder", "embeddings", "head"}),
        ({"freeze": ["embeddings", "vision"]}, {"projector", "decoder", "head"}),
        ({"method": "lora"}, set()),
        ({"method": "qlora"}, set()),
    ],
)
def test_whole_parts_train_but_for_the_layers_that_nothing_computes(
    tiny_model: Phi3VForCausalLM, changes: dict[str, Any], parts: set[str]
) -> None:
    select_trainable(tiny_model, config(**changes))
    expected = {
        name
        for name, _ in tiny_model.named_parameters()
        if part_of(name) in parts and not (part_of(name) == "vision" and any(word in name for word in UNUSED))
    }
    assert trainable_names(tiny_model) == expected
    assert {part_of(name) for name in expected} == parts


def test_adapters_stand_on_every_linear_layer_that_is_computed(tiny_model: Phi3VForCausalLM) -> None:
    linear = {
        name
        for name, module in tiny_model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(word in name for word in UNUSED)
    }
    settings = config(method="lora", lora_rank=2)
    select_trainable(tiny_model, settings)
    wrapped = wrap_lora(tiny_model, settings)
    expected = {f"base_model.model.{name}.lora_{side}.default.weight" for name in linear for side in "AB"}
    assert trainable_names(wrapped) == expected
    assert len(linear) == 2 * 6 + 2 + 2 * 4 + 1


def test_adapters_stand_where_lora_parts_says(tiny_model: Phi3VForCausalLM) -> None:
    settings = config(method="lora", lora_parts=["decoder", "projector"])
    wrapped = wrap_lora(tiny_model, settings)
    assert {part_of(name) for name in trainable_names(wrapped)} == {"decoder", "projector"}


def test_adapters_are_float32_on_16_bit_weights_and_start_by_the_seed(tiny_model: Phi3VForCausalLM) -> None:
    torch.manual_seed(3)
    wrapped = wrap_lora(tiny_model.to(torch.bfloat16), config(method="lora", lora_rank=4))
    adapters = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}
    assert all(bool((parameter == 0).all()) == ("lora_B" in name) for name, parameter in adapters.items())
    spread = adapters["base_model.model.lm_head.lora_A.default.weight"].std().item()
    assert spread == pytest.approx(1 / 4, rel=0.3), "gaussian A has a standard deviation of 1 / rank"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_adds_the_length_of_every_row(tiny_model: Phi3VForCausalLM, dtype: torch.dtype) -> None:
    """In float32 and exact, also of 16-bit weights, whose lengths PEFT rounds to 16 bit."""
    plain = trainable_names(wrap_lora(copy.deepcopy(tiny_model), config(method="lora", lora_rank=2)))
    settings = config(method="lora", lora_rank=2, use_dora=True)
    select_trainable(tiny_model, settings)
    wrapped = wrap_lora(tiny_model.to(dtype), settings)
    magnitudes = {name for name in trainable_names(wrapped) if "lora_magnitude_vector" in name}
    assert trainable_names(wrapped) - magnitudes == plain and len(magnitudes) == len(plain) / 2
    for name in magnitudes:
        layer = wrapped.get_submodule(name.removesuffix(".lora_magnitude_vector.default.weight"))
        own, lengths = wrapped.get_parameter(name), layer.get_base_layer().weight.float().norm(dim=1)  # pyright: ignore
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.data, lengths, rtol=1e-6, atol=0)
    assert undecayed_names(wrapped) >= magnitudes, "decay would take them to zero, not to the base"
    groups = parameter_groups(wrapped, settings)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.01]


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 12 / 9), (True, 12 / 3)])
def test_adapters_are_scaled_by_the_rank_or_its_root(
    tiny_model: Phi3VForCausalLM, use_rslora: bool, scaling: float
) -> None:
    wrapped = wrap_lora(tiny_model, config(method="lora", lora_rank=9, lora_alpha=12, use_rslora=use_rslora))
    found = [module.scaling["default"] for module in wrapped.modules() if isinstance(module, LoraLayer)]
    assert found == pytest.approx([scaling] * 23)


def test_adapters_on_4_bit_layers_are_those_of_lora(wide_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wrapped = []
    for method, load in (("lora", load_model), ("qlora", load_four_bit_model)):
        settings = config(method=method, lora_rank=2)
        model = load(wide_dir, dtype="bfloat16")
        assert isinstance(model, Phi3VForCausalLM)
        select_trainable(model, settings)
        torch.manual_seed(3)
        wrapped.append(wrap_lora(model, settings))
    lora, qlora = ({name: p for name, p in model.named_parameters() if p.requires_grad} for model in wrapped)
    assert lora.keys() == qlora.keys()
    assert {parameter.dtype for parameter in qlora.values()} == {torch.float32}
    assert all(torch.equal(qlora[name], parameter) for name, parameter in lora.items())


def test_embeddings_take_no_adapters(tiny_model: Phi3VForCausalLM) -> None:
    with pytest.raises(ConfigError, match="embeddings"):
        wrap_lora(tiny_model, config(method="lora", lora_parts=["embeddings", "decoder"]))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weight_decay_follows_trainer(tiny_model: Phi3VForCausalLM, method: str) -> None:
    settings = config(method=method)
    select_trainable(tiny_model, settings)
    model = wrap_lora(tiny_model, settings) if method == "lora" else tiny_model
    everything = {name for name, _ in model.named_parameters()}
    decayed = Trainer.get_decay_parameter_names(cast(Trainer, None), model)
    assert everything - undecayed_names(model) == set(decayed)


def test_every_trainable_parameter_has_one_group_with_its_rates(tiny_model: Phi3VForCausalLM) -> None:
    settings = config(freeze=["embeddings"], learning_rate=1e-3, part_learning_rates={"vision": 1e-5}, weight_decay=0.1)
    select_trainable(tiny_model, settings)
    groups = parameter_groups(tiny_model, settings)
    assert groups[0]["lr"] == 1e-3, "the rate that logs show"
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert found.keys() == trainable_names(tiny_model)
    for name, group in found.items():
        assert group["lr"] == (1e-5 if part_of(name) == "vision" else 1e-3)
        assert group["weight_decay"] == (0.0 if "norm" in name or "layrnorm" in name or name.endswith("bias") else 0.1)


@pytest.mark.parametrize(
    ("precision", "method", "expected"),
    [
        ("auto", "full", ("fp32", "float32")),
        ("fp32", "lora", ("fp32", "float32")),
        ("bf16", "full", ("bf16", "float32")),
        ("bf16", "frozen_vision", ("bf16", "float32")),
        ("bf16", "lora", ("bf16", "bfloat16")),
        ("fp32", "qlora", ("fp32", "float32")),
        ("bf16", "qlora", ("bf16", "bfloat16")),
    ],
)
def test_trained_weights_stay_float32(precision: str, method: str, expected: tuple[str, str]) -> None:
    chosen = choose_precision(config(precision=precision, method=method), "cpu")
    assert (chosen.name, chosen.weights) == expected


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_float8_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_refused: bool
) -> None:
    """What torch tells of the GPU is put in its place: there is none here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    with pytest.raises(ConfigError, match="A GPU has no float8") if is_refused else nullcontext():
        choose_precision(config(precision="fp32", fp8=True), "cuda")
    choose_precision(config(precision="fp32"), "cuda")
    choose_precision(config(precision="fp32", fp8=True), "cpu")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_precision(config(precision="fp16"), "cpu")
