"""``phi3v data``: data sets of other shapes made native, and native ones examined."""

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from phi3v.arguments import Parser, add_signature, with_underscores
from phi3v.errors import DataError


class _Command(NamedTuple):
    """A word of the command line.

    Attributes:
        purpose: returns what it does, a sentence.
        run: takes the arguments after it.
    """

    purpose: Callable[[], str]
    run: Callable[[Sequence[str]], None]


def data(arguments: Sequence[str]) -> None:
    """Convert data of other formats, or examine data before training on it."""
    commands = {
        "convert": _Command(partial(_purpose, _convert), _convert),
        "check": _Command(partial(_purpose, _check), _check),
    }
    _choose("phi3v data", _purpose(data), commands, arguments, what="COMMAND")


def _convert(arguments: Sequence[str]) -> None:
    """Turn a data set of another format into native JSONL and images."""
    from phi3v.data.convert import SOURCES, converter

    def command(name: str) -> _Command:
        return _Command(lambda: _purpose(converter(name)), lambda rest: _convert_from(name, rest))

    commands = {name: command(name) for name in SOURCES}
    _choose("phi3v data convert", _purpose(_convert), commands, arguments, what="SOURCE")


def _convert_from(source: str, arguments: Sequence[str]) -> None:
    from phi3v.data.convert import converter

    print(_call(f"phi3v data convert {source}", converter(source), arguments))


def _check(arguments: Sequence[str]) -> None:
    """Examine data: lines, images, lengths, labels, duplicates across splits."""
    from phi3v.doctor import examine

    diagnosis = _call("phi3v data check", examine, arguments)
    print(diagnosis)
    if not diagnosis.is_usable:
        raise DataError("training would refuse this data; the table above says what to mend")


def _choose(
    prog: str,
    purpose: str,
    commands: Mapping[str, _Command],
    arguments: Sequence[str],
    *,
    what: str,
) -> None:
    """Runs the command that the first argument names, with the others."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} {what} ...",
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=commands, metavar=what, help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    if arguments and arguments[0] in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {name:{width}}  {command.purpose()}" for name, command in commands.items()]
        parser.epilog = "\n".join([f"{what.lower()}s:", *lines, "", f"`{prog} {what} --help` says more."])
    parsed = parser.parse_args(arguments)
    commands[parsed.command].run(parsed.arguments)


def _call(prog: str, function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """Calls ``function`` with arguments read as its signature says."""
    parser = Parser(prog=prog, description=_purpose(function), allow_abbrev=False)
    add_signature(parser, function)
    values = vars(parser.parse_args(with_underscores(arguments)))
    positional = [
        values.pop(name)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    return function(*positional, **values)


def _purpose(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "`")
