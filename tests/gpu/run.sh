#!/usr/bin/env bash
# Runs the trainer on the GPUs of this machine in every form, and prints a table.
#   tests/gpu/run.sh CLIPS_FOLDER [--steps 200] [--cpu]
# --cpu rehearses the same runs, small, over gloo.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD:${PYTHONPATH:-}
exec "${PYTHON:-python3}" tests/gpu/check.py "$@"
