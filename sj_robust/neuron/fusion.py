"""Joins layers of an existing network into stages, and separates them again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from sj_robust.core.preserved import preserved
from sj_robust.neuron.dlif import DLIFNode
from sj_robust.neuron.stage import NORM_DIMENSIONS, Stage, pools_2x2

__all__ = ["FusionReport", "InStage", "fuse", "fused_names", "plain_names", "unfuse"]


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did.

    Attributes:
        stages: For every new stage, the former names of its modules.
        skipped: Batch norms that were not joined, by name, with the reason.
        renamed: New keys in ``state_dict`` of renamed parameters and buffers, by the old key.
    """

    stages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


class InStage(nn.Identity):
    """Placeholder for a module that is now part of the stage before it; keeps the names of later
    ones.

    Examples:
        >>> InStage()
        InStage()
    """


def fuse(net: nn.Module, *, run: Callable[[], object] | None = None) -> FusionReport:
    """Join batch norm, the DLIF neurons after it and a following 2x2 average pooling in a
    :class:`Stage`.

    Either the batch norm or the pooling may be missing. Only neighbours in an ``nn.Sequential`` are
    joined. The stage takes the place of the first module, and identity modules take the places of
    the others, so that the numbers of all other modules stay the same. Parameters, buffers, hooks
    and results do not change (spikes up to the rounding of batch norm), unless the network calls
    members of the ``nn.Sequential`` by index or in slices: pass ``run`` if it may do so.
    将相邻的 BatchNorm、DLIF 神经元和 2x2 平均池化合并为一个 ``Stage``，一次计算完成。

    Args:
        net: A network, changed in place.
        run: Runs the network once, such as ``lambda: model(x)``; it is in evaluation mode meanwhile
            and as before afterwards. An ``nn.Sequential`` that does not run as a whole stays.

    Returns:
        What was joined and what was not, and the keys in ``state_dict`` that have changed. Weights
            saved before are loaded with ``net.load_state_dict({report.renamed.get(key, key): value
            for key, value in weights.items()})``.

    Source: fused modules of ``torch.ao.quantization``; here also in training.

    Examples:
        >>> from sj_robust.core.host import layer
        >>> net = nn.Sequential(layer.Conv2d(1, 3, 3), layer.BatchNorm2d(3), DLIFNode(T=4))
        >>> report = fuse(net)
        >>> report.stages, report.renamed["2.input_gain"]
        ({'1': ('1', '2')}, '1.node.input_gain')
        >>> unfuse(net)
        >>> type(net[1]).__name__
        'BatchNorm2d'
    """
    report = FusionReport()
    for path, parent in net.named_modules():
        if isinstance(parent, Stage):
            continue
        children = _children(parent)
        for name, module in children.items():
            is_norm = any("BatchNorm" in cls.__name__ for cls in type(module).__mro__)
            if is_norm:
                report.skipped[_joined(path, name)] = _reason(name, children, parent)
    found = _to_be_joined(net)
    not_whole = {} if run is None or not found else _not_run_whole(net, found, run)
    for path, stages in found.items():
        parent = net.get_submodule(path)
        children = _children(parent)
        for members in stages:
            paths = tuple(_joined(path, name) for name in members)
            if path in not_whole:
                report.skipped[paths[0]] = not_whole[path]
                continue
            _put_stage(parent, {name: children[name] for name in members})
            report.stages[paths[0]] = paths
            report.skipped.pop(paths[0], None)
    for new, old in plain_names(net).items():
        if old != new:
            report.renamed[old] = new
    return report


class _Sequence:
    """What a run does with an ``nn.Sequential``."""

    def __init__(self) -> None:
        self.ran = False
        self.running = False
        self.in_parts = False

    def enter(self, *_: Any) -> None:
        """It starts."""
        self.ran = self.running = True

    def leave(self, *_: Any) -> None:
        """It has ended."""
        self.running = False

    @property
    def problem(self) -> str | None:
        """Why its members must stay as they are, or None."""
        if self.in_parts:
            return "is in an nn.Sequential that the network does not run as a whole"
        return None if self.ran else "is in an nn.Sequential that did not run"


