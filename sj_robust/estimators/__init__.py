"""Gradient estimators: other backward passes for the same spikes, as context managers over a
network.

A spike has no derivative, so the gradient of a spiking network is a matter of choice, and an attack
that uses only one choice overstates robustness. ``estimator(name)(model)`` is a context manager:
inside, every spiking neuron of ``model`` keeps its forward pass bit by bit (spikes and states) and
gets another backward pass; outside, everything is as before.

With z = h - v_threshold, the charged potential h of a step, and the half width W in units of the
potential:

==================== ===========================================================================
name                 what replaces ds/dz of the spike, or the gradient of the neuron's input
==================== ===========================================================================
``training``         the network's own surrogate
``triangle:w``       ``max(0, 1 - |z| / W) / W``, ``W = w * v_threshold``
``atan:a``           ``a / 2 / (1 + (pi / 2 * a * z)**2)``
``sigmoid:a``        ``a * sigmoid(a z) * (1 - sigmoid(a z))``
``rectangle:w``      ``1 / (2 W)`` where ``|z| <= W``, else 0
``exponential:a``    ``a / 2 * exp(-a |z|)``
``straight_through`` 1
``pdsg``             normal density at z, mean sigma / 2, standard deviation sigma: that of h so far
``assg``             ``atan`` (or ``assg:SHAPE``) sharpened by ``|z|`` per neuron, step, sample
``bptr``             ``grad_x[t] = grad_s[t]`` where the neuron spikes at all, else 0
``rga``              ``grad_x[t] = grad_s[t]`` times the slope of firing rate over mean input
``hart:w``           triangle times the gradient averaged over time, previous potential detached
``hart_mixed:w``     mean of ``hart:w`` and the network's own gradient, neuron by neuron
``cba``              that of a copy of the network with ReLU instead of every neuron
``mixed``            another shape in every forward: ``triangle:0.5``, ``atan:4``, ``sigmoid:4``,
                     ``rectangle:1``, ``exponential:2``, and again from the first
==================== ===========================================================================

The suffix ``+detach`` excludes the reset from the gradient: ``atan:4+detach``. An estimator that
needs all time steps at once (``bptr``, ``rga``, ``hart``, ``hart_mixed``) refuses neurons in step
mode ``"s"``.
"""

from sj_robust.estimators.applied import estimator
from sj_robust.estimators.naming import ESTIMATORS

__all__ = ["ESTIMATORS", "estimator"]
