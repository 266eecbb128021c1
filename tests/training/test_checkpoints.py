"""Checkpoints of routers and a LoRA that transformers attached: all of them, and all come back."""

import shutil

import pytest
import torch
from peft import get_peft_model
from peft_runs import LEARNED, add_quietly, lora
from router_runs import FIELDS
from trainer_runs import logs_of, trained_parameters, trainer_of

from dare_hf import DareConfig
from dare_hf.errors import AdapterMismatchError, DareStateError
from dare_hf.testing import tiny_model
from dare_hf.training import DareTrainer
from dare_hf.training.checkpoints import load_adapters, save_adapters

ORDERS = [("dare",), ("lora", "dare"), ("dare", "lora")]
WRAPPED = [("default",), ("mine",), ("mine", "default"), ("default", "tuned"), ("mine", "tuned")]
"""Names of a PeftModel's routers, and of the LoRA it is wrapped in."""
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
RATES = {"learning_rate": 0.5, "router_lr": 0.5, "rate_lr": 0.5}


def attached_model(names, **fields):
    """A frozen llava, adapters by model.add_adapter, all active; layer 0's rates do not learn."""
    model = tiny_model("llava").requires_grad_(False)
    configs = {"dare": DareConfig(**{**LEARNED, **FIELDS}), "lora": lora(**fields)}
    for name in names:
        add_quietly(model, configs[name], name)
    model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        kept = "layers.0.dare" in name and name.endswith("rate_logits")
        parameter.requires_grad_(not kept and ("dare_" in name or "lora_" in name))
    return model


def wrapped_model(names):
    """A PeftModel with routers, or with a LoRA around a model that has them; all of it learns."""
    router = DareConfig(**{**LEARNED, **FIELDS})
    model = tiny_model("llava")
    torch.manual_seed(0)
    if len(names) == 1:
        return get_peft_model(model, router, names[0])
    add_quietly(model, router, names[0])
    model = get_peft_model(model, lora(), names[1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("dare_" in name or "lora_" in name)
    return model


class Evaluating(DareTrainer):
    """Evaluates on what it trains on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, eval_dataset=kwargs["train_dataset"], **kwargs)


def made(names, wrap):
    return wrapped_model(names) if wrap else attached_model(names)


EACH = pytest.mark.parametrize(
    ("names", "wrap"),
    [(names, wrap) for wrap, each in ((False, ORDERS), (True, WRAPPED)) for names in each],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else ("attached", "peft")[value],
)


@EACH
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, names, wrap):
    def run(folder, resume=None):
        model = made(names, wrap)
        trainer = trainer_of(folder, model, **EVERY_STEP, **RATES)
        trainer.train(resume_from_checkpoint=resume)
        assert wrap or model.active_adapters() == list(names)
        return trained_parameters(model), logs_of(trainer)

    whole, logs = run(tmp_path / "whole")
    assert len(whole) == sum(p.requires_grad for p in made(names, wrap).parameters())
    resumed, later = run(tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == resumed.keys()
    for name, parameter in whole.items():
        torch.testing.assert_close(resumed[name], parameter, msg=name)
    assert [entry["loss"] for entry in later] == [entry["loss"] for entry in logs]


@EACH
def test_the_best_checkpoint_comes_back(tmp_path, names, wrap):
    """One learning rate after another, so that the last step is the worst."""
    trainer = trainer_of(
        tmp_path,
        made(names, wrap),
        cls=Evaluating,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        label_names=["labels"],
        per_device_eval_batch_size=4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        **EVERY_STEP,
        **dict.fromkeys(RATES, 5.0),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1] - 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    save_adapters(attached_model(["lora", "dare"]), tmp_path)
    wider = attached_model(["lora", "dare"], r=3)
    before = trained_parameters(wider)
    with pytest.raises(AdapterMismatchError, match="shape"):
        load_adapters(wider, tmp_path)
    shutil.rmtree(tmp_path / "dare")
    model = attached_model(["dare", "lora"])
    with pytest.raises(DareStateError, match="expected the adapter 'dare'"):
        load_adapters(model, tmp_path)
    for name, parameter in trained_parameters(wider).items():
        assert torch.equal(parameter, before[name]), name
