"""Folders of runs that are not there, or cannot be made."""

import pytest
from accelerate import Accelerator
from lab.run_folder import open_run_folder, run_to_resume


def test_no_configuration_and_no_room_for_a_folder(tmp_path):
    message = r"config\.yaml is missing; give the run's folder with --output"
    with pytest.raises(FileNotFoundError, match=message):
        run_to_resume(str(tmp_path), "digits")
    (tmp_path / "file").write_text("")
    message = r"file/run cannot be written \(Not a directory\); give another --output"
    with pytest.raises(OSError, match=message):
        open_run_folder(str(tmp_path / "file" / "run"), "digits", {}, Accelerator(cpu=True))
