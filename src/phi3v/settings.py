"""One field of a configuration: what it takes, and how it is read from YAML, the command line or Python.

Nothing here knows which fields there are; `phi3v.config` declares them. Every value passes through `Setting.read`, so
that all three sources refuse the same things with the same words. YAML is taken as a tree of nodes, not of objects: a
node knows its line, and keeps a scalar's text, so that ``1e-4`` is a number in a number's place and ``yes`` a name in a
name's.
"""

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from yaml.composer import ComposerError

from phi3v.credentials import holds_secret
from phi3v.errors import ConfigError

_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_NONE = ("none", "null")

MAX_YAML_BYTES = 256 * 2**10
"""Largest YAML file that is read; a run's configuration has a few hundred bytes."""

MAX_YAML_DEPTH = 8
"""Most levels of lists and mappings in one; a configuration has two."""

_MAX_NUMBER_CHARS = 64
_VALUE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What PyYAML raises on a value that is not of the type that its tag says, such as a date that is none."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a configuration: what it takes and what it means.

    Attributes:
        name: the field's name, as in YAML and after ``--``.
        section: the heading it stands under.
        doc: what it does, with its unit.
        kind: type of its value, of its items (list) or of its values (mapping).
        shape: one value, a list of them, or a mapping from a name to one.
        is_optional: whether ``none`` is a value.
        choices: the words allowed as value, as items or as a mapping's keys; empty when any will do.
        default: its value when not set; `dataclasses.MISSING` when it must be set.
        at_least: inclusive lower bound of a number.
        above: exclusive lower bound.
        at_most: inclusive upper bound.
        below: exclusive upper bound.
        familiar_names: what other trainers call it, for the did-you-mean.
        needs: what must hold for anything to read this field: ``field`` (is set), ``field=value`` or
            ``field=value|value``.
    """

    name: str
    section: str
    doc: str
    kind: type
    shape: Literal["one", "list", "mapping"]
    is_optional: bool
    choices: tuple[str, ...]
    default: Any
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    familiar_names: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def is_required(self) -> bool:
        """Whether a run cannot start without a value for it."""
        return self.default is MISSING

    @property
    def allowed(self) -> str:
        """The values it takes, in words."""
        words = " or ".join([", ".join(self.choices[:-1]), self.choices[-1]]) if len(self.choices) > 1 else ""
        if self.shape == "mapping":
            text = f"part=number pairs; parts {words}; {_number_in_words(self, 'numbers')}"
        elif self.shape == "list":
            text = f"a list of {words or ('paths' if self.kind is Path else 'texts')}"
        elif words:
            text = words
        elif self.kind is bool:
            text = "true or false"
        elif self.kind is Path:
            text = "a path"
        elif self.kind is str:
            text = "text"
        else:
            text = _number_in_words(self, "a whole number" if self.kind is int else "a number")
        return f"{text}, or none" if self.is_optional else text

    @property
    def default_text(self) -> str:
        """The default as it would be written in YAML; ``required`` when there is none."""
        if self.is_required:
            return "required"
        if self.default is None or self.default in ([], {}):
            return "none"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, list):
            return "[" + ", ".join(str(item) for item in self.default) + "]"
        return str(self.default)

    def unmet(self, settings: "Mapping[str, Setting]", values: Mapping[str, Any]) -> list[str]:
        """Returns, in words, those of its needs that ``values``, defaults filling the gaps, do not meet."""
        unmet = []
        for need in self.needs:
            name, _, wanted = need.partition("=")
            value = values.get(name, settings[name].default)
            if value not in wanted.split("|") if wanted else value in (None, []):
                unmet.append(need.replace("|", " or "))
        return unmet

    def read(self, raw: object) -> Any:
        """Returns the typed value of ``raw``: a Python value, or text as YAML and the command line give it.

        Raises:
            ConfigError: a wrong type or a value out of range.
        """
        if raw is None:
            if self.is_optional:
                return None
            if self.shape == "one" or self.is_required:
                raise self._refusal("is none")
            return [] if self.shape == "list" else {}
        if self.shape == "list":
            items = [self._read_one(item) for item in (raw if isinstance(raw, list | tuple) else [raw])]
            if not items and self.is_required:
                raise self._refusal("is empty")
            for item in items if self.choices else []:
                if items.count(item) > 1:
                    raise self._refusal(f"names {item!r} twice")
            return items
        if self.shape == "mapping":
            if not isinstance(raw, Mapping):
                raise self._refusal(f"is {_shown(raw)}")
            for key in raw:
                if key not in self.choices:
                    raise self._refusal(f"has the key {_shown(key)}", _suggestion(str(key), self.choices))
            return {key: self._read_one(value) for key, value in raw.items()}
        return self._read_one(raw)

    def _read_one(self, raw: object) -> Any:
        value: object = None
        if self.kind is bool:
            word = raw.casefold() if isinstance(raw, str) else raw
            if isinstance(word, bool):
                value = word
            elif word in _TRUE + _FALSE:
                value = word in _TRUE
        elif isinstance(raw, str | os.PathLike) and holds_secret(os.fspath(raw)):
            raise ConfigError(
                f"{self.name} holds a password or an access token, and a run writes its configuration down. Take it "
                "out: the hub's token is read from HF_TOKEN or from `hf auth login`, W&B's from WANDB_API_KEY"
            )
        elif self.kind is Path:
            value = expand_home(raw) if isinstance(raw, str | os.PathLike) else None
        elif self.kind is str:
            value = raw if isinstance(raw, str) and raw and "\0" not in raw else None
        else:
            value = _number(raw, self.kind)
        if value is None:
            raise self._refusal(f"{'is' if self.shape == 'one' else 'holds'} {_shown(raw)}")
        if self.choices and self.shape != "mapping" and value not in self.choices:
            found = f"{'is' if self.shape == 'one' else 'holds'} {_shown(raw)}"
            raise self._refusal(found, _suggestion(str(raw), self.choices))
        if isinstance(value, int | float) and not self._is_in_range(value):
            raise self._refusal(f"{'is' if self.shape == 'one' else 'holds'} {_shown(raw)}")
        return value

    def _is_in_range(self, number: float) -> bool:
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )

    def _refusal(self, found: str, suggestion: str = "") -> ConfigError:
        return ConfigError(f"{self.name} {found}; allowed: {self.allowed}{suggestion}")


def setting(
    section: str,
    doc: str,
    *,
    default: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    familiar_names: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
) -> Any:
    """Declares a dataclass field with its documentation and range; see `Setting` for the arguments."""
    about = {"section": section, "doc": doc, "default": default, "familiar_names": familiar_names, "needs": needs}
    about |= {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def describe_field(field: "dataclasses.Field[Any]", hint: Any) -> Setting:
    """Returns the setting of a dataclass field that `setting` declared.

    Args:
        field: the field.
        hint: its type: ``T``, ``list[T]`` or ``dict[Literal, T]``, with or without ``| None``; ``T`` may be a Literal.
    """
    is_optional = get_origin(hint) in (types.UnionType, Union)
    if is_optional:
        (hint,) = (member for member in get_args(hint) if member is not type(None))
    shape: Literal["one", "list", "mapping"] = "one"
    choices: tuple[str, ...] = ()
    if get_origin(hint) is list:
        shape, (hint,) = "list", get_args(hint)
    elif get_origin(hint) is dict:
        key_hint, hint = get_args(hint)
        shape, choices = "mapping", get_args(key_hint)
    if get_origin(hint) is Literal:
        choices, hint = get_args(hint), str
    return Setting(name=field.name, kind=hint, shape=shape, is_optional=is_optional, choices=choices, **field.metadata)


def read_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, tuple[object, str]]:
    """Returns {field: (raw value, ``file:line``)} of a YAML file.

    Raises:
        ConfigError: an unreadable file, or an unknown or repeated key.
    """
    node = _compose(_read_text(path), str(path))
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected lines of the form 'field: value'")
    values = {}
    for name, value_node, place in _entries(node, str(path)):
        if name not in settings:
            raise ConfigError(f"{place}: unknown field {_shown(name)}{_suggested_field(name, settings)}")
        values[name] = (_raw(value_node, str(path)), place)
    return values


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """Returns the values of a YAML file that holds a mapping, in YAML's own types, whatever its keys.

    Raises:
        ConfigError: an unreadable file, or one that holds something else or what `read_file` refuses in any YAML.
    """
    node = _compose(_read_text(path), str(path))
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{path}: holds {found}, not lines of the form 'field: value'")
    _entries(node, str(path))
    if node.tag != "tag:yaml.org,2002:map":
        raise ConfigError(f"{path}: the tag {node.tag} is not supported; write plain 'field: value' lines")
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, *_VALUE_ERRORS) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


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
                f"unexpected {_shown(token)} on the command line; fields are set as --field value, "
                "and the configuration file stands before them"
            )
        name = option[2:].replace("-", "_")
        negated = settings.get(name.removeprefix("no_")) if name.startswith("no_") else None
        if name not in settings and negated and negated.kind is bool and not has_value:
            values[negated.name] = False
            continue
        if name not in settings:
            raise ConfigError(f"unknown option {_shown(option)}{_suggested_field(name, settings)}")
        one = settings[name]
        if has_value:
            texts = [inline]
        else:
            texts = []
            mark = "--" if one.shape == "one" else "-"  # one value may be a negative number
            while position < len(tokens) and not tokens[position].startswith(mark):
                if one.kind is bool and tokens[position].casefold() not in _TRUE + _FALSE:
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


def write_yaml(values: Mapping[str, Any]) -> str:
    """Returns YAML lines that `read_file` reads back to equal values."""
    plain = {name: _plain(value) for name, value in values.items()}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _number_in_words(one: Setting, noun: str) -> str:
    bounds = {"at least": one.at_least, "above": one.above, "at most": one.at_most, "below": one.below}
    limits = " and ".join(f"{word} {bound:.15g}" for word, bound in bounds.items() if bound is not None)
    return f"{noun}, {limits}" if limits else noun


def _number(raw: object, kind: type) -> int | float | None:
    """Returns ``raw`` as an int or a finite float, or None when it is not one."""
    if isinstance(raw, bool) or not isinstance(raw, str | int | float) or (kind is int and isinstance(raw, float)):
        return None
    try:
        number = kind(raw)
    except (ValueError, OverflowError):
        return None
    is_usable = abs(number) < 2**63 if kind is int else math.isfinite(number)
    return number if is_usable else None


def expand_home(raw: "str | os.PathLike[str]") -> Path | None:
    """Returns ``raw`` as a path, ``~`` expanded; None for text that is no path, or the home of an unknown user."""
    if not os.fspath(raw) or "\0" in os.fspath(raw):
        return None
    try:
        return Path(raw).expanduser()
    except RuntimeError:
        return None


def _shown(raw: object) -> str:
    text = "none" if raw is None else repr(os.fspath(raw) if isinstance(raw, os.PathLike) else raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower().replace("-", "_"), known, n=1)
    return f" - did you mean {close[0]!r}?" if close else ""


def _suggested_field(name: str, settings: Mapping[str, Setting]) -> str:
    wanted = name.lower().replace("-", "_")
    for one in settings.values():
        if wanted in one.familiar_names:
            return f" - did you mean {one.name!r}?"
    return _suggestion(name, list(settings))


def _plain(value: Any) -> Any:
    """Returns a field's value in YAML's own types."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Quotes text that would otherwise be read as nothing or lose its line breaks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "'" if data.casefold() in _NONE else None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):
    """Safe YAML of a small tree: a few lines of aliases would stand for more values than memory holds."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = "aliases (*name) are not supported; write the value again"
            raise ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        # Base-60 numbers of any length are YAML too, and take the square of their length to compute.
        if len(node.value) > _MAX_NUMBER_CHARS and node.style is None:
            node.tag = "tag:yaml.org,2002:str"
        return node


def _read_text(path: Path) -> str:
    """Reads a text file that may be somebody else's.

    Raises:
        ConfigError: not there, too large, or no UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_YAML_BYTES // 2**10} KiB, so it is no configuration file")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not a UTF-8 text file ({error})") from error


