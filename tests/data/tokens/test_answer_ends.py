"""The end of an answer: a base tokenizer's EOS is not what a chat template ends a turn with."""

import json
from pathlib import Path
from typing import Any

import torch
from support.tiny_export import trained_run
from support.tiny_run import make_run
from transformers import AutoTokenizer

from dpo_dist.config.run_config import load_config
from dpo_dist.engine.forward.generation import stop_ids
from dpo_dist.engine.model.load import load_model
from dpo_dist.stages import export

TEXT_END, TURN_END = 0, 2  # <|endoftext|>, <|im_end|>


def test_a_base_model_learns_to_stop_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """`<|endoftext|>` is the tokenizer's EOS and the model's: the export stops at both."""
    run_yaml = make_run(tmp_path)
    model_dir = tmp_path / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(model_dir)
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": TEXT_END}))
    config = load_config(run_yaml, [])
    run = trained_run(config)
    report = json.loads((run.paths.pairs_dir / "report.json").read_text())
    assert report["hints"] == [
        "answers end in <|im_end|>, not in the tokenizer's EOS <|endoftext|>: the export stops at "
        "both"
    ]
    export.run(config)
    folder = run.paths.model_dir(merged=False)
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [TEXT_END, TURN_END]
    base: Any = load_model(model_dir, config.model, device=torch.device("cpu"))
    assert stop_ids(base, AutoTokenizer.from_pretrained(model_dir)) == [TEXT_END, TURN_END]
    assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == 0


def test_a_template_that_ends_in_plain_text_is_told(tmp_path: Path) -> None:
    run_yaml = make_run(tmp_path)
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    run = trained_run(load_config(run_yaml, [f"data.chat_template={tmp_path / 'plain.jinja'}"]))
    report = json.loads((run.paths.pairs_dir / "report.json").read_text())
    assert report["hints"] == [
        "the chat template ends an answer in no special token: the model will hardly learn to stop"
    ]
