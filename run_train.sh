#!/usr/bin/env bash
# Trains with torchrun on what this machine has. Without arguments: a first run of a few
# minutes on real sample clips. Relative paths begin at this file's folder.
#
#   ./run_train.sh [--section.setting VALUE ...]
#
#   CONFIG_FILE     settings            (train_configs/debug.toml)
#   NGPU            processes a node    (all GPUs, or 1 without any)
#   NNODES          nodes               (1)
#   NODE_RANK       this node's number  (0, the one of RDZV_ENDPOINT)
#   RDZV_ENDPOINT   host:port of node 0 (only for several nodes)
#   MAX_RESTARTS    how often to start anew, from the newest checkpoint, if it fails (0)
#   LOG_RANK        show the output of these local ranks alone, such as 0 or 0,1
set -euo pipefail
cd "$(dirname "$0")"

whole() { # NAME LEAST: ends with a line unless the variable is such a number
    [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ ]] && [ "${!1}" -ge "$2" ] && return
    mistake "$1=${!1}: give a whole number from $2 on"
}

mistake() { # TEXT
    echo "error: $1" >&2
    exit 2
}

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug.toml}
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MAX_RESTARTS=${MAX_RESTARTS:-0}
whole NNODES 1 && whole NODE_RANK 0 && whole MAX_RESTARTS 0
[ -z "${NGPU:-}" ] || whole NGPU 1
[ "$NODE_RANK" -lt "$NNODES" ] || mistake "NODE_RANK=$NODE_RANK: NNODES=$NNODES has none"
if [ "$NNODES" -gt 1 ]; then
    endpoint=${RDZV_ENDPOINT:-}
    [[ $endpoint =~ ^.+:([1-9][0-9]{0,4})$ ]] && [ "${BASH_REMATCH[1]}" -lt 65536 ] ||
        mistake "RDZV_ENDPOINT=$endpoint: give host:port of node 0"
fi
# Seconds that processes have for their step and their save before torchrun kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
whole TORCH_ELASTIC_SHUTDOWN_TIMEOUT 1
source ./environment.sh
# Ctrl-C ends this Python without a trace.
count='import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); import torch
print(max(1, torch.cuda.device_count()))'
NGPU=${NGPU:-$("$PYTHON" -c "$count")}
shown=${LOG_RANK:-0}
told="LOG_RANK=$shown: give local ranks from 0 to $((NGPU - 1)), parted by commas"
[[ $shown =~ ^[0-9]{1,3}(,[0-9]{1,3})*$ ]] || mistake "$told"
for rank in ${shown//,/ }; do
    [ "$rank" -lt "$NGPU" ] || mistake "$told"
done

settings=(--config "$CONFIG_FILE")
if [ "$CONFIG_FILE" = train_configs/debug.toml ]; then
    settings+=("--training.global_batch_size=$((2 * NNODES * NGPU))")
    case " $* " in
    *" --data.root"*) settings+=("--data.holdout=") ;; # a share, of other videos
    *) "$PYTHON" -m taehv.samples ;;
    esac
fi
settings+=("$@")
# A mistake in the settings is told here, in one line, before any process starts.
WORLD_SIZE=$((NNODES * NGPU)) "$PYTHON" -m taehv.config "${settings[@]}"

if [ "$NNODES" -gt 1 ]; then
    if [ "$NODE_RANK" = 0 ] && (: <"/dev/tcp/${endpoint%:*}/${endpoint##*:}") 2>&-; then
        mistake "port ${endpoint##*:} is in use: take another in RDZV_ENDPOINT, or give every node its NODE_RANK"
    fi
    launch=(--rdzv_backend c10d --rdzv_id taehv --rdzv_endpoint "$endpoint")
else
    launch=(--standalone)
fi
if [ -n "${LOG_RANK:-}" ]; then
    launch+=(--local-ranks-filter "$LOG_RANK")
fi
# One process may use every core; more share them.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
if [ "$MAX_RESTARTS" -gt 0 ] && [ "$NNODES" -gt 1 ]; then
    # Else processes that torchrun starts again meet the addresses of those before them
    # (pytorch/pytorch issue 135712); on one machine, train.py sees to that.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
# torchrun hands on these, of which SLURM sends the last before a job's time is over. A
# lost terminal's SIGHUP ends torchrun, upon which train.py stops; under nohup neither.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGUSR1}
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NGPU" \
    --max-restarts "$MAX_RESTARTS" "${launch[@]}" train.py "${settings[@]}"
