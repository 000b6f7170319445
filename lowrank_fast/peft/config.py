"""Configurations of the three PEFT methods. Fields that PEFT has keep PEFT's names and meanings."""

# ruff: noqa: RUF009  (`_help` is dataclasses.field with the help text)

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from peft.config import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..methods.lor2c_controller import check_schedule
from ..nn.weights import integer, positive


def _help(text: str, default: Any = None, factory: Any = None) -> Any:
    if factory is not None:
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _one_of(owner: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _dropout(owner: str, name: str, value: Any) -> None:
    _finite(owner, name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{owner}: {name} must be in [0, 1); got {value}")


def _finite(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be a finite number; got {value!r}")


class MethodName(str):
    """A `peft_type` that PEFT does not know; `value` is what PEFT reads of its own types, in its error messages."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


# What may change between reading a configuration and loading the tensors beside it.
_NOT_SHAPES = frozenset(("inference_mode", "task_type", "base_model_name_or_path", "revision", "auto_mapping"))


@dataclass
class FastConfig(PeftConfig):
    """What the three have in common; not for use by itself.

    Raises ValueError for `r` below 1, dropout outside [0, 1), factors that are no finite numbers, counts that are no
    integers or too small, `layers_to_transform` with a regex (as PEFT's LoRA does), and where a local checkpoint holds
    no safetensors file: pickled ones are not read.
    """

    r: int = _help("Rank of the update.", 8)
    target_modules: list[str] | str | None = _help("Names of the modules to adapt, or a regex.", None)
    exclude_modules: list[str] | str | None = _help("Names or regex of modules to leave out.", None)
    modules_to_save: list[str] | None = _help("Other modules to train and save, such as a new head.", None)
    layers_to_transform: list[int] | int | None = _help("Indexes of the layers to adapt; all when None.", None)
    layers_pattern: list[str] | str | None = _help("Name of the layer list, with layers_to_transform.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        name = type(self).__name__
        regex = isinstance(self.target_modules, str) and self.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND
        if regex and self.layers_to_transform is not None:
            raise ValueError(
                f"{name}: layers_to_transform={self.layers_to_transform!r} cannot be used with a regex, target_modules="
                f"{self.target_modules!r}: name the layers in the regex, or give target_modules as a list"
            )
        positive(name, "r", self.r)
        for factor in ("lora_alpha", "scaling", "lora_dropout"):
            if hasattr(self, factor):
                _finite(name, factor, getattr(self, factor))
        _dropout(name, "lora_dropout", getattr(self, "lora_dropout", 0.0))

    # A configuration read from a folder knows the tensors there until they are loaded. Once it has been changed, or
    # used, it is a configuration like any other.

    def _remember_tensors(self, path: str) -> None:
        self._tensors = path
        self._read_as = self._shapes()

    def _shapes(self) -> dict[str, Any]:
        return {f.name: copy.copy(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_SHAPES}

    def tensors_file(self) -> str | None:
        """The safetensors file that is about to be loaded with this configuration; None where there is none."""
        path: str | None = getattr(self, "_tensors", None)
        return path if path is not None and self._read_as == self._shapes() else None

    def forget_tensors(self) -> None:
        """The file has been loaded, or is not going to be."""
        self.__dict__.pop("_tensors", None)
        self.__dict__.pop("_read_as", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's; remembers where the tensors are, so that a bad file is refused before the model is touched."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        tensors = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(tensors):
            config._remember_tensors(tensors)
        elif os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
            raise ValueError(
                f"{folder} holds {WEIGHTS_NAME}, a pickle, and no {SAFETENSORS_WEIGHTS_NAME}; pickles are not read: "
                "save it again with safe_serialization=True"
            )
        return config


@dataclass
class LoR2CConfig(FastConfig):
    """LoR2C: a residual branch of rank `r` beside each transformer block, optionally merged and injected in training.

    `target_modules` are the query and value projections for injection (two names, or one fused one); they are found by
    name when None. The number of merges and injections may be "auto": see `lowrank_fast.methods.lor2c_controller`.
    """

    lora_alpha: float = _help("The branch is scaled by lora_alpha / r.", 16.0)
    lora_dropout: float = _help("Dropout on the branch's input.", 0.0)
    layers: str | None = _help("Name of the list of blocks, e.g. 'model.layers'; found by itself when None.", None)
    share: bool | dict[str, list[int]] = _help(
        "One A for all blocks, or {name: [blocks]}: fewer parameters, less layer-specific.", False
    )
    max_merges: int | str = _help("How many merges of adjacent branches, or 'auto'.", 0)
    max_injections: int | str = _help("How many branches to replace by q/v LoRA of rank r/2, or 'auto'.", 0)
    sfs_k: int | None = _help("k of the SFS score; None: 2 for r = 8, else r / 2.", None)
    max_span: int | None = _help("Most blocks one merged branch may cover.", None)
    merge_interval: int | None = _help("Steps between merges; None: the paper's schedule.", None)
    inject_interval: int | None = _help("Steps between injections; None: the paper's schedule.", None)
    fade_steps: int = _help("Cross-fade over so many steps; 0 switches at once, as the paper does.", 0)
    auto_threshold: float = _help("q of the 'auto' rule, in (0, 1].", 0.5)
    injected_alpha: float | None = _help("Alpha of injected LoRA; None: lora_alpha.", None)
    injected_dropout: float | None = _help("Dropout of injected LoRA; None: lora_dropout.", None)
    inplace: bool = _help("Update block outputs in place where that is safe.", True)
    seed: int = _help("Seed of the initial values of injected LoRA.", 0)

    def __post_init__(self) -> None:
        targets = self.target_modules
        super().__post_init__()
        self.peft_type = MethodName("LOR2C")
        if targets is not None and not isinstance(targets, list):
            raise ValueError("LoR2CConfig: target_modules must be a list, [query, value] or [fused projection]")
        self.target_modules = targets  # in the order given
        for unused in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, unused) is not None:
                raise ValueError(
                    f"LoR2CConfig: {unused} is not supported; got {getattr(self, unused)!r}. Every block of the list "
                    "that `layers` names gets a branch: leave it out"
                )
        self._check_schedule("LoR2CConfig")

    def _check_schedule(self, owner: str) -> None:
        check_schedule(
            owner, self.max_merges, self.max_span, self.merge_interval, self.inject_interval, self.fade_steps
        )
        if self.sfs_k is not None:
            integer(owner, "sfs_k", self.sfs_k, 1)
        if self.injected_alpha is not None:
            _finite(owner, "injected_alpha", self.injected_alpha)
        if self.injected_dropout is not None:
            _dropout(owner, "injected_dropout", self.injected_dropout)


@dataclass
class LilyConfig(FastConfig):
    """Lily: A shared by `stride_A` neighbouring layers, a bank of `num_B` experts per target, a router per module."""

    r: int = _help("Rank; larger than in LoRA, since A and B are shared.", 32)
    stride_A: int = _help("How many consecutive layers of a target share one A.", 1)
    num_B: int = _help("Experts in the bank that all layers of a target share; at least 2.", 2)
    scaling: float = _help("Factor of the update; no division by r.", 1.0)
    lora_dropout: float = _help("Dropout on the adapter's input.", 0.0)
    routing: str = _help(
        "'token': causal, independent of the batch, safe with a KV cache. 'sample': mean over a sample's tokens; an "
        "input [S, d] (poolers, heads) has one token per sample, unless the attention mask says that it holds the "
        "tokens of a batch in one list (OPT's fc1). 'batch': mean over all tokens, as published; outputs depend on "
        "batch mates and padding.",
        "token",
    )
    use_attention_mask: bool = _help("Leave padding out of 'batch' and 'sample' means.", True)
    fuse_inputs: bool = _help("One shrink for targets that read the same tensor (q, k, v).", True)
    grouping: str = _help("'target', or 'peft' for exactly the groups PEFT's Lily makes.", "target")
    init_weights: bool = _help("Zero B, so that the adapter changes nothing at first.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("LILY_FAST")
        integer("LilyConfig", "stride_A", self.stride_A, 1)
        integer("LilyConfig", "num_B", self.num_B, 2, " for a router to choose from")
        _one_of("LilyConfig", "routing", self.routing, ("token", "sample", "batch"))
        _one_of("LilyConfig", "grouping", self.grouping, ("target", "peft"))

    @classmethod
    def from_peft(cls, source: Any) -> LilyConfig:
        """The configuration that computes what PEFT's own Lily does.

        Args:
            source: a `peft.LilyConfig`, or a folder saved by PEFT's Lily. `PeftModel.from_pretrained(model, folder,
                config=LilyConfig.from_peft(folder))` then loads it.
        """
        from peft.tuners.lily import LilyConfig as PeftLily

        theirs = source if isinstance(source, PeftLily) else PeftLily.from_pretrained(source)
        names: tuple[str, ...] = ("r", "stride_A", "num_B", "scaling", "init_weights", "inference_mode", "task_type")
        names += ("target_modules", "exclude_modules", "modules_to_save")
        names += ("layers_to_transform", "layers_pattern", "base_model_name_or_path")
        values = {name: getattr(theirs, name) for name in names}
        if isinstance(theirs.target_modules, str) and theirs.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND:
            values["layers_to_transform"] = values["layers_pattern"] = None  # PEFT's Lily ignores them with a regex
        config = cls(**values, routing="batch", use_attention_mask=False, grouping="peft")
        if not isinstance(source, PeftLily):
            config._remember_tensors(os.path.join(source, SAFETENSORS_WEIGHTS_NAME))
        return config


@dataclass
class EffiLoRAConfig(FastConfig):
    """EffiLoRA: one A for all layers, `num_B` heads and a token router per module, a Reducer that skips most B's."""

    lora_alpha: float = _help("The update is scaled by lora_alpha / r.", 16.0)
    lora_dropout: float = _help("Dropout on x; the router sees x without it.", 0.0)
    num_B: int = _help("Heads E per module; 1 has no router and merges exactly.", 1)
    share_A: str = _help(
        "'in_features': one A per distinct input width. 'slice': one A of the largest width, sliced. "
        "'target': one A per target name.",
        "in_features",
    )
    freeze_A: bool = _help("Leave A at its initial values: x need not be kept for backward.", False)
    a_grad: str = _help(
        "'all' (the paper): every layer trains A. 'active': only active layers do, and x is kept only there.", "all"
    )
    fuse_inputs: bool = _help("One shrink for targets that read the same tensor (q, k, v).", True)
    keep_ratio: float = _help("Fraction of layers whose B is updated each step, in (0, 1].", 0.25)
    importance: str = _help("'suppression' (validation batches, the paper) or 'gradient' (free).", "suppression")
    selection: str = _help("'sample' by importance, or 'top'.", "sample")
    interval: int = _help("Steps between updates of the importance.", 10)
    warmup: int | None = _help("First steps with everything active; None: one interval.", None)
    seed: int = _help("Seed of the selection.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("EFFILORA")
        positive("EffiLoRAConfig", "num_B (heads E)", self.num_B)
        _finite("EffiLoRAConfig", "keep_ratio", self.keep_ratio)
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(f"EffiLoRAConfig: keep_ratio must be in (0, 1]; got {self.keep_ratio}")
        integer("EffiLoRAConfig", "interval", self.interval, 1)
        if self.warmup is not None:
            integer("EffiLoRAConfig", "warmup", self.warmup, 0)
        _one_of("EffiLoRAConfig", "share_A", self.share_A, ("in_features", "slice", "target"))
        _one_of("EffiLoRAConfig", "a_grad", self.a_grad, ("all", "active"))
        _one_of("EffiLoRAConfig", "importance", self.importance, ("suppression", "gradient"))
        _one_of("EffiLoRAConfig", "selection", self.selection, ("sample", "top"))
