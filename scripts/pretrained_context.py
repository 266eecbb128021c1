"""A context asked about many times, on pretrained weights: what is lost by compressing its cache.

A text of 450 tokens that holds one fact, stated once at a random place, is read whole; its cache is
cut once, the question being unknown, and then has to go on with the text (KL to the whole cache and
perplexity, over 32 true tokens behind the context) and to tell the fact. Every method keeps the
first 4 and the last 32 tokens, and as many in all; all but reconstruction and reading keep as many
in each layer. Model and texts: scripts/pretrained_files.py.

    python scripts/pretrained_context.py smollm2 --n 64 --out context.jsonl   # goes on where it was
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pretrained_files import texts
from torch.nn.functional import avg_pool1d, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from dare_hf import DareCache, DareConfig, apply_dare
from dare_hf.cache import Thinning
from dare_hf.compat import CACHE
from dare_hf.compression import INSTRUCTION, _prefill
from dare_hf.engine.reading_scores import ReadingScores
from dare_hf.engine.repetition import Repetition, listening
from dare_hf.hops.reconstruction import Shares, decide_context
from dare_hf.routing.scores import Softmax
from dare_hf.routing.selection import shared_keep
from dare_hf.scoring.observe import WINDOW, observed_scores
from dare_hf.tasks.mvot import wilson

if TYPE_CHECKING:
    from torch import Tensor

LENGTH, AFTER, FIRST, LAST = 450, 33, 4, 32
KEEPS = (0.5, 0.25)
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
THINGS = ("lamp", "door", "boat", "box", "tower", "garden", "engine", "bridge")


def fact(number: int) -> tuple[str, str, str]:
    """A sentence, the start of its repetition, and the code that has to come."""
    draw = random.Random(number)
    thing = f"{draw.choice(COLOURS)} {draw.choice(THINGS)}"
    code = "".join(draw.choices("0123456789", k=5))
    start = f"The access code of the {thing} is"
    asked = f"\n\nQuestion: What is the access code of the {thing}?\nAnswer: {start}"
    return f"\n{start} {code}.\n", asked, code


def observed(cache: DareCache) -> dict[int, Tensor]:
    """What the last 32 tokens attend to, times the value norm: dare_hf's score when a hop ends."""
    real = torch.ones(1, LENGTH, dtype=torch.bool)
    return {i: observed_scores(slot, real, [LENGTH - 1]) for i, slot in enumerate(cache.stored)}


def snapkv(cache: DareCache) -> dict[int, Tensor]:
    """What the last 32 tokens attend to, smoothed over 7 places (SnapKV, heads sharing one set)."""
    found = {}
    for i, slot in enumerate(cache.stored):
        assert slot.ring is not None
        last = slot.ring.until(torch.tensor([LENGTH - 1]), WINDOW)
        seen = slot.positions()[:, None, None] <= last.positions[:, None, :, None]
        groups = last.query.shape[1] // slot.keys.shape[1]
        keys = slot.keys.repeat_interleave(groups, dim=1)
        rules: Softmax = slot.ring.softmax
        products = last.query.float() @ keys.float().transpose(-1, -2)
        mass = rules.probabilities(products, seen).mean((1, 2))
        found[i] = avg_pool1d(mass, 7, stride=1, padding=3, count_include_pad=False)
    return found


def newest(cache: DareCache) -> dict[int, Tensor]:
    """The later, the better (StreamingLLM)."""
    return {i: slot.positions().float() for i, slot in enumerate(cache.stored)}


def level(cache: DareCache, scores: dict[int, Tensor], keep: float) -> list[Thinning]:
    """The best-scoring tokens of each layer, as many in each."""
    places = torch.arange(LENGTH)[None, None]
    forced = (places < FIRST) | (places >= LENGTH - LAST)
    able = torch.ones_like(forced)
    wanted = [math.ceil(keep * LENGTH)]
    decided = []
    for i, slot in enumerate(cache.stored):
        stays = shared_keep(scores[i][:, None], able, forced, wanted)[:, 0]
        decided.append(Thinning(slot, slot._table, stays, [int(stays.sum())], None))
    return decided


def cut(cache: DareCache, scores: dict[int, Tensor], keep: float, *, shared: bool) -> DareCache:
    """A copy of a whole cache, cut by these scores."""
    own: Any = copy.deepcopy(cache)
    shares = Shares(keep, FIRST, LAST, None)
    decided = decide_context(own, scores, shares, ()) if shared else level(own, scores, keep)
    own.hop_counters.compacted = [1]
    own.decide(decided)
    own.settle()
    return own


