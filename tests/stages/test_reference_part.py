"""Parts of a reference pass: each scores its own pairs, together they score all."""

import numpy as np
import pytest

from dpo_dist.config.run_config import parse_config
from dpo_dist.errors import ConfigError
from dpo_dist.stages.reference import own_part


def test_parts_share_out_the_pairs_whatever_is_already_there() -> None:
    missing = np.array([0, 1, 2, 5, 7, 8, 9])
    parts = [own_part(missing, f"{number}/3").tolist() for number in (1, 2, 3)]
    assert parts == [[0, 9], [1, 7], [2, 5, 8]]
    assert own_part(missing, None) is missing
    assert own_part(np.array([9]), "1/3").tolist() == [9], "started again, a part keeps its pairs"


@pytest.mark.parametrize("part", ["3", "0/2", "1/x", "-1/2"])
def test_what_is_no_part(part: str) -> None:
    raw = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    with pytest.raises(ConfigError, match="reference.part"):
        # reference.part=2/8 on a command line
        parse_config(raw | {"reference": {"part": part}})
