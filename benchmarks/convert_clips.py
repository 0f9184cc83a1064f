"""How many clips a second the video converters read: 180 frames of 320 x 240 px, mpeg4, as UCF-101's are.

    python benchmarks/convert_clips.py --num_clips 400

The clips are copies of one drawn clip, so the disk's cache serves them; decoding is what is measured, through the
command line and its start included.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

PROGRAM = (sys.executable, "-m", "phi3v", "data", "convert", "ucf101")
NUM_FRAMES, HEIGHT, WIDTH = 180, 240, 320


def write_clip(path: Path) -> None:
    """Writes a noisy picture that the camera moves over."""
    dice = np.random.default_rng(0)
    coarse = Image.fromarray(dice.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    scene = np.asarray(coarse.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 400_000
        for number in range(NUM_FRAMES):
            view = scene[number // 2 : number // 2 + HEIGHT, number : number + WIDTH]
            noisy = np.clip(view + dice.integers(-6, 6, view.shape), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(noisy), format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Makes the clips and converts them with each number of processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_clips", type=int, default=400, metavar="N")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 2], metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        first = clips / "train" / "class0" / "v0000.avi"
        write_clip(first)
        for number in range(1, options.num_clips):
            copy = clips / "train" / f"class{number % 10}" / f"v{number:04}.avi"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first, copy)
        print(f"{options.num_clips} clips of {first.stat().st_size / 1e3:.0f} kB")
        for num_workers in options.num_workers:
            for what in ("converted", "again, nothing to decode"):
                started = time.perf_counter()
                arguments = [clips, "--output_dir", Path(folder) / str(num_workers), "--num_workers", str(num_workers)]
                subprocess.run([*PROGRAM, *arguments, "--no_progress"], check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - started
                print(f"{num_workers} processes, {what}: {seconds:.2f} s, {options.num_clips / seconds:.1f} clips/s")


if __name__ == "__main__":
    main()
