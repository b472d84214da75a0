"""Triton's interpreter, rounding as the compiled kernels do: for processes with TRITON_INTERPRET=1.

The interpreter cuts float32 off where it becomes bfloat16, which no GPU does; here it rounds as the compiled kernel's
instruction does (test_nf4_triton.py reads that it is ``cvt.rn``).
"""

import os

import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ["TRITON_INTERPRET"] == "1"  # read when the kernels are decorated

_cast = interpreter.InterpreterBuilder.cast_impl


def _rounding_cast(builder, source, dtype):
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(builder, source, dtype)
    rounded = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy()
    return interpreter.TensorHandle(rounded.view(_cast(builder, source, dtype).data.dtype), dtype.scalar)


interpreter.InterpreterBuilder.cast_impl = _rounding_cast
