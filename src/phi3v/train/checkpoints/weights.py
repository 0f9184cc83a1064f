"""The weights that a run trains, as its model folders hold them: read back strictly, compared bit for bit."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from phi3v.errors import CheckpointError

_NAMES_SHOWN = 3


def saved_tensors(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Returns what ``save_model`` writes, by name in the file; the tensors share the model's memory."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    return model.state_dict()


def weights_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Counts the bytes of the tensors that ``save_model`` writes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in saved_tensors(model).values())


def restore_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Reads a model folder's weights into the model, in place; frozen ones are the base's, which the model has.

    Raises:
        CheckpointError: the folder does not hold exactly the model's tensors.
    """
    with torch.no_grad():
        learning = {one.data_ptr() for one in model.parameters() if one.requires_grad}
        for _, own, stored in _paired(model, folder):
            if own.data_ptr() in learning:
                own.copy_(stored)


def require_equal_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Checks that a model folder holds the model's weights bit for bit.

    Raises:
        CheckpointError: a tensor is missing, has another shape or type, or other bits.
    """
    for name, own, stored in _paired(model, folder):
        # Compared as bytes: a NaN equals itself, and -0.0 is not 0.0.
        if not torch.equal(_as_bytes(own), _as_bytes(stored)):
            raise CheckpointError(f"{folder}: {name} was written, but reads back with other values")


def _paired(model: PreTrainedModel | PeftModel, folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields every tensor's name, the model's own and the folder's."""
    own = saved_tensors(model)
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in sorted(folder.glob("*.safetensors"))]
        places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
        if places.keys() != own.keys():
            raise CheckpointError(
                f"{folder}: its tensors are not the model's: {_some(own.keys() - places.keys())} missing, "
                f"{_some(places.keys() - own.keys())} unknown. It belongs to another model or method; use another "
                "output_dir."
            )
        for name, tensor in own.items():
            stored = places[name].get_tensor(name)
            if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{folder}: {name} is {tuple(stored.shape)} {stored.dtype}, the model's is {tuple(tensor.shape)} "
                    f"{tensor.dtype}"
                )
            yield name, tensor, stored


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}; copy or download it again") from error


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown + f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN) if names else "none"
