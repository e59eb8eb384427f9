"""Where the files are that come with the package: recipes, studies, launch profiles and tasks of lm_eval."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PROFILES = RECIPES / "accelerate"
TASKS = RECIPES / "lm_eval"
SCHEMAS = RECIPES / "schema"
_STUDIES = "ablations"
_NO_RECIPES = (PROFILES.name, TASKS.name, _STUDIES, "depth")


def find_file(path: str) -> Path:
    """The file at ``path``, or the one in the package that is called so: "quickstart", "minilm/sst2",
    "ablations/nri". Where there is neither, ``path``."""
    candidates = (Path(path), RECIPES / f"{path}.yaml", RECIPES / path)
    return next((file for file in candidates if file.is_file()), Path(path))


def recipe_names() -> list[str]:
    """Names of the recipes for ``train``."""
    return [name for name in _names() if name.partition("/")[0] not in _NO_RECIPES]


def study_names() -> list[str]:
    """Names of the studies for ``ablate``."""
    return [name for name in _names() if name.startswith(f"{_STUDIES}/")]


def _names() -> list[str]:
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))
