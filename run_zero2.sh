#!/usr/bin/env bash
# Trains a LLaVA with DeepSpeed ZeRO-2, on every GPU or, on a machine without one, on two CPU ranks.
#   bash run_zero2.sh                                           the toy example (OpenMoji), some minutes
#   bash run_zero2.sh recipes/one-gpu-stage1.yaml               a recipe; arguments after it override it
#   bash run_zero2.sh --model_name_or_path M --data_path D --train_type lora --output_dir O …     your own run
# It takes the arguments of `python -m train_llava.train`. Paths are relative to the current folder.
# Settings in the environment:
#   INCLUDE=localhost:4,5   the devices to use, as DeepSpeed's --include takes them
#   CPU_RANKS=2             the number of processes on a machine without a GPU
#   MASTER_PORT=29500       needs a different value for each run on the same machine
#   LAUNCHER=deepspeed      who starts the ranks: deepspeed, torchrun, or srun, a task for each rank (SLURM)
# On several nodes, put the same files in the same places on each node, and set:
#   HOSTFILE=hosts          a line for each node, "name slots=GPUS", as DeepSpeed's --hostfile takes it
#   NODE_RANK=0             this node's number, from 0 in the order of that file. Without it, give the command on the
#                           first node alone, which starts the others by ssh (DeepSpeed's launcher only)
#   MASTER_ADDR=10.0.0.1    the first node's address, as the others reach it
# Under SLURM, `srun bash run_zero2.sh …` finds nodes, ranks and address by itself: recipes/slurm.sbatch
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements.txt

if [ $# -eq 0 ]; then
  exec bash "$repo/examples/openmoji/run.sh"
fi
export PYTHONSAFEPATH=1 # or Python would import a datasets.py in the current folder instead of the library
for argument in "$@"; do
  case $argument in -h | --help) exec python3 -m train_llava.train --help ;; esac
done
arguments=(--deepspeed="$repo/ds_zero2_no_offload.json" "$@") # one word, so that a recipe after it can override it

# under SLURM, each task of a step is a rank or, with a task on each of several nodes, starts the ranks of its node
tasks=${SLURM_STEP_NUM_TASKS:-1}
[ "$tasks" -le "${SLURM_STEP_NUM_NODES:-1}" ] || LAUNCHER=${LAUNCHER:-srun}
LAUNCHER=${LAUNCHER:-deepspeed}
ERROR_DIR=$(mktemp -d) # here the ranks note which errors they have printed
trap 'rm -rf "$ERROR_DIR"' EXIT
if [ -n "${SLURM_STEP_ID:-}" ]; then
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs may share a node
fi
if [ "$tasks" -gt 1 ] || [ "$LAUNCHER$tasks" = srun1 ]; then
  # the first node of a list such as gpu-[01-04,7],login
  first=$(sed -E 's/^([^],[]+)(\[([0-9]+)[^]]*\]([^,[]*))?.*/\1\3\4/' <<<"${SLURM_STEP_NODELIST:-}")
  MASTER_ADDR=${MASTER_ADDR:-$first}
