"""A configuration from a YAML file and the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from phi3v.config.run import RunConfig, refuse_unread, settings_of
from phi3v.errors import ConfigError
from phi3v.settings import read_file, read_overrides

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_config(cls: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a configuration from a YAML file and command-line overrides, which win.

    Overrides are ``--field value``, ``--field=value`` and, for true or false, ``--field`` and ``--no-field``; dashes
    and underscores are the same in names. A list is written ``--field a b``, ``--field a,b``, ``--field a --field b``
    or ``--field "[a, b]"`` and replaces the file's; a mapping is ``--field key=value,key=value``. ``none`` clears a
    field. Relative paths, in the file too, are relative to the working directory; ``~`` is the home directory.

    A field that nothing would read in this run is refused, except when the file sets it and an override has switched
    off what it belongs to (a LoRA recipe run with ``--method full``).

    Raises:
        ConfigError: an unreadable file, an unknown or repeated key, a wrong type, a value out of range, a missing
            field, or values that cannot go together.
    """
    settings = settings_of(cls)
    from_file = {} if path is None else read_file(path, settings)
    from_line = {name: (raw, "command line") for name, raw in read_overrides(overrides, settings).items()}
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for name, (raw, place) in (from_file | from_line).items():
        try:
            values[name] = settings[name].read(raw)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        places[name] = place
    missing = [one.name for one in settings.values() if one.is_required and one.name not in values]
    if missing:
        options = " ".join(f"--{name} ..." for name in missing)
        where = "on the command line" if path is None else f"in {path} or on the command line"
        raise ConfigError(f"{', '.join(missing)} must be set, {where}: {options}")
    for name in list(values):
        one = settings[name]
        if one.unmet(settings, values):
            is_switched_off = any(need.partition("=")[0] in from_line for need in one.needs)
            if name in from_line or not is_switched_off:
                refuse_unread(one, settings, values, f"{places[name]}: ")
            del values[name]
    return cls(**values)
