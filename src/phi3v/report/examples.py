"""Sample predictions with their images: which are shown, and how small they are made."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from phi3v.data.images import UnusableImageError, read_image
from phi3v.report.values import Json, by_step, read_or_note, shortened, to_number, to_text, to_whole
from phi3v.runlog import RunDirectory

MOST_SAMPLES = 24
"""Predictions shown, over all groups."""

MOST_IMAGES_A_SAMPLE = 8
"""Images shown of one question; a video sample of the published recipes has 8."""

THUMBNAIL_PX = 320
"""Longest side of an embedded image, pixels; half of it when a question has several."""

TINY_PX = 96
"""An image whose longest side is at most this is shown enlarged, pixel by pixel."""

RIGHT_FROM = 0.5
"""The score from which an answer counts as right: that of yes-or-no metrics, and where ANLS stops being 0."""

Pair = tuple[Json, Json | None]
"""A question's latest prediction, and the one from before training when there is one."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An image ready to embed, or the reason why there is none."""

    alt: str
    source: str | None
    width: int
    height: int
    is_pixelated: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to a question."""

    label: str
    text: str
    score: float | None
    is_right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One question with what was expected and what came."""

    name: str
    question: str
    expected: str
    answers: tuple[Answer, ...]
    thumbnails: tuple[Thumbnail, ...]
    images_left_out: int
    is_tiny: bool


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Questions that fared alike: how many there are in all, and the ones shown."""

    title: str
    total: int
    examples: tuple[Example, ...]


def example_groups(
    run: RunDirectory, image_folders: Sequence[Path], evals: Sequence[Json], notes: list[str]
) -> tuple[list[ExampleGroup], str, int]:
    """Chooses the predictions to show: the result's or else the latest, beside those from before training.

    Args:
        run: whose predictions.
        image_folders: as `image_folders` gives them; no image from elsewhere is shown.
        evals: lines of ``eval.jsonl``.
        notes: gets what could not be read.

    Returns:
        The groups, a sentence that says which predictions they are, and how many images could not be shown.
    """
    steps = run.prediction_steps()
    if not steps:
        return [], "", 0
    moments = {line["step"]: to_text(line.get("when")) for line in by_step(evals)}
    first_step = next((step for step, when in moments.items() if when == "before"), 0)
    # The result may be an earlier checkpoint than the last one scored.
    last_step = next((step for step, when in moments.items() if when == "after" and step in steps), steps[-1])
    last_rows = read_or_note(lambda: run.predictions(last_step), notes) or []
    has_both = first_step != last_step and first_step in steps
    first_rows = (read_or_note(lambda: run.predictions(first_step), notes) or []) if has_both else []
    earlier = {_question_key(row): row for row in first_rows}
    paired = [(row, earlier.get(_question_key(row))) for row in last_rows]
    last_label = {"before": "Before", "after": "After"}.get(moments.get(last_step, ""), f"Step {last_step:,}")
    groups, missing = [], 0
    for title, total, members in _choose(_grouped(paired)):
        examples = []
        for last, first in members:
            answers = [_answer("Before", first)] if first is not None else []
            examples.append(_example(last, (*answers, _answer(last_label, last)), image_folders))
        missing += sum(1 for example in examples for thumbnail in example.thumbnails if thumbnail.problem)
        groups.append(ExampleGroup(title, total, tuple(examples)))
    beside = ", beside those from before training" if first_rows else ""
    return groups, f"The model's answers at step {last_step:,}{beside}.", missing


def _question_key(row: Json) -> tuple[str, str]:
    return to_text(row.get("id")), to_text(row.get("turn"))


def _is_right(row: Json) -> bool:
    return (to_number(row.get("score")) or 0.0) >= RIGHT_FROM


def _grouped(paired: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Sorts questions by how they fared, the groups in the order in which they are worth reading."""
    titles = {
        (False, True): "Became right",
        (True, False): "Became wrong",
        (False, False): "Still wrong",
        (True, True): "Stayed right",
        (None, False): "Wrong",
        (None, True): "Right",
    }
    groups: dict[str, list[Pair]] = {title: [] for title in titles.values()}
    for last, first in paired:
        groups[titles[None if first is None else _is_right(first), _is_right(last)]].append((last, first))
    return {title: members for title, members in groups.items() if members}


