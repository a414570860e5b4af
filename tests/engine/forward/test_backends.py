"""Which kernel is chosen where packages are broken, older or wrong: found by trying each."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.faults.broken_package import BROKEN, broken_package
from torch import Tensor, nn
from torch.nn.attention import varlen

from dpo_dist.engine.forward import backend_choice
from dpo_dist.engine.forward.attention import Backend, PackedRow, packed_attention
from dpo_dist.engine.forward.packing import pack_pairs

CPU = torch.device("cpu")
LENGTHS = [(6, 3, 4), (1, 5, 1)]  # prompt, chosen, rejected


def attended(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], scale: float, window: int
) -> Tensor:
    """Causal attention of each call, aligned to the bottom right; a window of -1 sees all."""
    outs = []
    bounds = [list(zip(e[:-1].tolist(), e[1:].tolist(), strict=True)) for e in ends]
    for (start, end), (first, last) in zip(*bounds, strict=True):
        groups = q.shape[1] // k.shape[1]
        keys, values = (t[first:last].repeat_interleave(groups, 1).float() for t in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q[start:end].float(), keys) * scale
        positions = torch.arange(last - first - (end - start), last - first)[:, None]
        distance = positions - torch.arange(last - first)
        hidden = (distance < 0) | (distance > window if window >= 0 else distance < 0)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(2)
        outs.append(torch.einsum("hqk,khe->qhe", weights, values))
    return torch.cat(outs).to(q.dtype)


def newer_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, *, return_aux: Any = None, scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's kernel with the signature of torch 2.13, on the CPU."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return attended(query, key, value, (cu_seq_q, cu_seq_k), scale, window_size[0])


def older_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, *, return_aux: Any = None, scale: float = 1.0,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """The same with the signature of torch 2.11: it does not know grouped heads."""
    ends = cu_seq_q, cu_seq_k, max_q, max_k
    return newer_varlen(query, key, value, *ends, scale=scale, window_size=window_size)


def oldest_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    """The same with the signature of torch 2.10: neither scale nor window."""
    raise AssertionError("called without what it was asked for")


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    *, seen: list[bool],
) -> Tensor:  # fmt: skip
    """flash-attn 2.8's signature on the CPU; notes in `seen` whether it was to be deterministic."""
    assert causal and softmax_scale is not None
    seen.append(deterministic)
    return attended(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale, window_size[0])


def with_flash_attn(patch: pytest.MonkeyPatch) -> list[bool]:
    module: Any = ModuleType("flash_attn")
    seen: list[bool] = []
    module.flash_attn_varlen_func = functools.partial(flash_attention, seen=seen)
    patch.setitem(sys.modules, "flash_attn", module)
    return seen


def attend(backend: Backend, num_key_heads: int, window: int | None) -> list[Tensor]:
    """Output and gradients over `LENGTHS` with four query heads."""
    row = PackedRow.of(pack_pairs([([3] * p, [4] * c, [5] * r) for p, c, r in LENGTHS]), backend)
    chance = torch.Generator().manual_seed(0)
    heads = (4, num_key_heads, num_key_heads)
    q, k, v = (torch.randn(1, n, 20, 8, generator=chance).requires_grad_() for n in heads)
    mask = None if window is None else torch.tensor(window)
    out, _ = packed_attention(nn.Module(), q, k, v, mask, packed_row=row)
    return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


CHOICES = """
import torch
from dpo_dist.engine.forward.backend_choice import choose_backend
from dpo_dist.errors import ConfigError
from dpo_dist.run.topology import SINGLE_PROCESS
from dpo_dist.stages import doctor
from pathlib import Path
from support.tiny_models import tiny_model
torch.cuda.get_device_capability = lambda device: (9, 0)
for requested in ("auto", "flash_attn"):
    try:
        print(*choose_backend(tiny_model("llama"), requested, torch.device("cuda"), torch.bfloat16))
    except ConfigError as error:
        print(error)
doctor.print_machine(doctor.look(Path(), SINGLE_PROCESS))
"""


@pytest.mark.fault(
    35,
    "a flash-attn that does not import",
    becomes="the next kernel is taken, the reason shown",
)
def test_truth_09_a_flash_attn_that_does_not_import_is_passed_over(tmp_path: Path) -> None:
    """On a GPU by its capability, in a process that finds the package installed."""
    done = subprocess.run(
        [sys.executable, "-c", CHOICES],
        capture_output=True, text=True, timeout=240, env=broken_package(tmp_path, "flash_attn"),
    )  # fmt: skip
    chosen, refused, *machine = done.stdout.splitlines() or [done.stderr]
    # torch's kernel is tried next, and the build for CPUs cannot run it either
    fault = f"flash-attn does not import: {BROKEN}"
    assert chosen.startswith(f"sdpa {fault}; torch's kernel does not run on this device: "), chosen
    assert refused == (
        f"model.attention is flash_attn, but {fault}; expected a backend that can run this model "
        "here: auto, sdpa. Set model.attention to one of them."
    )
    assert f"attention        flash_attn: {fault}" in machine
    assert "attention        sdpa: works" in machine


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("kernel", [older_varlen, newer_varlen])
def test_truth_09_torch_with_and_without_grouped_heads_gives_the_same_numbers(
    kernel: Callable[..., Tensor],
    num_key_heads: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    found = attend("torch", num_key_heads, window)
    torch.testing.assert_close(found, attend("sdpa", num_key_heads, window))


@pytest.mark.parametrize("kernel", [older_varlen, newer_varlen])
def test_a_kernel_that_works_has_no_obstacle(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    with_flash_attn(monkeypatch)
    before = torch.get_rng_state()
    for backend in backend_choice.BACKENDS:
        for dtype in (torch.bfloat16, torch.float32):
            assert backend_choice.kernel_obstacle(backend, CPU, dtype) is None
    assert torch.equal(before, torch.get_rng_state())


def wrong_varlen(*args: Any, scale: float, window_size: Any, enable_gqa: bool = False) -> Tensor:
    """As a kernel that aligns its window otherwise."""
    return newer_varlen(*args, scale=scale, window_size=(-1, 0), enable_gqa=enable_gqa)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (oldest_varlen, "does not run on this device: .* unexpected keyword argument 'scale'"),
        (wrong_varlen, r"gives numbers that are \d\.\de[+-]\d\d away from sdpa's"),
    ],
)
def test_truth_09_a_kernel_is_tried_with_all_it_will_be_asked(
    kernel: Callable[..., Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    obstacle = backend_choice.kernel_obstacle("torch", CPU, torch.bfloat16)
    assert re.search(f"^torch's kernel {said}$", obstacle or ""), obstacle


@pytest.mark.parametrize("deterministic", [True, False])
def test_flash_attn_is_asked_to_be_deterministic_when_torch_is(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = with_flash_attn(monkeypatch)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = attend("flash_attn", 2, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [deterministic]
    torch.testing.assert_close(found, attend("sdpa", 2, 3))
