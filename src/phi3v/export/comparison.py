"""When a written model counts as the trained one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..config import RopeMode

ARITHMETIC = 1e-4
"""Largest relative difference of logits between two ways of computing the same float32 weights: an adapter beside its
base or added into it, one process or another. Measured: 4e-6 at the published size (docs/LOG.md)."""

TOLERANCE = {torch.float32: ARITHMETIC, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative difference of logits that is accepted in any case, by the number format that weights were rounded to: by up
to 2^-11 and 2^-8 of themselves, and the layers add that up."""

ROUNDINGS = 2
"""How many times as far as another rounding of the same model a written model may be from the trained one."""

MOST_ROUNDING = 0.2
"""Limit of the relative difference of logits, whatever rounding does: a model that it moves further has no copy in the
format."""

MOST_NEAR_TIE = 2.3
"""Logits further apart than this, nats, are no near tie in any format: one token is ten times as likely."""

MOST_OF_THE_EFFECT = 0.5
"""A model whose logits are farther from the trained one's than this share of what is at stake has lost it. At stake is
what the adapter changes; of a whole model, its logits."""


@dataclass(frozen=True, slots=True)
class Greedy:
    """How greedy answers compare.

    A token that differs from the trained model's is a near tie if the trained model's own logits of the two lie no
    further apart than ``near_tie``. What follows a near tie is another text and is not compared.

    Attributes:
        samples: answers compared.
        same: of them equal token for token.
        tokens: tokens compared, stops included.
        near_tie: logits, nats.
        near_ties: gaps of the near ties, nats.
        mismatches: gaps of the tokens that differ and are no near ties, nats.
    """

    samples: int
    same: int
    tokens: int
    near_tie: float
    near_ties: tuple[float, ...]
    mismatches: tuple[float, ...]

    def __str__(self) -> str:
        text = f"greedy answers equal on {self.same} of {self.samples} samples"
        if self.near_ties:
            text += f", {len(self.near_ties)} part at a near tie (at most {self.near_tie:.1e} nats apart)"
        if self.mismatches:
            text += f", {len(self.mismatches)} at a token that is {max(self.mismatches):.1e} nats behind"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a written model was compared on and how close it came; both sides compute in float32.

    Attributes:
        dtype: number format of the written weights.
        trained_rope_mode: LongRoPE factors that the trained model reads with.
        written_rope_mode: those that the folder leads every loader to.
        num_samples: real samples compared.
        num_logits: answer positions compared.
        same_inputs: whether the written folder's own processor made the same ids and pixels of them.
        merge_difference: ``||merged - adapter|| / ||adapter||`` of the logits, in float32, before any rounding; None
            for a model that needs no merging.
        reload_difference: the same between the folder, loaded again, and the model in memory that was written.
        relative_difference: the same between the folder and the trained model.
        max_logit_difference: the largest single difference to the trained model.
        rounded_tensors: how many tensors the number format could not hold as they were.
        rounding_difference: relative difference that another rounding of them makes; 0 where none was rounded.
        rounding_max_logit: the largest single logit difference that it makes.
        tolerance: limit of ``relative_difference``.
        adapter_effect: ``||base - adapter|| / ||adapter||``: what the adapter changes; None for a whole model.
        same_top_token: share of positions where both predict the same token.
        greedy: the same for greedy answers.
    """

    dtype: str
    trained_rope_mode: RopeMode
    written_rope_mode: RopeMode
    num_samples: int
    num_logits: int
    same_inputs: bool
    merge_difference: float | None
    reload_difference: float
    relative_difference: float
    max_logit_difference: float
    rounded_tensors: int
    rounding_difference: float
    rounding_max_logit: float
    tolerance: float
    adapter_effect: float | None
    same_top_token: float
    greedy: Greedy

    def __str__(self) -> str:
        effect = "" if self.adapter_effect is None else f"; the adapter itself changes {self.adapter_effect:.1e}"
        return (
            f"{self.dtype}, {self.num_samples} samples, {self.num_logits} answer positions compared with the trained "
            f"model: relative difference {self.relative_difference:.1e} (limit {self.tolerance:.1e}{effect}), same "
            f"top token at {self.same_top_token:.1%}; {self.greedy}"
        )

    def problems(self) -> list[str]:
        """Says why the written model does not count as the trained one, and what to do; empty if it does.

        Every comparison is written so that a number that is not one fails it.
        """
        found = []
        if not self.same_inputs:
            found.append("its processor makes other ids or pixels of the same samples than the trained model's.")
        if self.merge_difference is not None and not self.merge_difference <= ARITHMETIC:
            found.append(
                f"adding the adapter into its base changed the logits by {self.merge_difference:.1e} before any "
                f"rounding (limit {ARITHMETIC:.0e}): the adapter is of a kind that cannot be merged, or the model "
                "amplifies even float32's own rounding. Serve the adapter itself, and please report this."
            )
        if not self.reload_difference <= ARITHMETIC and self.written_rope_mode != self.trained_rope_mode:
            found.append(
                f"it was trained with rope_mode {self.trained_rope_mode} and was to be written with "
                f"{self.written_rope_mode}, which gives other answers on these samples ({self.reload_difference:.1e} "
                "apart): leave --rope_mode out, or train with it."
            )
        elif not self.reload_difference <= ARITHMETIC:
            found.append(
                f"the files do not hold the model that was written to them: {self.reload_difference:.1e} apart (limit "
                f"{ARITHMETIC:.0e}). Try another disk, and a memory check."
            )
        if found:
            return found
        coarse = "Rounding to this number format is too coarse for this model: use --dtype float32."
        at_stake = 1.0 if self.adapter_effect is None else self.adapter_effect
        if not self.relative_difference <= self.tolerance:
            found.append(f"it is further from the trained model than rounding explains. {coarse}")
        # An adapter that changes less than float32's own arithmetic cannot be told from its base.
        elif not self.relative_difference <= max(MOST_OF_THE_EFFECT * at_stake, ARITHMETIC):
            lost = "The adapter's effect" if self.adapter_effect is not None else "What the model says"
            found.append(f"{lost} is lost in the rounding of this number format: use --dtype float32.")
        if self.greedy.mismatches and not found:
            found.append(f"greedy answers differ where the trained model is not undecided. {coarse}")
        return found


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns ``||logits - reference|| / ||reference||``."""
    return float((logits - reference).norm() / reference.norm())


