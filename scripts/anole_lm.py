"""Stage 2 of train_tiny_anole.py: next-token training on mvot solutions, resumable."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anole_files
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ChameleonForConditionalGeneration

from dare_hf.tasks import maze

Log = Callable[[dict], None]


@dataclass
class Plan:
    """Sizes and schedule of one training run; counts are in samples (one sample = one maze)."""

    samples: int = 33_000
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 1_500
    decay: float = 0.3
    weight_decay: float = 0.05
    answer_weight: float = 15.0
    changed_weight: float = 4.0
    seed: int = 0
    layers: int = 12
    hidden: int = 128
    ffn: int = 256
    heads: int = 4


class Sampler:
    """Batches of mvot solutions as token ids; a batch has one length, so no padding.

    Args:
        codes: VQ code of every cell type, int64 [NUM_CELL_TYPES].
        plan: Batch size, seed and loss weights.
    """

    def __init__(self, codes: np.ndarray, plan: Plan) -> None:
        self.plan = plan
        vocab = anole_files.vocabulary()
        self.vocab = vocab
        tokenizer = anole_files.build_tokenizer()
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        names = [anole_files.image_token_name(int(code)) for code in codes]
        self.cell_ids = np.array([vocab[name] for name in names])
        self.head = [vocab["<s>"], *self.encode(maze.PROMPT.split("{")[0])]
        self.steps = {
            (k, name): self.encode(f"{k}. Go {name}.") for k in range(1, 21) for name in maze.MOVES
        }
        self.answer = {letter: self.encode(f"The answer is {letter}.") for letter in maze.LETTERS}

    def example(self, item: maze.MazeItem, first: int = 1) -> tuple[list[int], list[float], int]:
        """One item -> ids, loss weight per id, prompt length; `first` numbers the first action."""
        v, plan = self.vocab, self.plan
        numbered = [self.steps[first + k, name] for k, name in enumerate(item.actions)]
        states = self.cell_ids[item.grids()].reshape(len(numbered) + 1, -1)
        ids = [*self.head, *(i for step in numbered for i in step)]
        ids += [v["<boi>"], *states[0], v["<eoi>"], v["<sep>"]]
        prompt = len(ids)
        weight = [0.0] * prompt
        for k, step in enumerate(numbered):
            ids += [*step, v["<boi>"], *states[k + 1], v["<eoi>"], v["<sep>"]]
            changed = np.where(states[k + 1] != states[k], plan.changed_weight, 1.0)
            weight += [1.0] * (len(step) + 1) + changed.tolist() + [1.0, 1.0]
        answer = self.answer[item.answer]
        ids += [*answer, v["</s>"]]
        weight += [1.0, 1.0, 1.0, plan.answer_weight, 1.0, 1.0]
        return ids, weight, prompt

    def batch(
        self, step: int, longest: int, naming: float, shifted: float, longer: float
    ) -> tuple[Tensor, Tensor, int]:
        """Batch number `step` -> ids [rows, n], weights [rows, n], prompt length.

        A share `naming` of the batches has no actions: the red point stands on a letter at once, so
        that a hundred tokens teach to name it, where a full solution takes hundreds.
        A share `shifted` numbers its actions from 2 or 3; a share `longer` has `longest` + 1.
        """
        rng = np.random.default_rng([self.plan.seed, step])
        length = int(rng.integers(1, longest + 1))
        if rng.random() < longer:
            length = longest + 1
        name_only = rng.random() < naming
        # Without shifted batches the words 7 and 8 would never be learned.
        first = int(rng.integers(2, 4)) if rng.random() < shifted else 1
        # Short mazes have few layouts: the split's hash, not the size, keeps evaluation disjoint.
        size, base = self.plan.batch * (1 + name_only), step * 2 * self.plan.batch
        rows = []
        for k in range(size):
            item = maze.sample_one("train", self.plan.seed, base + k, length=length)
            if name_only:
                item = replace(item, start=item.path()[-1], actions=())
            rows.append(self.example(item, first))
        ids = torch.tensor(np.array([row[0] for row in rows]))
        return ids, torch.tensor([row[1] for row in rows]), rows[0][2]


def curriculum(progress: float) -> tuple[int, float, float, float]:
    """By share of the run: most actions; shares of naming, shifted and longer batches."""
    if progress < 0.12:
        return 2, 0.4, 0.1, 0.0
    if progress < 0.6:
        return 3, 0.4, 0.1, 0.0
    return 6, 0.1, 0.5, 0.0 if progress < 0.9 else 0.08


def learning_rate(plan: Plan, seen: int) -> float:
    """Warm-up, stable, then decay to a twentieth over the last `plan.decay` of the run (WSD)."""
    left = (plan.samples - seen) / (plan.decay * plan.samples)
    down = 1.0 if left >= 1 else 0.05 + 0.95 * 0.5 * (1 - math.cos(math.pi * max(left, 0.0)))
    return plan.lr * min(1.0, (seen + 1) / plan.warmup) * down


def loss_and_marks(
    model: ChameleonForConditionalGeneration, ids: Tensor, weight: Tensor, prompt: int, bf16: bool
) -> tuple[Tensor, dict]:
    """Weighted token loss of the response; marks: image tokens, changed cells and answers right."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, prompt - 1 :])
    logits, target, weight = logits.float(), ids[:, prompt:], weight[:, prompt:]
    losses = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    loss = (losses * weight.flatten()).sum() / weight.sum()
    with torch.no_grad():
        right = logits.argmax(-1) == target
        code = (target >= 8) & (target < 8 + anole_files.CODES)
        text = ~code
        text[:, -6:] = False
        marks = {
            "image": right[code].float().mean().item(),
            "changed": right[code & (weight > 1)].float().mean().item(),
            "text": right[text].float().mean().item(),
            "naming": right[:, -3].float().mean().item() if not code.any() else math.nan,
            "answer": right[:, -3].float().mean().item() if code.any() else math.nan,
        }
    return loss, marks


