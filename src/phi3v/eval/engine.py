"""Answers by greedy generation and likelihoods of labels, for many prompts at once.

Prompts are computed in packed rows without padding, beginnings that several of them share only once. Their keys and
values go to a cache in which all answers of a batch grow together, one token a step; answers that have ended leave.
Tokens and likelihoods are those of one plain forward for every prompt, up to rounding.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import CheckpointError
from ..model.checkpoint import base_of
from ..model.modeling_phi3_v import Phi3VForCausalLM
from ..model.packed import PackedBatch
from ..model.packed_attention import PackedAttention, row_alignment
from ..model.packed_forward import embed_packed, product_dtype, run_decoder, towers_of
from .decode import KeyValueStore, Row, Shape, Stepper, logits_of, shape_of, unrounded_logits_of
from .prompts import Group, PackedReadings, Prompt, PromptReader, Reading

logger = logging.getLogger(__name__)

MOST_PREFILL_TOKENS = 16_384
"""Positions of a packed row, unless one group needs more: enough to keep a GPU's matrix products at full speed."""

MOST_LABEL_TOKENS = 1024
"""Label tokens whose logits are held at once: 131 MB in float32 at 32,064 tokens."""

MOST_QUESTIONS = {"cuda": 64, "cpu": 16}
"""Questions at once where neither the configuration nor the memory says less."""

STEPS_BETWEEN_CHECKS = {"cuda": 4, "cpu": 1}
"""Steps after which it is looked at who has ended; on a GPU the look waits for all work to be done."""

FEWEST_STEPS_TO_MOVE_FOR = 8
"""Steps that must lie ahead for the rows that go on to be moved together: a move costs about as much as two steps."""

USABLE_MEMORY = 0.85
"""Share of a GPU's free memory that keys, values and a packed row may fill; the rest is lost to fragmentation."""


FLOAT_BYTES = 4


@dataclass(slots=True)
class Answer:
    """What a model says to a prompt.

    Attributes:
        tokens: generated ones, without the stop token.
        log_likelihoods: of the prompt's labels, nats.
    """

    tokens: list[int] = field(default_factory=list)
    log_likelihoods: list[float] = field(default_factory=list)


