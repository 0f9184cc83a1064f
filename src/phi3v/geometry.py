"""Pure integers: from an image's size to its crops and its decoder positions. The one home of these formulas.

Words: a *crop* is one square tile that CLIP sees (336 px in the published model), a *patch* is one CLIP cell
(14 px), an *image token* is one decoder position. Sizes are ``(h, w)`` in pixels.
"""

from dataclasses import dataclass
from math import ceil

CROP_PX = 336
"""Crop edge of the published model, pixels: CLIP ViT-L/14-336's image size."""

TOKENS_PER_SIDE = 12
"""Image tokens along a crop's edge in the published model: 24 patches a side, merged two by two."""

MAX_NUM_CROPS = 1024
"""Most tiles that a file may ask for an image: more than a decoder of 131,072 positions holds in the published model,
and few enough that a line of data cannot ask for more memory than there is (1.4 GB of pixel values)."""


@dataclass(frozen=True, slots=True)
class HDLayout:
    """Where an image's pixels go in the HD transform.

    Attributes:
        resized: ``(h, w)`` px of the image after its bilinear resize, in the orientation it is resized in
            (landscape: a portrait image is transposed first and back at the end).
        pad_top: white rows above the resized image, px, in that same orientation.
        pad_bottom: white rows below it, px.
        is_transposed: whether the image is portrait (w < h) and so goes through the transform transposed.
        grid: ``(rows, columns)`` of crops in the image's own orientation, the global view not counted.
        padded: ``(h, w)`` px of the padded image in its own orientation; what ``image_sizes`` holds.
    """

    resized: tuple[int, int]
    pad_top: int
    pad_bottom: int
    is_transposed: bool
    grid: tuple[int, int]
    padded: tuple[int, int]

    @property
    def num_crops(self) -> int:
        """Crops that CLIP computes for the image: its tiles and the global view."""
        return self.grid[0] * self.grid[1] + 1


