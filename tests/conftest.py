"""What holds for every test: no hub, no sockets, one thread a worker, a fixed seed."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported anywhere: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jaxtyping
import pytest
import torch
import transformers

# Shape annotations are checked at run time here and nowhere else. The hook must precede the import
# of the rooms it names.
jaxtyping.install_import_hook(["dare_hf.routing", "dare_hf.cache"], "beartype.beartype")

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    # Two workers on two cores: more threads each would only fight each other.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The library's warnings at transformers' verbosity, those of earlier tests forgotten."""
    logging.Logger.warning_once.cache_clear()
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(handler)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield found
    transformers.logging.set_verbosity(before)
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def trained_volcano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routers and a LoRA of dare-tiny-volcano after two steps, as `dare-hf train` leaves them."""
    from trained_pair import train_pair

    return train_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def shipped(trained_volcano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That pair, found as dare-l and dare-lh of the installed package."""
    from trained_pair import ship

    from dare_hf import assets

    ship(trained_volcano, tmp_path / "assets", assets._HERE)
    monkeypatch.setattr(assets, "_HERE", tmp_path / "assets")
    return trained_volcano
