import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.schema import SampleError, Turn, parse_sample, render

WHERE = "train.jsonl:3"


def parse(*turns: dict[str, Any], **keys: Any):
    return parse_sample(json.dumps({"id": "s", "conversations": list(turns), **keys}), WHERE)


def text_of(sample, upto_turn=None) -> str:
    return "".join(segment.text for segment in render(sample, upto_turn))


def test_every_key_is_read():
    sample = parse(
        {
            "images": ["a.png", "b.png"],
            "user": "Same?",
            "assistant": "No",
            "answers": ["no", "they differ", "no"],
            "labels": ["Yes", "No"],
        },
        {"user": "Sure?", "assistant": "Yes"},
        system="Be brief.",
        num_crops=16,
        source="hand",
    )
    assert (sample.id, sample.system, sample.num_crops, sample.source) == ("s", "Be brief.", 16, "hand")
    assert sample.where == WHERE
    assert sample.images == ("a.png", "b.png")
    assert sample.turns[0].answers == ("No", "no", "they differ", "no")  # annotators may agree
    assert sample.turns[0].labels == ("Yes", "No")
    assert sample.turns[1] == Turn(user="Sure?", assistant="Yes", images=(), answers=("Yes",))


def test_an_answer_among_the_accepted_ones_is_not_counted_again():
    answers = ["no", "No", "they differ", "No"]
    sample = parse({"user": "Same?", "assistant": "No", "answers": answers})
    assert sample.turns[0].answers == tuple(answers)


def test_keys_that_may_be_left_out_may_be_null():
    turn = {"user": "Hi", "assistant": "Hello"}
    empty = {"images": None, "answers": None, "labels": None}
    assert parse(turn | empty, system=None, num_crops=None, source=None) == parse(turn)
    assert parse(turn, system="").system is None


def test_renders_the_published_format():
    sample = parse(
        {"images": ["a", "b"], "user": "q1", "assistant": "a1"},
        {"user": "q2", "assistant": "a2"},
        {"images": ["c"], "user": "q3", "assistant": "a3"},
        system="Be brief.",
    )
    assert [tuple(segment) for segment in render(sample)] == [
        (
            "<|system|>\nBe brief.<|end|>\n<|user|>\n<|image_1|>\n<|image_2|>\nq1<|end|>\n<|assistant|>\n",
            False,
        ),
        ("a1<|end|>\n", True),
        ("<|user|>\nq2<|end|>\n<|assistant|>\n", False),
        ("a2<|end|>\n", True),
        ("<|user|>\n<|image_3|>\nq3<|end|>\n<|assistant|>\n", False),
        ("a3<|end|>\n<|endoftext|>", True),
    ]


def test_a_generation_prompt_is_the_training_text_up_to_its_answer():
    sample = parse(*({"user": f"q{k}", "assistant": f"a{k}"} for k in range(3)))
    training = text_of(sample)
    for turn in range(3):
        prompt = text_of(sample, turn)
        assert prompt.endswith("<|assistant|>\n")
        assert training.startswith(prompt + f"a{turn}<|end|>")
    for turn in (-1, 3):
        with pytest.raises(ValueError, match="upto_turn"):
            render(sample, turn)


def test_own_tags_stay_where_they_are():
    sample = parse({"images": ["a", "b"], "user": "Is <|image_1|> like <|image_2|>?", "assistant": "No"})
    assert "<|user|>\nIs <|image_1|> like <|image_2|>?<|end|>" in text_of(sample)
    assert sample.images == ("a", "b")


def test_tags_out_of_order_show_their_own_images():
    swapped = parse({"images": ["a", "b"], "user": "<|image_2|> or <|image_1|>?", "assistant": "b"})
    plain = parse({"images": ["b", "a"], "user": "<|image_1|> or <|image_2|>?", "assistant": "b"})
    assert swapped == plain


def test_a_tag_may_show_an_image_that_another_turn_lists():
    sample = parse(
        {"images": ["a", "b", "c"], "user": "<|image_3|>", "assistant": "x"},
        {"user": "<|image_1|>", "assistant": "y"},
        {"images": ["d"], "user": "<|image_4|> <|image_2|>", "assistant": "z"},
    )
    assert [turn.images for turn in sample.turns] == [("c",), ("a",), ("d", "b")]
    assert [turn.user for turn in sample.turns] == ["<|image_1|>", "<|image_2|>", "<|image_3|> <|image_4|>"]


def test_an_image_alone_is_a_question():
    sample = parse({"images": ["a"], "user": "", "assistant": "A cat."})
    assert text_of(sample, 0) == "<|user|>\n<|image_1|>\n<|end|>\n<|assistant|>\n"


QA = {"user": "q", "assistant": "a"}


def line(*turns: Any, **keys: Any) -> str:
    return json.dumps({"id": "s", "conversations": list(turns), **keys})


