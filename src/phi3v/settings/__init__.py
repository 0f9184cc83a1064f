"""One field of a configuration: what it takes, and how it is read from YAML, the command line or Python.

Nothing here knows which fields there are; `phi3v.config` declares them. Every value passes through `Setting.read`, so
that all three sources refuse the same things with the same words.
"""

from phi3v.settings.files import read_file, write_yaml
from phi3v.settings.overrides import read_overrides
from phi3v.settings.setting import OnResume, Setting, describe_field, expand_home, setting
from phi3v.settings.tree import MAX_YAML_BYTES, read_plain_yaml

__all__ = [
    "MAX_YAML_BYTES",
    "OnResume",
    "Setting",
    "describe_field",
    "expand_home",
    "read_file",
    "read_overrides",
    "read_plain_yaml",
    "setting",
    "write_yaml",
]
