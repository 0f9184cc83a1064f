"""The engine on a GPU: tokens of plain decoding in float32, and graphs that change nothing in any format."""

from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.eval.decode import Step, Stepper
from phi3v.eval.engine import Engine
from phi3v.eval.prompts import Prompt
from phi3v.model.checkpoint import load_four_bit_model, load_model
from phi3v.model.processing_phi3_v import Phi3VProcessor
from prompting import plain_tokens, prompts_of_every_kind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def prompts(processor: Phi3VProcessor) -> list[Prompt]:
    return prompts_of_every_kind(processor)


def generate(model: Any, prompts: list[Prompt], *stop: int) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, stop_token_ids=stop, max_new_tokens=NUM_TOKENS)
    engine.answer(engine.group(prompts))
    answers = engine.answer(engine.group(prompts))  # from graphs that are there already
    return [answers[prompt].tokens for prompt in prompts], engine


def test_in_float32(tiny_dir: Path, prompts: list[Prompt]) -> None:
    """All but two answers end early, so that rows move and two shapes have graphs."""
    model = load_model(tiny_dir, device="cuda")
    going = (1, 3)
    whole = [plain_tokens(model, prompt, NUM_TOKENS, device="cuda") for prompt in prompts]
    kept = {token for number in going for token in whole[number]}
    stop = {next(t for t in tokens if t not in kept) for number, tokens in enumerate(whole) if number not in going}
    expected = [plain_tokens(model, prompt, NUM_TOKENS, sorted(stop), device="cuda") for prompt in prompts]
    found, engine = generate(model, prompts, *stop)
    assert found == expected
    graphs = {shape: step.graph is not None for shape, step in engine._stepper._steps.items()}
    assert len(graphs) == 2 and all(graphs.values())


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "autocast", "4-bit"])
def test_graphs_change_nothing(
    weights: str, tiny_dir: Path, wide_dir: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights == "4-bit":
        pytest.importorskip("bitsandbytes")
        model = load_four_bit_model(wide_dir, dtype="bfloat16", device="cuda:0").eval()
    else:
        model = load_model(tiny_dir, dtype="float32" if weights == "autocast" else weights, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=weights == "autocast"):
        found, engine = generate(model, prompts)
        assert all(step.graph is not None for step in engine._stepper._steps.values())
        monkeypatch.setattr(Stepper, "_capture", lambda *_: None)
        assert generate(model, prompts)[0] == found


def test_decoding_goes_on_where_capture_fails(
    tiny_dir: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_dir, device="cuda")
    expected, _ = generate(model, prompts)
    run = Step.run

    def looking(step: Step) -> None:
        """No host may look at a number while a graph is captured."""
        run(step)
        step.generated(1, 1).tolist()

    monkeypatch.setattr(Step, "run", looking)
    found, engine = generate(model, prompts)
    assert found == expected
    assert all(step.graph is None for step in engine._stepper._steps.values())
