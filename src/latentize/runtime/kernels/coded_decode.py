"""Split-KV absorbed decode over rows in codes, in Triton.

As :mod:`latent_decode`, for the rows of a :class:`~latentize.attention.coding.RowCode`. A program reads bytes, looks
their values up in the codebooks, and uses them at once: no restored row is ever in memory. Where a value's bits lie,
and which words they choose among, are six integers a column, so one kernel serves all widths. A token's two gains go
into its score and into its probability. The mean of the keys is turned to each row's position and enters the score
beside the rows. Rows that are seen as they are lie in parts of their own, and coded parts leave them out.

There is one new token. Q heads, N rows of a tile, r kv_lora_rank, n values of all roped components, F pairs.
"""

# What a kernel is written in looks like Python and has types of its own.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["attend_coded_splits"]


@triton.jit
def _values(
    ptr,
    at_N,
    ok_N,
    place_ptr,
    word_ptr,
    start: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CODED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Values ``[N, BLOCK]`` from column ``start`` on, without gains. See ``codecs.Coded.places``."""
    column = start + tl.arange(0, BLOCK)
    there = column < SIZE
    if CODED:
        at = place_ptr + column
        low_at = tl.load(at, mask=there, other=0)
        high_at = tl.load(at + SIZE, mask=there, other=0)
        shift = tl.load(at + 2 * SIZE, mask=there, other=0)
        high = tl.load(at + 3 * SIZE, mask=there, other=0)
        word_at = tl.load(at + 4 * SIZE, mask=there, other=0)
        step = tl.load(at + 5 * SIZE, mask=there, other=0)
        # Columns without bits have no words to step over.
        read = ok_N[:, None] & (step > 0)[None, :]
        index = tl.load(ptr + at_N[:, None] + low_at[None, :], mask=read, other=0).to(tl.int32)
        more = tl.load(ptr + at_N[:, None] + high_at[None, :], mask=read & (high > 0)[None, :], other=0).to(tl.int32)
        index = index | (((more >> shift[None, :]) & high[None, :]) << 8)
        found = tl.load(word_ptr + word_at[None, :] + index * step[None, :], mask=read, other=0.0)
    else:
        found = tl.load(ptr + at_N[:, None] + column[None, :], mask=ok_N[:, None] & there[None, :], other=0.0)
    return found.to(COMPUTE)


@triton.jit
def _gains(ptr, at_N, ok_N):
    """Of a byte: eight steps an octave, as ``quantizer.gain_values``."""
    byte_N = tl.load(ptr + at_N, mask=ok_N, other=0).to(tl.float32)
    return tl.where(ok_N, tl.exp2((byte_N - 128.0) / 8.0), 0.0)


@triton.jit
def _queries(ptr, head_Q, heads, start: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """``[Q, BLOCK]`` from value ``start`` on, of ``SIZE`` that belong together among ``WIDTH``."""
    dim = tl.arange(0, BLOCK)
    at = ptr + head_Q.to(tl.int64)[:, None] * WIDTH + start + dim[None, :]
    return tl.load(at, mask=(head_Q < heads)[:, None] & (dim < SIZE)[None, :], other=0.0)


# What changes while a cache grows must not ask for another kernel.
@triton.jit(
    do_not_specialize=[
        *("heads", "first", "count", "splits", "split_from", "all_splits", "c_outer", "k_outer"),
        *("number_outer", "apart_outer", "mask_outer"),
    ]
)
def attend_coded_splits(
    q_ptr,
    q_rope_ptr,
    c_ptr,
    k_ptr,
    c_place_ptr,
    k_place_ptr,
    word_ptr,
    frequency_ptr,
    start_ptr,
    number_ptr,
    apart_ptr,
    length_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    scale,
    heads,
    first,
    count,
    splits,
    split_from,
    all_splits,
    c_outer,
    c_token,
    k_outer,
    k_token,
    number_outer,
    apart_outer,
    mask_outer,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAIRS: tl.constexpr,
    CODED: tl.constexpr,
    NUMBERED: tl.constexpr,
    APART: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Grid: tiles of heads, splits, sequences. See ``launch.coded_decode`` for what the arguments mean.

    The part has ``count`` rows of each sequence: of numbers from ``first`` on, or of those at ``number_ptr``. Those
    whose numbers are at ``apart_ptr`` are left out. Writes ``out [B, H, all_splits, r]`` and ``lse [B, H, all_splits]``
    (base 2), float32, at ``split_from`` and after.
    """
    head_Q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + sequence)
    begins = tl.load(start_ptr + sequence)
    end = count
    if not NUMBERED:
        end = tl.minimum(count, length - first)
    tiles = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    share = tl.cdiv(tiles, splits)

    width: tl.constexpr = ROPE + 2 * PAIRS
    q_base = sequence * heads
    q_rope_at = q_rope_ptr + q_base * width
    q = _queries(q_ptr + q_base * RANK, head_Q, heads, 0, RANK, BLOCK_RANK, RANK)
    q_cos = _queries(q_rope_at, head_Q, heads, ROPE, PAIRS, BLOCK_PAIRS, width)
    q_sin = _queries(q_rope_at, head_Q, heads, ROPE + PAIRS, PAIRS, BLOCK_PAIRS, width)
    pair = tl.arange(0, BLOCK_PAIRS)
    frequency = tl.load(frequency_ptr + pair, mask=pair < PAIRS, other=0.0)

    top_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total_Q = tl.zeros([BLOCK_Q], tl.float32)
    sum_Qr = tl.zeros([BLOCK_Q, BLOCK_RANK], tl.float32)
    # Sums are in units of the largest gain so far.
    unit = 1e-30
    for i in range(split * share, tl.minimum(split * share + share, tiles)):
        row_N = i * BLOCK_N + tl.arange(0, BLOCK_N)
        ok_N = row_N < end
        if NUMBERED:
            j_N = tl.load(number_ptr + sequence * number_outer + row_N, mask=ok_N, other=-1).to(tl.int32)
            ok_N = ok_N & (j_N >= 0) & (j_N < length)
        else:
            j_N = first + row_N
        for a in tl.static_range(APART):
            ok_N = ok_N & (j_N != tl.load(apart_ptr + sequence * apart_outer + a))
        c_at_N = sequence * c_outer + row_N.to(tl.int64) * c_token
        k_at_N = sequence * k_outer + row_N.to(tl.int64) * k_token
        tile = _values(c_ptr, c_at_N, ok_N, c_place_ptr, word_ptr, 0, RANK, BLOCK_RANK, CODED, COMPUTE)
        score_QN = tl.dot(q, tl.trans(tile), input_precision="ieee")
        rope_QN = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for start in tl.static_range(0, ROPE, BLOCK_ROPE):
            roped = _values(k_ptr, k_at_N, ok_N, k_place_ptr, word_ptr, start, ROPE, BLOCK_ROPE, CODED, COMPUTE)
            q_rope = _queries(q_rope_at, head_Q, heads, start, ROPE - start, BLOCK_ROPE, width)
            rope_QN = tl.dot(q_rope, tl.trans(roped), rope_QN, input_precision="ieee")
        if CODED:
            c_gain_N = _gains(c_ptr, c_at_N, ok_N)
            score_QN = score_QN * c_gain_N[None, :]
            rope_QN = rope_QN * _gains(k_ptr, k_at_N, ok_N)[None, :]
        angle_NF = (j_N - begins).to(tl.float32)[:, None] * frequency[None, :]
        rope_QN = tl.dot(q_cos, tl.trans(tl.cos(angle_NF).to(COMPUTE)), rope_QN, input_precision="ieee")
        rope_QN = tl.dot(q_sin, tl.trans(tl.sin(angle_NF).to(COMPUTE)), rope_QN, input_precision="ieee")
        score_QN = (score_QN + rope_QN) * (scale * 1.4426950408889634)

        if MASKED:
            ok_N = ok_N & (tl.load(mask_ptr + sequence * mask_outer + j_N, mask=ok_N, other=0) != 0)
        score_QN = tl.where(ok_N[None, :] & (head_Q < heads)[:, None], score_QN, float("-inf"))

        new_top_Q = tl.maximum(top_Q, tl.max(score_QN, 1))
        finite_Q = tl.where(new_top_Q == float("-inf"), 0.0, new_top_Q)
        p_QN = tl.exp2(score_QN - finite_Q[:, None])
        fade_Q = tl.exp2(top_Q - finite_Q)
        total_Q = total_Q * fade_Q + tl.sum(p_QN, 1)
        top_Q = new_top_Q
        if CODED:
            new_unit = tl.maximum(unit, tl.max(c_gain_N, 0))
            p_QN = p_QN * (c_gain_N / new_unit)[None, :]
            fade_Q = fade_Q * (unit / new_unit)
            unit = new_unit
        sum_Qr = tl.dot(p_QN.to(COMPUTE), tile, sum_Qr * fade_Q[:, None], input_precision="ieee")

    blind_Q = total_Q == 0
    safe_Q = tl.where(blind_Q, 1.0, total_Q)
    factor_Q = 1.0 / safe_Q
    if CODED:
        factor_Q = factor_Q * unit
    slot_Q = (q_base + head_Q) * all_splits + split_from + split
    dim = tl.arange(0, BLOCK_RANK)
    at_out = out_ptr + slot_Q[:, None] * RANK + dim[None, :]
    tl.store(at_out, sum_Qr * factor_Q[:, None], mask=(head_Q < heads)[:, None] & (dim < RANK)[None, :])
    lse_Q = tl.where(blind_Q, float("-inf"), top_Q + tl.log2(safe_Q))
    tl.store(lse_ptr + slot_Q, lse_Q, mask=head_Q < heads)
