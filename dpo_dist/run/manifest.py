"""Atomic writes, digests, and the manifest that tells whether an artifact is current."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_dist.errors import ArtifactError, naming
from dpo_dist.parsing import parse_as
from dpo_dist.run.run_dir import MANIFEST_NAME
from dpo_dist.watch.heartbeat import beat
from dpo_dist.watch.lease import fence

SCHEMA_VERSION = 1
READ_BYTES = 1 << 22


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value."""
    # half a character, which JSON can spell, has an identity too
    return hashlib.sha256(canonical_json(value).encode(errors="surrogatepass")).hexdigest()


def digest_of_hex(data: memoryview) -> str:
    """`digest_of(data.hex())`, of any number of bytes, without a string of all of them."""
    digest = hashlib.sha256(b'"')
    for start in range(0, len(data), READ_BYTES):
        digest.update(data[start : start + READ_BYTES].hex().encode())
    digest.update(b'"')
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
            beat()
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    """Makes renames and creations inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces a file so that a reader or a crash sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    # not mkstemp, whose files are for their owner alone: here the umask decides, as for all files
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with naming(path), temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        fence()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong is told, not what follows from it
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_dir(final: Path) -> Iterator[Path]:
    """A folder that appears under its final name only when the block ends well.

    An older folder of that name is replaced; a killed attempt's leftovers are removed by the next.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with naming(final):
            yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with naming(path), path.open("rb") as stream:
                    os.fsync(stream.fileno())  # some file systems tell only here that they are full
        fsync_dir(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fence()
    replaced = final.parent / f".{final.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    fsync_dir(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: bytes, and the hex SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact was made from: stage, settings, digests of its inputs; and what came out."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Identity of the artifact: settings, inputs and details."""
        return digest_of(asdict(self))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of an artifact folder."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(folder: Path, details: type | None = None) -> Manifest:
    """Reads an artifact's manifest; raises ArtifactError when it is missing or not readable, or
    when its details are not of the given kind."""
    return read_manifest_file(folder / MANIFEST_NAME, folder, details)


def read_manifest_file(path: Path, artifact: Path, details: type | None = None) -> Manifest:
    """`read_manifest` for an artifact that is a single file, with the manifest beside it."""
    try:
        manifest = parse_as(Manifest, path.read_bytes())
        if details is not None:
            parse_as(details, json.dumps(manifest.details))
        return manifest
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist",
            "an artifact with its manifest",
            "Run the stage that writes it, or `dpo-dist run`.",
        ) from None
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not readable ({error})",
            "the manifest as it was written",
            f"Delete {artifact} and run its stage again.",
        ) from None


def differences(have: Mapping[str, Any], want: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names each leaf that differs: `key: have -> want`."""
    found = []
    for key in sorted({*have, *want}):
        a, b = have.get(key), want.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def is_current(
    folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> bool:
    """Whether an artifact stands and was made from exactly these settings and inputs.

    Returns False when there is none; raises ArtifactError with the named difference when it is
    stale, because replacing work that took hours is the user's decision.
    """
    if not (folder / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(folder)
    found = differences(manifest.settings, json.loads(canonical_json(settings)))
    found += differences(manifest.inputs, inputs, "input ")
    if manifest.schema_version != SCHEMA_VERSION:
        found.append(f"schema_version: {manifest.schema_version} -> {SCHEMA_VERSION}")
    if found:
        raise ArtifactError(
            f"{folder} was made by `{stage}` from other settings ({'; '.join(found)})",
            "the settings of this run config",
            f"Choose another run.dir, or delete {folder} to make it again.",
        )
    return True
