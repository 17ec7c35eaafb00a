"""Wrong use of a recipe: a row of words, the exit code (2: refused before any work, 1: the work
failed) and what the message names. Nothing is written, and nothing is left.

What newcomers get wrong with networks is in tests/test_newcomer_mistakes.py.
"""

import shlex
import sys
from dataclasses import asdict

import pytest
import torch
from evaluation.recipe_run import SMALL, shortened, undrawn
from launch import unboxed

from sj_robust.models import NetworkSpec, build_classifier
from sj_robust.training import save_checkpoint

RHO = "sweep --grid '{rho: [1, 2]}' "
OWN = "evaluate --T 2 --eps 0.1 --network "
ROWS = [
    ("adv_train --learning-rate 0.1", 2, "--learning-rate"),
    ("adv_train --epochs three", 2, "--epochs"),
    ("adv_train --epochs 0", 2, "--epochs"),
    ("adv_train --config mine.yaml", 2, "mine.yaml must"),
    ("adv_train --dataset cifar", 2, "--dataset"),
    ("adv_train --dataset fashion_mnist --data-root pictures", 1, "download=True"),
    ("adv_train --dataset image_folder:pictures", 1, "train/CLASS"),
    ("adv_train --eps 8 --no-reference", 2, "eps must"),
    ("adv_train --model resnet18", 2, "network must"),
    ("adv_train --resume", 1, "--output"),
    ("adv_train --batch-size 5000", 2, "batch_size"),
    ("adv_train --accumulate 3", 2, "batch_size"),
    ("adv_train --layers nowhere", 2, "nowhere"),
    ("adv_train --channels", 2, "convolution"),
    ("adv_train --mode certified --certified-eps -1", 2, "certified-eps"),
    ("adv_train --mode certified --compile", 2, "compile"),
    ("adv_train --mode trades --noise-std 0", 2, "noise_std"),
    ("adv_train --neuron lif --mode at --gain-penalty=-1", 2, ">= 0"),
    ("adv_train --pretrained nowhere.pt", 1, "nowhere.pt"),
    ("adv_train --augment-options '{cutout: 0}'", 2, "augment_options"),
    ("adv_train --augment-options '{rotate: 10}'", 2, "rotation"),
    ("adv_train --augment-options '{1: 2}'", 2, "augment_options"),
    ("adv_train --augment-options '{rotation: 400}'", 2, "rotation"),
    ("adv_train --augment-options '{flip: maybe}'", 2, "flip"),
    ("evaluate", 2, "--network"),
    (OWN + "mynet.py:build", 1, "does not exist"),
    (OWN + "torch.nn:Flatten --eps 8", 2, "eps must"),
    ("evaluate --eps 0.1 --network spikingjelly.activation_based.neuron:LIFNode", 2, "T must"),
    ("sweep", 2, "--sweep"),
    ("sweep --jobs 0", 2, "--jobs"),
    ("evaluate --compare a b", 1, "a does not exist"),
    ("evaluate --suite slow", 2, "slow"),
    ("evaluate digits/dlif-certifed", 1, "'digits/dlif-certified'"),
    ("evaluate digits/lif --surrogate-model nowhere.pt", 1, "nowhere.pt"),
    ("evaluate digits/lif --T 0", 2, "T"),
    ("figures", 2, "run"),
    ("figures --which neuron", 2, "--output"),
    ("figures --which neurons", 2, "neurons"),
    ("figures nowhere", 1, "nowhere"),
    ("figures --redraw nowhere", 1, "nowhere"),
    ("figures . --which gains", 1, "best.pt"),
    ("figures .", 1, "best.pt"),
    ("figures --redraw .", 1, "numbers"),
    ("benchmark --methods Brian", 2, "Brian"),
    ("benchmark --shapes [[0,0,0]]", 2, "shape"),
    ("benchmark --redraw nowhere", 1, "nowhere"),
    ("benchmark --instruction-set avx1024", 2, "instruction-set"),
    ("sweep --base nowhere", 2, "nowhere"),
    ("sweep --report --output nowhere", 2, "nowhere/sweep.yaml"),
    ("sweep --seeds 2", 2, "grid"),
    ("sweep --grid '{roh: [1]}'", 2, "--roh"),
    ("sweep --grid '{mode: [at, an]}'", 2, "--mode"),
    ("sweep --grid '{rho: [much]}'", 2, "--rho"),
    ("sweep --grid '{rho: 1}'", 2, "rho"),
    ("sweep --grid '{rho: []}'", 2, "rho"),
    ("sweep --grid '{\"norm,rho\": [[l1, 3], [l2]]}'", 2, "norm,rho"),
    ("sweep --grid '{\"norm,rho\": [[l1, 3]], rho: [1]}'", 2, "rho"),
    ("sweep --grid '{seed: [1]}'", 2, "seed"),
    (f"sweep --grid '{{dataset: [image_folder:{300 * 'n'}]}}'", 2, "a run"),
    ("sweep --cells '{a: {mode: at}}'", 2, "mode"),
    ("sweep --cells '{a: {search: {rho: [1]}}}'", 2, "search"),
    ("sweep --cells '{a: {options: {rho: 1}}, b: {options: {rho: 1.0}}}'", 2, "cells a and b"),
    ("sweep --cells '{a: {search: {seed: [1, 2]}}}'", 2, "seed"),
    # a search among values of the same run: by its values, by null, or without effect
    ("sweep --cells '{a: {search: {rho: [1, 1.0, 2]}}}'", 2, "cell a"),
    ("sweep --cells '{a: {search: {rho: [null, 1]}}}'", 2, "cell a"),
    ("sweep --cells '{a: {options: {rho: 0}, search: {norm: [l1, l2]}}}'", 2, "cell a"),
    (
        "sweep --cells '{a-at: {options: {epochs: 2}}, a: {search: {mode: [at, rat]}}}'",
        2,
        "a-at",
    ),
    ("sweep --cells '{a: [1]}'", 2, "cell a"),
    ("sweep --cells '{a: {search: [1, 2]}}'", 2, "search of cell a"),
    ("sweep --cells '{a: {options: [mode]}}'", 2, "options of cell a"),
    ("sweep --cells '{a: {config: [mode]}}'", 2, "mode"),
    ("sweep --cells '{1: {options: {mode: at}}}'", 2, "cell"),
    (RHO + "--cells '{a: {options: {rho: 3}}}'", 2, "rho"),
    (RHO + "--cells '{a: {search: {rho: [2, 3]}}}'", 2, "rho"),
    # before anything is searched
    ("sweep --cells '{a: {search: {rho: [0, 1]}}}' --grid '{mode: [an]}'", 2, "--mode"),
    (RHO + "--options '{output: x}'", 2, "output"),
    (RHO + "--options '{epochs: 1.5}'", 2, "--epochs"),
    (RHO + "--options '{1: 2}'", 2, "--1"),
    (RHO + "--evaluate slow", 2, "slow"),
    (RHO + "--evaluations '{f: {suite: fast, epss: 1}}'", 2, "epss"),
    (RHO + "--evaluations '{f: fast}'", 2, "evaluation f"),
    (RHO + "--evaluations '{f: {suite: stress}}'", 2, "suite stress"),
    (RHO + "--evaluations '{f: {suite: corruptions}}'", 2, "suite corruptions"),
    (RHO + "--evaluations '{f: {suite: fast, smooth: 0.25}}'", 2, "smooth"),
    (RHO + "--evaluate fast --evaluation-options '{name: x}'", 2, "name"),
    (RHO + "--contrast roh", 2, "roh"),
    (RHO + "--contrast mode", 2, "mode"),
    (RHO + "--plot roh", 2, "roh"),
    (RHO + "--cluster slurm", 2, "cluster slurm"),
    (RHO + "--cluster-options '{slurm_qeue: gpu}'", 2, "slurm_qeue"),
]
SEEDS = ("0", "[]", "[1, 1]", "[-1]", "[a]", "[0.5]")
ROWS += [(f"{RHO} --seeds '{seeds}'", 2, "seeds") for seeds in SEEDS]
NAMES = ("training", "run.json", "fast.yaml", "a/b", "..", '""', "4", "-a", "ä")
OWNED = ("checkpoint", "data_root", "device", "name", "output")
WEAK = RHO + "--evaluations"
ROWS += [(f"{WEAK} '{{{name}: {{suite: fast}}}}'", 2, "name of an evaluation") for name in NAMES]
ROWS += [(f"{WEAK} '{{weak: {{{option}: x}}}}'", 2, option) for option in OWNED]
ON_NETWORKS = [
    ("adv_train --config mine.yaml", 2, "--learning-rate"),
    ("adv_train --output own", 1, "--output"),
    ("adv_train --output mine.yaml", 2, "--output"),
    ("evaluate own/net/best.pt", 2, "cannot be read"),
    ("evaluate theirs.pt", 2, "format mark"),
    ("evaluate unlike.pt", 2, "size mismatch"),
    ("evaluate runs/one --network own_net:build", 2, "checkpoint"),
    ("evaluate nowhere.pt", 1, "runs/one/lif_none/best.pt"),
    ("evaluate runs", 1, "runs/one/lif_none/best.pt"),
    ("evaluate runs/two", 2, "runs/two/a/best.pt, runs/two/b"),
    ("evaluate runs/one --mean 0.5", 2, "mean"),
    ("evaluate runs/one --norm L0", 2, "eps"),
    ("evaluate runs/one --norm L0 --eps 20", 2, "suite 'standard'"),
    ("evaluate runs/one --suite events", 2, "suite 'events'"),
    ("evaluate runs/one --dataset n_mnist --eps 5", 1, "Train.zip"),
    ("evaluate runs/one --dataset mnits", 2, "dataset"),
    ("evaluate runs/one --dataset image_folder:x", 1, "x/train"),
    ("evaluate runs/one --dataset fashion_mnist", 1, "Fashion-MNIST"),
    ("evaluate runs/one --eps 0", 2, "eps"),
    ("evaluate runs/one --eps 8/x", 2, "eps"),
    ("evaluate runs/one --eps 0,0.1", 2, "eps"),
    ("evaluate runs/one --eps 0.1,", 2, "eps"),
    ("evaluate runs/one --eps 0.1,0.2 --suite stress", 2, "eps"),
    ("evaluate runs/one --norm L2", 2, "--eps"),
    ("evaluate runs/one --norm L2 --eps 1 --suite paper", 2, "Linf"),
    ("evaluate runs/one --smooth 0", 2, "--smooth"),
    ("evaluate runs/one --smooth 0.1 --suite fast", 2, "--suite"),
    ("evaluate runs/one --resume", 1, "resume"),
    ("evaluate runs/one --surrogate-model nowhere", 1, "nowhere"),
    ("evaluate runs/one --surrogate-model wide.pt", 2, "(1, 9, 9)"),
    ("evaluate runs/one runs/two/a", 2, "runs/two/a"),
    ("evaluate runs/one --draws 0", 2, "--draws"),
    ("evaluate runs/one --output own_net.py", 2, "output"),
    ("evaluate runs/one --output own_net.py/x", 2, "output"),
    ("evaluate --network own_net:build --T 3", 2, "eps"),
    ("evaluate --network own_net:wrapped --T 4 --eps 0.1", 2, "T"),
    (OWN + "no_net:build", 1, "no_net"),
    (OWN + "own_net", 2, "module:function"),
    (OWN + "own_net:missing", 2, "'missing'"),
    (OWN + "own_net:nothing", 2, "nn.Module"),
    (OWN + "own_net:wrong_shape", 2, "images"),
    (OWN + "own_net:five", 2, "5 classes"),
    (OWN + "own_net:needs_a_path", 2, "'path'"),
    (OWN + "own_net:fails", 2, "own_net.py:"),
    (OWN + "broken:build", 2, "broken.py:1"),
    (OWN + "unfinished.py:f", 2, "unfinished.py"),
    (OWN + "own_net:half", 2, "float16"),
    (OWN + "own_net:diverged", 2, "logits"),
    (OWN + "own_net:Blind", 2, "gradient"),
    ("figures plain --which curves", 1, "training history"),
    ("figures plain --which gains", 1, "DLIF"),
    ("figures plain --which intensity --eps 0.2", 1, "two sizes"),
    ("figures plain --which intensity --eps 0.1 0", 2, "eps"),
    ("figures plain --which intensity --eps 0.1 8", 2, "eps"),
    ("figures own --which gains", 1, "checkpoint"),
]


