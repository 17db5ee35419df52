"""Pallas kernels for GPUs that work on whole rows: Pattention's scores, and the loss's logits.

Both need a sum over a row before any of its entries can be finished: the norm of equation 5, the sum of the softmax,
and one more sum for the norm's gradient. XLA makes a pass over device memory for each such sum, and stores float32
arrays of the row's size between passes. Here one program reads a row, sums it up, and finishes it from registers, or
from the cache where the row is long: each array is read once and written once.

The contractions stay with XLA's library. A kernel that kept the scores on chip could not feed the matrix units of an
H100: docs/accelerator.md has the count.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tokenformer_jax.devices.sharding import platform
from tokenformer_jax.nn.layers import inverse_norm

# Measured on an H100, whose bytes a second they decide; docs/accelerator.md.
IN_REGISTERS = 4096  # scores of a row, at most, that a program keeps; of a longer row it reads them again
CHUNK, WARPS = 2048, 8  # scores of a long row that a program works on at once, and its warps
LONG_ROW, LONG_CHUNK, LONG_WARPS = 16384, 8192, 32  # few programs at a time, so that their rows fit into the cache
LOGITS_CHUNK, LOGITS_WARPS = 4096, 32  # likewise
LOGITS_PARTS = 4  # chunks that share one exponential of their maximum


def apply() -> bool:
    """Whether the computation is for GPUs, and each has whole rows of scores and logits."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "gpu" and (mesh.empty or mesh.shape["tensor"] == 1)


