"""What a network takes and gives is found out: the logits are those of the plain call, and the
network is left alone.
"""

import copy
import pickle

import pytest
import torch
from networks_as_written import CLASSES, ROWS
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from sj_robust import SpikingClassifier, compare_potentials, evaluate, perturbation_gains, verify
from sj_robust.classifier import SpikingEventClassifier
from sj_robust.core.convention import kept_state
from sj_robust.evaluation.subject import Subject, check_fits
from sj_robust.models import DirectlyEncoded, NetworkSpec, build_network, set_time_steps
from sj_robust.proofs import smooth
from sj_robust.training import Objective

QUICK_OF_THE_ZOO = {"MSResNet", "Spikformer", "MNISTNet"}
EVERY_ROW = [
    pytest.param(
        name, marks=pytest.mark.slow if row.module and name not in QUICK_OF_THE_ZOO else ()
    )
    for name, row in ROWS.items()
    if name != "SpikeDHS"  # returns a tuple
]


def classifier_of(row, net):
    if row.frames:
        return SpikingEventClassifier(net, row.T).eval()
    return SpikingClassifier(net, row.T if row.given else None).eval()


def plain_call(row, net, x):
    """What the author of the network does with it."""
    functional.reset_net(net)
    if not row.given:
        outputs = net(x)
        return outputs.mean(0) if outputs.ndim == 3 else outputs
    frames = x.transpose(0, 1).contiguous() if row.frames else x.expand(row.T, *x.shape)
    multi_step = next(m.step_mode for m in net.modules() if hasattr(m, "step_mode")) == "m"
    outputs = net(frames) if multi_step else torch.stack([net(frame) for frame in frames])
    return outputs.mean(0) if outputs.ndim == 3 else outputs


@pytest.mark.parametrize("name", EVERY_ROW)
def test_the_logits_are_those_of_the_plain_call(name):
    row = ROWS[name]
    net, x = row.network(), row.images(3)
    model = classifier_of(row, net)
    wanted = plain_call(row, net, x)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(x[: row.T]), plain_call(row, net, x[: row.T]))  # N = T or less
    assert model.convention.T == row.T == model.T
    assert (model.convention.takes == "images") == (not row.given)
    assert str(model.convention) in repr(model)


@pytest.mark.parametrize(
    "name",
    [
        "sequence",
        "sequence, mean over time in evaluation (TET)",
        "image repeated, mean over time in evaluation (TET)",
        "sequence, mean over time by a hook",
        "single steps",
    ],
)
@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_a_network_may_return_a_sequence_in_one_mode_and_its_mean_in_the_other(name, first):
    row = ROWS[name]
    net = row.network()
    model = classifier_of(row, net)
    for n in (3, row.T, CLASSES):  # so that N = T, or N and the number of classes are equal
        for training in (first == "training", first != "training"):
            model.train(training)
            x = row.images(n)
            norms = copy.deepcopy(net.state_dict())
            wanted = plain_call(row, net, x)
            net.load_state_dict(norms)
            assert torch.equal(model(x), wanted)
            assert wanted.shape == (n, CLASSES)


class Turned(nn.Module):
    """Logits of four classes; in training every step of them, time first or second."""

    def __init__(self, time):
        super().__init__()
        self.linear, self.time = nn.Linear(64, 4), time

    def forward(self, x_seq):
        y_seq = self.linear(x_seq.flatten(2))
        return y_seq.movedim(0, self.time) if self.training else y_seq.mean(0)


def test_what_is_neither_logits_nor_a_sequence_is_refused_in_training_too():
    x = torch.rand(3, 1, 8, 8)
    for time, T in ((0, 4), (0, 3)):  # T is the number of classes, or of images
        model = SpikingClassifier(Turned(time), T, takes="sequence")
        assert model.train()(x).shape == (3, 4)
        torch.testing.assert_close(model(x), model.eval()(x))
    model = SpikingClassifier(Turned(1), 4, takes="sequence")
    with pytest.raises(
        ValueError, match=r"N = 3 and T = 4, got a tensor \[3, 4, 4\]; .*time first"
    ):
        model.train()(x)


def test_twenty_networks_as_people_write_them_are_there():
    assert len(EVERY_ROW) >= 20
    assert not any(
        hasattr(ROWS[name].network(), "expands_time")
        for name in ("sequence", "loop over steps, mean")
    )


