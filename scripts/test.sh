#!/usr/bin/env bash
# Everything that must pass: builds .venv, then ruff and pytest. Further words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# tests are of one thread each, and one process per core runs them; in the order of their names the longest ones are not last
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
