"""Folders of runs that are not there, or cannot be made."""

import errno

import pytest
from accelerate import Accelerator
from lab import run_folder
from lab.run_folder import open_run_folder, run_to_resume


def test_no_configuration_and_no_room_for_a_folder(tmp_path):
    message = r"config\.yaml is missing; give the run's folder with --output"
    with pytest.raises(FileNotFoundError, match=message):
        run_to_resume(str(tmp_path), "digits")
    (tmp_path / "file").write_text("")
    message = r"file/run cannot be written \(Not a directory\); give another --output"
    with pytest.raises(OSError, match=message):
        open_run_folder(str(tmp_path / "file" / "run"), "digits", {}, Accelerator(cpu=True))


def test_a_folder_for_which_there_was_no_room_can_be_used_later(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_whole", full)
        with pytest.raises(OSError, match=r"No space left on device\); free some space and start"):
            open_run_folder(str(folder), "digits", {"epochs": 1}, Accelerator(cpu=True))
    open_run_folder(str(folder), "digits", {"epochs": 1}, Accelerator(cpu=True))
    assert run_to_resume(str(folder), "digits") == folder


def test_runs_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    numbers = run_folder._numbers
    started = []

    def overtaken(stem, root):
        """Another process makes the same folder between the look and the making."""
        found = numbers(stem, root)
        if len(started) < 3:
            started.append(root / f"{stem}-{max(found, default=0) + 1}")
            started[-1].mkdir(parents=True)
        return found

    monkeypatch.setattr(run_folder, "_numbers", overtaken)
    folder = open_run_folder(None, "digits[x]", {}, Accelerator(cpu=True), root=tmp_path / "runs")
    assert folder.name == "digits[x]-4"
    assert [path.name for path in started] == [f"digits[x]-{number}" for number in (1, 2, 3)]
    assert not any(list(path.iterdir()) for path in started)
