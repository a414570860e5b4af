"""An exported folder as verify opens it: from disk, strictly, where it fits."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.model.strict_load import load_adapted, load_whole
from dpo_dist.engine.weights.base_weights import StoredModel, open_base
from dpo_dist.run.exports import ExportKind
from dpo_dist.run.manifest import Manifest
from dpo_dist.verification.check import refuse

_logger = logging.getLogger(__name__)
GPU_SHARE = 0.8  # of its free memory for weights; a model that needs more is verified on the CPU


@dataclass(frozen=True)
class Exported:
    """One exported folder beside the run that it comes from."""

    config: RunConfig
    kind: ExportKind
    folder: Path
    manifest: Manifest
    base_dir: Path  # of the run's base model

    @cached_property
    def stored_base(self) -> StoredModel:
        """Headers of the base model's files."""
        return open_base(self.base_dir, self.config.model.trust_remote_code)

    @cached_property
    def device(self) -> torch.device:
        """The GPU when the weights fit into it, else the CPU."""
        folders = (self.folder, self.base_dir)
        stored = sum(path.stat().st_size for d in folders for path in d.glob("*.safetensors"))
        if torch.cuda.is_available() and stored < GPU_SHARE * torch.cuda.mem_get_info()[0]:
            return torch.device("cuda", torch.cuda.current_device())
        if stored > psutil.virtual_memory().available:
            _logger.warning("verify: the model is larger than this machine's free memory")
        return torch.device("cpu")

    def load(self) -> tuple[Any, list[str]]:
        """(The model, everything that does not fit.)"""
        section = self.config.model
        if self.kind == "adapter":
            return load_adapted(self.base_dir, self.folder, section, self.device)
        return load_whole(self.folder, section, self.device, self.stored_base.unread)

    def load_unmerged(self, adapter_dir: Path) -> Any:
        """peft's adapter on the full-precision base: what a merged model must compute."""
        section = self.config.model.model_copy(update={"quantization": None})
        policy, problems = load_adapted(self.base_dir, adapter_dir, section, self.device)
        refuse(problems)
        return policy
