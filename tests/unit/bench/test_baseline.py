"""The baseline computes what the published code computes, and its optimizer is AdamW on float32 weights."""

from typing import Any

import pytest
import torch
from torch import nn

from phi3v.bench import baseline
from phi3v.bench.baseline import MasterWeightAdamW, measure_baseline
from phi3v.bench.model import bench_config, build_model
from phi3v.bench.options import BenchOptions
from phi3v.bench.workload import draw_samples

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["full", "frozen_vision", "lora"])
def test_every_crop_and_every_position_is_computed(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BenchOptions(method=method, tiny=True, device="cpu", num_crops=6, baseline_samples=2, lora_rank=2)
    config = bench_config(is_tiny=True)
    samples = draw_samples(options, config, 2)
    assert samples[0].text.grids == ((2, 2),)  # five crops, where six and the global view are computed
    crops_in_layers: list[list[int]] = []
    logits: list[tuple[int, ...]] = []
    build = build_model

    def build_watched(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        for number, layer in enumerate(model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers):
            crops_in_layers.append([])
            layer.layer_norm1.register_forward_hook(
                lambda _, given, __, number=number: crops_in_layers[number].append(len(given[0]))
            )
        model.lm_head.register_forward_hook(lambda _, __, given: logits.append(tuple(given.shape)))
        return model

    monkeypatch.setattr(baseline, "build_model", build_watched)
    found = measure_baseline(options, config, samples, CPU)
    forward_passes = baseline.WARMUP_SAMPLES + options.baseline_samples
    # The layers that learn run again in the backward pass; the last one, which nothing uses, does not.
    times = 1 if method == "frozen_vision" else 2
    assert crops_in_layers == [[7] * forward_passes * times] * 2 + [[7] * forward_passes]
    lengths = [len(samples[number % 2].text.input_ids) for number in range(forward_passes)]
    assert logits == [(1, length, config.vocab_size) for length in lengths]
    assert found["samples_per_s"] == pytest.approx(2 / sum(found["sample_seconds"]["all"]))


def test_what_is_computed_besides_changes_no_loss() -> None:
    options = BenchOptions(tiny=True, num_crops=6)
    config = bench_config(is_tiny=True)
    model = build_model(config, torch.float32, CPU, seed=0)
    (sample,) = draw_samples(options, config, 1)
    batch = baseline._padded_batch(sample, config, baseline._random_crops(config, 7, seed=0))
    expected = model(**batch).loss
    with baseline._published_vision(model, 7):
        assert torch.equal(model(**batch).loss, expected)
    assert torch.equal(model(**batch).loss, expected)


def test_master_weights_step_as_plain_adamw_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "MASTER_NUMBERS_AT_ONCE", 20)
    torch.manual_seed(0)
    start = [torch.randn(size) for size in (3, 30, 8, 8, 8)]
    ours, plain = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    optimizer = MasterWeightAdamW(ours, lr=0.1, device=CPU)
    reference = torch.optim.AdamW(plain, lr=0.1, betas=(0.9, 0.95), eps=1e-7)
    for _ in range(3):
        for left, right in zip(ours, plain, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        optimizer.step(max_grad_norm=0.5)
        nn.utils.clip_grad_norm_(plain, 0.5)
        reference.step()
        assert all(one.grad is None for one in ours)
    for left, right in zip(ours, plain, strict=True):
        assert torch.equal(left, right)


def test_small_steps_are_not_lost_in_16_bit() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterWeightAdamW([weight], lr=1e-4, device=CPU)
    for _ in range(60):  # a step of 1e-4 is a fortieth of the distance between bf16 numbers around 1
        weight.grad = torch.ones_like(weight)
        optimizer.step(max_grad_norm=1.0)
    assert float(weight.detach()) == pytest.approx(1 - 60e-4, abs=2e-3)
