"""Networks as people write them, built small: SpikingJelly's model zoo and the patterns of its
tutorials.

Each function builds one network for ``T`` time steps; ``ZOO`` and ``PATTERNS`` say what it takes,
and ``recipes/studies/networks.py`` what works with it.
"""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

CLASSES = 10
SMALL = (1, 8, 8)


@dataclass(frozen=True)
class Row:
    """One network of the table.

    Attributes:
        build: Name of the function in this file that builds it.
        shape: Shape of one image, or of one event frame.
        T: Number of time steps that it is built for.
        given: Whether T has to be said; else the network brings it.
        frames: Whether it takes event frames.
        classes: Number of classes.
        module: Module of SpikingJelly's zoo that it is from; "" for a pattern.
        neuron: A neuron that it needs, which a release may not have.
    """

    build: str
    shape: tuple[int, ...] = SMALL
    T: int = 4
    given: bool = True
    frames: bool = False
    classes: int = CLASSES
    module: str = ""
    neuron: str = "IFNode"

    def network(self):
        """The network with weights that are always the same, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return globals()[self.build](self.T).eval()

    def images(self, n=2):
        """Images [N, C, H, W] in [0, 1], or binary event frames [N, T, C, H, W]."""
        generator = torch.Generator().manual_seed(1)
        if self.frames:
            return (torch.rand(n, self.T, *self.shape, generator=generator) < 0.3).float()
        return torch.rand(n, *self.shape, generator=generator)

    @property
    def is_there(self):
        """Whether the installed release has it."""
        name = f"spikingjelly.activation_based.model.{self.module}"
        in_zoo = not self.module or importlib.util.find_spec(name) is not None
        return in_zoo and hasattr(neuron, self.neuron)


# ---------------------------------------------------------------- the model zoo


def zoo(module):
    """A module of the zoo."""
    return importlib.import_module(f"spikingjelly.activation_based.model.{module}")


def multi_step(net):
    """The network in step mode "m"."""
    functional.set_step_mode(net, "m")
    return net


def lif(**arguments):
    """What the zoo builds its neurons with."""
    usual = {"surrogate_function": surrogate.ATan(), "v_threshold": 0.5}
    return neuron.LIFNode(**usual | arguments)


def parametric_lif_net(name):
    module = zoo("parametric_lif_net")
    build = getattr(module, name)
    return multi_step(build(channels=4, spiking_neuron=lif))


def mnist_net(T):
    return parametric_lif_net("MNISTNet")


def fashion_mnist_net(T):
    return parametric_lif_net("FashionMNISTNet")


def cifar10_net(T):
    return parametric_lif_net("CIFAR10Net")


def nmnist_net(T):
    return parametric_lif_net("NMNISTNet")


def cifar10_dvs_net(T):
    return parametric_lif_net("CIFAR10DVSNet")


def dvs_gesture_net(T):
    return parametric_lif_net("DVSGestureNet")


def spiking_resnet(T):
    module = zoo("spiking_resnet")
    net = module.SpikingResNet(
        module.BasicBlock,
        [1, 1, 1, 1],
        num_classes=CLASSES,
        spiking_neuron=lif,
    )
    return multi_step(net)


def sew_resnet(T, spiking_neuron=lif, connection="ADD"):
    module = zoo("sew_resnet")
    net = module.SEWResNet(
        module.BasicBlock,
        [1, 1, 1, 1],
        num_classes=CLASSES,
        spiking_neuron=spiking_neuron,
        cnf=connection,
    )
    return multi_step(net)


def sew_resnet_and(T):
    return sew_resnet(T, connection="AND")


def sew_resnet_iand(T):
    return sew_resnet(T, connection="IAND")


def sew_resnet_psn(T):
    return sew_resnet(T, lambda **_: neuron.PSN(T))


def sew_resnet_masked_psn(T):
    return sew_resnet(T, lambda **_: neuron.MaskedPSN(2, T, lambda_init=1.0))


def sew_resnet_sliding_psn(T):
    return sew_resnet(T, lambda **_: neuron.SlidingPSN(2))


def sew_resnet_ilif(T):
    return sew_resnet(T, lambda **_: neuron.ILIFNode())


def sew_resnet_klif(T):
    return sew_resnet(T, lambda **_: neuron.KLIFNode())


def sew_resnet_qif(T):
    return sew_resnet(T, lambda **_: neuron.QIFNode())


def spiking_vgg(T):
    """Its fully connected layers have 120 million weights in any size; the last one stays."""
    with torch.device("meta"):
        net = zoo("spiking_vgg").SpikingVGG(
            [8, "M", 512, "M"],
            spiking_neuron=lif,
            batch_norm=True,
            norm_layer=layer.BatchNorm2d,
            init_weights=False,
        )
        net.classifier = layer.Linear(512 * 7 * 7, CLASSES)
    net = net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return multi_step(net)


def ottt_vgg(T):
    return zoo("spiking_vggws_ottt").OTTTSpikingVGG(
        [8, "A", 512],
        light_classifier=True,
        num_classes=CLASSES,
        spiking_neuron=neuron.OTTTLIFNode,
    )


def snas_net(T):
    return _snas_net(T, "forward")


def snas_net_backward(T):
    return _snas_net(T, "backward")


def _snas_net(T, celltype):
    operations = torch.tensor([[0, 1, 4, 1], [1, 0, 1, 2], [1, 4, 0, 1], [1, 1, 1, 0]])
    settings = SimpleNamespace(
        timestep=T,
        second_avgpooling=4,
        dataset="cifar100",
        threshold=1.0,
        tau=4 / 3,
        celltype=celltype,
    )
    return zoo("snas_net").SNASNet(settings, operations)


def spike_dhs(T):
    settings = SimpleNamespace(
        fea_step=3,
        fea_num_layers=6,
        fea_block_multiplier=3,
        fea_filter_multiplier=48,
    )
    return multi_step(zoo("spike_dhs").SpikeDHS(args=settings))


class FirstOutput(nn.Module):
    """The adapter that the message names: the first of several outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


