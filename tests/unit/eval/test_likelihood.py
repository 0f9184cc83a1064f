"""Label scores equal plain forwards, one for every prompt and label, however the labels are packed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from phi3v.data.collate import Collator
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import IGNORED_LABEL, Encoded, SampleEncoder
from phi3v.eval import likelihood
from phi3v.eval.likelihood import label_log_likelihoods, label_token_ids
from phi3v.model.checkpoint import load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

LABELS = ("Yes", "No", "Yes, but", "A much longer label, with a comma", "Y")
"""One is the beginning of two others."""

TOLERANCE = 2e-6
"""Relative, of a float32 sum of log-probabilities: other shapes sum in another order."""


@pytest.fixture
def dataset(tmp_path: Path) -> ConversationDataset:
    """Text only, one image, two images."""
    (tmp_path / "images").mkdir()
    for index, size in enumerate([(30, 80), (90, 40)]):
        Image.frombytes("RGB", size, bytes((7 * index + k) % 256 for k in range(3 * size[0] * size[1]))).save(
            tmp_path / "images" / f"{index}.png"
        )
    turns = [
        {"user": "Is it so?", "assistant": "Yes"},
        {"images": ["0.png"], "user": "Is there anything here at all?", "assistant": "No"},
        {"images": ["1.png", "0.png"], "user": "Alike?", "assistant": "Yes"},
    ]
    lines = [json.dumps({"id": f"s{index}", "conversations": [turn]}) for index, turn in enumerate(turns)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return ConversationDataset(tmp_path / "data.jsonl")


@pytest.fixture
def prompts(processor: Phi3VProcessor, dataset: ConversationDataset) -> list[Encoded]:
    encoder = SampleEncoder(processor)
    return [
        encoder.encode_prompt(dataset[index], dataset.load_images(dataset[index]), turn=0)
        for index in range(len(dataset))
    ]


def text_prompt(processor: Phi3VProcessor, num_tokens: int) -> Encoded:
    ids = processor.encode("<|user|>\n" + "why " * num_tokens)[:num_tokens]
    return Encoded(input_ids=torch.tensor(ids))


def score(
    model: object, processor: Phi3VProcessor, prompts: Sequence[Encoded], labels: Sequence[str]
) -> list[list[float]]:
    inputs = Collator(processor.tokenizer.pad_token_id, padding_side="left")(prompts)
    ids = [label_token_ids(processor, label) for label in labels]
    return [row.tolist() for row in label_log_likelihoods(model, inputs, [ids] * len(prompts))]


@torch.no_grad()
def plain(model: object, processor: Phi3VProcessor, prompt: Encoded, label: str) -> float:
    """The reference: prompt and label as one sequence without padding, cache or mask."""
    answer = label_token_ids(processor, label)
    ids = torch.cat([prompt["input_ids"], torch.tensor(answer)])[None]
    images = {name: prompt[name] for name in ("pixel_values", "image_sizes") if name in prompt}
    logits = model(input_ids=ids, **images).logits[0, -len(answer) - 1 : -1]  # pyright: ignore
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


def assert_plain(
    model: object,
    processor: Phi3VProcessor,
    prompts: Sequence[Encoded],
    labels: Sequence[str],
) -> None:
    found = score(model, processor, prompts, labels)
    expected = [[plain(model, processor, prompt, label) for label in labels] for prompt in prompts]
    for row, expected_row in zip(found, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=TOLERANCE)
        assert row.index(max(row)) == expected_row.index(max(expected_row))


def test_a_label_has_the_tokens_that_training_supervises(
    processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    end = processor.stop_token_ids[1]
    for index in range(len(dataset)):
        sample = dataset[index]
        supervised = SampleEncoder(processor).encode(sample, dataset.load_images(sample))["labels"].tolist()
        answer = [token for token in supervised if token != IGNORED_LABEL]
        assert label_token_ids(processor, sample.turns[0].assistant) == answer[: answer.index(end) + 1]


def test_a_batch_with_images_equals_plain_forwards(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, prompts: list[Encoded]
) -> None:
    assert_plain(tiny_model, processor, prompts, LABELS)
    assert_plain(tiny_model, processor, prompts[1:2], LABELS[:1])


def test_rows_may_have_labels_of_their_own(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, prompts: list[Encoded]
) -> None:
    sets = [LABELS[:2], LABELS, LABELS[3:]]
    inputs = Collator(processor.tokenizer.pad_token_id, padding_side="left")(prompts)
    found = label_log_likelihoods(
        tiny_model, inputs, [[label_token_ids(processor, label) for label in labels] for labels in sets]
    )
    for row, prompt, labels in zip(found, prompts, sets, strict=True):
        expected = [plain(tiny_model, processor, prompt, label) for label in labels]
        assert row.tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_many_labels_are_scored_in_pieces(
    tiny_model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    prompts: list[Encoded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces of two or three labels; the longest label alone is more than a piece should hold."""
    monkeypatch.setattr(likelihood, "MOST_LABEL_TOKENS", 3 * 8)
    assert_plain(tiny_model, processor, prompts, LABELS)


