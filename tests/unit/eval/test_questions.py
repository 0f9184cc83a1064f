"""Questions are shared out evenly, and those without the labels they need are named before a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3v.data.dataset import ConversationDataset
from phi3v.errors import ConfigError, DataError
from phi3v.eval.questions import Question, check_labels, share_of
from phi3v.model.processing_phi3_v import Phi3VProcessor

Write = Callable[..., ConversationDataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*turns: dict[str, Any]) -> ConversationDataset:
        lines = [json.dumps({"id": f"s{k}", "conversations": [{"user": "?", **turn}]}) for k, turn in enumerate(turns)]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return ConversationDataset(tmp_path / "data.jsonl")

    return write


@given(st.lists(st.integers(1, 9000), max_size=40), st.integers(1, 9))
def test_shares_are_even_and_whole(costs: list[int], num_ranks: int) -> None:
    questions = [Question(index, 0, cost) for index, cost in enumerate(costs)]
    shares = [share_of(questions, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted((one for share in shares for one in share), key=lambda one: one.key) == questions
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    sums = [sum(one.cost for one in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs, default=0)
    for share in shares:
        assert [one.cost for one in share] == sorted((one.cost for one in share), reverse=True)


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
