#!/usr/bin/env bash
# Starts this node's share of a run over several nodes. Run it on every node, with the same numbers; on two of them:
#
#   NNODES=2 NPROC=8 HEAD=10.0.0.1 launch/multi_node.sh --config configs/fsdp2.yaml
#
# All arguments go to train.py.
set -euo pipefail

: "${NNODES:=2}"        # nodes
: "${NPROC:=8}"         # processes on each node: its GPUs
: "${HEAD:?the name or address of one of the nodes, reached by all}"
: "${PORT:=29500}"      # a free port on HEAD
: "${RUN_ID:=dist_ema}" # the same on all nodes; another for each run that shares HEAD and PORT
: "${ADDRESS:=}"        # of this node, where the others cannot resolve its host name
: "${RESTARTS:=0}"      # how often all processes start again, from the newest checkpoint, when one dies; needs --out

# torchrun would die of the signal that announces preemption. It ignores it from here on, while train.py catches it.
trap '' USR1

# At a restart, processes would find the addresses of those that died: torchrun is to make a store for each start.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" \
    --rdzv-id="$RUN_ID" --max-restarts="$RESTARTS" ${ADDRESS:+--local-addr="$ADDRESS"} "$(dirname "$0")/train.py" "$@"
