from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from oz_worker.backends.workspace import MARKERS, WorkspaceRoot, remove_tree, workspace_name
from oz_worker.errors import NotUsable, TaskFault
from oz_worker.model import Key, Reason


@pytest.fixture
def root(tmp_path: Path) -> WorkspaceRoot:
    root = WorkspaceRoot(str(tmp_path / "root"), "instance-1")
    root.open()
    return root


def test_names_are_cut_made_safe_and_kept_apart_by_the_unit() -> None:
    assert workspace_name(Key("t" * 99, "e" * 99), "0123456789abcdef") == f"{'t' * 40}-{'e' * 40}-01234567"
    assert workspace_name(Key("a b:c", ""), "0123456789abcdef") == "a_b_c-01234567"
    assert workspace_name(Key(".oz-worker", "x"), "0123456789abcdef") == "_oz-worker-x-01234567"


@pytest.mark.parametrize("key", [Key(""), Key("."), Key(".."), Key("a/b"), Key("a\\b"), Key("a\0"), Key("t", "../x")])
def test_an_id_that_is_no_part_of_a_path_is_refused(key: Key) -> None:
    with pytest.raises(TaskFault) as caught:
        workspace_name(key, "0123456789abcdef")
    assert caught.value.facts.reason is Reason.WORKSPACE_SETUP
    assert not caught.value.facts.agent_started


def test_a_workspace_is_private_empty_and_marked_outside_itself(root: WorkspaceRoot) -> None:
    path = root.create("w")
    assert os.listdir(path) == []
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert Path(root.path, MARKERS, "w").read_text() == "instance-1"
    assert root.remove("w") == ""
    assert os.listdir(root.path) == [MARKERS]
    assert os.listdir(Path(root.path, MARKERS)) == []


def test_only_marked_directories_are_removed(root: WorkspaceRoot) -> None:
    foreign, other = Path(root.path, "foreign"), Path(root.path, "other")
    foreign.mkdir()
    WorkspaceRoot(root.path, "instance-2").create("other")
    for name in ("foreign", "other", MARKERS, "..", ".", "", "a/b"):
        root.remove(name)
    assert foreign.is_dir()
    assert other.is_dir()
    assert Path(root.path, MARKERS).is_dir()


def test_a_directory_in_the_way_is_not_taken_over(root: WorkspaceRoot) -> None:
    Path(root.path, "w").mkdir()
    Path(root.path, "w", "precious").write_text("x")
    with pytest.raises(TaskFault) as caught:
        root.create("w")
    assert "w exists and is not this worker's" in caught.value.facts.detail
    assert Path(root.path, "w", "precious").exists()


def test_what_an_earlier_attempt_of_ours_left_is_replaced(root: WorkspaceRoot) -> None:
    Path(root.create("w"), "old").write_text("x")
    assert os.listdir(root.create("w")) == []


def test_a_root_that_is_a_file_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotUsable, match=r"file.*is not a directory; remove"):
            WorkspaceRoot(str(path), "i").open()


def test_removal_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "precious").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    (tree / "a" / "out").symlink_to(outside)
    (tree / "file").symlink_to(outside / "deep" / "precious")
    (tree / "dangling").symlink_to("nowhere")
    assert remove_tree(str(tree)) == ""
    assert not tree.exists()
    assert (outside / "deep" / "precious").exists()


def test_a_link_in_the_place_of_the_tree_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "tree").symlink_to(tmp_path / "outside")
    assert "could not be removed" in remove_tree(str(tmp_path / "tree"))
    assert (tmp_path / "outside").is_dir()


def test_read_only_directories_special_files_and_strange_names_go(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    inner = tree / "ro" / "closed"
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    (tree / b"odd\xff\n name".decode("utf-8", "surrogateescape")).write_text("x")
    os.mkfifo(tree / "fifo")
    inner.chmod(0o000)
    (tree / "ro").chmod(0o500)
    script = f"import os, sys; sys.path.insert(0, {os.getcwd()!r}); os.chdir({str(tmp_path)!r})\n"
    script += "from oz_worker.backends.workspace import remove_tree\n"
    # As an ordinary user, to whom a read-only directory means something: root is not stopped by it.
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "65534:65534", str(tmp_path)], check=True)
        script += "os.setgid(65534); os.setuid(65534)\n"
    script += "sys.exit(remove_tree('tree') or 0)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert not tree.exists()


def test_a_tree_far_deeper_than_descriptors_and_recursion_goes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    here = os.open(tree, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert remove_tree(str(tree)) == ""
    assert not tree.exists()


def test_mounts_inside_are_not_crossed_but_named_and_the_rest_goes(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "a" / "mnt").mkdir(parents=True)
    (tree / "b").mkdir()
    (tree / "file").write_text("")
    outside.mkdir()
    (outside / "precious").write_text("x")
    # In a mount namespace of its own, so that no mount survives a failing test; bind mounts of the same file system,
    # which no device number tells apart.
    script = f"mount --bind {outside} {tree}/a/mnt && mount --bind {outside}/precious {tree}/file && "
    script += f"exec {sys.executable} -c \"import sys; sys.path.insert(0, '{os.getcwd()}');"
    script += f"from oz_worker.backends.workspace import remove_tree; print(remove_tree('{tree}'))\""
    alone = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    found = subprocess.run([*alone, "/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert f"{tree}/a/mnt (something is mounted there)" in found.stdout
    assert f"{tree}/file (Device or resource busy)" in found.stdout
    assert (outside / "precious").read_text() == "x"
    assert not (tree / "b").exists()
    assert remove_tree(str(tree)) == ""  # the mounts are gone with their namespace
    assert not tree.exists()


def test_a_full_disk_is_a_fault_with_its_cure(tmp_path: Path) -> None:
    # A file system of our own with too few inodes, in a mount namespace that takes it along.
    script = f"mount -t tmpfs -o nr_inodes=3 none {tmp_path} && exec {sys.executable} -c "
    script += f"\"import sys; sys.path.insert(0, '{os.getcwd()}');"
    script += "from oz_worker.backends.workspace import WorkspaceRoot;"
    script += f"root = WorkspaceRoot('{tmp_path}', 'i'); root.open(); root.create('w')\""
    alone = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    found = subprocess.run([*alone, "/bin/sh", "-c", script], capture_output=True, text=True)
    assert f"workspace {tmp_path}/w cannot be made: No space left on device; free space or inodes there" in found.stderr


def test_trees_are_removed_side_by_side(tmp_path: Path) -> None:
    trees = [tmp_path / str(number) for number in range(4)]
    for tree in trees:
        for name in range(50):
            (tree / str(name)).mkdir(parents=True)
            (tree / str(name) / "file").write_text("x")
    threads = [threading.Thread(target=remove_tree, args=(str(tree),)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == []


def test_a_mark_that_was_cut_short_by_a_kill_is_removed(tmp_path: Path) -> None:
    root = WorkspaceRoot(str(tmp_path / "root"), "instance")
    root.open()
    mark = tmp_path / "root" / ".oz-worker" / "task-exec-12345678"
    mark.touch()
    assert root.remove(mark.name) == ""
    assert not mark.exists()
