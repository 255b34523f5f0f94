"""The mistakes that ``verifier_mutation.py`` plants, each in a small model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mistakes import (
    Mutation,
    attribute,
    bypass,
    constant,
    fill,
    floor_division,
    inputs,
    no_longer_overridable,
    operator,
    reader_reads,
    reads,
    reversed_order,
    round_half_up,
    same_as,
    sign_without_zero,
    swapped_outputs,
    through,
)  # fmt: skip

F = "m (float[N, 4] x) => (float[N, 4] y)"
ROWS = "{ t = Identity(x)  u = %s  y = Identity(u) }"


def elementwise(expression: str) -> str:
    """A model in which ``u`` is ``expression`` of ``t``."""
    return f"{F} {ROWS % expression}"


MUTATIONS: tuple[Mutation, ...] = (
    Mutation("softmax-axis", elementwise("Softmax <axis = 1> (t)"), "u", attribute("axis", 0)),
    Mutation("softmax-axis-dropped", elementwise("Softmax <axis = 0> (t)"), "u", attribute("axis", None)),
    Mutation(
        "concat-axis",
        "m (float[4, 4] x) => (float[8, 2] y) { s = Constant <value = int64[2] {8, 2}> () c = Concat <axis = 0> (x, x)"
        " z = Constant <value_ints = [0]> () e = Constant <value_ints = [2]> () o = Constant <value_ints = [1]> ()"
        " y = Slice(c, z, e, o) }",
        "y",
        constant(3, lambda a: a * 0),
    ),
    Mutation(
        "concat-order",
        "m (float[N, 2] x) => (float[N, 4] y) { a = Neg(x) y = Concat <axis = 1> (a, x) }",
        "y",
        inputs(1, 0),
    ),
    Mutation(
        "transpose-perm",
        "m (float[2, 2, N] x) => (float[2, 2, N] y) { t = Transpose <perm = [1, 0, 2]> (x) y = Exp(t) }",
        "t",
        attribute("perm", [0, 1, 2]),
    ),
    Mutation(
        "pad-off-by-one",
        "m (float[N, 1, 5, 5] x) => (float[N, 1, h, w] y) <float[1, 1, 3, 3] k = {1,2,3,4,5,6,7,8,9}>"
        " { c = Conv <pads = [1, 1, 0, 0], kernel_shape = [3, 3]> (x, k) y = Relu(c) }",
        "c",
        attribute("pads", [0, 0, 1, 1]),
    ),
    Mutation(
        "pad-value-dropped",
        "m (float[N, 4] x) => (float[N, 6] y) { p = Constant <value_ints = [0, 1, 0, 1]> ()"
        " v = Constant <value_float = -1000.0> () y = Pad(x, p, v) }",
        "y",
        inputs(0, 1, -1),
    ),
    Mutation(
        "pad-mode",
        "m (float[N, 4] x) => (float[N, 6] y) { p = Constant <value_ints = [0, 1, 0, 1]> ()"
        ' y = Pad <mode = "reflect"> (x, p) }',
        "y",
        attribute("mode", "edge"),
    ),
    Mutation(
        "ceil-mode-dropped",
        "m (float[N, 1, 6, 6] x) => (float[N, 1, h, w] y)"
        " { y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x) }",
        "y",
        attribute("ceil_mode", 0),
    ),
    Mutation(
        "count-include-pad",
        "m (float[N, 1, 4, 4] x) => (float[N, 1, h, w] y)"
        " { y = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1> (x) }",
        "y",
        attribute("count_include_pad", 0),
    ),
    Mutation("mul-by-zero-is-zero", elementwise("Mul(t, z)").replace("{ t", "<float[1] z = {0}> { t"), "u", fill(0)),
    Mutation("minus-itself-is-zero", elementwise("Sub(t, t)"), "u", fill(0)),
    Mutation("by-itself-is-one", elementwise("Div(t, t)"), "u", fill(1)),
    Mutation(
        "equal-to-itself",
        "m (float[N, 4] x) => (bool[N, 4] y) { t = Relu(x) e = Equal(x, x) n = Not(e) y = Not(n) }",
        "e",
        fill(1, np.bool_),
    ),
    Mutation(
        "isnan-dropped",
        "m (float[N, 4] x) => (float[N, 4] y) { n = IsNaN(x) z = Constant <value_float = 0.0> ()"
        " y0 = Where(n, z, x) y = Exp(y0) }",
        "y0",
        bypass(2),
    ),
    Mutation(
        "isinf-dropped",
        "m (float[N, 4] x) => (float[N, 4] y) { n = IsInf(x) z = Constant <value_float = 7.0> ()"
        " y0 = Where(n, z, x) y = Tanh(y0) }",
        "y0",
        bypass(2),
    ),
    Mutation("relu-dropped", elementwise("Relu(t)"), "u", bypass()),
    Mutation("abs-of-positive", elementwise("Abs(t)"), "u", bypass()),
    Mutation(
        "sqrt-of-square",
        "m (float[N] x) => (float[N] y) { s = Mul(x, x) r = Sqrt(s) y = Exp(r) }",
        "r",
        reader_reads("x"),
    ),
    Mutation(
        "relu6-bound-dropped",
        elementwise("Clip(t, lo, hi)").replace("{ t", "<float lo = {0}, float hi = {6}> { t"),
        "u",
        constant(2, lambda a: a + np.float32(np.inf)),
    ),
    Mutation(
        "clip-bound-moved",
        elementwise("Clip(t, lo, hi)").replace("{ t", "<float lo = {-20}, float hi = {20}> { t"),
        "u",
        constant(2, lambda a: a + 1),
    ),
    Mutation(
        "hard-swish-bounds",
        elementwise("HardSigmoid <alpha = 0.16666667, beta = 0.5> (t)"),
        "u",
        attribute("alpha", 0.2),
    ),
    Mutation(
        "operands-of-sub", elementwise("Sub(t, k)").replace("{ t", "<float[4] k = {1, 2, 3, 4}> { t"), "u", inputs(1, 0)
    ),
    Mutation(
        "operands-of-pow",
        "m (float[N, 4] x, float[N, 4] w) => (float[N, 4] y) { a = Abs(x) b = Abs(w) y = Pow(a, b) }",
        "y",
        inputs(1, 0),
    ),
    Mutation(
        "operands-of-less",
        "m (float[N, 4] x, float[N, 4] w) => (bool[N, 4] y) { a = Round(x) b = Round(w) y0 = Less(a, b) y = Not(y0) }",
        "y0",
        operator("LessOrEqual"),
    ),
    Mutation(
        "weight-scaled",
        "m (float[N, 4] x) => (float[N, 3] y)"
        " <float[4, 3] w = {1, -2, 3, 4, -5, 6, 7, 8, -9, 1, 2, 3}> { u = MatMul(x, w) y = Sigmoid(u) }",
        "u",
        constant(1, lambda a: (a * 1.001).astype(np.float32)),
    ),
    Mutation(
        "epsilon",
        "m (float[N, 2, 3] x) => (float[N, 2, 3] y)"
        " <float[2] s = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 1}, float[2] v = {0.01, 0.02}>"
        " { u = BatchNormalization <epsilon = 0.00001> (x, s, b, m, v) y = Tanh(u) }",
        "u",
        attribute("epsilon", 0.001),
    ),
    Mutation(
        "layernorm-epsilon",
        "m (float[N, 4] x) => (float[N, 4] y) <float[4] s = {1, 2, 3, 4}>"
        " { u = LayerNormalization <epsilon = 0.00001> (x, s) y = Tanh(u) }",
        "u",
        attribute("epsilon", 0.0001),
    ),
    Mutation(
        "wrong-batch",
        "m (float[N, 4] x) => (float[N, 2, 2] y) { s = Constant <value_ints = [0, 2, 2]> () y = Reshape(x, s) }",
        "y",
        constant(1, lambda a: np.asarray([1, 2, 2])),
    ),
    Mutation(
        "wrong-batch-mixed",
        "m (float[N, 2, 3] x) => (float[n, 3] y) { s = Constant <value_ints = [-1, 3]> () y = Reshape(x, s) }",
        "y",
        constant(1, lambda a: np.asarray([2, 3])),
    ),
    Mutation(
        "wrong-length",
        "m (float[1, T, 3] x) => (float[1, n] y) { s = Constant <value_ints = [1, -1]> () y = Reshape(x, s) }",
        "y",
        constant(1, lambda a: np.asarray([1, 24])),
    ),
    Mutation(
        "mean-over-batch",
        "m (float[N, 4] x) => (float[N, 4] y) { u = ReduceMean <axes = [1], keepdims = 1> (x) y = Sub(x, u) }",
        "u",
        attribute("axes", [0, 1]),
    ),
    Mutation(
        "keepdims",
        "m (float[4, 4] x) => (float[4, 4] y) { u = ReduceMean <axes = [1], keepdims = 1> (x) y = Sub(x, u) }",
        "u",
        attribute("keepdims", 0),
    ),
    Mutation(
        "stable-order",
        "m (float[N, 8] x) => (int64[N, 8] i) { k = Constant <value_ints = [8]> ()"
        " r = Round(x) v, i0 = TopK(r, k) i = Identity(i0) }",
        "i",
        reversed_order,
    ),
    Mutation(
        "argmax-last",
        "m (float[N, 8] x) => (int64[N, 1] y) { r = Round(x) y = ArgMax <axis = 1, select_last_index = 1> (r) }",
        "y",
        attribute("select_last_index", 0),
    ),
    Mutation(
        "int-division-floors",
        "m (int32[N, 4] x) => (int32[N, 4] y) <int32[1] k = {3}> { y0 = Div(x, k) y = Identity(y0) }",
        "y0",
        floor_division,
    ),
    Mutation(
        "mod-sign",
        "m (int32[N, 4] x) => (int32[N, 4] y) <int32[1] k = {3}> { y = Mod(x, k) }",
        "y",
        attribute("fmod", 1),
    ),
    Mutation(
        "cast-saturation",
        "m (float[N, 4] x) => (float[N, 4] y) { a = Cast <to = 6> (x) b = Cast <to = 1> (a) y = Neg(b) }",
        "a",
        through(ir.DataType.INT8),
    ),
    Mutation(
        "cast-truncates",
        "m (float[N, 4] x) => (float[N, 4] y) { a = Cast <to = 6> (x) b = Cast <to = 1> (a) y = Neg(b) }",
        "b",
        reader_reads("x"),
    ),
    Mutation(
        "cast-to-half-and-back",
        "m (float[N, 4] x) => (float[N, 4] y) { a = Cast <to = 10> (x) b = Cast <to = 1> (a) y = Neg(b) }",
        "b",
        reader_reads("x"),
    ),
    Mutation(
        "wrong-dtype",
        "m (float[N, 4] x) => (float[N, 4] y) { a = Cast <to = 7> (x) b = Cast <to = 1> (a) y = Neg(b) }",
        "a",
        attribute("to", 2),
    ),
    Mutation(
        "overridable-folded",
        "m (float[N, 4] x, float[4] k) => (float[N, 4] y) <float[4] k = {1, 2, 3, 4}> { u = Mul(x, k) y = Exp(u) }",
        "u",
        no_longer_overridable,
    ),
    Mutation(
        "overridable-int-folded",
        "m (float[N, 4] x, int64[1] k) => (float[N, 4] y) <int64[1] k = {1}>"
        " { c = Cast <to = 1> (k) u = Mul(x, c) y = Exp(u) }",
        "c",
        no_longer_overridable,
    ),
    Mutation(
        "random-merged",
        "m (float[3] x) => (bool y)"
        " { a = RandomNormal <shape = [3]> () b = RandomNormal <shape = [3]> () d = Sub(a, b) e = Abs(d)"
        " s = ReduceSum <keepdims = 0> (e) z = Constant <value_float = 0.0> () y = Greater(s, z) }",
        "b",
        same_as("a"),
    ),
    Mutation(
        "capture-swapped",
        "m (float[N, 4] x, float[N, 4] w, bool go) => (float[N, 4] y) { a = Neg(x) b = Abs(w)"
        " y = If (go) <then_branch = t () => (float[N, 4] p) { p = Sin(a) },"
        " else_branch = e () => (float[N, 4] q) { q = Cos(b) }> }",
        "q",
        reads(0, "x"),
    ),
    Mutation(
        "branches-swapped-when-false",
        "m (float[N, 4] x, bool go) => (float[N, 4] y) {"
        " y = If (go) <then_branch = t () => (float[N, 4] p) { p = Sin(x) },"
        " else_branch = e () => (float[N, 4] q) { q = Relu(x) }> }",
        "q",
        operator("Abs"),
    ),
    Mutation(
        "branches-swapped-when-true",
        "m (float[N, 4] x, bool go) => (float[N, 4] y) {"
        " y = If (go) <then_branch = t () => (float[N, 4] p) { p = Relu(x) },"
        " else_branch = e () => (float[N, 4] q) { q = Cos(x) }> }",
        "p",
        operator("Abs"),
    ),
    Mutation(
        "gather-negative",
        "m (float[5, 3] t, int64[N] i) => (float[N, 3] y) { r = Relu(i0) y0 = Gather(t, i)"
        " i0 = Cast <to = 1> (i) y = Identity(y0) }".replace("r = Relu(i0) ", "")
        .replace("{ y0", "{ j = Abs(i) y0")
        .replace(" i0 = Cast <to = 1> (i)", " k = Add(j, j)"),
        "y0",
        reads(1, "j"),
    ),
    Mutation(
        "outputs-swapped",
        "m (float[N, 4] x) => (float[N, 2] y, float[N, 2] z) { a, b = Split <axis = 1> (x) y = Sin(a) z = Sin(b) }",
        "a",
        swapped_outputs,
    ),
    Mutation(
        "where-swapped",
        "m (bool[N, 4] c, float[N, 4] x) => (float[N, 4] y) { a = Neg(x) y = Where(c, a, x) }",
        "y",
        inputs(0, 2, 1),
    ),
    Mutation(
        "gemm-alpha",
        "m (float[N, 4] x) => (float[N, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>"
        " { y = Gemm <alpha = 0.5> (x, w) }",
        "y",
        attribute("alpha", None),
    ),
    Mutation(
        "gemm-trans",
        "m (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = Gemm <transB = 1> (x, w) }",
        "y",
        attribute("transB", 0),
    ),
    Mutation(
        "group",
        "m (float[N, 2, 3, 3] x) => (float[N, 2, 3, 3] y) <float[2, 1, 1, 1] k = {1, 2}>"
        " { c = Conv <group = 2, kernel_shape = [1, 1]> (x, k) y = Relu(c) }",
        "c",
        constant(1, lambda a: a[::-1].copy()),
    ),
    Mutation(
        "resize-coordinates",
        "m (float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) <float[4] s = {1, 1, 2, 2}>"
        ' { y = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (x, , s) }',
        "y",
        attribute("coordinate_transformation_mode", "asymmetric"),
    ),
    Mutation(
        "slice-end",
        "m (float[N, T] x) => (float[N, t] y) { a = Constant <value_ints = [0]> ()"
        " e = Constant <value_ints = [9223372036854775807]> () o = Constant <value_ints = [1]> ()"
        " y = Slice(x, a, e, o) }",
        "y",
        constant(2, lambda a: np.asarray([8])),
    ),
    Mutation("round-half-even", elementwise("Round(t)"), "u", round_half_up),
    Mutation("sign-of-zero", elementwise("Sign(t)"), "u", sign_without_zero),
    Mutation(
        "uint8-wraps",
        "m (uint8[N, 4] x) => (uint8[N, 4] y) <uint8[1] k = {200}>"
        " { a = Add(x, k) b = Sub(a, k) y = Max(b, x) c = Max(a, x) }".replace(" c = Max(a, x)", "").replace(
            "y = Max(b, x)", "y = Max(a, b)"
        ),
        "y",
        reads(0, "b"),
    ),
)
