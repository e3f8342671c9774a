#!/usr/bin/env bash
# Trains a LLaVA with DeepSpeed ZeRO-2, on every GPU or, on a machine without one, on two CPU ranks.
#   bash run_zero2.sh                                           the embedded example: OpenMoji pictures, some minutes
#   bash run_zero2.sh --model_name_or_path M --data_path D --train_type lora --output_dir O …     your own run
# The arguments are those of `python -m train_llava.train`. Settings in the environment:
#   INCLUDE=localhost:4,5   the devices to use, as DeepSpeed's --include takes them
#   CPU_RANKS=2             how many processes on a machine without a GPU
#   MASTER_PORT=29500       another one for each run at the same time on one machine
# Several nodes: the same files in the same places on each of them, and
#   HOSTFILE=hosts          a line for each node, "name slots=GPUS", as DeepSpeed's --hostfile takes it
#   NODE_RANK=0             this node's number, from 0 in the order of that file; without it the first node starts the
#                           others by ssh, and the command is given there alone
#   MASTER_ADDR=10.0.0.1    the first node's address, which the others can reach
set -euo pipefail
cd "$(dirname "$0")"
source env.sh requirements.txt

if [ $# -eq 0 ]; then
  exec bash examples/openmoji/run.sh
fi

launcher=(--master_port "${MASTER_PORT:-29500}" --log_level warning)
if [ -n "${HOSTFILE:-}" ]; then
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
set -m # the launcher gets a process group of its own, so that signals reach it and its ranks through the lines below
deepspeed "${launcher[@]}" --module train_llava.train --deepspeed ds_zero2_no_offload.json "$@" &
run=$!
# Told to stop, the launcher would die and leave its ranks running; the ranks themselves end with a checkpoint
stop_ranks='import psutil, sys
for launch in psutil.Process(int(sys.argv[1])).children():
    for rank in launch.children():
        rank.terminate()'
trap 'python3 -c "$stop_ranks" $run' TERM
trap 'kill -INT -- -$run' INT
code=0
while kill -0 $run 2>/dev/null; do
  wait $run && code=0 || code=$?
done
# CPU ranks leave the shared memory that they talk through, 64 MB each
rm -f /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*_"${MASTER_PORT:-29500}"_*
exit $code
