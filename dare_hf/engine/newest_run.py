"""Which run of a model `last_report` speaks of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from dare_hf.engine.recorder import Recorder
    from dare_hf.report import DareReport

_WITHOUT = ", except without a report (inside dare_disabled, or a training forward)"


class NewestRun:
    """The newest run of a model that has finished; a copy of the model starts without one."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._uncounted = False

    def __reduce__(self) -> tuple[Any, ...]:
        return NewestRun, ()

    def finish(self, recorder: Recorder) -> None:
        """A run has finished."""
        self._recorder, self._uncounted = recorder, False

    def note_uncounted(self) -> None:
        """The model runs without being counted."""
        self._uncounted = True

    def report(self) -> DareReport:
        """Its report; a note says where the model ran again uncounted.

        Raises:
            DareStateError: There is none.
        """
        if self._recorder is None:
            raise DareStateError(
                "expected a model that has run generate or a forward since apply_dare; nothing "
                f"has run yet{_WITHOUT if self._uncounted else ''}. Call model.generate(...) first"
            )
        report = self._recorder.report()
        if self._uncounted:
            report.notes.append(f"not the newest run: nothing has run after it{_WITHOUT}")
        return report
