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


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (text, "cannot be read as a checkpoint"),
        (cut_off, "cannot be read as a checkpoint"),
        (trap, "cannot be read as a checkpoint"),
        (pickled, "checkpoint"),
        (something_else, "not a checkpoint of sj_robust"),
        (later_version, "checkpoint version 2, this release reads 1"),
    ],
)
def test_unreadable_and_foreign_files(tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    write(path)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)
    assert not (tmp_path / "trap").exists()
    with pytest.raises(FileNotFoundError, match="without --resume"):
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
    torch.save(OURS | {"version": 1, "epoch": 1}, path)  # as before there were digests
    assert load_checkpoint(path)["epoch"] == 1


def test_runs_of_before_an_option_go_on_with_what_it_meant_then():
    before = {"network": {"T": 3}, "options": {"lr": 0.1, "flips": 2}}
    now = {"network": {"T": 3}, "options": {"lr": 0.1, "flips": 2, "counts": False}}
    check_same_run(before, now)
    check_same_run(now, now)
    now["options"]["counts"] = True
    with pytest.raises(ValueError, match=r"\(options.counts: False there, True now\); resume with"):
        check_same_run(before, now)
    now["options"] |= {"counts": False, "newer": 3}
    with pytest.raises(ValueError, match=r"a release without options.newer, resume it with that "):
        check_same_run(before, now)
    now["options"].pop("newer")
    check_same_run(before, now | {"options": now["options"] | {"augment_options": {}}})
    augmented = now | {"options": now["options"] | {"augment_options": {"rotation": 10}}}
    with pytest.raises(ValueError, match=r"\(options.augment_options.rotation: None there, 10 now"):
        check_same_run(before, augmented)
    now["options"]["lr"] = 0.2
    with pytest.raises(
        ValueError, match=r"\(options.lr: 0.1 there, 0.2 now\); resume with the same"
    ):
        check_same_run(before, now)


def test_what_earlier_releases_do_not_tell_is_named_and_not_refused():
    before = {"options": {"lr": 0.1}}
    now = {"options": {"lr": 0.1}, "images and labels": "1f", "code on 3.12": "2e"}
    assert check_same_run(before, now) == ("images and labels", "code on 3.12")
    assert check_same_run(now, now) == ()
    other_python = before | {"images and labels": "1f", "code on 3.13": "3d"}
    assert check_same_run(other_python, now) == ("code on 3.12",)
    with pytest.raises(ValueError, match=r"images and labels: '0a' there, '1f' now"):
        check_same_run(now | {"images and labels": "0a"}, now)
    with pytest.raises(ValueError, match=r"code on 3.12: '0a' there, '2e' now"):
        check_same_run(now | {"code on 3.12": "0a"}, now)
