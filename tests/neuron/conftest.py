"""What tests of neurons share."""

from types import SimpleNamespace

import pytest

from sj_robust.ops.bn_dlif import dispatch


@pytest.fixture
def passes(monkeypatch):
    """Counts the batch norms and the poolings that ran in one pass with their neuron."""
    count = SimpleNamespace(fused=0, pooled=0)
    operator = dispatch.in_one_pass

    def counting(x_seq, norm, *args, **kwargs):
        count.fused += norm is not None
        count.pooled += kwargs["average_pool"]
        return operator(x_seq, norm, *args, **kwargs)

    monkeypatch.setattr(dispatch, "in_one_pass", counting)
    return count
