"""The packed forward equals the padded one, question by question: loss and every gradient."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from safetensors.torch import load_file, save_file

from packs import Pack, Question
from phi3v.errors import ConfigError
from phi3v.model.checkpoint import load_four_bit_model, load_model
from phi3v.model.compute import Compute
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.linear.working_copies import announce_changed_weights
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed_forward import release_towers
from phi3v.model.parts import is_never_used

TOLERANCE = 2e-5
"""Relative, float32, sums in another order."""

LORA = "qkv_proj|o_proj|gate_up_proj|down_proj|lm_head|q_proj|k_proj|v_proj|out_proj|fc1|fc2|img_projection.(0|2)"


def mixed_pack(config: Phi3VConfig) -> Pack:
    """Text only, one image, two images, three questions on an image, two on a pair, an image shown twice."""
    return Pack(
        config,
        grids=[(1, 1), (1, 2), (2, 1)],
        stems=[
            [Question((0,), 9, 3), Question((0,), 4, 2), Question((0,), 12, 1)],
            [Question((1, 2), 5, 4), Question((1, 2), 6, 1)],
        ],
        wholes=[Question((), 7, 2), Question((1,), 8, 3), Question((2, 0), 5, 2)],
    )


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    value = loss()
    value.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return float(value.detach()), found


def separate_loss(model: Any, pack: Pack) -> torch.Tensor:
    losses = [model(**single, supervised_only=True, use_cache=False).loss for single in pack.padded()]
    return torch.stack(losses).sum()


def assert_same(model: Any, pack: Pack, reference: Any = None, tolerance: float = TOLERANCE) -> None:
    expected_loss, expected = gradients(reference or model, lambda: separate_loss(reference or model, pack))
    loss, found = gradients(model, lambda: model(packed=pack.packed()).loss)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        norm = expected[name].norm()
        assert (gradient - expected[name]).norm() <= tolerance * norm + 1e-7, name


@pytest.fixture
def trainable(tiny_model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    for name, parameter in tiny_model.named_parameters():
        parameter.requires_grad_(not is_never_used(name, tiny_model.config.vision_config.num_hidden_layers))
    return tiny_model.train()


def adapted(model: Phi3VForCausalLM, dropout: float = 0.0, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=rf".*\.({LORA})|lm_head", lora_dropout=dropout, **changes)
    wrapped = get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.9, 1.1)
        if f".layers.{model.config.vision_config.num_hidden_layers - 1}." in name and "vision_model" in name:
            parameter.requires_grad_(False)
    return wrapped.train()


def test_loss_and_gradients_are_those_of_separate_questions(trainable: Phi3VForCausalLM) -> None:
    assert_same(trainable, mixed_pack(trainable.config))


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
@pytest.mark.parametrize("in_place", [False, True])
def test_choices_of_compute_change_nothing(trainable: Phi3VForCausalLM, checkpointing: Any, in_place: bool) -> None:
    trainable.compute = Compute(checkpointing=checkpointing, accumulates_in_place=in_place)
    assert_same(trainable, mixed_pack(trainable.config))


@pytest.mark.parametrize("adapters", [None, "lora", "dora"])
def test_gradients_of_several_packs_add_up_in_place(trainable: Phi3VForCausalLM, adapters: str | None) -> None:
    pack = mixed_pack(trainable.config).packed()
    model = adapted(trainable, use_dora=adapters == "dora") if adapters else trainable
    _, once = gradients(model, lambda: model(packed=pack).loss)
    trainable.compute = Compute(accumulates_in_place=True)
    model.zero_grad()
    for _ in range(3):
        model(packed=pack).loss.backward()
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 3 * once[name], rtol=1e-4, atol=1e-6)


def test_a_weight_changed_between_packs_is_seen(trainable: Phi3VForCausalLM) -> None:
    """Torch's fused optimizers change weights without counting their version up."""
    pack = mixed_pack(trainable.config)
    optimizer = torch.optim.AdamW([one for one in trainable.parameters() if one.requires_grad], lr=1e-2, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        trainable(packed=pack.packed()).loss.backward()
    optimizer.step()
    fresh = copy.deepcopy(trainable)
    with torch.autocast("cpu", torch.bfloat16):
        assert trainable(packed=pack.packed()).loss == fresh(packed=pack.packed()).loss


def test_frozen_vision(trainable: Phi3VForCausalLM) -> None:
    trainable.model.vision_embed_tokens.requires_grad_(False)
    assert_same(trainable, mixed_pack(trainable.config))


def test_frozen_decoder_and_embeddings(trainable: Phi3VForCausalLM) -> None:
    trainable.requires_grad_(False)
    trainable.model.vision_embed_tokens.img_projection.requires_grad_(True)
    assert_same(trainable, mixed_pack(trainable.config))


def test_text_only(trainable: Phi3VForCausalLM) -> None:
    assert_same(trainable, Pack(trainable.config, grids=[], wholes=[Question((), 7, 2), Question((), 3, 1)]))


@pytest.mark.parametrize("mode", ["auto", "short", "long"])
def test_rope_factors_are_chosen_by_sequence(tiny_config: Phi3VConfig, mode: str) -> None:
    torch.manual_seed(0)
    config = Phi3VConfig.from_dict({**tiny_config.to_dict(), "original_max_position_embeddings": 30})
    config.rope_mode = mode
    model = Phi3VForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_never_used(name, config.vision_config.num_hidden_layers))
    pack = Pack(
        config,
        grids=[(1, 1), (1, 1)],
        stems=[[Question((0,), 20, 3), Question((0,), 18, 2)], [Question((1,), 5, 2), Question((1,), 9, 1)]],
        wholes=[Question((), 40, 2), Question((), 8, 2)],
    )
    assert_same(model, pack)


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_adapters(trainable: Phi3VForCausalLM, checkpointing: Any) -> None:
    wrapped = adapted(trainable)
    trainable.compute = Compute(checkpointing=checkpointing)
    assert_same(wrapped, mixed_pack(trainable.config))


