"""An adapter at its start computes what the base does, in memory and after a save and a reload."""

from pathlib import Path

import pytest
import torch

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.model.checkpoint import load_four_bit_model, load_model, save_model
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.room import build_model
from phi3v.train.tuning import choose_precision
from training import alone, make_config, write_training_data


@torch.no_grad()
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapter_at_its_start_equals_the_base(
    method: str, use_dora: bool, wide_dir: Path, processor: Phi3VProcessor, tmp_path: Path
) -> None:
    """In memory that is the base as it is trained on, in 4 bit for qlora; once saved it stands on the base itself.

    DoRA's magnitudes are then the lengths of the 4-bit rows, which differ from the base's own by half a percent.
    """
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    dataset = ConversationDataset(write_training_data(tmp_path / "data") / "train.jsonl")
    batch = alone(SampleEncoder(processor).encode(dataset[2], dataset.load_images(dataset[2])))
    base = load_model(wide_dir)(**batch)
    config = make_config(wide_dir, tmp_path / "data", tmp_path / "run", method=method, lora_rank=4, use_dora=use_dora)
    adapted = build_model(config, choose_precision(config, "cpu"), torch.device("cpu")).eval()
    trained_on = load_four_bit_model(wide_dir, dtype="float32")(**batch) if method == "qlora" else base
    assert torch.equal(adapted(**batch).logits, trained_on.logits)
    reloaded = load_model(save_model(adapted, processor, tmp_path / "adapter"))
    if method == "qlora" and use_dora:
        off = (reloaded(**batch).logits - base.logits).norm() / base.logits.norm()
        assert 1e-4 < off < 0.2 * (trained_on.logits - base.logits).norm() / base.logits.norm()
        return
    assert torch.equal(reloaded(**batch).logits, base.logits)
    assert torch.equal(reloaded(**batch).loss, base.loss)
