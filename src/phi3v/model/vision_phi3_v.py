"""From crops to decoder rows: CLIP, the 2x2 merge with its separators, and the projector."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from .configuration_phi3_v import Phi3VConfig
from .packed_layers import PackedClipLayer


class Phi3VClipEncoder(nn.Module):
    """CLIP's stack of layers; named as in the published checkpoint."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.layers = nn.ModuleList([PackedClipLayer(vision) for _ in range(vision.num_hidden_layers)])


class Phi3VClipTower(nn.Module):
    """CLIP's vision tower up to its last but one hidden state.

    The last layer and ``post_layernorm`` never contribute: they are kept so that a checkpoint holds every published
    tensor, and are not computed.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.embeddings = CLIPVisionEmbeddings(vision)
        self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.encoder = Phi3VClipEncoder(config)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """crops: (S, 3, crop_px, crop_px) -> (S, patches, clip_width), the class token dropped."""
        hidden_states = self.pre_layrnorm(self.embeddings(crops))
        for layer in self.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states[:, 1:]


class Phi3VImageProcessorTower(nn.Module):
    """Holds the tower under the published name ``img_processor.vision_model``."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.vision_model = Phi3VClipTower(config)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.vision_model(crops)


class Phi3VImageEmbedding(nn.Module):
    """Turns images into rows of the decoder's input."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.crop_px = config.crop_px
        merged = 4 * config.vision_config.hidden_size
        self.img_processor = Phi3VImageProcessorTower(config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(
        self,
        crops: torch.Tensor,
        grids: Sequence[tuple[int, int]],
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Computes the rows of all images, one image after the other.

        Args:
            crops: (S, 3, crop_px, crop_px); of every image its global view, then its tiles row by row.
            grids: (rows, columns) of every image's tiles.
            encode: computes CLIP's features (S, patches, clip_width) of the crops; default: ``img_processor``.

        Returns:
            (rows, hidden_size): per image the tile grid row by row, each row closed by ``sub_GN``; then ``glb_GN``;
            then the global view, its rows closed by ``sub_GN`` too.
        """
        features = merge_neighbours((encode or self.img_processor)(crops.to(self.sub_GN.dtype)))
        rows_of_images: list[torch.Tensor] = []
        start = 0
        for rows, columns in grids:
            global_view, tiles = features[start], features[start + 1 : start + 1 + rows * columns]
            start += 1 + rows * columns
            side = tiles.shape[1]
            grid = tiles.reshape(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
            rows_of_images += [self._close_rows(grid), self.glb_GN[0].to(grid.dtype), self._close_rows(global_view)]
        return self.img_projection(torch.cat(rows_of_images))

    def own_crops(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Takes the images' own crops out of their padded form.

        Args:
            pixel_values: (N, C, 3, crop_px, crop_px); crops beyond an image's own are ignored.
            image_sizes: (N, 2) int64, padded (h, w) px.

        Returns:
            ``crops`` and ``grids`` as ``forward`` takes them.

        Raises:
            ValueError: an image has fewer crops than its size needs.
        """
        grids = [(height // self.crop_px, width // self.crop_px) for height, width in image_sizes.tolist()]
        most = max(rows * columns + 1 for rows, columns in grids)
        if len(grids) != pixel_values.shape[0] or most > pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values hold {pixel_values.shape[0]} images of {pixel_values.shape[1]} crops, but image_sizes "
                f"are of {len(grids)} images that need up to {most} crops"
            )
        own = [pixel_values[index, : rows * columns + 1] for index, (rows, columns) in enumerate(grids)]
        return torch.cat(own), grids

    def _close_rows(self, grid: torch.Tensor) -> torch.Tensor:
        """(h, w, width) -> (h * (w + 1), width): every row ends with the separator."""
        separators = self.sub_GN[0].expand(grid.shape[0], 1, -1).to(grid.dtype)
        return torch.cat([grid, separators], dim=1).flatten(0, 1)


def merge_neighbours(patches: torch.Tensor) -> torch.Tensor:
    """Joins 2x2 neighbouring patches into channels: (S, P * P, D) -> (S, P / 2, P / 2, 4 * D).

    The channels hold the block's patches in the order (0, 0), (0, 1), (1, 0), (1, 1) of (row, column).
    """
    crops, cells, width = patches.shape
    side = round(cells**0.5) // 2
    blocks = patches.reshape(crops, side, 2, side, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(crops, side, side, 4 * width)
