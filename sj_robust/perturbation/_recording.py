"""The current pair of runs: which neuron was called when, and what each followed layer makes of
it.
"""

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from sj_robust.core.checks import check_layers
from sj_robust.core.host import memories
from sj_robust.neuron.charging import Neuron
from sj_robust.neuron.watching import SpikingCall, Wants, keep_out_of_graphs
from sj_robust.perturbation._statistics import Kept
from sj_robust.perturbation.pair import LayerPair, NotFollowedError

__all__ = ["Layers", "Recording", "RunKind"]

Layers = Literal["last", "all"] | Sequence[str]
RunKind = Literal["clean", "perturbed"]
_SKIPPING_HOOKS = "a functional forward, or a compilation before the monitor was attached"


class Recording:
    """Collects one clean and one perturbed run of every followed layer; ``kept`` may be changed
    between pairs.
    """

    def __init__(
        self,
        neurons: Mapping[str, Neuron],
        unsupported: Mapping[str, str],
        layers: Layers,
        kept: Kept,
    ) -> None:
        self.run: RunKind | None = None
        self.order: list[str] = []
        self.pairs: dict[str, LayerPair] = {}
        self.complete = False
        self.without_graph: set[str] = set()  # layers that ran without gradients in a run with them
        self.kept = kept
        self._neurons = neurons
        self._unsupported = unsupported
        self._called: dict[str, None] = {}  # names in the order of their first call
        self._has_gradients = False  # of the present run, when it began
        self._before: dict[str, weakref.ref[Tensor] | None] = {}  # potentials before the run
        self._last: str | None = (
            None  # of the spiking layers, the one executed last, once a run has shown it
        )
        self._layers = self._checked(layers)

    @contextmanager
    def running(self, kind: RunKind) -> Iterator[None]:
        """Context of one run; whatever goes wrong inside, nothing of the pair stays."""
        keep_out_of_graphs()
        if self.run is not None:
            raise RuntimeError(
                f"{kind}() was entered inside {self.run}(): a run must end before the next begins"
            )
        if kind == "perturbed" and (not self.pairs or self.complete):
            raise RuntimeError(
                "perturbed() has no clean run to compare with: run the network inside clean() first"
            )
        if kind == "clean":
            self.forget()
        self.run = kind
        self._called = {}
        self._before = self._potentials()
        self._has_gradients = torch.is_grad_enabled()
        try:
            yield
            self._finish(kind)
        except BaseException:
            self.forget()
            raise
        finally:
            self.run = None
            self._called = {}
            self._before = {}

    def forget(self) -> None:
        self.pairs = {}
        self.complete = False
        self.without_graph = set()

    def chosen(self, layers: Layers) -> list[LayerPair]:
        """Layers of the complete pair."""
        if not self.complete:
            raise RuntimeError(
                "loss() needs two complete runs: run the network inside clean() and then "
                "perturbed(), with the monitor enabled"
            )
        layers = self._checked(layers)
        if layers == "all":
            return list(self.pairs.values())
        if layers == "last":
            self._check_last()
            assert self._last is not None  # the pair is complete
            layers = [self._last]
        for name in layers:
            if name not in self.pairs:
                raise ValueError(
                    f"layer {name!r} is not in the last pair of runs, which has "
                    f"{', '.join(self.pairs)}: it did not run, or the monitor's layers=... "
                    "leaves it out"
                )
        return [self.pairs[name] for name in layers]

    def wants(self, name: str) -> Wants:
        """What the present run looks at; at all neurons until one has shown which ``"last"`` is."""
        if self.run is None or not self._follows(name):
            return Wants.NOTHING
        return Wants.SPIKES if self.kept.statistics or self.kept.spikes else Wants.INPUT

    def called(self, call: SpikingCall) -> None:
        """A neuron was called in a run."""
        if self.run is None:
            return
        if getattr(call.node, "_is_replica", False):
            raise RuntimeError(
                "MPPDMonitor cannot follow the replicas of nn.DataParallel: "
                "use torch.nn.parallel.DistributedDataParallel"
            )
        name, perturbed = call.name, self.run == "perturbed"
        first_call = name not in self._called
        self._called[name] = None
        if call.input is None:
            return
        if first_call and not perturbed:
            if self._layers == "last":
                self.pairs.clear()
            if name in self._followed():
                self.pairs[name] = LayerPair(self._neurons[name], self.kept)
        if name in self.pairs:
            self._take(call, first_call)
        elif perturbed and self._layers != "last" and name in self._followed():
            raise ValueError(
                f"layer {name!r} ran in the perturbed run but not in the clean run: run the same "
                "network twice"
            )

    def _take(self, call: SpikingCall, first_call: bool) -> None:
        """Hand a call over to the pair of its layer."""
        pair, x, spikes = self.pairs[call.name], call.input, call.spikes
        assert x is not None  # see called
        pair.before(call, first_call=first_call, perturbed=self.run == "perturbed")
        if call.node.step_mode == "s":
            x = x.unsqueeze(0)
            spikes = None if spikes is None else spikes.unsqueeze(0)
        if self.run != "clean" and self._has_gradients and not torch.is_grad_enabled():
            self.without_graph.add(call.name)
        if self.run == "clean":
            pair.take_clean(x, spikes)
        else:
            pair.take_perturbed(x, spikes)

    def _finish(self, kind: RunKind) -> None:
        if kind == "clean":
            self._check_all_called(kind)
            self._find_order()
            if self._layers == "last":
                self._check_last()
            if not self.pairs:
                raise NotFollowedError(
                    f"no followed layer ran inside {kind}(): the network was not called there, "
                    f"or was called in a way that skips hooks ({_SKIPPING_HOOKS})"
                )
        else:
            for pair in self.pairs.values():
                pair.finish()
            self.complete = True

    def _potentials(self) -> dict[str, weakref.ref[Tensor] | None]:
        """Potentials of the layers that the present run looks at; None for a number."""
        found: dict[str, weakref.ref[Tensor] | None] = {}
        for name, neuron in self._neurons.items():
            if self.wants(name) > Wants.NOTHING:
                v = memories(neuron.module).get("v")
                found[name] = weakref.ref(v) if isinstance(v, Tensor) else None
        return found

    def _check_all_called(self, kind: RunKind) -> None:
        """Raise NotFollowedError if a layer ran, as its potential tells, and its hook did not."""
        for name, before in self._before.items():
            v = memories(self._neurons[name].module).get("v")
            is_other = before is None or before() is not v
            if name not in self._called and isinstance(v, Tensor) and is_other:
                raise NotFollowedError(
                    f"layer {name!r} ran inside {kind}(), but was called in a way that skips "
                    f"hooks ({_SKIPPING_HOOKS}), or its state was replaced: call the network "
                    "itself, attach the monitor before it is compiled, and convert the network "
                    "before the run"
                )

    def _find_order(self) -> None:
        """Order in which the neurons ran, and which of them was the last."""
        self.order = list(self._called)
        expected, self._last = self._last, next(reversed(self.order), None)
        if self._layers != "last" or expected is None or self._last not in self._neurons:
            return
        if self._last not in self.pairs:  # nothing but its call is known
            now, self._last = self._last, None
            raise RuntimeError(
                f"the spiking layer executed last was {expected!r} and is {now!r} now: name the "
                "layers"
            )

    def _checked(self, layers: Layers) -> Layers:
        names = check_layers(layers, "last", "all")
        if isinstance(names, str):
            return layers
        for name in names:
            if name in self._unsupported:
                raise ValueError(f"layer {name!r} cannot be followed: {self._unsupported[name]}")
            if name not in self._neurons:
                raise ValueError(
                    f"no monitored layer {name!r}; monitored are {', '.join(self._neurons)}"
                )
        return names

    def _follows(self, name: str) -> bool:
        if self._layers == "last":
            return self._last in (None, name)
        return name in self._followed()

    def _followed(self) -> Collection[str]:
        return self._neurons if isinstance(self._layers, str) else self._layers

    def _check_last(self) -> None:
        if self._last is not None and self._last in self._unsupported:
            reason = self._unsupported[self._last]
            raise NotFollowedError(
                f"the last spiking layer {self._last!r} cannot be followed ({reason}): name the "
                "layers"
            )
