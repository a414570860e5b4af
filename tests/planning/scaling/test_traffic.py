"""The bytes that a step exchanges, against those that DeepSpeed really does."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import join_team
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer, score_pairs
from dpo_dist.engine.model.model_shape import count_model, shape_of
from dpo_dist.engine.model.policy import PolicyParts, build_policy
from dpo_dist.engine.model.recompute import recompute_layers
from dpo_dist.engine.sharding import ds_config, zero
from dpo_dist.planning.scaling.traffic import Traffic, traffic_of
from dpo_dist.planning.setup import Setup, sharding_of
from dpo_dist.run.topology import from_environment

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "vocab_size": 128,
}  # fmt: skip
MICRO_BATCHES = 2
# (ZeRO stage, an adapter, stage3_max_live_parameters); some models are larger than the last
CASES = {
    "zero0": (0, False, 10**9),
    "zero1": (1, False, 10**9),
    "zero2": (2, False, 10**9),
    "zero3": (3, False, 10**9),
    "zero3 gathers again": (3, False, 100_000),
    "zero3 adapter": (3, True, 10**9),
}
LAYER = 41_088  # elements; what is kept for the backward is a number of whole layers
NOT_COUNTED = 64  # bytes of norms and flags


def config_of(stage: int, live: int, world_size: int) -> dict[str, Any]:
    train = TrainSection.model_validate({"learning_rate": 1e-3, "deepspeed": f"zero{stage}"})
    config = ds_config.training_config(train, "bfloat16", world_size)
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 20_000,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
        }
    return config


def counted(sums: Counter[str]) -> None:
    """Counts the bytes of whole tensors in this process's collectives from now on."""

    def watch(name: str, size: Callable[..., int]) -> None:
        real = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            sums[name] += size(*args, *kwargs.values())
            return real(*args, **kwargs)

        setattr(dist, name, watched)

    watch("all_gather_into_tensor", lambda whole, *_: whole.nbytes)
    watch("reduce_scatter_tensor", lambda _, whole, *__: whole.nbytes)
    watch("all_reduce", lambda whole, *_: whole.nbytes)


def second_step(model: str, name: str) -> dict[str, int]:
    """Bytes of a step, by collective; the first one only learns the order of the layers."""
    stage, adapter, live = CASES[name]
    topology, sums = from_environment(), Counter()
    counted(sums)
    with collectives.process_group(topology):
        section = ModelSection.model_validate({"path": model, "dtype": "bfloat16"})
        lora = AdapterSection.model_validate({"rank": 4}) if adapter else None
        train = TrainSection.model_validate({"learning_rate": 1e-3, "deepspeed": f"zero{stage}"})
        config = config_of(stage, live, topology.world_size)
        parts = PolicyParts(Path(model), section, lora)
        engine, _ = build_policy(parts, train, config, num_steps=10, device=CPU, seed=3)
        chance, seen = random.Random(1), Counter()
        for _ in range(2):
            before = Counter(sums)
            for number in range(MICRO_BATCHES):
                ids = [[chance.randrange(3, 128) for _ in range(n)] for n in (9, 7, 8)]
                scores = score_pairs(engine, pack_pairs([tuple(ids)], CPU))  # pyright: ignore
                loss = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).sum()
                last = number == MICRO_BATCHES - 1
                zero.backward(engine, loss, last=last, world_size=topology.world_size)
            zero.update(engine)
            seen = sums - before
        zero.take_down(engine)
    return dict(seen)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


def predicted(model: Path, name: str) -> Traffic:
    stage, adapter, live = CASES[name]
    lora = AdapterSection.model_validate({"rank": 4}) if adapter else None
    return traffic_of(
        Setup(
            shape=count_model(model, lora),
            sharding=sharding_of(config_of(stage, live, 2)), world_size=2, dtype_bytes=2,
            micro_batch_tokens=1, scoring_tokens=0, logits_per_chunk=1, checkpointing=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_a_step_are_those_that_deepspeed_exchanges(name: str, model: Path) -> None:
    found = run_ranks(2, second_step, str(model), name)[0]
    traffic, layer = predicted(model, name), 2 * LAYER * (name == "zero3 gathers again")
    gathered = MICRO_BATCHES * traffic.gathered + traffic.updated
    away = found.get("all_gather_into_tensor", 0) - gathered
    assert 0 <= away <= MICRO_BATCHES * layer + NOT_COUNTED
    assert found.get("reduce_scatter_tensor", 0) == MICRO_BATCHES * traffic.scattered
    reduced = MICRO_BATCHES * traffic.reduced + traffic.reduced_once
    assert 0 <= found.get("all_reduce", 0) - reduced <= NOT_COUNTED
    assert gathered + reduced > 0


def test_one_rank_exchanges_nothing_and_hpz_gathers_inside_nodes(model: Path) -> None:
    shape = count_model(model, None)
    config = config_of(3, 100_000, 4)
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    setup = Setup(
        shape=shape, sharding=sharding_of(config), world_size=4, dtype_bytes=2,
        micro_batch_tokens=1, scoring_tokens=0, logits_per_chunk=1, checkpointing=True,
    )  # fmt: skip
    n = shape.num_parameters
    assert traffic_of(setup) == Traffic(2 * n, 2 * (n - 100_000), 4 * n, 0, 0, 0)
    from dataclasses import replace

    assert traffic_of(replace(setup, world_size=1)) == Traffic(0, 0, 0, 0, 0, 0)


def sent_to_the_group(recomputed: bool) -> tuple[int, int]:
    """Bytes that leave this rank in a micro-batch, and its tokens; one key-value head."""
    sent: Counter[str] = Counter()
    real = dist.all_to_all_single

    def watched(received: torch.Tensor, parts: torch.Tensor, **settings: Any) -> Any:
        sent["bytes"] += parts.nbytes * (len(parts) - 1) // len(parts)
        return real(received, parts, **settings)

    dist.all_to_all_single = watched
    with collectives.process_group(from_environment()):
        policy: Any = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, num_key_value_heads=1))
        if recomputed:
            recompute_layers(policy)
        scorer = PairScorer(policy.train(), team=join_team(dist.get_world_size()))
        packed = pack_pairs([(list(range(3, 13)), [5] * 12, [6] * 6)])
        score_pairs(scorer, packed).sum().backward()
    return sent["bytes"], packed.num_tokens


@pytest.mark.parametrize(
    ("ranks", "recomputed"),
    [(2, True), pytest.param(4, False, marks=pytest.mark.slow)],
)
def test_bytes_between_ranks_that_share_a_row(ranks: int, recomputed: bool) -> None:
    skeleton = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, num_key_value_heads=1))
    setup = Setup(
        shape=shape_of(skeleton), sharding=sharding_of(config_of(0, 1, ranks)), world_size=ranks,
        dtype_bytes=4, micro_batch_tokens=1, scoring_tokens=0, logits_per_chunk=1,
        checkpointing=recomputed, ranks_per_row=ranks,
    )  # fmt: skip
    for sent, tokens in run_ranks(ranks, sent_to_the_group, recomputed):
        assert sent == setup.exchanged_bytes(tokens) > 0
    assert replace(setup, padded=True).exchanged_bytes(28) == 0
