"""The model card is one that the Hub reads, and what is pushed arrives at a stand-in of it."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from evaluation.reports import report, stress_report
from huggingface_hub import ModelCard
from torch import nn

from sj_robust.evaluation import Report
from sj_robust.evaluation.report import export

PROVED = report(verified=(4, 7))
NETWORK = nn.Linear(2, 3)


class Hub(BaseHTTPRequestHandler):
    """What a client asks for when it makes a model and commits files to it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.server.made = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/someone/net", "name": "net"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/someone/net/preupload/main":
            found = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **regular} for name in found]})
        elif path == "/api/models/someone/net/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            # older clients know this address alone
            commit = "https://huggingface.co/someone/net/commit/abc"
            self.answer({"success": True, "commitOid": "abc", "commitUrl": commit})
        else:
            self.answer({"error": path}, 404)

    def do_GET(self):
        self.answer({"id": "someone/net", "sha": "abc", "siblings": [], "private": False})

    def answer(self, content, code=200):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    stand_in = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    stand_in.asked, stand_in.files, stand_in.made = [], {}, {}
    thread = threading.Thread(target=stand_in.serve_forever)
    thread.start()
    yield stand_in
    stand_in.shutdown()
    thread.join()
    stand_in.server_close()


@pytest.mark.parametrize("kind", ["network", "file", "report alone"])
def test_card_report_and_network_arrive(kind, server, tmp_path):
    file = tmp_path / "best.pt"
    file.write_bytes(b"weights")
    network = {"network": NETWORK, "file": file, "report alone": None}[kind]
    endpoint = f"http://127.0.0.1:{server.server_port}"
    options = {"token": "hf_secret", "private": True, "endpoint": endpoint}
    address = PROVED.push_to_hub("someone/net", network, **options)
    assert address == f"{endpoint}/someone/net"
    assert server.made["name"] == "net"
    assert {token for _, token in server.asked} == {"Bearer hf_secret"}
    files = server.files
    assert Report.from_json(files.pop("report.json").decode()) == PROVED
    card = files.pop("README.md").decode()
    assert ("load_state_dict" in card) == (kind == "network")
    if kind == "network":
        state = torch.load(io.BytesIO(files.pop("model.pt")), weights_only=True)
        assert torch.equal(state["weight"], NETWORK.weight)
    elif kind == "file":
        assert files.pop("best.pt") == b"weights"
    assert files == {}
    assert b"hf_secret" not in card.encode()


def test_the_hub_reads_the_figures_of_a_card():
    card = ModelCard(PROVED.model_card())
    assert card.data.library_name == "sj_robust"
    assert "adversarial-robustness" in card.data.tags
    assert card.data.model_name == PROVED.name
    stated = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert stated == {
        "clean accuracy, %": 80.0,
        "robust accuracy, %, Linf 0.1, suite fast": 30.0,
        "verified accuracy, %, Linf 0.1": 20.0,
    }
    assert PROVED.verdict in card.text
    assert PROVED.table() in card.text
    stressed = stress_report()
    levels = ModelCard(stressed.model_card()).data.eval_results
    assert {one.metric_name.partition(" ")[0] for one in levels} == {
        "none",
        "lost_spikes:0.1",
        "lost_spikes:0.2",
        "weight_bits:4",
    }


def test_a_doubtful_network_is_called_so_on_its_card():
    dead = report(right=(0,), members=())
    assert dead.alarms
    for text in dead.alarms:
        assert f"**{text}**" in dead.model_card()


def test_wrong_use_and_a_missing_package_are_told(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="network must be a network or the path of a file, got int"):
        PROVED.push_to_hub("someone/net", 3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PROVED.push_to_hub("someone/net", tmp_path / "nowhere.pt")
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(ConnectionError, match="nowhere.invalid cannot be reached"):
        PROVED.push_to_hub("someone/net", endpoint="http://nowhere.invalid")
    with pytest.raises(Exception, match="htt?p:/") as caught:  # the client's own
        PROVED.push_to_hub("someone/net", endpoint="htp:/nowhere")
    assert not isinstance(caught.value, ConnectionError)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for use in (PROVED.model_card, lambda: PROVED.push_to_hub("someone/net")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'sj_robust\[hub\]'"):
            use()
