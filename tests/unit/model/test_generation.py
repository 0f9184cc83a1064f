"""Generation that goes on from a cache: later turns, drafts that are rejected, and LongRoPE's change of factors."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from phi3v.model.cache_names import CACHE_NAME
from phi3v.model.checkpoint import load_model
from phi3v.model.generation_phi3_v import positions_of_keys
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

LIMIT = 64
"""``original_max_position_embeddings`` of ``limited_model``."""

FIRST = "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n"
SECOND = "<|end|>\n<|user|>\n<|image_1|>\n<|image_2|>\nAnd these?<|end|>\n<|assistant|>\n"
TEXT = "<|end|>\n<|user|>\nWhy is that so, and what else could it have been? Answer at length.<|end|>\n<|assistant|>\n"
SIZES = [(56, 56), (30, 100), (90, 40)]


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES]


def generated(model: Any, inputs: dict[str, Any], count: int, **options: Any) -> list[int]:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, **options}
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


# --- drafts


def repeating(length: int) -> dict[str, torch.Tensor]:
    """Text in which everything comes again, so that a look into it always finds a draft."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(100, 30_000, (7,), generator=generator).repeat(length)[None, -length:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def assistant(limited_dir: Path) -> Phi3VForCausalLM:
    """Agrees with ``limited_model`` now and then."""
    model: Any = load_model(limited_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("length", [40, LIMIT - 2, LIMIT - 1, LIMIT, LIMIT + 1, 90])
@pytest.mark.parametrize("way", ["lookup", "assistant", "itself"])
def test_drafts_change_no_answer(limited_model: Any, assistant: Any, way: str, length: int) -> None:
    """Also where some of them would lie beyond the short factors' positions."""
    inputs = repeating(length)
    expected = generated(limited_model, inputs, 40, use_cache=False)
    helps: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
        "assistant": {"assistant_model": assistant},
        "itself": {"assistant_model": limited_model},
    }[way]
    assert generated(limited_model, inputs, 40, **helps) == expected


@pytest.mark.parametrize("way", ["lookup", "itself"])
def test_drafts_behind_images(limited_model: Any, processor: Phi3VProcessor, way: str) -> None:
    inputs = dict(processor([FIRST], [pictures()[:1]]))
    expected = generated(limited_model, inputs, 60, use_cache=False)
    helps: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
        "itself": {"assistant_model": limited_model},
    }[way]
    assert generated(limited_model, inputs, 60, **helps) == expected


def test_drafts_after_left_padding(limited_model: Any) -> None:
    inputs = repeating(50)
    padded = {
        "input_ids": torch.cat([torch.full((1, 9), 32000), inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 9, dtype=torch.int64), inputs["attention_mask"]], dim=1),
    }
    expected = generated(limited_model, inputs, 40, use_cache=False)
    assert generated(limited_model, padded, 40, prompt_lookup_num_tokens=6, max_matching_ngram_size=1) == expected


