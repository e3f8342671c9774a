#!/usr/bin/env bash
# Runs the tests in the environment of run_zero2.sh; arguments go to pytest (-k NAME, tests/test_data.py, -m "not slow").
set -euo pipefail
cd "$(dirname "$0")"
source env.sh requirements-dev.txt
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning
exec python3 -m pytest -n 2 "$@"