@pytest.mark.parametrize("compute", [Compute(), Compute("selective"), Compute("full", accumulates_in_place=True)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_dora(trainable: Phi3VForCausalLM, compute: Compute, use_rslora: bool) -> None:
    wrapped = adapted(trainable, use_dora=True, use_rslora=use_rslora)
    trainable.compute = compute
    assert_same(wrapped, mixed_pack(trainable.config), tolerance=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("parts", [["decoder"], ["vision", "projector"]])
def test_adapters_on_layers_in_4_bit(wide_dir: Path, parts: list[str], use_dora: bool) -> None:
    """PEFT's own forward beside it computes from the same 4-bit weights."""
    pytest.importorskip("bitsandbytes")
    model = load_four_bit_model(wide_dir, dtype="float32", parts=parts)
    wrapped = adapted(model, use_dora=use_dora)
    assert_same(wrapped, mixed_pack(model.config))


def test_adapters_after_they_changed(trainable: Phi3VForCausalLM) -> None:
    wrapped = adapted(trainable, use_dora=True)
    pack = mixed_pack(trainable.config)
    optimizer = torch.optim.AdamW([one for one in wrapped.parameters() if one.requires_grad], lr=1e-2, fused=True)
    for _ in range(2):
        wrapped(packed=pack.packed()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(wrapped, pack)


@pytest.mark.parametrize("use_dora", [False, True])
def test_disabled_adapters_are_not_computed(trainable: Phi3VForCausalLM, use_dora: bool) -> None:
    pack = mixed_pack(trainable.config)
    plain = float(trainable(packed=pack.packed()).loss.detach())
    wrapped = adapted(trainable, use_dora=use_dora)
    assert float(wrapped(packed=pack.packed()).loss.detach()) != pytest.approx(plain, rel=1e-3)
    with wrapped.disable_adapter():
        assert float(wrapped(packed=pack.packed()).loss.detach()) == pytest.approx(plain, rel=1e-6)


def test_adapters_dropout_is_the_same_in_the_backward_pass(trainable: Phi3VForCausalLM) -> None:
    """The gradient is that of the function that the forward pass computed: by a central difference along it.

    DoRA's has no such function, as the rows' lengths count as constant: test_projection.py compares it with PEFT's.
    """
    wrapped = adapted(trainable, dropout=0.4)
    pack = mixed_pack(trainable.config).packed()
    step = 2e-5

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return wrapped(packed=pack).loss

    for checkpointing in ("off", "full"):
        trainable.compute = Compute(checkpointing=checkpointing)
        value, found = gradients(wrapped, loss)
        own = dict(wrapped.named_parameters())
        ends = []
        for way in (1, -2):
            with torch.no_grad():
                for name, gradient in found.items():
                    own[name] += way * step * gradient
                ends.append(float(loss()))
        with torch.no_grad():
            for name, gradient in found.items():
                own[name] += step * gradient
        slope = sum(float(gradient.pow(2).sum()) for gradient in found.values())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.01)
    torch.manual_seed(2)
    assert float(wrapped(packed=pack).loss.detach()) != pytest.approx(value, rel=1e-4)


def test_bf16_autocast_stays_near_float32(trainable: Phi3VForCausalLM) -> None:
    """bf16 has 8 bits: within 3 % of the float32 gradient, as the padded forward under autocast is."""
    pack = mixed_pack(trainable.config)
    _, exact = gradients(trainable, lambda: separate_loss(trainable, pack))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return trainable(packed=pack.packed()).loss

    _, found = gradients(trainable, loss)
    off = sum(float((found[name] - exact[name]).pow(2).sum()) for name in exact) ** 0.5
    assert off <= 0.03 * sum(float(one.pow(2).sum()) for one in exact.values()) ** 0.5


def test_features_at_hand_take_the_place_of_crops(trainable: Phi3VForCausalLM) -> None:
    pack = mixed_pack(trainable.config).packed()
    with torch.no_grad():
        rows = trainable.model.vision_embed_tokens(pack.crops, pack.grids)
        expected = trainable(packed=pack).loss
        pack.crops, pack.grids, pack.features = None, (), rows
        assert trainable(packed=pack).loss == pytest.approx(float(expected), rel=1e-5)


def test_dora_under_bf16_autocast_stays_near_float32(trainable: Phi3VForCausalLM) -> None:
    """On a bf16 base: within 3 % of the float32 gradient of the same numbers."""
    pack = mixed_pack(trainable.config)
    trainable.to(torch.bfloat16).to(torch.float32)
    wrapped = adapted(trainable, use_dora=True)
    _, exact = gradients(wrapped, lambda: separate_loss(wrapped, pack))
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return wrapped(packed=pack.packed()).loss

    _, found = gradients(wrapped, loss)
    assert found.keys() == exact.keys()
    for kind in ("lora_A", "lora_B", "lora_magnitude"):
        names = [name for name in exact if kind in name]
        off = sum(float((found[name] - exact[name]).pow(2).sum()) for name in names) ** 0.5
        assert off <= 0.03 * sum(float(exact[name].pow(2).sum()) for name in names) ** 0.5, kind


@pytest.mark.parametrize("adapters", [None, "lora", "dora"])
def test_float8_stays_near(trainable: Phi3VForCausalLM, adapters: str | None) -> None:
    """3 bits of fraction forward, 2 backward: within a quarter of the float32 gradient, and not equal to it."""
    model = adapted(trainable, use_dora=adapters == "dora") if adapters else trainable
    pack = mixed_pack(trainable.config).packed()
    exact_loss, exact = gradients(model, lambda: model(packed=pack).loss)
    trainable.compute = Compute(fp8=True)
    loss, found = gradients(model, lambda: model(packed=pack).loss)
    off = sum(float((found[name] - exact[name]).pow(2).sum()) for name in exact) ** 0.5
    off /= sum(float(one.pow(2).sum()) for one in exact.values()) ** 0.5
    assert loss == pytest.approx(exact_loss, rel=0.03)
    assert 1e-4 < off < 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 1}, "as many key and value heads"),
        ({"resid_pdrop": 0.1}, "no dropout"),
        ({"hidden_act": "gelu"}, "silu"),
    ],
)
def test_models_that_it_does_not_compute_are_refused(
    tiny_config: Phi3VConfig, changes: dict[str, Any], message: str
) -> None:
    model = Phi3VForCausalLM(Phi3VConfig.from_dict({**tiny_config.to_dict(), **changes}))
    pack = Pack(model.config, grids=[], wholes=[Question((), 7, 2)])
    with pytest.raises(ValueError, match=message):
        model(packed=pack.packed())


