"""Training batches of dare-tiny-anole's three tasks, in both contexts, as token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import anole_files
import numpy as np
import torch

from dare_hf.tasks import frozen_lake, ghost, maze

if TYPE_CHECKING:
    from anole_lm import Plan
    from torch import Tensor

    Item = maze.MazeItem | frozen_lake.FrozenLakeItem | ghost.GhostItem

TASKS = ("maze", "lake", "ghost")


@dataclass
class Batch:
    """One batch; its rows have one length, so there is no padding.

    Attributes:
        ids: Token ids [rows, n].
        weight: Loss weight of every id, [rows, n]; 0 for what is given to the model.
        prompt: Columns before the first that the model samples.
        kind: Task and form: "maze", "maze_markov", "maze_naming", "lake", ...
    """

    ids: Tensor
    weight: Tensor
    prompt: int
    kind: str


class Sampler:
    """Batches of solutions as token ids.

    Args:
        codes: VQ code of every cell type, int64 [NUM_CELL_TYPES].
        plan: Batch size, seed, shares and loss weights.
    """

    def __init__(self, codes: np.ndarray, plan: Plan) -> None:
        self.plan = plan
        v = self.vocab = anole_files.vocabulary()
        tokenizer = anole_files.build_tokenizer()
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        names = [anole_files.image_token_name(int(code)) for code in codes]
        self.cell_ids = np.array([v[name] for name in names])
        prompts = {"maze": maze.PROMPT, "lake": frozen_lake.PROMPT, "ghost": ghost.PROMPT}
        self.heads = {
            task: [v["<s>"], *self.encode(text.split("{")[0])] for task, text in prompts.items()
        }
        numbers = range(1, 21)
        self.steps = {
            (k, name): self.encode(f"{k}. Go {name}.") for k in numbers for name in maze.MOVES
        }
        self.looks = {k: self.encode(f"{k}. Look.") for k in numbers}
        self.answer = {letter: self.encode(f"The answer is {letter}.") for letter in maze.LETTERS}

    def example(
        self, task: str, item: Item, first: int = 1, latest: int | None = None
    ) -> tuple[list[int], list[float], int]:
        """One item -> ids, loss weight per id, prompt length.

        Args:
            task: One of TASKS.
            item: Its item.
            first: Number of the first step.
            latest: None is the context "append_all". A count k is "markov" after k steps: beside
                question and first image only step k is given, and the next one is asked for.
        """
        v = self.vocab
        states = self.cell_ids[item.grids()].reshape(-1, maze.FIELD**2)
        count = len(states) - 1
        if task == "ghost":
            texts = [self.looks[first + k] for k in range(count)]
        else:
            texts = [self.steps[first + k, name] for k, name in enumerate(item.actions)]
        ids = [*self.heads[task], *(i for text in texts for i in text)]
        ids += [v["<boi>"], *states[0], v["<eoi>"], v["<sep>"]]
        weight = [0.0] * len(ids)
        spans = range(count)
        if latest is not None:
            spans = range(max(latest - 1, 0), min(latest + 1, count))
        prompt = len(ids)
        for k in spans:
            given = latest is not None and k == latest - 1
            step = self._look if task == "ghost" else self._move
            more, cost = step(texts[k], states, k)
            if task == "ghost" and latest == k:
                # In the context markov a look ends the call: its image comes with the next one.
                more, cost = more[: len(texts[k]) + 1], cost[: len(texts[k]) + 1]
            if latest is not None:
                # Which step is next must be looked up by its number here, not by where it stands.
                text = range(len(texts[k]))
                cost = [c * self.plan.step_weight if i in text else c for i, c in enumerate(cost)]
            ids += more
            weight += [0.0] * len(more) if given else cost
            prompt = len(ids) if given else prompt
        if latest is None or latest == count:
            ids += [*self.answer[item.answer], v["</s>"]]
            weight += [1.0, 1.0, 1.0, self.plan.answer_weight, 1.0, 1.0]
        return ids, weight, prompt

    def drill(self, task: str, item: Item, first: int, order: np.ndarray) -> tuple:
        """Question and image, then steps named in any `order`: only their directions count.

        Several look-ups by number in the space of one step with its image.
        """
        ids, _, prompt = self.example(task, item, first)
        ids, weight = ids[:prompt], [0.0] * prompt
        for k in order:
            text = self.steps[first + int(k), item.actions[int(k)]]
            ids += text
            weight += [0.0, 0.0, 0.0, 1.0, 0.0]
        return ids, weight, prompt

    def _move(self, text: list[int], states: np.ndarray, k: int) -> tuple[list[int], list[float]]:
        """Text, drawn image and separator of an action; cells that change weigh more."""
        v = self.vocab
        changed = np.where(states[k + 1] != states[k], self.plan.changed_weight, 1.0)
        ids = [*text, v["<boi>"], *states[k + 1], v["<eoi>"], v["<sep>"]]
        return ids, [1.0] * (len(text) + 1) + changed.tolist() + [1.0, 1.0]

    def _look(self, text: list[int], states: np.ndarray, k: int) -> tuple[list[int], list[float]]:
        """Text and separator of a look, then the image and separator that are put in."""
        v = self.vocab
        ids = [*text, v["<sep>"], v["<boi>"], *states[k + 1], v["<eoi>"], v["<sep>"]]
        seen = [0.0, *[self.plan.seen_weight] * states.shape[1], 0.0, 0.0]
        return ids, [1.0] * (len(text) + 1) + seen

    def batch(self, step: int, progress: float) -> Batch:
        """Batch number `step`, the same for the same plan, wherever a run was resumed.

        Naming batches have no steps to take (the point or agent stands where it ends; one image in
        the ghost task), so that a hundred tokens teach what full solutions take hundreds for.
        Shifted batches number their steps from 2 or 3, so that later numbers are learned too.
        `progress` is the share of the run that is done.
        """
        plan = self.plan if not self.plan.from_nothing else curriculum(self.plan, progress)
        rng = np.random.default_rng([plan.seed, 1, step])
        shares = np.array([plan.maze_share, plan.lake_share, plan.ghost_share])
        task = TASKS[int(rng.choice(3, p=shares / shares.sum()))]
        form = rng.random()
        naming, markov = form < plan.naming, form > 1 - plan.markov_share
        most = plan.ghost_longest if task == "ghost" else plan.longest
        length = int(rng.integers(1, most + 1))
        if task != "ghost" and rng.random() < plan.longer:
            length = most + 1
        if task == "ghost" and naming:
            length = 1
        first = int(rng.integers(2, 4)) if rng.random() < plan.shifted else 1
        latest = int(rng.integers(1, length + 1)) if markov else None
        drill = task != "ghost" and not naming and not markov and rng.random() < plan.drill
        if drill:
            length = int(rng.integers(4, most + 1))
        order = rng.permutation(length)
        size = plan.batch * (1 + (naming or markov or drill))
        rows = []
        for k in range(size):
            item = self._item(task, step * 2 * plan.batch + k, length)
            if naming and not isinstance(item, ghost.GhostItem):
                item = replace(item, start=item.path()[-1], actions=())
            row = self.example(task, item, first, latest)
            rows.append(self.drill(task, item, first, order) if drill else row)
        form = "_naming" if naming else "_markov" if markov else "_drill" if drill else ""
        kind = task + form
        ids = torch.tensor(np.array([row[0] for row in rows]))
        return Batch(ids, torch.tensor([row[1] for row in rows]), rows[0][2], kind)

    def _item(self, task: str, index: int, length: int) -> Item:
        draw = {"maze": maze, "lake": frozen_lake, "ghost": ghost}[task].sample_one
        return draw("train", self.plan.seed, index, length=length)


def curriculum(plan: Plan, progress: float) -> Plan:
    """A run from nothing begins with few steps and much naming, by share of the run."""
    if progress < 0.12:
        return replace(plan, longest=2, ghost_longest=1, naming=0.4, shifted=0.1, longer=0.0)
    if progress < 0.6:
        return replace(plan, longest=3, ghost_longest=3, naming=0.4, shifted=0.1, longer=0.0)
    longer = 0.0 if progress < 0.9 else plan.longer
    return replace(plan, naming=0.1, shifted=0.5, longer=longer)
