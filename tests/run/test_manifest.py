import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_dist.errors import ArtifactError
from dpo_dist.run import manifest
from dpo_dist.run.manifest import Manifest


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file.txt"
    manifest.write_atomic(target, "one")
    manifest.write_atomic(target, b"two")
    assert target.read_text() == "two"
    assert os.listdir(target.parent) == ["file.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_truth_17_the_umask_decides_who_reads_a_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        manifest.write_atomic(tmp_path / "a" / "file.txt", "one")
        with manifest.atomic_dir(tmp_path / "artifact") as partial:
            manifest.write_json(partial / "x.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders, files = 0o777 & ~umask, 0o666 & ~umask
    assert modes == {"a": folders, "file.txt": files, "artifact": folders, "x.json": files}


def test_write_atomic_failure_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    manifest.write_atomic(target, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_atomic(target, "\ud800")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_dir_appears_only_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "artifact"
    with manifest.atomic_dir(final) as partial:
        (partial / "x").write_text("1")
        assert not final.exists()
    assert (final / "x").read_text() == "1"
    with pytest.raises(ZeroDivisionError), manifest.atomic_dir(final) as partial:
        (partial / "x").write_text("2")
        raise ZeroDivisionError
    assert (final / "x").read_text() == "1"
    with manifest.atomic_dir(final) as partial:
        (partial / "y").write_text("3")
    assert os.listdir(final) == ["y"]
    assert os.listdir(tmp_path) == ["artifact"]


def test_killed_atomic_dir_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dpo_dist.run.manifest import atomic_dir\n"
        "with atomic_dir(Path(sys.argv[1])) as p:\n"
        "    (p / 'x').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    final = tmp_path / "artifact"
    ended = subprocess.run([sys.executable, "-c", program, str(final)], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not final.exists()
    with manifest.atomic_dir(final) as partial:
        assert os.listdir(partial) == []
    assert os.listdir(tmp_path) == ["artifact"]


def test_digest_depends_on_values_not_on_key_order() -> None:
    assert manifest.digest_of({"a": 1, "b": 2}) == manifest.digest_of({"b": 2, "a": 1})
    assert manifest.digest_of({"a": 1}) != manifest.digest_of({"a": 2})


def test_is_current_names_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    settings, inputs = {"max_length": 512, "gate": {"empty": "drop"}}, {"a.jsonl": "11"}
    assert not manifest.is_current(folder, "prepare", settings, inputs)
    manifest.write_manifest(folder, Manifest("prepare", settings, inputs))
    assert manifest.is_current(folder, "prepare", settings, inputs)
    changed = {"max_length": 640, "gate": {"empty": "raise"}}
    with pytest.raises(ArtifactError) as caught:
        manifest.is_current(folder, "prepare", changed, {"a.jsonl": "22"})
    assert str(caught.value) == (
        f'{folder} was made by `prepare` from other settings (gate.empty: "drop" -> "raise"; '
        'max_length: 512 -> 640; input a.jsonl: "11" -> "22"); expected the settings of this run '
        f"config. Choose another run.dir, or delete {folder} to make it again."
    )


def test_missing_and_broken_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        manifest.read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/MANIFEST.json does not exist; expected an artifact with its manifest. Run the "
        "stage that writes it, or `dpo-dist run`."
    )
    (tmp_path / "MANIFEST.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not readable .*; expected the manifest as it was"):
        manifest.read_manifest(tmp_path)


def test_a_digest_of_hex_digits_is_that_of_the_string(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 3  # checkpoints hold the digest of the string
    for block in (1, 7, 256, 768, 1 << 22):
        monkeypatch.setattr(manifest, "READ_BYTES", block)
        for length in (0, 1, 255, 256, 768):
            data = content[:length]
            assert manifest.digest_of_hex(memoryview(data)) == manifest.digest_of(data.hex())