def check(ended, folder, words, code, named):
    """The recipe ends with the code, says the name, and leaves every folder as it was."""
    name, *arguments = shlex.split(words)
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in str(path))
    with undrawn(), shortened():
        found, _, err = ended(name, *arguments)
    assert found == code, err
    assert named in unboxed(err), err
    assert "Traceback" not in err
    assert sorted(p for p in folder.rglob("*") if "__pycache__" not in str(p)) == before


@pytest.mark.parametrize(("words", "code", "named"), ROWS)
def test_wrong_use(ended, tmp_path, words, code, named):
    check(ended, tmp_path, words, code, named)


@pytest.fixture(scope="module")
def networks(folder):
    """The working folder, with networks that do not fit."""
    specs = {
        "wide": NetworkSpec(image_shape=(1, 9, 9)),
        "plain/lif/best": NetworkSpec(neuron="lif"),
        "unlike": NetworkSpec(channels=(4, 4)),
    }
    (folder / "mine.yaml").write_text("learning_rate: 0.1\n")
    torch.save({"state_dict": {}}, folder / "theirs.pt")
    for name, spec in specs.items():
        path = folder / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        description = {"network": asdict(spec), "options": {"dataset": "digits"}}
        built = NetworkSpec() if name == "unlike" else spec
        model = build_classifier(built).state_dict()
        save_checkpoint(path, {"description": description, "model": model})
    (folder / "own" / "net").mkdir(parents=True)
    (folder / "own" / "net" / "best.pt").write_bytes(b"nothing")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code", "named"), ON_NETWORKS)
def test_wrong_use_of_networks(ended, networks, monkeypatch, words, code, named):
    monkeypatch.chdir(networks)
    few = shlex.join(SMALL) if words.startswith("evaluate") else ""
    check(ended, networks, f"{words} {few}", code, named)


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("evaluate digits/lif --suite corruptions", "imagecorruptions"),
        ("adv_train --trackers wandb", "wandb"),
    ],
)
def test_a_package_that_is_missing(ended, tmp_path, monkeypatch, words, package):
    monkeypatch.setitem(sys.modules, package, None)
    check(ended, tmp_path, words, 1, package)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_a_gpu_that_is_missing(ended, tmp_path):
    check(ended, tmp_path, "benchmark --device cuda", 1, "GPU")
