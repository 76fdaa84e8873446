#!/usr/bin/env bash
# Everything a GPU can tell, in one call of less than nine minutes: installs, proves, measures, tunes. See docs/gpu.md.
#
#   bench/on_gpu.sh             the first call
#   bench/on_gpu.sh second      contract tests and sanitizers, in less than three minutes
#   bench/on_gpu.sh third       single ops and memory, in less than three minutes
#   bench/on_gpu.sh --rehearse  every stage of all without a GPU
#
# Results go to $OUT, or to the folder gpu-results. The exit status is 0 if every stage and every check went well.
cd "$(dirname "${BASH_SOURCE[0]}")/.." && exec "${PYTHON:-python3}" bench/on_gpu.py "$@"
