"""What `dare-hf info` says a configuration will cost, beside the plain model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.expected.flops import ExpectedFlops, expected_flops
from dare_hf.expected.run import ExpectedRun
from dare_hf.expected.subject import Subject
from dare_hf.expected.tokens import HopTokens
from dare_hf.report.flops import kv_bytes, unpruned_kv_bytes
from dare_hf.routing.kinds import TEXT, VISION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dare_hf.expected.subject import Config, Source

_UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Outlook:
    """Costs of one row, from rates and counts alone.

    Attributes:
        tokens: The prompt and its hops.
        flops: Of the prefill and of the first sampled token.
        kv: (DARE, plain) for each hop, bytes when a hop's last token was processed.
        begins: [hops] bytes with DARE when a hop begins.
        exact: Whether counts decide the bytes; else they are the most there can be.
        itemsize: Bytes of one element of the cache.
        rates: (text, vision) mean over the layers of the prompt's rates.
    """

    tokens: Sequence[HopTokens]
    flops: ExpectedFlops
    kv: list[tuple[int, int]]
    begins: list[int]
    exact: bool
    itemsize: int
    rates: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: FLOPs and bytes, with DARE ("dare") and without ("plain")."""
        flops = self.flops
        pairs = zip(self.begins, self.kv, strict=True)
        hops = [{"begin": begin, "end": end, "plain": plain} for begin, (end, plain) in pairs]
        return {
            "flops": {
                "prefill": {"dare": flops.prefill, "plain": flops.plain_prefill},
                "decoded_token": {"dare": flops.decode, "plain": flops.plain_decode},
            },
            "kv_bytes": {"prefill": hops[0], "hops": hops[1:], "exact": self.exact},
            "bytes_per_element": self.itemsize,
            "mean_retention": {"text": self.rates[TEXT], "vision": self.rates[VISION]},
        }

    def lines(self) -> Iterator[str]:
        """A table."""
        prompt, flops = self.tokens[0], self.flops
        yield (
            f"one row: {prompt.vision} vision and {prompt.text} text tokens, then "
            f"{len(self.tokens) - 1} hops; mean retention of the prompt "
            f"{self.rates[VISION]:.3g} vision, {self.rates[TEXT]:.3g} text; "
            f"{self.itemsize} bytes an element"
        )
        yield f"{'':34}{'plain':>10}{'DARE':>10}{'share':>8}"
        yield _row("prefill, FLOP", flops.plain_prefill, flops.prefill)
        yield _row("first decoded token, FLOP", flops.plain_decode, flops.decode)
        yield _row("KV after the prefill, bytes", self.kv[0][1], self.kv[0][0])
        for hop, ((end, plain), begin) in enumerate(zip(self.kv, self.begins, strict=True)):
            if hop:
                yield _row(
                    f"KV at the end of hop {hop}, bytes", plain, end, f"  begins at {_si(begin)}"
                )
        if not self.exact:
            yield "bytes with DARE are the most there can be: scores decide too how many stay"


def outlook_of(
    model: Source,
    config: Config,
    hops: Sequence[HopTokens],
    *,
    itemsize: int | None = None,
) -> Outlook:
    """The costs of one row; see `expected_kv_bytes` for the arguments and what it refuses."""
    subject = Subject.of(model, config, itemsize)
    run = ExpectedRun.of_rows(subject, [hops])[0]
    plain, lengths, seen = subject.plain(), [], 0
    for hop in hops:
        seen += sum(hop.total)
        lengths.append(seen)
    sizes = [unpruned_kv_bytes(plain, [n], subject.itemsize) for n in lengths]
    table = subject.rules.table
    return Outlook(
        tokens=hops,
        flops=expected_flops(subject, hops[0]),
        kv=[(_bytes(subject, held), size) for held, size in zip(run.ends, sizes, strict=True)],
        begins=[_bytes(subject, held) for held in run.begins],
        exact=run.exact,
        itemsize=subject.itemsize,
        rates=(table.mean(TEXT), table.mean(VISION)),
    )


def _bytes(subject: Subject, held: Sequence[int]) -> int:
    return kv_bytes(subject.shapes, [[count] for count in held], subject.itemsize)


def _row(name: str, plain: int, dare: int, more: str = "") -> str:
    return f"{name:34}{_si(plain):>10}{_si(dare):>10}{dare / max(plain, 1):>8.3f}{more}"


def _si(value: float) -> str:
    """Four digits and a power of 1000."""
    power = 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {_UNITS[power]}".strip()
