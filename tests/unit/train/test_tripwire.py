"""What is a spike and what is not: noise of every kind and an early fall raise no alarm."""

import json
import math
import random
from collections.abc import Callable

import pytest

from phi3v.train.tripwire import WARM_UP_STEPS, Tripwire

NOISE: dict[str, Callable[[random.Random, int], float]] = {
    "normal": lambda dice, step: dice.gauss(0.5, 0.05),
    "long tail": lambda dice, step: dice.expovariate(2),
    "a few samples a step": lambda dice, step: dice.gammavariate(4, 0.1),
    "a tenth of the data is hard": lambda dice, step: dice.gauss(3, 0.3) if dice.random() < 0.1 else 0.1,
    "early fall": lambda dice, step: 10 * math.exp(-step / 30) + 0.5 + dice.gauss(0, 0.05),
    "learnt by heart": lambda dice, step: 1e-4 * dice.lognormvariate(0, 1),
    "the same every time": lambda dice, step: 0.7,
}


@pytest.mark.parametrize("kind", NOISE)
def test_ordinary_noise_is_no_spike_and_a_real_one_is(kind: str) -> None:
    dice, tripwire = random.Random(0), Tripwire()
    norms = random.Random(1)
    for step in range(5000):
        assert tripwire.see(NOISE[kind](dice, step), norms.lognormvariate(0, 0.7)) is None, step
    spike = tripwire.see(20.0, 1.0)
    assert spike is not None and spike.loss_range is not None and spike.norm_range is None
    assert spike.loss_range.median < spike.loss_range.limit < 20
    assert "the loss is 20, where at most" in str(spike)
    of_norm = tripwire.see(NOISE[kind](dice, 5000), 1e4)
    assert of_norm is not None and of_norm.norm_range is not None and of_norm.loss_range is None
    assert of_norm.norm_range.median == pytest.approx(1, rel=0.3)


def test_a_lasting_change_of_level_is_reported_a_few_times_and_then_is_the_level() -> None:
    tripwire = Tripwire()
    alarms = [tripwire.see(loss, 1.0) is not None for loss in [0.5] * 100 + [5.0] * 300]
    assert 1 <= sum(alarms) <= 6 and not any(alarms[130:])


def test_nothing_is_a_spike_before_there_is_something_to_compare_with() -> None:
    tripwire = Tripwire()
    assert all(tripwire.see(0.5, 1.0) is None for _ in range(WARM_UP_STEPS - 1))
    assert tripwire.see(50.0, 1.0) is None
    assert Tripwire().see(float("nan"), float("inf")) is None


def test_a_resumed_run_goes_on_where_the_log_ends() -> None:
    dice = random.Random(2)
    losses = [dice.gauss(0.5, 0.05) for _ in range(120)] + [3.0]
    history = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, start=1)]
    whole = Tripwire()
    for loss in losses:
        whole.see(loss, 1.0)
    stored = json.loads(json.dumps([*history, {"step": 121, "eval_score": 0.5}]))
    resumed = Tripwire(stored)
    for loss in (0.6, 1.2, 2.5, 0.5, 9.0):
        assert resumed.see(loss, 1.0) == whole.see(loss, 1.0)
    of_means = Tripwire([{"step": 10 * number, "loss": 0.5, "grad_norm": 1.0} for number in range(1, 100)])
    assert of_means.see(50.0, 1.0) is None  # means over ten steps say little about the noise of one
