#!/usr/bin/env bash
# Checks formatting, lints and runs every test; --soak adds the long ones.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=tests/requirements.txt
packages="torch av diffusers tensorboard tomli torchmetrics tqdm pytest pytest_timeout xdist ruff"
source ./environment.sh

soak=(-m "not soak")
if [ "${1:-}" = --soak ]; then
    soak=(-m "soak or not soak" -o faulthandler_timeout=7200)
    shift
fi
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
# Runs write gigabytes; all of it goes when the tests end, however they end.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Two files at a time, each on one core.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -n 2 --dist loadfile --basetemp "$scratch/pytest" "${soak[@]}" "$@"
