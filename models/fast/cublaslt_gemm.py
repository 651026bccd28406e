"""Products of e4m3 by cuBLASLt itself, for what torch.nn and torch._scaled_mm do not hand through.

    out = f(unit * x W^T)      f: nothing or GELU;  out: bf16, or e4m3 as it is (what is beyond 448
                               becomes 448), perhaps a part of the columns of a wider tensor

One unit for all of W and none for x. On Hopper that leaves the largest tiles to choose from; which
of cuBLASLt's kernels is fastest for some sizes is measured once, with the first tensors that come.
Only kernels that add each result up in one piece are asked for, so all of them agree.
Source: cuBLAS library documentation, "cublasLtMatmul"; the numbers below are its enumerations'.

Dimension key:  B batch   N rows (tokens)   I input width   O output width
"""

import ctypes
from ctypes import byref, c_float, c_int, c_int8, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.fast.fp8_quantise import E4M3, gelu, to_e4m3

DTYPES = {torch.float32: 0, torch.bfloat16: 14, E4M3: 28}  # cudaDataType
COMPUTE_FP32 = 68
TRANSPOSE_A, EPILOGUE, FAST_SUMS = 3, 7, 25  # of a product's description
BATCH, SAMPLE_STRIDE = 5, 6  # of a matrix's layout
WORKSPACE_BYTES, SPLIT_SUMS, ALIGNED = 1, 3, (5, 6, 8)  # of the choice of kernels
NOTHING, GELU = 1, 32  # done to a result
WORKSPACE = 32 * 2**20
CANDIDATES, ROUNDS, REPEATS = 8, 3, 5  # how many kernels are tried, and how often


class Problem(NamedTuple):
    """What a kernel is chosen for. Strides are in values: (of a sample,) of a row."""

    device: torch.device
    rows: int
    width: int
    height: int  # of W
    batch: int
    x_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    out_strides: tuple[int, ...]
    alignment: tuple[int, ...]  # in bytes: of W, x and out
    dtype: torch.dtype  # of what is written
    with_gelu: bool


class Operands(NamedTuple):
    """What one call multiplies."""

    x: Tensor
    weight_OI: Tensor
    unit: float
    out: Tensor


def multiply(
    x: Tensor, weight_OI: Tensor, unit: float, out: Tensor, with_gelu: bool = False
) -> None:
    """Write f(unit * x W^T) to `out`, bf16 or e4m3.

    x (N, I) and W are e4m3, out (N, O); or x (B, N, I) and out (B, N, O). All may be parts of
    larger tensors whose strides are multiples of 16 bytes; values of a row are adjacent.
    Not on a GPU, the same in plain torch.
    """
    if not x.is_cuda:
        return _plain(x, weight_OI, unit, out, with_gelu)
    if x.dim() == 3 and all(t.stride(0) == t.shape[1] * t.stride(1) for t in (x, out)):
        x, out = x.flatten(0, 1), out.flatten(0, 1)
    for t in (x, weight_OI, out):
        assert t.stride(-1) == 1 and t.data_ptr() % 16 == 0, t.stride()
    problem = Problem(
        device=x.device,
        rows=x.shape[-2],
        width=x.shape[-1],
        height=len(weight_OI),
        batch=len(x) if x.dim() == 3 else 1,
        x_strides=x.stride()[:-1],
        weight_strides=weight_OI.stride()[:-1],
        out_strides=out.stride()[:-1],
        # cuBLASLt assumes 256 where it is not told
        alignment=tuple(min(256, t.data_ptr() & -t.data_ptr()) for t in (weight_OI, x, out)),
        dtype=out.dtype,
        with_gelu=with_gelu,
    )
    _kernel(problem)(Operands(x, weight_OI, unit, out))


def _plain(x: Tensor, weight_OI: Tensor, unit: float, out: Tensor, with_gelu: bool) -> None:
    y = unit * (x.float() @ weight_OI.float().t())
    y = gelu(y) if with_gelu else y
    out.copy_(to_e4m3(y) if out.dtype == E4M3 else y)


class _Library:
    """cuBLASLt, as torch has loaded it."""

    def __init__(self, device: torch.device):
        self.functions = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
        self.handle = c_void_p()
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self.call("Create", byref(self.handle))

    def call(self, name: str, *args) -> None:
        status = getattr(self.functions, f"cublasLt{name}")(*args)
        if status:
            raise RuntimeError(f"cublasLt{name} failed with status {status}")

    def made(self, name: str, *args) -> c_void_p:
        thing = c_void_p()
        self.call(f"{name}Create", byref(thing), *args)
        return thing

    def set(self, name: str, thing: c_void_p, values: dict[int, ctypes._SimpleCData]) -> None:
        for number, value in values.items():
            self.call(
                f"{name}SetAttribute", thing, number, byref(value), c_size_t(ctypes.sizeof(value))
            )


