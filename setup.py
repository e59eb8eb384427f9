"""Puts the recipes into wheels, as apt_trainer/recipes. Everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # which reads them where they are
            return
        target = Path(self.build_lib) / "apt_trainer" / "recipes"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree("recipes", target, ignore=shutil.ignore_patterns("README.md", "*.png", "__pycache__"))


setup(cmdclass={"build_py": WithRecipes})
