"""Triton kernels of the low-rank updates, one file per operation; importable without a GPU or a driver.

* `common.py`        products, dropout, softmax
* `shrink.py`        `t = x A^T`, with the router's softmax
* `expand.py`        `out = y + s t B^T`, with the bank mixed once per program
* `residual_add.py`  both in one launch
* `routed_small.py`  a routed projection of few rows in one launch
* `backward.py`      `g -> u, dB` and `u -> dx, dA`; `reduce.py` adds their partials
* `norm.py`          residual add with the next RMSNorm or LayerNorm
* `table.py`         launch choices; `tune.py` measures them on a GPU; `launch.py` runs or records launches
* `interpreter.py`   repairs and byte counts for Triton's interpreter

Installed as `lowrank_fast.triton_kernels`; `lowrank_fast/triton_backend.py` turns ops into launches.
"""
