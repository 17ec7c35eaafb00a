"""The current pair of runs: which neuron was called when, and what each followed layer makes of
it.
"""

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sj_robust.neuron.charging import Neuron
from sj_robust.perturbation._statistics import Kept
from sj_robust.perturbation.pair import LayerPair

__all__ = ["Layers", "NeuronHook", "Recording", "RunKind"]

Layers = Literal["last", "all"] | Sequence[str]
RunKind = Literal["clean", "perturbed", "paired"]


class Recording:
    """Collects one clean and one perturbed run of every followed layer; ``kept`` may be changed
    between pairs.
    """

    def __init__(
        self,
        neurons: Mapping[str, Neuron],
        unsupported: Mapping[str, str],
        spiking: Mapping[str, nn.Module],
        layers: Layers,
        kept: Kept,
    ) -> None:
        self.run: RunKind | None = None
        self.order: list[str] = []
        self.pairs: dict[str, LayerPair] = {}
        self.complete = False
        self.kept = kept
        self._neurons = neurons
        self._unsupported = unsupported
        self._spiking = spiking
        self._called: dict[
            str, int
        ] = {}  # by name in the order of their first call: when they were called last
        self._last: str | None = (
            None  # of the spiking layers, the one executed last, once a run has shown it
        )
        self._layers = self._checked(layers)

    @contextmanager
    def running(self, kind: RunKind) -> Iterator[None]:
        """Context of one run; whatever goes wrong inside, nothing of the pair stays."""
        if "torch._dynamo" in sys.modules:  # whoever compiles has loaded it
            _keep_out_of_graphs()
        if self.run is not None:
            raise RuntimeError(
                f"{kind}() was entered inside {self.run}(): a run must end before the next begins"
            )
        if kind == "perturbed" and (not self.pairs or self.complete):
            raise RuntimeError(
                "perturbed() has no clean run to compare with: run the network inside clean() first"
            )
        if kind != "perturbed":
            self.forget()
        self.run = kind
        self._called, self._began = {}, time.perf_counter_ns()
        try:
            yield
            self._finish(kind)
        except BaseException:
            self.forget()
            raise
        finally:
            self.run = None
            self._called = {}

    def forget(self) -> None:
        self.pairs = {}
        self.complete = False

    def chosen(self, layers: Layers) -> list[LayerPair]:
        """Layers of the complete pair."""
        if not self.complete:
            raise RuntimeError(
                "loss() needs two complete runs: run the network inside clean() and then "
                "perturbed(), or over the concatenated batch inside paired(), with the monitor "
                "enabled"
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

    def follows(self, name: str) -> bool:
        """Whether the present run looks at a neuron; at all of them until one has shown which
        ``"last"`` is.
        """
        if self.run is None:
            return False
        return self._last in (None, name) if self._layers == "last" else name in self._followed()

    def before_call(self, name: str) -> None:
        perturbed = self.run == "perturbed"
        first_call = name not in self._called
        self._called[name] = time.perf_counter_ns()
        if first_call and not perturbed:
            if self._layers == "last":
                self.pairs.clear()
            if name in self._followed():
                self.pairs[name] = LayerPair(
                    self._neurons[name], self.kept, paired=self.run == "paired"
                )
        if name in self.pairs:
            self.pairs[name].before(first_call, perturbed)
        elif perturbed and self._layers != "last" and name in self._followed():
            raise ValueError(
                f"layer {name!r} ran in the perturbed run but not in the clean run: run the same "
                "network twice"
            )

    def after_call(self, name: str, x: Tensor, output: Tensor) -> None:
        """A neuron was called on the current ``x`` and returned ``output``."""
        if name not in self.pairs:
            return
        if self._neurons[name].module.step_mode == "s":
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        pair = self.pairs[name]
        if self.run == "clean":
            pair.take_clean(x, output)
        elif self.run == "perturbed":
            pair.take_perturbed(x, output)
        else:
            pair.take_paired(x, output)

    def _finish(self, kind: RunKind) -> None:
        if kind != "perturbed":
            self._find_order()
            if self._layers == "last":
                self._check_last()
            if not self.pairs:
                raise RuntimeError(
                    f"no followed layer ran inside {kind}(): the network was not called there, "
                    "or in a way that skips hooks (a functional forward, or a compilation before "
                    "the monitor was attached)"
                )
        if kind != "clean":
            for pair in self.pairs.values():
                pair.finish()
            self.complete = True

    def _find_order(self) -> None:
        """Order in which the neurons ran; those that the hooks did not see may tell themselves when
        that was.
        """
        unseen = {name: getattr(module, "last_call", 0) for name, module in self._spiking.items()}
        unseen = {
            name: at for name, at in unseen.items() if at > self._began and name not in self._called
        }
        self.order = list(self._called)
        if unseen:
            called = self._called | unseen
            self.order = sorted(called, key=called.__getitem__)
        expected, self._last = (
            self._last,
            next(reversed(self._called if self._layers == "last" else self.order), None),
        )
        if self._layers == "last" and expected is not None and self.order[-1] in unseen:
            self._last = None
            raise RuntimeError(
                f"the spiking layer executed last was {expected!r} and is {self.order[-1]!r} "
                "now: name the layers"
            )

    def _checked(self, layers: Layers) -> Layers:
        if isinstance(layers, str):
            if layers not in ("last", "all"):
                raise ValueError(
                    f"layers must be 'last', 'all' or a list of names, got {layers!r}; for one "
                    f"layer pass [{layers!r}]"
                )
            return layers
        names = tuple(layers)
        if not names:
            raise ValueError("layers must name at least one layer, got an empty list")
        for name in names:
            if name in self._unsupported:
                raise ValueError(f"layer {name!r} cannot be followed: {self._unsupported[name]}")
            if name not in self._neurons:
                raise ValueError(
                    f"no monitored layer {name!r}; monitored are {', '.join(self._neurons)}"
                )
        return names

    def _followed(self) -> Collection[str]:
        return self._neurons if isinstance(self._layers, str) else self._layers

    def _check_last(self) -> None:
        if self._last is not None and self._last in self._unsupported:
            reason = self._unsupported[self._last]
            raise RuntimeError(
                f"the last spiking layer {self._last!r} cannot be followed ({reason}): name the "
                "layers"
            )


@cache
def _keep_out_of_graphs() -> None:
    """Hooks beside compiled code run as they are; saying so loads the compiler, which takes as long
    as torch itself.
    """
    for name in ("before_call", "after_call"):
        # torch leaves it untyped
        disabled = torch.compiler.disable(getattr(Recording, name))  # type: ignore[no-untyped-call]
        setattr(Recording, name, disabled)


class NeuronHook:
    """Hooks of one neuron; in a copy of the network they do nothing."""

    def __init__(self, recording: Recording | None, name: str) -> None:
        self._recording = recording
        self._name = name

    def __reduce__(self) -> tuple[type["NeuronHook"], tuple[None, str]]:
        return NeuronHook, (None, self._name)

    @property
    def active(self) -> bool:
        """Whether the hooks look at the neuron at present; if not, it may run as if it had none."""
        return self._recording is not None and self._recording.follows(self._name)

    @property
    def needs_output(self) -> bool:
        """Whether they look at the neuron's spikes; if not, those may be pooled before any hook
        sees them.
        """
        return self._recording is not None and (
            self._recording.kept.statistics or self._recording.kept.spikes
        )

    def before(self, module: nn.Module, args: Any) -> None:
        if self._recording is None or self._recording.run is None:
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "MPPDMonitor cannot follow the replicas of nn.DataParallel: "
                "use torch.nn.parallel.DistributedDataParallel"
            )
        self._recording.before_call(self._name)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._recording is not None and self._recording.run is not None:
            self._recording.after_call(
                self._name, args[0] if args else next(iter(kwargs.values())), output
            )
