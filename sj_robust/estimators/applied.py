"""The context in which an estimator is active, and what it changes in every neuron."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sj_robust.core.host import (
    EVAL_MODE_HAS_NO_GRADIENT,
    check_hooks_run,
    potential_at_reset,
    runs_on_torch,
    step_mode,
)
from sj_robust.core.preserved import from_reset, preserved, uncompiled
from sj_robust.estimators import backward
from sj_robust.estimators.crafting import crafting_network
from sj_robust.estimators.dynamics import Sequence, next_charging, spiking_neurons
from sj_robust.estimators.memory import ImageTracker, Rotation, Sharpness, Spread
from sj_robust.estimators.naming import EstimatorName
from sj_robust.estimators.shapes import (
    SHAPES,
    KeepingValues,
    derivative_of,
    has_compiled_kernel,
    host_surrogate,
)
from sj_robust.neuron import DLIFNode
from sj_robust.neuron.charging import has_known_dynamics

__all__ = ["Applied", "Estimator", "estimator"]

Backward = Callable[[Sequence, int], backward.Outputs]
_MARK = "_gradient_estimator"
_WHOLE_SEQUENCE = ("bptr", "rga", "hart", "hart_mixed")
_IN_THRESHOLDS = ("triangle", "rectangle", "hart", "hart_mixed")
"""Their number is a width in units of the threshold."""
_MIXED = (
    EstimatorName("triangle", 0.5),
    EstimatorName("atan", 4.0),
    EstimatorName("sigmoid", 4.0),
    EstimatorName("rectangle", 1.0),
    EstimatorName("exponential", 2.0),
)
"""What ``mixed`` takes in its forwards, one after the other."""
_TRIED_STEPS = 4
_TRIED_ELEMENTS = 64


class Estimator(EstimatorName):
    """A gradient estimator; call it on a network for a context in which the network has this
    backward pass.

    梯度估计器：仅替换脉冲神经元的反向传播，前向保持逐位一致。

    Equation: see the table of :mod:`sj_robust.estimators`.

    Args:
        family: First part of the name, such as ``"atan"``.
        number: Width or sharpness: half width in units of the threshold for ``triangle``,
            ``rectangle``, ``hart`` and ``hart_mixed``; alpha for ``atan``, ``sigmoid`` and
            ``exponential``; for ``assg`` the share of the surrogate's area kept around ``|z|``, in
            (0, 1); None for the others.
        shape: Shape of ``assg``, None for all others.
        detach_reset: Whether the reset is detached from the gradient.

    Raises:
        ValueError: If the family is unknown or the other arguments do not fit it.

    Source: straight-through: Bengio et al. (2013); BPTR: Ding et al., "SNN-RAT" (NeurIPS 2022);
        CBA: Sharmin et al. (ECCV 2020); RGA: Bu et al., "Rate Gradient Approximation Attack" (CVPR
        2023); HART: Hao et al. (ICLR 2024); PDSG: Lun et al. (CVPR 2025); ASSG: Wang et al. (arXiv
        2512.22522); mixed: the idea of MDSE in "Attacking the Spike" (arXiv 2209.03358), whose
        attack learns the weight of each surrogate, while here they alternate.

    Examples:
        >>> from sj_robust.neuron import DLIFNode
        >>> net = nn.Sequential(nn.Linear(3, 2), DLIFNode(T=4))
        >>> with Estimator("atan", 4.0)(net) as crafting:
        ...     crafting is net, net[1].surrogate_function.alpha
        (True, 4.0)
        >>> type(net[1].surrogate_function).__name__
        'PiecewiseQuadratic'
    """

    def __call__(self, model: nn.Module | Callable[[Tensor], Tensor]) -> "Applied":
        """Context whose value has this backward pass: ``model`` itself, for ``cba`` a network
        around it.

        ``Applied.moved`` tells which neurons compute their backward pass elsewhere.

        Args:
            model: A network with SpikingJelly neurons, bare or inside a ``SpikingClassifier``; for
                ``training`` any callable.

        Raises:
            TypeError: On entry, if ``model`` is not a module.
            ValueError: On entry, if there is no spiking neuron, or one that this estimator does not
                work for, such as those that SpikingJelly's ``memopt`` runs.
            RuntimeError: On entry, if an estimator is already active.
        """
        return Applied(self, model)

    def __repr__(self) -> str:
        return f"estimator({self.name!r})"


def estimator(name: str) -> Estimator:
    """The estimator with a name such as ``"atan:4"``, ``"assg:triangle"`` or ``"training+detach"``.

    Equation: see the table of :mod:`sj_robust.estimators`.

    Args:
        name: The family, then its parameters after colons (a number; for ``assg`` a shape and a
            number), optionally followed by ``+detach``. Omitted parameters have their defaults.

    Raises:
        TypeError: If ``name`` is not text.
        ValueError: If it is not the name of an estimator.

    Source: see :class:`Estimator`.

    Examples:
        >>> estimator("atan:4"), estimator("assg:sigmoid:0.9+detach").name
        (estimator('atan:4'), 'assg:sigmoid:0.9+detach')
    """
    return Estimator.parse(name)


class Applied(AbstractContextManager[Callable[[Tensor], Tensor]]):
    """The context in which an estimator is active on a network; its value is the network, or for
    ``cba`` one around it with its values.

    Use one context per batch of images: the memory of ``assg`` is cleared on every entry. A copy of
    the network that is made inside does not have the estimator. A compiled network runs uncompiled
    inside, unless the estimator is ``training``.

    Attributes:
        moved: Neurons whose backward pass no longer runs on their own backend, by name, with the
            new backend; the forward pass stays on its backend.

    Examples:
        >>> from sj_robust.estimators import estimator
        >>> applied = estimator("rectangle:1")(nn.Sequential(nn.Linear(3, 2), DLIFNode(T=4)))
        >>> with applied as crafting:
        ...     applied.moved
        {'1': 'torch'}
    """

    def __init__(
        self, estimator: EstimatorName, model: nn.Module | Callable[[Tensor], Tensor]
    ) -> None:
        """Nothing happens before the context is entered."""
        self.estimator = estimator
        self.moved: dict[str, str] = {}
        self._model = model
        self._stack: ExitStack | None = None

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        """Change the neurons, all or none."""
        if self._stack is not None:
            raise RuntimeError(
                f"this context of {self.estimator.name} is already entered; create a new one"
            )
        model = self._model
        estimator = self.estimator
        changes_nothing = estimator.family == "training" and not estimator.detach_reset
        if changes_nothing and not isinstance(model, nn.Module):
            self._stack = ExitStack()
            return model
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{estimator.name} needs a network (nn.Module), got {type(model).__name__}"
            )
        neurons = spiking_neurons(model)
        _check(estimator, model, neurons)
        with ExitStack() as stack:
            value: nn.Module = model
            if estimator.family == "cba":
                stack.enter_context(uncompiled(model))
                value = crafting_network(model, neurons.values())
            elif not changes_nothing:
                self._change(model, neurons, stack)
            self._stack = stack.pop_all()
        return value

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put everything back."""
        if self._stack is not None:
            stack = self._stack
            self._stack = None
            stack.close()

    def _change(self, model: nn.Module, neurons: dict[str, Any], stack: ExitStack) -> None:
        images, rotation = ImageTracker(), Rotation()
        plans = {}
        for name, node in neurons.items():
            plans[name] = _plan(self.estimator, name, node, images, rotation)
        stack.enter_context(uncompiled(model))
        for name, node in neurons.items():
            exchange = _Exchange(node, {_MARK: self.estimator.name, **plans[name]})
            stack.callback(exchange.undo)
        if self.estimator.family == "assg":
            stack.callback(model.register_forward_pre_hook(images.see).remove)
        if self.estimator.family == "mixed":
            stack.callback(model.register_forward_pre_hook(rotation.turn).remove)
        self.moved = {name: "torch" for name, plan in plans.items() if _moves(plan)}


