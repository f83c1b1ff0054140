"""What is timed in each mode, and the results that are checked before.

fwd: out from q, k, v. bwd: dq, dk, dv from dout and the residuals of one forward pass.
both: one forward and one backward pass, as a training step has them.
"""

import importlib
from typing import Any

import jax

from benchmarks import arrays, timing
from benchmarks.arrays import Operands
from benchmarks.contenders import Attention, Contender
from benchmarks.workloads import Mode, Workload

RESULTS = ("out", "dq", "dk", "dv")


def results(
    contender: Contender, workload: Workload, operands: Operands, gradients: bool
) -> dict[str, jax.Array]:
    """Returns out and, where asked for, dq, dk and dv of one contender."""
    attend = contender.build(workload)
    if contender.framework == "torch":
        found = _torch_results(attend, arrays.to_torch(operands), gradients)
    else:
        found = _jax_results(attend, operands, gradients)
    return dict(zip(RESULTS, found, strict=False))


def _jax_results(
    attend: Attention, operands: Operands, gradients: bool
) -> tuple[jax.Array, ...]:
    if not gradients:
        return (jax.jit(attend)(*operands.qkv),)
    return jax.jit(forward_and_backward(attend))(*operands.qkv, operands.dout)


def _torch_results(
    attend: Attention, operands: Operands, gradients: bool
) -> tuple[jax.Array, ...]:
    out = attend(*operands.qkv)
    tensors = (out,)
    if gradients:
        tensors += _torch_gradients(out, operands)
    return tuple(arrays.from_torch(tensor) for tensor in tensors)


def _torch_gradients(out: Any, operands: Operands, retain: bool = False) -> Any:
    autograd = importlib.import_module("torch").autograd
    return autograd.grad(out, operands.qkv, operands.dout, retain_graph=retain)


def forward_and_backward(attend: Attention) -> timing.Step:
    """Returns a function of q, k, v and dout that returns out, dq, dk and dv."""

    def step(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return step


def sampler(
    contender: Contender,
    workload: Workload,
    mode: Mode,
    operands: Operands,
    *,
    guess: float,
    sample_seconds: float,
) -> timing.Sampler:
    """Returns the contender, compiled and warm, ready to be timed.

    Args:
        contender: what is timed.
        workload: what it computes.
        mode: which pass.
        operands: JAX arrays.
        guess: seconds per call, roughly.
        sample_seconds: how long one sample should take.
    """
    attend = contender.build(workload)
    if contender.framework == "torch":
        tensors = arrays.to_torch(operands)
        return _torch_sampler(attend, mode, tensors, sample_seconds)
    step, first, rest = _jax_step(attend, mode, operands)
    return timing.JaxSampler(
        step, first, rest, guess=guess, sample_seconds=sample_seconds
    )


def _jax_step(
    attend: Attention, mode: Mode, operands: Operands
) -> tuple[timing.Step, jax.Array, tuple[Any, ...]]:
    q, k, v = operands.qkv
    if mode == "fwd":
        return attend, q, (k, v)
    if mode == "both":
        return forward_and_backward(attend), q, (k, v, operands.dout)
    _, vjp = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v))(q, k, v)
    return (lambda dout, vjp: vjp(dout)), operands.dout, (vjp,)


def _torch_sampler(
    attend: Attention, mode: Mode, operands: Operands, sample_seconds: float
) -> timing.TorchSampler:
    torch = importlib.import_module("torch")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def forward() -> Any:
        with torch.no_grad():
            return attend(*operands.qkv)

    def both() -> Any:
        return _torch_gradients(attend(*operands.qkv), operands)

    with torch.cuda.stream(stream):
        out = attend(*operands.qkv) if mode == "bwd" else None

    def backward() -> Any:
        return _torch_gradients(out, operands, retain=True)

    call = {"fwd": forward, "bwd": backward, "both": both}[mode]
    return timing.TorchSampler(call, stream, sample_seconds=sample_seconds)
