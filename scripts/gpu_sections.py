"""The sections of scripts/gpu_check.py: each returns the rows of a table."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, CompileConfig
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from dare_hf.benchmark import batch, decode, hops, memory, operations, prefill, runner
from dare_hf.benchmark.checked import verify
from dare_hf.benchmark.figures import kv_figures, timed
from dare_hf.benchmark.race import race, run_once
from dare_hf.benchmark.systems import (
    PLAIN,
    PRUNED,
    STATIC,
    WHOLE,
    Subject,
    System,
    on_systems,
    random_subject,
)
from dare_hf.training.quantized import quantization_config

if TYPE_CHECKING:
    from gpu_shapes import Shapes

    from dare_hf.benchmark.random_llava import Setting

Rows = list[dict[str, Any]]
_WARM_UP = 4  # tokens before the timed steps


class Check:
    """The sections, and the large model they share."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The large model, made when it is first needed."""
        if self._subject is None:
            self._subject = random_subject(self.shapes.large)
        return self._subject

    def tidy(self) -> None:
        """Give back what a section has left behind."""
        if self.shapes.large.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()

    def laws(self) -> Rows:
        """Tokens, logits and kept tokens against the masked oracle, by attention and dtype."""
        cases = [("sdpa", "float32"), ("sdpa", "bfloat16")]
        if self.shapes.law.device != "cpu" and is_flash_attn_2_available():
            cases.append(("flash_attention_2", "bfloat16"))
        rows: Rows = []
        for attn, dtype in cases:
            setting = replace(self.shapes.law, attn=attn, dtype=dtype)
            subject = random_subject(setting)
            for module, ragged in ((decode, False), (decode, True), (hops, False)):
                here = replace(setting, ragged=ragged, batch=3 if ragged else 1)
                found = runner.run_at(subject, module, here, None)
                name = "hops" if module is hops else "ragged" if ragged else "alone"
                held = sorted({row["checked"] for row in found})
                rows.append({"attn": attn, "dtype": dtype, "rows": name, "held": ", ".join(held)})
        return rows

    def first_token(self) -> Rows:
        """Time to the first token."""
        return self._series(prefill, self.shapes.lengths, (1,))

    def decode(self) -> Rows:
        """A decode step."""
        return self._series(decode, (self.shapes.decode,), self.shapes.batches, self.shapes.steps)

    def largest_batch(self) -> Rows:
        """Rows that a generate of three tokens takes in a fixed room beside the weights."""
        setting = replace(self.shapes.large, tokens=self.shapes.decode)
        with on_systems(self.subject, (PLAIN, WHOLE, PRUNED)) as systems:
            return [self._largest(system, setting) for system in systems]

    def peak_memory(self) -> Rows:
        """The most that the allocator had out beside the weights."""
        setting = replace(self.shapes.large, tokens=self.shapes.lengths[1])
        with on_systems(self.subject, memory.NAMES) as systems:
            rows = memory.allocated(self.subject, systems, setting)
        return [
            {"system": name, "tokens": setting.tokens, **row}
            for name, row in zip(memory.NAMES, rows, strict=True)
        ]

    def compiled(self) -> Rows:
        """A decode step as one graph, or that there is none yet."""
        law = random_subject(self.shapes.law)
        with on_systems(law, (PRUNED,)) as (small,):
            if not _compiles(small, law.inputs(self.shapes.law)):
                return [{"system": PRUNED, "compiled": "not built: generate runs it eagerly"}]
        setting = replace(self.shapes.large, tokens=self.shapes.decode)
        inputs = self.subject.inputs(setting)
        with on_systems(self.subject, (PLAIN, PRUNED)) as (plain, pruned):
            options = {"compile_config": CompileConfig(fullgraph=False, mode="reduce-overhead")}
            fast = replace(pruned, name=f"{PRUNED}_compiled", options=options)
            raced = (plain, pruned, fast)
            outcomes = race(raced, inputs, _WARM_UP + self.shapes.steps, **self.subject.options)
        steps = [one.seconds[_WARM_UP:] for one in outcomes]
        same = bool(torch.equal(outcomes[1].ids, outcomes[2].ids))
        return [
            {"system": one.name, **timed(own, steps[0]), "tokens_as_eager": same}
            for one, own in zip(raced, steps, strict=True)
        ]

    def nf4(self) -> Rows:
        """The same on a backbone in nf4, through a file, where bitsandbytes is installed."""
        self._subject = None
        self.tidy()
        if not is_bitsandbytes_available():
            return [{"nf4": "bitsandbytes is not installed"}]
        setting = replace(self.shapes.large, layers=self.shapes.nf4_layers)
        subject = random_subject(setting)
        with tempfile.TemporaryDirectory() as folder:
            subject.model.save_pretrained(folder)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, quantization_config=quantization_config(), device_map=setting.device
            ).eval()
        model.generation_config.eos_token_id = None
        subject = replace(subject, model=model)
        inputs = subject.inputs(setting)
        with on_systems(subject, (PLAIN, WHOLE, PRUNED)) as systems:
            outcomes = race(systems, inputs, _WARM_UP + self.shapes.steps, **subject.options)
            short = replace(setting, tokens=max(setting.check_tokens // 4, 20))
            given = subject.inputs(short)
            held = [
                verify(subject, one, given, run_once(one, given, _WARM_UP, **subject.options))
                for one in systems
            ]
        steps = [one.seconds[_WARM_UP:] for one in outcomes]
        return [
            {
                "system": systems[i].name,
                "layers": setting.layers,
                **timed(steps[i], steps[0]),
                **kv_figures(outcomes[i], outcomes[0]),
                "checked": held[i],
            }
            for i in range(len(systems))
        ]

    def operations(self) -> Rows:
        """Operations, and waits of the host for the device, that one more layer costs."""
        return operations.per_layer(self.shapes.law, (PLAIN, STATIC, WHOLE, PRUNED))

    def _series(
        self, module: Any, lengths: tuple[int, ...], batches: tuple[int, ...], pairs: int = 0
    ) -> Rows:
        rows: Rows = []
        for tokens in lengths:
            for many in batches:
                setting = replace(self.shapes.large, tokens=tokens, batch=many)
                setting = replace(setting, pairs=pairs or setting.pairs)
                rows += runner.run_at(self.subject, module, setting, None)
        return rows

    def _largest(self, system: System, setting: Setting) -> dict[str, Any]:
        def fits(rows: int) -> bool:
            return self._fits(system, replace(setting, batch=rows))

        return {
            "system": system.name,
            "tokens": setting.tokens,
            "room_bytes": self.shapes.room,
            "largest_batch": batch.largest_batch(fits, self.shapes.most),
            "most_tried": self.shapes.most,
        }

    def _fits(self, system: System, setting: Setting) -> bool:
        """Whether a generate of so many rows stays in the room."""

        def run() -> None:
            run_once(system, self.subject.inputs(setting), 3, **self.subject.options)

        if setting.device == "cpu":
            return memory.peak_bytes(run) <= self.shapes.room
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_allocated() + self.shapes.room) / total)
        )
        try:
            run()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return True


def _compiles(system: System, inputs: dict[str, Any]) -> bool:
    """Whether generate compiles a decode step of DARE when it is asked to."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=False, mode=None, backend="eager")
    config._compile_all_devices = True
    run_once(system, inputs, 4, compile_config=config)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
