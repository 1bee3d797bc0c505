"""Bodies, in standard ONNX, of the operators that ``fuse`` makes; see ``functions``."""

from __future__ import annotations

_ADD_NORM = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "A sum and its norm">
AddNorm <epsilon: float = 0.000001> (x, added, weight) => (sum, normed)
{
  sum = Add (x, added)
  sum_f = Cast <to = 1> (sum)
  weight_f = Cast <to = 1> (weight)
  normed_f = RMSNormalization <axis = -1, epsilon: float = @epsilon> (sum_f, weight_f)
  normed = CastLike (normed_f, x)
}
"""

_RMS_NORM = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "Root mean square norm of the last dimension">
RmsNorm <epsilon: float = 0.000001> (x, weight) => (normed)
{
  x_f = Cast <to = 1> (x)
  weight_f = Cast <to = 1> (weight)
  normed_f = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x_f, weight_f)
  normed = CastLike (normed_f, x)
}
"""

_ROTARY_HEADS = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "Queries, keys and values of one product, normed and turned">
RotaryHeads <num_heads, kv_num_heads, normalize: int = 1, epsilon: float = 0.000001> (qkv, q_weight, k_weight, cos, sin)
  => (q, k, v)
{
  ones = Constant <value_ints: ints = [1]> ()
  axis_2 = Constant <value_ints: ints = [2]> ()
  zero = Constant <value_int: int = 0> ()
  Hq_0 = Constant <value_int: int = @num_heads> ()
  Hkv_0 = Constant <value_int: int = @kv_num_heads> ()
  norm_0 = Constant <value_int: int = @normalize> ()
  norms = Greater (norm_0, zero)
  Hq = Reshape (Hq_0, ones)
  Hkv = Reshape (Hkv_0, ones)
  D = Shape (q_weight)
  BL = Shape <start = 0, end = 2> (qkv)
  keys_values = Add (Hkv, Hkv)
  heads = Add (Hq, keys_values)
  shape = Concat <axis = 0> (BL, heads, D)
  x = Reshape <allowzero = 1> (qkv, shape)
  sizes = Concat <axis = 0> (Hq, Hkv, Hkv)
  q_T, k_T, v = Split <axis = 2> (x, sizes)

  q_f = Cast <to = 1> (q_T)
  k_f = Cast <to = 1> (k_T)
  q_weight_f = Cast <to = 1> (q_weight)
  k_weight_f = Cast <to = 1> (k_weight)
  q_unit = RMSNormalization <axis = -1, epsilon: float = @epsilon> (q_f, q_weight_f)
  k_unit = RMSNormalization <axis = -1, epsilon: float = @epsilon> (k_f, k_weight_f)
  q_n = Where (norms, q_unit, q_f)
  k_n = Where (norms, k_unit, k_f)

  c = Unsqueeze (cos, axis_2)
  s = Unsqueeze (sin, axis_2)
  q_a, q_b = Split <axis = 3, num_outputs = 2> (q_n)
  k_a, k_b = Split <axis = 3, num_outputs = 2> (k_n)
  q_ac = Mul (q_a, c)
  q_bs = Mul (q_b, s)
  q_bc = Mul (q_b, c)
  q_as = Mul (q_a, s)
  k_ac = Mul (k_a, c)
  k_bs = Mul (k_b, s)
  k_bc = Mul (k_b, c)
  k_as = Mul (k_a, s)
  q_1 = Sub (q_ac, q_bs)
  q_2 = Add (q_bc, q_as)
  k_1 = Sub (k_ac, k_bs)
  k_2 = Add (k_bc, k_as)
  q_turned = Concat <axis = 3> (q_1, q_2)
  k_turned = Concat <axis = 3> (k_1, k_2)
  q = CastLike (q_turned, qkv)
  k = CastLike (k_turned, qkv)
}
"""

_SWIGLU = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "silu(gate) * up of both in one tensor">
SwiGlu (gate_up) => (o)
{
  x = Cast <to = 1> (gate_up)
  gate, up = Split <axis = -1, num_outputs = 2> (x)
  sigmoid = Sigmoid (gate)
  silu = Mul (gate, sigmoid)
  o_f = Mul (silu, up)
  o = CastLike (o_f, gate_up)
}
"""

_TAKE_ROWS = """
<domain: "hsa", opset_import: ["" : 24], doc_string: "Rows by their numbers">
TakeRows (x, index) => (taken)
{
  taken = Gather <axis = -2> (x, index)
}
"""

FUSED_BODIES = (_ADD_NORM, _RMS_NORM, _ROTARY_HEADS, _SWIGLU, _TAKE_ROWS)