class Engine:
    """Answers prompts with a model.

    It is meant for one evaluation: what it keeps between batches (the cache's memory, graphs) holds as long as the
    model's weights stay where they are.

    Args:
        model: ``Phi3VForCausalLM``, or a ``PeftModel`` on one; its modules' training flags are restored after every
            batch.
        stop_token_ids: tokens that end an answer.
        max_new_tokens: longest answer, tokens.
        most_questions: answers generated at once; None: as many as the memory holds.

    Raises:
        CheckpointError: the model's configuration asks for what the packed forward does not compute.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_token_ids: Iterable[int],
        max_new_tokens: int,
        most_questions: int | None = None,
    ) -> None:
        base = base_of(model)
        try:
            towers_of(base.model)
        except ValueError as error:
            raise CheckpointError(f"model {base.name_or_path}: config.json: {error}") from error
        self.max_new_tokens = max_new_tokens
        self._wrapper = model
        self._model = base
        self._stop_token_ids = frozenset(stop_token_ids)
        self.device = base.model.embed_tokens.weight.device
        rope, config = base.model.rotary_emb, base.config
        self._reader = PromptReader(
            image_token_id=config.image_token_id,
            tokens_per_side=config.tokens_per_side,
            short_positions=rope.original_positions if rope.mode == "auto" else None,
            is_always_long=rope.mode == "long",
            alignment=row_alignment(self.device),
        )
        dims = config.dims
        dtype = product_dtype(base.model)
        self._store = KeyValueStore(dims.layers, dims.heads, dims.hidden // dims.heads, dtype, self.device)
        self._stepper = Stepper(base, self._store, max_new_tokens)
        self.most_questions = most_questions or MOST_QUESTIONS[self.device.type]
        self._most_positions: int | None = None
        if self.device.type == "cuda":
            position_bytes = 2 * dims.layers * dims.hidden * dtype.itemsize
            self._most_positions = _usable_bytes(base, self.device) // position_bytes

    def group(self, prompts: Sequence[Prompt]) -> list[Group]:
        """Puts prompts with common beginnings together; needs no device, so that another thread may do it."""
        once = dict.fromkeys(prompts)
        readings = [reading for prompt in once for reading in self._reader.read(prompt, self.max_new_tokens)]
        return self._reader.group(readings, MOST_PREFILL_TOKENS)

    def has_room(self, groups: Sequence[Group]) -> bool:
        """Whether the prompts of some groups can be answered together."""
        if num_prompts(groups) > self.most_questions:
            return False
        return self._most_positions is None or self._plan(groups).shape.num_positions <= self._most_positions

    def answer(self, groups: Sequence[Group]) -> dict[Prompt, Answer]:
        """Answers the prompts of some groups, in batches where they have no room together.

        Where the device's memory does not suffice, a batch is halved until it does, and later ones stay as small.

        Raises:
            torch.OutOfMemoryError: a single prompt does not fit.
        """
        answers: dict[Prompt, Answer] = {}
        for group in groups:
            for reading in group.readings:
                answers.setdefault(reading.prompt, Answer(log_likelihoods=[0.0] * len(reading.prompt.labels)))
        were_training = [module for module in self._wrapper.modules() if module.training]
        self._wrapper.eval()
        try:
            waiting = [list(groups)] if groups else []
            while waiting:
                batch = waiting.pop()
                halves = self._halve(batch)
                if halves and not self.has_room(batch):
                    waiting += reversed(halves)
                    continue
                found = self._try(batch, is_last_resort=not halves)
                if found is None:
                    waiting += reversed(halves)
                elif unfinished := self._record(found, answers):
                    waiting.append(self._reader.group(unfinished, MOST_PREFILL_TOKENS))
        finally:
            for module in were_training:
                module.training = True  # a part that was in evaluation mode stays in it
        return answers

    def _halve(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Splits groups, or the readings of the only group; nothing where there is one reading alone."""
        if len(groups) > 1:
            middle = len(groups) // 2
            return [list(groups[:middle]), list(groups[middle:])]
        readings = groups[0].readings
        middle = len(readings) // 2
        halves = (readings[:middle], readings[middle:]) if middle else ()
        return [self._reader.group(half, MOST_PREFILL_TOKENS) for half in halves]

    def _record(self, found: "_Found", answers: dict[Prompt, Answer]) -> list[Reading]:
        """Adds what a batch found to the answers; returns from where answers go on that have not ended."""
        for reading, value in found.log_likelihoods.items():
            assert reading.label is not None
            answers[reading.prompt].log_likelihoods[reading.label] = value
        unfinished: list[Reading] = []
        for reading, (tokens, is_stopped) in found.generated.items():
            answer = answers[reading.prompt]
            answer.tokens += tokens
            if not is_stopped and len(answer.tokens) < self.max_new_tokens:
                unfinished.append(self._reader.go_on(reading.prompt, answer.tokens, self.max_new_tokens))
        return unfinished

    def _try(self, groups: Sequence[Group], is_last_resort: bool) -> "_Found | None":
        """Computes a batch; None when memory ran out, after which fewer questions have room."""
        try:
            return self._compute(groups)
        except torch.OutOfMemoryError:
            if is_last_resort:
                raise
        # Behind the handler: while it runs, its traceback keeps the batch's tensors alive.
        self._store.release()
        self._stepper.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.most_questions = max(1, num_prompts(groups) // 2)
        logger.warning(
            "Out of memory with %d questions at once; going on with %d", num_prompts(groups), self.most_questions
        )
        return None

    @torch.no_grad()
    def _compute(self, groups: Sequence[Group]) -> "_Found":
        """Computes a batch: all prompts, then the tokens behind them."""
        plan = self._plan(groups)
        if plan.rows and not self._store.lay_out(plan.shape):
            self._stepper.forget()
        found = _Found()
        first_tokens: list[torch.Tensor] = []
        scores: list[tuple[Sequence[Reading], torch.Tensor]] = []
        for begin, end in _prefill_rows(groups):
            tokens, scored = self._prefill(groups[begin:end], plan.places[begin:end], plan.shape)
            first_tokens.append(tokens)
            scores += scored
        for readings, values in scores:
            for reading, value in zip(readings, values.tolist(), strict=True):
                found.log_likelihoods[reading] = found.log_likelihoods.get(reading, 0.0) + value
        if plan.rows:
            self._decode(plan, torch.cat(first_tokens), found)
        return found

    def _plan(self, groups: Sequence[Group]) -> "_Plan":
        """Gives the stems and rows of a batch their places in the cache."""
        plan = _Plan()
        for group in groups:
            generated = group.generated
            plan.places.append((len(plan.stem_lengths), len(plan.rows)) if generated else None)
            if generated:
                stem = group.stem or len(generated[0].ids)
                number = len(plan.stem_lengths)
                plan.rows += [Row(number, len(one.ids), len(one.ids) - stem, one.is_long) for one in generated]
                plan.stem_lengths.append(stem)
                plan.readings += generated
        self._size(plan)
        return plan

    def _size(self, plan: "_Plan") -> None:
        if plan.rows:
            is_rounded = self.device.type == "cuda"
            plan.shape = shape_of(plan.stem_lengths, plan.rows, self.max_new_tokens, is_rounded=is_rounded)

    def _prefill(
        self, groups: Sequence[Group], places: Sequence[tuple[int, int] | None], shape: Shape
    ) -> tuple[torch.Tensor, list[tuple[Sequence[Reading], torch.Tensor]]]:
        """Computes groups in one row and puts what their answers need into the cache.

        Args:
            groups: of a batch.
            places: number of each one's stem and of its first row in the cache; None where nothing is generated.
            shape: of the cache.

        Returns:
            The first token of every answer, (rows,) int64. And the labels' tokens, in pieces: whose they are, and
            their log-probabilities, (tokens,) float32.
        """
        packed = self._reader.pack(groups)
        batch = self._on_device(packed)
        # Where keys and values go: (stem or row, begin, end) in the packed row.
        stems: list[tuple[int, int, int]] = []
        branches: list[tuple[int, int, int]] = []
        last: list[int] = []
        for group, place, stem_span, spans in zip(groups, places, packed.stems, packed.branches, strict=True):
            if place is None:
                continue
            stem, row = place
            stems.append((stem, *stem_span))
            generated = [span for one, span in zip(group.readings, spans, strict=True) if one.label is None]
            last += [end - 1 for _, end in generated]
            if group.stem:
                branches += [(row + number, *span) for number, span in enumerate(generated)]

        model = self._model.model
        attention = PackedAttention(batch.layout, self.device, product_dtype(model))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if last:
                parts = ((self._store.stems(layer, shape), stems), (self._store.branches(layer, shape), branches))
                for kept, spans in parts:
                    for number, begin, end in spans:
                        kept[0, number, :, : end - begin] = k[begin:end].transpose(0, 1)
                        kept[1, number, :, : end - begin] = v[begin:end].transpose(0, 1)
            return attention.forward(q, k, v)[0]

        read = torch.cat([torch.tensor(last, dtype=torch.int64, device=self.device), batch.target_positions])
        embedded = embed_packed(model, batch)
        hidden = run_decoder(model, embedded, batch.position_ids, batch.is_long, attend, read)
        tokens = logits_of(self._model, hidden[: len(last)]).argmax(dim=-1)
        scores: list[tuple[Sequence[Reading], torch.Tensor]] = []
        for begin in range(0, len(packed.scored), MOST_LABEL_TOKENS):
            piece = slice(begin, begin + MOST_LABEL_TOKENS)
            logits = unrounded_logits_of(self._model, hidden[len(last) :][piece])
            picked = logits.gather(1, batch.target_ids[piece, None])[:, 0] - logits.logsumexp(dim=1)
            scores.append((packed.scored[piece], picked))
        return tokens, scores

    def _on_device(self, packed: PackedReadings) -> PackedBatch:
        """Copies a row to the device, without making the host wait for the work that is queued there."""
        is_cuda = self.device.type == "cuda"
        batch = (packed.batch.pin_memory() if is_cuda else packed.batch).to(self.device, non_blocking=is_cuda)
        if packed.pictures:
            # Image by image: the loader has put each into page-locked memory.
            crops = [picture.crops.to(self.device, non_blocking=is_cuda) for picture in packed.pictures]
            batch = replace(batch, crops=torch.cat(crops))
        return batch

    def _decode(self, plan: "_Plan", first_tokens: torch.Tensor, found: "_Found") -> None:
        """Lets all answers of a batch grow until each has ended or is as long as it may be."""
        steps_between_checks = STEPS_BETWEEN_CHECKS[self.device.type]
        step = self._stepper.step_of(plan.shape)
        step.start(plan.stem_lengths, plan.rows, first_tokens[:, None])
        count = 1
        while True:
            for reading, tokens in zip(plan.readings, step.generated(len(plan.rows), count).tolist(), strict=True):
                if reading not in found.generated and (ended := self._ended(reading, tokens)):
                    found.generated[reading] = ended
            going = [number for number, one in enumerate(plan.readings) if one not in found.generated]
            if not going:
                return
            num_ahead = max(plan.readings[number].most_tokens for number in going) - count
            if 2 * len(going) <= len(plan.rows) and num_ahead >= FEWEST_STEPS_TO_MOVE_FOR:
                generated = step.generated(len(plan.rows), count)[torch.tensor(going, device=self.device)]
                plan = self._keep(plan, going)
                step = self._stepper.step_of(plan.shape)
                step.start(plan.stem_lengths, plan.rows, generated)
            num_steps = min(steps_between_checks, num_ahead)
            self._stepper.run(step, num_steps, num_ahead)
            count += num_steps

    def _ended(self, reading: Reading, tokens: Sequence[int]) -> tuple[list[int], bool] | None:
        """Returns an answer's tokens, and whether a stop token ended it; None while it grows.

        Rows are computed on until it is looked at them; what is behind an answer's end does not count.
        """
        within = tokens[: reading.most_tokens]
        stop = next((place for place, token in enumerate(within) if token in self._stop_token_ids), None)
        if stop is not None:
            return list(tokens[:stop]), True
        return (list(within), False) if len(within) == reading.most_tokens else None

    def _keep(self, plan: "_Plan", going: Sequence[int]) -> "_Plan":
        """Moves the rows that go on, and their stems, to the front of the cache."""
        stems = sorted({plan.rows[number].stem for number in going})
        kept = _Plan(
            stem_lengths=[plan.stem_lengths[stem] for stem in stems],
            rows=[replace(plan.rows[number], stem=stems.index(plan.rows[number].stem)) for number in going],
            readings=[plan.readings[number] for number in going],
        )
        self._size(kept)
        self._store.keep(plan.shape, kept.shape, stems, going)
        return kept


@dataclass(slots=True)
class _Plan:
    """Where a batch lies in the cache.

    Attributes:
        places: for every group, the number of its stem and of its first row; None where nothing is generated.
        stem_lengths: positions of every stem.
        rows: the answers that grow.
        readings: from where each of them grows.
        shape: of the cache; all zeros without rows.
    """

    places: list[tuple[int, int] | None] = field(default_factory=list)
    stem_lengths: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    shape: Shape = field(default_factory=lambda: Shape(0, 0, 0, 0, 0))


@dataclass(slots=True)
class _Found:
    """What a batch has found out.

    Attributes:
        generated: by the reading it was generated from, an answer's tokens, and whether a stop token ended it.
        log_likelihoods: by the reading of prompt and label, the label's log-likelihood, nats.
    """

    generated: dict[Reading, tuple[list[int], bool]] = field(default_factory=dict)
    log_likelihoods: dict[Reading, float] = field(default_factory=dict)


def num_prompts(groups: Sequence[Group]) -> int:
    """Counts the prompts that groups belong to."""
    return len({reading.prompt for group in groups for reading in group.readings})


def _prefill_rows(groups: Sequence[Group]) -> Iterator[tuple[int, int]]:
    """Cuts groups into runs that are computed in one row each: their begins and ends."""
    begin = length = 0
    for number, group in enumerate(groups):
        if number > begin and length + group.num_tokens > MOST_PREFILL_TOKENS:
            yield begin, number
            begin, length = number, 0
        length += group.num_tokens
    yield begin, len(groups)


def _usable_bytes(model: Phi3VForCausalLM, device: torch.device) -> int:
    """Returns how much of a GPU's memory keys and values may take, when a packed row needs its own."""
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.is_autocast_enabled(device.type):  # it keeps 16-bit copies of trained weights
        free -= sum(2 * one.numel() for one in model.parameters() if one.dtype == torch.float32 and one.requires_grad)
    dims = model.config.dims
    number_bytes = product_dtype(model.model).itemsize
    position_bytes = number_bytes * (12 * dims.hidden + 4 * dims.mlp) + FLOAT_BYTES * 3 * dims.hidden
    patches = (dims.crop_px // dims.patch_px) ** 2 + 1
    crop_bytes = number_bytes * patches * (12 * dims.clip_width + 3 * dims.clip_mlp)
    most_crops = MOST_PREFILL_TOKENS // model.config.tokens_per_side**2
    row_bytes = MOST_PREFILL_TOKENS * position_bytes + most_crops * crop_bytes
    row_bytes += 3 * FLOAT_BYTES * MOST_LABEL_TOKENS * dims.vocab
    return max(0, int(USABLE_MEMORY * free) - row_bytes)
