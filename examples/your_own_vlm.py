"""Your own vision-language model: load it, prune it, and compare its answers with the plain ones.

    python examples/your_own_vlm.py MODEL_DIR IMAGE "What is left of the cup?"

MODEL_DIR is a directory (or hub id) that AutoModelForImageTextToText and AutoProcessor can load.
Without arguments a tiny random model, saved to a temporary directory, takes its place: offline,
on a CPU, in seconds.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from dare_hf import DareConfig, apply_dare, last_report, remove_dare
from dare_hf.errors import DareError
from dare_hf.testing import tiny_inputs, tiny_model

RETENTIONS = (1.0, 0.75, 0.5, 0.25)  # share of vision tokens a layer keeps, mean over layers


def load(arguments: list[str]) -> tuple:
    """Return model, inputs, and a function that turns new token ids into text."""
    if not arguments:
        with tempfile.TemporaryDirectory() as directory:
            tiny_model("qwen2_5_vl", layers=12).save_pretrained(directory)
            model = AutoModelForImageTextToText.from_pretrained(directory)
        return model, tiny_inputs(model, pixels=True), lambda ids: str(ids.tolist())
    directory, image, question = arguments
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image", "path": str(Path(image))}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    return model, inputs, lambda ids: processor.decode(ids, skip_special_tokens=True)


def main() -> None:
    model, inputs, text_of = load(sys.argv[1:])
    prompt_length = inputs["input_ids"].shape[1]
    for retention in RETENTIONS:
        config = DareConfig(vision_retention=retention, text_retention=1.0)
        try:
            apply_dare(model, config)
        except DareError as error:  # says what was expected, what it got, and what to do
            sys.exit(f"this model stays as it is: {error}")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        report = last_report(model)
        saved = 1 - report.kv_bytes / report.kv_bytes_baseline
        print(f"vision {retention:4.0%}  KV saved {saved:4.0%}  {text_of(ids[0, prompt_length:])}")
        remove_dare(model)


if __name__ == "__main__":
    main()
