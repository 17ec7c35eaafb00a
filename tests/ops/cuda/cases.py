"""What the CUDA text is put through on the CPU: variants, inputs, and the comparison with the
float64 oracle.

Needs numpy alone, so that it also runs in a process under AddressSanitizer: ``python -m
ops.cuda.cases LIBRARY``.
"""

import itertools
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ops import slopes
from ops.cuda.shim import Library
from oracle import Result, dlif_bptt

# distance every potential keeps from the threshold, so that spikes can be compared exactly
MARGIN = 1e-3
V_THRESHOLD = 0.8
RESETS = {"RESET_TO_ZERO": 0.0, "RESET_TO_VALUE": -0.25, "RESET_BY_SUBTRACTION": None}
SURROGATES = {
    "PiecewiseQuadratic": ("triangle", 1.25),
    "ATan": ("atan", 2.0),
    "Sigmoid": ("sigmoid", 4.0),
    "Spliced": ("atan", 2.0),
}
OTHERS = {
    "PiecewiseExp": "exponential",
    "SoftSign": "soft_sign",
    "SuperSpike": "super_spike",
    "Erf": "erf",
}
SHAPES = [  # steps per segment, whether longer than one segment, neurons per thread
    (1, False, 1),
    (1, False, 4),
    (2, False, 2),
    (3, False, 1),
    (5, False, 4),
    (8, False, 2),
    (8, False, 4),
    (16, False, 2),
    (32, False, 1),
    (16, True, 1),
    (16, True, 2),
]


SPLICED = """struct Spliced {
    static __device__ __forceinline__ float derivative(float z, float) {
        const float scaled = 1.57079632679f * 2.0f * z;
        return 1.0f / (1.0f + scaled * scaled);
    }
};
"""
IO = ("float", "Half", "BFloat16")


@dataclass(frozen=True)
class Variant:
    """Template arguments of one forward and one backward kernel."""

    shape: tuple[int, bool, int]
    io: str
    reset: str
    v_seq: bool
    detach: bool
    surrogate: str

    @property
    def name(self) -> str:
        steps, is_long, vec = self.shape
        flags = f"{'vseq' * self.v_seq}{'detach' * self.detach}"
        return f"{self.io}_{steps}{'long' * is_long}_{vec}_{self.reset}_{flags}_{self.surrogate}"

    def lines(self) -> str:
        """The two lines that make the kernels ``forward_NAME`` and ``backward_NAME``."""
        steps, is_long, vec = self.shape
        is_long, v_seq, detach = (str(flag).lower() for flag in (is_long, self.v_seq, self.detach))
        common = f"256, {self.io}, {steps}, {is_long}, {vec}, {self.reset}, {v_seq}"
        return (
            f"DLIF_FORWARD(forward_{self.name}, {common})\n"
            f"DLIF_BACKWARD(backward_{self.name}, {common}, {detach}, {self.surrogate})\n"
        )


def variants(strength: int, shapes: list[tuple[int, bool, int]] = SHAPES) -> list[Variant]:
    """A small set in which every combination of ``strength`` template arguments occurs: most new
    ones first.
    """
    rows = list(itertools.product(shapes, IO, RESETS, [False, True], [False, True], SURROGATES))
    random.Random(0).shuffle(rows)
    of_row = {row: set(itertools.combinations(enumerate(row), strength)) for row in rows}
    chosen, met = [], set()
    for least in range(math.comb(6, strength), 0, -1):
        for row in rows:
            if len(of_row[row] - met) >= least:
                met |= of_row[row]
                chosen.append(Variant(*row))
    return chosen


ROUND_TRIP = """extern "C" __global__
void round_trip(const float* from, BFloat16* bits, float* back, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        store_values(bits + i, {from[i]});
        back[i] = to_float(bits[i]);
    }
}
"""

SLOPES = """extern "C" __global__ void slopes_{0}(const float* z, float* g, int n, float alpha) {{
    for (int i = threadIdx.x; i < n; i += blockDim.x) g[i] = {0}::derivative(z[i], alpha);
}}
"""


def text(chosen: list[Variant], kernel: str) -> str:
    """The CUDA text with the kernels of the chosen variants, rounding to bfloat16, and every
    surrogate by itself.
    """
    slopes_of = "".join(SLOPES.format(name) for name in [*SURROGATES, *OTHERS])
    return (
        kernel + SPLICED + ROUND_TRIP + slopes_of + "".join(variant.lines() for variant in chosen)
    )


