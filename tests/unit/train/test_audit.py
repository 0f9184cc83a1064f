import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phi3v.config import TrainConfig
from phi3v.data.collate import PackCollator
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.packing import Load, MicroBatch
from phi3v.model.checkpoint import load_four_bit_model, load_model
from phi3v.model.compute import Compute
from phi3v.model.linear.projection import Projection
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.audit import Audit, audit
from phi3v.train.batches import TrainingSamples
from phi3v.train.tuning import Precision, select_trainable, wrap_lora
from training import TOKENS_PER_SIDE, write_training_data

FP32 = Precision("fp32", "float32")
Batches = dict[str, PackedBatch]


@pytest.fixture
def batches(processor: Phi3VProcessor, tmp_path: Path) -> Batches:
    """One sample without images and one with two."""
    dataset = ConversationDataset(write_training_data(tmp_path / "data") / "train.jsonl")
    collator = PackCollator(processor.image_token_id, tokens_per_side=TOKENS_PER_SIDE, short_positions=4096)
    samples = TrainingSamples(dataset, SampleEncoder(processor), collator)
    return {name: samples[MicroBatch(((index,),), Load())] for name, index in {"text": 0, "images": 2}.items()}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", output_dir=Path("r"), train_data=[Path("t.jsonl")], **changes)


def prepared(model: Phi3VForCausalLM, settings: TrainConfig) -> Any:
    select_trainable(model, settings)
    return wrap_lora(model, settings) if settings.trains_adapters else model


def parts(found: Audit) -> dict[str, Any]:
    return {part.part: part for part in found.parts}


