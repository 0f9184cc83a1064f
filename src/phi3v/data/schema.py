"""The JSONL conversation format: one line of text to a checked ``Sample``, and a ``Sample`` to the published chat text.

Nothing here needs torch, a tokenizer or an image: what a line says is settled before any of them is loaded.
"""

import difflib
import json
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

from ..errors import DataError
from ..geometry import MAX_NUM_CROPS

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
"""An image tag, ``<|image_1|>``; its group is the image's number, counted from 1 over the whole conversation."""

_NEAR_TAG = re.compile(r"<\|\s*image[^|>\n]*\|>", re.IGNORECASE)
_FOREIGN_TAG = "<image>"
"""What LLaVA and trainers after it write where an image stands."""

_MAX_TAG_CHARS = 20  # a number that no conversation reaches, and short enough for int()
_FORMAT_TOKENS = re.compile(r"<\|(?:user|assistant|system|end|endoftext)\|>")

_MAX_SHOWN_CHARS = 80
_MAX_LISTED = 20
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 4, 40, 40
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MAX_SHOWN_CHARS

_SAMPLE_KEYS = ("id", "source", "system", "num_crops", "conversations")
_TURN_KEYS = ("images", "user", "assistant", "answers", "labels")


class SampleError(DataError):
    """One sample cannot be used as it is.

    Attributes:
        reason: a few words that samples with the same fault share; skipped samples are counted under it.
    """

    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message)  # one positional argument, so that a data loader worker can hand the error on
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer.

    Attributes:
        user: the user's text. It holds image tags only where the line's author placed them.
        assistant: the answer to learn.
        images: paths as the file names them, in the order in which the turn shows them.
        answers: every answer that scoring accepts, as often as it was given; ``assistant`` is among them.
        labels: the closed set of answers that the question allows, or empty; ``assistant`` is one of them.
    """

    user: str
    assistant: str
    images: tuple[str, ...]
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation, checked but not tokenized.

    Attributes:
        id: the author's name for it; shown in messages and predictions.
        turns: at least one.
        system: system message, or None; an empty one counts as none.
        num_crops: most tiles an image of this sample may use, or None for the processor's own number.
        source: where the author took it from; carried along, never read.
        where: ``file:line``.
    """

    id: str
    turns: tuple[Turn, ...]
    system: str | None
    num_crops: int | None
    source: str | None
    where: str

    @property
    def label(self) -> str:
        """How messages name the sample: its place and its id."""
        return _label(self.where, self.id)

    @property
    def images(self) -> tuple[str, ...]:
        """Image paths of all turns, in the order in which the conversation shows them."""
        return tuple(name for turn in self.turns for name in turn.images)


class Segment(NamedTuple):
    """A stretch of chat text that is tokenized on its own."""

    text: str
    is_answer: bool


def sample_error(where: str, found: str, remedy: str, reason: str) -> SampleError:
    """Builds the error of one sample: where it stands, what was found, what to do."""
    return SampleError(f"{where}: {found}. {remedy}", reason)


