"""lm-eval on base and export: a local task, the table, and what it says when it cannot run."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import succeed
from support.ranks import ROOT
from support.tiny_run import WORDS, make_run

from dpo_dist.commands import harness
from dpo_dist.config.run_config import load_config
from dpo_dist.errors import HarnessError

TASK = """\
task: colors
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
NUM_ROWS = 30
NO_LM_EVAL = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nowhere())
from dpo_dist.cli.app import main
main()
"""


def task_rows() -> list[dict[str, Any]]:
    words = random.Random(0).choices(WORDS, k=NUM_ROWS)
    return [
        {"question": f"{word} {number}", "choices": ["red", "moon"], "label": number % 2}
        for number, word in enumerate(words)
    ]


def write_other_model(folder: Path) -> None:
    """An "export" beside the base: the same model with other weights in its head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "out" / "export" / "full")


@torch.no_grad()
def accuracy(model_dir: Path, tokenizer_dir: Path, rows: list[dict[str, Any]]) -> float:
    """How often the likelier choice is the right one, computed without lm-eval."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            start = len(tokenizer.encode(row["question"]))
            ids = torch.tensor([tokenizer.encode(f"{row['question']} {choice}")])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            scores.append(float(logps[start - 1 :].sum()))
        right += int(scores[1] > scores[0]) == row["label"]
    return right / len(rows)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    path = make_run(folder)
    write_other_model(folder)
    tasks = folder / "tasks"
    tasks.mkdir()
    lines = [json.dumps(row) + "\n" for row in task_rows()]
    (folder / "rows.jsonl").write_text("".join(lines))
    (tasks / "colors.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return path


@pytest.mark.slow
def test_both_models_are_measured_on_the_same_rows(run_yaml: Path) -> None:
    folder, config = run_yaml.parent, load_config(run_yaml)
    path = harness.run(config, "colors", folder / "tasks", None, False, "8")
    assert path == folder / "out" / "harness.json"
    (row,) = json.loads(path.read_text())["results"]
    export = folder / "out" / "export" / "full"
    expected = [
        accuracy(path, folder / "model", task_rows()) for path in (folder / "model", export)
    ]
    assert expected[0] != expected[1]
    assert [row["base"], row["export"]] == pytest.approx(expected)
    assert row["difference"] == pytest.approx(expected[1] - expected[0])
    stderrs = [(p * (1 - p) / (NUM_ROWS - 1)) ** 0.5 for p in expected]
    assert [row["base_stderr"], row["export_stderr"]] == pytest.approx(stderrs)
    assert row["difference_stderr"] == pytest.approx(sum(e * e for e in stderrs) ** 0.5)
    assert (row["task"], row["metric"], row["num_rows"]) == ("colors", "acc", NUM_ROWS)
    assert row["higher_is_better"] is True


@pytest.mark.slow
def test_a_task_whose_rows_are_not_there(run_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text(
        TASK.format(rows=tmp_path / "nowhere.jsonl").replace("colors", "broken")
    )
    with pytest.raises(HarnessError) as caught:
        harness.run(load_config(run_yaml), "broken", tmp_path, None, False, "8")
    assert caught.value.found.startswith("lm-eval cannot load broken (")
    assert "nowhere.jsonl" in caught.value.found
    assert caught.value.expected == "tasks whose rows can be read"


@pytest.mark.parametrize(
    ("settings", "found", "remedy"),
    [
        ({"names": "colorz"}, "lm-eval has no task colorz (of ", "Did you mean colors"),
        ({"names": ","}, "--harness ','", "For example arc_easy,piqa."),
        ({"batch_size": "0"}, "--batch-size 0", "For example --batch-size 8."),
        ({"include_path": Path("nowhere")}, "--include-path nowhere is no folder", "Correct it."),
    ],
    ids=["unknown", "empty", "batch-size", "include-path"],
)
def test_what_cannot_be_run(
    run_yaml: Path, settings: dict[str, Any], found: str, remedy: str
) -> None:
    usual = {
        "names": "colors", "include_path": run_yaml.parent / "tasks", "limit": None,
        "chat": False, "batch_size": "8",
    }  # fmt: skip
    with pytest.raises(HarnessError) as caught:
        harness.run(load_config(run_yaml), **usual | settings)
    assert caught.value.found.startswith(found) and caught.value.remedy.startswith(remedy)


@pytest.mark.slow
def test_the_command_shows_a_table(run_yaml: Path) -> None:
    include = ("--include-path", run_yaml.parent / "tasks")
    more = ("--limit", "7", "--batch-size", "3", "--chat")
    done = succeed("evaluate", run_yaml, "--harness", "colors", *include, *more)
    assert " colors " in done.stderr and "higher is better" in done.stderr
    result = json.loads((run_yaml.parent / "out" / "harness.json").read_text())
    assert result["limit"] == 7 and result["batch_size"] == 3 and result["chat_template"]
    assert result["results"][0]["num_rows"] == 7


def test_without_lm_eval(run_yaml: Path) -> None:
    command = [sys.executable, "-c", NO_LM_EVAL, "evaluate", str(run_yaml), "--harness", "colors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert said == (
        "error: lm-eval is not installed; expected it, for --harness. pip install 'dpo-dist[eval]'"
    )
