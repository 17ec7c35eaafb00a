"""Finds out by trial what a network takes and returns: images, sequences or single time steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sj_robust.core.environment import device_of
from sj_robust.core.host import base, first_argument, from_reset, is_neuron
from sj_robust.core.preserved import Snapshot, has_hooks, preserved, same

__all__ = [
    "TAKES",
    "Convention",
    "Takes",
    "checked_logits",
    "find_convention",
    "kept_state",
    "own_steps",
    "step_mode_of",
    "unreset",
]

Takes = Literal["images", "sequence", "steps"]
"""What a network is called with: images once, a sequence once, or one time step T times."""

TAKES: tuple[Takes, ...] = ("images", "sequence", "steps")

_SEED = 0
_ROUNDING = 1e-3  # of an image's logits, in float32; more in half precision
_SPIKES_AT_THE_THRESHOLD = 0.1  # of the logits of many images, if most of them differ by none
_MANY = 16


@dataclass(frozen=True)
class Convention:
    """How a network is called and what it returns. 网络的输入输出约定。

    Attributes:
        takes: ``"images"`` [N, C, H, W], which it repeats over time itself; ``"sequence"`` [T, N,
            C, H, W]; or ``"steps"``, T times [N, C, H, W].
        returns: ``"logits"`` [N, classes], per call if it takes steps; or ``"sequence"`` [T, N,
            classes]. This is the output in evaluation mode without hooks, for display only.
        T: Number of time steps of a run.
        resets_itself: Whether it resets its neurons in a run.
        takes_sequences: Whether it also takes sequences [T, N, C, H, W] of one and of two steps.

    Examples:
        >>> print(Convention("images", "logits", T=4))
        takes images [N, C, H, W], runs T = 4 steps itself, returns [N, classes]
    """

    takes: Takes
    returns: Literal["logits", "sequence"]
    T: int
    resets_itself: bool = False
    takes_sequences: bool = False

    def __str__(self) -> str:
        """In one line."""
        given = {
            "images": f"takes images [N, C, H, W], runs T = {self.T} steps itself",
            "sequence": f"takes a sequence [T, N, C, H, W] of T = {self.T} steps",
            "steps": f"takes one step [N, C, H, W] at a time, T = {self.T} of them",
        }[self.takes]
        returned = "[T, N, classes]" if self.returns == "sequence" else "[N, classes]"
        reset = ", resets itself" if self.resets_itself else ""
        return f"{given}, returns {returned}{reset}"


def find_convention(
    net: nn.Module,
    frames: Callable[[int, int], Tensor],
    T: int | None,
    *,
    takes: Sequence[Takes] = TAKES,
) -> Convention:
    """Find out how a network is called, by calling it on a few inputs.
    通过试运行判断网络的约定。

    A reading is told from another by the time steps that the network's neurons run in it: a call of
    a single-step neuron is one, that of a multi-step neuron on [T', N, *] is T'. Two batch sizes,
    both unlike T, tell the dimensions of the outputs apart. Where images and a sequence of them
    both fit, their logits must be the same except for rounding. As rounding moves a spike that is
    at the threshold, the logits of some images may differ by more, if those of one of 16 do not and
    the difference over all 16 is at most 10 %. The network is left as it was: modes, states,
    buffers, attributes and random generators; hooks on it are not called, unless no reading fits
    without them.

    Args:
        net: The network.
        frames: Called with a number of images N and one of steps T, gives frames [T, N, *] as the
            network gets them.
        T: Number of time steps; None if the network brings its own.
        takes: What the network may take.

    Raises:
        ValueError: If no reading fits, several fit and give different logits, T is missing or not
            the network's own, or the network keeps a state that is not reset.
        Exception: What the network itself raises, where it runs in no reading.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3))
        >>> find_convention(net, lambda n, steps: torch.rand(steps, n, 1, 2, 2), 5).takes
        'sequence'
    """
    trial = _Trial(net=net, frames=frames, T=T, takes=takes)
    found = trial.result()
    if not isinstance(found, Convention) and has_hooks(net):
        trial.hooks = True
        found = trial.result()
    if isinstance(found, Convention):
        return found
    raise found


def checked_logits(outputs: object, images: int, T: int | None = None) -> Tensor:
    """Logits [N, classes], the mean over time of a sequence [T, N, classes]; else ValueError.
    检查输出的形状与类型。

    The number of dimensions tells the two apart, whatever N, T and the number of classes are.

    Args:
        outputs: What a function of images returned.
        images: Number of images N.
        T: Number of time steps; None where the outputs must be logits.

    Examples:
        >>> checked_logits(torch.zeros(2, 3), 2).shape
        torch.Size([2, 3])
        >>> checked_logits(torch.zeros(4, 2, 3), 2, T=4).shape
        torch.Size([2, 3])
    """
    form = _form(outputs, images, T)
    if form is None:
        raise ValueError(_wrong_outputs(outputs, images, T))
    assert isinstance(outputs, Tensor)  # what _form has looked at
    return outputs.mean(0) if form == "sequence" else outputs


@torch.no_grad()
def kept_state(
    model: nn.Module,
    images: Tensor,
    *,
    run: Callable[[Tensor], object] | None = None,
    resets: bool = True,
) -> tuple[str, ...]:
    """What a model keeps from one call to the next, if that changes its logits; empty if not.
    网络中未被重置的状态。

    Both calls start from ``functional.reset_net`` and equal seeds, so that neither SpikingJelly's
    neurons nor random draws make a difference. The model is left as it was.

    Args:
        model: A network, a classifier or any module.
        images: What it takes.
        run: What calls it; None calls it with the images.
        resets: Whether it is reset before a call; False for a model that nobody resets.

    Returns:
        Names of the attributes that changed, such as ``("layer.v",)``; the model's class if none
        is seen to.

    Examples:
        >>> kept_state(nn.Linear(2, 2), torch.rand(3, 2))
        ()
    """
    call = model if run is None else run
    with preserved(model, "all") as kept:
        return _state_in(kept, model, lambda: call(images), images.device, resets=resets)


def unreset(model: nn.Module, names: Iterable[str]) -> ValueError:
    """The error of a model that keeps a state of these names. 状态未重置的错误。"""
    return ValueError(
        f"the network ({type(model).__name__}) keeps a state that functional.reset_net does not "
        f"reset ({', '.join(names)}), so its logits depend on earlier calls; give the module that "
        "holds it a method reset(), or derive it from SpikingJelly's base.MemoryModule and "
        "register the state with register_memory"
    )


def step_mode_of(net: nn.Module) -> str:
    """Step mode of the outermost step module; inner ones may differ (recurrent containers)."""
    for module in net.modules():
        # A container of SpikingJelly 2.x may be a step module without a mode of its own.
        if isinstance(module, base.StepModule) and hasattr(module, "step_mode"):
            return str(module.step_mode)
    return "m"


def own_steps(net: nn.Module) -> int | None:
    """Number of steps that a network keeps in its attribute ``T``; None if it keeps none."""
    T = vars(net).get("T")
    return T if isinstance(T, int) and not isinstance(T, bool) and T >= 1 else None


@dataclass(frozen=True)
class _Run:
    """A call, or T of them, from a reset.

    Attributes:
        outputs: What was returned; a list for T calls.
        error: What was raised instead.
        calls: Modules that ran, up to the error.
        steps: Time steps of the neuron that ran fewest; None if none was seen to run.
        lengths: Numbers of steps that single calls of multi-step neurons had, and numbers of calls
            of layers with weights.
        batches: Numbers of images that single calls of single-step neurons had.
        places: What T may be, if the neuron that ran fewest steps stands in several places.
        resets_itself: Whether a neuron was reset meanwhile.
    """

    outputs: object = None
    error: Exception | None = None
    calls: int = 0
    steps: int | None = None
    lengths: frozenset[int] = frozenset()
    batches: frozenset[int] = frozenset()
    places: frozenset[int] = frozenset()
    resets_itself: bool = False


@dataclass(frozen=True)
class _Fit:
    """A reading that fits, and the logits [N, classes] that it gave."""

    convention: Convention
    logits: Tensor


class _Trial:
    """Tries the readings of one network."""

    def __init__(
        self,
        net: nn.Module,
        frames: Callable[[int, int], Tensor],
        T: int | None,
        takes: Sequence[Takes],
    ) -> None:
        self.net = net
        self.frames = frames
        self.given = T
        self.takes = takes
        self.hooks = False
        self.device = device_of(net)
        self._start()

    def _start(self) -> None:
        self.T = own_steps(self.net) if self.given is None else self.given
        self._runs: dict[tuple[Takes, int, int | None], _Run] = {}
        self.returned: dict[Takes, str] = {}  # wrong outputs
        self.ran: dict[Takes, str] = {}  # wrong numbers of steps
        self.failed: dict[Takes, _Run] = {}

    def result(self) -> Convention | Exception:
        """The convention, or why there is none."""
        self._start()
        fits = self._fits()
        if not all(_are_alike(fits[0], other) for other in fits[1:]):
            fits = [fit for fit in fits if self._fits_many(fit.convention)]
        if not fits:
            return self._why_none_fits()
        chosen = fits[0].convention
        for other in fits[1:]:
            if not self._agree(fits[0], other):
                if not bool(fits[0].logits.isfinite().all()):
                    return ValueError(
                        f"the logits of the network ({self._name}) are not finite on trial "
                        "images, so its calls cannot be compared; look for weights that are NaN "
                        "or infinite, as after a training that diverged, or choose one with "
                        f"takes={chosen.takes!r} or takes={other.convention.takes!r}"
                    )
                return ValueError(
                    f"the network ({self._name}) can be called in two ways that give different "
                    f"logits: it {chosen}; or it {other.convention}; choose one with "
                    f"SpikingClassifier(net, T={self.T}, takes={chosen.takes!r}) or "
                    f"takes={other.convention.takes!r}"
                )
        kept = self._kept_in(chosen.takes)
        if kept is not None:
            return kept
        sequences = any(fit.convention.takes == "sequence" for fit in fits)
        if sequences and chosen.takes == "images":
            sequences = self._takes_steps(1) and self._takes_steps(min(2, chosen.T))
        return replace(chosen, takes_sequences=sequences)

    def _fits(self) -> list[_Fit]:
        """The readings that fit; that of images may tell the number of steps."""
        found: list[_Fit | None] = []
        if "images" in self.takes:
            images = self._images()
            found.append(images)
            if images is not None:
                self.T = images.convention.T
        if self.T is not None and "sequence" in self.takes:
            found.append(self._sequence(self.T))
        if self.T is not None and "steps" in self.takes:
            found.append(self._steps(self.T))
        return [fit for fit in found if fit is not None]

    def _agree(self, one: _Fit, other: _Fit) -> bool:
        """Whether two readings give the same logits, except for spikes at the threshold."""
        if _are_alike(one, other):
            return True
        a = self._logits_of_many(one.convention.takes)
        b = self._logits_of_many(other.convention.takes)
        if a.shape != b.shape:
            return False
        larger = torch.maximum(a.norm(), b.norm())
        difference = (a - b).norm() / larger
        spiking = (a != 0).any(dim=1)  # zeros are the same in any reading
        some_are_alike = bool((_alike(a, b) & spiking).any())
        return some_are_alike and float(difference) <= _SPIKES_AT_THE_THRESHOLD

    def _fits_many(self, convention: Convention) -> bool:
        """Whether a reading that fits a few images fits many as well: a slice along the wrong
        dimension may leave the few whole.
        """
        takes = convention.takes
        run = self._run(takes, _MANY)
        if run.error is not None:
            self.failed[takes] = run
            return False
        T = None if takes == "steps" else convention.T
        calls = run.outputs if isinstance(run.outputs, list) else [run.outputs]
        for outputs in calls:
            if _form(outputs, _MANY, T) is None:
                self._note_wrong(takes, outputs, _MANY, T)
                return False
        return True

    def _logits_of_many(self, takes: Takes) -> Tensor:
        return _mean(self._run(takes, _MANY).outputs)

    def _kept_in(self, takes: Takes) -> ValueError | None:
        """The error that names a state which is not reset, if there is one."""
        with preserved(self.net, "all", hooks=self.hooks) as kept:
            names = _state_in(kept, self.net, lambda: self._call(takes, 2), self.device)
        return unreset(self.net, names) if names else None

    @property
    def _may_differ(self) -> bool:
        """Whether there are several readings to be told apart."""
        return len(self.takes) > 1

    @property
    def _name(self) -> str:
        return type(self.net).__name__

    def _sizes(self) -> tuple[int, int]:
        """Two batch sizes unlike the number of steps, so that no dimension is taken for another."""
        if self.T == 2:
            return 3, 4
        return (2, 4) if self.T == 3 else (2, 3)

    def _call(self, takes: Takes, images: int) -> object:
        if takes == "images":
            return self.net(self.frames(images, 1)[0])
        assert self.T is not None  # these two are tried with a known number of steps
        sequence = self.frames(images, self.T)
        if takes == "sequence":
            return self.net(sequence)
        return [self.net(x) for x in sequence]

    def _run(self, takes: Takes, images: int) -> _Run:
        T = None if takes == "images" else self.T
        key = (takes, images, T)
        if key not in self._runs:
            self._runs[key] = self._watched(lambda: self._call(takes, images))
        return self._runs[key]

    def _watched(self, call: Callable[[], object]) -> _Run:
        with (
            preserved(self.net, "all", hooks=self.hooks),
            from_reset(self.net, _SEED, self.device),
            _Watch(self.net) as watch,
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                outputs = call()
            except Exception as error:  # somebody else's code raises anything
                return _Run(error=error, calls=watch.calls)
            return _Run(
                outputs=outputs,
                calls=watch.calls,
                steps=watch.steps(),
                lengths=watch.lengths(),
                batches=frozenset(watch.batches),
                places=watch.places(),
                resets_itself=watch.resets > 0,
            )

    def _images(self) -> _Fit | None:
        """The network brings the time steps itself."""
        sizes = self._sizes()
        one = self._run("images", sizes[0])
        two = self._run("images", sizes[1])
        for run in (one, two):
            if run.error is not None:
                self.failed["images"] = run
                return None
        if one.steps != two.steps:
            self.ran["images"] = f"its neurons treat the {sizes[0]} images as time steps"
            return None
        if one.steps == 1 and self.T != 1:
            return None  # one step of several
        steps = self._steps_of_a_call(one)
        if steps is None:
            return None
        form = _form(one.outputs, sizes[0], steps)
        if form is None:
            self._note_wrong("images", one.outputs, sizes[0], steps)
            return None
        if form != _form(two.outputs, sizes[1], steps):
            self._note_wrong("images", two.outputs, sizes[1], steps)
            return None
        if self.given not in (None, steps):
            self.ran["images"] = f"it runs {steps} steps itself, got T={self.given}"
            return None
        convention = Convention(
            takes="images", returns=form, T=steps, resets_itself=one.resets_itself
        )
        return _Fit(convention, _mean(one.outputs))

    def _steps_of_a_call(self, run: _Run) -> int | None:
        """Time steps of one call with images; None if that cannot be told."""
        if run.steps is None:
            if isinstance(run.outputs, Tensor) and run.outputs.ndim == 3:
                return len(run.outputs)
            if self._is_stateless() or not self._may_differ:
                return self.T or max(run.lengths, default=1)
            if self.T in run.lengths and self.T != 1:
                return self.T
            self.ran["images"] = "its steps cannot be counted, since its neurons are unknown"
            return None
        if run.steps == self.T or run.steps == 1:
            return run.steps
        if self.T in run.places and run.steps % (self.T or 1) == 0:
            return self.T  # a neuron that stands in several places
        if max(run.lengths, default=1) == 1:
            self.ran["images"] = (
                f"a neuron runs {run.steps} times in one call, for as many steps or places"
            )
            return None
        return run.steps

    def _sequence(self, T: int) -> _Fit | None:
        """The network takes all steps at once."""
        images = self._sizes()[0]
        run = self._run("sequence", images)
        if run.error is not None:
            self.failed["sequence"] = run
            return None
        if self._may_differ and run.steps is not None and run.steps % T:
            self.ran["sequence"] = f"its neurons run {run.steps} of {T} steps"
            return None
        if self._may_differ and run.batches == {T}:
            self.ran["sequence"] = f"its neurons treat the {T} steps as images"
            return None
        form = _form(run.outputs, images, T)
        if form is None:
            self._note_wrong("sequence", run.outputs, images, T)
            return None
        convention = Convention(
            takes="sequence", returns=form, T=T, resets_itself=run.resets_itself
        )
        return _Fit(convention, _mean(run.outputs))

    def _steps(self, T: int) -> _Fit | None:
        """The network takes one step at a time."""
        images = self._sizes()[0]
        once = self._run("images", images)
        if self._may_differ and once.steps not in (None, 1) and max(once.lengths, default=1) > 1:
            self.ran["steps"] = f"its neurons run {once.steps} steps in one call"
            return None
        run = self._run("steps", images)
        if run.error is not None:
            self.failed["steps"] = run
            return None
        assert isinstance(run.outputs, list)  # of one call each
        for outputs in run.outputs:
            if _form(outputs, images, None) != "logits":
                self._note_wrong("steps", outputs, images, None)
                return None
        convention = Convention(
            takes="steps", returns="logits", T=T, resets_itself=run.resets_itself
        )
        return _Fit(convention, _mean(run.outputs))

    def _note_wrong(self, takes: Takes, outputs: object, images: int, T: int | None) -> None:
        self.returned[takes] = _wrong_outputs(outputs, images, T, " (on trial images)")

    def _is_stateless(self) -> bool:
        """Whether a second call gives the same as the first."""
        frame = self.frames(2, 1)[0]
        run = self._watched(lambda: [self.net(frame), self.net(frame)])
        return isinstance(run.outputs, list) and same(*run.outputs)

    def _takes_steps(self, steps: int) -> bool:
        """Whether a sequence of so many steps is an input of the network."""
        return self._watched(lambda: self.net(self.frames(2, steps))).error is None

    def _why_none_fits(self) -> Exception:
        """What was returned, what was raised or what the neurons ran, in this order."""
        native: Takes = "steps" if step_mode_of(self.net) == "s" else "sequence"
        order: list[Takes] = sorted(self.takes, key=lambda takes: takes != native)
        for takes in order:
            if takes in self.returned:
                return ValueError(self.returned[takes])
        raised = [self.failed[takes] for takes in order if takes in self.failed]
        if own_steps(self.net) is not None:  # it may bring its time: what got furthest tells
            raised.sort(key=lambda run: -run.calls)
        if self.T is None:
            error = raised[0].error if raised else None
            cause = f" (with images, it raises {type(error).__name__}: {error})" if error else ""
            return ValueError(
                f"T must be given for a bare network ({self._name}), got None; it is the number "
                f"of time steps, such as T=4 (--T 4){cause}"
            )
        if self.given is not None and "got T=" in self.ran.get("images", ""):
            return ValueError(
                f"T must be the network's own or None: {self.ran['images']}; omit T, or "
                f"build the network for T={self.given}"
            )
        if native not in self.ran and raised and raised[0].error is not None:
            return raised[0].error
        if "images" in self.ran:
            kept = self._kept_in("images")
            if kept is not None:
                return kept
        ran = "; ".join(f"with takes={takes!r}, {problem}" for takes, problem in self.ran.items())
        return ValueError(
            f"it is not clear how the network ({self._name}) is called: {ran}; put all layers "
            "into one step mode with functional.set_step_mode(net, 'm'), or pass takes= to "
            f"SpikingClassifier, one of {', '.join(map(repr, TAKES))}"
        )


class _Watch:
    """Counts what runs in a network, by hooks of its own."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.calls = 0
        self._of_neurons: dict[nn.Module, list[int]] = {}
        self._of_layers: dict[nn.Module, int] = {}
        self._multi_step: set[int] = set()
        self.batches: set[int] = set()
        self.resets = 0
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for module in self.net.modules():
            if is_neuron(module):
                if isinstance(module, base.MemoryModule):
                    vars(module)["reset"] = partial(self._reset, module.reset)
                hook = module.register_forward_pre_hook(self._neuron, with_kwargs=True)
                self._handles.append(hook)
            elif any(True for _ in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_pre_hook(self._layer))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _neuron(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        multi_step = getattr(module, "step_mode", "m") == "m"
        length = 1
        x = first_argument(args, kwargs)
        if isinstance(x, Tensor) and x.ndim:
            if multi_step:
                length = len(x)
            else:
                self.batches.add(len(x))
        if multi_step:
            self._multi_step.add(length)
        self._of_neurons.setdefault(module, []).append(length)

    def _reset(self, reset: Callable[[], object]) -> None:
        self.resets += 1
        reset()

    def _layer(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls += 1
        self._of_layers[module] = self._of_layers.get(module, 0) + 1

    def steps(self) -> int | None:
        """See :class:`_Run`."""
        return min(map(sum, self._of_neurons.values()), default=None)

    def lengths(self) -> frozenset[int]:
        """See :class:`_Run`."""
        return frozenset(self._multi_step) | frozenset(self._of_layers.values())

    def places(self) -> frozenset[int]:
        """See :class:`_Run`.

        A multi-step neuron has calls of T steps; of the layers around a single-step one, some are
        called T times.
        """
        if not self._of_neurons:
            return frozenset()
        fewest = min(self._of_neurons, key=lambda node: sum(self._of_neurons[node]))
        if getattr(fewest, "step_mode", "m") == "m":
            return frozenset(self._of_neurons[fewest])
        return frozenset(self._of_layers.values()) - {1}


def _state_in(
    kept: Snapshot,
    net: nn.Module,
    call: Callable[[], object],
    device: torch.device,
    *,
    resets: bool = True,
) -> tuple[str, ...]:
    """What changed between two equal calls that gave unlike outputs; empty if they are alike."""
    outputs = []
    for _ in range(2):
        start = from_reset(net if resets else None, _SEED, device)
        with start, torch.inference_mode(False), torch.no_grad():
            outputs.append(call())
    if same(*outputs):
        return ()
    # Sums on a GPU may differ from run to run, which is no state.
    unseen = (type(net).__name__,) if device.type == "cpu" else ()
    return kept.changed() or unseen


def _form(outputs: object, images: int, T: int | None) -> Literal["logits", "sequence"] | None:
    """What outputs are; None if neither logits nor T times logits."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return None
    if outputs.ndim == 2 and len(outputs) == images:
        return "logits"
    if outputs.ndim == 3 and len(outputs) == T and outputs.shape[1] == images:
        return "sequence"
    return None


def _wrong_outputs(outputs: object, images: int, T: int | None, where: str = "") -> str:
    """What is wrong with the outputs of a network, and what to do."""
    wanted = "[N, classes]" if T is None else "[T, N, classes] or [N, classes]"
    steps = "" if T is None else f" and T = {T}"
    return (
        f"the network must return logits {wanted} with N = {images}{steps}{where}, got "
        f"{_shown(outputs)}; {_remedy(outputs, images)}"
    )


def _shown(outputs: object) -> str:
    """Outputs in a few words."""
    if isinstance(outputs, Tensor):
        kind = "tensor" if outputs.is_floating_point() else f"{outputs.dtype} tensor"
        return f"a {kind} {list(outputs.shape)}"
    if isinstance(outputs, dict):
        return f"a dict of {', '.join(map(repr, outputs))}"
    if isinstance(outputs, tuple | list):
        inner = ", ".join(_shown(value).removeprefix("a ") for value in outputs[:3])
        more = ", ..." if len(outputs) > 3 else ""
        return f"a {type(outputs).__name__} ({inner}{more})"
    return "None" if outputs is None else f"a {type(outputs).__name__}"


def _remedy(outputs: object, images: int) -> str:
    around = "wrap it in a module that returns only the logits,"
    if isinstance(outputs, dict):
        return f"{around} net(x)[{next(iter(outputs), 'logits')!r}]"
    if isinstance(outputs, list) and all(_form(x, images, None) == "logits" for x in outputs):
        return f"{around} torch.stack(net(x)).mean(0)"
    if isinstance(outputs, tuple | list):
        return f"{around} net(x)[0]"
    if isinstance(outputs, Tensor) and not outputs.is_floating_point():
        return "return floating-point logits, not classes or counts"
    if isinstance(outputs, Tensor) and outputs.ndim == 3 and len(outputs) == images:
        return f"{around} net(x).transpose(0, 1), with time first"
    if isinstance(outputs, Tensor) and outputs.ndim == 3 and outputs.shape[1] == images:
        return f"{around} net(x).mean(0), or give SpikingClassifier the T that it runs"
    return (
        "end it with a layer of spikingjelly.activation_based.layer, such as layer.Linear after "
        "layer.Flatten, in the network's own step mode"
    )


def _mean(outputs: object) -> Tensor:
    """The mean over time of outputs that have a form; those of single steps are a list."""
    stacked = torch.stack(outputs) if isinstance(outputs, list) else outputs
    assert isinstance(stacked, Tensor)  # _form has looked at it
    return stacked.mean(0) if stacked.ndim == 3 else stacked


def _are_alike(one: _Fit, other: _Fit) -> bool:
    """Whether two readings give the same logits except for rounding."""
    a, b = one.logits, other.logits
    return a.shape == b.shape and bool(_alike(a, b).all())


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Which images have the same logits except for rounding, [N]."""
    share = max(_ROUNDING, torch.finfo(a.dtype).eps ** 0.5)
    larger = torch.maximum(a.norm(dim=1), b.norm(dim=1))
    alike: Tensor = (a - b).norm(dim=1) <= share * larger
    return alike
