"""A vision-language model as a language model: what a text never reaches stays as it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import succeed
from support.tiny_run import make_run
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dpo_dist.config.run_config import load_config
from dpo_dist.engine.model.policy import PolicyParts, load_policy


@pytest.mark.slow
def test_full_training_of_a_vision_language_model_leaves_the_rest_of_it(tmp_path: Path) -> None:
    path = make_run(tmp_path, "gemma3")
    whole = json.loads((tmp_path / "model" / "config.json").read_text())
    text = {key: value for key, value in whole.items() if key != "architectures"}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    run = load_config(path)
    parts = PolicyParts(tmp_path / "model", run.model)
    trained = {
        n for n, p in load_policy(parts, torch.device("cpu")).named_parameters() if p.requires_grad
    }
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    succeed("run", path, "train.max_steps=2", "train.weight_decay=0.1", "local.workers=1")
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "export" / "full" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vision" in name or "projector" in name for name in moved)
