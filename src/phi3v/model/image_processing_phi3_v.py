"""The HD transform: one image becomes a global view and a grid of CLIP-sized crops."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils.hub import cached_file

from ..geometry import CROP_PX, MAX_NUM_CROPS, TOKENS_PER_SIDE, HDLayout, hd_layout, num_image_tokens

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHITE = 255
GRAY_MODES = ("1", "L", "LA")
"""PIL's modes without colour: their RGB repeats one channel three times."""
PREMULTIPLIED_MODES = {"La": "LA", "RGBa": "RGBA"}
"""PIL's modes that it converts to no mode but these."""
MAX_PIXEL_NUMBER = 1e3
"""Largest mean or standard deviation of [0, 1] pixels that is taken for one; its inverse is the least deviation."""
MAX_CROP_PX = 4096
"""Largest crop edge that a folder may ask for, pixels; the published model's is 336."""
PUBLISHED_CONSTANTS = ("auto_map", "do_convert_rgb", "image_processor_type", "processor_class")
"""Keys of the published file that are the same for every model of this family."""


class Phi3VImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings that ``from_pretrained`` and a call may override."""

    num_crops: int
    crop_px: int
    num_img_tokens: int


class Phi3VImageProcessor(BaseImageProcessor):
    """Resizes, pads, normalises and cuts images into crops.

    Args:
        num_crops: most tiles an image may take, the global view not counted. Published: 4; 16 is recommended for
            single documents.
        num_img_tokens: image tokens of one crop, a square number.
        crop_px: crop edge, pixels.
        image_mean: per-channel mean of [0, 1] pixels.
        image_std: per-channel standard deviation of [0, 1] pixels.

    Raises:
        ValueError: a number out of range or of another type, or ``num_img_tokens`` not a square.

    Source: published processor; geometry in ``phi3v.geometry.hd_layout``.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = Phi3VImageProcessorKwargs

    def __init__(
        self,
        num_crops: int = 4,
        num_img_tokens: int = TOKENS_PER_SIDE**2,
        crop_px: int = CROP_PX,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **published: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(published) - set(PUBLISHED_CONSTANTS))
        if unknown:
            raise TypeError(f"Phi3VImageProcessor does not know {', '.join(unknown)}")
        for name, value, most in (
            ("num_crops", num_crops, MAX_NUM_CROPS),
            ("num_img_tokens", num_img_tokens, MAX_CROP_PX**2),
            ("crop_px", crop_px, MAX_CROP_PX),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}, must be a whole number from 1 to {most}")
        if num_crops * crop_px**2 > MAX_NUM_CROPS * CROP_PX**2:
            raise ValueError(f"{num_crops} crops of {crop_px} px are more pixels than {MAX_NUM_CROPS} of {CROP_PX} px")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            is_list = isinstance(values, list | tuple) and len(values) == 3
            if not is_list or not all(isinstance(one, int | float) and abs(one) <= MAX_PIXEL_NUMBER for one in values):
                raise ValueError(f"{name} is {str(values)[:80]}, must be three numbers of [0, 1] pixels")
        if min(image_std) < 1 / MAX_PIXEL_NUMBER:
            raise ValueError(f"image_std is {list(image_std)}, must be above 0")
        self.num_crops = num_crops
        self.num_img_tokens = num_img_tokens
        self.tokens_per_side = round(num_img_tokens**0.5)
        if self.tokens_per_side**2 != num_img_tokens:
            raise ValueError(f"num_img_tokens is {num_img_tokens}, must be a square number")
        self.crop_px = crop_px
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def layout(self, height: int, width: int, num_crops: int | None = None) -> HDLayout:
        """Lays out an image of ``height`` x ``width`` px; ``num_crops`` defaults to the processor's own."""
        return hd_layout(height, width, self.num_crops if num_crops is None else num_crops, self.crop_px)

    def image_token_count(self, height: int, width: int, num_crops: int | None = None) -> int:
        """Counts an image's decoder positions from its size alone."""
        return num_image_tokens(self.layout(height, width, num_crops).grid, self.tokens_per_side)

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]  # the crops of one image belong together
        self,
        images: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray],
        num_crops: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Cuts images into crops.

        Args:
            images: one image or a list: PIL images of any mode, or uint8 arrays (h, w), (h, w, 3) or (h, w, 4).
                Orientation tags (EXIF) are not applied, as in the published processor.
            num_crops: overrides the processor's own.
            return_tensors: ``"pt"``, ``"np"`` or None.

        Returns:
            ``pixel_values``: (N, C, 3, crop_px, crop_px) float32; row n holds the global view of image n, then its
            tiles in row-major order, then zeros; C is the most crops of any image given.
            ``image_sizes``: (N, 2) int64, padded (h, w) px.
            ``num_img_tokens``: N decoder position counts.
        """
        if isinstance(images, Image.Image | np.ndarray):
            images = [images]
        layouts = [self.layout(*size_of(image), num_crops) for image in images]
        most = max((layout.num_crops for layout in layouts), default=0)
        pixel_values = torch.empty(len(layouts), most, 3, self.crop_px, self.crop_px)
        for image, layout, crops in zip(images, layouts, pixel_values, strict=True):
            self._cut(to_rgb_or_gray(image), layout, crops[: layout.num_crops])
            crops[layout.num_crops :] = 0
        data = {
            "pixel_values": pixel_values,
            "image_sizes": torch.tensor([layout.padded for layout in layouts], dtype=torch.int64).reshape(-1, 2),
            "num_img_tokens": [num_image_tokens(layout.grid, self.tokens_per_side) for layout in layouts],
        }
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["num_img_tokens"])

    def _cut(self, image: Image.Image, layout: HDLayout, crops: torch.Tensor) -> None:
        """Fills ``crops``: (1 + rows * columns, 3, crop_px, crop_px) float32, global view first.

        One channel after the other goes through one buffer, which stays in the processor's cache: every crop is
        written once.
        """
        edge = self.crop_px
        rows, columns = layout.grid
        tiles = crops[1:].view(rows, columns, 3, edge, edge)
        channels = [torch.from_numpy(np.array(channel)) for channel in hd_resize(image, layout).split()]
        if len(channels) == 1:
            channels *= 3
        plane = torch.empty(layout.padded)
        along = 1 if layout.is_transposed else 0
        inside = plane.narrow(along, layout.pad_top, layout.resized[0])
        for index, (pixels, mean, std) in enumerate(zip(channels, self.image_mean, self.image_std, strict=True)):
            plane.fill_(WHITE)
            inside.copy_(pixels)
            plane.div_(255).sub_(mean).div_(std)
            crops[0, index] = F.interpolate(plane[None, None], (edge, edge), mode="bicubic", align_corners=False)[0, 0]
            tiles[:, :, index] = plane.view(rows, edge, columns, edge).transpose(1, 2)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads ``preprocessor_config.json``, and the crop edge from ``config.json`` where that names one."""
        settings, rest = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "crop_px" not in settings:
            wanted = ("cache_dir", "force_download", "token", "local_files_only", "revision", "subfolder")
            config_file = None
            if not Path(pretrained_model_name_or_path).is_file():
                config_file = cached_file(
                    pretrained_model_name_or_path,
                    "config.json",
                    _raise_exceptions_for_missing_entries=False,
                    **{key: kwargs[key] for key in wanted if kwargs.get(key) is not None},
                )
            if config_file is not None:
                vision = json.loads(Path(config_file).read_text("utf-8")).get("vision_config") or {}
                if "image_size" in vision:
                    settings["crop_px"] = vision["image_size"]
                    settings["num_img_tokens"] = (vision["image_size"] // vision.get("patch_size", 14) // 2) ** 2
        return settings, rest

    def to_dict(self) -> dict[str, Any]:
        """Returns the published layout; ``crop_px`` is written only where it is not the published 336."""
        settings = {
            "do_convert_rgb": True,
            "image_mean": self.image_mean,
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": self.image_std,
            "num_crops": self.num_crops,
            "num_img_tokens": self.num_img_tokens,
            "processor_class": "Phi3VProcessor",
        }
        if self.crop_px != CROP_PX:
            settings["crop_px"] = self.crop_px
        return settings


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Returns an image's (h, w) px.

    Raises:
        TypeError: neither a PIL image nor a uint8 array of shape (h, w), (h, w, 3) or (h, w, 4).
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image must be a PIL image or a uint8 array, got {type(image).__name__}")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise TypeError(f"an image array must be (h, w), (h, w, 3) or (h, w, 4) uint8, got {image.shape} {image.dtype}")
    return image.shape[0], image.shape[1]


def to_rgb_or_gray(image: Image.Image | np.ndarray) -> Image.Image:
    """Converts as the published processor does: through PIL, alpha dropped, palettes resolved.

    An image without colour stays one channel (``L``), a third of the work for the same pixels. An image that is RGB or
    ``L`` already is returned itself.

    Raises:
        TypeError: as ``size_of``.
    """
    size_of(image)
    pil = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if pil.mode in PREMULTIPLIED_MODES:
        pil = pil.convert(PREMULTIPLIED_MODES[pil.mode])
    mode = "L" if pil.mode in GRAY_MODES else "RGB"
    return pil if pil.mode == mode else pil.convert(mode)


def hd_resize(image: Image.Image, layout: HDLayout) -> Image.Image:
    """Resizes an image to its layout, in its own orientation.

    The transform resizes a portrait image transposed. PIL works along the rows first, then along the columns, and
    rounds to whole values in between, so that the order shows. Two calls with one direction each give the transposed
    image's order, and its pixels, without turning the image twice.
    """
    short, long = layout.resized
    if not layout.is_transposed:
        return image.resize((long, short), Image.Resampling.BILINEAR)
    tall = image.resize((image.width, long), Image.Resampling.BILINEAR)
    return tall.resize((short, long), Image.Resampling.BILINEAR)
