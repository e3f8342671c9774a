#!/usr/bin/env bash
# Runs the tests in the environment of run_zero2.sh and passes its arguments to pytest (-k NAME, tests/test_data.py).
#   bash run_tests.sh                the fast tests, some minutes
#   bash run_tests.sh -m slow        whole runs: the toy example, the notebooks, a real language model
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements-dev.txt
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning
# paths are relative to the current folder; without a path, all tests run
tests=("$repo/tests") previous=
for argument in "$@"; do
  case $previous in -k | -m | -n | -p) ;; *) [ ! -e "${argument%%::*}" ] || tests=() ;; esac
  previous=$argument
done
exec python3 -m pytest -c "$repo/pyproject.toml" -n 2 "$@" ${tests[@]+"${tests[@]}"}
