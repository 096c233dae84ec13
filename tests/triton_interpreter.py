"""Makes bfloat16 right in Triton's interpreter, and the interpreter twice as fast; for tests,
imported for its effect.

The interpreter keeps bfloat16 as 16-bit patterns. Its dot multiplies the patterns
(triton-lang/triton issue 11584), and its conversion from float32 cuts digits off where a GPU rounds
to nearest even. Kernels that compute in float32, and meet bfloat16 in loads, stores, conversions
and dots alone, are right with these two replaced.

Half of its time goes into two things. It replaces the language's functions again whenever one
@triton.jit function calls another: here once. And a dozen operations of the language look whether
a sum of integers overflows, of which nothing comes: here numpy looks, and an overflow is an error.
Triton 3.6 to 3.9.
"""

import numpy
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
OPERATIONS = dict(add=numpy.add, sub=numpy.subtract, mul=numpy.multiply)


def rounding_convert(value, source, target, rounding):
    if (source.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return convert(value, source, target, rounding)
    bits = numpy.ascontiguousarray(value).view(numpy.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return numpy.where(numpy.isnan(value), 0x7FC0, rounded).astype(numpy.uint16)


def float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)


def exact_dot(self, a, b, d, *precision):
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return create_dot(self, a, b, d, *precision)
    product = numpy.matmul(float32(a), float32(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def check_overflow(self, a, b, operation):
    dtype = a.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    exact = OPERATIONS[operation.__name__](a.handle.data.astype(numpy.int64),
                                           b.handle.data.astype(numpy.int64))
    assert exact.min() >= dtype.get_int_min_value() and exact.max() <= dtype.get_int_max_value(), (
        f"{dtype} overflows in {operation.__name__}")


interpreter._convert_float = rounding_convert
interpreter.InterpreterBuilder.create_dot = exact_dot
TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
interpreter._patch_lang(tl.sum.fn)          # triton.language.core; a launch replaces what it uses
interpreter.InterpretedFunction.__call__ = lambda self, *arguments, **options: (
    self.rewrite()(*arguments, **options))
