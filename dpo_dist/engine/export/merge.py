"""Folding a low-rank adapter into the weight it adapts, in float32 and in place.

O outputs, I inputs, R rank, E experts of a stacked weight.

LoRA (Hu et al. 2021, arXiv:2106.09685): W + s B A with s = alpha / R, or alpha / sqrt(R) (rsLoRA,
Kalajdzievski 2023, arXiv:2312.03732). DoRA (Liu et al. 2024, arXiv:2402.09353): every row of that
sum is rescaled to the length m that was trained.
"""

import torch


def merge_lora_(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Adds scaling * B A to `weight` (O, I), or to its transpose when stored as (I, O).

    `lora_a` (R, I), `lora_b` (O, R); with `magnitude` (O,) the sum's rows become that long. GPT-2's
    Conv1D and embedding tables (I the vocabulary, O the hidden size) are stored transposed.
    """
    rows = weight.T if transposed else weight  # (O, I), a view
    assert rows.shape == (lora_b.shape[0], lora_a.shape[1]), (rows.shape, lora_a.shape)
    rows.addmm_(lora_b, lora_a, alpha=scaling)
    if magnitude is not None:
        lengths = torch.linalg.vector_norm(rows, dim=1)
        rows.mul_((magnitude / lengths)[:, None])


def merge_expert_lora_(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    transposed: bool = False,
) -> None:
    """Adds every expert's own scaling * B A to a stacked `weight` (E, O, I) or (E, I, O).

    peft keeps the factors of all experts in two matrices: `lora_a` (E * R, I) expert by expert,
    `lora_b` (O, R * E) with the expert as the inner index.
    """
    num_experts = weight.shape[0]
    a = lora_a.reshape(num_experts, -1, lora_a.shape[1])  # (E, R, I)
    b = lora_b.reshape(lora_b.shape[0], -1, num_experts)  # (O, R, E)
    for expert in range(num_experts):
        merge_lora_(weight[expert], a[expert], b[..., expert], scaling, transposed=transposed)
