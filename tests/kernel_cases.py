"""What every kernel must do: cases ``(kernels, device) -> what is wrong``, "" for nothing; faults to find.

``kernels`` has the functions of ``titan_moe.layer.kernels.eager``.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from titan_moe.layer.kernels import eager

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (T, K, D); the last but one has two blocks of columns.
SHAPES = [(5, 3, 48), (1, 1, 1), (7, 2, 130), (0, 3, 48), (2, 2, 1030), (2, 2, 0)]
FUNCTIONS = ("sum_rows", "weighted_sum", "weighted_sum_backward", "swiglu", "swiglu_backward")


def difference(got: torch.Tensor, want: torch.Tensor, what: str) -> str:
    """Other bits, but for the bits of a NaN."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{what}: {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}. "
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.dtype.itemsize]
    same = (got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())
    if same.all():
        return ""
    at = (~same).nonzero()[0].tolist()
    return f"{what}: {int((~same).sum())} differ, at {at} {got[tuple(at)]} for {want[tuple(at)]}. "


def distance(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, what: str) -> str:
    """Over 1e-5 of scale, and half a step of got's own dtype, away from an fp64 result."""
    info = torch.finfo(got.dtype)
    smallest = max(info.smallest_normal * info.eps, 1e-36)  # or that far: exp(100) is infinite in fp32
    bound = 1e-5 * scale + 0.5001 * info.eps * want.abs() + smallest
    wrong = ~((got.double() - want).abs() <= bound)
    if got.shape == want.shape and not wrong.any():
        return ""
    return f"{what}: {got[wrong][:1].tolist()} for {want[wrong][:1].tolist()} of {tuple(want.shape)}. "


