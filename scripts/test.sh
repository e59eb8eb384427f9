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
left_out=()
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "No Chromium is installed: the tests that look at a page in a browser are left out."
    left_out+=("not browser")
fi
NODE_PATH="${NODE_PATH:-$(npm root -g 2>/dev/null || true)}"
export NODE_PATH
if ! node -e 'require.resolve("@huggingface/transformers")' 2>/dev/null; then
    echo "transformers.js is not installed: the tests that run an export under node are left out."
    left_out+=("not node")
fi
if ((${#left_out[@]})); then
    printf -v chosen '%s and ' "${left_out[@]}"
    set -- -m "${chosen% and }" "$@"
fi
pytest -n 2 --dist worksteal "$@" # the tests of a module stay together, and so do its fixtures
