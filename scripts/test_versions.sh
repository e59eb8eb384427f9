#!/usr/bin/env bash
# A part of the tests with the oldest versions that pyproject.toml allows, and a smaller one with the newest
# (scripts/constraints-oldest.txt, scripts/constraints-newest.txt): families, generation, resuming, the engines. They
# lie in .venv-oldest and .venv-newest; all else is taken from .venv. Options go to pytest; VERSIONS=newest runs one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() { # its name
    local venv=".venv-$1" pins="scripts/constraints-$1.txt" wanted where
    wanted="$(cat pyproject.toml scripts/constraints.txt "$pins" scripts/test_versions.sh | cksum) $PWD"
    if [[ -f "$venv/installed" && "$(<"$venv/installed")" == "$wanted" ]]; then
        return
    fi
    echo "Installing the $1 versions into $PWD/$venv"
    rm -rf "$venv"
    .venv/bin/python -m venv "$venv"
    where="import sysconfig; print(sysconfig.get_path('purelib'))"
    # behind what is installed here
    echo "import site; site.addsitedir('$(.venv/bin/python -c "$where")')" >"$("$venv/bin/python" -c "$where")/rest.pth"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$pins"
    echo "$wanted" >"$venv/installed"
}

newest=(
    tests/edges/test_library_versions.py
    tests/unit/models/test_families.py::test_saved_models_load_with_equal_logits
    tests/unit/models/test_families.py::test_saved_models_generate_with_every_cache_and_decoding
    tests/unit/models/test_heads.py::test_cached_generation_without_heads
    tests/integration/test_resume.py::test_straight_and_resumed_are_bit_equal
    tests/integration/test_processes.py::test_two_processes_equal_one_and_go_on_from_each_other
    tests/integration/test_zero.py::test_zero_equals_one_process_and_checkpoints_move_between_engines
    tests/integration/test_fsdp2.py::test_fsdp2_equals_one_process_and_checkpoints_move_between_them
)
oldest=(
    "${newest[@]}"
    tests/unit/surgery/test_adapters.py
    tests/unit/models/test_families.py::test_generation_under_masks_equals_that_of_the_cut
    tests/integration/test_reload.py::test_every_family_and_head_loads_with_equal_logits
)

bash scripts/install.sh test
export OMP_NUM_THREADS=1 # the two test processes share the cores
path="$PATH"
for name in ${VERSIONS:-oldest newest}; do
    install "$name"
    export PATH="$PWD/.venv-$name/bin:$PWD/.venv/bin:$path"
    "$PWD/.venv-$name/bin/python" -m apt_trainer env
    tests="$name[@]"
    "$PWD/.venv-$name/bin/python" -m pytest -n 2 "${!tests}" "$@"
done
