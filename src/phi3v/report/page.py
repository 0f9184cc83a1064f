"""Turns a run directory into one HTML file that needs nothing else: no network, no script, no other file.

Everything in a run directory is untrusted text: the template escapes all of it, a content security policy forbids
scripts and requests, and images are decoded, scaled down and encoded anew. What is missing becomes a plain sentence.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from phi3v.credentials import plain_without_secrets, without_secrets
from phi3v.files import write_atomically
from phi3v.report import charts
from phi3v.report.classes import class_section
from phi3v.report.examples import RIGHT_FROM, example_groups, image_folders
from phi3v.report.values import (
    Json,
    by_step,
    humanised,
    in_bytes,
    in_duration,
    quantity,
    read_or_note,
    short_count,
    shortened,
    step_of,
    to_number,
    to_percent,
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

METRIC_NAMES = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "anls": "ANLS",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_accuracy": "relaxed accuracy",
    "f1": "F1",
}

MOST_SPIKES = 20
"""Spikes that the report lists; spikes.jsonl has all."""

Moment = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a list of facts."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Headline:
    """A score as the report states it; numbers in percent of a full score."""

    label: str
    metric: str
    score: float
    low: float | None
    high: float | None
    confidence: float | None
    n: int | None


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of the model in the trainability table."""

    name: str
    parameters: str
    parameters_exact: str
    share: float | None
    lora: str
    gradient: str
    is_silent: bool


@dataclass(frozen=True, slots=True)
class DataBlock:
    """What the data check found in one split."""

    split: str
    facts: list[Fact]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One checkpoint folder."""

    name: str
    is_complete: bool
    size: str
    is_best: bool


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
    headlines = _headlines(before, after, evals)
    parts = _part_rows(audit)
    has_model = (run.model_dir / "config.json").exists() or (run.model_dir / "adapter_config.json").exists()
    groups, samples_source, missing_images = example_groups(run, image_folders(config, data), evals, notes)
    drawn = _charts(steps, evals)
    return {
        "name": run.path.resolve().name,
        "subtitle": _subtitle(config),
        "is_finished": has_model or after is not None,
        "last_step": steps[-1]["step"] if steps else None,
        "headlines": headlines,
        "difference": _difference(headlines),
        "interval_names": _interval_names(headlines),
        "summary": _summary(steps, audit),
        "notes": [without_secrets(note) for note in notes + _notes(steps, after, parts, data, missing_images)],
        "charts": drawn,
        "chart_notes": [note for note in dict.fromkeys(chart.note for chart in drawn) if note],
        "eval_rows": _eval_rows(evals),
        "spike_rows": _spike_rows(spikes),
        "spikes_left_out": max(0, len(spikes) - MOST_SPIKES),
        "classes": class_section(after or _newest(evals) or before),
        "groups": groups,
        "samples_source": samples_source,
        "right_from": RIGHT_FROM,
        "parts": parts,
        "has_lora": any(row.lora for row in parts),
        "audit_facts": _audit_facts(audit),
        "data_blocks": [_data_block(split, summary) for split, summary in _splits(data)],
        "settings": [Fact(label, to_text(config[key])) for key, label in KEY_SETTINGS if config.get(key) is not None],
        "config_text": config_text,
        "environment": _environment_facts(environment),
        "checkpoints": _checkpoint_rows(run, best),
        "model_size": _size_of(run.model_dir) if has_model else None,
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
    }
    method = config.get("method")
    pieces = [methods.get(method, method) if isinstance(method, str) else None, config.get("model")]
    return " of ".join(str(piece) for piece in pieces if piece)


def _headlines(before: Json | None, after: Json | None, evals: Sequence[Json]) -> list[Headline]:
    named = [("Before training", before), ("After training", after)]
    if after is None:
        during = [line for line in evals if line.get("when") == "during" and step_of(line) is not None]
        if during:
            named.append((f"At step {during[-1]['step']:,}, the last score so far", during[-1]))
    return [headline for label, line in named if line is not None and (headline := _headline(label, line)) is not None]


def _headline(label: str, line: Json) -> Headline | None:
    score = to_number(line.get("score"))
    if score is None:
        return None
    return Headline(
        label=label,
        metric=_metric_name(line.get("metric")),
        score=100 * score,
        low=to_percent(line.get("low")),
        high=to_percent(line.get("high")),
        confidence=to_percent(line.get("confidence")),
        n=to_whole(line.get("n")),
    )


def _metric_name(metric: Any) -> str:
    return METRIC_NAMES.get(metric, metric) if isinstance(metric, str) else "score"


def _difference(headlines: Sequence[Headline]) -> float | None:
    """Points from the first score to the last; None unless both are of one metric over as many questions."""
    if len(headlines) != 2:
        return None
    first, last = headlines
    return last.score - first.score if (first.metric, first.n) == (last.metric, last.n) else None


def _interval_names(headlines: Sequence[Headline]) -> str:
    """The coverage of the headlines' intervals; empty when none has one."""
    coverages = [headline.confidence for headline in headlines if headline.low != headline.high]
    return " and ".join(dict.fromkeys(f"{coverage:g} %" for coverage in coverages if coverage is not None))


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
    for split, summary in _splits(data):
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
        _score_chart(evals),
        charts.curve("Learning rate", "", numbers, values("learning_rate"), from_zero=True),
        charts.curve(
            "Gradient norm", "L2", numbers, values("grad_norm"), from_zero=True, smooth=True, may_use_log=True
        ),
        charts.curve("Throughput", "samples/s", numbers, values("samples_per_s"), from_zero=True, smooth=True),
        charts.curve("Memory", "GiB", numbers, values("memory_bytes", 2**30), from_zero=True),
    ]
    return [chart for chart in made if chart is not None]


