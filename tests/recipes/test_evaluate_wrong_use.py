"""Wrong inputs of the recipe evaluate are named before anything is written."""

import re

import pytest
from evaluation.recipe_run import SMALL, finish, in_process, start

from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ((), ValueError, "give a checkpoint, or your own network"),
        (("runs/one", "--network", "own_net:build"), ValueError, "give a checkpoint, or your own"),
        (("nowhere.pt",), FileNotFoundError, r"nowhere.pt does not exist; in \. there are .*runs/one/lif_none/best.pt"),
        (("runs",), FileNotFoundError, "no best.pt in runs; there are runs/one/lif_none/best.pt"),
        (("runs/two",), ValueError, "runs/two holds 2 networks, give one of them: runs/two/a/best.pt, runs/two/b"),
        (("own_net.py",), ValueError, "cannot be read as a checkpoint"),
        (("other.pt",), ValueError, "other.pt holds no network that this release can build"),
        (("runs/one", "--T", "0"), ValueError, "--T must be an integer > 0, got 0"),
        (("runs/one", "--mean", "[0.5]"), ValueError, "a checkpoint knows its own mean and std"),
        (("runs/one", "--norm", "L0"), ValueError, "eps is the number of changed elements .* such as --eps 20"),
        (("runs/one", "--norm", "L0", "--eps", "20"), ValueError, "suite 'standard' does not fit a threat in L0"),
        (("runs/one", "--suite", "events"), ValueError, "suite 'events' does not fit a threat in Linf"),
        (("runs/one", "--dataset", "n_mnist", "--eps", "5"), FileNotFoundError, "Train.zip, Test.zip not found"),
        (("runs/one", "--dataset", "mnits"), ValueError, "dataset must be one of digits, .*, got 'mnits'"),
        (("runs/one", "--dataset", "image_folder:x"), FileNotFoundError, "x/train does not exist; an image folder"),
        (("runs/one", "--eps", "8"), ValueError, "eps must be <= 1.*write 8/255 instead of 8"),
        (("runs/one", "--eps", "0"), ValueError, "eps must be > 0"),
        (("runs/one", "--eps", "8/x"), ValueError, "number or a fraction"),
        (("runs/one", "--norm", "L2"), ValueError, "give that of L2, such as --eps 0.5"),
        (("runs/one", "--norm", "L2", "--eps", "1", "--suite", "paper"), ValueError, "defined for Linf"),
        (("runs/one", "--resume"), FileNotFoundError, "no run to resume"),
        (("runs/one", "--transfer", "nowhere"), FileNotFoundError, "nowhere does not exist"),
        (("runs/one", "--dataset", "fashion_mnist"), FileNotFoundError, "Fashion-MNIST is not complete"),
        (("--network", "own_net:build", "--T", "3"), ValueError, "eps is not known"),
        (("--network", "own_net:build", "--eps", "0.1"), ValueError, "give its time steps with --T"),
        (("--network", "own_net:wrapped", "--T", "3", "--eps", "0.1"), ValueError, "has its own T"),
        (("--network", "own_net"), ValueError, "network must be module:function"),
        (("--network", "no_net:build"), ModuleNotFoundError, "no module 'no_net' in"),
        (("--network", "no_net.py:build"), FileNotFoundError, "no_net.py does not exist"),
        (("--network", "own_net:missing"), ValueError, "has no function 'missing'"),
        (("--network", "own_net:nothing"), ValueError, r"must return a network \(nn.Module\), got int"),
        (("--network", "own_net:wrong_shape", "--T", "2", "--eps", "0.1"), ValueError, "does not take images"),
        (("--network", "own_net:five", "--T", "2", "--eps", "0.1"), ValueError, "tells 5 classes apart, digits has 10"),
        (
            ("--network", "own_net:needs_a_path", "--T", "2"),
            ValueError,
            r"failed \(TypeError: .*'path'\); it must return",
        ),
        (
            ("--network", "own_net:fails", "--T", "2"),
            ValueError,
            r"failed \(KeyError: .*layer 1', own_net.py:\d+\); it",
        ),
        (
            ("--network", "broken:build", "--T", "2"),
            ValueError,
            r"broken cannot be imported \(ImportError: .*broken.py:1\)",
        ),
        (
            ("--network", "unfinished.py:f"),
            ValueError,
            r"unfinished.py cannot be imported \(SyntaxError: .* line 1\)\);",
        ),
        (
            ("--network", "own_net:half", "--T", "2", "--eps", "0.1"),
            ValueError,
            r"weights torch.float16: return network.fl",
        ),
        (("--network", "own_net:diverged", "--T", "2", "--eps", "0.1"), ValueError, "NaN or infinite logits"),
        (
            ("--network", "own_net:Blind", "--T", "2", "--eps", "0.1"),
            ValueError,
            "no gradient reaches the images of Blind",
        ),
        (("runs/one", "runs/two/a"), ValueError, "one checkpoint at a time, got another one, runs/two/a"),
        (("runs/one", "--seed", "-1"), ValueError, "--seed must be an integer >= 0, got -1"),
        (("runs/one", "--draws", "0"), ValueError, "--draws must be an integer > 0, got 0"),
        (("runs/one", "--transfer", "wide.pt"), ValueError, r"wide takes images \(1, 9, 9\), those of digits are"),
        (
            ("runs/one", "--output", "own_net.py"),
            OSError,
            r"own_net.py cannot be written \(File exists\); give another",
        ),
        (("runs/one", "--output", "own_net.py/x"), OSError, r"cannot be written \(Not a directory\); give another"),
    ],
)
def test_wrong_inputs(folder, monkeypatch, options, error, message):
    save_checkpoint(folder / "other.pt", {"epoch": 1})
    wide = load_checkpoint(folder / "runs" / "one" / "lif_none" / "best.pt")
    wide["description"]["network"]["image_shape"] = [1, 9, 9]
    wide["model"] = build_network_state(wide["description"]["network"])
    save_checkpoint(folder / "wide.pt", {name: wide[name] for name in ("description", "model")})
    runs = sorted(path.name for path in (folder / "runs").iterdir() if not path.name.startswith("evaluate"))
    with pytest.raises(error, match=message):
        in_process(monkeypatch, folder, *options, *SMALL)
    assert sorted(path.name for path in (folder / "runs").iterdir() if not path.name.startswith("evaluate")) == runs


def test_errors_are_one_line(folder):
    _, err = finish(start(folder, "nowhere.pt"), code=1)
    assert re.fullmatch(r"error: nowhere.pt does not exist; .*\n", err)
    _, err = finish(start(folder, "runs/one", "--suite", "slow"), code=2)
    assert "slow" in err
    assert "Traceback" not in err


def build_network_state(options):
    return build_classifier(NetworkSpec(**options)).state_dict()
