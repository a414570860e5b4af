"""`dpo-dist import` tells by itself whose a file is, and of what task."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import dpo_dist, succeed

from dpo_dist.commands.import_config import import_config, trainer_of
from dpo_dist.errors import ConfigError

PREFERENCES = [{"path": "d", "type": "chatml.intel"}]
FILES: dict[str, dict[str, Any]] = {
    "TRL": {"model_name_or_path": "m", "dataset_name": "d", "beta": 0.3},
    "TRL, a mixture": {"model_name_or_path": "m", "datasets": [{"path": "d"}], "beta": 0.3},
    "TRL, the handbook's": {"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "beta": 0.3},
    "TRL, the handbook's today": {
        "model_name_or_path": "m", "dataset_mixture": {"datasets": [{"id": "d"}]}, "beta": 0.3,
    },
    "Axolotl": {
        "base_model": "m", "rl": "dpo", "datasets": PREFERENCES, "learning_rate": 1e-6,
        "rl_beta": 0.3,
    },
    "LlamaFactory": {"model_name_or_path": "m", "stage": "dpo", "dataset": "d", "pref_beta": 0.3},
}  # fmt: skip


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", FILES)
def test_whose_a_file_is(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FILES[name])
    assert trainer_of(FILES[name], path) == name.split(",")[0]
    imported = import_config(path, (), 2, None)
    assert imported.text.startswith(f"# Made of theirs.yaml, of {name.split(',')[0]}, by ")
    values = yaml.safe_load(imported.text)
    assert (values["model"]["path"], values["objective"]["beta"]) == ("m", 0.3)


@pytest.mark.parametrize(("values", "said"), [
    ({"model": {"path": "m"}, "data": {}}, "has the keys data, model; expected keys that tell "
     "whose it is (Axolotl: base_model, micro_batch_size, sequence_len; LlamaFactory: stage, "
     "finetuning_type, cutoff_len, pref_beta, dataset_dir; TRL: dataset_name, dataset_mixture, "
     "dataset_mixer). If it is a run.yaml already, run it: `dpo-dist run`."),
    ({"model_name_or_path": "m", "mine": 1}, "has the keys mine, model_name_or_path; exp"),
    ({}, "has the keys (none); expected keys that tell"),
    ({"model_name_or_path": "m", "dataset_name": "d", "packing": True},
     ": packing, a key of supervised fine-tuning; expected a YAML for DPO. Train that with TRL, or "
     "remove the key."),
    ({"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["f"]},
     ": reward_funcs, a key of GRPO; expected a YAML for DPO."),
    ({"base_model": "m", "datasets": []}, ": there is no rl: the file is of supervised fine"),
    ({"stage": "sft"}, ": stage: sft; expected stage: dpo."),
])  # fmt: skip
def test_files_of_another_kind_or_task(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    path = write(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        import_config(path, (), 1, None)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


def test_words_behind_the_file_count_too(tmp_path: Path) -> None:
    path = write(tmp_path, {"base_model": "m", "datasets": PREFERENCES})
    words = ("rl=ipo", "learning_rate=1e-6")
    assert yaml.safe_load(import_config(path, words, 1, None).text)["objective"]["loss"] == "ipo"
    with pytest.raises(ConfigError, match="'beta'; expected KEY=VALUE with a key of the file"):
        import_config(path, ("beta",), 1, None)


def test_a_key_that_stands_twice_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, FILES["Axolotl"])
    path.write_text(path.read_text() + "datasets: [{path: other, type: chatml.intel}]\n")
    imported = import_config(path, (), 1, None)
    assert imported.differs == ["datasets: stands twice in the file; the last one is taken"]
    assert yaml.safe_load(imported.text)["data"]["train"][0]["path"] == "other"


def test_the_command(tmp_path: Path) -> None:
    path, out = write(tmp_path, FILES["Axolotl"]), tmp_path / "run.yaml"
    command = ("import", path, "load_in_8bit=true", "--num-processes", "2")
    printed = succeed(*command)
    assert succeed(*command, "--out", out).stdout == "" and out.read_text() == printed.stdout
    assert printed.stderr.splitlines() == [
        "micro_batch_size 1 x gradient_accumulation_steps 1 x num_processes 2 = "
        "train.global_batch_size 2",
        "not taken: load_in_8bit: True; there is no 8-bit base; leave it in model.dtype",
    ]
    again = dpo_dist(*command, "--out", out)
    assert again.returncode == 2
    assert (
        again.stderr == f"error: {out} exists; expected a new file. Name another, or remove it.\n"
    )


def test_neither_the_trainers_nor_torch_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path, FILES["LlamaFactory"])
    program = (
        "import sys; sys.modules |= dict.fromkeys(('trl', 'torch', 'transformers', 'peft'))\n"
        "from dpo_dist.cli.app import app\n"
        f"app(['import', {str(path)!r}, '--num-processes', '1'])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)