def _score_chart(evals: Sequence[Json]) -> charts.Chart | None:
    scored = {line["step"]: line for line in by_step(evals) if to_number(line.get("score")) is not None}
    intervals = [
        charts.Interval(value, to_percent(line.get("low")), to_percent(line.get("high")))
        for line in scored.values()
        if (value := to_percent(line.get("score"))) is not None
    ]
    if len(intervals) < 2:
        return None
    metric = _metric_name(next(iter(scored.values())).get("metric"))
    return charts.scores(f"Evaluation: {metric}", list(scored), intervals)


def _eval_rows(evals: Sequence[Json]) -> list[dict[str, str]]:
    rows = []
    for line in evals:
        score, low, high = (to_percent(line.get(key)) for key in ("score", "low", "high"))
        seconds, step, n = to_number(line.get("seconds")), step_of(line), to_whole(line.get("n"))
        rows.append(
            {
                "when": to_text(line.get("when")),
                "step": "" if step is None else f"{step:,}",
                "score": "none" if score is None else f"{score:.1f} %",
                "interval": "" if low is None or high is None else f"{low:.1f} to {high:.1f}",
                "n": "" if n is None else f"{n:,}",
                "seconds": "" if seconds is None else in_duration(seconds),
            }
        )
    return rows


def _spike_rows(spikes: Sequence[Json]) -> list[dict[str, str]]:
    """The first spikes: what was found, what was expected, and whose it is."""

    def found(line: Json, key: str) -> str:
        value, limit = to_number(line.get(key)), to_number(line.get(f"{key}_limit"))
        text = "" if value is None else f"{value:.4g}"
        return text if limit is None else f"{text} (expected up to {limit:.4g})"

    return [
        {
            "step": f"{line['step']:,}",
            "loss": found(line, "loss"),
            "grad_norm": found(line, "grad_norm"),
            "learning_rate": "" if (rate := to_number(line.get("learning_rate"))) is None else f"{rate:.3g}",
            "samples": shortened(to_text(line.get("worst_samples"))),
        }
        for line in spikes[:MOST_SPIKES]
    ]


def _part_rows(audit: Json) -> list[PartRow]:
    parts = audit.get("parts")
    if isinstance(parts, Mapping):
        parts = [{"part": name, **row} for name, row in parts.items() if isinstance(row, Mapping)]
    rows = [row for row in parts if isinstance(row, Mapping)] if isinstance(parts, list) else []
    return [_part_row(row) for row in rows]


def _part_row(row: Json) -> PartRow:
    parameters, trainable = to_whole(row.get("parameters")), to_whole(row.get("trainable"))
    layers, covered = to_whole(row.get("linear_layers")), to_whole(row.get("lora_layers"))
    gradient = to_number(row.get("gradient_norm"))
    share = None if trainable is None or not parameters else 100 * trainable / parameters
    return PartRow(
        name=to_text(row.get("part")),
        parameters="?" if parameters is None else short_count(parameters),
        parameters_exact="?" if parameters is None else f"{parameters:,}",
        share=share,
        lora="" if not covered else f"{covered:,}" if layers is None else f"{covered:,}/{layers:,}",
        gradient="\N{EN DASH}" if gradient is None else f"{gradient:.2g}",
        is_silent=bool(trainable) and "gradient_norm" in row and not gradient,
    )


def _audit_facts(audit: Json) -> list[Fact]:
    """What the audit says beyond its table, whatever its keys."""
    return [
        Fact(humanised(key), quantity(key, value))
        for key, value in audit.items()
        if key != "parts" and value not in (None, [], {})
    ]


def _splits(data: Json) -> list[tuple[str, Json]]:
    """The data summaries: one a split, or a single one without a name."""
    splits = [(str(name), summary) for name, summary in data.items() if isinstance(summary, Mapping)]
    return splits if splits and "samples" not in data else [("", data)] if data else []


def _data_block(split: str, summary: Json) -> DataBlock:
    problems = summary.get("problems")
    return DataBlock(
        split,
        [Fact(humanised(key), quantity(key, value)) for key, value in summary.items() if key != "problems"],
        [without_secrets(shortened(problem)) for problem in problems] if isinstance(problems, list) else [],
    )


def _environment_facts(environment: Json) -> list[Fact]:
    facts = []
    for key, value in environment.items():
        if value is None or value == [] or value == {}:
            continue
        if key == "packages" and isinstance(value, Mapping):
            facts += [Fact(str(package), to_text(version)) for package, version in value.items()]
        else:
            facts.append(Fact(humanised(key), quantity(key, value)))
    return [Fact(without_secrets(fact.name), without_secrets(fact.value)) for fact in facts]


def _checkpoint_rows(run: RunDirectory, best: Json) -> list[CheckpointRow]:
    folders = [path for path in run.checkpoints_dir.glob("checkpoint-*") if path.is_dir()]
    folders.sort(key=lambda path: (len(path.name), path.name))
    best_step = best.get("step")
    return [
        CheckpointRow(
            name=path.name,
            is_complete=(path / "manifest.json").exists(),
            size=_size_of(path),
            is_best=best_step is not None and path.name == f"checkpoint-{best_step}",
        )
        for path in folders
    ]


def _size_of(folder: Path) -> str:
    """The bytes of all files in a folder; a file that goes while it is counted counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return in_bytes(total)
