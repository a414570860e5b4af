"""The doctor: what it reports of real ranks, and complaints that name the node to leave out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import succeed
from support.tiny_run import make_run

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ClusterError
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import NODES_VARIABLE, Topology
from dpo_dist.stages import doctor


def test_two_ranks_of_this_machine(tmp_path: Path) -> None:
    done = succeed("doctor", make_run(tmp_path), "--json")
    report = json.loads(done.stdout)
    assert len(report["ranks"]) == 2
    for rank in report["ranks"]:
        assert rank["versions"]["deepspeed"][0].isdigit() and rank["cores"] > 0
        assert rank["address"] == "127.0.0.1"
    assert report["all_reduce_gib_per_s"] > 0
    assert 0 < report["needed_disk_gib"] < report["free_disk_gib"]
    assert "all-reduce of 64 MiB" in done.stderr


def test_a_machine_alone() -> None:
    shown = succeed("doctor").stdout
    for name in ("host", "GPUs", "cores", "memory", "free disk here", "python", "torch", "ray"):
        assert f"\n{name} " in f"\n{shown}"
    report = json.loads(succeed("doctor", "--json").stdout)
    assert report["versions"]["torch"] in shown


def facts(node: str, **changes: Any) -> dict[str, Any]:
    seen = {"versions": {"torch": "2.13.0"}, "gpus": [{"name": "H100"}], "num_gpus": 8}
    return {"node": node, **seen, "attention": {"flash_attn": "works"}} | changes


def test_another_version_names_the_node() -> None:
    doctor.refuse_differences([facts("a"), facts("b")])
    with pytest.raises(ClusterError) as error:
        doctor.refuse_differences(
            [facts("a"), facts("b", versions={"torch": "2.12.0"}), facts("c")]
        )
    assert str(error.value) == (
        'b has versions {"torch": "2.12.0"}; expected {"torch": "2.13.0"} as on the other nodes. '
        "Fix the installation there, or leave it out (--exclude=b)."
    )


def test_other_gpus_name_the_node() -> None:
    with pytest.raises(
        ClusterError, match=r"^c has gpus \[\]; expected .*H100.*\(--exclude=c\)\.$"
    ):
        doctor.refuse_differences([facts("a"), facts("b"), facts("c", gpus=[])])


def test_attention_that_does_not_work_names_the_node() -> None:
    fault = "flash-attn does not import: undefined symbol"
    with pytest.raises(ClusterError) as error:
        doctor.refuse_differences(
            [facts("a"), facts("b"), facts("c", attention={"flash_attn": fault})]
        )
    assert str(error.value) == (
        f'c has attention {{"flash_attn": "{fault}"}}; expected {{"flash_attn": "works"}} as on '
        "the other nodes. Fix the installation there, or leave it out (--exclude=c)."
    )


def test_truth_10_a_rank_opens_no_gpu_but_its_own(tmp_path: Path) -> None:
    """Every function of torch.cuda that takes a device notes which; four GPUs are said to exist."""
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    opened, gpus, num_gpus = json.loads(done.stdout.splitlines()[-1])
    assert {number for _, number in opened} == {2}, opened
    assert opened[0][0] == "set_device", "before it torch opens the first GPU"
    assert gpus == [{"name": "GPU 2", "gib": 80.0}] and num_gpus == 4


OPENED = """
import inspect, json, sys
from pathlib import Path
from types import SimpleNamespace
import torch

opened = []

def noting(name, signature, result):
    def call(*given, **named):
        device = signature.bind(*given, **named).arguments.get("device")
        number = getattr(device, "index", device) or 0  # without a number, the current one
        opened.append((name, number))
        return result(number)
    return call

plain = inspect.signature(lambda device: None)
for name, member in vars(torch.cuda).items():
    if inspect.isfunction(member) and "device" in (of := inspect.signature(member)).parameters:
        setattr(torch.cuda, name, noting(name, of, lambda number: None))
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 4
properties = lambda number: SimpleNamespace(name=f"GPU {number}", total_memory=80 * 2**30)
torch.cuda.get_device_properties = noting("properties", plain, properties)
torch.cuda.get_device_capability = noting("capability", plain, lambda number: (9, 0))
torch.cuda.mem_get_info = noting("memory", plain, lambda number: (0, 0))
import torch.cuda.nccl
torch.cuda.nccl.version = lambda: (2, 28)

from dpo_dist.run.topology import Topology
from dpo_dist.stages import doctor

facts = doctor.look(Path(sys.argv[1]), Topology(2, 4, 2, 4, "127.0.0.1", 0))
print(json.dumps((opened, facts["gpus"], facts.get("num_gpus"))))
"""


@pytest.mark.fault(
    11,
    "a node that writes nothing into the run folder",
    becomes="named with its ranks",
)
@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            "n1 n2 n3",
            "ranks 2, 3 on n2 wrote nothing into the run folder; expected a sign of life "
            "from all 6 "
            "ranks within 0 s. Check that the node runs and sees run.dir, or leave it out "
            "(--exclude=n2).",
        ),
        (
            "",
            "ranks 2, 3 on node 1 of the job wrote nothing into the run folder; expected a sign of "
            "life from all 6 ranks within 0 s. Check that the node runs and sees run.dir, or leave "
            "that node out.",
        ),
    ],
)
def test_a_silent_node_is_named(
    nodes: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODES_VARIABLE, nodes)
    monkeypatch.setattr(doctor, "ARRIVAL_S", 0.3)
    paths = RunDir(tmp_path)
    paths.doctor_dir.mkdir()
    for rank in (0, 1, 4, 5):
        (paths.doctor_dir / f"rank{rank:04d}.json").write_text("{}")
    with pytest.raises(ClusterError) as error:
        doctor.await_all(paths, Topology(0, 6, 0, 2, "127.0.0.1", 0), 0.0)
    assert str(error.value) == said


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(make_run(tmp_path))
    config.run.dir.mkdir()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ClusterError) as error:
        doctor.check_disk(config, Topology(0, 2, 0, 2, "127.0.0.1", 0))
    assert str(error.value) == (
        f"{config.run.dir} has 0.0 GiB free; expected 0.0 GiB for checkpoints and exports "
        "(`dpo-dist "
        "plan` has the arithmetic). Free space, lower checkpoint.keep, or put run.dir elsewhere."
    )


def test_a_run_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(make_run(tmp_path), [f"run.dir={tmp_path / 'file' / 'out'}"])
    for name, value in Topology(0, 1, 0, 1, "127.0.0.1", 1).environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError) as error:
        doctor.run(config)
    assert "cannot write" in str(error.value) and "--exclude=" in str(error.value)
    assert "Put run.dir on a shared file system" in str(error.value)
