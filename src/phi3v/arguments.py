"""What every command line shares: the parser, exit codes, and options made from a function's signature."""

import argparse
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from phi3v.credentials import without_secrets
from phi3v.errors import ConfigError, Phi3VError, StoppedError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""The run did what a signal asked for, and the same command goes on. BSD's EX_TEMPFAIL: "try again later"."""

EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def exit_code(program: Callable[[], object]) -> int:
    """Runs a program and turns what it raises on purpose into one line on standard error.

    Returns:
        0, 2 for a usage or configuration error, 1 for any other error that phi3v raises on purpose, 75 when a run
        saved and stopped because a signal asked for it, 130 when interrupted. Other exceptions go through with their
        traceback.
    """
    # Read by OpenMP when torch is first imported. Its threads otherwise wait for each other by spinning, which costs a
    # CPU run most of its speed as soon as another program wants a core (measured: docs/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PEFT imports bitsandbytes wherever it is installed, which then advises a kernel that four_bit.py rules out.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        program()
    except ConfigError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return EXIT_USAGE
    except StoppedError as error:
        if is_first_process():
            print(f"stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except Phi3VError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun started, or was started alone."""
    return os.environ.get("RANK", "0") == "0"


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Rewrites ``--dashes-in-names`` as the ``--under_scores`` that the parsers know; values stay."""
    rewritten = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("--") and " " not in name
        rewritten.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_option else argument)
    return rewritten


def positive(text: str) -> int:
    """Reads a whole number, at least 1."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return number


def add_signature(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Adds an argument for every parameter of ``function``, described by its docstring.

    Positional parameters become positional arguments, but for a second one, which becomes a required option;
    keyword-only parameters become options. A parameter is a ``str``, ``int``, ``float``, ``bool``, ``Path``, a
    ``Literal`` or a list of one of them, with or without ``| None``.
    """
    described = _described_arguments(function)
    positional = 0
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, shape, choices, may_be_none = _kind_of(parameter.annotation)
        default = parameter.default
        is_required = default is inspect.Parameter.empty
        text = described[name].replace("``", "`").rstrip(".").replace("%", "%%")
        if not (is_required or default is None or default is False or default in ([], ())):
            text += f" (default: {default})".replace("%", "%%")
        options: dict[str, Any] = {"help": text} if is_required else {"help": text, "default": default}
        if choices:
            options |= {"choices": choices, "metavar": "WORD"}
            options["help"] += f"; one of {', '.join(choices)}"
        elif kind is not bool:
            options |= {"type": kind, "metavar": {int: "N", float: "X", Path: "PATH", str: "TEXT"}[kind]}
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and positional == 0:
            positional += 1
            options["metavar"] = name.upper()
            parser.add_argument(name, nargs="+" if shape is list else "?" if may_be_none else None, **options)
        elif kind is bool:
            parser.add_argument(f"--{name}", f"--no_{name}", action=_OnOff, nargs=0, **options)
        else:
            parser.add_argument(f"--{name}", required=is_required, nargs="+" if shape is list else None, **options)


class _OnOff(argparse.Action):
    """``--name`` for True, ``--no_name`` for False."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


def _kind_of(hint: Any) -> tuple[Any, Any, tuple[str, ...], bool]:
    """Returns a parameter's type, ``list`` or None, its words, and whether it may be None."""
    may_be_none = NoneType in get_args(hint)
    if may_be_none:
        (hint,) = (member for member in get_args(hint) if member is not NoneType)
    shape = None
    if get_origin(hint) in (list, Sequence):
        shape, (hint,) = list, get_args(hint)
    if get_origin(hint) is Literal:
        return str, shape, get_args(hint), may_be_none
    return hint, shape, (), may_be_none


def _described_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Returns what the ``Args:`` section of a docstring says of each parameter."""
    _, _, section = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    described: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if begins := re.match(r"    (\w+): (.*)", line):
            name, text = begins.groups()
            described[name] = text
        elif line.strip() and name:
            described[name] += " " + line.strip()
    return described
