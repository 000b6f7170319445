"""Which adapter of a PEFT model a function or a controller is for."""

from __future__ import annotations

from typing import Any


def adapter_of(model: Any, adapter_name: str | None) -> str:
    """`adapter_name`, or the active adapter of a PEFT model; ValueError if `model` is none."""
    if adapter_name is not None:
        return adapter_name
    if not hasattr(model, "active_adapter"):
        raise ValueError(f"needs a PEFT model with an adapter; got a {type(model).__name__}")
    return str(model.active_adapter)


def config_of(model: Any, adapter_name: str) -> Any:
    """The configuration of one adapter of a PEFT model; ValueError if there is none of that name."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"no adapter {adapter_name!r}; the model has {', '.join(map(repr, configs)) or 'none'}")
    return configs[adapter_name]


def adapter_of_kind(caller: str, model: Any, adapter_name: str | None, kind: type) -> tuple[str, Any]:
    """Name (the active adapter's by default) and configuration of the adapter that `caller` is to drive.

    Raises: TypeError if `model` has no PEFT adapters or the adapter's configuration is not a `kind`; ValueError if
        there is no adapter of that name.
    """
    if not getattr(model, "peft_config", None) or not isinstance(model.peft_config, dict):
        raise TypeError(f"{caller}: needs a PEFT model with an adapter of {kind.__name__}; got {type(model).__name__}")
    name = adapter_of(model, adapter_name)
    config = config_of(model, name)
    if not isinstance(config, kind):
        raise TypeError(
            f"{caller}: adapter {name!r} must be one of {kind.__name__}; it is one of {type(config).__name__}"
        )
    return name, config
