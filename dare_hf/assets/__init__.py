"""Embedded models, loaded from the installed package without a network."""

from pathlib import Path

from dare_hf.errors import DareInputError

_HERE = Path(__file__).parent


def model_path(name: str) -> Path:
    """Directory of an embedded model, for `from_pretrained`.

    Args:
        name: A directory name such as "dare-tiny-anole".

    Raises:
        DareInputError: No such model is embedded.
    """
    known = sorted(path.parent.name for path in _HERE.glob("*/config.json"))
    if name not in known:
        raise DareInputError(f"name: expected one of {known}, got {name!r}")
    return _HERE / name
