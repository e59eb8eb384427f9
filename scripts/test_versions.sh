#!/usr/bin/env bash
# A part of the tests with the oldest versions that pyproject.toml allows (scripts/constraints-oldest.txt): every family,
# generation, resuming, the engines. They lie in .venv-oldest; all else is taken from .venv. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh test
wanted="$(cat pyproject.toml scripts/constraints.txt scripts/constraints-oldest.txt scripts/test_versions.sh | cksum) $PWD"
if [[ ! -f .venv-oldest/installed || "$(<.venv-oldest/installed)" != "$wanted" ]]; then
    echo "Installing the oldest versions into $PWD/.venv-oldest"
    rm -rf .venv-oldest
    .venv/bin/python -m venv .venv-oldest
    where="import sysconfig; print(sysconfig.get_path('purelib'))"
    newest="$(.venv/bin/python -c "$where")" oldest="$(.venv-oldest/bin/python -c "$where")"
    echo "import site; site.addsitedir('$newest')" >"$oldest/newest.pth" # behind what is installed here
    .venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r scripts/constraints-oldest.txt
    echo "$wanted" >.venv-oldest/installed
fi

export PATH="$PWD/.venv-oldest/bin:$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # the two test processes share the cores
.venv-oldest/bin/python -m apt_trainer env
tests=(
    tests/edges/test_library_versions.py
    tests/unit/surgery/test_adapters.py
    tests/unit/models/test_families.py::test_saved_models_load_with_equal_logits
    tests/unit/models/test_families.py::test_saved_models_generate_with_every_cache_and_decoding
    tests/unit/models/test_families.py::test_generation_under_masks_equals_that_of_the_cut
    tests/unit/models/test_heads.py::test_cached_generation_without_heads
    tests/integration/test_reload.py::test_every_family_and_head_loads_with_equal_logits
    tests/integration/test_resume.py::test_straight_and_resumed_are_bit_equal
    tests/integration/test_processes.py::test_two_processes_equal_one_and_go_on_from_each_other
    tests/integration/test_zero.py::test_zero_equals_one_process_and_checkpoints_move_between_engines
    tests/integration/test_fsdp2.py::test_fsdp2_equals_one_process_and_checkpoints_move_between_them
)
.venv-oldest/bin/python -m pytest -n 2 "${tests[@]}" "$@"
