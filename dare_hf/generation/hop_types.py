"""What a hop loop tells its callback, and what the callback may answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.report import DareReport


@dataclass(frozen=True)
class HopState:
    """A hop of one row that has just closed: its delimiter has been processed.

    Attributes:
        index: Number of the hop; 1 is the first after the prompt.
        text: The hop's tokens as text, special tokens included; None without a processor.
        ids: Long[n] on the CPU: injected tokens that opened the hop, then the sampled ones with the
            delimiter. Images and features stand as placeholder ids.
        images: Pictures of the hop: those injected at its begin, then those the model drew
            (Chameleon-type models, where the loop has a processor and a decoder).
        report: The report so far.
        row: Row of the batch; with num_return_sequences, of the expanded batch.
        samples: Rows made of each prompt, num_return_sequences.
    """

    index: int
    text: str | None
    ids: Tensor
    images: list[Any]
    report: DareReport
    row: int
    samples: int = 1

    @property
    def prompt(self) -> int:
        """Row of the prompt this row was made of."""
        return self.row // self.samples


@dataclass(frozen=True)
class HopPrompt:
    """What a generate with a hop loop starts from.

    Attributes:
        model: The model.
        ids: Long[B, N]: the prompt, num_return_sequences applied.
        start: Columns of it that a carried cache already holds; their pictures are not encoded
            again.
        inputs: The keyword arguments of generate as the caller gave them.
        encoded: What get_image_features gave for the pictures of this call, row by row of `ids`;
            None where the model encodes them in its forward.
        samples: Rows made of each prompt, num_return_sequences.
        tokenizer: What reads the hops, or None.
    """

    model: Any
    ids: Tensor
    start: int
    inputs: Mapping[str, Any]
    encoded: Any
    samples: int
    tokenizer: Any


@dataclass
class HopInput:
    """What opens a row's next hop: one field or several.

    The order is images with the text, features, input_ids. Image tokens written in the text say
    where its images go (without any they come first). Placeholder ids in text or input_ids say
    where the features go.

    Attributes:
        text: Text, tokenised without special tokens of its own; needs a processor.
        input_ids: Token ids [n].
        images: A picture or several, as the processor takes them; needs a processor.
        features: [n, D] vectors as the model's projector gives them, one token each. A grid
            [height, width, D] says where each vector lies, for models with 2D positions (mrope);
            vectors without a grid count on there like text.

    Examples:
        >>> from dare_hf.generation import HopInput
        >>> HopInput(input_ids=[50, 51]).input_ids
        [50, 51]
    """

    text: str | None = None
    input_ids: Sequence[int] | Tensor | None = None
    images: Any = None
    features: Tensor | None = None

    @property
    def pictures(self) -> list[Any]:
        """The images as a list."""
        if self.images is None:
            return []
        return list(self.images) if isinstance(self.images, (list, tuple)) else [self.images]


class OnHop(Protocol):
    """An `on_hop` that makes itself ready for each call, such as BoxRefocus."""

    def begin(self, prompt: HopPrompt) -> Callable[[HopState], HopInput | None]:
        """Return the callback of the generate that starts from this prompt."""
        ...


@dataclass
class Piece:
    """One row's injected tokens.

    Attributes:
        ids: Token ids; placeholders where vectors go.
        places: Whether each of them is a placeholder.
        vectors: [p, D], one per placeholder, None without any.
        grids: (placeholders, [t, h, w]) per image with a grid, (1, None) per vector without, in
            their order.
    """

    ids: list[int]
    places: list[bool]
    vectors: Tensor | None = None
    grids: list[tuple[int, Tensor | None]] = field(default_factory=list)

    def runs(self) -> list[tuple[int, Tensor | None]]:
        """Consecutive tokens that share a way of counting positions: (tokens, grid or None)."""
        found: list[tuple[int, Tensor | None]] = []
        images, at = iter(self.grids), 0
        while at < len(self.ids):
            if self.places[at]:
                found.append(next(images))
                if not all(self.places[at : at + found[-1][0]]):
                    raise DareInputError(
                        "HopInput: expected the placeholders of a grid side by side; got other "
                        "tokens between them"
                    )
            else:
                rest = self.places[at:]
                found.append((rest.index(True) if True in rest else len(rest), None))
            at += found[-1][0]
        return found
