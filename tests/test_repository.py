"""What surrounds the code: hooks, pins, matrix, changelog, citation and security notes agree."""

import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml
from support.ranks import ROOT

import dpo_dist
from dpo_dist.config.keys import override_names

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MATRIX: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "matrix.py"))
CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_hooks_run_installed_tools_and_fetch_nothing() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    programs = {hook["entry"].split()[0] for hook in hooks}
    assert {"ruff", "codespell", "typos"} <= programs
    tools = str(Path(sys.executable).parent)
    assert not [program for program in programs if not shutil.which(program, path=tools)]


def test_the_workflow_of_github_is_ci_run_which_checks_and_tests() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["test"]["steps"][-1]["run"] == ".ci/run"
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make install", "make check", "make test"} <= set(commands)


def test_the_matrix_tries_the_supported_pythons() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [name.removeprefix(prefix) for name in PROJECT["classifiers"] if prefix in name]
    assert MATRIX["PYTHONS"] == tuple(f"3.{minor}" for minor in named)
    assert PROJECT["requires-python"] == f">={MATRIX['PYTHONS'][0]}"


def test_every_pin_is_allowed_by_its_lower_bound() -> None:
    pins, release = MATRIX["pins_of"](ROOT / "constraints.txt"), MATRIX["_release"]
    bounds = MATRIX["lower_bounds"]()
    assert {"torch", "transformers", "ray", "trl"} <= bounds.keys()
    assert not {name for name, bound in bounds.items() if release(pins[name]) < release(bound)}


def test_versions_are_compared_as_releases() -> None:
    release = MATRIX["_release"]
    assert release("1.0") == release("1.0.0") == (1,)
    assert release("0.10.1") > release("0.9")


def test_the_changelog_keeps_its_format() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    dated = [re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", v) for v in versions[1:]]
    assert all(dated), versions
    assert dated[0] and dated[0][1] == dpo_dist.__version__
    sections = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert sections <= CHANGES


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dpo_dist.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_security_notes_name_keys_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`((?:model|logging|export)\.\w+)", text))
    assert "model.allow_pickle_weights" in named
    assert not {f"{name}=" for name in named} - set(override_names())
    files = [*re.findall(r"`((?:launch|slurm)/[\w./]+)`", text), *re.findall(r"\]\((\S+)\)", text)]
    assert files and not [name for name in files if not (ROOT / name).exists()]
