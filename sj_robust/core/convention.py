"""How a network is called: with images, sequences or single time steps."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sj_robust.core.environment import device_of
from sj_robust.core.host import base, first_argument, is_neuron, step_mode
from sj_robust.core.preserved import Snapshot, from_reset, has_hooks, preserved, same

__all__ = [
    "TAKES",
    "Convention",
    "Takes",
    "checked_logits",
    "find_convention",
    "kept_state",
    "own_steps",
    "state_error",
    "step_mode_of",
]

Takes = Literal["images", "sequence", "steps"]
"""What a network is called with: images once, a sequence once, or one time step T times."""

TAKES: tuple[Takes, ...] = ("images", "sequence", "steps")

_SEED = 0
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Convention:
    """How a network is called and what it returns. 网络的输入输出约定。

    Attributes:
        takes: ``"images"`` [N, C, H, W], which it repeats over time itself; ``"sequence"`` [T, N,
            C, H, W]; or ``"steps"``, T times [N, C, H, W].
        returns: ``"logits"`` [N, classes], per call if it takes steps; or ``"sequence"`` [T, N,
            classes]. This is the output in evaluation mode without hooks, for display only.
        T: Number of time steps of a run.
        takes_sequences: Whether it also takes sequences [T, N, C, H, W] of one and of two steps.

    Examples:
        >>> print(Convention("images", "logits", T=4))
        takes images [N, C, H, W], runs T = 4 steps itself, returns [N, classes]
    """

    takes: Takes
    returns: Literal["logits", "sequence"]
    T: int
    takes_sequences: bool = False

    def __str__(self) -> str:
        """In one line."""
        given = {
            "images": f"takes images [N, C, H, W], runs T = {self.T} steps itself",
            "sequence": f"takes a sequence [T, N, C, H, W] of T = {self.T} steps",
            "steps": f"takes one step [N, C, H, W] at a time, T = {self.T} of them",
        }[self.takes]
        returned = "[T, N, classes]" if self.returns == "sequence" else "[N, classes]"
        return f"{given}, returns {returned}"


def find_convention(
    net: nn.Module,
    frames: Callable[[int, int], Tensor],
    T: int | None,
    *,
    takes: Sequence[Takes] = TAKES,
) -> Convention:
    """Find out how a network is called, by calling it on a few inputs.
    通过试运行判断网络的约定。

    The rule: without T, or with the T that it has as an attribute, it takes images and repeats
    them itself; else one step T times in step mode ``"s"``, or a sequence over which its forward
    loops, and a sequence in step mode ``"m"``, or images that it repeats T times. A few images show
    that its neurons run T steps then. The network is left as it was; hooks on it are not called,
    unless it fits in no way without them.

    Args:
        net: The network.
        frames: Called with a number of images N and one of steps T, gives frames [T, N, *] as the
            network gets them.
        T: Number of time steps; None if the network brings its own.
        takes: What the network may take; one alone is what it takes, whatever its neurons count.

    Raises:
        ValueError: If nothing fits, T is missing or not the network's own, or the network keeps a
            state that is not reset.
        Exception: What the network itself raises, where it runs in no reading.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3))
        >>> find_convention(net, lambda n, steps: torch.rand(steps, n, 1, 2, 2), 5).takes
        'sequence'
    """
    surely = len(takes) == 1
    for hooks in (False, True) if has_hooks(net) else (False,):
        trial = _Trial(net, frames, T, hooks=hooks)
        for reading in takes if surely else trial.order():
            if reading in takes and (found := trial.fits(reading, surely=surely)) is not None:
                return found
    raise trial.problem()


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


def state_error(model: nn.Module, names: Iterable[str]) -> ValueError:
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
        # Of the containers without a mode of their own, those for many steps are MultiStepModules.
        has_mode = isinstance(module, base.MultiStepModule) or hasattr(module, "step_mode")
        if isinstance(module, base.StepModule) and has_mode:
            return step_mode(module)
    return "m"


def own_steps(net: nn.Module) -> int | None:
    """Number of steps that a network keeps in its attribute ``T``; None if it keeps none."""
    T = vars(net).get("T")
    return T if isinstance(T, int) and not isinstance(T, bool) and T >= 1 else None


class _Trial:
    """Tries the ways in which a network may be called."""

    def __init__(
        self, net: nn.Module, frames: Callable[[int, int], Tensor], T: int | None, *, hooks: bool
    ) -> None:
        self.net = net
        self.frames = frames
        self.given = T
        self.T = own_steps(net) if T is None else T
        self.hooks = hooks
        self.device = device_of(net)
        self._telling: list[Exception] = []
        self._raised: list[Exception] = []

    def order(self) -> list[Takes]:
        """The ways to be tried: that of the step mode, and of images which it repeats itself."""
        known = any(isinstance(module, base.StepModule) for module in self.net.modules())
        multi_step = known and step_mode_of(self.net) == "m"
        # A forward of its own may loop over the steps of neurons that take one at a time.
        native: list[Takes] = ["sequence"] if multi_step else ["steps", "sequence"]
        if self.given is None:
            return ["images"]
        if own_steps(self.net) == self.given:
            return ["images", *native]
        return native if known and not multi_step else [*native, "images"]

    def fits(self, takes: Takes, *, surely: bool) -> Convention | None:
        """How the network is called, if it fits; ``surely`` if the caller says so."""
        images = 3 if self.T == 2 else 2  # no dimension is taken for another
        T: int | None = None
        try:
            run = self._run(takes, images)
            if takes == "images":
                more = self._run(takes, 4 if self.T == 3 else images + 1)
                T = self._steps_of_images(run, more, surely=surely)
            elif self.T is not None and self._fits_frames(takes, run, surely=surely):
                T = self.T
        except Exception as error:  # somebody else's code raises anything
            self._raised.append(error)
            return None
        if T is None:
            return None
        outputs = run.outputs if isinstance(run.outputs, list) else [run.outputs]
        for output in outputs:
            form = _form(output, images, None if takes == "steps" else T)
            if form is None:
                wrong = _wrong_outputs(output, images, T, " (on trial images)")
                self._telling.append(ValueError(wrong))
                return None
        kept = self.kept_in(takes, T)
        if kept is not None:
            raise kept
        found = Convention(takes, form or "logits", T)
        return replace(found, takes_sequences=self._takes_sequences(found, run))

    def _fits_frames(self, takes: Takes, run: "_Run", *, surely: bool) -> bool:
        """Whether the neurons ran T steps."""
        assert self.T is not None  # these are tried with a known number
        fits = run.lengths == [1] * self.T
        if takes == "sequence":
            fits = set(run.lengths) == {self.T} or sum(run.lengths) == self.T
        if surely or not run.lengths or fits:
            return True
        self._note_steps(sum(run.lengths) // (self.T if takes == "steps" else 1))
        return False

    def _steps_of_images(self, run: "_Run", more: "_Run", *, surely: bool) -> int | None:
        """Time steps of one call with images; None if they cannot be told, or are not T."""
        steps, own = sum(run.lengths), own_steps(self.net)
        if not run.lengths:
            of_outputs = 0
            if isinstance(run.outputs, Tensor) and run.outputs.ndim == 3:
                of_outputs = len(run.outputs)
            return of_outputs or self.T or max(run.layers, default=1)
        if steps != sum(more.lengths) or (steps == 1 and self.T != 1):
            return None  # images taken for time steps, or one step of several
        if surely or (own is not None and own == self.T and steps % own == 0):
            return self.T or steps
        if steps > 1 and max(run.lengths) == max(run.layers, default=1) == 1:
            return None  # a loop over a neuron, or several places of it
        if self.given not in (None, steps):
            self._note_steps(steps)
            return None
        return steps

    def _note_steps(self, steps: int) -> None:
        self._telling.append(
            ValueError(
                f"T must be the network's own or None: it runs {steps} steps itself, got "
                f"T={self.given}; omit T, or build the network for T={self.given}; if a neuron "
                "stands in several places, pass takes= to SpikingClassifier, one of "
                f"{', '.join(TAKES)}"
            )
        )

    def problem(self) -> Exception:
        """Why it fits in no way."""
        name = type(self.net).__name__
        if self._telling:
            return self._telling[0]
        if self.T is None:
            raised = [f"{type(error).__name__}: {error}" for error in self._raised]
            cause = f" (with images, it raises {raised[0]})" if raised else ""
            return ValueError(
                f"T must be given for a bare network ({name}), got None; it is the number of time "
                f"steps, such as T=4 (--T 4){cause}"
            )
        modes = [step_mode(module) for module in self.net.modules() if is_neuron(module)]
        if self._raised and not (step_mode_of(self.net) == "s" and "m" in modes):
            return self._raised[0]
        return ValueError(
            f"T must be the number of steps that the neurons of the network ({name}) run, got "
            f"{self.given}; put all layers into one step mode with functional.set_step_mode(net, "
            f"'m'), or pass takes= to SpikingClassifier, one of {', '.join(TAKES)}"
        )

    def _takes_sequences(self, found: Convention, run: "_Run") -> bool:
        """Whether sequences of T steps, and of one and of two, are inputs with the same logits."""
        if found.takes != "images":
            return found.takes == "sequence"
        images = 3 if self.T == 2 else 2
        try:
            whole = self._watched(lambda: self.net(self.frames(images, found.T)))
            for steps in (1, min(2, found.T)):
                self._watched(partial(self.net, self.frames(2, steps)))
            one = checked_logits(run.outputs, images, found.T)
            other = checked_logits(whole.outputs, images, found.T)
            alike = float((one - other).norm()) <= _ROUNDING * float(one.norm())
        except Exception:  # it takes none
            return False
        return alike and (not whole.lengths or set(whole.lengths) == {found.T})

    def kept_in(self, takes: Takes, T: int) -> ValueError | None:
        """The error that names a state which is not reset, if there is one."""
        with preserved(self.net, "all", hooks=self.hooks) as kept:
            names = _state_in(kept, self.net, lambda: self._call(takes, 2, T), self.device)
        return state_error(self.net, names) if names else None

    def _call(self, takes: Takes, images: int, T: int) -> object:
        frames = self.frames(images, 1 if takes == "images" else T)
        if takes == "images":
            return self.net(frames[0])
        return self.net(frames) if takes == "sequence" else [self.net(x) for x in frames]

    def _run(self, takes: Takes, images: int) -> "_Run":
        return self._watched(lambda: self._call(takes, images, self.T or 1))

    def _watched(self, call: Callable[[], object]) -> "_Run":
        neurons: dict[nn.Module, list[int]] = {}
        layers: Counter[nn.Module] = Counter()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            if not is_neuron(module):
                layers[module] += 1
            elif step_mode(module) == "m" and isinstance(x, Tensor) and x.ndim:
                neurons.setdefault(module, []).append(len(x))
            else:
                neurons.setdefault(module, []).append(1)

        with (
            preserved(self.net, "all", hooks=self.hooks),
            from_reset(self.net, _SEED, self.device),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            for module in self.net.modules():  # which have their own hooks alone afterwards
                if is_neuron(module) or any(True for _ in module.parameters(recurse=False)):
                    module.register_forward_pre_hook(note, with_kwargs=True)
            outputs = call()
        return _Run(outputs, min(neurons.values(), key=sum, default=[]), list(layers.values()))


@dataclass(frozen=True)
class _Run:
    """What a network did in a call.

    Attributes:
        outputs: What it returned; a list for T calls.
        lengths: Steps of every call of the neuron that ran fewest; empty if none is known.
        layers: Numbers of calls of layers with weights.
    """

    outputs: object
    lengths: list[int]
    layers: list[int]


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
