"""kill -9, hundreds of times: every run, taken up again after each kill, must end as an undisturbed one, bit for bit.

    python benchmarks/faults.py --kills 300      # about ten minutes on two CPU cores

A tiny model trains in one process or in two (gloo), with a checkpoint after every step. A kill meets all processes or
one of two, at a random moment: in a start's first seconds, or while a checkpoint is written. Between kills the same
command starts again; after some of them the run is let to its end and compared.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from commands import Forked, kill
from conftest import tiny_model_config, write_random_model
from phi3v.config import TrainConfig
from phi3v.train.checkpoints.store import CheckpointStore
from training import final_weights, logged, make_config, write_training_data

SETTINGS = {
    "num_train_epochs": 10, "save_steps": 1, "num_workers": 1, "freeze": ["embeddings", "head"], "progress": False,
}  # fmt: skip
FIRST_SECONDS = 4.0
"""A start's time in which a kill meets it: opening the data, loading the model, and some steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="kills in all")
    parser.add_argument("--kills_a_run", type=int, default=10, metavar="N", help="kills before a run is let to its end")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and victims")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(options.seed)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_random_model(tiny_model_config(), folder / "model")
        data = write_training_data(folder / "data")
        undisturbed = {}
        for num_processes in (1, 2):
            config = make_config(model, data, folder / f"whole-{num_processes}", **SETTINGS)
            assert set(Forked(config, num_processes).wait(300)) == {0}
            undisturbed[num_processes] = config.output_dir
        while counts["kills"] < options.kills:
            num_processes = 1 + counts["runs"] % 2
            config = make_config(model, data, folder / f"run-{counts['runs']}", **SETTINGS)
            kill_often(config, num_processes, options.kills_a_run, dice, counts)
            final = Forked(config, num_processes)
            assert set(final.wait(300)) == {0}, final.output
            counts["runs"] += 1
            counts["runs unlike the undisturbed one"] += not are_equal(undisturbed[num_processes], config.output_dir)
            print(f"{time.monotonic() - started:.0f} s: {describe(counts)}", flush=True)


def kill_often(config: TrainConfig, num_processes: int, kills: int, dice: random.Random, counts: Counter[str]) -> None:
    """Starts a run so often, and kills it every time."""
    store = CheckpointStore(config.output_dir / "checkpoints", config.keep_checkpoints)
    for _ in range(kills):
        start = Forked(config, num_processes)
        if dice.random() < 0.5:
            is_met = start.until(lambda: any(store.root.glob(".saving/*")))
            time.sleep(0.15 * dice.random())
        else:
            deadline = time.monotonic() + FIRST_SECONDS * dice.random()
            is_met = start.until(lambda deadline=deadline: time.monotonic() > deadline)
        if not is_met:
            assert set(start.wait(300)) == {0}, start.output
            return  # the run is over
        saved = max([0, *store.steps()])
        victims = start.ranks() if num_processes == 1 or dice.random() < 0.5 else [dice.choice(start.ranks())]
        for pid in victims:
            kill(pid)
        counts["had to be ended as torchrun does"] += end_rest(start)
        after = max([0, *store.steps()])
        assert after >= saved, "a checkpoint was lost"
        counts["kills"] += 1
        counts["of one process of two"] += len(victims) < num_processes
        counts["while a checkpoint was written"] += any(store.root.glob(".saving/*"))
        last_logged = max((line["step"] for line in start.run.steps()), default=0)
        counts[f"lost {max(0, last_logged - after)} logged steps"] += 1


def end_rest(start: Forked) -> bool:
    """Waits for processes that lost another one; returns whether they did not end by themselves within 5 s.

    Those are told to by SIGTERM and, 30 s later, killed, as torchrun does: a process that has not met the others yet
    waits for them.
    """
    for wait_s, number in ((5, signal.SIGTERM), (30, signal.SIGKILL)):
        deadline = time.monotonic() + wait_s
        while None in start.codes():
            if time.monotonic() > deadline:
                for pid, code in zip(start.ranks(), start.codes(), strict=True):
                    if code is None:
                        kill(pid, number)
                break
            time.sleep(0.01)
        else:
            return number == signal.SIGKILL
    start.wait()
    return True


def are_equal(undisturbed: Path, run: Path) -> bool:
    expected, found = final_weights(undisturbed), final_weights(run)
    same_weights = expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    return same_weights and logged(run) == logged(undisturbed)


def describe(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))


if __name__ == "__main__":
    main()