def _choose(groups: Mapping[str, list[Pair]]) -> list[tuple[str, int, list[Pair]]]:
    """Shares ``MOST_SAMPLES`` out, one to each group in turn, and takes each group's share evenly over its length.

    Returns:
        Each group's title, its size, and the pairs chosen from it.
    """
    shares = dict.fromkeys(groups, 0)
    while sum(shares.values()) < MOST_SAMPLES:
        open_groups = [title for title in groups if shares[title] < len(groups[title])]
        if not open_groups:
            break
        for title in open_groups[: MOST_SAMPLES - sum(shares.values())]:
            shares[title] += 1
    chosen = []
    for title, members in groups.items():
        share = shares[title]
        shown = [members[index * len(members) // share] for index in range(share)]
        chosen.append((title, len(members), shown))
    return chosen


def _answer(label: str, row: Json) -> Answer:
    prediction = row.get("prediction")
    return Answer(
        label, "" if prediction is None else shortened(prediction), to_number(row.get("score")), _is_right(row)
    )


def _example(row: Json, answers: tuple[Answer, ...], folders: Sequence[Path]) -> Example:
    names = row.get("images")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    shown = names[:MOST_IMAGES_A_SAMPLE]
    longest_px = THUMBNAIL_PX if len(shown) == 1 else THUMBNAIL_PX // 2
    turn = to_whole(row.get("turn"))
    accepted = row.get("answers")
    thumbnails = tuple(_thumbnail(name, folders, longest_px) for name in shown)
    return Example(
        name=to_text(row.get("id")) + (f", turn {turn + 1}" if turn else ""),
        question=shortened(row.get("question")),
        expected=shortened(
            " | ".join(dict.fromkeys(map(to_text, accepted))) if isinstance(accepted, list) else accepted
        ),
        answers=answers,
        thumbnails=thumbnails,
        images_left_out=len(names) - len(shown),
        is_tiny=len(thumbnails) == 1 and thumbnails[0].is_pixelated,
    )


def image_folders(config: Json, data: Json) -> list[Path]:
    """Returns the folders that a run's images lie in, links followed; a prediction's image lies in one of them or is
    not shown.

    Args:
        config: the run's ``config.yaml``; its ``image_dir``, or the folders of its data, in the order in which the data
            reader tries them. They may be relative to a folder in which the report is not made.
        data: the run's ``data.json``; its ``image_dirs`` are the folders that were used.
    """
    named = config.get("image_dir")
    if isinstance(named, str) and named:
        folders = [named]
    else:
        files = config.get("eval_data") or config.get("data")
        files = [files] if isinstance(files, str) else files if isinstance(files, list) else []
        parents = [Path(file).parent for file in files if isinstance(file, str)]
        folders = [str(folder) for parent in parents for folder in (parent / "images", parent)]
    for split in data.values():
        used = split.get("image_dirs") if isinstance(split, Mapping) else None
        folders += [folder for folder in used if isinstance(folder, str)] if isinstance(used, list) else []
    resolved = []
    for folder in dict.fromkeys(folders):
        with suppress(OSError, RuntimeError, ValueError):  # a link to itself, a null byte
            resolved.append(Path(folder).resolve())
    return resolved


def _thumbnail(name: str, folders: Sequence[Path], longest_px: int) -> Thumbnail:
    """Reads, scales and encodes one image. It is encoded anew, so its file's metadata does not travel along."""
    alt = Path(name).name or name
    if "\0" in name or "://" in name or name.startswith(("//", "\\\\")):
        return Thumbnail(alt, None, 0, 0, False, "its path is not one of this machine")
    paths = [path for folder in folders if _is_file(path := folder / name)]
    if not paths:
        return Thumbnail(alt, None, 0, 0, False, "the file is not there")
    path = next((path for path in map(Path.resolve, paths) if any(map(path.is_relative_to, folders))), None)
    if path is None:
        return Thumbnail(alt, None, 0, 0, False, "the file is outside the run's image folders")
    try:
        image = read_image(path)
    except UnusableImageError as error:
        return Thumbnail(alt, None, 0, 0, False, error.reason)
    except OSError:
        return Thumbnail(alt, None, 0, 0, False, "the file cannot be read")
    return _encode_thumbnail(alt, image, longest_px)


def _is_file(path: Path) -> bool:
    """Whether this is a regular file: neither a device nor a pipe, which would never end."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _encode_thumbnail(alt: str, image: Image.Image, longest_px: int) -> Thumbnail:
    longest = max(image.size)
    is_tiny = longest <= TINY_PX
    if longest > longest_px:
        image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    # Whole multiples keep every pixel of a tiny image square and equal.
    zoom = max(1, longest_px // 2 // longest) if is_tiny else 1
    # Comments and colour profiles would be saved too; the model sees none of them.
    image.info = {}
    buffer = io.BytesIO()
    if is_tiny:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82, optimize=True)
    kind = "png" if is_tiny else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Thumbnail(alt, source, image.width * zoom, image.height * zoom, is_tiny, None)
