"""The forward and its backward on a second device: every family, adapter, layout and backend.

What is held is that nothing mixes the devices, and how often a micro-batch makes the host wait.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from support.devices.chosen import chosen_names, few_of
from support.oracles.plain_forward import PACKED, PADDED, adapted, pairs
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from dpo_dist.engine.forward.attention import Backend
from dpo_dist.engine.forward.backend_choice import model_obstacle
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer, score_pairs
from dpo_dist.objective.pair_logps import Terms

ROW, ENDS = 4, 2  # tensors of a packed row; where its calls end, for the kernels
UPLOADS = {"packed": ROW + ENDS, "padded": ROW + 2}  # lengths and positions of the padded rows
BOTH_ALL_TRUE = {"masking_utils.py:_ignore_causal_mask_sdpa": 2}
RECURRENT = {"masking_utils.py:create_recurrent_attention_mask": 1}
# What transformers asks of a padding mask while it runs: whether anything is padded at all.
WAITS = {
    "falcon_h1": BOTH_ALL_TRUE | RECURRENT, "lfm2": BOTH_ALL_TRUE | RECURRENT,
    "stablelm": BOTH_ALL_TRUE, "llama4": BOTH_ALL_TRUE, "llama": BOTH_ALL_TRUE,
    "all terms": BOTH_ALL_TRUE,
}  # fmt: skip
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "dora": ("llama", {"use_dora": True}),
    "rslora": ("llama", {"use_rslora": True}),
    "dropout": ("llama", {"lora_dropout": 0.1}),
    "trained head": ("llama", {"modules_to_save": ["lm_head"]}),
    "trained embeddings": ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
    "experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
}
KERNELS: dict[str, tuple[Backend, ...]] = {
    "llama": ("torch", "flash_attn"),
    "mistral": ("torch", "flash_attn"),  # windows
    "gemma2": ("flash_attn",),  # soft cap
    "gemma3": ("torch", "flash_attn"),
    "qwen2_moe": ("torch", "flash_attn"),
    "gpt2": ("torch", "flash_attn"),
}
# By default; each kernel, layout and kind of parameter once.
FEW = (
    "llama, sdpa", "gemma3, torch", "gemma2, flash_attn", "qwen2_moe, flash_attn", "llama, padded",
    "falcon_h1, padded", "dora, adapter", "experts, adapter", "all terms, packed",
)  # fmt: skip
ALL_TERMS = Terms(ld_alpha=0.5, unweighted=True, prompt=True, sum_sq=True, num_experts=4)


def names() -> list[str]:
    """ "what, how": a family with a backend or padded, a kind of adapter, all terms in a layout."""
    kernels = [f"{family}, {kernel}" for family in KERNELS for kernel in KERNELS[family]]
    return [
        *(f"{family}, sdpa" for family in PACKED),
        *kernels,
        *(f"{family}, padded" for family in ("llama", "gemma2", *PADDED)),
        *(f"{name}, adapter" for name in ADAPTERS),
        "all terms, packed",
        "all terms, padded",
    ]


def case(name: str) -> tuple[Any, Layout, Backend, Terms]:
    """(policy, layout, backend, terms)"""
    what, how = name.split(", ")
    if what == "all terms":
        return tiny_model("mixtral", dtype=torch.bfloat16), how, "sdpa", ALL_TERMS  # pyright: ignore
    if how == "adapter":
        family, settings = ADAPTERS[what]
        return adapted(family, **settings).to(torch.bfloat16), "packed", "torch", Terms()
    model = without_dropout(tiny_model(what, dtype=torch.bfloat16))
    if how == "padded":
        return model, "padded", "sdpa", Terms()
    assert model_obstacle(how, model) is None  # pyright: ignore[reportArgumentType]
    return model, "packed", how, Terms()  # pyright: ignore[reportReturnType]


def without_dropout(model: Any) -> Any:
    """As loading has it: the kernels of torch take none."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def worker(chosen: list[str]) -> dict[str, Any]:
    """Of each case what crossed, or the error."""
    from support.devices import flash_attn_stub
    from support.devices.second_device import second_device

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    seen: dict[str, Any] = {}
    with flash_attn_stub.installed():
        for name in chosen:
            policy, layout, backend, terms = case(name)
            try:
                with second_device() as device:
                    seen[name] = micro_batch(device, policy, layout, backend, terms)
            except Exception as error:
                seen[name] = {"error": repr(error)}
    return seen


def micro_batch(
    device: torch.device, policy: Any, layout: Any, backend: Backend, terms: Terms
) -> dict[str, Any]:
    from support.devices.second_device import Traffic, on_device

    policy.activation_checkpointing_enable({"use_reentrant": True})
    policy.enable_input_require_grads()
    scorer = PairScorer(on_device(policy).train(), layout=layout, backend=backend)
    with Traffic() as traffic:
        columns = score_pairs(scorer, pack_pairs(pairs(), device, terms))
        columns.sum().backward()
    trained = [p for p in scorer.parameters() if p.requires_grad]
    return {
        "columns": [*columns.shape],
        "where": [str(columns.dtype), columns.device.type],
        "without_gradient": sum(p.grad is None for p in trained),
        "uploads": traffic.uploads,
        "blocking": traffic.blocking,
        "waits": Counter(traffic.waits),
    }


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_ranks(1, worker, chosen_names(request), timeout_s=400)[0]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", few_of(names(), FEW))
def test_a_micro_batch_stays_on_its_device(name: str, seen: dict[str, Any]) -> None:
    what, how = name.split(", ")
    padded = how == "padded"
    assert seen[name] == {
        "columns": [3, ALL_TERMS.num_columns if what == "all terms" else 2],
        "where": ["torch.float32", "gpu"],
        "without_gradient": 0,
        "uploads": UPLOADS["padded" if padded else "packed"] + 2 * (name == "all terms, packed"),
        "blocking": [],
        "waits": WAITS.get(what, {}) if padded else {},
    }
