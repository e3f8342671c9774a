#!/usr/bin/env bash
# Measures on this machine's GPUs what a machine without one cannot, within 28 minutes, and writes
# benchmarks/results/gpu.md. Nothing is downloaded but the packages of requirements.txt, where they are missing.
#   bash benchmarks/gpu.sh                                               everything
#   bash benchmarks/gpu.sh --parts lora-zero2 speed-4b --output some.md  these alone
#   bash benchmarks/gpu.sh --geometry tiny --output tiny.md              a trial of the command, on any machine
set -euo pipefail
source "$(dirname "$0")/../env.sh" requirements.txt
export HF_HUB_OFFLINE=1
exec python3 "$repo/benchmarks/gpu.py" "$@"
