"""The operators as model-local functions of standard ONNX operators, so that a model runs in a plain ONNX Runtime.

Where the operator library is registered its kernels win and these bodies are not used. They are exact, not fast:
``ChunkAttention`` gathers the keys and values of every token, 2·B·L·Hkv·K·S·D floats, so feed it short segments.
Memory itself is never copied or transposed, only gathered from. Everything is computed in float.
"""

from __future__ import annotations

import onnx
from onnx import parser

from hsa_compile.export.schema import DOMAIN, OPSET

STANDARD_OPSET = 24  # the first with TensorScatter, which the models need for their state

# The chunk axis is reversed before TopK, which breaks ties towards the lower index: so they go to the newer chunk.
# K columns of -inf follow, so that K may exceed the number of chunks; they and what is not visible come out as -1.
_CHUNK_SELECT = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "The K best visible chunks of every token and kv head">
ChunkSelect <kv_num_heads, chunk_size, top_k, window: int = 0> (q_r, landmark, position, chunks) => (indices, scores)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  none = Constant <value_int: int = -1> ()
  ones = Constant <value_ints: ints = [1]> ()
  axes_1 = Constant <value_ints: ints = [1]> ()
  axes_13 = Constant <value_ints: ints = [1, 3]> ()
  zero_f = Constant <value_float: float = 0.0> ()
  nothing = Constant <value = float {-inf}> ()
  Hkv = Constant <value_int: int = @kv_num_heads> ()
  S = Constant <value_int: int = @chunk_size> ()
  K = Constant <value_int: int = @top_k> ()
  W = Constant <value_int: int = @window> ()
  Ks = Reshape (K, ones)

  # Token t sees the chunks that end at or before t - lag, and there are chunks[b] of them in all.
  W_S = Sub (W, S)
  has_window = Greater (W, zero)
  lag = Where (has_window, W_S, zero)
  L = Shape <start = 1, end = 2> (q_r)
  L0 = Squeeze (L)
  step = Range (zero, L0, one)
  position_B1 = Unsqueeze (position, axes_1)
  t = Add (position_B1, step)
  past = Sub (t, lag)
  filled = Mul (chunks, S)
  filled_B1 = Unsqueeze (filled, axes_1)
  limit = Min (past, filled_B1)
  limit_B1L1 = Unsqueeze (limit, axes_13)

  # Newest first: row 0 is chunk C-1, whose last token is C*S - 1.
  C = Shape <start = 1, end = 2> (landmark)
  C0 = Squeeze (C)
  newest = Sub (C0, one)
  chunk = Range (newest, none, none)
  after = Add (chunk, one)
  end = Mul (after, S)
  visible = LessOrEqual (end, limit_B1L1)

  landmark_f = Cast <to = 1> (landmark)
  reversed = Gather <axis = 1> (landmark_f, chunk)
  l_BHDC = Transpose <perm = [0, 2, 3, 1]> (reversed)
  q_f = Cast <to = 1> (q_r)
  q_BHLD = Transpose <perm = [0, 2, 1, 3]> (q_f)
  dot = MatMul (q_BHLD, l_BHDC)
  Dr = Shape <start = 3, end = 4> (q_r)
  Dr_f = Cast <to = 1> (Dr)
  root = Sqrt (Dr_f)
  s = Div (dot, root)
  masked = Where (visible, s, nothing)
  s_shape = Shape <start = 0, end = 3> (s)
  pad_shape = Concat <axis = 0> (s_shape, Ks)
  pad = Expand (nothing, pad_shape)
  candidates = Concat <axis = 3> (masked, pad)
  best, column = TopK <axis = 3, largest = 1, sorted = 1> (candidates, Ks)

  live = Greater (best, nothing)
  picked = Sub (newest, column)
  picked_or_none = Where (live, picked, none)
  ordered, order = TopK <axis = 3, largest = 1, sorted = 1> (picked_or_none, Ks)
  best_or_zero = Where (live, best, zero_f)
  best_ordered = GatherElements <axis = 3> (best_or_zero, order)

  # A single retrieval head serves all kv heads.
  Hkvs = Reshape (Hkv, ones)
  heads = Concat <axis = 0> (ones, ones, Hkvs, ones)
  ordered_BLHK = Transpose <perm = [0, 2, 1, 3]> (ordered)
  scores_BLHK = Transpose <perm = [0, 2, 1, 3]> (best_ordered)
  ordered_all = Expand (ordered_BLHK, heads)
  scores = Expand (scores_BLHK, heads)
  indices = Cast <to = 6> (ordered_all)
}
"""

# Without chunks there is nothing to gather from, so K is cut to 0 then and the sums are over nothing.
_CHUNK_ATTENTION = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "Attention to the selected chunks, a softmax inside each">
ChunkAttention <chunk_size, off_by_one: int = 0, scale: float = 0.0> (q, k, v, indices, weights) => (o)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  zeros = Constant <value_ints: ints = [0]> ()
  ones = Constant <value_ints: ints = [1]> ()
  axis_3 = Constant <value_ints: ints = [3]> ()
  last = Constant <value_ints: ints = [-1]> ()
  zero_f = Constant <value_float: float = 0.0> ()
  S = Constant <value_int: int = @chunk_size> ()
  plus_one = Constant <value_int: int = @off_by_one> ()
  off = Greater (plus_one, zero)
  Ss = Reshape (S, ones)
  B = Shape <start = 0, end = 1> (k)
  T = Shape <start = 1, end = 2> (k)
  Hkv = Shape <start = 2, end = 3> (k)
  D = Shape <start = 3, end = 4> (k)
  L = Shape <start = 1, end = 2> (q)
  Hq = Shape <start = 2, end = 3> (q)
  G = Div (Hq, Hkv)

  K_given = Shape <start = 3, end = 4> (indices)
  some = Min (T, ones)
  K = Mul (K_given, some)
  chunk = Slice (indices, zeros, K, axis_3)
  w = Slice (weights, zeros, K, axis_3)

  # Rows of k seen as [B*T*Hkv, D]: row = (b*T + c*S + j)*Hkv + h.
  chunk_i = Cast <to = 7> (chunk)
  live = GreaterOrEqual (chunk_i, zero)
  chunk_or_first = Max (chunk_i, zero)
  first = Mul (chunk_or_first, S)
  first_BLHK1 = Unsqueeze (first, last)
  j = Range (zero, S, one)
  token = Add (first_BLHK1, j)
  B0 = Squeeze (B)
  b = Range (zero, B0, one)
  row_shape = Constant <value_ints: ints = [-1, 1, 1, 1, 1]> ()
  b_B1111 = Reshape (b, row_shape)
  base = Mul (b_B1111, T)
  absolute = Add (base, token)
  wide = Mul (absolute, Hkv)
  Hkv0 = Squeeze (Hkv)
  h = Range (zero, Hkv0, one)
  head_shape = Constant <value_ints: ints = [-1, 1, 1]> ()
  h_H11 = Reshape (h, head_shape)
  row = Add (wide, h_H11)
  KS = Mul (K, Ss)
  rows_shape = Concat <axis = 0> (B, L, Hkv, KS)
  rows = Reshape <allowzero = 1> (row, rows_shape)
  BT = Mul (B, T)
  BTH = Mul (BT, Hkv)
  table_shape = Concat <axis = 0> (BTH, D)
  k_rows = Reshape <allowzero = 1> (k, table_shape)
  v_rows = Reshape <allowzero = 1> (v, table_shape)
  k_picked = Gather <axis = 0> (k_rows, rows)
  v_picked = Gather <axis = 0> (v_rows, rows)
  k_BLHND = Cast <to = 1> (k_picked)
  v_BLHND = Cast <to = 1> (v_picked)

  q_f = Cast <to = 1> (q)
  q_shape = Concat <axis = 0> (B, L, Hkv, G, D)
  q_BLHGD = Reshape <allowzero = 1> (q_f, q_shape)
  k_BLHDN = Transpose <perm = [0, 1, 2, 4, 3]> (k_BLHND)
  dot = MatMul (q_BLHGD, k_BLHDN)
  D_f = Cast <to = 1> (D)
  root = Sqrt (D_f)
  usual = Reciprocal (root)
  given = Constant <value_float: float = @scale> ()
  is_given = Greater (given, zero_f)
  logit_scale = Where (is_given, given, usual)
  logits = Mul (dot, logit_scale)
  chunk_shape = Concat <axis = 0> (B, L, Hkv, G, K, Ss)
  s = Reshape <allowzero = 1> (logits, chunk_shape)

  # Softmax with an optional 1 in the denominator, which is exp(0): so the peak is at least 0 then.
  highest = ReduceMax <keepdims = 1> (s, last)
  clamped = Max (highest, zero_f)
  peak = Where (off, clamped, highest)
  centred = Sub (s, peak)
  e = Exp (centred)
  sum = ReduceSum <keepdims = 1> (e, last)
  minus_peak = Neg (peak)
  exp_0 = Exp (minus_peak)
  extra = Where (off, exp_0, zero_f)
  denominator = Add (sum, extra)

  # Empty slots weigh nothing, whatever their weight says.
  w_live = Where (live, w, zero_f)
  w_BLH1K = Unsqueeze (w_live, axis_3)
  w_BLH1K1 = Unsqueeze (w_BLH1K, last)
  factor = Div (w_BLH1K1, denominator)
  p = Mul (e, factor)
  p_shape = Concat <axis = 0> (B, L, Hkv, G, KS)
  p_BLHGN = Reshape <allowzero = 1> (p, p_shape)
  sum_v = MatMul (p_BLHGN, v_BLHND)
  o_shape = Shape (q)
  o_f = Reshape <allowzero = 1> (sum_v, o_shape)
  o = CastLike (o_f, q)
}
"""

