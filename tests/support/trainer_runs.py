"""A DareTrainer on a tiny model: made, run, and what it logged."""

import functools

import torch
from laws import rows_of
from peft import get_peft_model
from router_runs import FIELDS, controller_of, sharpen
from transformers import TrainingArguments

from dare_hf import DareConfig
from dare_hf.testing import collate, tiny_model
from dare_hf.training import (
    DareTrainer,
)

SUPERVISED = 7


class Items(torch.utils.data.Dataset):
    """Rows with a prompt, seven supervised tokens and a hop that ends among them."""

    def __init__(self, model, images):
        self.rows = rows_of(model, images, text=[20 + i for i in range(len(images))])
        for row in self.rows:
            row["ids"][-3] = FIELDS["hop_delimiters"][0]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def together(model, rows, *, hop_ids=False, supervised=None):
    """A training batch; by default each row supervises another number of tokens."""
    batch = collate(model, rows)
    labels = torch.full_like(batch["input_ids"], -100)
    for index, row in enumerate(rows):
        count = supervised or SUPERVISED - len(row["ids"]) % 3
        labels[index, -count:] = batch["input_ids"][index, -count:]
    batch["labels"] = labels
    if hop_ids:
        batch["hop_ids"] = (labels != -100).long()
    return batch


def routed_model(name="llava", base=None, **fields):
    options = {"scorer": "router", "schedule": "learned", **FIELDS, **fields}
    model = get_peft_model(base or tiny_model(name), DareConfig(**options))
    sharpen(controller_of(model).routers)
    return model


def trainer_of(folder, model, images=(1, 0, 2, 1), cls=DareTrainer, collator=None, **kwargs):
    mine = {"router_lr", "rate_lr"} & set(kwargs)
    own = {key: kwargs.pop(key) for key in mine}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        **kwargs,
    }
    return cls(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=Items(inner, images),
        data_collator=collator or functools.partial(together, inner),
        **own,
    )


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trained_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
