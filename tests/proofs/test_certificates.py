"""Certificates: what is proved is accepted by a program that knows nothing of this package, what is
false or was changed is not, and what has no certificate is named.
"""

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import check_certificate
import numpy as np
import pytest
import torch
from covering import mostly_slow
from proofs.formulas import formula
from proofs.networks import NEURONS, T, batch, classifier, in_steps, residual, small
from proofs.test_networks import ROWS as LIARS
from proofs.test_structure import ATTACKS, beside_a_weight, least_leads
from spikingjelly.activation_based import layer, neuron
from torch import nn

from sj_robust import SpikingClassifier
from sj_robust.attacks import pgd
from sj_robust.core.threat import ThreatModel
from sj_robust.data import load_images
from sj_robust.models import pretrained
from sj_robust.proofs import verify

SHIPPED = [("digits/dlif-certified", 0.1), ("digits/dlif-at-mppd", 0.008), ("digits/lif-at", 0.004)]


def convolutional(node):
    """All operations of a certificate."""
    parts = layer.Conv2d(2, 4, 3, stride=2, padding=1), layer.BatchNorm2d(4), node()
    second = layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16, 6, bias=False), node()
    return nn.Sequential(*parts, *second, layer.Linear(6, 3))


WEIGHTS = ("header", "images", "labels", "numbers")


def leads(path):
    """What the checker proves of the images of a file."""
    network, _, eps, (images, labels, _) = check_certificate.read(path)
    return check_certificate.proved(network, images, labels, eps)


