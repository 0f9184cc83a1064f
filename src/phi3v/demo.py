"""``phi3v demo``: a small Phi-3.5-vision learns from real images, through the same verbs that train the real one.

The images are scikit-learn's handwritten digits; the model has the published architecture at toy sizes, built in place,
and a tokenizer with the published special tokens. Everything else is what a user of the real weights runs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from .errors import ConfigError, Phi3VError
from .model.checkpoint import save_model
from .model.configuration_phi3_v import Phi3VConfig
from .model.modeling_phi3_v import Phi3VForCausalLM
from .model.processing_phi3_v import Phi3VProcessor
from .runlog import RunDirectory

SEED = 0
NUM_TEST_IMAGES = 360

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = {
    "Which digit?": lambda digit: str(digit),
    "Even or odd?": lambda digit: "odd" if digit % 2 else "even",
    "Above four?": lambda digit: "yes" if digit > 4 else "no",
}
PAIR_QUESTION = "Larger digit?"
NEW_QUESTION = "Spell the digit."

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>")
STRIP_RIGHT = ("</s>", "<|assistant|>", "<|image|>")
"""Tokens that swallow the white space behind them, as in the published tokenizer."""


def build_tokenizer(folder: Path) -> dict[str, int]:
    """Writes a byte-level tokenizer with the published special tokens and chat format; returns its vocabulary.

    A printable character is one token, any other text falls back to its bytes; so nothing is ever unknown.
    """
    tokens = [
        *SPECIAL_TOKENS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        *CHAT_TOKENS,
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    added = {
        str(vocabulary[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": token in STRIP_RIGHT,
            "single_word": False,
            "special": token != "</s>",
        }
        for token in (*SPECIAL_TOKENS, *CHAT_TOKENS)
    }
    tokenizer.add_tokens([AddedToken(**settings) for settings in added.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "processor_class": "Phi3VProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    return vocabulary


def build_model(folder: Path, **sizes: Any) -> None:
    """Writes a small random model of the published architecture: 32-px crops, 4 image tokens each.

    Args:
        folder: where to.
        sizes: fields of ``Phi3VConfig`` that take other values.
    """
    parts = folder.with_name(f".{folder.name}.parts")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    ids = build_tokenizer(parts)
    settings: dict[str, Any] = dict(  # noqa: C408 - reads as the call it stands for
        vocab_size=len(ids),
        bos_token_id=ids["<s>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|endoftext|>"], ids["<|end|>"]],
        image_token_id=ids["<|image|>"],
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_scaling={"type": "su", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    config = Phi3VConfig(**settings | sizes)
    (parts / "config.json").write_text(config.to_json_string(), "utf-8")
    (parts / "preprocessor_config.json").write_text(json.dumps({"num_crops": 1}), "utf-8")
    torch.manual_seed(SEED)
    save_model(Phi3VForCausalLM(config), Phi3VProcessor.from_pretrained(parts), folder)
    shutil.rmtree(parts)


def write_data(folder: Path) -> None:
    """Writes scikit-learn's 1,797 digit images as PNG and the questions about them as JSONL, split by image.

    ``train.jsonl`` / ``test.jsonl``: three questions about every image, one about a pair. ``spell-train.jsonl`` /
    ``spell-test.jsonl``: a question that the first model never saw. ``again-train.jsonl`` / ``again-test.jsonl``: a
    quarter of the old questions, one about every image, so that the new one does not displace them.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the demo's images come with scikit-learn: pip install 'phi3v[demo]'") from error
    digits: Any = load_digits()
    images = folder / "images"
    images.mkdir(parents=True)
    for index, pixels in enumerate(digits.images):  # 8 x 8 px, ink 0 to 16
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(images / f"{index:04}.png")
    order = random.Random(SEED).sample(range(len(digits.images)), len(digits.images))
    for split, indices in (("test", order[:NUM_TEST_IMAGES]), ("train", order[NUM_TEST_IMAGES:])):
        samples = [sample for index in indices for sample in _questions_about(index, indices, digits.target)]
        _write_jsonl(folder / f"{split}.jsonl", samples)
        spelled = [
            _sample(f"spell-{index:04}", [index], NEW_QUESTION, DIGIT_NAMES[digits.target[index]]) for index in indices
        ]
        _write_jsonl(folder / f"spell-{split}.jsonl", spelled)
        _write_jsonl(folder / f"again-{split}.jsonl", [samples[4 * place + place % 4] for place in range(len(indices))])


def _questions_about(index: int, indices: Sequence[int], target: Sequence[int]) -> list[dict[str, Any]]:
    """Asks about one image, and about it beside another of the same split."""
    digit = int(target[index])
    samples = [
        _sample(f"{index:04}-{number}", [index], question, answer(digit))
        for number, (question, answer) in enumerate(QUESTIONS.items())
    ]
    other = random.Random(f"{SEED}-{index}").choice(indices)
    larger = max(digit, int(target[other]))
    return [*samples, _sample(f"{index:04}-{other:04}", [index, other], PAIR_QUESTION, str(larger))]


def _sample(name: str, indices: Sequence[int], question: str, answer: str) -> dict[str, Any]:
    turn = {"images": [f"{index:04}.png" for index in indices], "user": question, "assistant": answer}
    return {"id": name, "source": "scikit-learn digits", "conversations": [turn]}


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


