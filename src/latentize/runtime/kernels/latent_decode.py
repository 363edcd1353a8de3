"""Split-KV absorbed decode in Triton: the only module that needs triton.

Absorbed attention is multi-query attention whose value is its key's first part. One program attends some of the rows of
one sequence for a few queries: it loads a tile of latents once, and uses it for the scores and for the sums. A second
kernel merges what the programs found, by log-sum-exp (Flash-Decoding; Dao et al., 2023).

A row may have factors on its logits, each for as many queries: norms of keys.

Quantised tiles are never multiplied: what is loaded becomes a number that the matrix units take, exactly, and a token's
scale goes into its score and into its probability. Probabilities are kept relative to the largest scale so far, so that
float16 holds them.

Q queries of a sequence (heads × new tokens, the tokens inner), N tokens of a tile, r kv_lora_rank, R qk_rope_head_dim.
Formats: ``float`` (any floating-point type), ``fp8`` (e4m3 as bytes), ``int8``, ``int4`` (two values a byte, the one of
even number low; sixteen levels from -7.5).
"""

# What a kernel is written in looks like Python and has types of its own.
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

__all__ = ["attend_splits", "merge_splits"]


@triton.jit
def _queries(ptr, row_Q, SIZE: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, rows):
    """Queries ``[Q, BLOCK]``; for int4 those of even and of odd dimensions, else the same twice."""
    step: tl.constexpr = 2 if FORMAT == "int4" else 1
    dim = tl.arange(0, BLOCK) * step
    at = ptr + row_Q.to(tl.int64)[:, None] * SIZE + dim[None, :]
    there = (row_Q < rows)[:, None]
    one = tl.load(at, mask=there & (dim < SIZE)[None, :], other=0.0)
    other = one
    if FORMAT == "int4":
        other = tl.load(at + 1, mask=there & (dim + 1 < SIZE)[None, :], other=0.0)
    return one, other


@triton.jit
def _tile(ptr, at_N, ok_N, SIZE: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr, COMPUTE: tl.constexpr):
    """Stored steps ``[N, BLOCK]``, without scales; for int4 of even and of odd dimensions, else the same twice."""
    width: tl.constexpr = (SIZE + 1) // 2 if FORMAT == "int4" else SIZE
    dim = tl.arange(0, BLOCK)
    raw = tl.load(ptr + at_N[:, None] + dim[None, :], mask=ok_N[:, None] & (dim < width)[None, :], other=0)
    if FORMAT == "int4":
        one = ((raw & 15).to(tl.float32) - 7.5).to(COMPUTE)
        other = ((raw >> 4).to(tl.float32) - 7.5).to(COMPUTE)
    elif FORMAT == "fp8":
        # The bits of a float16 that is 1/256 of it, subnormals included; the scale makes up for that.
        bits = raw.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        one = bits.to(tl.float16, bitcast=True).to(COMPUTE)
        other = one
    else:
        one = raw.to(COMPUTE)
        other = one
    return one, other


@triton.jit
def _scales(ptr, at_N, ok_N, FORMAT: tl.constexpr):
    unit: tl.constexpr = 256.0 if FORMAT == "fp8" else 1.0
    return tl.load(ptr + at_N, mask=ok_N, other=0.0).to(tl.float32) * unit


@triton.jit
def _dots(q, q_odd, tile, tile_odd, FORMAT: tl.constexpr):
    score = tl.dot(q, tl.trans(tile), input_precision="ieee")
    if FORMAT == "int4":
        score = tl.dot(q_odd, tl.trans(tile_odd), score, input_precision="ieee")
    return score


