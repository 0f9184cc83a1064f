"""What the published implementation gave on a tiny model, recorded in ``tests/golden``.

The recordings were made in float32 with eager attention; ours must agree in float32 with both kernels.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from phi3v.model.checkpoint import load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
IMAGE_CASES: list[dict[str, Any]] = json.loads((GOLDEN / "image_processing.json").read_text())
ATTENTION = ("sdpa", "eager")

PIXEL_TOLERANCE = 1e-6
"""Absolute, on normalised pixels of magnitude 2: a few float32 roundings."""

MOMENT_TOLERANCE = 1e-5
"""Absolute, on means and standard deviations of up to 6 million float32 pixels."""

LOGITS_TOLERANCE = 1e-5
"""Absolute, on logits of magnitude 2, after 3 + 4 float32 layers and up to 2,536 positions."""

LOSS_TOLERANCE = 5e-6
"""Absolute, on losses of 10."""

GRADIENT_TOLERANCE = 5e-5
"""Relative, on gradient norms; below ``GRADIENT_NOISE`` a norm is rounding noise (CLIP's key biases have none)."""

GRADIENT_NOISE = 1e-8


@cache
def the_processor() -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(GOLDEN)


@cache
def the_model(attention: str) -> Phi3VForCausalLM:
    model = load_model(GOLDEN, attention=attention, dtype="float32")
    assert isinstance(model, Phi3VForCausalLM)
    return model


@cache
def recorded() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


def encode(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the model's inputs for prompt and answer, and the labels."""
    processor = the_processor()
    images = [Image.open(GOLDEN / name) for name in case["images"]]
    inputs = dict(processor(case["prompt"], images, num_crops=case["num_crops"]))
    answer = torch.tensor([processor.encode(case["answer"], add_bos=False)])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs, labels


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: f"{Path(case['image']).stem}-{case['num_crops']}")
def test_pixels(case: dict[str, Any]) -> None:
    image = Image.open(GOLDEN / case["image"])
    image_processor = the_processor().image_processor
    features = image_processor(image, num_crops=case["num_crops"])
    pixels = features["pixel_values"][0]

    assert features["image_sizes"].tolist() == [case["image_size"]]
    assert features["num_img_tokens"] == [case["num_img_tokens"]]
    assert image_processor.image_token_count(image.height, image.width, case["num_crops"]) == case["from_size"]
    assert pixels.shape == (case["used_crops"], 3, 336, 336)
    for moments, of in ((case["mean"], torch.Tensor.mean), (case["std"], torch.Tensor.std)):
        ours = [of(pixels).item(), of(pixels[0]).item()]
        assert ours == pytest.approx(moments, abs=MOMENT_TOLERANCE)
    for *place, value in case["samples"]:
        assert pixels[tuple(place)].item() == pytest.approx(value, abs=PIXEL_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_token_ids_and_labels(name: str) -> None:
    inputs, labels = encode(CASES[name])
    published = recorded()[f"{name}.input_ids"]
    is_image = published < 0
    image_token_id = the_model("sdpa").config.image_token_id

    assert inputs["input_ids"].shape[1] == CASES[name]["seq_len"]
    torch.testing.assert_close(inputs["input_ids"], published.masked_fill(is_image, image_token_id))
    torch.testing.assert_close(labels, recorded()[f"{name}.labels"])
    if "image_sizes" in inputs:
        images = the_model("sdpa").model.images_of_rows(inputs["input_ids"], inputs["image_sizes"])
        assert images == [list(range(-int(published.min())))]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name: str, attention: str) -> None:
    case = CASES[name]
    inputs, labels = encode(case)
    model = the_model(attention)
    model.zero_grad()
    outputs = model(**inputs, labels=labels, use_cache=False)
    tail = recorded()[f"{name}.logits_tail"]

    torch.testing.assert_close(outputs.logits[0, -len(tail) :, ::16], tail, atol=LOGITS_TOLERANCE, rtol=0)
    assert outputs.loss.item() == pytest.approx(case["loss"], abs=LOSS_TOLERANCE)
    if "grad_norms" not in case:
        return
    outputs.loss.backward()
    ours = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(case["grad_norms"])
    assert ours == pytest.approx(case["grad_norms"], rel=GRADIENT_TOLERANCE, abs=GRADIENT_NOISE)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "greedy" in case])
def test_greedy_tokens(name: str, attention: str) -> None:
    """Recorded without a cache; taken with one here."""
    case = CASES[name]
    inputs = the_processor()(
        case["prompt"], [Image.open(GOLDEN / image) for image in case["images"]], num_crops=case["num_crops"]
    )
    output = the_model(attention).generate(**inputs, max_new_tokens=len(case["greedy"]), do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy"]


def test_file_holds_exactly_the_models_tensors() -> None:
    with safe_open(GOLDEN / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(the_model("sdpa").state_dict())
