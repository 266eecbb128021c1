"""The missing half of a Chameleon VQ-VAE: image tokens back to pixels.

transformers has no VQ decoder for Chameleon (5.23), so a model that draws ships one beside its
weights. This one decodes each token by itself; nothing of one patch leaks into its neighbours.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DECODER_FILE = "image_decoder.safetensors"


class VQPatchDecoder(nn.Module):
    """Codebook vectors -> pixels, one patch per vector.

    Args:
        embed_dim: Width of a codebook vector.
        hidden: Channels of the one hidden layer.
        patch: Pixels per side of a patch.
    """

    def __init__(self, embed_dim: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.shape = {"embed_dim": embed_dim, "hidden": hidden, "patch": patch}
        self.layers = nn.Sequential(
            nn.Conv2d(embed_dim, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, 3 * patch * patch, 1),
            nn.PixelShuffle(patch),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Codebook vectors [batch, embed_dim, h, w] -> pixels [batch, 3, h patch, w patch]."""
        return self.layers(codes)

    def save(self, directory: Path) -> None:
        """Writes the weights, as float16 and with the shape as metadata, to DECODER_FILE."""
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        metadata = {name: str(value) for name, value in self.shape.items()}
        save_file(state, directory / DECODER_FILE, metadata=metadata)

    @classmethod
    def load(cls, directory: Path) -> "VQPatchDecoder":
        """Reads what `save` wrote; parameters are float32, in eval mode, without gradients.

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
            shape = {name: int(value) for name, value in file.metadata().items()}
        decoder = cls(**{name: shape[name] for name in ("embed_dim", "hidden", "patch")})
        decoder.load_state_dict({k: v.to(torch.float32) for k, v in load_file(path).items()})
        return decoder.eval().requires_grad_(False)
