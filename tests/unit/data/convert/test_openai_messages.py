import base64
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from phi3v.data.check import check_dataset
from phi3v.data.convert import openai_messages
from phi3v.data.convert.openai_messages import convert_openai_messages
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import DataError


def natives(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def encoded(colour=(0, 200, 0), image_format="PNG", size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, image_format)
    return buffer.getvalue()


def data_url(content: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def text(words):
    return {"type": "text", "text": words}


def image(url, **keys):
    return {"type": "image_url", "image_url": {"url": url, **keys}}


def chat(*turns, **keys):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **keys}


@pytest.fixture
def convert(tmp_path, image_folder):
    def run(*records, output="out", **options):
        source = tmp_path / "chat.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        return convert_openai_messages(
            str(source), tmp_path / output, **{"image_dir": image_folder, "progress": False, **options}
        )

    return run


def native(*turns, system=None):
    keys = {} if system is None else {"system": system}
    return {"id": "chat-1", **keys, "conversations": list(turns)}


CHEESE = native(
    {"images": ["red.png"], "user": "What is this cheese?\n<|image_1|>", "assistant": "Danbo"}, system="Taste."
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            chat(
                ("system", "Taste."),
                ("user", "What is this cheese?"),
                ("user", [image("red.png", detail="low")]),
                ("assistant", "Danbo"),
            ),
            CHEESE,
        ),  # the vision fine-tuning page's own example
        (
            chat(
                ("developer", [{"type": "input_text", "text": "Taste."}]),
                (
                    "user",
                    [
                        {"type": "input_text", "text": "What is this cheese?"},
                        {"type": "input_image", "image_url": "red.png"},
                    ],
                ),
                ("assistant", [{"type": "output_text", "text": "Danbo"}]),
            ),
            CHEESE,
        ),
        (
            chat(
                ("user", [image("red.png"), image("blue.jpg"), text("Which is"), text("red?")]),
                ("assistant", [text("The first."), text("The second is blue.")]),
                ("user", [text("And between"), image("blue.jpg"), text("and"), image("red.png"), text("?")]),
                ("assistant", "The second."),
            ),
            native(
                {
                    "images": ["red.png", "blue.jpg"],
                    "user": "Which is\nred?",
                    "assistant": "The first.\nThe second is blue.",
                },
                {
                    "images": ["blue.jpg", "red.png"],
                    "user": "And between\n<|image_3|>\nand\n<|image_4|>\n?",
                    "assistant": "The second.",
                },
            ),
        ),
        (
            chat(("user", "Say <image>"), ("assistant", "<image>"), tools=[], parallel_tool_calls=False),
            native({"user": "Say <image>", "assistant": "<image>"}),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "name": "Ann"},
                    {"role": "assistant", "content": "b", "weight": 1, "tool_calls": None},
                ]
            },
            native({"user": "a", "assistant": "b"}),
        ),
        (  # Axolotl, TRL
            chat(
                ("user", [{"type": "image"}, text("or"), {"type": "image", "path": "red.png"}, {"type": "image"}]),
                ("assistant", "b"),
                images=["blue.jpg", "red.png"],
            ),
            native(
                {
                    "images": ["blue.jpg", "red.png", "red.png"],
                    "user": "<|image_1|>\nor\n<|image_2|>\n<|image_3|>",
                    "assistant": "b",
                }
            ),
        ),
    ],
)
def test_messages_become_this_record(convert, tmp_path, record, expected):
    convert(record)
    assert natives(tmp_path / "out" / "chat_train.jsonl") == [expected]
    assert (tmp_path / "out" / "images").is_symlink() == ("images" in str(expected))


def test_file_urls_are_paths(convert, image_folder, tmp_path):
    (image_folder / "a b.png").write_bytes(encoded())
    url = f"file://{image_folder}/a%20b.png"
    convert(chat(("user", [image(url), text("What?")]), ("assistant", "b")))
    assert natives(tmp_path / "out" / "chat_train.jsonl")[0]["conversations"][0]["images"] == ["a b.png"]


def test_data_urls_become_files_named_by_their_content(convert, tmp_path, processor):
    green, white = encoded(), encoded((255, 255, 255), "JPEG")
    conversion = convert(
        chat(("user", [image(data_url(green)), text("What?")]), ("assistant", "Green")),
        chat(("user", [image(data_url(white, "image/jpeg")), image(data_url(green))]), ("assistant", "Both")),
    )
    names = [f"{hashlib.sha256(green).hexdigest()[:32]}.png", f"{hashlib.sha256(white).hexdigest()[:32]}.jpg"]
    first, second = natives(tmp_path / "out" / "chat_train.jsonl")
    assert first["conversations"] == [{"images": names[:1], "user": "What?", "assistant": "Green"}]
    assert second["conversations"] == [{"images": names[::-1], "user": "", "assistant": "Both"}]
    assert {path.name: path.read_bytes() for path in conversion.image_dir.iterdir()} == dict(
        zip(names, (green, white), strict=True)
    )
    dataset = ConversationDataset(conversion.files["train"])
    summary = check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1)
    assert (summary.samples, summary.images) == (2, 3)


def test_the_data_check_takes_paths(convert, processor):
    conversion = convert(chat(("user", [text("a"), image("red.png")]), ("assistant", "b")))
    dataset = ConversationDataset(conversion.files["train"])
    assert check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1).images == 1


def test_data_urls_and_paths_together_need_copies(convert, tmp_path, image_folder):
    both = [
        chat(("user", [image(data_url(encoded())), text("What?")]), ("assistant", "Green")),
        chat(("user", [image("red.png"), text("What?")]), ("assistant", "Red")),
    ]
    for number, records in enumerate((both, both[::-1])):
        with pytest.raises(DataError, match=r"holds images of its own and names image files as well.*Set copy_images"):
            convert(*records, output=f"out{number}")
        assert sorted(path.name for path in image_folder.iterdir()) == ["blue.jpg", "red.png"]
    conversion = convert(*both, copy_images=True)
    assert (conversion.image_dir / "red.png").read_bytes() == (image_folder / "red.png").read_bytes()
    assert len(list(conversion.image_dir.iterdir())) == 2


