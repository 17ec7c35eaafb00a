import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from sj_robust.models import checkpoint
from sj_robust.models.checkpoint import check_same_run, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path):
    content = {
        "model": {"w": torch.rand(3)},
        "epoch": 2,
        "options": {"channels": (16, 32), "eps": None},
    }
    save_checkpoint(tmp_path / "last.pt", content)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(loaded["model"]["w"], content["model"]["w"])
    assert loaded["options"] == content["options"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


FULL = OSError("no space left on device")
FULL_SAYS_TORCH = RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("error", [FULL, FULL_SAYS_TORCH])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail(content, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match=r"no space left|could not be written .* is intact"):
        save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_an_unfinished_file_goes_only_if_its_process_is_gone(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    numbers = (ended.pid, os.getppid())
    gone, living = (tmp_path / f".last.pt.{number}.tmp" for number in numbers)
    gone.touch()
    living.touch()
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", living.name}


class Trap:
    def __reduce__(self):
        return (open, ("trap", "w"))


OURS = {"format": "sj_robust.checkpoint"}


def text(path):
    path.write_text("hello")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def trap(path):
    torch.save(OURS | {"version": 1, "trap": Trap()}, path)


def pickled(path):
    path.write_bytes(pickle.dumps(OURS))


def something_else(path):
    torch.save({"w": torch.rand(3)}, path)


def later_version(path):
    torch.save(OURS | {"version": 2}, path)


@pytest.mark.parametrize("write", [text, cut_off, trap, pickled, something_else, later_version])
def test_unreadable_and_foreign_files_are_refused(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    write(path)
    with pytest.raises(ValueError, match="last.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "trap").exists()
    with pytest.raises(FileNotFoundError, match="first.pt"):
        load_checkpoint(tmp_path / "first.pt")


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "last.pt"
    model = {"w": torch.rand(40), "b": torch.rand(3).bfloat16()}
    history = [(1, 0.5, None)]
    save_checkpoint(path, {"model": model, "history": history})
    whole = path.read_bytes()
    positions = range(0, len(whole), 29)
    refused = 0
    for position in positions:
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except ValueError:
            refused += 1
            continue
        assert_close(loaded["model"], model, rtol=0, atol=0)
        assert loaded["history"] == history
    assert refused > len(positions) / 3


BEFORE = {"network": {"T": 3}, "options": {"lr": 0.1}}


def with_options(**options):
    return BEFORE | {"options": BEFORE["options"] | options}


CODE = {"images and labels": "1f", "code on 3.12": "2e"}
SAME_RUNS = [
    (BEFORE, BEFORE, ()),
    (with_options(lr=0.1), with_options(augment_options={}), ()),
    (BEFORE, BEFORE | CODE, ("images and labels", "code on 3.12")),
    (BEFORE | CODE, BEFORE | CODE, ()),
    (BEFORE | {"code on 3.13": "3d", "images and labels": "1f"}, BEFORE | CODE, ("code on 3.12",)),
]
OTHER_RUNS = [
    (BEFORE, with_options(newer=3), "options.newer"),
    (BEFORE, with_options(augment_options={"rotation": 10}), "options.augment_options.rotation"),
    (BEFORE, with_options(lr=0.2), "options.lr"),
    (BEFORE | CODE, BEFORE | CODE | {"images and labels": "0a"}, "images and labels"),
    (BEFORE | CODE, BEFORE | CODE | {"code on 3.12": "0a"}, "code on 3.12"),
]


@pytest.mark.parametrize(("saved", "wanted", "unrecorded"), SAME_RUNS)
def test_a_run_goes_on_with_what_its_options_meant(saved, wanted, unrecorded):
    assert check_same_run(saved, wanted) == unrecorded


@pytest.mark.parametrize(("saved", "wanted", "named"), OTHER_RUNS)
def test_a_run_with_other_options_is_refused(saved, wanted, named):
    with pytest.raises(ValueError, match=named):
        check_same_run(saved, wanted)
