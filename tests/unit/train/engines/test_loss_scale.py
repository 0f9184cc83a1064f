"""fp16's loss scale: torch's own where nothing is shared out, and all processes leave out a step together."""

import os
import traceback
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from packs import Pack, Question
from phi3v.model.compute import Compute
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import is_never_used
from phi3v.train.engines import loss_scale
from phi3v.train.engines.engine import AVERAGES, gradient_norm
from phi3v.train.engines.fully_sharded import FullySharded
from phi3v.train.engines.loss_scale import FIRST_SCALE, ScaledSteps

LEARNING_RATE = 1e-3


def adamw(model: nn.Module) -> torch.optim.AdamW:
    # A large epsilon keeps updates proportional to the gradients: rounding stays rounding.
    trained = [one for one in model.parameters() if one.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=1e-2)


def test_steps_and_scales_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps_to_grow = 40
    monkeypatch.setattr(loss_scale, "STEPS_TO_GROW", steps_to_grow)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    scaled, plain = ScaledSteps(adamw(ours)), adamw(theirs)
    scaler = torch.amp.GradScaler("cpu", growth_interval=steps_to_grow)  # pyright: ignore[reportPrivateImportUsage]
    for step in range(2 * steps_to_grow + 20):
        inputs = torch.randn(4, 3)
        blows_up = step in (3, 4, steps_to_grow)
        for model, scale in ((ours, scaled.scale), (theirs, scaler.get_scale() if step else FIRST_SCALE)):
            model.zero_grad()
            (model(inputs).pow(2).mean() * scale * (float("inf") if blows_up else 1.0)).backward()
        scaled.unscale(ours.parameters())
        scaled.see(float(gradient_norm(list(ours.parameters()), 1.0)))
        scaled.step()
        scaler.scale(torch.zeros(()))  # makes its scale
        scaler.unscale_(plain)
        gradient_norm(list(theirs.parameters()), 1.0)
        scaler.step(plain)
        scaler.update()
        assert scaled.scale == scaler.get_scale()
        assert scaled.step_was_skipped == blows_up
    assert scaled.scale == FIRST_SCALE / 4  # halved three times, doubled once
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def in_two_processes(work: Callable[[int], dict[str, torch.Tensor]], folder: Path) -> list[dict[str, torch.Tensor]]:
    """Forks two processes that talk through gloo; returns what each found."""
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                store = distributed.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]
                distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)  # pyright: ignore[reportPrivateImportUsage]
                save_file(work(rank), folder / f"{rank}.safetensors")
                distributed.barrier()
                code = 0
            except BaseException:  # noqa: BLE001  a child must never return into pytest
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.fixture
def model(tiny_model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    copy = deepcopy(tiny_model).train()
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(not is_never_used(name, copy.config.vision_config.num_hidden_layers))
    return copy


def packs_of(model: Phi3VForCausalLM) -> list[Any]:
    """One micro-batch for each of two processes."""
    questions = [Question((0,), 9, 3), Question((), 7, 2)]
    return [Pack(model.config, [(1, 1)], wholes=questions, seed=rank).packed() for rank in range(2)]


def test_sharded_processes_leave_out_a_step_together_and_then_learn(model: Phi3VForCausalLM, tmp_path: Path) -> None:
    packs = packs_of(model)

    def work(rank: int) -> dict[str, torch.Tensor]:
        model.compute = Compute(is_sharded=True)
        engine = FullySharded(model, adamw, device=torch.device("cpu"), dtype=torch.float16)
        found: dict[str, torch.Tensor] = {}
        for step in range(3):
            # At first one process's gradient overflows, and only its own.
            factor = 1e30 if step == 0 and rank == 1 else 1.0
            engine.run(lambda factor=factor: engine.module(packed=packs[rank]).loss * factor, is_last=True)
            found[f"norm {step}"] = engine.clip(1.0)
            engine.optimizer.step()
            engine.module.zero_grad()
            if step == 0:
                assert engine.scaling() == {"scale": FIRST_SCALE / 2, "steps": 0}
                assert engine.num_steps() == 0
                assert all(not tensor.any() for *_, tensor in engine.averages())
        assert engine.scaling() == {"scale": FIRST_SCALE / 2, "steps": 2}
        found |= {name: tensor.clone() for name, tensor in engine.weights(has_frozen=False)}
        averages = {f"{name}.{average}": tensor.clone() for name, average, tensor in engine.averages()}
        # A checkpoint's way back: into an engine that has not stepped.
        engine.optimizer.state.clear()
        engine.load(lambda name, average: averages[f"{name}.{average}"], 2)
        engine.load_scaling({"scale": 8.0, "steps": 5})
        assert engine.scaling() == {"scale": 8.0, "steps": 5} and engine.num_steps() == 2
        restored = {f"{name}.{average}": tensor for name, average, tensor in engine.averages()}
        assert len(restored) == len(AVERAGES) * len(averages) / 2
        assert all(torch.equal(restored[name], averages[name]) for name in averages)
        return found

    one, other = in_two_processes(work, tmp_path)
    assert not torch.isfinite(one.pop("norm 0")) and not torch.isfinite(other.pop("norm 0"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    plain = deepcopy(model)
    before = {name: tensor.detach().clone() for name, tensor in plain.named_parameters()}
    optimizer = adamw(plain)
    for step in (1, 2):
        torch.stack([plain(packed=batch).loss / 2 for batch in packs]).sum().backward()
        norm = gradient_norm([one for one in plain.parameters() if one.requires_grad], 1.0)
        assert float(one[f"norm {step}"]) == pytest.approx(float(norm), rel=1e-2)
        optimizer.step()
        plain.zero_grad()
    expected = {name: tensor - before[name] for name, tensor in plain.named_parameters() if tensor.requires_grad}
    moved = torch.cat([(one[name] - before[name]).flatten() for name in expected])
    exact = torch.cat([tensor.flatten() for tensor in expected.values()])
    assert (moved - exact).norm() < 2e-2 * exact.norm()
