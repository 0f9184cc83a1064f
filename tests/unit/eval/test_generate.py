"""Generation from one prompt."""

import pytest
from PIL import Image

from phi3v.errors import DataError
from phi3v.eval.generate import generate_once
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from prompting import IMAGES, Ask, plain_tokens


@pytest.mark.parametrize("images", [["wide", "square"], ["square", "wide"]])
def test_an_answer_is_the_text_of_the_generated_tokens(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, ask: Ask, images: list[str]
) -> None:
    """Two images of different numbers of crops."""
    prompt = ask("<|image_1|>\n<|image_2|>\nAlike?", images)
    assert len({len(picture.crops) for picture in prompt.pictures}) == 2
    expected = processor.tokenizer.decode(plain_tokens(tiny_model, prompt, 16), skip_special_tokens=True)
    shown = [IMAGES[name] for name in images]
    assert generate_once(tiny_model, processor, "Alike?", shown, max_new_tokens=16) == expected.strip() != ""


def test_one_prompt_with_images_in_any_tag_order(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (90, 30), "blue")
    swapped = generate_once(tiny_model, processor, "<|image_2|> then <|image_1|>?", [first, second], max_new_tokens=5)
    straight = generate_once(tiny_model, processor, "<|image_1|> then <|image_2|>?", [second, first], max_new_tokens=5)
    assert swapped == straight


def test_one_prompt_whose_tags_do_not_fit_is_refused(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    with pytest.raises(DataError, match="command line"):
        generate_once(tiny_model, processor, "<|image_1|> and <|image_2|>?", [Image.new("RGB", (9, 9))])
