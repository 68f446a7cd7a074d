"""One step of :mod:`.jacobi`: Jacobi's method on a subproblem, which a program holds in registers.

A sweep rotates every two indices once, in steps of disjoint pairs (i, i ^ d), one for each distance d. A step rotates
the rows, transposes, and rotates the rows again: Triton lays the rows out along the lanes of a warp, and a gather of 32
rows is one shuffle for each element.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def members(step, pair, pairs, SIZE: tl.constexpr):
    """Indices of the rows of a pair of blocks in one round of a tournament, by the circle method: lower block first."""
    rounds = 2 * pairs - 1
    one = (step + pair) % rounds
    other = tl.where(pair == 0, rounds, (step + rounds - pair) % rounds)
    index = tl.arange(0, SIZE)
    BLOCK: tl.constexpr = SIZE // 2
    upper = tl.minimum(one, other) * BLOCK + index
    lower = tl.maximum(one, other) * BLOCK + index - BLOCK
    return tl.where(index < BLOCK, upper, lower)


@triton.jit
def roots_of(diagonal):
    """√|a_ii| with the sign of a_ii."""
    return tl.where(diagonal < 0.0, -1.0, 1.0) * tl.sqrt(tl.abs(diagonal))


@triton.jit
def threshold(product, norm, tolerance):
    """The largest |a_ij| that needs no rotation, for the product of two roots; relative to the norm unless positive."""
    return tolerance * tl.where(product > 0.0, product, norm)


@triton.jit
def rotations(diagonal, off, index, partner, norm, tolerance):
    """For each index the rotation that annihilates its element ``off`` with its partner, if that is needed.

    The angle is at most π/4 (Golub & Van Loan, §8.5), or π/2 off such an angle where the diagonal would not descend
    otherwise, which saves sweeps.

    Returns:
        The sine and the tangent of half the angle, of opposite signs for partners; the new diagonal; the partners of
        those that are rotated, -1 for the others.
    """
    other = tl.gather(diagonal, partner, 0)
    off = 0.5 * (off + tl.gather(off, partner, 0))  # the same bits for both partners, or columns lose orthogonality
    needed = tl.abs(off) > threshold(roots_of(diagonal) * roots_of(other), norm, tolerance)
    first = index < partner
    theta = 0.5 * (other - diagonal) / tl.where(needed, off, 1.0)
    sign = tl.where((theta > 0.0) | ((theta == 0.0) & first), 1.0, -1.0)
    tangent = tl.where(needed, sign / (tl.abs(theta) + tl.sqrt(1.0 + theta * theta)), 0.0)
    square = 1.0 + tangent * tangent
    cosine = tl.rsqrt(square)
    cosine *= 1.5 - 0.5 * square * cosine * cosine  # the hardware's two roundoffs, all of one sign, would add up
    sine = tangent * cosine
    mine = diagonal - tangent * off
    theirs = other + tangent * off
    swapped = needed & (mine != theirs) & (first == (mine < theirs))
    new_sine = tl.where(swapped, -sign * cosine, sine)
    half = new_sine / (1.0 + tl.where(swapped, sign * sine, cosine))
    return new_sine, half, tl.where(swapped, theirs, mine), tl.where(needed, partner, -1)


@triton.jit
def rotated(rows, partner, sine, half, SIZE: tl.constexpr):
    """Each row turned towards its partner.

    Adding a correction, as in Rutishauser (1966), keeps orthogonality an order of magnitude better than c·x − s·y.
    """
    mates = tl.gather(rows, tl.broadcast_to(partner[:, None], (SIZE, SIZE)), 0)
    return rows - sine[:, None] * (mates + half[:, None] * rows)


@triton.jit
def largest_needed(A, diagonal, different, norm, tolerance):
    """The largest off-diagonal element above its threshold, 0 if none needs a rotation."""
    roots = roots_of(diagonal)
    needed = different & (tl.abs(A) > threshold(roots[:, None] * roots[None, :], norm, tolerance))
    return tl.max(tl.max(tl.where(needed, tl.abs(A), 0.0), 1), 0)


@triton.jit
def swept(A, diagonal, Qt, index, norm, tolerance, SIZE: tl.constexpr):
    """A, its diagonal and Qᵀ after a sweep. The diagonal of A itself is not kept up to date."""
    for distance in range(1, SIZE):
        partner = index ^ distance
        off = tl.sum(tl.where(index[None, :] == partner[:, None], A, 0.0), 1)
        sine, half, diagonal, zero = rotations(diagonal, off, index, partner, norm, tolerance)
        A = rotated(A, partner, sine, half, SIZE)
        A = rotated(tl.trans(A), partner, sine, half, SIZE)  # the columns, for A is symmetric
        A = tl.where(index[None, :] == zero[:, None], 0.0, A)
        Qt = rotated(Qt, partner, sine, half, SIZE)
    return 0.5 * (A + tl.trans(A)), diagonal, Qt


@triton.jit(do_not_specialize=["batch", "pairs", "sweep", "step"])  # one compilation for all
def diagonalize(
    matrices,
    turns,
    busy,
    unfinished,
    norms,
    batch,
    pairs,
    sweep,
    step,
    tolerance,
    SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Jacobi's method on the subproblem of one pair of one matrix per program, at most ``LIMIT`` sweeps.

    Args:
        matrices: (batch, n, n) with n = pairs·SIZE.
        turns: (batch, pairs, SIZE, SIZE), set to Qᵀ.
        busy: (batch, pairs) int32, set to whether Q is not the identity.
        unfinished: (sweeps + 1, batch) int32; row ``sweep`` says which matrices need it, the next one is set.
        norms: (batch,), the largest element of each matrix.
    """
    matrix = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    if tl.load(unfinished + sweep * batch + matrix) != 0:
        n = pairs * SIZE
        norm = tl.load(norms + matrix)
        index = tl.arange(0, SIZE)
        member = members(step, pair, pairs, SIZE)
        tile = matrices + matrix.to(tl.int64) * n * n + member[:, None] * n + member[None, :]
        A = tl.load(tile)
        different = index[:, None] != index[None, :]
        diagonal = tl.sum(tl.where(different, 0.0, A), 1)
        largest = largest_needed(A, diagonal, different, norm, tolerance)
        tl.store(busy + tl.program_id(0), tl.where(largest > 0.0, 1, 0))
        if largest > 0.0:
            tl.store(unfinished + (sweep + 1) * batch + matrix, 1)
            Qt = tl.where(different, 0.0, 1.0)
            if LIMIT == 1:
                A, diagonal, Qt = swept(A, diagonal, Qt, index, norm, tolerance, SIZE)
            else:
                done = 0
                while (largest > 0.0) & (done < LIMIT):
                    A, diagonal, Qt = swept(A, diagonal, Qt, index, norm, tolerance, SIZE)
                    largest = largest_needed(A, diagonal, different, norm, tolerance)
                    done += 1
            tl.store(tile, tl.where(different, A, diagonal[:, None]))
            turn = turns + tl.program_id(0).to(tl.int64) * SIZE * SIZE
            tl.store(turn + index[:, None] * SIZE + index[None, :], Qt)
