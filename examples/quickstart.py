"""Quickstart: prune a vision-language model's generate, see what that saved, and undo it.

    python examples/quickstart.py

Offline, on a CPU, in seconds. The model is a tiny LLaVA with random weights: it answers nonsense,
but every count below is what its layers really ran and its cache really stored.
"""

import torch

from dare_hf import DareConfig, apply_dare, dare_disabled, last_report, remove_dare
from dare_hf.testing import tiny_inputs, tiny_model


def main() -> None:
    model = tiny_model("llava")
    inputs = tiny_inputs(model, pixels=True)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)

    apply_dare(model)  # the preset "safe": text whole, vision thins out with depth
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print("preset 'safe'", last_report(model), sep="\n")

    remove_dare(model)  # a model has one config at a time
    apply_dare(model, DareConfig(vision_retention=0.4, text_retention=1.0))
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    report = last_report(model)
    flops = report.flops["prefill"] / report.flops_baseline["prefill"]
    kv_bytes = report.kv_bytes / report.kv_bytes_baseline
    print(f"\nvision 0.4: prefill FLOPs x{flops:.2f}, KV bytes x{kv_bytes:.2f}")

    with dare_disabled(model):
        same = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print("disabled, it is the plain model:", torch.equal(same, plain))

    remove_dare(model)
    same = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print("removed, it is the plain model:", torch.equal(same, plain))


if __name__ == "__main__":
    main()
