"""Model folders: loading, saving in one piece, and merging adapters.

A folder is either *published layout* (``config.json`` and weights under the published names) or a *PEFT adapter*
(``adapter_config.json``, ``adapter_model.safetensors``, and our processor files beside them).
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError
from .configuration_phi3_v import Phi3VConfig
from .four_bit import four_bit_loading, make_exact_on_cpu, require_four_bit
from .modeling_phi3_v import Phi3VForCausalLM
from .processing_phi3_v import Phi3VProcessor

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_adapter(path: str | Path) -> bool:
    """Says whether a local folder holds a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_of(model: nn.Module) -> Phi3VForCausalLM:
    """Returns the model under its adapters, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, Phi3VForCausalLM)
    return base


def base_of_adapter(path: str | Path) -> str:
    """Names the base model that an adapter folder was trained on.

    Raises:
        CheckpointError: the adapter does not say.
    """
    config_file = Path(path) / ADAPTER_CONFIG
    base = json.loads(config_file.read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{config_file}: base_model_name_or_path is missing; name the base model explicitly")
    return base


def _check_folder(path: str | Path, what: str) -> None:
    """Refuses a local path that holds no model; anything that is not a local path is taken for a hub id."""
    folder = Path(path)
    looks_local = folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1
    if folder.exists() or looks_local:
        if not folder.is_dir():
            raise CheckpointError(f"{what} {path}: no such folder")
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{what} {path}: holds neither config.json nor {ADAPTER_CONFIG}; give a model folder, such as RUN/model"
            )


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    attention: str = "sdpa",
    rope_mode: str = "auto",
    device: str | torch.device | None = None,
    base: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Loads a published-layout folder, a hub id, or an adapter on its base.

    The base is loaded as its folder holds it, also under an adapter that was trained on it in 4 bit.

    Args:
        path: the folder or hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the dtype the folder was saved in. An adapter's
            own matrices stay float32.
        attention: ``sdpa`` or ``eager``.
        rope_mode: LongRoPE factors ``auto`` (per sequence), ``short`` or ``long``.
        device: where to; default: stay on the CPU.
        base: for an adapter: another place of its base model.

    Raises:
        CheckpointError: no such folder or hub id, or one whose files are damaged or lack tensors.
    """
    if is_adapter(path):
        base_path = base or base_of_adapter(path)
        _check_folder(base_path, f"base model of adapter {path}:")
        loaded = load_model(base_path, dtype=dtype, attention=attention, rope_mode=rope_mode)
        with warnings.catch_warnings():
            # PEFT asks for gradient checkpointing under the name that transformers 5.23 has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            model: PreTrainedModel | PeftModel = PeftModel.from_pretrained(loaded, str(path))  # pyright: ignore[reportArgumentType]
    else:
        model = _load_whole_model(path, dtype=dtype, attention=attention, rope_mode=rope_mode)
    model.eval()
    return model if device is None else model.to(device)  # pyright: ignore[reportArgumentType]


def load_four_bit_model(
    path: str | Path,
    *,
    dtype: str,
    attention: str = "sdpa",
    rope_mode: str = "auto",
    device: str | torch.device = "cpu",
) -> Phi3VForCausalLM:
    """Loads a published-layout folder or hub id with the linear layers of its decoder in 4 bit.

    Args:
        path: the folder or hub id; its weights are not quantised yet.
        dtype: ``float32``, ``bfloat16`` or ``float16``: of everything else, and what the 4-bit layers compute in.
        attention: ``sdpa`` or ``eager``.
        rope_mode: LongRoPE factors ``auto`` (per sequence), ``short`` or ``long``.
        device: where to.

    Raises:
        CheckpointError: no such folder or hub id, or one whose files are damaged or lack tensors.
        ConfigError: bitsandbytes is not installed, or does not work on ``device`` or for this model on a CPU.
    """
    require_four_bit(device)
    options = four_bit_loading(DTYPES[dtype], device)
    model = _load_whole_model(path, dtype=dtype, attention=attention, rope_mode=rope_mode, **options)
    if torch.device(device).type == "cpu":
        make_exact_on_cpu(model)
    return model.eval()


def _load_whole_model(
    path: str | Path, *, dtype: str, attention: str, rope_mode: str, **options: Any
) -> Phi3VForCausalLM:
    _check_folder(path, "model")
    try:
        model, loading = Phi3VForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation=attention,
            rope_mode=rope_mode,
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model {path}: {error}") from error
    # transformers would go on with random numbers in their place.
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"model {path}: its files lack {len(missing)} of the model's tensors, such as {missing[0]}; "
            "copy or download it again"
        )
    return model


def load_processor(path: str | Path, num_crops: int | None = None) -> Phi3VProcessor:
    """Loads the processor of a model folder, a hub id or an adapter folder (its base's where it has none itself)."""
    if is_adapter(path) and not (Path(path) / "preprocessor_config.json").is_file():
        path = base_of_adapter(path)
    elif not is_adapter(path):
        _check_folder(path, "model")
    return Phi3VProcessor.from_pretrained(path, num_crops=num_crops)


def save_model(model: PreTrainedModel | PeftModel, processor: Phi3VProcessor, folder: str | Path) -> Path:
    """Writes a model folder in one piece: complete under its name, or not there at all.

    A full model is written in the published layout, a ``PeftModel`` in PEFT's adapter format; both with the
    processor's files. An existing folder of that name is replaced.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # An adapter on lm_head must not drag the base's own lm_head into the file.
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(str(temporary), **options)
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's model-card template, full of blanks
    processor.save_pretrained(temporary)
    mode = (temporary / "preprocessor_config.json").stat().st_mode
    for file in temporary.iterdir():
        file.chmod(mode)  # safetensors' writer leaves its file to the owner alone, whatever the umask
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        outgoing = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(outgoing, ignore_errors=True)
        folder.rename(outgoing)
        try:
            temporary.rename(folder)
        except OSError:
            outgoing.rename(folder)
            raise
        shutil.rmtree(outgoing)
    else:
        temporary.rename(folder)
    return folder


def merge_adapter(model: PeftModel, dtype: torch.dtype) -> Phi3VForCausalLM:
    """Adds a loaded LoRA adapter into its base and returns the full model in ``dtype``.

    Load the adapter with ``dtype="float32"``: the sum is then formed in float32 and rounded once, so that a 16-bit
    merge differs from the adapter model by one rounding of the weights and no more. ``model`` is used up.
    """
    merged = model.merge_and_unload(safe_merge=True).to(dtype)  # pyright: ignore[reportCallIssue]
    merged.config.dtype = dtype
    return merged


def dtype_of_folder(path: str | Path) -> torch.dtype:
    """Returns the number format that a published-layout folder's weights are saved in."""
    dtype = Phi3VConfig.from_pretrained(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
