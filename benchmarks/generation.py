"""Questions a second of greedy generation: transformers' own, one by one and in batches, and the engine.

python benchmarks/generation.py
python benchmarks/generation.py --questions 64 --per-image 1 4 8 --json generation.json
python benchmarks/generation.py --tiny

The model has the published size and random weights, made on the device; pages are random crops, and every answer has
the same number of tokens. Loading of images is not part of it. Every run goes over its questions several times: the
first time includes what is set up once (kernels, graphs).
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from phi3v.eval.engine import Engine
from phi3v.eval.prompts import Picture, Prompt
from phi3v.geometry import num_image_tokens
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

GRID = (4, 4)
"""Tiles of a page at num_crops 16: 2,509 positions."""

TEXT_TOKENS = (24, 64)
"""A question's positions behind its image, from and to; uniform."""

NUM_DIFFERENT_PAGES = 4
"""Pages of random pixels that are made; more would cost memory and change no timing."""

STEM_FRAME = 3
"""Positions before the image: ``<s>``, ``<|user|>``, a new line."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}

CLIP_PATCH_PX = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One way to generate, measured.

    Attributes:
        name: which way.
        questions: answered in a round.
        seconds: of every round.
        prefill_s: of a round that generates one token a question, the last of them; None: not measured.
        memory_gb: most memory that the device held, GB.
    """

    name: str
    questions: int
    seconds: list[float]
    prefill_s: float | None
    memory_gb: float

    @property
    def steady_s(self) -> float:
        """Median of the rounds behind the first."""
        return statistics.median(self.seconds[1:] or self.seconds)


def make_model(options: argparse.Namespace, device: torch.device) -> Phi3VForCausalLM:
    """Makes a random model on the device."""
    dtype = torch.float32 if options.tiny else torch.bfloat16
    config = Phi3VConfig(**TINY) if options.tiny else Phi3VConfig()
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Phi3VForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    # Nothing ends an answer early.
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model.eval()


def make_prompts(config: Phi3VConfig, num_questions: int, per_image: int, use_pinned_memory: bool) -> list[Prompt]:
    """Makes questions of different lengths, ``per_image`` of them about each page."""
    dice = torch.Generator().manual_seed(0)
    grid = (1, 2) if config.crop_px < 336 else GRID
    edge = config.crop_px
    pages = [torch.rand(grid[0] * grid[1] + 1, 3, edge, edge, generator=dice) for _ in range(NUM_DIFFERENT_PAGES)]
    if use_pinned_memory:
        pages = [page.pin_memory() for page in pages]
    image = [config.image_token_id] * num_image_tokens(grid, config.tokens_per_side)

    def words(count: int) -> list[int]:
        return torch.randint(3, 32_000, (count,), generator=dice).tolist()

    frame = [1, *words(STEM_FRAME - 1)]
    prompts: list[Prompt] = []
    for number in range(num_questions):
        page = number // per_image
        picture = Picture(f"page {page}", pages[page % NUM_DIFFERENT_PAGES], grid)
        length = int(torch.randint(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1, (), generator=dice))
        prompts.append(Prompt([*frame, *image, 1, *words(length - 1)], (picture,)))
    return prompts


def generate_plainly(
    model: Phi3VForCausalLM, prompts: Sequence[Prompt], batch_size: int, new_tokens: int, device: torch.device
) -> None:
    """transformers' generation from left-padded batches."""
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        longest = max(len(prompt.ids) for prompt in batch)
        ids = torch.tensor([[0] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in batch])
        pictures = [prompt.pictures[0] for prompt in batch]
        edge = pictures[0].crops.shape[-1]
        sizes = torch.tensor([[edge * side for side in picture.grid] for picture in pictures])
        pixels = torch.stack([picture.crops for picture in pictures])
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=pixels.to(device),
            image_sizes=sizes.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        assert found.shape[1] == longest + new_tokens


def generate_with_engine(engine: Engine, prompts: Sequence[Prompt], per_image: int) -> None:
    """As an evaluation does: groups of questions, as many at once as there is room for."""
    groups = [engine.group(prompts[begin : begin + per_image]) for begin in range(0, len(prompts), per_image)]
    batch: list[Any] = []
    for group in groups:
        if batch and not engine.has_room([*batch, *group]):
            engine.answer(batch)
            batch = []
        batch += group
    answers = engine.answer(batch)
    assert {len(answer.tokens) for answer in answers.values()} == {engine.max_new_tokens}


