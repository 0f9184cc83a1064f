"""The recipes' data sets in small, in every form in which they are published."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MINI_DOCVQA = "nielsr/docvqa_1200_examples"
PUBLISHED_DOCVQA = "lmms-lab/DocVQA"
CAULDRON = "HuggingFaceM4/the_cauldron"

CauldronRow = tuple[Sequence[bytes], Sequence[tuple[str, str]]]
"""Encoded images, and (question, answer) pairs."""

IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(number: int, image_format: str = "PNG", size: tuple[int, int] = (24, 36)) -> bytes:
    """Returns an encoded image of one colour of its own; ``size`` is (h, w) in pixels."""
    colour = (number * 37 % 256, number * 91 % 256, number % 256)
    encoded = io.BytesIO()
    Image.new("RGB", size[::-1], colour).save(encoded, image_format)
    return encoded.getvalue()


def write_table(path: Path, rows: list[dict[str, Any]], schema: dict[str, pa.DataType], has_types: bool = True) -> None:
    """Writes a Parquet file as the hub holds them, a few rows a group.

    Args:
        path: folders above it are made.
        rows: one dictionary a row; an image is ``{"bytes": .., "path": ..}``.
        schema: types of the columns.
        has_types: write the note that tells the ``datasets`` library which columns are images.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, pa.schema(schema))
    if has_types:
        features = {name: _feature(column) for name, column in schema.items()}
        note = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(table, path, row_group_size=4)


