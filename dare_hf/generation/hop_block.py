"""Injected columns of a batch, and what generate carries from step to step extended by them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError, UnsupportedModelError
from dare_hf.generation.hop_types import Piece

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_TYPE_IDS = ("token_type_ids", "mm_token_type_ids")


@dataclass
class Block:
    """Columns injected into all rows at once; each row's tokens stand at the right end.

    Attributes:
        pieces: Row -> its tokens.
        ids: Long[B, k], pad ids where a row has nothing.
        mask: Long[B, k], 1 for injected tokens.
        places: Bool[B, k] placeholders.
        vectors: [p, D] what goes there, row by row; None without any.
    """

    pieces: Mapping[int, Piece]
    ids: Tensor
    mask: Tensor
    places: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, pieces: Mapping[int, Piece], like: Tensor, pad_id: int) -> Block:
        """Right-align the pieces of some rows of `like` [B, N]."""
        width = max(len(piece.ids) for piece in pieces.values())
        ids = torch.full((like.shape[0], width), pad_id, dtype=like.dtype)
        mask = torch.zeros_like(ids, dtype=torch.long)
        places = torch.zeros_like(ids, dtype=torch.bool)
        vectors = []
        for row in sorted(pieces):
            piece = pieces[row]
            columns = slice(width - len(piece.ids), width)
            ids[row, columns] = torch.tensor(piece.ids, dtype=like.dtype)
            mask[row, columns] = 1
            places[row, columns] = torch.tensor(piece.places)
            vectors += [] if piece.vectors is None else [piece.vectors]
        device = like.device
        whole = torch.cat([v.to(vectors[0]) for v in vectors]) if vectors else None
        return cls(pieces, ids.to(device), mask.to(device), places.to(device), whole)

    @property
    def rows(self) -> Tensor:
        """Bool[B]: rows that got something."""
        return self.mask.any(1)

    @contextmanager
    def embedded(self, model: Any) -> Iterator[None]:
        """Let the embedding give the vectors at the placeholders, for one forward.

        This is where models of transformers put image features; ids still reach the model, so
        whatever else it reads from them stays right.
        """
        if self.vectors is None:
            yield
            return
        vectors, places, used = self.vectors, self.places, []

        def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if args and args[0].shape == places.shape:
                # A placeholder may lie outside the vocabulary.
                return (args[0].masked_fill(places.to(args[0].device), 0), *args[1:])
            return args

        def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            if output.shape[:2] != places.shape:
                return output
            used.append(True)
            output = output.clone()
            output[places.to(output.device)] = vectors.to(output)
            return output

        embedding = model.get_input_embeddings()
        hooks = [embedding.register_forward_pre_hook(before)]
        hooks.append(embedding.register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if not used:
            raise UnsupportedModelError(
                "HopInput: expected a model that embeds input_ids through get_input_embeddings(); "
                f"got {type(model).__name__}, which does not. Inject text or input_ids"
            )


class Carried:
    """Extends the model_kwargs of a running generate by a block.

    Args:
        model: The model.
        prompt: The prompt's ids and model_kwargs, from which the meaning of type ids is read.
        vision_ids: Ids of vision tokens.
    """

    def __init__(
        self, model: Any, prompt: tuple[Tensor, Mapping[str, Any]], vision_ids: tuple[int, ...]
    ) -> None:
        self.model = model
        ids, kwargs = prompt
        types = kwargs.get("token_type_ids")
        vision = torch.isin(ids, torch.tensor(vision_ids, dtype=ids.dtype, device=ids.device))
        # Gemma marks images by ones; elsewhere these ids say other things (PaliGemma: the prefix).
        self.types_mark_vision = types is None or (
            types.shape == ids.shape and bool(((types > 0) == vision).all())
        )

    def extend(
        self, kwargs: dict[str, Any], block: Block, past: int
    ) -> tuple[dict[str, Any], Tensor | None]:
        """New kwargs that cover the block's columns as well.

        Args:
            kwargs: model_kwargs that cover `past` columns.
            block: The injected columns.
            past: Logical columns before them.

        Returns:
            The kwargs, and position ids of one column more: of the token sampled next. None for a
            model without position ids.

        Raises:
            DareInputError: The model needs inputs per token that nobody can tell.
        """
        if not self.types_mark_vision or kwargs.get("moe_mm_token_type_ids") is not None:
            raise DareInputError(
                "hop_loop: expected token_type_ids that mark image tokens, or none; got others, "
                "which cannot be continued over injected tokens. Leave them out where the model "
                "allows it"
            )
        if block.vectors is not None:
            self._check_types(kwargs)
        kwargs = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and not bool(block.mask.all()):
            mask = block.mask.new_ones((len(block.mask), past))
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask, block.mask.to(mask)], dim=1)
        for name in _TYPE_IDS:
            if (types := kwargs.get(name)) is not None:
                missing = past - types.shape[1]
                types = torch.nn.functional.pad(types, (missing, 0)) if missing > 0 else types
                kwargs[name] = torch.cat([types, block.places.to(types)], dim=1)
        if (positions := kwargs.get("position_ids")) is None:
            return kwargs, None
        positions = self._positions(positions, block, mask)
        return kwargs | {"position_ids": positions[..., :-1]}, positions

    def _check_types(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse vectors where the model's mask needs type ids that the prompt came without."""
        positions = kwargs.get("position_ids")
        mrope = positions is not None and positions.ndim == 3
        taken = inspect.signature(type(self.model).forward).parameters
        for name in _TYPE_IDS if not mrope else ():
            if name in taken and kwargs.get(name) is None:
                raise DareInputError(
                    f"hop_loop: expected {name} beside the prompt (1 on image tokens, 0 "
                    f"elsewhere), from which {type(self.model).__name__} tells injected images; "
                    "got none. Pass what the processor gives, or zeros for a prompt of text"
                )

    def _positions(self, positions: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        """[..., B, past + k + 1]: the block's positions, and those of the token after it."""
        rows, width = block.mask.shape
        counted = block.mask.cumsum(1)
        counted = torch.cat([counted, counted[:, -1:] + 1], dim=1).to(positions)
        if positions.ndim == 2:
            positions = positions.expand(rows, -1)
            return torch.cat([positions, positions[:, -1:] + counted], dim=1)
        positions = positions.expand(-1, rows, -1)
        if positions.shape[0] == 1:  # a later chat turn has the model's positions only
            real = torch.ones_like(positions[0]) if mask is None else mask
            text = (real.cumsum(1) - 1).clamp(min=0).to(positions)
            positions = torch.cat([text[None], positions.expand(3, -1, -1)])
        added = positions[..., -1:] + counted
        for row, piece in block.pieces.items():
            start = int(positions[-3:, row, -1].max()) + 1
            own = _grid_positions(self.model, piece, start).to(added)
            added[-3:, row, width - len(piece.ids) :] = own
        return torch.cat([positions, added], dim=-1)

    def settle(self, kwargs: dict[str, Any], positions: Tensor | None) -> None:
        """After HF appended one column for the next token: put right what it guessed."""
        if (types := kwargs.get("token_type_ids")) is not None:
            types[:, -1] = 0
        if positions is None:
            return
        kwargs["position_ids"] = positions
        if positions.ndim == 3 and positions.shape[0] == 4:
            delta = (positions[1] - positions[0])[:, -1:]
            for module in self.model.modules():
                if "rope_deltas" in vars(module):
                    module.rope_deltas = delta.clone()


def _grid_positions(model: Any, piece: Piece, start: int) -> Tensor:
    """[3, n + 1]: positions of a piece of an mrope model, and of the token after it."""
    parts = []
    for count, grid in piece.runs():
        if grid is None:
            part = torch.arange(start, start + count).expand(3, -1)
        else:
            part = start + _image_positions(model, count, grid)
        parts.append(part)
        start = int(part.max()) + 1
    parts.append(torch.full((3, 1), start))
    return torch.cat(parts, dim=1)


def _image_positions(model: Any, count: int, grid: Tensor) -> Tensor:
    """[3, count] positions of one image that begins at position 0, as the model counts them."""
    ask = getattr(model.base_model, "get_rope_index", None)
    names = inspect.signature(ask).parameters if ask is not None else ()
    if ask is None or not {"mm_token_type_ids", "image_grid_thw"} <= set(names):
        raise DareInputError(
            "HopInput: expected a model whose get_rope_index takes mm_token_type_ids and "
            f"image_grid_thw; got {type(model).__name__}. Inject features [n, D] without a grid"
        )
    ids = torch.zeros((1, count), dtype=torch.long)
    positions, _ = ask(ids, mm_token_type_ids=torch.ones_like(ids), image_grid_thw=grid[None])
    if positions.shape[-1] != count:
        raise DareInputError(f"HopInput: expected {count} tokens in the grid; got {grid.tolist()}")
    return positions[-3:, 0].cpu()
