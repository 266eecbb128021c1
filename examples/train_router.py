"""Train routers on a frozen vision-language model, save the adapter, and generate with it.

    python examples/train_router.py

A tiny random model and made-up rows take the place of yours: offline, on a CPU, in seconds. With a
real model, give DareTrainer your dataset and a collator that sets labels to -100 on the prompt.
"""

import tempfile

import torch
from peft import get_peft_model
from transformers import TrainingArguments

from dare_hf import DareConfig, apply_dare, last_report
from dare_hf.testing import collate, tiny_inputs, tiny_model, tiny_rows
from dare_hf.training import DareTrainer

ANSWER = 6  # supervised tokens at the end of each row
HOP_END = 12  # the token that ends a hop of the answer


def rows(model) -> list[dict]:
    """Return rows of one image, a question and an answer of two hops."""
    made = tiny_rows(model, images=[1] * 16, text=20)
    for row in made:
        row["ids"][-ANSWER // 2] = HOP_END
    return made


def main() -> None:
    model = tiny_model("llava")
    config = DareConfig(
        scorer="router",
        schedule="learned",
        vision_retention=0.4,
        text_retention=0.7,
        hop_delimiters=(HOP_END,),
        max_hops=3,
    )
    routed = get_peft_model(model, config)
    routed.print_trainable_parameters()

    def batch(items: list[dict]) -> dict:
        inputs = collate(model, items)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
        return {**inputs, "labels": labels}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=12,
            per_device_train_batch_size=8,
            logging_steps=4,
            save_strategy="no",
            remove_unused_columns=False,  # keeps hop_ids, where a dataset has them
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
        )
        DareTrainer(routed, arguments, train_dataset=rows(model), data_collator=batch).train()
        routed.save_pretrained(folder)
        fresh = tiny_model("llava")
        apply_dare(fresh, folder)

    fresh.generate(**tiny_inputs(fresh), max_new_tokens=8, do_sample=False)
    print(last_report(fresh))


if __name__ == "__main__":
    main()