def quoted(value: Any) -> str:
    """Returns a value as messages quote it: a line may hold megabytes, and lists as deep as Python can read."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


def parse_sample(line: str, where: str) -> Sample:
    """Reads one line of a JSONL file.

    Tags that the author placed are renumbered in text order and ``Turn.images`` follows them, so that a reader of
    ``Sample`` never meets tags out of order: ``<|image_2|> .. <|image_1|>`` with [a, b] comes out as
    ``<|image_1|> .. <|image_2|>`` with [b, a].

    Args:
        line: one JSON object.
        where: ``file:line``, for messages.

    Raises:
        SampleError: broken JSON, a key that the format does not know, a value of a wrong type, an empty answer, tags
            that do not match the images, or text that holds the chat format's own tokens.

    >>> sample = parse_sample('{"id": "7", "conversations": [{"images": ["a.png"], "user": "Total?", '
    ...                       '"assistant": "12"}]}', "bills.jsonl:1")
    >>> sample.turns[0]
    Turn(user='Total?', assistant='12', images=('a.png',), answers=('12',), labels=())
    """
    try:
        record = json.loads(line, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        is_array = line.lstrip().startswith("[")
        raise sample_error(
            where,
            f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}",
            "Each line must be one whole JSON object; write the file with json.dumps, one object a line."
            + " `phi3v data convert` turns other trainers' JSON arrays into such files." * is_array,
            "broken JSON",
        ) from error
    except _RepeatedKeyError as error:
        raise sample_error(
            where, f"the key {quoted(error.key)} stands twice in one object", "Keep one of the two.", "broken JSON"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise sample_error(
            where, f"broken JSON: {error}", "Write the line as docs/data.md shows.", "broken JSON"
        ) from error
    if not isinstance(record, dict):
        known = "an object with the keys " + ", ".join(_SAMPLE_KEYS)
        by_converter = "; `phi3v data convert` reads arrays of other trainers" if isinstance(record, list) else ""
        raise _type_error(where, "the line", record, known + by_converter)
    _check_keys(where, record, _SAMPLE_KEYS, "a sample")
    sample_id = _text(where, record, "id", "the sample")
    label = _label(where, sample_id)
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise _type_error(label, "'conversations'", conversations, "a list of at least one turn")
    turns = tuple(_parse_turn(f"{label}, turn {k}", turn) for k, turn in enumerate(conversations, start=1))
    system = _optional_text(label, record, "system")
    if system is not None:
        _refuse_tokens(label, "the system message", system, _FORMAT_TOKENS, _NEAR_TAG)
    return Sample(
        id=sample_id,
        turns=_in_text_order(label, turns),
        system=system if system and system.strip() else None,
        num_crops=_num_crops(label, record.get("num_crops")),
        source=_optional_text(label, record, "source"),
        where=where,
    )


def render(sample: Sample, upto_turn: int | None = None) -> list[Segment]:
    """Writes a conversation in the published chat format, cut where the published training tokenizes separately.

    A turn's images stand before its text, one tag a line, unless the text holds tags itself.

    Args:
        sample: the conversation.
        upto_turn: None for training. For generation, the zero-based turn to answer: earlier turns stand with their
            gold answers and the last segment ends where the model's answer begins.

    Returns:
        Prompts and answers in turn. An answer ends with ``<|end|>`` and a line feed; the conversation's last one is
        followed by ``<|endoftext|>``.

    >>> sample = parse_sample('{"id": "7", "conversations": [{"images": ["a.png"], "user": "Total?", '
    ...                       '"assistant": "12"}]}', "bills.jsonl:1")
    >>> for segment in render(sample):
    ...     print(segment)
    Segment(text='<|user|>\\n<|image_1|>\\nTotal?<|end|>\\n<|assistant|>\\n', is_answer=False)
    Segment(text='12<|end|>\\n<|endoftext|>', is_answer=True)

    Source: published chat template and fine-tuning recipe.
    """
    num_turns = len(sample.turns)
    if upto_turn is not None and not 0 <= upto_turn < num_turns:
        raise ValueError(f"{sample.where}: upto_turn is {upto_turn}, must be 0 to {num_turns - 1}")
    last = num_turns - 1 if upto_turn is None else upto_turn
    segments: list[Segment] = []
    opening = "" if sample.system is None else f"<|system|>\n{sample.system}<|end|>\n"
    num_images = 0
    for index, turn in enumerate(sample.turns[: last + 1]):
        text = turn.user
        if not IMAGE_TAG.search(text):
            numbers = range(num_images + 1, num_images + len(turn.images) + 1)
            text = "".join(f"<|image_{number}|>\n" for number in numbers) + text
        num_images += len(turn.images)
        segments.append(Segment(f"{opening}<|user|>\n{text}<|end|>\n<|assistant|>\n", is_answer=False))
        opening = ""
        if index == upto_turn:
            break
        ending = "<|endoftext|>" if index == num_turns - 1 else ""
        segments.append(Segment(f"{turn.assistant}<|end|>\n{ending}", is_answer=True))
    return segments


def _label(where: str, sample_id: str) -> str:
    return f"{where}: sample {quoted(sample_id)}"


class _RepeatedKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise _RepeatedKeyError(key)
        record[key] = value
    return record


def _parse_turn(where: str, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise _type_error(where, "the turn", turn, "an object with the keys " + ", ".join(_TURN_KEYS))
    _check_keys(where, turn, _TURN_KEYS, "a turn")
    images = turn.get("images")
    if images is None:
        images = []
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise _type_error(where, "'images'", images, "a list of paths relative to the image folder")
    for name in images:
        _check_encodable(where, "an image path", name)
    user = _text(where, turn, "user", "the turn", may_be_empty=bool(images))
    _refuse_tokens(where, "the user's text", user, _FORMAT_TOKENS)
    for tag in _NEAR_TAG.finditer(user):
        if len(tag.group()) > _MAX_TAG_CHARS or not IMAGE_TAG.fullmatch(tag.group()):
            raise sample_error(
                where,
                f"the user's text holds {tag.group()[:40]!r}, which looks like an image tag and is none",
                "Write <|image_1|>, or leave tags out: the turn's images are then placed before its text.",
                "wrong image tags",
            )
    if images and _FOREIGN_TAG in user:
        raise sample_error(
            where,
            f"the user's text holds {_FOREIGN_TAG!r}, which is no image tag here and would be read as text",
            "Write <|image_1|>, or leave it out: the turn's images are then placed before its text. `phi3v data "
            "convert` turns other trainers' files into these.",
            "wrong image tags",
        )
    assistant = _text(where, turn, "assistant", "the turn", empty_reason="empty answer")
    _refuse_tokens(where, "the answer", assistant, _FORMAT_TOKENS, _NEAR_TAG)
    answers = turn.get("answers")
    if answers is None:
        answers = []
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise _type_error(where, "'answers'", answers, "a list of further accepted answers, none of them empty")
    for answer in answers:
        _check_encodable(where, "an accepted answer", answer)
    return Turn(
        user=user,
        assistant=assistant,
        images=tuple(images),
        answers=tuple(answers) if assistant in answers else (assistant, *answers),
        labels=_labels(where, turn.get("labels"), assistant),
    )


def _labels(where: str, labels: Any, assistant: str) -> tuple[str, ...]:
    if labels is None:
        return ()
    is_list = isinstance(labels, list) and all(isinstance(label, str) and label.strip() for label in labels)
    if not is_list or len(labels) < 2 or len(set(labels)) < len(labels):
        raise _type_error(where, "'labels'", labels, "a list of at least two different answers, none of them empty")
    for label in labels:
        _check_encodable(where, "a label", label)
        _refuse_tokens(where, "a label", label, _FORMAT_TOKENS, _NEAR_TAG)
    if assistant not in labels:
        raise sample_error(
            where,
            f"the answer {quoted(assistant)} is none of its labels {', '.join(map(quoted, labels[:_MAX_LISTED]))}"
            + f" and {len(labels) - _MAX_LISTED} more" * (len(labels) > _MAX_LISTED),
            "Write the answer as one of the labels, letter by letter, or add it to them.",
            "answer outside the labels",
        )
    return tuple(labels)


def _in_text_order(where: str, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Checks the conversation's tags against its images, and puts both into text order.

    A turn whose text holds no tags shows its own images; the number of an image is its place in the whole file line.
    """
    images = [name for turn in turns for name in turn.images]
    shown: list[list[int]] = []
    num_listed = 0
    for turn in turns:
        own = range(num_listed + 1, num_listed + len(turn.images) + 1)
        num_listed += len(turn.images)
        shown.append([int(number) for number in IMAGE_TAG.findall(turn.user)] or list(own))
    order = [number for numbers in shown for number in numbers]
    if sorted(order) != list(range(1, len(images) + 1)):
        raise sample_error(
            where,
            f"its image tags are numbered {quoted(order)} and it lists {len(images)} image(s)",
            "Number tags from 1 over the whole conversation, each image once, or leave tags out of the text.",
            "wrong image tags",
        )
    placed: list[Turn] = []
    num_shown = 0
    for turn, numbers in zip(turns, shown, strict=True):
        user = _renumber_tags(turn.user, num_shown + 1)
        placed.append(replace(turn, user=user, images=tuple(images[number - 1] for number in numbers)))
        num_shown += len(numbers)
    return tuple(placed)