BAD_LINES = {
    "cut JSON": (line(QA)[:-3], "broken JSON", "one object a line"),
    "an array's first line": ("[", "broken JSON", "phi3v data convert"),
    "an array on one line": ("[" + line(QA) + "]", "wrong type", "phi3v data convert"),
    "LLaVA's tag": (line({**QA, "images": ["a"], "user": "<image>\nTotal?"}), "wrong image tags", "leave it out"),
    "not an object": ("[1, 2]", "wrong type", "an object with the keys id"),
    "a key twice": ('{"id": "s", "id": "t", "conversations": []}', "broken JSON", "Keep one"),
    "endless nesting": ("[" * 100_000, "broken JSON", "docs/data.md"),
    "endless number": ('{"id": ' + "9" * 5000 + "}", "broken JSON", "docs/data.md"),
    "no id": (json.dumps({"conversations": [QA]}), "missing key", 'Add "id"'),
    "number as id": (json.dumps({"id": 7, "conversations": [QA]}), "wrong type", "It must be a string"),
    "misspelt key": (line(QA, sytem="x"), "unknown key", "Did you mean 'system'?"),
    "misspelt turn key": (line(QA | {"image": ["a"]}), "unknown key", "Did you mean 'images'?"),
    "foreign key": (line(QA, xyz=1), "unknown key", "The keys of a sample are id, source"),
    "no turns": (line(), "wrong type", "at least one turn"),
    "turn not an object": (line("hello"), "wrong type", "an object with the keys images"),
    "no answer": (line({"user": "q"}), "missing key", 'Add "assistant"'),
    "empty answer": (line({"user": "q", "assistant": " \n"}), "empty answer", "take the sample out"),
    "empty question": (line({"user": "", "assistant": "a"}), "empty text", "Write its text"),
    "empty further answer": (line(QA | {"answers": [""]}), "wrong type", "none of them empty"),
    "one label": (line(QA | {"labels": ["a"]}), "wrong type", "at least two different answers"),
    "a label twice": (line(QA | {"labels": ["a", "b", "a"]}), "wrong type", "at least two different answers"),
    "an empty label": (line(QA | {"labels": ["a", " "]}), "wrong type", "none of them empty"),
    "special token in a label": (line(QA | {"labels": ["a", "b<|end|>"]}), "special token in the text", "Take it out"),
    "an answer that is no label": (line(QA | {"labels": ["x", "y"]}), "answer outside the labels", "letter by letter"),
    "image not in a list": (line(QA | {"images": "a.png"}), "wrong type", "a list of paths"),
    "no crops": (line(QA, num_crops=0), "wrong type", "from 1 to 1024"),
    "crops as bool": (line(QA, num_crops=True), "wrong type", "a whole number"),
    "half a character": (line({"user": "\ud800", "assistant": "a"}), "broken text", "the whole character"),
    "tag without image": (line({"user": "<|image_1|> q", "assistant": "a"}), "wrong image tags", "Number tags from 1"),
    "too few tags": (line(QA | {"images": ["a", "b"], "user": "<|image_1|>"}), "wrong image tags", "each image once"),
    "a tag twice": (line(QA | {"images": ["a"], "user": "<|image_1|><|image_1|>"}), "wrong image tags", "once"),
    "tags from 0": (line(QA | {"images": ["a"], "user": "<|image_0|>"}), "wrong image tags", "from 1"),
    "restarted numbers": (
        line(QA | {"images": ["a"]}, QA | {"images": ["b"], "user": "<|image_1|>"}),
        "wrong image tags",
        "over the whole conversation",
    ),
    "almost a tag": (line(QA | {"images": ["a"], "user": "<|image1|>"}), "wrong image tags", "Write <|image_1|>"),
    "endless tag": (line(QA | {"images": ["a"], "user": f"<|image_{'1' * 5000}|>"}), "wrong image tags", "Write"),
    "tag in the answer": (line(QA | {"assistant": "see <|image_1|>"}), "special token in the text", "Take it out"),
    "tag in the system text": (line(QA, system="<|image_1|>"), "special token in the text", "Take it out"),
    "end token in the question": (line(QA | {"user": "q<|end|>"}), "special token in the text", "Take it out"),
    "end token in the answer": (line(QA | {"assistant": "a<|end|>"}), "special token in the text", "Take it out"),
    "role in the system text": (line(QA, system="<|user|>"), "special token in the text", "Take it out"),
}


@pytest.mark.parametrize(("text", "reason", "remedy"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_place_and_remedy(text, reason, remedy):
    with pytest.raises(SampleError) as caught:
        parse_sample(text, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert remedy in message
    assert len(message) < 500
    assert caught.value.reason == reason


def test_the_error_survives_the_way_from_a_worker_process():
    error = SampleError("train.jsonl:3: found. Remedy.", "broken JSON")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason) == (str(error), error.reason)
    assert str(SampleError("what torch's worker wrapper passes on")) == "what torch's worker wrapper passes on"


def test_reading_the_format_needs_no_torch():
    code = (
        "import sys; sys.argv[0] = 'phi3v'; import phi3v.data.schema;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documented_examples_are_samples():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.+?)\n```", text, re.DOTALL)
    assert len(examples) == 5
    for example in examples:
        assert parse_sample(example, WHERE).turns