def _compose(text: str, place: str) -> yaml.Node | None:
    """Parses YAML into nodes, which know their lines and hold every scalar as its text; builds no objects."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError) as error:  # PyYAML lets impossible \U escapes through to chr()
        raise ConfigError(f"{place}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: not valid YAML: nested too deeply") from error


def _scalar(node: yaml.Node, place: str) -> str | None:
    """Returns a scalar's text; None for YAML's null, and for ``none`` without quotes."""
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{place}: lists and mappings cannot hold further ones")
    if not node.tag.startswith("tag:yaml.org,2002:"):
        raise ConfigError(f"{place}: the tag {node.tag} is not supported; write the plain value")
    is_null = node.tag == "tag:yaml.org,2002:null" or (node.style is None and node.value.casefold() in _NONE)
    return None if is_null else node.value


def _entries(node: yaml.MappingNode, path: str) -> list[tuple[str, yaml.Node, str]]:
    """Returns (key, value, ``file:line``) of a mapping.

    Raises:
        ConfigError: a key that is not text, or one that stands there twice.
    """
    places: dict[str, str] = {}
    entries = []
    for key_node, value_node in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a list or mapping stands where a name is expected")
        if key_node.value in places:
            raise ConfigError(f"{place}: {key_node.value!r} is set twice; first at {places[key_node.value]}")
        places[key_node.value] = place
        entries.append((key_node.value, value_node, place))
    return entries


def _raw(node: yaml.Node, path: str) -> object:
    """Returns a node as text, None, a list of texts or a mapping from text to text."""
    place = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(item, place) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: _scalar(value, where) for key, value, where in _entries(node, path)}
    return _scalar(node, place)


def _raw_of_texts(one: Setting, texts: list[str]) -> object:
    """Returns what the texts after ``--field`` stand for, not yet typed: text, None, a list or a mapping."""
    if len(texts) == 1 and texts[0].casefold() in _NONE:
        return None
    if one.shape == "one":
        return texts[0]
    items: list[str | None] = []
    pairs: dict[str, str | None] = {}
    for text in texts:
        if text.startswith("{" if one.shape == "mapping" else "["):
            node = _compose(text, f"--{one.name}")
            raw = None if node is None else _raw(node, f"--{one.name}")
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
                    raise ConfigError(f"--{one.name} holds {_shown(pair)}; allowed: {one.allowed}")
                pairs[key.strip()] = value.strip()
    return items if one.shape == "list" else pairs
