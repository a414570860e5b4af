"""Sweeps: their points and names, what is shared, what a rerun does, the table and the plot."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml
from matplotlib import colormaps
from support.commands import dpo_dist, succeed
from support.tiny_run import make_run, metrics_of

from dpo_dist.config.keys import to_yaml
from dpo_dist.errors import ArtifactError, ConfigError
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import scoring_contract
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.status import update_stage
from dpo_dist.stages import prepare
from dpo_dist.sweeps import results as sweep_results
from dpo_dist.sweeps.points import (
    Point,
    Sweep,
    link_pairs,
    links_of,
    plan_sweep,
    split_values,
    state_of,
)

BETAS = "objective.beta=0.05,0.1"


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    config = {
        "run": {"dir": str(tmp_path / "out")},
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def refused(run_yaml: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        plan_sweep(run_yaml, overrides)
    return str(error.value)


def finish(point: Point, *, accuracy: float | None, margin: float = 0.0) -> None:
    """Leaves what a finished training leaves."""
    update_stage(point.paths.status_path, "train", "finished")
    write_atomic(point.paths.config_path, to_yaml(point.config))
    lines: list[dict[str, Any]] = [
        {"step": 1, "time": 0, "loss": 0.7, "rewards/accuracies": 0.5, "rewards/margins": 0.0,
         "pairs_per_second": 1.0, "consumed_pairs": 8.0},
        {"step": 2, "time": 1, "loss": 0.6, "rewards/accuracies": 0.6, "rewards/margins": margin,
         "pairs_per_second": 2.0, "consumed_pairs": 16.0},
    ]  # fmt: skip
    if accuracy is not None:
        held_out = {"rewards/accuracies": accuracy, "rewards/margins": margin, "loss": 0.5}
        lines.append({"step": 2, "time": 2} | {f"eval_{k}": v for k, v in held_out.items()})
    write_atomic(point.paths.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.05,0.1, 5e-7", ["0.05", "0.1", "5e-7"]),
        ("0.1", ["0.1"]),
        ("", [""]),
        ("[q_proj,v_proj]", ["[q_proj,v_proj]"]),
        ("[q_proj],[q_proj,v_proj],all-linear", ["[q_proj]", "[q_proj,v_proj]", "all-linear"]),
        ("null,{rank: 8, alpha: 4}", ["null", "{rank: 8, alpha: 4}"]),
        ("'a,b',c", ["'a,b'", "c"]),
    ],
)
def test_values_are_apart_at_commas_outside_brackets_and_quotes(
    text: str, values: list[str]
) -> None:
    assert split_values(text) == values


def test_the_product_of_the_values_in_their_order(run_yaml: Path, tmp_path: Path) -> None:
    sweep = plan_sweep(
        run_yaml, ["train.num_epochs=2", BETAS, "train.learning_rate=5e-7,1e-6"]
    )  # fmt: skip
    assert [point.name for point in sweep.points] == [
        "beta=0.05,learning_rate=5e-07", "beta=0.05,learning_rate=1e-06",
        "beta=0.1,learning_rate=5e-07", "beta=0.1,learning_rate=1e-06",
    ]  # fmt: skip
    last = sweep.points[-1]
    assert last.values == {"objective.beta": 0.1, "train.learning_rate": 1e-6}
    assert (last.config.objective.beta, last.config.train.learning_rate) == (0.1, 1e-6)
    assert {point.config.train.num_epochs for point in sweep.points} == {2}
    assert last.config.run.dir == tmp_path / "out" / "sweep" / last.name
    assert len(sweep.inputs) == 1
    stores = {point.config.reference.store_dir for point in (*sweep.points, *sweep.inputs)}
    assert stores == {tmp_path / "out" / "reference"}


def test_points_share_inputs_unless_pairs_or_model_differ(run_yaml: Path) -> None:
    sweep = plan_sweep(run_yaml, ["data.max_length=64,128", BETAS])
    assert len(sweep.inputs) == 2
    assert [len(sweep.points_of(inputs)) for inputs in sweep.inputs] == [2, 2]
    for point in sweep.points:
        assert point.inputs.config.data == point.config.data
    stores = {point.config.reference.store_dir for point in sweep.points}
    assert len(stores) == 1, "rows are keyed by their tokens, so what is equal is scored once"


@pytest.mark.fault(21, "another dtype, vocabulary, reference model", becomes="a miss")
@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.ld_alpha=0.5,1.0"],
        ["objective.loss=sigmoid,simpo"],
        ["adapter.path=a,b"],
        ["adapter.path=a", "adapter.start=continue,merge"],
        ["model.quantization=null,nf4", "adapter.rank=8"],
        ["model.layout=packed,padded"],
        ["model.dtype=bfloat16,float32"],
        ["model.pad_vocab_to_multiple=8,16"],
        ["reference.model=null,other"],
        ["adapter.modules_to_save=[embed_tokens],[lm_head]", "model.add_tokens=[<a>]"],
    ],
    ids=" ".join,
)
def test_points_of_different_references_have_inputs_of_their_own(
    run_yaml: Path, overrides: list[str]
) -> None:
    sweep = plan_sweep(run_yaml, [*overrides, BETAS])
    assert len(sweep.inputs) == 2
    for inputs in sweep.inputs:
        assert len({point.values["objective.beta"] for point in sweep.points_of(inputs)}) == 2


@pytest.mark.fault(21, "another beta, loss, seed", becomes="a hit")
@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.loss=sigmoid,ipo", "adapter.rank=8,16", "run.seed=1,2"],
        ["objective.loss=simpo,orpo"],
        ["adapter.path=a", "adapter.dropout=0.0,0.1"],
    ],
    ids=" ".join,
)
def test_points_of_one_reference_share_it(run_yaml: Path, overrides: list[str]) -> None:
    assert len(plan_sweep(run_yaml, [*overrides, BETAS]).inputs) == 1


def test_names_are_safe_and_distinct(run_yaml: Path) -> None:
    keys = ("model.path=a/b,a-b", "reference.model=null,../m", "data.train.0.path=/x/y.jsonl,z")
    points = plan_sweep(run_yaml, keys).points
    names = {point.name for point in points}
    assert len(names) == 8 and not any("/" in name or " " in name for name in names)
    assert all("model.path=" in name and "data.train.0.path=" in name for name in names), (
        "two keys end in path"
    )
    long = plan_sweep(run_yaml, [f"model.path={'m' * 250},{'m' * 249}"]).points
    assert max(len(point.name) for point in long) < 80 and len({p.name for p in long}) == 2


def test_all_points_are_checked_before_any_starts(run_yaml: Path, tmp_path: Path) -> None:
    said = refused(run_yaml, "objective.beta=0.1,-1", "train.learning_rat=1,2", "run.seed=1,x")
    assert said.startswith("8 of the sweep's 8 points are not usable:\n  ")
    assert "train.learning_rat: unknown key; did you mean learning_rate? (8 of the points)" in said
    assert "objective.beta: -1; expected a number greater than 0 (4 of the points)" in said
    assert "run.seed: 'x'; " in said
    assert said.endswith("Correct the lines above; nothing was started.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.beta=0.1"], "no key has several values; expected at least one such as"),
        (["objective.beta=0.1,1e-1"], "objective.beta=0.1 stands in the sweep twice; expected"),
        (["run.dir=a,b"], "run.dir cannot be swept; expected keys that differ between runs"),
        ([BETAS, "objective.beta=1,2"], "objective.beta is swept twice; expected keys"),
        ([BETAS, "export.push_to_hub=me/x"], "export.push_to_hub is set: all points would go"),
        (["objective.beta=0.1,,2"], "values '0.1,,2' are not a YAML list ("),
        (["objective.beta=[0.1"], "values '[0.1' are not a YAML list ("),
    ],
)
def test_what_is_no_sweep_is_refused(run_yaml: Path, overrides: list[str], words: str) -> None:
    assert words in refused(run_yaml, *overrides)


def test_a_folder_whose_name_is_no_plain_yaml(run_yaml: Path, tmp_path: Path) -> None:
    strange = tmp_path / "a: b #1"
    sweep = plan_sweep(run_yaml, [BETAS, f"run.dir={json.dumps(str(strange))}"])
    assert sweep.points[0].config.run.dir == strange / "sweep" / "beta=0.05"


def test_states_come_from_what_the_runs_left(run_yaml: Path) -> None:
    sweep = plan_sweep(run_yaml, [BETAS])
    point, other = sweep.points
    assert state_of(point, "train").name == "waiting"
    update_stage(point.inputs.paths.status_path, "reference", "failed", error="out of memory")
    assert state_of(point, "train").error == "reference: out of memory"
    for state, expected in (("started", "running"), ("running", "running"), ("stopped", "stopped")):
        update_stage(point.paths.status_path, "train", state)
        assert state_of(point, "train").name == expected
    update_stage(point.paths.status_path, "train", "failed", error="not finite")
    assert (state_of(point, "train").name, state_of(point, "train").error) == (
        "failed", "train: not finite",
    )  # fmt: skip
    finish(point, accuracy=0.5)
    assert state_of(point, "train").name == "done"
    assert state_of(point, "verify").name == "waiting", "trained, but not exported yet"
    changed = plan_sweep(run_yaml, [BETAS, "train.num_epochs=3"]).points[0]
    assert state_of(changed, "train").name == "waiting", "done with other settings is not done"


def test_pairs_are_linked_by_a_relative_name(run_yaml: Path) -> None:
    point, other = plan_sweep(run_yaml, [BETAS]).points
    for _ in range(2):
        link_pairs(point)
        assert point.paths.pairs_dir.readlink() == Path("..") / point.inputs.name / "pairs"
    other.paths.pairs_dir.mkdir(parents=True)
    with pytest.raises(ArtifactError) as error:
        link_pairs(other)
    assert str(error.value) == (
        f"{other.paths.pairs_dir} is a folder of its own; expected a link to "
        f"{other.inputs.paths.pairs_dir}. A sweep did not make this folder: move it away."
    )


@pytest.mark.parametrize(
    "overrides",
    [["model.add_tokens=[<a>]"], ["model.pad_vocab_to_multiple=8"],
     ["adapter.path=a", "adapter.start=merge"]],
    ids=" ".join,
)  # fmt: skip
def test_a_base_model_of_the_inputs_is_linked_too(run_yaml: Path, overrides: list[str]) -> None:
    for point in plan_sweep(run_yaml, [BETAS, *overrides]).points:
        point.inputs.paths.base_dir.mkdir(parents=True, exist_ok=True)
        link_pairs(point)
        assert point.paths.base_dir.samefile(point.inputs.paths.base_dir)
    (plain, _) = plan_sweep(run_yaml, [BETAS]).points
    assert plain.paths.base_dir not in links_of(plain)


def test_a_point_starts_from_the_base_that_prepare_made(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    for point in plan_sweep(path, [BETAS, "model.pad_vocab_to_multiple=64"]).points:
        prepare.run(point.inputs.config)
        link_pairs(point)
        own, shared = (
            scoring_contract(RunModels(run.config), "packed") for run in (point, point.inputs)
        )
        assert own == shared and RunModels(point.config).base.name == "base"


def test_the_table_is_sorted_by_held_out_accuracy_then_margin(run_yaml: Path) -> None:
    sweep = plan_sweep(run_yaml, ["objective.beta=0.1,0.2,0.3,0.4"], train_only=True)
    first, second, third, _ = sweep.points
    finish(first, accuracy=0.6, margin=0.1)
    finish(second, accuracy=0.6, margin=0.3)
    finish(third, accuracy=0.7, margin=0.2)
    rows = sweep_results.collect(sweep)
    assert [row["values"]["objective.beta"] for row in rows] == [0.3, 0.2, 0.1, 0.4]
    assert [row["state"] for row in rows] == ["done", "done", "done", "waiting"]
    best = rows[0]
    assert (best["eval_accuracy"], best["eval_loss"], best["train_loss"]) == (0.7, 0.5, 0.6)
    assert best["pairs_per_second"] == pytest.approx(16 / 12), "16 pairs in 8 s and 4 s"
    sweep_results.write_results(sweep, rows)
    with sweep.root.sweep_table_path.open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [line["objective.beta"] for line in table] == ["0.3", "0.2", "0.1", "0.4"]
    assert json.loads(sweep.root.sweep_results_path.read_text())["points"][0]["name"] == "beta=0.3"
    assert sweep.root.sweep_plot_path.read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_more_points_than_it_names(run_yaml: Path) -> None:
    num_points = sweep_results.MAX_BARS + 6
    betas = ",".join(f"{0.01 * number:.2f}" for number in range(1, num_points + 1))
    sweep = plan_sweep(run_yaml, [f"objective.beta={betas}"], train_only=True)
    for number, point in enumerate(sweep.points[:-1]):  # the last has not begun
        finish(point, accuracy=number / num_points)
    sweep_results.write_results(sweep, sweep_results.collect(sweep))
    pixels = matplotlib.image.imread(sweep.root.sweep_plot_path)
    for shade in colormaps["viridis"]([0.0, 0.45])[:, :3]:  # of the best and of the middle
        assert (np.abs(pixels[..., :3] - shade).max(axis=2) < 0.02).sum() > 1000


def test_without_held_out_pairs_training_metrics_sort(run_yaml: Path) -> None:
    sweep = plan_sweep(run_yaml, [BETAS], train_only=True)
    finish(sweep.points[0], accuracy=None, margin=0.1)
    finish(sweep.points[1], accuracy=None, margin=0.3)
    rows = sweep_results.collect(sweep)
    assert [row["values"]["objective.beta"] for row in rows] == [0.1, 0.05]
    sweep_results.write_results(sweep, rows)


def attempts_at(sweep: Sweep, stage: str) -> list[int]:
    return [point.paths.count_attempts(stage) for point in sweep.points]


@pytest.mark.slow
def test_two_points_of_which_one_fails(tmp_path: Path) -> None:
    """Real training of both; what failed is recorded and does not stop the rest."""
    path = make_run(tmp_path)
    arguments = [path, "train.learning_rate=1e-3,1e30", "local.workers=1", "train.max_steps=3"]
    said = succeed("sweep", *arguments, "--train-only", "--dry-run").stdout.splitlines()
    assert [line.split()[:2] for line in said] == [
        ["dpo-dist", "prepare"], ["dpo-dist", "reference"],
        *[["ln", "-s"], ["dpo-dist", "train"]] * 2,
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()

    done = dpo_dist("sweep", *arguments, "--train-only")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    root = tmp_path / "out" / "sweep"
    result = json.loads((root / "results.json").read_text())
    good, bad = result["points"]
    assert (good["state"], good["step"], bad["state"]) == ("done", 3, "failed")
    assert good["eval_accuracy"] is not None
    assert "train: step 3: the loss or a reward is not finite" in bad["error"]
    assert bad["error"] in done.stderr
    sweep = plan_sweep(path, [*map(str, arguments[1:])], train_only=True)
    assert attempts_at(sweep, "train") == [1, 1]
    assert attempts_at(sweep, "prepare") == attempts_at(sweep, "reference") == [0, 0]
    (inputs,) = sweep.inputs
    assert inputs.paths.count_attempts("reference") == 1


@pytest.mark.slow
def test_a_point_is_the_run_with_its_settings(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    assert succeed("sweep", path, "objective.beta=0.1,0.5", "train.max_steps=4").returncode == 0
    for beta in ("0.1", "0.5"):
        alone = tmp_path / f"alone{beta}"
        succeed("run", path, f"objective.beta={beta}", "train.max_steps=4", f"run.dir={alone}")
        point = tmp_path / "out" / "sweep" / f"beta={beta}"
        assert metrics_of(point) == metrics_of(alone)
        assert json.loads((point / "verify.json").read_text())["passed"]
    said = succeed("sweep", path, "objective.beta=0.1,0.5", "train.max_steps=4")
    assert said.stderr.count("beta=0.1: done") == 1 and "step 1/4" not in said.stderr
    grown = succeed("sweep", path, "objective.beta=0.1,0.2,0.5", "train.max_steps=4")
    assert "beta=0.5: done" in grown.stderr and "reference: current" in grown.stderr


@pytest.mark.slow
def test_the_same_command_again_tries_what_failed(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    arguments = ["train.learning_rate=1e30,1e-3", "local.workers=1", "train.max_steps=3"]
    sweep = plan_sweep(path, arguments, train_only=True)
    for attempt in (1, 2):
        assert dpo_dist("sweep", path, *arguments, "--train-only").returncode == 1
        assert attempts_at(sweep, "train") == [attempt, 1]