def _not_run_whole(
    net: nn.Module, found: Mapping[str, list[list[str]]], run: Callable[[], object]
) -> dict[str, str]:
    """Paths of the sequences that a run does not run as a whole, with the reason."""
    sequences: dict[str, _Sequence] = {}
    holders: dict[nn.Module, list[_Sequence]] = {}

    def called(member: nn.Module, *_: Any) -> None:
        if not any(sequence.running for sequence in holders[member]):
            for sequence in holders[member]:
                sequence.in_parts = True

    with preserved(net, "all"), ExitStack() as hooks:
        for path, stages in found.items():
            parent = net.get_submodule(path)
            sequence = sequences[path] = _Sequence()
            hooks.enter_context(parent.register_forward_pre_hook(sequence.enter))
            hooks.enter_context(parent.register_forward_hook(sequence.leave, always_call=True))
            for name in chain.from_iterable(stages):
                holders.setdefault(parent.get_submodule(name), []).append(sequence)
        for member in holders:
            hooks.enter_context(member.register_forward_pre_hook(called))
        run()
    return {path: one.problem for path, one in sequences.items() if one.problem is not None}


def _to_be_joined(net: nn.Module) -> dict[str, list[list[str]]]:
    """Names of the members of each new stage, by the path of the ``nn.Sequential`` they are in."""
    found = {}
    for path, parent in net.named_modules():
        if type(parent) is nn.Sequential:
            stages = list(_members_of_stages(_children(parent)))
            if stages:
                found[path] = stages
    return found


