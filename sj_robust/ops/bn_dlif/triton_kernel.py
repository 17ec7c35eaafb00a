"""Batch norm, DLIF and 2x2 average pooling in Triton. Importing it imports Triton.

What ``normalised.h`` does on the CPU, with the neurons of ``dlif/triton_kernel.py`` and like them:
segments, potentials computed again, arithmetic in float32. Numbers per channel are float64 in
memory.

A program owns a tile of neurons [members, BLOCK, CHANNELS] for the whole sequence. In planes it is
BLOCK neighbours of one channel, the samples one behind the other; with channels last (LAST) it has
CHANNELS neighbours at every position. With POOL a line of positions is a line of 2x2 windows, whose
members are its two rows in planes, and the four neurons of a window with channels last. So every
access is to neighbours in memory, and one thread has a whole window. A sum over a channel or over
all neurons is written as a share of each program and added up in a fixed order.
"""

import triton
import triton.language as tl

from sj_robust.ops.dlif.triton_kernel import (
    charge,
    grad_charge,
    hidden,
    load,
    load_or,
    reset,
    store,
)

__all__ = ["bn_dlif_backward", "bn_dlif_forward", "bn_finish", "bn_moments", "bn_statistics"]

_COUNTS = ["samples", "height", "units"]  # which say nothing of how tensors are aligned


@triton.jit
def _positions(program, span, rows, BLOCK: tl.constexpr, POOL: tl.constexpr):
    """Of BLOCK positions, lines of ``span``: the first one's sample, and each one's sample, line of
    it and column.
    """
    start = program * BLOCK
    first = start // span
    at = start % span + tl.arange(0, BLOCK)[None, :, None]
    line = first + at // span
    column = at % span
    if POOL:
        return first // rows, line // rows, line % rows, column
    else:
        return first, line, line * 0, column


@triton.jit
def _channels(program, CHANNELS: tl.constexpr):
    return (program * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]


@triton.jit
def _place(sample, pixel, c, channels, plane, LAST: tl.constexpr):
    if LAST:
        return (sample * plane + pixel) * channels + c
    else:
        return (sample * channels + c) * plane + pixel


