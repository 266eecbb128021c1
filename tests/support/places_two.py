"""Every run of the places, in this process or in each of several that share the heads.

python places_two.py FOLDER        # or: torchrun --nproc_per_node 2 places_two.py FOLDER

FOLDER holds one saved model by the name of each of MODELS, and a router adapter for the first.
Each process writes what it got to FOLDER/<processes>-<rank>.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

from hop_runs import WORDS, chatter  # noqa: E402
from laws import generate, inputs_of  # noqa: E402
from places import (  # noqa: E402
    FULL,
    PRUNED,
    RATES,
    as_trace,
    place_inputs,
    place_model,
    plain_trace,
    routed_trace,
    trace,
)
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from dare_hf import DareConfig, apply_dare, remove_dare  # noqa: E402
from dare_hf.architectures.locate import locate  # noqa: E402
from dare_hf.generation import HopInput, HopLoop  # noqa: E402
from dare_hf.training import end_processes  # noqa: E402

SHARED = ("llava", "qwen2_5_vl", "gemma3", "smolvlm")
"""The models whose text config has a tensor-parallel plan."""

ADAPTER = "adapter"


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def loaded(folder: Path, name: str):
    """The saved model, its heads shared where there are several processes."""
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")} if processes() > 1 else {}
    model = AutoModelForImageTextToText.from_pretrained(folder / name, **plan)
    model.generation_config = place_model(name).generation_config
    return model


def traces_of(model) -> dict:
    """The runs every model makes."""
    inputs = place_inputs(model)
    found = {"plain": plain_trace(model, inputs), "full": routed_trace(model, inputs, FULL)}
    found |= {case: routed_trace(model, inputs, config) for case, config in PRUNED.items()}
    return found | {"removed": plain_trace(model, inputs)}


def further_traces(model, folder: Path) -> dict:
    """A trained adapter, a hop loop that writes between hops, and speculation over hops."""
    inputs = inputs_of(model, (0, 1, 2))
    apply_dare(model, str(folder / ADAPTER))
    found = {"adapter": trace(model, inputs)}
    remove_dare(model)
    apply_dare(model, DareConfig(**{**RATES, "hop_delimiters": tuple(range(10, 45))}))
    loop = HopLoop(on_hop=lambda hop: HopInput(input_ids=[50 + hop.index, 51]), max_hops=3)
    found["loop"] = as_trace(model, generate(model, inputs, hop_loop=loop, max_new_tokens=14))
    remove_dare(model)
    apply_dare(model, DareConfig(**{**RATES, "hop_delimiters": WORDS[:3]}))
    options = {"prompt_lookup_num_tokens": 3}
    found["speculative"] = as_trace(model, chatter(model, inputs_of(model), **options))
    remove_dare(model)
    return found


def fsdp_traces() -> dict:
    """By rank, a model whose layers FSDP2 has sharded: each process has rows of its own."""
    model = place_model("llava")
    if processes() > 1:
        for layer in locate(model).layers:
            fully_shard(layer)
        fully_shard(model)
        torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    mine = [rank()] if processes() > 1 else range(2)
    inputs = {r: inputs_of(model, (0, 1, 2), seed=r) for r in mine}
    return {r: routed_trace(model, inputs[r], PRUNED["attention"]) for r in mine}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in SHARED:
        model = loaded(folder, name)
        found[name] = traces_of(model)
        if name == SHARED[0]:
            found |= further_traces(model, folder)
    found["fsdp"] = fsdp_traces()
    torch.save(found, folder / f"{processes()}-{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_processes()
