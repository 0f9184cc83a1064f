"""Small real clips for tests, whose pictures say which frame they are."""

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

BLOCKS = (2, 5)
"""Rows and columns of blocks in a picture."""


def write_clip(path: Path, num_frames: int, codec: str = "mpeg4", block_px: int = 16) -> Path:
    """Encodes a clip; frame k shows k in binary, a white block for a 1, so that no codec loses it.

    Args:
        path: ``.avi``, ``.mp4``, ``.mkv`` or another ending that FFmpeg knows; folders above it are made.
        num_frames: at most 1024.
        codec: FFmpeg's name of an encoder: ``mpeg4``, ``libx264``, ``mjpeg``.
        block_px: edge of a block; 16 makes pictures of 32 x 80 px (h x w).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width = (count * block_px for count in BLOCKS)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        container.start_encoding()  # a file also where there are no frames
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(_picture(number, block_px), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_number(image: Image.Image) -> int:
    """Reads from a decoded picture which frame of its clip it is."""
    rows, columns = BLOCKS
    blocks = np.asarray(image.convert("L")).reshape(rows, image.height // rows, columns, image.width // columns)
    bits = blocks.mean(axis=(1, 3)).ravel() > 127
    return sum(1 << place for place, bit in enumerate(bits) if bit)


def write_sound(path: Path) -> Path:
    """Encodes a file with a sound stream and no video stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        for place in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, place * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _picture(number: int, block_px: int) -> np.ndarray:
    """Draws frame ``number``: (h, w, 3) uint8."""
    rows, columns = BLOCKS
    bits = np.array([number >> place & 1 for place in range(rows * columns)], np.uint8).reshape(BLOCKS)
    pixels = np.kron(bits * 255, np.ones((block_px, block_px), np.uint8))
    return np.ascontiguousarray(np.repeat(pixels[..., None], 3, axis=2))
