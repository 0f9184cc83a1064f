"""Model folders and training checkpoints, hostile or damaged: what they say is loaded, or an error names them.

Whether a folder is loaded rightly is judged by a reader of a dozen lines that knows nothing of safetensors or PEFT.
"""

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phi3v.errors import CheckpointError
from phi3v.model.checkpoint import load_model, load_processor, save_model
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.checkpoints.store import MANIFEST, REQUIRED_FILES, CheckpointStore, find_problem
from phi3v.train.checkpoints.weights import restore_weights

FUZZ = settings.get_profile("phi3v-fuzz")
LOADS = settings(FUZZ, max_examples=FUZZ.max_examples // 3)
"""Of tests that load a model or a processor for every example."""
IDS = torch.tensor([[1, 15, 300, 32000, 7]])
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**9, 10**18, -(2**63), 1.5, float("nan"), float("inf")])
    | st.sampled_from(["", "x", "float16", "su", "system", "../x", "kernels-community/evil"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "image_size", "x", "rope_type", "short_factor"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def folder(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small model that tests change; `restored` makes it whole again."""
    return shutil.copytree(tiny_dir, tmp_path_factory.mktemp("fuzzed") / "model")


@pytest.fixture(scope="module")
def adapter(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = load_model(tiny_dir)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return save_model(adapted, Phi3VProcessor.from_pretrained(tiny_dir), tmp_path_factory.mktemp("fuzzed") / "adapter")


@pytest.fixture(scope="module")
def reference(tiny_dir: Path) -> torch.Tensor:
    return logits(load_model(tiny_dir))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


class Changed:
    """One file of a folder with other content while the block lasts."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        self.path, self.content = path, content
        self.before = path.read_bytes() if path.is_file() else None

    def __enter__(self) -> None:
        self.path.unlink(missing_ok=True)
        if self.content is not None:
            self.path.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self.before is not None:
            self.path.write_bytes(self.before)


def loaded(load: Callable[[Path], Any], folder: Path) -> Any | None:
    """What a loader returns; None where it raises the documented error, which names the folder."""
    try:
        return load(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) and len(str(error)) < 4000
        return None


def plain_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file by its description: a length, a JSON header, bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    body = content[8 + length :]
    kinds = {"F32": np.uint32, "F64": np.uint64, "F16": np.uint16, "BF16": np.uint16}
    tensors = {}
    for name, about in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = about["data_offsets"]
            tensors[name] = np.frombuffer(body[start:stop], kinds[about["dtype"]]).reshape(about["shape"])
    return tensors


def assert_holds(model: Any, path: Path) -> None:
    """The model's weights are the file's, bit for bit, and all of them."""
    own, stored = model.state_dict(), plain_tensors(path)
    assert set(own) == set(stored)
    for name, tensor in stored.items():
        assert tensor.dtype == np.uint32, name
        assert np.array_equal(own[name].contiguous().view(torch.int32).numpy().view(np.uint32), tensor), name


# --- config.json


KEYS = sorted({*Phi3VConfig().to_dict(), "vision_config", "rope_scaling", "quantization_config", "auto_map", "dtype"})
MATTERS = {
    "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "original_max_position_embeddings", "torch_dtype",
    "max_position_embeddings", "vision_config", "rope_parameters", "dtype",
}  # fmt: skip
"""Settings that change what the same weights compute."""


@LOADS
@given(key=st.sampled_from(KEYS), value=JUNK)
@example(key="num_hidden_layers", value=10**9)
@example(key="num_hidden_layers", value=1)
@example(key="num_hidden_layers", value=0)
@example(key="hidden_size", value=10**18)
@example(key="vocab_size", value=10**12)
@example(key="vocab_size", value=5)
@example(key="num_attention_heads", value=0)
@example(key="rope_scaling", value={"type": "su"})
@example(key="rope_scaling", value={"type": "yarn", "factor": 2})
@example(key="rope_scaling", value={"type": "su", "short_factor": "abc", "long_factor": [1]})
@example(key="rope_scaling", value="x")
@example(key="vision_config", value={"num_hidden_layers": 10**9})
@example(key="vision_config", value={"image_size": 56, "patch_size": 0})
@example(key="vision_config", value={"attn_implementation": "kernels-community/evil"})
@example(key="quantization_config", value={"quant_method": "gptq"})
@example(key="quantization_config", value={"quant_method": "x"})
@example(key="model_type", value="llama")
@example(key="dtype", value="system")
@example(key="sliding_window", value=2)
@example(key="partial_rotary_factor", value=0.5)
@example(key="use_return_dict", value=False)
@example(key="pad_token_id", value=10**9)
@example(key="return_dict", value=None)
@example(key="output_hidden_states", value=1.5)
def test_a_changed_setting_is_refused_or_the_model_is_the_files(
    folder: Path, reference: torch.Tensor, key: str, value: Any
) -> None:
    setup = json.loads((folder / "config.json").read_text())
    with Changed(folder / "config.json", json.dumps({**setup, key: value}).encode()):
        model = loaded(load_model, folder)
        if model is None:
            return
        assert next(model.parameters()).dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if next(model.parameters()).dtype == torch.float32:
            assert_holds(model, folder / WEIGHTS)
        if key not in MATTERS:
            assert torch.equal(logits(model), reference)


@LOADS
@given(
    name=st.sampled_from(
        ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"]
    ),
    content=st.binary(max_size=30) | JUNK.map(lambda value: json.dumps(value).encode()),
)
@example(name="config.json", content=b'{"a": ' + b"[" * 100_000)
@example(name="config.json", content=b"null")
@example(name="config.json", content=b"[]")
@example(name="generation_config.json", content=b"[]")
@example(name="preprocessor_config.json", content=b"3")
@example(name="preprocessor_config.json", content=b'"\xff"')
@example(name="tokenizer_config.json", content=b"null")
@example(name="tokenizer.json", content=b"{}")
def test_other_content_is_refused_or_harmless(folder: Path, name: str, content: bytes) -> None:
    with Changed(folder / name, content):
        model = loaded(load_model, folder)
        assert model is None or name != "config.json"
        processor = loaded(load_processor, folder)
        assert processor is None or name != "tokenizer.json"


# --- weights


@LOADS
@given(
    keep=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), max_size=3), deep=st.booleans()
)
@example(keep=0.0, flips=[], deep=True)
@example(keep=0.5, flips=[], deep=True)
def test_damaged_weights_are_refused_or_read_as_they_are(
    folder: Path, keep: float, flips: list[tuple[float, int]], deep: bool
) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    reach = len(content) - 1 if deep else length + 7
    for place, bit in flips:
        content[int(place * reach)] ^= 1 << bit
    content = content[: int(len(content) * keep)] if keep < 0.9 else content
    with Changed(folder / WEIGHTS, bytes(content)):
        model = loaded(load_model, folder)
        if model is not None:
            assert_holds(model, folder / WEIGHTS)


TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "header",
    [
        {},
        {TENSOR: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {TENSOR: {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}},
        {TENSOR: {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {TENSOR: {"dtype": "F32", "shape": "x", "data_offsets": None}},
        {TENSOR: {"dtype": "EVIL", "shape": [2], "data_offsets": [0, 8]}},
        {TENSOR: {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}},
        {TENSOR: {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"model.layers.999999999.x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"model.layers.99999999999999999999.x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"__metadata__": {"format": "flax"}, TENSOR: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"__metadata__": 5, TENSOR: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"../../x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
    ],
)
def test_hostile_headers_are_refused(folder: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    with Changed(folder / WEIGHTS, struct.pack("<Q", len(text)) + text + bytes(8)):
        assert loaded(load_model, folder) is None


@pytest.mark.parametrize(
    "start", [b"", b"x" * 40, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 9) + b'{"a":' + b"[" * 9**5]
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, start: bytes) -> None:
    with Changed(folder / WEIGHTS, start):
        assert loaded(load_model, folder) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(TENSOR),
        lambda tensors: tensors.update({TENSOR: tensors[TENSOR].T.contiguous()}),
        lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:3].contiguous()}),
        lambda tensors: tensors.update({TENSOR: tensors[TENSOR].to(torch.int8)}),
        lambda tensors: tensors.update({TENSOR: tensors[TENSOR] > 0}),
        lambda tensors: tensors.update({"model.layers.1.mlp.third.weight": torch.zeros(2)}),
        lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": torch.zeros(32)}),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.0." in name],
    ],
    ids=["missing", "turned", "shorter", "int8", "bool", "unknown", "another layer", "no first layer"],
)
def test_tensors_that_are_not_the_models_are_refused(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    other = folder.parent / "other.safetensors"
    save_file(tensors, other, metadata={"format": "pt"})
    with Changed(folder / WEIGHTS, other.read_bytes()):
        assert loaded(load_model, folder) is None


@LOADS
@given(
    weight_map=JUNK
    | st.dictionaries(
        st.sampled_from(["lm_head.weight", TENSOR, "x"]),
        st.sampled_from(["part.safetensors", "../model/part.safetensors", "/etc/passwd", "part.bin", "x.safetensors"])
        | JUNK,
        max_size=3,
    )
)
@example(weight_map={"lm_head.weight": "part.safetensors"})
@example(weight_map={"lm_head.weight": "../model/part.safetensors"})
@example(weight_map={})
def test_an_index_names_files_of_its_folder_or_is_refused(folder: Path, weight_map: Any) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    with (
        Changed(folder / "part.safetensors", whole),
        Changed(folder / WEIGHTS, None),
        Changed(folder / "model.safetensors.index.json", index),
    ):
        model = loaded(load_model, folder)
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        assert (model is not None) == (names == {"part.safetensors"})
        if model is not None:
            assert_holds(model, folder / "part.safetensors")


# --- adapters


ADAPTER_KEYS = [
    "peft_type", "r", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "base_model_name_or_path",
    "megatron_config", "megatron_core", "lora_alpha", "use_dora", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "bias", "fan_in_fan_out", "task_type", "auto_mapping", "layers_pattern", "runtime_config",
    "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias", "eva_config", "loftq_config",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(adapter: Path) -> torch.Tensor:
    return logits(load_model(adapter))


@LOADS
@given(key=st.sampled_from(ADAPTER_KEYS), value=JUNK)
@example(key="peft_type", value="PROMPT_TUNING")
@example(key="r", value=10**9)
@example(key="rank_pattern", value={"qkv_proj": 10**9})
@example(key="target_modules", value=r"(([a-z._0-9])+)+X")
@example(key="target_modules", value=["qkv_proj"])
@example(key="target_modules", value=["qkv_proj", "o_proj", "down_proj"])
@example(key="alpha_pattern", value={"(a+)+$": 2})
@example(key="megatron_config", value={"a": 1})
@example(key="init_lora_weights", value="pissa")
@example(key="init_lora_weights", value="eva")
@example(key="layer_replication", value=[[0, 2], [0, 10**6]])
def test_a_changed_adapter_setting_is_refused_or_the_adapter_is_the_files(
    adapter: Path, tiny_dir: Path, adapted: torch.Tensor, key: str, value: Any
) -> None:
    setup = json.loads((adapter / "adapter_config.json").read_text())
    with Changed(adapter / "adapter_config.json", json.dumps({**setup, key: value}).encode()):
        try:
            model = load_model(adapter, base=str(tiny_dir) if key != "base_model_name_or_path" else None)
        except CheckpointError as error:
            assert str(adapter) in str(error) or str(value) in str(error)
            return
        stored = {
            name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
            for name, tensor in load_file(adapter / ADAPTER).items()
        }
        own = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        assert own.keys() == stored.keys()
        assert all(torch.equal(own[name], stored[name]) for name in own)
        if key not in ("lora_alpha", "use_rslora", "alpha_pattern", "fan_in_fan_out"):
            assert torch.equal(logits(model), adapted)


@LOADS
@given(
    change=st.sampled_from(["drop", "rename", "shape", "dtype", "swap", "extra"]),
    which=st.integers(0, 7),
    size=st.integers(0, 9),
)
def test_an_adapters_tensors_must_fit(adapter: Path, adapted: torch.Tensor, change: str, which: int, size: int) -> None:
    tensors = load_file(adapter / ADAPTER)
    name = sorted(tensors)[which % len(tensors)]
    if change == "drop":
        del tensors[name]
    elif change == "rename":
        tensors[name.replace("layers.", "layers.7")] = tensors.pop(name)
    elif change == "shape":
        tensors[name] = torch.zeros(size, tensors[name].shape[1])
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.float16)
    elif change == "swap":
        other = sorted(tensors)[(which + 1) % len(tensors)]
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    else:
        tensors["base_model.model.evil.lora_A.weight"] = torch.zeros(4, size)
    path = adapter.parent / "other.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with Changed(adapter / ADAPTER, path.read_bytes()):
        model = loaded(load_model, adapter)
        is_same = change == "dtype" or (change == "shape" and size == load_file(path)[name].shape[0] == 4)
        assert (model is not None) <= (is_same or change in ("shape", "swap"))
        if model is not None:
            own = {key.replace(".default", ""): value for key, value in model.state_dict().items() if "lora_" in key}
            assert all(torch.equal(own[key], value.float()) for key, value in tensors.items())


# --- the processor


NUMBERS = ["num_crops", "num_img_tokens", "crop_px", "image_mean", "image_std", "do_convert_rgb", "auto_map", "x"]


@LOADS
@given(key=st.sampled_from(NUMBERS), value=JUNK | st.lists(st.floats(), min_size=3, max_size=3))
@example(key="num_crops", value=10**9)
@example(key="num_crops", value=2.5)
@example(key="num_img_tokens", value=-1)
@example(key="num_img_tokens", value=10**30)
@example(key="crop_px", value=0)
@example(key="crop_px", value=4096)
@example(key="image_std", value=[0, 0, 0])
@example(key="image_std", value=[float("nan")] * 3)
@example(key="image_mean", value="x")
def test_a_changed_processor_setting_is_refused_or_kept(folder: Path, key: str, value: Any) -> None:
    file = folder / "preprocessor_config.json"
    with Changed(file, json.dumps({**json.loads(file.read_text()), key: value}).encode()):
        processor = loaded(load_processor, folder)
        if processor is None or key in ("do_convert_rgb", "auto_map"):
            return
        assert getattr(processor.image_processor, key) == value
        if processor.image_processor.crop_px > 400:
            return  # megabytes of pixels, a second each
        cut = processor.image_processor.preprocess(np.zeros((9, 5), dtype=np.uint8))
        assert torch.isfinite(cut["pixel_values"]).all()


@LOADS
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=4), head=st.booleans())
def test_a_damaged_tokenizer_is_refused_or_tokenizes(folder: Path, flips: list[tuple[float, int]], head: bool) -> None:
    content = bytearray((folder / "tokenizer.json").read_bytes())
    reach = 6000 if head else len(content) - 1
    for place, bit in flips:
        content[int(place * reach)] ^= 1 << bit
    with Changed(folder / "tokenizer.json", bytes(content)):
        processor = loaded(load_processor, folder)
        if processor is not None:
            assert all(isinstance(token, int) for token in processor.encode("Which <|image_1|> total?", [3]))


