"""Checkpoints of routers and a LoRA that transformers attached: all of them, and all come back."""

import shutil

import pytest
import torch
from peft_runs import LEARNED, add_quietly, lora
from router_runs import FIELDS
from test_trainer import logs_of, trained_parameters, trainer_of

from dare_hf import DareConfig
from dare_hf.errors import AdapterMismatchError, DareStateError
from dare_hf.testing import tiny_model
from dare_hf.training import DareTrainer
from dare_hf.training.checkpoints import load_adapters, save_adapters

ORDERS = [("dare",), ("lora", "dare"), ("dare", "lora")]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
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


class Evaluating(DareTrainer):
    """Evaluates on what it trains on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, eval_dataset=kwargs["train_dataset"], **kwargs)


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, names):
    def run(folder, resume=None):
        model = attached_model(names)
        trainer = trainer_of(folder, model, **EVERY_STEP, **RATES)
        trainer.train(resume_from_checkpoint=resume)
        assert model.active_adapters() == list(names)
        return trained_parameters(model), logs_of(trainer)

    whole, logs = run(tmp_path / "whole")
    assert len(whole) == sum(p.requires_grad for p in attached_model(names).parameters())
    resumed, later = run(tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == resumed.keys()
    for name, parameter in whole.items():
        torch.testing.assert_close(resumed[name], parameter, msg=name)
    assert [entry["loss"] for entry in later] == [entry["loss"] for entry in logs]


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_the_best_checkpoint_comes_back(tmp_path, names):
    trainer = trainer_of(
        tmp_path,
        attached_model(names),
        cls=Evaluating,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        per_device_eval_batch_size=4,
        **EVERY_STEP,
        **RATES,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 3
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
