"""Shows that the fast path learns: a mid-size model on a GPU, real images, bf16 or fp16, packed, beginnings shared.

The model has the published sizes of heads and special tokens, a decoder of 6 layers of 768 and a CLIP of 5 layers of
256 on 112-px crops, random weights. Full training learns three questions about scikit-learn's digits and one about a
pair of them; then adapters learn a question that the model was never asked. Everything runs as ``phi3v train`` does.

    python benchmarks/learning.py OUTPUT_DIR [--precision bf16] [--data FOLDER] [--float8]
    python benchmarks/learning.py OUTPUT_DIR --small       # the demo's model of 0.5 M, on a CPU too

``--data``: a folder that ``phi3v demo`` wrote (its ``data``), for machines without scikit-learn.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from phi3v.config import TrainConfig
from phi3v.demo import build_model, write_data
from phi3v.runlog import RunDirectory
from phi3v.train.run import run_training

SIZES: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
}


def train(folder: Path, name: str, **settings: Any) -> None:
    """Trains one run and prints what it reached."""
    started = time.perf_counter()
    config = TrainConfig(
        output_dir=folder / name,
        batch_size=64,
        warmup_steps=40,
        save_steps=None,
        eval_max_new_tokens=10,
        logging_steps=10,
        report_to=[],
        num_workers=8,
        progress=False,
        **settings,
    )
    run = RunDirectory(run_training(config)).open()
    steps, evals = run.steps(), run.evals()
    data = json.loads((run.path / "data.json").read_text("utf-8"))
    print(f"\n{name}: {steps[-1]['step']} steps, {time.perf_counter() - started:.0f} s, {config.precision}")
    print("  loss " + ", ".join(f"{line['step']}: {line['loss']:.3f}" for line in steps[:: max(1, len(steps) // 8)]))
    print("  accuracy " + ", ".join(f"{line['when']} {line['score']:.4f}" for line in evals))
    print(f"  last step {json.dumps(steps[-1])}")
    print(f"  sharing {json.dumps(data['train'].get('sharing'))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--epochs", type=float, default=5)
    options = parser.parse_args()
    folder: Path = options.output_dir
    data = options.data
    if data is None:
        data = folder / "data"
        write_data(data)
    build_model(folder / "base", **({} if options.small else SIZES))
    shared = {"precision": options.precision, "fp8": options.float8}
    splits = {"train_data": [data / "train.jsonl"], "eval_data": [data / "test.jsonl"]}
    rate = 2e-3 if options.small else 4e-4
    full = {"model": str(folder / "base"), "method": "full", "learning_rate": rate, "num_train_epochs": options.epochs}
    train(folder, "full", **full, **splits, **shared)
    train(folder, "full, nothing shared", **full, **splits, **shared, shared_questions=1)
    spell = {"train_data": [data / "spell-train.jsonl"], "eval_data": [data / "spell-test.jsonl"]}
    adapters: dict[str, Any] = {"method": "lora", "lora_rank": 16, "lora_alpha": 32, "learning_rate": 2e-3}
    train(folder, "lora", model=str(folder / "full" / "model"), num_train_epochs=4, **adapters, **spell, **shared)


if __name__ == "__main__":
    main()
