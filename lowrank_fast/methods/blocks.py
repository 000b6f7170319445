"""Finding the transformer blocks of a model, and the query and value projections inside one.

The layer list is the `nn.ModuleList` of equal blocks that the model runs one after the other: among all ModuleLists
whose entries are of one class, the one with `config.num_hidden_layers` entries, else the longest. Encoder-decoder
models have two; then it must be named.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

# (query, value) projections by the names that models give them, then fused layouts.
_QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("to_q", "to_v"))
_FUSED = (
    "c_attn",
    "qkv_proj",
)  # outputs [q | k | v]; layouts interleaved by head (GPT-NeoX, Falcon) are not among them


def near_names(wanted: str, names: list[str]) -> str:
    """`; did you mean 'a', 'b'?` for the names most like `wanted`, or an empty string."""
    close = difflib.get_close_matches(wanted, sorted(set(names)), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def _declared_layers(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for source in (getattr(config, "get_text_config", lambda: None)() if config is not None else None, config):
        for field in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            value = getattr(source, field, None)
            if isinstance(value, int):
                return value
    return None


def _candidates(model: nn.Module) -> dict[str, nn.ModuleList]:
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(block) for block in module}) != 1:
            continue
        if not isinstance(module[0], (nn.Linear, nn.Embedding, nn.LayerNorm)):
            found[name] = module
    outermost = [n for n in found if not any(n.startswith(o + ".") for o in found if o != n)]
    return {name: found[name] for name in outermost}


def find_layers(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The dotted name and the ModuleList of the blocks of `model`.

    Args:
        name: the list to use, as in `dict(model.named_modules())`; found by itself when None.
    Raises: ValueError if there is none, if several fit, or if `name` is not a non-empty ModuleList.
    """
    candidates = _candidates(model)
    if name is not None:
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            got = "no such module" if module is None else f"{type(module).__name__} of {len(list(module.children()))}"
            hint = near_names(name, list(candidates)) or f"; candidates: {', '.join(candidates) or 'none'}"
            raise ValueError(f"layers: {name!r} must name a non-empty nn.ModuleList of blocks; got {got}{hint}")
        return name, module
    declared = _declared_layers(model)
    fitting = [n for n, m in candidates.items() if declared is None or len(m) == declared]
    if not fitting and declared is not None:
        fitting = list(candidates)
    longest = max((len(candidates[n]) for n in fitting), default=0)
    fitting = [n for n in fitting if len(candidates[n]) == longest]
    if not fitting:
        raise ValueError(
            "layers: no list of blocks found (an nn.ModuleList of modules of one class); "
            "name it, e.g. layers='model.layers'"
        )
    if len(fitting) > 1:
        raise ValueError(f"layers: several lists of blocks fit: {', '.join(fitting)}; name one with layers=...")
    return fitting[0], candidates[fitting[0]]


def hidden_size(model: nn.Module, block: nn.Module) -> int:
    """Width of the hidden states that `block` reads and returns.

    Taken from the configuration where a norm of the block confirms it, else from the block's own norms and linears:
    the width that most of its weights have as an input.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)() if config is not None else None
    declared = [getattr(text, f, None) for f in ("hidden_size", "n_embd", "d_model", "dim")]
    widths: list[int] = []
    for module in block.modules():
        shape = getattr(module, "normalized_shape", None)
        weight: Any = getattr(module, "weight", None)
        if shape is not None:
            widths += [int(shape[-1])] * 2
        elif weight is not None and getattr(weight, "dim", lambda: 0)() == 1:
            widths.append(int(weight.shape[0]))
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):
            widths.append(linear_sizes(module)[0])
    for size in declared:
        if isinstance(size, int) and (size in widths or not widths):
            return size
    if not widths:
        raise ValueError(f"cannot tell the hidden size of {type(block).__name__}; give hidden_size=")
    return max(set(widths), key=lambda w: (widths.count(w), -w))


class Projections:
    """Where LoRA on q and v goes in one block.

    Attributes:
        modules: `[(name in the block, module, columns)]`; `columns` are the two half-open output ranges `(start, stop)`
            of q and v in a fused projection, or None for a projection of its own.
    """

    def __init__(self, modules: list[tuple[str, nn.Module, tuple[tuple[int, int], tuple[int, int]] | None]]) -> None:
        self.modules = modules


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of a linear layer: nn.Linear, its quantised relatives, or transformers' Conv1D."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight: Any = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:
        return int(weight.shape[0]), int(weight.shape[1])
    raise ValueError(f"{type(module).__name__} is not a linear layer (no in_features and out_features)")


def find_projections(block: nn.Module, targets: list[str] | None = None) -> Projections:
    """The query and value projections of `block`, separate or fused.

    Args:
        targets: the two leaf names (query, value), or one leaf name of a fused projection; found by name when None.
    Raises: ValueError if they are not there.
    """
    leaves: dict[str, tuple[str, nn.Module]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.ParameterDict):
            continue  # the q/v LoRA of another LoR2C adapter at this block, which are named `query` and `value`
        leaves.setdefault(name.rpartition(".")[2], (name, module))  # self attention comes before cross attention
    leaves.pop("", None)
    if targets is not None:
        missing = [t for t in targets if t not in leaves]
        if missing:
            hint = near_names(missing[0], list(leaves))
            raise ValueError(f"target_modules: {missing[0]!r} is not a module of {type(block).__name__}{hint}")
        if len(targets) == 1:
            return _fused(*leaves[targets[0]])
        if len(targets) != 2:
            raise ValueError(f"target_modules must name query and value, or one fused projection; got {targets}")
        return Projections([(*leaves[t], None) for t in targets])
    for query, value in _QUERY_VALUE:
        if query in leaves and value in leaves:
            return Projections([(*leaves[query], None), (*leaves[value], None)])
    for fused in _FUSED:
        if fused in leaves:
            return _fused(*leaves[fused])
    raise ValueError(
        f"{type(block).__name__} has no query and value projections by a known name; name them with target_modules="
        "[query, value], or train without injections"
    )


def _fused(name: str, module: nn.Module) -> Projections:
    d, d_out = linear_sizes(module)
    if d_out != 3 * d:
        raise ValueError(f"{name}: a fused projection must map d to 3 d (q, k, v); got {d} to {d_out}")
    return Projections([(name, module, ((0, d), (2 * d, 3 * d)))])