def _renumber_tags(text: str, first: int) -> str:
    numbers = count(first)
    return IMAGE_TAG.sub(lambda _: f"<|image_{next(numbers)}|>", text)


def _num_crops(where: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_NUM_CROPS:
        raise _type_error(where, "'num_crops'", value, f"a whole number from 1 to {MAX_NUM_CROPS}")
    return value


def _text(
    where: str,
    record: dict[str, Any],
    key: str,
    owner: str,
    may_be_empty: bool = False,
    empty_reason: str = "empty text",
) -> str:
    if key not in record:
        raise sample_error(where, f"{owner} has no {key!r}", f'Add "{key}": "..." to it.', "missing key")
    value = record[key]
    if not isinstance(value, str):
        raise _type_error(where, repr(key), value, "a string")
    if not may_be_empty and not value.strip():
        raise sample_error(where, f"{key!r} is empty", "Write its text, or take the sample out.", empty_reason)
    _check_encodable(where, repr(key), value)
    return value


def _optional_text(where: str, record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise _type_error(where, repr(key), value, "a string, or left out")
    if value is not None:
        _check_encodable(where, repr(key), value)
    return value


def _check_encodable(where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise sample_error(
            where,
            f"{name} holds half of a surrogate pair at character {error.start}, which is no character",
            "Write the whole character: two \\u escapes, or UTF-8.",
            "broken text",
        ) from error


def _refuse_tokens(where: str, name: str, text: str, *patterns: re.Pattern[str]) -> None:
    for pattern in patterns:
        if found := pattern.search(text):
            raise sample_error(
                where,
                f"{name} holds the special token {found.group()!r}, which would end or change the turn",
                "Take it out or write it differently, for example with a space inside; turns and images have keys "
                "of their own.",
                "special token in the text",
            )


def _check_keys(where: str, record: dict[str, Any], known: tuple[str, ...], owner: str) -> None:
    for key in record:
        if key in known:
            continue
        near = difflib.get_close_matches(key[:_MAX_SHOWN_CHARS], known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise sample_error(
            where,
            f"{owner} has no key {quoted(key)}",
            f"{hint}The keys of {owner} are {', '.join(known)}.",
            "unknown key",
        )


def _type_error(where: str, name: str, value: Any, wanted: str) -> SampleError:
    return sample_error(where, f"{name} is {quoted(value)}", f"It must be {wanted}.", "wrong type")
