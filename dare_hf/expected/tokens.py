"""The counts that predictions start from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class HopTokens:
    """The tokens of one hop of one row, as counts.

    What came as input, the prompt of hop 0 or what was injected, is a span: each layer keeps a part
    of it. Sampled tokens follow it, and all of them are kept until their hop has closed.

    Attributes:
        vision: Vision tokens of the span.
        text: Text tokens of the span.
        sampled_vision: Vision tokens sampled after it, the hop's delimiter included.
        sampled_text: Text tokens sampled after it, the hop's delimiter included.
        forced_vision: Of `vision` those that no selection drops: the hop's first `prefix_tokens`,
            the span's last token, `always_keep_token_ids`, what is protected. None: the first ones
            and the last, which are taken for text as far as there is any.
        forced_text: The same of `text`.
        pinned_vision: Of the whole hop's vision tokens those that no later hop drops: its first
            `prefix_tokens` and `always_keep_token_ids`. None: the first ones, taken from `text`,
            `vision` and the sampled tokens in this order.
        pinned_text: The same of its text tokens.
        continues: Whether the span goes on with the hop before it: a later chunk of a prefill in
            chunks. Its `pinned_vision` and `pinned_text` are its own.

    Raises:
        DareInputError: A count is no integer or negative, or more are forced than there are.

    Examples:
        >>> from dare_hf import HopTokens
        >>> HopTokens(vision=576, text=64).vision
        576
    """

    vision: int = 0
    text: int = 0
    sampled_vision: int = 0
    sampled_text: int = 0
    forced_vision: int | None = None
    forced_text: int | None = None
    pinned_vision: int | None = None
    pinned_text: int | None = None
    continues: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            optional = field.default is None and value is None
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not optional and not whole:
                raise DareInputError(f"{field.name}: expected a count >= 0; got {value!r}")
        most = {"forced": self.span, "pinned": self.total}
        for name, (text, vision) in most.items():
            for kind, limit in (("text", text), ("vision", vision)):
                value = getattr(self, f"{name}_{kind}")
                if value is not None and value > limit:
                    raise DareInputError(
                        f"{name}_{kind}: expected at most the {limit} {kind} tokens there are; "
                        f"got {value}"
                    )

    @property
    def span(self) -> tuple[int, int]:
        """(text, vision) of the span."""
        return self.text, self.vision

    @property
    def sampled(self) -> tuple[int, int]:
        """(text, vision) of what was sampled."""
        return self.sampled_text, self.sampled_vision

    @property
    def total(self) -> tuple[int, int]:
        """(text, vision) of both."""
        return self.text + self.sampled_text, self.vision + self.sampled_vision

    def forced(self, prefix: int) -> tuple[int, int]:
        """(text, vision) of the span that are forced; `prefix` of the hop's first are in it."""
        first = min(prefix + 1, sum(self.span))
        text = min(first, self.text) if self.forced_text is None else self.forced_text
        rest = min(max(first - text, 0), self.vision)
        return text, rest if self.forced_vision is None else self.forced_vision

    def pinned(self, prefix: int) -> tuple[int, int]:
        """(text, vision) of all that are pinned; `prefix` of the hop's first are in it."""
        text = vision = 0
        for count, is_text in (
            (self.text, True),
            (self.vision, False),
            (self.sampled_text, True),
            (self.sampled_vision, False),
        ):
            taken = min(prefix - text - vision, count)
            text, vision = (text + taken, vision) if is_text else (text, vision + taken)
        return (
            text if self.pinned_text is None else self.pinned_text,
            vision if self.pinned_vision is None else self.pinned_vision,
        )


def rows_of(hops: Sequence[HopTokens] | Sequence[Sequence[HopTokens]]) -> list[list[HopTokens]]:
    """The hops of each row; of one row they may come without a list around them.

    Raises:
        DareInputError: They are no HopTokens, or there are none.
    """
    single = [hops] if hops and isinstance(hops[0], HopTokens) else hops
    rows: list[list[HopTokens]] = []
    for row in single:
        found = list(row) if isinstance(row, (list, tuple)) else [row]
        if not found or not all(isinstance(hop, HopTokens) for hop in found):
            raise DareInputError(
                "hops: expected HopTokens, the prompt first, or a list of them for each row; got "
                f"{row!r}"
            )
        if found[0].continues:
            raise DareInputError(
                "hops: expected a row that starts with its prompt; got one whose first entry "
                "continues a hop. Leave out continues=True there"
            )
        rows.append(found)  # ty: ignore[invalid-argument-type]
    if not rows:
        raise DareInputError("hops: expected at least the prompt's HopTokens; got none")
    return rows
