# Sourced by run_zero2.sh and run_tests.sh: afterwards `python3` has the packages of a requirements file and, from any
# folder, train_llava; `repo` is the folder of this file.
#   source env.sh requirements.txt
# An active environment that has them all is used as it is; otherwise they go into .venv.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

has_packages() { # PYTHON FILE: does this Python have every package that the file (and the one it includes) pins?
  "$1" - "$repo/$2" 2>/dev/null <<'PYTHON'
import os, sys
from importlib.metadata import version
from packaging.requirements import Requirement

def lines(path):
    for line in open(path, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from lines(os.path.join(os.path.dirname(path), line[3:].strip()))
        elif line and not line.startswith("-"):
            yield Requirement(line)

wanted = [line for line in lines(sys.argv[1]) if line.marker is None or line.marker.evaluate()]
sys.exit(not all(line.specifier.contains(version(line.name), prereleases=True) for line in wanted))
PYTHON
}

if ! has_packages python3 "$1"; then
  python=$repo/.venv/bin/python remedy="remove $repo/.venv"
  [ -x "$python" ] || python=python3 remedy="put the folder of such a python3 first in PATH"
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    version=$("$python" --version 2>&1) || version="not there"
    echo "error: Python 3.11, 3.12 or 3.13 is needed, and $python is $version: $remedy" >&2
    return 1
  fi
  if [ "$python" = python3 ]; then
    echo "making $repo/.venv with $(python3 --version)"
    python3 -m venv "$repo/.venv" || { rm -rf "$repo/.venv"; return 1; }
  fi
  export VIRTUAL_ENV=$repo/.venv PATH=$repo/.venv/bin:$PATH
  if ! has_packages python3 "$1"; then
    echo "installing $1 into .venv, some minutes the first time"
    python3 -m pip install --disable-pip-version-check -r "$repo/$1"
  fi
fi

# Once is enough: run.sh and the tests start run_zero2.sh, which sources this again
if [ -z "${DEVICE_LOOKED_UP:-}" ] && ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  export DS_ACCELERATOR=cpu # DeepSpeed runs on CPU ranks; it compiles a small extension the first time
  # a step's tensors are kept for the next step, instead of asked of the system again: measured 6 % faster (glibc)
  export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296
  command -v g++ >/dev/null || { echo "error: DeepSpeed needs a C++ compiler on a machine without a GPU: install g++" >&2; return 1; }
  python3 - <<'PYTHON'
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
PYTHON
fi
export DEVICE_LOOKED_UP=1
