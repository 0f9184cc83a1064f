"""Model folders: loading, saving in one piece, and merging adapters.

A folder is either *published layout* (``config.json`` and weights under the published names) or a *PEFT adapter*
(``adapter_config.json``, ``adapter_model.safetensors``, and our processor files beside them). Neither is trusted:
``phi3v.model.folder`` looks at it first, weights are read from safetensors files alone, and no code of a folder runs.
"""

import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..errors import CheckpointError
from .configuration_phi3_v import Phi3VConfig
from .folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapted_modules,
    as_checkpoint_error,
    check_adapter,
    check_processor_files,
    check_settings,
    check_weights,
    is_hub_id,
    read_object,
    read_tensors,
    taken_for_a_path,
)
from .four_bit import four_bit_loading, make_exact_on_cpu, require_four_bit
from .modeling_phi3_v import Phi3VForCausalLM
from .packed_forward import release_towers
from .processing_phi3_v import Phi3VProcessor

OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
"""What a forward pass returns; a ``config.json`` that says otherwise would make it a tuple or keep all layers' rows."""
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
    base = read_object(config_file).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{config_file}: base_model_name_or_path is missing; name the base model explicitly")
    return base


def _check_folder(path: str | Path, what: str) -> None:
    """Refuses a local path that holds no model; anything that is not a local path is taken for a hub id."""
    folder = Path(path)
    if not is_hub_id(path):
        if not folder.is_dir():
            former = _replaced(folder)
            hint = taken_for_a_path(path)
            if former.is_dir():
                hint = f"; a save was interrupted, the former one is {former}: rename it"
            raise CheckpointError(f"{what} {path}: no such folder{hint}")
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{what} {path}: holds neither config.json nor {ADAPTER_CONFIG}; give a model folder, such as RUN/model"
            )


