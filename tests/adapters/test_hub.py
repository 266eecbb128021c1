"""Adapters pushed to the hub, and loaded by hub id out of its cache on disk: as from a folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file

from dare_hf import DareConfig, apply_dare
from dare_hf.testing import tiny_model

PROGRAM = """
import torch
from peft import PeftModel
from dare_hf import apply_dare
from dare_hf.testing import tiny_inputs, tiny_model
sides = []
for source in ("someone/router", {folder!r}):
    for load in (apply_dare, PeftModel.from_pretrained):
        model = load(tiny_model("llava"), source)
        ids = model.generate(**tiny_inputs(model), max_new_tokens=4, do_sample=False)
        sides.append((ids.tolist(), {{n: p.sum().item() for n, p in model.named_parameters()
                                     if "dare_" in n}} if load is not apply_dare else None))
print(sides[0] == sides[2], sides[1] == sides[3], len(sides[1][1]) > 0)
"""


def test_an_adapter_of_the_hub_is_that_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    routed = get_peft_model(tiny_model("llava"), DareConfig(scorer="router", schedule="learned"))
    routed.save_pretrained(str(folder))
    repository = tmp_path / "cache" / "models--someone--router"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(folder))],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True True True\n", done.stderr


def test_what_is_pushed_is_what_a_folder_gets(tmp_path: Path, monkeypatch) -> None:
    """push_to_hub is transformers' own: the adapter's files go up, and load again."""
    pushed = tmp_path / "pushed"
    pushed.mkdir()

    class Api:
        """The hub, as far as an upload asks it."""

        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list, **_: object) -> None:
            for one in operations:
                shutil.copy(one.path_or_fileobj, pushed / one.path_in_repo)

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Api)
    routed = get_peft_model(tiny_model("llava"), DareConfig(scorer="router", schedule="learned"))
    routed.push_to_hub("someone/router")
    routed.save_pretrained(str(tmp_path / "folder"))
    names = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert sorted(file.name for file in pushed.iterdir()) == names
    tensors = load_file(pushed / "adapter_model.safetensors")
    kept = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert all("dare_" in name and torch.equal(tensors[name], kept[name]) for name in kept)
    apply_dare(tiny_model("llava"), str(pushed))
