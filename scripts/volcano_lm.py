"""Trains dare-tiny-volcano on SCENE solutions: tower, projector and text together, resumable."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import volcano_files
from anole_lm import learning_rate, save
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from dare_hf.tasks import scene, scene_render

Log = Callable[[dict], None]
LOG_EVERY = 100
_BASE_TILE = volcano_files.IMAGE_SIZE // scene.GRID


@dataclass
class Plan:
    """Sizes and schedule of one training run; counts are in samples (one sample = one question)."""

    samples: int = 200_000
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 3_000
    decay: float = 0.3
    weight_decay: float = 0.05
    box_weight: float = 5.0
    answer_weight: float = 10.0
    blind: float = 0.15
    seed: int = 0
    layers: int = 10
    hidden: int = 128
    ffn: int = 256
    heads: int = 4
    tower_layers: int = 3
    tower_hidden: int = 96


class Pixels:
    """What the processor makes of scenes and of crops of cells, put together from tiles.

    A shrunken picture is its shrunken tiles side by side, and a crop of a cell is its tile: so the
    processor sees each of the 96 tiles once, and batches are table look-ups.
    """

    def __init__(self) -> None:
        drawn = scene_render.tiles()
        process = volcano_files.build_processor().image_processor
        tiles = drawn.reshape(-1, scene_render.TILE, scene_render.TILE, 3)
        crops = process([Image.fromarray(tile) for tile in tiles], return_tensors="pt")
        self.crops = crops["pixel_values"].view(*drawn.shape[:3], 3, *tiles.shape[1:3])
        ground = scene_render.scene_to_array(())
        self.ground = process(Image.fromarray(ground), return_tensors="pt")["pixel_values"][0]
        corner = (slice(None), slice(0, _BASE_TILE), slice(0, _BASE_TILE))
        self.base = torch.empty(*drawn.shape[:2], 3, _BASE_TILE, _BASE_TILE)
        for colour in range(len(scene.COLOURS)):
            for form in range(len(scene.FORMS)):
                picture = scene_render.scene_to_array((scene.Shape(0, 0, colour, form, 0),))
                values = process(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
                self.base[colour, form] = values[corner]

    def picture(self, shapes: tuple[scene.Shape, ...]) -> Tensor:
        """Pixel values of a scene, float32 [3, 64, 64]."""
        values = self.ground.clone()
        for shape in shapes:
            top, left = shape.row * _BASE_TILE, shape.column * _BASE_TILE
            tile = self.base[shape.colour, shape.form]
            values[:, top : top + _BASE_TILE, left : left + _BASE_TILE] = tile
        return values

    def crop(self, shape: scene.Shape) -> Tensor:
        """Pixel values of a shape's box, float32 [3, 64, 64]."""
        return self.crops[shape.colour, shape.form, shape.mark]


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Marks are learned at once, boxes slowly: until those are there most samples go without crops,
    which makes them shorter.

    Attributes:
        shapes: Least and most.
        shares: Of questions with 0, 1 and 2 relations.
        blind: Share of batches without crops.
        listing: Share of batches that list all shapes instead.
        boxes: Share of right boxes, over the last LOG_EVERY steps, that ends the stage.
    """

    shapes: tuple[int, int]
    shares: tuple[float, float, float]
    blind: float
    listing: float
    boxes: float


STAGES = (
    Stage((2, 3), (1.0, 0.0, 0.0), 0.5, 0.4, 0.8),
    Stage((2, 5), (0.5, 0.5, 0.0), 0.85, 0.1, 0.8),
    Stage((3, 5), (0.2, 0.8, 0.0), 0.85, 0.05, 0.9),
    Stage((3, 5), (0.2, 0.4, 0.4), 0.7, 0.05, 0.93),
)
LAST_STAGE_AT = 0.75  # share of the run from which on the last stage runs, whatever was learned


def last_stage(plan: Plan) -> Stage:
    return Stage((3, 5), (0.15, 0.5, 0.35), plan.blind, 0.0, 2.0)


@dataclass
class Batch:
    """Questions with the same number of looks.

    Attributes:
        ids: int64 [rows, n], padded on the right.
        weight: Loss weight of each id, float32 [rows, n].
        role: 1 where the first two numbers of a box stand, 2 where the answer does, else 0.
        pixels: float32 [pictures, 3, 64, 64], row by row, the scene before its crops.
        cells: Colour and form of the shape in each cell of a scene, from 1 on, 0 for none; int64
            [rows, cells, 2].
    """

    ids: Tensor
    weight: Tensor
    role: Tensor
    pixels: Tensor
    cells: Tensor


class Sampler:
    """Batches of solutions.

    Args:
        plan: Batch size, seed and loss weights.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.pixels = plan, Pixels()
        tokenizer = volcano_files.build_tokenizer()
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        vocab = volcano_files.vocabulary()
        self.begin, self.end, self.pad = vocab["<s>"], vocab["</s>"], vocab["<pad>"]
        self.image = [vocab["<image>"]] * volcano_files.IMAGE_TOKENS

    def example(self, item: scene.SceneItem, blind: bool) -> tuple[list, list, list]:
        """Ids, weights and roles of one solution; `blind`: without the crops."""
        plan = self.plan
        ids = [self.begin, *self.encode(item.prompt.replace("<image>", "")), *self.image]
        weight, role = [0.0] * len(ids), [0] * len(ids)
        for shape in item.looks():
            box = self.encode(scene.box_text(shape.box))
            ids += box
            # <coor> x1 , y1 , x2 , y2 </coor>
            weight += [1.0, plan.box_weight, 0.5, plan.box_weight, *[0.5] * 5]
            role += [0, 1, 0, 1, *[0] * 5]
            if not blind:
                ids += self.image
                weight += [0.0] * len(self.image)
                role += [0] * len(self.image)
        answer = self.encode(f"The answer is {item.answer}.")
        ids += [*answer, self.end]
        answer_weight = 1.0 if blind else plan.answer_weight  # there it is a guess
        weight += [1.0, 0.5, 0.5, answer_weight, 0.5, 0.5]
        role += [0, 0, 0, 2, 0, 0]
        return ids, weight, role

    def listing(self, item: scene.SceneItem, order: np.ndarray) -> tuple[list, list, list]:
        """Ids, weights and roles of a list of all shapes with their boxes, in any order.

        One such sample asks where something is as often as it has shapes, and ties what is seen to
        its words: questions alone stayed at naming any shape for 10 000 samples and more.
        """
        plan = self.plan
        ids = [self.begin, *self.encode("What is in the picture?"), *self.image]
        weight, role = [0.0] * len(ids), [0] * len(ids)
        for shape in (item.shapes[k] for k in order):
            name, box = self.encode(shape.name), self.encode(scene.box_text(shape.box))
            ids += [*name, *box]
            weight += [0.2, 2.0, 3.0, 0.2, plan.box_weight, 0.2, plan.box_weight, *[0.2] * 5]
            role += [0] * len(name) + [0, 1, 0, 1, *[0] * 5]
        return [*ids, self.end], [*weight, 0.2], [*role, 0]

    def batch(self, step: int, stage: Stage) -> Batch:
        """Batch number `step`: lists, or questions with one number of relations."""
        plan = self.plan
        rng = np.random.default_rng([plan.seed, step])
        relations = int(rng.choice(len(stage.shares), p=stage.shares))
        blind = bool(rng.random() < stage.blind)
        listing = bool(rng.random() < stage.listing)
        rows, pixels = [], []
        cells = torch.zeros(plan.batch, scene.GRID**2, 2, dtype=torch.long)
        for k in range(plan.batch):
            index = step * plan.batch + k
            item = scene.sample_one("train", plan.seed, index, stage.shapes, relations)
            pixels.append(self.pixels.picture(item.shapes))
            for shape in item.shapes:
                kind = torch.tensor([shape.colour + 1, shape.form + 1])
                cells[k, shape.row * scene.GRID + shape.column] = kind
            if listing:
                rows.append(self.listing(item, rng.permutation(len(item.shapes))))
                continue
            rows.append(self.example(item, blind))
            if not blind:
                pixels += [self.pixels.crop(shape) for shape in item.looks()]
        width = max(len(row[0]) for row in rows)
        fills = (self.pad, 0.0, 0)
        parts = (
            torch.tensor([row[k] + [fill] * (width - len(row[k])) for row in rows])
            for k, fill in enumerate(fills)
        )
        return Batch(*parts, torch.stack(pixels), cells)


