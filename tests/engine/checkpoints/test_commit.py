import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults.other_user import files_of_another_user, needs_root

from dpo_dist.engine.checkpoints.commit import (
    check_new_files,
    check_pickles,
    commit,
    find_changed,
    put_aside,
    read_committed,
    record_files,
    remove,
    remove_leftovers,
    verify,
)
from dpo_dist.errors import CheckpointError
from dpo_dist.run.manifest import FileRecord, digest_of_file
from dpo_dist.run.run_dir import COMMIT_NAME, MANIFEST_NAME

SHARDS = {f"zero_pp_rank_{rank}_optim_states.pt": bytes([rank]) * 100 for rank in (0, 1)}


def committed(folder: Path, contents: dict[str, bytes] = SHARDS) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    commit(folder, record_files(folder))
    return folder


def test_a_file_that_was_hashed_while_it_was_written_is_not_read_again(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"content")
    told = FileRecord(7, "the hash that its writer took")
    records = record_files(tmp_path, {"a": told})
    assert records == {"a": told, "b": FileRecord(7, digest_of_file(tmp_path / "b"))}
    (tmp_path / "a").write_bytes(b"longer content")
    with pytest.raises(AssertionError, match="a has 14 bytes instead of 7"):
        record_files(tmp_path, {"a": told})


def flip_a_bit(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_optim_states.pt"
    path.write_bytes(b"\x01" * 99 + b"\x03")


def truncate(folder: Path) -> None:
    os.truncate(folder / "zero_pp_rank_1_optim_states.pt", 60)


def empty(folder: Path) -> None:
    os.truncate(folder / "zero_pp_rank_1_optim_states.pt", 0)


def lose_a_shard(folder: Path) -> None:
    (folder / "zero_pp_rank_1_optim_states.pt").unlink()


def swap_two_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.pt"))
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)


def swap_manifests(folder: Path) -> None:
    other = committed(folder.parent / "other", {"zero_pp_rank_0_optim_states.pt": b"x"})
    (other / MANIFEST_NAME).rename(folder / MANIFEST_NAME)


def swap_manifests_and_markers(folder: Path) -> None:
    other = committed(
        folder.parent / "other", SHARDS | {"zero_pp_rank_1_optim_states.pt": b"\x02" * 100}
    )
    for name in (MANIFEST_NAME, COMMIT_NAME):
        (other / name).rename(folder / name)


def lose_the_marker(folder: Path) -> None:
    (folder / COMMIT_NAME).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()


def garbage_marker(folder: Path) -> None:
    (folder / COMMIT_NAME).write_bytes(b"\xff\x00garbage")


def marker_of_another_kind(folder: Path) -> None:
    (folder / COMMIT_NAME).write_text("[1, 2]")


def marker_pointing_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_text("{}")
    (folder / COMMIT_NAME).unlink()
    (folder / COMMIT_NAME).symlink_to(outside)


def escaping_link(folder: Path) -> None:
    shard = folder / "zero_pp_rank_1_optim_states.pt"
    outside = folder.parent / "outside"
    shard.rename(outside)
    shard.symlink_to(outside)


def linked_folder(folder: Path) -> None:
    """The files of a folder below are as committed, in a folder elsewhere."""
    committed(folder, {"zero/fp32.pt": b"content"})
    (folder / "zero").rename(folder.parent / "outside")
    (folder / "zero").symlink_to(folder.parent / "outside")


def shard_as_a_pipe(folder: Path) -> None:
    (folder / "zero_pp_rank_1_optim_states.pt").unlink()
    os.mkfifo(folder / "zero_pp_rank_1_optim_states.pt")


def rewrite_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Changes the manifest and the marker with it, as somebody who knows the format would."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    (folder / COMMIT_NAME).unlink()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    marker = {"manifest": digest_of_file(folder / MANIFEST_NAME)}
    (folder / COMMIT_NAME).write_text(json.dumps(marker))


