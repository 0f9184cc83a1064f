"""``phi3v merge`` and ``phi3v export``: from a trained model to a folder that others load."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from phi3v.arguments import Parser, positive, with_underscores
from phi3v.config import RopeMode


def merge(arguments: Sequence[str]) -> None:
    """Merge an adapter into its base model, and check that both answer alike."""
    parser = Parser(prog="phi3v merge", description=(merge.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="the adapter: a folder such as RUN/model, or a hub id"
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder to write the merged model to")
    _add_what_to_write_and_compare(parser)
    options = parser.parse_args(with_underscores(arguments))
    from phi3v.export.merge import merge_and_verify

    comparison = merge_and_verify(
        options.adapter,
        options.output_dir,
        base=options.base,
        data=options.data,
        image_dir=options.image_dir,
        num_samples=options.samples,
        dtype=options.dtype,
    )
    print(f"merged into {options.output_dir}: {comparison}")


def export(arguments: Sequence[str]) -> None:
    """Write a trained model for others: published layout, checked in a fresh process, with a model card."""
    parser = Parser(prog="phi3v export", description=(export.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="run directory, model folder, adapter folder, or hub id of an adapter",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder to write to")
    _add_what_to_write_and_compare(parser)
    parser.add_argument(
        "--num_crops",
        type=positive,
        metavar="N",
        help="most crops an image is cut into, as the folder will say (default: as trained)",
    )
    parser.add_argument(
        "--rope_mode",
        choices=get_args(RopeMode),
        help="LongRoPE factors that the folder will lead every loader to (default: as trained)",
    )
    parser.add_argument(
        "--auto_map",
        action="store_true",
        help="point to the original's code, for programs that load it with trust_remote_code, such as vLLM",
    )
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the checked folder to this hub repository")
    parser.add_argument("--private", action="store_true", help="create that repository as a private one")
    options = parser.parse_args(with_underscores(arguments))
    if options.private and options.push_to_hub is None:
        parser.error("--private says how --push_to_hub creates its repository; give both")
    from phi3v.export.run import export_model

    export_model(
        options.source,
        options.output_dir,
        base=options.base,
        data=options.data,
        image_dir=options.image_dir,
        num_samples=options.samples,
        dtype=options.dtype,
        num_crops=options.num_crops,
        rope_mode=options.rope_mode,
        use_auto_map=options.auto_map,
        push_to_hub=options.push_to_hub,
        is_private=options.private,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(options.output_dir)


def _add_what_to_write_and_compare(parser: Parser) -> None:
    parser.add_argument("--base", metavar="PATH", help="the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=Path,
        metavar="JSONL",
        help="real samples to compare the two on; repeat for more files (default: the run's own)",
    )
    parser.add_argument("--image_dir", type=Path, metavar="PATH", help="folder that their image paths start from")
    parser.add_argument("--samples", type=positive, default=4, metavar="N", help="samples to compare (default: 4)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="number format of the written files (default: auto, as they are; an adapter's: the base's own)",
    )