@torch.no_grad()
def judge(model: Any, cache: DareCache, item: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the continuation, and whether greedy decoding answers with the code."""
    code = item["code"]
    asked = torch.cat([item["question"], code], dim=1)
    said = model(input_ids=asked, use_cache=True, **{CACHE: copy.deepcopy(cache)}).logits
    says = said[:, -1 - code.shape[1] : -1].argmax(-1)
    out = model(input_ids=item["after"][:, :-1], use_cache=True, **{CACHE: cache}).logits[0]
    return {"log": log_softmax(out.double(), -1), "found": torch.equal(says, code)}


def measured(run: dict[str, Any], full: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    """KL to the whole cache (nats), negative log-likelihood of the truth, whether it was found."""
    log, whole = run["log"], full["log"]
    kl = (whole.exp() * (whole - log)).sum(-1).mean().item()
    truth = item["after"][0, 1:, None]
    return {"kl": kl, "nll": -log.gather(1, truth).mean().item(), "found": run["found"]}


def prepared(tokenizer: Any, ids: list[int], number: int) -> dict[str, Any]:
    """Context with its fact, what follows it in the text, and the question."""
    sentence, question, code = fact(number)
    inside = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    place = random.Random(number).randrange(LENGTH - len(inside))
    context = [*ids[:place], *inside, *ids[place : LENGTH - len(inside)]]
    after = ids[LENGTH - len(inside) :][:AFTER]
    asked, told = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, f" {code}")
    )
    tensors = {"ids": context, "after": after, "question": asked, "code": told}
    return {name: torch.tensor([value]) for name, value in tensors.items()}


@torch.no_grad()
def run(model: Any, tokenizer: Any, item: dict[str, Any]) -> dict[str, Any]:
    """All methods on one context: {method: {keep: measures}}."""
    inputs = {"input_ids": item["ids"], "attention_mask": torch.ones_like(item["ids"])}
    cache = DareCache()
    controller = model._dare.controller
    reading = ReadingScores(controller, cache)
    with listening(controller, reading):
        given = _prefill(model, model._dare, inputs, cache)
    full = judge(model, copy.deepcopy(cache), item)
    result: dict[str, Any] = {"whole cache": {"1.0": measured(full, full, item)}}
    said = tuple(tokenizer.encode(INSTRUCTION, add_special_tokens=False))
    scored = {
        "reconstruct": Repetition(controller, cache, given, said, 2048).scores(),
        "reconstruct, no words": Repetition(controller, cache, given, (), 2048).scores(),
        "reading": reading.scores(),
        "observed": observed(cache),
        "SnapKV-like": snapkv(cache),
        "StreamingLLM": newest(cache),
    }
    for name, scores in scored.items():
        result[name] = {}
        for keep in KEEPS:
            own = cut(cache, scores, keep, shared=name.startswith("re"))
            kept = own.kept_lengths().float().mean().item() / LENGTH
            found = measured(judge(model, own, item), full, item)
            result[name][str(keep)] = found | {"kept": kept}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means with 95 % intervals (normal; of shares Wilson's)."""
    lines = ["| method | keep | KL | perplexity | found |", "|---|---|---|---|---|"]
    for name, keeps in rows[0]["runs"].items():
        for keep in keeps:
            cells = [row["runs"][name][keep] for row in rows]
            kl = torch.tensor([cell["kl"] for cell in cells], dtype=torch.float64)
            half = 1.96 * kl.std().item() / len(kl) ** 0.5
            nll = sum(cell["nll"] for cell in cells) / len(cells)
            found = sum(cell["found"] for cell in cells)
            low, high = wilson(found / len(cells), len(cells))
            lines.append(
                f"| {name} | {keep} | {kl.mean():.3f} ± {half:.3f} | {math.exp(nll):.1f} | "
                f"{found} of {len(cells)} ({100 * low:.0f} to {100 * high:.0f} %) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing in the file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder written by pretrained_files.py")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    ).eval()
    # A cap no context reaches: every layer then remembers its queries, which "observed" reads.
    apply_dare(model, DareConfig(max_kv_tokens=10**6))
    chosen = texts(tokenizer, arguments.n, LENGTH + AFTER)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    rows = [json.loads(line) for line in lines]
    for number, (name, ids) in list(enumerate(chosen))[len(rows) :]:
        rows.append({"text": name, "runs": run(model, tokenizer, prepared(tokenizer, ids, number))})
        with arguments.out.open("a") as file:
            print(json.dumps(rows[-1]), file=file)
    print(table(rows))


if __name__ == "__main__":
    main()