def hd_layout(height: int, width: int, num_crops: int, crop_px: int = CROP_PX) -> HDLayout:
    """Lays an image of ``height`` x ``width`` px out on at most ``num_crops`` tiles.

    The image is scaled, up or down, to the widest whole number of tiles whose rows still fit, then padded with
    white to whole tiles.

    Raises:
        ValueError: a size or ``num_crops`` below 1, or an aspect ratio whose short side would vanish.

    Source: published processor's HD transform.

    >>> hd_layout(1100, 850, num_crops=16).grid  # a portrait page
    (4, 4)
    >>> hd_layout(480, 640, num_crops=4).padded
    (672, 672)
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} px (h x w) has no pixels")
    if num_crops < 1:
        raise ValueError(f"num_crops is {num_crops}, must be at least 1")
    is_transposed = width < height
    short, long = (width, height) if is_transposed else (height, width)
    ratio = long / short
    scale = 1
    while scale * ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    resized_w = scale * crop_px
    resized_h = int(resized_w / ratio)
    if resized_h < 1:
        raise ValueError(f"an image of {height}x{width} px (h x w) is too elongated: its short side vanishes")
    rows = ceil(resized_h / crop_px)
    missing = rows * crop_px - resized_h
    pad_top = missing // 2
    grid = (scale, rows) if is_transposed else (rows, scale)
    return HDLayout(
        resized=(resized_h, resized_w),
        pad_top=pad_top,
        pad_bottom=missing - pad_top,
        is_transposed=is_transposed,
        grid=grid,
        padded=(grid[0] * crop_px, grid[1] * crop_px),
    )


def num_image_tokens(grid: tuple[int, int], tokens_per_side: int = TOKENS_PER_SIDE) -> int:
    """Counts the decoder positions of one image whose tiles form ``grid`` = (rows, columns).

    Tiles and global view give ``tokens_per_side**2`` each; every token row of both ends with a separator, and one
    separator stands between them.

    >>> num_image_tokens((1, 1)), num_image_tokens((2, 2)), num_image_tokens((4, 4))
    (313, 757, 2509)
    """
    rows, columns = grid
    return (rows * columns + 1) * tokens_per_side**2 + 1 + (rows + 1) * tokens_per_side


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes of a model, from which its parameters, memory and arithmetic follow.

    Attributes:
        hidden: width of a decoder position.
        layers: decoder layers.
        mlp: width inside the decoder's MLP, gate and up projection each.
        heads: query heads of the decoder.
        kv_heads: key and value heads of the decoder.
        vocab: rows of the embedding and of the head.
        has_tied_head: whether head and embedding are one matrix.
        clip_width: width of a CLIP position.
        clip_layers: layers of the CLIP tower as stored; the last one is not computed.
        clip_mlp: width inside CLIP's MLP.
        clip_heads: attention heads of CLIP.
        crop_px: crop edge, pixels.
        patch_px: patch edge, pixels.
    """

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    has_tied_head: bool = False
    clip_width: int
    clip_layers: int
    clip_mlp: int
    clip_heads: int
    crop_px: int
    patch_px: int

    @classmethod
    def published(cls) -> "ModelDims":
        """Returns the sizes of Phi-3-vision and Phi-3.5-vision.

        Source: published config.json and openai/clip-vit-large-patch14-336.
        """
        return cls(
            hidden=3072,
            layers=32,
            mlp=8192,
            heads=32,
            kv_heads=32,
            vocab=32064,
            clip_width=1024,
            clip_layers=24,
            clip_mlp=4096,
            clip_heads=16,
            crop_px=CROP_PX,
            patch_px=CROP_PX // (2 * TOKENS_PER_SIDE),
        )

    @property
    def head_dim(self) -> int:
        """Width of a decoder head."""
        return self.hidden // self.heads

    @property
    def qkv(self) -> int:
        """Width of the decoder's fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def clip_layers_computed(self) -> int:
        """CLIP layers that contribute: all but the last."""
        return self.clip_layers - 1

    @property
    def patches(self) -> int:
        """Patches of a crop."""
        return (self.crop_px // self.patch_px) ** 2

    @property
    def clip_positions(self) -> int:
        """Positions of a crop in CLIP: its patches and the class token."""
        return self.patches + 1

    @property
    def merged_width(self) -> int:
        """Width of a row that enters the projector: two by two patches side by side."""
        return 4 * self.clip_width

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along a crop's edge."""
        return self.crop_px // self.patch_px // 2

    @property
    def crop_tokens(self) -> int:
        """Image tokens of a crop, separators not counted."""
        return self.tokens_per_side**2

    @property
    def decoder_layer_matrices(self) -> int:
        """Weights of the four matrices of a decoder layer: those that QLoRA holds in 4 bit.

        >>> ModelDims.published().decoder_layer_matrices
        113246208
        """
        return self.hidden * self.qkv + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.mlp

    @property
    def num_decoder_parameters(self) -> int:
        """Parameters of the decoder's layers and its last norm."""
        return self.layers * (self.decoder_layer_matrices + 2 * self.hidden) + self.hidden

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the token embedding; as many as the head's."""
        return self.vocab * self.hidden

    @property
    def clip_layer_parameters(self) -> int:
        """Parameters of a CLIP layer: attention, MLP with biases, two layer norms."""
        width, mlp = self.clip_width, self.clip_mlp
        return 4 * width * (width + 1) + 2 * width * mlp + mlp + width + 4 * width

    @property
    def num_vision_parameters(self) -> int:
        """Parameters of CLIP as stored: embeddings, every layer, the norms before and behind them."""
        embeddings = self.clip_width * (1 + self.clip_positions + 3 * self.patch_px**2)
        return embeddings + self.clip_layers * self.clip_layer_parameters + 4 * self.clip_width

    @property
    def num_projector_parameters(self) -> int:
        """Parameters of the projector and of the two separators."""
        return (self.merged_width + 1) * self.hidden + (self.hidden + 1) * self.hidden + 2 * self.merged_width

    @property
    def num_parameters(self) -> int:
        """Parameters of the model.

        >>> ModelDims.published().num_parameters
        4146621440
        """
        embeddings = self.num_embedding_parameters * (1 if self.has_tied_head else 2)
        return self.num_decoder_parameters + embeddings + self.num_vision_parameters + self.num_projector_parameters
