"""What an epoch draws: every sample once, every class equally often, or one question of every image."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from phi3v.data.dataset import ConversationDataset
from phi3v.errors import ConfigError
from phi3v.train.order import Sampling, StemsTogether, epoch_order


def dataset(folder: Path, answers: list[str], images: list[list[str]] | None = None) -> ConversationDataset:
    shown = images or [[f"{number}.png"] for number in range(len(answers))]
    lines = [
        json.dumps({"id": str(number), "conversations": [{"images": names, "user": "?", "assistant": answer}]})
        for number, (answer, names) in enumerate(zip(answers, shown, strict=True))
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return ConversationDataset(folder / "data.jsonl")


@pytest.mark.parametrize("sampling", ["shuffle", "class_balanced", "one_per_image"])
def test_orders_depend_on_seed_and_epoch_alone(sampling: Sampling, tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a"] * 20 + ["b"] * 10, [[f"{number // 3}.png"] for number in range(30)])
    order = epoch_order(data, sampling, seed=0)
    assert order.of(1).tolist() == epoch_order(data, sampling, seed=0).of(1).tolist()
    assert order.of(1).tolist() != order.of(2).tolist()
    assert order.of(1).tolist() != epoch_order(data, sampling, seed=1).of(1).tolist()
    assert len(order) == len(order.of(0))


def test_balanced_classes_come_equally_often_and_use_every_sample(tmp_path: Path) -> None:
    answers = ["yes"] * 17 + ["no"] * 4 + ["perhaps"]
    order = epoch_order(dataset(tmp_path, answers), "class_balanced", seed=0)
    assert len(order) == 24  # three classes, the smallest multiple of three that is no less than 22
    drawn = Counter[int]()
    for epoch in range(17):
        positions = order.of(epoch).tolist()
        assert Counter(answers[position] for position in positions) == {"yes": 8, "no": 8, "perhaps": 8}
        drawn.update(positions)
    # 17 epochs x 8 draws go through the 17 of "yes" and the 4 of "no" a whole number of times.
    assert {drawn[position] for position in range(17)} == {8}
    assert {drawn[position] for position in range(17, 21)} == {34}
    assert drawn[21] == 136


def test_one_question_of_every_image_an_epoch_until_all_have_come(tmp_path: Path) -> None:
    images = [["a.png"], ["a.png"], ["b.png"], ["a.png"], ["b.png", "c.png"], [], []]
    order = epoch_order(dataset(tmp_path, list("1234567"), images), "one_per_image", seed=3)
    epochs = [set(order.of(epoch).tolist()) for epoch in range(3)]
    assert all(len(epoch) == 5 and {2, 4, 5, 6} < epoch for epoch in epochs)
    assert set.union(*epochs) == set(range(7))  # the three questions about a.png took turns


def test_answers_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, list("aabcd"))
    with pytest.raises(ConfigError, match="5 training samples have 4 different last answers"):
        epoch_order(data, "class_balanced", seed=0)


GROUP_OF = [0] * 9 + [1] + [2] * 3 + [3, 4, 5] + [6] * 4
"""Of 20 samples; nine of them begin alike, three others, and four more."""


def runs_of(order: list[int]) -> list[int]:
    """Lengths of the stretches of one group."""
    return [len(list(stretch)) for _, stretch in itertools.groupby(order, key=GROUP_OF.__getitem__)]


def test_samples_that_begin_alike_come_together_in_groups_of_at_most_so_many() -> None:
    order = StemsTogether(GROUP_OF, most=4, seed=0)
    seen, apart = set(), 0
    for epoch in range(40):
        drawn = order.of(epoch).tolist()
        assert sorted(drawn) == list(range(20))
        assert drawn == StemsTogether(GROUP_OF, most=4, seed=0).of(epoch).tolist()
        # Nine make three groups of three, which may lie side by side; the others are whole groups.
        lengths = Counter(runs_of(drawn))
        assert lengths[1] == 4 and lengths[4] == 1 and lengths[3] + 2 * lengths[6] + 3 * lengths[9] == 4
        seen.add(tuple(drawn))
        apart += lengths[3] == 4
    assert len(seen) == 40 and apart > 5


def test_groups_of_one_beginning_are_drawn_anew_every_epoch() -> None:
    order = StemsTogether([0] * 6, most=3, seed=0)
    halves = {frozenset(order.of(epoch).tolist()[:3]) for epoch in range(60)}
    assert len(halves) > 12  # of 20
    firsts = Counter(StemsTogether(GROUP_OF, most=4, seed=0).of(epoch).tolist()[0] for epoch in range(600))
    assert set(firsts) == set(range(20))


def test_shuffle_keeps_beginnings_together_where_they_are_shared(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a"] * 20)
    shared = epoch_order(data, "shuffle", 3, stem_group_of=np.array(GROUP_OF), shared_questions=4)
    assert shared.of(1).tolist() == StemsTogether(GROUP_OF, most=4, seed=3).of(1).tolist()
    alone = epoch_order(data, "shuffle", 3, stem_group_of=np.array(GROUP_OF), shared_questions=1)
    assert alone.of(1).tolist() == epoch_order(data, "shuffle", 3).of(1).tolist()
