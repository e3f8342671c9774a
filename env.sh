# Sourced by run_zero2.sh and run_tests.sh. Afterwards `python3` has the packages of a requirements file and finds
# train_llava from any folder. `repo` is the folder of this file.
#   source env.sh requirements.txt
# It uses an active environment that has all packages. Otherwise it installs them into .venv.
#   TORCH_INDEX=URL   the index for torch's CPU build, on Linux without an NVIDIA GPU; empty: take PyPI's build
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

say() { # ENGLISH CHINESE: prints the one that fits the locale
  case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in zh*) printf '%s\n' "$2" ;; *) printf '%s\n' "$1" ;; esac
}

has_packages() { # PYTHON FILE [NAME]: does it have every package (or the one named) that the file and its includes pin?
  "$1" - "$repo/$2" "${@:3}" 2>/dev/null <<'PYTHON'
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
wanted = [line for line in wanted if line.name in sys.argv[2:] or not sys.argv[2:]]
sys.exit(not all(line.specifier.contains(version(line.name), prereleases=True) for line in wanted))
PYTHON
}

has_nvidia() { # asks the driver, as torch may not be installed yet; WSL has nvidia-smi alone
  [ -e /dev/nvidiactl ] || [ -e /proc/driver/nvidia ] || command -v nvidia-smi >/dev/null
}

# PyPI's torch for Linux brings CUDA's libraries, useless without an NVIDIA GPU. This installs torch alone from
# PyTorch's own index. The packages that torch needs follow from PyPI.
install_cpu_torch() {
  local index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu} pin
  if [ "$(uname -s)" != Linux ] || [ -z "$index" ] || has_nvidia || has_packages python3 requirements.txt torch; then
    return 0
  fi
  pin=$(grep -o '^torch==[^ ]*' "$repo/requirements.txt")
  say "no NVIDIA GPU here: asking $index for torch's CPU build, a tenth of PyPI's (TORCH_INDEX= takes that)" \
    "没有 NVIDIA GPU：从 $index 取 torch 的 CPU 版，大小是 PyPI 版的十分之一（TORCH_INDEX= 改用 PyPI 版）"
  trap 'exit 130' INT # or a stopped pip would count as an index that fails
  # ask first: pip waits long for each address of an index that does not answer
  if ! timeout --foreground 10 python3 -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' \
    "${index%/}/torch/" 2>/dev/null ||
    ! python3 -m pip install --disable-pip-version-check --retries 0 --no-deps --index-url "$index" "$pin+cpu"; then
    say "torch comes from PyPI instead, whose CUDA build computes on the CPU as well" \
      "改从 PyPI 安装 torch：它的 CUDA 版也能用 CPU 计算"
  fi
  trap - INT
}

if ! has_packages python3 "$1"; then
  python=$repo/.venv/bin/python remedy="remove $repo/.venv" remedy_zh="请删除 $repo/.venv"
  [ -x "$python" ] || python=python3 remedy="put the folder of such a python3 first in PATH" \
    remedy_zh="请把这样一个 python3 所在的文件夹放在 PATH 最前面"
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    version=$("$python" --version 2>&1) || version=$(say "not there" "没有安装")
    say "error: Python 3.11, 3.12 or 3.13 is needed, and $python is $version: $remedy" \
      "错误：需要 Python 3.11、3.12 或 3.13，而 $python 是 $version：$remedy_zh" >&2
    return 1
  fi
  if [ "$python" = python3 ]; then
    say "making $repo/.venv with $(python3 --version)" "用 $(python3 --version) 建立 $repo/.venv"
    python3 -m venv "$repo/.venv" || { rm -rf "$repo/.venv"; return 1; }
  fi
  export VIRTUAL_ENV=$repo/.venv PATH=$repo/.venv/bin:$PATH
  if ! has_packages python3 "$1"; then
    say "installing $1 into .venv, once: some minutes, up to 3 GB of disk (8 GB with the CUDA build of torch)" \
      "把 $1 装进 .venv，只装一次：要几分钟，最多占 3 GB 磁盘（torch 的 CUDA 版最多 8 GB）"
    install_cpu_torch
    python3 -m pip install --disable-pip-version-check -r "$repo/$1"
  fi
fi

# only once: run.sh and the tests start run_zero2.sh, which sources this file again
if [ -z "${DEVICE_LOOKED_UP:-}" ] && ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  if has_nvidia && python3 -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
    say "warning: this machine has an NVIDIA GPU, and torch is a CPU build: remove $repo/.venv to have it installed anew" \
      "注意：这台机器有 NVIDIA GPU，而 torch 是 CPU 版：删除 $repo/.venv 后会重新安装" >&2
  fi
  export DS_ACCELERATOR=cpu # DeepSpeed then runs on CPU ranks and compiles a small extension the first time
  export CUDA_HOME='' CUDA_PATH='' # or torch would warn that it finds a CUDA folder without a GPU
  # glibc keeps freed memory for the next step instead of returning it: measured 6 % faster
  export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296
  command -v g++ >/dev/null || {
    say "error: DeepSpeed needs a C++ compiler on a machine without a GPU: install g++" \
      "错误：没有 GPU 的机器上，DeepSpeed 需要 C++ 编译器：请安装 g++" >&2
    return 1
  }
  python3 -c 'from train_llava.training.extension import build_extension; build_extension("ShareMemCommBuilder")'
fi
export DEVICE_LOOKED_UP=1
