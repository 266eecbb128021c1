"""Interleaved text and images from Chameleon: let it draw, keep each image whole, decode it.

transformers' Chameleon reads images but cannot write them: its forward sets the logits of all image
tokens to the dtype's minimum (modeling_chameleon.py, 5.23). The three parts here undo that for one
model, from outside, and only while asked to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ChameleonProcessor, LogitsProcessor, PreTrainedModel

from dare_hf.errors import DareConfigError, DareInputError, UnsupportedModelError
from dare_hf.generation.vq_decoder import ImageDecoder


def image_token_ids(model: PreTrainedModel) -> dict[int, int]:
    """Vocabulary id -> VQ code of a Chameleon-type model, in id order.

    Raises:
        UnsupportedModelError: The model has no image tokens in its vocabulary.
    """
    return dict(sorted(_chameleon(model).vocabulary_mapping.bpe2img.items()))


def _chameleon(model: torch.nn.Module) -> Any:
    """The inner module that owns the vocabulary mapping, below any wrapper."""
    for module in model.modules():
        if hasattr(module, "vocabulary_mapping"):
            return module
    raise UnsupportedModelError(
        f"expected a model with image tokens in its vocabulary (Chameleon), got "
        f"{type(model).__name__}: only such models can draw images"
    )


@contextmanager
def allow_image_tokens(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Lets `model` sample image tokens inside the block; afterwards its mapping is as it was.

    Only cached properties of this model's own mapping instance are set. Blocks may be nested.

    Args:
        model: A Chameleon-type model, or a wrapper around one.

    Yields:
        The same model.

    Raises:
        UnsupportedModelError: The model has no image tokens in its vocabulary.
    """
    mapping = _chameleon(model).vocabulary_mapping
    before = dict(vars(mapping))
    # These are cached from `image_tokens`, so they must be read before it is emptied.
    _ = (mapping.bpe2img, mapping.img2bpe, mapping.bpe2img_search_tensors)
    _ = mapping.img2bpe_mapping_tensor
    mapping.image_tokens = []
    try:
        yield model
    finally:
        vars(mapping).clear()
        vars(mapping).update(before)


