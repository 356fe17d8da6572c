"""What runs on the device for the update of SGD, Adam and AdamW, which reads clean weights where they are saved.

The arithmetic of torch.optim, entry by entry, in float32 or float64. addresses: of the weights to be written, of where
they are read, of gradients, and of the state, (rows, tensors). layout: number of entries, (tensors,). group: of each
tensor. numbers: of each group, (5, groups). chunks: tensor, number of the block in it, (2, programs). found_inf: where
it is not 0, the weights are only brought back, and the state stays as it is. grad_scale: what SCALED gradients have
been multiplied by.
"""

import triton
import triton.language as tl

from sam_optim.optim.kernels.triton_ascent import load, pointer, store


@triton.jit
def number(numbers, row: tl.constexpr, groups, k, WIDE: tl.constexpr):
    return tl.load(numbers + row * groups + k).to(WIDE)


@triton.jit
def nonfinite(
    addresses,
    layout,
    chunks,
    progress,
    found_inf,
    skipped,
    tensors,
    programs,
    G: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found_inf <- 1 where a gradient is inf or NaN, else 0; skipped <- skipped + found_inf.

    By the last of `programs`, in whatever launch: progress counts them, and above 2^32 those that have found one, and
    is 0 again afterwards. Sums of whole numbers: their order does not matter. chunks: of SPAN blocks.
    """
    c = tl.program_id(0)
    i = tl.load(chunks + c)
    start = tl.load(chunks + tl.num_programs(0) + c).to(tl.int64) * (SPAN * BLOCK)
    n = tl.load(layout + i)
    place = pointer(addresses, 2 * tensors + i, G, ALIGNED)
    at = start + tl.arange(0, BLOCK)
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    if start + SPAN * BLOCK <= n:
        for k in tl.static_range(SPAN):
            x = load(place, at + k * BLOCK, n, True).to(WIDE)
            bad = tl.where(tl.abs(x) < float("inf"), bad, 1)
    else:
        for k in range(SPAN):
            x = load(place, at + k * BLOCK, n, False).to(WIDE)
            bad = tl.where(tl.abs(x) < float("inf"), bad, 1)
    own = tl.max(bad, axis=0).to(tl.int64) * 4294967296 + 1
    so_far = tl.atomic_add(progress, own) + own
    if so_far % 4294967296 == programs:
        is_bad = so_far >= 4294967296
        tl.store(found_inf, tl.where(is_bad, 1.0, 0.0))
        tl.store(skipped, tl.load(skipped) + tl.where(is_bad, 1, 0))
        tl.store(progress, so_far - so_far)


@triton.jit
def divided(x, y):
    """Rounded as torch rounds it: in float32 Triton's own division and root are approximate."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def gradient(place, at, n, skips, scale, WIDE: tl.constexpr, SCALED: tl.constexpr, FULL: tl.constexpr):
    """As it is, or what is left of it without GradScaler's factor, which then stands in its place, as with torch."""
    given = load(place, at, n, FULL)
    g = given.to(WIDE)
    if SCALED:
        g = divided(g, scale)
        store(place, at, tl.where(skips, given, g.to(given.dtype)), n, FULL)
    return g


@triton.jit
def sgd_block(
    addresses,
    i,
    tensors,
    at,
    n,
    lr,
    momentum,
    fresh,
    decay,
    skips,
    scale,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    clean = load(pointer(addresses, tensors + i, W, ALIGNED), at, n, FULL)
    w = clean.to(WIDE)
    g = gradient(pointer(addresses, 2 * tensors + i, G, ALIGNED), at, n, skips, scale, WIDE, SCALED, FULL)
    if MAXIMIZE:
        g = -g
    g += decay * w
    if MOMENTUM:
        place = pointer(addresses, 3 * tensors + i, W, ALIGNED)
        before = load(place, at, n, FULL)
        v = momentum * before.to(WIDE) + fresh * g
        store(place, at, tl.where(skips, before, v.to(W)), n, FULL)
        g = g + momentum * v if NESTEROV else v
    after = (w - lr * g).to(W)
    store(pointer(addresses, i, W, ALIGNED), at, tl.where(skips, clean, after), n, FULL)


@triton.jit
def sgd(
    addresses,
    layout,
    group,
    numbers,
    chunks,
    found_inf,
    grad_scale,
    tensors,
    groups,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """v <- momentum v + (1 - dampening) g;  w <- saved - lr v.  numbers: lr, momentum, dampening, weight decay, -."""
    c = tl.program_id(0)
    i = tl.load(chunks + c)
    start = tl.load(chunks + tl.num_programs(0) + c).to(tl.int64) * BLOCK
    n = tl.load(layout + i)
    k = tl.load(group + i)
    at = start + tl.arange(0, BLOCK)
    lr, momentum = number(numbers, 0, groups, k, WIDE), number(numbers, 1, groups, k, WIDE)
    fresh = (1 - tl.load(numbers + 2 * groups + k)).to(WIDE)
    decay = number(numbers, 3, groups, k, WIDE)
    skips = tl.load(found_inf) != 0
    scale = tl.load(grad_scale).to(WIDE)
    if start + BLOCK <= n:
        sgd_block(
            addresses,
            i,
            tensors,
            at,
            n,
            lr,
            momentum,
            fresh,
            decay,
            skips,
            scale,
            G,
            W,
            WIDE,
            MOMENTUM,
            NESTEROV,
            MAXIMIZE,
            SCALED,
            ALIGNED,
            True,
        )
    else:
        sgd_block(
            addresses,
            i,
            tensors,
            at,
            n,
            lr,
            momentum,
            fresh,
            decay,
            skips,
            scale,
            G,
            W,
            WIDE,
            MOMENTUM,
            NESTEROV,
            MAXIMIZE,
            SCALED,
            ALIGNED,
            False,
        )


@triton.jit
def power(x, exponent):
    """x ** exponent in float64, by squaring: exponents are whole."""
    result = x * 0.0 + 1.0
    for bit in tl.static_range(31):
        result = tl.where((exponent >> bit) & 1 == 1, result * x, result)
        x = x * x
    return result


@triton.jit
def adam_steps(steps, group, numbers, found_inf, scalars, tensors, groups, BLOCK: tl.constexpr):
    """step <- step + 1;  scalars <- [lr / (1 - beta1^step), sqrt(1 - beta2^step)] of each tensor, (2, tensors)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < tensors
    place = tl.load(steps + i, mask=here, other=0).to(tl.pointer_type(tl.float32))
    k = tl.load(group + i, mask=here, other=0)
    taken = tl.where(tl.load(found_inf) != 0, 0.0, 1.0)
    step = tl.load(place, mask=here, other=0.0) + taken
    tl.store(place, step, mask=here)
    whole = step.to(tl.int32)
    lr = tl.load(numbers + k, mask=here, other=0.0)
    beta1 = tl.load(numbers + groups + k, mask=here, other=0.0)
    beta2 = tl.load(numbers + 2 * groups + k, mask=here, other=0.0)
    tl.store(scalars + i, lr / (1 - power(beta1, whole)), mask=here & (whole > 0))
    tl.store(scalars + tensors + i, tl.sqrt(1 - power(beta2, whole)), mask=here & (whole > 0))


@triton.jit
def adam_block(
    addresses,
    i,
    tensors,
    at,
    n,
    beta1,
    beta2,
    fresh1,
    fresh2,
    decay,
    eps,
    step_size,
    correction,
    skips,
    scale,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    clean = load(pointer(addresses, tensors + i, W, ALIGNED), at, n, FULL)
    w = clean.to(WIDE)
    g = gradient(pointer(addresses, 2 * tensors + i, G, ALIGNED), at, n, skips, scale, WIDE, SCALED, FULL)
    if MAXIMIZE:
        g = -g
    if DECOUPLED:
        w -= decay * w
    else:
        g += decay * w
    m_place = pointer(addresses, 3 * tensors + i, W, ALIGNED)
    v_place = pointer(addresses, 4 * tensors + i, W, ALIGNED)
    m_before = load(m_place, at, n, FULL)
    v_before = load(v_place, at, n, FULL)
    m = beta1 * m_before.to(WIDE) + fresh1 * g
    v = beta2 * v_before.to(WIDE) + fresh2 * g * g
    store(m_place, at, tl.where(skips, m_before, m.to(W)), n, FULL)
    store(v_place, at, tl.where(skips, v_before, v.to(W)), n, FULL)
    if AMSGRAD:
        most_place = pointer(addresses, 5 * tensors + i, W, ALIGNED)
        most = load(most_place, at, n, FULL)
        v = tl.where(most.to(WIDE) > v, most.to(WIDE), v)
        store(most_place, at, tl.where(skips, most, v.to(W)), n, FULL)
    after = (w - divided(step_size * m, divided(root(v), correction) + eps)).to(W)
    store(pointer(addresses, i, W, ALIGNED), at, tl.where(skips, clean, after), n, FULL)


@triton.jit
def adam(
    addresses,
    layout,
    group,
    numbers,
    chunks,
    found_inf,
    grad_scale,
    scalars,
    tensors,
    groups,
    first,
    all_tensors,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As Adam, or AdamW where DECOUPLED. numbers: lr, beta1, beta2, weight decay, eps; scalars: see `adam_steps`."""
    c = tl.program_id(0)
    i = tl.load(chunks + c)
    start = tl.load(chunks + tl.num_programs(0) + c).to(tl.int64) * BLOCK
    n = tl.load(layout + i)
    k = tl.load(group + i)
    at = start + tl.arange(0, BLOCK)
    beta1, beta2 = number(numbers, 1, groups, k, WIDE), number(numbers, 2, groups, k, WIDE)
    # 1 - 0.999 has lost four digits in float32
    fresh1 = (1 - tl.load(numbers + groups + k)).to(WIDE)
    fresh2 = (1 - tl.load(numbers + 2 * groups + k)).to(WIDE)
    decay = tl.load(numbers + 3 * groups + k)
    if DECOUPLED:
        decay = decay * tl.load(numbers + k)
    decay = decay.to(WIDE)
    eps = number(numbers, 4, groups, k, WIDE)
    step_size = tl.load(scalars + first + i).to(WIDE)
    correction = tl.load(scalars + all_tensors + first + i).to(WIDE)
    skips = tl.load(found_inf) != 0
    scale = tl.load(grad_scale).to(WIDE)
    if start + BLOCK <= n:
        adam_block(
            addresses,
            i,
            tensors,
            at,
            n,
            beta1,
            beta2,
            fresh1,
            fresh2,
            decay,
            eps,
            step_size,
            correction,
            skips,
            scale,
            G,
            W,
            WIDE,
            DECOUPLED,
            AMSGRAD,
            MAXIMIZE,
            SCALED,
            ALIGNED,
            True,
        )
    else:
        adam_block(
            addresses,
            i,
            tensors,
            at,
            n,
            beta1,
            beta2,
            fresh1,
            fresh2,
            decay,
            eps,
            step_size,
            correction,
            skips,
            scale,
            G,
            W,
            WIDE,
            DECOUPLED,
            AMSGRAD,
            MAXIMIZE,
            SCALED,
            ALIGNED,
            False,
        )
