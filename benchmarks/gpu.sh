#!/usr/bin/env bash
# Measures a training step on this machine's GPU in many variants, within 15 minutes, and writes
# benchmarks/results/gpu_steps.md. Nothing is downloaded but the packages of requirements.txt, where they are missing.
#   bash benchmarks/gpu.sh                                                  all variants
#   bash benchmarks/gpu.sh --variants no-dropout compiled --output some.md  these alone
#   bash benchmarks/gpu.sh --geometry tiny --output tiny.md                 a trial of the command, on any machine
set -euo pipefail
source "$(dirname "$0")/../env.sh" requirements.txt
export HF_HUB_OFFLINE=1
exec python3 "$repo/benchmarks/gpu.py" "$@"
