"""What an adapter costs in a training step, ours against PEFT's: time above the frozen model, and peak memory.

    python examples/overhead.py [--dtype float32 bfloat16] [--rounds 7] [--layers 12] [--threads 2] [--variants ...]
                                [--clock wall|cpu] [--json FILE] [--no-memory]

A LLaMA-shaped model with random weights (d 768, 12 layers, inner 2048, 12 heads, 4 x 256 tokens by default), fed with
embeddings that require a gradient, so that every variant, the frozen one too, runs the whole backward. One process
times all variants in turn, round after round. Reported are the quickest steps, (variant - frozen) / frozen, for other
work on the machine only adds time; beside them the median over rounds of the same within a round, which agrees on an
idle machine. On a busy one use `--threads 1 --clock cpu`: seconds of processor time, in which waiting does not count.
Memory is the peak resident set of a process of its own per variant, above that of the process before its first step.

    lora-peft, lora-ours     LoRA r 8 on all linear layers; ours is the same PEFT model after accelerate_adapters
    lily-peft, lily-ours     Lily r 32, 4 experts, stride 4, on all linear layers, batch routing
    lily-token               the same adapter with routing="token"
    lor2c                    LoR2C r 8
    effilora, effilora-25    EffiLoRA r 8, one head, all linear; a quarter of the layers active with a_grad="active"
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = (
    "frozen",
    "lora-peft",
    "lora-ours",
    "lily-peft",
    "lily-ours",
    "lily-token",
    "lor2c",
    "effilora",
    "effilora-25",
)


def build(variant: str, layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """The model of one variant, in training mode."""
    import peft
    from transformers import LlamaConfig, LlamaModel

    from lowrank_fast.peft import EffiLoRAConfig, LilyConfig, LoR2CConfig, accelerate_adapters

    torch.manual_seed(0)
    model: Any = LlamaModel(
        LlamaConfig(
            vocab_size=64,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=12,
            use_cache=False,
        )
    ).to(dtype)
    model.requires_grad_(False)
    lily = {"r": 32, "num_B": 4, "stride_A": 4, "target_modules": LINEAR}
    effilora = {"r": 8, "target_modules": LINEAR, "importance": "gradient"}
    configs: dict[str, Any] = {
        "lora-peft": lambda: peft.LoraConfig(r=8, target_modules=LINEAR),
        "lora-ours": lambda: peft.LoraConfig(r=8, target_modules=LINEAR),
        "lily-peft": lambda: peft.LilyConfig(**lily),
        "lily-ours": lambda: peft.LilyConfig(**lily),
        "lily-token": lambda: LilyConfig(**lily, routing="token"),
        "lor2c": lambda: LoR2CConfig(r=8),
        "effilora": lambda: EffiLoRAConfig(**effilora),
        "effilora-25": lambda: EffiLoRAConfig(**effilora, a_grad="active"),
    }
    if variant != "frozen":
        model = peft.get_peft_model(model, configs[variant]())
    if variant.endswith("-ours"):
        accelerate_adapters(model, verbose=False)
    if variant == "effilora-25":
        from lowrank_fast.peft import effilora_reducer

        effilora_reducer(model).begin_step(11)
    return model.train()


def step_of(model: torch.nn.Module, dtype: torch.dtype, rows: int, tokens: int) -> Callable[[], None]:
    """One forward and backward; gradients are freed afterwards."""
    x = torch.randn(rows, tokens, 768, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()

    def step() -> None:
        out = model(inputs_embeds=x)
        out.last_hidden_state.sum().backward()
        x.grad = None
        model.zero_grad(set_to_none=True)

    return step


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, list[float]]:
    """Variant -> seconds of each round, variants taking turns."""
    clock = CLOCKS[arguments.clock]
    steps = {
        name: step_of(build(name, arguments.layers, dtype), dtype, arguments.rows, arguments.tokens)
        for name in arguments.variants
    }
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in arguments.variants}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def peak_memory(arguments: argparse.Namespace) -> int:
    """Peak resident bytes of two steps above the size of this process before them (Linux)."""
    dtype = getattr(torch, arguments.dtype[0])
    step = step_of(build(arguments.only, arguments.layers, dtype), dtype, arguments.rows, arguments.tokens)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts afresh: building the model is not part of the step
    before = resident("VmRSS")
    step()
    step()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="frozen is always run")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--json")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.variants = [name for name in VARIANTS if name == "frozen" or name in arguments.variants]
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    if arguments.only:
        print(peak_memory(arguments))
        return
    records = []
    for kind in arguments.dtype:
        seconds = measure(arguments, getattr(torch, kind))
        frozen = seconds["frozen"]
        print(f"\n{kind}: frozen model {min(frozen):.3f} s per step, best of {arguments.rounds}")
        print(f"{'variant':14} {'overhead':>9} {'median':>7} {'p20':>7} {'p80':>7} {'peak MiB':>9}")
        for name in arguments.variants:
            ratios = sorted(s / f - 1 for s, f in zip(seconds[name], frozen, strict=True))
            low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
            peak = None if arguments.no_memory else memory_of(name, kind, arguments)
            shown = "-" if peak is None else f"{peak / 2**20:.0f}"
            best = min(seconds[name]) / min(frozen) - 1
            print(f"{name:14} {best:>9.1%} {statistics.median(ratios):>7.1%} {low:>7.1%} {high:>7.1%} {shown:>9}")
            records.append({"variant": name, "dtype": kind, "seconds": seconds[name], "peak_bytes": peak})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(records, file)


def memory_of(variant: str, kind: str, arguments: argparse.Namespace) -> int:
    """`peak_memory` in a fresh process."""
    command = [sys.executable, __file__, "--only", variant, "--dtype", kind]
    for option in ("layers", "rows", "tokens", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
