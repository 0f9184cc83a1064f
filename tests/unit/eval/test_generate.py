"""Batched answers equal single ones, in the data set's order, with everything of the model restored."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from phi3v.data.dataset import ConversationDataset
from phi3v.errors import DataError
from phi3v.eval.generate import answer_batch, generate_once, generate_predictions
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor


@pytest.fixture
def dataset(tmp_path: Path) -> ConversationDataset:
    """Text only, one image, two images, and two turns of which the second adds an image."""
    (tmp_path / "images").mkdir()
    for index, size in enumerate([(30, 80), (90, 40), (56, 56)]):
        Image.frombytes("RGB", size, bytes((7 * index + k) % 256 for k in range(3 * size[0] * size[1]))).save(
            tmp_path / "images" / f"{index}.png"
        )
    turns = [
        [{"user": "A much longer question about nothing in particular, really?", "assistant": "no"}],
        [{"images": ["0.png"], "user": "One?", "assistant": "a", "answers": ["a", "b"]}],
        [{"images": ["1.png", "2.png"], "user": "Two?", "assistant": "b"}],
        [
            {"images": ["0.png"], "user": "First?", "assistant": "c"},
            {"images": ["2.png"], "user": "Second <|image_2|>?", "assistant": "d"},
        ],
    ]
    lines = [json.dumps({"id": f"s{index}", "conversations": turn}) for index, turn in enumerate(turns)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return ConversationDataset(tmp_path / "data.jsonl")


def test_batched_answers_equal_single_ones(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    def answers(batch_size: int) -> list[str]:
        predictions = generate_predictions(
            tiny_model, processor, dataset, batch_size=batch_size, max_new_tokens=6, progress=False
        )
        return [one.prediction for one in predictions]

    single = answers(1)
    assert any(single)
    assert answers(3) == single
    assert answers(8) == single


def test_every_turn_is_a_question_in_the_order_of_the_data(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    predictions = generate_predictions(tiny_model, processor, dataset, batch_size=2, max_new_tokens=2, progress=False)
    assert [(one.id, one.turn) for one in predictions] == [("s0", 0), ("s1", 0), ("s2", 0), ("s3", 0), ("s3", 1)]
    assert predictions[1].answers == ("a", "b")
    assert predictions[4].question == "Second ?"
    assert [Path(name).name for name in predictions[4].images] == ["0.png", "2.png"]
    assert all(Path(name).is_absolute() for one in predictions for name in one.images)


def test_limit_counts_samples(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    predictions = generate_predictions(
        tiny_model, processor, dataset, batch_size=4, max_new_tokens=1, limit=2, progress=False
    )
    assert [one.id for one in predictions] == ["s0", "s1"]


def test_later_turns_see_the_gold_answers_of_earlier_ones(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    """The reference asks with the whole history written out by hand."""
    predictions = generate_predictions(tiny_model, processor, dataset, batch_size=1, max_new_tokens=5, progress=False)
    images = dataset.load_images(dataset[3])
    text = (
        "<|user|>\n<|image_1|>\nFirst?<|end|>\n<|assistant|>\nc<|end|>\n"
        "<|user|>\nSecond <|image_2|>?<|end|>\n<|assistant|>\n"
    )
    inputs = processor(text, images, return_tensors="pt")
    assert predictions[4].prediction == answer_batch(tiny_model, processor, dict(inputs), 5)[0]


def test_the_training_flag_and_random_state_are_as_before(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    tiny_model.train()
    state = torch.get_rng_state()
    generate_predictions(tiny_model, processor, dataset, batch_size=2, max_new_tokens=2, progress=False)
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)


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