def _members_of_stages(children: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Names of the neighbours that each new stage is made of."""
    names = list(children)
    position = 0
    for count in _counts(list(children.values())):
        if count > 1:
            yield names[position : position + count]
        position += count


def _put_stage(parent: nn.Module, members: dict[str, nn.Module]) -> None:
    """Put a stage in the place of its first member, and modules that do nothing in the others."""
    first, *others = members
    setattr(parent, first, _stage(list(members.values())))
    for name in others:
        setattr(parent, name, InStage())


def unfuse(net: nn.Module) -> None:
    """Replace every :class:`Stage` by its modules, as they were before :func:`fuse`.

    Args:
        net: A network, changed in place. A stage that is not in an ``nn.Sequential``
            becomes one.

    Raises:
        ValueError: If ``net`` is itself a stage.

    Examples:
        >>> from sj_robust.core.host import layer
        >>> net = nn.Sequential(Stage(DLIFNode(T=4), norm=layer.BatchNorm2d(3)))
        >>> unfuse(net)
        >>> [type(module).__name__ for module in net]
        ['BatchNorm2d', 'DLIFNode']
    """
    if isinstance(net, Stage):
        raise ValueError(
            "net is itself a Stage, which cannot be replaced in place; wrap it in nn.Sequential"
        )
    for parent in list(net.modules()):
        children = _children(parent)
        if not any(isinstance(child, Stage) for child in children.values()):
            continue
        if type(parent) is nn.Sequential:
            for name in children:
                delattr(parent, name)
            for name, _, module in _without_stages(parent, children):
                parent.add_module(name, module)
            continue
        for name, child in children.items():
            if isinstance(child, Stage):
                parts = [part for _, part in child.parts()]
                setattr(parent, name, nn.Sequential(*parts))


def plain_names(net: nn.Module) -> dict[str, str]:
    """The key in ``state_dict`` that every parameter and buffer has in the network without stages.
    去掉 ``Stage`` 后各参数的名称。

    Args:
        net: A network, with or without stages.

    Returns:
        Those keys by the keys of ``net.state_dict()``, in its order.

    Examples:
        >>> plain_names(nn.Sequential(Stage(DLIFNode(T=4)), nn.Linear(1, 1, bias=False)))
        {'0.node.input_gain': '0.input_gain', '1.weight': '1.weight'}
    """
    modules = dict(_plain_paths(net, "", ""))
    names = {}
    for key in net.state_dict():
        module, _, parameter = key.rpartition(".")
        names[key] = _joined(modules[module], parameter)
    return names


def fused_names(net: nn.Module) -> dict[str, str]:
    """Those of :func:`plain_names` by the keys that ``net.state_dict()`` has once all of the
    network is fused. 融合后各参数的名称。

    Examples:
        >>> from sj_robust.core.host import layer
        >>> net = nn.Sequential(layer.BatchNorm2d(3, affine=False), DLIFNode(T=4))
        >>> list(fused_names(net))[-1], fused_names(net)["0.node.input_gain"]
        ('0.node.input_gain', '1.input_gain')
    """
    moved = {}
    for path, stages in _to_be_joined(net).items():
        children = _children(net.get_submodule(path))
        for members in stages:
            stage = _joined(path, members[0])
            has_norm = type(children[members[0]]) in NORM_DIMENSIONS
            roles = ["norm", "node", "pool"] if has_norm else ["node", "pool"]
            for name, role in zip(members, roles, strict=False):  # there may be no pool
                moved[_joined(path, name) + "."] = f"{stage}.{role}."
    names = {}
    for key, plain in plain_names(net).items():
        place = next((place for place in moved if key.startswith(place)), "")
        names[moved.get(place, "") + key.removeprefix(place)] = plain
    return names


def _plain_paths(module: nn.Module, path: str, plain: str) -> Iterator[tuple[str, str]]:
    """Path and plain path of a module and of everything in it."""
    yield path, plain
    for plain_name, name, child in _without_stages(module, _children(module)):
        yield from _plain_paths(child, _joined(path, name), _joined(plain, plain_name))


def _without_stages(
    parent: nn.Module, children: dict[str, nn.Module]
) -> Iterator[tuple[str, str, nn.Module]]:
    """Children with the parts of stages in the places of these: name without stages, name now."""
    is_sequential = type(parent) is nn.Sequential
    is_numbered = is_sequential and list(children) == _numbers(0, len(children))
    names = list(children)
    position = 0  # of the next module in the parent without stages
    for index, (name, child) in enumerate(children.items()):
        if isinstance(child, InStage):
            continue
        if not isinstance(child, Stage):
            plain_name = str(position) if is_numbered else name
            yield plain_name, name, child
            position += 1
            continue
        parts = list(child.parts())
        places = names[index : index + len(parts)]
        kept = [one for one in places[1:] if isinstance(children[one], InStage)]
        if is_numbered:
            plain_names_of_parts = _numbers(position, len(parts))
        elif is_sequential and len(kept) == len(parts) - 1:
            plain_names_of_parts = places
        else:
            plain_names_of_parts = [f"{name}.{number}" for number in range(len(parts))]
        for plain, (part_name, part) in zip(plain_names_of_parts, parts, strict=True):
            yield plain, f"{name}.{part_name}", part
        position += len(parts)


def _numbers(first: int, count: int) -> list[str]:
    """Names that ``nn.Sequential`` gives to modules at these places."""
    return [str(first + index) for index in range(count)]


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Children by name; one that is in two places has both names."""
    members = module.named_modules(remove_duplicate=False)
    return {name: child for name, child in members if name and "." not in name}


def _joined(path: str, name: str) -> str:
    """The path of a child; either may be empty."""
    return ".".join(filter(None, (path, name)))


def _counts(modules: Sequence[nn.Module]) -> list[int]:
    """How many consecutive modules make a stage; 1 for a module that stays as it is."""
    counts = []
    position = 0
    while position < len(modules):
        has_norm = type(modules[position]) in NORM_DIMENSIONS
        node_at = position + has_norm
        count = 1
        if node_at < len(modules) and type(modules[node_at]) is DLIFNode:
            has_pool = node_at + 1 < len(modules) and pools_2x2(modules[node_at + 1])
            count = has_norm + 1 + has_pool
        counts.append(count)
        position += count
    return counts


def _stage(modules: list[nn.Module]) -> Stage:
    """The stage of a DLIFNode, the batch norm before it and the pooling behind it, if any."""
    norm = modules.pop(0) if type(modules[0]) in NORM_DIMENSIONS else None
    node = modules.pop(0)
    pool = modules.pop(0) if modules else None
    stage = Stage(node, norm=norm, pool=pool)
    stage.training = node.training
    return stage


def _reason(name: str, children: dict[str, nn.Module], parent: nn.Module) -> str:
    """Why a batch norm stays as it is, if it is not joined."""
    module = children[name]
    if type(module) not in NORM_DIMENSIONS:
        return (
            f"{type(module).__module__}.{type(module).__name__} is not a BatchNorm of "
            "SpikingJelly's layer module"
        )
    if type(parent) is not nn.Sequential:
        return (
            f"is in a {type(parent).__name__}, whose forward may run something between it "
            "and a neuron"
        )
    names = list(children)
    behind = names[names.index(name) + 1 :]
    follower = type(children[behind[0]]).__name__ if behind else "nothing"
    return f"is followed by {follower}, not by a DLIFNode"
