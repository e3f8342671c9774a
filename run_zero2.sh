#!/usr/bin/env bash
# Trains a LLaVA with DeepSpeed ZeRO-2, on every GPU or, on a machine without one, on two CPU ranks.
#   bash run_zero2.sh                                           the toy example: OpenMoji pictures, some minutes
#   bash run_zero2.sh recipes/one-gpu-stage1.yaml               the arguments in a file; those behind it override it
#   bash run_zero2.sh --model_name_or_path M --data_path D --train_type lora --output_dir O …     your own run
# The arguments are those of `python -m train_llava.train`, and paths those of the folder the command is given in.
# Settings in the environment:
#   INCLUDE=localhost:4,5   the devices to use, as DeepSpeed's --include takes them
#   CPU_RANKS=2             how many processes on a machine without a GPU
#   MASTER_PORT=29500       another one for each run at the same time on one machine
# Several nodes: the same files in the same places on each of them, and
#   HOSTFILE=hosts          a line for each node, "name slots=GPUS", as DeepSpeed's --hostfile takes it
#   NODE_RANK=0             this node's number, from 0 in the order of that file; without it the first node starts the
#                           others by ssh, and the command is given there alone
#   MASTER_ADDR=10.0.0.1    the first node's address, which the others can reach
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements.txt

if [ $# -eq 0 ]; then
  exec bash "$repo/examples/openmoji/run.sh"
fi
export PYTHONSAFEPATH=1 # a datasets.py of the caller's folder is not the library
for argument in "$@"; do
  case $argument in -h | --help) exec python3 -m train_llava.train --help ;; esac
done
arguments=(--deepspeed="$repo/ds_zero2_no_offload.json" "$@") # in one word, which gives way to a recipe behind it

# the ranks and this script tell what went wrong: DeepSpeed's launcher would repeat the command in an error line
launcher=(--master_port "${MASTER_PORT:-29500}" --log_level critical)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || { echo "error: HOSTFILE=$HOSTFILE does not exist" >&2; exit 1; }
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
# hides what DeepSpeed and torch say to each other about deprecated names
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
ERROR_DIR=$(mktemp -d) # where the ranks see which errors have been printed already
export ERROR_DIR
set -m # the launcher gets a process group of its own, so that signals reach it and its ranks through the lines below
deepspeed "${launcher[@]}" --module train_llava.train "${arguments[@]}" &
run=$!
# Told to stop, the launcher would die and leave its ranks running; the ranks themselves end with a checkpoint
stop_ranks='import psutil, sys
for launch in psutil.Process(int(sys.argv[1])).children():
    for rank in launch.children():
        rank.terminate()'
trap 'python3 -c "$stop_ranks" $run 2>/dev/null || true' TERM # who signals everybody has ended the launcher, too
trap 'kill -INT -- -$run' INT
code=0
while kill -0 $run 2>/dev/null; do
  wait $run && code=0 || code=$?
  sleep 0.2 # of a launcher that somebody has paused, `wait` tells at once, over and over
done
wait $run && code=0 || code=$? # where it ended just then
while kill -0 -- -$run 2>/dev/null; do sleep 0.2; done # its ranks may still be writing
# CPU ranks leave the shared memory that they talk through, 64 MB each
rm -rf "$ERROR_DIR" /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*_"${MASTER_PORT:-29500}"_*
if [ $code -gt 192 ]; then
  echo "error: a rank was ended by signal $((256 - code)) (9: often for want of memory)" >&2
fi
exit $code
