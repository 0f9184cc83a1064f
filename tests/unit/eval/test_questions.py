"""Questions are shared out evenly, and those without the labels they need are named before a model is loaded."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import ConfigError, DataError
from phi3v.eval.questions import Question, check_labels, group_questions, list_questions, share_of
from phi3v.model.processing_phi3_v import Phi3VProcessor

Write = Callable[..., ConversationDataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*turns: dict[str, Any]) -> ConversationDataset:
        lines = [json.dumps({"id": f"s{k}", "conversations": [{"user": "?", **turn}]}) for k, turn in enumerate(turns)]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return ConversationDataset(tmp_path / "data.jsonl")

    return write


@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 5)), max_size=40), st.integers(1, 9))
def test_shares_are_even_and_whole(groups_of: list[tuple[int, int]], num_ranks: int) -> None:
    """Groups of a cost and a number of questions; the plain estimate of what a group costs stands here again."""
    groups = [[Question(index, turn, cost) for turn in range(number)] for index, (cost, number) in enumerate(groups_of)]
    shares = [share_of(groups, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted((group for share in shares for group in share), key=lambda group: group[0].key) == groups
    cost_of = [cost + 100 * (number - 1) for cost, number in groups_of]
    costs = [[cost_of[group[0].index] for group in share] for share in shares]
    for share in costs:
        assert share == sorted(share, reverse=True)
        assert sum(share[:-1]) <= min(map(sum, costs)), "the last group went to the process with the least to do"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=30), st.integers(1, 5))
def test_groups_are_of_one_first_image_and_as_few_as_may_be(asked: list[tuple[str, int]], most: int) -> None:
    questions = [
        Question(index, 0, 9, tuple([name] * min(number, 1) + ["other"] * (number - 1)))
        for index, (name, number) in enumerate(asked)
    ]
    groups = group_questions(questions, most)
    assert sorted((one for group in groups for one in group), key=lambda one: one.key) == questions
    firsts = [question.images[0] for question in questions if question.images]
    num_alone = len(questions) - len(firsts)
    assert len(groups) == num_alone + sum(math.ceil(firsts.count(name) / most) for name in set(firsts))
    for group in groups:
        assert len(group) <= most and len({one.images[:1] or one.key for one in group}) == 1


def test_listed_questions_know_their_prompts(processor: Phi3VProcessor, tmp_path: Path) -> None:
    """Ids made from the listed sizes are those of the encoder, and images that look the same to it have one key."""
    for name, size in (("a", (30, 80)), ("b", (90, 40)), ("c", (56, 56))):
        Image.new("RGB", size, "orange").save(tmp_path / f"{name}.png")
    (tmp_path / "again.png").symlink_to(tmp_path / "a.png")
    turns = [
        {"images": ["a.png"], "user": "First?", "assistant": "c"},
        {"user": "Then?", "assistant": "d"},
        {"images": ["c.png", "b.png"], "user": "<|image_3|> or <|image_2|>?", "assistant": "e"},
    ]
    lines = [
        {"id": "0", "system": "Be brief.", "conversations": turns},
        {"id": "1", "num_crops": 1, "conversations": [{"images": ["a.png"], "user": "?", "assistant": "c"}]},
        {"id": "2", "conversations": [{"images": ["again.png"], "user": "?", "assistant": "c"}]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset, encoder = ConversationDataset(tmp_path / "data.jsonl"), SampleEncoder(processor)
    questions = list_questions(dataset, encoder, None)
    assert [one.key for one in questions] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert [len(one.images) for one in questions] == [1, 1, 3, 1, 1]
    for one in questions:
        sample = dataset[one.index]
        images = dataset.load_images(sample, one.turn)
        expected = encoder.encode_prompt(sample, images, one.turn)["input_ids"].tolist()
        assert encoder.prompt_ids(sample, one.image_sizes, one.turn) == expected
        assert one.image_sizes == tuple((image.height, image.width) for image in images)
    assert questions[4].images == questions[0].images
    assert len({key for one in questions for key in one.images}) == 4, "other num_crops are another image"
    assert len(list_questions(dataset, encoder, 1)) == 3


@pytest.mark.parametrize("scoring", ["likelihood", "both"])
def test_a_question_without_labels_is_named_with_its_remedy(
    scoring: Any, write: Write, processor: Phi3VProcessor
) -> None:
    dataset = write({"assistant": "a", "labels": ["a", "b"]}, {"assistant": "b"})
    with pytest.raises(DataError, match=rf"data\.jsonl:2: sample 's1', turn 1: scoring is {scoring}.*\"labels\""):
        check_labels(dataset, processor, scoring=scoring, labels=[], limit=None)
    check_labels(dataset, processor, scoring=scoring, labels=[], limit=1)
    check_labels(dataset, processor, scoring=scoring, labels=["B", "c"], limit=None)
    check_labels(dataset, processor, scoring="generate", labels=[], limit=None)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_an_answer_outside_the_configured_labels_is_named(
    scoring: Any, write: Write, processor: Phi3VProcessor
) -> None:
    dataset = write({"assistant": "a", "labels": ["a", "b"]}, {"assistant": "maybe"})
    with pytest.raises(DataError, match="'s1', turn 1: the answer 'maybe' is none of the labels 'Yes', 'No'"):
        check_labels(dataset, processor, scoring=scoring, labels=["Yes", "No"], limit=None)


@pytest.mark.parametrize(
    "labels", [["Yes"], ["Yes", "Yes"], ["Yes", " "], ["Yes", "No<|end|>"], ["a", "<|image_1|>"], ["a", "<s>"]]
)
def test_configured_labels_are_held_to_what_data_may_name(
    labels: list[str], write: Write, processor: Phi3VProcessor
) -> None:
    with pytest.raises(ConfigError, match="the setting labels"):
        check_labels(write({"assistant": "Yes"}), processor, scoring="generate", labels=labels, limit=None)