fi
if [ "$LAUNCHER" = srun ] && [ -n "${SLURM_STEP_ID:-}" ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$tasks
  export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # such as 8(x2)
  export LOCAL_SIZE=$LOCAL_WORLD_SIZE
  rmdir "$ERROR_DIR"
  ERROR_DIR=${TMPDIR:-/tmp}/train_llava-$SLURM_JOB_ID.$SLURM_STEP_ID.${SLURM_RESTART_COUNT:-0} # of the node's tasks
  mkdir -p "$ERROR_DIR"
elif [ "$tasks" -gt 1 ]; then
  NODE_RANK=$SLURM_NODEID HOSTFILE=$ERROR_DIR/hosts slots=${CPU_RANKS:-2}
  [ "${DS_ACCELERATOR:-}" = cpu ] || slots=$(python3 -c 'import torch; print(torch.cuda.device_count())')
  for ((node = 0; node < tasks; node++)); do echo "node$node slots=$slots"; done >"$HOSTFILE"
fi
export ERROR_DIR MASTER_PORT=${MASTER_PORT:-29500} ${MASTER_ADDR:+MASTER_ADDR}

# who starts the ranks; they and this script report errors, and a launcher would add its own line for each rank
ranks=gpu
if [ "${DS_ACCELERATOR:-}" = cpu ] && [ -z "${INCLUDE:-}${HOSTFILE:-}" ]; then
  ranks=${CPU_RANKS:-2} cores=$(python3 -c 'import os; print(os.cpu_count())')
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi
if [ -n "${HOSTFILE:-}" ] && [ ! -f "$HOSTFILE" ]; then
  say "error: HOSTFILE=$HOSTFILE does not exist" "错误：HOSTFILE=$HOSTFILE 不存在" >&2
  exit 1
fi
# torchrun without its own lines
torchrun='import logging, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.disable()
try:
    run.main(sys.argv[1:])
except ChildFailedError as error:
    sys.exit(error.get_first_failure()[1].exitcode % 256)
except SignalException as error:
    sys.exit(256 - error.sigval)'
case $LAUNCHER in
  deepspeed)
    launcher=(deepspeed --master_port "$MASTER_PORT" --log_level critical)
    if [ -n "${HOSTFILE:-}" ]; then
      launcher+=(--hostfile "$HOSTFILE")
      [ -z "${MASTER_ADDR:-}" ] || launcher+=(--master_addr "$MASTER_ADDR")
      [ -z "${NODE_RANK:-}" ] || launcher+=(--no_ssh --node_rank "$NODE_RANK")
    fi
    [ -z "${INCLUDE:-}" ] || launcher+=(--include "$INCLUDE")
    [ "$ranks" = gpu ] || launcher+=(--num_accelerators "$ranks")
    launcher+=(--module)
    ;;
  torchrun)
    launcher=(python3 -c "$torchrun" --master-port "$MASTER_PORT")
    if [ -n "${HOSTFILE:-}" ]; then
      if [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; then
        say "error: torchrun starts one node: set NODE_RANK and MASTER_ADDR" \
          "错误：torchrun 只启动一台机器：请设置 NODE_RANK 和 MASTER_ADDR" >&2
        exit 1
      fi
      mapfile -t hosts < <(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$HOSTFILE")
      launcher+=(--nnodes ${#hosts[@]} --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR")
      ranks=${hosts[NODE_RANK]}
    fi
    [ -z "${INCLUDE:-}" ] || export CUDA_VISIBLE_DEVICES=${INCLUDE#*:}
    launcher+=(--nproc-per-node "$ranks" -m)
    ;;
  "${SLURM_STEP_ID:+srun}") launcher=(python3 -m) ;;
  *)
    say "error: LAUNCHER=$LAUNCHER is none of deepspeed, torchrun and, in a step of SLURM, srun" \
      "错误：LAUNCHER=$LAUNCHER 不是 deepspeed、torchrun；srun 只能在 SLURM 的作业步里用" >&2
    exit 1
    ;;
esac
# hides DeepSpeed's and torch's warnings about deprecated names
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
set -m # gives the launcher its own process group, so that only the traps below send it signals
"${launcher[@]}" train_llava.train "${arguments[@]}" &
run=$!
# On SIGTERM a launcher would end its ranks within half a minute. Send it to the ranks, which save a checkpoint and end
stop_ranks='import psutil, sys
run = psutil.Process(int(sys.argv[1]))
for process in [run, *run.children(recursive=True)]:
    if "RANK" in process.environ():
        process.terminate()'
trap 'python3 -c "$stop_ranks" $run 2>/dev/null || true' TERM # fails if the launcher got the signal, too
trap 'kill -INT -- -$run' INT
code=0
while kill -0 $run 2>/dev/null; do
  wait $run && code=0 || code=$?
  sleep 0.2 # `wait` returns at once, again and again, while the launcher is paused
done
wait $run && code=0 || code=$? # it may have ended after the last `kill -0`
while kill -0 -- -$run 2>/dev/null; do sleep 0.2; done # the ranks may still be writing
# CPU ranks leave their shared memory behind, 64 MB each
rm -rf /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*_"$MASTER_PORT"_*
if [ "$LAUNCHER" = srun ] && [ $code != 0 ]; then
  sleep 2 # the node's other tasks have the same error
  [ $code -le 128 ] || code=$((384 - code)) # of a signal, as a launcher gives it
fi
if [ $code -gt 192 ]; then
  case $((256 - code)) in
    9) say "error: a rank was killed (signal 9), often for want of memory" "错误：一个进程被强行结束（信号 9），多半是内存不够" ;;
    15) say "stopped by SIGTERM" "收到 SIGTERM，已停止" ;;
    *) say "error: a rank was ended by signal $((256 - code))" "错误：一个进程被信号 $((256 - code)) 结束" ;;
  esac >&2
fi
exit $code
