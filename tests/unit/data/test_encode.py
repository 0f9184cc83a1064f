import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from phi3v.data.encode import OVERLONG, SampleEncoder
from phi3v.data.schema import IMAGE_TAG, Sample, SampleError, Turn, parse_sample, render
from phi3v.geometry import num_image_tokens
from phi3v.model.processing_phi3_v import Phi3VProcessor

SQUARE = (336, 336)
SQUARE_TOKENS = 313  # at one tile: two crops of 144, two rows of separators of 12, one between


def sample_of(*turns: dict, **keys) -> Sample:
    return parse_sample(json.dumps({"id": "s", "conversations": list(turns), **keys}), "train.jsonl:3")


def one_turn(user: str = "What colour?", assistant: str = "Red", images: tuple | list = (), **keys) -> Sample:
    return sample_of({"user": user, "assistant": assistant, "images": list(images)}, **keys)


def square(colour: int = 0) -> Image.Image:
    return Image.new("RGB", (336, 336), (colour, 0, 0))


def crops_of(encoded) -> int:
    sizes = encoded["image_sizes"].tolist() if "image_sizes" in encoded else []
    return sum(height * width // 336**2 + 1 for height, width in sizes)


def supervised_text(processor, encoded) -> str:
    labels = encoded["labels"]
    return processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=False)


GOLDEN_SAMPLES = {
    "single_image": [("What is the invoice number?", "2043", 1)],
    "two_images": [("Is the statement true: both images show a box?", "True", 2)],
    "text_only": [("Name a colour.", "Blue, or teal.", 0)],
    "two_turns": [("What is it?", "A banner.", 1), ("Which colour?", "Red", 0)],
}


@pytest.mark.parametrize("name", GOLDEN_SAMPLES)
def test_ids_and_labels_are_the_published_ones(golden, name):
    case = next(case for case in json.loads((golden / "cases.json").read_text()) if case["name"] == name)
    recorded = load_file(golden / "tensors.safetensors")
    paths = iter(case["images"])
    turns = [
        {"user": user, "assistant": assistant, "images": [next(paths) for _ in range(num_images)]}
        for user, assistant, num_images in GOLDEN_SAMPLES[name]
    ]
    sample = sample_of(*turns)
    images = [Image.open(golden / path) for path in case["images"]]
    processor = Phi3VProcessor.from_pretrained(golden, num_crops=case["num_crops"])
    encoder = SampleEncoder(processor)
    encoded = encoder.encode(sample, images)

    ids = recorded[f"{name}.input_ids"][0]
    assert torch.equal(encoded["input_ids"], torch.where(ids < 0, processor.image_token_id, ids))
    # The recording supervises the last answer only; the earlier one was part of its prompt.
    last = torch.arange(len(ids)) >= (recorded[f"{name}.labels"][0] != -100).nonzero()[0]
    assert torch.equal(torch.where(last, encoded["labels"], -100), recorded[f"{name}.labels"][0])
    prompt = encoder.encode_prompt(sample, images, len(turns) - 1)["input_ids"]
    answer_start = len(ids) - int(last.sum())
    assert torch.equal(prompt, encoded["input_ids"][:answer_start])


def test_a_prompt_is_what_the_processor_makes_of_the_whole_text(processor):
    """Serving code passes one text with all turns; its ids are those that training puts before the answer."""
    sample = sample_of(
        {"user": "one", "assistant": "first", "images": ["a"]},
        {"user": "two", "assistant": "second"},
        {"user": "three <|image_3|> and <|image_2|>", "assistant": "third", "images": ["b", "c"]},
        {"user": "four", "assistant": "fourth"},
        system="Be brief.",
    )
    images = [square(0), square(100), square(200)]
    encoder = SampleEncoder(processor)
    training = encoder.encode(sample, images)["input_ids"].tolist()
    for turn, num_images in enumerate((1, 1, 3, 3)):
        prompt = encoder.encode_prompt(sample, images[:num_images], turn)
        text = "".join(segment.text for segment in render(sample, turn))
        whole = processor(text, images[:num_images], return_tensors="pt")
        assert prompt["input_ids"].tolist() == whole["input_ids"][0].tolist()
        assert training[: len(prompt["input_ids"])] == prompt["input_ids"].tolist()
        assert torch.equal(prompt["pixel_values"], whole["pixel_values"])
        assert "labels" not in prompt
    assert training.count(processor.bos_token_id) == 1 + len(images)


