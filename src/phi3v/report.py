"""Turns a run directory into one HTML file that needs nothing else: no network, no script, no other file.

Everything in a run directory is untrusted text: the template escapes all of it, a content security policy forbids
scripts and requests, and images are decoded, scaled down and encoded anew. What is missing becomes a plain sentence.
"""

import base64
import io
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jinja2
from PIL import Image

from phi3v import charts
from phi3v.data.images import UnusableImageError, read_image
from phi3v.errors import Phi3VError
from phi3v.runlog import RunDirectory, write_atomically

MOST_SAMPLES = 24
"""Predictions shown, over all groups."""

MOST_IMAGES_A_SAMPLE = 8
"""Images shown of one question; a video sample of the published recipes has 8."""

THUMBNAIL_PX = 320
"""Longest side of an embedded image, pixels; half of it when a question has several."""

TINY_PX = 96
"""An image whose longest side is at most this is shown enlarged, pixel by pixel."""

LONGEST_TEXT = 500
"""Characters shown of a question or answer; the count of the rest is."""

RIGHT_FROM = 0.5
"""The score from which an answer counts as right: that of yes-or-no metrics, and where ANLS stops being 0."""

DEEPEST_VALUE = 4
"""Levels of nesting shown of a setting or a summary."""

BIGGEST_NUMBER = 1e30
"""Logged numbers beyond are treated as not finite: a run that logs them has diverged."""

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

NO_BREAK = "\N{NO-BREAK SPACE}"
"""Stands between a number and its unit where a line must not end."""

METRIC_NAMES = {"accuracy": "accuracy", "exact_match": "exact match", "anls": "ANLS"}

Moment = Literal["before", "after"]
Json = Mapping[str, Any]
Pair = tuple[Json, Json | None]
"""A question's latest prediction, and the one from before training when there is one."""
T = TypeVar("T")


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
class Thumbnail:
    """An image ready to embed, or the reason why there is none."""

    alt: str
    source: str | None
    width: int
    height: int
    is_pixelated: bool
    problem: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to a question."""

    label: str
    text: str
    score: float | None
    is_right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One question with what was expected and what came."""

    name: str
    question: str
    expected: str
    answers: tuple[Answer, ...]
    thumbnails: tuple[Thumbnail, ...]
    images_left_out: int
    is_tiny: bool


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Questions that fared alike: how many there are in all, and the ones shown."""

    title: str
    total: int
    examples: tuple[Example, ...]


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
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
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
    config, config_text = _read(run.config, notes) or {}, _read(run.config_text, notes)
    environment, best = _read(run.environment, notes) or {}, _read(run.best, notes) or {}
    steps = _by_step(_read(run.steps, notes) or [])
    evals = _read(run.evals, notes) or []
    audit = _read(run.audit, notes) or {}
    data = _read(run.data, notes) or {}
    before = _read(lambda: _evaluation(run, evals, "before"), notes)
    after = _read(lambda: _evaluation(run, evals, "after"), notes)
    headlines = _headlines(before, after, evals)
    parts = _part_rows(audit)
    has_model = (run.model_dir / "config.json").exists() or (run.model_dir / "adapter_config.json").exists()
    groups, samples_source, missing_images = _examples(run, config, evals, notes)
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
        "notes": notes + _notes(steps, after, parts, data, missing_images),
        "charts": drawn,
        "chart_notes": [note for note in dict.fromkeys(chart.note for chart in drawn) if note],
        "eval_rows": _eval_rows(evals),
        "groups": groups,
        "samples_source": samples_source,
        "right_from": RIGHT_FROM,
        "parts": parts,
        "has_lora": any(row.lora for row in parts),
        "audit_facts": _audit_facts(audit),
        "data_blocks": [_data_block(split, summary) for split, summary in _splits(data)],
        "settings": [Fact(label, _text(config[key])) for key, label in KEY_SETTINGS if config.get(key) is not None],
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


def _read(reader: Callable[[], T], notes: list[str]) -> T | None:
    """Reads one piece of the run; an unreadable one becomes a note of the report."""
    try:
        return reader()
    except (Phi3VError, OSError) as error:
        notes.append(f"A piece of the run could not be read and is left out. {error}")
        return None


def _evaluation(run: RunDirectory, evals: Sequence[Json], when: Moment) -> Json | None:
    lines = [line for line in evals if line.get("when") == when]
    return lines[-1] if lines else run.evaluation(when)


def _by_step(lines: Sequence[Json]) -> list[Json]:
    """Step lines in order, the last one of each step, without lines that have no usable step."""
    by_step = {step: line for line in lines if (step := _step(line)) is not None}
    return [by_step[step] for step in sorted(by_step)]


def _step(line: Json) -> int | None:
    step = line.get("step")
    is_usable = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 10**12
    return step if is_usable else None


def _number(value: Any) -> float | None:
    """A logged number; None for a gap, for what is no number, and for what only a diverged run logs."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > BIGGEST_NUMBER or not math.isfinite(value):
        return None
    return float(value) if abs(value) > 1 / BIGGEST_NUMBER else 0.0


