"""The page: needs nothing but itself, runs nothing, and shows crops and tokens as training has them."""

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import as_jpeg, picture, sample, write_jsonl

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import IGNORED_LABEL, SampleEncoder
from phi3v.doctor import examine, specimens
from phi3v.doctor.specimens import MOST_TOKENS, NUM_SPECIMENS
from phi3v.model.processing_phi3_v import Phi3VProcessor

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></svg><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
]


class Page(HTMLParser):
    """What a browser would take from the page: tags with attributes, and the texts that stand in each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[dict[str, str], str]] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in ("meta", "link", "img", "path", "rect"):
            self._open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] != "style":
            self.texts.append((self._open[-1][1], data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for _, text in self.texts).split())

    def tokens(self) -> list[tuple[str, str, bool]]:
        """The text, id note and colour of every token that stands in a sample's text."""
        return [
            (text, attributes["title"], "learnt" in attributes["class"])
            for attributes, text in self.texts
            if "title" in attributes and "class" in attributes
        ]

    def images(self) -> list[tuple[str, Image.Image]]:
        sources = [(tag[1]["alt"], tag[1]["src"].partition(",")[2]) for tag in self.tags if tag[0] == "img"]
        return [(alt, Image.open(io.BytesIO(base64.b64decode(source)))) for alt, source in sources]


def page_of(path: Path, model: Path, **options: int) -> Page:
    html = path.with_suffix(".html")
    examine([path], model=str(model), html=html, progress=False, **options)  # pyright: ignore[reportArgumentType]
    return Page(html)


def test_hostile_names_and_texts_stay_text(tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "images").mkdir()
    records = []
    for k, text in enumerate(HOSTILE):
        name = f"{text.replace('/', '|')}{k}.png"
        picture(k).save(tmp_path / "images" / name)
        records.append(sample(text, [name], user=text, assistant=text, source=text))
        records.append(sample(text, [f"gone {name}"], user=text, assistant=text))
    records += [sample("answered otherwise", records[0]["conversations"][0]["images"], user=HOSTILE[0])]
    path = write_jsonl(tmp_path / f"{HOSTILE[1].replace('/', '|')}.jsonl", *records, HOSTILE[0])
    page = page_of(path, tiny_dir)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "video", "audio", "source"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith("data:"), (tag, name, value)
    assert not re.search(r"url\(|@import|//", page.source[page.source.index("<style>") : page.source.index("</style>")])
    (policy,) = [tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    for text in HOSTILE:
        assert " ".join(text.split()) in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_crops_are_the_pixel_values_of_training(tmp_path: Path, tiny_dir: Path, processor: Phi3VProcessor) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sample("1", ["a.png"]))
    picture(3, 70, 130).save(tmp_path / "images" / "a.png")
    crops = page_of(path, tiny_dir).images()
    pixels = processor.image_processor.preprocess(picture(3, 70, 130))["pixel_values"][0].double().numpy()
    mean, deviation = (
        np.array(values)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    assert [alt for alt, _ in crops] == ["global view", *(f"crop {k}" for k in range(1, len(pixels)))]
    for (_, shown), expected in zip(crops, pixels, strict=True):
        levels = (expected * deviation + mean) * 255
        difference = np.asarray(shown, dtype=float).transpose(2, 0, 1) - levels.clip(0, 255)
        assert abs(difference).max() <= 0.51


def test_a_square_image_on_one_tile_is_shown_as_it_is(tmp_path: Path, tiny_dir: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sample("1", ["a.png"]))
    picture(4, 56, 56).save(tmp_path / "images" / "a.png")
    _, (_, tile) = page_of(path, tiny_dir, num_crops=1).images()
    assert (np.asarray(tile) == np.asarray(picture(4, 56, 56))).all()


def test_every_token_stands_there_and_exactly_the_supervised_are_coloured(
    tmp_path: Path, tiny_dir: Path, processor: Phi3VProcessor
) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl",
        {
            "id": "1",
            "conversations": [
                {"images": ["a.png", "b.png"], "user": "Which is larger?\nSay it.", "assistant": "The first one."},
                {"user": "Sure?", "assistant": "Caf\u00e9 \U0001f600"},
            ],
        },
    )
    for name in "ab":
        picture(5, 60, 90).save(tmp_path / "images" / f"{name}.png")
    dataset = ConversationDataset(path)
    encoded = SampleEncoder(processor).encode(dataset[0], dataset.load_images(dataset[0]))
    assert "labels" in encoded
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    expected = []
    num_images = 0
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token != processor.image_token_id:
            expected.append((token, label != IGNORED_LABEL))
        elif ids[place - 1] != token:
            num_images += 1
            expected.append((token, False))
    shown = page_of(path, tiny_dir).tokens()
    assert [(int(note.removeprefix("id ")), learnt) for _, note, learnt in shown] == expected
    count = processor.image_processor.image_token_count(60, 90)
    chips = [text for text, note, _ in shown if note == f"id {processor.image_token_id}"]
    assert chips == [f"[image 1: {count} tokens]", f"[image 2: {count} tokens]"]
    assert "The first one.<|end|>" in "".join(text for text, _, learnt in shown if learnt)
    assert "".join(text for text, _, learnt in shown if not learnt).startswith("<s><|user|>")


