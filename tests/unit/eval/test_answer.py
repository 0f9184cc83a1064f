"""Batched answers equal single ones, in the data set's order, with everything of the model restored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import DataError
from phi3v.eval import answer, loading
from phi3v.eval.answer import EvalSettings, Prediction, Share, answer_questions
from phi3v.eval.engine import Engine
from phi3v.eval.likelihood import label_token_ids
from phi3v.eval.prompts import Picture, Prompt
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from prompting import plain_log_likelihood, plain_tokens


def asking(**changes: Any) -> EvalSettings:
    settings: dict[str, Any] = {"metric": "accuracy", "batch_size": 2, "max_new_tokens": 2, "progress": False}
    return EvalSettings(**{**settings, **changes})


def prompt_of(processor: Phi3VProcessor, dataset: ConversationDataset, index: int, turn: int) -> Prompt:
    """A question's prompt as the encoder gives it, alone."""
    sample = dataset[index]
    encoded = SampleEncoder(processor).encode_prompt(sample, dataset.load_images(sample, turn), turn)
    pictures: list[Picture] = []
    if "pixel_values" in encoded and "image_sizes" in encoded:
        for number, (crops, size) in enumerate(
            zip(encoded["pixel_values"], encoded["image_sizes"].tolist(), strict=True)
        ):
            rows, columns = (side // crops.shape[-1] for side in size)
            pictures.append(Picture(str(number), crops[: rows * columns + 1], (rows, columns)))
    return Prompt(encoded["input_ids"].tolist(), tuple(pictures))


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


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_answers_are_those_of_plain_greedy_decoding(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset, batch_size: int | None
) -> None:
    for one in answer_questions(tiny_model, processor, dataset, asking(batch_size=batch_size, max_new_tokens=6)):
        prompt = prompt_of(processor, dataset, int(one.id.removeprefix("s")), one.turn)
        tokens = plain_tokens(tiny_model, prompt, 6, processor.stop_token_ids)
        assert one.prediction == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""


def test_no_more_questions_are_held_at_once_than_are_asked_for(
    tiny_model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[int] = []
    original = Engine.answer

    def counted(engine: Engine, groups: Any) -> Any:
        answers = original(engine, groups)
        held.append(len(answers))
        return answers

    monkeypatch.setattr(Engine, "answer", counted)
    for batch_size, expected in ((1, [1] * 5), (3, [2, 3]), (None, [5])):
        held.clear()
        answer_questions(tiny_model, processor, dataset, asking(batch_size=batch_size))
        assert sorted(held) == expected


def test_an_image_is_cut_once_for_all_questions_about_it(
    tiny_model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first image is shown by three questions; the third also by another sample that begins differently."""
    cut: list[tuple[int, int]] = []
    original = SampleEncoder.cut

    def counted(encoder: SampleEncoder, sample: Any, image: Image.Image) -> torch.Tensor:
        cut.append(image.size)
        return original(encoder, sample, image)

    monkeypatch.setattr(SampleEncoder, "cut", counted)
    answer_questions(tiny_model, processor, dataset, asking(batch_size=8))
    assert sorted(cut) == [(30, 80), (56, 56), (90, 40)]


def test_every_turn_is_a_question_in_the_order_of_the_data(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    predictions = answer_questions(tiny_model, processor, dataset, asking())
    assert [(one.id, one.turn) for one in predictions] == [("s0", 0), ("s1", 0), ("s2", 0), ("s3", 0), ("s3", 1)]
    assert predictions[1].answers == ("a", "b")
    assert predictions[4].question == "Second ?"
    assert [Path(name).name for name in predictions[4].images] == ["0.png", "2.png"]
    assert all(Path(name).is_absolute() for one in predictions for name in one.images)


def test_limit_counts_samples(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    predictions = answer_questions(tiny_model, processor, dataset, asking(limit=2))
    assert [one.id for one in predictions] == ["s0", "s1"]


def test_later_turns_see_the_gold_answers_of_earlier_ones(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    """The reference asks with the whole history written out by hand."""
    predictions = answer_questions(tiny_model, processor, dataset, asking(max_new_tokens=5))
    images = dataset.load_images(dataset[3])
    text = (
        "<|user|>\n<|image_1|>\nFirst?<|end|>\n<|assistant|>\nc<|end|>\n"
        "<|user|>\nSecond <|image_2|>?<|end|>\n<|assistant|>\n"
    )
    inputs = processor(text, images, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt_of(processor, dataset, 3, 1).ids
    tokens = plain_tokens(tiny_model, prompt_of(processor, dataset, 3, 1), 5, processor.stop_token_ids)
    assert predictions[4].prediction == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_the_training_flag_and_random_state_are_as_before(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    tiny_model.train()
    state = torch.get_rng_state()
    answer_questions(tiny_model, processor, dataset, asking())
    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_images_with_many_crops_are_not_cut_far_ahead(
    processor: Phi3VProcessor, dataset: ConversationDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many questions may be ahead: only the next group's images are, once those of two exceed the bound."""
    encoder = SampleEncoder(processor)
    groups = [[question] for question in answer.list_questions(dataset, encoder, None)]
    cut: list[Any] = []
    num_crops = loading.QuestionLoader._num_crops

    def counted(self: Any, *given: Any) -> int:
        cut.append(given)
        return num_crops(self, *given)

    monkeypatch.setattr(loading.QuestionLoader, "_num_crops", counted)
    for most, ahead in ((1024, 3), (1, 1)):
        monkeypatch.setattr(loading, "MOST_CROPS_AHEAD", most)
        cut.clear()
        loader = loading.QuestionLoader(
            dataset, encoder, ask=lambda sample, turn, ids, pictures: Prompt(ids, pictures), group=lambda _: [],
            num_ahead=4,
        )  # fmt: skip
        next(iter(loader.load(groups)))
        assert len(cut) == ahead


def test_labels_are_the_turns_own_or_the_configured(
    tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset, tmp_path: Path
) -> None:
    turns = [{"user": "?", "assistant": "b", "labels": ["a", "b"]}, {"user": "?", "assistant": "no"}]
    lines = [json.dumps({"id": str(k), "conversations": [turn]}) for k, turn in enumerate(turns)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines))
    labelled = ConversationDataset(tmp_path / "labelled.jsonl")
    own, configured = answer_questions(tiny_model, processor, labelled, asking(labels=["Yes", "No"]))
    assert (own.labels, own.expected) == (("a", "b"), "b")
    assert (configured.labels, configured.expected) == (("Yes", "No"), "No")
    assert own.probabilities is None
    (first, *_) = answer_questions(tiny_model, processor, dataset, asking())
    assert (first.labels, first.expected) == ((), None)


@pytest.mark.parametrize("scoring", ["likelihood", "both"])
def test_probabilities_are_the_softmax_of_the_labels_log_likelihoods(
    scoring: str, tiny_model: Phi3VForCausalLM, processor: Phi3VProcessor, dataset: ConversationDataset
) -> None:
    labels = ["no", "a", "b", "c", "d"]
    generated = answer_questions(tiny_model, processor, dataset, asking())
    found = answer_questions(tiny_model, processor, dataset, asking(scoring=scoring, labels=labels))
    ids = [label_token_ids(processor, label) for label in labels]
    for one, other in zip(found, generated, strict=True):
        prompt = prompt_of(processor, dataset, int(one.id.removeprefix("s")), one.turn)
        expected = torch.tensor([plain_log_likelihood(tiny_model, prompt, label) for label in ids])
        assert one.probabilities == pytest.approx(expected.softmax(0).tolist(), rel=1e-4)
        assert sum(one.probabilities or ()) == pytest.approx(1)
        likeliest = labels[int(expected.argmax())]
        assert one.prediction == (likeliest if scoring == "likelihood" else other.prediction)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_processes_answer_every_question_once_and_together_what_one_answers(
    scoring: str,
    tiny_model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven processes for five questions, of which some share an image: some of them have nothing to do."""
    settings = asking(scoring=scoring, labels=["no", "a", "b", "c", "d"])
    alone = answer_questions(tiny_model, processor, dataset, settings)
    shares: list[list[Any]] = []

    def keep(own: list[Any]) -> list[Any]:
        ((answered, is_stopped),) = own
        assert not is_stopped
        shares.append(answered)
        return own

    monkeypatch.setattr(answer, "gather_object", keep)
    for num_ranks in (2, 7):
        shares.clear()
        for rank in range(num_ranks):
            answer_questions(tiny_model, processor, dataset, settings, Share(rank, num_ranks))
        assert sorted(map(len, shares)) in ([2, 3], [0, 0, 0, 1, 1, 1, 2])
        together: list[Prediction] = [one for _, one in sorted(pair for share in shares for pair in share)]
        for one, other in zip(together, alone, strict=True):
            assert (one.id, one.turn, one.prediction) == (other.id, other.turn, other.prediction)
            assert (one.probabilities or ()) == pytest.approx(other.probabilities or (), rel=1e-4)


def test_an_image_that_is_gone_since_the_check_is_named(
    tiny_model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = dataset.image_path(dataset[2], "2.png")
    list_questions = answer.list_questions

    def list_and_lose(*given: Any) -> Any:
        questions = list_questions(*given)
        path.unlink()
        return questions

    monkeypatch.setattr(answer, "list_questions", list_and_lose)
    with pytest.raises(DataError, match=r"data\.jsonl:\d.*2\.png.*does not exist"):
        answer_questions(tiny_model, processor, dataset, asking())
