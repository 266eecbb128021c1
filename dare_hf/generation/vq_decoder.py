"""The missing half of a Chameleon VQ-VAE: image tokens back to pixels.

transformers has no VQ decoder for Chameleon (5.24), so a model that draws ships one beside its
weights, in one of two kinds.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

DECODER_FILE = "image_decoder.safetensors"


class ImageDecoder(nn.Module):
    """Codebook vectors -> pixels. What it is made of is written beside its weights.

    Args:
        shape: The arguments that make such a decoder, as JSON knows them.
    """

    kinds: ClassVar[dict[str, type[ImageDecoder]]] = {}
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        super().__init_subclass__()
        cls.kind = kind
        ImageDecoder.kinds[kind] = cls

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        self.shape = shape

    def save(self, directory: Path, dtype: torch.dtype | None = torch.float16) -> None:
        """Writes the weights, with the shape as metadata, to DECODER_FILE.

        Args:
            directory: The model's folder.
            dtype: Of the weights in the file; None keeps theirs.
        """
        state = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        metadata = {name: json.dumps(value) for name, value in self.shape.items()}
        save_file(state, directory / DECODER_FILE, metadata=metadata | {"kind": self.kind})

    @classmethod
    def load(cls, directory: Path) -> ImageDecoder:
        """Reads what `save` wrote; parameters are float32, in eval mode, without gradients.

        Args:
            directory: The model's folder.

        Raises:
            FileNotFoundError: The model directory has no decoder.
        """
        path = Path(directory) / DECODER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"expected an image decoder at {path}, got no such file: only models that ship "
                f"{DECODER_FILE} can turn image tokens into pictures"
            )
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        kind = cls.kinds[metadata.pop("kind", VQPatchDecoder.kind)]
        decoder = kind(**{name: json.loads(value) for name, value in metadata.items()})
        decoder.load_state_dict({k: v.to(torch.float32) for k, v in load_file(path).items()})
        return decoder.eval().requires_grad_(False)


class VQPatchDecoder(ImageDecoder, kind="patches"):
    """One patch per vector, each by itself; nothing of one patch leaks into its neighbours.

    Args:
        embed_dim: Width of a codebook vector.
        hidden: Channels of the one hidden layer.
        patch: Pixels per side of a patch.
    """

    def __init__(self, embed_dim: int, hidden: int, patch: int) -> None:
        super().__init__(embed_dim=embed_dim, hidden=hidden, patch=patch)
        self.layers = nn.Sequential(
            nn.Conv2d(embed_dim, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, 3 * patch * patch, 1),
            nn.PixelShuffle(patch),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Codebook vectors [batch, embed_dim, h, w] -> pixels [batch, 3, h patch, w patch]."""
        return self.layers(codes)


class ChameleonVQDecoder(ImageDecoder, kind="vqgan"):
    """The decoder of Chameleon's and Anole's VQGAN, by the names its checkpoints have.

    Args:
        embed_dim: Width of a codebook vector.
        latent_channels: Channels between the codebook and the decoder.
        base_channels: Channels at full resolution.
        channel_multiplier: Times that many at each level, the finest first.
        num_res_blocks: Residual blocks of a level of the encoder; the decoder has one more.

    Source: taming-transformers (arXiv:2012.09841), as Chameleon (arXiv:2405.09818) uses it.
    """

    def __init__(
        self,
        embed_dim: int,
        latent_channels: int,
        base_channels: int,
        channel_multiplier: list[int],
        num_res_blocks: int,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            latent_channels=latent_channels,
            base_channels=base_channels,
            channel_multiplier=list(channel_multiplier),
            num_res_blocks=num_res_blocks,
        )
        # the encoder's blocks are the decoder's; imported here, since few models draw
        from transformers.models.chameleon import modeling_chameleon as chameleon

        block = partial(
            chameleon.ChameleonVQVAEEncoderResnetBlock, chameleon.ChameleonVQVAEConfig(dropout=0.0)
        )
        widths = [base_channels * times for times in channel_multiplier]
        self.post_quant_conv = nn.Conv2d(embed_dim, latent_channels, 1)
        decoder: Any = nn.Module()
        self.decoder = decoder
        decoder.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        decoder.mid = nn.Module()
        decoder.mid.block_1 = block(widths[-1], widths[-1])
        decoder.mid.attn_1 = chameleon.ChameleonVQVAEEncoderAttnBlock(widths[-1])
        decoder.mid.block_2 = block(widths[-1], widths[-1])
        decoder.up = nn.ModuleList(
            _level(block, level, widths, num_res_blocks) for level in range(len(widths))
        )
        decoder.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Codebook vectors [batch, embed_dim, h, w] -> pixels [batch, 3, 2^n h, 2^n w].

        n is the number of levels less one.
        """
        decoder: Any = self.decoder
        x = decoder.conv_in(self.post_quant_conv(codes))
        x = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(x)))
        for level in reversed(range(len(decoder.up))):
            for block in decoder.up[level].block:
                x = block(x)
            if level:
                x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = decoder.up[level].upsample.conv(x)
        return decoder.conv_out(nn.functional.silu(decoder.norm_out(x)))


def _level(block: Any, level: int, widths: list[int], num_res_blocks: int) -> nn.Module:
    """The blocks of a level, which begin at the coarser one's width, and the way to the finer."""
    width, coarser = widths[level], widths[min(level + 1, len(widths) - 1)]
    up: Any = nn.Module()
    up.block = nn.ModuleList(block(entry, width) for entry in [coarser, *[width] * num_res_blocks])
    if level:
        up.upsample = nn.Module()
        up.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
    return up
