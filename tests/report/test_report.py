"""The report of a run: whole, partial and damaged runs, in a real browser, on a full disk."""

import contextlib
import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from support.commands import dpo_dist
from support.faults.limits import in_files_of
from support.ranks import ROOT

from dpo_dist.commands import report
from dpo_dist.data.screening.distributions import length_bias
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.errors import ArtifactError
from dpo_dist.metrics.curves import PLOTS
from dpo_dist.report.charts import COLORS
from dpo_dist.report.sections import SHOWN
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import COMMIT_NAME, PAIRS_REPORT_NAME, TRAIN_STATE_NAME, RunDir

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium (apt-get install)")
NUM_STEPS = 60


def metric_lines() -> Iterator[dict[str, Any]]:
    """What training writes in 60 steps in which both log-probs fall."""
    for step in range(1, NUM_STEPS + 1):
        done = step / NUM_STEPS
        line = {
            "loss": 0.7 - 0.4 * done + 0.05 * (step % 3), "rewards/chosen": -1.5 * done,
            "rewards/rejected": -4 * done, "rewards/margins": 2.5 * done,
            "rewards/accuracies": 0.5 + 0.4 * done, "logps/chosen": -200 - 15 * done,
            "logps/rejected": -180 - 40 * done, "grad_norm": 5.0, "learning_rate": 1e-6,
            "tokens_per_second": 900.0 + step, "pairs_per_second": 4.0, "peak_memory_gib": 3.25,
            "epoch": done, "consumed_pairs": 8.0 * step,
        }  # fmt: skip
        yield {"step": step, "time": 1.8e9 + step, **line}
        if step % 20 == 0:
            names = [name for name in line if name.startswith(("loss", "rewards", "logps"))]
            yield {"step": step, "time": 1.8e9, **{f"eval_{name}": line[name] for name in names}}


def counts(rows: int) -> dict[str, Any]:
    noted = {"rows": rows, "kept": rows - 2, "pairs": rows - 2}
    return noted | {"dropped": {"empty": 2, "template": 0}, "noted": {"truncated": 3}}


