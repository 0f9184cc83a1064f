"""Every parameter belongs to one part, under PEFT's names too."""

import pytest
from peft import LoraConfig, get_peft_model

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import PARTS, is_never_used, part_of

PREFIXES = {
    "model.vision_embed_tokens.img_processor.": "vision",
    "model.vision_embed_tokens.img_projection.": "projector",
    "model.vision_embed_tokens.glb_GN": "projector",
    "model.vision_embed_tokens.sub_GN": "projector",
    "model.layers.": "decoder",
    "model.norm.": "decoder",
    "model.embed_tokens.": "embeddings",
    "lm_head.": "head",
}


def test_every_parameter_has_its_part(tiny_model: Phi3VForCausalLM) -> None:
    names = [name for name, _ in tiny_model.named_parameters()]
    expected = {name: part for name in names for prefix, part in PREFIXES.items() if name.startswith(prefix)}
    assert {name: part_of(name) for name in names} == expected
    assert set(expected) == set(names)
    assert set(expected.values()) == set(PARTS)

    adapted = get_peft_model(tiny_model, LoraConfig(target_modules=["qkv_proj", "fc1", "img_projection.0", "lm_head"]))
    for name, _ in adapted.named_parameters():
        plain = name.removeprefix("base_model.model.").split(".lora_")[0].replace(".base_layer", "")
        assert part_of(name) == part_of(plain + ".weight")


def test_foreign_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"score\.weight is not a parameter"):
        part_of("score.weight")


def test_never_used_is_the_towers_end_only() -> None:
    tower = "model.vision_embed_tokens.img_processor.vision_model."
    assert is_never_used(f"{tower}encoder.layers.23.mlp.fc1.weight", 24)
    assert is_never_used(f"base_model.model.{tower}encoder.layers.23.mlp.fc1.lora_A.default.weight", 24)
    assert is_never_used(f"{tower}post_layernorm.bias", 24)
    assert not is_never_used(f"{tower}encoder.layers.22.mlp.fc1.weight", 24)
    assert not is_never_used(f"{tower}encoder.layers.2.mlp.fc1.weight", 24)
    assert not is_never_used("model.layers.23.mlp.down_proj.weight", 24)
