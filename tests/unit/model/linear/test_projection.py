"""One projection against PEFT's own layers: output and every gradient, whatever the base, the adapters, the dropout."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from phi3v.errors import ConfigError
from phi3v.model.linear import dora, products
from phi3v.model.linear.dora import row_norms, set_magnitudes_to_norms
from phi3v.model.linear.float8 import Float8Compute
from phi3v.model.linear.products import ProjectionCompute
from phi3v.model.linear.projection import Projection

WIDTH, SEED = 64, 3

ROWS = [7, 70]
"""Fewer and more than the width: outputs are scaled in the one case, weights in the other."""

COMPUTE = ProjectionCompute(accumulates_in_place=False, keeps_copies=True)

KINDS: dict[str, tuple[list[int], bool]] = {"one layer": ([48], False), "three with biases": ([32, 32, 32], True)}
"""Outputs of the layers that read one input, and whether they have biases: the decoder's and CLIP's kind."""


class GivenDropout(nn.Dropout):
    """Drops what the projection drops: every layer's adapter the same numbers, for they read the same input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(SEED)) >= self.p
        return x * kept / (1 - self.p)


def make_layers(kind: str, base: str, targets: str = ".*", **settings: Any) -> nn.ModuleDict:
    """Layers with random adapters of PEFT's; with DoRA every row has another length than its weights'."""
    outputs, has_bias = KINDS[kind]
    torch.manual_seed(0)
    layers: Any = nn.ModuleDict({f"l{number}": nn.Linear(WIDTH, out, has_bias) for number, out in enumerate(outputs)})
    layers.requires_grad_(False)
    if base == "4 bit":
        layers = in_four_bit(layers)
    elif base == "16 bit":
        layers = layers.bfloat16()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **settings}
    get_peft_model(layers, LoraConfig(**settings))
    for name, parameter in layers.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        elif "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    for layer in layers.values():
        if isinstance(layer, LoraLayer) and isinstance(layer.lora_dropout["default"], nn.Dropout):
            layer.lora_dropout["default"] = GivenDropout(layer.lora_dropout["default"].p)
    return layers.train()


def in_four_bit(layers: nn.ModuleDict) -> nn.ModuleDict:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, layer in list(layers.items()):
        options = {"bias": layer.bias is not None, "compute_dtype": torch.float32, "quant_type": "nf4"}
        quantised = bitsandbytes.nn.Linear4bit(WIDTH, layer.out_features, **options)
        quantised.load_state_dict(layer.state_dict())
        layers[name] = quantised.to("cpu").requires_grad_(False)
        quantised.support_avx512bf16_for_cpu = False
    layers.is_loaded_in_4bit = True  # pyright: ignore
    return layers