def state_of(net):
    """All that a network holds, for comparison."""
    held = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                held |= {f"{name}.{key}.{inner}": kept for inner, kept in value.items()}
            else:
                held[f"{name}.{key}"] = value
    return held


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert after[key] is value or after[key] == value, key


@pytest.mark.parametrize(
    "name", ["image repeated, mean over time", "loop over steps, mean", "sequence"]
)
def test_trying_leaves_the_network_as_it_was(name):
    row = ROWS[name]
    net, x = row.network().train(), row.images(3)
    plain_call(row, net, x).sum().backward()  # states with a graph, statistics, gradients
    calls = []
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, args, output: calls.append(len(args)))
    norm.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    model = SpikingClassifier(net, row.T if row.given else None)
    held = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in state_of(net).items()
    }
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    model.find_convention(x)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(held, state_of(net))
    assert gradients
    assert all(
        map(torch.equal, gradients, [p.grad for p in net.parameters() if p.grad is not None])
    )
    assert all(module.training for module in net.modules())
    model(x)
    assert len(calls) == 2 * (4 if "loop" in name else 1)  # the first forward itself is seen once


def test_a_classifier_is_copied_pickled_and_loaded_as_before():
    row = ROWS["sequence"]
    model, x = classifier_of(row, row.network()), row.images()
    names = list(model.state_dict())
    wanted = model(x)
    assert list(model.state_dict()) == names
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), wanted)
    fresh = SpikingClassifier(row.network(), row.T)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), wanted)
    assert "_found" not in vars(model.net)


def test_a_change_of_step_mode_or_of_steps_is_noticed():
    row = ROWS["sequence"]
    model, x = classifier_of(row, row.network()), row.images()
    wanted = model(x)
    functional.set_step_mode(model.net, "s")
    torch.testing.assert_close(model(x), wanted)
    assert model.convention.takes == "steps"
    own = classifier_of(
        ROWS["image repeated, mean over time"], ROWS["image repeated, mean over time"].network()
    )
    own(x)
    set_time_steps(own, 6)
    own(x)
    assert own.convention.T == own.T == 6


class Switch(nn.Module):
    """Does one thing with images and another with sequences."""

    def __init__(self):
        super().__init__()
        self.T = 4
        self.layers = nn.Sequential(
            layer.Flatten(), layer.Linear(64, 5), neuron.IFNode(v_threshold=0.1)
        )
        functional.set_step_mode(self, "m")

    def forward(self, x):
        if x.ndim == 4:
            return self.layers(x.expand(4, *x.shape)).sum(0)
        return self.layers(x).mean(0)


def test_two_readings_with_unlike_logits_are_refused_and_told_apart_by_takes():
    torch.manual_seed(0)
    net, x = Switch().eval(), torch.rand(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"two ways .* takes='images'\) or takes='sequence'"):
        SpikingClassifier(net, 4)(x)
    images, sequence = (
        SpikingClassifier(net, 4, takes=takes)(x) for takes in ("images", "sequence")
    )
    assert torch.equal(images, 4 * sequence)
    assert images.abs().sum() > 0


class Unlike(Switch):
    """Its logits of sequences differ from those of images."""

    def __init__(self, change):
        super().__init__()
        self.layers, self.change = nn.Sequential(layer.Flatten(2), layer.Linear(64, 5)), change

    def forward(self, x):
        if x.ndim == 4:
            return self.layers(x.expand(4, *x.shape)).mean(0)
        return self.change(self.layers(x).mean(0))


def one_spike_more(logits):
    """For the first image of a batch."""
    more = torch.zeros_like(logits)
    more[0, 0] = 0.1 * logits.norm() / len(logits)
    return logits + more


