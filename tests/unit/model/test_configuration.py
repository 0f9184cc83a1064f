"""The published config.json goes in and comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig

from phi3v.model.configuration_phi3_v import Phi3VConfig

PUBLISHED: dict[str, Any] = {
    "_name_or_path": "Phi-3.5-vision-instruct",
    "architectures": ["Phi3VForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    "bos_token_id": 1,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3_v",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + index / 2 for index in range(48)],
        "short_factor": [1.0 + index / 50 for index in range(48)],
        "type": "su",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.1",
    "use_cache": True,
    "vocab_size": 32064,
    "_attn_implementation": "flash_attention_2",
}
"""The published Phi-3.5-vision config.json; its two lists of factors are simplified."""

NOT_WRITTEN = ("_name_or_path", "auto_map", "_attn_implementation")


@pytest.fixture
def published_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return folder


def saved(config: Phi3VConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_published_file_comes_out_as_it_went_in(published_dir: Path, tmp_path: Path) -> None:
    written = saved(Phi3VConfig.from_pretrained(published_dir), tmp_path)
    expected = {key: value for key, value in PUBLISHED.items() if key not in NOT_WRITTEN}
    # `</s>`, which the model never emits, is not handed on.
    assert written == {
        **expected,
        "eos_token_id": [32000, 32007],
        "transformers_version": written["transformers_version"],
    }


def test_published_file_means_the_published_model(published_dir: Path) -> None:
    config = Phi3VConfig.from_pretrained(published_dir)
    vision = config.vision_config
    assert (config.crop_px, config.tokens_per_side, config.image_token_id) == (336, 12, 32044)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 24, 16)
    assert (vision.intermediate_size, vision.patch_size, vision.hidden_act) == (4096, 14, "quick_gelu")
    assert vision.layer_norm_eps == 1e-5
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.rope_parameters["short_factor"] == PUBLISHED["rope_scaling"]["short_factor"]
    assert config.rope_parameters["long_factor"] == PUBLISHED["rope_scaling"]["long_factor"]
    assert config.rope_mode == "auto"


def test_small_model_round_trip(tiny_dir: Path, tmp_path: Path) -> None:
    written = saved(Phi3VConfig.from_pretrained(tiny_dir), tmp_path)
    assert written == json.loads((tiny_dir / "config.json").read_text())
    assert written["vision_config"] == {
        "hidden_size": 32,
        "image_size": 56,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 14,
    }
    assert (written["img_processor"]["image_dim_out"], written["img_processor"]["num_img_tokens"]) == (32, 4)


def test_dict_round_trip(tiny_config: Phi3VConfig) -> None:
    again = Phi3VConfig(**tiny_config.to_dict())
    assert again.to_dict() == tiny_config.to_dict()
    assert again.rope_parameters == tiny_config.rope_parameters


def test_recorded_tiny_config_loses_nothing(golden_dir: Path, tmp_path: Path) -> None:
    published = json.loads((golden_dir / "config.json").read_text())
    written = saved(Phi3VConfig.from_pretrained(golden_dir), tmp_path)
    kept = {key: value for key, value in published.items() if key not in (*NOT_WRITTEN, "transformers_version")}
    assert {key: written.get(key) for key in kept} == {**kept, "eos_token_id": [32000, 32007]}


@pytest.mark.parametrize("mode", ["short", "long"])
def test_rope_mode_is_a_matter_of_the_run_not_of_the_file(published_dir: Path, tmp_path: Path, mode: str) -> None:
    config = Phi3VConfig.from_pretrained(published_dir, rope_mode=mode)
    assert config.rope_mode == mode
    assert "rope_mode" not in saved(config, tmp_path)


def test_without_longrope(tmp_path: Path) -> None:
    written = saved(Phi3VConfig(rope_scaling=None), tmp_path)
    assert (written["rope_scaling"], written["rope_theta"]) == (None, 10000.0)
    assert Phi3VConfig.from_pretrained(tmp_path).rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    ("given", "kept"), [(None, [32000, 32007]), (2, [32000, 32007]), (32007, 32007), ([5, 6], [5, 6])]
)
def test_stop_tokens(given: int | list[int] | None, kept: int | list[int]) -> None:
    assert Phi3VConfig(eos_token_id=given).eos_token_id == kept


def test_own_image_token_is_written(tmp_path: Path) -> None:
    assert saved(Phi3VConfig(image_token_id=7), tmp_path)["image_token_id"] == 7
    assert Phi3VConfig.from_pretrained(tmp_path).image_token_id == 7


def test_vision_config_object_is_taken() -> None:
    vision = CLIPVisionConfig(hidden_size=64, image_size=28, patch_size=14, num_attention_heads=4)
    assert Phi3VConfig(vision_config=vision).crop_px == 28


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rope_mode is 'longest', must be one of auto, short, long"):
        Phi3VConfig(rope_mode="longest")
    for image_size in (42, 50):  # 3 patches a side; no whole number of patches
        with pytest.raises(ValueError, match=f"image_size {image_size} px must hold an even number of 14-px patches"):
            Phi3VConfig(vision_config={"image_size": image_size})


def test_another_arrangement_of_image_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embd_layer\.hd_transform_order is 'glb_sub'; only 'sub_glb'"):
        Phi3VConfig(embd_layer={"hd_transform_order": "glb_sub"})
