"""PEFT adapters: `get_peft_model(model, LoR2CConfig(...))`, and acceleration of adapters that PEFT already made.

Importing this module registers the peft_type strings "LOR2C", "LILY_FAST" and "EFFILORA" with PEFT, so that
`PeftModel.from_pretrained` finds them.
"""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .accelerate import AccelerationReport, accelerate_adapters, restore_adapters
from .config import EffiLoRAConfig, LilyConfig, LoR2CConfig
from .effilora import EffiLoRAModel, effilora_reducer
from .export import calibrate, export_lora, uncalibrate
from .lily import LilyModel
from .lor2c import LoR2CModel, lor2c_controller

_METHODS: tuple[tuple[str, Any, Any], ...] = (
    ("LOR2C", LoR2CConfig, LoR2CModel),
    ("LILY_FAST", LilyConfig, LilyModel),
    ("EFFILORA", EffiLoRAConfig, EffiLoRAModel),
)
for _type, _config, _tuner in _METHODS:
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = _tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = _tuner.prefix  # type: ignore[index]

__all__ = [
    "AccelerationReport",
    "EffiLoRAConfig",
    "EffiLoRAModel",
    "LilyConfig",
    "LilyModel",
    "LoR2CConfig",
    "LoR2CModel",
    "accelerate_adapters",
    "calibrate",
    "effilora_reducer",
    "export_lora",
    "lor2c_controller",
    "restore_adapters",
    "uncalibrate",
]