def load_config(path: str | Path) -> Phi3VConfig:
    """Loads the configuration of a published-layout folder or hub id.

    Raises:
        CheckpointError: no such folder or hub id, or one of another kind of model, or with values that make no model.
    """
    _check_folder(path, "model")
    if Path(path).is_dir():
        read_object(Path(path) / "config.json")  # whose errors name the file
    with as_checkpoint_error(f"model {path}: config.json"):
        settings, _ = Phi3VConfig.get_config_dict(path)
        check_settings(settings)
        return Phi3VConfig.from_pretrained(path)


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
        CheckpointError: no such folder or hub id, or one whose files are damaged, do not belong together, or are no
            safetensors.
    """
    if is_adapter(path):
        check_adapter(Path(path))
        base_path = base or base_of_adapter(path)
        if is_adapter(base_path):
            raise CheckpointError(
                f"base model of adapter {path}: {base_path} is an adapter itself; merge that one first"
            )
        _check_folder(base_path, f"base model of adapter {path}:")
        loaded = load_model(base_path, dtype=dtype, attention=attention, rope_mode=rope_mode)
        model: PreTrainedModel | PeftModel = _put_adapter(loaded, Path(path))
    else:
        model = _load_whole_model(path, dtype=dtype, attention=attention, rope_mode=rope_mode)
    model.eval()
    return model if device is None else model.to(device)  # pyright: ignore[reportArgumentType]


def load_four_bit_model(
    path: str | Path,
    *,
    dtype: str,
    parts: Collection[str] = ("decoder",),
    attention: str = "sdpa",
    rope_mode: str = "auto",
    device: str | torch.device = "cpu",
) -> Phi3VForCausalLM:
    """Loads a published-layout folder or hub id with the linear layers of some parts in 4 bit.

    Args:
        path: the folder or hub id; its weights are not quantised yet.
        dtype: ``float32``, ``bfloat16`` or ``float16``: of everything else, and what the 4-bit layers compute in.
        parts: of ``vision``, ``projector`` and ``decoder``, those held in 4 bit.
        attention: ``sdpa`` or ``eager``.
        rope_mode: LongRoPE factors ``auto`` (per sequence), ``short`` or ``long``.
        device: where to.

    Raises:
        CheckpointError: no such folder or hub id, or one whose files are damaged or lack tensors.
        ConfigError: bitsandbytes is not installed, or does not work on ``device`` or for this model on a CPU.
    """
    require_four_bit(device)
    options = four_bit_loading(DTYPES[dtype], device, parts)
    model = _load_whole_model(path, dtype=dtype, attention=attention, rope_mode=rope_mode, **options)
    if torch.device(device).type == "cpu":
        make_exact_on_cpu(model)
    return model.eval()


def _load_whole_model(
    path: str | Path, *, dtype: str, attention: str, rope_mode: str, **options: Any
) -> Phi3VForCausalLM:
    config = load_config(path)
    if Path(path).is_dir():
        check_weights(Path(path), config)
    elif cached_file(str(path), ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False) is not None:
        raise CheckpointError(f"model {path}: is an adapter; download it and give its folder")
    with as_checkpoint_error(f"model {path}"):
        model, loading = Phi3VForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation=attention,
            rope_mode=rope_mode,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    _refuse_other_tensors(f"model {path}", loading)
    for name, value in OUTPUTS.items():
        setattr(model.config, name, value)
    return model


def _refuse_other_tensors(place: str, loading: dict[str, Any]) -> None:
    """Refuses weights that are not the model's: transformers would go on without them, or with random numbers.

    Raises:
        CheckpointError: names one of them.
    """
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"{place}: its files lack {len(missing)} of the model's tensors, such as {missing[0]}; "
            "copy or download it again"
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, own = mismatched[0]
        raise CheckpointError(
            f"{place}: {len(mismatched)} of its tensors have other shapes than config.json says, such as {name}: "
            f"{tuple(stored)} instead of {tuple(own)}; copy or download both again"
        )
    if unexpected := sorted(loading["unexpected_keys"]):
        raise CheckpointError(
            f"{place}: its files hold {len(unexpected)} tensors that this model has no place for, such as "
            f"{unexpected[0]}; config.json or the weights belong to another model"
        )


def _put_adapter(base: Any, folder: Path) -> PeftModel:
    """Puts a checked adapter on its base.

    Raises:
        CheckpointError: its tensors are not those that its settings ask for on this base.
    """
    with as_checkpoint_error(f"adapter {folder}"), warnings.catch_warnings():
        # PEFT asks for gradient checkpointing under the name that transformers 5.23 has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        settings = PeftConfig.from_pretrained(str(folder))
        if isinstance(settings, LoraConfig) and isinstance(settings.target_modules, str):
            settings.target_modules = adapted_modules(folder)
        model = PeftModel.from_pretrained(base, str(folder), config=settings)
    # PEFT leaves what the file lacks as it was initialised, and what it has too much of aside.
    stored = read_tensors([folder / ADAPTER_WEIGHTS]).keys()
    own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if missing := sorted(own - stored):
        raise CheckpointError(
            f"adapter {folder}: its file lacks {len(missing)} of the tensors that {ADAPTER_CONFIG} asks for, such as "
            f"{missing[0]}; copy or download it again, or name the base model that it was trained on"
        )
    of_base = {f"base_model.model.{name}" for name in model.get_base_model().state_dict()}
    if unexpected := sorted(stored - own - of_base):
        raise CheckpointError(
            f"adapter {folder}: its file holds {len(unexpected)} tensors that the model has no place for, such as "
            f"{unexpected[0]}; name the base model that it was trained on"
        )
    return model


def load_processor(path: str | Path, num_crops: int | None = None) -> Phi3VProcessor:
    """Loads the processor of a model folder, a hub id or an adapter folder (its base's where it has none itself).

    Raises:
        CheckpointError: no such folder or hub id, or files that are missing, damaged or make no processor.
    """
    if is_adapter(path) and not (Path(path) / "preprocessor_config.json").is_file():
        path = base_of_adapter(path)
    if not is_adapter(path):
        _check_folder(path, "model")
    if Path(path).is_dir():
        check_processor_files(Path(path))
    with as_checkpoint_error(f"processor of {path}"):
        return Phi3VProcessor.from_pretrained(path, num_crops=num_crops)


def save_model(
    model: PreTrainedModel | PeftModel,
    processor: Phi3VProcessor,
    folder: str | Path,
    max_shard_size: str | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a model folder in one piece: complete under its name, or not there at all.

    A full model is written in the published layout, a ``PeftModel`` in PEFT's adapter format; both with the
    processor's files. An existing folder of that name is replaced. A save that fails leaves it as it was, and nothing
    beside it. A save that is killed may leave ``.NAME.writing``, which the next one removes; killed between the new
    folder's writing and its naming, it leaves the former one as ``.NAME.replaced``, which the next one puts back first.

    Args:
        model: what to write.
        processor: whose files to write beside it.
        folder: where to.
        max_shard_size: largest weight file, such as ``5GB``; None: as transformers does.
        state: the weights, where the model itself holds them in parts; by the names of its parameters, of one dtype.
    """
    folder = Path(folder)
    temporary, outgoing = folder.with_name(f".{folder.name}.writing"), _replaced(folder)
    if outgoing.is_dir() and not folder.exists():
        outgoing.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_model(model, processor, temporary, max_shard_size, state)
        if folder.exists():
            shutil.rmtree(outgoing, ignore_errors=True)
            folder.rename(outgoing)
            try:
                temporary.rename(folder)
            except BaseException:
                outgoing.rename(folder)
                raise
            shutil.rmtree(outgoing)
        else:
            temporary.rename(folder)
    except BaseException:  # also Ctrl-C: what is half written is as large as a model
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _replaced(folder: Path) -> Path:
    """Returns where a model folder steps aside to, for the moment in which the new one takes its name."""
    return folder.with_name(f".{folder.name}.replaced")


def _write_model(
    model: PreTrainedModel | PeftModel,
    processor: Phi3VProcessor,
    folder: Path,
    max_shard_size: str | None,
    state: Mapping[str, torch.Tensor] | None,
) -> None:
    """Writes all files of a model into an empty folder, and waits until they are on the disk."""
    # An adapter on lm_head must not drag the base's own lm_head into the file.
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    if max_shard_size is not None:
        options["max_shard_size"] = max_shard_size
    if state is not None:
        options["state_dict"] = dict(state)
    model.save_pretrained(str(folder), **options)
    if state is not None and not isinstance(model, PeftModel):
        _write_dtype(folder / "config.json", next(iter(state.values())).dtype)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model-card template, full of blanks
    processor.save_pretrained(folder)
    mode = (folder / "preprocessor_config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors' writer leaves its file to the owner alone, whatever the umask
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Writes down what the weights beside a configuration are saved in: transformers takes it from the model's own."""
    settings = {**read_object(config_file), "dtype": str(dtype).removeprefix("torch.")}
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merge_adapter(model: PeftModel, dtype: torch.dtype) -> Phi3VForCausalLM:
    """Adds a loaded LoRA adapter into its base and returns the full model in ``dtype``.

    Load the adapter with ``dtype="float32"``: the sum is then formed in float32 and rounded once, so that a 16-bit
    merge differs from the adapter model by one rounding of the weights and no more. ``model`` is used up.
    """
    merged = model.merge_and_unload(safe_merge=True).to(dtype)  # pyright: ignore[reportCallIssue]
    release_towers(merged.model)
    merged.config.dtype = dtype
    return merged


def dtype_of_folder(path: str | Path) -> torch.dtype:
    """Returns the number format that a published-layout folder's weights are saved in."""
    dtype = load_config(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
