"""The export, loaded afresh, must compute what the training engine computed: verify.json.

1. Find the checkpoint that the export was made from, and its probe: the log-probs that the
   engine gave a few training pairs when it saved.
2. For every exported folder: files, names and shapes; a strict load; the tokenizer; an answer.
3. Score the probe pairs with the loaded model, by our forward and by the model's own.
4. Write every check with its largest difference, then fail when one did.

K probe pairs.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from dpo_dist.config import RunConfig
from dpo_dist.data.batches import plan_micro_batches
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.data.templates import load_tokenizer, resolve_template
from dpo_dist.engine.checkpoint import read_probe
from dpo_dist.engine.collectives import device_of
from dpo_dist.engine.commit import FileRecord, find_changed
from dpo_dist.engine.forward import PairScorer
from dpo_dist.engine.generate import answer
from dpo_dist.engine.packing import pack_pairs
from dpo_dist.engine.policy import settle_layout
from dpo_dist.engine.reload import load_adapted, load_whole
from dpo_dist.engine.safetensors_stream import TensorSpec, read_places
from dpo_dist.engine.scoring import score
from dpo_dist.errors import ArtefactError, VerificationError
from dpo_dist.manifest import Manifest, digest_of_file, read_manifest, write_json
from dpo_dist.model_files import read_model_config, weight_files
from dpo_dist.plan import base_model_dir
from dpo_dist.run_dir import MANIFEST_NAME, RunDir
from dpo_dist.topology import from_environment

_logger = logging.getLogger(__name__)
LogpArray = npt.NDArray[np.float32]
NUM_ANSWER_TOKENS = 16
