"""Throughput of the data path: samples/s of one worker, stage by stage, beside the plain version of the same path.

python benchmarks/data_path.py
python benchmarks/data_path.py --kinds gray-png --rounds 15 --json data_path.json

It draws its own pages of text in the size of a letter page scanned at 200 dpi, runs on the CPU alone, and needs no
model: the published tokenizer lies in tests/golden. Both versions are checked to give equal batches, then measured in
turns. The table holds medians over rounds, the JSON every round.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from phi3v.data.collate import PackCollator, PackSample
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.images import read_image
from phi3v.geometry import num_image_tokens
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor, hd_resize, to_rgb_or_gray
from phi3v.model.packed import PackedBatch
from phi3v.model.processing_phi3_v import Phi3VProcessor

PROCESSOR = Path(__file__).parents[1] / "tests" / "golden"
PAGE_PX = (2200, 1700)
"""(h, w): a letter page at 200 dpi."""

PAPER_NOISE = 2.0
"""Standard deviation of a scanner's noise, gray levels; it decides how far a page compresses, how long it decodes."""

KINDS = {
    "gray-png": ("L", "PNG", {}),
    "bilevel-png": ("1", "PNG", {}),
    "rgb-png": ("RGB", "PNG", {}),
    "rgb-jpeg": ("RGB", "JPEG", {"quality": 85}),
}
"""What a scanned page may be on disk: PIL's mode, its format, and how it is saved."""

STAGES = ("read", "resize", "normalise, cut, global view", "tokenize", "whole sample", "collate")
"""What is timed in this process. ``whole sample`` is all from the JSONL line to tokens and pixels, in one call."""

Item = tuple[PackSample, dict[str, torch.Tensor]]
"""A sample's text, and its images' crops by name."""


def draw_page(mode: str, seed: int) -> Image.Image:
    """Draws one page of text, with a coloured box in it where ``mode`` has colours."""
    height, width = PAGE_PX
    chance = random.Random(seed)
    page = Image.new("RGB", (width, height), (246, 244, 238))
    draw = ImageDraw.Draw(page)
    draw.rectangle((width - 500, 80, width - 120, 240), fill=(40, 70, 150))
    font = ImageFont.load_default(28)
    for top in range(280, height - 160, 40):
        words = ("".join(chance.choices("etaoinshrdlucmfwyp", k=chance.randint(2, 10))) for _ in range(13))
        draw.text((140, top), " ".join(words)[:90], font=font, fill=(30, 30, 34))
    if mode == "1":
        return Image.fromarray(np.asarray(page.convert("L")) > 128)
    noise = np.random.default_rng(seed).normal(0, PAPER_NOISE, PAGE_PX).round()
    pixels = np.asarray(page.convert(mode), np.int16)
    noisy = pixels + noise.reshape(PAGE_PX + (1,) * (pixels.ndim - 2)).astype(np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_pages(folder: Path, kind: str, num_pages: int) -> ConversationDataset:
    """Writes pages of one kind, with one question each, as a data set."""
    mode, image_format, options = KINDS[kind]
    lines = []
    for seed in range(num_pages):
        name = f"{kind}-{seed}.{image_format.lower()}"
        draw_page(mode, seed).save(folder / name, image_format, **options)
        turn = {"images": [name], "user": "What is the total amount on this page?", "assistant": f"${seed}.00"}
        lines.append(json.dumps({"id": name, "conversations": [turn]}))
    (folder / f"{kind}.jsonl").write_text("\n".join(lines), "utf-8")
    return ConversationDataset(folder / f"{kind}.jsonl", folder)


class PlainImageProcessor(Phi3VImageProcessor):
    """The HD transform step by step on whole RGB images, as docs/internals.md tells it."""

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Sequence[Image.Image], num_crops: int | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        layouts = [self.layout(image.height, image.width, num_crops) for image in images]
        all_crops = []
        for image, layout in zip(images, layouts, strict=True):
            pixels = torch.from_numpy(np.array(self.resize_and_pad(image))).permute(2, 0, 1).to(torch.float32).div_(255)
            pixels.sub_(torch.tensor(self.image_mean)[:, None, None]).div_(torch.tensor(self.image_std)[:, None, None])
            edge, (rows, columns) = self.crop_px, layout.grid
            global_view = F.interpolate(pixels[None], size=(edge, edge), mode="bicubic", align_corners=False)
            tiles = pixels.reshape(3, rows, edge, columns, edge).permute(1, 3, 0, 2, 4).reshape(-1, 3, edge, edge)
            all_crops.append(torch.cat([global_view, tiles]))
        pixel_values = torch.zeros(len(images), max(map(len, all_crops)), *all_crops[0].shape[1:])
        for row, crops in zip(pixel_values, all_crops, strict=True):
            row[: len(crops)] = crops
        data = {
            "pixel_values": pixel_values,
            "image_sizes": torch.tensor([layout.padded for layout in layouts]),
            "num_img_tokens": [num_image_tokens(layout.grid, self.tokens_per_side) for layout in layouts],
        }
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["num_img_tokens"])

    def resize_and_pad(self, image: Image.Image) -> Image.Image:
        """Returns the resized RGB image on white whole tiles."""
        layout = self.layout(image.height, image.width)
        image = image.convert("RGB")
        if layout.is_transposed:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        height, width = layout.resized
        canvas = Image.new("RGB", (width, layout.pad_top + height + layout.pad_bottom), (255, 255, 255))
        canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, layout.pad_top))
        return canvas.transpose(Image.Transpose.TRANSPOSE) if layout.is_transposed else canvas


