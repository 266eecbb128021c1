"""What pruning text costs a pretrained language model: routed prefill against the full one.

SmolLM2-135M-Instruct reads the first tokens of a text with DARE, then its true continuation at full
depth. At the continuation's tokens: KL to the full model (nats), and how often both have the same
most likely token. An arm is a configuration; means over texts, with 95 % bootstrap intervals, and
the difference in KL to the first arm of the same rate, paired by text. Texts are added in blocks,
so that a run that is cut short has whole rows; --out is read again when it exists. What arms with
"fitted" in their name have is measured by `fit_router` on 16 other texts, whose true continuations
stand for the model's answers.

    python scripts/pretrained_files.py smollm2
    python scripts/pretrained_text.py --model smollm2 --n 64 --out text.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrained_files import texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from dare_hf import DareConfig, apply_dare, last_report, remove_dare
from dare_hf.calibration import fit_router

PROMPT, CONTINUATION, BLOCK = 300, 32, 8
FIT_POOL, FIT_TEXTS = 400, 16
FITTED: dict[str, Any] = {
    "scorer": "router",
    "schedule": "ramp",
    "recent_share": 0.75,
    "mean_update": True,
}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "two_stage, nothing protected": {"schedule": "two_stage", "recent_tokens": 0},
    "two_stage": {"schedule": "two_stage"},
    "two_stage, share 0.25": {"schedule": "two_stage", "recent_share": 0.25},
    "two_stage, share 0.5": {"schedule": "two_stage", "recent_share": 0.5},
    "two_stage, share 0.75": {"schedule": "two_stage", "recent_share": 0.75},
    "ramp": {"schedule": "ramp"},
    "ramp, share 0.25": {"schedule": "ramp", "recent_share": 0.25},
    "ramp, share 0.5": {"schedule": "ramp", "recent_share": 0.5},
    "ramp, share 0.75": {"schedule": "ramp", "recent_share": 0.75},
    "two_stage, recent": {"schedule": "two_stage", "scorer": "recent"},
    "ramp, recent": {"schedule": "ramp", "scorer": "recent"},
    "two_stage, position": {"schedule": "two_stage", "scorer": "position"},
    "two_stage, random": {"schedule": "two_stage", "scorer": "random"},
    "ramp, random": {"schedule": "ramp", "scorer": "random"},
    "constant": {"schedule": "constant"},
    "ramp, share 0.75, fitted mean update": {**FITTED, "scorer": "attention"},
    "freeze": {"pruned": "freeze"},
    "ramp, share 0.75, fitted mean update, freeze": {
        **FITTED,
        "scorer": "attention",
        "pruned": "freeze",
    },
    "fitted router, freeze": {**FITTED, "pruned": "freeze"},
    "fitted router, no mean update": {**FITTED, "mean_update": False},
    "fitted router": FITTED,
    "fitted router, share 0.5": {**FITTED, "recent_share": 0.5},
}
"""Fields beside the rate; unnamed ones are the defaults."""


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Float32[B, CONTINUATION, V] of each token of the continuations, [B, S] ids given."""
    # what comes after the prompt was sampled: it runs all layers
    told = {"prompt_length": PROMPT} if "_dare" in vars(model) else {}
    kept = {"logits_to_keep": CONTINUATION + 1, "use_cache": False}
    logits = model(input_ids=ids, **kept, **told).logits
    return logits[:, :-1].float().log_softmax(-1)


def fitted(
    model: Any, fields: dict[str, Any], folder: Path, chosen: list[list[int]]
) -> DareConfig | str:
    """The configuration of an arm; of a fitted one the folder of its adapter, made once."""
    if "mean_update" not in fields:
        return DareConfig(**fields)
    if not folder.exists():
        batches = []
        for start in range(0, len(chosen), 4):
            ids = torch.tensor(chosen[start : start + 4])
            labels = ids.clone()
            labels[:, :PROMPT] = -100
            mask = torch.ones_like(ids)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        routed = fit_router(model, batches, DareConfig(**fields))
        routed.save_pretrained(folder)
        routed.unload()
    return str(folder)