def make_optimizers(
    model: ChameleonForConditionalGeneration, plan: Plan
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms; one learning rate."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2 and min(p.shape) > 32]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    muon = torch.optim.Muon(matrices, plan.lr, plan.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, plan.lr, (0.9, 0.98), weight_decay=0.0)]


def save(path: Path, state: dict) -> None:
    """Replaces the checkpoint in one move, so that a kill leaves a whole one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train_lm(plan: Plan, vq: dict, codes: np.ndarray, out: Path, bf16: bool, log: Log) -> None:
    """Runs or resumes the plan; `out`/lm.pt is replaced every few minutes.

    Args:
        plan: What to run.
        vq: State dict of the trained ChameleonVQVAE; stays frozen.
        codes: VQ code of every cell type.
        out: Folder of checkpoints.
        bf16: Whether matrix products run under bfloat16 autocast.
        log: Receives one entry per 50 steps.
    """
    torch.manual_seed(plan.seed)
    model = anole_files.build_model(plan.layers, plan.hidden, plan.ffn, plan.heads)
    model.model.vqmodel.load_state_dict(vq)
    model.model.vqmodel.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, plan)
    step, path = 0, out / "lm.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        step = state["step"]
    if os.environ.get("ANOLE_COMPILE"):
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    model.train()
    sampler, marks, saved = Sampler(codes, plan), [], time.time()
    started, tokens = time.time(), 0
    while step * plan.batch < plan.samples:
        seen = step * plan.batch
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(plan, seen)
        ids, weight, prompt = sampler.batch(step, *curriculum(seen / plan.samples))
        loss, mark = loss_and_marks(model, ids, weight, prompt, bf16)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        tokens += ids.numel()
        marks.append({"loss": loss.item(), **mark})
        done = step * plan.batch >= plan.samples
        if step % 50 == 0 or done:
            mean = {k: round(float(np.nanmean([m[k] for m in marks])), 5) for k in marks[0]}
            pace = round(tokens / (time.time() - started))
            log({"stage": "lm", "samples": step * plan.batch, **mean, "tokens_per_s": pace})
            marks, started, tokens = [], time.time(), 0
        if done or time.time() - saved > 180:
            raw = {k.replace("._orig_mod", ""): v for k, v in model.state_dict().items()}
            state = {"model": raw, "step": step, "plan": asdict(plan)}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save(path, state)
            saved = time.time()
