"""``phi3v bench``: speed and memory of training on this machine."""

from collections.abc import Sequence

from phi3v.arguments import Parser, add_signature, with_underscores


def bench(arguments: Sequence[str]) -> None:
    """Measure training speed and memory at the published size, with random weights."""
    from phi3v.bench.options import BenchOptions

    parser = Parser(prog="phi3v bench", description=(bench.__doc__ or "").strip(), allow_abbrev=False)
    add_signature(parser, BenchOptions)
    options = BenchOptions(**vars(parser.parse_args(with_underscores(arguments))))
    from phi3v.bench.run import run_bench

    run_bench(options, lambda line: print(line, flush=True))
