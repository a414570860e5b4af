"""A model folder on disk: where it is, which files are its weights, and their identity."""

import contextlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dpo_dist.errors import ModelFilesError
from dpo_dist.model_files.adapter import ADAPTER_CONFIG_NAME, read_adapter_config
from dpo_dist.parsing import parse_as, parse_object
from dpo_dist.run.manifest import digest_of, digest_of_file, write_json
from dpo_dist.watch.heartbeat import during
from dpo_dist.wording import first_line

HASH_THREADS = 8
MOST_POSITIONS = 1 << 48  # more is no length, such as the 10^30 of a tokenizer without one
CONFIG_NAME = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model",
)  # fmt: skip
# what else belongs to a tokenizer where a folder has it, and is copied with it
BESIDE_TOKENIZER = (
    "additional_chat_templates/*.jinja", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenization_*.py",
)  # fmt: skip
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def resolve_model_dir(path: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The local folder of a model given as a folder or as a hub id (downloaded when needed).

    Raises ModelFilesError when it is neither, or when the hub does not answer.
    """
    folder = Path(path).expanduser()
    _refuse_adapter(folder, path)
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelFilesError(
            f"{path} has no config.json",
            "a Hugging Face model folder, or a hub id such as org/name",
            "Correct model.path.",
        )
    from huggingface_hub import snapshot_download

    patterns = [*HUB_PATTERNS, *(["*.bin"] if allow_pickle else [])]
    try:
        with during("network"):
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = first_line(error)
        raise ModelFilesError(
            f"model {path!r} is not a folder here, and the hub gave none ({reason})",
            "a model folder or a reachable hub id",
            "Correct model.path, download it where there is a network, or set HF_TOKEN.",
        ) from None
    _refuse_adapter(folder, path)
    return folder


def _refuse_adapter(folder: Path, path: str) -> None:
    """Raises ModelFilesError for an adapter's folder, also where a model lies beside it.

    transformers would load the model that the adapter names, from wherever that is.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        base = read_adapter_config(folder).get("base_model_name_or_path")
        raise ModelFilesError(
            f"{path} holds an adapter ({ADAPTER_CONFIG_NAME})",
            "a whole model",
            f"To train on from it, set adapter.path to {path} and model.path to its base model "
            f"({base}).",
        )


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """The model's config.json; raises ModelFilesError when it is missing or not JSON."""
    path = model_dir / "config.json"
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFilesError(
            f"{path} is not readable ({error})", "a JSON object", "Download the model again."
        ) from None


def model_config(base: dict[str, Any], dtype: str, breaks_ties: bool) -> dict[str, Any]:
    """The base model's config.json for weights of `dtype`, untied if they are stored apart."""
    config = {key: value for key, value in base.items() if key != "_name_or_path"}
    if not {"dtype", "torch_dtype"} & set(config):
        config["dtype"] = dtype
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):  # the second is how transformers 4 spelled it
            config[key] = dtype
        elif key == "tie_word_embeddings" and breaks_ties:
            config[key] = False
        elif isinstance(value, dict) and "model_type" in value:  # the text part of a larger model
            config[key] = model_config(value, dtype, breaks_ties)
    if breaks_ties:
        config["tie_word_embeddings"] = False  # the default of some families is true
    return config


def with_vocab_size(config: dict[str, Any], size: int) -> dict[str, Any]:
    """A config.json whose vocabulary has `size` tokens, also in the text part of a larger model."""
    return {
        key: size
        if key == "vocab_size"
        else with_vocab_size(value, size)
        if isinstance(value, dict) and "model_type" in value
        else value
        for key, value in config.items()
    }


def vocab_size_of(model_dir: Path) -> int | None:
    """Rows of the model's embeddings, None when its config does not tell."""
    config = read_model_config(model_dir)
    for section in (config, _object(config, "text_config")):
        if isinstance(section.get("vocab_size"), int):
            return section["vocab_size"]
    return None


def position_limit(model_dir: Path) -> int | None:
    """Positions that the model was made for, its scaled rotary embeddings included, None: unknown.

    Under a rope of `factor` these are `factor` times those it was trained with, which older
    config.json files do not put into max_position_embeddings.
    """
    config = read_model_config(model_dir)
    for section in (config, _object(config, "text_config")):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(section.get(name), int):
                return max(section[name], *_scaled_positions(section, section[name]))
    return None


def _scaled_positions(section: dict[str, Any], positions: int) -> list[int]:
    ropes = _object(section, "rope_parameters") or _object(section, "rope_scaling")
    by_layer = [rope for rope in ropes.values() if isinstance(rope, dict)]
    name = "original_max_position_embeddings"
    outer = _positive(section, name, positions)
    scaled = [_positive(r, name, outer) * _positive(r, "factor", 1) for r in by_layer or [ropes]]
    return [0, *map(int, scaled)]


def _object(section: dict[str, Any], name: str) -> dict[str, Any]:
    found = section.get(name)
    return found if isinstance(found, dict) else {}


