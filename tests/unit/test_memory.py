"""The memory model against a model's own tensors and against peaks measured on a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.config import LORA_PARTS, PARTS, TrainConfig
from phi3v.geometry import ModelDims
from phi3v.memory import CHECKPOINTING, FOUR_BIT_BYTES, Checkpointing, Coefficients, MemoryModel, MicroBatch
from phi3v.model.checkpoint import load_four_bit_model
from phi3v.model.compute import Compute
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch, PackLayout
from phi3v.model.parts import part_of
from phi3v.train.activations import memory_model
from phi3v.train.tuning import select_trainable, wrap_lora

FULL = MemoryModel(dims=ModelDims.published(), trained_parts=PARTS)
FROZEN_VISION = replace(FULL, trained_parts=("decoder", "embeddings", "head"))
LORA = replace(FULL, trained_parts=LORA_PARTS, adapter_rank=32)
QLORA = replace(LORA, four_bit_parts=("decoder",))


def total(memory: MemoryModel, checkpointing: Checkpointing, batch: MicroBatch) -> int:
    return sum(memory.predict(checkpointing, batch).values())


def config_of(method: str, **changes: object) -> TrainConfig:
    return TrainConfig(model="any", output_dir="any", train_data=["any"], method=method, **changes)  # pyright: ignore


@pytest.fixture
def random_model(tiny_config: Phi3VConfig) -> Phi3VForCausalLM:
    return Phi3VForCausalLM(tiny_config)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_parameters_are_those_of_the_model(tiny_config: Phi3VConfig, changes: dict[str, object]) -> None:
    config = Phi3VConfig.from_dict({**tiny_config.to_dict(), **changes})
    model = Phi3VForCausalLM(config)
    assert config.dims.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    by_part = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        by_part[part_of(name)] += parameter.numel()
    dims = config.dims
    assert dims.num_vision_parameters == by_part["vision"]
    assert dims.num_projector_parameters == by_part["projector"]
    assert dims.num_decoder_parameters == by_part["decoder"]
    assert dims.num_embedding_parameters == by_part["embeddings"]
    decoder_layer = dict(model.model.layers[0].named_parameters())
    matrices = [parameter.numel() for parameter in decoder_layer.values() if parameter.ndim == 2]
    assert len(matrices) == 4 and dims.decoder_layer_matrices == sum(matrices)


def test_published_sizes() -> None:
    published = ModelDims.published()
    assert published == Phi3VConfig(intermediate_size=8192, num_hidden_layers=32, vocab_size=32064).dims
    assert (published.crop_tokens, published.clip_positions) == (144, 577)


@pytest.mark.parametrize(
    "changes",
    [{}, {"freeze": ["vision"]}, {"freeze": ["decoder", "embeddings"]}, {"freeze": ["vision", "projector", "head"]}],
)
def test_trained_numbers_are_those_that_the_run_trains(
    random_model: Phi3VForCausalLM, changes: dict[str, object]
) -> None:
    config = config_of("full", **changes)
    select_trainable(random_model, config)
    memory = MemoryModel(dims=random_model.config.dims, trained_parts=config.trained_parts, precision="fp32")
    trained = sum(parameter.numel() for parameter in random_model.parameters() if parameter.requires_grad)
    assert memory.num_trained == trained
    stored = sum(parameter.numel() for parameter in random_model.parameters())
    assert memory.state_bytes() == {"weights": 4 * stored, "gradients": 4 * trained, "optimizer": 8 * trained}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("parts", [None, ["vision"], ["decoder"], ["projector", "head"]])
def test_adapters_have_as_many_numbers_as_peft_makes(
    random_model: Phi3VForCausalLM, parts: list[str] | None, use_dora: bool
) -> None:
    config = config_of("lora", lora_rank=3, lora_parts=parts, use_dora=use_dora)
    select_trainable(random_model, config)
    wrapped = wrap_lora(random_model, config)
    memory = memory_model(config, random_model.config.dims, precision="fp32")
    assert memory.num_trained == sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("parallel", "whole_bytes", "shared_bytes"), [("ddp", 18, 0), ("fsdp2", 0, 16), ("zero2", 2, 16), ("zero3", 0, 18)]
)
def test_engines_share_their_state_out(parallel: str, whole_bytes: int, shared_bytes: int) -> None:
    """Full training in bf16 by the number: weights of 4 and a copy of 2 or masters of 4 and weights of 2; 4; 8.

    DDP adds gradients up beside those that it sends: 4 more. What layers are put together in, and buffers that are
    sent, is less than a twentieth of one process's state.
    """
    trained = FULL.num_trained
    for num_ranks in (1, 8):
        found = sum(replace(FULL, num_ranks=num_ranks, parallel=parallel).state_bytes().values())
        expected = trained * (whole_bytes + shared_bytes / num_ranks)
        if parallel == "ddp" and num_ranks > 1:
            expected += 4 * trained
        assert expected - 0.01 * 18 * trained < found < expected + 0.05 * 18 * trained
    offloaded = replace(FULL, num_ranks=8, parallel="zero3", offloads=True).state_bytes()
    assert sum(offloaded.values()) < 0.05 * 18 * trained


def test_four_bits_take_a_quarter_of_sixteen() -> None:
    four_bit, sixteen = QLORA.state_bytes(), LORA.state_bytes()
    saved = sixteen.pop("weights") - four_bit.pop("weights")
    dims = QLORA.dims
    assert saved / (2 * dims.layers * dims.decoder_layer_matrices) == pytest.approx(1 - 0.2579, abs=1e-3)  # 4.127 bits
    assert four_bit == sixteen


@pytest.mark.parametrize("parts", [["vision"], ["projector"], ["decoder"], ["vision", "projector", "decoder"]])
def test_parts_in_4_bit_take_what_their_matrices_take(wide_dir: Path, parts: list[str]) -> None:
    linear: Any = pytest.importorskip("bitsandbytes").nn.Linear4bit
    model = load_four_bit_model(wide_dir, dtype="bfloat16", parts=parts)
    held = sum(weight.nbytes for weight in model.parameters())  # 4-bit numbers as two a byte, without their scales
    config = config_of("qlora", four_bit_parts=parts, lora_rank=1)
    predicted = memory_model(config, model.config.dims, precision="bf16").state_bytes()["weights"]
    numbers = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, linear))
    assert predicted - held == pytest.approx((FOUR_BIT_BYTES - 0.5) * numbers, abs=1)


def test_dora_takes_a_little_more() -> None:
    batch = MicroBatch(positions=10_000, crops=6, targets=100)
    dora = replace(LORA, has_magnitudes=True)
    more = {name: size - LORA.predict("off", batch)[name] for name, size in dora.predict("off", batch).items()}
    dims = LORA.dims
    decoder_rows = 32 * (9216 + 3072 + 2 * 8192 + 3072)
    vision_rows = 23 * (5 * 1024 + 4096)
    rows = decoder_rows + vision_rows + 2 * 3072 + 32064
    assert more["adapters"] == more["gradients"] == 4 * rows and more["optimizer"] == 8 * rows
    assert more["logits"] == 18 * dims.hidden * dims.vocab + 100 * 12 * dims.vocab
    assert more["decoder"] == more["vision"] == more["layer at work"] == 0


def test_dora_keeps_nothing_more_for_the_backward_pass(tiny_config: Phi3VConfig) -> None:
    """But for the projector and the head, which PEFT computes."""
    kept = []
    for use_dora in (False, True):
        config = config_of("lora", lora_rank=2, lora_parts=["decoder", "vision"], use_dora=use_dora)
        model = Phi3VForCausalLM(tiny_config)
        select_trainable(model, config)
        wrapped = wrap_lora(model, config)
        wrapped(packed=one_image(tiny_config))  # weights find their place beside the adapters
        hooks = KeptBytes(model)
        with hooks:
            wrapped(packed=one_image(tiny_config))
        kept.append(hooks.total)
    assert kept[0] == kept[1] > 0


def test_the_backward_pass_goes_through_what_is_trained_and_what_follows_it() -> None:
    assert not replace(FULL, trained_parts=("head",)).is_reached("decoder")
    decoder_only = replace(FULL, trained_parts=("decoder",))
    assert not decoder_only.is_reached("projector") and decoder_only.is_reached("decoder")
    vision_only = replace(FULL, trained_parts=("vision",))
    assert vision_only.is_reached("projector") and vision_only.is_reached("decoder")


def test_sixteen_bit_copies() -> None:
    dims = FULL.dims
    used = FULL.num_trained - dims.num_embedding_parameters  # the embedding is looked up, not multiplied by
    assert FULL.state_bytes()["16-bit copies"] == FROZEN_VISION.state_bytes()["16-bit copies"] == 2 * used
    assert LORA.state_bytes()["16-bit copies"] == 2 * LORA.num_trained
    recomputed = FULL.state_bytes("full")["16-bit copies"]
    assert recomputed == 2 * (dims.decoder_layer_matrices + dims.num_embedding_parameters)
    assert "16-bit copies" not in replace(FULL, precision="fp32").state_bytes()


@pytest.mark.parametrize("memory", [FULL, FROZEN_VISION, LORA, QLORA])
def test_more_recomputation_keeps_less_and_more_positions_keep_more(memory: MemoryModel) -> None:
    batch = MicroBatch(positions=10_000, crops=60, targets=100)
    sizes = [total(memory, mode, batch) for mode in CHECKPOINTING]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    assert total(memory, "off", replace(batch, positions=10_001)) > sizes[0]
    assert total(memory, "off", replace(batch, crops=61)) > sizes[0]
    assert total(memory, "off", replace(batch, targets=101)) > sizes[0]


def test_a_frozen_tower_keeps_nothing_whatever_is_recomputed() -> None:
    batch = MicroBatch(positions=10_000, crops=60, targets=100)
    kept = [FROZEN_VISION.activation_bytes(mode, batch)["vision"] for mode in CHECKPOINTING]
    assert kept == [kept[0]] * len(CHECKPOINTING)
    assert kept[0] < FULL.activation_bytes("full", batch)["vision"]


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the different tensors that autograd keeps, weights aside."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.kept: dict[int, torch.Tensor] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.kept[storage.data_ptr()] = tensor
            return tensor

        super().__init__(note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def one_image(config: Phi3VConfig) -> PackedBatch:
    """Returns 20 positions, of which 13 show an image on one tile and 5 are supervised."""
    return PackedBatch(
        layout=PackLayout(wholes=(20,)),
        input_ids=torch.arange(20),
        position_ids=torch.arange(20),
        is_long=torch.zeros(20, dtype=torch.bool),
        target_positions=torch.arange(14, 19),
        target_ids=torch.arange(15, 20),
        target_weights=torch.ones(5),
        image_positions=torch.arange(1, 14),
        image_rows=torch.arange(13),
        crops=torch.randn(2, 3, config.crop_px, config.crop_px),
        grids=((1, 1),),
    )


def with_layers(config: Phi3VConfig, tower: str, layers: int) -> Phi3VConfig:
    changed = config.to_dict()
    if tower == "decoder":
        changed["num_hidden_layers"] = layers
    else:
        changed["vision_config"] = {**changed["vision_config"], "num_hidden_layers": layers}
    return Phi3VConfig.from_dict(changed)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tower", ["decoder", "vision"])
def test_a_layer_keeps_what_the_packed_forward_keeps(
    tiny_config: Phi3VConfig, precision: str, checkpointing: Checkpointing, tower: str
) -> None:
    """Each further layer of a model makes autograd keep as many bytes more as the memory model says."""
    kept: list[int] = []
    predicted: list[int] = []
    for layers in (3, 4):
        config = with_layers(tiny_config, tower, layers)
        model = Phi3VForCausalLM(config)
        model.compute = Compute(checkpointing=checkpointing)
        hooks = KeptBytes(model)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(packed=one_image(config)).loss
        kept.append(hooks.total)
        loss.backward()
        memory = MemoryModel(
            dims=config.dims,
            trained_parts=PARTS,
            precision=precision,
            coefficients=Coefficients(attention_sums=0),  # a GPU's kernels keep them, the CPU's attention does not
        )
        batch = MicroBatch(positions=20, crops=2, targets=5)
        predicted.append(memory.activation_bytes(checkpointing, batch)[tower])
    assert kept[1] - kept[0] == predicted[1] - predicted[0]


@pytest.mark.parametrize(
    ("memory", "checkpointing", "pages", "measured_gb"),
    [
        (FULL, "off", 4, 136.6),
        (FROZEN_VISION, "off", 8, 134.8),
        (replace(LORA, adapter_rank=64), "off", 8, 136.5),
        (FULL, "full", 1, 69.0),
        (replace(LORA, adapter_rank=64), "full", 1, 13.1),
        (replace(QLORA, adapter_rank=64), "full", 1, 7.8),
    ],
)
def test_peaks_measured_on_one_gpu_are_predicted(
    memory: MemoryModel, checkpointing: Checkpointing, pages: int, measured_gb: float
) -> None:
    """Peaks of `phi3v bench` on one H200 at the published size, bf16: docs/LOG.md of 2026-11-25."""
    batch = MicroBatch(positions=2552 * pages, crops=17 * pages, targets=10 * pages)
    predicted_gb = total(memory, checkpointing, batch) / 1e9
    assert measured_gb <= predicted_gb <= 1.06 * measured_gb + 0.6
