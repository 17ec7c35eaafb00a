"""The current pair of runs: which neuron was called when, and what each followed layer makes of it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sj_robust.neuron.charging import Neuron
from sj_robust.perturbation.pair import LayerPair

__all__ = ["Layers", "NeuronHook", "Recording", "RunKind"]

Layers = Literal["last", "all"] | Sequence[str]
RunKind = Literal["clean", "perturbed", "paired"]


class Recording:
    """Collects one clean and one perturbed run of every followed layer.

    Args:
        neurons: Neurons that can be followed, by name.
        unsupported: Reasons by name of those that cannot.
        layers: Layers to follow: ``"all"``, ``"last"`` or names.
        input_gain: Whether the perturbation of a trace contains the learnable gain.
        trace: Whether full traces are kept.
        spikes: Whether the spikes are kept for a loss on them.
        statistics: Whether anything is measured beside the loss; may be changed between runs.
    """

    def __init__(
        self,
        neurons: Mapping[str, Neuron],
        unsupported: Mapping[str, str],
        layers: Layers,
        *,
        input_gain: bool,
        trace: bool,
        spikes: bool,
        statistics: bool,
    ) -> None:
        _keep_out_of_graphs()
        self.run: RunKind | None = None
        self.order: list[str] = []
        self.pairs: dict[str, LayerPair] = {}
        self.complete = False
        self.statistics = statistics
        self._neurons = neurons
        self._unsupported = unsupported
        self._options = {"input_gain": input_gain, "trace": trace, "spikes": spikes}
        self._called: list[str] = []
        self._unseen: set[str] = set()
        self._layers = self._checked(layers)

    @contextmanager
    def running(self, kind: RunKind) -> Iterator[None]:
        """Context of one run; whatever goes wrong inside, nothing of the pair stays."""
        if self.run is not None:
            raise RuntimeError(f"{kind}() was entered inside {self.run}(): a run must end before the next begins")
        if kind == "perturbed" and (not self.pairs or self.complete):
            raise RuntimeError("perturbed() has no clean run to compare with: run the network inside clean() first")
        if kind != "perturbed":
            self.forget()
        self.run = kind
        self._called, self._unseen = [], set()
        try:
            yield
            self._finish(kind)
        except BaseException:
            self.forget()
            raise
        finally:
            self.run = None
            self._called, self._unseen = [], set()

    def forget(self) -> None:
        """Let go of the pair."""
        self.pairs = {}
        self.complete = False

    def chosen(self, layers: Layers) -> list[LayerPair]:
        """Layers of the complete pair."""
        if not self.complete:
            raise RuntimeError(
                "loss() needs two complete runs: run the network inside clean() and then perturbed(), or over the "
                "concatenated batch inside paired(), with the monitor enabled"
            )
        layers = self._checked(layers)
        if layers == "all":
            return list(self.pairs.values())
        if layers == "last":
            self._check_last()
            layers = self.order[-1:]
        for name in layers:
            if name not in self.pairs:
                raise ValueError(
                    f"layer {name!r} is not in the last pair of runs, which has {', '.join(self.pairs)}: "
                    "it did not run, or the monitor's layers=... leaves it out"
                )
        return [self.pairs[name] for name in layers]

    def needs(self, name: str) -> bool:
        """Whether the next call of a neuron has to pass through the hooks.

        Of ``layers="last"`` any may be the one until a first run has shown which is.
        """
        if self.run is None:
            return False
        if self._layers == "last":
            return not self.order or name == self.order[-1]
        return name in self._followed()

    def unseen_call(self, name: str) -> None:
        """A neuron that is not needed was called in a way that the hooks do not see."""
        if self.run is not None and name not in self._called:
            self._called.append(name)
            self._unseen.add(name)

    def before_call(self, name: str) -> None:
        """A neuron is about to be called."""
        perturbed = self.run == "perturbed"
        first_call = name not in self._called
        if first_call:
            self._called.append(name)
            if not perturbed:
                self._begin(name)
        if name in self.pairs:
            self.pairs[name].before(first_call, perturbed)
        elif perturbed and self._layers != "last" and name in self._followed():
            raise ValueError(
                f"layer {name!r} ran in the perturbed run but not in the clean run: run the same network twice"
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

    def _begin(self, name: str) -> None:
        if self._layers == "last":
            self.pairs.clear()
        if name in self._followed():
            self.pairs[name] = LayerPair(
                self._neurons[name], paired=self.run == "paired", statistics=self.statistics, **self._options
            )

    def _finish(self, kind: RunKind) -> None:
        if kind != "perturbed":
            expected, self.order = self.order[-1:], self._called
            if self._layers == "last":
                self._check_last()
                if self.order and self.order[-1] in self._unseen:
                    last, self.order = self.order[-1], []
                    raise RuntimeError(
                        f"the spiking layer executed last was {expected[0]!r} and is {last!r} now: name the layers"
                    )
            if not self.pairs:
                raise RuntimeError(
                    f"no followed layer ran inside {kind}(): the network was not called there, or in a way that skips "
                    "hooks (a functional forward, or a compilation before the monitor was attached)"
                )
        if kind != "clean":
            for pair in self.pairs.values():
                pair.finish()
            self.complete = True

    def _checked(self, layers: Layers) -> Layers:
        if isinstance(layers, str):
            if layers not in ("last", "all"):
                raise ValueError(
                    f"layers must be 'last', 'all' or a list of names, got {layers!r}; for one layer pass [{layers!r}]"
                )
            return layers
        names = tuple(layers)
        if not names:
            raise ValueError("layers must name at least one layer, got an empty list")
        for name in names:
            if name in self._unsupported:
                raise ValueError(f"layer {name!r} cannot be followed: {self._unsupported[name]}")
            if name not in self._neurons:
                raise ValueError(f"no monitored layer {name!r}; monitored are {', '.join(self._neurons)}")
        return names

    def _followed(self) -> Collection[str]:
        return self._neurons if isinstance(self._layers, str) else self._layers

    def _check_last(self) -> None:
        for name in self.order[-1:]:
            if name in self._unsupported:
                reason = self._unsupported[name]
                raise RuntimeError(f"the last spiking layer {name!r} cannot be followed ({reason}): name the layers")


@cache
def _keep_out_of_graphs() -> None:
    """Hooks beside compiled code run as they are; said here, not at import, since torch loads its compiler for it."""
    for name in ("before_call", "after_call"):
        disabled = torch.compiler.disable(getattr(Recording, name))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        setattr(Recording, name, disabled)


class NeuronHook:
    """Hooks of one neuron; in a copy of the network they do nothing.

    Fused layers ask :meth:`needs_call` whether they may run the neuron without calling it, and then tell
    :meth:`unseen_call` that they did.
    """

    def __init__(self, recording: Recording | None, name: str) -> None:
        self._recording = recording
        self._name = name

    def __reduce__(self) -> tuple[type["NeuronHook"], tuple[None, str]]:
        return NeuronHook, (None, self._name)

    def needs_call(self) -> bool:
        """Whether the hooks must see the next call."""
        return self._recording is not None and self._recording.needs(self._name)

    def unseen_call(self) -> None:
        """The neuron ran without a call that the hooks could see."""
        if self._recording is not None:
            self._recording.unseen_call(self._name)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        if self._recording is None or self._recording.run is None:
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "MPPDMonitor cannot follow the replicas of nn.DataParallel: "
                "use torch.nn.parallel.DistributedDataParallel"
            )
        self._recording.before_call(self._name)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook."""
        if self._recording is not None and self._recording.run is not None:
            self._recording.after_call(self._name, args[0] if args else next(iter(kwargs.values())), output)
