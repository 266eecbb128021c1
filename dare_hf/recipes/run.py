"""Running a recipe: load, attach, train, save."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from dare_hf.api import apply_dare, remove_dare
from dare_hf.architectures.locate import locate
from dare_hf.assets import model_path
from dare_hf.calibration import fit_router
from dare_hf.config import DareConfig
from dare_hf.demo.embedded import RUNNERS, runner_type
from dare_hf.errors import DareStateError
from dare_hf.forward.modality import vision_token_ids
from dare_hf.generation.interleaved import allow_image_tokens
from dare_hf.recipes.data import ResponseCollator, TaskCollator, datasets_of
from dare_hf.training import DareTrainer
from dare_hf.training.attaching import add_adapter
from dare_hf.training.checkpoints import save_adapters
from dare_hf.training.quantized import keep_gradients_right, quantization_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from dare_hf.recipes.recipe import Recipe

DARE, LORA = "dare", "lora"


@dataclass(frozen=True)
class TrainingResult:
    """What a run left.

    Attributes:
        model: The trained model with its adapters active.
        processor: Its processor.
        folders: Where each adapter was saved, by "dare" and "lora".
        log: The Trainer's log entries.
    """

    model: Any
    processor: Any
    folders: dict[str, str]
    log: list[dict[str, Any]]


class _Told(TrainerCallback):
    """Tells how many steps are done."""

    def __init__(self, tell: Callable[[str, int, int], None]) -> None:
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.tell("steps", state.global_step, state.max_steps)


def train(
    recipe: Recipe,
    resume: bool = False,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainingResult:
    """Train routers, alone or with a LoRA, as a recipe says.

    Under torchrun or `accelerate launch` each process takes `batch_size` rows a step; the first
    one writes the folders, and the others return when it has.

    Args:
        recipe: The run.
        resume: Go on from the last checkpoint in the recipe's folder, to where the whole run would
            have ended; `save_every` writes them.
        progress: Called with ("steps", done, in all), and before with what `fit_router` tells.

    Returns:
        The model and where its adapters were saved: `apply_dare(model, out + "/dare")` loads the
        routers; a LoRA is loaded before, by `model.load_adapter(out + "/lora")`.

    Raises:
        DareError: The recipe, its data or its model cannot be used; the text says why.
    """
    checkpoint = _last_checkpoint(recipe) if resume else None
    set_seed(recipe.seed)
    arguments = _arguments(recipe)
    rows, held_out = datasets_of(recipe, arguments.world_size)  # checked before weights are loaded
    model, processor, delimiters = _load(recipe)
    _attach(model, recipe, delimiters)
    out, collate = Path(recipe.out), _collator(recipe, model, processor)
    trainer = DareTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collate,
        router_lr=recipe.router_lr,
        rate_lr=recipe.rate_lr,
        callbacks=None if progress is None else [_Told(progress)],
    )
    draws = model.config.model_type == "chameleon"
    with allow_image_tokens(model) if draws else nullcontext():
        if not resume and model._dare.controller.routers is not None:
            _start(model, recipe, rows, collate, progress)
        trainer.train(resume_from_checkpoint=checkpoint)
    log = trainer.state.log_history
    folders = _save(model, recipe, out, write=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        _write_log(recipe, log, out / "training_log.jsonl")
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(model.eval(), processor, folders, log)


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a recipe's folder; None without one."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def _last_checkpoint(recipe: Recipe) -> str:
    found = last_checkpoint(recipe.out)
    if found is None:
        raise DareStateError(
            f"resume: expected a checkpoint in {recipe.out!r}; got none. Run without it, and with "
            "save_every (steps between checkpoints) in the recipe"
        )
    return found


def _load(recipe: Recipe) -> tuple[Any, Any, tuple[int, ...]]:
    """Model, processor, and what ends a hop in the tasks of an embedded model."""
    source, delimiters, settings = recipe.model, (), {}
    if recipe.load_in_4bit:
        settings["quantization_config"] = quantization_config()
    if recipe.model in RUNNERS:
        source = str(model_path(runner_type(recipe.model).folder))
    model = AutoModelForImageTextToText.from_pretrained(source, **settings)
    processor = AutoProcessor.from_pretrained(source)
    if recipe.model in RUNNERS:
        delimiters = runner_type(recipe.model).delimiters(processor)
    return model, processor, delimiters


def _attach(model: Any, recipe: Recipe, delimiters: tuple[int, ...]) -> None:
    """Put the adapters of a recipe on the model; only they are trained."""
    from peft import LoraConfig

    model.requires_grad_(False)
    keep_gradients_right(model)
    names = []
    if recipe.lora is not None:
        add_adapter(model, LoraConfig(**(_lora_defaults(model) | recipe.lora)), LORA)
        names.append(LORA)
    config = recipe.dare_config(delimiters)
    if config.scorer == "router":
        with warnings.catch_warnings():  # peft asks whether a second adapter is meant: it is
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            add_adapter(model, config, DARE)
        names.append(DARE)
        model.set_adapter(names)
    else:
        apply_dare(model, config)


def _start(model: Any, recipe: Recipe, rows: Any, collate: Any, progress: Any) -> None:
    """Where fresh routers and rates begin: equal rates, a fit to the first rows, as asked for."""
    controller, most = model._dare.controller, math.log(1 / recipe.rate_margin - 1)
    config = controller.config
    if recipe.equal_rates and config.learns_rates:
        targets = torch.tensor([config.text_retention, config.vision_retention]).logit()
        with torch.no_grad():
            for router in controller.routers:
                router.rate_logits.copy_(targets.clamp(-most, most).expand_as(router.rate_logits))
    if recipe.calibrate:
        _calibrate(model, recipe, rows, collate, progress)
        with torch.no_grad():
            for router in controller.routers:
                router.rate_logits.clamp_(-most, most)


def _calibrate(model: Any, recipe: Recipe, rows: Any, collate: Any, progress: Any) -> None:
    """Fit the fresh routers to the first rows."""
    picked = [rows[index] for index in range(min(recipe.calibrate, len(rows)))]
    size = recipe.batch_size
    batches = [collate(picked[k : k + size]) for k in range(0, len(picked), size)]
    batches = [{n: t.to(model.device) for n, t in batch.items()} for batch in batches]
    fit_router(model, batches, fit_rates=not recipe.equal_rates, progress=progress)


def _lora_defaults(model: Any) -> dict[str, Any]:
    """All linear maps of the decoder layers, by their full names: no vision tower, no head."""
    anatomy = locate(model)
    spots = {id(layer) for layer in anatomy.layers}
    inside = [name for name, module in model.named_modules() if id(module) in spots]
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    names = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in linear and name.startswith(tuple(f"{i}." for i in inside))
    ]
    return {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": names}


def _arguments(recipe: Recipe) -> TrainingArguments:
    return TrainingArguments(
        output_dir=recipe.out,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=recipe.warmup,
        weight_decay=0.0,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        **_checkpointing(recipe),
        logging_steps=max(min(20, recipe.steps), 1),
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=2,
        eval_strategy="steps" if recipe.validate else "no",
        eval_steps=recipe.save_every or None,
        per_device_eval_batch_size=recipe.batch_size,
        prediction_loss_only=True,
        load_best_model_at_end=bool(recipe.validate),
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    """The argument by its newer name where there is one (transformers 5.23)."""
    known = {one.name for one in fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True} if recipe.gradient_checkpointing else {}


def _collator(recipe: Recipe, model: Any, processor: Any) -> Any:
    if recipe.data is None:
        return TaskCollator(model, processor)
    config: DareConfig = model._dare.controller.config
    return ResponseCollator(processor, vision_token_ids(model.config, config.image_token_ids))


def _save(model: Any, recipe: Recipe, out: Path, write: bool) -> dict[str, str]:
    """Save each adapter in a folder of its own, in the one process that is to `write`."""
    kinds = [LORA] if recipe.lora is not None else []
    if model._dare.controller.routers is not None:
        kinds.append(DARE)
    else:
        remove_dare(model)
    if kinds:
        save_adapters(model, out, write)
    return {name: str(out / name) for name in kinds}


def _write_log(recipe: Recipe, log: list[dict[str, Any]], file: Path) -> None:
    """One JSON line each: the recipe, then what the Trainer logged."""
    lines = [json.dumps(entry) for entry in ({"recipe": asdict(recipe)}, *log)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