UNLIKE = {
    "rounding": (lambda logits: logits * (1 + 1e-6), True),
    "a spike": (one_spike_more, True),
    "a factor": (lambda logits: 1.05 * logits, False),
    "a shift": (lambda logits: logits + 0.02, False),
    "less classes": (lambda logits: logits[:, :-1], False),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_readings_agree_as_far_as_rounding_and_single_spikes_explain(kind):
    change, agree = UNLIKE[kind]
    torch.manual_seed(0)
    model = SpikingClassifier(Unlike(change).eval(), 4)
    if agree:
        assert model.find_convention(torch.rand(3, 1, 8, 8)).takes == "images"
    else:
        with pytest.raises(ValueError, match="two ways that give different logits"):
            model.find_convention(torch.rand(3, 1, 8, 8))


class Alternating(nn.Module):
    """Two calls give two things in turn."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs, self.calls = outputs, 0

    def forward(self, x):
        self.calls += 1
        return self.outputs[self.calls % 2]


@pytest.mark.parametrize("outputs", [(1.0, 2.0), ("a", "b"), (None, torch.zeros(2)), (3, None)])
def test_outputs_that_are_no_tensors_are_compared_too(outputs):
    assert kept_state(Alternating(*outputs), torch.rand(2, 1)) == ("calls",)
    assert kept_state(Alternating(outputs[0], outputs[0]), torch.rand(2, 1)) == ()


class TwoPlaces(nn.Module):
    """Two calls of one neuron: two steps, or one step of two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layer.Linear(64, 16), layer.Linear(16, 5)
        self.neuron = neuron.IFNode(v_threshold=0.1)

    def forward(self, x):
        return self.second(self.neuron(self.neuron(self.first(x.flatten(1)))))


def test_a_neuron_in_two_places_is_no_loop_once_that_is_said():
    net, x = TwoPlaces().eval(), torch.rand(3, 1, 8, 8)
    model = SpikingClassifier(net, 4, takes="steps")
    assert torch.equal(model(x), plain_call(ROWS["single steps"], net, x))
    assert model.convention.takes == "steps"


@pytest.mark.parametrize(
    ("name", "T", "match"),
    [
        ("single steps", None, r"T must be given for a bare network \(Sequential\), got None"),
        ("sequence", None, "T must be given"),
        ("image repeated, mean over time", 6, "runs 4 steps itself, got T=6; omit T"),
        ("loop over steps, mean", 6, "runs 4 steps itself, got T=6"),
        ("single steps", 0, "T must be .*>= 1.*, got 0"),
    ],
)
@pytest.mark.parametrize(
    "call", ["classifier", "evaluate", "compare", "perturbation_gains", "verify"]
)
def test_a_wrong_number_of_steps_is_refused(name, T, match, call):
    net, x = ROWS[name].network(), ROWS[name].images()
    if call == "compare" and T is None:
        pytest.skip("without T the network gets its own inputs")
    with pytest.raises(ValueError, match=match):
        {
            "classifier": lambda: SpikingClassifier(net, T)(x),
            "evaluate": lambda: evaluate(
                net, x, torch.tensor([0, 1]), eps=0.1, T=T, progress=False
            ),
            "compare": lambda: compare_potentials(net, x, x, T=T),
            "perturbation_gains": lambda: perturbation_gains(net, x, T=T),
            "verify": lambda: verify(net, x, torch.tensor([0, 1]), 0.1, T=T),
        }[call]()


class Returning(nn.Module):
    """A network without neurons that returns what it is told to."""

    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(64, 10), change

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)))


