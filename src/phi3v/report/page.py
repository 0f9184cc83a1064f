"""Turns a run directory into one HTML file that needs nothing else: no network, no script, no other file.

Everything in a run directory is untrusted text: the template escapes all of it, a content security policy forbids
scripts and requests, and images are decoded, scaled down and encoded anew. What is missing becomes a plain sentence.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2

from phi3v.credentials import plain_without_secrets, without_secrets
from phi3v.files import write_atomically
from phi3v.report import charts
from phi3v.report.classes import class_section
from phi3v.report.examples import RIGHT_FROM, example_groups, image_folders
from phi3v.report.scores import difference, eval_rows, headlines, interval_names, score_chart
from phi3v.report.tables import (
    MOST_SPIKES,
    Fact,
    PartRow,
    audit_facts,
    checkpoint_rows,
    data_block,
    environment_facts,
    part_rows,
    size_of,
    spike_rows,
    splits,
)
from phi3v.report.values import (
    Json,
    by_step,
    in_bytes,
    in_duration,
    read_or_note,
    short_count,
    step_of,
    to_number,
    to_text,
    to_whole,
)
from phi3v.runlog import RunDirectory

KEY_SETTINGS = (
    ("model", "model"),
    ("method", "method"),
    ("freeze", "frozen parts"),
    ("lora_rank", "LoRA rank"),
    ("lora_alpha", "LoRA alpha"),
    ("learning_rate", "learning rate"),
    ("part_learning_rates", "learning rates by part"),
    ("lr_scheduler", "schedule"),
    ("warmup_steps", "warm-up steps"),
    ("batch_size", "batch size, samples a step"),
    ("num_train_epochs", "epochs"),
    ("max_steps", "most steps"),
    ("num_crops", "crops an image, at most"),
    ("max_length", "longest sample, tokens"),
    ("precision", "precision"),
    ("loss_weighting", "loss weighting"),
    ("rope_mode", "LongRoPE factors"),
    ("seed", "seed"),
    ("train_data", "training data"),
    ("eval_data", "evaluation data"),
)
"""Settings that the report lists before the whole file."""

Moment = Literal["before", "after"]


def write_report(run_dir: Path | str) -> Path:
    """Writes ``report.html`` into a run directory, in place of an earlier one.

    A run may be at any point of its life, killed ones included: what it did not leave is said, not required.

    Raises:
        DataError: ``run_dir`` is not a run directory.
    """
    run = RunDirectory(run_dir).open()
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = templates.get_template("report.html").render(_view(run))
    # A lone surrogate, which UTF-8 cannot hold, becomes a character reference; browsers show it as a replacement mark.
    write_atomically(run.report_path, html.encode("utf-8", errors="xmlcharrefreplace"))
    return run.report_path


def _view(run: RunDirectory) -> dict[str, Any]:
    """Gathers all that the template shows."""
    notes: list[str] = []
    # A run writes no secrets down; a configuration that was changed by hand may hold some.
    config = plain_without_secrets(read_or_note(run.config, notes) or {})
    config_text = without_secrets(read_or_note(run.config_text, notes) or "")
    environment = read_or_note(run.environment, notes) or {}
    best = read_or_note(run.best, notes) or {}
    steps = by_step(read_or_note(run.steps, notes) or [])
    evals = read_or_note(run.evals, notes) or []
    spikes = by_step(read_or_note(run.spikes, notes) or [])
    audit = read_or_note(run.audit, notes) or {}
    data = read_or_note(run.data, notes) or {}
    before = read_or_note(lambda: _evaluation(run, evals, "before"), notes)
    after = read_or_note(lambda: _evaluation(run, evals, "after"), notes)
    stated = headlines(before, after, evals)
    parts = part_rows(audit)
    has_model = (run.model_dir / "config.json").exists() or (run.model_dir / "adapter_config.json").exists()
    groups, samples_source, missing_images = example_groups(run, image_folders(config, data), evals, notes)
    drawn = _charts(steps, evals)
    return {
        "name": run.path.resolve().name,
        "subtitle": _subtitle(config),
        "is_finished": has_model or after is not None,
        "last_step": steps[-1]["step"] if steps else None,
        "headlines": stated,
        "difference": difference(stated),
        "interval_names": interval_names(stated),
        "summary": _summary(steps, audit),
        "notes": [without_secrets(note) for note in notes + _notes(steps, after, parts, data, missing_images)],
        "charts": drawn,
        "chart_notes": [note for note in dict.fromkeys(chart.note for chart in drawn) if note],
        "eval_rows": eval_rows(evals),
        "spike_rows": spike_rows(spikes),
        "spikes_left_out": max(0, len(spikes) - MOST_SPIKES),
        "classes": class_section(after or _newest(evals) or before),
        "groups": groups,
        "samples_source": samples_source,
        "right_from": RIGHT_FROM,
        "parts": parts,
        "has_lora": any(row.lora for row in parts),
        "audit_facts": audit_facts(audit),
        "data_blocks": [data_block(split, summary) for split, summary in splits(data)],
        "settings": [Fact(label, to_text(config[key])) for key, label in KEY_SETTINGS if config.get(key) is not None],
        "config_text": config_text,
        "environment": environment_facts(environment),
        "checkpoints": checkpoint_rows(run, best),
        "model_size": size_of(run.model_dir) if has_model else None,
        "chart_box": {
            "width": charts.WIDTH,
            "height": charts.HEIGHT,
            "left": charts.LEFT,
            "right": charts.RIGHT,
            "top": charts.TOP,
            "bottom": charts.BOTTOM,
        },
    }


def _evaluation(run: RunDirectory, evals: Sequence[Json], when: Moment) -> Json | None:
    lines = [line for line in evals if line.get("when") == when]
    return lines[-1] if lines else run.evaluation(when)


def _newest(evals: Sequence[Json]) -> Json | None:
    """The evaluation of the latest step; None when there is none."""
    lines = by_step(evals)
    return lines[-1] if lines else None


def _subtitle(config: Json) -> str:
    methods = {
        "full": "full fine-tuning",
        "frozen_vision": "fine-tuning with frozen vision",
        "lora": "LoRA fine-tuning",
        "qlora": "QLoRA fine-tuning",
    }
    method = config.get("method")
    pieces = [methods.get(method, method) if isinstance(method, str) else None, config.get("model")]
    return " of ".join(str(piece) for piece in pieces if piece)


def _summary(steps: Sequence[Json], audit: Json) -> list[Fact]:
    """The run in a few numbers."""
    facts = []
    trainable, parameters = to_whole(audit.get("trainable")), to_whole(audit.get("parameters"))
    if trainable is not None and parameters:
        share = 100 * trainable / parameters
        own = short_count(parameters)
        facts.append(Fact("trainable parameters", f"{short_count(trainable)}, {share:.3g} % of the model's {own}"))
    if not steps:
        return facts
    epoch = to_number(steps[-1].get("epoch"))
    reached = f"{steps[-1]['step']:,}"
    facts.append(Fact("optimizer steps", reached if epoch is None else f"{reached} (epoch {epoch:.3g})"))
    elapsed = to_number(steps[-1].get("elapsed_s"))
    if elapsed is not None:
        facts.append(Fact("training time", in_duration(elapsed)))
    for key, name in (("samples_per_s", "median samples/s"), ("tokens_per_s", "median tokens/s")):
        speeds = [speed for line in steps if (speed := to_number(line.get(key))) is not None]
        if speeds:
            facts.append(
                Fact(
                    name,
                    f"{statistics.median(speeds):,.3g}" if max(speeds) < 1000 else f"{statistics.median(speeds):,.0f}",
                )
            )
    peaks = [peak for line in steps if (peak := to_number(line.get("memory_bytes"))) is not None]
    if peaks:
        facts.append(Fact("peak memory", in_bytes(max(peaks))))
    return facts


def _notes(
    steps: Sequence[Json], after: Json | None, parts: Sequence[PartRow], data: Json, missing_images: int
) -> list[str]:
    """What a reader must not overlook."""
    notes = []
    result_step = None if after is None else step_of(after)
    if steps and result_step is not None and result_step < steps[-1]["step"]:
        notes.append(f"The result is the model of step {result_step:,}; training went on to {steps[-1]['step']:,}.")
    lost = sum(1 for line in steps if "loss" in line and to_number(line["loss"]) is None)
    if lost:
        notes.append(f"{lost:,} of {len(steps):,} logged steps have a loss that is not finite; they are gaps below.")
    silent = [row.name for row in parts if row.is_silent]
    if silent:
        notes.append(f"No gradient reached these trainable parts: {', '.join(silent)}.")
    for split, summary in splits(data):
        losses = []
        skipped = summary.get("skipped")
        if isinstance(skipped, Mapping):
            losses += [
                f"{count:,} skipped ({reason})" for reason, value in skipped.items() if (count := to_whole(value))
            ]
        losses += [f"{count:,} {key}" for key in ("skipped", "dropped", "cut") if (count := to_whole(summary.get(key)))]
        if losses:
            notes.append(f"Samples not used whole{f' in {split}' if split else ''}: {', '.join(losses)}.")
    if missing_images:
        notes.append(f"{missing_images:,} of the images below could not be shown; the reason stands in their place.")
    return notes


def _charts(steps: Sequence[Json], evals: Sequence[Json]) -> list[charts.Chart]:
    numbers = [line["step"] for line in steps]

    def values(key: str, divisor: float = 1.0) -> list[float | None]:
        return [None if (number := to_number(line.get(key))) is None else number / divisor for line in steps]

    made = [
        charts.curve("Loss", "nats per answer token", numbers, values("loss"), from_zero=False, smooth=True),
        score_chart(evals),
        charts.curve("Learning rate", "", numbers, values("learning_rate"), from_zero=True),
        charts.curve(
            "Gradient norm", "L2", numbers, values("grad_norm"), from_zero=True, smooth=True, may_use_log=True
        ),
        charts.curve("Throughput", "samples/s", numbers, values("samples_per_s"), from_zero=True, smooth=True),
        charts.curve("Memory", "GiB", numbers, values("memory_bytes", 2**30), from_zero=True),
    ]
    return [chart for chart in made if chart is not None]
