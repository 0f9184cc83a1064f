"""The bench measures what training does, and its numbers agree with each other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from phi3v.bench.machine import Stopwatch
from phi3v.bench.model import bench_config
from phi3v.bench.options import BenchOptions
from phi3v.bench.page import PUBLISHED, table_lines
from phi3v.bench.run import Bench, run_bench
from phi3v.bench.training import _vision_watched, build_trainee
from phi3v.bench.workload import Workload, draw_samples, work_of
from phi3v.cli import main
from phi3v.config import PARTS
from phi3v.data.packing import Budget
from phi3v.errors import CapacityError, ConfigError
from phi3v.flops import Work, count_flops
from phi3v.geometry import num_image_tokens
from phi3v.model.compute import Compute

CPU = torch.device("cpu")
TINY = {"tiny": True, "device": "cpu", "num_crops": 4, "batch_size": 4, "steps": 2, "warmup_steps": 1}


def numbers_of(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers_of(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers_of(one)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_the_command_writes_everything_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "bench.json"
    small = ["--tiny", "--device=cpu", "--num-crops=4", "--batch-size=4", "--steps=3", "--warmup-steps=1"]
    assert main(["bench", *small, "--baseline", "--baseline-samples=3", "--output", str(output)]) == 0
    measured = json.loads(output.read_text())
    assert measured["environment"]["packages"]["torch"] and measured["device"] == "CPU"
    assert measured["options"]["batch_size"] == 4 and measured["model"]["hidden"] == bench_config(True).hidden_size
    assert min(numbers_of(measured["machine"])) > 0
    (run,) = measured["runs"]
    assert run["name"] == "full" and run["precision"] == "fp32"
    assert set(run["split_seconds"]) == {"packing", "data", "vision", "decoder", "optimizer"}
    assert all(number > 0 for number in numbers_of(run["split_seconds"]))
    assert run["samples_a_step"] == [4, 4, 4] and len(run["step_seconds"]) == 3 and len(run["warmup_seconds"]) == 1
    assert all(loss == loss and 0 < loss < 100 for loss in run["losses"])
    # A process's peak never falls, so that beside a baseline neither's own is known.
    assert run["memory"] == run["baseline"]["memory"] == {}

    low, high = run["samples_per_s_range"]
    assert 0 < low <= run["samples_per_s"] <= high
    assert sorted(4 / seconds for seconds in run["step_seconds"])[1] == pytest.approx(run["samples_per_s"])
    assert run["tflops"] == pytest.approx(run["samples_per_s"] * run["sample"]["flops"] / 1e12)
    assert run["positions_per_s"] == pytest.approx(run["samples_per_s"] * run["sample"]["positions"])
    assert run["machine_share"] == pytest.approx(run["tflops"] / measured["machine"]["matmul_tflops"])
    assert run["ratio"] == pytest.approx(run["samples_per_s"] / run["baseline"]["samples_per_s"])
    assert len(run["baseline"]["sample_seconds"]["all"]) == 3

    printed = capsys.readouterr().out
    assert f"{run['samples_per_s']:.4g} (" in printed and "times as fast" in printed
    assert "memory     not measured" in printed and "samples/s, memory not measured" in printed


def test_measuring_that_fails_leaves_no_file_and_keeps_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CapacityError("too large")

    monkeypatch.setattr(Bench, "measure", fail)
    (tmp_path / "former.json").write_text("{}")
    for name in ("new.json", "former.json"):
        with pytest.raises(CapacityError):
            run_bench(BenchOptions(**TINY, output=tmp_path / name))
    assert [file.name for file in tmp_path.iterdir()] == ["former.json"]
    assert (tmp_path / "former.json").read_text() == "{}"


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi3v.bench.run.measure_rates", lambda device: pytest.fail("something was measured"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output .*cannot be written"):
        run_bench(BenchOptions(**TINY, output=tmp_path / "file" / "bench.json"))


@pytest.mark.parametrize("questions", [1.0, 2.0])
def test_operations_are_those_of_the_samples(questions: float) -> None:
    options = BenchOptions(**TINY, questions_per_image=questions)
    config = bench_config(True)
    run = Bench(config, CPU).measure(options)
    assert min(numbers_of(run["memory"])) > 0
    rows = num_image_tokens((2, 2), config.tokens_per_side)
    stem = 3 + rows
    total = 0
    # Steps 1 and 2 are timed: samples 4 to 11, whose pages come in whole.
    samples = [len(sample.text.input_ids) for sample in draw_samples(options, config, 16)[4:12]]
    for first in range(0, len(samples), int(questions)):
        lengths = samples[first : first + int(questions)]
        pieces: dict[str, Any] = {"wholes": lengths}
        if questions > 1:
            pieces = {"stems": [stem], "branches": [[length - stem for length in lengths]]}
        work = Work(**pieces, crops=5, image_rows=rows, targets=10 * len(lengths))
        total += count_flops(config.dims, work, PARTS).needed
    assert run["sample"]["flops"] == pytest.approx(total / 8)
    assert run["sample"]["positions"] == sum(samples) / 8
    assert run["sample"]["crops"] == 5 / questions


@pytest.mark.parametrize("method", ["full", "frozen_vision"])
@pytest.mark.parametrize("questions", [1.0, 2.0])
def test_speed_is_measured_by_what_the_packed_forward_really_computes(method: Any, questions: float) -> None:
    options = BenchOptions(**TINY, method=method, questions_per_image=questions)
    config = bench_config(True)
    samples = draw_samples(options, config, 4)
    workload = Workload(samples, config, batch_size=4, budget=Budget(), shared_questions=8, seed=0)
    (batch,) = (workload.pack(planned) for planned in workload.plan(0))
    trainee = build_trainee(options, config, CPU)
    counted = {}
    for checkpointing in ("off", "selective", "full"):
        trainee.model.compute = Compute(checkpointing=checkpointing)
        with FlopCounterMode(display=False) as counter:
            trainee.learner(packed=batch).loss.backward()
        counted[checkpointing] = counter.get_total_flops()
    count = count_flops(config.dims, work_of(batch, config.tokens_per_side), trainee.config.trained_parts)
    # A CPU's attention does its products unseen.
    attention = count.clip_attention.total + count.decoder_attention.total
    assert counted["off"] == counted["selective"] == count.needed - attention < count.total - attention
    again = count.decoder_attention.forward + (count.clip_attention.forward if method == "full" else 0)
    assert counted["full"] - counted["off"] == count.recomputed("full") - again > 0


def test_a_step_trains_as_the_public_forward_pass_does() -> None:
    """Float32, relative 1e-5: sums of 4 samples in another order."""
    options = BenchOptions(**TINY, questions_per_image=2.0)
    config = bench_config(True)
    samples = draw_samples(options, config, 4)
    workload = Workload(samples, config, batch_size=4, budget=Budget(tokens=120), shared_questions=8, seed=0)
    batches = [workload.pack(planned) for planned in workload.plan(0)]
    assert len(batches) > 1 and any(batch.layout.stems for batch in batches)
    trainee = build_trainee(options, config, CPU)
    crops = {key: batch.crops[number * 5 :][:5] for batch in batches for number, key in enumerate(batch.image_keys)}
    with torch.no_grad():
        expected = 0.0
        for sample in samples:
            ids, labels = sample.text.input_ids[None], sample.text.labels[None]
            (key,) = sample.image_keys
            edge = 2 * config.crop_px
            logits = trainee.model(
                input_ids=ids, pixel_values=crops[key][None], image_sizes=torch.tensor([[edge, edge]])
            ).logits
            expected += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)) / 4
    before = trainee.model.lm_head.weight.detach().clone()
    assert float(trainee.step(batches, 4)) == pytest.approx(expected, rel=1e-5)
    # Adam's first step moves every weight by the learning rate, decay aside.
    moved = (trainee.model.lm_head.weight.detach() - before).abs()
    assert float(moved.max()) == pytest.approx(1e-6, rel=0.02)
    assert all(parameter.grad is None for parameter in trainee.model.parameters())


@pytest.mark.parametrize("method", ["full", "frozen_vision"])
def test_a_step_is_split_where_vision_ends_and_begins(method: Any) -> None:
    options = BenchOptions(**TINY, method=method)
    config = bench_config(True)
    workload = Workload(
        draw_samples(options, config, 2), config, batch_size=2, budget=Budget(), shared_questions=8, seed=0
    )
    trainee = build_trainee(options, config, CPU)
    entered: list[str] = []
    watch: Any = SimpleNamespace(enter=entered.append)
    with _vision_watched(trainee.model, watch):
        trainee.step([workload.pack(planned) for planned in workload.plan(0)], 2, watch)
    # The copy, embeddings, vision forward, decoder forward and backward, vision backward where it learns, optimizer.
    vision_backward = ["vision"] if method == "full" else []
    assert entered == ["data", "decoder", "vision", "decoder", *vision_backward, "optimizer"]


@pytest.mark.parametrize("method", ["frozen_vision", "lora"])
def test_only_what_the_method_trains_is_trained(method: Any) -> None:
    options = BenchOptions(**TINY, method=method, lora_rank=2)
    trainee = build_trainee(options, bench_config(True), CPU)
    held = {id(one) for group in trainee.optimizer.param_groups for one in group["params"]}
    names = [name for name, parameter in trainee.learner.named_parameters() if id(parameter) in held]
    assert names and all(("lora_" in name) == (method == "lora") for name in names)
    assert any("vision_embed_tokens" in name for name in names) == (method == "lora")


def test_cached_features_take_the_place_of_the_vision_encoder() -> None:
    options = BenchOptions(**TINY, method="frozen_vision")
    with_crops, cached = (
        Bench(bench_config(True), CPU).measure(BenchOptions(**TINY, method="frozen_vision", cached_features=is_cached))
        for is_cached in (False, True)
    )
    assert "vision" in with_crops["split_seconds"] and "vision" not in cached["split_seconds"]
    assert (with_crops["sample"]["crops"], cached["sample"]["crops"]) == (5, 0)
    vision = sum(with_crops["flops"][name]["forward"] for name in ("clip", "clip_attention", "projector"))
    assert with_crops["flops"]["needed"] - cached["flops"]["needed"] == vision > 0
    assert options.train_config().method == "frozen_vision"


def test_the_table_puts_all_methods_beside_microsofts_figures() -> None:
    lines: list[str] = []
    measured = run_bench(BenchOptions(**{**TINY, "steps": 1, "batch_size": 2}, table=True, lora_rank=2), lines.append)
    assert [run["name"] for run in measured["runs"]] == ["full", "frozen_vision", "lora", "qlora"]
    table = [line for line in lines if line.startswith("| ")]
    assert "Microsoft" in table[0] and "A100" in table[0]
    for run, line in zip(measured["runs"], table[1:], strict=True):
        published = PUBLISHED[run["name"]]
        assert f"| {run['samples_per_s']:.3g} |" in line
        assert f"{published.samples_per_s} / {published.samples_per_s_flash}" in line


def test_a_method_that_does_not_fit_stays_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: Bench, options: BenchOptions) -> dict[str, Any]:
        raise torch.OutOfMemoryError(f"no room for {options.method}")

    monkeypatch.setattr(Bench, "measure", measure)
    measured = run_bench(BenchOptions(**TINY, table=True), lambda _: None)
    assert all("no room" in run["not_measured"] for run in measured["runs"])
    assert all("no room" in line for line in table_lines(measured)[3:])
    with pytest.raises(CapacityError, match="full does not fit: no room for full"):
        run_bench(BenchOptions(**TINY), lambda _: None)


@pytest.mark.parametrize(
    ("sweep", "changed"),
    [("num_crops", "crops"), ("length", "positions"), ("micro_batch", None), ("rank", None)],
)
def test_a_sweep_changes_one_thing(sweep: Any, changed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3v.bench.run.SWEPT_TEXT_TOKENS", (33, 64, 128))  # attention on a CPU is slow at thousands
    monkeypatch.setattr("phi3v.bench.run.SWEPT_RANKS", (2, 4, 8))
    options = BenchOptions(**{**TINY, "steps": 1, "warmup_steps": 0}, method="lora", lora_rank=4, sweep=sweep)
    runs = run_bench(options, lambda _: None)["runs"]
    assert len(runs) >= 3
    if changed is not None:
        values = [run["sample"][changed] for run in runs]
        assert values == sorted(set(values))
    flops = [run["sample"]["flops"] for run in runs]
    assert flops == sorted(flops)
    assert (len(set(flops)) == 1) == (sweep == "micro_batch")
    at_once = [run["micro_batches_a_step"] for run in runs]
    assert (at_once[0], at_once[-1]) == (4, 1) if sweep == "micro_batch" else True


def test_checkpointing_costs_what_is_reported_apart_and_no_speed_is_claimed_for_it() -> None:
    kept, again = (
        Bench(bench_config(True), CPU).measure(BenchOptions(**TINY, checkpointing=mode)) for mode in ("off", "full")
    )
    assert kept["flops"] == again["flops"]
    assert kept["flops"]["recomputed"]["off"] == 0 < kept["flops"]["recomputed"]["full"]
    assert (kept["compute"]["checkpointing"], again["compute"]["checkpointing"]) == ("off", "full")


def test_sections_add_up_to_the_time_that_passed() -> None:
    watch = Stopwatch(CPU, "a")
    for section in ("b", "a", "b"):
        watch.enter(section)
    found = watch.seconds()
    assert list(found) == ["a", "b"]
    times = [mark for _, mark in watch._marks]
    assert sum(found.values()) == pytest.approx(times[-1] - times[0])


def test_help_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "phi3v", "bench", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "--questions_per_image" in done.stdout
    assert imported.isdisjoint(("torch", "transformers"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--text_tokens", "12"],
        ["--cached_features"],
        ["--data", "a.jsonl"],
        ["--sweep", "rank"],
        ["--sweep", "length", "--baseline"],
        ["--sweep", "colour"],
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tiny", "--device", "cpu", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