def test_a_draft_may_repeat_image_positions(tiny_model: Any, processor: Phi3VProcessor) -> None:
    """A look into the prompt copies what stands there; the model has to say whether it is right."""
    inputs = dict(processor([FIRST.replace("it", "it\n")], [pictures()[:1]]))
    newline = inputs["input_ids"][0, int((inputs["input_ids"][0] == 32044).nonzero()[0]) - 1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], newline[None, None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = generated(tiny_model, inputs, 20)
    assert generated(tiny_model, inputs, 20, prompt_lookup_num_tokens=6, max_matching_ngram_size=1) == expected


# --- a cache that was cropped


@pytest.mark.parametrize("kept", [30, 60])
@pytest.mark.parametrize("filled_by", ["forward", "generate"])
def test_a_cache_cropped_to_below_the_limit_goes_on(limited_model: Any, filled_by: str, kept: int) -> None:
    """Its keys have the long factors, but the shorter text needs the short ones."""
    inputs = repeating(80)
    if filled_by == "forward":
        cache: Any = DynamicCache()
        with torch.no_grad():
            limited_model(**inputs, **{CACHE_NAME: cache})
    else:
        cache = limited_model.generate(
            **repeating(50), max_new_tokens=30, min_new_tokens=30, do_sample=False, return_dict_in_generate=True
        )[CACHE_NAME]
        inputs["input_ids"] = limited_model.generate(
            **repeating(50), max_new_tokens=30, min_new_tokens=30, do_sample=False
        )
    cache.crop(kept - cache.get_seq_length())
    again = {"input_ids": inputs["input_ids"][:, : kept + 2]}
    expected = generated(limited_model, again, 30, use_cache=False)
    assert generated(limited_model, again, 30, **{CACHE_NAME: cache}) == expected


def test_an_emptied_cache_is_as_a_new_one(limited_model: Any) -> None:
    """What it held before, with the long factors, does not count."""
    cache = DynamicCache()
    with torch.no_grad():
        limited_model(**repeating(80), **{CACHE_NAME: cache})
        cache.crop(-cache.get_seq_length())
        limited_model(**repeating(30), **{CACHE_NAME: cache})
    assert positions_of_keys(cache) == 30 == cache.get_seq_length()


def test_a_prompt_in_chunks_across_the_limit_is_refused_by_its_setting(limited_model: Any) -> None:
    with pytest.raises(ValueError, match="without prefill_chunk_size"):
        limited_model.generate(**repeating(80), max_new_tokens=2, prefill_chunk_size=32)


# --- later turns


class Conversation:
    """A first turn that was answered, and a second that shows two more images.

    Attributes:
        whole: everything up to the second answer, with all images.
        new: the images of the second turn alone.
        cache: of the first turn and its answer.
    """

    def __init__(self, model: Any, processor: Phi3VProcessor, second: str = SECOND) -> None:
        shown = pictures()
        first = dict(processor([FIRST], [shown[:1]]))
        self.past: Any = model.generate(
            **first, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        self.cache = self.past[CACHE_NAME]
        later = dict(processor([second], [shown[1:] if "image" in second else []]))
        self.new = {key: later[key] for key in ("pixel_values", "image_sizes") if key in later}
        ids = torch.cat([self.past["sequences"], later["input_ids"]], dim=1)
        self.later_ids = torch.cat([self.past["sequences"][:, -1:], later["input_ids"]], dim=1)
        self.whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        every = dict(processor(["<|image_1|><|image_2|><|image_3|>"], [shown]))
        count = 3 if self.new else 1
        self.images = {key: every[key][:count] for key in ("pixel_values", "image_sizes")}


def test_a_later_turn_with_all_images(tiny_model: Any, processor: Phi3VProcessor) -> None:
    talk = Conversation(tiny_model, processor)
    expected = generated(tiny_model, {**talk.whole, **talk.images}, 6)
    cached = {CACHE_NAME: talk.cache}
    assert generated(tiny_model, {**talk.whole, **talk.images}, 6, **cached) == expected


def test_a_later_turn_with_its_own_images(tiny_model: Any, processor: Phi3VProcessor) -> None:
    talk = Conversation(tiny_model, processor)
    expected = generated(tiny_model, {**talk.whole, **talk.images}, 6)
    only_new = {"input_ids": talk.later_ids, "attention_mask": talk.whole["attention_mask"]}
    for ids in (talk.whole, only_new):
        cached = {CACHE_NAME: copy.deepcopy(talk.cache)}
        assert generated(tiny_model, {**ids, **talk.new}, 6, **cached) == expected


@pytest.mark.parametrize("images", ["all", "new"])
def test_beams_of_a_later_turn(tiny_model: Any, processor: Phi3VProcessor, images: str) -> None:
    talk = Conversation(tiny_model, processor)
    expected = generated(tiny_model, {**talk.whole, **talk.images}, 6, num_beams=3)
    talk.cache.batch_repeat_interleave(3)
    given = talk.images if images == "all" else talk.new
    assert generated(tiny_model, {**talk.whole, **given}, 6, num_beams=3, **{CACHE_NAME: talk.cache}) == expected


@pytest.mark.parametrize("second", [SECOND, TEXT])
@pytest.mark.parametrize("from_cache", [False, True])
def test_a_later_turn_that_outgrows_the_short_factors(
    limited_model: Any, processor: Phi3VProcessor, second: str, from_cache: bool
) -> None:
    talk = Conversation(limited_model, processor, second)
    assert talk.cache.get_seq_length() <= LIMIT < talk.whole["input_ids"].shape[1]
    expected = generated(limited_model, {**talk.whole, **talk.images}, 6, use_cache=False)
    cached = {CACHE_NAME: talk.cache} if from_cache else {}
    assert generated(limited_model, {**talk.whole, **talk.images}, 6, **cached) == expected


@pytest.mark.parametrize("second", [SECOND, TEXT])
def test_outgrowing_the_short_factors_needs_all_images(
    limited_model: Any, processor: Phi3VProcessor, second: str
) -> None:
    talk = Conversation(limited_model, processor, second)
    with pytest.raises(ValueError, match="images of the whole conversation"):
        generated(limited_model, {**talk.whole, **talk.new}, 6, **{CACHE_NAME: copy.deepcopy(talk.cache)})
    only_new = {"input_ids": talk.later_ids, "attention_mask": talk.whole["attention_mask"]}
    with pytest.raises(ValueError, match="ids of the whole conversation"):
        generated(limited_model, {**only_new, **talk.new}, 6, **{CACHE_NAME: talk.cache})


def test_a_later_turns_images_that_were_forgotten(tiny_model: Any, processor: Phi3VProcessor) -> None:
    talk = Conversation(tiny_model, processor)
    with pytest.raises(ValueError, match="image positions but no pixel_values were given"):
        generated(tiny_model, talk.whole, 6, **{CACHE_NAME: copy.deepcopy(talk.cache)})
    with pytest.raises(ValueError, match="image positions but no pixel_values were given"):
        tiny_model(talk.later_ids, **{CACHE_NAME: talk.cache})


def test_a_later_turns_images_that_do_not_fit(tiny_model: Any, processor: Phi3VProcessor) -> None:
    talk = Conversation(tiny_model, processor)
    two = {key: value[:2] for key, value in talk.images.items()}
    with pytest.raises(ValueError, match="row 0 of the batch holds"):
        generated(tiny_model, {**talk.whole, **two}, 6, **{CACHE_NAME: talk.cache})


def test_a_cache_that_ends_inside_an_image(tiny_model: Any, processor: Phi3VProcessor) -> None:
    talk = Conversation(tiny_model, processor)
    talk.cache.crop(12 - talk.cache.get_seq_length())
    with pytest.raises(ValueError, match="inside an image"):
        generated(tiny_model, {**talk.whole, **talk.images}, 6, **{CACHE_NAME: talk.cache})
