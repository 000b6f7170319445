"""State dicts in which each shared tensor stands once, and their files.

A tensor that several modules hold is named after the first of them in `named_parameters` order. Reading accepts the
duplicated form too (every alias present), if the copies are equal. Files are safetensors only, written to a temporary
name and renamed; nothing is ever unpickled.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def aliases(module: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter or persistent buffer -> all its names."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    wanted = module.state_dict(keep_vars=True)
    for name, tensor in wanted.items():
        if isinstance(tensor, Tensor):
            names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def shared_state_dict(module: nn.Module, *, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of `module`, each shared tensor once; only names that start with `prefix`."""
    state = module.state_dict()
    return {name: state[name] for name in aliases(module) if name.startswith(prefix)}


def spread(names: Mapping[str, list[str]], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with one entry per first name, from any alias; ValueError if present copies differ."""
    first = {alias: name for name, group in names.items() for alias in group}
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = first.get(key, key)
        kept = out.setdefault(name, tensor)
        if kept is not tensor and not torch.equal(kept, tensor):
            raise ValueError(f"{key} must equal {name}, with which it shares one tensor, but the file holds two values")
    return out


def check_entries(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """ValueError that names the missing, extra and wrong-shaped entries, if any."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} does not belong there" for name in found if name not in expected]
    problems += [
        f"{name} must be {list(expected[name])}, got {list(shape)}"
        for name, shape in found.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{what}: {'; '.join(problems[:5])}{more}")


def load_shared_state_dict(module: nn.Module, state: Mapping[str, Tensor], *, prefix: str = "") -> None:
    """Copy `state` into `module`, in place; every tensor must be there, with its shape, and no other.

    Raises ValueError that names what is missing, extra or wrong-shaped, before anything is changed.
    """
    names = aliases(module)
    current = shared_state_dict(module, prefix=prefix)
    compact = spread(names, state)
    check_entries(
        {name: tuple(tensor.shape) for name, tensor in current.items()},
        {name: tuple(tensor.shape) for name, tensor in compact.items()},
        "load_shared_state_dict",
    )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(compact[name])


def save_tensors(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write `state` to `path` as safetensors, under a temporary name first."""
    from safetensors.torch import save_file  # needed for files only

    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".safetensors")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_shared(module: nn.Module, path: str | os.PathLike[str], *, prefix: str = "") -> None:
    """Write `shared_state_dict(module)` to the safetensors file `path`."""
    save_tensors(shared_state_dict(module, prefix=prefix), path)


def load_shared(module: nn.Module, path: str | os.PathLike[str], *, prefix: str = "") -> None:
    """Read a file of `save_shared` into `module`; raises as `load_shared_state_dict` does."""
    from safetensors.torch import load_file

    load_shared_state_dict(module, load_file(os.fspath(path)), prefix=prefix)
