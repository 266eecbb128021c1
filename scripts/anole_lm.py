"""Stage 2 of train_tiny_anole.py: next-token training on mvot solutions, resumable."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import anole_files
import numpy as np
import torch
from anole_samples import Batch, Sampler
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, ChameleonForConditionalGeneration

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
    seen_weight: float = 0.2
    step_weight: float = 4.0
    maze_share: float = 0.4
    lake_share: float = 0.3
    ghost_share: float = 0.3
    naming: float = 0.1
    markov_share: float = 0.15
    drill: float = 0.2
    shifted: float = 0.3
    longer: float = 0.08
    longest: int = 6
    ghost_longest: int = 6
    from_nothing: bool = False
    seed: int = 0
    layers: int = 12
    hidden: int = 128
    ffn: int = 256
    heads: int = 4


def learning_rate(plan: Plan, seen: int) -> float:
    """Warm-up, stable, then decay to a twentieth over the last `plan.decay` of the run (WSD)."""
    left = (plan.samples - seen) / (plan.decay * plan.samples)
    down = 1.0 if left >= 1 else 0.05 + 0.95 * 0.5 * (1 - math.cos(math.pi * max(left, 0.0)))
    return plan.lr * min(1.0, (seen + 1) / plan.warmup) * down


def loss_and_marks(
    model: ChameleonForConditionalGeneration, batch: Batch, bf16: bool
) -> tuple[Tensor, dict]:
    """Weighted token loss of the response; marks: image tokens, changed cells and answers right.

    Answers and changed cells are marked per task and form ("lake_answer", "maze_markov_changed");
    images count where the model draws them, so not in the ghost task.
    """
    ids, weight, start = batch.ids, batch.weight, batch.prompt
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, start - 1 :])
    logits, target, weight = logits.float(), ids[:, start:], weight[:, start:]
    losses = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    loss = (losses * weight.flatten()).sum() / weight.sum()
    with torch.no_grad():
        right = logits.argmax(-1) == target
        code = (target >= 8) & (target < 8 + anole_files.CODES)
        words = ~code & (weight > 0)
        marks = {}
        if words[0, -1] and target[0, -1] == 2:
            marks[f"{batch.kind}_answer"] = right[:, -3].float().mean().item()
            words[:, -6:] = False
        if words.any():
            name = f"{batch.kind}_text" if batch.kind.endswith(("_markov", "_drill")) else "text"
            marks[name] = right[words].float().mean().item()
        if code.any() and not batch.kind.startswith("ghost"):
            marks["image"] = right[code].float().mean().item()
            changed = code & (weight > 1)
            if changed.any():
                marks[f"{batch.kind}_changed"] = right[changed].float().mean().item()
        elif code.any():
            marks["seen"] = right[code].float().mean().item()
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


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float = 1.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention [B, H, N, D] by plain products; rows without padding, so no mask is read.

    On a CPU in bfloat16 a training step is 1.5 times as fast with it as with torch's flash kernel,
    whose backward took 40 % of the time (404 tokens, head size 32).
    """
    batch, heads, count, width = query.shape
    with torch.autocast("cpu", enabled=False):
        flat = (x.to(value.dtype).reshape(-1, count, width) for x in (query, key, value))
        query, key, value = flat
        scores = torch.bmm(query * scaling, key.transpose(1, 2))
        scores = scores + torch.full_like(scores[0], -math.inf).triu(1)
        out = torch.bmm(scores.softmax(-1), value)
    return out.view(batch, heads, count, width).transpose(1, 2), None


def start_model(plan: Plan, vq: dict, begin: dict | None) -> ChameleonForConditionalGeneration:
    """A new model, or one that goes on from the weights `begin` of a smaller vocabulary.

    Words that `begin` lacks start at the mean of its words, slightly moved apart.
    """
    torch.manual_seed(plan.seed)
    model = anole_files.build_model(plan.layers, plan.hidden, plan.ffn, plan.heads)
    if begin is not None:
        old = begin["model.embed_tokens.weight"]
        new = len(anole_files.vocabulary()) - len(old)
        words = old[8 + anole_files.CODES :]
        rows = words.mean(0) + 0.5 * words.std(0) * torch.randn(new, words.shape[1])
        table = torch.cat([old, rows])
        model.load_state_dict(
            {**begin, "model.embed_tokens.weight": table, "lm_head.weight": table}
        )
    model.model.vqmodel.load_state_dict(vq)
    model.model.vqmodel.requires_grad_(False)
    return model


def train_lm(
    plan: Plan,
    vq: dict,
    codes: np.ndarray,
    out: Path,
    bf16: bool,
    log: Log,
    begin: dict | None = None,
) -> None:
    """Runs or resumes the plan; `out`/lm.pt is replaced every few minutes.

    Args:
        plan: What to run.
        vq: State dict of the trained ChameleonVQVAE; stays frozen.
        codes: VQ code of every cell type.
        out: Folder of checkpoints.
        bf16: Whether matrix products run under bfloat16 autocast.
        log: Receives one entry per 50 steps.
        begin: State dict to start from; None starts from nothing.
    """
    model = start_model(plan, vq, begin)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(model, plan)
    step, seen, path = 0, 0, out / "lm.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        model.model.vqmodel.load_state_dict(vq)
        step, seen = state["step"], state["seen"]
    if os.environ.get("ANOLE_COMPILE"):
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    AttentionInterface.register("dense", dense_attention)
    model.set_attn_implementation("dense")
    model.train()
    sampler, marks, saved = Sampler(codes, plan), [], time.time()
    started, tokens = time.time(), 0
    while seen < plan.samples:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(plan, seen)
        batch = sampler.batch(step, seen / plan.samples)
        loss, mark = loss_and_marks(model, batch, bf16)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + len(batch.ids)
        tokens += batch.ids.numel()
        marks.append({"loss": loss.item(), **mark})
        done = seen >= plan.samples
        if step % 50 == 0 or done:
            pace = round(tokens / (time.time() - started))
            entry = {"stage": "lm", "step": step, "samples": seen, **means(marks)}
            log(entry | {"tokens_per_s": pace})
            marks, started, tokens = [], time.time(), 0
        if done or time.time() - saved > 180:
            raw = {k.replace("._orig_mod", ""): v for k, v in model.state_dict().items()}
            state = {"model": raw, "step": step, "seen": seen, "plan": asdict(plan)}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save(path, state)
            saved = time.time()


def means(marks: list[dict]) -> dict[str, float]:
    """Mean of every mark over the steps that have it."""
    names = sorted({name for mark in marks for name in mark})
    return {
        name: round(float(np.mean([mark[name] for mark in marks if name in mark])), 4)
        for name in names
    }
