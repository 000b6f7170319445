"""What one shrink for layers on a shared input saves: time above the frozen layers, and peak memory, of a step.

    python examples/shared_inputs.py [--adapter lora lily] [--rank 8 32] [--rows 4] [--tokens 256] [--width 768]
                                     [--inner 2048] [--dtype float32] [--rounds 30] [--threads 2] [--clock wall|cpu]

q, k and v read one tensor, gate and up another. For each of the two groups, forward and backward of the layers with

    peft      PEFT's adapters: each layer reads x for itself, in float32, and makes a dx of its own
    apart     accelerate_adapters(model, fuse_inputs=False): the same with fused operations
    together  accelerate_adapters(model): one shrink with the rows of all A's, one dx that all layers add to

One process times them in turn, round after round; shown is the quickest step of a variant above the quickest of the
frozen layers, in milliseconds, and the most bytes that PyTorch's allocator had handed out at once, above those before
the step. On a busy machine use `--threads 1 --clock cpu`, which does not count the time of other processes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from lowrank_fast.bench.memory import peak_bytes
from torch import Tensor, nn

from lowrank_fast.peft import accelerate_adapters

VARIANTS = ("frozen", "peft", "apart", "together")


class Readers(nn.Module):
    """Frozen linear layers that read one tensor."""

    def __init__(self, width: int, outputs: dict[str, int]) -> None:
        super().__init__()
        for name, size in outputs.items():
            self.add_module(name, nn.Linear(width, size, bias=False))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each layer makes of `x`."""
        return [layer(x) for layer in self.children()]


def build(variant: str, adapter: str, rank: int, width: int, outputs: dict[str, int], dtype: torch.dtype) -> nn.Module:
    """The layers of one group, with the adapters of one variant."""
    torch.manual_seed(0)
    layers: Any = Readers(width, outputs).to(dtype)
    if variant == "frozen":
        return layers
    lora = peft.LoraConfig(r=rank, target_modules=list(outputs))
    lily = peft.LilyConfig(r=rank, num_B=4, target_modules=list(outputs))
    model = peft.get_peft_model(layers, lora if adapter == "lora" else lily)
    if variant != "peft":
        accelerate_adapters(model, fuse_inputs=variant == "together", verbose=False)
    return model


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward; gradients are freed afterwards."""
    gradients = [torch.randn_like(y) for y in model(x)]

    def step() -> None:
        torch.autograd.backward(model(x), gradients)
        x.grad = None
        model.zero_grad(set_to_none=True)

    return step


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def report(adapter: str, rank: int, outputs: dict[str, int], arguments: argparse.Namespace) -> None:
    """Time and memory of the variants for one group, one line each."""
    dtype, clock = getattr(torch, arguments.dtype), CLOCKS[arguments.clock]
    x = torch.randn(arguments.rows, arguments.tokens, arguments.width, dtype=dtype).requires_grad_()
    steps = {v: step_of(build(v, adapter, rank, arguments.width, outputs, dtype), x) for v in VARIANTS}
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for _ in range(arguments.rounds):
        for variant, step in steps.items():
            start = clock()
            step()
            seconds[variant].append(clock() - start)
    print(f"\n{', '.join(outputs)}: {adapter} r={rank}, {arguments.dtype}", end="; ")
    frozen = min(seconds["frozen"])
    print(f"frozen layers {1e3 * frozen:.1f} ms")
    for variant in VARIANTS[1:]:
        above, peak = min(seconds[variant]) - frozen, peak_bytes(steps[variant]) / 2**20
        print(f"    {variant:9} {1e3 * above:7.2f} ms above   {peak:7.2f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", nargs="+", choices=("lora", "lily"), default=["lora", "lily"])
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 32])
    for name, value in (("rows", 4), ("tokens", 256), ("width", 768), ("inner", 2048), ("rounds", 30), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), arguments.width)
    gated = dict.fromkeys(("gate_proj", "up_proj"), arguments.inner)
    for adapter in arguments.adapter:
        for rank in arguments.rank:
            for outputs in (attention, gated):
                report(adapter, rank, outputs, arguments)


if __name__ == "__main__":
    main()
