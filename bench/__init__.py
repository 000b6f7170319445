"""The benchmark suite behind `lowrank-fast bench`: ops x providers, a model, a size sweep, and the target table.

stats.py         quantiles of a list of seconds
environment.py   versions, processor, load, commit
records.py       the record (one JSON line per measurement), and atomic writing
memory.py        peak bytes of a call
cases.py         a problem (op, shapes, dtype) and its seeded inputs
expressions.py   the baselines, as plain PyTorch expressions
registry.py      which provider measures which op in which direction
gate.py          nothing is timed before it is right
runner.py        alternating rounds over the providers of a case
overhead.py      microseconds around the op, bytes kept for backward
plans.py         the cases of each suite
model.py         training steps of a pretrained transformer on real text (text.py)
targets.py       the table of figures that the package must reach
report.py, plots.py, cli.py
"""
