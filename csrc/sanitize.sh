#!/usr/bin/env bash
# tests/test_native.py under AddressSanitizer and UBSan, after two planted faults have been found.
#
#   csrc/sanitize.sh              # needs torch, pytest and pybind11 in `python`; cmake and ninja
#   PYTHON=python3.12 csrc/sanitize.sh
#
# 165 s on 2 busy cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

FASTMIM_SANITIZE=1 FASTMIM_CUDA=0 cmake -S "$root" -B "$work/build" -G Ninja \
  -DPython_EXECUTABLE="$(command -v "$python")"
cmake --build "$work/build"
mkdir "$work/fastmim"
touch "$work/fastmim/__init__.py" # the compiled part alone: no other part of the library is needed
cmake --install "$work/build" --prefix "$work/fastmim"
cp "$root/tests/test_native.py" "$work"
cd "$work"

# The sanitizers must be loaded before Python; libstdc++ too, so that they see its exceptions.
compiler=${CXX:-c++}
preload="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so.6)"
sanitized() {
  # Python itself leaks at exit: leaks are not looked for.
  env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" "$@"
}

# planted NAME ARGUMENTS MESSAGE: the call must end the process with the message.
planted() {
  if sanitized -c "
import ctypes, torch
control = ctypes.CDLL('build/sanitize_control.so')
x = torch.zeros(1024)
control.read_past_end.argtypes = ctypes.c_void_p, ctypes.c_int64
control.overflow.argtypes = [ctypes.c_int64]
control.$1($2)" 2>"$work/report"; then
    echo "sanitize: the planted fault '$1' was NOT found" >&2
    exit 1
  fi
  grep -q "$3" "$work/report" || { cat "$work/report" >&2; exit 1; }
  echo "sanitize: planted fault '$1' found: $(grep -m1 "$3" "$work/report")"
}
planted read_past_end "x.data_ptr(), x.numel()" "heap-buffer-overflow"
planted overflow "1" "signed integer overflow"

sanitized -m pytest -q -p no:cacheprovider test_native.py
