"""The chunks that neighbouring tokens select between them."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(2147483647)  # sorts behind every chunk


@triton.jit(do_not_specialize=["L", "C"])
def unite(
    INDICES, LISTS, COUNTS, L, C,
    H: tl.constexpr, TOP_K: tl.constexpr, K_P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Lists every chunk once that a tile of tokens selected, ascending; one program a tile.

    INDICES int32 [B, L, H, TOP_K] -> LISTS int32 [B*H*tiles, TOKENS*TOP_K], COUNTS int32 [B*H*tiles]. Indices outside
    0 … C-1 are left out.
    """
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(L, TOKENS)
    b = pid // (tiles * H)
    h = pid // tiles % H
    place = tl.arange(0, TOKENS * K_P)
    token = pid % tiles * TOKENS + place // K_P
    slot = place % K_P
    used = (token < L) & (slot < TOP_K)
    chunk = tl.load(INDICES + ((b * L + token) * H + h) * TOP_K + slot, mask=used, other=-1)
    ordered = tl.sort(tl.where((chunk >= 0) & (chunk < C), chunk, NOTHING))
    before = tl.where(place > 0, tl.gather(ordered, tl.maximum(place - 1, 0), 0), -1)
    fresh = (ordered != before) & (ordered != NOTHING)
    rank = tl.cumsum(fresh.to(tl.int32), 0)
    tl.store(LISTS + pid * (TOKENS * TOP_K) + rank - 1, ordered, mask=fresh)
    tl.store(COUNTS + pid, tl.max(rank, 0))


@triton.jit
def tile_rows(pid, L, H: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """Where the TOKENS * G_P query rows of tile ``pid`` lie in [B, L, H*G, D]: (offsets, which exist, b, h)."""
    tiles = tl.cdiv(L, TOKENS)
    b = pid // (tiles * H)
    h = pid // tiles % H
    row = tl.arange(0, TOKENS * G_P)
    token = pid % tiles * TOKENS + row // G_P
    g = row % G_P
    return (((b * L + token) * H + h) * G + g) * D, (token < L) & (g < G), b, h


@triton.jit
def tile_slots(
    INDICES, WEIGHTS, pid, L,
    H: tl.constexpr, TOP_K: tl.constexpr, K_P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Selected chunks and weights of tile ``pid``, both [TOKENS, K_P], -1 and 0 in empty slots."""
    tiles = tl.cdiv(L, TOKENS)
    b = pid // (tiles * H)
    h = pid // tiles % H
    token = pid % tiles * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, K_P)
    at = ((b * L + token) * H + h)[:, None] * TOP_K + slot[None, :]
    used = (token < L)[:, None] & (slot < TOP_K)[None, :]
    chunk = tl.load(INDICES + at, mask=used, other=-1)
    weight = tl.load(WEIGHTS + at, mask=used & (chunk >= 0), other=0.0)
    return chunk, weight


@triton.jit
def row_weights(chunks, weights, c, G_P: tl.constexpr, TOKENS: tl.constexpr):
    """[TOKENS * G_P] weight that each row gives chunk ``c``: 0 where its token did not select it, the sum of duplicates
    where it did so more than once."""
    weight = tl.sum(tl.where(chunks == c, weights, 0.0), 1)
    return tl.reshape(tl.broadcast_to(weight[:, None], [TOKENS, G_P]), [TOKENS * G_P])
