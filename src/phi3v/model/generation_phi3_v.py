"""What transformers' generation has to know of images and of LongRoPE's change of factors."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache

from .cache_names import named_cache, one_cache
from .configuration_phi3_v import Phi3VConfig

Candidates = tuple[torch.Tensor, torch.Tensor | None]
"""Ids with drafts at their end (1, L), and the drafts' logits (1, drafts, vocab_size) where there are some."""

_LONGEST = "_phi3v_longest_text"


def note_positions_of_keys(cache: Cache, new: int) -> None:
    """Notes on a cache that can be cropped how long the text is that its next ``new`` keys are computed in."""
    if isinstance(cache, DynamicCache) and not torch.compiler.is_compiling():
        past = int(cache.get_seq_length())
        earlier = positions_of_keys(cache) if past else 0  # an emptied cache holds no keys of the text before
        vars(cache)[_LONGEST] = max(past + new, earlier)


def positions_of_keys(cache: Cache) -> int:
    """Returns the length, in positions, of the longest text that keys of a cache were computed in; 0: not known.

    More than the cache holds where some were cropped away since: LongRoPE chose the others' factors with them.
    """
    return vars(cache).get(_LONGEST, 0)


class Phi3VGenerationMixin(GenerationMixin):
    """Generation of a ``Phi3VForCausalLM``.

    Cached keys were rotated with the factors of the text that they were computed in. The first position past
    ``original_max_position_embeddings`` needs the long ones everywhere, so at that step, or when a cache was cropped
    back to before it, everything is computed again; with a fixed ``rope_mode`` never.
    """

    config: Phi3VConfig
    model: Any

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepares one forward pass: of what follows the cache, or of everything where the factors change.

        Images may be those of the whole conversation or those that follow the cache.

        Raises:
            ValueError: images that are neither, or everything must be computed again and is not there.
        """
        cache = one_cache(cache, past_key_values)
        past = int(cache.get_seq_length()) if cache is not None else 0
        new = next_sequence_length
        if new is None:
            new = (inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids).shape[1]
        if cache is not None and self._changes_rope_factors(cache, past + new, attention_mask):
            if inputs_embeds is None:
                self._require_whole_conversation(input_ids, past + new, kwargs.get("image_sizes"))
            elif not is_first_iteration:  # the prompt; what was generated since then stands at the end of input_ids
                generated = input_ids[:, inputs_embeds.shape[1] - past - new :]
                inputs_embeds = torch.cat([inputs_embeds, self.model.embed_tokens(generated)], dim=1)
            cache = None
            next_sequence_length = None
            is_first_iteration = True
        elif cache is not None and past == 0 and inputs_embeds is None:
            # An assistant's calls never are to transformers, which would leave the images out.
            is_first_iteration = True
        elif past and is_first_iteration and inputs_embeds is None and kwargs.get("image_sizes") is not None:
            kwargs |= self._images_behind(past, input_ids, new, kwargs)
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **named_cache(cache),
            **kwargs,
        )

    def _changes_rope_factors(self, cache: Cache, length: int, attention_mask: torch.Tensor | None) -> bool:
        """Says whether a row of ``length`` positions, padding included, needs other factors than its cached keys have.

        The longest text that keys of the cache were computed in decides their factors.
        """
        limit = self.config.original_max_position_embeddings
        past = int(cache.get_seq_length())
        longest = max(past, positions_of_keys(cache))
        if self.config.rope_mode != "auto" or past == 0 or max(length, longest) <= limit:
            return False
        if attention_mask is None or attention_mask.ndim != 2:
            return (longest <= limit) != (length <= limit)
        before = attention_mask[:, :past].sum(dim=1) + (longest - past)
        return bool(((before <= limit) != (attention_mask.sum(dim=1) <= limit)).any())

    def _require_whole_conversation(
        self, input_ids: torch.Tensor, length: int, image_sizes: torch.Tensor | None
    ) -> None:
        """Makes sure that everything is there to be computed again.

        Raises:
            ValueError: ids or images of earlier turns are not.
        """
        if input_ids.shape[1] < length:
            missing = "ids of the whole conversation, in one piece without prefill_chunk_size"
        elif (input_ids == self.config.image_token_id).sum() > self.model.num_image_positions(image_sizes):
            missing = "images of the whole conversation"
        else:
            return
        raise ValueError(
            f"the text passes {self.config.original_max_position_embeddings} positions, or was cut back to fewer: "
            "LongRoPE's factors change there and everything is computed again. Give the "
            f"{missing}, or load the model with rope_mode short or long"
        )

    def _images_behind(
        self, past: int, input_ids: torch.Tensor, new: int, given: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """Returns ``pixel_values`` and ``image_sizes`` of the images that follow ``past`` cached positions.

        Args:
            past: cached positions.
            input_ids: (B, L), of the whole conversation or of what follows the cache.
            new: positions that follow the cache.
            given: holds those of all images, or of these.

        Raises:
            ValueError: they are neither, or the cache ends inside an image.
        """
        images = {key: given[key] for key in ("pixel_values", "image_sizes")}
        if self.model.num_image_positions(images["image_sizes"]) == self._num_positions(input_ids[:, -new:]):
            return images
        before = (input_ids[:, :-new] == self.config.image_token_id).sum(dim=1).tolist()
        kept: list[int] = []
        for row, (own, skipped) in enumerate(
            zip(self.model.images_of_rows(input_ids, images["image_sizes"]), before, strict=True)
        ):
            while own and skipped > 0:
                first, *own = own
                skipped -= self.model.num_image_positions(images["image_sizes"][[first]])
            if skipped:
                raise ValueError(f"the cache's {past} positions end inside an image of row {row}; crop it to before it")
            kept += own
        if not kept:
            return {"pixel_values": None, "image_sizes": None}
        return {key: tensor[kept] for key, tensor in images.items()}

    def _num_positions(self, input_ids: torch.Tensor) -> int:
        return int((input_ids == self.config.image_token_id).sum())

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **model_kwargs: Any
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeats every row together with its own images, for beams and several samples a prompt.

        transformers repeats image by image, which is another order as soon as a row has two images.
        """
        sizes = model_kwargs.get("image_sizes")
        own: dict[str, torch.Tensor] = {}
        if expand_size > 1 and sizes is not None and input_ids is not None and input_ids.shape[1] > 0:
            cache = one_cache(model_kwargs.get("cache"), model_kwargs.get("past_key_values"))
            behind = input_ids[:, 0 if cache is None else int(cache.get_seq_length()) :]
            is_whole = self.model.num_image_positions(sizes) != self._num_positions(behind)
            rows = self.model.images_of_rows(input_ids if is_whole else behind, sizes)
            order = [image for row in rows for image in row * expand_size]
            own = {key: model_kwargs.pop(key)[order] for key in ("pixel_values", "image_sizes")}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **own}

    def _get_candidate_generator(self, **arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As transformers' own, for drafts of an assistant or of a look into the prompt; some are cut short.

        A draft ends where the short factors' positions end: in one pass with what follows, its tokens would be judged
        with the long ones. It also ends in front of an image position, which a look into the prompt copies.
        """
        generator = super()._get_candidate_generator(**arguments)  # pyright: ignore[reportAttributeAccessIssue]
        draft: Callable[..., Candidates] = generator.get_candidates
        given, model_kwargs = arguments["input_ids"], arguments["model_kwargs"]
        position_ids, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
        if position_ids is not None:
            real = int(position_ids[0, -1]) + 1
        else:
            real = given.shape[1] if mask is None else int(mask.sum())
        elsewhere = real - given.shape[1]  # embedded or cached positions, less padding

        def get_candidates(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Candidates:
            ids, logits = draft(input_ids, *args, **kwargs)
            length = input_ids.shape[1]
            room = self.config.original_max_position_embeddings - length - elsewhere
            drafted = ids.shape[1] - length
            kept = min(drafted, room) if self.config.rope_mode == "auto" and room >= 0 else drafted
            is_image = (ids[0, length : length + kept] == self.config.image_token_id).tolist()
            kept = is_image.index(True) if True in is_image else kept
            if kept == 0:
                return input_ids, None
            return ids[:, : length + kept], None if logits is None else logits[:, :kept]

        generator.get_candidates = get_candidates
        return generator