def loss_and_marks(
    model: LlavaForConditionalGeneration, probe: nn.Linear, batch: Batch, bf16: bool
) -> tuple[Tensor, dict]:
    """Weighted token loss and the probe's; marks: boxes wholly right and answers right, forced.

    The probe names colour and form of each cell from the token the text model gets for it, and is
    thrown away: from answers and lists alone forms were not learned in 80 000 samples.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model.model(
            input_ids=batch.ids[:, :-1], pixel_values=batch.pixels, use_cache=False
        )
        logits = model.lm_head(output.last_hidden_state)
        scenes = torch.arange(0, len(batch.pixels), len(batch.pixels) // len(batch.ids))
        seen = probe(
            output.image_hidden_states.view(len(batch.pixels), -1, probe.in_features)[scenes]
        )
    logits, target, weight = logits.float(), batch.ids[:, 1:], batch.weight[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    loss = (losses * weight.flatten()).sum() / weight.sum()
    kinds = seen.float().split([len(scene.COLOURS) + 1, len(scene.FORMS) + 1], dim=-1)
    named = [
        functional.cross_entropy(kinds[k].flatten(0, 1), batch.cells[..., k].flatten())
        for k in (0, 1)
    ]
    loss = loss + sum(named)
    with torch.no_grad():
        right, role = logits.argmax(-1) == target, batch.role[:, 1:]
        filled = batch.cells[..., 1] > 0
        form = (kinds[1].argmax(-1) == batch.cells[..., 1])[filled].float().mean().item()
        boxes = (right | (role != 1)).all(1).float().mean().item()
        if not (role == 2).any():
            listed = right[role == 1].float().mean().item()
            return loss, {"lists": boxes, "listed_boxes": listed, "form": form}
        relations = int((role[0] == 1).sum()) // 2
        answers = right[role == 2].float().mean().item()
        blind = len(batch.pixels) == len(batch.ids)
        longer = "looks2" if relations > 1 else "looks1"
        return loss, {f"boxes_{longer}": boxes, "answer_blind" if blind else "answer": answers}


def make_optimizers(
    model: LlavaForConditionalGeneration, probe: nn.Linear, plan: Plan
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; one learning rate."""
    layers = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, plan.lr, plan.weight_decay, adjust_lr_fn="match_rms_adamw")
    adams = [
        torch.optim.AdamW(p, plan.lr, (0.9, 0.98), weight_decay=0.0)
        for p in (rest, probe.parameters())
    ]
    return [muon, *adams]