FULL_YAML = """\
# Every weight of the small random model learns to read digits.
model: {folder}/base-model
train_data: [{folder}/data/train.jsonl]
eval_data: [{folder}/data/test.jsonl]
output_dir: {folder}/full
method: full
precision: fp32
learning_rate: 1.5e-3
num_train_epochs: 4
batch_size: 32
save_steps: 100
eval_batch_size: 120
eval_max_new_tokens: 8
num_workers: 0
logging_steps: {logging_steps}
device: cpu
"""

LORA_YAML = """\
# Adapters teach the trained model a question that it has never been asked, beside some that it knows.
model: {folder}/full/model
train_data: [{folder}/data/spell-train.jsonl, {folder}/data/again-train.jsonl]
eval_data: [{folder}/data/spell-test.jsonl, {folder}/data/again-test.jsonl]
output_dir: {folder}/lora
method: lora
lora_rank: 8
lora_alpha: 16
precision: fp32
learning_rate: 3e-3
num_train_epochs: 3
batch_size: 32
warmup_steps: 10
save_steps: 100
eval_batch_size: 120
eval_max_new_tokens: 10
num_workers: 0
logging_steps: {logging_steps}
device: cpu
"""

LOGGING_STEPS = 10
KILL_AT_STEP = 150
"""The full run is killed here, half way between two checkpoints."""


def run_demo(folder: Path) -> None:
    """Builds, trains, kills, resumes, adapts, exports, evaluates, asks and reports, printing every command it runs.

    Args:
        folder: made anew; an older demo's folder of that name is replaced, any other is refused.

    Raises:
        ConfigError: the folder holds something else than an older demo, or scikit-learn is missing.
        Phi3VError: a step failed; its output stands above.
    """
    started = time.monotonic()
    _clear(folder)
    _say("Build a small random model and write the digits as PNG and JSONL")
    build_model(folder / "base-model")
    write_data(folder / "data")
    for name, text in (("full.yaml", FULL_YAML), ("lora.yaml", LORA_YAML)):
        (folder / name).write_text(text.format(folder=folder, logging_steps=LOGGING_STEPS), "utf-8")

    _say("Full fine-tuning, killed on the way")
    _train_and_kill(folder)
    _say("The same command again: it goes on from the last checkpoint")
    _phi3v("train", folder / "full.yaml")
    _say("LoRA on the trained model: a new question")
    _phi3v("train", folder / "lora.yaml")
    _say("Export: merge the adapter, reload the result in a fresh process and compare the two")
    _phi3v("export", folder / "lora", folder / "exported")
    _say("The exported folder answers the new question and the old ones from the test set")
    data = folder / "data"
    _phi3v(
        *("eval", "--model", folder / "exported", "--data", data / "spell-test.jsonl", data / "test.jsonl"),
        *("--output_dir", folder / "eval-exported", "--batch_size", "120", "--max_new_tokens", "10"),
        *("--device", "cpu"),
    )
    image = folder / "data" / "images" / "0003.png"
    _phi3v("generate", "--model", folder / "exported", "--image", image, "--prompt", NEW_QUESTION, "--device", "cpu")
    _say("Reports")
    for run in ("full", "lora"):
        _phi3v("report", folder / run)
    _say(f"Done in {time.monotonic() - started:.0f} s")
    print(_summary(folder))


def _clear(folder: Path) -> None:
    marker = folder / ".phi3v-demo"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise ConfigError(f"{folder} holds something else than an older demo; give another --output_dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(*arguments: str | Path) -> list[str]:
    print("$ phi3v " + " ".join(map(str, arguments)), flush=True)
    return [sys.executable, "-m", "phi3v", *map(str, arguments)]


def _phi3v(*arguments: str | Path) -> None:
    if subprocess.run(_command(*arguments), check=False).returncode != 0:
        raise Phi3VError(f"phi3v {arguments[0]} failed; its message stands above")


def _train_and_kill(folder: Path) -> None:
    """Starts the full run and kills it, as a power cut would, once it is past KILL_AT_STEP."""
    process = subprocess.Popen(_command("train", folder / "full.yaml"))
    steps = folder / "full" / "steps.jsonl"
    while process.poll() is None:
        time.sleep(0.1)
        lines = steps.read_text("utf-8").splitlines() if steps.exists() else []
        if len(lines) * LOGGING_STEPS >= KILL_AT_STEP:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            print(f"-- killed after step {len(lines) * LOGGING_STEPS}", flush=True)
            return
    raise Phi3VError("the training run ended before it could be killed; its message stands above")


def _summary(folder: Path) -> str:
    """Tabulates accuracy before and after, by question, from the runs' own records."""
    title = f"accuracy, {NUM_TEST_IMAGES} held-out images"
    lines = [f"{'run':5} {'question':16} {'before':>8} {'after':>8} {'chance':>8}   {title}"]
    for name in ("full", "lora"):
        run = RunDirectory(folder / name).open()
        first, *_, last = run.prediction_steps()
        before, after = _scores_by_question(run, first), _scores_by_question(run, last)
        for question, rows in after.items():
            answers = Counter(row["answers"][0] for row in rows)
            chance = answers.most_common(1)[0][1] / len(rows)
            lines.append(f"{name:5} {question:16} {_mean(before[question]):8.1%} {_mean(rows):8.1%} {chance:8.1%}")
    lines += [
        "(chance: always giving the commonest answer)",
        "",
        f"The reports, each one file:  {folder}/full/report.html  {folder}/lora/report.html",
    ]
    return "\n".join(lines)


def _scores_by_question(run: RunDirectory, step: int) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in run.predictions(step):
        rows.setdefault(row["question"], []).append(row)
    return rows


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["score"] for row in rows) / len(rows)
