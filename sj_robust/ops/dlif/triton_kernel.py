"""DLIF over all time steps in Triton, forward and backward. Importing it imports Triton.

What the CUDA text of ``kernel.cu`` does, by the same formulas. A program owns BLOCK neighbouring
neurons for the whole sequence. Tensors are float32, float16 or bfloat16, arithmetic and potentials
are float32. Backward saves nothing: it computes the potentials again and keeps those of one segment
in registers. A sequence is FIRST steps and then LATER times SEGMENT steps. One with later segments
is walked through once, to note the potential before each of these in ``checkpoints``, then
backwards segment by segment.

Spikes equal those of the reference bit by bit if products and sums are rounded one by one, so
kernels are compiled with ``enable_fp_fusion=False``. Pointers that may be missing are None, which a
kernel knows when it is compiled.
"""

import triton
import triton.language as tl

__all__ = [
    "charge",
    "dlif_backward",
    "dlif_forward",
    "grad_charge",
    "hidden",
    "load",
    "load_or",
    "reset",
    "store",
]


@triton.jit
def charge(v, x, gain, decay, leak_current, RESET: tl.constexpr):
    """Potential before the reset."""
    h = v * decay + x * gain
    if RESET == "value":
        h = h + leak_current
    return h


@triton.jit
def reset(h, v_threshold, v_reset, RESET: tl.constexpr):
    """Potential behind the reset."""
    if RESET == "subtraction":
        return tl.where(h >= v_threshold, h - v_threshold, h)
    else:
        return tl.where(h >= v_threshold, v_reset, h)


@triton.jit
def _derivative(z, alpha, SURROGATE: tl.constexpr):
    if SURROGATE == "triangle":
        height = alpha - alpha * alpha * tl.abs(z)
        return tl.where(
            height < 0.0, 0.0, height
        )  # unlike a maximum, it keeps what is not a number
    elif SURROGATE == "atan":
        scaled = 1.57079632679489662 * alpha * z
        return 0.5 * alpha / (1.0 + scaled * scaled)
    elif SURROGATE == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-alpha * z))
        return alpha * s * (1.0 - s)
    elif SURROGATE == "exponential":
        return 0.5 * alpha * tl.exp(-alpha * tl.abs(z))
    elif SURROGATE == "soft_sign":
        root = 1.0 + alpha * tl.abs(z)
        return 0.5 * alpha / (root * root)
    elif SURROGATE == "super_spike":
        root = 1.0 + tl.abs(z)
        return alpha / (root * root)
    else:
        tl.static_assert(SURROGATE == "erf")
        scaled = alpha * z
        return 0.56418958354775629 * alpha * tl.exp(-scaled * scaled)


