"""An exported folder says what the original says, and is read natively whatever it points to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from phi3v.export.layout import (
    CODE_REPOSITORY,
    point_to_published_code,
    settle_rope_factors,
    settle_stop_tokens,
)
from phi3v.model.checkpoint import load_model, load_processor, save_model
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

SHORT_POSITIONS = 16
"""Where the short factors end in the models of these tests."""


@pytest.fixture
def folder(golden_dir: Path, tmp_path: Path) -> Path:
    """The golden model, saved and pointing to the published code."""
    saved = save_model(load_model(golden_dir), load_processor(golden_dir), tmp_path / "saved")
    point_to_published_code(saved)
    return saved


def settings_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_the_pointers_are_the_published_ones(name: str, folder: Path, golden_dir: Path) -> None:
    published = settings_of(golden_dir / name)["auto_map"]
    assert settings_of(folder / name)["auto_map"] == {
        key: f"{CODE_REPOSITORY}--{value}" for key, value in published.items()
    }


def test_pointers_change_nothing_else(folder: Path, golden_dir: Path, tmp_path: Path) -> None:
    plain = save_model(load_model(golden_dir), load_processor(golden_dir), tmp_path / "plain")
    for file in plain.glob("*.json"):
        with_pointers = settings_of(folder / file.name)
        with_pointers.pop("auto_map", None)
        assert with_pointers == settings_of(file), file.name
    assert {file.name for file in folder.iterdir()} - {file.name for file in plain.iterdir()} == {
        "processor_config.json"
    }


def test_the_published_code_finds_no_key_that_it_does_not_know(folder: Path, golden_dir: Path) -> None:
    """``vision_config`` is the one addition, of models that the published code does not load anyway."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"):
        added = settings_of(folder / name).keys() - settings_of(golden_dir / name).keys()
        known = {"vision_config", "transformers_version", "architectures"}
        # What the published configuration class takes, with these very values, where its file leaves it out.
        defaults = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": True, "tie_word_embeddings": False}
        unknown = {key for key in added - known if settings_of(folder / name)[key] != defaults.get(key)}
        assert unknown <= {"output_attentions", "output_hidden_states", "pad_token_id", "sliding_window"}, name


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a loader asked the network or the user")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("builtins.input", refuse)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_no_loader_of_ours_follows_the_pointers(options: dict[str, Any], folder: Path, golden_dir: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder, **options)) is Phi3VConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder, **options)) is Phi3VForCausalLM
    processor = AutoProcessor.from_pretrained(folder, **options)
    assert type(processor) is Phi3VProcessor
    of_golden = load_processor(golden_dir)
    assert processor.encode("a<|image_1|>b", [3]) == of_golden.encode("a<|image_1|>b", [3])
    assert AutoTokenizer.from_pretrained(folder).encode("Hi there") == of_golden.encode("Hi there")
    assert "auto_map" not in load_model(folder).config.to_dict()


def test_saving_such_a_folder_again_leaves_the_pointers_out(folder: Path, tmp_path: Path) -> None:
    again = save_model(load_model(folder), load_processor(folder), tmp_path / "again")
    assert not [file.name for file in again.glob("*.json") if "auto_map" in file.read_text("utf-8")]


def test_answers_stop_where_the_tokenizer_says(tiny_model: Any, processor: Phi3VProcessor, tmp_path: Path) -> None:
    tiny_model.config.eos_token_id = tiny_model.generation_config.eos_token_id = 5
    settle_stop_tokens(tiny_model, processor)
    saved = save_model(tiny_model, processor, tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert settings_of(saved / name)["eos_token_id"] == [32000, 32007]


@pytest.fixture
def early_long_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    """The small model, whose long factors begin at 17 positions; the scale of its cosines is not 1."""
    copied = Path(shutil.copytree(tiny_dir, tmp_path / "early"))
    settings = settings_of(copied / "config.json")
    settings |= {"original_max_position_embeddings": SHORT_POSITIONS, "max_position_embeddings": 512}
    (copied / "config.json").write_text(json.dumps(settings))
    return copied


@torch.no_grad()
@pytest.mark.parametrize("mode", ["short", "long"])
def test_a_fixed_mode_is_what_every_loader_gets(
    mode: Any, early_long_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    """The loader chooses by length, as all do: on both sides of the limit it gets the mode's factors."""
    model: Any = load_model(early_long_dir)
    settle_rope_factors(model, mode)
    saved = save_model(model, processor, tmp_path / "saved")
    loaded, fixed = load_model(saved), load_model(early_long_dir, rope_mode=mode)
    for length in (SHORT_POSITIONS, SHORT_POSITIONS + 5):
        ids = torch.arange(100, 100 + length)[None]
        assert torch.equal(loaded(ids).logits, fixed(ids).logits)
    # Lowering max_position_embeddings forces the short factors too, but with another scale.
    settings = settings_of(early_long_dir / "config.json") | {"max_position_embeddings": SHORT_POSITIONS}
    (early_long_dir / "config.json").write_text(json.dumps(settings))
    ids = torch.arange(100, 100 + SHORT_POSITIONS)[None]
    assert (load_model(early_long_dir, rope_mode="short")(ids).logits - fixed(ids).logits).abs().max() > 1e-3


def test_auto_keeps_the_published_factors(tiny_model: Any, processor: Phi3VProcessor, tmp_path: Path) -> None:
    before = tiny_model.config.to_dict()["rope_scaling"]
    settle_rope_factors(tiny_model, "auto")
    saved = save_model(tiny_model, processor, tmp_path / "saved")
    assert settings_of(saved / "config.json")["rope_scaling"] == before
    assert before["short_factor"] != before["long_factor"]
