"""What runs on the device for the ascent: partial norms, one finalisation, the move. See `kernels.triton`.

Each program has one chunk of one tensor, whose addresses it reads from tables: the number of launches does not grow
with the number of tensors. Whole blocks are read and written without a mask, 16 bytes at a time where addresses allow.
Arithmetic is in float32, or float64 where weights or gradients are; there are no atomics, and the order of every sum is
fixed, so that the same gradients give the same bits.
"""

import triton
import triton.language as tl

ONES = tl.constexpr(0)  # T = 1
ELEMENTS = tl.constexpr(1)  # T = a |w| + eta: a = 0, eta = 1 for tensors at T = 1 beside adaptive ones
SLICES = tl.constexpr(2)  # T is one number for each row, or for the tensor


@triton.jit
def pointer(addresses, i, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = tl.load(addresses + i).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # a promise to the compiler, without which all access is entry by entry
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def load(pointer, at, n, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer + at)
    else:
        return tl.load(pointer + at, mask=at < n, other=0.0)


@triton.jit
def store(pointer, at, value, n, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, mask=at < n)


@triton.jit
def t_of(
    w, start, n, i, num_tensors, fixed, layout, numbers, WIDE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """T of tensor i, whose values are w, at the block of its entries that begins at start."""
    if MODE == ELEMENTS:
        a, eta = tl.load(numbers + i).to(WIDE), tl.load(numbers + num_tensors + i).to(WIDE)
        return tl.abs(w) * a + eta
    else:
        t = tl.load(fixed + 2 * num_tensors + i).to(tl.pointer_type(WIDE))
        stride, size = tl.load(layout + num_tensors + i), tl.load(layout + 2 * num_tensors + i)
        entry = tl.arange(0, BLOCK)  # divided in 32 bits: 64 take many registers
        row = ((start // stride) % size).to(tl.int32) + ((start % stride).to(tl.int32) + entry) // stride.to(tl.int32)
        return tl.load(t + row % size.to(tl.int32), mask=start + entry < n, other=0.0)


@triton.jit
def powers(
    g_pointer,
    w_pointer,
    start,
    n,
    i,
    num_tensors,
    fixed,
    layout,
    numbers,
    WIDE: tl.constexpr,
    SUM: tl.constexpr,
    MODE: tl.constexpr,
    SQUARES: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """|T g|^q of one block, T g in WIDE and the power in SUM."""
    at = start + tl.arange(0, BLOCK)
    x = load(g_pointer, at, n, FULL).to(WIDE)
    if MODE != ONES:
        w = tl.zeros([BLOCK], dtype=WIDE)
        if MODE == ELEMENTS:
            w = load(w_pointer, at, n, FULL).to(WIDE)
        x = x * t_of(w, start, n, i, num_tensors, fixed, layout, numbers, WIDE, MODE, BLOCK)
    x = x.to(SUM)
    return x * x if SQUARES else tl.abs(x)


@triton.jit
def sum_of_powers(
    g_pointer,
    w_pointer,
    start,
    n,
    i,
    num_tensors,
    fixed,
    layout,
    numbers,
    WIDE: tl.constexpr,
    SUM: tl.constexpr,
    MODE: tl.constexpr,
    SQUARES: tl.constexpr,
    FULL: tl.constexpr,
    UNROLLED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum |T g|^q over one chunk. Unrolled, all its loads are under way at once, and in registers."""
    total = tl.zeros([BLOCK], dtype=SUM)
    if UNROLLED:
        for k in tl.static_range(SPAN):
            total += powers(
                g_pointer,
                w_pointer,
                start + k * BLOCK,
                n,
                i,
                num_tensors,
                fixed,
                layout,
                numbers,
                WIDE,
                SUM,
                MODE,
                SQUARES,
                FULL,
                BLOCK,
            )
    else:
        for k in range(SPAN):
            total += powers(
                g_pointer,
                w_pointer,
                start + k * BLOCK,
                n,
                i,
                num_tensors,
                fixed,
                layout,
                numbers,
                WIDE,
                SUM,
                MODE,
                SQUARES,
                FULL,
                BLOCK,
            )
    return tl.sum(total, axis=0)


@triton.jit
def norm_partials(
    grads,
    fixed,
    layout,
    numbers,
    chunks,
    partials,
    num_tensors,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[place] <- sum |T g|^q over a chunk of SPAN blocks.

    grads: addresses, (tensors,). fixed: addresses of w, of where w is saved, of T, (3, tensors). layout: number of
    entries, and stride and number of the slices of T, (3, tensors). numbers: a and eta, (2, tensors). chunks: tensor,
    number of the chunk in it, place of the sum, (3, programs).
    """
    c = tl.program_id(0)
    programs = tl.num_programs(0)
    i = tl.load(chunks + c)
    start = tl.load(chunks + programs + c).to(tl.int64) * (SPAN * BLOCK)
    n = tl.load(layout + i)
    g = pointer(grads, i, G, ALIGNED)
    w = pointer(fixed, i, W, ALIGNED)
    SUM: tl.constexpr = WIDE
    if start + SPAN * BLOCK <= n:
        total = sum_of_powers(
            g, w, start, n, i, num_tensors, fixed, layout, numbers, WIDE, SUM, MODE, SQUARES, True, True, SPAN, BLOCK
        )
    else:
        total = sum_of_powers(
            g, w, start, n, i, num_tensors, fixed, layout, numbers, WIDE, SUM, MODE, SQUARES, False, False, SPAN, BLOCK
        )
    result = total.to(tl.float64)
    if not ((total > 1e-30) & (total < 1e30)):  # squares have left float32, or it is 0 or NaN and stays so
        result = sum_of_powers(
            g,
            w,
            start,
            n,
            i,
            num_tensors,
            fixed,
            layout,
            numbers,
            WIDE,
            tl.float64,
            MODE,
            SQUARES,
            False,
            False,
            SPAN,
            BLOCK,
        )
    tl.store(partials + tl.load(chunks + 2 * programs + c), result)


@triton.jit
def finalise(
    partials,
    bucket_of_row,
    kinds,
    rhos,
    numbers,
    moved,
    stays,
    num_buckets,
    NUM: tl.constexpr,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
):
    """One program: numbers <- [norm, ||T^-1 e||_p, factor of each bucket, sum |T g|^q of each bucket], in float64.

    partials: (ROWS, ROW), each row of one bucket. kinds: 1 where p = inf, 0 where p = 2. rhos: the radii. moved:
    whether the norm is neither 0 nor inf nor NaN; stays counts how often it was.
    """
    b = tl.arange(0, NUM)
    here = b < num_buckets
    power = tl.zeros([NUM], dtype=tl.float64)
    for k in range(ROWS):
        x = tl.sum(tl.load(partials + k * ROW + tl.arange(0, ROW)), axis=0)
        power += tl.where(b == tl.load(bucket_of_row + k), x, 0.0)
    is_inf = tl.load(kinds + b, mask=here, other=0) != 0
    squares = tl.sum(tl.where(is_inf, 0.0, power), axis=0)
    sums = tl.sum(tl.where(is_inf, power, 0.0), axis=0)
    norm = tl.sqrt(squares)
    total = norm + sums
    moves = (total > 0) & (total < float("inf"))
    rho = tl.load(rhos + b, mask=here, other=0.0).to(tl.float64)
    own = tl.where(is_inf, sums, norm)
    factor = tl.where(is_inf, rho, rho / tl.where(own > 0, own, 1.0))
    factor = tl.where(moves, tl.where(own > 0, factor, 0.0), 0.0)
    share = power / tl.where(squares > 0, squares, 1.0)
    length = tl.sqrt(tl.sum(tl.where(is_inf, 0.0, rho * rho * share), axis=0))
    longest = tl.max(tl.where(is_inf, tl.abs(rho), 0.0), axis=0)
    length = tl.where(moves, tl.where(longest > length, longest, length), 0.0)
    tl.store(numbers, total)
    tl.store(numbers + 1, length)
    tl.store(numbers + 2 + b, factor, mask=here)
    tl.store(numbers + 2 + num_buckets + b, power, mask=here)
    tl.store(moved, tl.where(moves, 1, 0).to(tl.int8))
    tl.store(stays, tl.load(stays) + tl.where(moves, 0, 1))


@triton.jit
def move_block(
    grads,
    fixed,
    layout,
    numbers,
    i,
    num_tensors,
    start,
    n,
    factor,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """saved <- w;  w <- w + factor T^2 g  or  w + factor T sign(g). Returns <e', e> and <e, e>, e' what w has of e."""
    at = start + tl.arange(0, BLOCK)
    w_pointer = pointer(fixed, i, W, ALIGNED)
    w = load(w_pointer, at, n, FULL)
    g = load(pointer(grads, i, G, ALIGNED), at, n, FULL).to(WIDE)
    wide = w.to(WIDE)
    if not SQUARES:
        g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)).to(WIDE)
    if MODE != ONES:
        t = t_of(wide, start, n, i, num_tensors, fixed, layout, numbers, WIDE, MODE, BLOCK)
        g = g * t * t if SQUARES else g * t
    e = tl.where(factor == 0, 0.0, g * factor)  # a gradient of NaN must not reach w
    moved = (wide + e).to(W)
    store(pointer(fixed, num_tensors + i, W, ALIGNED), at, w, n, FULL)
    store(w_pointer, at, moved, n, FULL)
    left = moved.to(WIDE) - wide
    return tl.sum(left * e, axis=0), tl.sum(e * e, axis=0)


@triton.jit
def perturb(
    grads,
    fixed,
    layout,
    numbers,
    bucket,
    factors,
    chunks,
    realized,
    num_tensors,
    G: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `move_block`, from the last chunk to the first: the end of g is still in the cache from `norm_partials`.

    As there, with chunks: tensor, number of the block in it, (2, programs); bucket: of each tensor, its place in
    factors; realized: with MEASURE, what `move_block` returns, (2, programs).
    """
    programs = tl.num_programs(0)
    c = programs - 1 - tl.program_id(0)
    i = tl.load(chunks + c)
    start = tl.load(chunks + programs + c).to(tl.int64) * BLOCK
    n = tl.load(layout + i)
    factor = tl.load(factors + tl.load(bucket + i)).to(WIDE)
    if start + BLOCK <= n:
        dot, square = move_block(
            grads,
            fixed,
            layout,
            numbers,
            i,
            num_tensors,
            start,
            n,
            factor,
            G,
            W,
            WIDE,
            MODE,
            SQUARES,
            ALIGNED,
            True,
            BLOCK,
        )
    else:
        dot, square = move_block(
            grads,
            fixed,
            layout,
            numbers,
            i,
            num_tensors,
            start,
            n,
            factor,
            G,
            W,
            WIDE,
            MODE,
            SQUARES,
            ALIGNED,
            False,
            BLOCK,
        )
    if MEASURE:
        tl.store(realized + c, dot.to(tl.float64))
        tl.store(realized + programs + c, square.to(tl.float64))
