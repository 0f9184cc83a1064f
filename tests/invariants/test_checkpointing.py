"""Recomputing activations changes memory and time, and no number."""

from pathlib import Path

import pytest

from phi3v.train.run import run_training
from training import final_weights, largest_difference, logged, make_config, write_training_data


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_gradient_checkpointing_on_equals_off(method: str, wide_dir: Path, tmp_path: Path) -> None:
    """With dropout in the adapters, too: the recomputation draws the same masks."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    data = write_training_data(tmp_path / "data")
    dropout = {} if method == "full" else {"lora_rank": 2, "lora_dropout": 0.3}
    on, off = (
        run_training(
            make_config(
                wide_dir,
                data,
                tmp_path / str(is_on),
                method=method,
                gradient_checkpointing=is_on,
                max_steps=3,
                save_steps=None,
                **dropout,
            )
        )
        for is_on in (True, False)
    )
    assert [line["loss"] for line in logged(on)] == [line["loss"] for line in logged(off)]
    assert largest_difference(final_weights(on), final_weights(off)) == 0.0
