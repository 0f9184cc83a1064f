"""The model's promises: batches are their rows, caches change nothing, losses are their plain three lines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoProcessor, DynamicCache, StaticCache

from phi3v.model.cache_names import CACHE_NAME
from phi3v.model.checkpoint import load_model
from phi3v.model.configuration_phi3_v import STOP_TOKEN_IDS
from phi3v.model.loss import mean_token_loss
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import is_never_used, part_of
from phi3v.model.processing_phi3_v import Phi3VProcessor

LIMIT = 64
"""``original_max_position_embeddings`` of ``limited_model``."""

TOLERANCE = 1e-5
"""Absolute, on logits of magnitude 4 and gradients of magnitude 1, float32."""


def picture(h: int, w: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng((h, w)).integers(0, 256, (h, w, 3), dtype=np.uint8))


WIDE, TALL, SQUARE = picture(30, 100), picture(90, 40), picture(56, 56)
TEXTS = {
    "text": "<|user|>\nName a colour.<|end|>\n<|assistant|>\n",
    "one": "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n",
    "two": "<|user|>\n<|image_1|>\n<|image_2|>\nDo these two pictures show the same thing?<|end|>\n<|assistant|>\n",
    "swapped": "<|user|>\n<|image_2|> or <|image_1|>?<|end|>\n<|assistant|>\n",
    "eight": "".join(f"<|image_{index}|>\n" for index in range(1, 9)) + "Which?",
}
IMAGES = {
    "text": [],
    "one": [SQUARE],
    "two": [WIDE, TALL],
    "swapped": [SQUARE, TALL],
    "eight": [WIDE, TALL, SQUARE, picture(10, 11), picture(200, 30), picture(5, 5), WIDE, picture(70, 80)],
}
MIXED = ["two", "text", "one", "swapped", "eight"]
"""A batch of everything: text alone, one image, several, tags out of order, eight of different shapes."""


def inputs_of(processor: Phi3VProcessor, *names: str, **options: Any) -> dict[str, torch.Tensor]:
    return dict(processor([TEXTS[name] for name in names], [IMAGES[name] for name in names], **options))


def new_tokens(model: Any, inputs: dict[str, torch.Tensor], count: int, **options: Any) -> list[list[int]]:
    """Generates greedily and returns the new ids of every row, all ``count`` of them."""
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def labelled(processor: Phi3VProcessor, *names: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns a right-padded batch and labels at each row's last five real tokens."""
    inputs = inputs_of(processor, *names)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        labels[row, length - 5 : length] = inputs["input_ids"][row, length - 5 : length]
    return inputs, labels


# --- forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(tiny_dir: Path, processor: Phi3VProcessor, attention: str, side: str) -> None:
    model = load_model(tiny_dir, attention=attention)
    batch = inputs_of(processor, *MIXED, padding_side=side)
    logits = model(**batch).logits
    for row, name in enumerate(MIXED):
        alone = model(**inputs_of(processor, name)).logits[0]
        real = logits[row, batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, alone, atol=TOLERANCE, rtol=0)


def test_published_filling_with_zero_crops_changes_nothing(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor
) -> None:
    inputs = inputs_of(processor, *MIXED)
    images, crops = inputs["pixel_values"].shape[:2]
    filled = {**inputs, "pixel_values": torch.zeros(images, 17, 3, 56, 56)}
    filled["pixel_values"][:, :crops] = inputs["pixel_values"]
    torch.testing.assert_close(tiny_model(**filled).logits, tiny_model(**inputs).logits, atol=0, rtol=0)