@cache
def _library(device: torch.device) -> _Library:
    return _Library(device)


class _Candidate(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class _Kernel:
    """One problem's product. cuBLASLt is column-major: to it, out^T = W x^T."""

    def __init__(self, p: Problem):
        self.batch, self.lt = p.batch, _library(p.device)
        lt = self.lt
        self.product = lt.made("MatmulDesc", COMPUTE_FP32, DTYPES[torch.float32])
        epilogue = c_int(GELU if p.with_gelu else NOTHING)
        lt.set(
            "MatmulDesc",
            self.product,
            {TRANSPOSE_A: c_int(1), FAST_SUMS: c_int8(1), EPILOGUE: epilogue},
        )
        self.layouts = [
            self._layout(E4M3, p.width, p.height, p.weight_strides),
            self._layout(E4M3, p.width, p.rows, p.x_strides),
            # of what is added to: never read
            self._layout(torch.bfloat16, p.height, p.rows, (p.height,)),
            self._layout(p.dtype, p.height, p.rows, p.out_strides),
        ]
        self.candidates = self._candidates(p.alignment)
        self.fastest: _Candidate | None = None

    def _layout(
        self, dtype: torch.dtype, rows: int, columns: int, strides: tuple[int, ...]
    ) -> c_void_p:
        """Strides: (from one sample to the next,) from one column to the next; all share one."""
        stride, sample = strides[-1], strides[0] if len(strides) > 1 else 0
        sizes = c_uint64(rows), c_uint64(columns), c_int64(stride)
        layout = self.lt.made("MatrixLayout", DTYPES[dtype], *sizes)
        if self.batch > 1:
            of_batch = {BATCH: c_int(self.batch), SAMPLE_STRIDE: c_int64(sample)}
            self.lt.set("MatrixLayout", layout, of_batch)
        return layout

    def _candidates(self, alignment: tuple[int, ...]) -> list[_Candidate]:
        lt = self.lt
        wish = lt.made("MatmulPreference")
        lt.set(
            "MatmulPreference",
            wish,
            {
                WORKSPACE_BYTES: c_uint64(WORKSPACE),
                SPLIT_SUMS: c_uint32(0),
                **{kind: c_uint32(bytes_) for kind, bytes_ in zip(ALIGNED, alignment)},
            },
        )
        found, count = (_Candidate * CANDIDATES)(), c_int()
        lt.call(
            "MatmulAlgoGetHeuristic",
            lt.handle,
            self.product,
            *self.layouts,
            wish,
            CANDIDATES,
            found,
            byref(count),
        )
        lt.call("MatmulPreferenceDestroy", wish)
        if not count.value:
            raise RuntimeError("cuBLASLt has no kernel for this product of e4m3")
        return list(found[: count.value])

    def __call__(self, operands: Operands) -> None:
        if self.fastest is None:
            seconds = self._seconds(operands)
            self.fastest = self.candidates[seconds.index(min(seconds))]
        self._run(self.fastest, operands)

    def _run(self, candidate: _Candidate, operands: Operands) -> None:
        lt, (of_weight, of_x, of_sum, of_out) = self.lt, self.layouts
        x, weight, unit, out = operands
        W, X, unread, Y = (c_void_p(t.data_ptr()) for t in (weight, x, lt.workspace, out))
        stream = c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        lt.call(
            "Matmul",
            lt.handle,
            self.product,
            byref(c_float(unit)),
            W,
            of_weight,
            X,
            of_x,
            byref(c_float(0)),
            unread,
            of_sum,
            Y,
            of_out,
            byref(candidate.algorithm),
            c_void_p(lt.workspace.data_ptr()),
            c_size_t(WORKSPACE),
            stream,
        )

    def _seconds(self, operands: Operands) -> list[float]:
        """Of every candidate, its fastest round."""
        best = [float("inf")] * len(self.candidates)
        for _ in range(ROUNDS):
            for i, candidate in enumerate(self.candidates):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._run(candidate, operands)
                start.record()
                for _ in range(REPEATS):
                    self._run(candidate, operands)
                end.record()
                end.synchronize()
                best[i] = min(best[i], start.elapsed_time(end))
        return best


@cache
def _kernel(problem: Problem) -> _Kernel:
    return _Kernel(problem)
