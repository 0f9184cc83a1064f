"""Data sets of other shapes to native JSONL: one module a source, one function each.

A converter is an ordinary function, ``convert_NAME(source, output_dir, *, options..) -> Conversion``. ``phi3v data
convert NAME`` is built from its signature and docstring, so every parameter is typed and described under ``Args:``.
Modules here import no torch; what only one of them needs (``datasets``, ``av``) is imported inside its functions.
"""

from collections.abc import Callable
from importlib import import_module

from .writer import Conversion

SOURCES = {
    "docvqa": "docvqa:convert_docvqa",
    "hateful-memes": "hateful_memes:convert_hateful_memes",
    "nlvr2": "nlvr2:convert_nlvr2",
    "ucf101": "ucf101:convert_ucf101",
    "video-folders": "video_folders:convert_video_folders",
    "image-folders": "image_folders:convert_image_folders",
    "csv": "csv_table:convert_csv",
    "llava": "llava:convert_llava",
    "sharegpt": "sharegpt:convert_sharegpt",
    "openai": "openai_messages:convert_openai_messages",
}
"""Converters by the name that the command line gives them: ``module:function`` in this package."""


def converter(name: str) -> Callable[..., Conversion]:
    """Returns the converter of a source in ``SOURCES``."""
    module, _, function = SOURCES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), function)
