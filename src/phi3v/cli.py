"""The command line, ``phi3v VERB``: each verb reads its arguments and calls one function of the package.

Heavy imports stand inside the verbs, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, get_args

from phi3v import __version__
from phi3v.config import (
    SECTIONS,
    Attention,
    Device,
    EvalConfig,
    Precision,
    RopeMode,
    RunConfig,
    TrainConfig,
    describe_fields,
    load_config,
)
from phi3v.errors import ConfigError, DataError, Phi3VError
from phi3v.settings import Setting

if TYPE_CHECKING:
    from PIL.Image import Image

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

ConfigT = TypeVar("ConfigT", bound=RunConfig)


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: what follows ``phi3v``; the process's own when None.

    Returns:
        The exit code: 0, 2 for a usage or configuration error, 1 for any other error that phi3v raises on purpose,
        130 when interrupted. Other exceptions go through with their traceback.
    """
    # Read by OpenMP when torch is first imported. Its threads otherwise wait for each other by spinning, which costs a
    # CPU run most of its speed as soon as another program wants a core (measured: docs/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Phi3VError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _run(arguments: Sequence[str]) -> None:
    width = max(map(len, VERBS))
    parser = _Parser(
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
    if os.environ.get("RANK", "0") == "0":  # set by torchrun: the first process speaks for all
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
        "--max_new_tokens", type=_positive, default=64, metavar="N", help="longest answer, tokens (default: 64)"
    )
    parser.add_argument(
        "--num_crops", type=_positive, metavar="N", help="most crops an image is cut into (default: the model's own)"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="default: auto")
    parser.add_argument("--attention", choices=get_args(Attention), default="sdpa", help="default: sdpa")
    parser.add_argument("--rope_mode", choices=get_args(RopeMode), default="auto", help="default: auto")
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: auto")
    options = parser.parse_args(_with_underscores(arguments))
    images = [_open_image(path) for path in options.image]
    from phi3v.eval.generate import generate_once
    from phi3v.model.checkpoint import load_model, load_processor
    from phi3v.model.placement import DTYPE_NAMES, resolve_device, resolve_precision

    device = resolve_device(options.device)
    dtype = DTYPE_NAMES[resolve_precision(options.precision, device)]
    processor = load_processor(options.model, num_crops=options.num_crops)
    model = load_model(
        options.model, dtype=dtype, attention=options.attention, rope_mode=options.rope_mode, device=device
    )
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


def merge(arguments: Sequence[str]) -> None:
    """Merge an adapter into its base model, and check that both answer alike."""
    parser = _verb_parser("merge")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter, such as RUN/model")
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder to write the merged model to")
    parser.add_argument("--base", metavar="PATH", help="the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=Path,
        metavar="JSONL",
        help="real samples to compare the two on; repeat for more files",
    )
    parser.add_argument("--image_dir", type=Path, metavar="PATH", help="folder that their image paths start from")
    parser.add_argument("--samples", type=_positive, default=4, metavar="N", help="samples to compare (default: 4)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="number format of the merged files (default: auto, the base's own)",
    )
    options = parser.parse_args(_with_underscores(arguments))
    from phi3v.eval.merge import merge_and_verify

    report = merge_and_verify(
        options.adapter,
        options.output_dir,
        base=options.base,
        data=options.data,
        image_dir=options.image_dir,
        num_samples=options.samples,
        dtype=options.dtype,
    )
    print(report)


def report(arguments: Sequence[str]) -> None:
    """Write a run's report.html: curves, scores, predictions."""
    parser = _verb_parser("report")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, the output_dir of `phi3v train`")
    options = parser.parse_args(_with_underscores(arguments))
    from phi3v.report import write_report

    print(write_report(options.run))


def demo(arguments: Sequence[str]) -> None:
    """Train a tiny model from scratch on the spot, to see every part at work."""
    parser = _verb_parser("demo")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-run"), metavar="PATH", help="default: demo-run")
    options = parser.parse_args(_with_underscores(arguments))
    from phi3v.demo import run_demo

    run_demo(options.output_dir)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "merge": merge,
    "report": report,
    "demo": demo,
}


def _purpose(verb: Callable[[Sequence[str]], None]) -> str:
    return (verb.__doc__ or "").strip()


def _verb_parser(name: str) -> _Parser:
    return _Parser(prog=f"phi3v {name}", description=_purpose(VERBS[name]), allow_abbrev=False)


def _read_config(verb: str, cls: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """Reads ``[CONFIG.yaml] [--field value ...]``, or prints the fields and exits when help is asked for."""
    if "-h" in arguments or "--help" in arguments:
        _field_help(verb, cls).print_help()
        raise SystemExit(0)
    has_file = bool(arguments) and not arguments[0].startswith("-")
    return load_config(cls, Path(arguments[0]) if has_file else None, arguments[1:] if has_file else arguments)


def _field_help(verb: str, cls: type[RunConfig]) -> _Parser:
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


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """Rewrites ``--dashes-in-names`` as the ``--under_scores`` that the parsers know; values stay."""
    rewritten = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and " " not in name
        rewritten.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else argument)
    return rewritten


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return number


def _open_image(path: Path) -> "Image":
    from phi3v.data.images import UnusableImageError, read_image

    try:
        return read_image(path)
    except UnusableImageError as error:
        raise DataError(f"--image {path}: {error.found}") from error
