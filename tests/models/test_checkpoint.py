import pickle

import pytest
import torch

from sj_robust.models import checkpoint
from sj_robust.models.checkpoint import load_checkpoint, save_checkpoint


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


@pytest.mark.parametrize(
    "error", [OSError("no space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
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


class Trap:
    def __reduce__(self):
        return (open, ("trap", "w"))


OURS = {"format": "sj_robust.checkpoint"}


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text("hello"), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read as a checkpoint"),
        (
            lambda path: torch.save(OURS | {"version": 1, "trap": Trap()}, path),
            "cannot be read as a checkpoint",
        ),
        (lambda path: path.write_bytes(pickle.dumps(OURS)), "checkpoint"),
        (lambda path: torch.save({"w": torch.rand(3)}, path), "not a checkpoint of sj_robust"),
        (
            lambda path: torch.save(OURS | {"version": 2}, path),
            "checkpoint version 2, this release reads 1",
        ),
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
    content = {
        "model": {"w": torch.rand(40), "b": torch.rand(3).bfloat16()},
        "history": [(1, 0.5, None)],
    }
    save_checkpoint(path, content)
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 29):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            loaded = load_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            assert all(
                torch.equal(loaded["model"][name], value)
                for name, value in content["model"].items()
            ), position
            assert loaded["history"] == content["history"]
    assert refused > len(whole) / 29 / 3
    torch.save(OURS | {"version": 1, "epoch": 1}, path)  # as before there were digests
    assert load_checkpoint(path)["epoch"] == 1
