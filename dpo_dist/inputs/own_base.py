"""The base model of a run whose config changes the one at model.path: more tokens, or merged.

`prepare` makes it before anything else; every later stage reads it as `RunModels.base`.
"""

import logging
import shutil
from pathlib import Path

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.tokens.vocabulary import extended_tokenizer
from dpo_dist.engine.export.own_base import lengthen, merge_start
from dpo_dist.model_files.adapter import digest_of_adapter
from dpo_dist.model_files.files import (
    BESIDE_TOKENIZER,
    TOKENIZER_FILES,
    copy_files,
    digest_of_tokenizer,
    digest_of_weights,
)
from dpo_dist.model_files.of_run import (
    BASE,
    RunModels,
    base_settings,
    makes_base,
)
from dpo_dist.run.manifest import Manifest, atomic_dir, is_current, write_manifest
from dpo_dist.run.run_dir import RunDir

_logger = logging.getLogger(__name__)


def make_base(models: RunModels) -> None:
    """Writes the run's own base model unless it is current, or none is needed.

    Raises ArtifactError when one made from other settings or files stands there, ModelFilesError
    when model or adapter are not usable.
    """
    config = models.config
    if not makes_base(config):
        return
    folder, model = RunDir(config.run.dir).base_dir, config.model
    source, settings = models.source, base_settings(config)
    merged = models.named_adapter if settings["merged_adapter"] else None
    inputs = {
        "model": digest_of_weights(source, model.allow_pickle_weights),
        "tokenizer": digest_of_tokenizer(source),
        **({"adapter": digest_of_adapter(merged)} if merged is not None else {}),
    }
    if is_current(folder, BASE, settings, inputs):
        _logger.info("prepare: base model current, %s", folder)
        return
    with atomic_dir(folder) as partial:
        longer = source
        if model.add_tokens or model.pad_vocab_to_multiple:
            longer = partial if merged is None else partial / "longer"
            _lengthen(config, source, longer)
        if merged is not None and config.adapter is not None:
            remote = model.trust_remote_code
            merge_start(longer, partial, config.adapter, merged, model.dtype, remote)
            _logger.info("prepare: %s merged, as %s", merged, model.dtype)
        if longer != partial:
            copy_files(longer, partial, TOKENIZER_FILES)
        copy_files(source, partial, BESIDE_TOKENIZER)
        if longer not in (source, partial):
            shutil.rmtree(longer)
        write_manifest(partial, Manifest(BASE, settings, inputs))
    _logger.info("prepare: base model in %s", folder)


def _lengthen(config: RunConfig, source: Path, folder: Path) -> None:
    """Model and tokenizer of `source` with the run's added tokens."""
    model = config.model
    tokenizer, vocabulary = extended_tokenizer(source, model.add_tokens, model.trust_remote_code)
    folder.mkdir(exist_ok=True)
    if vocabulary.new_ids:
        tokenizer.save_pretrained(folder)
    else:
        copy_files(source, folder, TOKENIZER_FILES)
    num_tokens, new_ids = vocabulary.num_tokens, vocabulary.new_ids
    multiple, remote = model.pad_vocab_to_multiple, model.trust_remote_code
    size = lengthen(source, folder, num_tokens, new_ids, multiple, remote)
    counts = (len(new_ids), num_tokens, size)
    _logger.info("prepare: %d tokens added, %d in all, embeddings for %d", *counts)
