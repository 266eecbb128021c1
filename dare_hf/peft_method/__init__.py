"""DARE's routers as a method of peft, registered when dare_hf is imported."""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from dare_hf.config import DareConfig
from dare_hf.config.fields import PEFT_TYPE
from dare_hf.peft_method.layer import RouterLayer
from dare_hf.peft_method.tuner import PREFIX, DareTuner

# peft.utils.register_peft_method takes members of peft's own enum only (0.21)
_KEY: Any = PEFT_TYPE
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = DareConfig
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = PREFIX
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = DareTuner

__all__ = ["DareTuner", "RouterLayer"]
