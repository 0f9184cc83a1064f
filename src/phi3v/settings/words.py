"""Words of configurations: those that stand for truth and for nothing, and how a wrong one is shown."""

import difflib
import os
from collections.abc import Sequence

TRUE = ("true", "yes", "on")
FALSE = ("false", "no", "off")
NONE = ("none", "null")


def shown(raw: object) -> str:
    """Returns a value for a message: quoted, and not too long."""
    text = "none" if raw is None else repr(os.fspath(raw) if isinstance(raw, os.PathLike) else raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggestion(word: str, known: Sequence[str]) -> str:
    """Returns the end of a message about an unknown word: the known one that is near, if any."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=1)
    return f" - did you mean {close[0]!r}?" if close else ""