class PlainCollator(PackCollator):
    """Puts crops together in the process's own memory."""

    def stack_crops(self, crops: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(crops))


@dataclass(frozen=True)
class DataPath:
    """One version of the way from files to a batch.

    Attributes:
        read: decodes an image file.
        resize: does the HD transform's resize, and what padding is done with it.
        encoder: makes tensors of a sample.
        collator: makes a batch of them.
    """

    read: Callable[[Path], Image.Image]
    resize: Callable[[Image.Image], Any]
    encoder: SampleEncoder
    collator: PackCollator

    def encode(self, dataset: ConversationDataset, index: int) -> Item:
        """Reads, transforms and tokenizes one sample."""
        sample = dataset[index]
        paths = [dataset.image_path(sample, name) for name in sample.images]
        images = [self.read(path) for path in paths]
        text = self.encoder.encode_text(sample, [(image.height, image.width) for image in images])
        keys = [self.encoder.image_key(sample, path) for path in paths]
        crops = {key: self.encoder.cut(sample, image) for key, image in zip(keys, images, strict=True)}
        return PackSample(text, tuple(keys[index] for index in text.order)), crops

    def collate(self, items: Sequence[Item]) -> PackedBatch:
        """Packs samples into one row."""
        crops = {key: own for _, shown in items for key, own in shown.items()}
        return self.collator([[sample] for sample, _ in items], crops)


def read_rgb(path: Path) -> Image.Image:
    """Decodes an image file to RGB, whatever it holds."""
    with Image.open(path) as image:
        return image.convert("RGB")


def build_paths(num_crops: int) -> dict[str, DataPath]:
    """Returns the versions to measure, by name."""

    def path(processor: Phi3VProcessor, read: Any, resize: Any, collator: type[PackCollator]) -> DataPath:
        side = processor.image_processor.tokens_per_side
        pack = collator(processor.image_token_id, tokens_per_side=side, short_positions=4096)
        return DataPath(read, resize, SampleEncoder(processor), pack)

    current = Phi3VProcessor.from_pretrained(PROCESSOR, num_crops=num_crops)
    plain = Phi3VProcessor.from_pretrained(PROCESSOR, num_crops=num_crops)
    plain.image_processor = PlainImageProcessor(num_crops=num_crops)

    def resize(image: Image.Image) -> Image.Image:
        return hd_resize(to_rgb_or_gray(image), current.image_processor.layout(image.height, image.width))

    return {
        "plain": path(plain, read_rgb, plain.image_processor.resize_and_pad, PlainCollator),
        "current": path(current, read_image, resize, PackCollator),
    }


class PageSamples(Dataset[Item]):
    """A data set encoded by one version, over and over up to ``length`` samples."""

    def __init__(self, path: DataPath, dataset: ConversationDataset, length: int) -> None:
        self.path, self.dataset, self.length = path, dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        return self.path.encode(self.dataset, index % len(self.dataset))


def check_equal(paths: Iterable[DataPath], dataset: ConversationDataset) -> None:
    """Exits unless every version makes the same batch, bit by bit, of all pages."""
    first, *others = [path.collate([path.encode(dataset, k) for k in range(len(dataset))]) for path in paths]
    for other in others:
        for field in fields(first):
            one, another = getattr(first, field.name), getattr(other, field.name)
            if not (torch.equal(one, another) if isinstance(one, torch.Tensor) else one == another):
                sys.exit(f"{field.name} differs between the versions: nothing was measured")


def time_stages(path: DataPath, dataset: ConversationDataset, batch_size: int) -> dict[str, float]:
    """Measures each stage once over all pages; returns milliseconds a sample."""
    spent: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        spent[stage] += 1e3 * (time.perf_counter() - started) / len(dataset)
        return result

    waiting: list[Item] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        image = timed("read", path.read, dataset.image_path(sample, sample.images[0]))
        timed("resize", path.resize, image)
        timed("normalise, cut, global view", path.encoder.processor.image_processor.preprocess, [image])
        timed("tokenize", path.encoder.measure, sample, [(image.height, image.width)])
        waiting.append(timed("whole sample", path.encode, dataset, index))
        if len(waiting) == batch_size or index == len(dataset) - 1:
            timed("collate", path.collate, waiting)
            waiting = []
    spent["normalise, cut, global view"] -= spent["resize"]
    return spent


