"""Measurements and files of the cache: bounded, checked, and never trusted where somebody else can write."""

import json
import os
import time

import pytest

from specdec.disk_cache.folders import MEASUREMENTS, CacheFolder
from specdec.disk_cache.measurements import keep, recall

KEY = ("forwards", "a model", 2)


def add(folder: CacheFolder, name: str, num_bytes: int, age_s: float = 0.0) -> None:
    def write(part):
        part.write_bytes(bytes(num_bytes))
        os.utime(part, (time.time() - age_s,) * 2)
        return name

    assert folder.write(write) is not None


def test_what_was_kept_is_recalled_for_its_key_only():
    assert recall(KEY) is None
    keep(KEY, {"1": 0.25})
    assert recall(KEY) == {"1": 0.25}
    assert recall((*KEY[:2], 3)) is None


@pytest.mark.parametrize("damage", ["junk", "edited", "truncated", "a list", "empty"])
def test_a_damaged_measurement_is_ignored_and_replaced(damage):
    keep(KEY, {"1": 0.25})
    (file,) = MEASUREMENTS.files()
    text = file.read_text()
    edited = {
        "junk": "\xff{",
        "edited": text.replace("0.25", "0.26"),
        "truncated": text[:-9],
        "a list": "[]",
        "empty": "",
    }
    file.write_text(edited[damage])
    assert recall(KEY) is None
    keep(KEY, {"1": 0.5})
    assert recall(KEY) == {"1": 0.5}


def test_an_old_measurement_is_made_again():
    keep(KEY, 1)
    (file,) = MEASUREMENTS.files()
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"time": document["time"] - 31 * 24 * 3600}))
    assert recall(KEY) is None


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_can_write_is_not_read(what):
    keep(KEY, 1)
    (file,) = MEASUREMENTS.files()
    (file if what == "file" else MEASUREMENTS.path).chmod(0o777)
    assert recall(KEY) is None


def test_a_link_is_not_followed(tmp_path):
    keep(KEY, 1)
    (file,) = MEASUREMENTS.files()
    file.replace(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert recall(KEY) is None


def test_a_folder_that_cannot_be_written_is_no_obstacle():
    MEASUREMENTS.path.parent.mkdir()
    MEASUREMENTS.path.write_text("a file where the folder should be")
    keep(KEY, 1)
    assert recall(KEY) is None


def test_the_files_that_were_not_used_for_longest_go_first():
    folder = CacheFolder("bounded", 100)
    add(folder, "oldest", 40, age_s=300)
    add(folder, "older", 40, age_s=200)
    assert folder.find("oldest"), "it counts as used now"
    add(folder, "new", 40)
    assert {file.name for file in folder.files()} == {"oldest", "new"}
    add(folder, "huge", 1000)
    assert [file.name for file in folder.files()] == ["huge"], "what has just been made is there for its maker"
    assert (folder.has_room(50), folder.has_room(101)) == (True, False)


def test_many_files_are_looked_for_in_one_list(monkeypatch):
    folder, lists = CacheFolder("listed", 100), []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (lists.append(path), listdir(path))[1])
    for name in ("b-1", "a-2", "a-1", "c", "ab", "e"):
        add(folder, name, 1)
    lists.clear()
    found = folder.find_all(["b-", "a", "a-2", "ab", "d", "e"])
    assert [file.name for file in found] == ["b-1", "a-1", "a-2", "ab"], "up to the first that there is none for"
    assert len(lists) == 1
    assert folder.find_all([]) == []
    assert CacheFolder("nowhere", 1).find_all(["a"]) == []


def test_files_are_the_users_own_and_an_error_leaves_nothing_behind():
    def fail(part):
        part.write_text("half")
        raise OSError("no space")

    add(MEASUREMENTS, "whole", 3)
    assert MEASUREMENTS.write(fail) is None
    (file,) = MEASUREMENTS.files()
    assert (file.name, file.stat().st_mode & 0o077) == ("whole", 0)
    MEASUREMENTS.clear()
    assert MEASUREMENTS.files() == []


def test_files_that_are_used_together_have_an_order():
    folder = CacheFolder("ordered", 100)
    for name in "abc":
        add(folder, name, 1)
    folder.touch(folder.path / name for name in "bca")
    assert sorted(folder.files(), key=lambda file: file.stat().st_mtime_ns) == [folder.path / name for name in "bca"]
