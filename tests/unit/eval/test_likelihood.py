"""Label scores equal plain forwards, one for every prompt and label, however the labels are packed."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phi3v.data.encode import IGNORED_LABEL, SampleEncoder
from phi3v.data.schema import Sample, Turn
from phi3v.eval import engine as engine_module
from phi3v.eval.decode import logits_of, unrounded_logits_of
from phi3v.eval.engine import Answer, Engine
from phi3v.eval.likelihood import label_probabilities, label_token_ids
from phi3v.eval.prompts import Prompt
from phi3v.model.checkpoint import base_of, load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from prompting import Ask, plain_log_likelihood, plain_tokens

LABELS = ("Yes", "No", "Yes, but", "A much longer label, with a comma", "Y")
"""One is the beginning of two others."""

TOLERANCE = 2e-6
"""Relative, of a float32 sum of log-probabilities: other shapes sum in another order."""


@pytest.fixture(scope="module")
def labels(processor: Phi3VProcessor) -> tuple[tuple[int, ...], ...]:
    return tuple(label_token_ids(processor, label) for label in LABELS)


def answer(model: Any, prompts: Sequence[Prompt], num_tokens: int = 4) -> list[Answer]:
    engine = Engine(model, stop_token_ids=(), max_new_tokens=num_tokens)
    answers = engine.answer(engine.group(prompts))
    return [answers[prompt] for prompt in prompts]


def with_labels(prompts: Sequence[Prompt], *sets: Sequence[tuple[int, ...]], generated: bool = False) -> list[Prompt]:
    """The prompts with sets of labels in turn."""
    return [
        replace(prompt, labels=tuple(sets[number % len(sets)]), is_generated=generated)
        for number, prompt in enumerate(prompts)
    ]


def assert_plain(model: Any, prompts: Sequence[Prompt]) -> None:
    for prompt, found in zip(prompts, answer(model, prompts), strict=True):
        expected = [plain_log_likelihood(model, prompt, label) for label in prompt.labels]
        assert found.log_likelihoods == pytest.approx(expected, rel=TOLERANCE)
        assert found.tokens == (plain_tokens(model, prompt, 4) if prompt.is_generated else [])


def test_a_label_has_the_tokens_that_training_supervises(processor: Phi3VProcessor) -> None:
    end = processor.stop_token_ids[1]
    for label in LABELS:
        turn = Turn(user="Is it so?", assistant=label, images=(), answers=(label,))
        sample = Sample(id="s", turns=(turn,), system=None, num_crops=None, source=None, where="here:1")
        supervised = SampleEncoder(processor).encode(sample, [])["labels"].tolist()
        tokens = [token for token in supervised if token != IGNORED_LABEL]
        assert list(label_token_ids(processor, label)) == tokens[: tokens.index(end) + 1]


def test_probabilities_are_shares_of_the_likelihood() -> None:
    assert label_probabilities([math.log(0.1), math.log(0.3)]) == pytest.approx((0.25, 0.75))
    assert label_probabilities([-1e4, -1e4]) == (0.5, 0.5)


@pytest.mark.parametrize("generated", [False, True])
def test_a_batch_with_images_equals_plain_forwards(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], labels: tuple[tuple[int, ...], ...], generated: bool
) -> None:
    """Labels of their own, all of them, or none."""
    assert_plain(tiny_model, with_labels(prompts, labels[:2], labels, labels[3:], generated=generated))
    assert_plain(tiny_model, with_labels(prompts[1:2], labels[:1], generated=generated))
    if generated:
        assert_plain(tiny_model, with_labels(prompts, (), labels, generated=True))


@pytest.mark.parametrize(("most_label_tokens", "most_prefill_tokens"), [(3, 16_384), (1024, 60), (7, 1)])
def test_many_labels_are_scored_in_pieces(
    tiny_model: Phi3VForCausalLM,
    prompts: list[Prompt],
    labels: tuple[tuple[int, ...], ...],
    monkeypatch: pytest.MonkeyPatch,
    most_label_tokens: int,
    most_prefill_tokens: int,
) -> None:
    monkeypatch.setattr(engine_module, "MOST_LABEL_TOKENS", most_label_tokens)
    monkeypatch.setattr(engine_module, "MOST_PREFILL_TOKENS", most_prefill_tokens)
    assert_plain(tiny_model, with_labels(prompts, labels, generated=True))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_are_not_rounded_where_labels_are_scored(
    tiny_dir: Path, dtype: torch.dtype, adapted: bool
) -> None:
    """Rounded, a logit near 20 is up to 0.06 off in bfloat16: likelihoods shift, and different ones become equal."""
    torch.manual_seed(0)
    model: Any = load_model(tiny_dir)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    model = model.to(dtype)
    base = base_of(model)
    hidden = 20 * torch.randn(5, base.config.hidden_size).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(base.lm_head).double()(hidden.double())
        found, rounded = unrounded_logits_of(base, hidden), logits_of(base, hidden)
    largest = float(exact.abs().max())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 2e-6 * largest
    assert (rounded - exact).abs().max() > 1e-4 * largest


def test_likelihoods_in_16_bit_are_of_unrounded_logits(
    tiny_dir: Path, prompts: list[Prompt], labels: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(tiny_dir, dtype="bfloat16")
    model.lm_head.weight.data *= 16
    (asked,) = with_labels(prompts[2:3], labels)
    heads: list[torch.Tensor] = []

    def in_double(model: Phi3VForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
        heads.append(hidden)
        return hidden.double() @ model.lm_head.weight.double().t()

    found = answer(model, [asked])[0].log_likelihoods
    monkeypatch.setattr(engine_module, "unrounded_logits_of", in_double)
    assert found == pytest.approx(answer(model, [asked])[0].log_likelihoods, rel=TOLERANCE) and heads


def test_with_an_adapter(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], labels: tuple[tuple[int, ...], ...]
) -> None:
    asked = with_labels(prompts[:3], labels)
    base = answer(tiny_model, asked)[0].log_likelihoods
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_model,
        LoraConfig(r=4, target_modules=r"lm_head|.*(qkv_proj|down_proj|img_projection\.0)", init_lora_weights=False),
    ).eval()
    assert_plain(adapted, asked)
    assert answer(adapted, asked)[0].log_likelihoods[0] != pytest.approx(base[0], rel=1e-3)


def test_of_a_model_with_eager_attention(
    tiny_dir: Path, prompts: list[Prompt], labels: tuple[tuple[int, ...], ...]
) -> None:
    assert_plain(load_model(tiny_dir, attention="eager"), with_labels(prompts[:3], labels))


@pytest.mark.parametrize("rope_mode", ["auto", "short", "long"])
def test_across_the_limit_of_the_short_factors(
    tiny_dir: Path, ask: Ask, labels: tuple[tuple[int, ...], ...], rope_mode: str
) -> None:
    """Labels of 2 to 10 tokens: from prompts that none of them carries over the limit to one that is over it itself."""
    model = load_model(tiny_dir, rope_mode=rope_mode)
    limit = 40
    assert isinstance(model, Phi3VForCausalLM)
    lengths = [len(label) for label in labels]
    assert min(lengths) == 2 and max(lengths) >= 8
    by_length = {len(one.ids): one for one in (ask("why " * number + "?") for number in range(1, 40))}
    asked = with_labels([by_length[limit + shift] for shift in (-20, -5, -3, -1, 0, 1)], labels, generated=True)
    before = answer(model, asked)[1].log_likelihoods[3]
    model.model.rotary_emb.original_positions = limit
    for prompt in asked:
        assert_plain(model, [prompt])
    assert_plain(model, asked)
    is_changed = answer(model, asked)[1].log_likelihoods[3] != pytest.approx(before, abs=0.01)
    assert is_changed == (rope_mode == "auto"), "the factors matter"


def test_generation_and_labels_share_the_prompt(
    tiny_model: Phi3VForCausalLM,
    prompts: list[Prompt],
    labels: tuple[tuple[int, ...], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer and five labels cost one row: the prompt once, its last position and a label's tokens for each."""
    layouts: list[Any] = []
    images: list[int] = []
    embed = engine_module.embed_packed

    def counted(model: Any, batch: Any) -> torch.Tensor:
        layouts.append(batch.layout)
        images.append(len(batch.image_keys))
        return embed(model, batch)

    monkeypatch.setattr(engine_module, "embed_packed", counted)
    answer(tiny_model, with_labels(prompts[4:5], labels, generated=True))
    (layout,) = layouts
    assert layout.stems == (len(prompts[4].ids) - 1,) and not layout.wholes
    assert layout.branches == ((1, *map(len, labels)),)
    assert images == [2]

    # Many labels of several questions on one image: the questions would be repeated for every label.
    layouts.clear()
    images.clear()
    answer(tiny_model, with_labels([prompts[2], prompts[3]], labels * 3))
    (layout,) = layouts
    assert layout.stems == (len(prompts[2].ids) - 1, len(prompts[3].ids) - 1)
    assert images == [1]


def test_model_and_random_state_are_as_before(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], labels: tuple[tuple[int, ...], ...]
) -> None:
    tiny_model.train()
    state = torch.get_rng_state()
    answer(tiny_model, with_labels(prompts, labels, generated=True))
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_label_is_as_likely_as_the_tokens_say(
    tiny_model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    prompts: list[Prompt],
    labels: tuple[tuple[int, ...], ...],
) -> None:
    """A head that knows only its bias: every token of a label adds its own log-probability, ``<|end|>`` included."""
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()
        tiny_model.lm_head = torch.nn.Linear(32, tiny_model.config.vocab_size)
        tiny_model.lm_head.bias.zero_()
        tiny_model.lm_head.bias[processor.stop_token_ids[1]] = 3
    norm = math.log(tiny_model.config.vocab_size - 1 + math.exp(3))
    (found,) = answer(tiny_model, with_labels(prompts[:1], labels))
    assert found.log_likelihoods == pytest.approx([3 - len(label) * norm for label in labels], rel=1e-5)
