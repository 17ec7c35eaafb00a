"""A network that spikes as another one does and runs faster, for attacks that only need logits."""

from copy import deepcopy

import torch
from torch import Tensor

from sj_robust.attacks.call import Model
from sj_robust.attacks.logits import differ
from sj_robust.classifier import SpikingClassifier
from sj_robust.core.host import is_neuron
from sj_robust.neuron.replacement import replace_neurons

__all__ = ["quicker"]


@torch.no_grad()
def quicker(model: Model, x: Tensor, logits: Tensor) -> Model:
    """A copy with DLIF's kernels in place of SpikingJelly's IF, LIF and PLIF neurons, where it
    gives the logits of ``x`` as well; else the model itself.

    What rounds otherwise may spike otherwise, so whoever breaks the copy has to ask the model.
    """
    if not isinstance(model, SpikingClassifier) or model.T is None:
        return model
    neurons = [module for module in model.net.modules() if is_neuron(module)]
    if model.net in neurons or any(neuron.step_mode != "m" for neuron in neurons):
        return model  # nothing is gained step by step
    copy = deepcopy(model)
    if not neurons or not replace_neurons(copy.net, model.T).replaced:
        return model
    try:
        found = copy(x)
    except RuntimeError:  # a neuron that runs in two places takes more than T steps
        return model
    return model if differ(logits, found) else copy
