"""A decoder in 4 bit: which layers, which numbers, and that they stay what they are."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3v.errors import CheckpointError, ConfigError
from phi3v.model.checkpoint import load_four_bit_model, load_model
from phi3v.model.four_bit import BLOCK, require_four_bit

bitsandbytes = pytest.importorskip("bitsandbytes")
Linear4bit: Any = bitsandbytes.nn.Linear4bit

IDS = torch.tensor([[1, 32010, 29871, 13, 1170, 8, 777]])


def nf4_code() -> torch.Tensor:
    """The 16 values of nf4: quantiles of the normal distribution, 8 above zero and 7 below, scaled to [-1, 1].

    Source: Dettmers et al. 2023, section 3 and appendix E.
    """
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (values / values.max()).float()


def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Every block of 64 numbers in row-major order, scaled by its largest, rounded to the nearest of the 16 values."""
    blocks = weight.flatten().view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    code = nf4_code()
    nearest = (blocks / scales).unsqueeze(-1).sub(code).abs().argmin(dim=-1)
    return (code[nearest] * scales).view(weight.shape)


def dequantised(layer: Any) -> torch.Tensor:
    """What the layer multiplies with: its product with the identity."""
    with torch.no_grad():
        product = layer(torch.eye(layer.in_features, dtype=layer.compute_dtype)).T.float()
        return product if layer.bias is None else product - layer.bias[:, None]


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).norm() / right.float().norm())


CLIP = "model.vision_embed_tokens.img_processor.vision_model.encoder.layers"
LINEAR_LAYERS = {
    "vision": {
        f"{CLIP}.{layer}.{name}"
        for layer in range(3)
        for name in (*(f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    },
    "projector": {f"model.vision_embed_tokens.img_projection.{number}" for number in (0, 2)},
    "decoder": {
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    },
}


@pytest.mark.parametrize("parts", [["decoder"], ["vision"], ["projector", "vision", "decoder"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parts_linear_layers_and_no_others_are_in_4_bit(wide_dir: Path, dtype: str, parts: list[str]) -> None:
    model = load_four_bit_model(wide_dir, dtype=dtype, parts=parts)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert found.keys() == set().union(*(LINEAR_LAYERS[part] for part in parts))
    for layer in found.values():
        assert layer.compute_dtype == getattr(torch, dtype)
        assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.blocksize == BLOCK
        assert layer.weight.quant_state.nested, "the scales are quantised too"
    plain = load_model(wide_dir, dtype=dtype).state_dict()
    others = [name for name, _ in model.named_parameters() if name.removesuffix(".weight") not in found]
    assert len(others) == len(plain) - len(found)
    assert all(torch.equal(model.get_parameter(name), plain[name]) for name in others)


def test_the_weights_are_nf4_of_the_base(wide_dir: Path) -> None:
    """A relative error of 0.09; the scales' own 8 bits add 0.003."""
    model = load_four_bit_model(wide_dir, dtype="float32", parts=LINEAR_LAYERS)
    base = load_file(wide_dir / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = base[f"{name}.weight"]
            assert difference(dequantised(layer), rounded_to_nf4(weight)) < 0.01, name
            assert 0.08 < difference(dequantised(layer), weight) < 0.11, name


@torch.no_grad()
def test_a_forward_pass_equals_the_rounded_base_before_and_after_an_evaluation(wide_dir: Path) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes would rearrange the weights at the first pass in evaluation mode."""
    model, rounded = load_four_bit_model(wide_dir, dtype="float32"), load_model(wide_dir)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            rounded.get_submodule(name).weight.copy_(dequantised(layer.train()))
    expected = rounded(IDS).logits
    in_training = model.train()(IDS).logits
    in_evaluation = [model.eval()(IDS).logits for _ in range(2)]
    for logits in (in_training, *in_evaluation, model.train()(IDS).logits):
        assert difference(logits, expected) < 1e-5
    assert 0.05 < difference(in_training, load_model(wide_dir)(IDS).logits) < 0.5


def test_every_load_gives_the_same_bits(wide_dir: Path) -> None:
    one, other = (load_four_bit_model(wide_dir, dtype="bfloat16").state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_layers_that_the_cpu_kernels_get_wrong_are_refused(tiny_dir: Path) -> None:
    """Rows of 32 and 48 numbers, and blocks of 64."""
    with pytest.raises(ConfigError, match=r"multiples of 64; model\.layers\.0\.self_attn\S+ of this model has rows of"):
        load_four_bit_model(tiny_dir, dtype="float32")
    with pytest.raises(ConfigError, match="or take vision out of four_bit_parts"):
        load_four_bit_model(tiny_dir, dtype="float32", parts=["vision"])


def test_a_missing_package_is_named(wide_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r'pip install "phi3v\[qlora\]"'):
        load_four_bit_model(wide_dir, dtype="float32")


def test_a_package_that_does_not_work_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_binary(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no binary for CUDA 99")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", no_binary)
    with pytest.raises(ConfigError, match="bitsandbytes does not work on cpu: no binary for CUDA 99"):
        require_four_bit("cpu")


def test_a_folder_that_lacks_a_tensor_is_refused(wide_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wide_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lack 1 of the model's tensors, such as model\.layers\.1\.mlp\.down_proj"
    ):
        load_four_bit_model(folder, dtype="float32")
