"""PNG plots of a results file, each written to a temporary name and renamed.

Colours are Okabe and Ito's, which readers with any colour vision tell apart; bars also differ in hatching and lines in
markers, so the plots survive grey print.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .cases import DIRECTIONS
from .records import Record, write_atomically
from .registry import LABELS, LIMITS, PROVIDERS
from .targets import OURS, Group, any_of, floor_fraction, groups, speedup, timed

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_RIVALS = [p.name for p in PROVIDERS if p.name not in (OURS, *LIMITS)]
_MODEL = {"lor2c_fused": 0, "lor2c_eager": 1, "lora_peft": 2, "frozen": 7}


def _style(name: str) -> int:
    """Ours is the first style everywhere; rivals take the others in the table's order."""
    if name in _MODEL or name == OURS:
        return _MODEL.get(name, 0)
    return 1 + _RIVALS.index(name) % (len(_COLOURS) - 1)


def _fill(name: str) -> dict[str, Any]:
    """Colour and hatching of a bar."""
    style = _style(name)
    return {"color": _COLOURS[style], "hatch": _HATCHES[style], "edgecolor": "#333333", "linewidth": 0.6}


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG, atomically, and close it."""
    try:
        return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    finally:
        plt.close(figure)


def _subtitle(records: Sequence[Record]) -> str:
    first, loads = records[0], [record["load"] for record in records]
    machine = f"{first['cpu']}, {first['threads']} threads, {first['isa']}"
    return f"{machine}, load {min(loads):.1f}–{max(loads):.1f}, {first['date'][:10]}"


def _titled(figure: Figure, title: str, records: Sequence[Record]) -> None:
    figure.suptitle(f"{title}\n{_subtitle(records)}", fontsize=10)


# ------------------------------------------------------------------------------------------------ ops


def speedup_bars(records: Sequence[Record], folder: Path) -> list[Path]:
    """`speedup-<op>.png`: how many times slower each baseline is than ours at rank 8; one panel per dtype."""
    paths = []
    grouped = [g for g in groups(records) if any_of(g)["direction"] in DIRECTIONS and timed(g, OURS)]
    grouped = [g for g in grouped if any_of(g)["suite"] == "ops" and any_of(g)["r"] == 8]
    for op, routing in dict.fromkeys((any_of(g)["op"], any_of(g)["routing"]) for g in grouped):
        mine = [g for g in grouped if (any_of(g)["op"], any_of(g)["routing"]) == (op, routing)]
        dtypes = list(dict.fromkeys(any_of(g)["dtype"] for g in mine))
        widest = max(sum(any_of(g)["dtype"] == dtype for g in mine) for dtype in dtypes)
        size = (max(9.0, 0.85 * widest), 3.6 * len(dtypes) + 0.8)
        figure, axes = plt.subplots(len(dtypes), 1, figsize=size, squeeze=False, layout="constrained")
        for dtype, axis in zip(dtypes, axes[:, 0], strict=True):
            _bars(axis, [g for g in mine if any_of(g)["dtype"] == dtype], dtype)
        handles = dict(
            reversed(pair) for axis in axes[:, 0] for pair in zip(*axis.get_legend_handles_labels(), strict=True)
        )
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=int(size[0] // 3), fontsize=8)
        name = op if routing is None else f"{op}-{routing}"
        _titled(figure, f"{name.replace('_', ' ')}: speed-up of lowrank_fast, from minimum times", records)
        paths.append(save(figure, folder / f"speedup-{name}.png"))
    return paths


def _bars(axis: Any, cases: list[Group], dtype: str) -> None:
    """Bars from the 1x line, side by side without gaps for baselines that a case does not have."""
    labelled: set[str] = set()
    for position, group in enumerate(cases):
        known = [(name, ratio) for name in _RIVALS if (ratio := speedup(group, name)) is not None]
        width = 0.85 / max(len(known), 1)
        for index, (name, ratio) in enumerate(known):
            axis.bar(
                position + (index - (len(known) - 1) / 2) * width,
                ratio - 1.0,
                width,
                bottom=1.0,
                label=None if name in labelled else LABELS[name],
                **_fill(name),
            )
            labelled.add(name)
    axis.axhline(1.0, color="black", linewidth=1.2)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_xticks(range(len(cases)), [_case_label(any_of(g)) for g in cases], fontsize=6.5)
    axis.set_xlim(-0.6, len(cases) - 0.4)
    axis.set_ylabel("time of baseline / time of ours")
    axis.set_title(f"{dtype}, r = 8; above 1x ours is faster", fontsize=9)
    axis.grid(axis="y", alpha=0.3)


def _case_label(case: Record) -> str:
    return f"{case['direction'].replace('_', chr(10))}\n{case['T']} x {case['d_in']}"


def _residual_ops(case: Record) -> bool:
    return case["suite"] == "ops" and case["op"] == "residual_add" and case["T"] > 64


def floor_by_rank(records: Sequence[Record], folder: Path) -> list[Path]:
    """`floor-by-rank.png`: fraction of the streaming floor against rank, ours and the best hand-written form."""
    rivals = {"forward_out": "addmm", "backward_out": "mm4"}
    cases = [g for g in groups(records) if _residual_ops(any_of(g)) and any_of(g)["direction"] in rivals]
    if not cases:
        return []
    dtypes = list(dict.fromkeys(any_of(g)["dtype"] for g in cases))
    figure, axes = plt.subplots(
        len(rivals), len(dtypes), figsize=(5.2 * len(dtypes), 7), squeeze=False, layout="constrained"
    )
    for row, (direction, rival) in zip(axes, rivals.items(), strict=True):
        for axis, dtype in zip(row, dtypes, strict=True):
            panel = [g for g in cases if any_of(g)["dtype"] == dtype and any_of(g)["direction"] == direction]
            for provider in (OURS, rival):
                for marker, shape in enumerate(dict.fromkeys((any_of(g)["T"], any_of(g)["d_in"]) for g in panel)):
                    points = sorted(
                        (any_of(g)["r"], fraction)
                        for g in panel
                        if (any_of(g)["T"], any_of(g)["d_in"]) == shape
                        and (fraction := floor_fraction(g, provider)) is not None
                    )
                    axis.plot(
                        *zip(*points, strict=True) if points else ([], []),
                        marker=_MARKERS[marker],
                        color=_COLOURS[_style(provider)],
                        linestyle="-" if provider == OURS else "--",
                        label=f"{LABELS[provider]}, {shape[0]} x {shape[1]}",
                    )
            axis.set_xscale("log", base=2)
            axis.set_xticks([8, 16, 32], ["8", "16", "32"])
            axis.set_ylim(bottom=0)
            axis.set_xlabel("rank r")
            axis.set_ylabel("fraction of the torch.add(out=) floor")
            axis.set_title(f"{direction.replace('_', ' ')}, {dtype}", fontsize=9)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    _titled(figure, "Residual add: distance to the memory floor by rank (minimum times)", records)
    return [save(figure, folder / "floor-by-rank.png")]


def sweep(records: Sequence[Record], folder: Path) -> list[Path]:
    """`sweep.png`: fraction of the floor against the number of tokens."""
    cases = [g for g in groups(records) if any_of(g)["suite"] == "sweep" and timed(g, OURS)]
    if not cases:
        return []
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, dtype in enumerate(dict.fromkeys(any_of(g)["dtype"] for g in cases)):
        for provider in (OURS, "addmm", "mm_add"):
            points = sorted(
                (any_of(g)["T"], fraction)
                for g in cases
                if any_of(g)["dtype"] == dtype and (fraction := floor_fraction(g, provider)) is not None
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker=_MARKERS[_style(provider)],
                    color=_COLOURS[_style(provider)],
                    linestyle=("-", "--")[index % 2],
                    label=f"{LABELS[provider]}, {dtype}",
                )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens T")
    axis.set_ylabel("fraction of the torch.add(out=) floor")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _titled(figure, "Residual add into out=, d = 1024, r = 8 (minimum times)", records)
    return [save(figure, folder / "sweep.png")]


# ------------------------------------------------------------------------------------------------ model


def model(records: Sequence[Record], folder: Path) -> list[Path]:
    """`model-loss.png` and `model-steps.png`."""
    found = [record for record in records if record["suite"] == "model"]
    if not found:
        return []
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for record in found:
        style = _style(record["provider"])
        fused = record["provider"] == "lor2c_fused"
        axis.plot(
            range(1, len(record["losses"]) + 1),
            record["losses"],
            color=_COLOURS[style],
            linewidth=1.2 if fused else 2.4,
            linestyle=":" if fused else "-",
            marker=_MARKERS[style],
            markersize=3,
            label=f"{LABELS[record['provider']]} (held-out accuracy {record['accuracy']:.3f})",
        )
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (cross-entropy, nats)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _titled(figure, "MiniLM on review snippets: loss curves", found)
    paths = [save(figure, folder / "model-loss.png")]

    timed_runs = [record for record in found if record["status"] == "ok"]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for position, record in enumerate(timed_runs):
        below, above = record["median_s"] - record["p20_s"], record["p80_s"] - record["median_s"]
        axis.bar(
            position,
            record["median_s"] * 1e3,
            yerr=[[below * 1e3], [above * 1e3]],
            capsize=4,
            **_fill(record["provider"]),
        )
        axis.plot(position, record["min_s"] * 1e3, marker="_", markersize=22, color="black")
    axis.set_xticks(
        range(len(timed_runs)), [LABELS[r["provider"]].replace(", ", ",\n") for r in timed_runs], fontsize=8
    )
    axis.set_ylabel("step time in ms (median, p20 to p80; dash: minimum)", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    _titled(figure, f"MiniLM: one training step of {found[0]['T']} tokens, fp32", found)
    return [*paths, save(figure, folder / "model-steps.png")]


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Every plot that the records have something for; the paths written."""
    makers = (speedup_bars, floor_by_rank, sweep, model)
    return [path for make in makers for path in make(records, folder)]
