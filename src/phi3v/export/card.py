"""The model card: what was trained on what, how it scored, how it is loaded, and what was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .comparison import Comparison
from .layout import CODE_REPOSITORY
from .trained import PUBLISHED_MODELS, Trained

SETTINGS = (
    "method",
    "freeze",
    "lora_rank",
    "lora_alpha",
    "lora_parts",
    "precision",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "warmup_steps",
    "weight_decay",
    "max_length",
    "on_overlong",
    "num_crops",
    "rope_mode",
    "loss_weighting",
    "seed",
)
"""Fields of a run's configuration that the card shows where the run has them; none of them holds a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What the card says of the folder itself.

    Attributes:
        name: of the model: the folder's, or the repository's.
        short_positions: longest sequence that the short factors reach where both are there, positions.
        num_crops: most tiles of an image.
        use_auto_map: whether it points to the original's code.
        comparison: of the folder with the trained model.
    """

    name: str
    short_positions: int
    num_crops: int
    use_auto_map: bool
    comparison: Comparison


def model_card(trained: Trained, exported: Exported) -> str:
    """Returns the README.md of an exported folder, with the hub's metadata at its head."""
    base = trained.published_base()
    sections = [
        _front_matter(trained, base),
        f"# {exported.name}",
        _opening(trained, base),
        _scores(trained),
        _data(trained),
        _settings(trained),
        _loading(exported),
        _serving(trained, exported),
        _check(exported.comparison),
        _licence(base),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(trained: Trained, base: str | None) -> str:
    """The licence is that of the published models, and stands only where the base is known to be one of them."""
    tags = ["phi3_v", "phi3v", "vision", "multimodal", *(["lora"] if trained.base else [])]
    head: dict[str, Any] = {}
    if base in PUBLISHED_MODELS.values():
        head["license"] = "mit"
    if base is not None:
        head |= {"base_model": base, "base_model_relation": "finetune"}
    head |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": tags}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _opening(trained: Trained, base: str | None) -> str:
    start = f"[{base}](https://huggingface.co/{base})" if base else "a model of the Phi-3.5-vision architecture"
    method = trained.settings.get("method")
    how = f" (method `{method}`)" if method else ""
    merged = " The adapters are merged into the weights." if trained.base else ""
    return f"{start}, fine-tuned with phi3v{how}.{merged}"


def _scores(trained: Trained) -> str:
    if trained.run is None:
        return ""
    taken = {when: trained.run.evaluation(when) for when in ("before", "after")}
    rows = []
    for when, line in taken.items():
        if line is None or line.get("score") is None:
            continue
        row = [f"{when} training", str(line.get("metric")), f"{line['score']:.4f}", _interval(line), str(line.get("n"))]
        rows.append(row)
    if not rows:
        return ""
    confidence = next(line["confidence"] for line in taken.values() if line and line.get("score") is not None)
    heads = ["evaluation data", "metric", "score", f"{confidence:.0%} interval", "questions"]
    return f"## Scores\n\n{_table(heads, rows)}"


def _interval(line: Mapping[str, Any]) -> str:
    return f"{line['low']:.4f} to {line['high']:.4f}"


def _data(trained: Trained) -> str:
    if trained.run is None:
        return ""
    summaries = trained.run.data() or {}
    rows = []
    for split in ("train", "eval"):
        files, summary = trained.settings.get(f"{split}_data") or [], summaries.get(split)
        if summary is None:
            continue
        names = ", ".join(f"`{Path(file).name}`" for file in files)
        left_out = sum((summary.get("skipped") or {}).values()) + summary.get("dropped", 0)
        counts = [f"{summary[key]:,}" for key in ("samples", "turns", "images", "max_tokens")]
        rows.append([split, names, *counts, f"{left_out:,}", f"`{summary['fingerprint'][:16]}`"])
    if not rows:
        return ""
    heads = ["split", "files", "samples", "questions", "images", "longest, tokens", "left out", "fingerprint"]
    return f"## Data\n\n{_table(heads, rows)}"


def _settings(trained: Trained) -> str:
    shown = [(name, trained.settings.get(name)) for name in SETTINGS]
    shown = [(name, value) for name, value in shown if value is not None and value != []]
    rows = [[f"`{name}`", _in_words(value)] for name, value in shown]
    if trained.run is not None and (after := trained.run.evaluation("after")) is not None:
        rows.append(["optimizer steps", f"{after['step']:,}"])
    return f"## Settings\n\n{_table(['setting', 'value'], rows)}" if rows else ""


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _loading(exported: Exported) -> str:
    parts = [
        "## Loading\n\nWith phi3v, natively on transformers 5, no remote code:\n\n```python\n"
        "import phi3v  # registers phi3_v with the Auto classes\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n\n"
        f'processor = AutoProcessor.from_pretrained("{exported.name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{exported.name}", dtype="auto")\n```'
    ]
    if exported.use_auto_map:
        parts.append(
            f"With the original's code, as the original: `trust_remote_code=True` (its files come from "
            f"{CODE_REPOSITORY}; it needs a transformers version that it was written for)."
        )
    else:
        parts.append("The folder does not point to the original's code; `phi3v export --auto_map` writes that.")
    parts.append(
        "Chat format: `<|user|>\\n<|image_1|>\\nquestion<|end|>\\n<|assistant|>\\n`. Images are cut into at most "
        f"{exported.num_crops} tiles (`num_crops` in `preprocessor_config.json`)."
    )
    return "\n\n".join(parts)


def _serving(trained: Trained, exported: Exported) -> str:
    short = f"{exported.short_positions:,}"
    mode = exported.comparison.written_rope_mode
    known = f" The model was trained with `rope_mode: {trained.rope_mode}`." if trained.is_rope_mode_known else ""
    if mode == "auto":
        text = (
            f"LongRoPE: both factor sets are as published.{known}"
            f" phi3v chooses by each sequence's own length: short factors up to {short} positions, long ones beyond. "
            "The original's code chooses once a batch, vLLM once at start-up: short factors if `--max-model-len` is at "
            f"most {short}, else the long ones for every sequence."
        )
        longest = _longest_training_sample(trained)
        if longest is not None and longest <= exported.short_positions:
            text += (
                f" The longest training sample has {longest:,} positions, so it was trained with the short ones: serve "
                f"it with `--max-model-len {exported.short_positions}`."
            )
        elif longest is not None:
            text += (
                f" The longest training sample has {longest:,} positions: some samples were trained with the long "
                "factors, the others with the short ones, and no setting of vLLM serves both as they were trained."
            )
    else:
        text = (
            f"LongRoPE: the {mode} factors stand in both places of `rope_scaling`, so that every loader "
            f"and every `--max-model-len` of vLLM uses them.{known}"
        )
    needs = (
        "vLLM reads this folder as it reads the original, with `--trust-remote-code`"
        if exported.use_auto_map
        else "vLLM needs the pointers to the original's processor: `phi3v export --auto_map`"
    )
    return (
        f"## Serving\n\n{text}\n\n{needs}; `--mm-processor-kwargs '{{\"num_crops\": {exported.num_crops}}}'` says the "
        "number of tiles there. phi3v's authors have not tried vLLM on such a folder."
    )


def _longest_training_sample(trained: Trained) -> int | None:
    summaries = (trained.run.data() if trained.run else None) or {}
    return summaries.get("train", {}).get("max_tokens")


def _check(comparison: Comparison) -> str:
    return (
        "## Check\n\nBefore it was called done, this folder was loaded again in a fresh process: "
        f"{comparison}. All numbers: `export_check.json`."
    )


def _licence(base: str | None) -> str:
    if base in PUBLISHED_MODELS.values():
        weights = f"The base model, {base}, is Microsoft's, under the MIT licence, which these weights keep."
    elif base is not None:
        weights = f"These weights derive from {base}; its licence applies."
    else:
        weights = (
            "The base model is not known to the program that wrote this card: add `license` and `base_model` to its "
            "head. The published Phi-3.5-vision is Microsoft's, under the MIT licence."
        )
    return (
        f"## Licence\n\n{weights} The training data have licences of their own, which may bind what is trained on "
        "them: whoever publishes these weights has to check that."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