def spike_dhs_first_output(T):
    return FirstOutput(spike_dhs(T))


def spikformer(T):
    return zoo("spikformer").Spikformer(
        T,
        img_size_h=16,
        img_size_w=16,
        patch_size=4,
        embed_dims=32,
        num_heads=2,
        depths=1,
        num_classes=CLASSES,
    )


def qkformer(T):
    return zoo("qkformer").QKFormer(
        T,
        embed_dims=32,
        num_heads=(1, 2, 4),
        depths=(1, 1, 1),
        num_classes=CLASSES,
    )


def maxformer(T):
    return zoo("maxformer").MaxFormer(
        T,
        embed_dims=32,
        depths=(1, 1, 1),
        num_classes=CLASSES,
    )


def spike_driven_transformer(T):
    return zoo("spike_driven_transformer").SpikeDrivenTransformer(
        T,
        embed_dims=32,
        num_heads=2,
        depths=1,
        pooling_stat="0011",
        num_classes=CLASSES,
    )


RESIDUAL = {
    "num_classes": CLASSES,
    "layers": (1, 1, 1),
    "base_channels": 8,
    "stem_kernel_size": 3,
    "stem_stride": 1,
}


def ms_resnet(T):
    return zoo("ms_resnet").MSResNet(T, **RESIDUAL)


def max_resnet(T):
    return zoo("ms_resnet").MaxResNet(T, **RESIDUAL)


def att_ms_resnet(T):
    return zoo("masnn").AttMSResNet(T, **RESIDUAL, reduction_c=2)


def masnn(T):
    return zoo("masnn").MASNN(
        T,
        2,
        CLASSES,
        input_size=(16, 16),
        channels=(8, 8),
        pools=(2, 2),
        fc_hidden=16,
        reduction_t=2,
        reduction_c=2,
    )


