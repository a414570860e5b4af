"""The rules of the house: which rooms there are, which may import which, who alone does what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from dpo_dist.run import pipeline

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dpo_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAUNCHERS = sorted((ROOT / "launch").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Every room of the package from the ground up. A room imports only rooms above it in this list,
# so data flows one way; a folder that is not here does not belong to the house.
GROUND = "(top)"  # errors, extras, parsing, wording: known to all
ROOMS = (
    GROUND,
    "config",
    "watch",
    "run",
    "model_files",
    "reference",
    "metrics",
    "planning",
    "planning/scaling",
    "judging",
    "importing",
    "importing/trl",
    "importing/axolotl",
    "importing/llamafactory",
    "data",
    "data/rows",
    "data/sources",
    "data/tokens",
    "data/screening",
    "data/answers",
    "report",
    "sweeps",
    "submission",
    "objective",
    "engine/distributed",
    "engine/weights",
    "engine/forward",
    "engine/sharding",
    "engine/model",
    "engine/export",
    "engine/checkpoints",
    "inputs",
    "training",
    "exporting",
    "verification",
    "stages",
    "commands",
    "cli",
)
WITHOUT_TORCH = ROOMS[: ROOMS.index("objective")]
TOP_LEVEL = {
    "__init__.py",
    "__main__.py",
    "py.typed",
    "errors.py",
    "extras.py",
    "parsing.py",
    "wording.py",
}
TEST_ROOMS = {
    *ROOMS[1:], GROUND, "engine", "launch", "examples", "benchmarks", "clusters", "faults", "fuzz",
    "gpu", "soak",
    "support",
    "support/devices", "support/docs", "support/faults", "support/keys", "support/oracles",
    "support/servers", "support/weights",
}  # fmt: skip
MAX_FILES = 12  # of a folder
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def room_of(path: Path) -> str:
    folder = path.relative_to(PACKAGE).parent.as_posix()
    return GROUND if folder == "." else folder


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file; `from a import b` counts as a.b too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[Path]:
    """The modules of the package that a file imports."""
    parts = [name.split(".")[1:] for name in imports_of(path) if name.startswith("dpo_dist.")]
    files = {PACKAGE.joinpath(*names).with_suffix(".py") for names in parts if names}
    return {file for file in files if file.is_file()}


def libraries_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in [*MODULES, *LAUNCHERS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_the_rooms_are_those_of_the_list() -> None:
    assert {room_of(path) for path in MODULES if path.name != "__init__.py"} == set(ROOMS)
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == TOP_LEVEL


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room == GROUND and path.name == "__main__.py":
        return  # the front door
    above = {
        str(target.relative_to(PACKAGE))
        for target in imported_modules(path)
        if ROOMS.index(room_of(target)) > ROOMS.index(room)
    }
    assert not above, f"{room} imports upward: {sorted(above)}"


@pytest.mark.parametrize("folder", ["stages", "commands"])
def test_stages_do_not_import_each_other(folder: str) -> None:
    """They meet through files; a command that a user gives by hand is no stage's tool either."""
    for path in (PACKAGE / folder).glob("*.py"):
        meant = {t.name for t in imported_modules(path) if room_of(t) == folder}
        assert not meant, f"{path.name} imports {meant}"


def test_a_stage_is_what_the_pipeline_names() -> None:
    """A file a stage and a stage a file; what else a user calls by hand is in commands/."""
    files = sorted(path.stem for path in (PACKAGE / "stages").glob("*.py"))
    names = sorted(stage.name for stage in pipeline.ALL_STAGES)
    assert names == sorted(get_args(pipeline.StageName))
    assert files == ["__init__", *names]
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    assert not commands & {*names}


