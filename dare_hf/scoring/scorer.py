"""What a scorer is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.report.flops import LayerShape
    from dare_hf.scoring.observe import AttentionCall


class Scoring(NamedTuple):
    """The scoring of one layer's tokens, in numbers.

    Attributes:
        shapes: One per layer of the model.
        hidden: Width of the hidden state.
        layer: The layer that selects by the scores.
        tokens: Real tokens of the forward, rows summed.
        queries: Per row the tokens of the span that ran the layer before.
        keys: Per row the keys that layer attended to.
        span: Per row [text, vision] tokens of the span; () for sampled tokens.
    """

    shapes: Sequence[LayerShape]
    hidden: int
    layer: int
    tokens: int
    queries: Sequence[int] = ()
    keys: Sequence[int] = ()
    span: Sequence[Sequence[int]] = ()

    @property
    def of_span(self) -> bool:
        """Whether there is a token of a span."""
        return any(map(any, self.span))


class Scorer:
    """Scores the new tokens of a forward before a layer runs; what holds for most is said here.

    Attributes:
        untrained: Whether nothing was learned.
        yields_text: Whether special tokens, image delimiters and recent text are kept whatever it
            says; a user's own decides alone.
        needs_attention: Whether it reads the layer before; it then has `observe`.
        reads_inputs: Whether it reads the embeddings; it then has `read_inputs`.
        stepwise: Whether its scores are those of step-by-step runs, which one forward over all hops
            (training) does not have.
    """

    untrained: ClassVar[bool] = True
    yields_text: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False
    reads_inputs: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S] for hidden states [B, S, D] that enter layer `index`."""
        raise NotImplementedError

    def flops(self, work: Scoring) -> int:
        """What the scores of a layer cost; nothing for one that looks at no content."""
        return 0

    def read_inputs(self, run: Run, hidden: Tensor) -> None:
        """Take down what it needs of the embeddings [B, S, D]."""

    def observe(
        self, run: Run, layer: int, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall
    ) -> None:
        """Take down what it needs of the attention of `layer`: query, key and value."""
