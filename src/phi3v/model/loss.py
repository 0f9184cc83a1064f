"""Next-token loss over the supervised positions only."""

import torch
from torch import nn
from torch.nn import functional as F


def mean_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross entropy over all supervised tokens of a batch, the published model's ``loss``.

    Args:
        logits: (B, L, V); position j predicts token j + 1.
        labels: (B, L) int64, -100 where nothing is supervised.
        num_items_in_batch: divide the sum by this number instead of the batch's own supervised tokens; transformers'
            Trainer passes the number of a whole accumulation window and then scales no further.
    """
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(scores, targets, ignore_index=-100)
    return F.cross_entropy(scores, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


def weighted_token_loss(
    hidden_states: torch.Tensor, lm_head: nn.Module, labels: torch.Tensor, loss_weights: torch.Tensor
) -> torch.Tensor:
    """Sum of weighted cross entropies, logits computed at supervised positions only.

    Equals ``(cross_entropy(lm_head(hidden_states)[:, :-1], labels[:, 1:]) * loss_weights[:, 1:]).sum()``
    and avoids the (B, L, V) logits, of which an answer of ten tokens after an image of 2,500 needs ten rows.

    Args:
        hidden_states: (B, L, H), the decoder's last.
        lm_head: maps H to V.
        labels: (B, L) int64, -100 where nothing is supervised.
        loss_weights: (B, L) float; entry j weighs the prediction of token j.
    """
    targets = labels[:, 1:]
    rows, columns = (targets != -100).nonzero(as_tuple=True)
    return target_loss(hidden_states[rows, columns], lm_head, targets[rows, columns], loss_weights[rows, columns + 1])


def target_loss(
    hidden_states: torch.Tensor, lm_head: nn.Module, target_ids: torch.Tensor, target_weights: torch.Tensor
) -> torch.Tensor:
    """Sum of weighted cross entropies at positions picked out already.

    Args:
        hidden_states: (K, H), the decoder's last, at the supervised positions.
        lm_head: maps H to V.
        target_ids: (K,) int64, the token that follows each.
        target_weights: (K,) float.
    """
    losses = F.cross_entropy(lm_head(hidden_states).float(), target_ids, reduction="none")
    return (losses * target_weights.to(losses.dtype)).sum()
