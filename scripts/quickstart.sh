#!/usr/bin/env bash
# Installs apt_trainer into .venv, prunes a small text classifier on the CPU, and lets it predict. Needs Python 3.11 or
# newer and a Python package index; no model hub, no GPU. Options are handed on, for example:
#   bash scripts/quickstart.sh
#   SENTENCE="Shares fell after the bank cut its forecast." bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --target_sparsity 0.4 --output_dir out/quickstart-40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

output=out/quickstart previous=""
for word in "$@"; do
    if [[ "$previous" == --output_dir ]]; then output="$word"; fi
    if [[ "$word" == --output_dir=* ]]; then output="${word#*=}"; fi
    previous="$word"
done

bash scripts/install.sh
.venv/bin/apt-trainer train --config recipes/quickstart.yaml "$@"
echo
.venv/bin/apt-trainer predict "$output" --text "${SENTENCE:-The striker scored twice in extra time and lifted the cup.}"
