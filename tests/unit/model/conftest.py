"""Fixtures of the model room: a model that outgrows its short LongRoPE factors after 64 positions."""

import json
import shutil
from pathlib import Path

import pytest

from phi3v.model.checkpoint import load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

LIMIT = 64
"""Positions that the short factors hold for."""


@pytest.fixture(scope="session")
def limited_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_dir`` with ``original_max_position_embeddings`` 64."""
    folder = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("limited") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "original_max_position_embeddings": LIMIT}))
    return folder


@pytest.fixture
def limited_model(limited_dir: Path) -> Phi3VForCausalLM:
    """The model of ``limited_dir``, in evaluation mode; each test's own."""
    model = load_model(limited_dir)
    assert isinstance(model, Phi3VForCausalLM)
    return model
