"""What nodes compute and send in a second, by the names of their GPUs."""

from dataclasses import dataclass

from dpo_dist.errors import ConfigError
from dpo_dist.planning.flops import PEAKS, peak_flops

# Bytes per second of a GPU to the others of its node, one way: half of what NVIDIA's data sheets
# give for NVLink, and PCIe 4.0 x16 (V100 PCIe and T4: 3.0) where there is none.
LINKS_INSIDE = {
    "A100": 300e9, "H100 PCIE": 32e9, "H100 NVL": 300e9, "H100": 450e9, "H200 NVL": 450e9,
    "H200": 450e9, "B200": 900e9, "L40S": 32e9, "A10": 32e9, "RTX 4090": 32e9,
    "V100 PCIE": 16e9, "V100": 150e9, "T4": 16e9,
}  # fmt: skip
LINK_SHARE = 0.8  # of a link's rate that large collectives reach


@dataclass(frozen=True)
class Hardware:
    """Nodes that are alike; rates are those that are reached, not those of data sheets."""

    gpu: str
    gpus_per_node: int
    flops: float  # a second, of a GPU
    inside: float  # bytes a second, of a GPU to the others of its node
    between: float  # bytes a second, of a node to the others

    def seconds(self, num_bytes: float, nodes: int) -> tuple[float, float]:
        """What a ring over all GPUs takes inside nodes and between them.

        `num_bytes` is what is gathered, or scattered, in whole: a GPU passes on all but its own
        part, and each node as much to the next one.
        """
        ranks = nodes * self.gpus_per_node
        moved = num_bytes * (ranks - 1) / ranks
        return moved / self.inside, moved / self.between if nodes > 1 else 0.0


def hardware_of(
    gpu: str, dtype: str, gpus_per_node: int, link_gbit: float, utilization: float
) -> Hardware:
    """Nodes with GPUs of a name in the table of peaks, and links of so many Gbit/s a node.

    Raises ConfigError for a GPU without a peak in `dtype`.
    """
    name, peak = gpu.upper(), peak_flops(gpu, dtype)
    if peak is None or name not in LINKS_INSIDE:
        known = ", ".join(word for word, _, dtypes in PEAKS if dtype in dtypes)
        raise ConfigError(
            f"--gpu {gpu}, of which the peak in {dtype} is not known",
            f"one of {known or 'none: there is no table for this dtype'}",
            "Name one of them, or set model.dtype to bfloat16.",
        )
    return Hardware(
        gpu=name,
        gpus_per_node=gpus_per_node,
        flops=peak * utilization,
        inside=LINKS_INSIDE[name] * LINK_SHARE,
        between=link_gbit / 8 * 1e9 * LINK_SHARE,
    )
