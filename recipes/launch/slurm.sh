#!/bin/bash
# sbatch recipes/launch/slurm.sh recipe=qwen3 [key=value ...]
# One launcher per machine, which starts one process per GPU. Five minutes before the time is up, or
# when the scheduler preempts the job, every process finishes its step, the train state is saved,
# and the job goes back into the queue, where it resumes by itself. LAUNCH chooses another file:
#   LAUNCH=fsdp2 sbatch --nodes=4 recipes/launch/slurm.sh recipe=qwen3
#SBATCH --job-name=dflash-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail

LAUNCH=${LAUNCH:-multi_node}
first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The launcher ends its processes on SIGTERM and waits this long for them, in seconds; its default
# of 30 may be shorter than a step and a save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

must_stop=
stop() {
  must_stop=yes
  scancel --signal=TERM "$SLURM_JOB_ID.0"  # every process of the step below
}
trap stop TERM

# --machine_rank differs between machines, so each shell fills it in itself.
srun --kill-on-bad-exit=0 bash -c 'exec python -m dflash_train.launch \
  --config_file "recipes/launch/$0.yaml" \
  --num_machines "$SLURM_NNODES" \
  --num_processes "$((SLURM_NNODES * SLURM_GPUS_PER_NODE))" \
  --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$1" \
  --main_process_port 29500 \
  --same_network \
  train.py "${@:2}"' "$LAUNCH" "$first_machine" "$@" &
step=$!
wait "$step"
status=$?
if [ -n "$must_stop" ]; then
  wait "$step"  # a trap ends the first wait; the states are being saved
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