def ask(part):
    return chat(("user", [text("What?"), part]), ("assistant", "b"))


GOOD = chat(("user", "Hello"), ("assistant", "Hi"))
BAD = {
    "web": (ask(image("https://x.org/a.png")), "message 1, part 2: image 'https://x.org/a.png' is a URL, not a path."),
    "missing": (ask(image("x.png")), "message 1, part 2: image 'x.png' does not exist (looked for"),
    "outside": (ask(image("file:///etc/hostname")), "image path '/etc/hostname' leads outside the image folder"),
    "another host": (ask(image("file://server/a.png")), "'file://server/a.png' lies on another machine"),
    "no image": (ask(image(data_url(b"GIF? no."))), "the image in its data URL is not an image that can be read"),
    "cut short": (
        ask(image(data_url(encoded(size=(99, 99))[:60]))),
        "the image in its data URL is damaged or cut short",
    ),
    "damaged inside": (
        ask(image(data_url(encoded(size=(99, 99))[:50] + bytes(9) + encoded(size=(99, 99))[59:]))),
        "the image in its data URL is damaged or cut short",
    ),
    "not base64": (ask(image("data:image/png;base64,a$b=")), "its data URL is broken (Only base64 data is allowed)"),
    "percent encoding": (ask(image("data:image/png,%89PNG")), "'data:image/png,%89PNG' is no data URL of an image"),
    "not an image type": (ask(image("data:text/html;base64,AAAA")), "'data:text/html;base64,AAAA' is no data URL of"),
    "vector": (ask(image("data:image/svg+xml;base64,AAAA")), "the type be one of avif, bmp, gif"),
    "file id": (ask({"type": "input_image", "file_id": "file-1"}), "part 2: the image is given by 'file_id'"),
    "no url": (ask({"type": "image_url", "image_url": {}}), "part 2: the image part does not name one image"),
    "two urls": (ask(image("red.png") | {"path": "red.png"}), "part 2: the image part does not name one image"),
    "unlisted": (ask({"type": "image"}), "part 2: the image part does not name one image"),
    "unshown": (GOOD | {"images": ["red.png"]}, "it lists 1 image(s) and its parts show 0 of them"),
    "audio": (ask({"type": "input_audio", "input_audio": {}}), "part 2: a part of type 'input_audio' cannot be"),
    "text part": (ask({"type": "text"}), "part 2: 'text' is missing or null. It must be a string."),
    "bare string": (ask("red.png"), "message 1, part 2: it is 'red.png'. It must be an object with a 'type'."),
    "refusal": (
        chat(("user", "a"), ("assistant", [{"type": "refusal", "refusal": "No"}])),
        "message 2, part 1: a part of type 'refusal'",
    ),
    "shown by the assistant": (
        chat(("user", "a"), ("assistant", [image("red.png")])),
        "message 2, part 1: an image stands in the assistant's message",
    ),
    "weight": (
        {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"weight": 0}]},
        "message 2: the answer has 'weight': 0. Here every answer of a conversation is learned alike: drop the key",
    ),
    "tool call": (
        {"messages": [GOOD["messages"][0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "message 2: it is a tool's turn or calls one. Tools are not trained here",
    ),
    "tool": (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 2: it is a tool's turn"),
    "tools": (GOOD | {"tools": [{"type": "function"}]}, "it has 'tools'. Tools are not trained here"),
    "role": (
        chat(("human", "a"), ("gpt", "b")),
        "'role' is 'human'. Who speaks must be one of user, assistant, system",
    ),
    "null": (chat(("user", None)), "message 1: 'content' is missing or null. It must be a string or a list of parts."),
    "no parts": (chat(("user", [])), "message 1: 'content' is []. It must be a string or a list of parts."),
    "no answer": (chat(("user", "a")), "its last question has no answer"),
    "preference": ({"input": {"messages": []}, "preferred_output": []}, "it has no 'messages'; its keys are 'input', "),
    "token": (chat(("user", "a"), ("assistant", "<|assistant|>")), "turn 1: the answer holds the special token"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_refused_at_its_line(convert, tmp_path, image_folder, kind):
    record, message = BAD[kind]
    with pytest.raises(DataError) as caught:
        convert(GOOD, record)
    assert str(caught.value).startswith(f"{tmp_path}/chat.jsonl:2: sample 'chat-2'")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 800
    conversion = convert(GOOD, record, on_bad_sample="skip")
    assert conversion.samples == {"train": 1}
    assert sum(conversion.skipped.values()) == 1
    if not conversion.image_dir.is_symlink() and conversion.image_dir.exists():
        assert not list(conversion.image_dir.iterdir())


def test_data_urls_have_a_limit(convert, monkeypatch):
    content = encoded(size=(300, 300))
    monkeypatch.setattr(openai_messages, "MAX_DATA_URL_BYTES", len(content))
    convert(ask(image(data_url(content))))
    monkeypatch.setattr(openai_messages, "MAX_DATA_URL_BYTES", len(content) - 1)
    with pytest.raises(DataError, match=rf"holds {len(content)} bytes\. At most {len(content) - 1} are read"):
        convert(ask(image(data_url(content))))


def test_converters_need_no_torch():
    modules = "csv_table, image_folders, llava, openai_messages, sharegpt"
    command = (
        f"import sys; sys.argv[0] = 'phi3v'; from phi3v.data.convert import {modules}; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout == "False\n"
