"""What was measured, a line each, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareStateError
from dare_hf.evaluation.processes import ALONE, Processes

if TYPE_CHECKING:
    from collections.abc import Iterable


class Journal:
    """Results by key, in a file where one is given.

    A line that was cut off when the process died is dropped. Of several processes the first one
    reads and writes, and the others know what it has read.

    Args:
        file: Where results are written as they come; None keeps them in memory.
        setting: What they are results of; a file of another setting is refused.
        processes: Those that work on it.

    Raises:
        DareStateError: The file is of another setting, or no journal; or processes have different
            settings.
    """

    def __init__(
        self, file: str | Path | None, setting: dict[str, Any], processes: Processes = ALONE
    ) -> None:
        self.file = Path(file) if file is not None and processes.first else None
        self._found: dict[str, Any] = {}
        self._setting = json.loads(json.dumps(setting))
        for rank, other in enumerate(processes.gathered(self._setting)):
            if other != self._setting:
                raise DareStateError(
                    "processes: expected the same run in all; got other "
                    f"{_different(other, self._setting)} in process {rank} than in "
                    f"{processes.rank}. Start all of them with the same files and options"
                )
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.exists() and self.file.stat().st_size:
                self._read(self.file)
            else:
                self._append({"setting": setting})
        self._found = processes.from_first(lambda: self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep a JSON value, on disk when this returns."""
        self._found[key] = json.loads(json.dumps(value))
        if self.file is not None:
            self._append({"key": key, "value": value})

    def put_in_order(self, keys: Iterable[str]) -> None:
        """Write the file anew in the order of `keys`, all of them its own, unless it has it."""
        ordered = {key: self._found[key] for key in keys}
        if self.file is None or list(ordered) == list(self._found):
            return
        self._found = ordered
        fresh = self.file.with_name(f"{self.file.name}.new")
        fresh.unlink(missing_ok=True)
        place, self.file = self.file, fresh
        self._append({"setting": self._setting})
        for key, value in ordered.items():
            self._append({"key": key, "value": value})
        self.file = fresh.replace(place)

    def _append(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")

    def _read(self, file: Path) -> None:
        whole = file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            got, pairs = first["setting"], [(line["key"], line["value"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise DareStateError(
                f"expected a file that a run like this began, or none; got {file}: {error!r:.100}. "
                "Name another, or remove it"
            ) from error
        if got != self._setting:
            raise DareStateError(
                f"expected a file of the same run to go on with; got {file}, of another "
                f"{_different(got, self._setting)}. Name another, or remove it"
            )
        self._found = dict(pairs)
        file.write_bytes(whole)


def _different(one: dict[str, Any], other: dict[str, Any]) -> str:
    return ", ".join(sorted(k for k in {*one, *other} if one.get(k) != other.get(k)))
