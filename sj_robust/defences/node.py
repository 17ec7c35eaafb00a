"""Base of spiking neurons written as one time step, for both releases of SpikingJelly."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from sj_robust.core.checks import check_surrogate, check_tau, of_other_steps
from sj_robust.core.host import neuron, surrogate
from sj_robust.ops.dlif.config import state_dtype

__all__ = ["Bounded", "PerNeuron", "SteppedNode", "check_decay"]


class Bounded(ABC):
    """A module with parameters that have a range. 参数有取值范围的模块。

    Outside of it a parameter would have no gradient to return with, so a training calls
    :meth:`project_` after every step of the optimizer.
    """

    @abstractmethod
    def project_(self) -> None:
        """Put the parameters back into their range, in place."""


class SteppedNode(neuron.BaseNode):
    """A spiking neuron that is written as one time step, :meth:`step`.
    以单步方程定义的脉冲神经元。

    Step modes, state, ``store_v_seq`` and the explicit states of SpikingJelly 2.x follow from it.
    The states are all that is registered with ``register_memory``, in this order: the potential
    ``v``, the number of steps since the reset ``time_step``, then those of the subclass.

    Shapes: ``x_seq`` [T, N, *] in step mode ``"m"``, [N, *] in ``"s"``. States are [N, *] in
    float32 (float64 for float64 inputs), and none is in ``state_dict``.

    Args:
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None subtracts the threshold instead (soft reset).
        surrogate_function: A SpikingJelly surrogate, or any differentiable function of ``h -
            v_threshold``; None builds ``PiecewiseQuadratic(alpha=1.0)``.
        detach_reset: Whether the reset is detached from the gradient.
        step_mode: ``"m"`` or ``"s"``.
        store_v_seq: Whether the potentials after every reset are kept in ``v_seq``.
    """

    v: Tensor | float
    v_seq: Tensor | None
    time_step: int
    v_threshold: float
    v_reset: float | None
    surrogate_function: Callable[[Tensor], Tensor]
    register_memory: Callable[[str, Any], None]

    def __init__(
        self,
        *,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
    ) -> None:
        """Build the neuron; see the class."""
        check_surrogate(surrogate_function)
        if surrogate_function is None:
            surrogate_function = surrogate.PiecewiseQuadratic(alpha=1.0)
        super().__init__(
            v_threshold=float(v_threshold),
            v_reset=None if v_reset is None else float(v_reset),
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.register_memory("time_step", 0)

    def step(self, x: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Spikes [N, *] of the currents [N, *] of one step, and the states after it."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """Spikes [T, N, *] for input currents [T, N, *]; moves the state on."""
        states = self._present(x_seq[0])
        spikes = []
        potentials = []
        for x in x_seq:
            spike, states = self._stepped(x, states)
            spikes.append(spike)
            potentials.append(states[0])
        self._keep(states)
        if self.store_v_seq:
            self.v_seq = torch.stack(potentials)
        return torch.stack(spikes)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """Spikes [N, *] for the input current [N, *] of the next step; moves the state on."""
        states = self._present(x)
        spike, states = self._stepped(x, states)
        self._keep(states)
        if self.store_v_seq:
            v_step = states[0].unsqueeze(0)
            before = () if self.v_seq is None else (self.v_seq,)
            self.v_seq = torch.cat((*before, v_step))
        return spike

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """States as tensors in the shape of one step, for SpikingJelly 2.x."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        return tuple(self._shaped(state, x) for state in states)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One step that leaves the module's own states alone, for SpikingJelly 2.x."""
        spike, states = self._stepped(inputs[0], states)
        return (spike,), states

    def _stepped(self, x: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """:meth:`step` in the precision of the states, spikes in that of the currents."""
        wide = x.to(state_dtype(x))
        spike, states = self.step(wide, states)
        return spike.to(x.dtype), states

    def _present(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(self._shaped(self._memories[name], x) for name in self._state_names)

    def _keep(self, states: tuple[Any, ...]) -> None:
        for name, state in zip(self._state_names, states, strict=True):
            self._memories[name] = state

    @property
    def _state_names(self) -> list[str]:
        """All states; 0.0.0.0.14 counts ``v_seq`` among them."""
        return [name for name in self._memories if name != "v_seq"]

    @staticmethod
    def _shaped(state: Any, x: Tensor) -> Any:
        """A state in the shape of one step ``x``; a count stays as it is."""
        dtype = state_dtype(x)
        if isinstance(state, int):
            return state
        if not isinstance(state, Tensor):
            return torch.full_like(x, state, dtype=dtype)
        if state.shape != x.shape:
            raise RuntimeError(
                f"the neuron's state has shape {tuple(state.shape)}, but one step of the input "
                f"has {tuple(x.shape)}: call functional.reset_net(net) before a batch of another "
                "size"
            )
        return state.to(x.device, dtype)


class PerNeuron(nn.Module):
    """A module that has parameters or buffers with one value per neuron.
    每个神经元一个取值的参数。

    Their shapes are those of the first input, or of the weights that are loaded. Until then a
    parameter is torch's ``UninitializedParameter``, which an optimizer may hold already, and a
    buffer is None.
    """

    T: int | None = None
    per_step: tuple[str, ...] = ()
    """Those with a row per time step; ``set_time_steps`` asks every module for them."""

    def materialize(self, name: str, shape: tuple[int, ...], value: float, x: Tensor) -> None:
        """Fill a parameter or buffer with ``value`` in its shape, if it has none yet.

        Raises:
            RuntimeError: If it has another shape.
        """
        held: Any = getattr(self, name)
        dtype = state_dtype(x)
        if held is None or is_lazy(held):
            # in inference mode, too, they are ordinary tensors, which can be trained later
            with torch.inference_mode(False), torch.no_grad():
                if held is None:
                    self._buffers[name] = torch.full(shape, value, device=x.device, dtype=dtype)
                else:
                    held.materialize(shape, device=x.device, dtype=dtype)
                    held.fill_(value)
        elif held.shape != shape:
            raise RuntimeError(
                f"{type(self).__name__} has {name} of shape {tuple(held.shape)}, one value for "
                f"each neuron, but its input asks for {shape}; build a network for images of this "
                "size"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, held in (*self._parameters.items(), *self._buffers.items()):
            if held is not None and not is_lazy(held):  # those without a shape have no value
                destination[f"{prefix}{name}"] = held if keep_vars else held.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        for name, held in (*self._parameters.items(), *self._buffers.items()):
            key = f"{prefix}{name}"
            saved = state_dict.get(key)
            if saved is None:
                continue
            if name in self.per_step and saved.ndim > 0 and len(saved) != self.T:
                errors.append(of_other_steps(key, len(saved), self.T))
                return
            if held is None:
                self._buffers[name] = torch.empty_like(saved)
            elif isinstance(held, UninitializedParameter):
                held.materialize(saved.shape, dtype=saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_decay(tau: float) -> float:
    """``1 - 1 / tau``, the share of the potential that a step keeps."""
    return 1.0 - 1.0 / check_tau(tau)
