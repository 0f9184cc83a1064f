"""The keys and values of earlier positions: their name in the installed transformers, and the text they are of."""

from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""``cache`` since transformers 5.24, which renamed it in masks, layers, outputs and generation at once."""

_LONGEST = "_phi3v_longest_text"


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


def note_positions_of_keys(cache: Cache, new: int) -> None:
    """Notes on a cache that can be cropped how long the text is that its next ``new`` keys are computed in."""
    if isinstance(cache, DynamicCache) and not torch.compiler.is_compiling():
        length = int(cache.get_seq_length()) + new
        vars(cache)[_LONGEST] = max(length, positions_of_keys(cache))


def positions_of_keys(cache: Cache) -> int:
    """Returns the length, in positions, of the longest text that keys of a cache were computed in; 0: not known.

    More than the cache holds where some were cropped away since: LongRoPE chose the others' factors with them.
    """
    return vars(cache).get(_LONGEST, 0)
