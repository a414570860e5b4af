"""Models that are counted by arithmetic: the numbers of the model itself, without its libraries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import succeed
from support.tiny_models import tiny_model
from support.tiny_run import make_run

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.model.model_shape import count_model
from dpo_dist.planning.known_layouts import FAMILIES, known_shape

# changes to the config.json of a tiny model -> a plain layout
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "tied": ("llama_tied", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 24}),
    "biases beside norms": ("qwen3", {"attention_bias": True}),
    "heads as wide as the model": ("qwen3", {"head_dim": 32}),
    "one layer": ("mistral", {"num_hidden_layers": 1, "layer_types": None}),
}
ADAPTERS: tuple[dict[str, Any] | None, ...] = (
    None,
    {},
    {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
)
LENGTHENED: dict[str, Any] = {"vocab_size": 200}


def write_config(folder: Path, family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a tiny model with these keys changed; None takes one out."""
    tiny_model(family).config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", PLAIN)
def test_arithmetic_and_model_agree(tmp_path: Path, layout: str) -> None:
    config = write_config(tmp_path, *PLAIN[layout])
    for settings in ADAPTERS:
        adapter = None if settings is None else AdapterSection.model_validate(settings)
        for others in ({}, LENGTHENED, {"quantized": True}):
            counted = count_model(tmp_path, adapter, **others)
            assert known_shape(config, adapter, **others) == counted, (settings, others)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("gemma2", {}),
        ("llama", {"hidden_size": 33}),
        ("llama", {"vocab_size": "many"}),
        ("llama", {"num_key_value_heads": None}),
        ("llama", {"head_dim": 1.5}),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "own.Model"}}),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ],
)
def test_what_is_not_plain_is_left_to_the_model(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    assert known_shape(write_config(tmp_path, family, changes), None) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["nothing"]},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": []},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["up_proj"]},
        {"rank_pattern": {"q_proj": 9}},
        {"target_parameters": ["embed_tokens.weight"]},
    ],
    ids=str,
)
def test_an_adapter_of_single_layers_is_left_to_the_model(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = write_config(tmp_path, "llama", {})
    assert known_shape(config, AdapterSection.model_validate(settings)) is None


HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "huggingface_hub")


def test_a_plan_starts_without_heavy_libraries(tmp_path: Path) -> None:
    """With prepared pairs, for a GPU on which the run does not fit, so that remedies are tried."""
    path = make_run(tmp_path)
    succeed("prepare", path)
    program = (
        "import sys; from pathlib import Path; from dpo_dist.commands.plan import print_plan\n"
        "from dpo_dist.config.run_config import load_config\n"
        f"for more in ([], ['adapter.rank=4'], ['adapter.rank=4', 'model.quantization=nf4']):\n"
        f"    print_plan(load_config(Path({str(path)!r}), more), 2, 0.001, False)\n"
        f"heavy = {{*{HEAVY}}} & {{*sys.modules}}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    assert "model.quantization=nf4 (QLoRA)" in done.stdout
