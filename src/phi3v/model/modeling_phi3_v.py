"""Phi-3.5-vision on transformers' own Phi3 and CLIP layers, with the published tensor names."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPVisionEmbeddings
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3RMSNorm
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..geometry import num_image_tokens
from .cache_names import CACHE_NAME, named_cache, one_cache
from .compute import Compute
from .configuration_phi3_v import PUBLISHED_WRONG_EOS, Phi3VConfig
from .generation_phi3_v import Phi3VGenerationMixin, note_positions_of_keys
from .loss import mean_token_loss, weighted_token_loss
from .packed import PackedBatch
from .packed_forward import packed_loss, release_towers
from .packed_layers import PackedClipLayer, PackedDecoderLayer
from .rope import Phi3VRotaryEmbedding
from .vision_phi3_v import Phi3VImageEmbedding


class Phi3VPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, initialise, checkpoint and dispatch the model."""

    config_class = Phi3VConfig
    config: Phi3VConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = [PackedDecoderLayer.__name__, PackedClipLayer.__name__]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PackedDecoderLayer, "attentions": Phi3Attention}
    # The published code shares the text embedding under this name; its files may hold the copy.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte", r"embeddings\.position_ids"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises as the published classes do: CLIP by its own rules, the rest normally distributed."""
        if isinstance(module, CLIPVisionEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=module.embed_dim**-0.5)
            init.normal_(module.patch_embedding.weight, std=module.config.initializer_range)
            init.normal_(module.position_embedding.weight, std=module.config.initializer_range)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))
        elif isinstance(module, CLIPAttention):
            inner = module.embed_dim**-0.5 * (2 * module.config.num_hidden_layers) ** -0.5
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.weight, std=inner)
            init.normal_(module.out_proj.weight, std=module.embed_dim**-0.5)
        elif isinstance(module, CLIPMLP):
            inner = module.config.hidden_size**-0.5 * (2 * module.config.num_hidden_layers) ** -0.5
            init.normal_(module.fc1.weight, std=(2 * module.config.hidden_size) ** -0.5)
            init.normal_(module.fc2.weight, std=inner)
        elif isinstance(module, Phi3VImageEmbedding):
            init.zeros_(module.glb_GN)
            init.zeros_(module.sub_GN)
        else:
            super()._init_weights(module)


class Phi3VModel(Phi3VPreTrainedModel):
    """Text embedding, image embedding and decoder, without the head."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.layers = nn.ModuleList([PackedDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3VRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As torch's; a packed forward may have left weights in memory that no file format takes."""
        release_towers(self)
        return super().state_dict(*args, **kwargs)

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, image_sizes: torch.Tensor | None
    ) -> torch.Tensor:
        """Embeds ids and puts image rows where ``image_token_id`` stands: (B, L) -> (B, L, hidden_size).

        Raises:
            ValueError: a row's image positions are not what its images need.
        """
        embedded = self.embed_tokens(input_ids)
        if pixel_values is None or pixel_values.shape[0] == 0:
            return embedded
        if image_sizes is None:
            raise ValueError("pixel_values came without image_sizes")
        self.images_of_rows(input_ids, image_sizes)
        image_rows = self.vision_embed_tokens(*self.vision_embed_tokens.own_crops(pixel_values, image_sizes))
        is_image = input_ids == self.config.image_token_id
        return embedded.masked_scatter(is_image[..., None], image_rows.to(embedded.device, embedded.dtype))

    def images_of_rows(self, input_ids: torch.Tensor, image_sizes: torch.Tensor) -> list[list[int]]:
        """Returns for every row of ``input_ids`` (B, L) the indices of its images, from their token counts.

        Raises:
            ValueError: a row's image positions are not what its images need, or images are left over.
        """
        costs = self._positions_of_images(image_sizes)
        rows: list[list[int]] = []
        taken = 0
        for index, positions in enumerate((input_ids == self.config.image_token_id).sum(dim=1).tolist()):
            first, needed = taken, 0
            while needed < positions and taken < len(costs):
                needed += costs[taken]
                taken += 1
            if needed != positions:
                raise ValueError(
                    f"row {index} of the batch holds {positions} image positions but its {taken - first} images need "
                    f"{needed}: text and images were prepared with different num_crops, their order differs, or the "
                    "text was cut inside an image"
                )
            rows.append(list(range(first, taken)))
        if taken < len(costs):
            raise ValueError(f"the text shows {taken} images but {len(costs)} were given")
        return rows

    def num_image_positions(self, image_sizes: torch.Tensor | None) -> int:
        """Counts the positions that images of sizes (N, 2) take in the text."""
        return 0 if image_sizes is None else sum(self._positions_of_images(image_sizes))

    def _positions_of_images(self, image_sizes: torch.Tensor) -> list[int]:
        crop_px, per_side = self.config.crop_px, self.config.tokens_per_side
        return [num_image_tokens((h // crop_px, w // crop_px), per_side) for h, w in image_sizes.tolist()]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder; arguments as in ``Phi3VForCausalLM.forward``."""
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None and len(pixel_values):
            raise ValueError("inputs_embeds hold their images already; give pixel_values with input_ids")
        if inputs_embeds is None:
            assert input_ids is not None
            # A single position behind others was generated: whatever its id, it shows nothing.
            if pixel_values is None and (input_ids.shape[1] > 1 or cache is None or cache.get_seq_length() == 0):
                self._refuse_missing_images(input_ids)
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes)
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, cache)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache(cache),
        )
        # Made after the mask: transformers looks for a packed row's restarting positions only where there is no cache.
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            note_positions_of_keys(cache, inputs_embeds.shape[1])
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **named_cache(cache),
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **named_cache(cache if use_cache else None)
        )

    def _refuse_missing_images(self, input_ids: torch.Tensor) -> None:
        positions = int((input_ids == self.config.image_token_id).sum())
        if positions:
            raise ValueError(f"the text holds {positions} image positions but no pixel_values were given")

    @staticmethod
    def _positions(embedded: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        """Counts each row's positions from its own first real token, so that left padding shifts nothing."""
        batch, length = embedded.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)[:, -length:]
        past = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(length, device=embedded.device) + past).expand(batch, length)