def test_each_image_reaches_its_own_place(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """Two images of one shape, told apart by their tags alone."""
    images = [picture(30, 100), picture(30, 101)]
    tags = "<|image_1|> and <|image_2|>", "<|image_2|> and <|image_1|>"
    one, other = (tiny_model(**processor(text, images)).logits for text in tags)
    assert (one - other).abs().max() > 0.01
    reordered = tiny_model(**processor(tags[0], images[::-1])).logits
    torch.testing.assert_close(other, reordered, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_cache_gives_the_logits_of_recomputing(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, cache: type, name: str
) -> None:
    inputs = inputs_of(processor, "two", "text", padding_side="left")
    tokens = torch.randint(100, 30_000, (2, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    whole = tiny_model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -7:]

    store = cache(config=tiny_model.config, max_cache_len=200) if cache is StaticCache else cache()
    steps = [tiny_model(**inputs, **{name: store}, use_cache=True).logits[:, -1:]]
    past = inputs["input_ids"].shape[1]
    for end in range(past + 1, past + 7):
        step = tiny_model(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], **{name: store})
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=TOLERANCE, rtol=0)


def test_a_cache_goes_on_without_a_mask(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "text")
    del inputs["attention_mask"]
    ids = inputs["input_ids"]
    first = tiny_model(input_ids=ids[:, :4], use_cache=True)
    second = tiny_model(input_ids=ids[:, 4:], cache=first[CACHE_NAME])
    whole = tiny_model(input_ids=ids).logits
    torch.testing.assert_close(second.logits, whole[:, 4:], atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}])
def test_nothing_that_will_be_removed_is_called(
    limited_model: Phi3VForCausalLM, processor: Phi3VProcessor, options: dict[str, Any]
) -> None:
    """The change of the rope factors is among the steps."""
    new_tokens(limited_model, inputs_of(processor, "one"), LIMIT, **options)


def test_logits_to_keep(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "one")
    whole = tiny_model(**inputs).logits
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=3).logits, whole[:, -3:], atol=TOLERANCE, rtol=0)
    chosen = torch.tensor([2, 5])
    torch.testing.assert_close(
        tiny_model(**inputs, logits_to_keep=chosen).logits, whole[:, chosen], atol=TOLERANCE, rtol=0
    )


def test_outputs_that_callers_ask_for(tiny_dir: Path, processor: Phi3VProcessor) -> None:
    model = load_model(tiny_dir, attention="eager")
    inputs = inputs_of(processor, "one")
    length = inputs["input_ids"].shape[1]
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(1, length, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 2, length, length)] * 2
    as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    torch.testing.assert_close(as_tuple[1], outputs.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sixteen_bit(tiny_dir: Path, processor: Phi3VProcessor, dtype: torch.dtype, attention: str) -> None:
    inputs = inputs_of(processor, *MIXED, padding_side="left")
    expected = load_model(tiny_dir)(**inputs).logits[:, -1]
    half = load_model(tiny_dir, attention=attention).to(dtype)
    logits = half(**inputs).logits[:, -1]
    assert logits.dtype == dtype
    # Two significant digits are left after six layers of bfloat16, three of float16; the logits' spread is 1.
    torch.testing.assert_close(logits.float(), expected, atol=0.15 if dtype == torch.bfloat16 else 0.03, rtol=0)
    assert len(new_tokens(half, inputs, 3)[0]) == 3


# --- generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
    ],
    ids=["cache", "no-cache", "static", "beams", "beams-no-cache"],
)
def test_left_padded_generation_is_one_by_one(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, options: dict[str, Any]
) -> None:
    batch = inputs_of(processor, *MIXED, padding_side="left")
    alone = [new_tokens(tiny_model, inputs_of(processor, name), 6, **options)[0] for name in MIXED]
    assert new_tokens(tiny_model, batch, 6, **options) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(MIXED)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}, {"attention": "eager"}])
def test_ways_to_generate_agree(tiny_dir: Path, processor: Phi3VProcessor, options: dict[str, Any]) -> None:
    inputs = inputs_of(processor, "swapped")
    expected = new_tokens(load_model(tiny_dir), inputs, 8)
    model = load_model(tiny_dir, attention=options.pop("attention", "sdpa"))
    assert new_tokens(model, inputs, 8, **options) == expected


