"""What a run asks of a Ray cluster, and whether the cluster has it."""

from ray.train import ScalingConfig

from dpo_dist.config.cluster_section import RaySection
from dpo_dist.errors import ClusterError


def count_workers(section: RaySection, nodes: list[dict[str, float]]) -> int:
    """Workers that fit on the nodes, given the resources of each and the placement."""
    per_worker = {"GPU": section.gpus_per_worker, "CPU": section.cpus_per_worker}
    expected = {name: amount for name, amount in per_worker.items() if amount > 0}
    fitting = [
        int(min(node.get(name, 0.0) // amount for name, amount in expected.items()))
        for node in nodes
    ]
    if section.placement == "STRICT_PACK":  # all on one node
        return max(fitting, default=0)
    if section.placement == "STRICT_SPREAD":  # one a node
        fitting = [min(number, 1) for number in fitting]
    return sum(fitting)


def check_resources(section: RaySection, nodes: list[dict[str, float]]) -> None:
    """Raises ClusterError when the cluster is too small: Ray would wait for ever."""
    fewest = section.min_workers or section.workers
    possible = count_workers(section, nodes)
    if possible < fewest:
        there = ", ".join(
            f"{node.get('GPU', 0):g} GPUs and {node.get('CPU', 0):g} CPUs" for node in nodes
        )
        strict = f" placed {section.placement}" if section.placement.startswith("STRICT") else ""
        raise ClusterError(
            f"the cluster has room for {possible} workers of {section.gpus_per_worker:g} GPUs and "
            f"{section.cpus_per_worker:g} CPUs{strict} ({len(nodes)} nodes: {there})",
            f"room for {fewest}",
            "Lower ray.workers, ray.gpus_per_worker or ray.cpus_per_worker, "
            + ("set ray.placement=PACK, " if strict else "")
            + "or add nodes.",
        )


def scaling_config(section: RaySection, distributed: bool) -> ScalingConfig:
    """Workers of a stage; a range where it may go on with fewer."""
    resources = {"CPU": section.cpus_per_worker}
    if section.gpus_per_worker:
        resources["GPU"] = section.gpus_per_worker
    num_workers: int | tuple[int, int] = section.workers if distributed else 1
    if distributed and section.min_workers is not None:
        num_workers = (section.min_workers, section.workers)
    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=section.gpus_per_worker > 0,
        resources_per_worker=resources,
        placement_strategy=section.placement,
    )
