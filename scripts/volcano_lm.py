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
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from dare_hf.tasks import scene, scene_render

Log = Callable[[dict], None]
_BASE_TILE = volcano_files.IMAGE_SIZE // scene.GRID


@dataclass
class Plan:
    """Sizes and schedule of one training run; counts are in samples (one sample = one question)."""

    samples: int = 96_000
    batch: int = 16
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


@dataclass
class Batch:
    """Questions with the same number of looks.

    Attributes:
        ids: int64 [rows, n], padded on the right.
        weight: Loss weight of each id, float32 [rows, n].
        role: 1 where the first two numbers of a box stand, 2 where the answer does, else 0.
        pixels: float32 [pictures, 3, 64, 64], row by row, the scene before its crops.
    """

    ids: Tensor
    weight: Tensor
    role: Tensor
    pixels: Tensor


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

    def batch(
        self, step: int, shapes: tuple[int, int], shares: tuple[float, ...], blind_share: float
    ) -> Batch:
        """Batch number `step`, all questions with one number of relations, drawn by `shares`."""
        plan = self.plan
        rng = np.random.default_rng([plan.seed, step])
        relations = int(rng.choice(len(shares), p=shares))
        blind = bool(rng.random() < blind_share)
        rows, pixels = [], []
        for k in range(plan.batch):
            item = scene.sample_one("train", plan.seed, step * plan.batch + k, shapes, relations)
            rows.append(self.example(item, blind))
            pixels.append(self.pixels.picture(item.shapes))
            if not blind:
                pixels += [self.pixels.crop(shape) for shape in item.looks()]
        width = max(len(row[0]) for row in rows)
        fills = (self.pad, 0.0, 0)
        parts = (
            torch.tensor([row[k] + [fill] * (width - len(row[k])) for row in rows])
            for k, fill in enumerate(fills)
        )
        return Batch(*parts, torch.stack(pixels))


def curriculum(progress: float, blind: float) -> tuple[tuple[int, int], tuple[float, ...], float]:
    """By share of the run: numbers of shapes; shares of 0, 1 and 2 relations; share without crops.

    Marks are learned within the first hundredths of a run, boxes slowly: until those are there
    most samples go without crops, which makes them half as long.
    """
    if progress < 0.03:
        return (1, 3), (1.0, 0.0, 0.0), blind
    if progress < 0.1:
        return (2, 4), (1.0, 0.0, 0.0), 0.8
    if progress < 0.25:
        return (3, 5), (0.4, 0.6, 0.0), 0.8
    if progress < 0.5:
        return (3, 6), (0.2, 0.6, 0.2), 0.6
    return (3, 6), (0.15, 0.55, 0.3), blind


def loss_and_marks(
    model: LlavaForConditionalGeneration, batch: Batch, bf16: bool
) -> tuple[Tensor, dict]:
    """Weighted token loss; marks: boxes wholly right and answers right, teacher-forced."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model.model(
            input_ids=batch.ids[:, :-1], pixel_values=batch.pixels, use_cache=False
        )
        logits = model.lm_head(output.last_hidden_state)
    logits, target, weight = logits.float(), batch.ids[:, 1:], batch.weight[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    loss = (losses * weight.flatten()).sum() / weight.sum()
    with torch.no_grad():
        right, role = logits.argmax(-1) == target, batch.role[:, 1:]
        relations = int((role[0] == 1).sum()) // 2
        boxes = (right | (role != 1)).all(1).float().mean().item()
        answers = right[role == 2].float().mean().item()
        blind = len(batch.pixels) == len(batch.ids)
        longer = "looks2" if relations > 1 else "looks1"
        return loss, {f"boxes_{longer}": boxes, "answer_blind" if blind else "answer": answers}


def make_optimizers(
    model: LlavaForConditionalGeneration, plan: Plan
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; one learning rate."""
    layers = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, plan.lr, plan.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, plan.lr, (0.9, 0.98), weight_decay=0.0)]


def train(plan: Plan, out: Path, bf16: bool, log: Log) -> None:
    """Runs or resumes the plan; `out`/lm.pt is replaced every few minutes.

    Args:
        plan: What to run.
        out: Folder of checkpoints.
        bf16: Whether matrix products run under bfloat16 autocast.
        log: Receives one entry per 100 steps.
    """
    torch.manual_seed(plan.seed)
    sizes = (plan.layers, plan.hidden, plan.ffn, plan.heads, plan.tower_layers, plan.tower_hidden)
    model = volcano_files.build_model(*sizes)
    optimizers = make_optimizers(model, plan)
    step, path = 0, out / "lm.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        step = state["step"]
    model.train()
    sampler, marks, saved = Sampler(plan), [], time.time()
    started = time.time()
    while step * plan.batch < plan.samples:
        seen = step * plan.batch
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(plan, seen)
        batch = sampler.batch(step, *curriculum(seen / plan.samples, plan.blind))
        loss, mark = loss_and_marks(model, batch, bf16)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        marks.append({"loss": loss.item(), **mark})
        done = step * plan.batch >= plan.samples
        if step % 100 == 0 or done:
            names = sorted({name for mark in marks for name in mark})
            mean = {k: float(np.mean([m[k] for m in marks if k in m])) for k in names}
            pace = round(len(marks) * plan.batch / (time.time() - started), 1)
            rounded = {k: round(v, 4) for k, v in mean.items()}
            log({"samples": step * plan.batch, **rounded, "samples_per_s": pace})
            marks, started = [], time.time()
        if done or time.time() - saved > 180:
            state = {"model": model.state_dict(), "step": step, "plan": asdict(plan)}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save(path, state)
            saved = time.time()
