# Sourced by run_zero2.sh and run_tests.sh: afterwards `python3` has the packages of a requirements file.
#   source env.sh requirements.txt
# An active environment that has them all is used as it is; otherwise they go into .venv.

has_packages() { # PYTHON FILE: does this Python have every package that the file (and the one it includes) pins?
  "$1" - "$2" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

def pins(path):
    for line in open(path):
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from pins(line[3:])
        elif line:
            yield line.split("==")

try:
    sys.exit(any(version(name).split("+")[0] != wanted for name, wanted in pins(sys.argv[1])))
except PackageNotFoundError:
    sys.exit(1)
PYTHON
}

if ! has_packages "$(command -v python3)" "$1"; then
  if ! [ -x .venv/bin/python ]; then
    echo "making .venv with $(python3 --version)"
    python3 -m venv .venv
  fi
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
  if ! has_packages .venv/bin/python "$1"; then
    echo "installing $1 into .venv, some minutes the first time"
    .venv/bin/python -m pip install --disable-pip-version-check -r "$1"
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