# --- training checkpoints


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointStore]:
    store = CheckpointStore(tmp_path_factory.mktemp("store") / "checkpoints", keep=5)
    for step in (1, 2):
        staged = store.staging / f"checkpoint-{step}"
        for name in (*REQUIRED_FILES, WEIGHTS):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_text(json.dumps({"global_step": step, "file": name}))
        store.commit(step, {"seed": 7})
    yield store


def newest_after(store: CheckpointStore, change: Callable[[Path], None]) -> int | None:
    """Changes a copy of checkpoint 2, asks for the newest, and puts everything back."""
    copy = store.root.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store.root, copy)
    changed = CheckpointStore(copy, keep=5)
    change(changed.folder(2))
    problem = find_problem(changed.folder(2))
    assert problem is None or problem
    newest = changed.newest()
    assert (newest is not None and newest.step == 2) == (problem is None)
    if newest is not None:
        assert newest.identity == {"seed": 7}
    return None if newest is None else newest.step


@FUZZ
@given(
    name=st.sampled_from([*REQUIRED_FILES, WEIGHTS, MANIFEST]),
    how=st.sampled_from(["cut", "flip", "empty", "gone", "folder", "link", "swapped"]),
    seed=st.integers(0, 10**6),
)
def test_a_damaged_checkpoint_is_never_the_newest(store: CheckpointStore, name: str, how: str, seed: int) -> None:
    def damage(folder: Path) -> None:
        dice, path = random.Random(seed), folder / name
        content = bytearray(path.read_bytes())
        path.unlink()
        if how == "cut":
            path.write_bytes(content[: dice.randrange(len(content) - 1)])
        elif how == "flip":
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
        elif how == "empty":
            path.touch()
        elif how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to("/dev/null")
        elif how == "swapped":
            shutil.copyfile(store.folder(1) / name, path)

    found = newest_after(store, damage)
    # A flipped bit of the manifest may hit what says nothing: a letter of the indentation, of a key that nobody reads.
    assert found == 1 or (name == MANIFEST and how == "flip")


