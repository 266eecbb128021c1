"""Reading the JSON of a configuration that may come from anywhere."""

import json
from pathlib import Path
from typing import Any

from dare_hf.errors import DareConfigError

MOST_BYTES = 4 * 2**20
"""The largest file that is read; a schedule of 1024 pairs and 65,536 token ids take a fifth."""


def read_object(path: str | Path) -> dict[str, Any]:
    """The members of a file's JSON object.

    Args:
        path: The file, UTF-8.

    Raises:
        DareConfigError: It cannot be read, is too large or too deep, or holds no object.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        found = json.loads(file.read_text(encoding="utf-8")) if size <= MOST_BYTES else None
    except RecursionError:
        reason = "lists or objects nested too deep"
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON, endless integers
        reason = str(error)
    else:
        if isinstance(found, dict):
            return found
        kind = f"a {type(found).__name__}" if size <= MOST_BYTES else f"{size} bytes"
        reason = f"{kind}"
    raise DareConfigError(
        f"{file.name}: expected one JSON object in at most {MOST_BYTES >> 20} MiB of UTF-8; got "
        f"{reason[:200]} in {file}. Save the configuration again"
    )