def rows(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Of many magnitudes, so that order and rounding show; some -0, some subnormal."""
    exponent = torch.randint(-6, 7, shape, generator=generator)
    value = torch.ldexp(torch.randn(shape, generator=generator), exponent).to(dtype)
    value = torch.where(torch.rand(shape, generator=generator) < 0.05, -0.0, value)
    tiny = torch.finfo(dtype).smallest_normal / 3
    return torch.where(torch.rand(shape, generator=generator) < 0.05, tiny, value).to(dtype)


def inputs(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> SimpleNamespace:
    """What all five functions take; absent places hold NaN in hollow_ND."""
    generator = torch.Generator().manual_seed(sum(shape))
    T, K, D = shape
    order_N = torch.randperm(T * K, generator=generator)
    place_TK = order_N.argsort().view(T, K)
    present_TK = torch.rand(T, K, generator=generator) < 0.6
    y_ND, gate_ND, up_ND = (rows(generator, T * K, D, dtype=dtype) for _ in range(3))
    hollow_ND = y_ND.clone()
    hollow_ND[place_TK[~present_TK]] = torch.nan
    gate_ND[:2] = torch.tensor([-100, -20, -1.3, 100, 0, -0.0]).repeat(D)[:D].to(dtype)
    scores_TK = torch.randn(T, K, generator=generator)
    grad_TD = rows(generator, T, D, dtype=dtype)
    made = {name: value.to(device) for name, value in locals().items() if isinstance(value, torch.Tensor)}
    return SimpleNamespace(**made)


def sum_rows(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """Equal to eager, all present and some absent, of one matrix and of two."""
    given = inputs(dtype, shape, device)
    hollow, place, present = given.hollow_ND, given.place_TK, given.present_TK
    minus = torch.full_like(given.y_ND, -0.0)  # all of a token's rows: so is their sum
    cases = {
        "whole": (given.y_ND, place),
        "some": (hollow, place, present),
        "two": (given.y_ND, place, None, given.up_ND),
        "some of two": (hollow, place, present, given.up_ND),
        "-0": (minus, place, present),
        "-0, whole": (minus, place),
        "-0 of two": (minus, place, None, minus),
    }
    return "".join(
        difference(kernels.sum_rows(*args), eager.sum_rows(*args), what) for what, args in cases.items()
    )


def weighted_sum(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """Equal to eager, all present and some absent."""
    given = inputs(dtype, shape, device)
    whole = (given.y_ND, given.scores_TK, given.place_TK, None)
    some = (given.hollow_ND, given.scores_TK, given.place_TK, given.present_TK)
    minus = (torch.full_like(given.y_ND, -0.0), given.scores_TK.abs(), given.place_TK, None)
    return "".join(
        difference(kernels.weighted_sum(*args), eager.weighted_sum(*args), what)
        for what, args in (("whole", whole), ("some", some), ("-0", minus))
    )


def weighted_sum_backward(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """Rows equal to eager, dot products close to fp64."""
    given = inputs(dtype, shape, device)
    args = (given.grad_TD, given.y_ND, given.scores_TK, given.order_N)
    grad_y_ND, grad_score_N = kernels.weighted_sum_backward(*args)
    want_ND, like_N = eager.weighted_sum_backward(*args)
    terms_ND = given.grad_TD.double()[given.order_N // shape[1]] * given.y_ND.double()
    found = difference(grad_y_ND, want_ND, "grad_y")
    found += difference(grad_score_N * 0, like_N * 0, "grad_score's form")
    return found + distance(grad_score_N, terms_ND.sum(1), terms_ND.abs().sum(1), "grad_score")


def swiglu(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """Close to fp64, rounded once."""
    given = inputs(dtype, shape, device)
    want_ND = eager.swiglu(given.gate_ND.double(), given.up_ND.double())
    got_ND = kernels.swiglu(given.gate_ND, given.up_ND)
    return distance(got_ND, want_ND, want_ND.abs(), "h") + f"dtype {got_ND.dtype}" * (got_ND.dtype != dtype)


def swiglu_backward(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """Close to fp64, rounded once."""
    given = inputs(dtype, shape, device)
    args = (given.y_ND, given.gate_ND, given.up_ND)
    grad, gate, up = (arg.double() for arg in args)
    want_gate_ND, want_up_ND = eager.swiglu_backward(grad, gate, up)
    s = torch.sigmoid(gate)
    terms_ND = (grad * up * s).abs() * (1 + gate.abs() * (1 - s))  # 1 + gate * (1 - s) may cancel
    grad_gate_ND, grad_up_ND = kernels.swiglu_backward(*args)
    found = distance(grad_gate_ND, want_gate_ND, terms_ND, "grad_gate")
    found += distance(grad_up_ND, want_up_ND, want_up_ND.abs(), "grad_up")
    return found + "dtypes" * (grad_gate_ND.dtype != dtype or grad_up_ND.dtype != dtype)


def position(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """A row has the same bits among other rows, in another order, and from an odd address on."""
    given, (T, K, _) = inputs(dtype, shape, device), shape
    whole_TD = kernels.weighted_sum(given.hollow_ND, given.scores_TK, given.place_TK, given.present_TK)
    backward = kernels.weighted_sum_backward(given.grad_TD, given.y_ND, given.scores_TK, given.order_N)
    found = ""
    for few in (torch.arange(T * K, device=device).flip(0), slice(1, None), slice(3, 6)):
        t = few[few < T] if isinstance(few, torch.Tensor) else few
        of_t = (given.scores_TK[t], given.place_TK[t], given.present_TK[t])
        found += difference(kernels.weighted_sum(given.hollow_ND, *of_t), whole_TD[t], f"forward of {few}")
        of_few = (given.grad_TD, given.y_ND[few], given.scores_TK, given.order_N[few])
        for got, want in zip(kernels.weighted_sum_backward(*of_few), backward, strict=True):
            found += difference(got, want[few], f"backward of {few}")
    return found


def position_swiglu(kernels: Any, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """A row has the same bits among other rows, and from an odd address on. (eager's on a CPU have not.)"""
    given = inputs(dtype, shape, device)
    args = (given.y_ND, given.gate_ND, given.up_ND)
    found = ""
    for few in (slice(1, None), slice(3, 6)):
        fewer = [arg[few] for arg in args]
        got = (kernels.swiglu(*fewer[1:]), *kernels.swiglu_backward(*fewer))
        want = (kernels.swiglu(*args[1:]), *kernels.swiglu_backward(*args))
        for both in zip(got, (whole[few] for whole in want), strict=True):
            found += difference(*both, f"of {few}")
    return found


def absent_score(kernels: Any, device: str) -> str:
    """Not used either. (eager multiplies it by 0.)"""
    given = inputs(torch.bfloat16, (5, 3, 48), device)
    none_TK = torch.where(given.present_TK, given.scores_TK, torch.nan)
    got_TD = kernels.weighted_sum(given.hollow_ND, none_TK, given.place_TK, given.present_TK)
    want_TD = eager.weighted_sum(given.hollow_ND, given.scores_TK, given.place_TK, given.present_TK)
    return difference(got_TD, want_TD, "scores of NaN")


def strided(kernels: Any, device: str) -> str:
    """Every argument non-contiguous."""
    given = inputs(torch.bfloat16, (5, 3, 48), device)
    gapped = {name: value.repeat_interleave(2, -1)[..., ::2] for name, value in vars(given).items()}
    found = "".join(f"{name} is contiguous" for name, value in gapped.items() if value.is_contiguous())
    for name in FUNCTIONS:
        pair = (_call(kernels, name, SimpleNamespace(**of)) for of in (gapped, vars(given)))
        found += "".join(difference(*both, name) for both in zip(*pair, strict=True))
    return found


def fp64(kernels: Any, device: str) -> str:
    """The work of eager."""
    given = inputs(torch.float64, (5, 3, 48), device)
    return "".join(
        difference(*both, name)
        for name in FUNCTIONS
        for both in zip(_call(kernels, name, given), _call(eager, name, given), strict=True)
    )


def _call(kernels: Any, name: str, of: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    args = {
        "sum_rows": ("hollow_ND", "place_TK", "present_TK", "up_ND"),
        "weighted_sum": ("hollow_ND", "scores_TK", "place_TK", "present_TK"),
        "weighted_sum_backward": ("grad_TD", "y_ND", "scores_TK", "order_N"),
        "swiglu": ("gate_ND", "up_ND"),
        "swiglu_backward": ("y_ND", "gate_ND", "up_ND"),
    }[name]
    result = getattr(kernels, name)(*(getattr(of, arg) for arg in args))
    return result if isinstance(result, tuple) else (result,)


CASES = {
    f"{check.__name__}-{name}-{'x'.join(map(str, shape))}": partial(check, dtype=dtype, shape=shape)
    for check in (sum_rows, weighted_sum, weighted_sum_backward, swiglu, swiglu_backward)
    for name, dtype in DTYPES.items()
    for shape in SHAPES
}
CASES |= {
    f"{check.__name__}-{name}": partial(check, dtype=dtype, shape=(7, 2, 130))
    for check in (position, position_swiglu)
    for name, dtype in DTYPES.items()
}
CASES |= {"absent score": absent_score, "strided": strided, "fp64": fp64}


# ---------------------------------------------------------------------------------------------------
# Negative controls: faults planted in eager, and the cases that must see them.


def _fused(y_ND: Any, scores_TK: Any, place_TK: Any, present_TK: Any = None) -> torch.Tensor:
    """fma: the product is not rounded."""
    total_TD = torch.zeros(len(place_TK), y_ND.shape[1])
    for k in range(place_TK.shape[1]):
        row_TD = y_ND[place_TK[:, k]].double()
        if present_TK is not None:
            row_TD = torch.where(present_TK[:, k, None], row_TD, 0)
        total_TD = (total_TD + row_TD * scores_TK[:, k, None].double()).float()
    return total_TD.to(y_ND.dtype)


def _rounded_per_slot(y_ND: Any, place_TK: Any, present_TK: Any = None, also_ND: Any = None) -> torch.Tensor:
    parts = [
        eager.sum_rows(
            y_ND,
            place_TK[:, k : k + 1],
            None if present_TK is None else present_TK[:, k : k + 1],
            also_ND,
        )
        for k in range(place_TK.shape[1])
    ]
    return sum(parts[1:], parts[0])


def _sums_not_rounded(y_ND: Any, place_TK: Any, present_TK: Any = None, also_ND: Any = None) -> torch.Tensor:
    also_ND = None if also_ND is None else also_ND.float()
    return eager.sum_rows(y_ND.float(), place_TK, present_TK, also_ND).to(y_ND.dtype)


def _cut_off(y_ND: Any, *args: Any) -> torch.Tensor:
    wide_TD = eager.weighted_sum(y_ND.float(), *args)
    return (wide_TD.view(torch.int32) & -65536).view(torch.float32).to(y_ND.dtype)


def by_halves(grad_TD: Any, y_ND: Any, scores_TK: Any, order_N: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the batch's second half sum their products from the end on."""
    grad_y_ND, grad_score_N = eager.weighted_sum_backward(grad_TD, y_ND, scores_TK, order_N)
    products_ND = grad_TD.float()[order_N // scores_TK.shape[1]] * y_ND.float()
    half, from_the_end_N = len(y_ND) // 2, products_ND.flip(1).cumsum(1)[:, -1]
    return grad_y_ND, torch.cat([grad_score_N[:half], from_the_end_N[half:]])


_backward = eager.weighted_sum_backward
FAULTS = {
    "present ignored": ("sum_rows", "bf16", lambda y, p, q=None, also=None: eager.sum_rows(y, p, None, also)),
    "present ignored, weighted": (
        "weighted_sum",
        "bf16",
        lambda y, s, p, q=None: eager.weighted_sum(y, s, p),
    ),
    "scores of the wrong slot": (
        "weighted_sum",
        "bf16",
        lambda y, s, p, q=None: eager.weighted_sum(y, s.roll(1, 1), p, q),
    ),
    "another order of slots": (
        "sum_rows",
        "fp32",
        lambda y, p, q=None, also=None: eager.sum_rows(y, p.flip(1), None if q is None else q.flip(1), also),
    ),
    "starts at +0": ("sum_rows", "fp32", lambda *args: eager.sum_rows(*args) + 0.0),
    "fused": ("weighted_sum", "fp32", _fused),
    "rounded per slot": ("sum_rows", "bf16", _rounded_per_slot),
    "sums of two not rounded": ("sum_rows", "bf16", _sums_not_rounded),
    "only one of two": ("sum_rows", "bf16", lambda y, p, q=None, also=None: eager.sum_rows(y, p, q)),
    "cut off": ("weighted_sum", "bf16", _cut_off),
    "scores of the wrong token": (
        "weighted_sum_backward",
        "bf16",
        lambda g, y, s, order: _backward(g, y, s.roll(1, 0), order),
    ),
    "the wrong token's grad": (
        "weighted_sum_backward",
        "fp16",
        lambda g, y, s, order: (_backward(g, y, s, order)[0], _backward(g.roll(1, 0), y, s, order)[1]),
    ),
    "swiglu in bf16": ("swiglu", "bf16", lambda gate, up: F.silu(gate) * up),
    "no silu'": (
        "swiglu_backward",
        "fp32",
        lambda g, gate, up: (g * up * torch.sigmoid(gate), eager.swiglu_backward(g, gate, up)[1]),
    ),
    "by where a row stands": ("weighted_sum_backward", "fp32", by_halves),
}
