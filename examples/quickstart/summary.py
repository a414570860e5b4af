"""What the quickstart did: numbers and answers before and after, and where things lie."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_dist.report import charts
from dpo_dist.run.run_dir import RunDir

sys.path.insert(0, str(Path(__file__).parent))
from make_preferences import follows_preference


def main(run_dir: str) -> None:
    """Prints the tables, draws margins.png, and fails unless the export was verified."""
    paths = RunDir(Path(run_dir))
    evaluation = json.loads(paths.evaluate_path.read_text())
    generated = json.loads(paths.generate_path.read_text())["answers"]
    verified = json.loads(paths.verify_path.read_text())["passed"]
    console = Console()

    before, after = evaluation["before"], evaluation["after"]
    numbers = Table("held-out pairs", "before", "after", title=f"{evaluation['num_pairs']} pairs")
    for name, metric in (
        ("reward accuracy", "rewards/accuracies"),
        ("reward margin", "rewards/margins"),
        ("ranked right by log-probs alone", "logps/accuracies"),
    ):
        numbers.add_row(name, f"{before[metric]:.3f}", f"{after[metric]:.3f}")
    follows = [
        sum(follows_preference(row[key]) for row in generated) for key in ("before", "after")
    ]
    numbers.add_row("answers that close with an offer", *(f"{n}/{len(generated)}" for n in follows))
    console.print(numbers)

    answers = Table("prompt", "before", "after", show_lines=True)
    for row in generated[:3]:
        question = row["prompt"].split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        answers.add_row(question, row["before"].strip(), row["after"].strip())
    console.print(answers)

    places = Table("what", "where", show_header=False)
    plot = draw_margins(paths, paths.root / "margins.png")
    for what, where in (
        ("TensorBoard", f"tensorboard --logdir {paths.tensorboard_dir}"),
        ("metrics", paths.metrics_path),
        ("reward margins", plot),
        ("adapter", paths.adapter_dir),
        ("merged model", paths.model_dir(merged=True)),
        ("verification", f"{paths.verify_path} ({'passed' if verified else 'FAILED'})"),
    ):
        places.add_row(what, str(where))
    console.print(places)
    sys.exit(0 if verified else 1)


def draw_margins(paths: RunDir, target: Path) -> Path:
    """Draws the reward margin of the training steps and of the held-out pairs."""
    lines = [json.loads(line) for line in paths.metrics_path.read_text().splitlines()]
    with charts.drawing() as figure:
        axes = figure.subplots()
        for key, label, marker in (
            ("rewards/margins", "training batch", ""),
            ("eval_rewards/margins", "held-out pairs", "o"),
        ):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=label, marker=marker)
        axes.set(xlabel="optimizer step", ylabel="reward margin")
        axes.locator_params(axis="x", integer=True)
        axes.legend()
        target.write_bytes(charts.png(figure))
    return target


if __name__ == "__main__":
    main(*sys.argv[1:])
