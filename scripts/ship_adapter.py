"""Puts what `dare-hf train` left beside an embedded model's weights, as the package ships it.

    python scripts/ship_adapter.py --run runs/dare_lh --model anole --name dare-lh

Copies routers and LoRA (weights in float16, half the size: measure what is shipped), replaces
the paths of the machine they were trained on by names, and writes recipe.yaml, which
`dare-hf train --config` takes, from the first line of the training log.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from dare_hf.assets import package_folder
from dare_hf.demo.embedded import RUNNERS, runner_type
from dare_hf.evaluation import trained_arm

_KEPT = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def ship(run: Path, model: str, name: str) -> Path:
    """Copy an adapter's folders, log and recipe; returns where to."""
    folder = runner_type(model).folder
    target = package_folder(folder) / "adapters" / name
    trained_arm(name, run)  # refuses what is no adapter
    lines = (run / "training_log.jsonl").read_text().splitlines()
    recipe = json.loads(lines[0])["recipe"] | {"model": model, "out": f"runs/{name}"}
    for part in ("dare", "lora"):
        if not (run / part).is_dir():
            continue
        (target / part).mkdir(parents=True, exist_ok=True)
        base = json.loads((run / part / _KEPT[0]).read_text())["base_model_name_or_path"]
        for file in _KEPT:
            if (run / part / file).is_file():
                shutil.copyfile(run / part / file, target / part / file)
                if base and not file.endswith("safetensors"):
                    text = (target / part / file).read_text().replace(base, folder)
                    (target / part / file).write_text(text)
        weights = target / part / "adapter_model.safetensors"
        halves = {
            name: tensor.half() if name.endswith(".weight") else tensor  # rates stay exact
            for name, tensor in load_file(weights).items()
        }
        save_file(halves, weights, metadata={"format": "pt"})
    (target / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    log = [json.dumps({"recipe": recipe}), *lines[1:]]
    (target / "training_log.jsonl").write_text("".join(f"{line}\n" for line in log))
    return target


def main() -> None:
    """Parse the command line and copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that `train` wrote")
    parser.add_argument("--model", choices=sorted(RUNNERS), required=True)
    parser.add_argument("--name", required=True, help="dare-lh or dare-l")
    args = parser.parse_args()
    target = ship(args.run, args.model, args.name)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