def forged(path, change, *, name="forged.npz"):
    """A file with something changed in its header and arrays, and sums that fit."""
    with np.load(path) as file:
        arrays = {key: file[key].copy() for key in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    claim = {key: arrays.pop(key) for key in WEIGHTS[1:]}
    header["network"] = check_certificate.digest(header["operations"], arrays)
    header["claim"] = check_certificate.digest([header["network"], header["eps"]], claim)
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    found = path.parent / name
    np.savez(found, header=text, **claim, **arrays)
    return found


def digits(name, eps, count, path):
    """A saved certificate of a shipped network, and the result."""
    test = load_images("digits").test
    x, y = (torch.stack(part) for part in zip(*(test[i] for i in range(count)), strict=True))
    result = verify(pretrained(name).eval(), x, y, eps)
    result.save_certificate(path)
    return result


@pytest.mark.parametrize(("name", "eps"), mostly_slow(SHIPPED, quick=SHIPPED[:1]))
def test_proofs_of_shipped_networks_are_accepted_as_they_are(name, eps, tmp_path):
    path = tmp_path / "proofs.npz"
    result = digits(name, eps, 100, path)
    found = leads(path)
    assert len(found) == sum(result.verified) > 50
    assert (found > 0).all()


def test_the_checker_runs_without_torch_and_without_this_package(tmp_path):
    path = tmp_path / "proofs.npz"
    digits("digits/dlif-certified", 0.1, 10, path)
    script = (
        "import sys; sys.modules['torch'] = sys.modules['sj_robust'] = None; "
        f"sys.path.insert(0, {str(Path(check_certificate.__file__).parent)!r}); "
        "import check_certificate; sys.exit(check_certificate.main(sys.argv[1:]))"
    )
    wrong = forged(path, lambda header, arrays: arrays["labels"].__setitem__(0, 3))
    for arguments, code in (([path], 0), ([wrong], 1), ([path, "--network", "0"], 2)):
        call = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
    assert "expected that network" in done.stdout


ROWS = [
    (name, method, eps) for name in NEURONS for method, eps in (("joint", 0.01), ("ibp", 0.003))
]
ROWS = [row for row in ROWS if row[0] != "DLIF from 0.5"]
FEW = [row for row in ROWS if row[1] == "joint" and row[0] in ("LIF soft", "DLIF")]
SOFT = 0.8
"""Share of proofs that is accepted at least after soft resets, whose spikes are not counted."""


@pytest.mark.parametrize(("node", "method", "eps"), mostly_slow(ROWS, quick=FEW))
def test_proofs_are_accepted_and_no_bound_is_false(node, method, eps, tmp_path):
    """At points of a larger ball, where little is proved, all leads are as the checker says."""
    model = classifier(convolutional, NEURONS[node])
    x, y = batch(model, 24)
    result = verify(model, x, y, eps, method=method)
    path = tmp_path / "proofs.npz"
    result.save_certificate(path)
    found = leads(path)
    assert (found > 0).mean() >= (SOFT if "soft" in node else 1.0)

    def every(header, arrays):
        arrays["images"], arrays["labels"] = x.numpy(), y.numpy()
        arrays["numbers"] = np.arange(len(x))
        header["eps"] = 3 * eps

    found = torch.from_numpy(leads(forged(path, every)))
    z = pgd(model, x, y, eps=3 * eps, step_size=eps / 2, steps=20)
    corners = x + 3 * eps * (2.0 * torch.randint(2, (8, *x.shape)) - 1)
    for point in (x, z, *corners.clamp(0, 1)):
        logits = model(point).detach().double()
        right = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        lead = right - logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
        assert (lead >= found).all()


def without_a_label(header, arrays):
    arrays["labels"] = (arrays["labels"] + 1) % 10


def in_a_large_ball(header, arrays):
    header["eps"] = 0.5


def without_weights(header, arrays):
    for name in set(arrays) - set(WEIGHTS):
        arrays[name] = 0 * arrays[name]


def of_another_image(header, arrays):
    arrays["images"] = 1 - arrays["images"]


def with_another_threshold(header, arrays):
    neurons = [one for one in header["operations"] if one["op"] == "neuron"]
    neurons[0]["threshold"] = 100.0


@pytest.mark.parametrize(
    "change",
    [
        without_a_label,
        in_a_large_ball,
        without_weights,
        of_another_image,
        with_another_threshold,
    ],
)
def test_false_claims_are_refused_though_all_sums_fit(change, tmp_path):
    path = tmp_path / "proofs.npz"
    digits("digits/dlif-certified", 0.1, 20, path)
    assert (leads(forged(path, change)) <= 0).mean() > 0.8


def flipped(array, generator):
    """An array with one bit of one element flipped."""
    found = np.array(array)
    raw = found.reshape(-1).view(np.uint8)
    raw[generator.integers(len(raw))] ^= np.uint8(1 << generator.integers(8))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_file_with_one_other_bit_is_refused(seed, tmp_path):
    """Bits of weights, images, labels, numbers and header in turn, whose sums are as they were."""
    generator = np.random.default_rng(seed)
    path = tmp_path / "proofs.npz"
    model = small(NEURONS["LIF"])
    x = torch.rand(4, 3)
    verify(model, x, model(x).argmax(1), 0.0).save_certificate(path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    name = sorted(arrays)[seed % len(arrays)]
    arrays[name] = flipped(arrays[name], generator)
    np.savez(path, **arrays)
    assert check_certificate.main([str(path)]) == 2


def operation(number, **given):
    def change(header, arrays):
        header["operations"][number] |= given

    return change


def one_missing(header, arrays):
    del header["operations"][-1]


def a_weight_of_its_own(header, arrays):
    arrays["weight9"] = np.zeros(3, dtype=np.float32)


def not_finite(header, arrays):
    arrays["weight0"][0] = np.nan


def in_float64(header, arrays):
    arrays["weight0"] = arrays["weight0"].astype(np.float64)


def an_image_above_1(header, arrays):
    arrays["images"][0] = 1.5


def an_unknown_label(header, arrays):
    arrays["labels"][0] = 12


def no_format(header, arrays):
    header["format"] = "another"


MALFORMED = {
    "an unknown operation": (operation(1, op="erf"), "erf"),
    "a shape that mixes rows": (operation(0, shape=[4, 1, 6]), "expected what fits"),
    "too few gains": (lambda h, a: neurons_of(h)[0]["gains"].pop(), "gains"),
    "a gain that is no number": (lambda h, a: neurons_of(h)[0].update(gains=[1e400] * T), "fits"),
    "no mean": (one_missing, "a mean over time"),
    "an unused array": (a_weight_of_its_own, "no other arrays"),
    "NaN": (not_finite, "float32 weights"),
    "float64": (in_float64, "float32 weights"),
    "an image": (an_image_above_1, r"images in \[0, 1\]"),
    "a label": (an_unknown_label, "labels of classes"),
    "a radius": (lambda h, a: h.update(eps=-0.1), "eps >= 0"),
    "a format": (no_format, "the format"),
}


def neurons_of(header):
    return [one for one in header["operations"] if one["op"] == "neuron"]


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_the_reason(case, tmp_path):
    change, message = MALFORMED[case]
    model = small(NEURONS["LIF"])
    path = tmp_path / "proofs.npz"
    x = torch.rand(4, 3)
    verify(model, x, model(x).argmax(1), 0.0).save_certificate(path)
    with pytest.raises(ValueError, match=message):
        check_certificate.read(forged(path, change))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04K\x01."])
def test_a_file_that_is_no_archive_is_refused(content, tmp_path):
    path = tmp_path / "proofs.npz"
    path.write_bytes(content)
    assert check_certificate.main([str(path)]) == 2


def in_a_chain(between):
    """Of operations that certificates know, one after the other."""
    parts = {name: nn.Linear(*sizes) for name, sizes in {"fc": (2, 4), "out": (4, 4)}.items()}
    for part in parts.values():
        nn.init.normal_(part.weight, 0.3, 1.5)
    nodes = {name: neuron.IFNode(step_mode="m") for name in ("node", "last")}
    return formula(lambda net, x: net.out(net.last(between(net, net.fc(x)))), T=2, **parts, **nodes)


def afterwards(net, x):
    found = net.node(x)
    x.mul_(-2)
    return found


IN_A_CHAIN = {
    "twice": lambda net, x: net.node(net.node(x)),
    "a branch that is dropped": lambda net, x: (net.node(net.out(x)), x)[1],
    "samples as steps": lambda net, x: net.node(x.reshape(x.shape[1], -1, 4)).reshape(x.shape),
    "a mean": lambda net, x: net.node(x).mean(0, keepdim=True).expand(x.shape),
    "a view in place": lambda net, x: (net.node(x.view(x.shape).mul_(-3)), x)[1],
    "in place afterwards": afterwards,
    "a potential": lambda net, x: (net.node(x), net.node.v.expand(x.shape))[1],
    "dtype": lambda net, x: net.node(x.int().float()),
}
POINTS = torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
FALSE = {name: (build, x[:8], eps) for name, (build, x, eps, _) in LIARS.items()}
for name, attack in ATTACKS.items():
    FALSE[f"large: {name}"] = (partial(beside_a_weight, attack, 1e8, behind=False), POINTS, 0.1)
for name, between in IN_A_CHAIN.items():
    FALSE[f"chain: {name}"] = (partial(in_a_chain, between), POINTS, 0.02)


@pytest.mark.parametrize("case", FALSE)
def test_no_network_that_was_proved_falsely_has_a_certificate_that_is_accepted(case, tmp_path):
    build, x, eps = FALSE[case]
    torch.manual_seed(0)
    model = build()
    y = model(x).argmax(1)
    path = tmp_path / "proofs.npz"
    with contextlib.suppress(NotImplementedError):
        verify(model, x, y, eps).save_certificate(path)

        def every(header, arrays):
            arrays["images"], arrays["labels"] = x.numpy(), y.numpy()
            arrays["numbers"] = np.arange(len(x))

        assert (least_leads(model, x, y, eps).numpy() >= leads(forged(path, every))).all()


def a_weight(model):
    with torch.no_grad():
        for part in model.parameters():
            part.mul_(-2)


def a_statistic(model):
    for part in model.buffers():
        part.add_(1)


def a_threshold(model):
    for part in model.modules():
        part.v_threshold = 0.1


@pytest.mark.parametrize("change", [a_weight, a_statistic, a_threshold])
@pytest.mark.parametrize("node", ["DLIF", "PLIF"])
def test_a_certificate_is_of_the_network_as_it_was_proved(node, change, tmp_path):
    model = classifier(convolutional, NEURONS[node])
    x, y = batch(model, 6)
    result = verify(model, x, y, 0.01)
    before, after = tmp_path / "before.npz", tmp_path / "after.npz"
    name = result.save_certificate(before)
    change(model)
    assert result.save_certificate(after) == name
    assert (leads(after) == leads(before)).all()
    assert verify(model, x, y, 0.01).save_certificate(after) != name


def of_events():
    return in_steps(nn.Linear(3, 2), neuron.IFNode(), nn.Linear(2, 2))


UNCERTIFIED = {
    "mip": (of_events, {"method": "mip"}, 'method "mip"'),
    "events": (of_events, {"eps": ThreatModel("L0", 1)}, "for events"),
    "sums": (lambda: classifier(residual, NEURONS["LIF"]), {}, "takes more than"),
    "max pooling": (
        lambda: in_steps(layer.MaxPool2d(2), layer.Flatten(), nn.Linear(32, 3), neuron.IFNode()),
        {},
        "max_pool2d",
    ),
    "steps": (
        lambda: SpikingClassifier(nn.Sequential(nn.Linear(3, 2), neuron.IFNode()), 1).eval(),
        {},
        "unbind",
    ),
    "another start": (
        lambda: in_steps(nn.Linear(3, 2), NEURONS["DLIF from 0.5"](), nn.Linear(2, 2)),
        {},
        "starts elsewhere",
    ),
}


@pytest.mark.parametrize("case", UNCERTIFIED)
def test_what_has_no_certificate_is_named(case, tmp_path):
    build, given, message = UNCERTIFIED[case]
    model = build()
    convolves = any(isinstance(part, nn.Conv2d | nn.MaxPool2d) for part in model.modules())
    x = torch.rand(2, *((2, 8, 8) if convolves else (3,))).round()
    result = verify(model, x, torch.tensor([0, 1]), **{"eps": 0.01, **given})
    with pytest.raises(NotImplementedError, match=message):
        result.save_certificate(tmp_path / "proofs.npz")
    assert not list(tmp_path.iterdir())
