"""LoR2C (arXiv 2503.00572): one low-rank residual branch beside each transformer block, by hooks.

    h_{l+1} = Layer_l(h_l) + s * (dropout(h_l) A_l^T) B_l^T,   s = alpha / r

A *span* `(start, end)` reads the input of block `start` and is added to the output of block `end`; plain LoR2C has one
span `(l, l)` per block, merging makes longer ones. A longer span keeps only `t = h_start A^T [.., r]` alive. The branch
reads the raw hidden state and is added to the raw block output, after every norm inside the block.

    Slot       the tensors that live at one block: A, B, and the q/v LoRA that may replace them
    Topology   which spans exist, with which gates; the hooks; the manifest that is saved with the tensors

`lor2c_hooks.py` attaches them to a model.

The manifest is JSON: version, number of blocks, spans `[start, end, home, gate, fade]` (`home`: the block whose slot
holds A and B), injected blocks with their gates, and the controller's counters and history.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

from .. import functional as F
from ..nn.inplace import dtype_for, may_update
from ..nn.residual import residual_update
from ..nn.weights import Down, Up, uniform_
from .blocks import Projections, linear_sizes
from .lor2c_carry import Carried, Key

MANIFEST_VERSION = 1


@dataclass
class Span:
    """A residual branch from the input of block `start` to the output of block `end`.

    `gate` multiplies its scale; `fade` is +1 while it rises, -1 while it falls, 0 when steady.
    """

    start: int
    end: int
    home: int
    gate: float = 1.0
    fade: int = 0

    @property
    def key(self) -> Key:
        """What tells it from the other spans."""
        return self.start, self.end, self.home


@dataclass(frozen=True)
class Settings:
    """What all branches of one adapter have in common. `lora_*` are those of injected q/v LoRA."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    lora_r: int = 4
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    inplace: bool = True
    seed: int = 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Slot(nn.Module):
    """The tensors at one block: `down` (A, possibly shared), `up` (B), and the dormant `query` and `value` LoRA.

    Dormant and retired tensors keep their Parameter, so that an optimizer made at the start stays valid, but hold no
    elements (with torch.distributed, whose buckets need fixed sizes, dormant ones are allocated in full).
    """

    def __init__(
        self,
        d: int,
        settings: Settings,
        down: Down | None,
        projections: Projections | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.owns_down = down is None
        self.d, self.r = d, settings.r
        self.down = Down(d, settings.r, device=device, dtype=dtype) if down is None else down
        self.up = Up(settings.r, d, device=device, dtype=dtype)
        self.shapes: list[tuple[str, int, int]] = []
        if projections is None:
            return
        for (_, module, columns), roles in zip(
            projections.modules, (("query",), ("value",)) if len(projections.modules) == 2 else (("query", "value"),),
            strict=True,
        ):  # fmt: skip
            d_in, d_out = linear_sizes(module)
            for i, role in enumerate(roles):
                width = d_out if columns is None else columns[i][1] - columns[i][0]
                self.shapes.append((role, d_in, width))
                rank = settings.lora_r if _distributed() else 0
                pair = nn.ParameterDict(
                    {
                        "down": torch.zeros(rank, d_in, device=device, dtype=dtype),
                        "up": torch.zeros(width, rank, device=device, dtype=dtype),
                    }
                )
                setattr(self, role, pair)

    def residual_parameters(self) -> list[nn.Parameter]:
        """B, and A where it is not shared."""
        return [self.up.weight] + ([self.down.weight] if self.owns_down else [])

    def lora(self, role: str) -> tuple[Tensor, Tensor]:
        """A `[r', d_in]` and B `[d_out, r']` of the injected "query" or "value"."""
        pair = getattr(self, role)
        return pair["down"], pair["up"]

    def wake(self, rank: int, seed: int) -> None:
        """Give the q/v LoRA its tensors: A uniform from a generator seeded with `seed`, B zero."""
        for i, (role, d_in, d_out) in enumerate(self.shapes):
            pair = getattr(self, role)
            generator = torch.Generator().manual_seed(seed * 2 + i)
            down = torch.empty(rank, d_in)
            uniform_(down, generator)
            pair["down"].data = down.to(pair["down"])
            pair["up"].data = torch.zeros(d_out, rank).to(pair["up"])

    def sleep(self) -> None:
        """Empty the q/v LoRA again."""
        for role, d_in, d_out in self.shapes:
            pair = getattr(self, role)
            for leaf, shape in (("down", (0, d_in)), ("up", (d_out, 0))):
                pair[leaf].grad, pair[leaf].data = None, pair[leaf].data.new_empty(shape)

    def revive(self) -> None:
        """Allocate what `retire` freed, as zeros to be loaded into."""
        self.up.weight.data = self.up.weight.data.new_zeros(self.d, self.r)
        if self.owns_down:
            self.down.weight.data = self.down.weight.data.new_zeros(self.r, self.d)

    def retire(self) -> None:
        """Free the branch's own tensors; the Parameters stay, empty."""
        for parameter in self.residual_parameters():
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0, parameter.shape[-1])