@pytest.fixture
def whole(tmp_path: Path) -> RunDir:
    """A run folder with every file that the report reads, and markup wherever text comes from."""
    paths = RunDir(tmp_path / "a <b> run")
    write_json(
        paths.status_path,
        {
            "stage": "verify", "state": "finished", "host": EVIL, "time": 1.8e9, "pid": 1,
            "train": {"step": NUM_STEPS, "num_steps": NUM_STEPS},
            "early_stop": None, "best_checkpoint": str(paths.checkpoint_dir(40)),
            "best_by": "eval_loss", "best_metric": 0.456789,
        },
    )  # fmt: skip
    paths.config_path.write_text("run:\n  dir: somewhere\ntrain:\n  learning_rate: 1.0e-06\n")
    paths.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    sample = {"time": 1.8e9, "number": 0, "prompt": EVIL}
    paths.samples_path.write_text(
        "".join(json.dumps(sample | {"step": s, "answer": f"{EVIL} {s}"}) + "\n" for s in (0, 60))
    )
    write_json(paths.generate_path, {"answers": [{"prompt": EVIL, "before": "b", "after": EVIL}]})
    means = {"num_pairs": 10, **dict.fromkeys(SHOWN, 0.25)}
    groups = {when: means | {"per_source": {EVIL: means}} for when in ("before", "after")}
    write_json(paths.evaluate_path, groups)
    lengths = {"prompt": {"p50": 1, "p90": 2, "p99": 3, "max": 4}, "chosen": {}}
    bias = length_bias(np.array([5, 2, 3, 9]), np.array([1, 4, 3, 1]))
    answers = {"edges": [0, 5, 10], "counts": {"chosen": [30, 18], "rejected": [40, 8]}}
    split = {
        **counts(50), "first": {"empty": EVIL}, "refusals": [EVIL], "lengths": lengths,
        "sources": {EVIL: counts(50) | {"path": "p", "format": "orca", "length_bias": bias}},
        "length_bias": bias, "tokens": 4321, "tokens_saved_by_sharing": 0.25,
        "histograms": {
            "prompt": {"edges": [0, 5, 10], "counts": {"prompt": [20, 28]}}, "answers": answers,
            "difference": {"edges": [-5, 0, 5], "counts": {EVIL: [12, 36]}},
        },
    }  # fmt: skip
    pairs_report = {
        "max_length_reason": EVIL, "max_length": 64, "splits": {"train": split},
        "hints": [EVIL], "warnings": [], "held_out": EVIL,
    }  # fmt: skip
    write_json(paths.pairs_dir / PAIRS_REPORT_NAME, pairs_report)
    check = {"name": "full: probe", "passed": True, "detail": EVIL}
    check |= {"max_difference": 1e-5, "tolerance": 5e-4}
    verified = {"passed": True, "checkpoint": "x/step-000060", "num_probe_pairs": 8}
    write_json(paths.verify_path, verified | {"checks": [check]})
    for step in (40, 60):
        step_dir = paths.checkpoint_dir(step)
        step_dir.mkdir(parents=True)
        state = TrainState(step, 8 * step, 1.0, {}, 2, 3, {"torch": "2.13.0", EVIL: "1"})
        (step_dir / TRAIN_STATE_NAME).write_text(state.to_json())
        (step_dir / COMMIT_NAME).write_text("{}")
    gpu = {"name": "A100", "gib": 79.2}
    write_json(paths.doctor_path, {"ranks": [{"host": "n1", "cores": 8, "gpus": [gpu]}]})
    return paths


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in a browser without a network; stderr holds what its console says."""
    assert BROWSER is not None
    profile = page.parent.parent / "browser"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=2000", "--timeout=20000", *options, page.as_uri(),
    ]  # fmt: skip
    browser = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = browser.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(browser.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, browser.returncode, output, errors)


def console_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_a_browser_shows_it_without_a_complaint_or_a_request(whole: RunDir) -> None:
    page = report.run(whole.root)
    done = browse(page, "--dump-dom")
    assert "<h1>a &lt;b&gt; run</h1>" in done.stdout
    assert console_of(done) == []
    asking = page.with_name("asking.html")
    asking.write_text(page.read_text().replace("<main>", '<main><img src="http://x.org/a.png">'))
    assert "Content Security Policy" in "".join(console_of(browse(asking, "--dump-dom")))


def seen_by_browser(page: Path, script: str) -> Any:
    """What a script finds in a page that is shown without its policy, so that it may run."""
    lax = page.with_name("lax.html")
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    probe = f"<script>onload = () => document.body.dataset.seen = JSON.stringify({script})</script>"
    lax.write_text(text.replace("</body>", f"{probe}</body>"))
    dom = browse(lax, "--dump-dom").stdout
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None, dom[-2000:]
    return json.loads(html.unescape(found.group(1)))


@needs_browser
def test_markup_in_texts_stays_text(whole: RunDir) -> None:
    page = report.run(whole.root)  # escaping alone has to hold
    seen = seen_by_browser(
        page, "[document.title, document.scripts.length, document.images.length]"
    )
    assert seen == ["a <b> run", 1, 0]
    assert page.read_text().count("&lt;script&gt;document.title") >= 10


@needs_browser
def test_texts_of_a_chart_neither_overlap_nor_leave_it(whole: RunDir) -> None:
    boxes = """[...document.querySelectorAll("svg")].map(s => [s, ...s.querySelectorAll("text")]
        .map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom]))"""
    found = seen_by_browser(report.run(whole.root), boxes)
    assert len(found) == len(PLOTS) + 4
    for (left, top, right, bottom), *texts in found:
        assert right - left > 300 and len(texts) >= 2
        for text in texts:
            assert left <= text[0] and top <= text[1] and text[2] <= right and text[3] <= bottom
        for one, two in itertools.combinations(texts, 2):
            apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
            assert apart, (one, two)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_screenshot_has_the_curves(whole: RunDir, tmp_path: Path, scheme: str) -> None:
    page, shot = report.run(whole.root), tmp_path / "shot.png"
    chosen = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, f"--screenshot={shot}", "--window-size=1280,2400", "--hide-scrollbars", *chosen)
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round()
    assert pixels.shape == (2400, 1280, 3)
    for name, num_pixels in (
        ("paper", 500_000),
        ("panel", 500_000),
        ("first", 500),
        ("second", 500),
    ):
        color = [255 * part for part in to_rgb(COLORS[name][scheme == "dark"])]
        assert (np.abs(pixels - color).max(axis=2) < 8).sum() > num_pixels, name


def test_it_says_what_the_run_has(whole: RunDir) -> None:
    path = whole.pairs_dir / PAIRS_REPORT_NAME
    write_json(path, json.loads(path.read_text()) | {"warnings": ["biased"]})
    text = report.run(whole.root).read_text()
    assert "Likelihood displacement: the log-probs of chosen and of rejected answers both fall" in (
        text
    )
    assert "held-out pairs: chosen -205.0 -&gt; -215.0 nats (-10.0), rejected -193.3 -&gt;" in text
    for words in (
        "train.learning_rate", "1e-06", "step-000040", "Best by eval_loss: 0.4568",
        "the prompt or an answer is empty", "p99", "4,321",
        "Verified: a fresh load against 8 pairs",
        "A100 (79.2 GiB)", "ranks in training", "3.25", "2.0 min", "step 60",
    ):  # fmt: skip
        assert words in text, words
    assert "chosen is longer in 50% of pairs" in text
    assert text.count("<svg") == len(PLOTS) + 4 and text.count(">biased<") == 1
    names = {path.name for path in whole.report_dir.iterdir()}
    assert names == {"index.html"} | {f"{plot.name}.png" for plot in PLOTS}


def test_no_warning_where_none_is_due(whole: RunDir) -> None:
    lines = [
        line | {"logps/chosen": -200.0, "eval_logps/chosen": -200.0} for line in metric_lines()
    ]
    whole.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.run(whole.root).read_text()
    assert 'class="warning"' not in text[: text.index("<section>")]


def test_without_a_reference_there_is_no_before(whole: RunDir) -> None:
    evaluated = json.loads(whole.evaluate_path.read_text())
    write_json(whole.evaluate_path, {"after": evaluated["after"]})
    text = report.run(whole.root).read_text()
    assert "rewards/margins after" in text and "rewards/margins before" not in text
    assert "Export against the start" not in text and "The export (dpo-dist evaluate)" in text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    paths = RunDir(tmp_path)
    write_json(paths.status_path, {"stage": "prepare", "state": "running"})
    text = report.run(tmp_path).read_text()
    for words in (
        "No pairs have been prepared yet.", "No step has been trained yet.",
        "No held-out pairs have been evaluated yet.", "None has been committed yet.",
        "Nothing has been exported and verified yet.", "None yet: run `dpo-dist generate`",
        "There is no config.resolved.yaml yet.", "prepare running",
    ):  # fmt: skip
        assert words in text, words
    assert [path.name for path in paths.report_dir.iterdir()] == ["index.html"]


def test_while_training_writes_and_after_a_failure(whole: RunDir) -> None:
    with whole.metrics_path.open("a") as stream:
        stream.write('{"step": 61, "loss": null, "non_finite": ["loss"]}\n{"step": 62, "lo')
    whole.generate_path.write_text('{"answers"')
    status = json.loads(whole.status_path.read_text())
    stages = {"train": {"state": "failed", "error": "step 61: the loss is not finite"}}
    write_json(whole.status_path, status | {"stages": stages})
    text = report.run(whole.root).read_text()
    assert "train failed: step 61: the loss is not finite" in text
    assert "Numbers that are not finite: 1 of 64 lines, first at step 61." in text
    assert "generate.json is damaged: not shown." in text


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a', b"\xff\xfe\x00", b": - :\n\t?"])
def test_damaged_files_are_named_and_cost_their_sections_only(
    whole: RunDir, content: bytes
) -> None:
    by_line = (whole.metrics_path, whole.samples_path)
    damaged = (
        whole.status_path, whole.config_path, whole.generate_path, whole.evaluate_path,
        whole.verify_path, whole.doctor_path, whole.pairs_dir / PAIRS_REPORT_NAME,
    )  # fmt: skip
    for path in (*by_line, *damaged):
        path.write_bytes(content)
    text = report.run(whole.root).read_text()
    for path in damaged:
        assert f"{path.relative_to(whole.root)} is damaged: not shown." in text
    assert text.count("is damaged") == len(damaged)
    assert "No step has been trained yet." in text and "No pairs have been prepared yet." in text
    assert "step-000040" in text and "ranks in training" in text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    done = dpo_dist("report", tmp_path)
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr == (
        f"error: {tmp_path}/status.json does not exist; expected the folder of a run. Name the "
        "run.dir of a run.yaml.\n"
    )


def old_report(paths: RunDir) -> None:
    paths.report_dir.mkdir()
    (paths.report_dir / "index.html").write_text("old")


def assert_old_report_alone(paths: RunDir) -> None:
    assert (paths.report_dir / "index.html").read_text() == "old"
    assert [path.name for path in paths.root.glob("*report*")] == ["report"]
    assert [path.name for path in paths.root.glob(".*")] == []


@pytest.mark.parametrize("num_bytes", [1_000, 100_000], ids=["picture", "page"])
def test_a_file_that_does_not_fit_leaves_the_old_report(whole: RunDir, num_bytes: int) -> None:
    old_report(whole)
    done = subprocess.run(
        in_files_of(num_bytes, [sys.executable, "-m", "dpo_dist", "report", str(whole.root)]),
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"COLUMNS": "1000"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {whole.report_dir} could not be written (File too large); expected a writable "
        "folder with free space. Fix this and run `dpo-dist report` again; nothing half-written "
        "is left."
    )
    assert_old_report_alone(whole)


@pytest.mark.fault(15, "a full disk under the report", becomes="the old report stays")
def test_a_full_disk_leaves_the_old_report(whole: RunDir, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        paths = RunDir(disk / "run")
        shutil.copytree(whole.root, paths.root)
        old_report(paths)
        with pytest.raises(ArtifactError, match="No space left on device.*nothing half-written"):
            report.run(paths.root)
        assert_old_report_alone(paths)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