def train(plan: Plan, out: Path, bf16: bool, log: Log) -> None:
    """Runs or resumes the plan; `out`/lm.pt is replaced every few minutes.

    Args:
        plan: What to run.
        out: Folder of checkpoints.
        bf16: Whether matrix products run under bfloat16 autocast.
        log: Receives one entry per LOG_EVERY steps.
    """
    torch.manual_seed(plan.seed)
    sizes = (plan.layers, plan.hidden, plan.ffn, plan.heads, plan.tower_layers, plan.tower_hidden)
    model = volcano_files.build_model(*sizes)
    probe = nn.Linear(plan.hidden, len(scene.COLOURS) + len(scene.FORMS) + 2)
    optimizers = make_optimizers(model, probe, plan)
    step, stage, path = 0, 0, out / "lm.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        probe.load_state_dict(state["probe"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        step, stage = state["step"], state["stage"]
    model.train()
    sampler, marks, saved = Sampler(plan), [], time.time()
    stages = (*STAGES, last_stage(plan))
    started = time.time()
    while step * plan.batch < plan.samples:
        seen = step * plan.batch
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(plan, seen)
        if seen >= LAST_STAGE_AT * plan.samples:
            stage = len(stages) - 1
        batch = sampler.batch(step, stages[stage])
        loss, mark = loss_and_marks(model, probe, batch, bf16)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        marks.append({"loss": loss.item(), **mark})
        done = step * plan.batch >= plan.samples
        if step % LOG_EVERY == 0 or done:
            names = sorted({name for mark in marks for name in mark})
            mean = {k: float(np.mean([m[k] for m in marks if k in m])) for k in names}
            pace = round(len(marks) * plan.batch / (time.time() - started), 1)
            rounded = {k: round(v, 4) for k, v in mean.items()}
            log({"samples": step * plan.batch, "stage": stage, **rounded, "samples_per_s": pace})
            boxes = [value for name, value in mean.items() if name.startswith("boxes_")]
            stage += min(boxes) >= stages[stage].boxes
            marks, started = [], time.time()
        if done or time.time() - saved > 180:
            state = {"model": model.state_dict(), "step": step, "stage": stage}
            state |= {"plan": asdict(plan), "probe": probe.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save(path, state)
            saved = time.time()