@triton.jit
def _neurons(
    program,
    c,
    samples,
    channels,
    height,
    units,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    LAST: tl.constexpr,
):
    """Where the first sample of a tile begins in a step, how far from there its neurons lie, and
    which there are.
    """
    width = units * UNIT
    rows = (height + 1) // 2
    if not POOL:
        first, sample, row, column = _positions(program, width, rows, BLOCK, POOL)
    elif LAST:
        first, sample, row, column = _positions(program, (width + 1) // 2, rows, BLOCK, POOL)
        member = tl.arange(0, 4)[:, None, None]
        row = 2 * row + member // 2
        column = 2 * column + member % 2
    else:
        span = width
        if UNIT == 1:  # else it is even
            span = width + width % 2
        first, sample, row, column = _positions(program, span, rows, BLOCK, POOL)
        row = 2 * row + tl.arange(0, 2)[:, None, None]
    inside = (sample < samples) & (row < height) & (column < width) & (c < channels)
    plane = height * width
    pixel = row * width + column
    return (
        first.to(tl.int64) * (channels * plane),
        _place(sample - first, pixel, c, channels, plane, LAST),
        inside,
    )


@triton.jit
def _windows(
    program,
    c,
    samples,
    channels,
    height,
    units,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    POOL: tl.constexpr,
    LAST: tl.constexpr,
):
    """The same of the windows of a tile in a step of means; None without pooling."""
    if POOL:
        columns = units * UNIT // 2
        span = (units * UNIT + 1) // 2
        if UNIT > 1:
            columns = units * (UNIT // 2)
            span = columns
        WINDOWS: tl.constexpr = BLOCK if LAST else BLOCK // 2
        first, sample, row, column = _positions(program, span, (height + 1) // 2, WINDOWS, POOL)
        rows = height // 2
        inside = (sample < samples) & (row < rows) & (column < columns) & (c < channels)
        plane = rows * columns
        pixel = row * columns + column
        return (
            first.to(tl.int64) * (channels * plane),
            _place(sample - first, pixel, c, channels, plane, LAST),
            inside,
        )
    else:
        return None


@triton.jit
def _store_spikes(spike_seq, at, windows, s, LAST: tl.constexpr):
    block, i, inside = windows
    s = tl.sum(s, 0)
    if not LAST:
        s = tl.sum(tl.reshape(s, [s.shape[0] // 2, 2, s.shape[1]]), 1)
    store(spike_seq, at + block, i, inside, 0.25 * s[None, :, :])


@triton.jit
def _spread(means, LAST: tl.constexpr):
    """Gradient of the spikes of a tile from what :func:`_load_grad_spikes` found."""
    g = 0.25 * means
    if not LAST:
        pairs = tl.broadcast_to(g[:, :, None, :], [1, g.shape[1], 2, g.shape[2]])
        g = tl.reshape(pairs, [1, 2 * g.shape[1], g.shape[2]])
    return g


@triton.jit
def _of_channels(numbers, at, c, channels):
    return load(numbers, at * channels, c, c < channels).to(tl.float32)


@triton.jit
def _affine(moments, c, channels):
    """Scale and offset of the batch norm, or None."""
    if moments is None:
        return None
    else:
        return _of_channels(moments, 2, c, channels), _of_channels(moments, 3, c, channels)


@triton.jit
def _current(x, affine):
    if affine is None:
        return x
    else:
        return x * affine[0] + affine[1]


@triton.jit
def _forward_steps(
    first,
    v,
    x_seq,
    affine,
    input_gain,
    spike_seq,
    v_seq,
    current_seq,
    tile,
    windows,
    x_row,
    row,
    window_row,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    STEPS: tl.constexpr,
    RESET: tl.constexpr,
    POOL: tl.constexpr,
    LAST: tl.constexpr,
):
    block, i, inside = tile
    for k in tl.static_range(STEPS):
        t = first + k
        y = _current(load(x_seq, t * x_row + block, i, inside).to(tl.float32), affine)
        h = charge(v, y, tl.load(input_gain + t), decay, leak_current, RESET)
        v = reset(h, v_threshold, v_reset, RESET)
        if spike_seq is not None:
            s = tl.where(h >= v_threshold, 1.0, 0.0)
            if POOL:
                _store_spikes(spike_seq, t * window_row, windows, s, LAST)
            else:
                store(spike_seq, t * row + block, i, inside, s)
        if v_seq is not None:
            store(v_seq, t * row + block, i, inside, v)
        if current_seq is not None:
            store(current_seq, t * row + block, i, inside, y)
    return v


@triton.jit(do_not_specialize=_COUNTS)
def bn_dlif_forward(
    x_seq,
    moments,
    input_gain,
    v_init,
    spike_seq,
    v_last,
    v_seq,
    current_seq,
    samples,
    channels,
    height,
    units,
    x_row,
    neurons,
    window_row,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    FIRST: tl.constexpr,
    LATER: tl.constexpr,
    SEGMENT: tl.constexpr,
    RESET: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    POOL: tl.constexpr,
    LAST: tl.constexpr,
):
    """Spikes, or their means over 2x2 neurons, and potentials.

    A step of ``x_seq`` is ``samples`` x ``channels`` x ``height`` x ``units * UNIT`` numbers in the
    order of memory, or with the channels last; ``x_row``, ``neurons`` and ``window_row`` are the
    strides of time of x, of everything with its shape and of the means. ``moments`` are mean,
    variance, scale and offset per channel, None without batch norm.
    """
    x_row, row, window_row = (
        tl.cast(x_row, tl.int64),
        tl.cast(neurons, tl.int64),
        tl.cast(window_row, tl.int64),
    )
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0) // blocks
    c = _channels(tl.program_id(0) % blocks, CHANNELS)
    tile = _neurons(program, c, samples, channels, height, units, UNIT, BLOCK, POOL, LAST)
    windows = _windows(program, c, samples, channels, height, units, UNIT, BLOCK, POOL, LAST)
    affine = _affine(moments, c, channels)
    block, i, inside = tile
    v = load_or(v_init, block, i, inside, v_reset)
    v = _forward_steps(
        0,
        v,
        x_seq,
        affine,
        input_gain,
        spike_seq,
        v_seq,
        current_seq,
        tile,
        windows,
        x_row,
        row,
        window_row,
        decay,
        leak_current,
        v_threshold,
        v_reset,
        FIRST,
        RESET,
        POOL,
        LAST,
    )
    if LATER > 0:
        for done in range(LATER):
            segment = hidden(done, decay)
            v = _forward_steps(
                FIRST + segment * SEGMENT,
                v,
                x_seq,
                affine,
                input_gain,
                spike_seq,
                v_seq,
                current_seq,
                tile,
                windows,
                x_row,
                row,
                window_row,
                decay,
                leak_current,
                v_threshold,
                v_reset,
                SEGMENT,
                RESET,
                POOL,
                LAST,
            )
    store(v_last, block, i, inside, v)


@triton.jit
def _load_grad_spikes(
    grad_spike_seq, t, tile, windows, row, window_row, POOL: tl.constexpr, LAST: tl.constexpr
):
    if POOL:
        block, i, inside = windows
        if LAST:  # once for every member, whichever thread has it
            i, inside = tl.broadcast_to(i, tile[1].shape), tl.broadcast_to(inside, tile[1].shape)
        return load(grad_spike_seq, t * window_row + block, i, inside)
    else:
        block, i, inside = tile
        return load(grad_spike_seq, t * row + block, i, inside)


@triton.jit
def _backward_steps(
    first,
    v,
    grad_v,
    grad_sum,
    product_sum,
    x_seq,
    affine,
    mean,
    slopes,
    input_gain,
    grad_spike_seq,
    grad_v_seq,
    grad_current_seq,
    grad_x_seq,
    partial_grad_gain,
    tile,
    windows,
    x_row,
    x_row_again,
    row,
    window_row,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    alpha,
    STEPS: tl.constexpr,
    RESET: tl.constexpr,
    POOL: tl.constexpr,
    LAST: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    SUMS: tl.constexpr,
):
    block, i, inside = tile
    hs = ()
    for k in tl.static_range(STEPS):
        y = _current(load(x_seq, (first + k) * x_row + block, i, inside).to(tl.float32), affine)
        h = charge(v, y, tl.load(input_gain + first + k), decay, leak_current, RESET)
        v = reset(h, v_threshold, v_reset, RESET)
        hs = hs + (h,)  # noqa: RUF005  # Triton does not unpack

    grad_spike = _load_grad_spikes(
        grad_spike_seq, first + STEPS - 1, tile, windows, row, window_row, POOL, LAST
    )
    for k in tl.static_range(STEPS - 1, -1, -1):
        t = first + k
        upcoming = grad_spike
        if k > 0:  # on its way while this step computes
            upcoming = _load_grad_spikes(
                grad_spike_seq, t - 1, tile, windows, row, window_row, POOL, LAST
            )
        if grad_v_seq is not None:
            grad_v += load(grad_v_seq, t * row + block, i, inside)
        grad_spike = grad_spike.to(tl.float32)
        if POOL:
            grad_spike = _spread(grad_spike, LAST)
        grad_h = grad_charge(
            hs[k], grad_spike, grad_v, v_threshold, v_reset, alpha, RESET, DETACH, SURROGATE
        )
        x = load(x_seq, t * x_row_again + block, i, inside).to(tl.float32)
        if partial_grad_gain is not None:  # where nothing was loaded, the gradient is 0
            tl.store(partial_grad_gain + t, tl.sum(grad_h * _current(x, affine)))
        grad_x = grad_h * tl.load(input_gain + t)
        if grad_current_seq is not None:
            grad_x += load(grad_current_seq, t * row + block, i, inside)
        if SUMS:
            grad_sum += grad_x
            product_sum += grad_x * (x - mean)
        if grad_x_seq is not None:
            if affine is not None:
                grad_x = grad_x * affine[0]
            if slopes is not None:
                grad_x = grad_x + (x - mean) * slopes[0] + slopes[1]
            store(grad_x_seq, t * row + block, i, inside, grad_x)
        grad_v = grad_h * decay
        grad_spike = upcoming
    return grad_v, grad_sum, product_sum


@triton.jit(do_not_specialize=_COUNTS)
def bn_dlif_backward(
    x_seq,
    moments,
    slopes,
    input_gain,
    v_init,
    grad_spike_seq,
    grad_v_last,
    grad_v_seq,
    grad_current_seq,
    grad_x_seq,
    grad_x_total,
    grad_v_init,
    partial_sums,
    partial_grad_gain,
    checkpoints,
    samples,
    channels,
    height,
    units,
    x_row,
    x_row_again,
    neurons,
    window_row,
    decay,
    leak_current,
    v_threshold,
    v_reset,
    alpha,
    FIRST: tl.constexpr,
    LATER: tl.constexpr,
    SEGMENT: tl.constexpr,
    RESET: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    POOL: tl.constexpr,
    LAST: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    """Gradients, those that there is room for.

    With g the gradient of the currents, ``partial_sums`` are the shares of sum g and sum g (x -
    mean), [blocks, 2, channels], ``grad_x_total`` is the gradient of a step that is repeated,
    without the share of batch statistics, and the gradient of x is ``g * scale``; where ``slopes``
    are given, plus ``(x - mean) * slopes[0] + slopes[1]``. ``x_row_again`` is ``x_row``, which
    saves registers as in ``dlif_backward``.
    """
    x_row, row, window_row = (
        tl.cast(x_row, tl.int64),
        tl.cast(neurons, tl.int64),
        tl.cast(window_row, tl.int64),
    )
    x_row_again = tl.cast(x_row_again, tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0) // blocks
    c = _channels(tl.program_id(0) % blocks, CHANNELS)
    tile = _neurons(program, c, samples, channels, height, units, UNIT, BLOCK, POOL, LAST)
    windows = _windows(program, c, samples, channels, height, units, UNIT, BLOCK, POOL, LAST)
    affine = _affine(moments, c, channels)
    mean, lines = None, None
    if moments is not None:
        mean = _of_channels(moments, 0, c, channels)
    if slopes is not None:
        lines = _of_channels(slopes, 0, c, channels), _of_channels(slopes, 1, c, channels)
    SUMS: tl.constexpr = partial_sums is not None
    if partial_grad_gain is not None:
        partial_grad_gain += tl.program_id(0).to(tl.int64) * (FIRST + LATER * SEGMENT)
    block, i, inside = tile
    start = load_or(v_init, block, i, inside, v_reset)
    grad_v = load_or(grad_v_last, block, i, inside, 0.0)
    grad_sum = tl.zeros(i.shape, tl.float32)
    product_sum = tl.zeros(i.shape, tl.float32)
    if LATER > 0:
        v = _forward_steps(
            0,
            start,
            x_seq,
            affine,
            input_gain,
            None,
            None,
            None,
            tile,
            windows,
            x_row,
            row,
            window_row,
            decay,
            leak_current,
            v_threshold,
            v_reset,
            FIRST,
            RESET,
            POOL,
            LAST,
        )
        for segment in range(LATER):
            store(checkpoints, segment * row + block, i, inside, v)
            if segment < LATER - 1:
                v = _forward_steps(
                    FIRST + segment * SEGMENT,
                    v,
                    x_seq,
                    affine,
                    input_gain,
                    None,
                    None,
                    None,
                    tile,
                    windows,
                    x_row,
                    row,
                    window_row,
                    decay,
                    leak_current,
                    v_threshold,
                    v_reset,
                    SEGMENT,
                    RESET,
                    POOL,
                    LAST,
                )
        # another thread may own a neuron from here on, and reads what this one has noted
        tl.debug_barrier()
        for done in range(LATER):
            segment = LATER - 1 - done
            v = load(checkpoints, segment * row + block, i, inside)
            grad_v, grad_sum, product_sum = _backward_steps(
                FIRST + segment * SEGMENT,
                v,
                grad_v,
                grad_sum,
                product_sum,
                x_seq,
                affine,
                mean,
                lines,
                input_gain,
                grad_spike_seq,
                grad_v_seq,
                grad_current_seq,
                grad_x_seq,
                partial_grad_gain,
                tile,
                windows,
                x_row,
                x_row_again,
                row,
                window_row,
                decay,
                leak_current,
                v_threshold,
                v_reset,
                alpha,
                SEGMENT,
                RESET,
                POOL,
                LAST,
                DETACH,
                SURROGATE,
                SUMS,
            )
    grad_v, grad_sum, product_sum = _backward_steps(
        0,
        start,
        grad_v,
        grad_sum,
        product_sum,
        x_seq,
        affine,
        mean,
        lines,
        input_gain,
        grad_spike_seq,
        grad_v_seq,
        grad_current_seq,
        grad_x_seq,
        partial_grad_gain,
        tile,
        windows,
        x_row,
        x_row_again,
        row,
        window_row,
        decay,
        leak_current,
        v_threshold,
        v_reset,
        alpha,
        FIRST,
        RESET,
        POOL,
        LAST,
        DETACH,
        SURROGATE,
        SUMS,
    )
    if grad_v_init is not None:
        store(grad_v_init, block, i, inside, grad_v)
    if SUMS:
        _store_sums(
            partial_sums,
            program,
            tl.program_id(0) % blocks,
            channels,
            grad_sum,
            product_sum,
            CHANNELS,
        )
    if grad_x_total is not None:
        store(grad_x_total, block, i, inside, grad_sum * affine[0])


@triton.jit
def _store_sums(partial_sums, program, block, channels, one, other, CHANNELS: tl.constexpr):
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    at = program.to(tl.int64) * (2 * channels)
    store(partial_sums, at, c, c < channels, tl.sum(tl.sum(one, 0), 0))
    store(partial_sums, at + channels, c, c < channels, tl.sum(tl.sum(other, 0), 0))


@triton.jit(do_not_specialize=_COUNTS)
def bn_statistics(
    x_seq,
    partial_sums,
    samples,
    channels,
    units,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Shares [programs, 2, channels] of sum d and sum d^2, d = x - the first x of the channel, of
    COUNT tiles each.

    That one is near enough to the mean that nothing cancels.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0) // blocks
    c = _channels(tl.program_id(0) % blocks, CHANNELS)
    near = load(x_seq, 0, c * _to_next_channel(units * UNIT, LAST), c < channels).to(tl.float32)
    one = tl.zeros([1, BLOCK, CHANNELS], tl.float32)
    other = tl.zeros([1, BLOCK, CHANNELS], tl.float32)
    for k in range(COUNT):
        block, i, inside = _neurons(
            program * COUNT + k, c, samples, channels, 1, units, UNIT, BLOCK, False, LAST
        )
        d = tl.where(inside, load(x_seq, block, i, inside).to(tl.float32) - near, 0.0)
        one += d
        other += d * d
    _store_sums(partial_sums, program, tl.program_id(0) % blocks, channels, one, other, CHANNELS)


@triton.jit
def _to_next_channel(plane, LAST: tl.constexpr):
    if LAST:
        return 1
    else:
        return plane


@triton.jit(do_not_specialize=["count", "plane"])
def bn_moments(
    x_seq,
    sums,
    weight,
    bias,
    running_mean,
    running_var,
    moments,
    count,
    channels,
    plane,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    """Mean, variance, scale and offset [4, channels], from ``sums`` of :func:`bn_statistics` or
    what is running.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    if sums is None:
        mean = load(running_mean, 0, c, inside).to(tl.float64)
        variance = load(running_var, 0, c, inside).to(tl.float64)
    else:
        distance = load(sums, 0, c, inside) / count
        near = load(x_seq, 0, c * _to_next_channel(plane, LAST), inside).to(tl.float64)
        mean = near + distance
        variance = load(sums, channels, c, inside) / count - distance * distance
        variance = tl.where(variance < 0.0, 0.0, variance)
    scale = 1.0 / tl.sqrt(variance + EPS)
    if weight is not None:
        scale = load(weight, 0, c, inside).to(tl.float64) * scale
    offset = -mean * scale
    if bias is not None:
        offset = load(bias, 0, c, inside).to(tl.float64) - mean * scale
    store(moments, 0, c, inside, mean)
    store(moments, channels, c, inside, variance)
    store(moments, 2 * channels, c, inside, scale)
    store(moments, 3 * channels, c, inside, offset)


@triton.jit(do_not_specialize=["count"])
def bn_finish(
    sums, moments, grad_norm, slopes, count, channels, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of weight and bias, and for :func:`bn_dlif_backward` what batch statistics do to
    that of x.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    inverse_std = 1.0 / tl.sqrt(load(moments, channels, c, inside) + EPS)
    scale = load(moments, 2 * channels, c, inside)
    grad_sum = load(sums, 0, c, inside)
    product_sum = load(sums, channels, c, inside)
    store(grad_norm, 0, c, inside, product_sum * inverse_std)
    store(grad_norm, channels, c, inside, grad_sum)
    if slopes is not None:
        store(slopes, 0, c, inside, -scale * inverse_std * inverse_std * product_sum / count)
        store(slopes, channels, c, inside, -scale * grad_sum / count)