def test_float8_losses_follow_float32s(tiny_dir: Path) -> None:
    """Sixty steps on one pack: both fall to under a tenth, and never part by more than a fiftieth of the first loss."""
    curves = []
    for fp8 in (False, True):
        model = load_model(tiny_dir).train()
        assert isinstance(model, Phi3VForCausalLM)
        model.compute = Compute(fp8=fp8)
        pack = mixed_pack(model.config).packed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(packed=pack).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    exact, eighth = curves
    assert exact[-1] < exact[0] / 10 and eighth[-1] < exact[0] / 10
    assert max(abs(one - other) for one, other in zip(exact, eighth, strict=True)) < exact[0] / 50


# --- what changes between two packs


def switch_adapter(wrapped: Any) -> None:
    wrapped.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=r".*\.(qkv_proj|fc1)", use_dora=True))
    for name, parameter in wrapped.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.set_adapter("other")


def delete_the_first_adapter(wrapped: Any) -> None:
    switch_adapter(wrapped)
    wrapped.delete_adapter("default")


def halve_the_scaling(wrapped: Any) -> None:
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(0.5)


def swap_the_adapter(wrapped: Any) -> None:
    changed = {name: torch.randn_like(one) * 0.1 for name, one in wrapped.named_parameters() if "lora_" in name}
    settings = LoraConfig(**{**wrapped.peft_config["default"].to_dict(), "lora_alpha": 11})
    hotswap_adapter_from_state_dict(wrapped, changed, adapter_name="default", config=settings)