class TimedCollator:
    """Collates in a loader's worker, and tells how long it takes until the images lie in shared memory.

    The loader moves them there in any case; here it happens a moment earlier, where it can be timed.
    """

    def __init__(self, collate: Callable[[Sequence[Item]], PackedBatch]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Item]) -> tuple[PackedBatch, float]:
        started = time.perf_counter()
        batch = self.collate(samples)
        assert batch.crops is not None
        batch.crops.share_memory_()
        return batch, 1e3 * (time.perf_counter() - started) / len(samples)


def time_loader(
    path: DataPath, dataset: ConversationDataset, length: int, batch_size: int, num_workers: int
) -> tuple[float, float]:
    """Runs a loader, its start not counted.

    Returns:
        The samples/s that reach the main process, and the milliseconds a sample that a worker takes to collate and
        share them.
    """
    samples = PageSamples(path, dataset, length)
    loader = DataLoader(samples, batch_size, num_workers=num_workers, collate_fn=TimedCollator(path.collate))
    batches = iter(loader)
    for _ in range(num_workers):
        next(batches)
    started = time.perf_counter()
    sizes, collate_ms = zip(*((batch.num_samples, spent) for batch, spent in batches), strict=True)
    return sum(sizes) / (time.perf_counter() - started), statistics.median(collate_ms)


def main() -> None:
    """Reads the flags, draws, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flag = parser.add_argument
    flag("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what the pages are on disk (default: all)")
    flag("--num_pages", type=int, default=4, help="different pages of each kind (%(default)s)")
    flag("--num_crops", type=int, default=16, help="most tiles of a page (%(default)s)")
    flag("--batch_size", type=int, default=2, help="samples in a micro-batch (%(default)s)")
    flag("--rounds", type=int, default=5, help="times each version is measured, in turns (%(default)s)")
    flag("--loader_samples", type=int, default=24, help="samples of a loader's round (%(default)s)")
    flag("--loader_rounds", type=int, default=3, help="the same for the loader, which takes longest (%(default)s)")
    flag("--num_workers", type=int, nargs="*", default=[1, 2], help="loaders to measure, by workers (1 2)")
    flag("--versions", nargs="+", choices=("plain", "current"), default=["plain", "current"], help="default: both")
    flag("--json", type=Path, metavar="PATH", help="write every figure here as well")
    flags = parser.parse_args()

    torch.set_num_threads(1)  # as in a loader's worker
    paths = {name: path for name, path in build_paths(flags.num_crops).items() if name in flags.versions}
    report: dict[str, Any] = {"machine": describe_machine(), "arguments": sys.argv[1:], "kinds": {}}
    print("; ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in flags.kinds:
            dataset = write_pages(Path(folder), kind, flags.num_pages)
            file_bytes = sum(file.stat().st_size for file in Path(folder).glob(f"{kind}-*")) // flags.num_pages
            check_equal(paths.values(), dataset)
            figures = measure(paths, dataset, flags)
            report["kinds"][kind] = {"file_bytes": file_bytes, "figures": figures}
            print(f"\n{kind}, {file_bytes:,} bytes a page", flush=True)
            print_table(figures)
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1), "utf-8")


def measure(
    paths: dict[str, DataPath], dataset: ConversationDataset, flags: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Measures all versions in turns; returns {what: {version: a value for each round}}."""
    figures = {f"{stage}, ms": {name: [] for name in paths} for stage in STAGES}
    for _ in range(flags.rounds):
        for name, path in paths.items():
            for stage, spent in time_stages(path, dataset, flags.batch_size).items():
                figures[f"{stage}, ms"][name].append(spent)
    figures["one process, samples/s"] = {
        name: [1e3 / spent for spent in values] for name, values in figures["whole sample, ms"].items()
    }
    for workers in flags.num_workers:
        speeds = figures[f"loader, {workers} worker(s), samples/s"] = {name: [] for name in paths}
        shared = figures[f"collate and share, {workers} worker(s), ms"] = {name: [] for name in paths}
        for _ in range(flags.loader_rounds):
            for name, path in paths.items():
                speed, collate_ms = time_loader(path, dataset, flags.loader_samples, flags.batch_size, workers)
                speeds[name].append(speed)
                shared[name].append(collate_ms)
    return figures


def print_table(figures: dict[str, dict[str, list[float]]]) -> None:
    """Prints the medians, a column for each version, and how many times better the last is than the first."""
    names = list(next(iter(figures.values())))
    print(f"  {'':34}" + "".join(f"{name:>10}" for name in names))
    for what, by_version in figures.items():
        medians = [statistics.median(by_version[name]) for name in names]
        ratio = medians[-1] / medians[0] if what.endswith("samples/s") else medians[0] / medians[-1]
        gain = f"{ratio:9.2f}x" if len(names) > 1 else ""
        print(f"  {what:34}" + "".join(f"{median:10.2f}" for median in medians) + gain)


def describe_machine() -> dict[str, str]:
    """Returns what a figure needs beside it to be understood."""
    cpu_info = Path("/proc/cpuinfo")
    models = [line for line in cpu_info.read_text().splitlines() if "model name" in line] if cpu_info.exists() else []
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "pillow", "numpy", "tokenizers", "transformers")},
    }


if __name__ == "__main__":
    main()
