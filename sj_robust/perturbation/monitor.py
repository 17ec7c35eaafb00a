"""MPPDMonitor: perturbation of the membrane potential in every spiking layer, by hooks."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sj_robust.classifier import SpikingClassifier, as_classifier
from sj_robust.core.checks import (
    Channels,
    check_channels,
    check_choice,
    check_network,
    check_number_of_channels,
    check_steps,
    check_tensor,
    check_values,
)
from sj_robust.core.convention import kept_state, state_error
from sj_robust.core.host import functional
from sj_robust.core.preserved import RandomNumbers, Snapshot, evaluation_mode
from sj_robust.neuron.charging import NeuronKey, find_neurons, is_neuron, stated
from sj_robust.neuron.watching import register_watcher
from sj_robust.perturbation._recording import Layers, Recording, RunKind
from sj_robust.perturbation._statistics import Kept, LayerTotals, MPPDStatistics
from sj_robust.perturbation.dynamics import NORMS, Norm
from sj_robust.perturbation.pair import Indicator, LayerPair, NotFollowedError

__all__ = ["MPPDMonitor", "compare_potentials"]


def compare_potentials(
    net: nn.Module,
    x: Tensor,
    x_perturbed: Tensor,
    *,
    T: int | None = None,
    mean: Channels = None,
    std: Channels = None,
) -> MPPDStatistics:
    """How a perturbation changes the membrane potential of every spiking layer, in one call.
    一次调用比较膜电位扰动。

    Equation: as in :class:`MPPDMonitor`, which can also be used during training, follows neurons
    with other dynamics and keeps traces.

    Args:
        net: A bare network of SpikingJelly neurons in either step mode, or a ``SpikingClassifier``.
        x: Clean images [N, C, H, W], or features [N, F]; without ``T``, the input of the bare
            network itself, such as [T, N, C, H, W].
        x_perturbed: Perturbed inputs, such as those that an attack returns.
        T: Number of time steps for which every image is shown to a bare network.
        mean: Mean per channel that a bare network expects to be subtracted from images.
        std: Standard deviation per channel that it expects them to be divided by.

    Returns:
        :class:`LayerStats` by the layer's name in ``net`` (for a classifier, in its network), in
        order of execution. A warning is issued for a layer that never fires on the clean images,
        since no perturbation passes through it.

    Raises:
        ValueError: As :meth:`MPPDMonitor.compare`.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024).

    Examples:
        >>> from sj_robust.models import pretrained
        >>> x = torch.rand(5, 1, 8, 8)
        >>> compare_potentials(pretrained("digits/dlif-at-mppd"), x, (x + 0.1).clamp(max=1))[
        ...     "stages.0.node"
        ... ].ms_mppd.shape
        torch.Size([4])
    """
    check_network(net)
    check_tensor("x", x)
    check_tensor("x_perturbed", x_perturbed)
    T = check_steps(T)
    mean, std = check_channels("mean", mean), check_channels("std", std, positive=True)
    if T is not None:
        check_number_of_channels(x, mean=mean, std=std)
    watched, forward = as_watched(net, x, T, mean, std)
    with MPPDMonitor(watched) as monitor:
        stats = monitor.compare(x, x_perturbed, forward=forward)
    if stats.silent:
        warnings.warn(
            f"{', '.join(stats.silent)} never fired, so neither images nor perturbations pass "
            "through; check the weights, mean and std, or train the network",
            stacklevel=2,
        )
    return stats


def as_watched(
    net: nn.Module,
    x: Tensor,
    T: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[nn.Module, nn.Module | None]:
    """What a monitor hooks, and what runs it: the network itself if it gets its own inputs, else
    its classifier.
    """
    if T is None and mean is None and std is None and not isinstance(net, SpikingClassifier):
        return net, None
    model = as_classifier(net, T, mean=mean, std=std, images=x)
    return model.net if isinstance(model, SpikingClassifier) else net, model


class MPPDMonitor:
    """Measures how an input perturbation changes the membrane potential of every spiking layer.
    监测各层膜电位扰动。

    Equation, per layer, with the input currents ``x`` of the clean and ``x~`` of the perturbed
    run::

        eps[t] = decay * eps[t-1] + gain[t] * (x[t] - x~[t]),    MS-MPPD = mean(eps^2)

    and the full perturbation ``d[t] = v[t] - v~[t]``, which includes the reset. The monitor
    hooks only the neurons, so the layers between them do not matter. It follows IF, LIF, PLIF
    and DLIF, and any other ``BaseNode`` whose ``decay`` is given. Other neurons are listed in
    :attr:`unsupported` with the reason; one warning names them.

    There are two ways to use it:

    - ``monitor.compare(x, x_perturbed)`` runs the network twice and returns the statistics.
    - ``with monitor.clean(): ...`` and then ``with monitor.perturbed(): ...``, each holding one run
      of the network (one call, chunks, or T single steps), then :meth:`loss` or :meth:`statistics`.

    Statistics are sums over all pairs of runs since :meth:`clear_recorded_data`. Currents and
    spikes of the clean run are kept until the perturbed run has used them; where gradients are
    enabled, the currents stay for :meth:`loss` until the next pair, ``loss(retain=False)``,
    :meth:`clear_recorded_data` or :meth:`close`. A neuron that is called more than once per time
    step is followed call by call, just as its own state is. Calls outside both contexts are
    ignored, and the network's outputs and gradients are the same with and without the monitor.

    Like a SpikingJelly monitor, it has ``monitored_layers``, ``monitor[name]`` (a list: the
    :class:`LayerStats` so far, or with ``keep="trace"`` one :class:`LayerTrace` per pair),
    ``enable``, ``disable``, ``clear_recorded_data`` and ``remove_hooks``, and is a context manager
    that removes its hooks. Attach it before wrapping the network in DDP.

    Args:
        net: Network of SpikingJelly neurons in either step mode.
        layers: Layers to follow: ``"all"``, ``"last"`` (the spiking layer that is executed last;
            this needs the least memory) or names from :attr:`monitored_layers`.
        decay: Fraction of the potential kept per step, for neurons whose dynamics the monitor does
            not know, by module name or exact type. An entry declares that the neuron charges as ``h
            = decay * v + gain * x``, plus ``(1 - decay) * v_reset`` for a hard reset.
        gain: Input gain of the neurons in ``decay`` (with the same keys), 1 by default.
        input_gain: Whether a DLIF neuron's learnable gain is part of the perturbation in statistics
            and traces.
        keep: ``"statistics"`` keeps sums; ``"trace"`` also keeps the [T, N, *] tensors of every
            pair; ``"loss"`` measures nothing outside :meth:`compare`, which is cheapest and all
            that training needs.
        spikes: Whether the spikes of a pair are kept for :meth:`loss`, as its currents are; the
            indicators ``"tasad"`` and ``"std"`` need them.

    Attributes:
        unsupported: Neurons that cannot be followed, by module name, with the reason.

    Raises:
        ValueError: If the network has no neurons, or a name, type, decay or option is wrong.

    Source: Ding et al., "Robust Stable Spiking Neural Networks" (ICML 2024).

    Examples:
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(3, 2), neuron.LIFNode(tau=2.0, step_mode="m"))
        >>> x = torch.rand(4, 5, 3)
        >>> with MPPDMonitor(net) as monitor:
        ...     stats = monitor.compare(x, x + 0.1)
        >>> list(stats), stats["1"].ms_mppd.shape
        (['1'], torch.Size([4]))
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        layers: Layers = "all",
        decay: Mapping[NeuronKey, float] | None = None,
        gain: Mapping[NeuronKey, float] | None = None,
        input_gain: bool = True,
        keep: Literal["statistics", "trace", "loss"] = "statistics",
        spikes: bool = False,
    ) -> None:
        """Find the neurons and hook them; see the class."""
        self.hooks: list[RemovableHandle] = []
        check_choice("keep", keep, ("statistics", "trace", "loss"))
        with stated(net, decay, gain):
            neurons, self.unsupported, spiking = find_neurons(net, offers_decay=True)
        self.monitored_layers = list(neurons)
        self.records: list[Any] = []
        self.name_records_index: dict[str, list[int]] = {name: [] for name in neurons}
        self._enabled = True
        self._net = net
        self._found = _neurons_of(net)
        self._keep = keep
        self._totals: dict[str, LayerTotals] = {}
        self._warned_of_potential = False
        kept = Kept(input_gain, trace=keep == "trace", spikes=spikes, statistics=keep != "loss")
        self._numbers: list[RandomNumbers] = []
        self._recording = Recording(
            neurons=neurons, unsupported=self.unsupported, layers=layers, kept=kept
        )
        self.hooks += register_watcher(net, self._recording, (*neurons, *sorted(spiking)))
        if self.unsupported:
            count = len(self.unsupported)
            warnings.warn(
                f"MPPDMonitor does not follow {count} neuron(s): {self._reasons()}", stacklevel=2
            )

    def _reasons(self) -> str:
        """Why neurons cannot be followed, of the first five."""
        reasons = [f"{name!r}: {reason}" for name, reason in self.unsupported.items()]
        if len(reasons) > 5:
            reasons = [*reasons[:5], "and more in monitor.unsupported"]
        return "; ".join(reasons)

    @property
    def execution_order(self) -> tuple[str, ...]:
        """Names of the monitored layers in the order of their first call in the last run; empty
        before the first run.
        """
        return tuple(name for name in self._recording.order if name in self.name_records_index)

    def compare(
        self, x: Tensor, x_perturbed: Tensor, *, forward: Callable[[Tensor], object] | None = None
    ) -> MPPDStatistics:
        """Run the network on both inputs and return the statistics of this pair by layer, in order
        of execution.

        Both runs start from a reset network in evaluation mode without gradients, and draw the same
        random numbers; training modes are restored, and the network is reset. The pair also counts
        in :meth:`statistics`, even while the monitor is disabled.

        Args:
            x: Clean input of the network.
            x_perturbed: Perturbed input of the same shape.
            forward: Runs the network on one of the inputs; None calls ``net(x)``. A network in step
                mode ``"s"`` needs a function that loops over the steps, such as ``lambda x:
                [net(x_t) for x_t in x]``.

        Returns:
            :class:`LayerStats` by name.

        Raises:
            ValueError: If the inputs differ in shape or are not finite, if a network in step mode
                ``"s"``, or with some neurons in it, is called only once, or if it keeps a state
                that is not reset.
            RuntimeError: If the hooks were removed, a run is open, or no monitored layer ran.
        """
        check_values(self._net)
        if x.shape != x_perturbed.shape:
            raise ValueError(
                f"x and x_perturbed must have the same shape, got {tuple(x.shape)} and "
                f"{tuple(x_perturbed.shape)}; perturb the batch that the clean run gets"
            )
        bad = int((~torch.isfinite(x)).sum())
        bad += int((~torch.isfinite(x_perturbed)).sum())
        if bad:
            raise ValueError(
                f"x and x_perturbed must be finite, got {bad} NaN or infinite values; omit "
                "those samples"
            )
        if self._recording.run is not None:
            raise RuntimeError(
                f"compare() was called inside {self._recording.run}(): leave that context first"
            )
        run = self._net if forward is None else forward
        numbers = RandomNumbers(run, x.device)  # a classifier's encoder is outside net
        enabled = self.is_enable()
        kept = self._recording.kept
        before = Snapshot(self._net)
        try:
            self.enable()
            self._recording.kept = kept._replace(statistics=True)
            with evaluation_mode(self._net), torch.no_grad():
                functional.reset_net(self._net)
                with self.clean():
                    run(x)
                    if forward is None:
                        self._check_steps(x)
                functional.reset_net(self._net)
                with numbers.again(), self.perturbed():
                    run(x_perturbed)
                if before.changed() and (names := kept_state(self._net, x, run=run)):
                    raise state_error(self._net, names)
            return _stats_of(_totals_of(self._recording.pairs))
        finally:
            self._recording.kept = kept
            self._recording.forget()
            self._numbers = []
            functional.reset_net(self._net)
            if not enabled:
                self.disable()

    def clean(self) -> AbstractContextManager[None]:
        """Context of the clean run; a :meth:`perturbed` run has to follow."""
        return self._running("clean")

    def perturbed(self) -> AbstractContextManager[None]:
        """Context of the perturbed run that completes the pair begun by :meth:`clean`.

        Each forward of the network draws the numbers that it drew in the clean run, so that dropout
        is no perturbation; afterwards torch's generators go on from where it found them.
        """
        return self._running("perturbed")

    def loss(
        self,
        layers: Layers = "last",
        norm: Norm = "l2",
        input_gain: bool = False,
        *,
        indicator: Indicator = "mppd",
        retain: bool = True,
    ) -> Tensor:
        """MS-MPPD of the last pair of runs, or a distance between their spikes, for training.
        用于训练的可微损失。

        Equation: ``mean(d^2)`` (``"l2"``) or ``mean(|d|)`` (``"l1"``), averaged over the chosen
        layers so that its weight means the same for one layer and for many, where ``d`` is

        - ``"mppd"``: ``eps[t]``, the mean taken over time, batch and features;
        - ``"std"``: ``s[t] - s~[t]`` likewise; with both norms its value is the spike-train
          distance divided by T;
        - ``"tasad"``: ``mean_t s[t] - mean_t s~[t]``, the mean taken over batch and features; with
          ``"l1"``, this is the mean of TASAD.

        The clean run is treated as a constant: the gradient reaches the network through the
        perturbed run (its spikes through their surrogate) and through the decay and the gains that
        the neurons learn. If gradients were disabled during the perturbed run, the result has no
        graph.

        Args:
            layers: ``"last"`` for the spiking layer executed last, ``"all"``, or names.
            norm: ``"l2"`` or ``"l1"``.
            input_gain: Whether the learnable gain of DLIF neurons is part of ``eps``; the paper
                leaves it out. A fixed gain (the 1/tau of ``decay_input``) is always included.
            indicator: What is measured; the distances between spikes need a monitor with
                ``spikes=True``.
            retain: Whether the pair is kept for another call.

        Returns:
            A scalar tensor.

        Raises:
            ValueError: If a layer is unknown, was not followed or did not run, if ``norm`` or
                ``indicator`` is unknown, or if the indicator needs spikes and they were not kept.
            RuntimeError: If there is no complete pair, the last spiking layer cannot be followed,
                or a layer ran without gradients though the run had them when it began.
        """
        check_choice("norm", norm, NORMS)
        pairs = self._recording.chosen(layers)
        self._check_graph(pairs)
        values = [pair.loss(norm, input_gain=input_gain, indicator=indicator) for pair in pairs]
        value = torch.stack(values).mean()
        if not retain:
            self._recording.forget()
        return value

    def statistics(self) -> MPPDStatistics:
        """Statistics of every layer that ran, over all pairs since :meth:`clear_recorded_data`, by
        name.

        Raises:
            RuntimeError: If the monitor has ``keep="loss"`` and :meth:`compare` has not been
                called.
        """
        if self._keep == "loss" and not self._totals:
            raise RuntimeError(
                "a monitor with keep='loss' measures nothing but its loss: call compare(x, "
                "x_perturbed), or build it with keep='statistics'"
            )
        return _stats_of(self._totals)

    def __getitem__(self, i: int | str) -> Any:
        """Records of a layer by name, or one record by index, as every SpikingJelly monitor has
        them.

        Unless traces are kept, the records are the statistics so far, made again here.
        """
        if isinstance(i, str) and i not in self.name_records_index:
            raise KeyError(
                f"no monitored layer {i!r}; monitored are {', '.join(self.monitored_layers)}"
            )
        if self._keep != "trace":
            self._clear_records()
            for name, stats in self.statistics().items():
                self._record_of(name, stats)
        if isinstance(i, str):
            return [self.records[index] for index in self.name_records_index[i]]
        return self.records[i]

    def enable(self) -> None:
        """Record from now on."""
        self._enabled = True

    def disable(self) -> None:
        """Record nothing until :meth:`enable` is called."""
        self._enabled = False

    def is_enable(self) -> bool:
        """Whether the monitor records."""
        return self._enabled

    def clear_recorded_data(self) -> None:
        """Forget all statistics and traces, and the pair that :meth:`loss` would use."""
        self._clear_records()
        self._totals.clear()
        self._recording.forget()

    def remove_hooks(self) -> None:
        """Remove the hooks from the network permanently."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def close(self) -> None:
        """Disable the monitor, remove its hooks and release the last pair; statistics and traces
        stay.
        """
        self.disable()
        self.remove_hooks()
        self._recording.forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hooks, since they belong to the network; it watches nothing."""
        return self.__dict__ | {"hooks": [], "_numbers": []}

    def __del__(self) -> None:
        """Take the hooks off."""
        self.remove_hooks()

    def __enter__(self) -> Self:
        """The monitor itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the monitor."""
        self.close()

    def _check_steps(self, x: Tensor) -> None:
        """Raise ValueError if a network in step mode ``"s"`` was called once on ``x``: that is one
        time step, not a sequence; or if neurons in ``"s"`` took the time steps for samples.
        """
        if isinstance(self._net, SpikingClassifier):
            return  # a classifier calls the network once per step by itself
        pairs = self._recording.pairs
        single = [name for name, pair in pairs.items() if pair.neuron.module.step_mode == "s"]
        sizes = {pair.size for pair in pairs.values()}
        if 0 < len(single) < len(pairs) and len(sizes) > 1:
            raise ValueError(
                f"{', '.join(single)} in step mode 's' took other numbers of time steps and "
                "samples than the layers in 'm' of the same call; call "
                "functional.set_step_mode(net, 'm'), or pass forward=net if these layers are to "
                "run once"
            )
        if all(pair.took_one_step for pair in pairs.values()):
            raise ValueError(
                f"compare() called the network once on x of shape {tuple(x.shape)}, which is one "
                "time step in step mode 's'; pass forward=lambda x: [net(x_t) for x_t in x] with "
                "x [T, N, *], call functional.set_step_mode(net, 'm'), or give the monitor a "
                "SpikingClassifier (forward=net for one step)"
            )

    def _check_graph(self, pairs: Sequence[LayerPair]) -> None:
        """Raise RuntimeError if the loss would have no gradient where one is expected."""
        if not torch.is_grad_enabled():
            return
        names = [pair.neuron.name for pair in pairs]
        lost = [name for name in names if name in self._recording.without_graph]
        if lost and any(weight.requires_grad for weight in self._net.parameters()):
            raise RuntimeError(
                f"layer {lost[0]!r} ran without gradients inside a run that began with them, as "
                "reentrant activation checkpointing does, so its loss has no gradient; use "
                "checkpoint(..., use_reentrant=False). If that is intended, name the layers that "
                "have gradients, loss(['0', ...]), or, for the value alone, call loss() inside "
                "torch.no_grad()"
            )

    @contextmanager
    def _running(self, kind: RunKind) -> Iterator[None]:
        """Context of a run; a pair that it completes is added to the statistics."""
        if not self.hooks:
            raise RuntimeError(
                f"{kind}(): the monitor has no hooks: it was closed, or is a copy; build a new one "
                "with MPPDMonitor(net)"
            )
        if not self.is_enable():
            self._recording.forget()
            yield
            return
        if not self.monitored_layers:
            raise NotFollowedError(f"{kind}(): no neuron can be followed: {self._reasons()}")
        self._check_neurons(kind)
        with self._equal_numbers(kind), self._recording.running(kind):
            yield
        if self._recording.complete:
            try:
                self._take_pair(self._recording.pairs)
            except ValueError:
                self._recording.forget()
                raise

    @contextmanager
    def _equal_numbers(self, kind: RunKind) -> Iterator[None]:
        """Let each forward of the network in a perturbed run draw what that of the clean run drew;
        afterwards torch's generators go on from where it found them.
        """
        drawn: list[RandomNumbers] = self._numbers if kind == "perturbed" else []
        self._numbers = drawn if kind == "clean" else []
        following = iter(drawn)
        again = ExitStack()

        def before(net: nn.Module, args: tuple[Any, ...]) -> None:
            if kind == "clean":
                devices = [given.device for given in args if isinstance(given, Tensor)]
                drawn.append(RandomNumbers(net, devices[0] if devices else torch.device("cpu")))
                return
            numbers = next(following, None)
            if numbers is not None:
                again.enter_context(numbers.again())

        def after(net: nn.Module, args: object, outputs: object) -> None:
            again.close()

        with ExitStack() as hooks:
            hooks.callback(self._net.register_forward_pre_hook(before).remove)
            hooks.callback(self._net.register_forward_hook(after, always_call=True).remove)
            yield

    def _check_neurons(self, kind: RunKind) -> None:
        """Raise RuntimeError if the network has other neurons than when the monitor was built."""
        now = _neurons_of(self._net)
        before = self._found
        names = [name for name in now | before if now.get(name) is not before.get(name)]
        if names:
            raise RuntimeError(
                f"{kind}(): neurons were exchanged, added or removed since the monitor was "
                f"attached ({', '.join(sorted(names))}); build a new one with MPPDMonitor(net)"
            )

    def _take_pair(self, pairs: Mapping[str, LayerPair]) -> None:
        """Add a complete pair to the statistics: all of its layers, or none if one does not fit."""
        totals = _totals_of(pairs)
        wrong_potential = [name for name, one in totals.items() if not one.full_valid]
        for name in totals.keys() & self._totals.keys():
            self._totals[name].check_fits(totals[name])
        for name, pair_totals in totals.items():
            if name in self._totals:
                self._totals[name].add(pair_totals)
            else:
                self._totals[name] = pair_totals
        for name, pair in pairs.items():
            if pair.trace is not None:
                self._record_of(name, pair.trace)
                pair.trace = None
        if wrong_potential and not self._warned_of_potential:
            self._warned_of_potential = True
            warnings.warn(
                f"the potential of {', '.join(wrong_potential)} does not follow h = decay * v + "
                "gain * x with the decay given, so the full perturbation is omitted there",
                stacklevel=4,
            )

    def _clear_records(self) -> None:
        self.records.clear()
        for indices in self.name_records_index.values():
            indices.clear()

    def _record_of(self, name: str, value: object) -> None:
        self.name_records_index[name].append(len(self.records))
        self.records.append(value)


def _stats_of(totals: Mapping[str, LayerTotals]) -> MPPDStatistics:
    return MPPDStatistics({name: one.stats() for name, one in totals.items()})


def _neurons_of(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if is_neuron(module)}


def _totals_of(pairs: Mapping[str, LayerPair]) -> dict[str, LayerTotals]:
    return {name: pair.totals for name, pair in pairs.items() if pair.totals is not None}
