"""A config of another trainer -> a run.yaml, with a reason behind every value.

1. `read_yaml` and the words behind the file give its keys; `trainer_of` tells whose they are.
2. `settings_of` refuses keys that its trainer does not know; a key left out has its default.
3. `convert` of that trainer goes through the sections, and `imported` writes what became of it.

Neither the trainer nor torch is needed; keys.py of each holds what becomes of each key.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_dist.errors import ConfigError
from dpo_dist.importing.axolotl import convert as axolotl
from dpo_dist.importing.axolotl.keys import AXOLOTL
from dpo_dist.importing.files import read_yaml, repeated_keys, settings_of, with_overrides
from dpo_dist.importing.llamafactory import convert as llamafactory
from dpo_dist.importing.llamafactory.keys import LLAMAFACTORY
from dpo_dist.importing.run_yaml import Imported, imported
from dpo_dist.importing.settings import Peer, Run
from dpo_dist.importing.trl import convert as trl
from dpo_dist.importing.trl.keys import TRL

Trainer = Literal["TRL", "Axolotl", "LlamaFactory"]
TRAINERS: dict[Trainer, tuple[Peer, Callable[[Run], None]]] = {
    "TRL": (TRL, trl.convert),
    "Axolotl": (AXOLOTL, axolotl.convert),
    "LlamaFactory": (LLAMAFACTORY, llamafactory.convert),
}
# keys that only one of them has
MARKS: dict[Trainer, tuple[str, ...]] = {
    "Axolotl": ("base_model", "micro_batch_size", "sequence_len"),
    "LlamaFactory": ("stage", "finetuning_type", "cutoff_len", "pref_beta", "dataset_dir"),
    "TRL": ("dataset_name", "dataset_mixture", "dataset_mixer"),
}
# keys of TRL's and the handbook's other scripts -> what those train
OTHER_TASKS = {
    **dict.fromkeys(
        ("packing", "max_seq_length", "dataset_text_field", "completion_only_loss",
         "assistant_only_loss", "eos_token"),
        "supervised fine-tuning",
    ),
    **dict.fromkeys(("reward_funcs", "num_generations", "reward_weights"), "GRPO"),
    **dict.fromkeys(("reward_model_path", "response_length", "kl_coef"), "PPO or RLOO"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), "KTO"),
    "center_rewards_coefficient": "a reward model",
}  # fmt: skip


def import_config(
    path: Path, overrides: Sequence[str], num_processes: int | None, accelerate: Path | None,
    trainer: Trainer | None = None,
) -> Imported:  # fmt: skip
    """Converts a YAML; raises ConfigError when it is none that is known, or not usable."""
    values = with_overrides(read_yaml(path, "a trainer's YAML"), overrides)
    peer, convert = TRAINERS[trainer or trainer_of(values, path)]
    if peer is TRL:
        _check_task(values, path)
    settings = settings_of(peer, values, path)
    launcher = read_yaml(accelerate, "an accelerate config") if accelerate else {}
    run = Run(settings, num_processes or launcher.get("num_processes"), launcher)
    for key in repeated_keys(path):
        run.differs.append(f"{key}: stands twice in the file; the last one is taken")
    try:
        convert(run)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.found}", error.expected, error.remedy) from None
    return imported(run, path)


def trainer_of(values: dict[str, Any], path: Path) -> Trainer:
    """Whose file it is, by keys that nobody else has; raises ConfigError where none tells."""
    for trainer, marks in MARKS.items():
        if any(mark in values for mark in marks):
            return trainer
    if "model_name_or_path" in values and len({*values} & {*TRL.known}) == len(values):
        return "TRL"
    found = f"{path} has the keys {', '.join(map(str, values)) or '(none)'}"
    if {"model", "data"} <= values.keys():
        remedy = "If it is a run.yaml already, run it: `dpo-dist run`."
    else:
        remedy = "If it is TRL's, `dpo-dist import-trl` names the keys that are not."
    marks = "; ".join(f"{trainer}: {', '.join(keys)}" for trainer, keys in MARKS.items())
    raise ConfigError(found, f"keys that tell whose it is ({marks})", remedy)


def _check_task(values: dict[str, Any], path: Path) -> None:
    for key, task in OTHER_TASKS.items():
        if values.get(key) is not None:
            raise ConfigError(
                f"{path}: {key}, a key of {task}",
                "a YAML for DPO",
                "Train that with TRL, or remove the key.",
            )