def measure(
    model: Any, config: DareConfig | str, ids: torch.Tensor, full: torch.Tensor
) -> dict[str, list]:
    """KL, agreement and the share of the prompts that ran, of each text."""
    apply_dare(model, config)
    try:
        ours = log_probabilities(model, ids)
        rates = [layer["text"] for layer in last_report(model).retention[0]]
    finally:
        remove_dare(model)
    return {
        "kl": (full.exp() * (full - ours)).sum(-1).mean(-1).tolist(),
        "same": (full.argmax(-1) == ours.argmax(-1)).float().mean(-1).tolist(),
        "ran": [sum(rates) / len(rates)] * len(ids),
    }


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over texts."""
    draws = np.random.default_rng(seed).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def table(results: dict[str, dict[str, list]]) -> str:
    """Markdown, one row per arm and rate."""
    lines = [
        "| rate | arm | n | KL to full | same top-1 | KL minus the first arm's | ran |",
        "|---|---|---|---|---|---|---|",
    ]
    first: dict[str, np.ndarray] = {}
    for key, found in results.items():
        rate, _, arm = key.partition(" ")
        kl, same = np.array(found["kl"]), np.array(found["same"])
        base = first.setdefault(rate, kl)
        apart = kl - base[: len(kl)] if len(base) >= len(kl) else kl * np.nan
        cells = [
            f"{values.mean():{form}} ({low:{form}} to {high:{form}})"
            for values, form in ((kl, ".3f"), (same, ".3f"), (apart, "+.3f"))
            for low, high in [interval(values)]
        ]
        ran = f"{np.mean(found['ran']):.3f}"
        lines.append(f"| {rate} | {arm} | {len(kl)} | {' | '.join(cells)} | {ran} |")
    return "\n".join(lines)


def main() -> None:
    """Runs all arms at all rates, block by block of texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="what pretrained_files.py wrote")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rates", default="0.7,0.5")
    parser.add_argument("--arms", default="", help="names split by ;, default: all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after each block")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    ).eval()
    chosen = texts(tokenizer, args.n, PROMPT + CONTINUATION)
    to_fit = []
    if any("mean_update" in ARMS[arm] for arm in args.arms.split(";") if arm):
        pool = texts(tokenizer, FIT_POOL, PROMPT + CONTINUATION)
        others = [ids for _, ids in pool if ids not in [taken for _, taken in chosen]]
        to_fit = others[:: len(others) // FIT_TEXTS][:FIT_TEXTS]
    adapters = args.out.with_suffix("")
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]
    arms = args.arms.split(";") if args.arms else list(ARMS)
    keys = [f"{rate} {arm}" for rate in args.rates.split(",") for arm in arms]
    found = json.loads(args.out.read_text()) if args.out.exists() else {"texts": digest, "arms": {}}
    if found["texts"] != digest:
        raise SystemExit(f"{args.out} is of other texts than {digest}")
    for key in keys:
        found["arms"].setdefault(key, {"kl": [], "same": [], "ran": []})
    for start in range(0, args.n, BLOCK):
        due = [key for key in keys if len(found["arms"][key]["kl"]) == start]
        if not due:
            continue
        batch = torch.tensor([ids for _, ids in chosen[start : start + BLOCK]])
        plain = log_probabilities(model, batch)
        for key in due:
            rate, _, arm = key.partition(" ")
            fields = {"text_retention": float(rate), **ARMS[arm]}
            config = fitted(model, fields, adapters / key, to_fit)
            for name, values in measure(model, config, batch, plain).items():
                found["arms"][key][name] += values
        args.out.write_text(json.dumps(found))
        print(f"{start + len(batch)} texts", flush=True)
    print(f"texts {digest}\n{table({key: found['arms'][key] for key in keys})}")


if __name__ == "__main__":
    main()
