"""The mixin over TRL's SFTTrainer: a processor, pixels and injected spans of an embedded model."""

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="an extra: dare-hf[train]")
    datasets = pytest.importorskip("datasets", reason="an extra: dare-hf[train]")

import torch
from peft import get_peft_model
from peft_runs import learn
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


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_log_probabilities_are_those_of_the_run_that_sampled(tmp_path, kind):
    class Ours(DareTrainerMixin, getattr(trl, f"{kind}Trainer")):
        pass

    model, processor = load_embedded("volcano")
    words = processor.tokenizer
    config = DareConfig(
        scorer="router", schedule="learned", max_hops=4, hop_delimiters=tuple(range(10, 60))
    )
    routed = get_peft_model(model, config)
    learn(routed)
    generator = torch.Generator().manual_seed(0)
    texts = [words.decode(torch.randint(10, 60, (n,), generator=generator)) for n in (14, 9)]
    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Ours(
        model=routed,
        args=arguments,
        processing_class=words,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )
    routed.eval()
    prompts = words(texts, return_tensors="pt", padding=True, padding_side="left")
    prompts.pop("token_type_ids", None)
    assert not prompts["attention_mask"].all()
    out = routed.generate(
        **prompts,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = torch.stack(out.logits, dim=1)
    count = steps.shape[1]
    steps = steps.log_softmax(-1).gather(-1, out.sequences[:, -count:, None])[..., 0]
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(out.sequences[:, -count:])], dim=1)
    for grad, size in ((False, None), (False, 1), (True, None)):
        with torch.set_grad_enabled(grad):
            found = trainer._get_per_token_logps_and_entropies(
                routed, out.sequences, mask, count, batch_size=size
            )[0]
        torch.testing.assert_close(found.detach() * trainer.temperature, steps, atol=1e-3, rtol=0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["dare/ratio_text"] > 0
    assert entry["grad_norm"] > 0