def test_every_answer_is_supervised_with_its_end_and_nothing_else(processor):
    sample = sample_of(
        {"user": "one", "assistant": "first answer", "images": ["a"]}, {"user": "two", "assistant": "second"}
    )
    encoded = SampleEncoder(processor).encode(sample, [square()])
    answers = [
        processor.tokenizer("first answer<|end|>\n", add_special_tokens=False).input_ids,
        processor.tokenizer("second<|end|>\n<|endoftext|>", add_special_tokens=False).input_ids,
    ]
    runs = [
        [token for _, token in run]
        for is_answer, run in itertools.groupby(
            zip(encoded["labels"].tolist(), encoded["input_ids"].tolist(), strict=True), lambda pair: pair[0] != -100
        )
        if is_answer
    ]
    assert runs == answers
    is_supervised = encoded["labels"] != -100
    assert torch.equal(encoded["labels"][is_supervised], encoded["input_ids"][is_supervised])


def test_images_follow_their_tags_also_in_samples_built_by_hand(processor):
    user = "<|image_2|> or <|image_1|>?"
    by_hand = Sample("s", (Turn(user, "b", ("a", "b"), ("b",)),), None, None, None, "here:1")
    from_file = one_turn(user=user, assistant="b", images=["a", "b"])
    encoder = SampleEncoder(processor)
    wide, tall = Image.new("RGB", (336, 50)), Image.new("RGB", (336, 336), "white")
    hand = encoder.encode(by_hand, [wide, tall])
    file = encoder.encode(from_file, [tall, wide])
    for key in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(hand[key], file[key])
    assert hand["pixel_values"][0, 0].mean() > hand["pixel_values"][1, 0].mean()


def test_the_sample_chooses_its_number_of_crops(processor):
    encoder = SampleEncoder(processor)
    fine = one_turn(images=["a"], num_crops=4)
    encoded = encoder.encode(fine, [square()])
    assert encoded["pixel_values"].shape == (1, 5, 3, 336, 336)
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 757
    assert encoder.measure(fine, [SQUARE]).crops == 5
    assert encoder.measure(one_turn(images=["a"]), [SQUARE]).crops == 2


def test_text_only_has_no_pixels(processor):
    assert set(SampleEncoder(processor).encode(one_turn(), [])) == {"input_ids", "labels"}


@pytest.mark.parametrize("field", ["user", "assistant", "system"])
@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>", "<|placeholder3|>"])
def test_text_with_the_tokenizers_special_tokens_is_refused(processor, field, token):
    encoder = SampleEncoder(processor)
    with pytest.raises(SampleError, match=r"train\.jsonl:3: sample 's'.*special token\. Take it out") as caught:
        encoder.measure(one_turn(**{field: f"a {token} b"}), [])
    assert token in str(caught.value)


def test_words_that_were_added_to_the_vocabulary_are_text(processor):
    wider = copy.deepcopy(processor)
    wider.tokenizer.add_tokens(["<loc_17>"])
    ids = SampleEncoder(wider).encode_text(one_turn(assistant="at <loc_17>"), []).input_ids
    assert wider.tokenizer.convert_tokens_to_ids("<loc_17>") in ids.tolist()


def test_tags_and_images_that_do_not_fit_are_refused(processor):
    encoder = SampleEncoder(processor)
    with pytest.raises(SampleError, match=r"train\.jsonl:3: .*shows 1 image\(s\) but 0 were given\. List"):
        encoder.encode(one_turn(images=["a"]), [])
    by_hand = replace(one_turn(), turns=(Turn("<|image_2|>", "b", ("a",), ("b",)),))
    with pytest.raises(SampleError, match=r"train\.jsonl:3: .*without gaps.*Number the tags again"):
        encoder.measure(by_hand, [SQUARE])


def test_an_image_too_elongated_to_resize_is_refused(processor):
    with pytest.raises(SampleError, match=r"train\.jsonl:3: .*image 'a'.*elongated.*Crop or pad") as caught:
        SampleEncoder(processor).measure(one_turn(images=["a"]), [(1, 5000)])
    assert caught.value.reason == "elongated image"


PIECES = ["word ", "a", " ", "\n", "é", "漢", "😀", "3.14 ", "<|image", "<|", "'s "]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join).filter(str.strip)


@st.composite
def samples(draw) -> tuple[Sample, list[tuple[int, int]]]:
    turns = []
    num_images = 0
    for _ in range(draw(st.integers(1, 3))):
        own = draw(st.integers(0, 2))
        user = draw(TEXTS)
        if own and draw(st.booleans()):
            tags = draw(st.permutations(range(num_images + 1, num_images + own + 1)))
            user = "".join(f"{draw(TEXTS)}<|image_{tag}|>" for tag in tags) + user
        num_images += own
        turns.append({"user": user, "assistant": draw(TEXTS), "images": ["x"] * own})
    return sample_of(*turns), [(draw(st.integers(20, 400)), draw(st.integers(20, 400))) for _ in range(num_images)]


