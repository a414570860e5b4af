"""The self-check of a model runs once a run, and again when anything that it depends on differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny_models import tiny_model

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.model import policy
from dpo_dist.engine.model.self_check import check_key
from dpo_dist.run.topology import from_environment

CPU = torch.device("cpu")


def forwards_of(record: Path, model: Any, section: ModelSection, training: bool = False) -> int:
    """How many forwards settling a model's layout takes."""
    scorer, count = PairScorer(model.train(training)), 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    scorer.register_forward_pre_hook(counted)
    policy.settle_layout(scorer, scorer, section, CPU, record)
    return count


def section_of(**keys: Any) -> ModelSection:
    return ModelSection(path="m", dtype="float32", **keys)


def test_truth_19_what_was_found_is_not_tried_again(tmp_path: Path) -> None:
    record = tmp_path / "self_check.json"
    assert forwards_of(record, tiny_model("llama"), section_of()) > 0
    assert forwards_of(record, tiny_model("llama"), section_of()) == 0
    assert forwards_of(record, tiny_model("llama"), section_of(), training=True) == 2, "dropout"
    assert forwards_of(record, tiny_model("llama"), section_of(), training=True) == 0
    (check,) = json.loads(record.read_text()).values()
    found, key = check["found"], check["key"]
    assert found["layout"] == "packed" and found["backend"] == "sdpa"
    assert found["moved_by_neighbors"] == found["random_in_training"] == 0.0
    assert key["libraries"]["torch"] and key["devices"] and key["config"]["hidden_size"]
    scorer = PairScorer(tiny_model("mamba"))
    assert policy.settle_layout(scorer, scorer, section_of(), CPU, record) == "padded"
    scorer = PairScorer(tiny_model("mamba"))
    assert policy.settle_layout(scorer, scorer, section_of(), CPU, record) == "padded"


def other_width() -> Any:
    model = tiny_model("llama")
    model.config.rms_norm_eps = 0.1
    return model


@pytest.mark.parametrize(
    ("model", "section"),
    [
        (lambda: tiny_model("qwen2"), {}),
        (other_width, {}),
        (lambda: tiny_model("llama").bfloat16(), {}),
        (lambda: tiny_model("llama"), {"layout": "packed"}),
        (lambda: tiny_model("llama"), {"attention": "sdpa"}),
    ],
    ids=["family", "config", "dtype", "layout", "attention"],
)
def test_truth_19_whatever_it_depends_on_makes_it_run_again(
    model: Callable[[], Any], section: dict[str, Any], tmp_path: Path
) -> None:
    record = tmp_path / "self_check.json"
    forwards_of(record, tiny_model("llama"), section_of())
    assert forwards_of(record, model(), section_of(**section)) > 0


@pytest.mark.parametrize("name", ["_version", "_device_name", "_digest_of_code"])
def test_truth_19_so_do_libraries_device_and_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "self_check.json"
    forwards_of(record, tiny_model("llama"), section_of())
    monkeypatch.setattr(f"dpo_dist.engine.model.self_check.{name}", lambda *_: "another")
    assert forwards_of(record, tiny_model("llama"), section_of()) > 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_truth_19_a_damaged_record_is_made_again(text: str, tmp_path: Path) -> None:
    record = tmp_path / "self_check.json"
    record.write_text(text)
    assert forwards_of(record, tiny_model("llama"), section_of()) > 0
    assert forwards_of(record, tiny_model("llama"), section_of()) == 0


def settled_by_two(record: str) -> list[int]:
    with collectives.process_group(from_environment()):
        return [forwards_of(Path(record), tiny_model("llama"), section_of()) for _ in range(2)]


@pytest.mark.fault(11, "a record that only rank 0 reads", becomes="all ranks decide alike")
def test_truth_19_ranks_agree_on_what_is_known(tmp_path: Path) -> None:
    first, second = run_ranks(2, settled_by_two, str(tmp_path / "self_check.json"))
    assert first == second and first[0] > 0 and first[1] == 0


def test_keys_are_the_same_in_every_process(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def key() -> dict[str, Any]:
        adapted = get_peft_model(
            tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"])
        )
        return check_key(adapted, section_of(), CPU)

    assert key() == key() and key()["adapters"]["default"]["target_modules"] == ["q_proj", "v_proj"]