def has_estimator(model: nn.Module) -> bool:
    """Whether an estimator is active on a network, which a copy of it would not have."""
    return any(_MARK in vars(module) for module in model.modules())


def _moves(plan: dict[str, Any]) -> bool:
    """Whether a neuron's backward pass runs elsewhere."""
    return "gradient" in plan or "multi_step_forward" in plan


def _check(estimator: EstimatorName, model: nn.Module, neurons: dict[str, Any]) -> None:
    """Refuse what this estimator cannot work on."""
    for node in neurons.values():
        if _MARK in vars(node):
            raise RuntimeError(
                f"{vars(node)[_MARK]} is already active on this network; leave its context "
                f"before {estimator.name}"
            )
    if estimator.family == "training" and not estimator.detach_reset:
        return
    if not neurons:
        raise ValueError(
            f"{type(model).__name__} holds no spiking neuron, so {estimator.name} has nothing to "
            "change; use the estimator 'training'"
        )
    check_hooks_run(model, estimator.name, copied=estimator.family == "cba")
    for name, node in neurons.items():
        if estimator.family in _WHOLE_SEQUENCE and step_mode(node) == "s":
            raise ValueError(
                f"{estimator.name} needs all time steps at once, but neuron {name!r} "
                f"({type(node).__name__}) is in step_mode 's'; use functional.set_step_mode(net, "
                "'m') or an estimator without time averages"
            )


