"""Data sets of the Hugging Face hub, or of folders that hold the same files, read row by row as they are stored.

Rows are streamed: nothing is copied to a cache, and ``limit`` ends the transfer. Only the columns asked for are read.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ...errors import ConfigError, DataError
from ..schema import sample_error
from .records import SourceRecord
from .writer import NativeWriter, name_of_content

_SUFFIXES = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "JPEG": ".jpg",
    "JPEG2000": ".jp2",
    "MPO": ".jpg",  # what PIL calls a JPEG of several pictures
    "PNG": ".png",
    "PPM": ".ppm",
    "TIFF": ".tiff",
    "WEBP": ".webp",
}
"""File name endings of the formats that phi3v.data.images reads, by PIL's names."""


class HubDataset:
    """A data set of Parquet files.

    Args:
        path: ``owner/name`` on the hub, or a folder with the same layout.
        config: which of its parts to read, where it has several: in a folder, that sub-folder.

    Attributes:
        columns: names of the columns, by split.

    Raises:
        ConfigError: the ``datasets`` library is not installed.
        DataError: there is no such data set, it may not be read, or the hub cannot be reached.
    """

    def __init__(self, path: str, config: str | None = None) -> None:
        self._path = path
        self._config = config
        self._label = f"{path} {config}/" if config else f"{path} "
        part = f' --include "{config}/*"' if config else ""
        self._other_way = (
            "Write or fetch the folder's files again."
            if Path(path).is_dir()
            else f"Or fetch it where there is a network, with `hf download {path} --repo-type dataset{part} "
            "--local-dir FOLDER`, and name FOLDER as the source; the original release on disk is read, too."
        )
        self.columns: dict[str, tuple[str, ...]] = {
            split: tuple(table.column_names or ()) for split, table in self._load().items()
        }

    def choose_columns(self, split: str, *alternatives: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the first of several sets of columns that a split has.

        Raises:
            DataError: no such split, or it has none of them whole.
        """
        if split not in self.columns:
            raise DataError(
                f"{self._label.rstrip(' /')}: there is no split {split!r}, only {', '.join(self.columns)}. Name the "
                "data set as it was published."
            )
        columns = self.columns[split]
        for needed in alternatives:
            if set(needed) <= set(columns):
                return needed
        raise DataError(
            f"{self._label}{split}: its columns are {', '.join(columns)}. Needed are "
            f"{'; or '.join(', '.join(needed) for needed in alternatives)}. Name the data set as it was published."
        )

    def rows(
        self, split: str, columns: Sequence[str], *, limit: int | None = None, progress: bool = True
    ) -> Iterator[tuple[int, SourceRecord]]:
        """Yields a split's rows with their numbers, counted from 0.

        An image is ``{"bytes": encoded file, "path": its name}``.

        Args:
            split: one of ``columns``.
            columns: what to read.
            limit: how many rows, from the first.
            progress: show a bar.

        Raises:
            DataError: the transfer breaks off, or a file is damaged.
        """
        label = f"{self._label}{split}"
        table = self._load(columns=list(columns))[split].decode(False)
        known = (table.info.splits or {}).get(split)
        total = min((count for count in (known and known.num_examples, limit) if count), default=None)
        rows = enumerate(islice(self._iterate(table, label), limit))
        for number, row in tqdm(rows, desc=f"reading {label}", total=total, unit=" rows", disable=not progress):
            yield number, SourceRecord(row, f"{label} row {number}")

    def _iterate(self, table: Any, label: str) -> Iterator[Mapping[str, Any]]:
        with _source_errors(label, self._other_way):
            yield from table

    def _load(self, **options: Any) -> Any:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{self._path} is read with the datasets library, and it is not there ({error}): "
                "pip install 'phi3v[hub]'"
            ) from error
        path, config = self._path, self._config
        if config and (Path(path) / config).is_dir():
            # The card that names a data set's parts need not be in a folder; its parts are folders all the same.
            path, config = f"{path}/{config}", None
        with _source_errors(self._label.rstrip(" /"), self._other_way):
            return datasets.load_dataset(path, config, streaming=True, **options)


def write_hub_image(writer: NativeWriter, image: Any, where: str) -> str:
    """Writes an image of a row as it is stored, and returns its name: a digest of its content.

    Rows with the same image so name the same file, which training can then compute once for all of their questions.

    Args:
        writer: writes the data set.
        image: a row's ``{"bytes": .., "path": ..}``.
        where: the row, for messages.

    Raises:
        SampleError: no image, or none of the formats that can be trained on.
    """
    content = image.get("bytes") if isinstance(image, Mapping) else None
    if not isinstance(content, bytes):
        raise sample_error(where, "the row holds no encoded image", "Leave the row out.", "missing image")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image_format = opened.format or ""
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise sample_error(
            where, f"an image of {len(content)} bytes cannot be read ({error})", "Leave the row out.", "not an image"
        ) from error
    if image_format not in _SUFFIXES:
        raise sample_error(
            where,
            f"an image is a {image_format} file",
            f"Only {', '.join(_SUFFIXES)} are read; leave the row out.",
            "not an image",
        )
    return writer.write_image(name_of_content(content) + _SUFFIXES[image_format], content)


@contextmanager
def _source_errors(label: str, other_way: str) -> Iterator[None]:
    """Turns what reading a data set raises into DataError."""
    from datasets.exceptions import DatasetNotFoundError

    # of httpx or httpx2: the one that this version is built on
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from pyarrow import ArrowException

    try:
        yield
    except DatasetNotFoundError as error:
        raise DataError(
            f"{label}: not on the Hugging Face hub, or not for everyone ({error}) Correct the name, or log in with "
            f"`hf auth login`. {other_way}"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise DataError(f"{label}: the Hugging Face hub cannot be reached ({error}). Try again. {other_way}") from error
    except (OSError, ValueError, RuntimeError, ArrowException, HTTPError) as error:
        raise DataError(f"{label}: cannot be read ({type(error).__name__}: {error}). {other_way}") from error
