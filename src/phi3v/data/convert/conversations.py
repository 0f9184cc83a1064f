"""What the conversation formats of other tools share: messages to native turns, images to their places in the text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tqdm import tqdm

from ..schema import SampleError, sample_error
from .json_records import read_json_records
from .source_images import SourceImages, SplitChoice, data_set_name, source_file
from .writer import Conversion, NativeWriter, OnBadSample

Role: TypeAlias = Literal["system", "user", "assistant"]

PLACEHOLDER = "<image>"
"""Where LLaVA, LLaMA-Factory and ms-swift show an image in a text."""

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Who speaks, in the words of LLaVA and ShareGPT. Source: the names that Axolotl and LLaMA-Factory know unasked."""

_TOOL_ROLES = ("function", "function_call", "ipython", "observation", "tool", "tool_call", "tool_response")
_TOOL_REMEDY = "Tools are not trained here: take the sample out, or write what was called as text of the answer."
_PREFERENCE_REMEDY = "Preferences are not trained here: keep the wanted answer as the last message and drop this key."

_FOREIGN_KEYS = {
    "video": "Convert clips with `phi3v data convert video-folders`, or name frames of it as images.",
    "videos": "Convert clips with `phi3v data convert video-folders`, or name frames of them as images.",
    "audio": "The model reads images and text: take the sample out.",
    "audios": "The model reads images and text: take the sample out.",
    "tools": _TOOL_REMEDY,
    "functions": _TOOL_REMEDY,
    "objects": "Write boxes as text where <ref-object> and <bbox> stand, and drop this key.",
    "chosen": _PREFERENCE_REMEDY,
    "rejected": _PREFERENCE_REMEDY,
    "rejected_response": _PREFERENCE_REMEDY,
    "rejected_messages": _PREFERENCE_REMEDY,
    "kto_tag": _PREFERENCE_REMEDY,
}
"""Keys of samples that would be learned wrongly without what they say. Other unknown keys are the author's notes."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message, its images found.

    Attributes:
        role: who speaks.
        texts: what stands around its images: one more than there are images. ``("Is ", " older than ", "?")``.
        images: names in the converted data set.
    """

    role: Role
    texts: tuple[str, ...]
    images: tuple[str, ...] = ()

    def followed_by(self, other: "Message") -> "Message":
        """Returns this message and another of the same role as one, a line feed between them."""
        joint = f"{self.texts[-1]}\n{other.texts[0]}"
        return Message(self.role, (*self.texts[:-1], joint, *other.texts[1:]), self.images + other.images)


ToNative: TypeAlias = Callable[[dict[str, Any], str, SourceImages], dict[str, Any]]
"""From a record of a source, how messages name it, and the source's images, to a native record without an id."""


def convert_records(
    source: str,
    output_dir: Path,
    kind: str,
    to_native: ToNative,
    *,
    image_dir: Path | None,
    split: str,
    val_share: float,
    on_bad_sample: OnBadSample,
    copy_images: bool,
    progress: bool,
) -> Conversion:
    """Converts a JSON array or JSON lines of conversations; one record at a time is held.

    Args:
        source: the file.
        output_dir: where the data set goes.
        kind: what its files are called where the source's own name says no more than the split.
        to_native: converts one record; raises SampleError for a bad one.
        image_dir: as in every converter's own arguments, and so are those that follow.

    Raises:
        DataError: a bad record that is not to be skipped, no usable one, or a file or folder that is not there.
        ConfigError: options that make no sense.
    """
    path = source_file(source)
    choice = SplitChoice(split, val_share)
    with NativeWriter(output_dir, data_set_name(path.stem, split, kind), on_bad_sample=on_bad_sample) as writer:
        images = SourceImages(writer, path.parent if image_dir is None else image_dir, copy_images=copy_images)
        records = tqdm(
            read_json_records(path, writer.skip), desc=f"converting {path.name}", unit=" samples", disable=not progress
        )
        for number, (where, record) in enumerate(records, start=1):
            try:
                if not isinstance(record, dict):
                    raise wrong_type(where, "the record", record, "an object with messages")
                sample_id = _sample_id(record, where, f"{path.stem}-{number}")
                label = f"{where}: sample {sample_id!r}"
                _refuse_foreign_keys(record, label)
                native = {"id": sample_id, **to_native(record, label, images)}
            except SampleError as error:
                writer.skip(error)
                continue
            shown_images = [name for turn in native["conversations"] for name in turn.get("images", ())]
            writer.add(choice.choose(shown_images, sample_id), native, where=where)
    return writer.conversion