@settings(max_examples=60, deadline=None)
@given(samples())
def test_measured_lengths_are_the_encoded_ones(processor, drawn):
    sample, sizes = drawn
    encoder = SampleEncoder(processor)
    encoded = encoder.encode(sample, [Image.new("RGB", (width, height)) for height, width in sizes])
    lengths = encoder.measure(sample, sizes)
    assert lengths.tokens == len(encoded["input_ids"])
    assert lengths.supervised == (encoded["labels"] != -100).sum()
    assert lengths.crops == crops_of(encoded)


@settings(max_examples=60, deadline=None)
@given(samples())
def test_a_stem_ends_with_the_leading_images_and_leaves_the_question(processor, drawn):
    sample, sizes = drawn
    encoder = SampleEncoder(processor)
    text, stem = encoder.encode_text(sample, sizes), encoder.measure(sample, sizes).stem
    assert text.stem == stem
    pieces = IMAGE_TAG.split(render(sample)[0].text)[::2]
    leading = 0
    while leading < len(pieces) - 1 and (leading == 0 or not pieces[leading].strip()):
        leading += 1
    assert stem.images == leading
    ids = text.input_ids.tolist()
    is_image = [token == processor.image_token_id for token in ids]
    shown = [num_image_tokens(grid) for grid in text.grids[:leading]]
    assert sum(is_image[: stem.tokens]) == sum(shown) and (not leading or is_image[stem.tokens - 1])
    assert stem.crops == sum(rows * columns + 1 for rows, columns in text.grids[:leading])
    assert (text.labels[: stem.tokens + 1] == -100).all() and stem.tokens + 1 < len(ids)


def test_stems_are_equal_where_samples_begin_alike(processor):
    encoder = SampleEncoder(processor)

    def digest(**changes) -> bytes:
        sample = sample_of(*changes.pop("turns", [{"user": "why", "assistant": "so", "images": ["a", "b"]}]), **changes)
        return encoder.measure(sample, [SQUARE, SQUARE]).stem.digest

    first = digest()
    assert digest(turns=[{"user": "how", "assistant": "no", "images": ["x", "y"]}]) == first  # which image: the path
    assert digest(turns=[{"user": "<|image_1|>\n<|image_2|>\nhow", "assistant": "n", "images": ["x", "y"]}]) == first
    others = [
        digest(num_crops=4),
        digest(system="Be brief."),
        digest(turns=[{"user": "<|image_1|> and <|image_2|>\nhow", "assistant": "n", "images": ["x", "y"]}]),
        digest(turns=[{"user": "See <|image_1|>\n<|image_2|>\nhow", "assistant": "n", "images": ["x", "y"]}]),
        digest(turns=[{"user": "u", "assistant": "n"}, {"user": "v", "assistant": "n", "images": ["x", "y"]}]),
    ]
    assert len({first, *others}) == 6


def test_a_cut_sample_begins_as_it_is_cut(processor):
    sample = one_turn(user="<|image_1|> and <|image_2|> which", assistant="so", images=["a", "b"])
    encoder = SampleEncoder(processor)
    full = encoder.measure(sample, [SQUARE, SQUARE])
    cut = SampleEncoder(processor, max_length=full.tokens - 3, on_overlong="cut")
    assert full.stem.images == 1
    text = cut.encode_text(sample, [SQUARE, SQUARE])
    assert text.stem == cut.measure(sample, [SQUARE, SQUARE]).stem
    assert text.input_ids[text.stem.tokens - 1] == processor.image_token_id


def tokens_of(sample, sizes, processor) -> int:
    return SampleEncoder(processor).measure(sample, sizes).tokens


