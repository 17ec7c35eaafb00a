"""What type checkers and editors see of the package from a script that lies elsewhere."""

from typing import assert_type

import torch
from torch import nn

import sj_robust
from sj_robust import DLIFNode, MPPDMonitor, SpikingClassifier
from sj_robust.attacks import pgd
from sj_robust.evaluation import Report
from sj_robust.models import pretrained


def main() -> None:
    """Nothing here is Any: what cannot be imported would be."""
    net = nn.Sequential(nn.Linear(16, 32), DLIFNode(T=4, step_mode="m"), nn.Linear(32, 4))
    x, y = torch.rand(8, 16), torch.arange(8) % 4
    x_adv = pgd(SpikingClassifier(net, T=4), x, y, eps=0.1, step_size=0.05, steps=3)
    assert_type(x_adv, torch.Tensor)
    with MPPDMonitor(net) as monitor:
        stats = monitor.compare(x.expand(4, 8, 16), x_adv.expand(4, 8, 16))
    assert_type(stats["1"].ms_mppd, torch.Tensor)
    report = sj_robust.evaluate(pretrained("digits/lif"), x, y, eps=0.1)
    assert_type(report, Report)
    assert_type(sj_robust.finetune(net, (x, y), eps=0.1), Report)
