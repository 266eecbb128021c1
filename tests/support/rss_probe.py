"""A script: what a process holds while a generate goes through thirteen hops, as JSON lines.

Small weights and large keys and values (32 KiB a token), so that the cache is most of what a run
holds. Run by tests/hops/test_hop_rss.py in processes of its own, since an allocator that has worked
before keeps what others freed. Also by hand: python tests/support/rss_probe.py pruned|kept|leaking
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import LogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf import DareCache, DareConfig, apply_dare
from dare_hf.compat import CACHE
from dare_hf.testing import tiny_model

ROWS, TOKENS, VISION, IMAGE_ID = 24, 256, 232, 3
LAYERS, HEADS, HEAD_DIM = 4, 8, 128
TOKEN_BYTES = 2 * HEADS * HEAD_DIM * 4
"""Bytes of a token's float32 key and value in one layer."""
SPARE_TOKENS = 64
WINDOW, HOPS = 3, 13
RATES = {
    "pruned": {"vision_retention": 0.4, "text_retention": 0.6, "hop_decay": 0.8},
    "kept": {"vision_retention": 1.0, "text_retention": 1.0},
}
RATES["leaking"] = RATES["pruned"]


def anonymous_bytes() -> int:
    """Memory this process holds that is no file: `RssAnon` of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith("RssAnon:")).split()[1]
    return int(kilobytes) * 1024


class Look(LogitsProcessor):
    """Measures after every forward; may hold on to what a compaction let go."""

    def __init__(self, cache: DareCache, base: int, leak: bool) -> None:
        self.cache, self.base, self.leak, self.held = cache, base, leak, {}

    def __call__(self, input_ids, scores):
        if self.leak:
            for layer in self.cache.layers:
                self.held[id(layer._slabs)] = layer._slabs
        gc.collect()
        longest = self.cache.kept_lengths().amax(dim=1)
        room = (1.25 * longest * ROWS + SPARE_TOKENS).sum() * TOKEN_BYTES
        rings = [layer.ring for layer in self.cache.layers if layer.ring is not None]
        found = {
            "hop": int(self.cache.hops.max()),
            "columns": self.cache.get_seq_length(),
            "kv": self.cache.kv_bytes(),
            "allocated": self.cache.allocated_bytes(),
            "bound": int(room),
            "ring": sum(ring.nbytes() for ring in rings),
            "rss": anonymous_bytes() - self.base,
        }
        sys.stdout.write(json.dumps(found) + "\n")
        return scores


def inputs_of(rows: int, width: int) -> dict:
    """Rows of an image between a few words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 100, (rows, TOKENS), generator=generator)
    ids[:, 4 : 4 + VISION] = IMAGE_ID
    features = [torch.randn(VISION, width, generator=generator) for _ in range(rows)]
    image = BaseModelOutputWithPooling(pooler_output=features)
    return {"input_ids": ids, "mm_encoder_outputs": {"image": image}}


def main(mode: str) -> None:
    """Run once to load everything, then once measured."""
    torch.set_num_threads(1)
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
    model = tiny_model("llava", layers=LAYERS, **sizes)
    apply_dare(model, DareConfig(schedule="constant", decode_window=WINDOW, **RATES[mode]))
    options = {"do_sample": False, "suppress_tokens": [IMAGE_ID, 4, 5, 6]}
    model.generate(**inputs_of(1, 32), max_new_tokens=2 * WINDOW, **options)
    inputs, cache = inputs_of(ROWS, 32), DareCache()
    gc.collect()
    look = Look(cache, anonymous_bytes(), mode == "leaking")
    model.generate(
        **inputs,
        **{CACHE: cache},
        max_new_tokens=WINDOW * (HOPS - 1) + 2,
        logits_processor=[look],
        **options,
    )


if __name__ == "__main__":
    main(sys.argv[1])