RECORD = st.fixed_dictionaries({"bytes": JUNK, "sha256": JUNK}) | JUNK
HOSTILE_NAMES = st.sampled_from(["../../secret", "/etc/passwd", ".", "", "a\0b", "x" * 300, WEIGHTS, *REQUIRED_FILES])


@FUZZ
@given(
    manifest=JUNK
    | st.fixed_dictionaries(
        {"format": st.sampled_from([1, 2, 3, 10**9]), "step": JUNK, "identity": JUNK, "files": JUNK}
    )
    | st.fixed_dictionaries(
        {
            "format": st.sampled_from([1, 2]),
            "identity": JUNK,
            "files": st.dictionaries(HOSTILE_NAMES, RECORD, max_size=4),
        }
    )
)
@example(manifest=[])
@example(manifest={"format": 2, "files": []})
@example(manifest={"format": 2, "files": {name: {"bytes": 2**70, "sha256": "x"} for name in REQUIRED_FILES}})
@example(manifest={"format": 2, "files": dict.fromkeys(REQUIRED_FILES, 5)})
def test_a_hostile_manifest_makes_no_checkpoint(store: CheckpointStore, manifest: Any) -> None:
    assert newest_after(store, lambda folder: (folder / MANIFEST).write_text(json.dumps(manifest)) and None) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"\xff\xfe",
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_a_manifest_that_is_no_json_makes_no_checkpoint(store: CheckpointStore, content: bytes) -> None:
    assert newest_after(store, lambda folder: (folder / MANIFEST).write_bytes(content) and None) == 1


def test_a_manifest_reads_no_file_outside_its_checkpoint(store: CheckpointStore) -> None:
    """Were it followed, files of any place could be compared with a guess."""
    (store.root.parent / "secret").write_bytes(b"secret")

    def point_outside(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"]["../../secret"] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    assert newest_after(store, point_outside) == 1


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Any:
    return load_model(tiny_dir)


@FUZZ
@given(keep=st.floats(0, 0.999), flip=st.floats(0, 1), drop=st.booleans())
def test_damaged_weights_are_not_restored(folder: Path, model: Any, keep: float, flip: float, drop: bool) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[int(flip * (length + 7))] ^= 1
    damaged = None if drop else bytes(content[: int(len(content) * keep)])
    with Changed(folder / WEIGHTS, damaged), pytest.raises(CheckpointError, match=str(folder)):
        restore_weights(model, folder)
