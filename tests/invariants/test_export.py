"""exported == trained, from training to the exported folder through the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from phi3v.cli import main
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.model.checkpoint import load_model, load_processor
from training import alone, write_training_data

TRAINING = (
    *("--batch_size", "4", "--num_train_epochs", "2", "--learning_rate", "1e-3", "--num_workers", "0"),
    *("--device", "cpu", "--save_steps", "none", "--report_to", "none", "--shared_questions", "1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("method", [("full",), ("lora", "--lora_rank", "4")], ids=lambda method: method[0])
def test_exported_equals_trained(method: tuple[str, ...], tiny_dir: Path, tmp_path: Path) -> None:
    """The reference loads both by itself, the exported one as a stranger would, and asks them everything."""
    data = write_training_data(tmp_path / "data")
    run, exported = tmp_path / "run", tmp_path / "exported"
    where = ("--model", str(tiny_dir), "--train_data", str(data / "train.jsonl"), "--output_dir", str(run))
    assert main(["train", *where, *TRAINING, "--method", *method]) == 0
    assert main(["export", str(run), str(exported), "--auto_map", "--samples", "2"]) == 0

    trained: Any = load_model(run / "model")
    stranger: Any = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    processor = AutoProcessor.from_pretrained(exported)
    ours = SampleEncoder(load_processor(run / "model"))
    dataset = ConversationDataset(data / "train.jsonl")
    for index in range(len(dataset)):
        sample = dataset[index]
        images = dataset.load_images(sample)
        batch, other = (alone(encoder.encode(sample, images)) for encoder in (ours, SampleEncoder(processor)))
        assert all(torch.equal(batch[name], other[name]) for name in batch | other)
        with torch.no_grad():
            torch.testing.assert_close(stranger(**other).logits, trained(**batch).logits, atol=1e-4, rtol=1e-4)
        asked = {name: tensor for name, tensor in batch.items() if name != "labels"}
        answers = [model.generate(**asked, max_new_tokens=5, do_sample=False) for model in (stranger, trained)]
        assert torch.equal(*answers)
