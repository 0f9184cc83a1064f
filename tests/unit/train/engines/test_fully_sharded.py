"""FSDP2: weights that stay whole during a step change nothing."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from engines import adamw, in_two_processes, packs_of
from phi3v.model.compute import Compute
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import part_of
from phi3v.train.engines.fully_sharded import FullySharded


@pytest.mark.parametrize(
    ("dtype", "frozen"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "vision")]
)
def test_weights_that_stay_whole_change_nothing(
    dtype: torch.dtype, frozen: str | None, model: Phi3VForCausalLM, tmp_path: Path
) -> None:
    packs = packs_of(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and part_of(name) != frozen)

    def take_steps(rank: int, keeps_weights: bool) -> dict[str, torch.Tensor]:
        copy = deepcopy(model)
        copy.compute = Compute(is_sharded=True)
        engine = FullySharded(copy, adamw, device=torch.device("cpu"), dtype=dtype, keeps_weights=keeps_weights)
        assert all(isinstance(one, DTensor) for one in copy.parameters())
        found: dict[str, torch.Tensor] = {}
        for step in range(3):
            # Two micro-batches on each process, and each process has its own order.
            for place, pack in enumerate((packs[rank], packs[1 - rank])):
                loss = engine.run(lambda pack=pack: engine.module(packed=pack).loss, is_last=place == 1)
                found[f"loss {step} {place}"] = loss
                is_whole = not any(isinstance(one, DTensor) for one in copy.model.layers.parameters())
                assert is_whole == (keeps_weights and place == 0)
            assert all(isinstance(one, DTensor) for one in copy.parameters())
            found[f"norm {step}"] = engine.clip(1.0)
            engine.optimizer.step()
            engine.module.zero_grad()
        return found | {name: tensor.clone() for name, tensor in engine.weights(has_frozen=True)}

    def work(rank: int) -> dict[str, torch.Tensor]:
        runs = {name: take_steps(rank, keeps_weights=name == "kept") for name in ("kept", "plain")}
        return {f"{name} {key}": tensor for name, found in runs.items() for key, tensor in found.items()}

    for found in in_two_processes(work, tmp_path):
        kept, plain = (
            {name.removeprefix(kind): tensor for name, tensor in found.items() if name.startswith(kind)}
            for kind in ("kept ", "plain ")
        )
        assert kept.keys() == plain.keys() and len(kept) > 9
        assert all(torch.equal(kept[name], plain[name]) for name in plain)
        assert plain["loss 2 0"] < plain["loss 0 0"]
