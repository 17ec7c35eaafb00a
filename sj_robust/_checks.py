"""A check of arguments that every layer of the package needs."""

from torch import nn

__all__ = ["check_network"]


def check_network(net: object) -> None:
    """Raise TypeError for what is no network, such as a class that was not called. 检查参数是否为网络。

    Examples:
        >>> check_network(nn.ReLU)
        Traceback (most recent call last):
            ...
        TypeError: net must be a network (nn.Module), got the class ReLU; build it first, as in MyNet()
    """
    if not isinstance(net, nn.Module):
        kind = f"the class {net.__name__}" if isinstance(net, type) else type(net).__name__
        raise TypeError(f"net must be a network (nn.Module), got {kind}; build it first, as in MyNet()")
