"""tpu_scripts/Containerfile: what the image holds is what jaxgrpo needs to be installed and run."""

from __future__ import annotations

import tomllib

from tests.tpu_scripts.conftest import SCRIPTS

ROOT = SCRIPTS.parent
LINES = (SCRIPTS / "Containerfile").read_text().splitlines()
COPIED = {
    name
    for line in LINES
    if line.startswith("COPY ")
    for name in line.split()[1:-1]  # the last is where to
}


def test_the_files_and_packages_of_the_project_are_copied_and_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    files = [project["project"]["readme"], *project["project"]["license-files"]]
    wanted = {name.removesuffix("*") for name in packages} | {*files, "pyproject.toml", "configs"}
    assert wanted == COPIED
    assert all((ROOT / name).exists() for name in COPIED)


def test_it_installs_an_extra_of_the_project_and_does_not_run_as_root_unless_told_so() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"tpu", "cuda"} <= set(project["project"]["optional-dependencies"])
    assert "ARG ACCELERATOR=cuda" in LINES
    assert LINES.index("ARG RUN_AS=jaxgrpo") + 1 == LINES.index("USER $RUN_AS")
