"""The names of lmms-eval 0.7 that its models need, for where the package is not installed."""

import abc
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class CacheHook:
    def add_partial(self, attr, req, res):
        pass


class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = (pair.split("=") for pair in arg_string.split(",") if pair)
        given = {name: _value(value) for name, value in pairs}
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**given, **more)


def _value(text):
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def provide(monkeypatch):
    """Put stand-ins where the package is missing; returns whether the package itself is there."""
    if find_spec("lmms_eval") is not None:
        return True
    names = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "TokenCounts": TokenCounts,
            "GenerationResult": GenerationResult,
        },
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, members in names.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return False
