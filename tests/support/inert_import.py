"""A script: fails when `import dare_hf` changes torch, transformers or peft, or loads too much.

Everything that dare_hf imports from elsewhere is imported first, so that only its own doing is
compared. Run by tests/package/test_packaging.py on the source tree, by .ci/check_wheel on the
wheel.
"""

import contextlib
import importlib
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator

FOREIGN = ("torch", "transformers", "peft")
# What an import may register: the PEFT method, the attention function and its mask function.
REGISTRATIONS = (
    "PeftType",
    "PEFT_TYPE_TO_",
    "AttentionInterface._global_mapping",
    "AttentionMaskInterface._global_mapping",
)
# Left to those who use them: a program that only calls apply_dare must not pay for these.
NOT_LOADED = (
    "dare_hf.benchmark",
    "dare_hf.cli",
    "dare_hf.demo",
    "dare_hf.evaluation",
    "dare_hf.tasks",
    "dare_hf.testing",
    "dare_hf.training",
    "dare_hf.visualize",
    "matplotlib.pyplot",
    "typer",
)


def _entries(path: str, value: object) -> Iterator[tuple[str, object]]:
    yield path, value
    # By type and with dict.items: some foreign objects answer isinstance or .items() with imports.
    content = dict(dict.items(value)) if issubclass(type(value), dict) else {}
    if type(value).__name__ == "_LazyAutoMapping":
        content |= vars(value)["_extra_content"]
    for key, item in content.items():
        yield f"{path}[{repr(key)[:80]}]", item


def _snapshot(modules: dict[str, types.ModuleType]) -> dict[str, object]:
    """Every attribute of these modules, of the classes they define, and of their dicts."""
    found: dict[str, object] = {}
    for name, module in modules.items():
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("__"):
                continue
            found.update(_entries(f"{name}.{attribute}", value))
            if issubclass(type(value), type) and value.__module__ == name:
                for member, item in list(vars(value).items()):
                    found.update(_entries(f"{name}.{attribute}.{member}", item))
    return found


def _is_lazy_import(path: str, value: object) -> bool:
    """Whether a new attribute is a submodule, or a name a lazy package resolved from its own."""
    if isinstance(value, types.ModuleType):
        return True
    owner = sys.modules.get(path.rpartition(".")[0])
    origin = str(getattr(value, "__module__", ""))
    return type(owner).__name__ == "_LazyModule" and origin.partition(".")[0] in FOREIGN


def _modules_of_import() -> list[str]:
    """Names of the modules that all public names load in a fresh interpreter."""
    program = "import sys; from dare_hf import *; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def main() -> int:
    """Return 0 when the import is inert."""
    loaded = _modules_of_import()
    problems = [f"loads {name}" for name in NOT_LOADED if name in loaded]
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        for name in FOREIGN:
            importlib.import_module(name)
    for name in loaded:
        if name.partition(".")[0] != "dare_hf":
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    foreign = {name: it for name, it in sys.modules.items() if name.partition(".")[0] in FOREIGN}
    before = _snapshot(foreign)
    import dare_hf

    for name in dare_hf.__all__:  # some are loaded on first use
        getattr(dare_hf, name)
    for path, value in _snapshot(foreign).items():
        if any(registration in path for registration in REGISTRATIONS):
            continue
        if path not in before and not _is_lazy_import(path, value):
            problems.append(f"adds {path}")
        elif path in before and before[path] is not value:
            problems.append(f"changes {path}")
    print(f"{dare_hf.__file__}: {len(before)} attributes compared")
    for problem in problems:
        print(f"import dare_hf {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