WRONG = {
    "tuple": (lambda z: (z, None), r"a tuple \(tensor \[\d, 10\], None\); .* net\(x\)\[0\]"),
    "dict": (lambda z: {"logits": z}, r"a dict of 'logits'; .* net\(x\)\['logits'\]"),
    "list": (lambda z: [z, z], r"a list .* torch.stack\(net\(x\)\).mean\(0\)"),
    "time": (lambda z: z.expand(7, *z.shape), r"a tensor \[7, \d, 10\]; .* net\(x\).mean\(0\)"),
    "batch": (lambda z: z[:1], r"a tensor \[1, 10\]"),
    "integers": (
        lambda z: z.argmax(1),
        r"a torch.int64 tensor \[\d\]; return floating-point logits",
    ),
    "nothing": (lambda z: None, "got None"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_outputs_are_refused_with_what_was_got_and_what_to_return(kind):
    change, match = WRONG[kind]
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match=match):
        check_fits(Subject("mine", Returning(change), ""), x[:1], None, "images")
    if kind != "time":  # which is T = 7 for a classifier
        with pytest.raises(ValueError, match=match):
            SpikingClassifier(Returning(change), 4)(x)


class Stateful(nn.Module):
    """A plain module that remembers."""

    def __init__(self):
        super().__init__()
        self.linear, self.v = nn.Linear(64, 10), 0.0

    def forward(self, x):
        self.v = self.v * 0.5 + self.linear(x.flatten(1))
        return self.v


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear((x + torch.rand_like(x)).flatten(1))


def test_a_state_that_nothing_resets_is_named_and_is_no_draw():
    x = torch.rand(2, 1, 8, 8)
    net = nn.Sequential(Stateful())
    assert kept_state(net, x) == ("0.v",)
    assert net[0].v == 0.0
    assert kept_state(Drawing(), x) == ()
    assert kept_state(SpikingClassifier(ROWS["loop over steps, mean"].network()), x) == ()
    with pytest.raises(ValueError, match=r"keeps a state that .* \(0\.v\), .* method reset\(\)"):
        SpikingClassifier(net, 1, takes="images")(x)
    SpikingClassifier(Drawing(), 4)(x)


def test_networks_of_the_package_take_images_and_frames():
    net = build_network(NetworkSpec(T=4))
    assert isinstance(net, DirectlyEncoded)
    x = torch.rand(3, 1, 8, 8)
    model = SpikingClassifier(net.eval(), 4)
    model(x)
    assert model.convention.takes == "images"
    assert model.convention.takes_sequences


class Expanded(nn.Sequential):
    """Expands an image over six steps; a sequence of another length cannot be expanded."""

    def forward(self, x):
        return super().forward(x.expand(6, -1, -1, -1, -1)).mean(0)


def test_a_network_that_expands_one_step_takes_no_sequences():
    torch.manual_seed(0)
    net = Expanded(layer.Flatten(step_mode="m"), nn.Linear(64, 3), neuron.IFNode(step_mode="m"))
    x = torch.rand(2, 1, 8, 8)
    model = SpikingClassifier(net.eval())
    model(x)
    assert (model.convention.takes, model.convention.T) == ("images", 6)
    assert not model.convention.takes_sequences
    assert perturbation_gains(model, x).layers


PER_CALL = {
    "compare": lambda model, x, y: compare_potentials(model, x, (x + 0.05).clamp(max=1)),
    "perturbation_gains": lambda model, x, y: perturbation_gains(
        model, x, x_perturbed=(x + 0.05).clamp(max=1)
    ),
    "verify": lambda model, x, y: verify(model, x, y, 0.001),
    "smooth": lambda model, x, y: smooth(model, x, 0.1, n0=4, n=8),
    "objective": lambda model, x, y: Objective(model.train())(x, y, x).total.backward(),
}


@pytest.mark.parametrize("call", PER_CALL)
@pytest.mark.parametrize(
    "name", ["image repeated, mean over time", "loop over steps, mean", "single steps"]
)
def test_every_call_runs_on_every_convention(name, call):
    row = ROWS[name]
    model, x = classifier_of(row, row.network()), row.images(3)
    PER_CALL[call](model, x, model(x).argmax(1))


def test_certified_gains_of_images_are_those_of_sequences():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x_perturbed = (x + 0.05).clamp(max=1)
    found = []
    for name in ("image repeated, mean over time", "sequence"):
        row = ROWS[name]
        model = classifier_of(row, row.network())
        found.append(list(perturbation_gains(model, x, x_perturbed=x_perturbed).layers))
    for of_images, of_sequence in zip(*found, strict=True):
        if of_images.feeds == ("input",):  # one image feeds all four steps
            assert of_images.norm == pytest.approx(2 * of_sequence.norm, rel=1e-3)
        elif of_images.norm is not None:
            assert of_images.norm == pytest.approx(of_sequence.norm, rel=1e-3)


def test_trying_is_cheap_and_happens_once():
    row = ROWS["sequence"]
    net, x = row.network(), row.images(64)
    model = classifier_of(row, net)
    calls = []
    net.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    model(x)
    model(x)
    assert calls == [64, 64]
    forward, calls_tried = net.forward, []
    net.forward = lambda frames: calls_tried.append(frames.shape) or forward(frames)
    SpikingClassifier(net, row.T).find_convention(x)
    assert max(shape[-4] for shape in calls_tried) <= 4
    assert len(calls_tried) <= 10


def test_functions_of_the_command_line_bring_their_steps(tmp_path, monkeypatch):
    from sj_robust.evaluation.subject import from_function

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "brings_its_steps.py").write_text(
        "from networks_as_written import ROWS\nbuild = ROWS['loop over steps, mean'].network\n"
    )
    subject = from_function("brings_its_steps:build")
    assert check_fits(subject, torch.rand(1, 1, 8, 8), 10, "digits") == 10
    assert subject.model.T == 4