@pytest.mark.parametrize("stage", get_args(pipeline.StageName))
def test_a_stage_runs_with_a_config_and_returns_the_path_of_its_artifact(stage: str) -> None:
    tree = ast.parse((PACKAGE / "stages" / f"{stage}.py").read_text())
    (run,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run")
    assert run.returns is not None
    signature = f"({ast.unparse(run.args)}) -> {ast.unparse(run.returns)}"
    assert signature == "(config: RunConfig) -> Path"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_inside_a_room(room: str) -> None:
    folder = PACKAGE if room == GROUND else PACKAGE / room
    left = {p: {t for t in imported_modules(p) if room_of(t) == room} for p in folder.glob("*.py")}
    while free := [path for path, needs in left.items() if not needs & left.keys() - {path}]:
        for path in free:
            del left[path]
    assert not left, sorted(path.name for path in left)


def test_files_of_a_folder_files_and_functions_are_few_and_short() -> None:
    folders = {path.parent for path in [*MODULES, *LAUNCHERS, *TESTS]}
    crowded = {str(f): n for f in folders if (n := len(list(f.glob("*.py")))) > MAX_FILES}
    assert not crowded
    lines = {str(p): len(p.read_text().splitlines()) for p in [*MODULES, *LAUNCHERS]}
    assert not {path: count for path, count in lines.items() if count > MAX_FILE_LINES}
    long = {
        f"{path.name}:{node.name}": length
        for path, node in functions()
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


def test_tests_mirror_the_package() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS}
    assert {GROUND if folder == "." else folder for folder in folders} <= TEST_ROOMS
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert len(names) == len(set(names)), "two test files of one name hide each other"


def test_only_the_engine_names_deepspeed_peft_and_bitsandbytes() -> None:
    for path in MODULES:
        if not room_of(path).startswith("engine") and path.name != "extras.py":  # it only tries
            assert not libraries_of(path) & {"deepspeed", "peft", "bitsandbytes"}, path


def test_what_lies_below_the_objective_does_not_know_torch() -> None:
    for path in MODULES:
        if room_of(path) in WITHOUT_TORCH:
            assert "torch" not in libraries_of(path), path


def test_objective_knows_torch_only() -> None:
    for path in (PACKAGE / "objective").glob("*.py"):
        assert libraries_of(path) - set(sys.stdlib_module_names) <= {"torch", "dpo_dist"}, path
        assert all(room_of(target) == "objective" for target in imported_modules(path)), path


def test_nothing_imports_launch() -> None:
    for path in MODULES:
        assert "launch" not in libraries_of(path), path
    assert not (ROOT / "launch" / "__init__.py").exists()


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.name)
def test_launchers_know_nothing_of_torch(path: Path) -> None:
    inside = {room_of(t) for t in imported_modules(path)} - set(WITHOUT_TORCH)
    assert not inside, "their contract with the stages is argv and environment"


def test_only_topology_reads_the_rank_variables() -> None:
    variable = re.compile(r"""["'](RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE)["']""")
    readers = {p.name for p in MODULES if variable.search(p.read_text())}
    assert readers == {"topology.py"}


def test_only_run_dir_spells_file_names_of_a_run() -> None:
    run_dir = (PACKAGE / "run" / "run_dir.py").read_text()
    names = re.findall(r'"([\w.-]+\.(?:json|jsonl|yaml|lock|safetensors))"', run_dir)
    assert {"status.json", "metrics.jsonl", "MANIFEST.json", "probe.safetensors"} <= set(names)
    for path in MODULES:
        if path.name != "run_dir.py":
            spelled = [name for name in names if f'"{name}"' in path.read_text()]
            assert not spelled, f"{path} spells {spelled}"


def test_the_command_line_starts_without_heavy_libraries() -> None:
    program = (
        "import sys; import dpo_dist.cli.app\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'trl', 'matplotlib', 'numpy',"
        " 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_modules_are_imported_by_name() -> None:
    """A stage is dispatched by an import statement, which tools can follow, not by a string."""
    for path in [*MODULES, *LAUNCHERS]:
        assert not re.search(r"import_module|__import__", path.read_text()), path


def test_no_utils_and_no_base_classes() -> None:
    for path in MODULES:
        assert path.name != "utils.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not node.name.startswith("Base"), f"{path}: {node.name}"
                assert not node.name.endswith("Manager"), f"{path}: {node.name}"


def test_only_limits_sets_limits_of_a_process() -> None:
    """Elsewhere nobody would think of what Python compiles under them."""
    (set_there,) = [path for path in TESTS if re.search(r"\.setrlimit\(", path.read_text())]
    assert set_there == ROOT / "tests" / "support" / "faults" / "limits.py"
