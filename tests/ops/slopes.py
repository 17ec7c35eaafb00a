"""Slopes of surrogates at ordinary potentials and at extreme ones; needs numpy alone, as
ops.cuda.cases does.
"""

import numpy as np
from oracle import surrogate_derivative

ALPHAS = (2.0, 0.75)


def points(alpha, dtype):
    """Distances from the threshold: a range, kinks and beside them, tiny, large and infinite ones,
    not a number.
    """
    edges = np.array(
        [0.0, 1e-30, 1 / alpha, 1 / alpha + 1e-3, 1 / alpha - 1e-3, 20, 43, 1e3, 1e15, 1e30, np.inf]
    )
    return np.concatenate((edges, -edges, [np.nan], np.linspace(-3, 3, 131))).astype(dtype)


def check(kind, alpha, z, slopes):
    """Relative error at most 1e-12, in float32 1e-5; where the formula is a difference, of the
    height.
    """
    if z.dtype == np.float64:
        relative = 1e-12
        of_height = 1e-15
        absolute = 0.0
    else:
        relative = 1e-5
        of_height = 1e-7
        absolute = 1e-37
    if kind in ("triangle", "sigmoid"):
        absolute = of_height * alpha
    with np.errstate(over="ignore"):
        wanted = surrogate_derivative(kind, alpha, z.astype(np.float64))
    np.testing.assert_allclose(
        slopes, wanted, rtol=relative, atol=absolute, err_msg=f"{kind} of {alpha}"
    )
