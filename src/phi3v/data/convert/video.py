"""Video clips on disk: a few frames of each, evenly spaced; untrusted files, one decoded frame in memory at a time.

FFmpeg, through PyAV, opens addresses as readily as files, and playlists that name other files. Here it is held to
ordinary video files: a whitelist of formats, none of which refers to another file, and no protocol but ``file``.
"""

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import ConfigError
from ..images import MAX_IMAGE_PIXELS

VIDEO_SUFFIXES = (
    ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv",
)  # fmt: skip
"""Endings that a clip's name may have, in lower case; the file's content decides how it is read."""

_FORMATS = "asf,avi,flv,gif,m4v,matroska,mov,mpeg,mpegts,mpegvideo"
"""FFmpeg's names of what is read. Its playlists (concat, hls, dash) are left out, and so are the formats that take any
text for pictures (tty)."""


class UnusableVideoError(Exception):
    """A clip cannot be used. The converter adds which one.

    Attributes:
        found: what is wrong with the file, a phrase that follows its name.
        remedy: what to do about it, a sentence.
        reason: a few words that files with the same fault share.
    """

    def __init__(self, found: str, remedy: str, reason: str) -> None:
        super().__init__(found, remedy, reason)  # all three, so that another process can hand the error on
        self.found = found
        self.remedy = remedy
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.found}. {self.remedy}"


def import_av() -> Any:
    """Returns the module ``av``.

    Raises:
        ConfigError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            f"videos are read with PyAV, and it is not there ({error}): pip install 'phi3v[video]'"
        ) from error
    return av


def frame_indices(total: int, num_frames: int) -> list[int]:
    """Returns which frames of a clip are taken: frame i is the clip's frame floor(i * total / num_frames).

    The first frame is always taken; a clip of fewer frames than ``num_frames`` shows some of them several times.

    Source: the published converter, ``numpy.arange(0, total, total / num_frames).astype(int)``. For its 8 frames both
    agree for every clip; for other numbers arange's rounding may give one frame more, or an index one lower.

    >>> frame_indices(180, 8)
    [0, 22, 45, 67, 90, 112, 135, 157]
    >>> frame_indices(3, 8)
    [0, 0, 0, 1, 1, 1, 2, 2]
    """
    return [i * total // num_frames for i in range(num_frames)]


def read_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Decodes ``num_frames`` frames of a clip to RGB, evenly spaced as ``frame_indices`` says.

    The clip's number of frames is the one that its header states, if it has as many packets; otherwise its frames are
    counted by decoding it once more. A clip that was cut short thus gives the frames that are there. Rotation tags are
    not applied, like those of images.

    Raises:
        UnusableVideoError: missing, not a video, without video stream or frames, over the pixel limit of images, or
            damaged where it had to be read.
        ConfigError: PyAV is not installed.
    """
    total = _stated_num_frames(path) or _decoded_num_frames(path)
    frames = _frames_at(path, frame_indices(total, num_frames))
    if len(frames) < num_frames:  # packets that hold no picture
        frames = _frames_at(path, frame_indices(_decoded_num_frames(path), num_frames))
    return frames


def _stated_num_frames(path: Path) -> int:
    """Returns the header's number of frames, or 0 where it states none or not as many as there are packets."""
    with _open(path) as (container, stream):
        stated = stream.frames
        if stated and stated == sum(1 for packet in container.demux(stream) if packet.size):
            return stated
    return 0


def _decoded_num_frames(path: Path) -> int:
    with _open(path) as (container, stream):
        if total := sum(1 for _ in container.decode(stream)):
            return total
    raise UnusableVideoError("holds no frame", "Fetch it again, or take it out.", "corrupt clip")


def _frames_at(path: Path, indices: Sequence[int]) -> list[Image.Image]:
    """Decodes from the start to the last of the indices, which ascend; fewer images where the clip ends before it."""
    wanted = Counter(indices)
    frames: list[Image.Image] = []
    with _open(path) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                if frame.is_corrupt:
                    raise _corrupt(f"frame {index} is incomplete")
                frames += [frame.to_image()] * wanted[index]
            if index == indices[-1]:
                break
    return frames


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a clip; yields FFmpeg's container and its main video stream, whose decoder uses one thread.

    FFmpeg's errors, also those of the block, come out as UnusableVideoError.
    """
    av = import_av()
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise UnusableVideoError(f"{found} (looked for {path})", "Put the clip there, or take it out.", "missing clip")
    # Titles that are not UTF-8 are no reason to refuse a clip; PyAV 19 takes them by itself and drops the argument.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        container = av.open(
            f"file:{path}",  # the protocol by name: a file called concat:a.avi is a file
            container_options={
                "format_whitelist": _FORMATS,
                "protocol_whitelist": "file",
                "fflags": "+discardcorrupt",  # half a packet, where a file is cut short
            },
            **lenient,
        )
    except av.FFmpegError as error:
        is_refused = error.errno == errno.EINVAL  # what FFmpeg says of a format outside the whitelist
        found = "a playlist, or another format that is not opened here" if is_refused else error.strerror
        raise UnusableVideoError(
            f"is not a video that can be read ({found}; {path.stat().st_size} bytes)",
            f"Replace it by a whole file of one of these kinds: {', '.join(VIDEO_SUFFIXES)}.",
            "not a video",
        ) from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise UnusableVideoError(
                "has no video stream", "Take it out: there is nothing to see in it.", "no video stream"
            )
        if stream.codec_context is None:
            raise UnusableVideoError(
                "is coded in a way that this FFmpeg cannot decode",
                "Encode it anew, as H.264 for example.",
                "unknown codec",
            )
        height, width = stream.codec_context.height, stream.codec_context.width
        if height * width > MAX_IMAGE_PIXELS:
            raise UnusableVideoError(
                f"is too large: {height}x{width} px (h x w), over the limit of {MAX_IMAGE_PIXELS} pixels",
                "Scale it down; the model sees at most a few thousand pixels a side.",
                "decompression bomb",
            )
        stream.codec_context.thread_count = 1
        # Frames may grow on the way. FFmpeg counts them padded to whole blocks, hence twice the limit.
        stream.codec_context.options = {"max_pixels": str(2 * MAX_IMAGE_PIXELS)}
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise _corrupt(error.strerror) from error


def _corrupt(found: str) -> UnusableVideoError:
    return UnusableVideoError(f"is damaged ({found})", "Fetch it again, or take it out.", "corrupt clip")