def tolerance_of(dtype: torch.dtype, rounding_difference: float, num_rounded: int) -> float:
    """Returns the largest accepted relative difference between a written model and the trained one.

    Weights that are written as they are leave the arithmetic alone. Where some are rounded, how far that moves the
    logits depends on the model: a deep one with random weights amplifies the same 2^-9 of a weight ten times as much as
    a trained one. Another rounding of the same model (``rounding.move_within_rounding``) shows it, whatever the model,
    and whether the written files are right or wrong: no copy in this format, the best possible one included, can be
    expected to come closer.
    """
    if not num_rounded:
        return ARITHMETIC
    return min(max(TOLERANCE[dtype], ROUNDINGS * rounding_difference), MOST_ROUNDING)


def near_tie_of(logits: torch.Tensor, rounding_max_logit: float) -> float:
    """Returns how far apart two logits of the trained model may lie to count as a near tie, nats.

    Args:
        logits: (positions, vocab_size) of the trained model.
        rounding_max_logit: the largest difference that another rounding makes to a single one of them.
    """
    return min(max(ARITHMETIC * float(logits.abs().max()), ROUNDINGS * rounding_max_logit), MOST_NEAR_TIE)


def compare_greedy(
    of_trained: Sequence[Sequence[int]],
    of_written: Sequence[Sequence[int]],
    logits: Sequence[torch.Tensor],
    *,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    near_tie: float,
) -> Greedy:
    """Compares greedy answers token for token, the stop behind them included.

    Args:
        of_trained: the trained model's answers, without stop tokens.
        of_written: the written model's.
        logits: the trained model's behind the question and behind each token of its own answer: (tokens + 1,
            vocab_size) a sample.
        stop_token_ids: any of them ends an answer.
        max_new_tokens: longest answer; one as long has no stop.
        near_tie: as in ``Greedy``.
    """
    stop = -1
    stops = list(stop_token_ids)
    same = tokens = 0
    gaps: list[float] = []
    for trained, written, rows in zip(of_trained, of_written, logits, strict=True):
        ours, theirs = ([*answer, stop][:max_new_tokens] for answer in (trained, written))
        place = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            same += 1
            tokens += len(ours)
            continue
        tokens += place + 1
        row = rows[place]
        said = row[stops].max() if theirs[place] == stop else row[theirs[place]]
        gaps.append(float(row.max() - said))
    return Greedy(
        samples=len(logits),
        same=same,
        tokens=tokens,
        near_tie=near_tie,
        near_ties=tuple(gap for gap in gaps if gap <= near_tie),
        mismatches=tuple(gap for gap in gaps if not gap <= near_tie),
    )
