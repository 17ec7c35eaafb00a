"""What is wrong with an attacked bare network: states that it carries from one forward to the next,
and images where it takes sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sj_robust.core.checks import is_compiled
from sj_robust.core.host import step_mode


class _CarriedStateError(RuntimeError):
    """A neuron holds the state of the previous forward; a RuntimeError outside this file."""


@contextmanager
def refuse_carried_states(model: object) -> Iterator[None]:
    """RuntimeError where a neuron begins a forward of ``model`` with the state that the one before
    left. 检查状态重置。

    Every step of an attack would then see another network, and its gradient would belong to none of
    the images. What lies in a classifier that says ``resets_itself`` is not looked at, so that
    nothing is paid for it; nor is what no hook can see: a plain function around a network, or a
    compiled one.
    """
    neurons: list[nn.Module] = []
    if isinstance(model, nn.Module) and not is_compiled(model):
        neurons = list(filter(_memories, _bare_modules(model)))
    if not neurons:
        yield
        return
    assert isinstance(model, nn.Module)  # it has neurons
    left: dict[nn.Module, list[Tensor]] = {}

    def begin(*_: object) -> None:
        left.update({neuron: _states(neuron) for neuron in neurons})

    def called(neuron: nn.Module, *_: object) -> None:
        before = left.pop(neuron, [])
        for state in _states(neuron):
            if any(state is earlier for earlier in before):
                raise _CarriedStateError(
                    f"{type(neuron).__name__} still holds the state of the previous forward pass, "
                    "so every step of the attack would see a different network: attack "
                    "SpikingClassifier(net, T=...), which resets the network before every forward"
                )

    hooks = [
        model.register_forward_pre_hook(begin),
        *(neuron.register_forward_pre_hook(called) for neuron in neurons),
    ]
    try:
        yield
    except _CarriedStateError as error:
        raise RuntimeError(str(error)).with_traceback(error.__traceback__) from None
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def note_missing_time(model: object) -> Iterator[None]:
    """A note on an error in a forward of ``model`` whose first layer or neuron in step mode "m" is
    given images [N, ...] without a time axis. 提示缺少时间维度。

    A compiled network and a classifier's, which repeats images over time, are not looked at.
    """
    layers: list[nn.Module] = []
    if isinstance(model, nn.Module) and not is_compiled(model):
        layers = [layer for layer in _bare_modules(model) if step_mode(layer, "") == "m"]
    if not isinstance(model, nn.Module) or not layers:
        yield
        return
    samples = 0
    is_first = is_missing = False

    def begin(_: object, arguments: tuple[Any, ...]) -> None:
        nonlocal samples, is_first, is_missing
        samples = len(arguments[0]) if arguments else 0
        is_first, is_missing = True, False

    def called(_: object, arguments: tuple[Any, ...]) -> None:
        nonlocal is_first, is_missing
        if is_first and arguments and isinstance(arguments[0], Tensor):
            shape = arguments[0].shape
            is_missing = shape[:1] == (samples,) and shape[1:2] != (samples,)
        is_first = False

    def end(*_: object) -> None:
        nonlocal is_missing
        is_missing = False

    hooks = [
        model.register_forward_pre_hook(begin),
        model.register_forward_hook(end),
        *(layer.register_forward_pre_hook(called) for layer in layers),
    ]
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if is_missing and not isinstance(error, _CarriedStateError):
            error.add_note(
                "the network's layers are in step mode 'm' and take a sequence [T, N, ...], but "
                "an attack gives it images [N, ...]: attack SpikingClassifier(net, T=...), which "
                "repeats them over time"
            )
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _bare_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and its parts, except for those in a classifier that resets them."""
    if getattr(module, "resets_itself", False):
        return
    yield module
    for child in module.children():
        yield from _bare_modules(child)


def _memories(module: nn.Module) -> dict[str, Any]:
    memories = vars(module).get("_memories")
    return memories if isinstance(memories, dict) else {}


def _states(module: nn.Module) -> list[Tensor]:
    """Tensors that a reset would put something else in the place of; one with a tensor to return to
    keeps its own.
    """
    initial = vars(module).get("_memories_rv", {})
    found = []
    for name, value in _memories(module).items():
        if isinstance(value, Tensor) and not isinstance(initial.get(name), Tensor):
            found.append(value)
    return found
