#!/usr/bin/env bash
# Everything a change has to pass: style, layers, types, tests. Installs into .venv first. Options go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/unit/test_recipe.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh test
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # the two test processes share the cores

ruff check .
ruff format --check .
lint-imports
mypy
pytest -n 2 "$@"
