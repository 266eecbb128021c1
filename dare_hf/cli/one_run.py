"""One generate with DARE, of an embedded model's held-out item or of a user's question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.cli.console import embedded_runner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from dare_hf.report import DareReport
    from dare_hf.visualize import SeenImage, Watched

_ITEMS = 20  # enough that one of them shows several hops


@dataclass(frozen=True)
class OneRun:
    """What is told of it.

    Attributes:
        title: What was asked of which model.
        answer: What it said.
        report: Of the generate call.
        images: The pictures it saw or drew, with what was held of them where that is known.
    """

    title: str
    answer: str
    report: DareReport
    images: tuple[SeenImage, ...]


def held_out(model: str, seed: int, config: str | None) -> OneRun:
    """An embedded model solves one of a few held-out items, the one that shows most.

    Args:
        model: Its name.
        seed: Of the items.
        config: A shipped adapter or a folder of `dare-hf train`; "safe"; None: the demo's adapter.

    Raises:
        DareError: There is no such adapter.
    """
    from dare_hf.demo import arms, picture
    from dare_hf.evaluation import suite

    runner = embedded_runner(model)
    safe = config == "safe"
    arm = arms.choose_arm(
        model,
        runner.processor,
        suite.task_of(None, runner.folder).ends(runner.processor),
        adapter=None if safe else config or arms.DEFAULT_ADAPTER,
        safe=safe,
    )
    solved = picture.solve_one(runner, runner.sample(_ITEMS, "easy", seed), arm)
    return OneRun(
        f"{runner.folder}, {arm.name}. {solved.title}", solved.text, solved.report, solved.images
    )


def question(
    model: str, prompt: str, files: Sequence[Path], config: str, max_new_tokens: int
) -> OneRun:
    """A model of transformers answers a question about pictures, greedily.

    Args:
        model: Folder or hub id.
        prompt: The question.
        files: Its pictures.
        config: As `apply_dare` takes it.
        max_new_tokens: Most tokens of the answer.

    Raises:
        DareError: The model, a picture or the configuration cannot be used.
    """
    from dare_hf import DareCache, dare_applied, last_report
    from dare_hf.compat import CACHE
    from dare_hf.tuning.fidelity import on_device
    from dare_hf.tuning.loading import as_used, prepare
    from dare_hf.tuning.rows import asked
    from dare_hf.visualize import HopWatch

    row = asked(prompt, files)
    loaded, prompts, _ = prepare(model, [row])
    inputs = on_device(loaded, prompts.encode([row]))
    cache = DareCache()
    watch = HopWatch(cache)
    with as_used(loaded), dare_applied(loaded, config, processor=prompts.processor):
        ids = loaded.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=prompts.pad_id,
            streamer=watch,
            **{CACHE: cache},
        )
        report = last_report(loaded)
    length = inputs["input_ids"].shape[1]
    answer = prompts.text(getattr(ids, "sequences", ids)[0, length:].tolist())
    places = _places(loaded.config, inputs, cache, len(files), length)
    pictures = tuple(_seen(files, places, watch.states))
    return OneRun(f"{model}, {config}: {prompt}", answer, report, pictures)


def _places(
    config: Any, inputs: dict[str, Any], cache: Any, pictures: int, length: int
) -> list[tuple[list[int], tuple[int, int]]] | None:
    """Columns and grid of each picture; None where they cannot be told."""
    from dare_hf.generation.feature_grid import picture_grids
    from dare_hf.routing.kinds import VISION

    columns = (cache.log.modality[0, :length] == VISION).nonzero()[:, 0].tolist()
    grids = picture_grids(config, inputs, pictures, len(columns))
    if grids is None:
        return None
    places, start = [], 0
    for down, across in grids:
        places.append((columns[start : start + down * across], (down, across)))
        start += down * across
    return places


def _seen(files: Sequence[Path], places: Any, states: Sequence[Watched]) -> Iterator[SeenImage]:
    from PIL import Image

    from dare_hf.visualize import SeenImage, seen_image

    for number, file in enumerate(files):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        caption = f"image {number + 1}: {file.name}"
        if places is None:
            yield SeenImage(image, caption)
        else:
            yield seen_image(image, caption, *places[number], states)
