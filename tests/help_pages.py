"""What programs say of themselves, asked in this process: a fresh one would spend seconds on imports."""

import io
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from unittest import mock

import pytest

from phi3v.cli import main


@cache
def help_of(program: tuple[str, ...]) -> str:
    """Returns what ``phi3v VERB ...`` or a script's path prints for ``--help``."""
    page = io.StringIO()
    with mock.patch.object(sys, "argv", [*program, "--help"]), redirect_stdout(page), pytest.raises(SystemExit) as end:
        if program[0].endswith(".py"):
            runpy.run_path(program[0], run_name="__main__")
        else:
            sys.exit(main([*program[1:], "--help"]))
    assert not end.value.code
    return page.getvalue()
