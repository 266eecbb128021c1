"""DareTrainer: the losses add up however a step is cut, and a run goes on where it stopped."""

import math

import pytest
import torch
from laws import checkpoints_inside
from peft import LoraConfig, get_peft_model
from router_runs import FIELDS, controller_of
from trainer_runs import logs_of, routed_model, together, trained_parameters, trainer_of
from transformers import Trainer

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.errors import DareConfigError, DareStateError
from dare_hf.testing import tiny_model
from dare_hf.training import (
    DareTrainer,
    DareTrainerMixin,
    auxiliary_loss,
    cosine_temperature,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def steps_of(tmp_path, **kwargs):
    """Parameters and logs after two SGD steps, whose size is the gradient's."""
    model = routed_model()
    options = {"optim": "sgd", "router_lr": 0.1, "rate_lr": 0.1, "max_grad_norm": 0.0}
    trainer = trainer_of(tmp_path, model, **options, lr_scheduler_type="constant", **kwargs)
    trainer.train()
    return trained_parameters(model), logs_of(trainer)


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, size):
    whole, logs = steps_of(tmp_path)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    parts, other = steps_of(tmp_path, **cut)
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=2e-4, atol=2e-5, msg=name)
    for left, right in zip(logs, other, strict=True):
        for key in ("loss", "dare/ratio_text", "dare/soft_vision", "dare/hard_vision"):
            assert right[key] == pytest.approx(left[key], rel=1e-3), key


def test_the_loss_is_the_sum_and_every_part_is_logged(tmp_path):
    model = routed_model()
    trainer = trainer_of(tmp_path, model, max_steps=1)
    batch = together(model.get_base_model(), trainer.train_dataset.rows)
    model.train()
    task = model(**batch).loss.item()
    extra, parts = auxiliary_loss(model)
    trainer.train()
    (entry,) = logs_of(trainer)
    assert entry["loss"] == pytest.approx(task + extra.item(), rel=1e-4)
    for name, part in parts.items():
        assert part > 0, name
        assert entry[f"dare/{name}"] == pytest.approx(part.item(), rel=1e-4)
    assert 0 < entry["dare/rate_vision"] < 1
    assert entry["dare/tau"] == 1.0


def test_training_moves_rates_and_scores_to_their_targets(tmp_path):
    """Without a task, from rates far off; the backbone does not move."""
    model = routed_model(vision_retention=0.3, text_retention=0.8)
    backbone = {k: v.clone() for k, v in model.state_dict().items() if "dare_" not in k}
    options = {"max_steps": 16, "rate_lr": 0.15, "router_lr": 0.05, "lr_scheduler_type": "constant"}

    class Taskless(DareTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * 0 + auxiliary_loss(self.model)[0]

    trainer = trainer_of(tmp_path, model, cls=Taskless, **options)
    trainer.train()
    first, *_, last = logs_of(trainer)
    for kind, target in (("vision", 0.3), ("text", 0.8)):
        name = f"dare/rate_{kind}"
        assert abs(last[name] - target) < 0.5 * abs(first[name] - target), kind
    for key, tensor in model.state_dict().items():
        assert "dare_" in key or torch.equal(tensor, backbone[key]), key


def test_routers_and_rates_have_their_own_learning_rates(tmp_path):
    model = routed_model()
    norm = model.get_base_model().model.language_model.norm.weight
    norm.requires_grad_(True)
    trainer = trainer_of(tmp_path, model, learning_rate=5e-5, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    rates = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(named)
    for name, parameter in named.items():
        group = rates[id(parameter)]
        if name.endswith("rate_logits"):
            assert (group["lr"], group["weight_decay"]) == (1e-2, 0.0)
        elif "dare_" in name:
            assert group["lr"] == 1e-3
        else:
            assert group["lr"] == 5e-5


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    def run(folder, resume=None, **kwargs):
        model = routed_model(selector="gumbel")
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **kwargs}
        trainer = trainer_of(folder, model, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trained_parameters(model), logs_of(trainer)

    whole, logs = run(tmp_path / "whole")
    resumed, later = run(tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in whole.items():
        torch.testing.assert_close(resumed[name], parameter, msg=name)
    taus = [entry["dare/tau"] for entry in logs]
    assert taus == [cosine_temperature(step / 4, 1.0, 0.2) for step in range(4)]
    assert [entry["dare/tau"] for entry in later[-2:]] == taus[2:]


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, pytest.param({"gradient_checkpointing": True}, marks=checkpoints_inside)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_modes_of_the_trainer_train(tmp_path, options):
    model = routed_model()
    before = trained_parameters(model)
    trainer = trainer_of(tmp_path, model, **options)
    trainer.train()
    for entry in logs_of(trainer):
        assert math.isfinite(entry["loss"])
        assert math.isfinite(entry["grad_norm"])
    after = trained_parameters(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_evaluation_is_the_same_loss(tmp_path):
    model = routed_model()
    trainer = trainer_of(tmp_path, model, per_device_eval_batch_size=4)
    batch = together(model.get_base_model(), trainer.train_dataset.rows)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss + auxiliary_loss(model)[0]
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_hop_ids_reach_the_simulation(tmp_path):
    model = routed_model()
    inner = model.get_base_model()
    trainer = trainer_of(tmp_path, model, collator=lambda rows: together(inner, rows, hop_ids=True))
    trainer.train()
    assert controller_of(model).record.seen.shape[1] == 2
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    assert controller_of(model).record.seen.shape[1] == 3


def test_a_trainer_that_hides_labels_from_the_model(tmp_path):
    """As TRL does: the inner model is called without labels, and the loss made outside."""

    class Outside(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inner = self.accelerator.unwrap_model(model).get_base_model()
            given = {k: v for k, v in inputs.items() if k != "labels"}
            hidden = inner.model(**given).last_hidden_state
            logits, labels = inner.lm_head(hidden)[:, :-1], inputs["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return (loss, {"logits": logits}) if return_outputs else loss

    class Ours(DareTrainerMixin, Outside):
        pass

    found = []
    for cls in (DareTrainer, Ours):
        trainer = trainer_of(tmp_path, routed_model(), cls=cls, max_steps=1)
        trainer.train()
        found.append(logs_of(trainer)[0])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-3)


def test_a_model_without_routers_trains_on_the_task_alone(tmp_path):
    """The arms of a comparison: static scores, the backbone's adapter learns."""
    model = apply_dare(tiny_model("llava"), DareConfig(scorer="random", **FIELDS))
    model.requires_grad_(False)
    model.model.language_model.layers[1].mlp.requires_grad_(True)
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    entry = logs_of(trainer)[0]
    assert not any(key.startswith("dare/") for key in entry)
    assert entry["grad_norm"] > 0
    remove_dare(model)


def test_label_smoothing_and_models_without_dare_are_refused(tmp_path):
    with pytest.raises(DareConfigError, match="label_smoothing"):
        trainer_of(tmp_path, routed_model(), label_smoothing_factor=0.1)
    plain = get_peft_model(tiny_model("llava"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(DareStateError):
        trainer_of(tmp_path, plain)


def test_the_temperature_falls_by_a_cosine():
    assert cosine_temperature(0.0, 1.0, 0.2) == 1.0
    assert cosine_temperature(0.5, 1.0, 0.2) == pytest.approx(0.6)
    assert cosine_temperature(1.0, 1.0, 0.2) == pytest.approx(0.2)
    assert cosine_temperature(7.0, 1.0, 0.2) == pytest.approx(0.2)
