"""Keys that are valid one by one and wrong together: each is refused with its reason."""

from typing import Any

import pytest

from dpo_dist.config.run_config import parse_config
from dpo_dist.errors import ConfigError

BASE: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"path": "pairs.jsonl"}]},
}
LABELLED = {"path": "org/data", "format": "labelled", "streaming": True}
NF4 = {"path": "org/model", "quantization": "nf4"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"data": {"train": [{"path": "pairs.jsonl"}, LABELLED]}},
        "data.train.1.streaming: true with format labelled; expected false, because the two "
        "answers of a pair may be anywhere in the data. Set it to false, or pair the rows "
        "beforehand.",
    ),
    (
        {"data": {"train": [LABELLED | {"format": "scored"}]}},
        "data.train.0.streaming: true with format scored; expected false, because the two answers "
        "of a pair may be anywhere in the data. Set it to false, or pair the rows beforehand.",
    ),
    (
        {"objective": {"loss": ["simpo", "sft"]}, "reference": {"model": "org/other"}},
        "reference.model: org/other with loss simpo, sft; expected null, because this loss has no "
        "reference. Remove it.",
    ),
    (
        {"objective": {"router_aux_loss_coef": 0.01}},
        "train.gradient_checkpointing: true with objective.router_aux_loss_coef 0.01; expected "
        "false, because recomputed layers pass no gradient to their routers. Set it to false.",
    ),
    (
        {"train": {"offload_activations": True, "gradient_checkpointing": False}},
        "train.offload_activations: true with train.gradient_checkpointing false; expected true, "
        "because what is kept in host memory are the inputs of recomputed layers. Set "
        "train.gradient_checkpointing to true.",
    ),
    (
        {"train": {"profile_steps": [12, 10]}},
        "train.profile_steps: [12, 10]; expected the first step, then the last. Swap them.",
    ),
    (
        {"train": {"optimizer": "muon"}},
        "train.max_grad_norm: 1.0 with train.optimizer muon; expected 0, because ZeRO would clip "
        "the orthogonalized step instead of the gradient. Set it to 0.",
    ),
    (
        {
            "checkpoint": {"best_by": "eval_loss", "every_steps": 250},
            "eval": {"every_steps": 100},
        },
        "checkpoint.every_steps: 250 with eval.every_steps 100 and checkpoint.best_by eval_loss; "
        "expected a multiple of eval.every_steps, because checkpoints are compared by their "
        "evaluations. Set it to 300, for example.",
    ),
    (
        {
            "checkpoint": {"best_by": "eval_loss", "every_steps": 0.5},
            "eval": {"every_steps": 0.25},
        },
        "checkpoint.every_steps: 0.5 with eval.every_steps 0.25 and checkpoint.best_by eval_loss; "
        "expected the same share for both, because checkpoints are compared by their evaluations. "
        "Set it to 0.25, for example.",
    ),
    (
        {"train": {"min_lr_rate": 0.1, "lr_schedule": "linear"}},
        "train.min_lr_rate: 0.1 with lr_schedule linear; expected 0.0, because only cosine and "
        "wsd read it. Remove the key, or set train.lr_schedule to cosine.",
    ),
    (
        {"train": {"warmup_steps": 100, "warmup_ratio": 0.1}},
        "train.warmup_steps: 100 with train.warmup_ratio 0.1; expected one of them, because each "
        "says how long the warmup is. Remove one, or set train.warmup_ratio to null.",
    ),
    (
        {"train": {"decay_steps": 50}},
        "train.decay_steps: 50 with lr_schedule cosine; expected 0.1, because only wsd reads it. "
        "Remove the key, or set train.lr_schedule to wsd.",
    ),
    (
        {"train": {"decay_shape": "linear"}},
        "train.decay_shape: linear with lr_schedule cosine; expected cosine, because only wsd "
        "reads it. Remove the key, or set train.lr_schedule to wsd.",
    ),
    (
        {"eval": {"every_steps": 1.5}},
        "eval.every_steps: 1.5; expected a number of steps, or a share of all steps below 1",
    ),
    (
        {"checkpoint": {"every_steps": 0}},
        "checkpoint.every_steps: 0; expected a number of steps, or a share of all steps below 1",
    ),
    (
        {"adapter": {"target_modules": "(q_proj"}},
        "adapter.target_modules: '(q_proj' is no regular expression (missing ), unterminated "
        "subpattern at position 0)",
    ),
    (
        {"eval": {"patience": 3}},
        "eval.patience: 3 without checkpoint.best_by; expected a metric to compare by. Set "
        "checkpoint.best_by, for example to eval_loss.",
    ),
    (
        {"export": {"checkpoint": "best"}},
        "export.checkpoint: best without checkpoint.best_by; expected a metric to compare by. Set "
        "checkpoint.best_by, for example to eval_loss.",
    ),
    (
        {"export": {"hub_folder": "merged"}},
        "export.hub_folder: merged, which this run does not export; expected auto or full. Set it "
        "to one of these.",
    ),
    (
        {"adapter": {}, "export": {"hub_folder": "full"}},
        "export.hub_folder: full, which this run does not export; expected auto or adapter or "
        "merged. Set it to one of these.",
    ),
    (
        {"adapter": {}, "export": {"hub_folder": "merged", "merge": False}},
        "export.hub_folder: merged, which this run does not export; expected auto or adapter. Set "
        "it to one of these.",
    ),
    (
        {"model": NF4},
        "model.quantization: nf4 without an adapter section; expected one, because quantized "
        "weights are frozen. Add `adapter: {}`.",
    ),
    (
        {"model": NF4, "adapter": {"use_dora": True}},
        "adapter.use_dora: true with model.quantization; expected false, because DoRA would train "
        "the lengths of the quantized rows, and the merge has full-precision rows. Set it to "
        "false.",
    ),
    (
        {"adapter": {"start": "merge"}},
        "adapter.start: merge without adapter.path; expected an adapter to merge. Set "
        "adapter.path.",
    ),
    (
        {"adapter": {"path": "sft", "rank": 8}},
        "adapter.rank: 8 with adapter.start continue; expected no value, because the adapter at "
        "adapter.path has its own. Remove the key, or set adapter.start=merge to train a fresh "
        "adapter.",
    ),
    (
        {"adapter": {}, "model": {"path": "org/model", "add_tokens": ["<a>"]}},
        "model.add_tokens: ['<a>'] with an adapter that leaves the embeddings frozen; expected "
        "trained embeddings, because the new tokens would otherwise stay identical. Add the "
        "embeddings and the head to adapter.modules_to_save, for example [embed_tokens, lm_head].",
    ),
    (
        {"ray": {"workers": 2, "min_workers": 3}},
        "ray.min_workers: 3 with ray.workers 2; expected at most 2. Lower it, or raise "
        "ray.workers.",
    ),
]


