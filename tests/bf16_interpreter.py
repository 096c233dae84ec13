"""Makes bfloat16 right in Triton's interpreter; for tests, imported for its effect.

The interpreter keeps bfloat16 as 16-bit patterns. Its dot multiplies the patterns
(triton-lang/triton issue 11584), and its conversion from float32 cuts digits off where a GPU rounds
to nearest even. Kernels that compute in float32, and meet bfloat16 in loads, stores, conversions
and dots alone, are right with these two replaced. Triton 3.6 to 3.9.
"""

import numpy
import triton.language as tl
from triton.runtime import interpreter

convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


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


interpreter._convert_float = rounding_convert
interpreter.InterpreterBuilder.create_dot = exact_dot
