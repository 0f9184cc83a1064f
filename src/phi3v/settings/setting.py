"""A field of a configuration, and the typed value of what stands there for it."""

import dataclasses
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from phi3v.credentials import secret_in
from phi3v.errors import ConfigError
from phi3v.settings.words import FALSE, TRUE, shown, suggestion

OnResume = Literal["decides", "rounds", "free"]
"""What another value is to a run that goes on: another run, another order of floating-point operations, or nothing."""


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
        on_resume: what another value means to a run that goes on.
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
    on_resume: OnResume = "decides"

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
                raise self._refusal(f"is {shown(raw)}")
            for key in raw:
                if key not in self.choices:
                    raise self._refusal(f"has the key {shown(key)}", suggestion(str(key), self.choices))
            return {key: self._read_one(value) for key, value in raw.items()}
        return self._read_one(raw)

    def _read_one(self, raw: object) -> Any:
        value: object = None
        if self.kind is bool:
            word = raw.casefold() if isinstance(raw, str) else raw
            if isinstance(word, bool):
                value = word
            elif word in TRUE + FALSE:
                value = word in TRUE
        elif isinstance(raw, str | os.PathLike) and (sign := secret_in(os.fspath(raw))) is not None:
            raise ConfigError(
                f"{self.name} holds a password or an access token (known {sign}), and a run writes its configuration "
                "down. Take it out: the hub's token is read from HF_TOKEN or from `hf auth login`, W&B's from "
                "WANDB_API_KEY"
            )
        elif self.kind is Path:
            value = expand_home(raw) if isinstance(raw, str | os.PathLike) else None
        elif self.kind is str:
            value = raw if isinstance(raw, str) and raw and "\0" not in raw else None
        else:
            value = _number(raw, self.kind)
        if value is None:
            raise self._refusal(f"{'is' if self.shape == 'one' else 'holds'} {shown(raw)}")
        if self.choices and self.shape != "mapping" and value not in self.choices:
            found = f"{'is' if self.shape == 'one' else 'holds'} {shown(raw)}"
            raise self._refusal(found, suggestion(str(raw), self.choices))
        if isinstance(value, int | float) and not self._is_in_range(value):
            raise self._refusal(f"{'is' if self.shape == 'one' else 'holds'} {shown(raw)}")
        return value

    def _is_in_range(self, number: float) -> bool:
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )

    def _refusal(self, found: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{self.name} {found}; allowed: {self.allowed}{hint}")


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
    on_resume: OnResume = "decides",
) -> Any:
    """Declares a dataclass field with its documentation and range; see `Setting` for the arguments."""
    about = {"section": section, "doc": doc, "default": default, "familiar_names": familiar_names, "needs": needs}
    about |= {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "on_resume": on_resume}
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


def suggested_field(name: str, settings: Mapping[str, Setting]) -> str:
    """Returns the end of a message about an unknown field: the one that is meant, if it can be guessed."""
    wanted = name.lower().replace("-", "_")
    for one in settings.values():
        if wanted in one.familiar_names:
            return f" - did you mean {one.name!r}?"
    return suggestion(name, list(settings))
