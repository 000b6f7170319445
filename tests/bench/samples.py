"""Made-up records for the tests of tables and plots: the times are arguments, everything else is plausible."""

from __future__ import annotations

from typing import Any

from lowrank_fast.bench.records import Record, validate

ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "lowrank_fast": "0.1.0"},
    "cpu": "A processor",
    "isa": "avx512",
    "threads": 2,
    "load": 0.3,
    "date": "2026-11-21T12:00:00+00:00",
    "commit": "0123456789ab",
}


def record(provider: str = "ours", minimum: float | None = 1.0, median: float | None = None, **fields: Any) -> Record:
    """A record with `min_s = minimum`; `median` defaults to 1.1 times that; None stands for a refused provider."""
    status = "ok" if minimum is not None else "refused"
    if minimum is not None and median is None:
        median = 1.1 * minimum
    made = {
        "suite": "ops",
        "op": "residual_add",
        "direction": "forward_out",
        "provider": provider,
        "status": status,
        "reason": None if status == "ok" else "out is off by 1.0e-01",
        "dtype": "float32",
        "T": 4096,
        "d_in": 768,
        "d_out": 768,
        "r": 8,
        "E": None,
        "routing": None,
        "median_s": median,
        "p20_s": minimum,
        "p80_s": median,
        "min_s": minimum,
        "rounds": 10 if status == "ok" else 0,
        "calls_per_sample": 1,
        "floor_min_s": None,
        "floor_median_s": None,
        "peak_bytes": 1024,
        "error": 1e-7,
        **ENVIRONMENT,
    }
    return validate(made | fields)


def case(times: dict[str, float | None], **fields: Any) -> list[Record]:
    """The records of one case: provider -> minimum seconds."""
    return [record(provider, seconds, **fields) for provider, seconds in times.items()]


def model_records(drift: float = 1e-7) -> list[Record]:
    """The four configurations of the model benchmark."""
    shape = {"suite": "model", "op": "train_step", "direction": "step", "T": 1536, "d_in": 384, "d_out": 384}
    names = ("frozen", "lora_peft", "lor2c_eager", "lor2c_fused")
    return [
        record(
            name,
            0.1 * (1 + index),
            **shape,
            losses=[0.7, 0.6, 0.5],
            accuracy=0.7,
            held_out=320,
            trainable_parameters=1000,
            error=drift if name == "lor2c_fused" else None,
        )
        for index, name in enumerate(names)
    ]
