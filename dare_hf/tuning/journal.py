"""What was measured, a line each, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dare_hf.errors import DareStateError


class Journal:
    """Results by key, in a file where one is given.

    A line that was cut off when the process died is dropped.

    Args:
        file: Where results are written as they come; None keeps them in memory.
        setting: What they are results of; a file of another setting is refused.

    Raises:
        DareStateError: The file is of another setting, or no journal.
    """

    def __init__(self, file: str | Path | None, setting: dict[str, Any]) -> None:
        self.file = None if file is None else Path(file)
        self._found: dict[str, Any] = {}
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists() and self.file.stat().st_size:
            self._read(self.file, json.loads(json.dumps(setting)))
        else:
            self._append({"setting": setting})

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep a JSON value, on disk when this returns."""
        self._found[key] = json.loads(json.dumps(value))
        if self.file is not None:
            self._append({"key": key, "value": value})

    def _append(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")

    def _read(self, file: Path, setting: dict[str, Any]) -> None:
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
        if got != setting:
            differ = sorted(k for k in {*got, *setting} if got.get(k) != setting.get(k))
            raise DareStateError(
                f"expected a file of the same run to go on with; got {file}, of another "
                f"{', '.join(differ)}. Name another, or remove it"
            )
        self._found = dict(pairs)
        file.write_bytes(whole)
