import csv
import json
from pathlib import Path

import pytest

from phi3v.data.check import check_dataset
from phi3v.data.convert import csv_table
from phi3v.data.convert.csv_table import convert_csv
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.errors import ConfigError, DataError


def natives(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def convert(tmp_path, image_folder):
    def run(content, name="table.csv", **options):
        source = tmp_path / name
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
        return convert_csv(str(source), tmp_path / "out", **{"image_dir": image_folder, "progress": False, **options})

    return run


def native(name, image, user, assistant, **keys):
    return {"id": name, "conversations": [{"images": image, "user": user, "assistant": assistant, **keys}]}


def test_long_cells_are_read_and_the_limit_of_other_readers_stays(convert, tmp_path):
    before = csv.field_size_limit()
    convert("image,question,answer\nred.png,q," + "word " * 40_000)
    assert natives(tmp_path / "out" / "table_train.jsonl")[0]["conversations"][0]["assistant"].count("word") == 40_000
    assert csv.field_size_limit() == before


TABLE = """\
image,question,answer,note
red.png,What colour?,Red,
blue.jpg|red.png,"Which is red,
the first or the second?", second ,"a ""note"" of
two lines"

red.png|red.png,Größer?,"Nein, ""gleich"" ",x
"""
NATIVE = [
    native("table-2", ["red.png"], "What colour?", "Red"),
    native("table-3", ["blue.jpg", "red.png"], "Which is red,\nthe first or the second?", "second"),
    native("table-7", ["red.png", "red.png"], "Größer?", 'Nein, "gleich"'),
]


def test_rows_become_these_records(convert, tmp_path, image_folder):
    conversion = convert(TABLE)
    assert natives(tmp_path / "out" / "table_train.jsonl") == NATIVE
    assert conversion.samples == {"train": 3}
    assert conversion.image_dir.resolve() == image_folder


def test_windows_tables_are_read(convert):
    conversion = convert(b"\xef\xbb\xbf" + TABLE.encode().replace(b"\n", b"\r\n"))
    assert natives(conversion.files["train"]) == NATIVE


@pytest.mark.parametrize(
    ("content", "name", "options"),
    [
        ("image\tquestion\tanswer\nred.png\tWhat?\ta", "table.tsv", {}),
        ("image\tquestion\tanswer\nred.png\tWhat?\ta\n", "table.txt", {"delimiter": "tab"}),
        ("image\tquestion\tanswer\nred.png\tWhat?\ta\n", "table.txt", {"delimiter": "\\t"}),
        ("image;question;answer\nred.png;What?;a\n", "table.csv", {"delimiter": ";"}),
        ("\nimage,question,answer\n,,\nred.png,What?,a\n , ,\n", "table.csv", {}),
        ("file,q,answer\nred.png,What?,a\n", "table.csv", {"image_column": "file", "question_column": "q"}),
        ("image,question,out\nred.png,What?,a\n", "table.csv", {"answer_column": "out"}),
        ("image , answer\nred.png,a\n", "table.csv", {"question": "What?"}),
        ("image,question,answer\nred.png,ignored,a\n", "table.csv", {"question": "What?"}),
    ],
)
def test_tables_of_other_makes_are_read(convert, content, name, options):
    (sample,) = natives(convert(content, name, **options).files["train"])
    assert sample["conversations"] == [{"images": ["red.png"], "user": "What?", "assistant": "a"}]


def test_ids_and_further_answers_come_from_their_columns(convert, tmp_path):
    convert(
        "key,image,question,answer,also\n 7 ,red.png,Total?,12,12.0; 12 EUR;\n8,red.png;blue.jpg,Sum?,13,\n",
        id_column="key",
        answers_column="also",
        separator=";",
    )
    assert natives(tmp_path / "out" / "table_train.jsonl") == [
        native("7", ["red.png"], "Total?", "12", answers=["12.0", "12 EUR"]),
        native("8", ["red.png", "blue.jpg"], "Sum?", "13"),
    ]


def test_labels_are_the_tables_different_answers(convert, tmp_path):
    convert('image,answer\nred.png,dog\nblue.jpg,"cat, small"\nred.png, dog\n', question="Which?", labels=True)
    labels = ["cat, small", "dog"]
    assert natives(tmp_path / "out" / "table_train.jsonl") == [
        native("table-2", ["red.png"], "Which?", "dog", labels=labels),
        native("table-3", ["blue.jpg"], "Which?", "cat, small", labels=labels),
        native("table-4", ["red.png"], "Which?", "dog", labels=labels),
    ]


def test_the_data_check_takes_it(convert, processor):
    conversion = convert("image,answer\nred.png|blue.jpg,dog\nblue.jpg,cat\n", question="Which?", labels=True)
    dataset = ConversationDataset(conversion.files["train"])
    summary = check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1)
    assert (summary.samples, summary.images) == (2, 3)


def test_one_images_questions_stay_on_one_side(convert, image_folder):
    for number in range(20):
        (image_folder / f"{number}.png").write_bytes((image_folder / "red.png").read_bytes())
    rows = [f"{number}.png,Question {k}?,a" for k in range(3) for number in range(20)]
    conversion = convert("\n".join(["image,question,answer", *rows]), val_share=0.5)
    sides = [
        {str(sample["conversations"][0]["images"]) for sample in natives(path)} for path in conversion.files.values()
    ]
    assert sum(conversion.samples.values()) == 60
    assert all(sides) and not sides[0] & sides[1]


