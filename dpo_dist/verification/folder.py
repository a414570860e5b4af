"""All checks of one exported folder, in order: a load that fails ends them.

1. The files are those that the export wrote.
2. Names, shapes and types are the base model's; the weights are not.
3. Every weight finds its place when the model is loaded.
4. The tokenizer is the run's, and the model answers.
5. The probe scores as it did in training.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from dpo_dist.data.pairs import unmarked
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.checkpoints.commit import find_changed
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.export.weight_streams import export_dtype
from dpo_dist.engine.forward.generation import Sampling, answer, answer_in_training
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.model.strict_load import stored_specs
from dpo_dist.engine.weights.safetensors_reader import TensorSpec
from dpo_dist.errors import DPODistError
from dpo_dist.inputs.frozen_model import FrozenModel
from dpo_dist.model_files.files import read_model_config
from dpo_dist.run.exports import export_folders
from dpo_dist.run.manifest import FileRecord
from dpo_dist.verification.check import Check, check, refuse
from dpo_dist.verification.exported import Exported
from dpo_dist.verification.moved import check_moved
from dpo_dist.verification.probe import LogpArray, Probe, check_probe, plain_logps

NUM_ANSWER_TOKENS = 16


def check_folder(exported: Exported, probe: Probe) -> Iterator[Check]:
    """Each check as soon as it is done."""
    kind = exported.kind
    yield check(f"{kind}: files", lambda: collectives.on_first(lambda: _files(exported)))
    if kind != "adapter":
        yield check(f"{kind}: names, shapes and types", lambda: _tensors(exported))
    yield check(f"{kind}: moved by training", lambda: check_moved(exported))
    try:
        # before the folder's own model, so that only one of them is in memory
        expected = _expected_logps(exported, probe)
    except DPODistError as error:
        yield Check(f"{kind}: adapter on the full-precision base", False, error.found)
        return
    loaded: list[FrozenModel] = []
    yield check(f"{kind}: strict load", lambda: _load(exported, loaded))
    if not loaded:
        return
    (frozen,) = loaded
    yield check(f"{kind}: tokenizer", lambda: _tokenizer(exported, probe))
    # before scoring, which changes the model's attention
    yield check(f"{kind}: answer", lambda: _answer(exported, frozen, probe))
    yield from check_probe(exported, frozen, probe, expected)
    frozen.take_down()


def _expected_logps(exported: Exported, probe: Probe) -> LogpArray:
    """(K, 2) log-probs that the folder must compute: those of training, except that a merge after
    QLoRA is the adapter on the full-precision base, which was not trained."""
    if exported.kind != "merged" or exported.config.model.quantization is None:
        return probe.logps
    frozen = exported.load_unmerged(export_folders(exported.config)["adapter"])
    logps = plain_logps(frozen.model, probe, exported.device)
    frozen.take_down()
    return logps


def _files(exported: Exported) -> str:
    """The files are those that the export wrote."""
    folder, records = exported.folder, exported.manifest.details["files"]
    files = {name: FileRecord(**record) for name, record in records.items()}
    missing = [name for name in files if not (folder / name).is_file()]
    problems = [f"{folder / name} is missing" for name in missing]
    refuse(problems + find_changed(folder, files, [n for n in files if n not in missing]))
    return f"{len(files)} as they were written"


def _tensors(exported: Exported) -> str:
    """The tensors of the base model, and beside them at most a head that training untied.

    Types are the base's under export.dtype auto, else that one.
    """
    found, base = stored_specs(exported.folder), stored_specs(exported.base_dir)
    expected = {
        name: TensorSpec(_exported_dtype(exported, spec.dtype), spec.shape)
        for name, spec in base.items()
    }
    added = [name for name in found if name not in base]
    wrong = [name for name, spec in expected.items() if found.get(name) != spec]
    base_tied, still_tied = map(_is_tied, (exported.base_dir, exported.folder))
    if len(added) > int(base_tied and not still_tied):
        wrong += added
    refuse([f"{n} is {_told(found.get(n))} here, expected {_told(expected.get(n))}" for n in wrong])
    types = sorted({str(spec.dtype).removeprefix("torch.") for spec in found.values()})
    untied = f", untied {added[0]}" if added else ""
    return f"{len(found)} tensors of {', '.join(types)}{untied}"


def _exported_dtype(exported: Exported, stored: torch.dtype) -> torch.dtype:
    name = exported.config.export.dtype
    dtype = None if name == "auto" else getattr(torch, name)
    return export_dtype(exported.stored_base.main_dtype, stored, dtype)


def _is_tied(folder: Path) -> bool:
    return read_model_config(folder).get("tie_word_embeddings") is not False


def _told(spec: TensorSpec | None) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {spec.shape}" if spec else "absent"


def _load(exported: Exported, loaded: list[FrozenModel]) -> str:
    """A whole model goes into `loaded` even where weights do not fit: other checks tell more."""
    model, problems = exported.load()
    loaded += [] if model is None else [model]
    refuse(problems)
    return f"every weight in its place, on {exported.device.type}"


def _tokenizer(exported: Exported, probe: Probe) -> str:
    """The exported tokenizer encodes the probe as the run's, and has the run's chat template."""
    config = exported.config
    template, remote = resolve_template(config.data.chat_template), config.model.trust_remote_code
    own = load_tokenizer(exported.base_dir, template, remote)
    found = load_tokenizer(exported.folder, None, remote)
    texts = [
        own.decode([*prompt, *unmarked(chosen)])
        for prompt, chosen, _ in map(probe.pairs.token_ids, probe.indices.tolist())
    ]
    refuse([f"encodes {t!r} differently" for t in texts if own.encode(t) != found.encode(t)])
    if own.chat_template != found.chat_template:
        refuse(["has another chat template than the run"])
    return f"{len(texts)} texts encode alike, same chat template"


def _answer(exported: Exported, frozen: FrozenModel, probe: Probe) -> str:
    """Greedy generation runs."""
    tokenizer = load_tokenizer(exported.folder, None, exported.config.model.trust_remote_code)
    pair, sampling = probe.pairs.token_ids(int(probe.indices[0])), Sampling(NUM_ANSWER_TOKENS)
    prompts = [pair[0].tolist()]
    if frozen.engine is None:
        text = answer(frozen.scorer.policy, tokenizer, prompts, sampling)[0].text
    else:
        # Through the engine once: by that DeepSpeed learns which modules read others' weights, as
        # DoRA's do, and gathers them from then on.
        with torch.no_grad():
            score_pairs(frozen.model, pack_pairs([pair], exported.device), "plain")
        seed = exported.config.run.seed
        (text,) = answer_in_training(
            frozen.engine, tokenizer, prompts, sampling, device=exported.device, seed=seed
        )
    return f"greedy, at most {NUM_ANSWER_TOKENS} tokens: {text!r}"
