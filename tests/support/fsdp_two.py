"""Ten steps of DareTrainer on routers and a LoRA, in this process or under FSDP2 in one of several.

python fsdp_two.py OUT [kind=attached] [steps=10] [save=0] [state=FULL_STATE_DICT] [resume=FOLDER]
    [wrap=fsdp]

`kind` attached has the adapters by transformers, as `dare-hf train` has them; means likewise, with
mean updates and thresholds of routed decode; wrapped has routers alone, by peft. `wrap` is fsdp or
ddp.
OUT gets the adapters' parameters, whole, and the losses and parts of every step.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

from accelerate import DistributedType  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from router_runs import FIELDS, controller_of, sharpen  # noqa: E402
from trainer_runs import logs_of, trainer_of  # noqa: E402

from dare_hf import DareConfig  # noqa: E402
from dare_hf.testing import tiny_model  # noqa: E402
from dare_hf.training import add_adapter, end_processes  # noqa: E402

IMAGES = (1, 2, 0, 0)
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
MEANS = {"mean_update": True, "decode": "routed", "plan_every": 1}
LORA = {"r": 2, "target_modules": r".*language_model.*(q|down)_proj", "lora_dropout": 0.0}


def adapted(kind):
    """Routers with learned rates and a LoRA, the same in every process."""
    model = tiny_model("llava")
    torch.manual_seed(5)
    more = MEANS if kind == "means" else {}
    routers = DareConfig(**{"scorer": "router", "schedule": "learned", **FIELDS, **more})
    lora = LoraConfig(**LORA)
    if kind in ("attached", "means"):
        model.requires_grad_(False)
        add_adapter(model, lora, "lora")
        add_adapter(model, routers, "dare")
        model.set_adapter(["lora", "dare"])
    else:
        model = get_peft_model(model, routers)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    sharpen(controller_of(model).routers)
    return model


def shard_on_cpus():
    """accelerate (1.15) gives FSDP to accelerators alone and takes DDP on a CPU, in silence."""
    made = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and PROCESSES > 1:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            # every later state takes it over from there
            for state in (self, PartialState()):
                state.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(out, kind="attached", steps=10, save=0, state="FULL_STATE_DICT", resume=None, wrap="fsdp"):
    torch.set_num_threads(1)
    shard_on_cpus()
    model = adapted(kind)
    more = {}
    if PROCESSES > 1 and wrap == "fsdp":
        layers = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
        config = {"version": 2, "state_dict_type": state, "transformer_layer_cls_to_wrap": layers}
        more |= {"fsdp": True, "fsdp_config": config}
    if int(save):
        more |= {"save_strategy": "steps", "save_steps": int(save)}
    trainer = trainer_of(
        Path(out).with_suffix(""),
        model,
        images=IMAGES,
        per_device_train_batch_size=4 // PROCESSES,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=1e-2,
        router_lr=1e-2,
        rate_lr=1e-2,
        lr_scheduler_type="constant",
        max_steps=int(steps),
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    named += [(n, b) for n, b in trainer.model.named_buffers() if "dare_" in n]
    sharded = sum(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    tensors = {name: whole(parameter) for name, parameter in named}
    if trainer.accelerator.is_main_process:
        for entry in logs_of(trainer):
            kept = [key for key in entry if key.startswith(("dare", "loss"))]
            tensors |= {f"{entry['step']} {key}": torch.tensor(entry[key]) for key in kept}
        print("processes:", trainer.accelerator.num_processes, "sharded:", sharded)
        save_file(tensors, out)


if __name__ == "__main__":
    main(sys.argv[1], **dict(word.split("=", 1) for word in sys.argv[2:]))
    end_processes()
