"""The mixin over TRL's SFTTrainer, which calls the inner model: the auxiliary losses are there."""

from __future__ import annotations

import pytest
import torch
from laws import inputs_of
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dare_hf import DareConfig
from dare_hf.testing import tiny_model
from dare_hf.training import DareTrainerMixin

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]


def rows_of(model):
    """Rows without padding, as a processed dataset has them."""
    batch = inputs_of(model, (1,), pixels=True)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-6] = -100
    return [{name: value[0] for name, value in batch.items()}] * 4


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_sft_trainer_trains_routers_and_logs_the_parts(tmp_path):
    class Trainer(DareTrainerMixin, trl.SFTTrainer):
        pass

    model = get_peft_model(tiny_model("llava"), DareConfig(scorer="router", schedule="learned"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = rows_of(model)
    trainer = Trainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"row": k} for k in range(4)]),
        data_collator=lambda rows: collate([data[row["row"]] for row in rows]),
        processing_class=_tokenizer(),
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "dare/soft_vision" in entry]
    assert len(entries) == 2
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("dare_" in name for name in moved)


def _tokenizer():
    """What SFTTrainer asks for even where the data needs no preparation."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
