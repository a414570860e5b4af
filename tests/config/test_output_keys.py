"""Keys of `run.dir`, `export` and `generate`: each is flipped, and other things are written."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.keys.flips import Flip, assert_effect, overrides
from support.servers.push_server import hub_server, point_at
from support.tiny_export import trained_run
from support.tiny_models import tiny_model
from support.tiny_run import make_run

from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.run.pipeline import stages_of
from dpo_dist.run.run_dir import MANIFEST_NAME
from dpo_dist.run.topology import SINGLE_PROCESS
from dpo_dist.stages import export, generate, prepare, push, verify

LORA = {"adapter.rank": 3, "adapter.alpha": 4.0}
WIDE = LORA | {"model.path": "wide"}  # weights of more than a MiB
VERIFIED = LORA | {"export.base_model": "me/base"}
PUSHED = VERIFIED | {"export.push_to_hub": "me/tiny"}
ANSWERED = VERIFIED | {"generate.max_new_tokens": 6}
SAMPLED = ANSWERED | {"generate.temperature": 2.0}


def made_elsewhere(config: RunConfig) -> bool:
    """Whether `prepare` writes into the flipped folder."""
    prepare.run(config)
    return Path("elsewhere/pairs").is_dir()


def exported(config: RunConfig) -> dict[str, str]:
    """Names and digests of all exported files; manifests would repeat the settings."""
    trained_run(config)
    folder = export.run(config)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }


def pushed(config: RunConfig) -> Any:
    """What a run sends to the hub as its last stage: repository -> its privacy and branches."""
    shutil.copytree("verified", config.run.dir)
    with hub_server() as hub, pytest.MonkeyPatch.context() as patch:
        point_at(patch, hub.url)
        if any(stage.name == "push" for stage in stages_of(config)):
            push.run(config)
        return {
            name: (repository.private, {b: set(f) for b, f in repository.branches.items()})
            for name, repository in hub.repositories.items()
        }


def answers_of(config: RunConfig) -> list[dict[str, str]]:
    """The answers of base and export."""
    shutil.copytree("verified", config.run.dir)
    return json.loads(generate.run(config).read_text())["answers"]


def prompts_at_once(config: RunConfig) -> int:
    """The most rows that go through the embeddings together."""
    rows: list[int] = []

    def note(module: Any, inputs: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            rows.append(len(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        answers_of(config)
    finally:
        handle.remove()
    return max(rows)


FLIPS = [
    Flip("run.dir", "elsewhere", made_elsewhere),
    Flip("export.dtype", "bfloat16", exported, LORA),
    Flip("export.max_shard_size_mib", 1, exported, WIDE),
    Flip("export.merge", False, exported, LORA),
    Flip("export.base_model", "me/base", exported, LORA),
    Flip("export.push_to_hub", "me/tiny", pushed, VERIFIED),
    Flip("export.hub_private", False, pushed, PUSHED),
    Flip("export.hub_revision", "v1", pushed, PUSHED),
    Flip("export.hub_folder", "adapter", pushed, PUSHED),
    Flip("generate.num_prompts", 2, answers_of, ANSWERED),
    Flip("generate.max_new_tokens", 4, answers_of, VERIFIED | {"generate.num_prompts": 1}),
    Flip("generate.temperature", 2.0, answers_of, ANSWERED),
    Flip("generate.top_p", 1e-6, answers_of, SAMPLED),
    Flip("generate.batch_size", 1, prompts_at_once, ANSWERED),
]


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in the folder where its tests run, and `verified`, what is left of it at its end."""
    folder = tmp_path_factory.mktemp("output")
    path = make_run(folder)
    shutil.copytree(folder / "model", folder / "wide")
    tiny_model("llama", vocab_size=8192).save_pretrained(folder / "wide")
    config = load_config(path, [f"run.dir={folder / 'verified'}", *overrides(VERIFIED)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for variable, value in SINGLE_PROCESS.environment().items():
            patch.setenv(variable, value)
        trained_run(config)
        export.run(config)
        verify.run(config)
        yield path


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key_of_the_output(flip: Flip, run_yaml: Path) -> None:
    assert_effect(flip, run_yaml)
