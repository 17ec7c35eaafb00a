"""Bounds of everything that a network computes for inputs in a box, including rounding: a run, and
the logits that it gives.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.classifier import SpikingClassifier
from sj_robust.neuron.charging import Neuron, find_neurons, is_neuron
from sj_robust.proofs.moves import EVENTS, Events
from sj_robust.proofs.neurons import (
    as_lif,
    counts,
    has_steps,
    no_bounds,
    other_forwards,
    stepped,
)
from sj_robust.proofs.program import Operation, Program, captured, recorded
from sj_robust.proofs.rounding import SLACK, NoBoundsError
from sj_robust.proofs.rules import step
from sj_robust.proofs.spiking import (
    Float32Counting,
    Float32Spiking,
    Interval,
    LayerBounds,
    RealSpiking,
    SpikingBounds,
)
from sj_robust.proofs.structure import (
    Forms,
    ReadCall,
    Structure,
    by_row,
)
from sj_robust.proofs.values import (
    Bounds,
    Pooling,
    bounds_of,
    reshaped,
)

__all__ = [
    "BoundedRun",
    "LayerCall",
    "Leaf",
    "Programs",
    "bounded_logits",
    "bounded_neurons",
    "pulled_back",
    "unknown",
]


@dataclass(frozen=True)
class Leaf:
    """A tensor that bounds start from again: its centre is a variable of the graph."""

    centre: Tensor
    radius: Tensor
    batch_dim: int
    """Where the samples are; -1 if dimension 0 holds the time steps of all samples, first step
    first.
    """
    operation: Operation | None
    """The operation that gives it; None for the images."""

    def by_sample(self, values: Tensor, samples: int) -> Tensor:
        """Values of the shape of the radius as rows, one per sample: [N, values]."""
        return by_row(values, samples, self.batch_dim).reshape(samples, -1)


def pulled_back(
    weights: Tensor, outputs: Tensor, inputs: list[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Weights on outputs as weights on inputs, None where no graph leads; the graph stays.

    Given weights, torch would import sympy to compare two shapes, which takes half a second.
    """
    with torch.enable_grad():  # whoever looks whether there are bounds asks without a graph
        total = (outputs * weights).sum()
    return torch.autograd.grad(
        total,
        inputs,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
    )


@dataclass
class _Switch:
    """What a graph asks, which must not hold the run: the run holds the graph, and neither would
    ever be freed.
    """

    on: bool = False


@dataclass(frozen=True)
class LayerCall:
    """A call of a spiking layer or of another function on bounds: an affine map of earlier leaves
    ends here, and a leaf begins.

    Attributes:
        by: The spiking layer; None for another function.
        pooling: The function, if that is a max pooling.
        read: What the structure says of it.
        current: What reaches it, laid out with its samples in a dimension.
        batch_dim: Where the current has its samples, as a leaf.
    """

    by: Neuron | None
    pooling: Pooling | None
    read: ReadCall
    current: Bounds
    batch_dim: int


