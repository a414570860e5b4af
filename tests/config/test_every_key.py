"""Every config key is flipped by exactly one test, which sees the effect."""

from collections import Counter

import test_cluster_keys
import test_data_keys
import test_model_keys
import test_objective_keys
import test_output_keys
import test_run_keys
import test_training_keys

from dpo_dist.config.keys import explain_keys

TABLES = (
    test_cluster_keys.FLIPS, test_data_keys.FLIPS, test_model_keys.FLIPS,
    test_objective_keys.FLIPS, test_output_keys.FLIPS, test_training_keys.FLIPS,
)  # fmt: skip


def test_every_key_is_flipped() -> None:
    flipped = Counter([*test_run_keys.KEYS, *(flip.key for table in TABLES for flip in table)])
    assert flipped == Counter(key for key, *_ in explain_keys())
