"""The words that fields take, and the headings they stand under."""

from typing import Literal, get_args

Part = Literal["vision", "projector", "decoder", "embeddings", "head"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of the model that a run freezes, adapts or gives a learning rate of its own."""

LORA_PARTS: tuple[Part, ...] = ("vision", "projector", "decoder", "head")
"""Where adapters stand unless ``lora_parts`` says otherwise."""

FOUR_BIT_PARTS: tuple[Part, ...] = ("vision", "projector", "decoder")
"""Parts that can be held in 4 bit."""

Metric = Literal["accuracy", "exact_match", "anls", "vqa_accuracy", "relaxed_accuracy", "f1"]
Scoring = Literal["generate", "likelihood", "both"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RopeMode = Literal["auto", "short", "long"]
Device = Literal["auto", "cpu", "cuda"]

MODEL_AND_DATA = "model and data"
METHOD = "method"
OPTIMISATION = "optimisation"
HARDWARE = "hardware"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
LOGGING = "logging"
SECTIONS = (MODEL_AND_DATA, METHOD, OPTIMISATION, HARDWARE, CHECKPOINTS, EVALUATION, LOGGING)

MAX_SEED = 2**32 - 1
"""The largest seed that every random generator in use takes."""

SCORING_DOC = (
    "Where answers come from. Generate: greedy generation. Likelihood: the likeliest label, for questions with a "
    "closed set of labels; gives probabilities. Both: generated answers are scored, and probabilities taken besides."
)
LABELS_DOC = "Closed set of answers of every question that names none itself (docs/data.md). None: open questions."
