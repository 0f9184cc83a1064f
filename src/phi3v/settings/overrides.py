"""Configurations on the command line: ``--field value``."""

from collections.abc import Mapping, Sequence

from phi3v.errors import ConfigError
from phi3v.settings.setting import Setting, suggested_field
from phi3v.settings.tree import compose, raw_of
from phi3v.settings.words import FALSE, NONE, TRUE, shown


def read_overrides(tokens: Sequence[str], settings: Mapping[str, Setting]) -> dict[str, object]:
    """Returns {field: raw value} of ``--field value`` tokens.

    Raises:
        ConfigError: an unknown option, one without a value, or a token that belongs to none.
    """
    values: dict[str, object] = {}
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        option, has_value, inline = token.partition("=")
        if not option.startswith("--") or option == "--":
            raise ConfigError(
                f"unexpected {shown(token)} on the command line; fields are set as --field value, "
                "and the configuration file stands before them"
            )
        name = option[2:].replace("-", "_")
        negated = settings.get(name.removeprefix("no_")) if name.startswith("no_") else None
        if name not in settings and negated and negated.kind is bool and not has_value:
            values[negated.name] = False
            continue
        if name not in settings:
            raise ConfigError(f"unknown option {shown(option)}{suggested_field(name, settings)}")
        one = settings[name]
        if has_value:
            texts = [inline]
        else:
            texts = []
            mark = "--" if one.shape == "one" else "-"  # one value may be a negative number
            while position < len(tokens) and not tokens[position].startswith(mark):
                if one.kind is bool and tokens[position].casefold() not in TRUE + FALSE:
                    break
                texts.append(tokens[position])
                position += 1
                if one.shape == "one":
                    break
        if one.kind is bool and not texts:
            values[name] = True
        elif not texts:
            raise ConfigError(f"--{name} is given without a value; allowed: {one.allowed}")
        else:
            raw = _raw_of_texts(one, texts)
            earlier = values.get(name)
            if isinstance(raw, list) and isinstance(earlier, list):
                raw = earlier + raw
            elif isinstance(raw, dict) and isinstance(earlier, dict):
                raw = earlier | raw
            values[name] = raw
    return values


def _raw_of_texts(one: Setting, texts: list[str]) -> object:
    """Returns what the texts after ``--field`` stand for, not yet typed: text, None, a list or a mapping."""
    if len(texts) == 1 and texts[0].casefold() in NONE:
        return None
    if one.shape == "one":
        return texts[0]
    items: list[str | None] = []
    pairs: dict[str, str | None] = {}
    for text in texts:
        if text.startswith("{" if one.shape == "mapping" else "["):
            node = compose(text, f"--{one.name}")
            raw = None if node is None else raw_of(node, f"--{one.name}")
            if isinstance(raw, dict):
                pairs |= raw
            elif isinstance(raw, list):
                items += raw
        elif one.shape == "list":
            items += [item.strip() for item in text.split(",")]
        else:
            for pair in text.split(","):
                key, equals, value = pair.partition("=")
                if not equals:
                    raise ConfigError(f"--{one.name} holds {shown(pair)}; allowed: {one.allowed}")
                pairs[key.strip()] = value.strip()
    return items if one.shape == "list" else pairs
