"""Wrong inputs of the recipe evaluate are named before anything is written."""

import re
from dataclasses import asdict

import pytest
from evaluation.recipe_run import SMALL, in_process
from launch import unboxed

from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import save_checkpoint

pytestmark = pytest.mark.slow


NETWORKS = {
    "own_net": "network must be module:function",
    "own_net:missing": "has no function 'missing'",
    "own_net:nothing": r"must return a network \(nn.Module\), got int",
    "own_net:wrong_shape": "does not take images",
    "own_net:five": "distinguishes 5 classes, digits has 10",
    "own_net:needs_a_path": r"failed \(TypeError: .*'path'\); it must return",
    "own_net:fails": r"failed \(KeyError: .*layer 1', own_net.py:\d+\); it",
    "broken:build": r"broken cannot be imported \(ImportError: .*broken.py:1\)",
    "unfinished.py:f": r"unfinished.py cannot be imported \(SyntaxError: .* line 1\)\);",
    "own_net:half": r"weights torch.float16: return network.fl",
    "own_net:diverged": "NaN or infinite logits",
    "own_net:Blind": "no gradient reaches the images of 'Blind'",
}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("runs/one --network own_net:build", ValueError, "give a checkpoint, or your own"),
        (
            "nowhere.pt",
            FileNotFoundError,
            r"nowhere.pt does not exist; in \. there are .*runs/one/lif_none/best.pt",
        ),
        ("runs", FileNotFoundError, "no best.pt in runs; there are runs/one/lif_none/best.pt"),
        (
            "runs/two",
            ValueError,
            "runs/two holds 2 networks, give one of them: runs/two/a/best.pt, runs/two/b",
        ),
        ("runs/one --mean 0.5", ValueError, "a checkpoint contains its mean and std"),
        (
            "runs/one --norm L0",
            ValueError,
            "eps is the number of changed or moved events .* as in --eps 20",
        ),
        (
            "runs/one --norm L0 --eps 20",
            ValueError,
            "suite 'standard' does not fit a threat in L0",
        ),
        (
            "runs/one --suite events",
            ValueError,
            "suite 'events' does not fit a threat in Linf",
        ),
        (
            "runs/one --dataset n_mnist --eps 5",
            FileNotFoundError,
            "Train.zip",
        ),
        (
            "runs/one --dataset mnits",
            SystemExit,
            "dataset must be one of digits, .*, got 'mnits'",
        ),
        (
            "runs/one --dataset image_folder:x",
            FileNotFoundError,
            "x/train",
        ),
        ("runs/one --eps 0", ValueError, "eps must be > 0"),
        ("runs/one --eps 0,0.1", ValueError, "eps must be > 0"),
        ("runs/one --eps 0.1,0.2 --suite stress", ValueError, "eps must be one radius"),
        ("runs/one --eps 0.1,", SystemExit, "number or a fraction"),
        ("runs/one --eps 8/x", SystemExit, "number or a fraction"),
        ("runs/one --norm L2", ValueError, "give that of L2, such as --eps 0.5"),
        (
            "runs/one --norm L2 --eps 1 --suite paper",
            ValueError,
            "defined for Linf",
        ),
        ("runs/one --smooth 0", ValueError, "--smooth needs SIGMA > 0"),
        (
            "runs/one --smooth 0.1 --suite fast",
            ValueError,
            "omit --eps, --norm, --suite, --transfer",
        ),
        ("runs/one --resume", FileNotFoundError, "no run to resume"),
        ("runs/one --transfer nowhere", FileNotFoundError, "nowhere does not exist"),
        (
            "runs/one --dataset fashion_mnist",
            FileNotFoundError,
            "Fashion-MNIST is not complete",
        ),
        ("--network own_net:build --T 3", ValueError, "eps is not known"),
        (
            "--network own_net:wrapped --T 4 --eps 0.1",
            ValueError,
            "must be the classifier.s 3",
        ),
        ("--network no_net:build", ModuleNotFoundError, "no module 'no_net' in"),
        *(
            (f"--network {one} --T 2 --eps 0.1", ValueError, message)
            for one, message in NETWORKS.items()
        ),
        (
            "runs/one runs/two/a",
            SystemExit,
            "Unrecognized options: runs/two/a",
        ),
        ("runs/one --draws 0", SystemExit, "--draws: no type .* must be an integer >= 1, got 0"),
        (
            "runs/one --transfer wide.pt",
            ValueError,
            r"wide takes images \(1, 9, 9\), those of digits are",
        ),
        (
            "runs/one --output own_net.py",
            SystemExit,
            r"output must be a folder, but own_net.py is a file; give another",
        ),
        (
            "runs/one --output own_net.py/x",
            SystemExit,
            r"output must be a folder, got own_net.py/x, but own_net.py is a file; give another",
        ),
    ],
)
def test_wrong_inputs(folder, options, error, message, capsys):
    wide = NetworkSpec(image_shape=(1, 9, 9))
    content = {
        "description": {"network": asdict(wide)},
        "model": build_classifier(wide).state_dict(),
    }
    save_checkpoint(folder / "wide.pt", content)
    before = list((folder / "runs").iterdir())
    with pytest.raises(error) as refused:
        in_process(folder, *options.split(), *SMALL)
    told = unboxed(capsys.readouterr().err) if error is SystemExit else str(refused.value)
    assert re.search(message, told), told
    assert list((folder / "runs").iterdir()) == before
