"""The tiny run that the docs show: its files, a judge that is a rule, and commands in a row."""

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from support.docs.forked_commands import run_command
from support.servers.local_judge import Answer, Request, serve
from support.servers.push_server import hub_server
from support.tiny_run import NUM_EVAL, NUM_TRAIN, make_run

from dpo_dist.run import pipeline

WARM, COLD = ("red", "sun", "warm", "fast", "cat", "dog"), ("blue", "moon", "cold", "river", "tree")
SETTINGS = {"train": {"learning_rate": 3e-4}, "local": {"workers": 1}}
PUZZLE = "What?"
PROMPTS = ("Name a color.", "What is warm?", "Who runs fast?", "Where is the cat?")
ZEPHYR = {  # alignment-handbook's full DPO run, as far as TRL's own script knows its keys
    "model_name_or_path": "alignment-handbook/zephyr-7b-sft-full",
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "dataset_train_split": "train_prefs",
    "dataset_test_split": "test_prefs",
    "output_dir": "data/zephyr-7b-dpo-full",
    "bf16": True,
    "beta": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "learning_rate": 5.0e-7,
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
    "warmup_ratio": 0.1,
}
TASK = {
    "task": "colors",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/colors.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
STAGES = "|".join(stage.name for stage in pipeline.STAGES)
STAGE_HEADING = re.compile(rf"^(?=(?:{STAGES}): .* ─+$)", re.MULTILINE)
CLEANED = (
    (r"^\n?.*\d+%\|.*\n", ""),  # bars that are hushed before the imports
    (r"^(?:\[\d\d/\d\d/\d\d \d\d:\d\d:\d\d\]| {19}) (?=\S)", ""),
    (r"^(.{80})─+$", r"\1"),
    (r"^=+ (\S+) =+$", r"=== \1 ==="),
    (r" +$", ""),
)


@dataclass(frozen=True)
class DocsRun:
    """A folder with run.yaml and what else the documented commands read; what they printed."""

    folder: Path
    judge_url: str
    hub_url: str
    outputs: dict[str, str] = field(default_factory=dict)

    def output(self, command: str) -> str:
        """What a command prints, run once; `dpo-dist run` gives the outputs of the stages too."""
        if command not in self.outputs:
            self._provide(command)
            said = run_command(command.replace("URL", self.judge_url), self.folder, self.hub_url)
            self.outputs[command] = self._clean(said)
        if command == "dpo-dist run run.yaml":
            _, *parts = STAGE_HEADING.split(self.outputs[command])
            stages = {part.split(":")[0]: part for part in parts}
            for name, part in stages.items():
                self.outputs[f"dpo-dist {name} run.yaml"] = part
        return self.outputs[command]

    def _provide(self, command: str) -> None:
        """A copy of the run where a command names one, for what would spoil the run's status."""
        for name, left_out in {"verified": (), "unverified": ("verify.json",)}.items():
            copy = self.folder / name
            if f"run.dir={name}" in command and not copy.exists():
                without = shutil.ignore_patterns(*left_out)
                shutil.copytree(self.folder / "out", copy, ignore=without, symlinks=True)

    def _clean(self, said: str) -> str:
        """As on the page: without clock, trailing blanks and bars of other libraries, rules of 80
        characters, and what the page calls RUN, URL and HUB."""
        names = {f"{self.folder}/out": "RUN", f"{self.folder}/": "", self.judge_url: "URL"}
        for real, name in (names | {self.hub_url: "HUB"}).items():
            said = said.replace(real, name)
        for pattern, replacement in CLEANED:
            said = re.sub(pattern, replacement, said, flags=re.MULTILINE)
        return said


@contextlib.contextmanager
def docs_run(folder: Path) -> Iterator[DocsRun]:
    """Writes the files and serves judge and hub until the block ends."""
    path = make_run(folder)
    settings = yaml.safe_load(path.read_text().replace(f"{folder}/", ""))
    for section, values in SETTINGS.items():
        settings[section] |= values
    path.write_text(yaml.safe_dump(settings))
    _write_preferences(folder / "train.jsonl", NUM_TRAIN)
    _write_preferences(folder / "eval.jsonl", NUM_EVAL)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "dpo.yaml").write_text(yaml.safe_dump(ZEPHYR))
    _write_answers(folder)
    _write_task(folder / "tasks")
    with serve(_longer_is_better) as judge, hub_server() as hub:
        yield DocsRun(folder, judge.url, hub.url)


def _write_preferences(path: Path, count: int) -> None:
    """Warm words are preferred to cold ones, so that held-out pairs can be ranked right."""
    chance = random.Random(path.stem)

    def say(words: tuple[str, ...]) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(2, 9)))

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{path.stem} {number} {say(WARM + COLD)}"}],
            "chosen": [{"role": "assistant", "content": say(WARM)}],
            "rejected": [{"role": "assistant", "content": say(COLD)}],
        }
        for number in range(count)
    ]
    _write_rows(path, rows)


def _write_answers(folder: Path) -> None:
    """20 answers of two models: 8 and 4 are longer, 4 as long, 4 puzzle the judge."""
    lengths = [(2, 1)] * 8 + [(1, 2)] * 4 + [(1, 1)] * 4 + [(0, 0)] * 4
    for place, name in enumerate(("ours", "base")):
        answers = ["yes " * pair[place] or PUZZLE for pair in lengths]
        rows = [
            {"question_id": number, "prompt": f"Question {number}", "answers": [answer]}
            for number, answer in enumerate(answers)
        ]
        _write_rows(folder / f"{name}.jsonl", rows)


def _longer_is_better(request: Request, _: int) -> Answer:
    a, b = re.findall(r"### Assistant [AB] replies\n(.*?)\n\n## ", request.asked, re.S)
    if a.strip() == PUZZLE:
        return Answer("Who is first is right. [[A]]")
    verdict = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return Answer(f"The longer one is better. [[{verdict}]]")


def _write_task(folder: Path) -> None:
    folder.mkdir()
    chance = random.Random(0)
    rows = [
        {
            "question": f"{chance.choice(WARM + COLD)} {n}",
            "choices": ["red", "moon"],
            "label": n % 2,
        }
        for n in range(20)
    ]
    _write_rows(folder / "colors.jsonl", rows)
    (folder / "colors.yaml").write_text(yaml.safe_dump(TASK))


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
