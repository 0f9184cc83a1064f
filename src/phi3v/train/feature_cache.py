"""The rows of images whose vision encoder and projector are frozen, kept on disk and computed once.

A cache folder holds one folder for each vision encoder, number format and way of cutting images, so that nothing
computed otherwise is ever found. In it every process that stores has two files of its own, to which nobody else writes:
``NAME.rows`` with the rows of one image after the other, and ``NAME.index`` with an entry of fixed size for each,
written when its rows are. Readers look at all of them. So no process waits for another, and one that is killed leaves
at most rows without an entry, or a part of one, which is not read. Every entry and all rows carry a checksum: what a
disk lost or damaged counts as never computed.
"""

import hashlib
import logging
import mmap
import os
import secrets
import shutil
import socket
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.images import check_image
from phi3v.data.packing import SampleCosts
from phi3v.errors import CapacityError, ConfigError
from phi3v.files import write_json
from phi3v.geometry import num_image_tokens
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch
from phi3v.model.packed_forward import image_rows
from phi3v.model.vision_phi3_v import Phi3VImageEmbedding
from phi3v.train.checkpoints.rehearsal import in_words

logger = logging.getLogger(__name__)

ABOUT_FILE = "about.json"
"""Says what an encoder's folder holds, for a person who wants to delete old ones."""

_FORMAT = 1
_ALIGNMENT = 64
_ENTRY = struct.Struct("<32sQII")  # key, where its rows start, how many rows, their checksum
_CHECKSUM = struct.Struct("<I")
_ENTRY_BYTES = 64
_FILLING = bytes(_ENTRY_BYTES - _ENTRY.size - _CHECKSUM.size)


class _Place(NamedTuple):
    """Where an image's rows lie."""

    file: str
    offset: int
    num_rows: int
    checksum: int