RGB = (3, 16, 16)
ZOO = {
    "MNISTNet": Row(
        build="mnist_net",
        shape=(1, 28, 28),
        module="parametric_lif_net",
    ),
    "FashionMNISTNet": Row(
        build="fashion_mnist_net",
        shape=(1, 28, 28),
        module="parametric_lif_net",
    ),
    "CIFAR10Net": Row(
        build="cifar10_net",
        shape=(3, 32, 32),
        module="parametric_lif_net",
    ),
    "NMNISTNet": Row(
        build="nmnist_net",
        shape=(2, 34, 34),
        frames=True,
        module="parametric_lif_net",
    ),
    "CIFAR10DVSNet": Row(
        build="cifar10_dvs_net",
        shape=(2, 128, 128),
        T=2,
        frames=True,
        module="parametric_lif_net",
    ),
    "DVSGestureNet": Row(
        build="dvs_gesture_net",
        shape=(2, 128, 128),
        T=2,
        frames=True,
        classes=11,
        module="parametric_lif_net",
    ),
    "SpikingResNet": Row(
        build="spiking_resnet",
        shape=(3, 32, 32),
        T=2,
        module="spiking_resnet",
    ),
    "SEWResNet": Row(
        build="sew_resnet",
        shape=(3, 32, 32),
        T=2,
        module="sew_resnet",
    ),
    "SpikingVGG": Row(
        build="spiking_vgg",
        shape=(3, 8, 8),
        T=2,
        module="spiking_vgg",
    ),
    "OTTTSpikingVGG": Row(
        build="ottt_vgg",
        shape=(3, 8, 8),
        module="spiking_vggws_ottt",
    ),
    "SNASNet, forward cells": Row(
        build="snas_net",
        shape=(3, 32, 32),
        T=2,
        given=False,
        classes=100,
        module="snas_net",
    ),
    "SNASNet, backward cells": Row(
        build="snas_net_backward",
        shape=(3, 32, 32),
        T=2,
        given=False,
        classes=100,
        module="snas_net",
    ),
    "SpikeDHS": Row(
        build="spike_dhs",
        shape=(3, 32, 32),
        T=6,
        given=False,
        classes=100,
        module="spike_dhs",
    ),
    "SpikeDHS, net(x)[0]": Row(
        build="spike_dhs_first_output",
        shape=(3, 32, 32),
        T=6,
        given=False,
        classes=100,
        module="spike_dhs",
    ),
    "Spikformer": Row(
        build="spikformer",
        shape=RGB,
        given=False,
        module="spikformer",
    ),
    "QKFormer": Row(
        build="qkformer",
        shape=RGB,
        given=False,
        module="qkformer",
    ),
    "MaxFormer": Row(
        build="maxformer",
        shape=RGB,
        given=False,
        module="maxformer",
    ),
    "SpikeDrivenTransformer": Row(
        build="spike_driven_transformer",
        shape=RGB,
        given=False,
        module="spike_driven_transformer",
    ),
    "MSResNet": Row(
        build="ms_resnet",
        shape=RGB,
        given=False,
        module="ms_resnet",
    ),
    "MaxResNet": Row(
        build="max_resnet",
        shape=RGB,
        given=False,
        module="ms_resnet",
    ),
    "AttMSResNet": Row(
        build="att_ms_resnet",
        shape=RGB,
        given=False,
        module="masnn",
    ),
    "MASNN": Row("masnn", (2, 16, 16), given=False, module="masnn"),
}


# ---------------------------------------------------------------- patterns of the tutorials


def body(*, tail=True):
    """Convolution and two spiking layers, in step mode "s"."""
    last = [lif(v_threshold=0.1)] if tail else []
    return nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        lif(v_threshold=0.2),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(64, CLASSES),
        *last,
    )


class RepeatMean(nn.Module):
    """The image repeated, the firing rate returned."""

    def __init__(self, T):
        super().__init__()
        self.T = T
        self.body = multi_step(body())

    def forward(self, x):
        x_seq = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        return self.body(x_seq).mean(0)


class RepeatSequence(RepeatMean):
    """The image repeated, every step returned."""

    def forward(self, x):
        x_seq = x.unsqueeze(0).expand(self.T, -1, -1, -1, -1)
        return self.body(x_seq)


class RepeatIfNeeded(RepeatMean):
    """Images or sequences."""

    def forward(self, x):
        if x.ndim == 4:
            x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        return self.body(x)


class ResetLast(RepeatMean):
    """Resets itself when it is done."""

    def forward(self, x):
        rate = super().forward(x)
        functional.reset_net(self)
        return rate


class Loop(nn.Module):
    """A loop over single steps, its outputs averaged; T has another name."""

    def __init__(self, T):
        super().__init__()
        self.time_steps = T
        self.body = body()

    def forward(self, x):
        total = 0.0
        for _ in range(self.time_steps):
            total = total + self.body(x)
        return total / self.time_steps


class LoopReset(Loop):
    """Resets itself before it begins."""

    def forward(self, x):
        functional.reset_net(self)
        return super().forward(x)


class LoopStack(Loop):
    """Every step of the loop is returned."""

    def forward(self, x):
        return torch.stack([self.body(x) for _ in range(self.time_steps)])


class StaticFirst(nn.Module):
    """The first convolution runs once, outside of the loop."""

    def __init__(self, T):
        super().__init__()
        self.T = T
        self.static = nn.Sequential(layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4))
        self.rest = nn.Sequential(
            lif(v_threshold=0.2),
            layer.Flatten(),
            layer.Linear(256, CLASSES),
            lif(v_threshold=0.1),
        )

    def forward(self, x):
        x = self.static(x)
        total = self.rest(x)
        for _ in range(1, self.T):
            total = total + self.rest(x)
        return total / self.T


