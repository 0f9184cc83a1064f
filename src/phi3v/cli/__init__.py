"""The command line, ``phi3v VERB``: each verb reads its arguments and calls one function of the package.

Heavy imports stand inside the verbs, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from phi3v import __version__
from phi3v.arguments import Parser, exit_code, with_underscores
from phi3v.cli.bench import bench
from phi3v.cli.configured import evaluate, train
from phi3v.cli.data import data
from phi3v.cli.export import export, merge
from phi3v.cli.generate import generate


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