@pytest.mark.parametrize(("sections", "problem"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_broken_rule_is_the_only_problem(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE | sections)
    assert str(caught.value) == (
        f"config has 1 problem:\n  {problem}\n"
        "expected keys and values that `dpo-dist config` lists. Fix the lines above."
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"train": [LABELLED | {"streaming": False}]}},
        {"objective": {"loss": "simpo"}},
        {
            "objective": {"router_aux_loss_coef": 0.01},
            "train": {"gradient_checkpointing": False},
        },
        {"train": {"profile_steps": [10, 12]}},
        {"train": {"offload_activations": True, "tiled_mlp": 4096}},
        {"train": {"lr_schedule": "wsd", "decay_steps": 50, "min_lr_rate": 0.1}},
        {"train": {"warmup_steps": 0, "warmup_ratio": None}},
        {"train": {"optimizer": "muon", "max_grad_norm": 0}},
        {"checkpoint": {"best_by": "eval_loss", "every_steps": 200}, "eval": {"patience": 3}},
        {"checkpoint": {"best_by": "eval_loss"}, "export": {"checkpoint": "best"}},
        {"adapter": {}, "export": {"hub_folder": "merged"}},
        {"model": NF4, "adapter": {}},
        {"adapter": {"path": "sft", "dropout": 0.1}},
        {"adapter": {"path": "sft", "start": "merge", "rank": 8, "use_dora": True}},
        {
            "adapter": {"modules_to_save": ["embed_tokens", "lm_head"]},
            "model": {"path": "org/model", "add_tokens": ["<a>"]},
        },
        {"adapter": {"path": "sft"}, "model": {"path": "org/model", "add_tokens": ["<a>"]}},
        {"ray": {"workers": 2, "min_workers": 2}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_goes_together_is_accepted(sections: dict[str, Any]) -> None:
    parse_config(BASE | sections)


def test_all_broken_rules_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE | {"eval": {"patience": 3}, "export": {"checkpoint": "best"}})
    lines = str(caught.value).splitlines()
    assert lines[0] == "config has 2 problems:"
    assert [line.split()[0] for line in lines[1:3]] == ["eval.patience:", "export.checkpoint:"]