def manifest_naming_outside(folder: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["files"]["../outside"] = {"size": 2, "sha256": "0" * 64}

    (folder.parent / "outside").write_text("{}")
    rewrite_manifest(folder, change)


def manifest_of_another_kind(folder: Path) -> None:
    rewrite_manifest(folder, lambda manifest: manifest.update(files=[1]))


CHEAP = [
    (truncate, "zero_pp_rank_1_optim_states.pt has 60 bytes instead of 100"),
    (empty, "zero_pp_rank_1_optim_states.pt has 0 bytes instead of 100"),
    (lose_a_shard, r"lacks zero_pp_rank_1_optim_states.pt \(1 of 2 files\)"),
    (swap_manifests, "MANIFEST.json is not the one that COMMITTED names"),
    (lose_the_marker, "step-000001 has no COMMITTED marker"),
    (lose_the_manifest, "MANIFEST.json is not the one that COMMITTED names"),
    (garbage_marker, "COMMITTED is not readable"),
    (marker_of_another_kind, "COMMITTED is not readable"),
    (marker_pointing_outside, "COMMITTED is a link or a special file, not a plain file"),
    (escaping_link, "zero_pp_rank_1_optim_states.pt is a link or a special file"),
    (linked_folder, "zero is a link or a special file, not a plain folder"),
    (shard_as_a_pipe, "zero_pp_rank_1_optim_states.pt is a link or a special file"),
    (manifest_naming_outside, "names '../outside', which is not a file of the folder"),
    (manifest_of_another_kind, "MANIFEST.json does not list files"),
]
SAME_SIZE = [
    (flip_a_bit, "zero_pp_rank_1_optim_states.pt has another content than was committed"),
    (swap_two_shards, "zero_pp_rank_0_optim_states.pt has another content than was committed"),
    (swap_manifests_and_markers, "zero_pp_rank_1_optim_states.pt has another content"),
]


@pytest.mark.fault(
    13,
    "a file cut short or emptied, a lost shard, swapped or lost manifests",
    becomes="refused, the damage named",
)
@pytest.mark.fault(
    14,
    "a marker of garbage or outside the run folder, links that leave it, a pipe, a "
    "manifest that names `../x`",
    becomes="refused, the damage named",
)
@pytest.mark.parametrize(("damage", "found"), CHEAP, ids=lambda p: getattr(p, "__name__", ""))
def test_damage_is_found_without_reading_the_files(
    tmp_path: Path, damage: Callable[[Path], None], found: str
) -> None:
    folder = committed(tmp_path / "step-000001")
    damage(folder)
    with pytest.raises(CheckpointError, match=found) as caught:
        read_committed(folder)
    assert "expected a checkpoint as it was committed. Use another checkpoint" in str(caught.value)


@pytest.mark.fault(
    13,
    "a bit flipped, two shards swapped, manifest and marker of another checkpoint",
    becomes="refused by content",
)
@pytest.mark.parametrize(("damage", "found"), SAME_SIZE, ids=lambda p: getattr(p, "__name__", ""))
def test_damage_of_equal_size_is_found_by_content(
    tmp_path: Path, damage: Callable[[Path], None], found: str
) -> None:
    folder = committed(tmp_path / "step-000001")
    damage(folder)
    read_committed(folder)
    with pytest.raises(CheckpointError, match=found):
        verify(folder)


def test_a_whole_folder_verifies_at_any_depth(tmp_path: Path) -> None:
    folder = committed(tmp_path / "x", {"zero/a.b/fp32.pt": b"1", "top": b"", "odd name": b"3"})
    files = verify(folder)
    assert sorted(files) == ["odd name", "top", "zero/a.b/fp32.pt"]
    assert files["zero/a.b/fp32.pt"].size == 1
    assert find_changed(folder, files, ["top"]) == []
    assert all(stat.S_ISREG(path.stat().st_mode) for path in folder.glob("*.json"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-000009 does not exist"):
        read_committed(tmp_path / "step-000009")


# What a person, an editor, a desktop or a network file system leaves behind.
FOREIGN = [
    "note.txt", ".nfs000000000001", "train_state.json~", ".train_state.json.swp", ".DS_Store",
    "._zero_pp_rank_0_optim_states.pt", "zero_pp_rank_0_optim_states.pt.bak", "copy/of/a_file",
]  # fmt: skip


@pytest.mark.fault(32, "a note, .nfs, backups and copies in a checkpoint", becomes="no damage")
@pytest.mark.parametrize("name", FOREIGN)
def test_truth_05_a_foreign_file_is_no_damage(tmp_path: Path, name: str) -> None:
    folder = committed(tmp_path / "step-000001")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("not of the run")
    assert sorted(verify(folder)) == sorted(SHARDS)
    check_pickles(folder)


@pytest.mark.fault(32, "a link and a pipe in a checkpoint", becomes="no damage")
def test_truth_05_nor_is_a_foreign_link_or_pipe(tmp_path: Path) -> None:
    folder = committed(tmp_path / "step-000001")
    os.mkfifo(folder / "pipe")
    (folder / "latest").symlink_to(tmp_path)
    assert sorted(verify(folder)) == sorted(SHARDS)


@pytest.mark.fault(29, "a pickle that is not in the manifest", becomes="refused")
def test_a_pickle_that_was_not_committed_is_not_opened(tmp_path: Path) -> None:
    """DeepSpeed looks for shards by pattern; what it might find must be of the checkpoint."""
    folder = committed(tmp_path / "step-000001")
    shard = folder / "zero_pp_rank_2_optim_states.pt"
    shard.write_bytes(b"foreign")
    assert sorted(verify(folder)) == sorted(SHARDS), "which is no damage"
    with pytest.raises(CheckpointError) as caught:
        check_pickles(folder)
    assert str(caught.value) == (
        f"{shard} is not in the manifest; expected only the pickles that were committed, because "
        "opening one can run any code. Move it out of this folder."
    )


@pytest.mark.fault(29, "a pickle of another owner", becomes="refused with the remedy")
@pytest.mark.fault(32, "files of another owner", becomes="no damage; an error with the remedy")
@needs_root
def test_truth_06_files_of_another_user_are_whole_and_not_opened(tmp_path: Path) -> None:
    folder = committed(tmp_path / "step-000001")
    shard = folder / "zero_pp_rank_1_optim_states.pt"
    os.chown(shard, 12345, -1)
    assert sorted(verify(folder)) == sorted(SHARDS)
    with pytest.raises(CheckpointError) as caught:
        check_pickles(folder)
    assert str(caught.value) == (
        f"{shard} belongs to user 12345, this is user 0; expected checkpoint files of this user, "
        "because opening a pickle can run any code. If you trust who wrote it, set "
        "checkpoint.trusted_owners=[12345], or copy the run folder as this user and set run.dir to "
        "the copy."
    )
    check_pickles(folder, trusted=[12345])
    os.chown(shard, 0, -1)
    for path in (folder, folder / COMMIT_NAME):
        os.chown(path, 12345, -1)
        with pytest.raises(CheckpointError, match=f"{path.name} belongs to user 12345"):
            check_pickles(folder)
        os.chown(path, 0, -1)


@needs_root
def test_truth_06_a_file_system_that_maps_owners_is_found_by_the_first_file() -> None:
    with files_of_another_user() as mapped:
        with pytest.raises(CheckpointError) as caught:
            check_new_files(mapped)
        check_new_files(mapped, trusted=[12345])
        assert os.listdir(mapped) == []
    assert str(caught.value) == (
        f"what user 0 writes into {mapped} belongs to user 12345; expected files of this user, "
        "because a resume opens pickles, which can run any code. The file system maps owners, as "
        "with root_squash: run as a user that it leaves alone, put run.dir elsewhere, or, if you "
        "trust all who write as that user, set checkpoint.trusted_owners=[12345]."
    )


@needs_root
def test_truth_06_a_folder_that_cannot_be_written_is_found_by_the_first_file() -> None:
    with files_of_another_user() as folder:
        ours = folder / "checkpoints"
        ours.mkdir(mode=0o555)
        with pytest.raises(CheckpointError) as caught:
            check_new_files(ours)
    assert str(caught.value) == (
        f"{ours} cannot be written (Permission denied); expected a run folder that this user may "
        "write. Change its permissions, or set another run.dir."
    )


def test_put_aside_keeps_every_version_with_its_reason(tmp_path: Path) -> None:
    for attempt in (1, 2):
        folder = committed(tmp_path / "step-000001", {"attempt": bytes([attempt])})
        put_aside(folder, tmp_path / "quarantine", f"reason {attempt}")
        assert not folder.exists()
    quarantine = tmp_path / "quarantine"
    assert (quarantine / "step-000001" / "attempt").read_bytes() == b"\x01"
    assert (quarantine / "step-000001.2" / "attempt").read_bytes() == b"\x02"
    assert (quarantine / "step-000001.reason.txt").read_text() == "reason 1\n"
    assert (quarantine / "step-000001.2.reason.txt").read_text() == "reason 2\n"


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    remove(committed(tmp_path / "step-000001"))
    (tmp_path / ".step-000003.partial" / "sub").mkdir(parents=True)
    (tmp_path / ".other").mkdir()
    remove_leftovers(tmp_path, "step-")
    assert os.listdir(tmp_path) == [".other"]