def _plan(
    estimator: EstimatorName, name: str, node: Any, images: ImageTracker, rotation: Rotation
) -> dict[str, Any]:
    """Attributes that activate the estimator on one neuron."""
    plan: dict[str, Any] = {}
    if estimator.detach_reset:
        if not isinstance(vars(node).get("detach_reset"), bool):
            raise ValueError(
                f"{estimator.name}: neuron {name!r} ({type(node).__name__}) has no detach_reset"
            )
        plan["detach_reset"] = True
    if estimator.family == "training":
        return plan
    if estimator.family in SHAPES:
        plan.update(_surrogate_plan(estimator, name, node))
    else:
        if not has_known_dynamics(node):
            raise ValueError(
                f"{estimator.name} needs the dynamics of every neuron, which are not known for "
                f"{name!r} ({type(node).__name__}); use a surrogate such as 'atan:4'"
            )
        gradient = _gradient(estimator, name, node, images, rotation)
        plan.update(_Override(node, gradient, estimator).entries())
    return plan


def _surrogate_plan(estimator: EstimatorName, name: str, node: Any) -> dict[str, Any]:
    """Swap the surrogate where the forward pass stays on the same code, else replace the backward
    pass alone.
    """
    shape = estimator.family
    alpha = _sharpness(estimator, name, node)
    own = getattr(node, "surrogate_function", None)
    if not callable(own):
        raise ValueError(
            f"{estimator.name}: neuron {name!r} ({type(node).__name__}) has no "
            "surrogate_function to change"
        )
    if not has_known_dynamics(node) and _ignores_surrogate(node):
        raise ValueError(
            f"{estimator.name} would change nothing: neuron {name!r} ({type(node).__name__}) does "
            "not spike through its surrogate_function; call self.surrogate_function in its "
            "forward, or use the estimator 'training'"
        )
    swapped = host_surrogate(shape, alpha)
    on_fast_code = has_compiled_kernel(own) and has_compiled_kernel(swapped)
    on_torch = isinstance(node, DLIFNode) or runs_on_torch(node)
    if on_fast_code and on_torch:
        return {"surrogate_function": swapped}
    derivative = partial(SHAPES[shape], alpha=alpha)
    if not has_known_dynamics(node):
        return {"surrogate_function": KeepingValues(own, derivative)}

    def gradient(run: Sequence, first: int) -> backward.Outputs:
        return backward.through_time(run, derivative)

    return _Override(node, gradient, estimator).entries()


