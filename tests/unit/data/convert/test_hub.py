import io
import sys

import pyarrow as pa
import pytest
from PIL import Image

from phi3v.data.convert.hub import HubDataset, write_hub_image
from phi3v.data.convert.writer import NativeWriter
from phi3v.data.schema import SampleError
from phi3v.errors import ConfigError, DataError
from sources import CAULDRON, IMAGE_TYPE, docvqa_rows, picture, write_cauldron, write_mini_docvqa, write_table

CARD = """---
configs:
- config_name: docvqa
  data_files:
  - split: train
    path: docvqa/train-*
- config_name: nlvr2
  data_files:
  - split: train
    path: nlvr2/train-*
---
"""


def texts_of(table: HubDataset, **options) -> list[tuple[int, str, str]]:
    rows = table.rows("train", ["texts"], progress=False, **options)
    return [(number, record.where, record.values["texts"][0]["assistant"]) for number, record in rows]


@pytest.mark.parametrize("has_card", [True, False])
@pytest.mark.parametrize("has_types", [True, False])
def test_a_part_of_a_data_set_is_read_with_and_without_its_card(hub, has_card, has_types):
    folder = write_cauldron(hub, "docvqa", docvqa_rows(5), has_types=has_types)
    write_cauldron(hub, "nlvr2", docvqa_rows(1), has_types=has_types)
    if has_card:
        (folder / "README.md").write_text(CARD)
    table = HubDataset(CAULDRON, "docvqa")
    assert table.columns == {"train": ("images", "texts")}
    assert texts_of(table) == [(row, f"{CAULDRON} docvqa/train row {row}", f"May {row + 1}.") for row in range(5)]
    _, record = next(table.rows("train", ["images"], progress=False))
    assert record.values == {"images": [{"bytes": picture(0), "path": None}]}, "only what is asked for, as stored"


def test_a_limit_ends_the_reading(hub):
    write_cauldron(hub, "docvqa", docvqa_rows(9))
    assert len(texts_of(HubDataset(CAULDRON, "docvqa"), limit=3)) == 3
    assert len(texts_of(HubDataset(CAULDRON, "docvqa"), limit=30)) == 9


def test_all_splits_are_known_without_reading_rows(hub):
    write_mini_docvqa(hub)
    table = HubDataset("nielsr/docvqa_1200_examples")
    assert sorted(table.columns) == ["test", "train"]
    assert table.choose_columns("test", ("images", "texts"), ("image", "query")) == ("image", "query")


def test_other_columns_are_named_beside_those_needed(hub):
    write_table(hub / "me/other/train-0.parquet", [{"photo": "a", "caption": "b"}], {"photo": pa.string()})
    with pytest.raises(
        DataError, match=r"me/other train: its columns are photo. Needed are images, texts; or image, query\. Name the"
    ):
        HubDataset("me/other").choose_columns("train", ("images", "texts"), ("image", "query"))


def test_a_split_that_is_not_there_is_named_beside_those_that_are(hub):
    write_cauldron(hub, "docvqa", docvqa_rows(3))
    with pytest.raises(DataError, match=r"the_cauldron docvqa: there is no split 'validation', only train\."):
        HubDataset(CAULDRON, "docvqa").choose_columns("validation", ("images", "texts"))


def test_the_library_is_named_where_it_is_missing(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"nielsr/docvqa_1200_examples is read with .*pip install 'phi3v\[hub\]'"):
        HubDataset("nielsr/docvqa_1200_examples")


def test_a_hub_out_of_reach_says_what_else_can_be_done(hub):
    with pytest.raises(DataError) as caught:
        HubDataset(CAULDRON, "docvqa")
    message = str(caught.value)
    assert message.startswith(f"{CAULDRON} docvqa: the Hugging Face hub cannot be reached (")
    assert f'`hf download {CAULDRON} --repo-type dataset --include "docvqa/*" --local-dir FOLDER`' in message
    assert "the original release on disk is read, too" in message


def test_a_data_set_that_may_not_be_read_asks_for_a_login(hub, monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*arguments, **options):
        raise DatasetNotFoundError("Dataset 'me/mine' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"me/mine: not on .* a gated dataset on the Hub.*`hf auth login`"):
        HubDataset("me/mine")


def test_a_transfer_that_breaks_off_is_an_error_of_the_data(hub, monkeypatch):
    import datasets
    from huggingface_hub.errors import HTTPError

    write_cauldron(hub, "docvqa", docvqa_rows(3))
    table = HubDataset(CAULDRON, "docvqa")

    def break_off(self):
        yield {"texts": []}
        raise HTTPError("peer closed connection")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", break_off)
    rows = table.rows("train", ["texts"], progress=False)
    next(rows)
    with pytest.raises(DataError, match=r"docvqa/train: cannot be read \(HTTPError: peer closed connection\)"):
        next(rows)


@pytest.mark.parametrize("damage", ["no Parquet file", "damaged inside"])
def test_a_damaged_file_is_an_error_of_the_data(hub, damage):
    folder = write_cauldron(hub, "docvqa", docvqa_rows(3))
    path = sorted((folder / "docvqa").iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(b"PAR1 no" if damage == "no Parquet file" else content[:20] + b"\0" * 300 + content[320:])
    with pytest.raises(DataError, match=r"docvqa.*: cannot be read \(.*Write or fetch the folder's files again"):
        list(HubDataset(CAULDRON, "docvqa").rows("train", ["images"], progress=False))


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_format", "suffix"),
    [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tiff"), ("BMP", "bmp")],
)
def test_images_keep_their_bytes_and_are_named_after_them(tmp_path, image_format, suffix):
    content = picture(3, image_format)
    writer = NativeWriter(tmp_path, "x")
    name = write_hub_image(writer, {"bytes": content, "path": "wrong.name"}, "row 1")
    assert name.endswith(f".{suffix}")
    assert (tmp_path / "images" / name).read_bytes() == content
    assert write_hub_image(writer, {"bytes": content, "path": None}, "row 2") == name
    assert write_hub_image(writer, {"bytes": picture(4, image_format), "path": None}, "row 3") != name
    assert len(list((tmp_path / "images").iterdir())) == 2


def as_icon() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(encoded, "ICO")
    return encoded.getvalue()


@pytest.mark.parametrize(
    ("image", "message", "reason"),
    [
        (None, "row 7: the row holds no encoded image", "missing image"),
        ({"bytes": None, "path": "a.png"}, "row 7: the row holds no encoded image", "missing image"),
        ({"bytes": b"", "path": None}, "row 7: an image of 0 bytes cannot be read", "not an image"),
        ({"bytes": b"%PDF-1.4", "path": None}, "row 7: an image of 8 bytes cannot be read", "not an image"),
        (
            {"bytes": as_icon(), "path": None},
            "row 7: an image is a ICO file. Only AVIF, BMP, .* are read",
            "not an image",
        ),
    ],
)
def test_what_is_no_image_is_a_bad_sample(tmp_path, image, message, reason):
    with pytest.raises(SampleError, match=message) as caught:
        write_hub_image(NativeWriter(tmp_path, "x"), image, "row 7")
    assert caught.value.reason == reason
    assert not (tmp_path / "images").exists()


def test_an_image_column_is_found_whatever_its_depth(hub):
    row = {"image": {"bytes": picture(1), "path": "a.png"}}
    write_table(hub / "me/mine/train-0.parquet", [row], {"image": IMAGE_TYPE})
    ((_, record),) = HubDataset("me/mine").rows("train", ["image"], progress=False)
    assert record.values == row
