"""Passwords and access tokens, known by their looks or from the environment: so that none is written down or shown."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"
"""Stands where a password or token stood."""

SHORTEST_SECRET = 8
"""Characters below which an environment variable's value is not looked for: it would be found in ordinary words."""

_NAMES_OF_SECRETS = re.compile(
    r"(?!.*_(?:FILE|PATH|DIR)$).*(?:TOKEN(?!I[ZS])|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)",
    re.IGNORECASE,
)

_SECRETS = re.compile(
    r"""
      (?<=://) (?!\[hidden\]) [^/\s@'"<>]+ (?=@)  # user and password of a URL
    | (?<=[?&])  # the same in its query
      (?i: (?:access_)?token | api_?key | key | password | secret | sig | signature | x-amz-(?:signature|credential) )
      = (?!\[hidden\]) [^&\#\s'"<>]+
    | \b hf_[A-Za-z0-9]{16,}  # Hugging Face
    | \b (?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{20,} | \b github_pat_[A-Za-z0-9_]{20,}
    | \b glpat-[A-Za-z0-9_-]{16,}  # GitLab
    | \b sk-[A-Za-z0-9_-]{20,}  # OpenAI, Anthropic
    | \b xox[abprs]-[A-Za-z0-9-]{10,}  # Slack
    | \b (?:AKIA|ASIA)[0-9A-Z]{16} \b  # Amazon
    | \b AIza[0-9A-Za-z_-]{35}  # Google
    | \b wandb_v1_[A-Za-z0-9_]{20,}  # Weights & Biases
    """,
    re.VERBOSE,
)


def secret_in(text: str) -> str | None:
    """Says by what a text is known to hold a secret, without showing it; None where it holds none.

    >>> secret_in("https://me:opensesame@example.org/model")
    'by its looks'
    """
    if _SECRETS.search(text):
        return "by its looks"
    name = next((name for name, value in _secret_variables() if value in text), None)
    return None if name is None else f"as the value of the environment variable {name}"


def without_secrets(text: str) -> str:
    """Returns a text with ``HIDDEN`` in place of every secret in it.

    >>> without_secrets("https://me:opensesame@example.org/model")
    'https://[hidden]@example.org/model'
    """
    for _, value in _secret_variables():
        text = text.replace(value, HIDDEN)
    return _SECRETS.sub(HIDDEN, text)


def plain_without_secrets(value: Any) -> Any:
    """Returns a JSON or YAML value with ``HIDDEN`` in place of every secret in its texts."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {plain_without_secrets(key): plain_without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_without_secrets(item) for item in value]
    return value


def _secret_variables() -> list[tuple[str, str]]:
    """Returns the environment variables with a secret's name and what they hold, longest first."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and _NAMES_OF_SECRETS.match(name) and not value.isdecimal()
    ]
    return sorted(found, key=lambda variable: (-len(variable[1]), variable))