def check(library: Library, variant: Variant) -> None:
    """Every launch of one variant, compared with the oracle.

    Raises:
        AssertionError: With what differs.
    """
    vec = variant.shape[2]
    many, few = {"blocks": 3, "threads": 64}, {"blocks": 1, "threads": 32}
    _compare(library, variant, M=(2 * 64 + 37) * vec, optional=True, on_grid=False, **many)
    _compare(
        library, variant, M=3 * vec, optional=False, on_grid=False, **few
    )  # fewer neurons than a block has
    _compare(library, variant, M=64 * vec, optional=True, on_grid=True, blocks=1, threads=64)


def check_bfloat16(library: Library) -> None:
    """Every bfloat16, the values half-way to the next, and their neighbours: to nearest, ties to
    even.
    """
    low, high = np.meshgrid(
        np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32), np.arange(0x10000, dtype=np.uint32)
    )
    values = ((high << 16) | low).ravel().view(np.float32)
    bits, back = np.zeros(values.size, np.uint16), np.zeros(values.size, np.float32)
    library.launch("round_trip", 1, 32, values, bits, back, np.int32(values.size))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(np.isnan(back), ~number)
    expected = (high + ((low > 0x8000) | ((low == 0x8000) & (high % 2 == 1)))).ravel()[number]
    np.testing.assert_array_equal(bits[number], expected)
    np.testing.assert_array_equal(back[number], (expected << 16).astype(np.uint32).view(np.float32))


def check_slopes(library: Library) -> None:
    """Every surrogate by itself; the variants have some of them, since a kernel is the same with
    each.
    """
    kinds = {name: kind for name, (kind, _) in SURROGATES.items() if name != "Spliced"} | OTHERS
    for (name, kind), alpha in itertools.product(kinds.items(), slopes.ALPHAS):
        z = slopes.points(alpha, np.float32)
        found = np.zeros_like(z)
        library.launch(f"slopes_{name}", 1, 32, z, found, np.int32(z.size), np.float32(alpha))
        slopes.check(kind, alpha, z, found)


_Inputs = dict[str, np.ndarray]
"""Arguments of the oracle, by name."""


