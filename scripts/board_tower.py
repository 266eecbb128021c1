"""Stage 1 of dare-board: the tower says of each patch what the text model's words say.

A patch's target is the sum of the text model's own input embeddings of the words for its field:
colour, form, column and row; or `nothing`, column and row.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from board_files import build_model, build_processor
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dare_hf.tasks import board, board_render

Log = Callable[[dict], None]
BATCH, LR, WARMUP = 16, 2e-3, 100
CONTENTS = [
    board.NOTHING,
    *(f"{colour} {form}" for colour in board.COLOURS for form in board.FORMS),
]


class Words:
    """The targets of fields, from the text model's embeddings.

    Attributes:
        contents: float32 [31, D]: of an empty field, then of each shape.
        places: float32 [36, D].
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        table = model.get_input_embeddings().weight.detach().float()
        encode = processor.tokenizer.encode

        def meaning(text: str) -> Tensor:
            return table[encode(" " + text, add_special_tokens=False)].sum(0)

        cells = (divmod(cell, board.GRID) for cell in range(board.GRID**2))
        self.contents = torch.stack([meaning(text) for text in CONTENTS])
        self.places = torch.stack([meaning(board.field_name(*cell)) for cell in cells])
        self.scale = table.std()

    def target(self, shown: Tensor, side: int) -> Tensor:
        """Of every patch, [B, side * side, D]; `shown`: contents of fields, int64 [B, 36]."""
        fields = self.contents[shown] + self.places
        return fields[:, cell_of_patch(side)]

    def read(self, features: Tensor, side: int) -> Tensor:
        """The nearest content and place of each patch, int64 [2, B, side * side]."""
        pairs = (self.contents[:, None] + self.places).flatten(0, 1)
        nearest = torch.cdist(features.float().flatten(0, 1), pairs).argmin(1)
        return torch.stack([nearest // len(self.places), nearest % len(self.places)]).view(
            2, len(features), side**2
        )


def cell_of_patch(side: int) -> Tensor:
    """The field in which each patch lies, int64 [side * side]."""
    field = torch.arange(side) * board.GRID // side
    return (field[:, None] * board.GRID + field).flatten()


def contents_of(pieces: board.Board) -> Tensor:
    """Index into CONTENTS of each field, int64 [36]."""
    shown = torch.zeros(board.GRID**2, dtype=torch.long)
    for piece in pieces:
        shown[piece.row * board.GRID + piece.column] = CONTENTS.index(piece.name)
    return shown


def features_of(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the text model gets of pictures, [B, patches, D]."""
    found = model.model.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def pixels_of(processor: LlavaProcessor, boards: list[board.Board]) -> Tensor:
    pictures = [board_render.board_to_image(pieces) for pieces in boards]
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


def shares_right(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, side: int, n: int
) -> dict[str, float]:
    """Share of patches of n held-out boards read right, content and place, by content."""
    words = Words(model, processor)
    boards = [board.sample_board("easy", 0, index, 0)[0] for index in range(n)]
    shown = torch.stack([contents_of(pieces) for pieces in boards])[:, cell_of_patch(side)]
    with torch.no_grad():
        content, place = words.read(features_of(model, pixels_of(processor, boards)), side)
    right = (content == shown) & (place == cell_of_patch(side))
    return {
        "objects": right[shown > 0].float().mean().item(),
        "empty": right[shown == 0].float().mean().item(),
    }


def train_tower(
    backbone: Path, side: int, steps: int, seed: int, log: Log
) -> LlavaForConditionalGeneration:
    """A model whose tower and projector have learned the words; minutes, not resumed."""
    model, processor = build_model(backbone, side, seed), build_processor(backbone, side)
    words = Words(model, processor)
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    learned = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(learned, LR, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=steps, pct_start=min(0.3, WARMUP / steps)
    )
    started = time.time()
    for step in range(steps):
        indices = range(step * BATCH, (step + 1) * BATCH)
        boards = [board.sample_board("train", seed, index, 0)[0] for index in indices]
        shown = torch.stack([contents_of(pieces) for pieces in boards])
        features = features_of(model, pixels_of(processor, boards))
        target = words.target(shown, side)
        errors = functional.mse_loss(features, target, reduction="none").mean(-1)
        # empty fields are three of four, and easy
        weight = 1.0 + 2.0 * (shown[:, cell_of_patch(side)] > 0)
        loss = (errors * weight).sum() / weight.sum() / words.scale**2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            right = shares_right(model, processor, side, 32)
            seconds = round(time.time() - started)
            log({"stage": 1, "step": step + 1, "loss": loss.item(), **right, "seconds": seconds})
    return model
