"""Two steps of DareTrainer in this process or in one of two; writes the parameters it ends with.

python train_two.py OUT [FOLDER]    # or: torchrun --nproc_per_node 2 train_two.py OUT [FOLDER]

FOLDER holds a backbone that is loaded in 4 bit.
"""

import gc
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

from trainer_runs import logs_of, routed_model, trained_parameters, trainer_of  # noqa: E402

from dare_hf.training import end_processes  # noqa: E402
from dare_hf.training.quantized import quantization_config  # noqa: E402

IMAGES = (1, 2, 0, 0)
"""Of the rows in order: the second of two processes sees no image."""


def in_4bit(folder: str) -> LlavaForConditionalGeneration:
    config = quantization_config(bnb_4bit_compute_dtype=torch.float32)
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config)


def main(out: str, folder: str | None = None) -> None:
    torch.set_num_threads(1)
    model = routed_model(base=folder and in_4bit(folder))
    trainer = trainer_of(
        Path(out).parent,
        model,
        images=IMAGES,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")),
        train_sampling_strategy="sequential",
        optim="sgd",
        router_lr=0.1,
        rate_lr=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        logged = logs_of(trainer)[-1]
        kept = [key for key in logged if key.startswith(("dare", "loss"))]
        numbers = {key: torch.tensor(logged[key]) for key in kept}
        print("processes:", trainer.accelerator.num_processes)
        save_file({**trained_parameters(model), **numbers}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_processes()
    left = [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
    sys.exit(f"DDP outlived its group: {left}" if left else 0)