def collect(layers: nn.ModuleDict, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": x, **{name: p for name, p in layers.named_parameters() if p.requires_grad}}


def by_peft(layers: nn.ModuleDict, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PEFT's own forward and autograd's backward."""
    x = x.clone().requires_grad_()
    y = torch.cat([layer(x) for layer in layers.values()], dim=1)
    learning = collect(layers, x)
    return y.detach(), dict(zip(learning, torch.autograd.grad(y, list(learning.values()), grad), strict=True))


def by_hand(
    layers: nn.ModuleDict,
    x: torch.Tensor,
    grad: torch.Tensor,
    compute: ProjectionCompute = COMPUTE,
    *,
    has_room: bool = True,
    is_filled: bool = False,
    is_output_kept: bool = False,
    projection: Projection | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    projection = projection or Projection(list(layers.values()), has_room=has_room)
    buffer = projection.buffer(len(x), x)
    buffer[:, :WIDTH] = x
    y = projection.forward(buffer, compute, SEED)
    if not is_filled:
        buffer[:, WIDTH:] = float("nan")
    gradients: dict[torch.Tensor, torch.Tensor] = {}
    output = y if is_output_kept else None
    grad_x = projection.backward(buffer, grad, compute, gradients, seed=SEED, is_filled=is_filled, output=output)
    assert grad_x.stride(1) == 1 and (projection.room or grad_x.is_contiguous()), "cuDNN's attention reads it wrong"
    learning = collect(layers, x)
    assert projection.parameters and {id(one) for one in projection.parameters} == {id(one) for one in gradients}
    return y, {"x": grad_x, **{name: gradients[one] for name, one in learning.items() if name != "x"}}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the tensors' relative differences."""
    assert found.keys() == expected.keys() and len(found) > 2
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in found)


def inputs(kind: str, rows: int = ROWS[0]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, sum(KINDS[kind][0]), generator=generator)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["32 bit", "4 bit"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_pefts(
    kind: str,
    rows: int,
    base: str,
    use_dora: bool,
    dropout: float,
    use_rslora: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32: within 1e-5. 4-bit layers compute in float32 here."""
    monkeypatch.setattr(products, "ROWS_A_SUM", 32)
    layers = make_layers(kind, base, use_dora=use_dora, lora_dropout=dropout, use_rslora=use_rslora)
    x, grad = inputs(kind, rows)
    expected, gradients = by_peft(layers, x, grad)
    for has_room in (True, False):
        for is_filled in (True, False):
            for is_output_kept in (True, False):
                for keeps_copies in (True, False):
                    compute = ProjectionCompute(accumulates_in_place=False, keeps_copies=keeps_copies)
                    y, found = by_hand(
                        layers, x, grad, compute,
                        has_room=has_room, is_filled=is_filled, is_output_kept=is_output_kept,
                    )  # fmt: skip
                    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
                    assert largest_error(found, gradients) < 1e-5
    scaling = layers["l0"].scaling["default"]
    assert scaling == pytest.approx(6 / (math.sqrt(4) if use_rslora else 4))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_on_16_bit_weights_stays_near_the_exact_result(kind: str, dropout: float, rows: int) -> None:
    """bf16 has 8 bits: 2 % of every gradient, where the base's own numbers are those of the reference."""
    layers = make_layers(kind, "16 bit", use_dora=True, lora_dropout=dropout)
    x, grad = (one.bfloat16().float() for one in inputs(kind, rows))
    y, found = by_hand(layers, x.bfloat16(), grad.bfloat16())
    assert y.dtype == torch.bfloat16
    magnitudes = [p for name, p in layers.named_parameters() if "magnitude" in name]
    assert {p.dtype for p in magnitudes} == {found["l0.lora_magnitude_vector.default.weight"].dtype} == {torch.float32}
    expected, gradients = by_peft(layers.float(), x, grad)
    assert largest_error({"y": y, **found}, {"y": expected, **gradients}) < 0.02


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_copies_that_are_not_kept_come_back_whole(dropout: float, use_dora: bool) -> None:
    """Bit for bit, in 16 bit of float32 weights; memory that is let go of is often given out again at once."""
    layers = make_layers("one layer", "32 bit", use_dora=use_dora, lora_dropout=dropout)
    x, grad = (one.bfloat16() for one in inputs("one layer", ROWS[1]))
    expected = by_hand(layers, x, grad)
    projection = Projection(list(layers.values()))
    compute = ProjectionCompute(accumulates_in_place=False, keeps_copies=False)
    for _ in range(5):
        y, found = by_hand(layers, x, grad, compute, projection=projection)
        assert torch.equal(y, expected[0])
        assert all(torch.equal(found[name], one) for name, one in expected[1].items())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_in_float8_stays_near(kind: str, dropout: float) -> None:
    """3 bits of fraction forward, 2 backward: 15 % of every gradient, and not equal."""
    layers = make_layers(kind, "32 bit", use_dora=True, lora_dropout=dropout)
    x, grad = inputs(kind, ROWS[1])
    expected, gradients = by_peft(layers, x, grad)
    y, found = by_hand(layers, x, grad, Float8Compute(accumulates_in_place=False, keeps_copies=True))
    assert 0.005 < largest_error({"y": y, **found}, {"y": expected, **gradients}) < 0.15


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layers_without_an_adapter_beside_such_with_dora(dropout: float, rows: int) -> None:
    kind = "three with biases"
    layers = make_layers(kind, "32 bit", targets="l0|l2", use_dora=True, lora_dropout=dropout)
    x, grad = inputs(kind, rows)
    expected, gradients = by_peft(layers, x, grad)
    y, found = by_hand(layers, x, grad)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert largest_error(found, gradients) < 1e-5


def change_every_adapter_by_fused_steps(layers: nn.ModuleDict) -> None:
    """Torch's fused optimizers change weights without counting their version up."""
    learning = [one for one in layers.parameters() if one.requires_grad]
    for one in learning:
        one.grad = torch.randn_like(one)
    torch.optim.AdamW(learning, lr=0.05, fused=True).step()


def replace_every_tensor(layers: nn.ModuleDict) -> None:
    """As what shards a model does: the module gets another parameter, with other numbers in it."""
    for module in layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            changed = parameter.detach() * 1.1 if parameter.requires_grad else parameter.detach().clone()
            setattr(module, name, nn.Parameter(changed, requires_grad=parameter.requires_grad))


@pytest.mark.parametrize("change", [change_every_adapter_by_fused_steps, replace_every_tensor])
def test_changed_adapters_are_seen(change: Any) -> None:
    kind = "three with biases"
    layers = make_layers(kind, "32 bit", use_dora=True)
    projection = Projection(list(layers.values()))
    x, grad = inputs(kind, ROWS[1])
    before, _ = by_hand(layers, x, grad, projection=projection)
    change(layers)
    expected, gradients = by_peft(layers, x, grad)
    y, found = by_hand(layers, x, grad, projection=projection)
    assert (expected - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert largest_error(found, gradients) < 1e-5


def test_rows_are_measured_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where copies of weights are not kept."""
    layers = make_layers("one layer", "32 bit", use_dora=True)
    projection = Projection(list(layers.values()), has_room=False)
    calls: list[int] = []
    monkeypatch.setattr(dora, "row_norms", lambda *args: calls.append(1) or row_norms(*args))
    compute = ProjectionCompute(accumulates_in_place=False, keeps_copies=False)
    x, grad = inputs("one layer")
    for steps in (1, 2):
        for _ in range(3):
            by_hand(layers, x, grad, compute, projection=projection)
        assert len(calls) == steps
        change_every_adapter_by_fused_steps(layers)


def test_row_norms_are_those_of_the_adapted_weights() -> None:
    """More rows than are taken at once; one that the adapter undoes to a thousandth keeps its digits."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(2500, 16), torch.randn(3, 16), torch.randn(2500, 3)
    b[7], a[0], weight[7] = torch.tensor([1.0, 0.0, 0.0]), torch.randn(16), 0
    weight[7] = -0.999 * 2 * a[0]
    exact = torch.linalg.vector_norm(weight.double() + 2 * b.double() @ a.double(), dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, 2.0).double(), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(row_norms(weight[:7], a, b[:7], 2.0).double(), exact[:7], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("base", ["32 bit", "16 bit", "4 bit"])
def test_dora_starts_as_the_base(base: str, rows: int) -> None:
    """Bit for bit. PEFT's own magnitudes of 16-bit weights are rounded to 16 bit, and so is the model then."""
    layers = make_layers("one layer", base, use_dora=True, init_lora_weights=True)
    for name, parameter in layers.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    x, _ = inputs("one layer", rows)
    x = x.bfloat16() if base == "16 bit" else x
    compute: Sequence[Projection] = [Projection([own]) for own in (layers["l0"], layers["l0"].get_base_layer())]
    buffers = [one.buffer(rows, x) for one in compute]
    for buffer in buffers:
        buffer[:, :WIDTH] = x

    def outputs() -> list[torch.Tensor]:
        return [one.forward(buffer, COMPUTE) for one, buffer in zip(compute, buffers, strict=True)]

    adapted, plain = outputs()
    assert not torch.allclose(adapted, plain)
    set_magnitudes_to_norms(layers)
    adapted, plain = outputs()
    assert torch.equal(adapted, plain)


@pytest.mark.parametrize(
    "settings",
    [{"lora_bias": True}, {"use_dora": True, "requires_grad": True}, {"two": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_computed_is_refused(settings: dict[str, Any]) -> None:
    two, trains_base = settings.pop("two", False), settings.pop("requires_grad", False)
    layers = make_layers("three with biases", "32 bit", **settings)
    if two:
        layers["l0"].update_layer("other", 2, 2, config=LoraConfig(r=2))
        layers["l0"].set_adapter(["default", "other"])
    if trains_base:
        layers["l0"].get_base_layer().weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"one LoRA or DoRA adapter a layer|freeze them"):
        by_hand(layers, *inputs("three with biases"))
