"""What the report tabulates besides scores: spikes, parts, data, environment, checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3v.credentials import without_secrets
from phi3v.report.values import (
    Json,
    humanised,
    in_bytes,
    quantity,
    short_count,
    shortened,
    to_number,
    to_text,
    to_whole,
)
from phi3v.runlog import RunDirectory

MOST_SPIKES = 20
"""Spikes that the report lists; spikes.jsonl has all."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a list of facts."""

    name: str
    value: str


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


def spike_rows(spikes: Sequence[Json]) -> list[dict[str, str]]:
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


def part_rows(audit: Json) -> list[PartRow]:
    """The audit's parts, given as a list or by name."""
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


def audit_facts(audit: Json) -> list[Fact]:
    """What the audit says beyond its table, whatever its keys."""
    return [
        Fact(humanised(key), quantity(key, value))
        for key, value in audit.items()
        if key != "parts" and value not in (None, [], {})
    ]


def splits(data: Json) -> list[tuple[str, Json]]:
    """The data summaries: one a split, or a single one without a name."""
    splits = [(str(name), summary) for name, summary in data.items() if isinstance(summary, Mapping)]
    return splits if splits and "samples" not in data else [("", data)] if data else []


def data_block(split: str, summary: Json) -> DataBlock:
    """What the data check found in a split; its problems without secrets."""
    problems = summary.get("problems")
    return DataBlock(
        split,
        [Fact(humanised(key), quantity(key, value)) for key, value in summary.items() if key != "problems"],
        [without_secrets(shortened(problem)) for problem in problems] if isinstance(problems, list) else [],
    )


def environment_facts(environment: Json) -> list[Fact]:
    """What the run ran on, packages one by one, without secrets."""
    facts = []
    for key, value in environment.items():
        if value is None or value == [] or value == {}:
            continue
        if key == "packages" and isinstance(value, Mapping):
            facts += [Fact(str(package), to_text(version)) for package, version in value.items()]
        else:
            facts.append(Fact(humanised(key), quantity(key, value)))
    return [Fact(without_secrets(fact.name), without_secrets(fact.value)) for fact in facts]


def checkpoint_rows(run: RunDirectory, best: Json) -> list[CheckpointRow]:
    """The checkpoints on disk, by step."""
    folders = [path for path in run.checkpoints_dir.glob("checkpoint-*") if path.is_dir()]
    folders.sort(key=lambda path: (len(path.name), path.name))
    best_step = best.get("step")
    return [
        CheckpointRow(
            name=path.name,
            is_complete=(path / "manifest.json").exists(),
            size=size_of(path),
            is_best=best_step is not None and path.name == f"checkpoint-{best_step}",
        )
        for path in folders
    ]


def size_of(folder: Path) -> str:
    """The bytes of all files in a folder; a file that goes while it is counted counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return in_bytes(total)
