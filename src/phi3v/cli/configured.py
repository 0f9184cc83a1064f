"""``phi3v train`` and ``phi3v eval``: verbs that a configuration file describes, with every field as an option."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from phi3v.arguments import Parser, is_first_process
from phi3v.config import SECTIONS, EvalConfig, RunConfig, TrainConfig, describe_fields, load_config
from phi3v.settings import Setting

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def train(arguments: Sequence[str]) -> None:
    """Fine-tune a model, or go on with an interrupted run."""
    config = _read_config("train", train, TrainConfig, arguments)
    from phi3v.train.run import run_training

    run = run_training(config)
    if is_first_process():
        print(f"run directory: {run}")


def evaluate(arguments: Sequence[str]) -> None:
    """Score a model's answers to a data set's questions."""
    config = _read_config("eval", evaluate, EvalConfig, arguments)
    from phi3v.eval.run import run_evaluation

    result = run_evaluation(config)
    score = result.score
    print(
        f"{score.metric} {score.score:.4f} ({score.confidence:.0%} interval {score.low:.4f} to {score.high:.4f}, "
        f"{score.n} questions, {result.seconds:.1f} s); results in {config.output_dir}"
    )


def _read_config(
    name: str, verb: Callable[[Sequence[str]], None], cls: type[ConfigT], arguments: Sequence[str]
) -> ConfigT:
    """Reads ``[CONFIG.yaml] [--field value ...]``, or prints the fields and exits when help is asked for."""
    if "-h" in arguments or "--help" in arguments:
        _field_help(name, (verb.__doc__ or "").strip(), cls).print_help()
        raise SystemExit(0)
    has_file = bool(arguments) and not arguments[0].startswith("-")
    return load_config(cls, Path(arguments[0]) if has_file else None, arguments[1:] if has_file else arguments)


def _field_help(name: str, purpose: str, cls: type[RunConfig]) -> Parser:
    """Returns a parser that describes every field; `load_config`, not argparse, reads them."""
    parser = Parser(prog=f"phi3v {name}", description=purpose, allow_abbrev=False)
    parser.usage = f"phi3v {name} [CONFIG.yaml] [--field value ...]"
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
