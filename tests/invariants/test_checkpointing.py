"""Recomputing activations changes memory and time, and no number."""

from pathlib import Path

import pytest

from phi3v.train.run import run_training
from training import final_weights, largest_difference, logged, make_config, write_training_data


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_checkpointing_on_equals_off(method: str, wide_dir: Path, tmp_path: Path) -> None:
    """With dropout in the adapters, too: the recomputation draws the same masks."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    data = write_training_data(tmp_path / "data")
    dropout = {} if method == "full" else {"lora_rank": 2, "lora_dropout": 0.3}
    off, *on = (
        run_training(
            make_config(
                wide_dir,
                data,
                tmp_path / checkpointing,
                method=method,
                checkpointing=checkpointing,
                max_steps=3,
                save_steps=None,
                **dropout,
            )
        )
        for checkpointing in ("off", "selective", "full")
    )
    for run in on:
        assert [line["loss"] for line in logged(run)] == [line["loss"] for line in logged(off)]
        assert largest_difference(final_weights(run), final_weights(off)) == 0.0
