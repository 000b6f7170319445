#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can say about this package, in one folder. `make gpu` runs it.
#
# Each step writes its output and exit status into the folder and none stops the others; the summary at the end lists them.
# Usage: bench/gpu/run.sh [FOLDER]. Environment: PYTHON (default: .venv/bin/python, which the first step makes),
# LOWRANK_FAST_GPU_STEPS (a list of step names, default all), LOWRANK_FAST_GPU_MINUTES (limit per step, default 20).
set -u
cd "$(dirname "$0")/../.." || exit 2
export PYTHON_GPU="${PYTHON:-$PWD/.venv/bin/python}"
PATH="$(dirname "$PYTHON_GPU"):$PATH" # ninja
folder=${1:-bench/results/gpu-$(date -u +%Y%m%d-%H%M%S)}
mkdir -p "$folder" || exit 2
steps=${LOWRANK_FAST_GPU_STEPS:-setup machine build-cpu build-cuda info tests sanitizer verify codegen bench}
limit=${LOWRANK_FAST_GPU_MINUTES:-20}
failed=0
: > "$folder/summary.txt"

# step NAME COMMAND...: runs it with a time limit, keeps its output and says how it ended.
step() {
  local name=$1 status began=$SECONDS
  shift
  case " $steps " in *" $name "*) ;; *) return 0 ;; esac
  timeout "${limit}m" "$@" > "$folder/$name.log" 2>&1 < /dev/null
  status=$?
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  printf '%-10s exit %-3s %4s s  %s\n' "$name" "$status" "$((SECONDS - began))" "$folder/$name.log" | tee -a "$folder/summary.txt"
}

machine() {
  uname -a
  git rev-parse HEAD
  nvidia-smi || return
  "$PYTHON_GPU" -c 'import torch; print(torch.__version__, torch.version.cuda); print(torch.cuda.get_device_properties(0))'
}

sanitizer() { # memcheck finds what the emulation cannot: real addresses, real alignment, real hardware faults
  command -v compute-sanitizer > /dev/null || {
    echo "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    return 1
  }
  local tool status=0
  for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON_GPU" -m pytest tests/cuda -m gpu -q -k sanitizer || status=$?
  done
  return "$status"
}
export -f machine sanitizer

step setup make setup
step machine bash -c machine
step build-cpu env LOWRANK_FAST_BUILD=1 LOWRANK_FAST_BUILD_CUDA=0 "$PYTHON_GPU" setup.py build_ext --inplace
step build-cuda env LOWRANK_FAST_BUILD=0 LOWRANK_FAST_BUILD_CUDA=1 "$PYTHON_GPU" setup.py build_ext --inplace
step info "$PYTHON_GPU" -m lowrank_fast info
step tests "$PYTHON_GPU" -m pytest tests -q
step sanitizer bash -c sanitizer
step verify "$PYTHON_GPU" -m lowrank_fast verify --json "$folder/verify.json"
step codegen "$PYTHON_GPU" -m lowrank_fast codegen --kernels cuda --json "$folder/codegen.json" --table "$folder/codegen.md"
step bench "$PYTHON_GPU" -m lowrank_fast.bench.gpu.measure --out "$folder/bench"
echo "results in $folder; $failed step(s) failed"
[ "$failed" -eq 0 ]