def _ignores_surrogate(node: Any) -> bool:
    """Whether a neuron has the same gradient with its surrogate as with one of derivative 0, so
    that another surrogate changes nothing; False where a copy cannot show it.

    The neuron and the generators stay as they are.
    """
    try:
        with preserved(node):
            twin = copy.deepcopy(node)
        own = _gradient_of(twin)
        twin.surrogate_function = KeepingValues(twin.surrogate_function, torch.zeros_like)
        without = _gradient_of(twin)
    except Exception:  # foreign code raises anything, such as for an input of another shape
        return False
    return bool(own.any()) and torch.equal(own, without)


def _gradient_of(node: Any) -> Tensor:
    """Gradient of the number of spikes with respect to currents around the threshold."""
    tensors = chain(node.parameters(), node.buffers())
    like = next(filter(Tensor.is_floating_point, tensors), torch.empty(0))
    threshold = torch.as_tensor(getattr(node, "v_threshold", 1.0)).detach().mean().item()
    x = torch.linspace(-1.0, 4.0, _TRIED_ELEMENTS, dtype=like.dtype, device=like.device)
    x = (x * threshold).repeat(_TRIED_STEPS, 1, 1).requires_grad_()
    with from_reset(node, 0, x.device), torch.enable_grad():
        node.training = EVAL_MODE_HAS_NO_GRADIENT
        calls = [x] if step_mode(node) == "m" else x.unbind()
        spikes = [node.forward(part) for part in calls]  # past hooks, which may do anything
        (grad,) = torch.autograd.grad(torch.cat(spikes).sum(), x)
    return grad


def _gradient(
    estimator: EstimatorName, name: str, node: Any, images: ImageTracker, rotation: Rotation
) -> Backward:
    family = estimator.family
    if family == "bptr":
        return lambda run, first: backward.bptr(run)
    if family == "rga":
        if not node.v_threshold > (node.v_reset or 0.0):
            raise ValueError(
                f"rga needs thresholds above the reset potential, got {node.v_threshold} and "
                f"{node.v_reset} in {name!r}"
            )
        return lambda run, first: backward.rga(run)
    if family in ("pdsg", "assg"):
        memory: Spread | Sharpness = Spread()
        if family == "assg":
            memory = Sharpness(images, str(estimator.shape), float(estimator.number or 0))
        return lambda run, first: backward.through_time(run, partial(memory, first=first))
    if family == "mixed":
        alphas = [_sharpness(part, name, node) for part in _MIXED]
        families = [SHAPES[part.family] for part in _MIXED]
        shapes = [partial(f, alpha=a) for f, a in zip(families, alphas, strict=True)]
        return lambda run, first: backward.through_time(run, rotation.of(shapes))
    derivative = partial(SHAPES["triangle"], alpha=_sharpness(estimator, name, node))
    if family == "hart":
        return lambda run, first: backward.hart(run, derivative)
    if family != "hart_mixed":
        raise NotImplementedError(f"no backward pass of estimator family {family!r}")
    own = partial(derivative_of, node.surrogate_function)
    return lambda run, first: backward.hart_mixed(run, derivative, own)


def _sharpness(estimator: EstimatorName, name: str, node: Any) -> float:
    """Alpha of the shape: the number itself, or 1 / (half width in units of the threshold)."""
    number = 1.0 if estimator.number is None else float(estimator.number)
    if estimator.family not in _IN_THRESHOLDS:
        return number
    threshold = float(getattr(node, "v_threshold", 1.0))
    if not threshold > 0:
        raise ValueError(
            f"{estimator.name} has a width in units of the threshold, which must be > 0, got "
            f"{threshold} in neuron {name!r}; use a shape with its own sharpness, such as "
            "'atan:4'"
        )
    return 1.0 / (number * threshold)