@triton.jit
def grad_charge(
    h,
    grad_spike,
    grad_v,
    v_threshold,
    v_reset,
    alpha,
    RESET: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """Gradient of the potential before the reset."""
    g = _derivative(h - v_threshold, alpha, SURROGATE)
    if RESET == "subtraction":
        if not DETACH:
            grad_spike = grad_spike - grad_v * v_threshold
        return grad_spike * g + grad_v
    else:
        if not DETACH:
            grad_spike = grad_spike + grad_v * (v_reset - h)
        return grad_spike * g + tl.where(h >= v_threshold, 0.0, grad_v)


@triton.jit
def load(pointer, at, i, inside):
    """What lies ``at + i`` numbers behind a pointer; 0 outside."""
    return tl.load(
        pointer + at + i, mask=inside, other=0.0
    )  # `at` is a scalar: every thread adds it as one


@triton.jit
def store(pointer, at, i, inside, value):
    """Write there what is inside, in the dtype of the pointer."""
    tl.store(pointer + at + i, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_or(pointer, at, i, inside, otherwise):
    """As :func:`load`, or the same number everywhere where there is no pointer."""
    if pointer is None:
        return tl.zeros(i.shape, tl.float32) + otherwise
    else:
        return load(pointer, at, i, inside)


@triton.jit
def hidden(segment, decay):
    """The same number, as the compiler does not know: else a loop over segments keeps an address
    for every access.
    """
    return segment ^ tl.cast(decay > 1.0, tl.int32)


@triton.jit
def _forward_steps(
    first,
    v,
    x_seq,
    input_gain,
    spike_seq,
    v_seq,
    block,
    i,
    inside,
    row,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    STEPS: tl.constexpr,
    RESET: tl.constexpr,
):
    for k in tl.static_range(STEPS):
        at = (first + k) * row + block
        x = load(x_seq, at, i, inside).to(tl.float32)
        h = charge(v, x, tl.load(input_gain + first + k), decay, leak_current, RESET)
        v = reset(h, v_threshold, v_reset, RESET)
        if spike_seq is not None:
            store(spike_seq, at, i, inside, tl.where(h >= v_threshold, 1.0, 0.0))
        if v_seq is not None:
            store(v_seq, at, i, inside, v)
    return v


@triton.jit
def dlif_forward(
    x_seq,
    input_gain,
    v_init,
    spike_seq,
    v_last,
    v_seq,
    neurons,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    FIRST: tl.constexpr,
    LATER: tl.constexpr,
    SEGMENT: tl.constexpr,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Spikes and potentials; ``x_seq`` and everything else with a time axis is [steps, neurons]."""
    row = tl.cast(neurons, tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = block + i < neurons
    v = load_or(v_init, block, i, inside, v_reset)
    v = _forward_steps(
        0,
        v,
        x_seq,
        input_gain,
        spike_seq,
        v_seq,
        block,
        i,
        inside,
        row,
        decay,
        leak_current,
        v_threshold,
        v_reset,
        FIRST,
        RESET,
    )
    if LATER > 0:
        for done in range(LATER):
            segment = hidden(done, decay)
            v = _forward_steps(
                FIRST + segment * SEGMENT,
                v,
                x_seq,
                input_gain,
                spike_seq,
                v_seq,
                block,
                i,
                inside,
                row,
                decay,
                leak_current,
                v_threshold,
                v_reset,
                SEGMENT,
                RESET,
            )
    store(v_last, block, i, inside, v)


@triton.jit
def _backward_steps(
    first,
    v,
    grad_v,
    x_seq,
    input_gain,
    grad_spike_seq,
    grad_v_seq,
    grad_x_seq,
    partial_grad_gain,
    block,
    i,
    inside,
    row,
    row_again,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    alpha,
    STEPS: tl.constexpr,
    RESET: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    hs = ()
    for k in tl.static_range(STEPS):
        x = load(x_seq, (first + k) * row + block, i, inside).to(tl.float32)
        h = charge(v, x, tl.load(input_gain + first + k), decay, leak_current, RESET)
        v = reset(h, v_threshold, v_reset, RESET)
        hs = hs + (h,)  # noqa: RUF005  # Triton does not unpack

    grad_spike = load(grad_spike_seq, (first + STEPS - 1) * row_again + block, i, inside)
    for k in tl.static_range(STEPS - 1, -1, -1):
        t = first + k
        at = t * row_again + block
        upcoming = grad_spike
        if k > 0:  # on its way while this step computes
            upcoming = load(grad_spike_seq, at - row_again, i, inside)
        if grad_v_seq is not None:
            grad_v += load(grad_v_seq, at, i, inside)
        x = load(x_seq, at, i, inside).to(tl.float32)
        grad_h = grad_charge(
            hs[k],
            grad_spike.to(tl.float32),
            grad_v,
            v_threshold,
            v_reset,
            alpha,
            RESET,
            DETACH,
            SURROGATE,
        )
        store(grad_x_seq, at, i, inside, grad_h * tl.load(input_gain + t))
        tl.store(partial_grad_gain + t, tl.sum(grad_h * x, 0))  # where nothing was loaded, x is 0
        grad_v = grad_h * decay
        grad_spike = upcoming
    return grad_v


@triton.jit
def dlif_backward(
    x_seq,
    input_gain,
    v_init,
    grad_spike_seq,
    grad_v_last,
    grad_v_seq,
    grad_x_seq,
    grad_v_init,
    partial_grad_gain,
    checkpoints,
    neurons,
    neurons_again,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    alpha,
    FIRST: tl.constexpr,
    LATER: tl.constexpr,
    SEGMENT: tl.constexpr,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """Gradients; ``partial_grad_gain`` is [programs, steps], every program's share, summed later in
    a fixed order.

    Two things save registers, up to half of them. ``neurons_again`` is ``neurons``, which the
    compiler does not know: else it keeps every address of the way forward for the way back. And x
    is loaded twice, the second time from a cache: else it is kept, 16-bit formats widened.
    """
    row = tl.cast(neurons, tl.int64)
    row_again = tl.cast(neurons_again, tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = block + i < neurons
    partial_grad_gain += tl.program_id(0).to(tl.int64) * (FIRST + LATER * SEGMENT)
    start = load_or(v_init, block, i, inside, v_reset)
    grad_v = load_or(grad_v_last, block, i, inside, 0.0)
    if LATER > 0:
        v = _forward_steps(
            0,
            start,
            x_seq,
            input_gain,
            None,
            None,
            block,
            i,
            inside,
            row,
            decay,
            leak_current,
            v_threshold,
            v_reset,
            FIRST,
            RESET,
        )
        for segment in range(LATER):
            store(checkpoints, segment * row + block, i, inside, v)
            if segment < LATER - 1:
                v = _forward_steps(
                    FIRST + segment * SEGMENT,
                    v,
                    x_seq,
                    input_gain,
                    None,
                    None,
                    block,
                    i,
                    inside,
                    row,
                    decay,
                    leak_current,
                    v_threshold,
                    v_reset,
                    SEGMENT,
                    RESET,
                )
        # another thread may own a neuron from here on, and reads what this one has noted
        tl.debug_barrier()
        for done in range(LATER):
            segment = LATER - 1 - done
            v = load(checkpoints, segment * row + block, i, inside)
            grad_v = _backward_steps(
                FIRST + segment * SEGMENT,
                v,
                grad_v,
                x_seq,
                input_gain,
                grad_spike_seq,
                grad_v_seq,
                grad_x_seq,
                partial_grad_gain,
                block,
                i,
                inside,
                row,
                row_again,
                decay,
                leak_current,
                v_threshold,
                v_reset,
                alpha,
                SEGMENT,
                RESET,
                DETACH,
                SURROGATE,
            )
    grad_v = _backward_steps(
        0,
        start,
        grad_v,
        x_seq,
        input_gain,
        grad_spike_seq,
        grad_v_seq,
        grad_x_seq,
        partial_grad_gain,
        block,
        i,
        inside,
        row,
        row_again,
        decay,
        leak_current,
        v_threshold,
        v_reset,
        alpha,
        FIRST,
        RESET,
        DETACH,
        SURROGATE,
    )
    if grad_v_init is not None:
        store(grad_v_init, block, i, inside, grad_v)
