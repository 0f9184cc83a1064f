"""The name under which the installed transformers passes and returns the keys and values of earlier positions."""

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""``cache`` since transformers 5.24, which renamed it in masks, layers, outputs and generation at once."""


def named_cache(cache: Cache | None) -> dict[str, Any]:
    """Returns ``cache`` as the keyword argument that transformers' functions and outputs take.

    The other name warns at every call, or is unknown.
    """
    return {CACHE_NAME: cache}


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Returns the cache that a caller gave under either name.

    Raises:
        ValueError: both names were given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them")
    return past_key_values if cache is None else cache