# The ring and the segment are joined first, and all else comes from that: so the rings may be written in place.
# Slot s of a ring holds the last token before ``position`` whose number is s modulo W, negative where there is none.
_SLIDING_WINDOW = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "Causal attention within a window, over a ring of past keys">
SlidingWindow (q, k, v, past_k, past_v, position, lengths) => (o, present_k, present_v)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  axes_1 = Constant <value_ints: ints = [1]> ()
  axes_2 = Constant <value_ints: ints = [2]> ()
  axes_12 = Constant <value_ints: ints = [1, 2]> ()
  last = Constant <value_ints: ints = [-1]> ()
  lowest = Constant <value_float: float = -3.4e38> ()
  B = Shape <start = 0, end = 1> (q)
  L = Shape <start = 1, end = 2> (q)
  Hq = Shape <start = 2, end = 3> (q)
  D = Shape <start = 3, end = 4> (q)
  W = Shape <start = 1, end = 2> (past_k)
  Hkv = Shape <start = 2, end = 3> (past_k)
  G = Div (Hq, Hkv)
  L0 = Squeeze (L)
  W0 = Squeeze (W)

  joined_k = Concat <axis = 1> (past_k, k)
  joined_v = Concat <axis = 1> (past_v, v)
  position_B1 = Unsqueeze (position, axes_1)
  place = Range (zero, L0, one)
  own = Add (position_B1, place)
  slot = Range (zero, W0, one)
  before = Sub (position_B1, one)
  from_slot = Sub (before, slot)
  back = Mod (from_slot, W)
  held = Sub (before, back)
  key_BT = Concat <axis = 1> (held, own)

  key_B1T = Unsqueeze (key_BT, axes_1)
  own_BL1 = Unsqueeze (own, axes_2)
  distance = Sub (own_BL1, key_B1T)
  not_later = GreaterOrEqual (distance, zero)
  near = Less (distance, W)
  real = GreaterOrEqual (key_B1T, zero)
  causal = And (not_later, near)
  mask = And (causal, real)
  mask_B11LT = Unsqueeze (mask, axes_12)

  q_f = Cast <to = 1> (q)
  q_shape = Concat <axis = 0> (B, L, Hkv, G, D)
  q_BLHGD = Reshape <allowzero = 1> (q_f, q_shape)
  q_BHGLD = Transpose <perm = [0, 2, 3, 1, 4]> (q_BLHGD)
  k_f = Cast <to = 1> (joined_k)
  v_f = Cast <to = 1> (joined_v)
  k_BHDT = Transpose <perm = [0, 2, 3, 1]> (k_f)
  v_BHTD = Transpose <perm = [0, 2, 1, 3]> (v_f)
  k_BH1DT = Unsqueeze (k_BHDT, axes_2)
  v_BH1TD = Unsqueeze (v_BHTD, axes_2)
  dot = MatMul (q_BHGLD, k_BH1DT)
  D_f = Cast <to = 1> (D)
  root = Sqrt (D_f)
  s = Div (dot, root)
  masked = Where (mask_B11LT, s, lowest)
  p = Softmax <axis = -1> (masked)
  o_BHGLD = MatMul (p, v_BH1TD)
  o_BLHGD = Transpose <perm = [0, 3, 1, 2, 4]> (o_BHGLD)
  o_shape = Shape (q)
  o_f = Reshape <allowzero = 1> (o_BLHGD, o_shape)
  o = CastLike (o_f, q)

  lengths_B1 = Unsqueeze (lengths, axes_1)
  after = Add (before, lengths_B1)
  after_slot = Sub (after, slot)
  after_back = Mod (after_slot, W)
  now_held = Sub (after, after_back)
  is_new = GreaterOrEqual (now_held, position_B1)
  number = Sub (now_held, position_B1)
  new_row = Add (number, W)
  row = Where (is_new, new_row, slot)
  row_BW1 = Unsqueeze (row, last)
  present_k = GatherND <batch_dims = 1> (joined_k, row_BW1)
  present_v = GatherND <batch_dims = 1> (joined_v, row_BW1)
}
"""

# Sums are in double: the rows are sorted here, and added up in another order by kernels.
_SAMPLE = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "A token for each row of logits, likeliest or at random">
Sample (logits, temperature, top_p, uniform) => (token)
{
  none = Constant <value_int: int = -1> ()
  zero = Constant <value = double {0}> ()
  one = Constant <value = double {1}> ()
  first = Constant <value_int: int = 0> ()
  axes_12 = Constant <value_ints: ints = [1, 2]> ()
  axis_2 = Constant <value_ints: ints = [2]> ()
  second = Constant <value_int: int = 2> ()

  V = Shape <start = 2, end = 3> (logits)
  values, order = TopK <axis = 2, largest = 1, sorted = 1> (logits, V)
  likeliest = Gather <axis = 2> (order, first)
  peak = ReduceMax <keepdims = 1> (logits, axis_2)
  falling = Sub (values, peak)
  x = Cast <to = 11> (falling)
  temperature_d = Cast <to = 11> (temperature)
  temperature_B11 = Unsqueeze (temperature_d, axes_12)
  cold = Equal (temperature_B11, zero)
  divisor = Where (cold, one, temperature_B11)
  scaled = Div (x, divisor)
  p = Softmax <axis = 2> (scaled)
  before = CumSum <exclusive = 1> (p, second)
  top_p_d = Cast <to = 11> (top_p)
  top_p_B11 = Unsqueeze (top_p_d, axes_12)
  likely = Less (before, top_p_B11)
  kept = Where (likely, p, zero)

  # Back into the order of ids, where the first that passes the target has as many before it that do not.
  by_id = ScatterElements <axis = 2> (kept, order, kept)
  cumulated = CumSum (by_id, second)
  all = ReduceSum <keepdims = 1> (kept, axis_2)
  uniform_d = Cast <to = 11> (uniform)
  uniform_B11 = Unsqueeze (uniform_d, axes_12)
  target = Mul (all, uniform_B11)
  below = LessOrEqual (cumulated, target)
  counted = Cast <to = 7> (below)
  drawn = ReduceSum <keepdims = 0> (counted, axis_2)

  cold_B1 = Squeeze (cold, axis_2)
  chosen = Where (cold_B1, likeliest, drawn)
  is_nan = IsNaN (logits)
  nan = Cast <to = 7> (is_nan)
  nans = ReduceSum <keepdims = 0> (nan, axis_2)
  has_nan = Greater (nans, first)
  top = Squeeze (peak, axis_2)
  infinite = IsInf (top)
  bad = Or (has_nan, infinite)
  token = Where (bad, none, chosen)
}
"""


def function_bodies() -> list[onnx.FunctionProto]:
    """The operators of domain ``hsa`` as functions over standard opset ``STANDARD_OPSET``."""
    return [parser.parse_function(text) for text in (_CHUNK_SELECT, _CHUNK_ATTENTION, _SLIDING_WINDOW, _SAMPLE)]


def attach_functions(model: onnx.ModelProto) -> None:
    """Adds the function bodies to a model that uses the operators, in place.

    Raises:
        ValueError: the model imports an older standard opset than the bodies are written in.
    """
    imported = {o.domain: o.version for o in model.opset_import}
    if imported.get("", 0) < STANDARD_OPSET:
        have = imported.get("", 0)
        raise ValueError(f"the model imports opset {have}; export it with opset_version={STANDARD_OPSET} or later")
    present = {(f.domain, f.name) for f in model.functions}
    model.functions.extend(f for f in function_bodies() if (f.domain, f.name) not in present)
    if DOMAIN not in imported:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, OPSET))