def replace_a_norm(wrapped: Any) -> None:
    layer = wrapped.get_base_model().model.layers[0]
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    layer.input_layernorm.weight.data *= 1.5


def replace_a_layer(wrapped: Any) -> None:
    layers = wrapped.get_base_model().model.layers
    layers[0] = copy.deepcopy(layers[0])
    for parameter in layers[0].parameters():
        parameter.data *= 1.2


def drop_a_layer(wrapped: Any) -> None:
    body = wrapped.get_base_model().model
    body.layers = body.layers[:-1]


def repeat_a_layer(wrapped: Any) -> None:
    layers = wrapped.get_base_model().model.layers
    layers.append(copy.deepcopy(layers[0]))


CHANGES = [
    switch_adapter,
    delete_the_first_adapter,
    halve_the_scaling,
    swap_the_adapter,
    replace_a_norm,
    replace_a_layer,
    drop_a_layer,
    repeat_a_layer,
]


@pytest.mark.parametrize(
    ("change", "use_dora"),
    [(change, False) for change in CHANGES] + [(change, True) for change in CHANGES if change is not swap_the_adapter],
)
def test_a_change_between_packs_is_seen(trainable: Phi3VForCausalLM, change: Any, use_dora: bool) -> None:
    """Adapters that PEFT switches, scales or swaps (it swaps none of DoRA's), and modules that are replaced."""
    wrapped = adapted(trainable, use_dora=use_dora)
    pack = mixed_pack(trainable.config)
    before = float(wrapped(packed=pack.packed()).loss.detach())
    change(wrapped)
    assert float(separate_loss(wrapped, pack).detach()) != pytest.approx(before, rel=1e-4)
    assert_same(wrapped, pack)


@pytest.mark.parametrize("is_packed_before", [False, True])
def test_merged_adapters_that_are_disabled_are_refused(trainable: Phi3VForCausalLM, is_packed_before: bool) -> None:
    """PEFT's own forward takes them out of the weights; the packed one would compute with them."""
    wrapped = adapted(trainable)
    pack = mixed_pack(trainable.config).packed()
    wrapped.merge_adapter()
    with torch.no_grad():
        if is_packed_before:
            wrapped(packed=pack)
        with wrapped.disable_adapter():
            with pytest.raises(ConfigError, match=r"call unmerge_adapter\(\) before disable_adapter"):
                wrapped(packed=pack)
            wrapped.unmerge_adapter()
            expected = separate_loss(wrapped, mixed_pack(trainable.config))
            assert float(wrapped(packed=pack).loss) == pytest.approx(float(expected), rel=1e-5)