def time_rounds(run: Callable[[], None], rounds: int, device: torch.device) -> list[float]:
    """Returns the seconds of every round."""
    seconds: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(
    name: str, questions: int, make: Callable[[int], Callable[[], None]], options: argparse.Namespace,
    device: torch.device, rounds: int,
) -> Measurement:  # fmt: skip
    """Measures a way to generate; ``make`` returns a round of it with that many new tokens."""

    def start_afresh() -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    start_afresh()
    seconds = time_rounds(make(options.new_tokens), rounds, device)
    memory_gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    start_afresh()
    prefill_s = time_rounds(make(1), 1, device)[-1]
    found = Measurement(name=name, questions=questions, seconds=seconds, prefill_s=prefill_s, memory_gb=memory_gb)
    print_row(found, options.new_tokens)
    return found


def print_head() -> None:
    print(f"{'':<34} {'questions':>9} {'first/s':>8} {'then/s':>8} {'prefill s':>9} {'ms/step':>8} {'GB':>6}")


def print_row(one: Measurement, new_tokens: int) -> None:
    """Prints questions/s of the first round and of the others, seconds of a prefill, and milliseconds of a step."""
    prefill, step = "", ""
    if one.prefill_s is not None:
        prefill = f"{one.prefill_s:.3f}"
        if new_tokens > 1:
            step = f"{1000 * (one.steady_s - one.prefill_s) / (new_tokens - 1):.1f}"
    first, then = (one.questions / seconds for seconds in (one.seconds[0], one.steady_s))
    print(
        f"{one.name:<34} {one.questions:>9} {first:>8.2f} {then:>8.2f} {prefill:>9} {step:>8} {one.memory_gb:>6.1f}",
        flush=True,
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64, help="of the engine's rounds (default: 64)")
    parser.add_argument("--per-image", type=int, nargs="*", default=[1, 4], help="questions a page (default: 1 4)")
    parser.add_argument("--plain-questions", type=int, default=8, help="of transformers' rounds (default: 8)")
    parser.add_argument("--plain-batches", type=int, nargs="*", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--new-tokens", type=int, default=10, help="of every answer (default: 10)")
    parser.add_argument("--most-questions", type=int, help="answered at once (default: what the memory holds)")
    parser.add_argument("--rounds", type=int, default=3, help="of the engine (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU where there is no GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("the published size needs a GPU; --tiny runs without one")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    started = time.perf_counter()
    model = make_model(options, device)
    print(
        f"{name}, torch {torch.__version__}, transformers {version('transformers')}; "
        f"{sum(one.numel() for one in model.parameters()) / 1e9:.2f} B parameters, {options.new_tokens} new tokens; "
        f"model made in {time.perf_counter() - started:.1f} s"
    )
    print_head()
    found: list[Measurement] = []
    for batch_size in options.plain_batches:
        prompts = make_prompts(model.config, options.plain_questions, 1, device.type == "cuda")

        def plain(new_tokens: int, size: int = batch_size, asked: Sequence[Prompt] = prompts) -> Callable[[], None]:
            return lambda: generate_plainly(model, asked, size, new_tokens, device)

        label = f"transformers, batches of {batch_size}"
        found.append(measure(label, len(prompts), plain, options, device, rounds=2))
    for per_image in options.per_image:
        prompts = make_prompts(model.config, options.questions, per_image, device.type == "cuda")

        def engine(
            new_tokens: int, per_image: int = per_image, asked: Sequence[Prompt] = prompts
        ) -> Callable[[], None]:
            own = Engine(model, stop_token_ids=(), max_new_tokens=new_tokens, most_questions=options.most_questions)
            return lambda: generate_with_engine(own, asked, per_image)

        label = f"engine, {per_image} question{'s' if per_image > 1 else ''} a page"
        found.append(measure(label, len(prompts), engine, options, device, options.rounds))
    print(f"{time.perf_counter() - started:.1f} s in all")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