@settings(max_examples=60, deadline=None)
@given(samples(), st.floats(0.01, 0.99))
def test_a_cut_takes_text_and_nothing_else(processor, drawn, fraction):
    sample, sizes = drawn
    full = SampleEncoder(processor).encode(sample, [Image.new("RGB", (w, h)) for h, w in sizes])["input_ids"].tolist()
    max_length = max(1, int(len(full) * fraction))
    encoder = SampleEncoder(processor, max_length=max_length, on_overlong="cut")
    try:
        cut = encoder.encode(sample, [Image.new("RGB", (w, h)) for h, w in sizes])
    except SampleError as error:
        assert error.reason == "too long to cut"
        assert "train.jsonl:3" in str(error)
        assert "Raise max_length, lower num_crops" in str(error)
        return
    ids = cut["input_ids"].tolist()
    assert len(ids) <= max_length
    assert encoder.measure(sample, sizes)[:4] == (len(ids), (cut["labels"] != -100).sum(), crops_of(cut), True)
    frame = [processor.image_token_id, processor.bos_token_id, *processor.stop_token_ids]
    frame += [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|assistant|>")]
    assert [token for token in ids if token in frame] == [token for token in full if token in frame]
    ending = processor.tokenizer("<|end|>\n<|endoftext|>", add_special_tokens=False).input_ids
    assert cut["labels"].tolist()[-len(ending) :] == ending
    for answer in processor.tokenizer.decode(cut["input_ids"]).split("<|assistant|>")[1:]:
        assert answer.split("<|end|>")[0].strip()


def test_a_cut_starts_at_the_end_of_the_longest_question(processor):
    sample = sample_of(
        {"user": "short question", "assistant": "yes " * 30},
        {"user": "one two three <|image_1|> four five six seven", "assistant": "no", "images": ["a"]},
    )
    full = tokens_of(sample, [SQUARE], processor)
    encoder = SampleEncoder(processor, max_length=full - 5, on_overlong="cut")
    text = processor.tokenizer.decode(encoder.encode(sample, [square()])["input_ids"])
    assert "short question" in text
    assert "one two thr" in text
    assert "six" not in text
    assert text.count("<|image|>") == SQUARE_TOKENS
    assert "yes " * 29 in text


def test_a_cut_goes_on_to_the_last_answer_and_stops_where_only_images_are_left(processor):
    sample = one_turn(user="why", assistant="because of this and that", images=["a"])
    bare = tokens_of(one_turn(user="", assistant="x", images=["a"]), [SQUARE], processor)
    encoder = SampleEncoder(processor, max_length=bare, on_overlong="cut")
    encoded = encoder.encode(sample, [square()])
    assert len(encoded["input_ids"]) == bare
    assert supervised_text(processor, encoded).startswith("because<|end|>")
    with pytest.raises(
        SampleError, match=r"train\.jsonl:3: .*its 1 image\(s\) alone take 313 tokens.*Raise max_length"
    ):
        SampleEncoder(processor, max_length=bare - 1, on_overlong="cut").encode(sample, [square()])


def test_an_over_long_sample_is_refused_or_reported(processor):
    sample = one_turn(images=["a"])
    full = tokens_of(sample, [SQUARE], processor)
    for policy in ("error", "drop", "cut"):
        fitting = SampleEncoder(processor, max_length=full, on_overlong=policy).measure(sample, [SQUARE])
        assert (fitting.tokens, fitting.is_overlong) == (full, False)
    refusing = SampleEncoder(processor, max_length=full - 1, on_overlong="error")
    with pytest.raises(
        SampleError, match=rf"train\.jsonl:3: .*{full} tokens, of which 313 .*Raise max_length"
    ) as caught:
        refusing.measure(sample, [SQUARE])
    assert caught.value.reason == OVERLONG
    dropping = SampleEncoder(processor, max_length=full - 1, on_overlong="drop")
    assert dropping.measure(sample, [SQUARE])[:4] == (full, 5, 2, True)  # ▁Red <|end|> ▁ \\n <|endoftext|>
    with pytest.raises(SampleError, match="exceed max_length"):
        dropping.encode(sample, [square()])


def test_a_sample_may_not_be_longer_than_the_model_knows_positions(processor):
    sample = one_turn(user="word " * 50)
    full = tokens_of(sample, [], processor)
    for limits in ({"max_positions": full - 1}, {"max_positions": full - 1, "max_length": full}):
        with pytest.raises(SampleError) as caught:
            SampleEncoder(processor, **limits).measure(sample, [])
        assert caught.value.reason == OVERLONG
        assert f"exceed the {full - 1} positions that the model knows" in str(caught.value)
        way = "on_overlong to drop" if "max_length" in limits else f"max_length to {full - 1} and on_overlong to drop"
        assert f". Lower num_crops, shorten the text, or set {way}" in str(caught.value)
    assert not SampleEncoder(processor, max_positions=full).measure(sample, []).is_overlong
    with pytest.raises(SampleError, match=r"exceed max_length=9\. Raise max_length, lower"):
        SampleEncoder(processor, max_positions=full - 1, max_length=9).measure(sample, [])
    cut = SampleEncoder(processor, max_positions=full - 5, on_overlong="cut").measure(sample, [])
    assert (cut.tokens <= full - 5, cut.is_overlong) == (True, True)


def test_a_prompt_has_no_length_limit(processor):
    sample = one_turn(user="word " * 50)
    encoder = SampleEncoder(processor, max_length=10, on_overlong="cut")
    assert len(encoder.encode_prompt(sample, [], 0)["input_ids"]) > 50


def test_settings_out_of_range_are_refused(processor):
    with pytest.raises(ValueError, match="max_length is 0"):
        SampleEncoder(processor, max_length=0)
    with pytest.raises(ValueError, match="must be error, drop or cut"):
        SampleEncoder(processor, on_overlong="truncate")  # pyright: ignore[reportArgumentType]
