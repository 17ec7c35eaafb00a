"""Networks that are not in the package: fetched whole or in pieces, checked, and kept."""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from subprocess import PIPE, Popen
from threading import Thread
from time import sleep

import pytest
import torch

from sj_robust.models import assets, pretrained, shipped
from sj_robust.models.assets import ADDRESS_VARIABLE, Asset
from sj_robust.models.checkpoint import load_checkpoint
from sj_robust.models.weights import as_named_in

NAME = "digits/far"
INSIDE = shipped.pretrained_file("digits/lif")
WHOLE = INSIDE.read_bytes()
CARDS = json.loads((INSIDE.parents[1] / "cards.json").read_text(encoding="utf-8"))
CARD = CARDS["digits/lif"]
FILE = Asset(NAME, CARD["size"], CARD["sha256"]).file_name
HALF = len(WHOLE) // 2
PIPES = {"stdin": PIPE, "stdout": PIPE, "text": True}


@dataclass
class Release:
    """A server with one file, and what it was asked for.

    ``cuts`` holds the bytes after which it ends one answer after the other; it sends all of an
    answer when there are no more.
    """

    content: bytes = WHOLE
    ranges: bool = True
    status: int | None = None
    moved: bool = False
    pause: float = 0.0
    cuts: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @contextmanager
    def online(self):
        answer = type("OfThis", (Answer,), {"release": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), answer) as server:
            thread = Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/assets/"
            finally:
                server.shutdown()
                thread.join()


class Answer(BaseHTTPRequestHandler):
    release: Release

    def do_GET(self):
        release = self.release
        begun = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if release.moved and not self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/moved{self.path}")
            self.end_headers()
            return
        release.asked.append(begun)
        if release.status or not self.path.endswith(f"/assets/{FILE}"):
            self.send_error(release.status or 404)
            return
        rest = release.content[begun if release.ranges else 0 :]
        self.send_response(206 if release.ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        sleep(release.pause)
        self.wfile.write(rest[: release.cuts.pop(0)] if release.cuts else rest)

    def log_message(self, *words):
        pass


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the cache, with one card of a network that is not in the package."""
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "cards.json").write_text(json.dumps({NAME: CARD}), encoding="utf-8")
    monkeypatch.setattr(shipped, "_FOLDER", trained)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "home" / "hub" / "sj_robust"


COMING = {
    "whole": ({}, [0]),
    "behind a redirection": ({"moved": True}, [0]),
    "cut off twice": ({"cuts": [HALF, 100]}, [0, HALF, HALF + 100]),
    "without ranges": ({"ranges": False}, [0]),
    "cut off without ranges": ({"ranges": False, "cuts": [HALF]}, [0, HALF]),
}


@pytest.mark.parametrize("case", COMING)
def test_a_network_comes_whole_and_is_kept(case, kept, monkeypatch, capfd):
    behaviour, asked = COMING[case]
    release = Release(**behaviour)
    with release.online() as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        network = pretrained(NAME)
    same_as_the_card(network)
    assert release.asked == asked
    assert (kept / FILE).read_bytes() == WHOLE
    assert not list(kept.glob("*.part"))
    same_as_the_card(pretrained(NAME))  # from the cache: the server is gone
    assert capfd.readouterr().err == "", "no bar where there is no terminal"


def same_as_the_card(network):
    assert sha256(WHOLE).hexdigest() == CARD["sha256"]
    weights = as_named_in(network, load_checkpoint(INSIDE)["model"])
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


def test_what_a_lost_connection_leaves_is_continued_by_the_next_call(kept, monkeypatch):
    release = Release(cuts=[HALF, 0])
    with release.online() as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        with pytest.raises(OSError, match="the connection ended early"):
            pretrained(NAME)
        (part,) = kept.glob("*.part")
        assert part.read_bytes() == WHOLE[:HALF]
        same_as_the_card(pretrained(NAME))
    assert release.asked == [0, HALF, HALF]


REFUSED = {
    "not there": ({"status": 404}, "HTTP Error 404"),
    "another file": (
        {"content": WHOLE[:-1]},
        rf"has {len(WHOLE) - 1} bytes instead of {len(WHOLE)}",
    ),
    "nothing comes": ({"cuts": [0]}, "the connection ended early"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_does_not_give_is_said_in_one_line(case, kept, monkeypatch):
    behaviour, reason = REFUSED[case]
    with Release(**behaviour).online() as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        with pytest.raises(OSError, match=reason) as caught:
            pretrained(NAME)
    says_what_to_do(caught, address, kept)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/assets", "nowhere", ""])
def test_without_a_server_the_file_can_be_put_there_by_hand(address, kept, monkeypatch):
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    monkeypatch.setattr(assets, "RELEASE", "")
    with pytest.raises(OSError, match=r"refused|unknown url type") as caught:
        pretrained(NAME)
    says_what_to_do(caught, address, kept)
    (kept / FILE).write_bytes(WHOLE)
    same_as_the_card(pretrained(NAME))


def says_what_to_do(caught, address, kept):
    said = str(caught.value)
    assert f"{NAME} is not in the package and cannot be downloaded from {address}" in said
    assert f"set {ADDRESS_VARIABLE} to the address of another folder" in said
    assert said.endswith(f"put the file there by hand: {kept / FILE}")
    assert "\n" not in said


def test_a_folder_can_be_a_mirror(kept, monkeypatch, tmp_path):
    (tmp_path / FILE).write_bytes(WHOLE)
    monkeypatch.setenv(ADDRESS_VARIABLE, tmp_path.as_uri())
    same_as_the_card(pretrained(NAME))


WRONG = bytes(len(WHOLE))


@pytest.mark.parametrize(("content", "part"), [(WRONG, b""), (WHOLE, WRONG[:HALF])])
def test_a_file_that_is_not_that_of_the_card_is_refused_and_removed(
    content, part, kept, monkeypatch
):
    kept.mkdir(parents=True)
    (kept / FILE).with_suffix(".part").write_bytes(part)
    found = sha256(part + content[len(part) :]).hexdigest()
    message = f"must have the SHA-256 {CARD['sha256']} of the card, got {found}; it was removed"
    with Release(content=content).online() as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        with pytest.raises(ValueError, match=message):
            pretrained(NAME)
    assert [file.suffix for file in kept.iterdir()] == [".lock"]
    with Release().online() as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        same_as_the_card(pretrained(NAME))


def test_a_cache_that_cannot_be_is_named(kept, monkeypatch):
    kept.parents[1].write_text("in the way")
    with pytest.raises(ValueError, match="TORCH_HOME must be a folder, .*but .*home is a file"):
        pretrained(NAME)


FETCH = """
import sys
from pathlib import Path
from sj_robust.models import pretrained, shipped

shipped._FOLDER = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_of_two_processes_one_fetches_and_the_other_waits(kept, monkeypatch):
    release = Release(pause=1.0)
    with release.online() as address:
        monkeypatch.setenv(ADDRESS_VARIABLE, address)
        command = [sys.executable, "-c", FETCH, str(shipped._FOLDER), NAME]
        with Popen(command, **PIPES) as one, Popen(command, **PIPES) as other:
            for process in (one, other):
                assert process.stdout.readline() == "ready\n"
            for process in (one, other):
                process.stdin.write("go\n")
                process.stdin.flush()
            assert one.wait() == other.wait() == 0
    assert release.asked == [0]
    assert (kept / FILE).read_bytes() == WHOLE