@dataclass
class Progress:
    """What a controller has done, kept with the topology so that it is saved and resumed with it."""

    merges: int = 0
    injections: int = 0
    last_step: int = -1
    fade_begin: int = -1
    fade_steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def rebase(self, step: int) -> None:
        """Count on from `step` instead of `last_step`; what a fade has done of its way stays done."""
        self.fade_begin += step - self.last_step if self.fade_steps else 0
        self.last_step = step


class Topology:
    """The spans of one adapter over the blocks of one model; runs them from hooks."""

    def __init__(self, slots: Sequence[Slot], settings: Settings, can_inject: bool) -> None:
        self.slots = list(slots)
        self.settings = settings
        self.can_inject = can_inject
        self.spans = [Span(i, i, i) for i in range(len(self.slots))]
        self.injected: dict[int, float] = {}
        self.progress = Progress()
        self.carried = Carried()

    # ---------------------------------------------------------------------------------------------- forward

    def before(self, layer: int, x: Tensor, training: bool) -> None:
        """Keep `t = dropout(x) A^T` for the spans that start at block `layer` and end later."""
        inside = [span.key for span in self.spans if span.start < layer <= span.end]
        if inside and not torch.compiler.is_compiling():
            self.carried.enter(inside, x)
        for span in self.spans:
            if span.start == layer and span.end != layer:
                down = dtype_for(self.slots[span.home].down.weight, x).to(x.device)
                t = F.shrink(x, down, dropout_p=self.settings.dropout, training=training)
                self.carried.start(span.key, x, t)

    def after(self, layer: int, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output `y` of block `layer` with the spans that end there added."""
        for span in self.spans:
            if span.end != layer:
                continue
            slot, scale = self.slots[span.home], self.settings.alpha / self.settings.r * span.gate
            if span.start == layer:
                y = residual_update(
                    y, x, slot.down.weight, slot.up.weight, scale,
                    dropout_p=self.settings.dropout, training=training, inplace=self.settings.inplace,
                )  # fmt: skip
            else:
                t = self.carried.take(span.key, x, slot.down.weight.requires_grad).to(y.device)
                up = dtype_for(slot.up.weight, y).to(y.device)
                y = F.expand_add(y, t, up, scale, inplace=self.settings.inplace and may_update(y, t))
        return y

    def passed(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Block `layer` was given `x` and returns `y`, which holds the updates of all adapters."""
        inside = [span.key for span in self.spans if span.start <= layer < span.end]
        if inside and not torch.compiler.is_compiling():
            self.carried.leave(inside, x, y)

    def project(self, layer: int, roles: tuple[str, ...], columns: Any, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output `y` of a q, v or fused projection of block `layer` with its injected LoRA added."""
        gate = self.injected.get(layer)
        if gate is None:
            return y
        pairs = [self.slots[layer].lora(role) for role in roles]
        down, up = pairs[0]
        if columns is not None:
            down = torch.cat([pair[0] for pair in pairs])
            up = _block_columns([pair[1] for pair in pairs], columns, y.shape[-1])
        scale = self.settings.lora_alpha / self.settings.lora_r * gate
        return residual_update(
            y, x, down, up, scale,
            dropout_p=self.settings.lora_dropout, training=training, inplace=self.settings.inplace,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- structure

    def steady(self) -> list[Span]:
        """The spans that are not fading, in order."""
        return sorted((s for s in self.spans if s.fade == 0), key=lambda s: s.start)

    def entries(self, manifest: dict[str, Any] | None = None) -> dict[tuple[int, str], tuple[int, ...]]:
        """(block, name in its slot) -> shape of every tensor in use, each shared one once, at its first block.

        With `manifest`, those of the structure it describes instead of the present one.
        """
        manifest = self.manifest() if manifest is None else manifest
        found: dict[tuple[int, str], tuple[int, ...]] = {}
        seen: set[int] = set()
        for home in sorted({entry[2] for entry in manifest["spans"]}):
            slot = self.slots[home]
            if id(slot.down) not in seen:
                seen.add(id(slot.down))
                found[home, "down.weight"] = (slot.r, slot.d)
            found[home, "up.weight"] = (slot.d, slot.r)
        for layer, _ in manifest["injected"]:
            for role, d_in, d_out in self.slots[layer].shapes:
                found[layer, f"{role}.down"] = (self.settings.lora_r, d_in)
                found[layer, f"{role}.up"] = (d_out, self.settings.lora_r)
        return found

    def parameters(self) -> int:
        """Number of elements in use, each shared tensor once."""
        return sum(math.prod(shape) for shape in self.entries().values())

    def merge(self, first: Span, second: Span, keep: Span, fade: bool = False) -> None:
        """Replace two adjacent spans by one over both, with the tensors of `keep`."""
        merged = Span(first.start, second.end, keep.home)
        if fade:
            first.fade = second.fade = -1
            merged.gate, merged.fade = 0.0, 1
        else:
            self.spans = [s for s in self.spans if s is not first and s is not second]
        self.spans.append(merged)
        self.spans.sort(key=lambda s: (s.start, s.end))

    def inject(self, span: Span, fade: bool = False) -> None:
        """Replace a single-layer span by LoRA on q and v of its block."""
        self.slots[span.home].wake(self.settings.lora_r, self.settings.seed * len(self.slots) + span.home)
        self.injected[span.start] = 0.0 if fade else 1.0
        if fade:
            span.fade = -1
        else:
            self.spans = [s for s in self.spans if s is not span]

    def set_fade(self, a: float) -> None:
        """Rising gates to `a`, falling ones to `1 - a`; at 1 the fallen spans go and the risen ones are steady."""
        for span in self.spans:
            if span.fade:
                span.gate = a if span.fade > 0 else 1.0 - a
        for layer, gate in self.injected.items():
            if gate < 1.0:
                self.injected[layer] = a
        if a >= 1.0:
            self.spans = [s for s in self.spans if s.fade >= 0]
            for span in self.spans:
                span.fade = 0

    def retire_unused(self) -> list[nn.Parameter]:
        """Free the tensors of slots that no span uses; returns the Parameters that were freed."""
        used = {s.home for s in self.spans}
        freed = [
            parameter
            for home, slot in enumerate(self.slots)
            if home not in used and slot.up.weight.numel()
            for parameter in slot.residual_parameters()
        ]
        for home, slot in enumerate(self.slots):
            if home not in used and slot.up.weight.numel():
                slot.retire()
        return freed

    # ---------------------------------------------------------------------------------------------- manifest

    def manifest(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON types."""
        return {
            "version": MANIFEST_VERSION,
            "layers": len(self.slots),
            "spans": [[s.start, s.end, s.home, s.gate, s.fade] for s in self.spans],
            "injected": [[layer, gate] for layer, gate in sorted(self.injected.items())],
            "progress": asdict(self.progress),
        }

    def check_manifest(self, manifest: dict[str, Any]) -> None:
        """ValueError if `manifest` cannot be this adapter's."""
        version = manifest.get("version")
        if not isinstance(version, int) or version > MANIFEST_VERSION:
            raise ValueError(
                f"LoR2C manifest: version {version!r} is newer than {MANIFEST_VERSION}, the newest this release reads; "
                "upgrade lowrank_fast"
            )
        if manifest.get("layers") != len(self.slots):
            raise ValueError(
                f"LoR2C manifest: made for {manifest.get('layers')} blocks; this model has {len(self.slots)}"
            )
        if manifest["injected"] and not self.can_inject:
            raise ValueError("LoR2C manifest: holds injected q/v LoRA; create the adapter with max_injections > 0")
        for start, end, home, *_ in manifest["spans"]:
            if not 0 <= start <= home <= end < len(self.slots):
                raise ValueError(f"LoR2C manifest: span {[start, end, home]} must satisfy 0 <= start <= home <= end")

    def load_manifest(self, manifest: dict[str, Any]) -> None:
        """Take the structure of `manifest`: wakes and retires slots. The tensors are loaded afterwards."""
        self.check_manifest(manifest)
        self.spans = [Span(*entry) for entry in manifest["spans"]]
        for layer in self.injected:
            self.slots[layer].sleep()
        self.injected = {}
        for span in self.spans:
            if self.slots[span.home].up.weight.numel() == 0:
                self.slots[span.home].revive()
        for layer, gate in manifest["injected"]:
            self.slots[layer].wake(self.settings.lora_r, self.settings.seed * len(self.slots) + layer)
            self.injected[layer] = gate
        self.progress = Progress(**manifest["progress"])
        self.retire_unused()

    def manifest_tensor(self) -> Tensor:
        """`manifest()` as UTF-8 JSON in a uint8 tensor, to stand among the saved tensors."""
        text = json.dumps(self.manifest(), separators=(",", ":")).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def read_manifest(tensor: Tensor) -> dict[str, Any]:
    """The manifest in a uint8 tensor; ValueError if it is not one."""
    try:
        found = json.loads(bytes(tensor.cpu().tolist()).decode())
        assert isinstance(found, dict)
    except (ValueError, AssertionError, UnicodeDecodeError) as error:
        raise ValueError(f"LoR2C manifest: not readable ({error})") from None
    return found


def _block_columns(ups: list[Tensor], columns: Any, d_out: int) -> Tensor:
    """`[d_out, sum r]` that writes each factor to its own output columns and none to the others."""
    total = sum(up.shape[1] for up in ups)
    rows, at, column = [], 0, 0
    for up, (start, stop) in zip(ups, columns, strict=True):
        rows.append(up.new_zeros(start - at, total))
        rows.append(torch_F.pad(up, (column, total - column - up.shape[1])))
        at, column = stop, column + up.shape[1]
    return torch.cat([*rows, ups[0].new_zeros(d_out - at, total)])
