"""The forward as a library: the loop of the example, and the page that documents it."""

import importlib
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracles.plain_forward import pairs, plain_scores
from support.ranks import ROOT, run_ranks
from support.tiny_models import tiny_model
from support.tiny_run import write_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.engine.forward import PairIds, PairScorer, pack_pairs, score_pairs, settle
from dpo_dist.objective import Objective, PairLogps, pair_losses

SCRIPT = ROOT / "examples" / "own_loop.py"
PAGE = ROOT / "docs" / "python.md"
PACKAGES = ("dpo_dist.engine.forward", "dpo_dist.objective")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # as the page says it; here a folder of this name
LAYOUTS = {"llama": "packed", "gpt2": "packed", "bloom": "padded"}
STEP = re.compile(r"step (\d+): loss ([\d.]+), margin (-?[\d.]+), accuracy ([\d.]+)")


@pytest.fixture(params=LAYOUTS)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family, and in the working directory a tiny model of it under the page's name."""
    write_model(tmp_path / NAME, request.param)
    monkeypatch.chdir(tmp_path)
    return request.param


def test_the_loop_starts_at_ln_2_and_learns(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), NAME])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"layout: {LAYOUTS[family]} (")
    steps = [[float(number) for number in STEP.fullmatch(line).groups()] for line in lines]  # pyright: ignore
    assert [step for step, *_ in steps] == [1, 2, 3, 4, 5, 6]
    losses = [loss for _, loss, *_ in steps]
    assert losses[0] == round(math.log(2), 4) and losses == sorted(set(losses), reverse=True)
    assert losses[-1] < losses[0] - 0.01
    assert steps[0][2:] == [0, 0] and steps[-1][2] > 0.02


def test_its_log_probs_are_those_of_plain_forwards(family: str) -> None:
    script: Any = runpy.run_path(str(SCRIPT))
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    policy, twin = (AutoModelForCausalLM.from_pretrained(NAME) for _ in range(2))
    scorer = PairScorer(policy)
    settle(scorer)
    rows = [script["token_ids"](tokenizer, *row) for row in script["ROWS"]]
    assert {ids[-1] for _, *both in rows for ids in both} == {tokenizer.eos_token_id}
    with torch.no_grad():
        found = score_pairs(scorer, pack_pairs(rows))
        torch.testing.assert_close(found, plain_scores(twin, rows), rtol=1e-6, atol=1e-4)


def test_the_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 60


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_code_of_the_page_runs_as_it_stands(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.startswith("layout: packed (it agrees")
    assert names["losses"].tolist() == pytest.approx([math.log(2)] * 2)


def test_the_page_describes_every_name_and_only_those() -> None:
    page = PAGE.read_text()
    exported = {name for package in PACKAGES for name in importlib.import_module(package).__all__}
    assert [name for name in exported if name not in page] == []
    imported = re.findall(r"^from (dpo_dist\S*) import (.+)$", page + SCRIPT.read_text(), re.M)
    assert {package for package, _ in imported} == set(PACKAGES)
    assert {name for _, names in imported for name in names.split(", ")} <= exported


def gradients_under_ddp() -> list[float]:
    """The gradient's norm of each parameter, and the loss, of a step that two ranks share."""
    from dpo_dist.engine.distributed import collectives
    from dpo_dist.run.topology import from_environment

    with collectives.process_group(from_environment()):
        return step_under_ddp(*collectives.place())


def step_under_ddp(rank: int, ranks: int) -> list[float]:
    """In a function of its own: DDP must be gone before its process group is."""
    scorer = PairScorer(tiny_model("llama"))
    wrapped = DistributedDataParallel(scorer)
    assert settle(scorer, engine=wrapped).layout == "packed"
    return step_of(scorer, wrapped, pairs()[rank::ranks], ranks)


def step_of(scorer: PairScorer, model: Any, rows: list[PairIds], ranks: int) -> list[float]:
    packed = pack_pairs(rows)
    logps = PairLogps.from_columns(
        score_pairs(model, packed), torch.zeros(len(rows), 2), packed.lengths
    )
    loss = pair_losses(logps, Objective(beta=0.1)).sum() / len(pairs())
    (loss * ranks).backward()  # DDP takes the mean over ranks
    norms = [p.grad.norm().item() for p in scorer.parameters() if p.grad is not None]
    return [*norms, loss.item()]


def test_ranks_of_ddp_share_a_step() -> None:
    scorer = PairScorer(tiny_model("llama"))
    *expected, loss = step_of(scorer, scorer, pairs(), 1)
    results = run_ranks(2, gradients_under_ddp)
    assert sum(own for *_, own in results) == pytest.approx(loss)
    for *norms, _ in results:
        assert norms == pytest.approx(expected, rel=1e-4) and len(norms) == 21


def test_neither_deepspeed_nor_a_config_is_imported() -> None:
    program = (
        f"import sys, {', '.join(PACKAGES)}\n"
        "found = {'deepspeed', 'peft', 'pydantic', 'dpo_dist.config'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_house_itself_imports_modules() -> None:
    """The packages' names are for outsiders; inside, an import says which file is meant."""
    for path in (ROOT / "dpo_dist").rglob("*.py"):
        for package in PACKAGES:
            assert f"from {package} import" not in path.read_text(), path
