"""Generation from one batch or one prompt."""

import pytest
import torch
from PIL import Image

from phi3v.errors import DataError
from phi3v.eval.generate import answer_batch, generate_once
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor


def test_answers_stop_at_the_end_of_the_turn(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """A model that always predicts <|end|> answers with nothing, at once."""
    end = processor.stop_token_ids[1]
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()
        tiny_model.lm_head = torch.nn.Linear(32, tiny_model.config.vocab_size)
        tiny_model.lm_head.bias.zero_()
        tiny_model.lm_head.bias[end] = 1
    inputs = dict(processor("<|user|>\nHi<|end|>\n<|assistant|>\n", return_tensors="pt"))
    steps: list[object] = []
    tiny_model.generation_config.eos_token_id = None
    tiny_model.register_forward_hook(lambda *call: steps.append(call))
    assert answer_batch(tiny_model, processor, inputs, max_new_tokens=9) == [""]
    assert len(steps) == 1


def test_one_prompt_with_images_in_any_tag_order(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (90, 30), "blue")
    swapped = generate_once(tiny_model, processor, "<|image_2|> then <|image_1|>?", [first, second], max_new_tokens=5)
    straight = generate_once(tiny_model, processor, "<|image_1|> then <|image_2|>?", [second, first], max_new_tokens=5)
    assert swapped == straight


def test_one_prompt_whose_tags_do_not_fit_is_refused(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    with pytest.raises(DataError, match="command line"):
        generate_once(tiny_model, processor, "<|image_1|> and <|image_2|>?", [Image.new("RGB", (9, 9))])
