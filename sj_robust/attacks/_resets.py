"""States that an attacked network carries from one forward to the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sj_robust.core.host import is_neuron, step_mode


@contextmanager
def refuse_carried_states(model: object) -> Iterator[None]:
    """RuntimeError where a neuron begins a forward of ``model`` with the state that the one before
    left; and a note where a network that takes sequences fails on images. 检查状态重置。

    Every step of an attack would then see another network, and its gradient would belong to none of
    the images. What lies in a classifier that says ``resets_itself`` is not looked at, so that
    nothing is paid for it; nor is what no hook can see: a plain function around a network, or a
    compiled one.
    """
    if (
        not isinstance(model, nn.Module)
        or _is_compiled(model)
        or not (neurons := list(_bare_neurons(model)))
    ):
        yield
        return
    left: dict[nn.Module, list[Tensor]] = {}
    running = False

    def begin(*_: object) -> None:
        nonlocal running
        running = True
        left.update({neuron: _states(neuron) for neuron in neurons})

    def called(neuron: nn.Module, *_: object) -> None:
        before = left.pop(neuron, [])
        if any(state is earlier for state in _states(neuron) for earlier in before):
            raise RuntimeError(
                f"{type(neuron).__name__} still holds the state of the previous forward pass, so "
                "every step of the attack would see a different network: attack "
                "SpikingClassifier(net, T=...), which resets the network before every forward"
            )

    def end(*_: object) -> None:
        nonlocal running
        running = False

    hooks = [
        model.register_forward_pre_hook(begin),
        model.register_forward_hook(end),
        *(neuron.register_forward_pre_hook(called) for neuron in neurons),
    ]
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if running and "m" in map(step_mode, filter(is_neuron, neurons)):
            error.add_note(
                "the network's neurons are in step mode 'm' and take a sequence [T, N, ...], but "
                "an attack gives it images [N, ...]: attack SpikingClassifier(net, T=...), which "
                "repeats them over time"
            )
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _bare_neurons(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with a state, except for those in a classifier that resets them."""
    if getattr(module, "resets_itself", False):
        return
    if _memories(module):
        yield module
    for child in module.children():
        yield from _bare_neurons(child)


def _memories(module: nn.Module) -> dict[str, Any]:
    memories = vars(module).get("_memories")
    return memories if isinstance(memories, dict) else {}


def _states(module: nn.Module) -> list[Tensor]:
    """Tensors that a reset would put something else in the place of; one with a tensor to return to
    keeps its own.
    """
    initial = vars(module).get("_memories_rv", {})
    return [
        value
        for name, value in _memories(module).items()
        if isinstance(value, Tensor) and not isinstance(initial.get(name), Tensor)
    ]


def _is_compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
