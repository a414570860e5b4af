import pytest

from dpo_dist.errors import ConfigError
from dpo_dist.run.topology import Topology, from_environment, launched

ENVIRONMENT = Topology(3, 4, 1, 2, "10.0.0.1", 29500).environment()


def test_environment_and_back() -> None:
    assert from_environment(ENVIRONMENT) == Topology(3, 4, 1, 2, "10.0.0.1", 29500)


def test_launched_needs_rank_and_world_size() -> None:
    assert launched(ENVIRONMENT)
    assert not launched({"RANK": "0"})


@pytest.mark.fault(
    10,
    "a wrong number of tasks a node, missing variables",
    becomes="refused with the variable and its value",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"MASTER_PORT": ""},
            "environment variables MASTER_PORT are not set; expected all of RANK WORLD_SIZE "
            "LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT. Start the stage through "
            "dpo-dist, or set them in your launcher.",
        ),
        (
            {"RANK": "one"},
            "RANK='one'; expected an integer. Correct it in your launcher.",
        ),
        (
            {"RANK": "4"},
            "RANK=4 with WORLD_SIZE=4; expected 0 <= RANK < WORLD_SIZE. Check the number of tasks "
            "your launcher starts.",
        ),
        (
            {"LOCAL_RANK": "2"},
            "LOCAL_RANK=2 with LOCAL_WORLD_SIZE=2 and WORLD_SIZE=4; expected 0 <= LOCAL_RANK < "
            "LOCAL_WORLD_SIZE <= WORLD_SIZE. Check the number of tasks per node.",
        ),
    ],
)
def test_wrong_environment(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment(ENVIRONMENT | change)
    assert str(caught.value) == message


def test_ranks_of_a_team_read_one_batch() -> None:
    places = [
        from_environment(ENVIRONMENT | {"RANK": str(rank)}).in_teams_of(2) for rank in range(4)
    ]
    assert [(place.rank, place.world_size) for place in places] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ConfigError) as caught:
        from_environment(ENVIRONMENT).in_teams_of(3)
    assert str(caught.value) == (
        "train.sequence_parallel: 3 on 4 ranks; expected a number of ranks that it divides. Start "
        "a multiple of 3 ranks, or set train.sequence_parallel to 1."
    )
