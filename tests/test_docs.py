"""The docs: tests they lean on exist, and links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_tests_exist(path: Path) -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)(?:\[\w+\])?`", path.read_text())
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_truth_16_an_equal_resume_is_claimed_for_cpus_only(path: Path) -> None:
    """Attention on GPUs adds up in any order unless told otherwise, and no GPU was measured."""
    claims = re.compile(r"resume[^.]*(?:bit-identical|same\s+weights)", re.S)
    paragraphs = re.split(r"\n\s*\n|\n(?=[*|] )", path.read_text())
    assert [text for text in paragraphs if claims.search(text) and "CPU" not in text] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_named_extras_exist(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"dpo-dist\[([\w, -]+)\]", path.read_text())
    extras = {extra.strip() for names in named for extra in names.split(",")}
    assert extras - project["optional-dependencies"].keys() == set()


def test_every_doc_is_found_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [doc.name for doc in DOCS[1:] if f"docs/{doc.name}" not in readme] == []


def test_every_command_is_on_the_page_of_commands() -> None:
    from typer.main import get_command

    from dpo_dist.cli.app import app

    page = (ROOT / "docs/commands.md").read_text()
    names = list(vars(get_command(app))["commands"])
    assert "train" in names
    assert [name for name in names if f"\n## `dpo-dist {name}" not in page] == []
