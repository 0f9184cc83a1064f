"""How likely a model finds each label of a closed set as the answer to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from ..data.schema import Sample, Turn, render
from ..model.modeling_phi3_v import Phi3VForCausalLM
from ..model.processing_phi3_v import END_OF_TURN, Phi3VProcessor

MOST_LABEL_TOKENS = 1024
"""Label positions of one forward, over all rows: bounds their logits, 131 MB in float32 at 32064 tokens."""


def label_token_ids(processor: Phi3VProcessor, label: str) -> list[int]:
    """Returns the ids of a label as an answer, ``<|end|>`` included: those that training supervises.

    What training writes behind ``<|end|>`` is the same for every label and for the model to ignore.
    """
    turn = Turn(user="", assistant=label, images=(), answers=(label,))
    sample = Sample(id="label", turns=(turn,), system=None, num_crops=None, source=None, where="labels")
    ids = processor.encode(render(sample)[-1].text, add_bos=False)
    return ids[: ids.index(processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)) + 1]


@torch.inference_mode()
def label_log_likelihoods(
    model: Any, inputs: dict[str, torch.Tensor], label_ids: Sequence[Sequence[list[int]]]
) -> list[torch.Tensor]:
    """Scores labels as answers to left-padded prompts.

    Equals, up to rounding, one plain forward for every prompt and label, whose log-probabilities at the label's tokens
    and ``<|end|>`` are summed. Here images are embedded once and prompts computed once; the labels of a prompt then
    stand one behind the other in a row, each at the positions right after the prompt, and see the prompt's cached keys
    and their own earlier tokens only.

    LongRoPE chooses its factors by the length of the whole sequence. A label with which a prompt outgrows the short
    factors needs the prompt's keys with the long ones: the prompt is computed once more for such labels.

    Args:
        model: ``Phi3VForCausalLM``, or a ``PeftModel`` on one; its training flag is restored.
        inputs: B prompts as the collator gives them, padded on the left.
        label_ids: the labels of each prompt, at least one, as ``label_token_ids`` gives them.

    Returns:
        For every prompt its labels' log-likelihoods, nats, (num_labels,) float32 on the CPU.
    """
    was_training = model.training
    model.eval()
    try:
        return _score_all(_base_of(model), inputs, label_ids)
    finally:
        model.train(was_training)


def _base_of(model: Phi3VForCausalLM | PeftModel) -> Phi3VForCausalLM:
    """Returns the model itself, with its adapters in place."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, Phi3VForCausalLM)
    return base


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Prompts of one batch, images in place.

    Attributes:
        embedded: (B, L, hidden_size).
        mask: (B, L) int64, 0 at the padding on the left.
    """

    embedded: torch.Tensor
    mask: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        return self.mask.sum(dim=1)

    def rows(self, indices: Sequence[int]) -> "_Prompts":
        """Returns some of the prompts, without the padding that none of them needs."""
        mask = self.mask[list(indices)]
        longest = int(mask.sum(dim=1).max())
        return _Prompts(self.embedded[list(indices), -longest:], mask[:, -longest:])


def _score_all(
    model: Phi3VForCausalLM, inputs: dict[str, torch.Tensor], ids: Sequence[Sequence[list[int]]]
) -> list[torch.Tensor]:
    """Scores every row's labels, those apart that change the prompt's LongRoPE factors."""
    device = next(model.parameters()).device
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    embedded = model.model.embed(on_device["input_ids"], on_device.get("pixel_values"), on_device.get("image_sizes"))
    prompts = _Prompts(embedded, on_device["attention_mask"])
    scores = [torch.zeros(len(row)) for row in ids]
    rope = model.model.rotary_emb
    is_outgrown = [
        [rope.mode == "auto" and length <= rope.original_positions < length + len(label) for label in row]
        for row, length in zip(ids, prompts.lengths.tolist(), strict=True)
    ]
    usual = [[k for k, outgrown in enumerate(row) if not outgrown] for row in is_outgrown]
    rows = [index for index, places in enumerate(usual) if places]
    if rows:
        found = _score(model, prompts.rows(rows), [[ids[row][k] for k in usual[row]] for row in rows])
        for row, values in zip(rows, found, strict=True):
            scores[row][usual[row]] = values
    for row, outgrown in enumerate(is_outgrown):
        places = [k for k, is_one in enumerate(outgrown) if is_one]
        if places:
            own = [ids[row][k] for k in places]
            (scores[row][places],) = _score(model, prompts.rows([row]), [own], lead=own[0])
    return scores


def _score(
    model: Phi3VForCausalLM, prompts: _Prompts, ids: list[list[list[int]]], lead: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Scores labels that all leave their prompt's LongRoPE factors as they are when ``lead`` stands behind it.

    Args:
        model: in evaluation mode.
        prompts: B rows.
        ids: the tokens of each row's labels.
        lead: ids that are computed behind the only prompt and forgotten again, to get keys of the long factors.
    """
    embedded, mask = prompts.embedded, prompts.mask
    if lead:
        behind = torch.tensor([lead], device=mask.device)
        embedded = torch.cat([embedded, model.model.embed_tokens(behind).to(embedded.dtype)], dim=1)
        mask = torch.cat([mask, torch.ones_like(behind)], dim=1)
    cache = DynamicCache()
    last = prompts.mask.shape[1] - 1
    outputs = model(
        inputs_embeds=embedded,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor([last], device=mask.device),
    )
    cache.crop(-len(lead))
    first = outputs.logits[:, 0].float().log_softmax(dim=-1).cpu()
    scores = [torch.stack([first[row, label[0]] for label in labels]) for row, labels in enumerate(ids)]
    done = [0] * len(ids)
    while any(begin < len(labels) for begin, labels in zip(done, ids, strict=True)):
        packed = [
            _that_fit(labels[begin:], MOST_LABEL_TOKENS // len(ids)) for begin, labels in zip(done, ids, strict=True)
        ]
        for row, values in enumerate(_score_behind(model, prompts, cache, packed)):
            scores[row][done[row] : done[row] + len(values)] += values
            done[row] += len(values)
    return scores


def _that_fit(labels: list[list[int]], most_tokens: int) -> list[list[int]]:
    """Returns the first labels, as many as ``most_tokens`` allows and at least one where there is one."""
    fitting: list[list[int]] = []
    for label in labels:
        if fitting and sum(map(len, fitting)) + len(label) > most_tokens:
            break
        fitting.append(label)
    return fitting


def _score_behind(
    model: Phi3VForCausalLM, prompts: _Prompts, cache: DynamicCache, ids: list[list[list[int]]]
) -> list[torch.Tensor]:
    """Scores all tokens but the first of each label, given the prompts' cache, which is left as it was.

    A label's last token predicts nothing that counts. It is computed all the same: the length of the sequence, which
    LongRoPE asks for, is that of the whole label.

    Returns:
        For every row, (labels of the row,) float32 on the CPU.
    """
    device = prompts.mask.device
    num_tokens = max(sum(map(len, row)) for row in ids)
    tokens = torch.zeros(len(ids), num_tokens, dtype=torch.int64)
    offsets = torch.zeros_like(tokens)
    # The number of the label that a position belongs to; -1 for the filling behind a row's last label.
    owners = torch.full_like(tokens, -1)
    for row, labels in enumerate(ids):
        flat = [token for label in labels for token in label]
        tokens[row, : len(flat)] = torch.tensor(flat, dtype=torch.int64)
        offsets[row, : len(flat)] = torch.tensor([place for label in labels for place in range(len(label))])
        owners[row, : len(flat)] = torch.tensor([k for k, label in enumerate(labels) for _ in label])
    is_own = owners[:, :, None] == owners[:, None, :]
    is_earlier = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    is_prompt = prompts.mask.bool()[:, None, :].expand(-1, num_tokens, -1)
    is_seen = torch.cat([is_prompt, (is_own & is_earlier).to(device)], dim=2)[:, None]
    tokens = tokens.to(device)
    logits = model(
        input_ids=tokens,
        attention_mask=_as_attention_takes_it(model, is_seen),
        position_ids=prompts.lengths[:, None] + offsets.to(device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    cache.crop(-num_tokens)
    logits = logits[:, :-1].float()
    predicted = logits.gather(2, tokens[:, 1:, None])[..., 0] - logits.logsumexp(dim=2)
    predicted = predicted.cpu() * (owners[:, 1:] == owners[:, :-1])
    return [
        torch.zeros(len(labels)).index_add(0, owners[row, 1:].clamp(min=0), predicted[row] * (owners[row, 1:] >= 0))
        if labels
        else torch.zeros(0)
        for row, labels in enumerate(ids)
    ]


def _as_attention_takes_it(model: Phi3VForCausalLM, is_seen: torch.Tensor) -> torch.Tensor:
    """Turns (B, 1, queries, keys) bool into what the model's attention adds to its scores or masks them with."""
    if model.config._attn_implementation != "eager":
        return is_seen
    dtype = model.dtype
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill(~is_seen, torch.finfo(dtype).min)