def test_full_fine_tuning(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    found = audit(prepared(tiny_model, config()), batches["images"], config(), FP32)
    assert found.problems == ()
    found.require_trainable()
    for part in found.parts:
        assert part.gradient_norm is not None and part.gradient_norm > 0
        assert part.trainable == part.parameters - part.unused_by_design
        assert part.learning_rate == 4e-5 and part.lora_layers == 0
    assert sum(part.parameters for part in found.parts) == sum(p.numel() for p in tiny_model.parameters())
    last_layer = tiny_model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers[-1]
    assert parts(found)["vision"].unused_by_design == sum(p.numel() for p in last_layer.parameters()) + 2 * 32
    assert "vision" in found.table() and found.to_dict()["trainable"] == sum(part.trainable for part in found.parts)


def test_adapters_at_their_start_have_a_gradient_in_b_only_and_pass(
    tiny_model: Phi3VForCausalLM, batches: Batches
) -> None:
    settings = config(method="lora", lora_rank=2)
    model = prepared(tiny_model, settings)
    found = audit(model, batches["images"], settings, FP32)
    assert found.problems == ()
    layers = {name: (part.lora_layers, part.linear_layers) for name, part in parts(found).items()}
    assert layers == {"vision": (12, 12), "projector": (2, 2), "decoder": (8, 8), "embeddings": (0, 0), "head": (1, 1)}
    assert parts(found)["embeddings"].gradient_norm is None


def test_dora_and_rslora_are_counted_and_reached(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    settings = config(method="lora", lora_rank=4, lora_alpha=6, use_dora=True, use_rslora=True)
    plain = config(method="lora", lora_rank=4)
    lora = audit(prepared(copy.deepcopy(tiny_model), plain), batches["images"], plain, FP32)
    found = audit(prepared(tiny_model, settings), batches["images"], settings, FP32)
    assert found.problems == lora.problems == ()
    rows = {"vision": 2 * (5 * 32 + 48), "projector": 2 * 32, "decoder": 2 * (96 + 32 + 96 + 32), "head": 32064}
    for part in found.parts:
        without = parts(lora)[part.part]
        assert part.dora_layers == part.lora_layers == without.lora_layers and without.dora_layers == 0
        assert part.trainable - without.trainable == rows.get(part.part, 0)
        assert part.parameters == without.parameters and part.without_gradient == ()
        if part.should_learn:
            assert (part.adapter_scaling, without.adapter_scaling) == (6 / 2, 128 / 4)
    assert "12/12 DoRA" in found.table() and "DoRA" not in lora.table()


def test_adapters_of_another_kind_than_asked_for_are_named(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    """As if PEFT passed over a setting."""
    model = prepared(tiny_model, config(method="lora", lora_rank=4, lora_alpha=6, lora_parts=["decoder"]))
    asked = config(method="lora", lora_rank=4, lora_alpha=6, lora_parts=["decoder"], use_dora=True, use_rslora=True)
    scaled, without_magnitude = audit(model, batches["images"], asked, FP32).problems
    assert "decoder's adapters are scaled by 1.5, but lora_alpha, lora_rank and use_rslora ask for 3" in scaled
    assert "0 of decoder's 8 adapters have DoRA's magnitude, but use_dora is true" in without_magnitude


@pytest.mark.parametrize("tower", ["decoder", "vision"])
def test_a_magnitude_that_is_not_reached_is_named(
    tiny_model: Phi3VForCausalLM, batches: Batches, monkeypatch: pytest.MonkeyPatch, tower: str
) -> None:
    """The fault: the projections forget to give the magnitudes a gradient."""
    settings = config(method="lora", lora_rank=2, use_dora=True, lora_parts=[tower])
    model = prepared(tiny_model, settings)
    assert audit(model, batches["images"], settings, FP32).problems == ()
    magnitudes = [parameter for name, parameter in model.named_parameters() if "lora_magnitude_vector" in name]
    backward = Projection.backward

    def forgetful(self: Projection, x: Any, grad: Any, compute: Any, gradients: Any, **options: Any) -> Any:
        result = backward(self, x, grad, compute, gradients, **options)
        for magnitude in magnitudes:
            gradients.pop(magnitude, None)
        return result

    monkeypatch.setattr(Projection, "backward", forgetful)
    found = audit(model, batches["images"], settings, FP32)
    assert all("lora_magnitude_vector" in name for name in parts(found)[tower].without_gradient)
    (problem,) = found.problems
    assert problem.startswith(f"{tower} should learn, but the backward pass does not reach ")


def test_a_weight_in_4_bit_counts_as_the_numbers_that_it_stands_for(wide_dir: Path, batches: Batches) -> None:
    pytest.importorskip("bitsandbytes")
    settings = config(method="qlora", lora_rank=2)
    found = audit(prepared(load_four_bit_model(wide_dir, dtype="float32"), settings), batches["images"], settings, FP32)
    assert found.problems == ()
    assert all(part.gradient_norm for part in found.parts if part.part != "embeddings")
    plain: Any = load_model(wide_dir)
    counts = {part.part: (part.parameters, part.unused_by_design, part.trainable) for part in found.parts}
    same = config(method="lora", lora_rank=2)
    lora = audit(prepared(plain, same), batches["images"], same, FP32)
    assert counts == {part.part: (part.parameters, part.unused_by_design, part.trainable) for part in lora.parts}
    assert sum(part.parameters for part in found.parts) == sum(
        tensor.numel() for tensor in load_file(wide_dir / "model.safetensors").values()
    )
    assert (parts(found)["decoder"].lora_layers, parts(found)["decoder"].linear_layers) == (8, 8)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing(tiny_model: Phi3VForCausalLM, batches: Batches, checkpointing: Any) -> None:
    """CLIP's input needs no gradient, and the adapters inside still get theirs."""
    settings = config(method="lora", lora_rank=2)
    model = prepared(tiny_model, settings)
    plain = audit(model, batches["images"], settings, FP32)
    tiny_model.compute = Compute(checkpointing=checkpointing)
    assert audit(model, batches["images"], settings, FP32) == plain and plain.problems == ()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_part_cut_off_from_the_loss_is_named(tiny_model: Phi3VForCausalLM, batches: Batches, method: str) -> None:
    settings = config(method=method)
    model = prepared(tiny_model, settings)
    projection = tiny_model.model.vision_embed_tokens.img_projection
    projection.register_forward_pre_hook(lambda module, inputs: tuple(tensor.detach() for tensor in inputs))
    found = audit(model, batches["images"], settings, FP32)
    problem, *others = found.problems
    assert len(others) == (1 if method == "full" else 0), "the projector's separators, which adapters leave alone"
    assert problem.startswith("vision should learn, but the backward pass does not reach model.vision_embed_tokens")
    assert parts(found)["vision"].without_gradient


def test_a_part_whose_gradient_is_zero_is_named(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    model = prepared(tiny_model, config())
    tiny_model.model.vision_embed_tokens.img_projection[2].weight.data.zero_()
    problems = audit(model, batches["images"], config(), FP32).problems
    assert [problem.split(".")[0] for problem in problems] == ["vision should learn, but its gradient is exactly zero"]


def test_a_frozen_part_with_a_learning_rate_is_named(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    settings = config(part_learning_rates={"projector": 1e-3})
    model = prepared(tiny_model, settings)
    tiny_model.model.vision_embed_tokens.img_projection.requires_grad_(False)
    tiny_model.model.vision_embed_tokens.glb_GN.requires_grad_(False)
    tiny_model.model.vision_embed_tokens.sub_GN.requires_grad_(False)
    (problem,) = audit(model, batches["images"], settings, FP32).problems
    assert "projector should learn at 0.001, but none of its parameters is trainable" in problem


def test_image_parts_without_images_are_named(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    problems = audit(prepared(tiny_model, config()), batches["text"], config(), FP32).problems
    assert [problem.partition(",")[0] for problem in problems] == ["vision should learn", "projector should learn"]
    assert all("no training sample has an image" in problem for problem in problems)
    frozen = config(method="frozen_vision")
    assert audit(prepared(tiny_model, frozen), batches["text"], frozen, FP32).problems == ()


def test_a_gradient_that_is_not_finite_is_named(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    tiny_model.lm_head.weight.data[5, 5] = float("inf")
    problems = audit(prepared(tiny_model, config()), batches["images"], config(), FP32).problems
    assert problems and all("not finite" in problem for problem in problems)


def test_gradients_are_let_go_one_by_one(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    """Together they would take as much memory as the weights."""
    model = prepared(tiny_model, config())
    model.compute = Compute(accumulates_in_place=True)
    held: list[int] = []

    def count(_: Any) -> None:
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count)
    found = audit(model, batches["images"], config(), FP32)
    assert found.problems == () and max(held) == 1
    assert model.compute.accumulates_in_place


def test_nothing_is_left_behind(tiny_model: Phi3VForCausalLM, batches: Batches) -> None:
    settings = config(method="lora", lora_dropout=0.5)
    model = prepared(tiny_model, settings).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    audit(model, batches["images"], settings, FP32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
