#!/usr/bin/env bash
# The kernels' GPU tests under NVIDIA's compute-sanitizer: scripts/sanitize.sh PYTHON FOLDER [ARGUMENTS OF pytest]
#   memcheck   reads and writes beyond an allocation, and misaligned ones
#   racecheck  shared memory that is read before all who write it have
#   initcheck  global memory that is read before it was written
# Each leaves FOLDER/TOOL.log; the exit status is 1 where one found something, 2 where it cannot run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- tests/kernels/test_layer.py tests/kernels/test_norm_act.py tests/kernels/test_tiles.py \
    tests/kernels/test_wgrad.py tests/kernels/test_dgrad.py tests/kernels/test_bounds.py

if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2
    exit 2
fi
mkdir -p "$out"
# one allocation per tensor: torch's cache would hide which tensor an access missed
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
for tool in memcheck racecheck initcheck; do
    options=(--tool "$tool" --target-processes all --error-exitcode 1 --log-file "$out/$tool.log")
    echo "$tool"
    compute-sanitizer "${options[@]}" "$python" -m pytest -q -m gpu -p no:cacheprovider "$@" || status=1
    tail -n 1 "$out/$tool.log" || status=1 # one that left no log has judged nothing
done
exit $status
