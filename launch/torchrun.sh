#!/usr/bin/env bash
# One run over several hosts: start this on each of them, with the same arguments.
#   NODES=2 HEAD=host0 GPUS=8 launch/torchrun.sh model=llama32_1b parallel=tp8pp2
# The hosts share the directory that the run writes to.
set -euo pipefail

: "${NODES:?number of hosts}" "${HEAD:?name of the first host}"
exec torchrun \
  --nnodes="$NODES" \
  --nproc-per-node="${GPUS:-8}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$HEAD:${PORT:-29500}" \
  --rdzv-id="${RUN_ID:-megabridge}" \
  -m megabridge.run "$@"