class _Cut(torch.autograd.Function):
    """A leaf's centre: it passes its gradient on, unless its run asks for the map behind the leaves
    alone.
    """

    @staticmethod
    def forward(ctx: Any, centre: Tensor, cut: "_Switch") -> Tensor:
        """The centre."""
        ctx.cut = cut
        return centre.view_as(centre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient, or none."""
        return None if ctx.cut.on else grads[0], None


class BoundedRun:
    """One run of a network on bounds: its leaves, and what its spiking layers let through.

    Args:
        neurons: Neurons of known dynamics by name.
        samples: Number of samples in the run.
        differentiable: Whether the bounds are for training: in the precision of the input, without
            rounding, and with a graph to the weights, in which surrogates stand for the derivatives
            of both bounds of a spike. As with ``detach_reset``, the reset passes no gradient on.
        surrogate_width: Width of these derivatives in units of the neurons' own.
    """

    dtype = torch.float32
    """Of the network; what float32 rounds covers float64 as well."""

    points = False
    """See :class:`sj_robust.proofs.rules.Run`."""

    narrow = False
    """See :class:`sj_robust.proofs.rules.Run`."""

    program: Program
    """What runs; set as it begins."""

    structure: Structure
    """How that treats samples and time; likewise."""

    operation: Operation | None = None
    """What runs now."""

    def __init__(
        self,
        neurons: dict[str, Neuron],
        samples: int,
        *,
        differentiable: bool = False,
        surrogate_width: float = 1.0,
    ) -> None:
        """Nothing has run yet."""
        self.neurons = neurons
        self.samples = samples
        self.differentiable = differentiable
        self.rounded = not differentiable
        self.surrogate_width = surrogate_width
        self.cut = _Switch()
        self.leaves: list[Leaf] = []
        self._laid = 0
        """Values whose layout was asked for so far."""
        self._called = 0
        """Calls so far; see :attr:`Structure.calls`."""
        self.changed: Bounds | None = None
        """The frames, if at most some of their events change."""
        self.apart: dict[str, str] = {}
        """Layers that bound changed events as if some had budgets of their own, with the reason."""
        self.layers = {name: LayerBounds() for name in neurons}

    def leaf(self, values: Interval, batch_dim: int) -> Bounds:
        """Bounds that start here, of values that are exact."""
        low = values.low
        high = values.high
        centre = (low + high) / 2
        if self.differentiable:
            return self.leaf_around(centre, (high - low) / 2, batch_dim)
        radius = SLACK * torch.maximum(high - centre, centre - low)
        return self.leaf_around(centre, radius, batch_dim)

    def leaf_around(self, centre: Tensor, radius: Tensor, batch_dim: int) -> Bounds:
        """The same of values by their middle and half of their distance."""
        centre.requires_grad_()
        if self.differentiable:
            # torch leaves apply untyped
            centre = _Cut.apply(centre, self.cut)  # type: ignore[no-untyped-call]
        self.leaves.append(Leaf(centre, radius, batch_dim, self.operation))
        return Bounds(centre, radius, run=self)

    def apply(self, operation: Operation, args: Any, kwargs: Any) -> Any:
        """Bounds of an operation of the network's program."""
        func = operation.func
        self.operation = operation
        try:
            if isinstance(func, Neuron):
                return self._spikes_behind(self.neurons[func.name], *args)
            if isinstance(func, nn.Module):
                return step(args[0], func.forward)
            return bounds_of(func, *args, **kwargs)
        except NoBoundsError as error:
            error.where = operation.where
            raise

    def lead(self, logits: Bounds, y: Tensor) -> Tensor:
        """Upper bound of what every class's logit is above the right one's, [N, classes]; the right
        one's own is 0.

        Equation, with w_k the gradient of ``centre_k`` on the leaves, which is that of an affine
        map::

            centre_k - centre_y + sum | w_k - w_y | radius + error_k + error_y
        """
        right = y.unsqueeze(1)
        gap = logits.centre - logits.centre.gather(1, right)
        weights, radius = self._last_map(logits.centre)
        order = y.argsort()
        labels, counts = torch.unique_consecutive(y[order], return_counts=True)
        radii = torch.split(radius[order], counts.tolist())
        spreads = []
        for label, of_label in zip(labels, radii, strict=True):
            change = (weights - weights[label]).abs()
            spreads.append(of_label @ change.T)
        spread = torch.cat(spreads)[order.argsort()]
        if logits.unrounded:
            return (gap + spread).scatter(1, right, 0.0)
        error = logits.error + logits.error.gather(1, right)
        lead = gap.detach() + SLACK * (spread + error)
        return lead.scatter(1, right, 0.0)

    def _last_map(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The map from the leaves to the logits [classes, *], and the radius of the leaves [N, *].

        It is the same for every sample, so that one pass back gives it for as many classes as there
        are samples.
        """
        classes = logits.shape[1]
        no_weights = logits.new_zeros(classes, 1)
        no_radius = logits.new_zeros(self.samples, 1)
        nothing = (no_weights, no_radius)
        if not logits.requires_grad:
            return nothing
        leaves = self._first_leaves(logits)
        centres = [leaf.centre for leaf in leaves]
        found: list[list[Tensor]] = [[] for _ in centres]
        self.cut.on = True
        for start in range(0, classes, self.samples):
            number = min(self.samples, classes - start)
            asked = torch.zeros_like(logits)
            asked.diagonal(start)[:number] = 1.0
            grads = pulled_back(asked, logits, centres, create_graph=self.differentiable)
            for rows, leaf, grad in zip(found, leaves, grads, strict=True):
                if grad is not None:
                    rows.append(leaf.by_sample(grad, self.samples)[:number])
        self.cut.on = False
        weights = []
        radii = []
        for rows, leaf in zip(found, leaves, strict=True):
            if rows:
                weights.append(torch.cat(rows))
                radii.append(leaf.by_sample(leaf.radius, self.samples))
        if not weights:
            return nothing
        return torch.cat(weights, 1), torch.cat(radii, 1)

    def _first_leaves(self, logits: Tensor) -> list[Leaf]:
        """The leaves that the graph of the logits meets first; in training others lie behind
        them.
        """
        ends = {leaf.centre.grad_fn for leaf in self.leaves}
        seen: set[Any] = {None}  # which stands for a leaf without a graph
        todo: list[Any] = [logits.grad_fn]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in ends:
                todo += [before for before, _ in node.next_functions]
        return [leaf for leaf in self.leaves if leaf.centre.grad_fn in seen]

    def _spikes_behind(self, neuron: Neuron, x: Bounds) -> Bounds:
        """What a neuron gives for a current."""
        batch_dim = 1 if neuron.module.step_mode == "m" else 0
        read = self._call(x, batch_dim, neuron)
        if self.changed is not None and x.changes is None and 0 in read.leaves:
            self.apart[neuron.name] = "its current is more than one convolution or linear map"
        return self._leaf_behind(neuron, x, batch_dim)

    def _call(
        self, x: Bounds, batch_dim: int, by: Neuron | None, pooling: Pooling | None = None
    ) -> ReadCall:
        """The next call."""
        read = self.structure.calls[self._called]
        self._called += 1
        self._reached(LayerCall(by, pooling, read, x, batch_dim))
        return read

    def _leaf_behind(self, neuron: Neuron, x: Bounds, batch_dim: int) -> Bounds:
        """The spikes of a layer for a current, with which a leaf begins."""
        current = Interval(x.lower, x.upper)
        if batch_dim:
            spikes = self.spikes(neuron, current)
        else:
            one_step = current.each(lambda end: end.unsqueeze(0))
            spikes = self.spikes(neuron, one_step).each(lambda end: end[0])
        self._passed(neuron.name, x, spikes)
        return self.leaf(spikes, batch_dim)

    def begin(self, arguments: list[Bounds], values: Interval, pooling: Pooling | None) -> Bounds:
        """A leaf with these values, which an operation gives for arguments."""
        assert self.operation is not None  # which has the rule
        for x in arguments:
            batch_dim, shape = self._layout(x.shape)
            read = self._call(reshaped(x, shape), batch_dim, None, pooling)
            if self.changed is not None and 0 in read.leaves:
                self.apart["a max pooling or ReLU"] = "after it, every value has its own budget"
        batch_dim, shape = self._layout(self.operation.shape)
        found = self.leaf(values.each(lambda end: end.reshape(shape)), batch_dim)
        return reshaped(found, values.low.shape)

    def _layout(self, given: torch.Size) -> tuple[int, torch.Size]:
        """Where the samples of the next value are, see :class:`Leaf`, and in which shape."""
        layout = self.structure.layouts[self._laid]
        self._laid += 1
        shape = layout.shape(given, self.samples)
        assert shape is not None  # the structure of so many samples has been read
        return layout.batch_dim, shape

    def spikes(self, neuron: Neuron, x_seq: Interval) -> Interval:
        """Spikes of a layer, [T, N, *] as numbers, for its current in the next T steps."""
        return self._spiking(neuron).run(x_seq)

    def _spiking(self, neuron: Neuron) -> SpikingBounds:
        """A call of a layer."""
        layer = self.layers[neuron.name]
        most = counts(neuron)
        if most is not None:
            if self.differentiable:
                raise NoBoundsError(f"training with {neuron.type_name}, which emits integers")
            return Float32Counting(neuron, layer, most)
        if self.differentiable:
            return RealSpiking(neuron, layer, self.surrogate_width)
        return Float32Spiking(neuron, layer)

    def _reached(self, call: LayerCall) -> None:
        """An affine map ends here, at a spiking layer or an argument of another function, from
        which the next leaf comes.
        """

    def _passed(self, name: str, current: Bounds, spikes: Interval) -> None:
        """A spiking layer has been called: bounds of what came in and of what goes out."""


class Programs:
    """The programs of a network by number of images, all of which do the same with every image.

    Args:
        model: A classifier in evaluation mode.
        neurons: Its spiking layers by name.
    """

    def __init__(self, model: SpikingClassifier, neurons: dict[str, Neuron]) -> None:
        """None is captured yet."""
        self.neurons = neurons
        self._model = model
        self._forms = Forms()
        self._found: dict[int, Program] = {}
        self._of_several: Structure | None = None

    def of(self, images: Tensor) -> Program:
        """The program of so many images.

        Raises:
            NoBoundsError: If it mixes samples, or does another thing than that of other numbers of
                images.
        """
        if self._of_several is None:
            self.structure(images)
        if len(images) not in self._found:
            self._captured(images)
        return self._found[len(images)]

    def structure(self, images: Tensor, *, framed: bool = False) -> Structure:
        """How the network treats samples and time, as batches of several images tell.

        Args:
            images: One or more.
            framed: See :meth:`Structure.of`.
        """
        several = [torch.cat([images[:1]] * number) for number in _SEVERAL]
        if self._of_several is None:
            for batch in several:
                self._captured(batch)
        assert self._of_several is not None
        if framed:
            return self._read(self.of(several[0]), several[0], framed=True)
        return self._of_several

    def _captured(self, images: Tensor) -> None:
        """Capture the program of so many images."""
        program = captured(self._model, images, self.neurons)
        read = self._read(program, images)
        if self._of_several is None:
            self._of_several = read
        elif not read.alike(self._of_several):
            raise NoBoundsError(
                "a network that treats the samples of a batch of another size differently, such "
                "as a mean over them"
            )
        self._found[len(images)] = program

    def _read(self, program: Program, images: Tensor, *, framed: bool = False) -> Structure:
        return Structure.of(
            program,
            images,
            self.neurons,
            self._model.T,
            forms=Forms() if framed else self._forms,
            told=None if framed else self._of_several,
            framed=framed,
        )


_SEVERAL = (2, 3, 1)
"""Samples of batches that tell where samples are, and that their number does not matter."""


def bounded_logits(
    model: SpikingClassifier,
    run: BoundedRun,
    images: Tensor,
    eps: float | Tensor | Events,
    *,
    programs: Programs | None = None,
) -> Bounds:
    """Bounds of the logits over the ball, from the program of the classifier. 输出的上下界。

    Args:
        model: A classifier in evaluation mode.
        run: Where what is found is kept; made from :func:`bounded_neurons`.
        images: Images in [0, 1].
        eps: Linf radius, or one of each image, broadcast; or what may happen to event frames.
        programs: Those of the network that are known.

    Raises:
        NotImplementedError: If something in the network has no bounds; it is named.
    """
    run.dtype = images.dtype
    exact = images.detach() if run.differentiable else images.detach().double()
    if isinstance(eps, EVENTS):
        box = eps.box(exact)
    else:
        lowest = (exact - eps).clamp(min=0)
        highest = (exact + eps).clamp(max=1)
        box = Interval(lowest, highest)
    try:
        programs = Programs(model, run.neurons) if programs is None else programs
        run.program = _program(model, run, images, programs)
        run.structure = programs.structure(images)
        with torch.enable_grad():
            leaf = run.leaf(box, 0)
            if isinstance(eps, EVENTS):
                leaf.changes = eps.changes(exact, summed=run.differentiable)
                run.changed = leaf.same()
            logits: Bounds = run.program.run(leaf, run.apply)
    except NoBoundsError as error:
        raise unknown(error, model) from error
    return logits


def _program(
    model: SpikingClassifier, run: BoundedRun, images: Tensor, programs: Programs
) -> Program:
    """The program of these images; in training that of the present weights, with their graph."""
    if run.differentiable:
        found = recorded(model, images, run.neurons)
        if found.cut:
            raise NoBoundsError("training of what runs without a graph, as in torch.no_grad()")
        return found
    return programs.of(images)


def unknown(error: NoBoundsError, model: SpikingClassifier) -> NotImplementedError:
    """Of what there are no bounds, and where: in or behind the last module that was entered."""
    where = ""
    if error.where:
        kind = type(model.net.get_submodule(error.where)).__name__
        where = f" in or behind {error.where} ({kind})"
    return NotImplementedError(f"no bounds are known for {error}{where}; there are for {_COVERED}")


def bounded_neurons(model: SpikingClassifier) -> dict[str, Neuron]:
    """The network's spiking layers by name. 网络的脉冲层。

    Raises:
        NotImplementedError: If there are no bounds of one of them, or of the encoder; it is named.
    """
    neurons: dict[str, Neuron] = {}
    others: dict[str, str] = {}
    parts = list(model.net.modules())
    if any(map(is_neuron, parts)) or not has_steps(model.net):
        neurons, others, _ = find_neurons(model.net, offers_decay=True)
    unbounded: dict[str, str] = {}
    for name, reason in others.items():
        module = model.net.get_submodule(name)
        lif = as_lif(name, module)
        if lif is not None:
            neurons[name] = lif
        elif not stepped(module):
            why = no_bounds(module) or reason
            unbounded[name] = f"{name} ({type(module).__name__}): {why}"
    for name, n in neurons.items():
        fault = _why_unbounded(n)
        if fault is not None:
            unbounded[name] = f"{name}{fault}"
    if model.encoder is not None:
        unbounded = {"": f"the encoder {type(model.encoder).__name__}"} | unbounded
    if unbounded:
        raise NotImplementedError(
            f"no bounds are known for {next(iter(unbounded.values()))}; there are for {_COVERED}"
        )
    return neurons


def _why_unbounded(n: Neuron) -> str | None:
    """Why a neuron has no bounds, to follow its name in a sentence; None if it has some."""
    if not (n.known or n.stated):
        return f", a {n.type_name}, which fires in its own way"
    replaced = other_forwards(n.module)
    if replaced:
        return f", whose {replaced[0]} is not that of its class"
    if not n.spiking:
        return ", whose surrogate does not spike"
    if not n.charging().decay_value >= 0:
        return ", whose decay is negative: give it a tau of 1 or more"
    given = {"v_threshold": n.module.v_threshold, "v_reset": n.module.v_reset}
    for key, value in {**given, "initial potential": n.initial}.items():
        if value is None:
            continue
        if torch.as_tensor(value).numel() != 1 or not math.isfinite(value):
            return f", whose {key} is not one finite number"
    return None


_COVERED = (
    "direct encoding or given frames, convolution, linear, batch, layer and group norm, pooling, "
    "sums, products, ReLU and other monotone functions, softmax, and IF, LIF, PLIF, DLIF, I-LIF or "
    "PSN neurons that spike"
)
