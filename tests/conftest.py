"""Fixtures of all rooms: the recordings of the published code, and a small random model of the published layout."""

from pathlib import Path

import pytest
import torch

from phi3v.model.checkpoint import load_model, save_model
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

GOLDEN = Path(__file__).parent / "golden"
CROP_PX = 56
"""Crop edge of the small model: 4 x 4 patches, 2 x 2 image tokens; a square image on one tile costs 13 tokens."""


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Small matrices are slower on many threads, and the machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The published tokenizer files, and what the published code gave on a tiny model."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_config() -> Phi3VConfig:
    """Two decoder layers of width 32, CLIP of three layers, 56-px crops, real LongRoPE factors."""
    return tiny_model_config()


def tiny_model_config() -> Phi3VConfig:
    return Phi3VConfig(
        architectures=["Phi3VForCausalLM"],
        dtype="float32",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0, 2.4, 3.0],
            "long_factor": [1.0, 1.3, 5.4, 15.8, 32.6, 59.8, 63.5, 64.8],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": CROP_PX,
            "patch_size": 14,
        },
    )


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tiny_config: Phi3VConfig) -> Path:
    """A model folder of ``tiny_config``, float32; its weights are large enough for every tensor to matter."""
    return write_random_model(tiny_config, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory: pytest.TempPathFactory, tiny_config: Phi3VConfig) -> Path:
    """The same with both towers as wide as a block of 4-bit weights, which the CPU's 4-bit kernels need."""
    wide = {"hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    published = tiny_config.to_dict()
    vision = {**published["vision_config"], **wide}
    config = Phi3VConfig.from_dict({**published, **wide, **heads, "vision_config": vision})
    return write_random_model(config, tmp_path_factory.mktemp("wide") / "model")


def write_random_model(config: Phi3VConfig, folder: Path) -> Path:
    model = Phi3VForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            is_scale = name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if name.endswith("embed_tokens.weight") else noise * fan_in**-0.5 + is_scale)
    processor = Phi3VProcessor.from_pretrained(GOLDEN)
    processor.image_processor = Phi3VImageProcessor(
        num_crops=4, crop_px=CROP_PX, num_img_tokens=config.tokens_per_side**2
    )
    return save_model(model, processor, folder)


@pytest.fixture
def tiny_model(tiny_dir: Path) -> Phi3VForCausalLM:
    """The model of ``tiny_dir``, in evaluation mode; each test's own."""
    model = load_model(tiny_dir)
    assert isinstance(model, Phi3VForCausalLM)
    return model


@pytest.fixture(scope="session")
def processor(tiny_dir: Path) -> Phi3VProcessor:
    """The processor of ``tiny_dir``: published tokenizer, 56-px crops, at most four tiles an image."""
    return Phi3VProcessor.from_pretrained(tiny_dir)