@dataclass(slots=True)
class CacheCounts:
    """What one process did with a cache.

    Attributes:
        hits: images found.
        misses: images not found.
        damaged: images whose rows were not as they were written; they count as misses too.
        stored: images stored.
        stored_bytes: their rows' bytes.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    stored: int = 0
    stored_bytes: int = 0


class FeatureCache:
    """Rows of images by the images' content.

    Safe to use in any number of processes at once, and to hand to worker processes, forked or spawned.

    Args:
        folder: of the caches; made if it is not there.
        vision_weights: name of the weights that compute the rows, from :func:`fingerprint_of`.
        width: numbers of a row, ``hidden_size``.
        dtype: what rows are computed and kept in.
        cutting: settings that decide how an image becomes crops, its own ``num_crops`` aside.

    Attributes:
        folder: where this encoder's files lie.
        counts: what this process did.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vision_weights: str,
        width: int,
        dtype: torch.dtype,
        cutting: Mapping[str, Any] | None = None,
    ) -> None:
        self.width = width
        self.dtype = dtype
        about = {
            "format": _FORMAT,
            "vision_weights": vision_weights,
            "hidden_size": width,
            "dtype": str(dtype).removeprefix("torch."),
            "cutting": dict(cutting or {}),
        }
        name = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:16]
        self.folder = folder / name
        self.counts = CacheCounts()
        self._places: dict[bytes, list[_Place]] = {}
        self._read_bytes: dict[str, int] = {}
        self._writer: _Writer | None = None
        self._is_full = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT_FILE).exists():
            write_json(self.folder / ABOUT_FILE, about)
        self.refresh()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self.width * self.dtype.itemsize

    def __len__(self) -> int:
        """Images that this process knows of."""
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None, "counts": CacheCounts()}

    @staticmethod
    def key_of(path: Path, num_crops: int) -> str:
        """Names an image: equal names are equal file contents, cut into as many crops.

        Args:
            path: the image file, which is read.
            num_crops: most tiles that it is cut into.
        """
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        return hashlib.sha256(b"%s %d" % (content, num_crops)).hexdigest()

    def find(self, key: str, num_rows: int) -> torch.Tensor | None:
        """Returns an image's rows, or None when they are not there as they were computed.

        Args:
            key: from :meth:`key_of`.
            num_rows: rows that the image has by its size.

        Returns:
            (num_rows, width): mapped from the file, read when it is used; writing to it does not reach the file.
        """
        name = bytes.fromhex(key)
        if name not in self._places:
            self.refresh()
        places = self._places.get(name, [])
        while places:
            rows = self._read(places[-1]) if places[-1].num_rows == num_rows else None
            if rows is not None:
                self.counts.hits += 1
                return rows
            damaged = places.pop()
            self.counts.damaged += 1
            logger.warning("%s: the rows at byte %d are damaged; they are computed anew.", damaged.file, damaged.offset)
        self._places.pop(name, None)
        self.counts.misses += 1
        return None

    def store(self, key: str, rows: torch.Tensor) -> None:
        """Keeps an image's rows, unless they are there. A full disk stops storing, not the run.

        Args:
            key: from :meth:`key_of`.
            rows: (num_rows, width) of the cache's ``dtype``, on any device.
        """
        assert rows.dtype == self.dtype and rows.shape[1] == self.width, (rows.dtype, rows.shape)
        name = bytes.fromhex(key)
        if self._is_full:
            return
        self.refresh()
        if name in self._places:
            return
        try:
            if self._writer is None or self._writer.process != os.getpid():
                self._writer = _Writer(self.folder)
            content = rows.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
            self._writer.add(name, len(rows), content)
        except OSError as error:
            self._is_full = True
            logger.warning("%s: no more image rows are kept: %s.", self.folder, error)
            return
        self.counts.stored += 1
        self.counts.stored_bytes += content.nbytes

    def refresh(self) -> None:
        """Takes in what any process stored since the last look."""
        for file in sorted(self.folder.glob("*.index")):
            name = file.stem
            start = self._read_bytes.get(name, 0)
            if file.stat().st_size < start + _ENTRY_BYTES:
                continue
            with file.open("rb") as index:
                index.seek(start)
                content = index.read()
            whole = len(content) - len(content) % _ENTRY_BYTES  # the rest is being written, or was when a process died
            for offset in range(0, whole, _ENTRY_BYTES):
                self._add_entry(name, content[offset : offset + _ENTRY_BYTES])
            self._read_bytes[name] = start + whole

    def stored_bytes(self) -> int:
        """Counts the bytes of all rows in the folder."""
        return sum(file.stat().st_size for file in self.folder.glob("*.rows"))

    def _add_entry(self, file: str, entry: bytes) -> None:
        (checksum,) = _CHECKSUM.unpack_from(entry, _ENTRY.size)
        if zlib.crc32(entry[: _ENTRY.size]) == checksum:
            name, *place = _ENTRY.unpack_from(entry)
            self._places.setdefault(name, []).append(_Place(file, *place))

    def _read(self, place: _Place) -> torch.Tensor | None:
        size = place.num_rows * self.row_bytes
        start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
        skipped = place.offset - start
        path = self.folder / f"{place.file}.rows"
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < place.offset + size:
                    return None
                # A private map of these rows alone: of the whole file it would count as that much memory.
                mapped = mmap.mmap(file.fileno(), skipped + size, access=mmap.ACCESS_COPY, offset=start)
        except OSError:
            return None
        if zlib.crc32(memoryview(mapped)[skipped:]) != place.checksum:
            return None
        rows = torch.frombuffer(mapped, dtype=self.dtype, count=place.num_rows * self.width, offset=skipped)
        return rows.view(place.num_rows, self.width)


class _Writer:
    """One process's two files. The names are its own, also on a disk that several machines share."""

    def __init__(self, folder: Path) -> None:
        self.process = os.getpid()
        name = f"{socket.gethostname()}-{self.process}-{secrets.token_hex(4)}"
        self._rows = (folder / f"{name}.rows").open("xb", buffering=0)
        self._index = (folder / f"{name}.index").open("xb", buffering=0)
        self._end = 0

    def add(self, key: bytes, num_rows: int, content: memoryview) -> None:
        """Writes an image's rows, then their entry.

        Raises:
            OSError: the disk is full or gone; the entry is not written, and half-written rows are taken back.
        """
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        entry = _ENTRY.pack(key, offset, num_rows, zlib.crc32(content))
        try:
            self._rows.seek(offset)
            written = 0
            while written < len(content):
                written += self._rows.write(content[written:]) or 0
            self._index.write(entry + _CHECKSUM.pack(zlib.crc32(entry)) + _FILLING)
        except OSError:
            self._rows.truncate(self._end)
            raise
        self._end = offset + len(content)


