"""Training routers with HF's Trainer, or with one built on it (TRL's SFTTrainer)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from dare_hf.engine.attach import state_of
from dare_hf.errors import DareConfigError, DareStateError
from dare_hf.training.auxiliary import auxiliary_loss
from dare_hf.training.checkpoints import attached, load_adapters, save_adapters
from dare_hf.training.fsdp import fsdp_kind, take_buffers_of_first, written_as
from dare_hf.training.quantized import keep_gradients_right
from dare_hf.training.schedule import TemperatureSchedule

if TYPE_CHECKING:
    from torch import Tensor

ROUTER_LR = 1e-3
RATE_LR = 1e-2


class DareTrainerMixin:
    """Adds DARE's part to a Trainer: ``class MyTrainer(DareTrainerMixin, SFTTrainer): ...``.

    The task loss is the other class's. This one adds the auxiliary loss of every batch to it, so
    that a step's sum is the mean over all rows of the step, however they are dealt to micro-batches
    and processes; gives routers and rates their learning rates; moves the temperature; logs each
    part as ``dare/<part>``, and the mean rates.

    A batch may have `hop_ids` [B, S] beside its labels; `remove_unused_columns=False` lets a
    dataset's column of that name through. A model without routers trains on the task loss alone.
    Over TRL's GRPOTrainer and RLOOTrainer, log-probabilities are those of the run that sampled.

    Checkpoints hold every adapter, routers and LoRA: those transformers attached each in a folder
    of its name, a PeftModel's as peft saves them. `resume_from_checkpoint` and
    `load_best_model_at_end` load them all back.

    Args:
        args: As the other class takes them.
        router_lr: Learning rate of router weights and biases, at the schedule's peak.
        rate_lr: Learning rate of learned rates.
        kwargs: As the other class takes them.

    Raises:
        DareConfigError: Label smoothing is asked for.

    Source: docs/method.md, section 7.
    """

    def __init__(
        self, *args: Any, router_lr: float = ROUTER_LR, rate_lr: float = RATE_LR, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.label_smoothing_factor:
            raise DareConfigError(
                "label_smoothing_factor: expected 0, since transformers smooths the loss of "
                "image-text models against unshifted labels; got "
                f"{trainer.args.label_smoothing_factor}. Leave it out"
            )
        self.router_lr, self.rate_lr = router_lr, rate_lr
        self._step_rows = 0
        self._sums: Tensor | None = None
        self._names: list[str] = []
        keep_gradients_right(trainer.model)
        state_of(trainer.model)  # a model without DARE is refused now, not at the first step
        trainer.add_callback(TemperatureSchedule())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The other class's optimiser, with routers and rates in groups of their own."""
        trainer: Any = self
        given = trainer.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)  # ty: ignore[missing-attribute]
        if not given:
            _regroup(trainer.model, optimizer, self.router_lr, self.rate_lr)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step; their rows are counted, over all processes."""
        trainer: Any = self
        samples, items = super().get_batch_samples(*args, **kwargs)  # ty: ignore[missing-attribute]
        each = trainer.args.per_device_train_batch_size  # of trainers that make their batches later
        rows = torch.tensor(sum(_rows(b) if hasattr(b, "get") else each for b in samples))
        if trainer.args.world_size > 1:
            rows = trainer.accelerator.gather(rows.to(trainer.args.device)).sum()
        self._step_rows = int(rows)
        return samples, items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The other class's loss, plus this batch's share of the step's auxiliary loss."""
        trainer: Any = self
        inputs = dict(inputs)
        rows, hop_ids = _rows(inputs), inputs.pop("hop_ids", None)
        plain = trainer.accelerator.unwrap_model(model)
        controller = state_of(plain).controller
        if trainer.is_fsdp_enabled and model.training and controller.routers is not None:
            take_buffers_of_first(controller.routers)
        with controller.teach(labels=inputs.get("labels"), hop_ids=hop_ids):
            found = super().compute_loss(  # ty: ignore[missing-attribute]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        loss, outputs = found if return_outputs else (found, None)
        if controller.record is not None and controller.record.layers and not controller.disabled:
            extra, parts = auxiliary_loss(plain)
            if model.training:
                share = rows / max(self._step_rows, rows)
                self._note(share, parts, controller)
                scale = share * trainer.accelerator.num_processes
                if not self._scaled(num_items_in_batch):
                    scale *= trainer.current_gradient_accumulation_steps
                extra = extra * scale
            loss = loss + extra.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """TRL's (GRPO, RLOO; 1.16): the last `logits_to_keep` columns were sampled."""
        trainer: Any = self
        controller = state_of(trainer.accelerator.unwrap_model(model)).controller
        with controller.teach(sampled_columns=logits_to_keep):
            return super()._get_per_token_logps_and_entropies(  # ty: ignore[missing-attribute]
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer takes the loss as a share of the step already (transformers 5.23)."""
        trainer: Any = self
        if trainer.loss_is_scaled_for_ga is not None:
            return trainer.loss_is_scaled_for_ga
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or trainer.compute_loss_func is not None

    def _note(self, share: float, parts: dict[str, Tensor], controller: Any) -> None:
        """Add a micro-batch's parts to what the next log will say."""
        rates = torch.stack(controller.record.rates).detach().mean((0, 1))
        named = {name: part.detach() for name, part in parts.items()}
        named |= {"rate_text": rates[0], "rate_vision": rates[1]}
        self._names = list(named)
        values = torch.stack([*named.values(), torch.ones_like(rates[0])]) * share
        self._sums = values if self._sums is None else self._sums + values

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the parts beside the loss, each as its mean over the steps since the last log."""
        trainer: Any = self
        if "loss" in logs and self._sums is not None:
            sums = self._sums
            if trainer.args.world_size > 1:
                sums = trainer.accelerator.reduce(sums, reduction="sum")
            *values, steps = sums.tolist()
            logs |= {f"dare/{n}": v / steps for n, v in zip(self._names, values, strict=True)}
            logs["dare/tau"] = state_of(trainer.model).controller.tau
            self._sums = None
        super().log(logs, *args, **kwargs)  # ty: ignore[missing-attribute]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a checkpoint; transformers would save one adapter only, or stop at a second."""
        trainer: Any = self
        if not attached(trainer.model):
            super()._save(output_dir, state_dict)  # ty: ignore[missing-attribute]
            return
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        save_adapters(trainer.model, folder, trainer.args.should_save)
        if trainer.args.should_save:
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights into the model."""
        trainer: Any = self
        found = fsdp_kind(resume_from_checkpoint)
        if found is not None and not trainer.is_fsdp_enabled:
            raise DareStateError(
                f"checkpoint: expected one of a run without FSDP; got {resume_from_checkpoint}, "
                "whose optimizer's state FSDP wrote. Resume with the fsdp options it was written "
                "with; adapters in folders of their own there can be loaded for a new run"
            )
        if self._sharded() or not getattr(trainer.model, "peft_config", None):
            with written_as(found, trainer.accelerator):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # ty: ignore[missing-attribute]
        else:
            load_adapters(trainer.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what a checkpoint holds beside the weights."""
        trainer: Any = self
        with written_as(checkpoint and fsdp_kind(checkpoint), trainer.accelerator):
            super()._load_optimizer_and_scheduler(checkpoint)  # ty: ignore[missing-attribute]

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights into the model."""
        trainer: Any = self
        if self._sharded() or not getattr(trainer.model, "peft_config", None):
            super()._load_best_model()  # ty: ignore[missing-attribute]
        else:
            load_adapters(trainer.model, trainer.state.best_model_checkpoint)

    def _sharded(self) -> bool:
        """FSDP and DeepSpeed gather and load a model their own way."""
        trainer: Any = self
        return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


class DareTrainer(DareTrainerMixin, Trainer):
    """HF's Trainer with DARE's auxiliary losses; see DareTrainerMixin."""


def _rows(batch: Any) -> int:
    """Rows of a batch."""
    names = ("labels", "input_ids", "inputs_embeds", "completion_ids")
    tokens = (batch.get(name) for name in names)
    return next((len(value) for value in tokens if value is not None), 0)


def _regroup(model: Any, optimizer: Any, router_lr: float, rate_lr: float) -> None:
    """Move the parameters of routers to groups with learning rates of their own."""
    named = list(model.named_parameters())
    routers = {id(p) for name, p in named if "dare_" in name}
    rates = {id(p) for name, p in named if "dare_" in name and name.endswith("rate_logits")}
    kinds = ((routers - rates, router_lr), (rates, rate_lr))
    fresh = []
    for group in optimizer.param_groups:
        for kind, rate in kinds:
            mine = [p for p in group["params"] if id(p) in kind]
            if mine:
                options = {key: value for key, value in group.items() if key != "params"}
                # a rate that decays to 0 would be a rate of one half
                decay = 0.0 if kind is rates else options.get("weight_decay", 0.0)
                fresh.append(options | {"params": mine, "lr": rate, "weight_decay": decay})
        group["params"] = [p for p in group["params"] if id(p) not in routers]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in fresh:
        optimizer.add_param_group(group)
