"""The images that a source names: where they lie, what they are called afterwards, which split they put a sample in."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, DataError
from ..schema import SampleError, sample_error
from .writer import NativeWriter

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?=//)|(data):")
_MAX_SHOWN_CHARS = 120


def source_file(source: str) -> Path:
    """Returns the path of a source that is one file.

    Raises:
        DataError: there is no such file.
    """
    path = Path(source)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{source}: {found}. Name the file to convert.")
    return path


def data_set_name(name: str, split: str, kind: str) -> str:
    """Returns what the converted files' names start with: the source's name without its split, or what it is.

    >>> data_set_name("vqa_train", "train", "csv"), data_set_name("train", "train", "csv")
    ('vqa', 'csv')
    """
    return re.sub(rf"(^|[._-]){re.escape(split)}$", "", name) or kind


@dataclass(frozen=True, slots=True)
class SplitChoice:
    """Which split a sample belongs to: the same for all samples of an image, in every run, in any order.

    Attributes:
        split: name of the split that is not held out.
        val_share: share of the images whose samples go to ``val``, from 0 up to but not including 1.

    Raises:
        ConfigError: a share out of range, or a split that no file can be named after.
    """

    split: str
    val_share: float

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"val_share is {self.val_share}. It must be at least 0 and below 1.")
        if not re.fullmatch(r"[\w-]+", self.split):
            raise ConfigError(f"split is {self.split!r}. It becomes part of a file's name: letters, digits, - and _.")
        if self.val_share and self.split == "val":
            raise ConfigError("split is val, and val_share would take val out of it. Give one of the two.")

    def choose(self, images: Sequence[str], sample_id: str) -> str:
        """Returns the split of a sample with these images; a sample without any goes by its id.

        Samples stay together if they show the same images; two that share only one of several need not.

        >>> SplitChoice("train", 0.0).choose(["a.png"], "1")
        'train'
        """
        key = "\n".join(sorted(set(images))) if images else sample_id
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
        return "val" if int.from_bytes(digest[:8], "big") < self.val_share * 2**64 else self.split


class SourceImages:
    """Image files in the folder that a source's paths start from, on their way to ``OUT/images``.

    ``OUT/images`` becomes a link to the folder, or a folder of copies. It is made when the first image is met.

    Args:
        writer: writes the data set.
        folder: what paths are relative to and may not leave.
        copy_images: copy the images that samples show.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, writer: NativeWriter, folder: Path, *, copy_images: bool) -> None:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: the image folder is not there. Set image_dir to the folder that image paths start from."
            )
        self._writer = writer
        self._copy_images = copy_images
        self._folder = Path(os.path.normpath(folder.absolute()))
        self._resolved = folder.resolve()
        self._is_linked = False
        self._has_files = False

    def place(self, path: str, where: str) -> str:
        """Returns an image's name in the converted data set, after making sure that its file is there.

        Args:
            path: as the source names it, absolute or relative to the image folder.
            where: the place in the source, for messages.

        Raises:
            SampleError: a URL, no such file, or one outside the image folder.
            DataError: ``OUT/images`` is in the way.
        """
        if url := _URL.match(path):
            raise _url_error(where, path, (url[1] or url[2]).lower())
        try:
            named = Path(os.path.normpath(self._folder / path))
            actual = named.resolve()
            is_there, is_file = named.exists(), named.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a null byte, a name too long
            raise sample_error(
                where, f"image path {shown(path)} leads nowhere ({error})", "Correct the path.", "missing image"
            ) from error
        is_named_inside = named.is_relative_to(self._folder)
        if not actual.is_relative_to(self._resolved) and not (is_named_inside and self._copy_images):
            way = "Set copy_images to copy what links lead to, or set" if is_named_inside else "Set"
            raise sample_error(
                where,
                f"image path {shown(path)} leads outside the image folder {self._folder}, to {actual}",
                f"{way} image_dir to a folder that holds all images.",
                "image outside the image folder",
            )
        if not is_file:
            slashes = " Paths have / between folders, not \\." if "\\" in path else ""
            raise sample_error(
                where,
                f"image {shown(path)} {'is not a file' if is_there else 'does not exist'} (looked for {named})",
                f"Correct the path, or set image_dir to the folder that image paths start from.{slashes}",
                "missing image",
            )
        name = (named.relative_to(self._folder) if is_named_inside else actual.relative_to(self._resolved)).as_posix()
        if self._copy_images:
            self._keep_files()
            return self._writer.copy_image(actual, name)
        self._link()
        return name

    def write(self, name: str, content: bytes) -> Path:
        """Writes an encoded image that stands in the source itself, and returns its path.

        Raises:
            DataError: ``OUT/images`` is a link.
        """
        self._keep_files()
        return self._writer.image_dir / self._writer.write_image(name, content)

    def _link(self) -> None:
        if self._has_files:
            raise self._mixed_error()
        if not self._is_linked:
            self._writer.use_images(self._folder)
            self._is_linked = True

    def _keep_files(self) -> None:
        if self._is_linked:
            raise self._mixed_error()
        self._has_files = True

    def _mixed_error(self) -> DataError:
        return DataError(
            "the source holds images of its own and names image files as well: they cannot share "
            f"{self._writer.image_dir} unless the files are copied there. Set copy_images, and take "
            f"{self._writer.image_dir} away if it is there."
        )


def shown(path: str) -> str:
    """Returns a path as messages quote it; a URL may be millions of characters long."""
    return repr(path) if len(path) <= _MAX_SHOWN_CHARS else repr(path[:_MAX_SHOWN_CHARS]) + ".."


def _url_error(where: str, path: str, scheme: str) -> SampleError:
    remedies = {
        "data": "`phi3v data convert openai` reads messages with such images; or write it to a file and name that.",
        "file": "Write its path alone.",
    }
    remedy = remedies.get(scheme, "Nothing is fetched from a network: download it first and write the file's path.")
    return sample_error(where, f"image {shown(path)} is a URL, not a path", remedy, "image is a URL")
