"""A model folder from anywhere, looked at before a library builds something out of it.

Of weights only safetensors files are read: a pickle (``.bin``, ``.pt``) runs what it likes while it is loaded. Names in
an index may not lead out of the folder, and numbers of layers or ranks that the weights do not bear out are refused
before anybody allocates for them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .configuration_phi3_v import Phi3VConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Weight files that are refused: loading one can run any program."""

MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON file of a model folder that is read; the largest of the published ones has 2 MB."""

LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers, PEFT and safetensors raise on a folder whose files hold something unexpected; they promise no
narrower set."""

FLOAT_TYPES = ("float64", "float32", "float16", "bfloat16")
"""Number formats that ``config.json`` may name."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYERS = (
    ("decoder", re.compile(r"model\.layers\.(\d{1,9})\.")),
    ("vision", re.compile(r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers\.(\d{1,9})\.")),
)
_MORE_THAN_MATRICES = (
    "megatron_config", "layer_replication", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
"""Settings of an adapter that import a library, copy layers, or compute on the base model while it is loaded."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
"""How matrices may have been initialised: ways that leave the base as it is."""

_NAME = re.compile(r"\^?[\w.]+")
"""A module's name or the end of one. PEFT takes it for a regular expression, and one from elsewhere could run for
ever."""


class StoredTensor(NamedTuple):
    """What a safetensors header says of a tensor: its number format, as ``F32``, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@contextmanager
def as_checkpoint_error(place: str) -> Iterator[None]:
    """Turns what a library raises on an unexpected file into an error that names the folder.

    Args:
        place: begins the message.

    Raises:
        CheckpointError: in place of any of ``LOADING_ERRORS``, of the tokenizers library's ``Exception``, and of one
            that does not name the place.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # the folder's fault or not, that is for the caller to say
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    except Exception as error:
        # The tokenizers library raises Exception itself; any other that is not expected goes through.
        if type(error) is not Exception and not isinstance(error, LOADING_ERRORS):
            raise
        found = " ".join(str(error).split())
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{place}: {kind}{found}") from error


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        CheckpointError: not there, too large, or something else in it.
    """
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has {size:,} bytes, over the limit of {MAX_JSON_BYTES:,}")
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is no JSON file ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, not an object; copy or download it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a published-layout folder.

    Raises:
        CheckpointError: none, or only pickles; or an index that names something else than files of this folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise CheckpointError(f"model {folder}: {_without_weights(folder, WEIGHTS)}")
    weight_map = read_object(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    names = sorted({name if isinstance(name, str) else repr(name) for name in named})
    if not names:
        raise CheckpointError(f"{index}: its weight_map names no file; copy or download it again")
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors") or "\0" in name:
            raise CheckpointError(
                f"{index}: names {name[:200]!r} as a weight file; only safetensors files beside it are read"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there; copy or download the folder again")
    return [folder / name for name in names]


def read_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Reads the headers of safetensors files.

    Raises:
        CheckpointError: a file that is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with as_checkpoint_error(str(file)), safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                tensor = opened.get_slice(name)
                tensors[name] = StoredTensor(str(tensor.get_dtype()), tuple(tensor.get_shape()))
    return tensors


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses a ``config.json`` of another kind of model, which would be built as this one all the same.

    Args:
        settings: what the file holds.

    Raises:
        CheckpointError: says which setting, and leaves it to the caller to say where.
    """
    if settings.get("model_type") != Phi3VConfig.model_type:
        raise CheckpointError(
            f"model_type is {str(settings.get('model_type'))[:80]!r}, not {Phi3VConfig.model_type!r}; give a "
            "Phi-3-vision or Phi-3.5-vision folder"
        )
    if settings.get("quantization_config") is not None:
        raise CheckpointError(
            "its weights are quantised (quantization_config); give the unquantised model, which method: qlora "
            "quantises while it loads"
        )
    for key in ("torch_dtype", "dtype"):
        if settings.get(key) not in (None, *FLOAT_TYPES):
            raise CheckpointError(f"{key} is {str(settings[key])[:80]!r}; it must be one of {', '.join(FLOAT_TYPES)}")


def check_weights(folder: Path, config: Phi3VConfig) -> None:
    """Compares a published-layout folder's weights, by their headers, with its ``config.json``.

    Raises:
        CheckpointError: no safetensors files, a damaged one, numbers that are no floats, or another number of layers.
    """
    tensors = read_tensors(weight_files(folder))
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS and not name.endswith("position_ids"):
            raise CheckpointError(
                f"model {folder}: {name} is stored as {tensor.dtype}; only unquantised float weights are read"
            )
    counts = {"decoder": config.num_hidden_layers, "vision": config.vision_config.num_hidden_layers}
    for part, pattern in _LAYERS:
        stored = {int(match[1]) for name in tensors if (match := pattern.match(name))}
        # The last layer alone decides: of 10^9 layers nobody makes a list.
        if stored and max(stored) + 1 != counts[part]:
            raise CheckpointError(
                f"model {folder}: config.json says {counts[part]:,} {part} layers, its weights hold "
                f"{max(stored) + 1:,}; copy or download both again"
            )
        if not stored and counts[part]:
            raise CheckpointError(
                f"model {folder}: its files lack the model's tensors: there is no {part} layer in them; copy or "
                "download it again"
            )


