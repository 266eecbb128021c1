"""Adapters by hub id, out of the hub's cache on disk: what their folder gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from peft import get_peft_model

from dare_hf import DareConfig
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
