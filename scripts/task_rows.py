"""Writes items of an embedded model's task as rows for `dare-hf tune`, `check` and `eval --data`.

    python scripts/task_rows.py scene --n 64 --seed 0 --out rows/scene64

The rows have a prompt and an image and no answer: the models answer in hops (boxes, drawn images),
so that a drop is one of agreement with the unpruned model along its own answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dare_hf.tasks import maze, render, scene
from dare_hf.tasks.scene_render import scene_to_image


def main() -> None:
    """Writes the rows and their images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("maze", "scene"))
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "rows.jsonl").open("w", encoding="utf-8") as opened:
        if given.task == "maze":
            items = maze.sample(given.n, "easy", given.seed)
            pictures = [render.grid_to_image(item.grid(item.start)) for item in items]
        else:
            items = scene.sample(given.n, "easy", given.seed)
            pictures = [scene_to_image(item) for item in items]
        for number, (item, picture) in enumerate(zip(items, pictures, strict=True)):
            picture.save(given.out / f"{number}.png")
            opened.write(json.dumps({"prompt": item.prompt, "image": f"{number}.png"}) + "\n")


if __name__ == "__main__":
    main()
