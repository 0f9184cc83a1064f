"""Texts with image tags: ids, order of images, batches, and messages about what does not fit."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.errors import CheckpointError
from phi3v.model.processing_phi3_v import CHAT_TEMPLATE, PUBLISHED_CHAT_TEMPLATE, TOKENIZER_FILES, Phi3VProcessor

IMAGE_ID = 32044
PAD_ID = 32000
TEXT = "<|user|>\nName a colour.<|end|>\n<|assistant|>\n"
ONE = "<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n"
TWO = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat differs?<|end|>\n<|assistant|>\n"


def picture(h: int, w: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng((h, w)).integers(0, 256, (h, w, 3), dtype=np.uint8))


WIDE, TALL, SQUARE = picture(30, 100), picture(90, 40), picture(56, 56)
"""On at most four tiles of 56 px: (1, 3), (2, 1) and (2, 2); 21, 19 and 27 tokens at 2 x 2 tokens a crop."""


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=0, rtol=0)


def rows_of(encoded: Any) -> list[list[int]]:
    """Returns the ids of every row without its padding."""
    pairs = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize(
    "text", ["", "plain", TEXT, ONE, TWO, "<|image_1|>", "a<|image_1|><|image_2|>b", " <|image_1|> spaced <|image_2|> "]
)
def test_every_piece_is_tokenized_on_its_own_with_its_own_bos(processor: Phi3VProcessor, text: str) -> None:
    expected: list[int] = []
    for index, piece in enumerate(re.split(r"<\|image_\d+\|>", text)):
        expected += [IMAGE_ID] * (3 + index) if index else []
        expected += processor.tokenizer(piece).input_ids  # the tokenizer itself puts <s> first
    assert processor.encode(text, [4, 5]) == expected
    assert processor.encode(text, [4, 5], add_bos=False) == expected[1:]


def test_text_alone(processor: Phi3VProcessor) -> None:
    encoded = processor(TEXT)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"].tolist() == [processor.encode(TEXT)]
    assert encoded["attention_mask"].tolist() == [[1] * len(processor.encode(TEXT))]
    assert_same(processor(TEXT, []), encoded)
    assert_same(processor([TEXT], None), encoded)


def test_image_positions_are_as_many_as_the_image_needs(processor: Phi3VProcessor) -> None:
    encoded = processor(TWO, [WIDE, TALL])
    assert int((encoded["input_ids"] == IMAGE_ID).sum()) == 21 + 19
    assert encoded["pixel_values"].shape == (2, 4, 3, 56, 56)
    assert encoded["image_sizes"].tolist() == [[56, 168], [112, 56]]


def test_ways_to_call(processor: Phi3VProcessor) -> None:
    expected = processor(ONE, [WIDE], return_tensors="pt")
    assert_same(processor(ONE, WIDE), expected)
    assert_same(processor(text=ONE, images=WIDE), expected)
    assert_same(processor(images=[WIDE], text=[ONE], padding=True, return_tensors="pt"), expected)
    assert_same(processor([ONE], [[WIDE]], padding="longest"), expected)
    assert_same(processor(ONE, np.asarray(WIDE)), expected)
    assert_same(processor(text=ONE, images=WIDE, videos=None, audio=None), expected)
    as_arrays = processor(ONE, WIDE, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in as_arrays.values())
    as_lists = processor(ONE, WIDE, return_tensors=None)
    assert as_lists["input_ids"] == expected["input_ids"].tolist()


def test_tags_out_of_order_show_their_own_images(processor: Phi3VProcessor) -> None:
    swapped = TWO.replace("_1", "_x").replace("_2", "_1").replace("_x", "_2")
    assert_same(processor(swapped, [WIDE, TALL]), processor(TWO, [TALL, WIDE]))
    three = "<|image_3|>a<|image_1|>b<|image_2|>"
    in_order = "<|image_1|>a<|image_2|>b<|image_3|>"
    assert_same(processor(three, [WIDE, TALL, SQUARE]), processor(in_order, [SQUARE, WIDE, TALL]))


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("<|image_2|>", "2"),
        ("<|image_1|><|image_1|>", "1, 1"),
        ("<|image_1|><|image_3|>", "1, 3"),
        ("<|image_0|>", "0"),
    ],
    ids=["missing", "duplicate", "gap", "zero"],
)
def test_wrong_tags(processor: Phi3VProcessor, text: str, held: str) -> None:
    with pytest.raises(ValueError, match=rf"numbered from <\|image_1\|> without gaps.* holds \[{held}\]"):
        processor(text, [WIDE, TALL])


def test_the_bare_image_token_is_refused(processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match=r"holds <\|image\|>"):
        processor("What does <|image|> mean?")


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (ONE, None, "text 0 holds 1 image tags but 0 images"),
        (TEXT, WIDE, "text 0 holds 0 image tags but 1 images"),
        (TWO, [WIDE], "text 0 holds 2 image tags but 1 images"),
        ([ONE, TWO], [WIDE, TALL], "the texts hold 3 image tags but 2 images"),
        ([ONE, TWO], [[WIDE], [TALL]], "text 1 holds 2 image tags but 1 images"),
        ([ONE, TWO], [[WIDE]], "2 texts but 1 lists of images"),
    ],
)
def test_counts_that_do_not_fit(processor: Phi3VProcessor, texts: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(texts, images)


@pytest.mark.parametrize("images", ["picture.png", ["picture.png"], torch.zeros(3, 5, 5)])
def test_refuses_what_is_no_image(processor: Phi3VProcessor, images: Any) -> None:
    with pytest.raises(TypeError, match="an image must be a PIL image or a uint8 array"):
        processor(ONE, images)


def test_refuses_unknown_keywords(processor: Phi3VProcessor) -> None:
    with pytest.raises(TypeError, match="does not take max_length, truncation"):
        processor(TEXT, truncation=True, max_length=10)
    with pytest.raises(ValueError, match="padding is 'max_length', must be one of"):
        processor(TEXT, padding="max_length")


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_everything(processor: Phi3VProcessor, side: str) -> None:
    texts, images = [TWO, TEXT, ONE], [[WIDE, TALL], [], [SQUARE]]
    encoded = processor(texts, images, padding_side=side)
    assert rows_of(encoded) == [rows_of(processor(text, own))[0] for text, own in zip(texts, images, strict=True)]
    longest = max(map(len, rows_of(encoded)))
    for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows_of(encoded), strict=True):
        padding, zeros = [PAD_ID] * (longest - len(row)), [0] * (longest - len(row))
        assert ids.tolist() == (padding + row if side == "left" else row + padding)
        assert mask.tolist() == (zeros + [1] * len(row) if side == "left" else [1] * len(row) + zeros)
    assert encoded["image_sizes"].tolist() == [[56, 168], [112, 56], [112, 112]]
    assert_same(processor(texts, [WIDE, TALL, SQUARE], padding_side=side), encoded)  # shared out by their tags
    for index, image in enumerate((WIDE, TALL, SQUARE)):
        alone = processor(ONE, image)["pixel_values"][0]
        torch.testing.assert_close(encoded["pixel_values"][index, : len(alone)], alone, atol=0, rtol=0)


def test_a_batch_keeps_each_texts_own_order(processor: Phi3VProcessor) -> None:
    swapped = "<|image_2|>\n<|image_1|>"
    encoded = processor([swapped, TWO], [WIDE, TALL, WIDE, SQUARE])
    assert encoded["image_sizes"].tolist() == [[112, 56], [56, 168], [56, 168], [112, 112]]


def test_without_padding(processor: Phi3VProcessor) -> None:
    encoded = processor([TEXT, ONE], WIDE, padding=False, return_tensors=None)
    assert [len(row) for row in encoded["input_ids"]] == [len(processor.encode(TEXT)), len(processor.encode(ONE, [21]))]
    assert encoded["attention_mask"] == [[1] * len(row) for row in encoded["input_ids"]]


def test_a_real_endoftext_is_no_padding(processor: Phi3VProcessor) -> None:
    finished = "Blue<|end|>\n<|endoftext|>"
    encoded = processor([finished, TEXT])
    assert rows_of(encoded)[0] == processor.encode(finished)
    assert rows_of(encoded)[0][-1] == PAD_ID


def test_num_crops_of_a_call_wins(processor: Phi3VProcessor, tiny_dir: Path) -> None:
    assert processor.num_crops == 4
    sixteen = Phi3VProcessor.from_pretrained(tiny_dir, num_crops=16)
    assert sixteen.num_crops == 16
    assert_same(processor(ONE, SQUARE, num_crops=16), sixteen(ONE, SQUARE))
    assert processor(ONE, SQUARE, num_crops=16)["pixel_values"].shape[1] == 17


def test_padding_side_of_the_tokenizer(tiny_dir: Path, processor: Phi3VProcessor) -> None:
    left = Phi3VProcessor.from_pretrained(tiny_dir, padding_side="left")
    assert_same(left([TEXT, ONE], WIDE), processor([TEXT, ONE], WIDE, padding_side="left"))
    assert processor.tokenizer.padding_side == "right"


def test_decoding(processor: Phi3VProcessor) -> None:
    ids = [processor.encode("A dog.<|end|>\n", add_bos=False), processor.encode("Two cats.", add_bos=False)]
    assert [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)] == ["A dog.", "Two cats."]
    assert processor.decode(ids[1]) == "Two cats."
    assert processor.tokenizer.eos_token_id == 32000
    assert processor.stop_token_ids == [32000, 32007]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<|image_1|>\nWhat is it?"},
    {"role": "assistant", "content": "A banner."},
    {"role": "user", "content": "Which colour?"},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_of_plain_messages(processor: Phi3VProcessor, add_generation_prompt: bool) -> None:
    assert processor.tokenizer.chat_template == PUBLISHED_CHAT_TEMPLATE
    for messages in (MESSAGES, MESSAGES[:3]):
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        by_tokenizer = processor.tokenizer.apply_chat_template(messages, **arguments)
        assert processor.apply_chat_template(messages, **arguments) == by_tokenizer
    assert processor.apply_chat_template(MESSAGES[1:2], add_generation_prompt=True) == ONE


def test_chat_template_of_messages_in_parts(processor: Phi3VProcessor) -> None:
    def user(*images: Image.Image, text: str) -> dict[str, Any]:
        parts = [{"type": "image", "image": image} for image in images]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    answer = {"role": "assistant", "content": [{"type": "text", "text": "One."}]}
    chats = [[user(WIDE, TALL, text="What differs?")], [user(WIDE, text="a"), answer, user(SQUARE, text="b")]]
    texts = [
        TWO,
        "<|user|>\n<|image_1|>\na<|end|>\n<|assistant|>\nOne.<|end|>\n<|user|>\n<|image_2|>\nb<|end|>\n<|assistant|>\n",
    ]
    assert processor.apply_chat_template(chats, add_generation_prompt=True) == texts
    encoded = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert_same(encoded, processor(texts, [[WIDE, TALL], [WIDE, SQUARE]]))
    with pytest.raises(Exception, match="text and image parts only"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_own_chat_template_is_kept(processor: Phi3VProcessor, tiny_dir: Path) -> None:
    tokenizer = Phi3VProcessor.from_pretrained(tiny_dir).tokenizer
    tokenizer.chat_template = "own"
    assert Phi3VProcessor(processor.image_processor, tokenizer).chat_template == "own"
    assert Phi3VProcessor(processor.image_processor, tokenizer, chat_template="given").chat_template == "given"
    assert processor.chat_template == CHAT_TEMPLATE


def test_saves_the_published_files_byte_for_byte(golden_dir: Path, tmp_path: Path) -> None:
    Phi3VProcessor.from_pretrained(golden_dir).save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        if name != "tokenizer_config.json":
            assert (tmp_path / name).read_bytes() == (golden_dir / name).read_bytes()
    settings = json.loads((golden_dir / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == settings
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*TOKENIZER_FILES, "preprocessor_config.json"])


def test_saves_a_changed_tokenizer(golden_dir: Path, tmp_path: Path) -> None:
    changed = Phi3VProcessor.from_pretrained(golden_dir)
    changed.tokenizer.add_tokens(["<|new|>"])
    changed.save_pretrained(tmp_path)
    again = Phi3VProcessor.from_pretrained(tmp_path)
    assert again.tokenizer.convert_tokens_to_ids("<|new|>") == changed.tokenizer.convert_tokens_to_ids("<|new|>")
    assert again.encode(TWO, [3, 4]) == changed.encode(TWO, [3, 4])


def test_travels_to_a_worker_process(processor: Phi3VProcessor) -> None:
    assert_same(pickle.loads(pickle.dumps(processor))(ONE, WIDE), processor(ONE, WIDE))


def test_a_foreign_tokenizer_is_refused(golden_dir: Path, tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", *TOKENIZER_FILES):
        content = (golden_dir / name).read_text().replace("<|image|>", "<|else|>")
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer has no <\|image\|>"):
        Phi3VProcessor.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        Phi3VProcessor.from_pretrained(tmp_path)