def _whole(value: Any) -> int | None:
    is_usable = isinstance(value, int) and not isinstance(value, bool) and abs(value) < BIGGEST_NUMBER
    return value if is_usable else None


def _text(value: Any, depth: int = 0) -> str:
    """A value of the configuration or of a summary in one line; what is nested deeper than any of ours is left out."""
    if depth > DEEPEST_VALUE:
        return "\u2026"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item, depth + 1)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(item, depth + 1) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _shown(value: Any) -> str:
    """A question or an answer, cut to ``LONGEST_TEXT``."""
    text = value if isinstance(value, str) else _text(value)
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}\u2026 ({len(text) - LONGEST_TEXT:,} more characters)"


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
        during = [line for line in evals if line.get("when") == "during" and _step(line) is not None]
        if during:
            named.append((f"At step {during[-1]['step']:,}, the last score so far", during[-1]))
    return [headline for label, line in named if line is not None and (headline := _headline(label, line)) is not None]


def _headline(label: str, line: Json) -> Headline | None:
    score = _number(line.get("score"))
    if score is None:
        return None
    return Headline(
        label=label,
        metric=_metric_name(line.get("metric")),
        score=100 * score,
        low=_percent(line.get("low")),
        high=_percent(line.get("high")),
        confidence=_percent(line.get("confidence")),
        n=_whole(line.get("n")),
    )


def _metric_name(metric: Any) -> str:
    return METRIC_NAMES.get(metric, metric) if isinstance(metric, str) else "score"


