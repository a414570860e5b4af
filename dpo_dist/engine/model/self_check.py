"""The self-check of a model, once a run: what it found is kept in the run folder.

It takes several forwards, and every stage loads a model. A later stage takes over what an earlier
one found for the same key: the model's class, config, adapter and dtype, what the run config asks
for, the code that scores, its libraries, the devices of all ranks, and how many share a row.
Weights are not in it: the layout follows from what a model computes, not from the numbers that it
learned.
"""

import importlib.metadata
import inspect
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_dist.config.training_section import ModelSection
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.distributed.sequence_parallel import Team
from dpo_dist.engine.forward.model_parts import base_of
from dpo_dist.parsing import parse_object
from dpo_dist.run.manifest import digest_of, digest_of_file, write_json

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn", "flash_attn")
# Of a config: where it was read from and what is said when text is generated. Dropout is set to 0
# by some stages only.
_BESIDE = ("name_or_path", "version", "dtype", "architectures", "use_cache", "token_id", "drop",
           "jitter", "inference_mode", "revision")  # fmt: skip


def check_key(
    policy: nn.Module, section: ModelSection, device: torch.device, ranks_per_row: int = 1
) -> dict[str, Any]:
    """All that the outcome depends on, as JSON; all ranks call together."""
    base = base_of(policy)
    adapters = getattr(policy, "peft_config", None) or {}
    source = inspect.getsourcefile(type(base))
    return {
        "model": f"{type(base).__module__}.{type(base).__qualname__}",
        "source": source and digest_of_file(Path(source)),
        "config": _plain(base.config.to_dict()),
        "adapters": {name: _plain(adapter.to_dict()) for name, adapter in adapters.items()},
        "dtype": str(next(base.parameters()).dtype),
        "requested": [section.layout, section.attention, section.quantization],
        "code": _digest_of_code(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "ranks_per_row": ranks_per_row,
        "devices": sorted(set(collectives.gather(_device_name(device)))),
    }


def read_check(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """What was found for `key`, on all ranks; {} when nothing was, or the file is damaged."""

    def read() -> dict[str, Any]:
        try:
            found = parse_object(path.read_bytes())[digest_of(key)]["found"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}

    return collectives.on_first(read)


def write_check(path: Path, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Adds what was found for `key`; rank 0 writes."""
    if not collectives.is_first():
        return
    try:
        checks = parse_object(path.read_bytes())
    except (OSError, ValueError):
        checks = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, checks | {digest_of(key): {"found": found, "key": key}})


def _plain(config: Mapping[str, Any]) -> Any:
    """The settings in a config that may change what it computes, as JSON."""
    kept = {
        name: _plain(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not any(part in str(name) for part in _BESIDE)
    }
    return json.loads(json.dumps(kept, sort_keys=True, default=_sorted_or_named))


def _sorted_or_named(value: Any) -> Any:
    """A set has no order of its own, and differs between processes."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _digest_of_code() -> str:
    folder, beside = (Path(inspect.getfile(one)) for one in (base_of, Team))
    paths = [*sorted(folder.parent.glob("*.py")), beside]
    return digest_of([digest_of_file(path) for path in paths])


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
