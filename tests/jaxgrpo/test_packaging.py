"""The package's metadata agrees with the clone."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import jaxgrpo

CLONE = Path(jaxgrpo.__file__).parents[1]
PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("jaxgrpo", "models", "rewards", "data")

# What a distribution is imported as, where that is not its name.
IMPORTED_AS = {
    "opencv-python-headless": "cv2",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "rouge-score": "rouge_score",
    "tensorflow-datasets": "tensorflow_datasets",
}


def core_imports() -> set[str]:
    return {IMPORTED_AS.get(name, name) for name in names(PROJECT["project"]["dependencies"])}


def names(requirements: list[str]) -> list[str]:
    return [requirement.split("[")[0].split(">")[0].split("=")[0] for requirement in requirements]


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


def sources(package: str) -> list[Path]:
    return sorted((CLONE / package).rglob("*.py"))


def test_the_version_is_written_once() -> None:
    assert PROJECT["project"]["version"] == jaxgrpo.__version__


def test_the_code_imports_only_what_the_core_install_brings() -> None:
    # numpy and jax bring ml_dtypes; transformers the hub client and tokenizers; rouge-score nltk.
    brought = core_imports() | {"ml_dtypes", "huggingface_hub", "tokenizers", "absl", "nltk"}
    brought |= set(names(PROJECT["project"]["optional-dependencies"]["wandb"]))  # where it is set
    allowed = brought | set(PACKAGES) | set(sys.stdlib_module_names)
    foreign = {
        str(path.relative_to(CLONE)): sorted(imported(path) - allowed)
        for package in PACKAGES
        for path in sources(package)
        if imported(path) - allowed
    }
    # `jaxgrpo verify` compares with PyTorch where that is installed.
    assert foreign == {"jaxgrpo/verification/original.py": ["torch"]}


def test_torch_is_no_part_of_the_core_install_and_is_pinned_for_the_tests() -> None:
    assert "torch" not in names(PROJECT["project"]["dependencies"])
    assert "torch==2.13.0" in PROJECT["project"]["optional-dependencies"]["test"]


def test_the_packages_depend_on_each_other_one_way() -> None:
    never = {"models": {"jaxgrpo"}, "rewards": {"jaxgrpo", "models"}, "data": {"jaxgrpo", "models"}}
    for package, forbidden in never.items():
        for path in sources(package):
            assert not imported(path) & forbidden, path


def test_what_runs_in_data_workers_imports_neither_jax_nor_a_framework() -> None:
    qwen = CLONE / "models" / "qwen2_5_vl"
    paths = [
        *sources("data"),
        *(CLONE / package / "__init__.py" for package in PACKAGES),
        *(qwen / name for name in ("__init__.py", "config.py", "processor.py", "positions.py")),
        CLONE / "rewards" / "parse.py",
    ]
    for path in paths:
        assert not imported(path) & {"jax", "flax", "torch", "tensorflow"}, path


def test_no_file_is_longer_than_500_lines() -> None:
    long = {
        str(path.relative_to(CLONE)): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert long == {}


def test_the_licence_is_the_whole_apache_2_0() -> None:
    text = (CLONE / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_it_cannot_be_uploaded_by_mistake() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


def test_every_extra_names_what_it_is_for() -> None:
    extras = {"tpu", "cuda", "gcs", "wandb", "test"}
    assert set(PROJECT["project"]["optional-dependencies"]) == extras
