"""An export holds about one tensor: peak resident memory, measured by the kernel."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import ROOT
from support.tiny_export import make_trained_run
from support.tiny_tokenizer import make_tokenizer
from support.weights.trained_weights import InMemory
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.export.weight_changes import adapter_changes
from dpo_dist.engine.export.weight_streams import model_weights, plan_model
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.weights.base_weights import build_skeleton, open_base
from dpo_dist.engine.weights.safetensors_writer import write_shards

MIB = 1 << 20
LIMIT_MB = 300


def memory_mb(key: str) -> float:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_the_peak_is_a_few_tensors_and_not_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model_mb = sum(p.numel() * 4 for p in model.parameters()) / MIB
    largest_mb = max(p.numel() * 4 for p in model.parameters()) / MIB
    assert (round(model_mb), round(largest_mb)) == (224, 32)
    del model
    adapter = AdapterSection(rank=4)
    policy = add_adapter(build_skeleton(tmp_path / "base"), adapter, "")
    trainable = {n: p.shape for n, p in policy.named_parameters() if p.requires_grad}
    trained = InMemory({f"policy.{name}": torch.ones(shape) for name, shape in trainable.items()})
    base = open_base(tmp_path / "base")
    plan = plan_model(base, adapter_changes(base, policy, trained), torch.float32)
    gc.collect()
    forget_peak()
    before = memory_mb("VmRSS")
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "out", model_weights(plan, trained), 8 * MIB)
    assert memory_mb("VmHWM") - before < 3 * largest_mb
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20


PROGRAM = """
import gc, shutil, sys
from pathlib import Path
import peft, transformers.models.llama.modeling_llama, test_export_memory as memory
from dpo_dist.config.run_config import load_config
from dpo_dist.stages import export
before = memory.memory_mb("VmRSS")
for dtype in ("float32", "bfloat16"):
    config = load_config(Path(sys.argv[1]), [*sys.argv[2:], f"export.dtype={dtype}"])
    shutil.rmtree(config.run.dir / "export", ignore_errors=True)
    gc.collect()
    memory.forget_peak()
    export.run(config)
    print("PEAK_MB", memory.memory_mb("VmHWM") - before)
"""


def model_of_135m(folder: Path, dtype: torch.dtype) -> Path:
    """SmolLM2's own weights where they are, else random ones of its shapes."""
    real = os.environ.get("DPO_DIST_REAL_MODEL")
    if real and dtype == torch.bfloat16:
        return Path(real)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(make_tokenizer(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [(), ("adapter.rank=16",), ("adapter.rank=16", "adapter.use_dora=true")],
    ids=["full", "lora", "dora"],
)
def test_135m_parameters_stay_under_300_mb(
    settings: tuple[str, ...], base_dtype: torch.dtype, tmp_path: Path
) -> None:
    model_dir = model_of_135m(tmp_path / "base", base_dtype)
    overrides = [*settings, f"model.path={model_dir}", "export.max_shard_size_mib=50"]
    run = make_trained_run(tmp_path / "run", "llama", *overrides)
    run_yaml = run.paths.root.parent / "run.yaml"
    folders = (ROOT, ROOT / "tests", Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, run_yaml, *overrides],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = [float(line.split()[1]) for line in done.stdout.splitlines() if "PEAK_MB" in line]
    assert len(peaks) == 2
    assert max(peaks) < LIMIT_MB, peaks
    print("MB above the imports, float32 and bfloat16:", peaks)