def fingerprint_of(vision: Phi3VImageEmbedding) -> str:
    """Names the weights of an image embedding: a hash over every tensor's name, type, shape and bytes.

    Args:
        vision: ``model.model.vision_embed_tokens``.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_frozen(trained_parts: Sequence[str]) -> None:
    """Checks that rows stay as they are while a run trains.

    Raises:
        ConfigError: the run trains the vision encoder or its projector.
    """
    trained = [part for part in trained_parts if part in ("vision", "projector")]
    if trained:
        raise ConfigError(
            f"vision_cache keeps what the vision encoder computes, but this run trains {' and '.join(trained)}; set "
            "method: frozen_vision or freeze: [vision, projector], or take vision_cache out"
        )


def open_cache(
    folder: Path, model: Phi3VForCausalLM, processor: Phi3VImageProcessor, dtype: torch.dtype
) -> FeatureCache:
    """Opens the cache of a model's frozen image embedding.

    Args:
        folder: ``config.vision_cache``.
        model: with the weights that it trains with.
        processor: cuts the images.
        dtype: what the run computes in.
    """
    cutting = {name: getattr(processor, name) for name in ("crop_px", "num_img_tokens", "image_mean", "image_std")}
    return FeatureCache(
        folder,
        vision_weights=fingerprint_of(model.model.vision_embed_tokens),
        width=model.config.hidden_size,
        dtype=dtype,
        cutting=cutting,
    )


def compute_missing(batch: PackedBatch, cache: FeatureCache, model: Phi3VForCausalLM) -> PackedBatch:
    """Computes the images of a batch that the cache did not have, keeps their rows, and puts these where crops were.

    Args:
        batch: on the model's device; ``image_keys`` are the cache's.
        cache: where to keep them.
        model: whose image embedding is frozen.

    Returns:
        A batch whose images are all in ``features``; ``image_rows`` number them as before, computed ones first.
    """
    if batch.crops is None:
        return batch
    with torch.no_grad():
        rows = image_rows(model.model, batch.crops, batch.grids, model.compute, cache.dtype).to(cache.dtype)
    counts = [num_image_tokens(grid, model.config.tokens_per_side) for grid in batch.grids]
    for key, own in zip(batch.image_keys, rows.cpu().split(counts), strict=True):
        cache.store(key, own)
    features = rows if batch.features is None else torch.cat([rows, batch.features])
    return replace(batch, crops=None, grids=(), image_keys=(), features=features)


def require_room(cache: FeatureCache, dataset: ConversationDataset, encoder: SampleEncoder, costs: SampleCosts) -> None:
    """Says what the rows of all images will take on the disk, and checks that it has as much.

    Args:
        cache: whose disk.
        dataset: training samples; their images' headers are read only where a quick bound does not fit.
        encoder: knows how many rows an image has.
        costs: of the samples.

    Raises:
        CapacityError: the rows do not fit.
    """
    there = cache.stored_bytes()
    free = shutil.disk_usage(cache.folder).free
    tokens_per_side = encoder.processor.image_processor.tokens_per_side
    most = most_image_rows(costs, tokens_per_side) * cache.row_bytes
    if most - there <= free:
        logger.info(
            "%s: image rows of %s; those of all images take at most %s.", cache.folder, in_words(there), in_words(most)
        )
        return
    needed = count_image_rows(dataset, encoder) * cache.row_bytes
    if needed - there > free:
        raise CapacityError(
            f"{cache.folder}: the rows of all images take {in_words(needed)}, of which {in_words(there)} are there; "
            f"{in_words(free)} are free. Set vision_cache to a folder on another disk, lower num_crops, or take "
            "vision_cache out."
        )
    logger.info("%s: image rows of %s; those of all images take %s.", cache.folder, in_words(there), in_words(needed))


def most_image_rows(costs: SampleCosts, tokens_per_side: int) -> int:
    """Returns a bound of the rows of all different images, from the samples' costs alone.

    A stem holds its images, and equal stems hold the same; an image elsewhere counts as different from all others.
    """
    _, first = np.unique(costs.stem_keys, return_index=True)
    leading = int(costs.stem_tokens[first].sum(dtype=np.int64))
    elsewhere = int((costs.crops - costs.stem_crops).sum(dtype=np.int64))
    a_crop = num_image_tokens((1, 1), tokens_per_side) / 2  # of no grid a crop has more
    return leading + ceil(elsewhere * a_crop)


def count_image_rows(dataset: ConversationDataset, encoder: SampleEncoder) -> int:
    """Counts the rows of all different image files, cut as their samples ask for. Reads every image's header once."""
    rows: dict[str, int] = {}
    for sample in map(dataset.__getitem__, range(len(dataset))):
        for name in sample.images:
            path = dataset.image_path(sample, name)
            key = encoder.image_key(sample, path)
            if key not in rows:
                size = check_image(path, decode=False)
                rows[key] = encoder.processor.image_processor.image_token_count(*size, num_crops=sample.num_crops)
    return sum(rows.values())
