"""What a task may ask for in sidecars, and how long their volumes are counted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from oz_worker.backends.sidecar_ages import Ages
from oz_worker.backends.sidecar_asked import SidecarUnusable, asked
from oz_worker.model import Sidecar

GOOD = "acme/tool:1"

BAD = {
    "no image": (Sidecar("", "/a"), r"sidecar 2 \(no image at '/a'\) names no image; give it one"),
    "blanks for an image": (Sidecar(" \t", "/a"), "names no image"),
    "a flag": (Sidecar("--privileged", "/a"), "that is no name of an image; write it like registry/name:tag"),
    "capitals": (Sidecar("Acme/Tool", "/a"), "is no name of an image"),
    "blank in the name": (Sidecar("acme/to ol", "/a"), "is no name of an image"),
    "scheme": (Sidecar("https://r.test/a", "/a"), "is no name of an image"),
    "bad digest": (Sidecar("acme/tool@sha256:12", "/a"), "is no name of an image"),
    "newline": (Sidecar("acme/tool\nx", "/a"), "is no name of an image"),
    "no path": (Sidecar(GOOD, ""), r"\(acme/tool:1 at 'no path'\): a mount path is absolute"),
    "relative path": (Sidecar(GOOD, "agent"), "a mount path is absolute, like /agent; correct it"),
    "root": (Sidecar(GOOD, "/"), "cannot take the place of the whole file system"),
    "root in other words": (Sidecar(GOOD, "//x/.."), "cannot take the place of the whole file system"),
    "colon": (Sidecar(GOOD, "/a:ro"), "cannot have ':' in it; choose another path"),
    "comma": (Sidecar(GOOD, "/a,b"), "cannot have ',' in it"),
    "NUL": (Sidecar(GOOD, "/a\0b"), r"cannot have '\\x00' in it"),
    "long image": (Sidecar("x" * 100_000, "/a"), r"x{300} at '/a'\): that is no name of an image; write it like"),
    "long path": (Sidecar(GOOD, "/a" * 40_000), "at most 4 KiB, its parts 255 bytes; choose a shorter one"),
    "long part": (Sidecar(GOOD, "/a/" + "b" * 256), "at most 4 KiB, its parts 255 bytes; choose a shorter one"),
    "taken": (Sidecar(GOOD, "/first"), "other/image is mounted at /first already; give each a path of its own"),
    "taken, in other words": (Sidecar(GOOD, "//first//"), "other/image is mounted at /first already"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_named_with_the_cure(case: str) -> None:
    bad, told = BAD[case]
    with pytest.raises(SidecarUnusable, match=told):
        asked([Sidecar("other/image", "/first/"), bad])


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("tool", "tool"),
        ("docker.io/library/tool:1.2", "tool"),
        ("index.docker.io/acme/tool", "acme-tool"),
        ("r.test:5000/acme/tool", "r.test-5000-acme-tool"),
        ("[::1]:5000/acme/tool:v1@sha256:" + "a" * 64, "---1--5000-acme-tool"),
        ("localhost/a__b.c--d@sha256:" + "0" * 64, "localhost-a__b.c--d"),
        ("EU.R.test/acme/tool:Tag_1", "EU.R.test-acme-tool"),
        ("a/" * 50 + "b", "-a" * 29 + "-b"),
    ],
)
def test_names_of_images_and_what_a_volume_has_of_them(image: str, repository: str) -> None:
    (one,) = asked([Sidecar(f" {image}\n", "//mnt//x/./", True)])
    assert (one.image, one.path, one.read_write, one.repository) == (image, "/mnt/x", True, repository)


def test_ages_go_on_across_restarts(tmp_path: Path) -> None:
    file = tmp_path / "ages.json"
    now = time.time()
    file.write_text(json.dumps({"used": {"old": now - 100, "future": now + 1000}, "bare": {"old": now - 50}}))
    ages = Ages(file)
    assert (ages.idle("old") >= 100, ages.bare("old") >= 50, ages.idle("future") < 50) == (True, True, True)
    ages.touch("old")
    ages.held("old")
    ages.touch("gone")
    ages.keep({"old"})
    again = Ages(file)
    assert (again.idle("old") < 50, again.bare("old") < 50) == (True, True)
    assert [again.was_used(name) for name in ("old", "gone", "future")] == [True, False, False]
    assert oct(file.stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("damage", ["{", "[]", '{"used": {"a": "x"}, "bare": {}}', '{"used": 1, "bare": {}}', "NaN"])
def test_damaged_ages_begin_anew(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "ages.json"
    file.write_text(damage)
    ages = Ages(file)
    assert ages.idle("a") < 50
    ages.save()
    assert Ages(file).was_used("a")


def test_ages_that_cannot_be_written_are_kept_in_memory(tmp_path: Path) -> None:
    ages = Ages(tmp_path / "missing" / "ages.json")
    ages.touch("a")
    ages.save()
    assert ages.was_used("a")