def _percent(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else 100 * number


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
    trainable, parameters = _whole(audit.get("trainable")), _whole(audit.get("parameters"))
    if trainable is not None and parameters:
        share = 100 * trainable / parameters
        own = _short_count(parameters)
        facts.append(Fact("trainable parameters", f"{_short_count(trainable)}, {share:.3g} % of the model's {own}"))
    if not steps:
        return facts
    epoch = _number(steps[-1].get("epoch"))
    reached = f"{steps[-1]['step']:,}"
    facts.append(Fact("optimizer steps", reached if epoch is None else f"{reached} (epoch {epoch:.3g})"))
    elapsed = _number(steps[-1].get("elapsed_s"))
    if elapsed is not None:
        facts.append(Fact("training time", _duration(elapsed)))
    for key, name in (("samples_per_s", "median samples/s"), ("tokens_per_s", "median tokens/s")):
        speeds = [speed for line in steps if (speed := _number(line.get(key))) is not None]
        if speeds:
            facts.append(
                Fact(
                    name,
                    f"{statistics.median(speeds):,.3g}" if max(speeds) < 1000 else f"{statistics.median(speeds):,.0f}",
                )
            )
    peaks = [peak for line in steps if (peak := _number(line.get("memory_bytes"))) is not None]
    if peaks:
        facts.append(Fact("peak memory", _bytes(max(peaks))))
    return facts


def _notes(
    steps: Sequence[Json], after: Json | None, parts: Sequence[PartRow], data: Json, missing_images: int
) -> list[str]:
    """What a reader must not overlook."""
    notes = []
    result_step = None if after is None else _step(after)
    if steps and result_step is not None and result_step < steps[-1]["step"]:
        notes.append(f"The result is the model of step {result_step:,}; training went on to {steps[-1]['step']:,}.")
    lost = sum(1 for line in steps if "loss" in line and _number(line["loss"]) is None)
    if lost:
        notes.append(f"{lost:,} of {len(steps):,} logged steps have a loss that is not finite; they are gaps below.")
    silent = [row.name for row in parts if row.is_silent]
    if silent:
        notes.append(f"No gradient reached these trainable parts: {', '.join(silent)}.")
    for split, summary in _splits(data):
        losses = []
        skipped = summary.get("skipped")
        if isinstance(skipped, Mapping):
            losses += [f"{count:,} skipped ({reason})" for reason, value in skipped.items() if (count := _whole(value))]
        losses += [f"{count:,} {key}" for key in ("skipped", "dropped", "cut") if (count := _whole(summary.get(key)))]
        if losses:
            notes.append(f"Samples not used whole{f' in {split}' if split else ''}: {', '.join(losses)}.")
    if missing_images:
        notes.append(f"{missing_images:,} of the images below could not be shown; the reason stands in their place.")
    return notes


def _charts(steps: Sequence[Json], evals: Sequence[Json]) -> list[charts.Chart]:
    numbers = [line["step"] for line in steps]

    def values(key: str, divisor: float = 1.0) -> list[float | None]:
        return [None if (number := _number(line.get(key))) is None else number / divisor for line in steps]

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
    scored = {line["step"]: line for line in _by_step(evals) if _number(line.get("score")) is not None}
    intervals = [
        charts.Interval(value, _percent(line.get("low")), _percent(line.get("high")))
        for line in scored.values()
        if (value := _percent(line.get("score"))) is not None
    ]
    if len(intervals) < 2:
        return None
    metric = _metric_name(next(iter(scored.values())).get("metric"))
    return charts.scores(f"Evaluation: {metric}", list(scored), intervals)


def _eval_rows(evals: Sequence[Json]) -> list[dict[str, str]]:
    rows = []
    for line in evals:
        score, low, high = (_percent(line.get(key)) for key in ("score", "low", "high"))
        seconds, step, n = _number(line.get("seconds")), _step(line), _whole(line.get("n"))
        rows.append(
            {
                "when": _text(line.get("when")),
                "step": "" if step is None else f"{step:,}",
                "score": "none" if score is None else f"{score:.1f} %",
                "interval": "" if low is None or high is None else f"{low:.1f} to {high:.1f}",
                "n": "" if n is None else f"{n:,}",
                "seconds": "" if seconds is None else _duration(seconds),
            }
        )
    return rows


def _examples(
    run: RunDirectory, config: Json, evals: Sequence[Json], notes: list[str]
) -> tuple[list[ExampleGroup], str, int]:
    """Chooses the predictions to show: the result's or else the latest, beside those from before training.

    Returns:
        The groups, a sentence that says which predictions they are, and how many images could not be shown.
    """
    steps = run.prediction_steps()
    if not steps:
        return [], "", 0
    moments = {line["step"]: _text(line.get("when")) for line in _by_step(evals)}
    first_step = next((step for step, when in moments.items() if when == "before"), 0)
    # The result may be an earlier checkpoint than the last one scored.
    last_step = next((step for step, when in moments.items() if when == "after" and step in steps), steps[-1])
    last_rows = _read(lambda: run.predictions(last_step), notes) or []
    has_both = first_step != last_step and first_step in steps
    first_rows = (_read(lambda: run.predictions(first_step), notes) or []) if has_both else []
    earlier = {_question_key(row): row for row in first_rows}
    paired = [(row, earlier.get(_question_key(row))) for row in last_rows]
    last_label = {"before": "Before", "after": "After"}.get(moments.get(last_step, ""), f"Step {last_step:,}")
    groups, missing = [], 0
    for title, total, members in _choose(_grouped(paired)):
        examples = []
        for last, first in members:
            answers = [_answer("Before", first)] if first is not None else []
            examples.append(_example(last, (*answers, _answer(last_label, last)), config))
        missing += sum(1 for example in examples for thumbnail in example.thumbnails if thumbnail.problem)
        groups.append(ExampleGroup(title, total, tuple(examples)))
    beside = ", beside those from before training" if first_rows else ""
    return groups, f"The model's answers at step {last_step:,}{beside}.", missing


def _question_key(row: Json) -> tuple[str, str]:
    return _text(row.get("id")), _text(row.get("turn"))


def _is_right(row: Json) -> bool:
    return (_number(row.get("score")) or 0.0) >= RIGHT_FROM


def _grouped(paired: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Sorts questions by how they fared, the groups in the order in which they are worth reading."""
    titles = {
        (False, True): "Became right",
        (True, False): "Became wrong",
        (False, False): "Still wrong",
        (True, True): "Stayed right",
        (None, False): "Wrong",
        (None, True): "Right",
    }
    groups: dict[str, list[Pair]] = {title: [] for title in titles.values()}
    for last, first in paired:
        groups[titles[None if first is None else _is_right(first), _is_right(last)]].append((last, first))
    return {title: members for title, members in groups.items() if members}


def _choose(groups: Mapping[str, list[Pair]]) -> list[tuple[str, int, list[Pair]]]:
    """Shares ``MOST_SAMPLES`` out, one to each group in turn, and takes each group's share evenly over its length.

    Returns:
        Each group's title, its size, and the pairs chosen from it.
    """
    shares = dict.fromkeys(groups, 0)
    while sum(shares.values()) < MOST_SAMPLES:
        open_groups = [title for title in groups if shares[title] < len(groups[title])]
        if not open_groups:
            break
        for title in open_groups[: MOST_SAMPLES - sum(shares.values())]:
            shares[title] += 1
    chosen = []
    for title, members in groups.items():
        share = shares[title]
        shown = [members[index * len(members) // share] for index in range(share)]
        chosen.append((title, len(members), shown))
    return chosen


def _answer(label: str, row: Json) -> Answer:
    prediction = row.get("prediction")
    return Answer(label, "" if prediction is None else _shown(prediction), _number(row.get("score")), _is_right(row))


def _example(row: Json, answers: tuple[Answer, ...], config: Json) -> Example:
    names = row.get("images")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    shown = names[:MOST_IMAGES_A_SAMPLE]
    longest_px = THUMBNAIL_PX if len(shown) == 1 else THUMBNAIL_PX // 2
    turn = _whole(row.get("turn"))
    accepted = row.get("answers")
    thumbnails = tuple(_thumbnail(name, _image_roots(row, config), longest_px) for name in shown)
    return Example(
        name=_text(row.get("id")) + (f", turn {turn + 1}" if turn else ""),
        question=_shown(row.get("question")),
        expected=_shown(" | ".join(dict.fromkeys(map(_text, accepted))) if isinstance(accepted, list) else accepted),
        answers=answers,
        thumbnails=thumbnails,
        images_left_out=len(names) - len(shown),
        is_tiny=len(thumbnails) == 1 and thumbnails[0].is_pixelated,
    )


def _image_roots(row: Json, config: Json) -> list[Path]:
    """The folders that relative image paths may be relative to, in the order in which the data reader tries them."""
    for named in (row.get("image_dir"), config.get("image_dir")):
        if isinstance(named, str) and named:
            return [Path(named)]
    data = config.get("eval_data") or config.get("data")
    files = [data] if isinstance(data, str) else data if isinstance(data, list) else []
    folders = [Path(file).parent for file in files if isinstance(file, str)]
    return [root for folder in folders for root in (folder / "images", folder)]


def _thumbnail(name: str, roots: Sequence[Path], longest_px: int) -> Thumbnail:
    """Reads, scales and encodes one image. It is encoded anew, so its file's metadata does not travel along."""
    alt = Path(name).name or name
    if "\0" in name or "://" in name or name.startswith(("//", "\\\\")):
        return Thumbnail(alt, None, 0, 0, False, "its path is not one of this machine")
    path = _find_image(name, roots)
    if path is None:
        return Thumbnail(alt, None, 0, 0, False, "the file is not there")
    try:
        image = read_image(path)
    except UnusableImageError as error:
        return Thumbnail(alt, None, 0, 0, False, error.reason)
    except OSError:
        return Thumbnail(alt, None, 0, 0, False, "the file cannot be read")
    return _encode_thumbnail(alt, image, longest_px)


def _find_image(name: str, roots: Sequence[Path]) -> Path | None:
    if Path(name).is_absolute():
        candidates = [Path(name)]
    elif Path(os.path.normpath(name)).parts[:1] == (os.pardir,):
        candidates = []
    else:
        candidates = [root / name for root in roots]
    return next((path for path in candidates if _is_file(path)), None)


def _is_file(path: Path) -> bool:
    """Whether this is a regular file: neither a device nor a pipe, which would never end."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _encode_thumbnail(alt: str, image: Image.Image, longest_px: int) -> Thumbnail:
    longest = max(image.size)
    is_tiny = longest <= TINY_PX
    if longest > longest_px:
        image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    # Whole multiples keep every pixel of a tiny image square and equal.
    zoom = max(1, longest_px // 2 // longest) if is_tiny else 1
    # Comments and colour profiles would be saved too; the model sees none of them.
    image.info = {}
    buffer = io.BytesIO()
    if is_tiny:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82, optimize=True)
    kind = "png" if is_tiny else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    return Thumbnail(alt, source, image.width * zoom, image.height * zoom, is_tiny, None)


def _part_rows(audit: Json) -> list[PartRow]:
    parts = audit.get("parts")
    if isinstance(parts, Mapping):
        parts = [{"part": name, **row} for name, row in parts.items() if isinstance(row, Mapping)]
    rows = [row for row in parts if isinstance(row, Mapping)] if isinstance(parts, list) else []
    return [_part_row(row) for row in rows]


def _part_row(row: Json) -> PartRow:
    parameters, trainable = _whole(row.get("parameters")), _whole(row.get("trainable"))
    layers, covered = _whole(row.get("linear_layers")), _whole(row.get("lora_layers"))
    gradient = _number(row.get("gradient_norm"))
    share = None if trainable is None or not parameters else 100 * trainable / parameters
    return PartRow(
        name=_text(row.get("part")),
        parameters="?" if parameters is None else _short_count(parameters),
        parameters_exact="?" if parameters is None else f"{parameters:,}",
        share=share,
        lora="" if not covered else f"{covered:,}" if layers is None else f"{covered:,}/{layers:,}",
        gradient="\N{EN DASH}" if gradient is None else f"{gradient:.2g}",
        is_silent=bool(trainable) and "gradient_norm" in row and not gradient,
    )


def _audit_facts(audit: Json) -> list[Fact]:
    """What the audit says beyond its table, whatever its keys."""
    return [
        Fact(_humanised(key), _quantity(key, value))
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
        [Fact(_humanised(key), _quantity(key, value)) for key, value in summary.items() if key != "problems"],
        [_shown(problem) for problem in problems] if isinstance(problems, list) else [],
    )


def _environment_facts(environment: Json) -> list[Fact]:
    facts = []
    for key, value in environment.items():
        if value is None or value == [] or value == {}:
            continue
        if key == "packages" and isinstance(value, Mapping):
            facts += [Fact(str(package), _text(version)) for package, version in value.items()]
        else:
            facts.append(Fact(_humanised(key), _quantity(key, value)))
    return facts


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
    return _bytes(total)


def _humanised(key: str) -> str:
    names = {
        "phi3v": "phi3v",
        "cpu": "CPU",
        "cpu_count": "CPU cores",
        "gpus": "GPUs",
        "git": "source commit",
        "lora": "LoRA",
    }
    if key in names:
        return names[key]
    for suffix in ("_bytes", "_s"):
        key = key.removesuffix(suffix)
    return key.replace("_", " ")


def _quantity(key: str, value: Any, depth: int = 0) -> str:
    """A summary's value with the unit that its key ends in."""
    if depth > DEEPEST_VALUE:
        return "\u2026"
    if isinstance(value, Mapping):
        items = (f"{_humanised(str(name))}: {_quantity(str(name), item, depth + 1)}" for name, item in value.items())
        return ", ".join(items) or "none"
    if isinstance(value, list):
        return "; ".join(_quantity(key, item, depth + 1) for item in value) or "none"
    number = _number(value)
    if number is None:
        return _text(value)
    if key.endswith("_bytes"):
        return _bytes(number)
    if key.endswith("_s") or key == "seconds":
        return _duration(number)
    return f"{value:,}" if isinstance(value, int) else f"{number:,.4g}"


def _short_count(count: int) -> str:
    """A count in three digits: ``4.15 B``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{NO_BREAK}{letter}"
    return str(count)


def _bytes(count: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g}{NO_BREAK}{unit}"
    return f"{count:.0f}{NO_BREAK}bytes"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