def test_every_sample_of_a_prompt_sees_all_its_images(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """Sampling among one candidate is greedy; transformers alone would hand the first copy image 1 twice."""
    batch = inputs_of(processor, *MIXED, padding_side="left")
    expected = [tokens for tokens in new_tokens(tiny_model, batch, 5) for _ in range(3)]
    assert new_tokens(tiny_model, batch, 5, do_sample=True, top_k=1, num_return_sequences=3) == expected


def test_beams_see_all_their_images(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """The best of three beams of one token is the greedy token."""
    batch = inputs_of(processor, *MIXED, padding_side="left")
    assert new_tokens(tiny_model, batch, 1, num_beams=3) == new_tokens(tiny_model, batch, 1)


def test_generation_from_embeddings(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "two")
    embeddings = tiny_model.model.embed(inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"])
    output = tiny_model.generate(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
    )
    assert output.tolist() == new_tokens(tiny_model, inputs, 6)


LENGTHS = [40, LIMIT - 1, LIMIT, LIMIT + 1, 90]
"""Prompt lengths around the limit: crossing later, at the second, at the first new token, and already crossed."""


def prompts(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A left-padded batch of random text."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((len(lengths), max(lengths)), 32000)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(100, 30_000, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [{"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]} for ids, mask in pairs]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_generation_across_the_change_of_rope_factors(limited_model: Phi3VForCausalLM, options: dict[str, Any]) -> None:
    """The cached keys of a row were rotated with the short factors; without a cache nothing can go stale."""
    batch = prompts(LENGTHS)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    expected = [new_tokens(limited_model, row, 27, use_cache=False, **beams)[0] for row in rows(batch)]
    assert new_tokens(limited_model, batch, 27, **options) == expected


def test_the_change_of_rope_factors_matters(limited_dir: Path) -> None:
    """Otherwise the test above would see nothing."""
    batch = prompts([40])
    assert new_tokens(load_model(limited_dir), batch, 30) != new_tokens(
        load_model(limited_dir, rope_mode="short"), batch, 30
    )


@pytest.mark.parametrize("mode", ["short", "long"])
def test_a_fixed_mode_never_recomputes(limited_dir: Path, mode: str) -> None:
    model = load_model(limited_dir, rope_mode=mode)
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, arguments, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    cached = new_tokens(model, prompts([60]), 8)
    assert lengths == [60] + [1] * 7
    assert cached == new_tokens(model, prompts([60]), 8, use_cache=False)


@pytest.mark.parametrize("mode", ["short", "long"])
def test_a_mode_set_after_loading_counts_everywhere(
    limited_model: Phi3VForCausalLM, limited_dir: Path, mode: str
) -> None:
    limited_model.config.rope_mode = mode
    expected = new_tokens(load_model(limited_dir, rope_mode=mode), prompts([60]), 20)
    assert new_tokens(limited_model, prompts([60]), 20) == expected
    limited_model.config.rope_mode = "auto"
    expected = new_tokens(load_model(limited_dir), prompts([60]), 20)
    assert new_tokens(limited_model, prompts([60]), 20) == expected


def test_images_across_the_change_of_rope_factors(limited_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    names = ["one", "two", "text"]
    batch = inputs_of(processor, *names, padding_side="left")
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert min(lengths) < LIMIT < min(lengths) + 60
    expected = [new_tokens(limited_model, inputs_of(processor, name), 60, use_cache=False)[0] for name in names]
    assert new_tokens(limited_model, batch, 60) == expected


def test_embeddings_across_the_change_of_rope_factors(limited_model: Phi3VForCausalLM) -> None:
    batch = prompts([50, 60])
    embeddings = limited_model.model.embed_tokens(batch["input_ids"])
    output = limited_model.generate(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], max_new_tokens=20, do_sample=False
    )
    assert output.tolist() == new_tokens(limited_model, batch, 20)


@pytest.mark.parametrize("stop", STOP_TOKEN_IDS)
def test_generation_stops_where_answers_end(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, stop: int) -> None:
    inputs = inputs_of(processor, "text")
    second = new_tokens(tiny_model, inputs, 2)[0][1]
    with torch.no_grad():  # the second token becomes the stop token
        tiny_model.lm_head.weight[[stop, second]] = tiny_model.lm_head.weight[[second, stop]]
    output = tiny_model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist()[1:] == [stop]


def test_stop_tokens_replace_the_published_one(golden_dir: Path) -> None:
    assert '"eos_token_id": 2' in (golden_dir / "generation_config.json").read_text()
    settings = load_model(golden_dir).generation_config
    assert settings.eos_token_id == [32000, 32007]
    assert (settings.pad_token_id, settings.bos_token_id) == (32000, 1)


# --- loss and gradients

SUPERVISED = ["two", "text", "swapped"]


def test_mean_loss(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs, labels = labelled(processor, *SUPERVISED)
    outputs = tiny_model(**inputs, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])
    torch.testing.assert_close(outputs.loss, expected, atol=TOLERANCE, rtol=0)
    counted = tiny_model(**inputs, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(counted, expected * (labels[:, 1:] != -100).sum() / 100, atol=TOLERANCE, rtol=0)


def test_windows_of_batches_add_up(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """transformers' Trainer sums the losses of a window and leaves the division to ``num_items_in_batch``."""
    whole, labels = labelled(processor, "two", "text")
    number = int((labels[:, 1:] != -100).sum())
    parts = [labelled(processor, name) for name in ("two", "text")]
    losses = [tiny_model(**inputs, labels=own, num_items_in_batch=number).loss for inputs, own in parts]
    torch.testing.assert_close(sum(losses), tiny_model(**whole, labels=labels).loss, atol=TOLERANCE, rtol=0)


def test_weighted_loss(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs, labels = labelled(processor, *SUPERVISED)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    sparse = tiny_model(**inputs, labels=labels, loss_weights=weights, supervised_only=True)
    assert sparse.logits is None
    sparse.loss.backward()
    gradients = {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}

    tiny_model.zero_grad()
    logits = tiny_model(**inputs).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    expected = (losses * weights[:, 1:]).sum()
    expected.backward()
    torch.testing.assert_close(sparse.loss, expected, atol=TOLERANCE, rtol=TOLERANCE)
    for name, parameter in tiny_model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=TOLERANCE, rtol=1e-4)
    with_logits = tiny_model(**inputs, labels=labels, loss_weights=weights)
    torch.testing.assert_close(with_logits.loss, sparse.loss, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(with_logits.logits[:, :-1], logits, atol=TOLERANCE, rtol=0)


def test_weights_that_sum_to_one_a_row_give_the_mean_of_row_means(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor
) -> None:
    inputs, labels = labelled(processor, "two", "text")
    supervised = (labels != -100).float()
    weights = supervised / supervised.sum(dim=1, keepdim=True) / 2
    loss = tiny_model(**inputs, labels=labels, loss_weights=weights, supervised_only=True).loss
    alone = [
        tiny_model(**own, labels=row).loss for own, row in (labelled(processor, "two"), labelled(processor, "text"))
    ]
    torch.testing.assert_close(loss, sum(alone) / 2, atol=TOLERANCE, rtol=0)


def test_nothing_supervised_is_a_loss_of_zero(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs, labels = labelled(processor, "one")
    nothing = torch.full_like(labels, -100)
    loss = tiny_model(**inputs, labels=nothing, loss_weights=torch.ones(labels.shape), supervised_only=True).loss
    assert loss.item() == 0
    loss.backward()


def test_the_loss_is_formed_in_float32() -> None:
    logits = torch.randn(1, 9, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(9)[None]
    assert mean_token_loss(logits, labels).dtype == torch.float32
    torch.testing.assert_close(mean_token_loss(logits, labels), mean_token_loss(logits.float(), labels))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_checkpointing_changes_nothing(tiny_dir: Path, processor: Phi3VProcessor, use_reentrant: bool | None) -> None:
    inputs, labels = labelled(processor, *SUPERVISED)
    results: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for is_on in (False, True):
        model = load_model(tiny_dir).train()
        if is_on:
            options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
            model.gradient_checkpointing_enable(options)
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (checkpointed, recomputed) = results
    torch.testing.assert_close(checkpointed, plain, atol=0, rtol=0)
    assert set(recomputed) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_with_frozen_embeddings(tiny_dir: Path, processor: Phi3VProcessor) -> None:
    """LoRA's case: nothing below the first adapter asks for gradients; a reentrant checkpoint would give none."""
    inputs, labels = labelled(processor, "one")
    model = load_model(tiny_dir).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".layers." in name and part_of(name) == "decoder"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_what_gets_a_gradient(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs, labels = labelled(processor, "two")
    tiny_model(**inputs, labels=labels).loss.backward()
    untouched = {name for name, parameter in tiny_model.named_parameters() if parameter.grad is None}
    names = [name for name, _ in tiny_model.named_parameters()]
    assert untouched == {name for name in names if is_never_used(name, num_vision_layers=3)}
    assert untouched == {name for name in names if "encoder.layers.2." in name or "post_layernorm" in name}


def test_a_batch_without_images_leaves_the_tower_alone(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs, labels = labelled(processor, "text")
    tiny_model(**inputs, labels=labels).loss.backward()
    parts = {part_of(name) for name, parameter in tiny_model.named_parameters() if parameter.grad is not None}
    assert parts == {"embeddings", "decoder", "head"}


# --- errors


def test_image_positions_that_do_not_fit(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "one", "two")
    other_crops = inputs_of(processor, "one", "two", num_crops=1)
    with pytest.raises(ValueError, match="row 0 of the batch holds 27 image positions but its 3 images need 39: text"):
        tiny_model(**{**inputs, **{key: other_crops[key] for key in ("pixel_values", "image_sizes")}})
    cut = {**inputs, "input_ids": inputs["input_ids"][:, :20], "attention_mask": inputs["attention_mask"][:, :20]}
    with pytest.raises(ValueError, match=r"row 0 of the batch holds .* its 1 images need 27"):
        tiny_model(**cut)
    reordered = {**inputs, "pixel_values": inputs["pixel_values"].flip(0), "image_sizes": inputs["image_sizes"].flip(0)}
    with pytest.raises(ValueError, match="row 0 of the batch holds 27 image positions"):
        tiny_model(**reordered)
    with pytest.raises(ValueError, match="the text shows 0 images but 3 were given"):
        tiny_model(**{**inputs, **inputs_of(processor, "text", "text")})
    with pytest.raises(ValueError, match="pixel_values came without image_sizes"):
        tiny_model(**{**inputs, "image_sizes": None})


def test_image_positions_without_images(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "one")
    with pytest.raises(ValueError, match="27 image positions but no pixel_values were given"):
        tiny_model(input_ids=inputs["input_ids"])


def test_wrong_arguments(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "text")
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model(**inputs, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model()
    with pytest.raises(ValueError, match="supervised_only needs labels and loss_weights"):
        tiny_model(**inputs, labels=inputs["input_ids"], supervised_only=True)
    with pytest.raises(ValueError, match="two names of one argument"):
        tiny_model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


def test_embeddings_with_images_beside_them(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    inputs = inputs_of(processor, "one")
    embeddings = tiny_model.model.embed_tokens(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="inputs_embeds hold their images already"):
        tiny_model(**inputs, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="inputs_embeds hold their images already"):
        tiny_model.generate(**inputs, inputs_embeds=embeddings, max_new_tokens=2)


# --- as the model card shows it


def test_the_model_cards_snippet_runs_unchanged(tiny_dir: Path, processor: Phi3VProcessor) -> None:
    model_id = str(tiny_dir)
    model = AutoModelForCausalLM.from_pretrained(
        model_id, device_map="cpu", trust_remote_code=True, torch_dtype="auto", _attn_implementation="eager"
    )
    own = AutoProcessor.from_pretrained(model_id, trust_remote_code=True, num_crops=4)
    images = IMAGES["two"]
    placeholder = "".join(f"<|image_{index}|>\n" for index in range(1, len(images) + 1))
    messages = [{"role": "user", "content": placeholder + "Do these two pictures show the same thing?"}]
    prompt = own.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == TEXTS["two"]
    inputs = own(prompt, images, return_tensors="pt").to("cpu")
    generation_args = {"max_new_tokens": 6, "temperature": 0.0, "do_sample": False}
    generate_ids = model.generate(**inputs, eos_token_id=own.tokenizer.eos_token_id, **generation_args)
    generate_ids = generate_ids[:, inputs["input_ids"].shape[1] :]
    response = own.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]

    expected = new_tokens(load_model(tiny_dir), inputs_of(processor, "two"), 6)
    assert generate_ids.tolist() == expected
    assert response == processor.tokenizer.decode(expected[0], skip_special_tokens=True)
