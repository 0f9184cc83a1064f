"""The same seed gives the same losses, whatever prepares the samples and wherever the run is taken up again."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.arguments import EXIT_STOPPED
from phi3v.train.trainer import Phi3VTrainer
from training import final_weights, logged, make_config, train_in_child, write_shared_data


def stop_at_call(number: int) -> None:
    """Makes this process ask itself to stop in its micro-batch of this number, 1-based."""
    compute_loss, calls = Phi3VTrainer.compute_loss, iter(range(1, 1_000_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(*args, **kwargs)

    Phi3VTrainer.compute_loss = call


@pytest.mark.slow
def test_losses_depend_on_no_worker_and_no_resume(tiny_dir: Path, tmp_path: Path) -> None:
    """Windows of 5, 5 and 3 samples, in one to three micro-batches each; taken up in the middle of the second epoch."""
    data = write_shared_data(tmp_path / "data")
    settings = {"batch_size": 5, "shared_questions": 4, "micro_batch_size": None, "micro_batch_tokens": 150}
    for num_workers in (0, 2):
        run = tmp_path / f"workers-{num_workers}"
        assert train_in_child(make_config(tiny_dir, data, run, num_workers=num_workers, **settings)) == 0
    resumed = make_config(tiny_dir, data, tmp_path / "resumed", num_workers=1, save_steps=None, **settings)
    assert train_in_child(resumed, lambda: stop_at_call(9)) == EXIT_STOPPED
    stopped_at = len(logged(tmp_path / "resumed"))
    assert 3 < stopped_at < 6
    one_more = make_config(tiny_dir, data, tmp_path / "resumed", num_workers=2, save_steps=None, **settings)
    assert train_in_child(one_more) == 0

    expected, weights = logged(tmp_path / "workers-0"), final_weights(tmp_path / "workers-0")
    assert len({line["loss"] for line in expected}) == 6
    for name in ("workers-2", "resumed"):
        assert logged(tmp_path / name) == expected, name
        found = final_weights(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in weights.items()), name
