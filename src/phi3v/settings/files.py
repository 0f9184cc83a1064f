"""Configurations in YAML files: read for the fields that there are, and written."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phi3v.errors import ConfigError
from phi3v.settings.setting import Setting, suggested_field
from phi3v.settings.tree import compose, entries_of, raw_of, read_text
from phi3v.settings.words import NONE, shown


def read_file(path: Path, settings: Mapping[str, Setting]) -> dict[str, tuple[object, str]]:
    """Returns {field: (raw value, ``file:line``)} of a YAML file.

    Raises:
        ConfigError: an unreadable file, or an unknown or repeated key.
    """
    node = compose(read_text(path), str(path))
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected lines of the form 'field: value'")
    values = {}
    for name, value_node, place in entries_of(node, str(path)):
        if name not in settings:
            raise ConfigError(f"{place}: unknown field {shown(name)}{suggested_field(name, settings)}")
        values[name] = (raw_of(value_node, str(path)), place)
    return values


def write_yaml(values: Mapping[str, Any]) -> str:
    """Returns YAML lines that `read_file` reads back to equal values."""
    plain = {name: _plain(value) for name, value in values.items()}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _plain(value: Any) -> Any:
    """Returns a field's value in YAML's own types."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Quotes text that would otherwise be read as nothing or lose its line breaks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "'" if data.casefold() in NONE else None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