def test_a_page_of_large_images_and_long_texts_stays_small(
    tmp_path: Path, golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = 300_000  # bytes of pictures, which are soon encoded; each takes four thirds of itself
    rest = 3_000_000 - specimens.IMAGE_BYTES * 4 // 3
    monkeypatch.setattr(specimens, "IMAGE_BYTES", fewer)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    (tmp_path / "images" / "noise.jpg").write_bytes(as_jpeg(Image.fromarray(noise), 95))
    records = [
        sample(f"{k}", ["noise.jpg"], user="many words " * 400 + str(k), assistant="answer " * 200) for k in range(14)
    ]
    page = page_of(write_jsonl(tmp_path / "train.jsonl", *records), golden_dir, num_crops=4)
    assert fewer < len(page.source) < rest + fewer * 4 // 3
    assert page.text.count("Not shown: the page is full.") > 0
    assert page.source.count('class="specimen"') == NUM_SPECIMENS
    assert len(page.tokens()) == NUM_SPECIMENS * (MOST_TOKENS + 1)
    assert "more]" in page.text


def test_unusual_samples_are_shown_and_others_over_all_lengths(tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "images" / "turned.jpg").write_bytes(as_jpeg(picture(0), exif=exif))
    records = [sample(f"s{k}", [], user="word " * (k + 1)) for k in range(101)]
    records.insert(50, sample("turned", ["turned.jpg"]))
    page = page_of(write_jsonl(tmp_path / "train.jsonl", *records), tiny_dir, max_length=115)
    names = re.findall(r"sample '(\w+)' (turned by EXIF orientation|over 115 tokens|shortest|longest)", page.text)
    assert ("turned", "turned by EXIF orientation") in names
    assert ("s0", "shortest") in names
    assert any(reason == "over 115 tokens" for _, reason in names)
    lengths = [int(number) for number in re.findall(r"(\d+) tokens, \d+ supervised", page.text)]
    assert len(lengths) == NUM_SPECIMENS
    ordered = sorted(lengths)
    assert max(after - before for before, after in itertools.pairwise(ordered)) < 16


def test_a_sample_whose_image_breaks_only_when_decoded_is_told_not_shown(tmp_path: Path, tiny_dir: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", sample("1", ["a.png"]))
    image = tmp_path / "images" / "a.png"
    picture(0).save(image)
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 0xFF
    image.write_bytes(content)
    page = page_of(path, tiny_dir, hashes=False)
    assert "Not shown:" in page.text
    assert "damaged or cut short" in page.text


@pytest.mark.parametrize("names", [["train"], ["train", "val"]])
def test_every_split_has_its_charts(tmp_path: Path, tiny_dir: Path, names: list[str]) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", sample("1", ["a.png"]), sample("2", [])) for name in names]
    picture(0).save(tmp_path / "images" / "a.png")
    html = tmp_path / "new folder" / "page.html"
    diagnosis = examine(paths, model=str(tiny_dir), html=html, progress=False)
    page = Page(html)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 8 * len(names)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert f"page: {html}" in str(diagnosis) or "\N{HORIZONTAL ELLIPSIS}" in str(diagnosis)