class WholeImageLogitsProcessor(LogitsProcessor):
    """Allows an image only as begin, exactly `tokens_per_image` image ids, end.

    Each call derives where every row stands from its ids alone, so beam reordering, candidates of
    speculative decoding and left padding need no bookkeeping.

    Args:
        image_ids: Vocabulary ids of the VQ codes.
        begin_id: Begin-of-image id; when to draw is the model's choice.
        end_id: End-of-image id.
        tokens_per_image: Image ids between the two.
        vocab_size: Width of the logits, if known now; otherwise checked at the first call.
        placeholder_ids: Ids that only prompts may hold (`<image>`); never sampled.

    Raises:
        DareConfigError: No or repeated ids, a count below 1, or ids outside the vocabulary.
    """

    def __init__(
        self,
        image_ids: Sequence[int],
        begin_id: int,
        end_id: int,
        tokens_per_image: int,
        vocab_size: int | None = None,
        placeholder_ids: Sequence[int] = (),
    ) -> None:
        ids = [*image_ids, begin_id, end_id, *placeholder_ids]
        if not image_ids or len(set(ids)) != len(ids):
            raise DareConfigError(
                f"expected distinct image, begin, end and placeholder ids and at least one image "
                f"id, got {len(image_ids)} image ids, begin {begin_id}, end {end_id}, "
                f"placeholders {list(placeholder_ids)}"
            )
        if tokens_per_image < 1:
            raise DareConfigError(f"tokens_per_image: expected >= 1, got {tokens_per_image}")
        self.image_ids, self.placeholder_ids = list(image_ids), list(placeholder_ids)
        self.begin_id, self.end_id, self.tokens_per_image = begin_id, end_id, tokens_per_image
        self._bans: dict[tuple[int, torch.device], Tensor] = {}
        if vocab_size is not None:
            self._check_vocabulary(vocab_size)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, processor: ChameleonProcessor
    ) -> "WholeImageLogitsProcessor":
        """Reads all ids from a Chameleon-type model and its processor."""
        return cls(
            image_ids=list(image_token_ids(model)),
            begin_id=processor.image_start_token_id,
            end_id=processor.image_end_token_id,
            tokens_per_image=processor.image_seq_length,
            vocab_size=model.config.get_text_config().vocab_size,
            placeholder_ids=[processor.image_token_id],
        )

    def _check_vocabulary(self, vocab_size: int) -> None:
        ids = [*self.image_ids, self.begin_id, self.end_id, *self.placeholder_ids]
        outside = sorted({i for i in ids if not 0 <= i < vocab_size})
        if outside:
            raise DareConfigError(
                f"expected image-token ids inside the vocabulary of {vocab_size}, got "
                f"{outside[:5]}{' ...' if len(outside) > 5 else ''}: take the ids from this "
                f"model's own configuration (image_token_ids(model))"
            )

    def _ban_table(self, scores: Tensor) -> Tensor:
        """Bool [3, vocab]: what may not follow outside, inside, and at the end of an image."""
        key = (scores.shape[-1], scores.device)
        if key not in self._bans:
            self._check_vocabulary(scores.shape[-1])
            ban = torch.ones(3, scores.shape[-1], dtype=torch.bool)
            ban[0] = False
            ban[0, [*self.image_ids, self.end_id, *self.placeholder_ids]] = True
            ban[1, self.image_ids] = False
            ban[2, self.end_id] = False
            self._bans[key] = ban.to(scores.device)
        return self._bans[key]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, n] ids and [rows, vocab] scores -> scores with the impossible ids at -inf."""
        window = input_ids[:, -(self.tokens_per_image + 1) :]
        width = window.shape[1]
        place = torch.arange(width, device=window.device)
        begin = torch.where(window == self.begin_id, place, -1).amax(1)
        end = torch.where(window == self.end_id, place, -1).amax(1)
        drawn = width - 1 - begin
        # 0: outside, 1: an image id must follow, 2: the end must follow.
        state = torch.where(drawn < self.tokens_per_image, 1, 2)
        state = torch.where((begin < 0) | (end > begin), 0, state)
        return scores.masked_fill(self._ban_table(scores)[state], -torch.inf)


def find_images(ids: Sequence[int], begin_id: int, tokens_per_image: int) -> list[list[int]]:
    """The image ids after each begin-of-image of one row; one cut off at the end is left out."""
    ids = list(ids)
    starts = [k + 1 for k, token in enumerate(ids) if token == begin_id]
    spans = [ids[k : k + tokens_per_image] for k in starts]
    return [span for span in spans if len(span) == tokens_per_image]


@torch.no_grad()
def decode_images(
    model: PreTrainedModel,
    processor: ChameleonProcessor,
    images: Sequence[Sequence[int]],
    decoder: ImageDecoder,
) -> list[Image.Image]:
    """Image ids -> pictures, through the model's codebook and its decoder.

    Args:
        model: The Chameleon-type model the ids come from.
        processor: Its processor; says how pixels were normalised.
        images: One list of vocabulary ids per image, each of the same square length.
        decoder: See `load_decoder`.

    Returns:
        One RGB picture per image.

    Raises:
        DareInputError: An id is no image id, or an image is not square.
    """
    if not images:
        return []
    codes, side = image_token_ids(model), isqrt(len(images[0]))
    if any(len(image) != side * side for image in images):
        raise DareInputError(
            f"expected images of one square number of tokens, got lengths "
            f"{sorted({len(image) for image in images})}"
        )
    foreign = sorted({int(i) for image in images for i in image} - set(codes))
    if foreign:
        raise DareInputError(f"expected image-token ids, got {foreign[:5]}: no such VQ codes")
    book = _chameleon(model).vqmodel.quantize.embedding.weight
    picked = torch.tensor([[codes[int(i)] for i in image] for image in images], device=book.device)
    vectors = book[picked].view(len(images), side, side, -1).permute(0, 3, 1, 2).float()
    decoder.to(device=book.device)
    pixels = decoder(vectors).permute(0, 2, 3, 1).cpu().numpy()
    scale: Any = processor.image_processor
    pixels = (
        pixels * np.array(scale.image_std) + np.array(scale.image_mean)
    ) / scale.rescale_factor
    array = pixels.round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in array]


def load_decoder(model: PreTrainedModel) -> ImageDecoder:
    """The image decoder beside the weights `model` was loaded from.

    Raises:
        FileNotFoundError: That directory ships none.
    """
    return ImageDecoder.load(Path(model.config._name_or_path))
