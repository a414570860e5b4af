"""SmolLM3's published run, from its YAML as it stands to pairs."""

import json
from pathlib import Path
from typing import Any

from support.prepared import write_jsonl
from support.tiny_run import make_run

from dpo_dist.commands.import_config import import_config
from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.run.run_dir import RunDir
from dpo_dist.stages import prepare

YAML = Path(__file__).with_name("smollm3_apo.yaml")
TEMPLATE = (
    "{% if not enable_thinking %}no thinking {% endif %}"
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def test_its_settings(tmp_path: Path) -> None:
    imported = import_config(YAML, (), 16, None)
    (tmp_path / "run.yaml").write_text(imported.text)
    config = load_config(tmp_path / "run.yaml")
    assert [(s.config, s.weight) for s in config.data.train] == [
        ("Preference", 0.5), ("Preference", 0.25),
    ]  # fmt: skip
    assert config.data.max_length == 24576 and not config.data.eval
    assert (config.objective.loss, config.objective.beta) == ("apo_zero", 0.05)
    train = config.train
    assert (train.lr_schedule, train.min_lr_rate, train.warmup_ratio) == ("cosine", 0.1, 0.1)
    assert (train.learning_rate, train.max_grad_norm, train.global_batch_size) == (1e-6, 0.2, 32)
    assert config.checkpoint.every_steps == 0.5
    assert (config.model.revision, config.model.dtype) == ("it-SFT", "bfloat16")
    assert (config.logging.wandb, config.logging.wandb_name) == (True, "SmolLM3-DPO")
    assert imported.differs == [
        "push_to_hub: without hub_model_id; set export.push_to_hub to OWNER/NAME, where OWNER is "
        "your account or organization (TRL takes the account of the token)",
        "overwrite_output_dir: True; a run folder is gone on with; remove it to start anew",
    ]


def write_rows(path: Path, thinking: bool) -> dict[str, Any]:
    """16 rows with what the template is told, as the published ones have it."""
    rows = [
        {
            "prompt": f"red {number}",
            "chosen": [{"role": "user", "content": f"red {number}"},
                       {"role": "assistant", "content": "blue green"}],
            "rejected": [{"role": "user", "content": f"red {number}"},
                         {"role": "assistant", "content": "no"}],
            "chat_template_kwargs": {"enable_thinking": thinking, "custom_instructions": None},
        }
        for number in range(16)
    ]  # fmt: skip
    write_jsonl(path, rows)
    return {"id": str(path), "columns": list(rows[0])}


def test_its_two_sources_become_pairs_by_weight_with_what_the_template_is_told(
    tmp_path: Path,
) -> None:
    make_run(tmp_path)
    path = tmp_path / "model" / "config.json"  # as many positions as the run's max_length
    model = json.loads(path.read_text()) | {"max_position_embeddings": 24576}
    path.write_text(json.dumps(model))
    (tmp_path / "thinking.jinja").write_text(TEMPLATE)
    sources = [
        write_rows(tmp_path / f"{name}.jsonl", thinking) | {"weight": weight}
        for name, thinking, weight in (("no_think", False, 0.5), ("think", True, 0.25))
    ]
    words = [
        f"model_name_or_path={tmp_path}/model", "model_revision=main", "dataset_num_proc=1",
        f"dataset_mixture={json.dumps({'datasets': sources})}", f"output_dir={tmp_path}/out",
    ]  # fmt: skip
    (tmp_path / "run.yaml").write_text(import_config(YAML, words, 1, None).text)
    template = f"data.chat_template={tmp_path}/thinking.jinja"
    config = load_config(tmp_path / "run.yaml", [template])
    prepare.run(config)
    pairs = open_pairs(RunDir(config.run.dir).pairs_dir, "train")
    assert len(pairs) == 8 + 4
    lengths = sorted(len(pairs.token_ids(number)[0]) for number in range(len(pairs)))
    assert lengths[3] < lengths[4], "the prompts of 8 begin with 'no thinking', those of 4 do not"
