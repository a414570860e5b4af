"""Keys of `model` and `adapter`: each is flipped, and another policy is loaded."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.keys.flips import Flip, assert_effect
from support.servers.hub_server import hub, read_from
from support.tiny_models import tiny_model
from support.tiny_run import make_run
from support.weights.start_adapters import save_adapter

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model.policy import PolicyParts, load_policy, settle_layout
from dpo_dist.errors import ConfigError, ModelFilesError
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.stages import prepare

CPU = torch.device("cpu")
REPO = "org/tiny"
LORA = {"adapter": {}}
SFT = {"adapter.path": "sft"}
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "remote_llama"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def load(config: RunConfig) -> Any:
    """The policy as training starts from it."""
    models = RunModels(config)
    torch.manual_seed(0)
    parts = PolicyParts(models.base, config.model, config.adapter, models.start_adapter)
    return load_policy(parts, CPU)


def policy_of(config: RunConfig) -> Any:
    """Layers, parameters and the scale of adapters."""
    prepare.run(config)  # makes the base model where the config changes it
    policy = load(config)
    weights = {
        name: (weight.dtype, weight.requires_grad, weight.shape, weight.double().sum().item())
        for name, weight in policy.named_parameters()
    }
    scales = [module.scaling for module in policy.modules() if hasattr(module, "lora_A")]
    return str(policy), weights, scales


def scored_by(config: RunConfig) -> Any:
    """The attention backend and the layout of pairs, or why there is no such backend here."""
    scorer = PairScorer(load(config))
    try:
        settle_layout(scorer, scorer, config.model, CPU)
    except ConfigError as error:
        return str(error)
    return scorer.backend, scorer.layout


def class_loaded(config: RunConfig) -> str:
    """The model's class, or what refuses to load it."""
    try:
        return type(load(config)).__name__
    except (ModelFilesError, ValueError) as error:
        return type(error).__name__


FLIPS = [
    Flip("model.path", "other", policy_of),
    Flip("model.revision", "v1", policy_of, {"model.path": REPO}),
    Flip("model.dtype", "bfloat16", policy_of),
    Flip("model.quantization", "nf4", policy_of, LORA),
    Flip("model.attention", "torch", scored_by),
    Flip("model.layout", "padded", scored_by),
    Flip("model.add_tokens", ["<|tool|>"], policy_of),
    Flip("model.pad_vocab_to_multiple", 64, policy_of),
    Flip("model.trust_remote_code", True, class_loaded, {"model.path": "remote"}),
    Flip("model.allow_pickle_weights", True, class_loaded, {"model.path": "pickled"}),
    Flip("adapter", {}, policy_of),
    Flip("adapter.path", "sft", policy_of, LORA),
    Flip("adapter.start", "merge", policy_of, SFT),
    Flip("adapter.rank", 4, policy_of, LORA),
    Flip("adapter.alpha", 64.0, policy_of, LORA),
    Flip("adapter.dropout", 0.5, policy_of, LORA),
    Flip("adapter.target_modules", ["q_proj"], policy_of, LORA),
    Flip("adapter.use_rslora", True, policy_of, LORA),
    Flip("adapter.use_dora", True, policy_of, LORA),
    Flip("adapter.modules_to_save", ["lm_head"], policy_of, LORA),
    Flip("adapter.exclude_modules", ["up_proj"], policy_of, LORA),
    Flip("adapter.target_parameters", ["embed_tokens.weight"], policy_of, LORA),
    Flip("adapter.rank_pattern", {"q_proj": 4}, policy_of, LORA),
    Flip("adapter.alpha_pattern", {"q_proj": 4.0}, policy_of, LORA),
]


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in the folder where its tests run, with other models and an adapter beside it."""
    folder = tmp_path_factory.mktemp("model")
    path = make_run(folder)
    model_dir = folder / "model"
    for name in ("other", "remote", "pickled"):
        shutil.copytree(model_dir, folder / name)
    settings = json.loads((model_dir / "config.json").read_text())
    other = tiny_model("llama", seed=1, vocab_size=settings["vocab_size"])
    other.save_pretrained(folder / "other")
    save_remote_code(folder / "remote", settings)
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(other.state_dict(), folder / "pickled" / "pytorch_model.bin")
    save_adapter(folder / "sft", model_dir, "llama", rank=3)
    revisions = {
        branch: {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        for branch, name in (("main", "model"), ("v1", "other"))
    }
    with pytest.MonkeyPatch.context() as patch, hub({REPO: revisions}) as served:
        patch.chdir(folder)
        read_from(served, folder, patch)
        yield path


def save_remote_code(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "remote.py").write_text(REMOTE_CODE)
    own = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    settings = settings | {"model_type": "remote_llama", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("flip", FLIPS, ids=str)
def test_flipping_a_key_of_the_model(flip: Flip, run_yaml: Path) -> None:
    if flip.key == "model.quantization":
        pytest.importorskip("bitsandbytes")
    assert_effect(flip, run_yaml)
