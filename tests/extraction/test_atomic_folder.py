"""The final name: whole or absent, and nothing beside it, whatever happens in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from extraction import atomic_folder as module
from extraction.atomic_folder import atomic_folder
from extraction.errors import DestinationOccupied, DiskFull, PathRefused


def _write(dest: Path, name: str = "file") -> None:
    with atomic_folder(dest, 1) as root:
        (root / name).write_text("content")


def test_folder_has_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        _write(tmp_path / "dest")
    finally:
        os.umask(before)
    assert (tmp_path / "dest").stat().st_mode & 0o777 == 0o700


def test_missing_parents_are_made_and_on_failure_removed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "there/a/b/dest", 1):
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "there") == []
    _write(tmp_path / "there/a/b/dest")
    assert os.listdir(tmp_path / "there/a/b") == ["dest"]


def test_longest_name_that_a_file_system_takes_is_taken(tmp_path: Path) -> None:
    _write(tmp_path / ("ü" * 127))
    with pytest.raises(PathRefused, match="name too long"):
        _write(tmp_path / ("ü" * 128))
    assert os.listdir(tmp_path) == ["ü" * 127]


@pytest.mark.parametrize("dest", [".", "..", "", "a/..", "/"])
def test_name_that_is_no_new_folder_is_refused(
    dest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DestinationOccupied):
        _write(Path(dest))
    assert os.listdir(tmp_path) == []


def test_dangling_link_occupies_its_name(tmp_path: Path) -> None:
    (tmp_path / "dest").symlink_to("nowhere")
    with pytest.raises(DestinationOccupied):
        _write(tmp_path / "dest")
    assert os.listdir(tmp_path) == ["dest"]


def test_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PathRefused, match="file"):
        _write(tmp_path / "file/dest")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("is_folder", [True, False])
def test_name_taken_in_the_meantime_is_left_alone(tmp_path: Path, is_folder: bool) -> None:
    dest = tmp_path / "dest"
    with pytest.raises(DestinationOccupied), atomic_folder(dest, 1) as root:
        (root / "file").write_text("ours")
        if is_folder:
            _write(dest, "theirs")
        else:
            dest.write_text("theirs")
    assert os.listdir(tmp_path) == ["dest"]
    assert os.listdir(dest) == ["theirs"] if is_folder else dest.read_text() == "theirs"


def test_name_taken_between_the_last_look_and_the_renaming_is_occupied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second of two processes that index the same checkpoint meets it."""
    dest, rename = tmp_path / "dest", os.rename

    def take_first(source: Path, target: Path) -> None:
        dest.mkdir()
        (dest / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", take_first)
    with pytest.raises(DestinationOccupied):
        _write(dest)
    assert os.listdir(dest) == ["theirs"]


def test_two_at_once_give_one_folder_and_one_refusal(tmp_path: Path) -> None:
    start, refusals = threading.Barrier(8), []

    def write() -> None:
        start.wait()
        try:
            _write(tmp_path / "dest")
        except DestinationOccupied as error:
            refusals.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 7
    assert os.listdir(tmp_path) == ["dest"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".dest.0123abcd.partial"
    left.mkdir()
    (left / "weights").write_bytes(bytes(1000))
    other = tmp_path / ".other.0123abcd.partial"
    other.mkdir()
    _write(tmp_path / "dest")
    assert sorted(os.listdir(tmp_path)) == [other.name, "dest"]


def test_unfinished_folder_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from extraction.atomic_folder import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), 1) as root:\n"
        "    (root / 'file').write_text('first'); print('ready', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "dest")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "dest", 1):
            raise ZeroDivisionError
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "dest/file").read_text() == "first"


def test_linked_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (tmp_path / ".dest.0123abcd.partial").symlink_to("precious")
    _write(tmp_path / "dest")
    assert (tmp_path / "precious/file").exists()


def test_read_only_disk_is_one_clear_refusal(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("ro,size=1m")
    with pytest.raises(PathRefused, match=r"dest: Read-only file system$"):
        _write(disk / "dest")


def test_disk_that_others_fill_meanwhile_tells_what_is_missing(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("size=1m")
    needed = 700 * 1024
    with pytest.raises(DiskFull) as caught, atomic_folder(disk / "dest", needed) as root:
        (root / "ours").write_bytes(bytes(200 * 1024))
        (disk / "theirs").write_bytes(bytes(600 * 1024))
        (root / "more").write_bytes(bytes(500 * 1024))
    error = caught.value
    assert error.needed == needed
    assert error.free == (1024 - 600) * 1024
    assert f"{needed - error.free} missing" in str(error)
    assert os.listdir(disk) == ["theirs"]


def test_quota_counts_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskFull), atomic_folder(tmp_path / "dest", 10):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert os.listdir(tmp_path) == []


def test_space_is_checked_after_leftovers_are_gone(
    mount_disk: Callable[[str], Path],
) -> None:
    disk = mount_disk("size=1m")
    left = disk / ".dest.0123abcd.partial"
    left.mkdir()
    (left / "weights").write_bytes(bytes(900 * 1024))
    with atomic_folder(disk / "dest", 800 * 1024):
        assert module.free_bytes(disk) > 800 * 1024
    assert os.listdir(disk) == ["dest"]