class Phi3VForCausalLM(Phi3VPreTrainedModel, Phi3VGenerationMixin):
    """Phi-3.5-vision with its language-model head: training, scoring and generation.

    Attributes:
        compute: how a packed batch is computed.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute = Compute()
        self.post_init()
        self._use_real_stop_tokens()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a published-layout folder or hub id; generation stops where the model really ends its answers."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._use_real_stop_tokens()
        return loaded

    def _use_real_stop_tokens(self) -> None:
        """Replaces the published generation_config's stop token, which the model never emits."""
        settings = self.generation_config
        if settings is None:
            settings = self.generation_config = GenerationConfig()
        if settings.eos_token_id in (None, PUBLISHED_WRONG_EOS):
            settings.eos_token_id = self.config.eos_token_id
        settings.pad_token_id = self.config.pad_token_id
        settings.bos_token_id = self.config.bos_token_id

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        supervised_only: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        packed: PackedBatch | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token at every position.

        Args:
            input_ids: (B, L) int64; ``image_token_id`` at every image position.
            attention_mask: (B, L) 1 for real tokens, 0 for padding on either side; None = no padding.
            position_ids: (B, L) int64; default: counted per row from its first real token.
            cache: keys and values of earlier positions.
            inputs_embeds: (B, L, hidden_size) instead of ``input_ids``, images already in place.
            pixel_values: (N, C, 3, crop_px, crop_px); images in the order of their positions, row by row of the batch.
            image_sizes: (N, 2) int64, padded (h, w) px.
            labels: (B, L) int64; -100 where nothing is supervised. Shifted here.
            loss_weights: (B, L) float; entry j weighs the prediction of token j; the loss is then the weighted sum,
                without them the mean over supervised tokens.
            supervised_only: compute logits at supervised positions only and return none; needs ``labels`` and
                ``loss_weights``.
            num_items_in_batch: without ``loss_weights``: divide the summed loss by this instead of the mean's number.
            logits_to_keep: positions from the end to compute logits for; 0 = all.
            packed: several sequences in one row, instead of all other arguments; gives ``loss`` only, the weighted sum.
            past_key_values: ``cache`` by its name before transformers 5.24.

        Returns:
            ``loss`` (with labels), ``logits`` (B, L, vocab_size) and, with ``use_cache``, the cache by its name in the
            installed transformers.
        """
        if packed is not None:
            return CausalLMOutputWithPast(loss=packed_loss(self, packed))  # pyright: ignore[reportArgumentType]
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        loss = logits = None
        if labels is not None and loss_weights is not None:
            loss = weighted_token_loss(hidden_states, self.lm_head, labels, loss_weights)
        if not supervised_only:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None and loss_weights is None:
                loss = mean_token_loss(logits, labels, num_items_in_batch)
        elif loss is None:
            raise ValueError("supervised_only needs labels and loss_weights")
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **named_cache(outputs.get(CACHE_NAME)),
        )


__all__ = ["Phi3VForCausalLM", "Phi3VModel", "Phi3VPreTrainedModel"]
