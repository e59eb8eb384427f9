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
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "No Chromium is installed: the tests that look at a page in a browser are left out."
    set -- -m "not browser" "$@"
fi
pytest -n 2 "$@"