def image_paths(record: dict[str, Any], label: str) -> list[str]:
    """Returns the paths under ``image`` or ``images``: one path, a list of them, or none.

    Raises:
        SampleError: both keys, or something else under one.
    """
    given = {key: record[key] for key in ("image", "images") if record.get(key)}
    if len(given) > 1:
        raise sample_error(label, "it has both 'image' and 'images'", "Keep one of the two.", "wrong type")
    for key, value in given.items():
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise wrong_type(label, repr(key), value, "a path or a list of paths")
        return paths
    return []


def spoken(messages: Any, label: str) -> list[tuple[Role, str]]:
    """Returns roles and texts of ``{"from", "value"}`` or ``{"role", "content"}`` messages.

    Raises:
        SampleError: no such list, an unknown role, a tool's turn, or an answer that is not to be learned.
    """
    turns: list[tuple[Role, str]] = []
    for place, message in each_message(messages, label):
        keys = ("from", "value") if "from" in message else ("role", "content")
        role = read_role(message, keys[0], ROLES, place)
        text = message.get(keys[1])
        if isinstance(text, list):
            raise sample_error(
                place,
                f"{keys[1]!r} is a list of parts",
                "`phi3v data convert openai` reads messages made of parts.",
                "wrong type",
            )
        if not isinstance(text, str):
            raise wrong_type(place, repr(keys[1]), text, "a string")
        turns.append((role, text))
    return turns


