import json
from pathlib import Path

import pytest

from phi3v.data.check import check_dataset
from phi3v.data.convert.sharegpt import convert_sharegpt
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import DataError


def natives(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def share(*turns, **keys):
    """A sample in the words of ShareGPT: ``share(("human", "Hello"), ("gpt", "Hi"))``."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **keys}


def chat(*turns, **keys):
    """The same in those of OpenAI."""
    return {"messages": [{"role": role, "content": text} for role, text in turns], **keys}


@pytest.fixture
def convert(tmp_path, image_folder):
    def run(*records, **options):
        source = tmp_path / "mix.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        return convert_sharegpt(
            str(source), tmp_path / "out", **{"image_dir": image_folder, "progress": False, **options}
        )

    return run


def native(*turns, system=None, name="mix-1"):
    keys = {} if system is None else {"system": system}
    return {"id": name, **keys, "conversations": list(turns)}


TWO_IMAGES = native(
    {"images": ["red.png", "blue.jpg"], "user": "Is <|image_1|> like <|image_2|>?", "assistant": "No"},
    {"images": ["red.png"], "user": "And this?", "assistant": "Yes"},
    system="Be brief.",
)
ASKED = ("Is <image> like <image>?", "No", "<image>And this?", "Yes")
LISTED = ["red.png", "blue.jpg", "red.png"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            share(("human", "<image>Who?"), ("gpt", "Kane"), images=["red.png"]),  # LLaMA-Factory
            native({"images": ["red.png"], "user": "Who?", "assistant": "Kane"}),
        ),
        (share(*zip(["human", "gpt"] * 2, ASKED, strict=True), images=LISTED, system="Be brief."), TWO_IMAGES),
        (
            share(("system", "Be brief."), *zip(["user", "assistant"] * 2, ASKED, strict=True), images=LISTED),
            TWO_IMAGES,
        ),
        (chat(("system", "Be brief."), *zip(["user", "assistant"] * 2, ASKED, strict=True), images=LISTED), TWO_IMAGES),
        (
            {
                "system": "Be brief.",
                "conversation": [
                    {"human": ASKED[0], "assistant": ASKED[1]},
                    {"human": ASKED[2], "assistant": ASKED[3]},
                ],
                "images": LISTED,
            },
            TWO_IMAGES,
        ),
        (
            chat(("user", "What?"), ("assistant", "That"), ("user", "Why?"), ("assistant", "So"), images=LISTED[:2]),
            native({"images": LISTED[:2], "user": "What?", "assistant": "That"}, {"user": "Why?", "assistant": "So"}),
        ),
        (
            share(("human", "Hello"), ("gpt", "Hi"), images=[], tools="", system=None, id=5, score=0.5),
            native({"user": "Hello", "assistant": "Hi"}, name="5"),
        ),
        (
            share(("human", "Look:"), ("human", "<image>"), ("human", "Who?"), ("gpt", "Kane"), images="red.png"),
            native({"images": ["red.png"], "user": "Look:\n<|image_1|>\nWho?", "assistant": "Kane"}),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b", "weight": 1, "loss": True},
                ]
            },
            native({"user": "a", "assistant": "b"}),
        ),
    ],
)
def test_each_shape_becomes_this_record(convert, tmp_path, record, expected):
    convert(record)
    assert natives(tmp_path / "out" / "mix_train.jsonl") == [expected]


def test_the_data_check_takes_it(convert, processor):
    record = share(*zip(["human", "gpt"] * 2, ASKED, strict=True), images=LISTED)
    conversion = convert(record, record)
    dataset = ConversationDataset(conversion.files["train"])
    summary = check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1)
    assert (summary.samples, summary.turns, summary.images) == (2, 4, 6)


GOOD = share(("human", "Hello"), ("gpt", "Hi"))
TOOLS = "Tools are not trained here: take the sample out"
BAD = {
    "call": (
        share(("human", "a"), ("function_call", "{}"), ("observation", "b"), ("gpt", "c")),
        f"message 2: it is a tool's turn or calls one. {TOOLS}",
    ),
    "result": (
        chat(("user", "a"), ("tool", "b"), ("assistant", "c")),
        f"message 2: it is a tool's turn or calls one. {TOOLS}",
    ),
    "tools": (share(("human", "a"), ("gpt", "c"), tools="[{}]"), f"it has 'tools'. {TOOLS}"),
    "chosen": (
        share(("human", "a"), chosen={"from": "gpt", "value": "b"}),
        "it has 'chosen'. Preferences are not trained here",
    ),
    "rejected": (chat(("user", "a"), ("assistant", "b"), rejected_response="c"), "it has 'rejected_response'"),
    "kto": (chat(("user", "a"), ("assistant", "b"), label=False), "it has 'label': true or false"),
    "boxes": (
        chat(("user", "a"), ("assistant", "<bbox>"), objects={"bbox": [[1, 2, 3, 4]]}),
        "it has 'objects'. Write boxes as",
    ),
    "videos": (chat(("user", "<video>"), ("assistant", "b"), videos=["a.mp4"]), "`phi3v data convert video-folders`"),
    "audios": (chat(("user", "<audio>"), ("assistant", "b"), audios=["a.wav"]), "it has 'audios'"),
    "count": (
        share(("human", "<image>a"), ("gpt", "c"), images=LISTED),
        "its texts hold 1 x <image> and it lists 3 image(s)",
    ),
    "no placeholder's image": (share(("human", "<image>a"), ("gpt", "c")), "1 x <image> and it lists 0 image(s)"),
    "loss": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
        "message 2: the answer has 'loss': False. Here every answer",
    ),
    "train": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]},
        "message 2: the answer has 'train': False",
    ),
    "role": (share(("human", "a"), ("bard", "b")), "message 2: 'from' is 'bard'. Who speaks must be one of"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "message 1: 'content' is a list of parts. `phi3v data convert openai` reads",
    ),
    "null": (
        {"messages": [{"role": "user", "content": None}]},
        "message 1: 'content' is missing or null. It must be a string.",
    ),
    "two systems": (
        share(("system", "a"), ("human", "b"), ("gpt", "c"), system="d"),
        "message 1: a second system message stands beside 'system'",
    ),
    "system of a wrong type": (
        share(("human", "b"), ("gpt", "c"), system=["d"]),
        "'system' is ['d']. It must be a string.",
    ),
    "no conversation": (
        {"query": "a", "response": "b"},
        "it has no conversation; its keys are 'query', 'response'. A sample has one of the keys",
    ),
    "two conversations": (GOOD | chat(("user", "a"), ("assistant", "b")), "it has 'conversations' and 'messages'"),
    "half a pair": ({"conversation": [{"human": "a"}]}, "message 1: it is {'human': 'a'}. It must be an object"),
    "token": (
        share(("human", "a"), ("gpt", "b <|endoftext|>")),
        "turn 1: the answer holds the special token '<|endoftext|>'",
    ),
    "bytes": (
        share(("human", "a"), ("gpt", "b"), images=[{"bytes": "x"}]),
        "'images' is [{'bytes': 'x'}]. It must be a path or a list of paths.",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_refused_at_its_line(convert, tmp_path, kind):
    record, message = BAD[kind]
    with pytest.raises(DataError) as caught:
        convert(GOOD, record)
    assert str(caught.value).startswith(f"{tmp_path}/mix.jsonl:2: sample 'mix-2'")
    assert message in str(caught.value)
    conversion = convert(GOOD, record, on_bad_sample="skip")
    assert conversion.samples == {"train": 1}
    assert sum(conversion.skipped.values()) == 1
