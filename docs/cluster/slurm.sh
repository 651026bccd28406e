#!/bin/bash
# One torchrun a node; every node runs the same command.
#   sbatch docs/cluster/slurm.sh train.py --data_path /shared/mine --output_dir /shared/runs/mine
#SBATCH --job-name=thermaflux
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue                # the same command again resumes: nothing else to do
#SBATCH --signal=TERM@120        # two minutes before the end

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the repository root}"

export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a fresh store after every restart: docs/cluster.md
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # where a node has several networks

HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # `head` would close the pipe early

# $(hostname -I) is read on each node, and so not by this shell
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c '
  exec .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend=c10d --rdzv_endpoint="$1:29500" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_conf=is_host="$((SLURM_NODEID == 0))" \
    --local_addr="$(hostname -I | cut -d " " -f 1)" \
    --max_restarts=3 "${@:2}"' torchrun "$HOST" "$@"
