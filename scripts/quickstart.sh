#!/usr/bin/env bash
# Installs apt_trainer into .venv and prunes a small text classifier on the CPU. Needs Python 3.11 or newer and a
# Python package index; no model hub, no GPU. Options are handed on, for example:
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --target_sparsity 0.4 --output_dir out/quickstart-40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh
.venv/bin/apt-trainer train --config recipes/quickstart.yaml "$@"
