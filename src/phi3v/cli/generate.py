"""``phi3v generate``: one question to a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from phi3v.arguments import Parser, positive, with_underscores
from phi3v.config import Device, Precision, RopeMode
from phi3v.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def generate(arguments: Sequence[str]) -> None:
    """Answer one prompt about some images."""
    parser = Parser(prog="phi3v generate", description=(generate.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="published-layout folder or adapter, or a hub id"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's text")
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="PATH", help="an image; repeat for more, in order"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max_new_tokens", type=positive, default=64, metavar="N", help="longest answer, tokens (default: 64)"
    )
    parser.add_argument(
        "--num_crops",
        type=positive,
        metavar="N",
        help="most crops an image is cut into (default: the model's own)",
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="default: auto")
    parser.add_argument(
        "--rope_mode",
        choices=get_args(RopeMode),
        default="auto",
        help="LongRoPE factors (default: auto, as the run trained it whose result the model is, else by length)",
    )
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: auto")
    options = parser.parse_args(with_underscores(arguments))
    images = [_open_image(path) for path in options.image]
    from phi3v.eval.generate import generate_once
    from phi3v.eval.origin import rope_mode_to_ask
    from phi3v.model.checkpoint import load_model, load_processor
    from phi3v.model.downloads import local_folder
    from phi3v.model.placement import DTYPE_NAMES, resolve_device, resolve_precision

    rope_mode = rope_mode_to_ask(options.model, options.rope_mode)
    device = resolve_device(options.device)
    dtype = DTYPE_NAMES[resolve_precision(options.precision, device)]
    folder = local_folder(options.model)
    processor = load_processor(folder, num_crops=options.num_crops)
    model = load_model(folder, dtype=dtype, rope_mode=rope_mode, device=device)
    answer = generate_once(
        model,
        processor,
        options.prompt,
        images,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        num_crops=options.num_crops,
    )
    print(answer)


def _open_image(path: Path) -> "Image":
    from phi3v.data.images import UnusableImageError, read_image

    try:
        return read_image(path)
    except UnusableImageError as error:
        raise DataError(f"--image {path}: {error.found}") from error
