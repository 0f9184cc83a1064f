"""Tensors made from weights, made anew only when a weight may have changed."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Changes:
    """Counts, in this process, the changes of weights that the weights themselves do not show."""

    def __init__(self) -> None:
        self.optimizer_steps = 0
        self.announcements = 0
        register_optimizer_step_post_hook(self._count_step)

    def _count_step(self, *_: Any) -> None:
        self.optimizer_steps += 1


_changes = _Changes()


def announce_changed_weights() -> None:
    """Says that weights were written in a way that torch does not count, such as through ``.data``.

    All models' working copies are made anew at their next use. Needless after an optimizer of torch's, after writing in
    place under ``torch.no_grad()``, and after a weight was given other memory.
    """
    _changes.announcements += 1


def state_of(sources: Sequence[torch.Tensor], dtype: torch.dtype, *settings: Hashable) -> Hashable:
    """Returns what changes when a source may have changed.

    Writing in place counts a tensor's version up and moving gives it new memory, but torch's fused optimizers do
    neither: a trained source is taken for changed after every step of any of torch's optimizers.

    Args:
        sources: the weights.
        dtype: of what is made from them.
        settings: the numbers beside the weights that it is made from.
    """
    is_trained = any(source.requires_grad for source in sources)
    num_steps = _changes.optimizer_steps if is_trained else None
    places = tuple((source.data_ptr(), source._version) for source in sources)
    return dtype, _changes.announcements, num_steps, settings, places


class WorkingCopies:
    """What was made from some weights, by name."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Hashable, torch.Tensor]] = {}

    def get(self, name: str, state: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Returns what ``make`` gives, made anew only when ``state`` (of ``state_of``) is another than last time."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != state:
            with torch.no_grad():
                kept = self._kept[name] = (state, make())
        return kept[1]

    def forget(self) -> None:
        """Lets go of all of them."""
        self._kept.clear()


def stack(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Returns the rows of all tensors below each other, in ``dtype``."""
    return torch.cat([tensor.detach().to(dtype) for tensor in tensors])
