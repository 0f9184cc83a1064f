"""The engine's tokens are those of plain greedy decoding, prompt by prompt, whatever stands together in a batch."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phi3v.errors import CheckpointError
from phi3v.eval import engine as engine_module
from phi3v.eval.decode import KeyValueStore, Row, Shape, Step, Stepper, shape_of
from phi3v.eval.engine import Engine
from phi3v.eval.prompts import Prompt
from phi3v.model import packed
from phi3v.model.checkpoint import load_four_bit_model, load_model
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from prompting import Ask, plain_inputs, plain_tokens

NUM_TOKENS = 12


def generate(model: Any, prompts: Sequence[Prompt], num_tokens: int = NUM_TOKENS, **settings: Any) -> list[list[int]]:
    engine = Engine(model, **{"stop_token_ids": (), "max_new_tokens": num_tokens, **settings})
    answers = engine.answer(engine.group(prompts))
    return [answers[prompt].tokens for prompt in prompts]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes of all steps that are run."""
    shapes: list[Shape] = []
    run = Step.run

    def counted(step: Step) -> None:
        shapes.append(step.shape)
        run(step)

    monkeypatch.setattr(Step, "run", counted)
    return shapes


def test_prompts_of_every_kind(tiny_model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    expected = [plain_tokens(tiny_model, prompt, NUM_TOKENS) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(prompts)
    assert generate(tiny_model, prompts) == expected
    assert generate(tiny_model, prompts[::-1]) == expected[::-1]
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate(tiny_model, [prompt]) == [tokens]


def test_a_prompt_that_is_asked_twice_is_answered_once(tiny_model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    once = generate(tiny_model, prompts[2:3])
    assert generate(tiny_model, [prompts[2], prompts[2]]) == once * 2


def test_every_part_keeps_its_training_flag(tiny_model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    tiny_model.train()
    tiny_model.model.vision_embed_tokens.eval()
    before = {name: module.training for name, module in tiny_model.named_modules()}
    generate(tiny_model, prompts[:1], num_tokens=1)
    assert {name: module.training for name, module in tiny_model.named_modules()} == before
    assert len(set(before.values())) == 2


@pytest.mark.parametrize("change", [{"attention_dropout": 0.1}, {"hidden_act": "gelu"}])
def test_a_model_that_is_not_computed_is_refused_by_its_folder(
    change: dict[str, Any], tiny_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "other"))
    settings = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"model .*/other: config\.json: .*packed forward"):
        Engine(load_model(folder), stop_token_ids=(), max_new_tokens=1)


def test_transformers_own_generation_gives_the_same(tiny_model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    for prompt, tokens in zip(prompts, generate(tiny_model, prompts), strict=True):
        inputs = plain_inputs(prompt)
        found = tiny_model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
        assert found[0, len(prompt.ids) :].tolist() == tokens


@pytest.mark.parametrize("most_questions", [1, 2, 4])
def test_batches_of_any_size(tiny_model: Phi3VForCausalLM, prompts: list[Prompt], most_questions: int) -> None:
    assert generate(tiny_model, prompts, most_questions=most_questions) == generate(tiny_model, prompts)


def test_rows_of_a_prefill_that_hold_a_part_of_the_batch(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that are longer than a row are cut, too."""
    expected = generate(tiny_model, prompts)
    for most in (100, 40, 1):
        monkeypatch.setattr(engine_module, "MOST_PREFILL_TOKENS", most)
        assert generate(tiny_model, prompts) == expected


def test_one_token(tiny_model: Phi3VForCausalLM, prompts: list[Prompt], steps: list[Shape]) -> None:
    assert generate(tiny_model, prompts, 1) == [plain_tokens(tiny_model, prompt, 1) for prompt in prompts]
    assert not steps


def test_answers_end_at_stop_tokens(tiny_model: Phi3VForCausalLM, prompts: list[Prompt], steps: list[Shape]) -> None:
    """Stop tokens are the first prompt's first, the second's second, and so on: each answer is of another length."""
    whole = generate(tiny_model, prompts)
    steps.clear()
    stop = {tokens[place] for place, tokens in enumerate(whole[:5])}
    expected = [plain_tokens(tiny_model, prompt, NUM_TOKENS, sorted(stop)) for prompt in prompts]
    assert expected[0] == [] and len(set(map(len, expected))) > 3
    assert generate(tiny_model, prompts, stop_token_ids=stop) == expected
    steps.clear()
    assert generate(tiny_model, prompts[:1], stop_token_ids=stop) == [[]]
    assert not steps


@pytest.mark.parametrize("between_checks", [1, 5])
def test_rows_that_end_leave(
    tiny_model: Phi3VForCausalLM,
    prompts: list[Prompt],
    steps: list[Shape],
    monkeypatch: pytest.MonkeyPatch,
    between_checks: int,
) -> None:
    """All but the second and the fourth prompt end early; each is one of several rows of its batch."""
    num_tokens = 24
    monkeypatch.setitem(engine_module.STEPS_BETWEEN_CHECKS, "cpu", between_checks)
    going = (1, 3)
    whole = [plain_tokens(tiny_model, prompt, num_tokens) for prompt in prompts]
    kept = {token for number in going for token in whole[number]}
    stop = {next(t for t in tokens if t not in kept) for number, tokens in enumerate(whole) if number not in going}
    expected = [plain_tokens(tiny_model, prompt, num_tokens, sorted(stop)) for prompt in prompts]
    assert generate(tiny_model, prompts, num_tokens, stop_token_ids=stop) == expected
    assert [len(expected[number]) for number in going] == [num_tokens] * 2
    assert steps[0].num_rows == len(prompts) and steps[0].rows_per_stem == 5
    assert (steps[-1].num_rows, steps[-1].num_stems) == (2, 2)
    assert len(steps) == num_tokens - 1


@pytest.mark.parametrize(("num_images", "between_checks"), [(0, 1), (1, 5)])
@pytest.mark.parametrize("rope_mode", ["auto", "short", "long"])
def test_across_the_limit_of_the_short_factors(
    tiny_dir: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, rope_mode: str, num_images: int, between_checks: int
) -> None:
    """Prompts that stay below, cross with their first, third or last token, reach the limit exactly, or are over it."""
    monkeypatch.setitem(engine_module.STEPS_BETWEEN_CHECKS, "cpu", between_checks)
    model = load_model(tiny_dir, rope_mode=rope_mode)
    assert isinstance(model, Phi3VForCausalLM)
    start = "<|image_1|>\n" * num_images
    images = ["tall"] * num_images
    asked = [ask(start + "why " * number + "?", images) for number in range(1, 30)]
    limit = len(asked[15].ids)
    by_length = {len(prompt.ids) - limit: prompt for prompt in asked}
    prompts = [by_length[shift] for shift in (-14, -NUM_TOKENS, 1 - NUM_TOKENS, -3, -1, 0, 1, 8)]
    before = generate(model, prompts)
    model.model.rotary_emb.original_positions = limit
    expected = [plain_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    assert generate(model, prompts) == expected
    assert [generate(model, [prompt]) for prompt in prompts] == [[tokens] for tokens in expected]
    assert (expected == before) == (rope_mode != "auto"), "the factors matter"


@pytest.mark.parametrize("use_dora", [False, True])
def test_with_an_adapter(tiny_model: Phi3VForCausalLM, prompts: list[Prompt], use_dora: bool) -> None:
    base = generate(tiny_model, prompts)
    torch.manual_seed(0)
    targets = r"lm_head|.*(qkv_proj|down_proj|img_projection\.0)"
    settings = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
    adapted = get_peft_model(tiny_model, settings).train()
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.8, 1.2)
    found = generate(adapted, prompts)
    assert adapted.training and tiny_model.training
    adapted.eval()
    assert found == [plain_tokens(adapted, prompt, NUM_TOKENS) for prompt in prompts]
    assert found != base


def test_in_4_bit(wide_dir: Path, prompts: list[Prompt]) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_four_bit_model(wide_dir, dtype="float32", device="cpu").eval()
    assert generate(model, prompts, 4) == [plain_tokens(model, prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_in_16_bit(tiny_dir: Path, prompts: list[Prompt], weights: str) -> None:
    """Held in 16 bit, or as in training under autocast: each first token is one that a plain forward finds likely."""
    model = load_model(tiny_dir, dtype=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == "float32"):
        found = generate(model, prompts, 3)
        with torch.no_grad():
            for prompt, tokens in zip(prompts, found, strict=True):
                logits = model(**plain_inputs(prompt, tokens[:-1])).logits[0, -3:].float()
                chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
                # A spread of about 1 between the logits; bfloat16 has 8 bits.
                assert bool((chosen >= logits.max(dim=1).values - 0.1).all())


def test_a_batch_that_does_not_fit_is_halved(
    tiny_model: Phi3VForCausalLM,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Memory runs out in the middle of decoding, with more than two rows."""
    expected = generate(tiny_model, prompts)
    run = Step.run
    num_steps = 0

    def run_out(step: Step) -> None:
        nonlocal num_steps
        num_steps += 1
        if step.shape.num_rows > 2 and num_steps % 5 == 0:
            raise torch.OutOfMemoryError("no memory")
        run(step)

    monkeypatch.setattr(Step, "run", run_out)
    with caplog.at_level(logging.WARNING):
        engine = Engine(tiny_model, stop_token_ids=(), max_new_tokens=NUM_TOKENS)
        answers = engine.answer(engine.group(prompts))
    assert [answers[prompt].tokens for prompt in prompts] == expected
    assert "Out of memory with 9 questions at once; going on with 4" in caplog.text
    assert engine.most_questions <= 2 and not engine.has_room(engine.group(prompts[:3]))

    monkeypatch.setattr(Step, "run", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        engine.answer(engine.group(prompts))


def test_common_beginnings_are_computed_once(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    embed = engine_module.embed_packed

    def counted(model: Any, batch: Any) -> torch.Tensor:
        lengths.append(batch.layout.num_tokens)
        images.append(len(batch.crops))
        return embed(model, batch)

    images: list[int] = []
    monkeypatch.setattr(engine_module, "embed_packed", counted)
    about_one = [prompts[2], prompts[3], prompts[6]]
    generate(tiny_model, about_one)
    common = next(
        place for place, ids in enumerate(zip(*(prompt.ids for prompt in about_one), strict=False)) if len({*ids}) > 1
    )
    assert common > max(place for place, token in enumerate(about_one[0].ids) if token == 32044)
    assert lengths == [sum(len(prompt.ids) for prompt in about_one) - 2 * common]
    assert images == [len(about_one[0].pictures[0].crops)]


def test_different_images_of_one_size_are_not_taken_for_one_another(tiny_model: Phi3VForCausalLM, ask: Ask) -> None:
    """The same first image, the same ids all along: only the second image differs."""
    first = ask("<|image_1|>\n<|image_2|>\nAlike?", ["wide", "square"])
    other_crops = first.pictures[1].crops.flip(-1)
    other = Prompt(
        first.ids, (first.pictures[0], type(first.pictures[1])("other", other_crops, first.pictures[1].grid))
    )
    expected = [plain_tokens(tiny_model, prompt, NUM_TOKENS) for prompt in (first, other)]
    assert expected[0] != expected[1]
    assert generate(tiny_model, [first, other]) == expected


def test_the_cache_holds_nothing_of_earlier_batches(tiny_model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    """Long before short, with one engine; what lies behind a row's own positions must not reach it, even as NaN."""
    engine = Engine(tiny_model, stop_token_ids=(), max_new_tokens=NUM_TOKENS)
    long, short = prompts[7], prompts[0]
    answers = engine.answer(engine.group([long, prompts[4]]))
    for layer in engine._store._layers:
        layer.fill_(float("nan"))
    answers |= engine.answer(engine.group([short])) | engine.answer(engine.group([long, short]))
    assert answers[short].tokens == plain_tokens(tiny_model, short, NUM_TOKENS)
    assert answers[long].tokens == plain_tokens(tiny_model, long, NUM_TOKENS)


def test_rows_move_with_their_keys_and_values() -> None:
    store = KeyValueStore(2, 3, 4, torch.float32, torch.device("cpu"))
    old, new = Shape(4, 8, 6, 5, 2), Shape(2, 6, 3, 5, 2)
    assert not store.lay_out(old) and store.lay_out(old)
    for layer in range(2):
        for part in (store.stems(layer, old), store.branches(layer, old)):
            part.copy_(torch.randn(part.shape))
    expected = [
        (store.stems(one, old)[:, [1, 3], :, :6].clone(), store.branches(one, old)[:, [0, 2, 5]].clone())
        for one in range(2)
    ]
    store.keep(old, new, [1, 3], [0, 2, 5])
    for layer, (stems, branches) in enumerate(expected):
        assert torch.equal(store.stems(layer, new), stems)
        assert torch.equal(store.branches(layer, new), branches)


def test_sizes_are_filled_up_for_graphs() -> None:
    rows = [Row(0, 140, 11, False), Row(1, 130, 2, False), Row(0, 131, 2, False), Row(0, 132, 3, False)]
    assert shape_of([129, 128], rows, 5, is_rounded=False) == Shape(2, 129, 4, 16, 3)
    assert shape_of([129, 128], rows, 5, is_rounded=True) == Shape(2, 256, 8, 16, 4)
    assert shape_of([129, 128], rows, 6, is_rounded=True).branch_length == 32
    counts = [shape_of([7] * count, rows, 5, is_rounded=True).num_stems for count in (2, 7, 8, 9, 15, 17, 33, 64)]
    assert counts == [2, 7, 8, 10, 16, 20, 40, 64]


def test_filled_up_sizes_and_graphs_change_no_token(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with graphs that run what they were captured from: the second batch runs from them alone."""
    prompts = [*prompts, *(ask("Why? " * number) for number in range(1, 6))]
    expected = [plain_tokens(tiny_model, prompt, NUM_TOKENS) for prompt in prompts]

    class Graph:
        def __init__(self, step: Step) -> None:
            self.step = step

        def replay(self) -> None:
            replayed.append(self.step.shape)
            self.step.run()

    def capture(stepper: Stepper, step: Step) -> None:
        captured.append(step.shape)
        step.graph = Graph(step)  # pyright: ignore[reportAttributeAccessIssue]

    captured: list[Shape] = []
    replayed: list[Shape] = []
    monkeypatch.setattr(Stepper, "_capture", capture)
    monkeypatch.setitem(engine_module.STEPS_BETWEEN_CHECKS, "cpu", 4)
    monkeypatch.setattr(engine_module, "shape_of", lambda *given, is_rounded: shape_of(*given, is_rounded=True))
    engine = Engine(tiny_model, stop_token_ids=(), max_new_tokens=NUM_TOKENS)
    engine._stepper._may_capture = True
    for num_replayed in (NUM_TOKENS - 2, NUM_TOKENS - 1):
        replayed.clear()
        answers = engine.answer(engine.group(prompts))
        assert [answers[prompt].tokens for prompt in prompts] == expected
        assert len(replayed) == num_replayed
    assert len(captured) == 1 and (captured[0].num_rows, captured[0].num_stems) == (16, 10)

    # A batch that needs more memory moves the cache: its graphs were made for the old place.
    engine.answer(engine.group([*prompts, Prompt([*prompts[0].ids] * 20)]))
    assert len(captured) == 2
    assert engine._stepper._steps.keys() == {captured[1]}


def test_filled_up_prompts_change_no_token(
    tiny_model: Phi3VForCausalLM, prompts: list[Prompt], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU whose attention wants pieces of one length, however much filling that takes."""
    prompts = [*prompts, *(ask("Why? " * number, labels=((5, 7), (9,))) for number in range(1, 4))]
    engine = Engine(tiny_model, stop_token_ids=(), max_new_tokens=NUM_TOKENS)
    expected = engine.answer(engine.group(prompts))
    monkeypatch.setattr(packed, "MOST_ALIGNING_SHARE", 100)
    engine._reader.alignment = 16
    batch = engine._reader.pack(engine.group(prompts)).batch
    assert len(set(batch.layout.wholes)) == 1 and len(batch.input_ids) == batch.layout.num_tokens
    found = engine.answer(engine.group(prompts))
    assert [found[one].tokens for one in prompts] == [expected[one].tokens for one in prompts]
    for one in prompts:
        assert found[one].log_likelihoods == pytest.approx(expected[one].log_likelihoods, abs=1e-5)


def test_room_is_by_questions_and_by_memory(tiny_model: Phi3VForCausalLM, prompts: list[Prompt]) -> None:
    engine = Engine(tiny_model, stop_token_ids=(), max_new_tokens=NUM_TOKENS, most_questions=3)
    groups = [group for prompt in prompts[:4] for group in engine.group([prompt])]
    assert engine.has_room(groups[:3]) and not engine.has_room(groups)
    longest = max(len(prompt.ids) for prompt in prompts[:3])
    engine._most_positions = 3 * (longest + NUM_TOKENS)
    assert engine.has_room(groups[:3])
    engine._most_positions -= 1
    assert not engine.has_room(groups[:3]) and engine.has_room(groups[:2])
    assert engine.answer([]) == {}
    expected = [plain_tokens(tiny_model, prompt, NUM_TOKENS) for prompt in prompts]
    engine._most_positions = 1
    answers = engine.answer(engine.group(prompts))
    assert [answers[prompt].tokens for prompt in prompts] == expected