def test_weights_written_past_torch_are_seen_once_that_is_said(trainable: Phi3VForCausalLM) -> None:
    """Copies in 16 bit of float32 weights: nothing about a tensor tells a write through ``.data``."""
    pack = mixed_pack(trainable.config).packed()
    with torch.autocast("cpu", torch.bfloat16):
        before = trainable(packed=pack).loss.detach()
        for parameter in trainable.model.layers.parameters():
            parameter.data.mul_(1.5)
        announce_changed_weights()
        after = trainable(packed=pack).loss.detach()
        fresh = copy.deepcopy(trainable)(packed=pack).loss.detach()
    assert after == fresh != before


def held_bytes() -> int:
    """Counts the bytes of all tensors that are alive."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_are_in_memory_once(trainable: Phi3VForCausalLM, dtype: torch.dtype) -> None:
    """Laid beside the adapters' columns they leave their former memory; counted by all tensors' bytes."""
    wrapped = adapted(trainable.to(dtype))
    pack = mixed_pack(trainable.config).packed()
    pack.crops = pack.crops.to(dtype)
    weights = sum(one.nbytes for name, one in wrapped.named_parameters() if ".layers." in name and "base_layer" in name)
    before = held_bytes()
    with torch.no_grad():
        wrapped(packed=pack)
    assert held_bytes() - before < weights / 3


def merged(wrapped: Any) -> Any:
    return wrapped.merge_and_unload()


def unloaded(wrapped: Any) -> Any:
    return wrapped.unload()


@pytest.mark.parametrize("result", [merged, unloaded])
def test_a_model_that_was_packed_is_saved_by_transformers(
    trainable: Phi3VForCausalLM, result: Any, tmp_path: Path
) -> None:
    wrapped = adapted(trainable)
    expected = {name: one.clone() for name, one in result(copy.deepcopy(wrapped)).state_dict().items()}
    with torch.no_grad():
        wrapped(packed=mixed_pack(trainable.config).packed())
    result(wrapped).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], one) for name, one in expected.items())


def test_weights_of_a_packed_model_are_written_by_safetensors(trainable: Phi3VForCausalLM, tmp_path: Path) -> None:
    """And share their memory with the parameters: what is read into them is read into the model."""
    wrapped = adapted(trainable)
    pack = mixed_pack(trainable.config).packed()
    with torch.no_grad():
        before = wrapped(packed=pack).loss
        state = wrapped.state_dict()
        save_file(state, tmp_path / "all.safetensors")
        parameters = dict(wrapped.named_parameters())
        assert all(state[name].data_ptr() == one.data_ptr() for name, one in parameters.items())
        assert wrapped(packed=pack).loss == before
    wrapped.get_base_model().save_pretrained(tmp_path / "base")


def test_released_towers_hold_nothing(trainable: Phi3VForCausalLM) -> None:
    wrapped = adapted(trainable)
    pack = mixed_pack(trainable.config).packed()
    held = []
    for _ in range(2):  # the first time rotations' frequencies are made, which stay
        with torch.no_grad():
            wrapped(packed=pack)
        held.append(held_bytes())
        release_towers(trainable.model)
        held.append(held_bytes())
    assert held[2] > held[3] == held[1]
    assert all(one.is_contiguous() for one in trainable.parameters())


def test_second_derivatives_are_refused(trainable: Phi3VForCausalLM) -> None:
    parameters = [trainable.model.layers[0].mlp.down_proj.weight, trainable.lm_head.weight]
    loss = trainable(packed=mixed_pack(trainable.config).packed()).loss
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.stack([one.pow(2).sum() for one in first]).sum().backward()


def test_float8_on_layers_in_4_bit_is_refused(wide_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_four_bit_model(wide_dir, dtype="float32")
    model.compute = Compute(fp8=True)
    with pytest.raises(ConfigError, match="fp8"):
        model(packed=mixed_pack(model.config).packed())


def test_norms_learn_alone(trainable: Phi3VForCausalLM) -> None:
    """Also the first one, in front of a projection that nothing else asks for its input's gradient."""
    for name, parameter in trainable.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "layer_norm" in name)
    assert_same(trainable, mixed_pack(trainable.config))