def _positive(section: dict[str, Any], name: str, default: float) -> float:
    """A number that can be counted with; another library refuses what is none."""
    found: Any = section.get(name)
    return found if type(found) in (int, float) and 0 < found < MOST_POSITIONS else default


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copies what a model folder has of these names or patterns, folders of theirs included."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def weight_files(model_dir: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a folder, sorted; safetensors only unless pickles are allowed.

    Raises ModelFilesError when there is none, when one named by the index is missing, and when a
    name leaves the folder: an index that says `../x` would read files of somebody else.
    """
    index_path = model_dir / "model.safetensors.index.json"
    if index_path.is_file():
        for name in (names := _indexed(index_path)):
            if Path(name).name != name:
                raise ModelFilesError(
                    f"{index_path} names {name!r}",
                    "file names inside the model folder",
                    "Do not use this model: its index points elsewhere.",
                )
        paths = [model_dir / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelFilesError(
                f"{model_dir} lacks {', '.join(missing)}",
                "every file its index names",
                "Download the model again.",
            )
        return paths
    single = model_dir / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(model_dir.glob("*.bin"))
    if pickles and allow_pickle:
        return pickles
    if pickles:
        raise ModelFilesError(
            f"{model_dir} has pickled weights only ({pickles[0].name})",
            "safetensors: loading a pickle runs the code in it",
            "Convert it, or set model.allow_pickle_weights=true if you trust its author.",
        )
    raise ModelFilesError(
        f"{model_dir} has no weight files", "model.safetensors", "Download the model again."
    )


def _indexed(index_path: Path) -> list[str]:
    """The names that an index gives files, sorted."""
    try:
        found = parse_as(_Index, index_path.read_bytes()).weight_map.values()
    except ValueError as error:
        raise ModelFilesError(
            f"{index_path} is not readable ({error})",
            "a weight_map of tensors to files",
            "Download the model again.",
        ) from None
    return sorted({*found})


class _Index(BaseModel):
    weight_map: dict[str, str]


def digest_of_weights(model_dir: Path, allow_pickle: bool = False) -> str:
    """Identity of a model's weights and architecture: names and SHA-256 of its files.

    File digests are cached by path, size and modification time, so a 70B model is read once.
    """
    files = [model_dir / "config.json", *weight_files(model_dir, allow_pickle)]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = list(pool.map(_cached_digest, files))
    return digest_of({path.name: digest for path, digest in zip(files, digests, strict=True)})


def check_named_base(adapter_dir: Path, model_path: str) -> None:
    """Raises ModelFilesError when an adapter names another base model than `model_path`.

    Two folders here are compared by the digest of their weights; otherwise the last part of the
    names decides, since one model may lie on the hub, in the hub's cache and in a folder of one's
    own. An adapter that names none passes; names and shapes are compared when it is loaded.
    """
    named = read_adapter_config(adapter_dir).get("base_model_name_or_path")
    if not named or _is_same_model(str(named), model_path):
        return
    raise ModelFilesError(
        f"the adapter {adapter_dir} was trained on {named}, and model.path is {model_path}",
        "the adapter's own base model",
        f"Set model.path to {named}. If both are the same model under two names, put yours into "
        f"base_model_name_or_path of {adapter_dir / ADAPTER_CONFIG_NAME}.",
    )


def _is_same_model(one: str, other: str) -> bool:
    folders = [Path(path).expanduser() for path in (one, other)]
    if all((folder / CONFIG_NAME).is_file() for folder in folders):
        paths = {folder.resolve() for folder in folders}
        return len(paths) == 1 or len({digest_of_weights(path, True) for path in paths}) == 1
    names: set[str] = set()
    for folder in folders:
        parts = folder.resolve().parts if folder.exists() else folder.parts
        cached = [part for part in parts if part.startswith("models--")]
        names.add((cached[-1].split("--")[-1] if cached else parts[-1]).lower())
    return len(names) == 1


def digest_of_tokenizer(model_dir: Path) -> str:
    """Identity of a tokenizer with its chat template: names and SHA-256 of its files."""
    files = [model_dir / name for name in TOKENIZER_FILES if (model_dir / name).is_file()]
    files += sorted(model_dir.glob(BESIDE_TOKENIZER[0]))
    if not files:
        raise ModelFilesError(
            f"{model_dir} has no tokenizer files", "tokenizer.json", "Copy the tokenizer there."
        )
    return digest_of({path.name: digest_of_file(path) for path in files})


def _cached_digest(path: Path) -> str:
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    cached = home / "dpo-dist" / "digests" / f"{digest_of(identity)}.json"
    try:
        record = parse_object(cached.read_bytes())
        if record.get("file") == identity and isinstance(digest := record.get("sha256"), str):
            return digest
    except (OSError, ValueError):
        pass
    digest = digest_of_file(path)
    with contextlib.suppress(OSError):  # a read-only home only costs the next run another read
        write_json(cached, {"file": identity, "sha256": digest})
    return digest
