"""Experts by one grouped product: what is chosen, and that it gives the numbers of a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import adapted, pairs
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dpo_dist.config.training_section import ModelSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.backend_choice import choose_experts
from dpo_dist.engine.forward.layout_choice import settle
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import Layout, PairScorer
from dpo_dist.engine.model.policy import settle_layout
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.run.topology import from_environment

CPU = torch.device("cpu")
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
SECTION = {"path": "m", "dtype": "float32"}
ADAPTED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def of_width(width: int, dtype: torch.dtype = torch.float32) -> Any:
    """A mixture whose experts have rows of `width`."""
    model: Any = tiny_model("qwen3_moe")
    config = type(model.config)(**model.config.to_dict() | {"moe_intermediate_size": width})
    return type(model)(config).to(dtype).eval()


def scores_and_gradients(model: Any, layout: Layout) -> tuple[torch.Tensor, dict[str, Any]]:
    scorer = PairScorer(model)
    scorer.layout, scorer.backend = layout, "sdpa"
    scores = scorer(pack_pairs(pairs()))
    scores.sum().backward()
    return scores.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_grouped_experts_equal_a_loop(adapter: bool, family: str, layout: Layout) -> None:
    """Log-probs and gradients, in float32, relative to the largest of them."""
    found = []
    for kind in ("eager", "grouped_mm"):
        model: Any = adapted(family, **ADAPTED) if adapter else tiny_model(family)
        base_of(model).set_experts_implementation(kind)
        found.append(scores_and_gradients(model, layout))
    (scores, gradients), (grouped, of_grouped) = found
    assert (grouped - scores).abs().max() <= 1e-5 * scores.abs().max()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert any(".experts." in name for name in gradients) and gradients.keys() == of_grouped.keys()
    for name, gradient in gradients.items():
        assert (of_grouped[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_grouped_product_is_chosen_where_it_works(family: str, dtype: torch.dtype) -> None:
    """transformers has it as its own default, so nothing changes but that it was tried."""
    model: Any = tiny_model(family, dtype=dtype)
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    drawn = torch.get_rng_state()
    assert choose_experts(model, CPU) == ("grouped_mm", "it works here")
    assert torch.equal(torch.get_rng_state(), drawn), "the run's own numbers"
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    assert choose_experts(tiny_model("llama"), CPU) is None


@pytest.mark.parametrize(
    ("width", "dtype"), [(25, torch.float32), (28, torch.bfloat16)], ids=["float32", "bfloat16"]
)
def test_experts_that_it_cannot_take_go_one_by_one(width: int, dtype: torch.dtype) -> None:
    """Rows that are no multiple of 16 bytes end transformers' own default with an error."""
    model = of_width(width, dtype)
    with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
        model(torch.arange(9)[None]).logits.float().sum().backward()
    settled = settle(PairScorer(model))
    assert str(settled).endswith(
        "; experts: eager (grouped_mm does not run here: strides should be multiple of 16 bytes)"
    )
    assert settled.found["experts"] == "eager" and settled.layout == "packed"
    assert scores_and_gradients(model, "packed")[0].isfinite().all()


def test_experts_with_other_numbers_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what was found with the one product does not hold for the other."""
    section, record = ModelSection.model_validate(SECTION), tmp_path / "self_check.json"
    caplog.set_level("INFO")
    scorer = PairScorer(tiny_model("mixtral"))
    settle_layout(scorer, scorer, section, CPU, record)
    assert "experts: grouped_mm (it works here)" in caplog.text
    right = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    wrong = lambda *given: 1.5 * right(*given)  # noqa: E731
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", wrong)
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    scorer.register_forward_pre_hook(counted)
    settle_layout(scorer, scorer, section, CPU, record)
    assert "away from a loop over experts" in caplog.text and count > 0


def on_ranks(stage: int) -> tuple[str, list[list[float]], float]:
    with collectives.process_group(from_environment()):
        section = {"deepspeed": f"zero{stage}", "max_grad_norm": 0.0}
        train = TrainSection.model_validate(section)
        sharding = ds_config.training_config(train, "float32", 2)
        scorer = PairScorer(tiny_model("mixtral"))
        engine = zero.start_training(scorer, sharding, train, 1)
        engine.train()
        kind = settle(scorer, engine=engine, device=CPU).found["experts"]
        rank = torch.distributed.get_rank()
        scores = engine(pack_pairs(pairs()[rank::2]))
        zero.backward(engine, scores.sum(), last=True, world_size=2)
        norm = zero.update(engine).grad_norm
        zero.take_down(engine)
        return kind, scores.tolist(), norm


@pytest.mark.parametrize("stage", [2, 3])
def test_grouped_experts_under_zero_equal_a_loop_on_one_rank(stage: int) -> None:
    model: Any = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    scores, gradients = scores_and_gradients(model, "packed")
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    for rank, (kind, own, of_ranks) in enumerate(run_ranks(2, on_ranks, stage, timeout_s=120)):
        assert kind == "grouped_mm"
        torch.testing.assert_close(torch.tensor(own), scores[rank::2], rtol=1e-5, atol=1e-5)
        assert of_ranks == pytest.approx(norm, rel=1e-5)