HEAD = "image,question,answer\n"
BAD_TABLES = {
    "missing column": (
        "img,question,answer\nred.png,a,b\n",
        {},
        "{path}:1: the table has no column 'image'. Its columns are 'img', 'question', 'answer'. Name the "
        "right one with image_column.",
    ),
    "missing question": (
        "image,answer\nred.png,b\n",
        {},
        "{path}:1: the table has no column 'question'. Its columns are 'image', 'answer'. Name the right one with "
        "question_column, or give one question for all rows with question.",
    ),
    "missing id": (HEAD, {"id_column": "key"}, "{path}:1: the table has no column 'key'"),
    "missing answers": (HEAD, {"answers_column": "also"}, "Name the right one with answers_column."),
    "twice": ("image,image,question,answer\n", {}, "{path}:1: the header has the column 'image' twice. Rename one"),
    "semicolons": (
        "image;question;answer\n",
        {},
        "{path}:1: the header is one cell, 'image;question;answer'. Its cells may be separated by ';': set delimiter.",
    ),
    "empty": (b"\xef\xbb\xbf\n\n", {}, "{path}: the table is empty. Its first row names the columns."),
    "open quote": (
        HEAD + 'red.png,a,b\nred.png,"a,b\nred.png,a,b\n',
        {},
        "{path}:3: the row that begins here cannot be read, up to line 4: unexpected end of data. A quote that stands",
    ),
    "quote inside": (HEAD + 'red.png,"a "quoted" word",b\n', {}, "{path}:2: the row that begins here cannot be read"),
    "latin-1": (
        HEAD.encode() + "red.png,Größe?,b\n".encode("latin-1"),
        {},
        "{path}:2: byte 11 of the line is not UTF-8. Save the table as UTF-8",
    ),
    "one label": (
        HEAD + "red.png,a,b\nred.png,c,b\n",
        {"labels": True},
        "{path}: labels needs at least two different answers, and the column 'answer' has 1.",
    ),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_broken_table_is_refused(convert, tmp_path, kind, on_bad_sample):
    content, options, message = BAD_TABLES[kind]
    with pytest.raises(DataError) as caught:
        convert(content, on_bad_sample=on_bad_sample, **options)
    assert message.replace("{path}", str(tmp_path / "table.csv")) in str(caught.value)
    assert not list(tmp_path.glob("out/*.jsonl"))


def test_labels_are_few(convert, monkeypatch):
    monkeypatch.setattr(csv_table, "MAX_LABELS", 3)
    rows = [f"red.png,Which?,answer {number}" for number in range(4)]
    assert convert(HEAD + "\n".join(rows[:3]), labels=True).samples == {"train": 3}
    with pytest.raises(DataError, match=r"table\.csv:5: the column 'answer' holds more than 3 different answers"):
        convert(HEAD + "\n".join(rows), labels=True)


BAD_ROWS = {
    "too many cells": ("red.png,a,b,c", "the row has 4 cells and the header 3. Put cells that hold the delimiter"),
    "too few": ("red.png,a", "the row has 2 cells and the header 3"),
    "missing image": ("x.png,a,b", "sample 'table-5': image 'x.png' does not exist (looked for"),
    "one of two missing": ("red.png|x.png,a,b", "sample 'table-5': image 'x.png' does not exist"),
    "no image": (" | ,a,b", "sample 'table-5': its cell 'image' is empty. Name an image, or take the row out."),
    "outside": ("../table.csv,a,b", "leads outside the image folder"),
    "web": ("https://x.org/a.png,a,b", "is a URL, not a path. Nothing is fetched"),
    "empty answer": ("red.png,a, ", "sample 'table-5', turn 1: 'assistant' is empty"),
    "token": ("red.png,a <|user|>,b", "turn 1: the user's text holds the special token '<|user|>'"),
    "tag": ("red.png,a <|image_2|>,b", "its image tags are numbered [2] and it lists 1 image(s)"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_refused_at_the_line_it_begins_on(convert, tmp_path, kind):
    row, message = BAD_ROWS[kind]
    content = f'{HEAD}red.png,"a\n\nb",c\n{row}\nblue.jpg,"a\nb",c\n'
    with pytest.raises(DataError) as caught:
        convert(content)
    assert str(caught.value).startswith(f"{tmp_path}/table.csv:5: ")
    assert message in str(caught.value)
    conversion = convert(content, on_bad_sample="skip")
    assert conversion.samples == {"train": 2}
    assert sum(conversion.skipped.values()) == 1


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"delimiter": "::"}, "delimiter is '::'. It must be one character"),
        ({"delimiter": '"'}, "delimiter is '\"'"),
        ({"separator": ""}, "separator is empty"),
        ({"val_share": -0.1}, "val_share is -0.1"),
    ],
)
def test_options_that_make_no_sense_are_refused(convert, options, found):
    with pytest.raises(ConfigError, match=found):
        convert(TABLE, **options)


def test_a_table_without_rows_is_refused(convert):
    with pytest.raises(DataError, match="no usable record was found"):
        convert(HEAD)