def is_hub_id(model: str | Path) -> bool:
    """Says whether a model is looked for on the hub: ``owner/name`` where no folder ``owner`` is here.

    Beside a folder that is there, a name is one that has gone: ``runs/modle``.
    """
    name = str(model)
    is_id = name.count("/") == 1 and not name.startswith((".", "~")) and not Path(name).is_absolute()
    return is_id and not Path(name).parent.is_dir()


def taken_for_a_path(model: str | Path) -> str:
    """Returns what to add to the error about a model that is not there: why the hub was not asked, if it might be."""
    parts = Path(model).parts
    if len(parts) != 2 or str(model).startswith((".", "/", "~")) or not Path(parts[0]).is_dir():
        return ""
    return (
        f"; {parts[0]}/ is a folder here, so this was taken for a path in it: to load {model} from the hub, start "
        f"where there is no folder {parts[0]}"
    )


def check_adapter(folder: Path) -> None:
    """Looks through an adapter folder: LoRA matrices in a safetensors file, of the ranks that its settings say.

    Raises:
        CheckpointError: another kind of adapter, patterns instead of names (but for ``target_modules``), a pickle, or
            ranks that do not match.
    """
    file = folder / ADAPTER_CONFIG
    settings = read_object(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {str(settings.get('peft_type'))[:80]!r}; only LORA is read")
    for key in _MORE_THAN_MATRICES:
        if settings.get(key) not in (None, False, {}, []):
            raise CheckpointError(f"{file}: {key} is set, which is not supported; only plain LoRA matrices are read")
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {str(settings['init_lora_weights'])[:80]!r}, with which loading an adapter "
            "changes its base; convert it to plain LoRA with PEFT first"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"adapter {folder}: {_without_weights(folder, ADAPTER_WEIGHTS)}")
    _check_names(file, settings)
    tensors = read_tensors([folder / ADAPTER_WEIGHTS])
    firsts = [tensor.shape for name, tensor in tensors.items() if "lora_A" in name or "lora_embedding_A" in name]
    most = max((shape[0] for shape in firsts if shape), default=0)
    patterns = settings.get("rank_pattern") or {}
    # With patterns for all modules the default rank is no matrix's: bounded all the same, for PEFT makes what it says.
    most_default = max((max(shape) for shape in firsts if shape), default=0) if patterns else most
    for rank, bound in [(settings.get("r", 8), most_default), *((rank, most) for rank in patterns.values())]:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= bound:
            raise CheckpointError(
                f"{file}: says rank {str(rank)[:80]}, but no matrix of {ADAPTER_WEIGHTS} has so many rows; "
                "copy or download both again"
            )


def adapted_modules(folder: Path) -> list[str]:
    """Names the modules that an adapter's matrices belong to, in full and by its weights.

    Where ``target_modules`` is a regular expression, these are what it found when the adapter was made; the expression
    itself, which could run for ever, is not run again.
    """
    names = read_tensors([folder / ADAPTER_WEIGHTS])
    return sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names if ".lora_" in name})


def check_processor_files(folder: Path) -> None:
    """Checks that the processor's files are there and hold JSON objects.

    Raises:
        CheckpointError: names the file.
    """
    for name in ("preprocessor_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: has no {name}; copy or download it from the base model")
        read_object(folder / name)
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            read_object(folder / name)


def _check_names(file: Path, settings: Mapping[str, Any]) -> None:
    """Makes sure that an adapter names modules, and holds no regular expressions but one that nobody runs."""
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = settings.get(key)
        if key == "target_modules" and isinstance(value, str):
            continue  # ``adapted_modules`` stands in its place
        names = [value] if isinstance(value, str) else value or []
        if not isinstance(names, list):
            raise CheckpointError(f"{file}: {key} is {str(names)[:80]!r}; it must be a list of names")
        _require_names(file, key, names)
    for key in ("rank_pattern", "alpha_pattern"):
        value = settings.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} is {str(value)[:80]!r}; it must hold name: number pairs")
        _require_names(file, key, list(value))


def _require_names(file: Path, key: str, names: list[Any]) -> None:
    for name in names:
        # "all-linear" is PEFT's word for every linear layer.
        if name != "all-linear" and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise CheckpointError(
                f"{file}: {key} holds {str(name)[:80]!r}, which is not a module's name; write the names of the modules"
            )


def _without_weights(folder: Path, wanted: str) -> str:
    """Says what is wrong with a folder that has no safetensors weights, and what to do."""
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if not pickles:
        return f"has no {wanted}; copy or download it again"
    return (
        f"has its weights only as a pickle ({', '.join(pickles[:3])}), which can run any program when it is loaded and "
        f"is not read; {wanted} is. If you trust where it is from, load it with the library that wrote it and save it "
        "there with save_pretrained(..., safe_serialization=True)"
    )
