"""The mixin over TRL's SFTTrainer: a processor, pixels and injected spans of an embedded model."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="an extra: dare-hf[train]")
    datasets = pytest.importorskip("datasets", reason="an extra: dare-hf[train]")

from peft import get_peft_model
from router_runs import controller_of

from dare_hf import DareConfig
from dare_hf.demo.embedded import load_embedded
from dare_hf.tasks import scene, teaching
from dare_hf.training import DareTrainerMixin, auxiliary_loss

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]


def test_sft_trainer_adds_the_auxiliary_loss(tmp_path):
    class Ours(DareTrainerMixin, trl.SFTTrainer):
        pass

    model, processor = load_embedded("volcano")
    items = scene.sample(4, "easy", seed=3)
    config = DareConfig(scorer="router", schedule="learned", max_hops=4)
    routed = get_peft_model(model, config)
    batch = teaching.batch(model, processor, items)
    routed.train()
    task = routed(**batch).loss.item()
    extra, parts = auxiliary_loss(routed)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = Ours(
        model=routed,
        args=arguments,
        processing_class=processor,
        train_dataset=datasets.Dataset.from_list([{"index": index} for index in range(4)]),
        data_collator=lambda rows: teaching.batch(
            model, processor, [items[row["index"]] for row in rows]
        ),
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert controller_of(routed).record.seen.shape[1] >= 3, "no injected span was counted"
    assert entry["loss"] == pytest.approx(task + extra.item(), rel=1e-3)
    for name, part in parts.items():
        assert entry[f"dare/{name}"] == pytest.approx(part.item(), rel=1e-3, abs=1e-6)
