"""Floating point operations (FLOPs) of tokens and optimizer steps, and how well a GPU is used.

Only products with matrices of the model are counted. Attention scores are not: forward they take
4 x query width x keys per token and layer, which at 1,000 keys is 3.5 % of an 8B Llama. Nor are
norms, rotations and the loss.
"""

import re
from dataclasses import dataclass

from dpo_dist.planning.setup import ModelShape

HALF_PRECISIONS = ("bfloat16", "float16")

# Dense peaks of the tensor cores with float32 accumulation, in FLOPs per second. The first entry
# whose words all occur in the name that CUDA gives counts. From NVIDIA's data sheets of A100, H100,
# H200, DGX B200, L40S, A10, V100 and T4, and for RTX 4090 the Ada GPU architecture white paper,
# appendix A. Sheets from A100 on print the double as well, which is with structured sparsity.
PEAKS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("A100", 312e12, HALF_PRECISIONS),
    ("H100 PCIE", 756e12, HALF_PRECISIONS),
    ("H100 NVL", 835e12, HALF_PRECISIONS),
    ("H100", 989e12, HALF_PRECISIONS),  # SXM
    ("H200 NVL", 835e12, HALF_PRECISIONS),
    ("H200", 989e12, HALF_PRECISIONS),
    ("B200", 2.25e15, HALF_PRECISIONS),
    ("L40S", 362e12, HALF_PRECISIONS),
    ("A10", 125e12, HALF_PRECISIONS),
    ("RTX 4090", 165e12, HALF_PRECISIONS),
    ("V100 PCIE", 112e12, ("float16",)),
    ("V100", 125e12, ("float16",)),
    ("T4", 65e12, ("float16",)),
)
OTHER_CHIPS = {"MIG", "GRID", "LAPTOP", "D"}  # a slice of the GPU, or a slower one of that name


@dataclass(frozen=True)
class Flops:
    """FLOPs of the passes over some tokens."""

    forward: int
    backward: int
    recomputed: int  # forwards made again, by gradient checkpointing or for the loss

    @property
    def model(self) -> int:
        """What the gradient needs, however it is computed: the FLOPs of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is really computed: the FLOPs of HFU."""
        return self.model + self.recomputed


def flops_per_token(shape: ModelShape, *, checkpointing: bool, tiled_mlp: bool = False) -> Flops:
    """FLOPs of a training token that passes every matrix, the output head included.

    Forward 2 per matrix element, a multiplication and an addition. Backward as many for the
    gradient of the activations, and 2 per trained element for its own gradient. Full training
    takes 6 per parameter, as in Kaplan et al. 2020 (arXiv:2001.08361), section 2.1. MLPs in
    tiles go forward once more.
    """
    forward = 2 * shape.num_active
    trained = 2 * min(shape.num_trained, shape.num_active)
    again = 2 * shape.num_layers * shape.num_mlp if tiled_mlp else 0
    return Flops(forward, forward + trained, (forward if checkpointing else 0) + again)


def step_flops(
    shape: ModelShape,
    num_tokens: int,
    num_scored: int,
    *,
    checkpointing: bool,
    second_forward: bool = False,
    tiled_mlp: bool = False,
) -> Flops:
    """FLOPs of an optimizer step, of all ranks together.

    `num_tokens` are packed tokens: each prompt once, neither padding nor fillers. `num_scored` is
    how many logits rows the head computes: completion tokens, and prompt tokens where a loss reads
    them. The backward always makes the logits again. `second_forward` says that the loss couples
    pairs, so that the whole step goes forward once before it trains.
    """
    token = flops_per_token(shape, checkpointing=checkpointing, tiled_mlp=tiled_mlp)
    in_tiles = num_tokens * (token.recomputed - (token.forward if checkpointing else 0))
    head, unscored = 2 * shape.num_head, num_tokens - num_scored
    forward = token.forward * num_tokens - head * unscored
    backward = token.backward * num_tokens - head * (1 + shape.head_trained) * unscored
    recomputed = in_tiles + (forward if checkpointing else head * num_scored)
    return Flops(forward, backward, recomputed + second_forward * forward)


def utilization(flops: float, seconds: float, peak_flops: float, num_devices: int) -> float:
    """Achieved FLOPs per second over the peak of all devices, from 0 to 1.

    Of `Flops.model` it is the model FLOPs utilization (MFU) of PaLM (Chowdhery et al. 2022,
    arXiv:2204.02311), appendix B, without the attention term there; of `Flops.hardware` the
    hardware FLOPs utilization (HFU).
    """
    return flops / seconds / (peak_flops * num_devices)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOPs per second of a GPU in `dtype`, None for what the table does not have.

    `device_name` as `torch.cuda.get_device_name` gives it. CPUs, float32 (which TF32 may or may
    not take over) and slices of a GPU have no peak here, hence no MFU.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    989000000000000.0
    >>> peak_flops("Tesla T4", "bfloat16") is None
    True
    """
    words = set(re.split(r"[ _-]+", device_name.upper()))
    if words & OTHER_CHIPS:
        return None
    for name, peak, dtypes in PEAKS:
        if words >= set(name.split()):
            return peak if dtype in dtypes else None
    return None