def write_mini_docvqa(
    root: Path, num_train: int = 8, num_test: int = 3, *, pages: Sequence[bytes] | None = None
) -> Path:
    """Writes ``nielsr/docvqa_1200_examples`` under ``root``.

    Two rows after one another show the same page, unless ``pages`` are given for the training rows.
    """
    folder = root / MINI_DOCVQA
    schema = {
        "id": pa.string(),
        "image": IMAGE_TYPE,
        "query": pa.struct(dict.fromkeys(("de", "en", "es", "fr", "it"), pa.string())),
        "answers": pa.list_(pa.string()),
        "words": pa.list_(pa.string()),
        "bounding_boxes": pa.list_(pa.list_(pa.float32())),
        "answer": pa.struct(
            {"match_score": pa.float64(), "matched_text": pa.string(), "start": pa.int64(), "text": pa.string()}
        ),
    }
    for split, first, count in (("train", 0, num_train), ("test", 1000, num_test)):
        rows = [
            {
                "id": f"{split}_{row}",
                "image": {
                    "bytes": pages[row] if pages and split == "train" else picture(first + row // 2),
                    "path": None,
                },
                "query": {"en": f"What is number {row}?", "de": f"Was ist Nummer {row}?"},
                "answers": [f"{row}", f" number {row}"],
                "words": ["number", f"{row}"],
                "bounding_boxes": [[0.0, 0.0, 1.0, 1.0]] * 2,
                "answer": {"match_score": 1.0, "matched_text": f"{row}", "start": 0, "text": f"{row}"},
            }
            for row in range(count)
        ]
        write_table(folder / "data" / f"{split}-00000-of-00001.parquet", rows, schema)
    return folder


def write_published_docvqa(root: Path, num_validation: int = 3, num_test: int = 2, num_public: int = 0) -> Path:
    """Writes ``lmms-lab/DocVQA`` under ``root``: validation, and a test split.

    Of the test split the first ``num_public`` questions have answers; the pages of the others cannot be read.
    """
    folder = root / PUBLISHED_DOCVQA
    schema = {
        "questionId": pa.string(),
        "question": pa.string(),
        "question_types": pa.list_(pa.string()),
        "image": IMAGE_TYPE,
        "docId": pa.int64(),
        "ucsf_document_id": pa.string(),
        "ucsf_document_page_no": pa.string(),
        "answers": pa.list_(pa.string()),
        "data_split": pa.string(),
    }
    for split, first, count, num_answered in (
        ("validation", 100, num_validation, num_validation),
        ("test", 200, num_test, num_public),
    ):
        rows = [
            {
                "questionId": f"{first + row}",
                "question": f"Who wrote page {row}?",
                "question_types": ["handwritten"],
                "image": {"bytes": picture(first) if row < num_answered else b"no image", "path": f"{first}.png"},
                "docId": first,
                "ucsf_document_id": "abcd0001",
                "ucsf_document_page_no": "1",
                "answers": ["Ann", "Ann B."] if row < num_answered else None,
                "data_split": split,
            }
            for row in range(count)
        ]
        write_table(folder / "DocVQA" / f"{split}-00000-of-00001.parquet", rows, schema)
    return folder


def write_cauldron(root: Path, part: str, rows: Sequence[CauldronRow], *, has_types: bool = True) -> Path:
    """Writes one part of ``HuggingFaceM4/the_cauldron`` under ``root``, in two files; returns the whole's folder."""
    folder = root / CAULDRON
    text = pa.struct(dict.fromkeys(("user", "assistant", "source"), pa.string()))
    schema = {"images": pa.list_(IMAGE_TYPE), "texts": pa.list_(text)}
    values = [
        {
            "images": [{"bytes": image, "path": None} for image in images],
            "texts": [{"user": user, "assistant": assistant, "source": part} for user, assistant in texts],
        }
        for images, texts in rows
    ]
    half = len(values) // 2
    for number, chunk in enumerate((values[:half], values[half:])):
        write_table(folder / part / f"train-0000{number}-of-00002-0123456789abcdef.parquet", chunk, schema, has_types)
    return folder


def docvqa_rows(num_rows: int) -> list[CauldronRow]:
    """Returns pages with two questions each, as the Cauldron words them."""
    return [
        (
            [picture(row)],
            [
                (f"What is the date on page {row}?\nProvide a short and direct response.", f"May {row + 1}."),
                (f"Who signed page {row}?\nGive a very brief answer.", "Ann."),
            ],
        )
        for row in range(num_rows)
    ]


def hateful_memes_rows(num_rows: int) -> list[CauldronRow]:
    """Returns memes with one question each, every other one hateful."""
    question = "Is this meme hateful?\nAnswer yes or no."
    return [([picture(row)], [(question, "Yes." if row % 2 else "No.")]) for row in range(num_rows)]


def nlvr2_rows(num_rows: int) -> list[CauldronRow]:
    """Returns pairs of photographs with two questions each."""
    return [
        (
            [picture(2 * row), picture(2 * row + 1, "JPEG")],
            [
                (f"Are there {row} dogs?\nAnswer yes or no.", "Yes." if row % 2 else "No."),
                (f"Is it true that {row} cats sit?\nAnswer yes or no.", "No."),
            ],
        )
        for row in range(num_rows)
    ]


def write_docvqa_release(folder: Path, layout: Literal["flat", "splits", "newer"] = "flat") -> Path:
    """Writes DocVQA's original release: two questions on one training page, one validation question.

    Args:
        folder: where.
        layout: ``flat``: everything in one folder. ``splits``: a folder a split. ``newer``: one folder of questions and
            one of pages.
    """
    questions = {
        "train": [
            {"questionId": 337, "question": "What is the date?", "image": "documents/xnbl0037_1.png", "docId": 279}
            | {"answers": ["1/8/93", "1-8-93"], "question_types": ["handwritten"], "data_split": "train"},
            {"questionId": 338, "question": "Who is it to?", "image": "documents/xnbl0037_1.png", "docId": 279}
            | {"answers": ["Paul"], "question_types": ["form"], "data_split": "train"},
        ],
        "val": [
            {
                "questionId": 49153,
                "question": "What is the total?",
                "image": "documents/pybv0228_81.png",
                "docId": 14465,
            }
            | {"answers": ["0.28", "0.28 "], "question_types": ["table"], "data_split": "val"},
        ],
    }
    for split, of_split in questions.items():
        own = folder / split if layout == "splits" else folder
        pages = folder / "spdocvqa_images" if layout == "newer" else own / "documents"
        lists = folder / "spdocvqa_qas" if layout == "newer" else own
        for place in (pages, lists):
            place.mkdir(parents=True, exist_ok=True)
        content = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": split, "data": of_split}
        (lists / f"{split}_v1.0_withQT.json").write_text(json.dumps(content))
        for number, question in enumerate(of_split):
            (pages / Path(question["image"]).name).write_bytes(picture(number))
    return folder


def write_hateful_memes_release(folder: Path) -> Path:
    """Writes the original release of Hateful Memes: three training memes, two of each other file's."""
    (folder / "img").mkdir(parents=True)
    files = {"train": 3, "dev_seen": 2, "dev_unseen": 2, "test_seen": 2, "test_unseen": 2}
    first = 1
    for name, count in files.items():
        lines = []
        for number in range(first, first + count):
            image = f"img/{number:05}.png"
            (folder / image).write_bytes(picture(number))
            meme = {"id": f"{number:05}" if name == "train" else number, "img": image, "label": number % 2}
            lines.append(json.dumps({**meme, "text": f"words {number}"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        first += count
    return folder


def write_nlvr2_release(folder: Path, layout: Literal["flat", "repository"] = "flat") -> Path:
    """Writes NLVR2's original release: two training sentences about one pair, a sentence each for dev and test1.

    Args:
        folder: where.
        layout: ``flat``: sentences in it, images in ``images/train``, ``dev`` and ``test1``. ``repository``: sentences
            in ``data``, all images in ``images``.
    """
    sentences = {
        "train": [
            {"identifier": "train-10171-0-0", "sentence": "There are two dogs.", "label": "False", "directory": 39},
            {"identifier": "train-10171-0-1", "sentence": "One dog sleeps.", "label": "True", "directory": 39},
        ],
        "dev": [{"identifier": "dev-850-0-0", "sentence": "Both birds fly.", "label": "True", "query": "bird"}],
        "test1": [{"identifier": "test1-1-3-1", "sentence": "A cup is red.", "label": "False", "synset": "cup"}],
    }
    lists = folder / "data" if layout == "repository" else folder
    lists.mkdir(parents=True)
    for split, of_split in sentences.items():
        (lists / f"{split}.json").write_text("".join(json.dumps(one) + "\n" for one in of_split))
        images = folder / "images" / split if layout == "repository" or split == "train" else folder / split
        for one in of_split:
            own = images / str(one["directory"]) if "directory" in one else images
            own.mkdir(parents=True, exist_ok=True)
            for side in (0, 1):
                name = f"{one['identifier'].rpartition('-')[0]}-img{side}.png"
                (own / name).write_bytes(picture(10 * len(name) + side))
    return folder


def _feature(column: pa.DataType) -> Any:
    """Returns how the ``datasets`` library notes the type of a column."""
    if column == IMAGE_TYPE:
        return {"_type": "Image"}
    if pa.types.is_list(column):
        return {"feature": _feature(column.value_type), "_type": "List"}
    if pa.types.is_struct(column):
        return {field.name: _feature(field.type) for field in column}
    return {"dtype": {"double": "float64", "float": "float32"}.get(str(column), str(column)), "_type": "Value"}
