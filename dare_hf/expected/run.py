"""A run of one row as counts: what its layers hold when each hop begins and ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dare_hf.errors import DareInputError
from dare_hf.hops.ledger import Held, Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.expected.subject import Subject
    from dare_hf.expected.tokens import HopTokens

# A row that takes no part in a forward.
_NONE = (0, 0)


@dataclass
class ExpectedRun:
    """One row, hop after hop.

    Attributes:
        subject: The model and the configuration.
        ledger: What counts say so far.
        tokens: [hops][text, vision] real tokens so far.
        pinned: [hops][text, vision] those that no later hop drops.
        begins: [hops][layers] tokens held when a hop begins.
        ends: [hops][layers] tokens held at its end.
        exact: Whether counts have decided all of them.
    """

    subject: Subject
    ledger: Ledger
    tokens: list[list[int]] = field(default_factory=list)
    pinned: list[list[int]] = field(default_factory=list)
    begins: list[list[int]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)
    exact: bool = True

    @staticmethod
    def of_rows(subject: Subject, rows: Sequence[Sequence[HopTokens]]) -> list[ExpectedRun]:
        """The runs of all rows; their n-th entries share a forward.

        Raises:
            DareInputError: Tokens are said to be sampled before the prompt was over.
        """
        empty = Ledger((Held.nothing(),) * len(subject.rules.table.plan_layers))
        runs, columns = [ExpectedRun(subject, empty) for _ in rows], 0
        for index in range(max(map(len, rows))):
            entries = [row[index] if index < len(row) else None for row in rows]
            for run, entry in zip(runs, entries, strict=True):
                if entry is not None and not entry.continues:
                    run.begin(columns)
            spans = [_NONE if entry is None else entry.span for entry in entries]
            pairs = zip(runs, entries, strict=True)
            forced = [_NONE if entry is None else run.forced(entry) for run, entry in pairs]
            columns += max(map(sum, spans))
            hops = [max(len(run.tokens) - 1, 0) for run in runs]
            kept = subject.rules.span(hops, spans, forced, columns)
            sampled = 0
            for row, (run, entry) in enumerate(zip(runs, entries, strict=True)):
                if entry is not None:
                    run.take(entry, [layer[row] for layer in kept], columns)
                    sampled = max(sampled, sum(entry.sampled))
            columns += sampled
        for run in runs:
            run.end(columns)
        return runs

    @property
    def seen(self) -> int:
        """Real tokens so far."""
        return sum(map(sum, self.tokens))

    def begun(self, hop: int) -> list[int]:
        """[layers] tokens held when `hop` begins; where there is none, at the row's end."""
        return self.begins[hop] if hop < len(self.begins) else self.ends[-1]

    def ended(self, hop: int) -> list[int]:
        """[layers] tokens held when `hop` ends; where there is none, at the row's end."""
        return self.ends[min(hop, len(self.ends) - 1)]

    def begin(self, columns: int) -> None:
        """End the hop that is open, if one is, and begin the next."""
        hop = len(self.tokens)
        if hop:
            self.end(columns)
            self._prune(hop, columns)
        self.begins.append(self._held())
        self.tokens.append([0, 0])
        self.pinned.append([0, 0])

    def end(self, columns: int) -> None:
        """End the hop that is open; the prompt's end keeps to a cap at once."""
        if len(self.tokens) == 1 and self.subject.rules.config.max_kv_tokens is not None:
            self._prune(1, columns)
        self.ends.append(self._held())

    def forced(self, entry: HopTokens) -> tuple[int, int]:
        """(text, vision) of an entry's span that no selection drops."""
        return entry.forced(self._prefix())

    def take(self, entry: HopTokens, kept: Sequence[Sequence[int]], columns: int) -> None:
        """Add the tokens of an entry.

        Args:
            entry: The entry.
            kept: [layers][text, vision] what each layer keeps of its span.
            columns: Logical columns up to its span's end.
        """
        hop = len(self.tokens) - 1
        if hop == 0 and any(entry.sampled):
            raise DareInputError(
                "hops: expected a prompt without sampled tokens, since the first of them opens hop "
                f"1; got {sum(entry.sampled)} in the first entry. Give them an entry of their own"
            )
        pinned = entry.pinned(self._prefix())
        if any(entry.span):
            self.ledger = self.ledger.with_span(hop, entry.span, kept, columns)
        for m, count in enumerate(entry.total):
            self.tokens[hop][m] += count
            self.pinned[hop][m] += pinned[m]

    def _prefix(self) -> int:
        """How many of the next tokens belong to the prefix of the open hop."""
        return max(self.subject.rules.config.prefix_tokens - sum(self.tokens[-1]), 0)

    def _prune(self, hop: int, columns: int) -> None:
        if hop > self.ledger.begun:
            rules = self.subject.rules
            self.ledger = self.ledger.with_begin(hop, self.tokens, self.pinned, rules, columns)

    def _held(self) -> list[int]:
        """[layers] tokens held now, at most."""
        extra = self.seen - self.ledger.seen
        layers = self.ledger.layers[: len(self.subject.shapes)]
        self.exact &= all(layer.least == layer.most for layer in layers)
        return [layer.most + extra for layer in layers]
