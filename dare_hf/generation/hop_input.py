"""From a callback's HopInput to the tokens and vectors one row gets."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import ChameleonProcessor

from dare_hf.compat import processed
from dare_hf.errors import DareInputError
from dare_hf.generation.hop_types import HopInput, Piece

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_PLACEHOLDERS = ("image_token_id", "image_token_index")


class HopInputReader:
    """Reads HopInputs for one model.

    Args:
        model: The model that will run them.
        processor: Its processor, or a tokenizer where only text is injected; or None.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.width = model.config.get_text_config().hidden_size
        self.rows = model.get_input_embeddings().weight.shape[0]
        self.placeholder = placeholder_id(model.config)

    def read(self, given: Any) -> Piece:
        """The tokens of one answer.

        Raises:
            DareInputError: It is no HopInput, is empty, or does not fit the model or the loop.
        """
        if not isinstance(given, HopInput):
            raise DareInputError(
                f"on_hop: expected a HopInput or None; got {type(given).__name__}. Return "
                "HopInput(text=...), HopInput(input_ids=...), images or features"
            )
        piece = self._images(given.pictures, given.text) if given.pictures else Piece([], [])
        own = [] if given.pictures or given.text is None else self._encode(given.text)
        own += self._ids(given.input_ids)
        if given.features is not None:
            self._features(piece, given.features, own)
        elif self.placeholder in own:
            raise DareInputError(
                f"HopInput: expected features for the placeholder id {self.placeholder} in "
                f"input_ids; got {own.count(self.placeholder)} placeholders and no features"
            )
        piece.ids += own
        piece.places += [token == self.placeholder for token in own]
        if not piece.ids:
            raise DareInputError(
                "HopInput: expected at least one token to inject; got none. Return None for a row "
                "that needs no input"
            )
        return piece

    def _ids(self, ids: Any) -> list[int]:
        if ids is None:
            return []
        numbers = torch.as_tensor(ids)
        if numbers.ndim == 2 and numbers.shape[0] == 1:
            numbers = numbers[0]
        if numbers.ndim != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise DareInputError(
                "HopInput.input_ids: expected whole numbers [n], one row; got "
                f"{numbers.dtype} of shape {list(numbers.shape)}"
            )
        found = [int(number) for number in numbers.tolist()]
        outside = [i for i in found if not 0 <= i < self.rows and i != self.placeholder]
        if outside:
            raise DareInputError(
                f"HopInput.input_ids: expected ids of the vocabulary, 0 to {self.rows - 1}; got "
                f"{outside[:5]}"
            )
        return found

    def _encode(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise DareInputError(f"HopInput.text: expected a string; got {type(text).__name__}")
        tokenizer = getattr(self._need("text"), "tokenizer", self.processor)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def _need(self, field: str) -> Any:
        if self.processor is None:
            raise DareInputError(
                f"HopInput.{field}: expected a loop with a processor; got none. Make the loop with "
                "HopLoop(..., processor=processor), or inject input_ids or features"
            )
        return self.processor

    def _holes(self, field: str) -> int:
        if self.placeholder is None:
            raise DareInputError(
                f"HopInput.{field}: expected a model with an image token in its config; got "
                f"{type(self.model).__name__}, which has none"
            )
        return self.placeholder

    # Vectors

    def _features(self, piece: Piece, features: Any, own: list[int]) -> None:
        """Add features to the piece; without placeholders in `own` they come before it."""
        token = self._holes("features")
        wanted = f"a float tensor [n, {self.width}] or [height, width, {self.width}]"
        if not isinstance(features, torch.Tensor) or not features.is_floating_point():
            got = getattr(features, "dtype", type(features).__name__)
            raise DareInputError(f"HopInput.features: expected {wanted}; got {got}")
        if features.ndim not in (2, 3) or features.shape[-1] != self.width or not len(features):
            raise DareInputError(
                f"HopInput.features: expected {wanted}; got shape {list(features.shape)}"
            )
        grid = self._grid(features) if features.ndim == 3 else None
        vectors = features.reshape(-1, self.width)
        count = len(vectors)
        holes = own.count(token)
        if holes not in (0, count):
            raise DareInputError(
                f"HopInput: expected as many placeholder ids ({token}) in text or input_ids as "
                f"features, {count}, or none; got {holes}"
            )
        if not holes:
            piece.ids += [token] * count
            piece.places += [True] * count
        piece.grids += [(count, grid)] if grid is not None else [(1, None)] * count
        old = piece.vectors
        piece.vectors = vectors if old is None else torch.cat([old, vectors.to(old)])

    def _grid(self, features: Tensor) -> Tensor:
        """[t, h, w] in the vision tower's patches, as processors give it."""
        vision = getattr(self.model.config, "vision_config", None)
        merge = getattr(vision, "spatial_merge_size", 1)
        return torch.tensor([1, features.shape[0] * merge, features.shape[1] * merge])

    # Images

    def _images(self, pictures: list[Any], text: str | None) -> Piece:
        """Pictures through the processor, the model's own tower and projector."""
        token = self._holes("images")
        processor = self._need("images")
        encoder = getattr(self.model.base_model, "get_image_features", None)
        if encoder is None or not hasattr(processor, "image_processor"):
            raise DareInputError(
                "HopInput.images: expected a model with get_image_features and its processor; got "
                f"{type(self.model).__name__} and {type(processor).__name__}. Inject features"
            )
        batch = self._process(processor, pictures, text)
        ids = [int(i) for i in torch.as_tensor(batch["input_ids"]).reshape(-1).tolist()]
        vectors, lengths = self._encode_images(encoder, batch)
        places = [i == token for i in ids]
        if sum(places) != len(vectors):
            raise DareInputError(
                "HopInput.images: expected as many placeholders from the processor as features "
                f"from the model; got {sum(places)} and {len(vectors)}"
            )
        grids: list[tuple[int, Tensor | None]] = [(1, None)] * len(vectors)
        if (given := batch.get("image_grid_thw")) is not None:
            grids = list(zip(lengths, given.cpu(), strict=True))
        return Piece(ids, places, vectors, grids)

    def _process(self, processor: Any, pictures: list[Any], text: str | None) -> Any:
        token = processor.image_token
        if text is None or token not in text:
            text = self._framed(processor, token) * len(pictures) + (text or "")
        options: dict[str, Any] = {"add_special_tokens": False, "return_tensors": "pt"}
        if isinstance(processor, ChameleonProcessor):
            # Chameleon's processor ends every text with a separator unless told not to.
            return processed(processor, images=pictures, text=[text], **options)
        return processor(images=pictures, text=[text], **options)

    def _framed(self, processor: Any, token: str) -> str:
        """The image token in the frame that Qwen-like models have around it in their prompts."""
        names = ("vision_start_token_id", "vision_end_token_id")
        frame = [getattr(self.model.config, name, None) for name in names]
        if None in frame:
            return token
        start, end = processor.tokenizer.convert_ids_to_tokens(frame)
        return f"{start}{token}{end}"

    def _encode_images(self, encoder: Callable[..., Any], batch: Any) -> tuple[Tensor, list[int]]:
        """[n, D] vectors of all images, and how many are each image's."""
        names = inspect.signature(encoder).parameters
        device, dtype = self.model.device, self.model.dtype
        arguments = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in batch.items()
            if name in names and isinstance(value, torch.Tensor)
        }
        output = encoder(**arguments, return_dict=True)
        if getattr(output, "deepstack_features", None) is not None:
            raise DareInputError(
                "HopInput.images: expected a model whose images enter at the embeddings only; got "
                f"{type(self.model).__name__}, which also adds them to deeper layers (deepstack). "
                "That cannot be injected yet: put the image into the prompt"
            )
        parts = [part.reshape(-1, self.width) for part in output.pooler_output]
        return torch.cat(parts), [len(part) for part in parts]


def placeholder_id(config: Any) -> int | None:
    """The id that stands for one image vector."""
    for name in _PLACEHOLDERS:
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    found = (getattr(config, "vocabulary_map", None) or {}).get("<image>")
    return None if found is None else int(found)