class NeuronsInALoop(nn.Module):
    """All layers outside of the loop, which holds a neuron alone."""

    def __init__(self, T):
        super().__init__()
        self.T = T
        self.layers = nn.Sequential(layer.Flatten(), layer.Linear(64, CLASSES))
        self.neuron = lif(v_threshold=0.1)

    def forward(self, x):
        x = self.layers(x)
        total = sum(self.neuron(x) for _ in range(self.T))
        return total / self.T


class Potential(Loop):
    """The last neuron never fires; its potential after the last step is returned."""

    def __init__(self, T):
        super().__init__(T)
        self.body = body(tail=False)
        self.last = neuron.LIFNode(v_threshold=float("inf"))

    def forward(self, x):
        for _ in range(self.time_steps):
            self.last(self.body(x))
        return self.last.v


class SequenceMean(nn.Module):
    """A sequence in, its mean over time out."""

    def __init__(self):
        super().__init__()
        self.body = multi_step(body())

    def forward(self, x_seq):
        return self.body(x_seq).mean(0)


class MeanInEvaluation(SequenceMean):
    """As a loss of every step (TET) wants it: a sequence in training, its mean in evaluation."""

    def forward(self, x_seq):
        y_seq = self.body(x_seq)
        return y_seq if self.training else y_seq.mean(0)


class RepeatMeanInEvaluation(RepeatSequence):
    """The image repeated; every step in training, their mean in evaluation."""

    def forward(self, x):
        y_seq = super().forward(x)
        return y_seq if self.training else y_seq.mean(0)


class Functions(nn.Module):
    """Layers of torch through SpikingJelly's functions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = lif(step_mode="m", v_threshold=0.2)
        self.last = lif(v_threshold=0.1)
        self.linear = nn.Linear(256, CLASSES)

    def forward(self, x_seq):
        x_seq = functional.seq_to_ann_forward(x_seq, [self.conv, self.norm])
        x_seq = F.relu(self.first(x_seq)).flatten(2)
        return functional.multi_step_forward(x_seq, [self.linear, self.last])


class OneNeuronTwice(nn.Module):
    """One stateful neuron in two places, taken for a plain activation."""

    def __init__(self):
        super().__init__()
        self.first = layer.Conv2d(1, 4, 3, padding=1)
        self.second = layer.Conv2d(4, 4, 3, padding=1)
        self.neuron = lif(v_threshold=0.2)
        self.head = nn.Sequential(layer.Flatten(), layer.Linear(256, CLASSES))
        multi_step(self)

    def forward(self, x_seq):
        x_seq = self.neuron(self.first(x_seq))
        x_seq = self.neuron(self.second(x_seq))
        return self.head(x_seq)


class OwnNeuron(nn.Module):
    """A neuron that is written by hand, with a method reset()."""

    def __init__(self):
        super().__init__()
        self.v = 0.0

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        self.v = self.v + 0.5 * (x - self.v)
        spike = torch.sigmoid(8 * (self.v - 0.3))
        self.v = self.v * (1 - spike)
        return spike


class OwnNeurons(Loop):
    """A loop over neurons that are not SpikingJelly's; it resets them itself."""

    def __init__(self, T):
        super().__init__(T)
        self.body = nn.Sequential(
            layer.Flatten(),
            layer.Linear(64, 16),
            OwnNeuron(),
            layer.Linear(16, CLASSES),
            OwnNeuron(),
        )

    def forward(self, x):
        for module in self.body:
            if isinstance(module, OwnNeuron):
                module.reset()
        return super().forward(x)


class Recurrent(nn.Module):
    """Spikes are fed back."""

    def __init__(self):
        super().__init__()
        feedback = layer.LinearRecurrentContainer(lif(v_threshold=0.2), 16, 16)
        net = nn.Sequential(
            layer.Flatten(),
            layer.Linear(64, 16),
            feedback,
            layer.Linear(16, CLASSES),
            lif(v_threshold=0.1),
        )
        self.body = multi_step(net)

    def forward(self, x_seq):
        return self.body(x_seq).mean(0)


class Filtered(Recurrent):
    """A synapse with a state of its own."""

    def __init__(self):
        super().__init__()
        self.body[2] = nn.Sequential(lif(v_threshold=0.2), layer.SynapseFilter(tau=2.0))
        multi_step(self)


def repeat_mean(T):
    return RepeatMean(T)


def repeat_sequence(T):
    return RepeatSequence(T)


def repeat_if_needed(T):
    return RepeatIfNeeded(T)


def reset_last(T):
    return ResetLast(T)


