"""The rules of the house: which room may import which, and who alone does what."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dpo_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
FACTS = {
    "errors", "config", "sections", "config_keys", "attempts", "topology",
    "run_dir", "run_lock", "manifest", "plan", "logs", "status", "stop_flag",
    "model_files", "model_card", "reference_store", "reference_parts", "metrics", "estimate",
    "remedies", "local", "curves", "plots", "report_page", "report_sections",
    "best",
    "svg", "html_page",
    "judging", "verdicts", "endpoint",
    "sweep", "sweep_results", "hub", "wandb_log",
    "trl_import",
}  # fmt: skip
ROOMS = ("data", "objective", "engine", "stages")
# room -> the rooms it may import beside itself and the facts
MAY_IMPORT = {
    "facts": {"data.keys"},
    "data": set(),
    "objective": set(),
    "engine": {"objective"},
    "stages": {"engine", "data", "objective"},
    "cli": {"stages"},
}


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file; `from a import b` counts as a.b too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    if relative.parts[0] in ROOMS:
        return relative.parts[0]
    return "facts" if Path(relative.parts[0]).stem in FACTS else "cli"


def inner_imports(path: Path) -> set[str]:
    return {n.removeprefix("dpo_dist.") for n in imports_of(path) if n.startswith("dpo_dist.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    for name in inner_imports(path):
        target = name.split(".")[0]
        if target not in ROOMS or target == room:
            continue
        allowed = MAY_IMPORT[room]
        assert target in allowed or any(name.startswith(a) for a in allowed), (
            f"{room} imports {name}"
        )


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=lambda p: p.name)
def test_stages_do_not_import_each_other(path: Path) -> None:
    stages = {n for n in inner_imports(path) if n.startswith("stages.")}
    shared = ("stages.base", "stages.inputs", "stages.sizes", "stages.train_step")
    assert all(n.startswith(shared) for n in stages), stages


def test_only_the_engine_names_deepspeed_peft_and_bitsandbytes() -> None:
    for path in MODULES:
        if room_of(path) != "engine":
            libraries = {name.split(".")[0] for name in imports_of(path)}
            assert not libraries & {"deepspeed", "peft", "bitsandbytes"}, path


def test_data_and_facts_do_not_know_torch() -> None:
    for path in MODULES:
        if room_of(path) in ("data", "facts"):
            assert "torch" not in {name.split(".")[0] for name in imports_of(path)}, path


def test_objective_knows_torch_only() -> None:
    for path in (PACKAGE / "objective").glob("*.py"):
        others = {n.split(".")[0] for n in imports_of(path)} - set(sys.stdlib_module_names)
        assert others <= {"torch", "dpo_dist"}, path
        assert all(n.startswith("objective") for n in inner_imports(path)), path


def test_nothing_imports_launch() -> None:
    for path in MODULES:
        assert "launch" not in {name.split(".")[0] for name in imports_of(path)}, path
    assert not (ROOT / "launch" / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.name)
def test_launchers_know_facts_only(path: Path) -> None:
    rooms = {name.split(".")[0] for name in inner_imports(path)} & {*ROOMS, "cli"}
    assert not rooms, "their contract with the stages is argv and environment"


def test_only_topology_reads_the_rank_variables() -> None:
    variable = re.compile(r"""["'](RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE)["']""")
    readers = {p.name for p in MODULES if variable.search(p.read_text())}
    assert readers == {"topology.py"}


def test_only_run_dir_spells_file_names_of_a_run() -> None:
    run_dir = (PACKAGE / "run_dir.py").read_text()
    names = re.findall(r'"([\w.-]+\.(?:json|jsonl|yaml|lock|safetensors))"', run_dir)
    assert {"status.json", "metrics.jsonl", "MANIFEST.json", "probe.safetensors"} <= set(names)
    for path in MODULES:
        if path.name != "run_dir.py":
            spelled = [name for name in names if f'"{name}"' in path.read_text()]
            assert not spelled, f"{path} spells {spelled}"


def test_facts_import_without_torch_and_fast() -> None:
    program = (
        "import sys; import dpo_dist.cli\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_no_utils_and_no_base_classes() -> None:
    for path in MODULES:
        assert path.name != "utils.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not node.name.startswith("Base"), f"{path}: {node.name}"
                assert not node.name.endswith("Manager"), f"{path}: {node.name}"
