"""YAML as a tree of nodes, not of objects, within limits: it may be somebody else's file.

A node knows its line, and keeps a scalar's text, so that ``1e-4`` is a number in a number's place and ``yes`` a name in
a name's.
"""

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from phi3v.errors import ConfigError
from phi3v.settings.words import NONE

MAX_YAML_BYTES = 256 * 2**10
"""Largest YAML file that is read; a run's configuration has a few hundred bytes."""

MAX_YAML_DEPTH = 8
"""Most levels of lists and mappings in one; a configuration has two."""

_MAX_NUMBER_CHARS = 64
_VALUE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What PyYAML raises on a value that is not of the type that its tag says, such as a date that is none."""


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """Returns the values of a YAML file that holds a mapping, in YAML's own types, whatever its keys.

    Raises:
        ConfigError: an unreadable file, or one that holds something else or what `read_file` refuses in any YAML.
    """
    node = compose(read_text(path), str(path))
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{path}: holds {found}, not lines of the form 'field: value'")
    entries_of(node, str(path))
    if node.tag != "tag:yaml.org,2002:map":
        raise ConfigError(f"{path}: the tag {node.tag} is not supported; write plain 'field: value' lines")
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, *_VALUE_ERRORS) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def read_text(path: Path) -> str:
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


def compose(text: str, place: str) -> yaml.Node | None:
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


def entries_of(node: yaml.MappingNode, path: str) -> list[tuple[str, yaml.Node, str]]:
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


def raw_of(node: yaml.Node, path: str) -> object:
    """Returns a node as text, None, a list of texts or a mapping from text to text."""
    place = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(item, place) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: _scalar(value, where) for key, value, where in entries_of(node, path)}
    return _scalar(node, place)


def _scalar(node: yaml.Node, place: str) -> str | None:
    """Returns a scalar's text; None for YAML's null, and for ``none`` without quotes."""
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{place}: lists and mappings cannot hold further ones")
    if not node.tag.startswith("tag:yaml.org,2002:"):
        raise ConfigError(f"{place}: the tag {node.tag} is not supported; write the plain value")
    is_null = node.tag == "tag:yaml.org,2002:null" or (node.style is None and node.value.casefold() in NONE)
    return None if is_null else node.value


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
