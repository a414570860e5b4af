"""An exported folder as verify opens it: from disk, strictly, where it fits."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.model.strict_load import load_adapted, load_whole
from dpo_dist.engine.weights.base_weights import StoredModel, open_base
from dpo_dist.inputs.frozen_model import FrozenModel, Placement, open_frozen
from dpo_dist.inputs.setup import without_quantization
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
    placement: Placement | None = None  # of its weights on several ranks; alone it finds one

    @cached_property
    def stored_base(self) -> StoredModel:
        """Headers of the base model's files."""
        return open_base(self.base_dir, self.config.model.trust_remote_code)

    @cached_property
    def device(self) -> torch.device:
        """That of the ranks; alone the GPU when the weights fit into it, else the CPU."""
        if self.placement is not None:
            return self.placement.device
        folders = (self.folder, self.base_dir)
        stored = sum(path.stat().st_size for d in folders for path in d.glob("*.safetensors"))
        if torch.cuda.is_available() and stored < GPU_SHARE * torch.cuda.mem_get_info()[0]:
            return torch.device("cuda", torch.cuda.current_device())
        if stored > psutil.virtual_memory().available:
            _logger.warning("verify: the model is larger than this machine's free memory")
        return torch.device("cpu")

    def load(self) -> tuple[FrozenModel | None, list[str]]:
        """(The model if it could be loaded, everything that does not fit.)"""
        section, zero3 = self.config.model, self._placement.zero3
        if self.kind == "adapter":
            model, problems = load_adapted(self.base_dir, self.folder, section, self.device, zero3)
        else:
            unread = self.stored_base.unread
            model, problems = load_whole(self.folder, section, self.device, unread, zero3)
        return model and open_frozen(model, self._placement), problems

    def load_unmerged(self, adapter_dir: Path) -> FrozenModel:
        """peft's adapter on the full-precision base: what a merged model must compute."""
        section, zero3 = without_quantization(self.config).model, self._placement.zero3
        policy, problems = load_adapted(self.base_dir, adapter_dir, section, self.device, zero3)
        refuse(problems)
        return open_frozen(policy, self._placement)

    @property
    def _placement(self) -> Placement:
        return self.placement or Placement(self.device)