class _Override:
    """Forward passes of one neuron: its own, without a graph, and then the gradient of the
    estimator.
    """

    def __init__(self, node: Any, gradient: Backward, estimator: EstimatorName) -> None:
        self._node = node
        self._gradient = gradient
        self._estimator = estimator
        self._step = 0  # of the sequence

    def entries(self) -> dict[str, Any]:
        """The activation: SpikingJelly's neurons have no field for it, but methods."""
        node = self._node
        if isinstance(node, DLIFNode):
            return {"gradient": self}
        multi = node.multi_step_forward
        single = node.single_step_forward
        return {
            "multi_step_forward": lambda x_seq: self.multi_step(x_seq, partial(multi, x_seq)),
            "single_step_forward": lambda x: self.single_step(x, partial(single, x)),
        }

    def multi_step(self, x_seq: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return forward()
        return self._run(x_seq, forward, self._node.store_v_seq)

    def single_step(self, x: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return forward()
        if self._estimator.family in _WHOLE_SEQUENCE:
            raise RuntimeError(
                f"{self._estimator.name} needs all time steps at once, got one; keep step_mode='m'"
            )

        def as_sequence() -> Tensor:
            return forward().unsqueeze(0)

        spike_seq = self._run(x.unsqueeze(0), as_sequence, store_v_seq=False)
        return spike_seq.squeeze(0)

    def _run(self, x_seq: Tensor, forward: Callable[[], Tensor], store_v_seq: bool) -> Tensor:
        node = self._node
        v_init = node.v
        first = 0
        if isinstance(v_init, Tensor):
            if v_init.shape == x_seq.shape[1:]:
                first = self._step
            else:
                v_init = potential_at_reset(node)  # 2.x starts anew for a batch of another size
        charging = next_charging(node, len(x_seq))
        with torch.no_grad():
            spike_seq = forward()
        self._step = first + len(x_seq)
        run = Sequence(
            x_seq=x_seq,
            spike_seq=spike_seq,
            v=node.v,
            v_seq=node.v_seq if store_v_seq else None,
            v_init=v_init,
            charging=charging,
            v_threshold=node.v_threshold,
            v_reset=node.v_reset,
            detach_reset=node.detach_reset,
        )
        if not run.differentiable:
            return spike_seq
        outputs = self._gradient(run, first)
        node.v = outputs.v
        if store_v_seq:
            node.v_seq = outputs.v_seq
        return outputs.spike_seq


class _Exchange:
    """Attributes of a neuron in place of its own, until they are put back.

    A registered part is exchanged where it is registered, since a compiled graph that reads it
    notices nothing else; any other attribute is shadowed.
    """

    def __init__(self, node: Any, entries: dict[str, Any]) -> None:
        """Set the attributes."""
        attributes = vars(node)
        self._node = node
        self._parts = {name: part for name, part in node._modules.items() if name in entries}
        self._found = {name: attributes[name] for name in entries if name in attributes}
        self._shadows = {name: entries[name] for name in entries if name not in self._parts}
        self._shadows["__reduce_ex__"] = self._reduced
        for name, part in self._parts.items():
            node._modules[name] = entries[name].train(part.training)
        attributes.update(self._shadows)

    def undo(self) -> None:
        """Put back what was there."""
        attributes = vars(self._node)
        for name in self._shadows:
            attributes.pop(name, None)
        attributes.update(self._found)
        self._node._modules.update(self._parts)

    def _reduced(self, protocol: Any) -> tuple[Any, ...]:
        """What copies and pickles the neuron as it is without its estimator."""
        reduced: Any = object.__reduce_ex__(self._node, protocol)
        function, arguments, state, *rest = reduced
        kept = {name: value for name, value in state.items() if name not in self._shadows}
        kept["_modules"] = {**state["_modules"], **self._parts}
        return function, arguments, {**kept, **self._found}, *rest
