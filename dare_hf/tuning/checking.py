"""Does a configuration keep a model's predictions on these rows? For a user's CI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.api import dare_applied
from dare_hf.errors import DareInputError
from dare_hf.evaluation.processes import ALONE, Processes
from dare_hf.tuning.fidelity import BATCH, References, fidelity
from dare_hf.tuning.loading import as_used, prepare

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dare_hf.config import DareConfig
    from dare_hf.tuning.rows import Row


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        agreement: Share of next-token predictions equal to the unpruned model's.
        kl: Mean KL of the predictions to the unpruned ones at the same places, nats.
        floor: The agreement asked for.
        rows: How many rows were read.
        interval: The agreement's 95 % interval, over rows.
    """

    agreement: float
    kl: float
    floor: float
    rows: int
    interval: tuple[float, float]

    @property
    def passed(self) -> bool:
        """Whether the agreement reaches the floor."""
        return self.agreement >= self.floor

    def to_dict(self) -> dict[str, Any]:
        """What `dare-hf check --json` prints."""
        names = ("agreement", "kl", "floor", "passed", "rows")
        return {name: getattr(self, name) for name in names}


def check(
    model: Any,
    config: DareConfig | str | os.PathLike[str] | None,
    rows: str | Path | Sequence[Row],
    *,
    floor: float = 0.98,
    processor: Any = None,
    batch_size: int = BATCH,
    load_in_4bit: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> Check:
    """Compare a configuration's predictions with the unpruned model's.

    Both are led along each row's answer, or along the unpruned model's own greedy answer of at most
    32 tokens where the row has none.

    Args:
        model: A plain model, which is left as it is; or the folder or hub id of one.
        config: As `apply_dare` takes it.
        rows: A JSON lines file of rows, or what `read_rows` returned.
        floor: The agreement that passes, in (0, 1].
        processor: The model's processor or tokenizer; None reads it from the model's folder.
        batch_size: Most rows of a generate call.
        load_in_4bit: Load the backbone in nf4, where a folder is given.
        progress: Called with ("rows", rows done, rows in all).
        processes: As `evaluate_rows` takes them; batches are shared.

    Raises:
        DareError: The rows, the model or the configuration cannot be used; the text says why.
    """
    if not 0 < floor <= 1:
        raise DareInputError(f"floor: expected an agreement in (0, 1]; got {floor}")
    model, prompts, given = prepare(model, rows, processor, load_in_4bit=load_in_4bit)
    references = References(model, prompts, given, batch_size, keep=False)

    def tell(done: int) -> None:
        if progress is not None:
            progress("rows", done, len(given))

    with as_used(model), dare_applied(model, config, processor=prompts.processor):
        found = fidelity(model, references, tell, processes)
    return Check(found.agreement, found.mean_kl, floor, len(given), found.agreement_interval)
