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
# On several nodes, put the same files in the same places on each node, and set:
#   HOSTFILE=hosts          a line for each node, "name slots=GPUS", as DeepSpeed's --hostfile takes it
#   NODE_RANK=0             this node's number, from 0 in the order of that file. Without it, give the command on the
#                           first node alone, which starts the others by ssh
#   MASTER_ADDR=10.0.0.1    the first node's address, as the others reach it
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

# the ranks and this script report errors; DeepSpeed's launcher would add its own line for each rank
launcher=(--master_port "${MASTER_PORT:-29500}" --log_level critical)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || { say "error: HOSTFILE=$HOSTFILE does not exist" "错误：HOSTFILE=$HOSTFILE 不存在" >&2; exit 1; }
  launcher+=(--hostfile "$HOSTFILE")
  [ -z "${MASTER_ADDR:-}" ] || launcher+=(--master_addr "$MASTER_ADDR")
  [ -z "${NODE_RANK:-}" ] || launcher+=(--no_ssh --node_rank "$NODE_RANK")
fi
if [ -n "${INCLUDE:-}" ]; then
  launcher+=(--include "$INCLUDE")
elif [ "${DS_ACCELERATOR:-}" = cpu ] && [ -z "${HOSTFILE:-}" ]; then
  ranks=${CPU_RANKS:-2}
  cores=$(python3 -c 'import os; print(os.cpu_count())')
  launcher+=(--num_accelerators "$ranks")
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi
# hides DeepSpeed's and torch's warnings about deprecated names
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
ERROR_DIR=$(mktemp -d) # here the ranks note which errors they have printed
export ERROR_DIR
set -m # gives the launcher its own process group, so that only the traps below send it signals
deepspeed "${launcher[@]}" --module train_llava.train "${arguments[@]}" &
run=$!
# On SIGTERM the launcher would die and leave its ranks running. Send it to the ranks, which save a checkpoint and end
stop_ranks='import psutil, sys
for launch in psutil.Process(int(sys.argv[1])).children():
    for rank in launch.children():
        rank.terminate()'
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
rm -rf "$ERROR_DIR" /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*_"${MASTER_PORT:-29500}"_*
if [ $code -gt 192 ]; then
  case $((256 - code)) in
    9) say "error: a rank was killed (signal 9), often for want of memory" "错误：一个进程被强行结束（信号 9），多半是内存不够" ;;
    15) say "stopped by SIGTERM" "收到 SIGTERM，已停止" ;;
    *) say "error: a rank was ended by signal $((256 - code))" "错误：一个进程被信号 $((256 - code)) 结束" ;;
  esac >&2
fi
exit $code
