"""Dynamic and asymmetric token routing for vision-language models of transformers."""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dare_hf.api import apply_dare, dare_applied, dare_disabled, last_report, remove_dare
    from dare_hf.cache import DareCache
    from dare_hf.compression import compress_context
    from dare_hf.config import DareConfig
    from dare_hf.expected import HopTokens, expected_kv_bytes
    from dare_hf.report import DareReport
    from dare_hf.scoring.base import register_scorer

__version__ = "0.1.0.dev0"

# Where each public name lives: loaded on first use.
_HOMES = {
    "DareCache": "cache",
    "DareConfig": "config",
    "DareReport": "report",
    "HopTokens": "expected",
    "apply_dare": "api",
    "compress_context": "compression",
    "dare_applied": "api",
    "dare_disabled": "api",
    "expected_kv_bytes": "expected",
    "last_report": "api",
    "register_scorer": "scoring.base",
    "remove_dare": "api",
}

__all__ = [
    "DareCache",
    "DareConfig",
    "DareReport",
    "HopTokens",
    "apply_dare",
    "compress_context",
    "dare_applied",
    "dare_disabled",
    "expected_kv_bytes",
    "last_report",
    "register_scorer",
    "remove_dare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make the adapters known to peft, and the attention and its mask to transformers."""
    importlib.import_module(f"{__name__}.peft_method")


# `import dare_hf` does so (docs/adapters.md); the names above stay lazy, so that a module of this
# package can be imported while the package itself is. Only the console script waits until a command
# runs: its help needs neither torch nor peft, whose import takes seconds.
if not any(PurePath(script).name in ("dare-hf", "dare-hf.exe") for script in sys.orig_argv[1:2]):
    _register()
