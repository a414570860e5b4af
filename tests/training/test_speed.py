"""Model FLOPs utilization of a window of steps, against the products counted by hand."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model

from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.model.model_shape import count_model
from dpo_dist.objective.objective import Objective
from dpo_dist.training.speed import model_flops_utilization, peak_of
from dpo_dist.training.sums import StepSums

PAIRS = [([5, 6, 7], [8, 9], [4]), ([5], [9], [8, 4])]  # 10 packed tokens, 6 of them scored


def test_mfu_counts_the_head_for_scored_tokens_only(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    head = model.get_output_embeddings().weight.numel()
    embeddings = model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - head - embeddings
    window = StepSums.zeros(Objective())
    for _ in range(2):
        window.add_tokens(pack_pairs(PAIRS))
    assert (window.tokens, window.tokens_unshared, window.tokens_scored) == (20, 28, 12)
    by_hand = 6 * (matrices * 20 + head * 12)
    mfu = model_flops_utilization(count_model(tmp_path, None), window, seconds=2.0, peak=1e9)
    assert mfu == pytest.approx(by_hand / 2.0 / 1e9, rel=1e-3)


def test_a_cpu_has_no_peak_and_no_mfu() -> None:
    assert peak_of(torch.device("cpu"), "bfloat16") is None
