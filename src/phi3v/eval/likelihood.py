"""How likely a model finds each label of a closed set as the answer to a prompt."""

from collections.abc import Sequence

import torch

from ..data.schema import Sample, Turn, render
from ..model.processing_phi3_v import END_OF_TURN, Phi3VProcessor


def label_token_ids(processor: Phi3VProcessor, label: str) -> tuple[int, ...]:
    """Returns the ids of a label as an answer, ``<|end|>`` included: those that training supervises.

    What training writes behind ``<|end|>`` is the same for every label and for the model to ignore.
    """
    turn = Turn(user="", assistant=label, images=(), answers=(label,))
    sample = Sample(id="label", turns=(turn,), system=None, num_crops=None, source=None, where="labels")
    ids = processor.encode(render(sample)[-1].text, add_bos=False)
    return tuple(ids[: ids.index(processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)) + 1])


def label_probabilities(log_likelihoods: Sequence[float]) -> tuple[float, ...]:
    """Returns each label's share of the labels' likelihood; they sum to 1."""
    return tuple(torch.tensor(log_likelihoods, dtype=torch.float64).softmax(dim=0).tolist())
