"""An adapter at its start computes what the base does, in memory and after a save and a reload."""

from pathlib import Path

import torch

from phi3v.data.collate import Collator
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.model.checkpoint import load_model, save_model
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.run import build_model
from phi3v.train.tuning import choose_precision
from training import make_config, write_training_data


@torch.no_grad()
def test_adapter_at_its_start_equals_the_base(tiny_dir: Path, processor: Phi3VProcessor, tmp_path: Path) -> None:
    dataset = ConversationDataset(write_training_data(tmp_path / "data") / "train.jsonl")
    encode = SampleEncoder(processor).encode
    samples = [encode(dataset[index], dataset.load_images(dataset[index])) for index in range(4)]
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    del batch["loss_weights"]
    base = load_model(tiny_dir)(**batch)
    config = make_config(tiny_dir, tmp_path / "data", tmp_path / "run", method="lora", lora_rank=4)
    adapted = build_model(config, choose_precision(config, "cpu"), torch.device("cpu")).eval()
    assert torch.equal(adapted(**batch).logits, base.logits)
    reloaded = load_model(save_model(adapted, processor, tmp_path / "adapter"))
    assert torch.equal(reloaded(**batch).logits, base.logits)
    assert torch.equal(reloaded(**batch).loss, base.loss)
