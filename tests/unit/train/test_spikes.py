"""A spike in a real run: found, put down to its samples, and, where asked for, not trained on."""

import json
from pathlib import Path

import pytest

import phi3v.train.tripwire as tripwire
from commands import Forked
from phi3v.errors import Phi3VError
from phi3v.report import write_report
from phi3v.runlog import RunDirectory
from phi3v.train.order import Shuffled
from phi3v.train.run import run_training
from training import make_config

SPIKE_STEP = 56
BATCH = 2
NUM_SAMPLES = 118

SETTINGS = {
    "batch_size": BATCH, "micro_batch_size": 1, "num_train_epochs": 1, "learning_rate": 3e-2, "save_steps": 52,
    "lr_scheduler": "constant", "freeze": ["vision", "projector"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that all have one answer, but for one that comes up in step ``SPIKE_STEP``."""
    folder = tmp_path_factory.mktemp("spikes")
    odd = Shuffled(NUM_SAMPLES, seed=0).of(0)[BATCH * (SPIKE_STEP - 1) + 1]
    lines = []
    for number in range(NUM_SAMPLES):
        answer = "Z" if number == odd else "yes"  # as long as the others, so that the second process gets it
        turn = {"user": "Is it?", "assistant": answer}
        lines.append(json.dumps({"id": f"odd-{number}" if number == odd else str(number), "conversations": [turn]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def _short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short enough that the early fall of the loss is out of sight by then."""
    monkeypatch.setattr(tripwire, "WARM_UP_STEPS", 30)
    monkeypatch.setattr(tripwire, "RECENT_STEPS", 30)


@pytest.mark.usefixtures("_short_memory")
def test_a_spike_is_put_down_to_its_samples_also_after_a_resume(
    tiny_dir: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Phi3VError) as caught:
        run_training(make_config(tiny_dir, data, tmp_path / "run", on_loss_spike="stop", **SETTINGS))
    message = str(caught.value)
    assert message.startswith(f"step {SPIKE_STEP}: the loss is ") and "odd-" in message
    assert "--on_loss_spike warn" in message and "checkpoint-52" in message
    run = RunDirectory(tmp_path / "run")
    assert run.steps()[-1]["step"] == SPIKE_STEP - 1
    (stopped,) = run.spikes()

    run_training(make_config(tiny_dir, data, tmp_path / "run", on_loss_spike="warn", **SETTINGS))
    (spike,) = (line for line in run.spikes() if line["step"] == SPIKE_STEP)
    assert (stopped["is_taken"], spike["is_taken"]) == (False, True)
    assert {**stopped, "is_taken": True} == spike
    logged = next(line for line in run.steps() if line["step"] == SPIKE_STEP)
    assert spike["loss"] == pytest.approx(logged["loss"], rel=1e-5) and spike["loss"] > spike["loss_limit"]
    assert spike["learning_rate"] == logged["learning_rate"]
    assert len(spike["samples"]) == BATCH and set(spike["worst_samples"]) < set(spike["samples"])
    assert spike["worst_samples"][0].startswith("odd-")
    assert spike["worst_loss"] == pytest.approx(2 * spike["loss"], rel=0.1)  # the other sample's loss is nearly 0
    assert f"step {SPIKE_STEP}: the loss is" in capfd.readouterr().err
    assert "odd-" in write_report(run.path).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("_short_memory")
@pytest.mark.parametrize("on_loss_spike", ["warn", "stop"])
def test_two_processes_find_the_same_culprit(on_loss_spike: str, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """The odd sample is one process's, and the other one stops too."""
    config = make_config(tiny_dir, data, tmp_path / "run", on_loss_spike=on_loss_spike, **SETTINGS)
    start = Forked(config, num_processes=2)
    stops = on_loss_spike == "stop"
    assert start.wait() == [int(stops)] * 2, start.output
    (spike,) = (line for line in start.run.spikes() if line["step"] == SPIKE_STEP)
    assert spike["is_taken"] is not stops
    assert len(spike["worst_samples"]) == 1 and spike["worst_samples"][0].startswith("odd-")
    assert start.run.steps()[-1]["step"] == (SPIKE_STEP - 1 if stops else NUM_SAMPLES // BATCH)