# What changes while a cache grows must not ask for another kernel.
@triton.jit(
    do_not_specialize=[
        *("rows", "new", "per_factor", "first", "stop", "window", "sinks", "gone"),
        *("splits", "split_from", "all_splits"),
        *("c_scale_outer", "k_scale_outer", "factor_outer", "mask_outer", "mask_token"),
    ]
)
def attend_splits(
    q_ptr,
    q_rope_ptr,
    q_sink_ptr,
    c_ptr,
    c_scale_ptr,
    k_ptr,
    k_scale_ptr,
    factor_ptr,
    length_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    scale,
    rows,
    new,
    per_factor,
    first,
    stop,
    window,
    sinks,
    gone,
    splits,
    split_from,
    all_splits,
    c_outer,
    c_token,
    c_scale_outer,
    c_scale_token,
    k_outer,
    k_token,
    k_scale_outer,
    k_scale_token,
    factor_outer,
    factor_token,
    mask_outer,
    mask_token,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS_TURNED: tl.constexpr,
    MASKED: tl.constexpr,
    FACTORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """Grid: tiles of queries, splits, sequences. See ``launch.absorbed_decode`` for what the arguments mean.

    ``first`` and ``stop`` are the rows of the sequence that lie in this storage; ``new`` new tokens are its last.
    Writes ``out [B, Q, all_splits, r]`` and ``lse [B, Q, all_splits]`` (base 2), float32, at ``split_from`` and after.
    """
    row_Q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + sequence)
    end = tl.minimum(length, stop)
    begin = first
    sink_end = first
    if WINDOW:
        # Sinks are tiles of their own, before those of the window.
        begin = tl.maximum(first, tl.maximum(sinks, length - window - new + 1))
        sink_end = tl.maximum(first, tl.minimum(sinks, end))
    sink_tiles = tl.cdiv(sink_end - first, BLOCK_N)
    tiles = sink_tiles + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    share = tl.cdiv(tiles, splits)

    token_Q = row_Q % new
    at_Q = length - new + token_Q
    q_base = sequence * rows
    q, q_odd = _queries(q_ptr + q_base * RANK, row_Q, RANK, BLOCK_RANK, LATENT, rows)
    q_rope, q_rope_odd = _queries(q_rope_ptr + q_base * ROPE, row_Q, ROPE, BLOCK_ROPE, ROPED, rows)
    if SINKS_TURNED:
        q_sink, q_sink_odd = _queries(q_sink_ptr + q_base * ROPE, row_Q, ROPE, BLOCK_ROPE, ROPED, rows)

    top_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total_Q = tl.zeros([BLOCK_Q], tl.float32)
    sum_Qr = tl.zeros([BLOCK_Q, BLOCK_RANK], tl.float32)
    sum_odd_Qr = sum_Qr
    # Sums are in units of the largest scale so far.
    unit = 1e-30
    for i in range(split * share, tl.minimum(split * share + share, tiles)):
        in_sinks = i < sink_tiles
        j_N = tl.where(in_sinks, first + i * BLOCK_N, begin + (i - sink_tiles) * BLOCK_N) + tl.arange(0, BLOCK_N)
        ok_N = j_N < tl.where(in_sinks, sink_end, end)
        inner_N = (j_N - first).to(tl.int64)
        tile, tile_odd = _tile(c_ptr, sequence * c_outer + inner_N * c_token, ok_N, RANK, BLOCK_RANK, LATENT, COMPUTE)
        roped, roped_odd = _tile(k_ptr, sequence * k_outer + inner_N * k_token, ok_N, ROPE, BLOCK_ROPE, ROPED, COMPUTE)
        score_QN = _dots(q, q_odd, tile, tile_odd, LATENT)
        if SINKS_TURNED:
            here, here_odd = tl.where(in_sinks, q_sink, q_rope), tl.where(in_sinks, q_sink_odd, q_rope_odd)
            rope_QN = _dots(here, here_odd, roped, roped_odd, ROPED)
        else:
            rope_QN = _dots(q_rope, q_rope_odd, roped, roped_odd, ROPED)
        if ROPED != "float":
            k_scale_N = _scales(k_scale_ptr, sequence * k_scale_outer + inner_N * k_scale_token, ok_N, ROPED)
            rope_QN = rope_QN * k_scale_N[None, :]
        if LATENT != "float":
            c_scale_N = _scales(c_scale_ptr, sequence * c_scale_outer + inner_N * c_scale_token, ok_N, LATENT)
            score_QN = score_QN * c_scale_N[None, :]
        score_QN = (score_QN + rope_QN) * (scale * 1.4426950408889634)
        if FACTORED:
            factor_N = factor_ptr + sequence * factor_outer + inner_N * factor_token
            at_factor = factor_N[None, :] + (row_Q // per_factor)[:, None]
            there_QN = ok_N[None, :] & (row_Q < rows)[:, None]
            score_QN = score_QN * tl.load(at_factor, mask=there_QN, other=0.0).to(tl.float32)

        seen_QN = ok_N[None, :] & (j_N[None, :] <= at_Q[:, None]) & (row_Q < rows)[:, None]
        if WINDOW:
            seen_QN = seen_QN & ((at_Q[:, None] - j_N[None, :] < window) | (j_N < sinks)[None, :])
        if MASKED:
            column_N = (j_N + tl.where(j_N < sinks, 0, gone)).to(tl.int64)
            at_mask = mask_ptr + sequence * mask_outer + token_Q[:, None] * mask_token + column_N[None, :]
            seen_QN = seen_QN & (tl.load(at_mask, mask=seen_QN, other=0) != 0)
        score_QN = tl.where(seen_QN, score_QN, float("-inf"))

        new_top_Q = tl.maximum(top_Q, tl.max(score_QN, 1))
        finite_Q = tl.where(new_top_Q == float("-inf"), 0.0, new_top_Q)
        p_QN = tl.exp2(score_QN - finite_Q[:, None])
        fade_Q = tl.exp2(top_Q - finite_Q)
        total_Q = total_Q * fade_Q + tl.sum(p_QN, 1)
        top_Q = new_top_Q
        if LATENT != "float":
            new_unit = tl.maximum(unit, tl.max(c_scale_N, 0))
            p_QN = p_QN * (c_scale_N / new_unit)[None, :]
            fade_Q = fade_Q * (unit / new_unit)
            unit = new_unit
        p_QN = p_QN.to(COMPUTE)
        sum_Qr = tl.dot(p_QN, tile, sum_Qr * fade_Q[:, None], input_precision="ieee")
        if LATENT == "int4":
            sum_odd_Qr = tl.dot(p_QN, tile_odd, sum_odd_Qr * fade_Q[:, None], input_precision="ieee")

    blind_Q = total_Q == 0
    safe_Q = tl.where(blind_Q, 1.0, total_Q)
    factor_Q = 1.0 / safe_Q
    if LATENT != "float":
        factor_Q = factor_Q * unit
    slot_Q = (q_base + row_Q) * all_splits + split_from + split
    step: tl.constexpr = 2 if LATENT == "int4" else 1
    dim = tl.arange(0, BLOCK_RANK) * step
    at_out = out_ptr + slot_Q[:, None] * RANK + dim[None, :]
    there = (row_Q < rows)[:, None]
    tl.store(at_out, sum_Qr * factor_Q[:, None], mask=there & (dim < RANK)[None, :])
    if LATENT == "int4":
        tl.store(at_out + 1, sum_odd_Qr * factor_Q[:, None], mask=there & (dim + 1 < RANK)[None, :])
    lse_Q = tl.where(blind_Q, float("-inf"), top_Q + tl.log2(safe_Q))
    tl.store(lse_ptr + slot_Q, lse_Q, mask=row_Q < rows)


@triton.jit(do_not_specialize=["splits"])
def merge_splits(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    splits,
    RANK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Grid: queries of all sequences, tiles of the rank. A query that sees nothing gets zeros, and ``-inf``."""
    query = tl.program_id(0).to(tl.int64)
    split_S = tl.arange(0, BLOCK_S)
    dim_r = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    lse_S = tl.load(part_lse_ptr + query * splits + split_S, mask=split_S < splits, other=float("-inf"))
    top = tl.max(lse_S, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_S = tl.exp2(lse_S - top)
    total = tl.sum(weight_S, 0)
    safe = tl.where(total == 0, 1.0, total)
    at = part_ptr + (query * splits + split_S)[:, None] * RANK + dim_r[None, :]
    part_Sr = tl.load(at, mask=(weight_S > 0)[:, None] & (dim_r < RANK)[None, :], other=0.0)
    out_r = tl.sum(part_Sr * weight_S[:, None], 0) / safe
    tl.store(out_ptr + query * RANK + dim_r, out_r, mask=dim_r < RANK)
    # Natural, as everywhere else.
    lse = tl.where(total == 0, float("-inf"), (top + tl.log2(safe)) * 0.6931471805599453)
    tl.store(lse_ptr + query, lse, mask=tl.program_id(1) == 0)
