"""Phi-3.5-vision's configuration: the published ``config.json``, read and written in its own layout."""

import math
from typing import Any, ClassVar

from transformers import CLIPVisionConfig, Phi3Config, PreTrainedConfig

from ..geometry import ModelDims

VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Sizes of the published vision tower; a ``config.json`` without ``vision_config`` means these."""

EMBEDDING_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
"""How both published models arrange an image's rows: tiles, separator, global view; every row closed."""

PUBLISHED_WRONG_EOS = 2
"""``eos_token_id`` of the published files: ``</s>``, which the model never emits."""

STOP_TOKEN_IDS = (32000, 32007)
"""``<|endoftext|>`` and ``<|end|>`` of the published tokenizer: where generation really ends."""

ROPE_MODES = ("auto", "short", "long")

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
)


class Phi3VConfig(Phi3Config):
    """Configuration of Phi-3-vision and Phi-3.5-vision.

    Everything of ``Phi3Config`` describes the decoder; in addition:

    Attributes:
        vision_config: CLIP sizes, a ``CLIPVisionConfig`` (or a dict of its fields when given); written to
            ``config.json`` only when they are not ViT-L/14-336's.
        img_processor: published description of the vision tower; kept as found, ``image_dim_out`` and
            ``num_img_tokens`` follow ``vision_config``.
        embd_layer: published description of the image embedding; kept as found.
        eos_token_id: the ids at which generation stops; the published file's 2, which the model never emits, is
            replaced by those of ``<|endoftext|>`` and ``<|end|>``.
        image_token_id: the id that stands at every image position, ``<|image|>`` of the published tokenizer.
        rope_mode: LongRoPE factors: ``auto`` chooses per sequence (short up to ``original_max_position_embeddings``
            positions, long beyond), ``short`` and ``long`` fix them. Never written to ``config.json``.

    Raises:
        ValueError: a size below 1 or heads that do not divide it, a patch grid that is not square and even, an unknown
            ``rope_mode``, position embeddings other than the published models' (LongRoPE, or plain RoPE), or an
            ``embd_layer`` of another arrangement than theirs.

    Source: published config.json; the saved form is the published one (``rope_scaling`` of type ``su``,
    ``rope_theta`` and ``torch_dtype`` at the top level), so that the original code reads it.
    """

    model_type = "phi3_v"
    # A plain mapping is read by every supported transformers; the newest ones derive it from another attribute.
    sub_configs: ClassVar = {"vision_config": CLIPVisionConfig}  # pyright: ignore

    max_position_embeddings: int = 131072
    eos_token_id: int | list[int] | None = None
    vision_config: Any = None
    img_processor: dict | None = None
    embd_layer: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # The classes are native: a published folder's pointer to remote code must not make a loader ask for trust.
        kwargs.pop("auto_map", None)
        kwargs.pop("_attn_implementation", None)
        self.rope_mode = kwargs.pop("rope_mode", "auto")
        if self.rope_mode not in ROPE_MODES:
            raise ValueError(f"rope_mode is {self.rope_mode!r}, must be one of {', '.join(ROPE_MODES)}")
        self.image_token_id = kwargs.pop("image_token_id", 32044)
        if self.eos_token_id in (None, PUBLISHED_WRONG_EOS):
            self.eos_token_id = list(STOP_TOKEN_IDS)
        if not isinstance(self.vision_config, CLIPVisionConfig):
            # Others would be lost when the configuration is written; one of transformers' own names code to fetch.
            if unknown := set(self.vision_config or {}) - {*VIT_L_14_336, "model_type"}:
                raise ValueError(f"vision_config.{min(unknown)} is not supported; it holds {', '.join(VIT_L_14_336)}")
            self.vision_config = CLIPVisionConfig(**{**VIT_L_14_336, **(self.vision_config or {})})
        vision: Any = self.vision_config
        for name, size in [(name, getattr(self, name)) for name in SIZES] + [
            (f"vision_config.{name}", getattr(vision, name)) for name in VIT_L_14_336
        ]:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, must be a whole number, at least 1")
        for name, sizes in (("", self), ("vision_config.", vision)):
            if sizes.hidden_size % sizes.num_attention_heads:
                raise ValueError(
                    f"{name}hidden_size {sizes.hidden_size} is not a multiple of its {sizes.num_attention_heads} heads"
                )
        patches_per_side, remainder = divmod(vision.image_size, vision.patch_size)
        if remainder or patches_per_side % 2:
            raise ValueError(
                f"vision_config.image_size {vision.image_size} px must hold an even number of "
                f"{vision.patch_size}-px patches a side"
            )
        self.img_processor = {
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            **(self.img_processor or {}),
            "image_dim_out": vision.hidden_size,
            "num_img_tokens": (patches_per_side // 2) ** 2,
        }
        self.embd_layer = {**EMBEDDING_LAYER, **(self.embd_layer or {})}
        for key, supported in EMBEDDING_LAYER.items():
            if self.embd_layer[key] != supported:
                raise ValueError(f"embd_layer.{key} is {self.embd_layer[key]!r}; only {supported!r} is supported")
        rope_scaling = kwargs.pop("rope_scaling", None)
        if rope_scaling is not None:
            if not isinstance(rope_scaling, dict):
                raise ValueError(f"rope_scaling is {rope_scaling!r}, must be an object or null")
            kind = rope_scaling.get("type", rope_scaling.get("rope_type", "default"))
            if kind not in ("su", "longrope", "default"):
                raise ValueError(f"rope_scaling.type is {kind!r}; only 'su' (LongRoPE) is supported")
            factors = {key: rope_scaling[key] for key in ("short_factor", "long_factor") if key in rope_scaling}
            self.rope_parameters = {"rope_type": "default"}
            if kind != "default" or factors:
                ratio = self.max_position_embeddings / self.original_max_position_embeddings
                self.rope_parameters = {"rope_type": "longrope", "factor": ratio, **factors}
        super().__post_init__(**kwargs)
        self._check_positions()

    def _check_positions(self) -> None:
        """Refuses position embeddings that the model does not compute: it would leave out what it does not know."""
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        if rope.get("rope_type") not in ("default", "longrope"):
            raise ValueError(f"rope_type is {rope.get('rope_type')!r}; only 'longrope' and 'default' are supported")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported")
        if self.sliding_window is not None and self.sliding_window < self.max_position_embeddings:
            raise ValueError(
                f"sliding_window is {self.sliding_window}, below max_position_embeddings "
                f"({self.max_position_embeddings}); only attention to all positions is supported"
            )
        num_factors = self.hidden_size // self.num_attention_heads // 2
        for key in ("short_factor", "long_factor"):
            factors: Any = rope.get(key)
            if rope["rope_type"] == "default" and factors is None:
                continue
            is_list = isinstance(factors, list | tuple) and len(factors) == num_factors
            if not is_list or not all(isinstance(one, int | float) and 0 < one < math.inf for one in factors):
                raise ValueError(
                    f"rope_scaling.{key} must be {num_factors} positive numbers, half as many as a head is wide"
                )

    @property
    def crop_px(self) -> int:
        """Crop edge, pixels."""
        return self.vision_config.image_size

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along a crop's edge."""
        return self.vision_config.image_size // self.vision_config.patch_size // 2

    @property
    def dims(self) -> ModelDims:
        """Sizes from which parameters, memory and arithmetic follow."""
        vision: Any = self.vision_config
        return ModelDims(
            hidden=self.hidden_size,
            layers=self.num_hidden_layers,
            mlp=self.intermediate_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads or self.num_attention_heads,
            vocab=self.vocab_size,
            has_tied_head=self.tie_word_embeddings,
            clip_width=vision.hidden_size,
            clip_layers=vision.num_hidden_layers,
            clip_mlp=vision.intermediate_size,
            clip_heads=vision.num_attention_heads,
            crop_px=vision.image_size,
            patch_px=vision.patch_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the published layout; ``Phi3VConfig(**config.to_dict())`` gives the same configuration."""
        published = super().to_dict()
        rope = published.pop("rope_parameters")
        published["rope_theta"] = rope["rope_theta"]
        published["rope_scaling"] = None
        if rope["rope_type"] == "longrope":
            published["rope_scaling"] = {
                "type": "su",
                "short_factor": rope["short_factor"],
                "long_factor": rope["long_factor"],
            }
        dtype = published.pop("dtype", None)
        if dtype is not None:
            published["torch_dtype"] = dtype
        for key in ("rope_mode", "partial_rotary_factor", "id2label", "label2id"):
            published.pop(key, None)
        if published.get("image_token_id") == 32044:
            del published["image_token_id"]
        vision = self.vision_config
        sizes = {key: getattr(vision, key) for key in VIT_L_14_336}
        published.pop("vision_config")
        if sizes != VIT_L_14_336:
            published["vision_config"] = sizes
        return published

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns ``to_dict()`` without the generic transformers defaults that the published file does not carry."""
        generic = PreTrainedConfig().to_dict()
        for key in ("transformers_version", "model_type"):
            generic.pop(key, None)
        return {
            key: value
            for key, value in self.to_dict().items()
            if key != "_name_or_path" and (key not in generic or value != generic[key])
        }
