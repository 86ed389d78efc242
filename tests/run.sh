#!/usr/bin/env bash
# Checks formatting, lints and runs every test; --soak adds the long ones.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=tests/requirements.txt
packages="torch, av, diffusers, tensorboard, tomli, torchmetrics, tqdm, pytest, ruff"
source ./environment.sh

soak=(-m "not soak")
if [ "${1:-}" = --soak ]; then
    soak=(-m "soak or not soak")
    shift
fi
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest "${soak[@]}" "$@"