def test_with_an_adapter(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, prompts: list[Encoded]) -> None:
    base = score(tiny_model, processor, prompts, LABELS)
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_model,
        LoraConfig(r=4, target_modules=r"lm_head|.*(qkv_proj|down_proj|img_projection\.0)", init_lora_weights=False),
    ).eval()
    assert_plain(adapted, processor, prompts, LABELS)
    assert score(adapted, processor, prompts, LABELS)[0][0] != pytest.approx(base[0][0], rel=1e-3)


def test_with_eager_attention(tiny_dir: Path, processor: Phi3VProcessor, prompts: list[Encoded]) -> None:
    assert_plain(load_model(tiny_dir, attention="eager"), processor, prompts, LABELS)


@pytest.mark.parametrize("rope_mode", ["auto", "short", "long"])
def test_across_the_limit_of_the_short_factors(tiny_dir: Path, processor: Phi3VProcessor, rope_mode: str) -> None:
    """Labels of 2 to 10 tokens: from prompts that none of them carries over the limit to one that is over it itself."""
    model = load_model(tiny_dir, rope_mode=rope_mode)
    limit = 40
    assert isinstance(model, Phi3VForCausalLM)
    model.model.rotary_emb.original_positions = limit
    lengths = [len(label_token_ids(processor, label)) for label in LABELS]
    assert min(lengths) == 2 and max(lengths) >= 8
    # Alone, and with neighbours of other lengths.
    prompts = [text_prompt(processor, limit + shift) for shift in (-20, -5, -3, -1, 0, 1)]
    for prompt in prompts:
        assert_plain(model, processor, [prompt], LABELS)
    assert_plain(model, processor, prompts, LABELS)


def test_the_factors_matter_to_that_test(tiny_dir: Path, processor: Phi3VProcessor) -> None:
    model = load_model(tiny_dir)
    assert isinstance(model, Phi3VForCausalLM)
    short = plain(model, processor, text_prompt(processor, 39), LABELS[3])
    model.model.rotary_emb.original_positions = 40
    assert abs(plain(model, processor, text_prompt(processor, 39), LABELS[3]) - short) > 0.05


def test_images_are_embedded_once_and_prompts_once_a_regime(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, prompts: list[Encoded]
) -> None:
    """Five labels cost one pass over the prompt and one over the labels; the vision tower runs once."""
    passes: list[int] = []
    images: list[int] = []
    tiny_model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].shape[1]))
    tiny_model.model.vision_embed_tokens.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0])))
    layer_lengths: list[int] = []
    tiny_model.model.layers[0].register_forward_hook(lambda _, inputs, __: layer_lengths.append(inputs[0].shape[1]))
    num_label_tokens = sum(len(label_token_ids(processor, label)) for label in LABELS)

    score(tiny_model, processor, prompts[2:], LABELS)
    length = len(prompts[2]["input_ids"])
    assert layer_lengths == [length, num_label_tokens]
    assert images == [2]

    # The longest label alone outgrows the short factors: the prompt is computed once more, its images are not.
    layer_lengths.clear()
    images.clear()
    tiny_model.model.rotary_emb.original_positions = length + 5
    longest = max(len(label_token_ids(processor, label)) for label in LABELS)
    score(tiny_model, processor, prompts[2:], LABELS)
    assert layer_lengths == [length, num_label_tokens - longest, length + longest, longest]
    assert images == [2]


def test_model_and_random_state_are_as_before(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, prompts: list[Encoded]
) -> None:
    tiny_model.train()
    state = torch.get_rng_state()
    score(tiny_model, processor, prompts, LABELS)
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_label_is_as_likely_as_the_tokens_say(tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """A head that knows only its bias: every token of a label adds its own log-probability, ``<|end|>`` included."""
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()
        tiny_model.lm_head = torch.nn.Linear(32, tiny_model.config.vocab_size)
        tiny_model.lm_head.bias.zero_()
        tiny_model.lm_head.bias[processor.stop_token_ids[1]] = 3
    norm = math.log(tiny_model.config.vocab_size - 1 + math.exp(3))
    lengths = [len(label_token_ids(processor, label)) for label in LABELS]
    (found,) = score(tiny_model, processor, [text_prompt(processor, 9)], LABELS)
    assert found == pytest.approx([3 - length * norm for length in lengths], rel=1e-5)