def _compare(
    library: Library,
    variant: Variant,
    *,
    blocks: int,
    threads: int,
    M: int,
    optional: bool,
    on_grid: bool,
) -> None:
    """One launch forward and one backward; ``optional``: with initial potential and gradients of
    potentials.
    """
    steps, is_long, _ = variant.shape
    T = 2 * steps + 5 if is_long else steps
    decay = (1.0 if T > 8 else 0.5) if on_grid else 0.9
    threshold = 1.0 if on_grid else V_THRESHOLD
    rng = np.random.default_rng([T, M, on_grid])
    inputs = (_draw_on_grid if on_grid else _draw)(rng, variant, T, M, decay, optional)
    gain, v_init, grad_v, grad_potentials = (
        inputs[name] for name in ("gain", "v_init", "grad_v", "grad_potentials")
    )
    expected = _oracle(inputs, variant, decay, threshold)

    v_reset = RESETS[variant.reset]
    constants = [
        np.float32(c) for c in (decay, (1 - decay) * (v_reset or 0.0), threshold, v_reset or 0.0)
    ]
    alpha = np.float32(SURROGATES[variant.surrogate][1])

    def given(array: np.ndarray) -> np.ndarray | None:
        return array if optional else None

    x, grad_spikes = _pack(inputs["x"], variant.io), _pack(inputs["grad_spikes"], variant.io)
    results = []
    for order in (0, 1, 2):  # in which the threads of a block run: must not matter
        spikes, v_last, potentials = _blank(x), _blank(v_init), _blank(inputs["x"])
        grad_x, grad_v_init, partial = _blank(x), _blank(v_init), _blank((blocks, T))
        library.launch(
            f"forward_{variant.name}",
            blocks,
            threads,
            x,
            gain,
            given(v_init),
            spikes,
            v_last,
            potentials if variant.v_seq else None,
            np.int64(M),
            np.int32(T),
            *constants,
            order=order,
        )
        library.launch(
            f"backward_{variant.name}",
            blocks,
            threads,
            x,
            gain,
            given(v_init),
            grad_spikes,
            given(grad_v),
            grad_potentials if variant.v_seq else None,
            grad_x,
            given(grad_v_init),
            partial,
            _blank((T // steps, M)) if is_long else None,
            np.int64(M),
            np.int32(T),
            *constants,
            alpha,
            order=order,
        )
        results.append((spikes, v_last, potentials, grad_x, grad_v_init, partial))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(
                first, second, err_msg="result depends on the order of the threads"
            )

    exact = {"rtol": 0.0, "atol": 0.0} if on_grid else {"rtol": 1e-5, "atol": 1e-6}
    half_ulp = {"float": 0.0, "Half": 2.0**-11, "BFloat16": 2.0**-8}[variant.io]
    np.testing.assert_array_equal(_unpack(spikes, variant.io), expected.spikes, err_msg="spikes")
    np.testing.assert_allclose(v_last, expected.potentials[-1], **exact, err_msg="last potential")
    if variant.v_seq:
        np.testing.assert_allclose(potentials, expected.potentials, **exact, err_msg="potentials")
    np.testing.assert_allclose(
        _unpack(grad_x, variant.io),
        expected.grad_x,
        rtol=1e-5 + half_ulp,
        atol=1e-5,
        err_msg="grad x",
    )
    np.testing.assert_allclose(
        partial.sum(0, dtype=np.float64),
        expected.grad_gain,
        rtol=1e-5,
        atol=1e-5 * M**0.5,
        err_msg="grad gain",
    )
    if optional:
        np.testing.assert_allclose(
            grad_v_init, expected.grad_v_init, rtol=1e-5, atol=1e-5, err_msg="grad v_init"
        )


def _oracle(inputs: _Inputs, variant: Variant, decay: float, threshold: float) -> Result:
    kind, alpha = SURROGATES[variant.surrogate]
    return dlif_bptt(
        **{name: array.astype(np.float64) for name, array in inputs.items()},
        decay=float(np.float32(decay)),
        v_threshold=float(np.float32(threshold)),
        v_reset=RESETS[variant.reset],
        kind=kind,
        alpha=alpha,
        detach_reset=variant.detach,
    )


def _draw(
    rng: np.random.Generator, variant: Variant, T: int, M: int, decay: float, optional: bool
) -> _Inputs:
    """Random inputs; neurons that come near the threshold at any step are drawn again."""
    inputs = {
        "x": np.zeros((T, M), np.float32),
        "gain": rng.normal(1.0, 0.2, T).astype(np.float32),
        "v_init": np.full(M, RESETS[variant.reset] or 0.0, np.float32),
        "grad_spikes": _representable(rng.normal(size=(T, M)), variant.io),
        "grad_v": rng.normal(size=M).astype(np.float32) * optional,
        "grad_potentials": rng.normal(size=(T, M)).astype(np.float32) * variant.v_seq,
    }
    near = np.ones(M, bool)
    while near.any():
        inputs["x"][:, near] = _representable(rng.normal(0.3, 0.8, (T, near.sum())), variant.io)
        if optional:
            inputs["v_init"][near] = rng.normal(0.2, 0.4, near.sum())
        h = _oracle(inputs, variant, decay, V_THRESHOLD).h
        near = (np.abs(h - V_THRESHOLD) < MARGIN).any(0)
    return inputs


def _draw_on_grid(
    rng: np.random.Generator, variant: Variant, T: int, M: int, decay: float, optional: bool
) -> _Inputs:
    """Multiples of 1/8, on which arithmetic is exact; many potentials equal the threshold."""
    inputs = {
        "x": rng.integers(-3, 5, (T, M)).astype(np.float32) / 4,
        "gain": np.ones(T, np.float32),
        "v_init": rng.integers(-8, 9, M).astype(np.float32) / 4,
        "grad_spikes": rng.integers(-4, 5, (T, M)).astype(np.float32) / 4,
        "grad_v": rng.integers(-4, 5, M).astype(np.float32) / 4,
        "grad_potentials": rng.integers(-4, 5, (T, M)).astype(np.float32) / 4 * variant.v_seq,
    }
    leak_current = (1 - decay) * (RESETS[variant.reset] or 0.0)
    meets = np.arange(M) % 4 == 0  # every fourth neuron starts exactly at the threshold of 1
    inputs["x"][0, meets] = 1.0 - decay * inputs["v_init"][meets] - leak_current
    assert (_oracle(inputs, variant, decay, 1.0).h[0, meets] == 1.0).all()
    return inputs


def _representable(array: np.ndarray, io: str) -> np.ndarray:
    """Float32 values that the tensor format holds exactly."""
    return _unpack(_pack(array.astype(np.float32), io), io)


def _pack(array: np.ndarray, io: str) -> np.ndarray:
    if io == "float":
        return array
    if io == "Half":
        return array.astype(np.float16).view(np.uint16)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _unpack(array: np.ndarray, io: str) -> np.ndarray:
    if io == "float":
        return array
    if io == "Half":
        return array.view(np.float16).astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)


def _blank(like: np.ndarray | tuple[int, ...]) -> np.ndarray:
    """An output that is not a number until a kernel writes it."""
    if isinstance(like, tuple):
        return np.full(like, np.nan, np.float32)
    return np.full_like(like, np.nan if like.dtype == np.float32 else 0x7FFF)


if __name__ == "__main__":
    _library = Library(Path(sys.argv[1]))
    _chosen = variants(int(sys.argv[2]))
    check_bfloat16(_library)
    check_slopes(_library)
    for _variant in _chosen:
        print(_variant.name, flush=True)
        check(_library, _variant)
    print(f"checked {len(_chosen)} variants")
