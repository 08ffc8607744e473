"""What is installed is this checkout, complete, and everything that it imports is asked for."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Where the name to import is not the name to install.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
OWN = {"cache", "cli", "pipeline"}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def _requirements(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    texts = project["dependencies"] + [t for extra in extras for t in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in texts]


def _imported(files: list[Path]) -> set[str]:
    """Distributions behind the third-party modules that the files import, inside functions too."""
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    foreign = found - OWN - set(sys.stdlib_module_names)
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in foreign}


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_generic_names_resolve_to_this_checkout(name: str):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT), f"another package named {name!r} is in the way"


def test_every_package_folder_is_packaged_and_no_other():
    tops = (ROOT / "cache", ROOT / "pipeline")
    folders = {file.parent for top in tops for file in top.rglob("*.py")}
    names = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == names
    assert PROJECT["tool"]["setuptools"]["py-modules"] == ["cli"]
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_tests_are_flat_so_that_they_shadow_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_installed_command_is_the_one_that_answers_errors_with_a_sentence():
    assert PROJECT["project"]["scripts"] == {"alignkd": "cli:main"}


def test_the_store_package_is_not_ignored_by_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "cache/new_module.py"]
    # Many people ignore `cache/` globally: the worst of them is simulated here.
    environment = os.environ | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.excludesFile",
        "GIT_CONFIG_VALUE_0": str(ROOT / "tests" / "fixtures" / "global_gitignore"),
    }
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 1


@pytest.mark.parametrize(
    "requirement", _requirements("dev", "emoji"), ids=lambda requirement: requirement.name
)
def test_the_pinned_version_satisfies_the_declared_range(requirement: Requirement):
    pins = _pins()
    name = canonicalize_name(requirement.name)
    assert name in pins, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pins[name], prereleases=True)


def test_constraints_pin_each_package_once_and_exactly():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert len(_pins()) == len(lines)


def test_torchvision_is_neither_pinned_nor_asked_for():
    # Its wheel from the package index brings another torch along; transformers does without it.
    names = {canonicalize_name(requirement.name) for requirement in _requirements("dev", "emoji")}
    assert "torchvision" not in names | _pins().keys()


def test_every_imported_package_is_declared():
    files = [ROOT / "cli.py", *(ROOT / "cache").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
    declared = {
        canonicalize_name(requirement.name)
        for requirement in _requirements(
            "datasets", "emoji", "executorch", "gguf", "llama-cpp", "lmms-eval", "report", "tensorboard"
        )
    }
    assert sorted(_imported(files) - declared) == []