def each_message(messages: Any, label: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns each message and how errors name it, after making sure that they are a list of objects."""
    if not isinstance(messages, list) or not messages:
        raise wrong_type(label, "its conversation", messages, "a list of at least one question and its answer")
    named = [(f"{label}, message {number}", message) for number, message in enumerate(messages, start=1)]
    for place, message in named:
        if not isinstance(message, dict):
            raise wrong_type(place, "it", message, "an object that says who speaks, and what")
    return named


def read_role(message: dict[str, Any], key: str, roles: dict[str, Role], place: str) -> Role:
    """Returns a message's role in native words.

    Raises:
        SampleError: an unknown role, a call of a tool, or an answer that is marked as not to be learned.
    """
    said = message.get(key)
    if said in _TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise sample_error(place, "it is a tool's turn or calls one", _TOOL_REMEDY, "tool turn")
    role = roles.get(said) if isinstance(said, str) else None
    if role is None:
        raise sample_error(
            place, f"{key!r} is {said!r}", f"Who speaks must be one of {', '.join(roles)}.", "unknown role"
        )
    for mark in ("weight", "loss", "train") if role == "assistant" else ():
        value = message.get(mark)
        if value is not None and value != 1:
            raise sample_error(
                place,
                f"the answer has {mark!r}: {value!r}",
                "Here every answer of a conversation is learned alike: drop the key to learn this one too, or split "
                "the conversation so that it ends with the answer to learn and tells the others in the question.",
                "answer not to be learned",
            )
    return role


def place_images(turns: Sequence[tuple[Role, str]], images: Sequence[str], label: str) -> list[Message]:
    """Returns messages whose images stand where the user's texts say ``<image>``, in order.

    Images that no text mentions stand before the first user's text.

    Args:
        turns: roles and texts.
        images: names of all images, in the order of the placeholders.
        label: how messages name the sample.

    Raises:
        SampleError: as many placeholders as images there are not, or one outside a user's text.
    """
    for number, (role, text) in enumerate(turns, start=1):
        if role != "user" and PLACEHOLDER in text:
            raise sample_error(
                f"{label}, message {number}",
                f"{PLACEHOLDER} stands in the {role}'s text",
                "Images can be shown in a user's text only. Move it there, or write it differently if it is no image.",
                "wrong image tags",
            )
    num_placeholders = sum(text.count(PLACEHOLDER) for _, text in turns)
    if num_placeholders and num_placeholders != len(images):
        raise sample_error(
            label,
            f"its texts hold {num_placeholders} x {PLACEHOLDER} and it lists {len(images)} image(s)",
            f"Write one {PLACEHOLDER} for each image, or none at all.",
            "wrong image tags",
        )
    waiting = list(images)
    messages: list[Message] = []
    for role, text in turns:
        texts = tuple(text.split(PLACEHOLDER))
        if role == "user" and not num_placeholders:
            texts = ("",) * len(waiting) + texts
        count = len(texts) - 1
        messages.append(Message(role, texts, tuple(waiting[:count])))
        del waiting[:count]
    return messages


def native_conversation(messages: Sequence[Message], label: str, system: str | None = None) -> dict[str, Any]:
    """Returns ``system`` and ``conversations`` of a native record.

    A user's messages in a row become one, a line feed between them. Images that lead a turn are written without tags,
    as native turns show them; others get tags at their places. White space around answers goes away.

    Args:
        messages: in order; a system message may come first.
        label: how errors name the sample.
        system: the system message, where the source has a key for it.

    Raises:
        SampleError: two system messages, or questions and answers that do not alternate.

    >>> native_conversation([Message("user", ("Is ", " a cat?"), ("a.png",)), Message("assistant", ("Yes ",))], "x:1")
    {'conversations': [{'images': ['a.png'], 'user': 'Is <|image_1|> a cat?', 'assistant': 'Yes'}]}
    """
    turns: list[dict[str, Any]] = []
    question: Message | None = None
    num_images = 0
    for number, message in enumerate(messages, start=1):
        place = f"{label}, message {number}"
        if message.role == "system":
            if number > 1:
                raise sample_error(
                    place, "a system message follows others", "It can only come first.", "turns out of order"
                )
            if system and system != message.texts[0]:
                raise sample_error(
                    place,
                    "a second system message stands beside 'system'",
                    "Keep one of the two.",
                    "turns out of order",
                )
            system = message.texts[0]
        elif message.role == "user":
            question = message if question is None else question.followed_by(message)
        elif question is None:
            raise sample_error(
                place,
                "an answer has no question before it",
                "Questions and answers must alternate, a question first.",
                "turns out of order",
            )
        else:
            shown_images = {"images": list(question.images)} if question.images else {}
            user = _user_text(question, num_images + 1)
            turns.append({**shown_images, "user": user, "assistant": message.texts[0].strip()})
            num_images += len(question.images)
            question = None
    if question is not None or not turns:
        found = "it has no question and answer" if question is None else "its last question has no answer"
        raise sample_error(label, found, "Add the answer, or take the question out.", "turns out of order")
    return {"system": system, "conversations": turns} if system else {"conversations": turns}


def wrong_type(where: str, name: str, value: Any, wanted: str) -> SampleError:
    """Returns the error of a value that is not what the format has in its place."""
    found = "is missing or null" if value is None else f"is {repr(value)[:60]}"
    return sample_error(where, f"{name} {found}", f"It must be {wanted}.", "wrong type")


def _user_text(question: Message, first_image: int) -> str:
    *before, last = question.texts
    if before and not any(text.strip() for text in before):
        return last.lstrip()
    tagged = (f"<|image_{number}|>{text}" for number, text in enumerate(question.texts[1:], start=first_image))
    return "".join([question.texts[0], *tagged])


def _sample_id(record: dict[str, Any], where: str, default: str) -> str:
    value = record.get("id")
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise wrong_type(where, "'id'", value, "text or a whole number")
    return str(value)


def _refuse_foreign_keys(record: dict[str, Any], label: str) -> None:
    for key, remedy in _FOREIGN_KEYS.items():
        if record.get(key) not in (None, "", [], {}):
            raise sample_error(label, f"it has {key!r}", remedy, f"sample with {key}")
    if isinstance(record.get("label"), bool):  # ms-swift's mark of good and bad answers
        raise sample_error(label, "it has 'label': true or false", _PREFERENCE_REMEDY, "sample with label")