def weights(scores_PN: jax.Array, tau: jax.Array, gelu: str, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """gelu(τ s / ‖s‖₂) of each row s of scores (equation 5), and its sum of squares.

    Args:
      scores_PN: scores of P positions, in bfloat16 or float32.
      tau: float32 scalar.
      gelu: "erf" or "tanh".
      interpret: runs anywhere, slowly.

    Returns:
      The weights [P, N] in the scores' dtype, and float32 ‖s‖₂² [P].
    """
    kernel = functools.partial(_weights_kernel, num_tokens=scores_PN.shape[1], gelu=gelu)
    outputs = [_like(scores_PN), jax.ShapeDtypeStruct(scores_PN.shape[:1], jnp.float32)]
    return _call(kernel, (scores_PN, tau.reshape(1)), outputs, *_score_blocks(*scores_PN.shape), interpret)


def weights_gradient(
    scores_PN: jax.Array,
    dweights_PN: jax.Array,
    squares_P: jax.Array,
    tau: jax.Array,
    gelu: str,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The weights once more, and the gradient of the scores from that of the weights, both [P, N]."""
    kernel = functools.partial(_weights_gradient_kernel, num_tokens=scores_PN.shape[1], gelu=gelu)
    inputs, outputs = (scores_PN, dweights_PN, squares_P, tau.reshape(1)), [_like(scores_PN)] * 2
    return _call(kernel, inputs, outputs, *_score_blocks(*scores_PN.shape), interpret)


def softmax_loss(
    logits_PV: jax.Array, targets_P: jax.Array, weights_P: jax.Array, dtype: Any, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] in nats, and the gradient of its weighted sum to the logits.

    Args:
      logits_PV: float32 logits of P positions.
      targets_P: int32.
      weights_P: float32.
      dtype: of the gradient.
      interpret: runs anywhere, slowly.

    Returns:
      float32 losses [P], without weights, and the gradient [P, V].
    """
    num_logits = logits_PV.shape[1]
    chunk = min(LOGITS_CHUNK, pl.next_power_of_2(pl.cdiv(num_logits, LOGITS_PARTS)))
    kernel = functools.partial(_loss_kernel, num_logits=num_logits, chunk=chunk)
    outputs = [_like(weights_P), jax.ShapeDtypeStruct(logits_PV.shape, dtype)]
    width = pl.cdiv(num_logits, LOGITS_PARTS * chunk) * LOGITS_PARTS * chunk
    return _call(kernel, (logits_PV, targets_P, weights_P), outputs, 1, LOGITS_WARPS, width, interpret)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(
    kernel: Callable,
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
    rows: int,
    warps: int,
    width: int,
    interpret: bool,
) -> Any:
    """Runs a program for every `rows` rows of arrays [P, N] and [P]; an array of one entry goes to all.

    A block is `width` columns wide, which may be more than there are: kernels mask what they read and write.
    """
    num_rows = outputs[0].shape[0]

    def spec(x: Any) -> pl.BlockSpec:
        if x.shape == (1,):
            return pl.BlockSpec((1,), lambda i: (0,))
        return pl.BlockSpec((rows, width)[: len(x.shape)], lambda i: (i, 0)[: len(x.shape)])

    return pl.pallas_call(
        kernel,
        grid=(num_rows // rows,),
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in outputs],
        out_shape=outputs,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(*inputs)


def _score_blocks(num_rows: int, num_tokens: int) -> tuple[int, int, int]:
    """Rows, warps and columns of one program."""
    if num_tokens > IN_REGISTERS:
        chunk, warps = _chunk(num_tokens)
        return 1, warps, pl.cdiv(num_tokens, chunk) * chunk
    rows = math.gcd(num_rows, max(1, 512 // pl.next_power_of_2(num_tokens)))
    return rows, 4, sum(piece.size for piece in _pieces(num_tokens))


def _chunk(num_tokens: int) -> tuple[int, int]:
    return (LONG_CHUNK, LONG_WARPS) if num_tokens > LONG_ROW else (CHUNK, WARPS)


class _Piece(NamedTuple):
    """Columns of a row: 2^k of them from `start`, of which the first `used` are there."""

    start: Any
    size: int
    used: Any

    def load(self, ref: Any, other: float = 0.0) -> jax.Array:
        """float32 [rows, size]; `other` where nothing is there."""
        mask = self._mask()
        x = triton.load(ref.at[:, pl.ds(self.start, self.size)], mask=mask, other=None if mask is None else other)
        return x.astype(jnp.float32)

    def store(self, ref: Any, x: jax.Array) -> None:
        triton.store(ref.at[:, pl.ds(self.start, self.size)], x.astype(ref.dtype), mask=self._mask())

    def split(self, parts: int) -> list["_Piece"]:
        size = self.size // parts
        starts = range(0, self.size, size)
        return [_Piece(self.start + i, size, size if self.used is self.size else self.used - i) for i in starts]

    def _mask(self) -> jax.Array | None:
        return None if self.used is self.size else (jnp.arange(self.size) < self.used)[None, :]


def _pieces(num_columns: int) -> list[_Piece]:
    """A row as pieces of falling sizes; the last may stick out, by a quarter of itself or into 128."""
    found, start = [], 0
    while start < num_columns:
        left = num_columns - start
        size = pl.next_power_of_2(left)
        if size > 128 and left < 0.75 * size:
            size //= 2
        found.append(_Piece(start, size, size if size <= left else left))
        start += size
    return found


def _loop(num_columns: int, chunk: int, body: Callable[[_Piece, Any], Any], carry: Any) -> Any:
    """carry = body(piece, carry) for each chunk of a row."""

    def one(i: jax.Array, carry: Any) -> Any:
        start = i * chunk
        return body(_Piece(start, chunk, num_columns - start if num_columns % chunk else chunk), carry)

    return jax.lax.fori_loop(0, pl.cdiv(num_columns, chunk), one, carry)


def _row_sum(*pieces: jax.Array) -> jax.Array:
    """[rows, 1], over all pieces of a row."""
    return functools.reduce(jnp.add, [jnp.sum(piece, axis=1) for piece in pieces])[:, None]


def _weights_kernel(scores_RN, tau_1, weights_RN, squares_R, *, num_tokens, gelu):
    def weigh(piece, s_RC):
        piece.store(weights_RN, _gelu_and_slope(s_RC * scale_R1, gelu)[0])

    if num_tokens <= IN_REGISTERS:
        row = [(piece, piece.load(scores_RN)) for piece in _pieces(num_tokens)]
        total_R1 = _row_sum(*(jnp.square(s_RC) for _, s_RC in row))
        scale_R1 = tau_1[0] * inverse_norm(total_R1)
        for piece, s_RC in row:
            weigh(piece, s_RC)
    else:
        chunk, _ = _chunk(num_tokens)
        zeros_RC = jnp.zeros((1, chunk), jnp.float32)
        total_R1 = _row_sum(
            _loop(num_tokens, chunk, lambda piece, sums_RC: sums_RC + jnp.square(piece.load(scores_RN)), zeros_RC)
        )
        scale_R1 = tau_1[0] * inverse_norm(total_R1)
        _loop(num_tokens, chunk, lambda piece, _: weigh(piece, piece.load(scores_RN)), None)
    squares_R[...] = total_R1[:, 0]


def _weights_gradient_kernel(scores_RN, dweights_RN, squares_R, tau_1, weights_RN, dscores_RN, *, num_tokens, gelu):
    inverse_R1 = inverse_norm(squares_R[...])[:, None]
    scale_R1 = tau_1[0] * inverse_R1

    def weigh(piece):
        """Stores the weights; gives the scores, and the gradient of the normalized ones over τ."""
        s_RC = piece.load(scores_RN)
        weights_RC, slope_RC = _gelu_and_slope(s_RC * scale_R1, gelu)
        piece.store(weights_RN, weights_RC)
        return s_RC, piece.load(dweights_RN) * slope_RC

    def finish(piece, s_RC, d_RC, sum_R1):  # without what is along the scores, since the norm takes that out
        piece.store(dscores_RN, scale_R1 * (d_RC - sum_R1 * inverse_R1 * inverse_R1 * s_RC))

    if num_tokens <= IN_REGISTERS:
        row = [(piece, *weigh(piece)) for piece in _pieces(num_tokens)]
        sum_R1 = _row_sum(*(s_RC * d_RC for _, s_RC, d_RC in row))
        for piece, s_RC, d_RC in row:
            finish(piece, s_RC, d_RC, sum_R1)
        return

    def add(piece, sums_RC):
        s_RC, d_RC = weigh(piece)
        piece.store(dscores_RN, d_RC)  # until the sum is known
        return sums_RC + s_RC * d_RC.astype(dscores_RN.dtype).astype(jnp.float32)

    chunk, _ = _chunk(num_tokens)
    sum_R1 = _row_sum(_loop(num_tokens, chunk, add, jnp.zeros((1, chunk), jnp.float32)))
    _loop(num_tokens, chunk, lambda p, _: finish(p, p.load(scores_RN), p.load(dscores_RN), sum_R1), None)


def _loss_kernel(logits_RV, targets_R, weights_R, nll_R, dlogits_RV, *, num_logits, chunk):
    target_R1, weight_R1 = targets_R[...][:, None], weights_R[...][:, None]
    lowest, log2e = -1e30, math.log2(math.e)  # the first stands for logits that are not there
    zeros_RC = jnp.zeros((1, chunk), jnp.float32)

    def add(piece, carry):
        max_RC, sum_RC = carry
        logits = [part.load(logits_RV, lowest) * log2e for part in piece.split(LOGITS_PARTS)]
        new_RC = functools.reduce(jnp.maximum, logits, max_RC)
        return new_RC, sum((jnp.exp2(x_RC - new_RC) for x_RC in logits), sum_RC * jnp.exp2(max_RC - new_RC))

    max_RC, sum_RC = _loop(num_logits, LOGITS_PARTS * chunk, add, (zeros_RC + lowest, zeros_RC))
    max_R1 = jnp.max(max_RC, axis=1)[:, None]
    sum_R1 = _row_sum(sum_RC * jnp.exp2(max_RC - max_R1))
    scale_R1 = weight_R1 / sum_R1

    def write(piece, target_logit_RC):
        x_RC = piece.load(logits_RV, lowest)
        is_target_RC = (piece.start + jnp.arange(chunk))[None, :] == target_R1
        probs_RC = jnp.exp2(x_RC * log2e - max_R1) * scale_R1  # times the weight
        piece.store(dlogits_RV, probs_RC - jnp.where(is_target_RC, weight_R1, 0.0))
        return target_logit_RC + jnp.where(is_target_RC, x_RC, 0.0)

    target_logit_R1 = _row_sum(_loop(num_logits, chunk, write, zeros_RC))
    nll_R[...] = (max_R1 / log2e + jnp.log(sum_R1) - target_logit_R1)[:, 0]


def _gelu_and_slope(n: jax.Array, gelu: str) -> tuple[jax.Array, jax.Array]:
    """gelu(n) and its derivative."""
    if gelu == "tanh":
        inner = math.sqrt(2 / math.pi) * n * (1 + 0.044715 * n * n)
        half = 1 / (1 + jnp.exp(-2 * inner))  # (1 + tanh) / 2
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * n * n)
        return n * half, half + n * half * (1 - half) * slope
    erf, exp = _erf_and_exp(n * math.sqrt(0.5))
    cdf = 0.5 + 0.5 * erf
    return n * cdf, cdf + n * exp * (1 / math.sqrt(2 * math.pi))


def _erf_and_exp(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """erf(x) to 1.5e-7 and exp(-x²), by which it is computed (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * jnp.abs(x))
    exp = jnp.exp2(x * x * -math.log2(math.e))
    poly = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    return jnp.where(x < 0, poly * exp - 1, 1 - poly * exp), exp