def loop(T):
    return Loop(T)


def loop_reset(T):
    return LoopReset(T)


def loop_stack(T):
    return LoopStack(T)


def static_first(T):
    return StaticFirst(T)


def neurons_in_a_loop(T):
    return NeuronsInALoop(T)


def potential(T):
    return Potential(T)


def single_step(T):
    return body()


def one_layer(T):
    return nn.Sequential(layer.Flatten(), layer.Linear(64, CLASSES, bias=False), lif())


def sequence(T):
    return multi_step(body())


def sequence_mean(T):
    return SequenceMean()


def mean_in_evaluation(T):
    return MeanInEvaluation()


def repeat_mean_in_evaluation(T):
    return RepeatMeanInEvaluation(T)


def averaged_by_a_hook(T):
    net = sequence(T)
    net.register_forward_hook(averaged)
    return net


def averaged(module, args, y_seq):
    """A forward hook."""
    return y_seq.mean(0)


def voting(T):
    net = body(tail=False)
    net[-1] = layer.Linear(64, 10 * CLASSES)
    return nn.Sequential(*net, lif(v_threshold=0.1), layer.VotingLayer(10))


def voting_sequence(T):
    return multi_step(voting(T))


def containers(T):
    """Layers of torch inside SpikingJelly's container."""
    return nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        lif(v_threshold=0.2, step_mode="m"),
        layer.SeqToANNContainer(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, CLASSES)),
        lif(v_threshold=0.1, step_mode="m"),
    )


def functions(T):
    return Functions()


def one_neuron_twice(T):
    return OneNeuronTwice()


def own_neurons(T):
    return OwnNeurons(T)


def recurrent(T):
    return Recurrent()


def filtered(T):
    return Filtered()


PATTERNS = {
    "image repeated, mean over time": Row("repeat_mean", given=False),
    "image repeated, every step returned": Row("repeat_sequence", given=False),
    "images or sequences": Row("repeat_if_needed", given=False),
    "image repeated, resets itself at the end": Row("reset_last", given=False),
    "loop over steps, mean": Row("loop", given=False),
    "loop over steps, resets itself first": Row("loop_reset", given=False),
    "loop over steps, every step returned": Row("loop_stack", given=False),
    "first convolution outside of the loop": Row("static_first", given=False),
    "neurons alone in the loop": Row("neurons_in_a_loop", given=False),
    "potential of the last neuron returned": Row("potential", given=False),
    "single steps": Row("single_step"),
    "single steps, one layer": Row("one_layer"),
    "sequence": Row("sequence"),
    "sequence, mean over time": Row("sequence_mean"),
    "sequence, mean over time in evaluation (TET)": Row("mean_in_evaluation"),
    "image repeated, mean over time in evaluation (TET)": Row(
        "repeat_mean_in_evaluation", given=False
    ),
    "sequence, mean over time by a hook": Row("averaged_by_a_hook"),
    "single steps, voting": Row("voting"),
    "sequence, voting": Row("voting_sequence"),
    "layers of torch in containers": Row("containers"),
    "functions of SpikingJelly": Row("functions"),
    "one neuron in two places": Row("one_neuron_twice"),
    "spikes fed back": Row("recurrent"),
    "synapse filter": Row("filtered"),
    "neurons written by hand, in a loop": Row("own_neurons", given=False),
}

SEW = {"shape": (3, 32, 32), "T": 2, "module": "sew_resnet"}
VARIANTS = {
    "SEWResNet, AND": Row("sew_resnet_and", **SEW),
    "SEWResNet, IAND": Row("sew_resnet_iand", **SEW),
    "SEWResNet, PSN": Row("sew_resnet_psn", neuron="PSN", **SEW),
    "SEWResNet, masked PSN": Row("sew_resnet_masked_psn", neuron="MaskedPSN", **SEW),
    "SEWResNet, sliding PSN": Row("sew_resnet_sliding_psn", neuron="SlidingPSN", **SEW),
    "SEWResNet, I-LIF": Row("sew_resnet_ilif", neuron="ILIFNode", **SEW),
    "SEWResNet, KLIF": Row("sew_resnet_klif", **SEW),
    "SEWResNet, QIF": Row("sew_resnet_qif", **SEW),
}
"""Networks of the zoo with other neurons and connections."""

ROWS = {name: row for name, row in {**PATTERNS, **ZOO}.items() if row.is_there}
BOUNDED = {name: row for name, row in {**ZOO, **VARIANTS}.items() if row.is_there}
"""Those of which proofs and evaluations are measured."""
