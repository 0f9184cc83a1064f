"""The command line, ``phi3v VERB``: each verb reads its arguments and calls one function of the package.

Heavy imports stand inside the verbs, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from phi3v import __version__
from phi3v.arguments import Parser, exit_code, is_first_process, positive, with_underscores
from phi3v.cli.bench import bench
from phi3v.cli.data import data
from phi3v.cli.export import export, merge
from phi3v.config import (
    SECTIONS,
    Device,
    EvalConfig,
    Precision,
    RopeMode,
    RunConfig,
    TrainConfig,
    describe_fields,
    load_config,
)
from phi3v.errors import DataError
from phi3v.settings import Setting

if TYPE_CHECKING:
    from PIL.Image import Image

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the process's exit code, as ``exit_code`` gives it.

    Args:
        arguments: what follows ``phi3v``; the process's own when None.
    """
    return exit_code(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> None:
    width = max(map(len, VERBS))
    parser = Parser(
        prog="phi3v",
        usage="phi3v VERB ...",
        description="Fine-tune Phi-3.5-vision.",
        epilog="verbs:\n"
        + "\n".join(f"  {name:{width}}  {_purpose(verb)}" for name, verb in VERBS.items())
        + "\n\n`phi3v VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"phi3v {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    VERBS[parsed.verb](parsed.arguments)


def train(arguments: Sequence[str]) -> None:
    """Fine-tune a model, or go on with an interrupted run."""
    config = _read_config("train", TrainConfig, arguments)
    from phi3v.train.run import run_training

    run = run_training(config)
    if is_first_process():
        print(f"run directory: {run}")


def evaluate(arguments: Sequence[str]) -> None:
    """Score a model's answers to a data set's questions."""
    config = _read_config("eval", EvalConfig, arguments)
    from phi3v.eval.run import run_evaluation

    result = run_evaluation(config)
    score = result.score
    print(
        f"{score.metric} {score.score:.4f} ({score.confidence:.0%} interval {score.low:.4f} to {score.high:.4f}, "
        f"{score.n} questions, {result.seconds:.1f} s); results in {config.output_dir}"
    )


def generate(arguments: Sequence[str]) -> None:
    """Answer one prompt about some images."""
    parser = _verb_parser("generate")
    parser.add_argument("--model", required=True, metavar="PATH", help="published-layout folder, hub id or adapter")
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
    parser.add_argument("--rope_mode", choices=get_args(RopeMode), default="auto", help="default: auto")
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: auto")
    options = parser.parse_args(with_underscores(arguments))
    images = [_open_image(path) for path in options.image]
    from phi3v.eval.generate import generate_once
    from phi3v.model.checkpoint import load_model, load_processor
    from phi3v.model.placement import DTYPE_NAMES, resolve_device, resolve_precision

    device = resolve_device(options.device)
    dtype = DTYPE_NAMES[resolve_precision(options.precision, device)]
    processor = load_processor(options.model, num_crops=options.num_crops)
    model = load_model(options.model, dtype=dtype, rope_mode=options.rope_mode, device=device)
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


def report(arguments: Sequence[str]) -> None:
    """Write a run's report.html: curves, scores, predictions."""
    parser = _verb_parser("report")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, the output_dir of `phi3v train`")
    options = parser.parse_args(with_underscores(arguments))
    from phi3v.report import write_report

    print(write_report(options.run))


def demo(arguments: Sequence[str]) -> None:
    """Train a tiny model from scratch on the spot, to see every part at work."""
    parser = _verb_parser("demo")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-run"), metavar="PATH", help="default: demo-run")
    options = parser.parse_args(with_underscores(arguments))
    from phi3v.demo import run_demo

    run_demo(options.output_dir)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "merge": merge,
    "export": export,
    "report": report,
    "data": data,
    "bench": bench,
    "demo": demo,
}


def _purpose(verb: Callable[[Sequence[str]], None]) -> str:
    return (verb.__doc__ or "").strip()


def _verb_parser(name: str) -> Parser:
    return Parser(prog=f"phi3v {name}", description=_purpose(VERBS[name]), allow_abbrev=False)


def _read_config(verb: str, cls: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Reads ``[CONFIG.yaml] [--field value ...]``, or prints the fields and exits when help is asked for."""
    if "-h" in arguments or "--help" in arguments:
        _field_help(verb, cls).print_help()
        raise SystemExit(0)
    has_file = bool(arguments) and not arguments[0].startswith("-")
    return load_config(cls, Path(arguments[0]) if has_file else None, arguments[1:] if has_file else arguments)


def _field_help(verb: str, cls: type[RunConfig]) -> Parser:
    """Returns a parser that describes every field; `load_config`, not argparse, reads them."""
    parser = _verb_parser(verb)
    parser.usage = f"phi3v {verb} [CONFIG.yaml] [--field value ...]"
    parser.epilog = (
        "The configuration file stands first; options win over it. Lists: a,b or a b. none clears a field. "
        "Relative paths are relative to the working directory."
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="YAML file with `field: value` lines")
    fields = describe_fields(cls)
    for section in SECTIONS:
        group = parser.add_argument_group(section)
        for one in fields:
            if one.section == section:
                help_text = f"{one.doc} [{one.default_text}; {one.allowed}]".replace("%", "%%")
                if one.kind is bool:
                    group.add_argument(f"--{one.name}", f"--no-{one.name}", action="store_true", help=help_text)
                else:
                    group.add_argument(f"--{one.name}", metavar=_placeholder(one), help=help_text)
    return parser


def _placeholder(one: Setting) -> str:
    if one.shape == "mapping":
        return "PART=X,..."
    if one.choices:
        return "WORD,..." if one.shape == "list" else "WORD"
    names: dict[type, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
    return f"{names[one.kind]},..." if one.shape == "list" else names[one.kind]


def _open_image(path: Path) -> "Image":
    from phi3v.data.images import UnusableImageError, read_image

    try:
        return read_image(path)
    except UnusableImageError as error:
        raise DataError(f"--image {path}: {error.found}") from error
