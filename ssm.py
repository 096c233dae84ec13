"""Mamba-2: one scan in five forms, its backward by hand, the step for one token, the layer.

A head of Mamba-2 keeps a matrix as its state. At each token the state decays, by a factor that is
computed from the input, and the token is added to it:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          S (p, n), A < 0 one number per head
    y_t = S_t C_t + D x_t

This is linear attention with decay: unrolled, y_t is a sum over s <= t of (C_t . B_s), times the
decay between s and t, times dt_s x_s. The file computes this sum in five forms, slowest first:

    ssd_recurrent   token by token               O(t) work, no matmuls       the definition
    ssd_quadratic   the (t, t) score matrix      O(t^2) work, all matmuls    the insight
    ssd_minimal     attention inside chunks,     O(t l) work, all matmuls    the algorithm: the
                    recurrence between them                                  form to copy first
    ssd_chunked     the same, chunk by chunk,    scores of one chunk only    trains and prefills
                    the backward by hand
    ssd_triton      the same, in GPU kernels     one pass over memory        the same, on GPUs
    ssd_step        one token, in place          O(1) work and memory        decodes

Source: Mamba-2, arXiv 2405.21060 (the scan: section 6; the layer: section 7). Shapes and names
follow state-spaces/mamba at e9594ce. The released Nemotron-H models use this layer unchanged.

Glossary (the paper's letter in brackets where it differs)
    b batch | t time steps (T) | h heads | p head dim (P) | n state size (N) | c chunks
    l length of a chunk (Q) | g groups | r = h / g heads that share their group's B and C
    x input (X) | dt step size, softplus applied | A decay, one number per head | D skip (h,)
    B, C input and output maps: attention's keys and queries | S state (b, h, p, n) | z output gate
    u = dt x, what enters the state | a = dt A, log of one step's decay | L = exp(segment sums of a)
    seq_idx (b, t): a change of value starts a new document and empties the state

Choices, and where others differ
  * B and C are not copied per head: each product with them is one batched matmul per group. (The
    copies of transformers 5.23 take 16 times the memory at the 9B's 128 heads in 8 groups.)
  * The mask comes before exp. If it came after, the backward would compute inf * 0 = NaN.
  * dt has no lower clamp. transformers 5.23 raises dt to at least time_step_min (0.001) in training
    and prefill, with or without kernels, but not in decode, so that its own two paths disagree.
  * dt, A, cumulative sums, decays and states are fp32 whatever x is (fp64 if x is fp64); matmul
    operands have x's dtype, as in the CUDA kernels. Sums in bf16 would cost 2% in the decays.
  * Differences of fp32 cumulative sums lose digits after a huge step: y is off by 4e-5 after one
    dt = 100 at A = -16, and by 6e-3 after one dt = 10000.
  * Each change of seq_idx counts: 0 1 0 are three documents. (mamba_ssm compares values instead.)
    initial_states belong to the document at position 0.
  * Convolution and gated norm are plain torch, compiled on CUDA. With hand-written backwards a
    default training step takes 0.95 to 1.04 times as long (2 cores, AMD EPYC Zen 5): no gain.
  * The Triton kernels (second half of the file) are checked in Triton's interpreter and by
    ahead-of-time compilation for A10G and H100. Their speed has not been measured.

Left out: splitting one sequence over several GPUs, or over the multiprocessors of one; second
derivatives of ssd_chunked and ssd_triton, which raise an error that names ssd_minimal instead.

    python ssm.py            error of every form and gradient against fp64      5 s on 2 cores
    python -m bench.ssm      speed against length; bytes, FLOPs and rooflines of the kernels
"""

import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------
# What every form shares


def accumulator(x):
    """The dtype for sums, decays and states: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def discretize(x, dt, A):
    """Each step's input u = dt x (b, t, h, p) and log-decay a = dt A <= 0 (b, t, h); fp32."""
    dtype = accumulator(x)
    dt = dt.to(dtype)
    return x.to(dtype) * dt[..., None], dt * A.to(dtype)


def documents(seq_idx):
    """seq_idx (b, t) -> document numbers (b, t): how often it has changed; None -> None."""
    if seq_idx is None:
        return None
    changed = (seq_idx[:, 1:] != seq_idx[:, :-1]).long()
    return F.pad(changed, (1, 0)).cumsum(1)


def _check(x, B, C):
    """Raise ValueError if there is no token, or if the matmuls' operands differ in dtype."""
    if not x.shape[0] * x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: at least one row and one token are needed")
    if not x.dtype == B.dtype == C.dtype:
        raise ValueError(f"x is {x.dtype}, B {B.dtype} and C {C.dtype}: they must be of one dtype")


def _prepare(x, dt, A, B, C, D, initial_states, seq_idx):
    """Check the arguments; return the state to start from and the document numbers."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    wanted = dict(dt=(dt, (b, t, h)), A=(A, (h,)), B=(B, (b, t, g, n)), C=(C, (b, t, g, n)),
                  D=(D, (h,)), initial_states=(initial_states, (b, h, p, n)),
                  seq_idx=(seq_idx, (b, t)))
    for name, (value, shape) in wanted.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {shape} for x "
                             f"{tuple(x.shape)} and B {tuple(B.shape)}")
    if h % g:
        raise ValueError(f"{h} heads cannot share {g} groups: heads must be a multiple of groups")
    _check(x, B, C)
    S = x.new_zeros(b, h, p, n) if initial_states is None else initial_states
    return S.to(accumulator(x)), documents(seq_idx)


# ------------------------------------------------------------------------------------------------
# The scan, slowest form first


def ssd_recurrent(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None):
    """The definition, one token at a time (Mamba-2, equation 1 with scalar A; section 3.1).

    x (b, t, h, p) float; dt (b, t, h) positive, softplus applied; A (h,) negative; B, C (b, t, g,
    n) of x's dtype; D (h,) or None; initial_states (b, h, p, n) or None for zeros; seq_idx (b, t)
    int or None. Returns y (b, t, h, p) in x's dtype and the final states (b, h, p, n), fp32 (fp64
    if x is). Raises ValueError on shapes and dtypes that do not fit. Gradients flow to every float
    input and from both outputs."""
    S, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    u, a = discretize(x, dt, A)
    B, C = B.to(u.dtype), C.to(u.dtype)

    S, ys = S.unflatten(1, (g, -1)), []                         # heads of a group side by side
    for i, (ui, ai, Bi, Ci) in enumerate(zip(*[m.unbind(1) for m in (u, a, B, C)])):
        decay = ai.exp()                                                    # (b, h)
        if doc is not None and i > 0:
            decay = decay * (doc[:, i] == doc[:, i - 1])[:, None]
        ui = ui.view(b, g, h // g, p)
        S = decay.view(b, g, h // g, 1, 1) * S + torch.einsum("bgrp,bgn->bgrpn", ui, Bi)
        ys.append(torch.einsum("bgrpn,bgn->bgrp", S, Ci).reshape(b, h, p))
    y = torch.stack(ys, 1)                                                  # (b, t, h, p)

    if D is not None:
        y = y + x * D[:, None]
    return y.to(x.dtype), S.reshape(b, h, p, n)


def segment_sum(a):
    """a (..., t) -> (..., t, t): [i, j] = a_{j+1} + ... + a_i, 0 on the diagonal, -inf above.

    It sums masked terms instead of subtracting two cumulative sums, so that no digits cancel."""
    t = a.shape[-1]
    lower = torch.ones(t, t, dtype=torch.bool, device=a.device).tril()
    steps = a[..., :, None].expand(*a.shape, t).masked_fill(~lower.tril(-1), 0)
    return steps.cumsum(-2).masked_fill(~lower, -torch.inf)


def ssd_quadratic(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None):
    """The attention form: y = (L * C B^T) u; decays L replace softmax (Mamba-2, section 3.2).

    O(t^2) time and memory. Arguments, results and errors as in `ssd_recurrent`."""
    S0, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    u, a = discretize(x, dt, A)
    B, C, u = B.to(u.dtype), C.to(u.dtype), u.view(b, t, g, h // g, p)

    a = a.transpose(1, 2).reshape(b, g, h // g, t)
    L, start = segment_sum(a), a.cumsum(-1)                     # (b, g, r, t, t), (b, g, r, t)
    if doc is not None:
        L = L.masked_fill((doc[:, :, None] != doc[:, None, :])[:, None, None], -torch.inf)
        start = start.masked_fill((doc != doc[:, :1])[:, None, None], -torch.inf)
    L, start = L.exp(), start.exp()

    scores = torch.einsum("bign,bjgn->bgij", C, B)[:, :, None] * L          # (b, g, r, t, t)
    y = torch.einsum("bgrij,bjgrp->bigrp", scores, u)
    S0 = S0.unflatten(1, (g, -1))
    y = y + torch.einsum("bign,bgrpn,bgri->bigrp", C, S0, start)
    S = start[..., -1, None, None] * S0
    S = S + torch.einsum("bgrj,bjgrp,bjgn->bgrpn", L[..., -1, :], u, B)

    y = y.reshape(b, t, h, p)
    if D is not None:
        y = y + x * D[:, None]
    return y.to(x.dtype), S.reshape(b, h, p, n)


def ssd_minimal(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128):
    """The chunked algorithm in its four steps (Mamba-2, section 6), all chunks at once, gradients
    by autograd. Arguments and results as in `ssd_recurrent`."""
    _check(x, B, C)
    t, g, l = x.shape[1], B.shape[2], max(1, min(chunk_size, x.shape[1]))
    u, a = discretize(x, dt, A)
    doc = documents(torch.zeros_like(a[..., 0]) if seq_idx is None else seq_idx)

    # Pad to whole chunks. Zeros in front are steps with dt = 0 in document 0: they change nothing.
    pad = -t % l
    u, a, B, C, doc = (F.pad(m, (0, 0) * (m.dim() - 2) + (pad, 0)).unflatten(1, (-1, l))
                       for m in (u, a, B.to(u.dtype), C.to(u.dtype), doc))
    u, doc = u.unflatten(3, (g, -1)), doc[:, :, None, None]     # (b, c, l, g, r, p), (b, c, 1.., l)
    a = a.unflatten(3, (g, -1)).movedim(2, -1).cumsum(-1)                   # (b, c, g, r, l)

    # Decays between two positions, from a chunk's start and to its end; none crosses documents.
    before = F.pad(doc[:, :-1, ..., -1:], (0, 0) * 3 + (1, 0))  # document of the token before
    same = (doc[..., :, None] == doc[..., None, :]).tril()
    L = (a[..., :, None] - a[..., None, :]).masked_fill(~same, -torch.inf).exp()
    head = a.masked_fill(doc != before, -torch.inf).exp()
    tail = (a[..., -1:] - a).masked_fill(doc != doc[..., -1:], -torch.inf).exp()

    # (1) Inside each chunk: attention, with decays in place of softmax.
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B)[:, :, :, None] * L    # (b, c, g, r, l, l)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", scores, u)
    # (2) The state that each chunk's own tokens leave at its end.
    states = torch.einsum("bclgrp,bcgrl,bclgn->bcgrpn", u, tail, B)
    # (3) The recurrence from chunk to chunk: the state that enters each chunk.
    S, entering = torch.zeros_like(states[:, 0]), []                        # (b, g, r, p, n)
    if initial_states is not None:
        S = initial_states.to(S.dtype).unflatten(1, (g, -1))
    for i in range(states.shape[1]):
        entering.append(S)
        S = head[:, i, ..., -1, None, None] * S + states[:, i]
    # (4) What the entering state adds to each output.
    y = y + torch.einsum("bclgn,bcgrpn,bcgrl->bclgrp", C, torch.stack(entering, 1), head)
    y = y.flatten(1, 2)[:, pad:].flatten(2, 3)                              # (b, t, h, p)
    if D is not None:
        y = y + x * D[:, None]
    return y.to(x.dtype), S.flatten(1, 2)


def ssd_chunked(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128):
    """The same algorithm, one chunk after the other, with the backward derived by hand
    (`_ChunkedScan`): time O(t l), memory O(t + l^2). Arguments, results and errors as in
    `ssd_recurrent`. The result does not depend on chunk_size; t need not be a multiple of it."""
    S0, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    groups = B.shape[2], -1
    D = None if D is None else D.unflatten(0, groups)
    y, S = _ChunkedScan.apply(
        x.unflatten(2, groups), dt.unflatten(2, groups), A.unflatten(0, groups), B, C, D,
        S0.unflatten(1, groups), doc, max(1, min(chunk_size, x.shape[1])), torch.is_grad_enabled())
    return y.flatten(2, 3), S.flatten(1, 2)


def group_heads(m):
    """(b, l, g, r, p) -> (b, g, l, r p): a group's heads side by side, to multiply B and C."""
    return m.transpose(1, 2).flatten(3)


def ungroup_heads(m, r):
    """(b, g, l, r p) -> (b, l, g, r, p), the inverse of `group_heads`."""
    return m.unflatten(3, (r, -1)).transpose(1, 2)


class _Chunk:
    """One chunk's slice of the inputs, heads split by group, and its four kinds of decay."""

    def __init__(self, x, dt, A, B, C, doc, start, stop):
        self.span = s = slice(start, stop)
        self.x, self.dt = x[:, s], dt[:, s].to(accumulator(x))
        self.u, a = discretize(self.x, self.dt, A)              # (b, l, g, r, p), (b, l, g, r)
        self.B, self.C = (m[:, s].transpose(1, 2).contiguous() for m in (B, C))     # (b, g, l, n)

        # Decay between two positions, from the chunk's start, to its end, and across all of it.
        a = a.cumsum(1)
        at = a.movedim(1, -1).contiguous()                                  # (b, g, r, l)
        self.L = at[..., :, None] - at[..., None, :]            # (b, g, r, l, l)
        self.L.clamp_(max=0).exp_().tril_()     # mask, then exp; a mask of -inf is 12x as slow
        self.head, self.tail = a.exp(), (a[:, -1:] - a).clamp_(max=0).exp_()    # (b, l, g, r) each
        if doc is not None:
            before, doc = doc[:, max(start - 1, 0), None], doc[:, s]
            self.L *= (doc[:, :, None] == doc[:, None, :])[:, None, None]
            self.head *= (doc == before)[..., None, None]
            self.tail *= (doc == doc[:, -1:])[..., None, None]
        self.all = self.head[:, -1]                                         # (b, g, r)


class _ChunkedScan(torch.autograd.Function):
    """The chunked scan and its gradient. x (b, t, g, r, p), dt (b, t, g, r), A, D (g, r), B, C (b,
    t, g, n), S0 (b, g, r, p, n), doc (b, t) or None.

    Per chunk, with S the state that enters it, G = C B^T its scores and M = G * L:

        y  = M u  +  head * (C S^T)  +  D x         (1) inside the chunk, (4) from the state
        S' = all * S  +  (tail * u)^T B             (3) the recurrence, (2) the chunk's own state

    The backward takes dy and R = dS' through the transposed products, last chunk first:

        du = M^T dy + tail * (B R^T)          dG = sum over a group's heads of (dy u^T) * L
        dC = dG B   + (head * dy) S           dB = dG^T C + (tail * u) R
        R  <- all * R + (head * dy)^T C       the gradient of the state that entered

    The log-decays a enter through exp of differences of their cumulative sum c, and d exp = exp.
    Let W = dM * M and w_i = <u_i, tail_i B_i R>, but 0 on the diagonal of W and at the last w,
    where the exponent is the constant 0:

        dc_i = sum_j W_ij - sum_j W_ji + <dy_i, head_i C_i S> - w_i
        dc_last += sum_i w_i + all <R, S>     tail and all also read the last sum
        da = reverse cumulative sum of dc     dA = sum of dt da
        ddt = <du, x> + A da                  dx = dt du + D dy

    Only the inputs and each chunk's entering state are saved; scores are computed again. Only one
    chunk's scores exist at a time, so that they stay in the CPU's cache."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, S0, doc, chunk_size, keep_states):
        b, t, g, r, p = x.shape
        starts = range(0, t, chunk_size)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        S = S0.flatten(2, 3).clone(memory_format=torch.contiguous_format)   # (b, g, r p, n)
        entering = S.new_empty(len(starts) if keep_states else 0, *S.shape)

        for i, start in enumerate(starts):
            k = _Chunk(x, dt, A, B, C, doc, start, min(start + chunk_size, t))
            if keep_states:
                entering[i] = S

            # (1) inside the chunk: scores times values, one matmul per head
            M = k.L.mul_((k.C @ k.B.mT)[:, :, None]).to(x.dtype)            # (b, g, r, l, l)
            yk = (M @ k.u.to(x.dtype).movedim(1, 3)).movedim(3, 1)          # (b, l, g, r, p)

            # (4) what the entering state adds to the output, one matmul per group
            from_state = ungroup_heads(k.C @ S.to(x.dtype).mT, r)           # (b, l, g, r, p)
            yk = torch.addcmul(yk.to(S.dtype), from_state.to(S.dtype), k.head[..., None])
            y[:, k.span] = yk if D is None else yk.addcmul_(k.x.to(S.dtype), D[..., None])

            # (2) the state that the chunk itself leaves, and (3) the recurrence
            left = group_heads((k.u * k.tail[..., None]).to(x.dtype))       # (b, g, l, r p)
            S.unflatten(2, (r, p)).mul_(k.all[..., None, None])
            S += left.mT @ k.B

        ctx.save_for_backward(x, dt, A, B, C, D, doc, entering)
        ctx.chunk_size = chunk_size
        return y, S.unflatten(2, (r, p))

    @staticmethod
    def backward(ctx, dy, dS):
        first_derivatives_only("ssd_chunked", "ssd_minimal")
        x, dt, A, B, C, D, doc, entering = ctx.saved_tensors
        b, t, g, r, p = x.shape
        dx, dB, dC = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, B, C))
        ddt = torch.empty_like(dt, dtype=dS.dtype, memory_format=torch.contiguous_format)
        dA, dD = dS.new_zeros(2, g, r)
        R = dS.flatten(2, 3).clone(memory_format=torch.contiguous_format)   # (b, g, r p, n)

        for i in reversed(range(len(entering))):
            k = _Chunk(x, dt, A, B, C, doc, i * ctx.chunk_size, min((i + 1) * ctx.chunk_size, t))
            S, dyk = entering[i], dy[:, k.span]
            Sx, Rx = S.to(x.dtype), R.to(x.dtype)

            # Through (1): gradients of scores, values and the decays between positions.
            G = (k.C @ k.B.mT)[:, :, None]                                  # (b, g, 1, l, l)
            dyh, uh = dyk.movedim(1, 3), k.u.to(x.dtype).movedim(1, 3)      # (b, g, r, l, p)
            dM = (dyh @ uh.mT).to(k.L.dtype).mul_(k.L)                      # dM * L
            dG = dM.sum(2).to(x.dtype)                                      # (b, g, l, l)
            du = (k.L.mul_(G).to(x.dtype).mT @ dyh).movedim(3, 1)           # (b, l, g, r, p)
            W = dM.mul_(G)
            W.diagonal(dim1=-2, dim2=-1).zero_()
            dc = (W.sum(-1) - W.sum(-2)).movedim(3, 1)                      # (b, l, g, r)

            # Through (4) and (2): what the state gave to y, and what u gave to the state.
            dyd = dyk * k.head[..., None]
            dc += (dyd * ungroup_heads(k.C @ Sx.mT, r)).sum(-1)
            from_R = ungroup_heads(k.B @ Rx.mT, r) * k.tail[..., None]
            du = du + from_R
            w = from_R.mul_(k.u).sum(-1)
            w[:, -1] = 0                        # the exponent is the constant 0
            dc -= w
            dc[:, -1] += w.sum(1) + k.all * (R * S).unflatten(2, (r, p)).sum((3, 4))

            left = group_heads((k.u * k.tail[..., None]).to(x.dtype))       # (b, g, l, r p)
            dyd = group_heads(dyd.to(x.dtype))
            dC[:, k.span] = (dG @ k.B + dyd @ Sx).transpose(1, 2)
            dB[:, k.span] = (dG.mT @ k.C + left @ Rx).transpose(1, 2)

            # Through (3): the gradient goes on to the chunk before.
            R.unflatten(2, (r, p)).mul_(k.all[..., None, None])
            R += dyd.mT @ k.C

            # From u and a to x, dt, A and D, whose sums over time are fp32.
            da = dc.flip(1).cumsum(1).flip(1)
            ddt[:, k.span] = (du * k.x).sum(-1) + da * A
            dA += (da * k.dt).sum((0, 1))
            du = du * k.dt[..., None]
            if D is not None:
                dD += (dyk.to(dD.dtype) * k.x).sum((0, 1, 4))
                du.addcmul_(dyk.to(du.dtype), D[..., None])
            dx[:, k.span] = du

        dD = None if D is None else dD.to(D.dtype)
        return (dx, ddt.to(dt.dtype), dA.to(A.dtype), dB, dC, dD, R.unflatten(2, (r, p)), None,
                None, None)


def first_derivatives_only(name, other):
    """Called by a hand-written backward, in which gradients are on only under create_graph=True.
    (With once_differentiable, autograd.grad takes second derivatives for zero.)"""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has first derivatives only: with create_graph=True use {other}")


BACKENDS = {"chunked": ssd_chunked}     # what `ssd` can run; the end of the file adds the others


def ssd(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128,
        backend="auto"):
    """The scan by one form. Arguments, results and errors as in `ssd_recurrent`.

    backend: a key of BACKENDS, or "auto": "triton" for 16-bit inputs on CUDA in shapes that the
    kernels take, else "chunked". (The fp32 kernels do not use matrix units; they serve tests.)"""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = on_cuda(x) and x.element_size() == 2 and unsupported(x, B) is None
        backend = "triton" if fits else "chunked"
    extra = {} if backend in ("recurrent", "quadratic") else dict(chunk_size=chunk_size)
    return BACKENDS[backend](x, dt, A, B, C, D, initial_states=initial_states, seq_idx=seq_idx,
                             **extra)


def ssd_step(state, x, dt, A, B, C, D=None):
    """One token: x (b, h, p), dt (b, h), B, C (b, g, n) -> y (b, h, p); state (b, h, p, n), which
    may be strided, is updated in place. Continues the scan exactly, at O(1) per token."""
    _check(x, B, C)
    groups = B.shape[1], -1
    u, a = discretize(x, dt, A)
    S = state.unflatten(1, groups)                              # (b, g, r, p, n), always a view
    u, B, C = u.unflatten(1, groups).to(S.dtype), B.to(S.dtype), C.to(S.dtype)

    state.mul_(a.exp()[..., None, None])
    S.addcmul_(u[..., None], B[:, :, None, None])
    y = (C[:, :, None] @ S.flatten(2, 3).mT).view(x.shape)                  # (b, h, p)
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), D[:, None].to(y.dtype))
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------
# The causal convolution, the gated norm, the layer


def causal_conv1d(x, weight, bias, *, initial_states=None, seq_idx=None):
    """silu(depthwise causal convolution): y_t = silu(bias + sum_k weight[:, w-1-k] x_{t-k}), k < w.

    x (b, t, channels), any strides; weight (channels, width); bias (channels,) or None;
    initial_states (b, channels, width - 1): the inputs just before x, oldest first, or None for
    zeros; seq_idx (b, t): taps do not reach into another document. Returns y (b, t, channels) in
    x's dtype and final_states (b, channels, width - 1): the last inputs of this call, which the
    next call takes as its initial_states."""
    (b, t, channels), width = x.shape, weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"weight has {weight.shape[0]} channels, x has {channels}")
    if initial_states is None:
        initial_states = x.new_zeros(b, channels, width - 1)
    x = torch.cat([initial_states.to(x.dtype).transpose(1, 2), x], 1)       # (b, w - 1 + t, ...)
    final_states, doc = x[:, t:].transpose(1, 2).clone(), documents(seq_idx)

    window, total = x.to(accumulator(x)), x.new_zeros(1) if bias is None else bias
    total = total.to(window.dtype).expand(b, t, channels).clone()
    taps = weight.t().to(total.dtype).contiguous()      # (width, channels); strided is half as fast
    for k in range(width):
        tap = window[:, k:k + t]
        if doc is not None:                             # inputs before x belong to document 0
            tap = tap * (F.pad(doc, (width - 1 - k, 0))[:, :t] == doc)[..., None]
        total.addcmul_(tap, taps[k])
    del window, tap                                     # each is as large as the result
    return F.silu(total).to(x.dtype), final_states


def inverse_rms(x, eps):
    """1 / sqrt(mean of x^2 over the last axis + eps): x (..., d) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt()


def gated_group_norm(y, z, weight, n_groups, eps):
    """Gate, then RMSNorm each of n_groups slices, then weight (d,): y, z (..., d) -> y's shape.

    Both the order and the groups matter. The first Mamba-2 checkpoints have one group, which hides
    a wrong grouping."""
    if y.shape[-1] % n_groups:
        raise ValueError(f"{y.shape[-1]} channels cannot form {n_groups} groups of equal size")
    s = (y * F.silu(z.to(accumulator(y)))).unflatten(-1, (n_groups, -1))
    s = s * inverse_rms(s, eps)
    return (s.flatten(-2) * weight).to(y.dtype)


class MambaState(NamedTuple):
    """What a layer remembers of the tokens so far; the layer updates it in place."""
    conv: torch.Tensor      # (b, conv_dim, d_conv - 1), the convolution's last inputs
    ssm: torch.Tensor       # (b, h, p, n), fp32


def layer_step(state, xBC, dt, weight, bias, dt_bias, A_log, D):
    """`causal_conv1d` and the scan for one token: xBC (b, conv_dim), dt (b, h) -> y (b, h, p).
    weight (conv_dim, d_conv), bias (conv_dim,), dt_bias, A_log, D (h,); state updated in place."""
    h, p, n = state.ssm.shape[1:]
    last = state.conv.transpose(1, 2)                           # (b, d_conv - 1, conv_dim), a view
    window = torch.cat([last, xBC[:, None].to(last.dtype)], 1)
    last.copy_(window[:, 1:])
    xBC = F.silu((window * weight.t().to(accumulator(xBC))).sum(1) + bias).to(xBC.dtype)
    x, BC = xBC[:, :h * p].unflatten(1, (h, p)), xBC[:, h * p:].unflatten(1, (2, -1, n))
    dt = F.softplus(dt.to(accumulator(x)) + dt_bias)
    return ssd_step(state.ssm, x, dt, -A_log.to(dt.dtype).exp(), BC[:, 0], BC[:, 1], D)


compiled = functools.cache(torch.compile)       # one compiled version per function


def on_cuda(x):
    """Whether x is on a CUDA GPU with Triton, neither interpreted nor inside torch.compile."""
    return x.is_cuda and TRITON and not INTERPRETED and not torch.compiler.is_compiling()


def fuse(f, x):
    """f, compiled if x is on a CUDA GPU: one or two kernels instead of one per operation."""
    return compiled(f) if on_cuda(x) else f


class Linear(nn.Linear):
    """nn.Linear without bias whose weight follows x's dtype: fp32 weights, bf16 matmuls."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class GatedGroupNorm(nn.Module):
    """The layer's output norm; see `gated_group_norm`."""

    def __init__(self, d, n_groups, eps=1e-5):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y, z):
        return fuse(gated_group_norm, y)(y, z, self.weight, self.n_groups, self.eps)


class Mamba2(nn.Module):
    """in_proj to [z, x, B, C, dt], conv over [x, B, C], scan, gated norm by z, out_proj (figure 6).

    d_inner = n_heads x head_dim need not be a multiple of d_model: the 9B has 10240 and 4480.
    Parameter names are those of the released checkpoints; conv1d only holds weights. A_log, D and
    dt_bias stay fp32 when the rest changes by .bfloat16(), .half() or .to(dtype)."""

    def __init__(self, d_model, n_heads, head_dim, d_state, n_groups, d_conv=4, chunk_size=128,
                 eps=1e-5):
        super().__init__()
        if n_heads % n_groups:
            raise ValueError(f"{n_heads} Mamba heads cannot share {n_groups} groups equally")
        self.n_heads, self.head_dim, self.n_groups = n_heads, head_dim, n_groups
        self.d_inner, self.chunk_size = n_heads * head_dim, chunk_size
        self.conv_dim = self.d_inner + 2 * n_groups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + n_heads)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(n_heads)) for _ in range(3))
        self.norm = GatedGroupNorm(self.d_inner, n_groups, eps)
        self.out_proj = Linear(self.d_inner, d_model)
        if not self.dt_bias.is_meta:
            self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self, dt_min=1e-3, dt_max=0.1, dt_floor=1e-4, A_range=(1, 16)):
        """dt log-uniform and dt_bias its inverse softplus; A uniform in A_range; D = 1."""
        dt = (torch.rand_like(self.dt_bias) * math.log(dt_max / dt_min)
              + math.log(dt_min)).exp().clamp(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.uniform_(*A_range).log_()
        self.D.fill_(1)

    def _apply(self, fn, recurse=True):
        """.to(), .cuda() and .bfloat16() call this; fn maps a tensor to a tensor."""
        for child in self.children() if recurse else ():
            child._apply(fn)

        def fp32_at_least(m):       # of this module: A_log, D, dt_bias and their gradients
            y = fn(m)
            return m.to(y.device, torch.float32) if y.dtype.itemsize < 4 else y
        return super()._apply(fp32_at_least, recurse=False)

    def split_groups(self, xBC):
        """(..., conv_dim) -> x (..., h, p), B and C (..., g, n), as views."""
        x, BC = xBC[..., :self.d_inner], xBC[..., self.d_inner:]
        B, C = BC.unflatten(-1, (2, self.n_groups, -1)).unbind(-3)
        return x.unflatten(-1, (self.n_heads, self.head_dim)), B, C

    def forward(self, x, state=None, seq_idx=None):
        """x (b, t, d) -> (b, t, d). state: a `MambaState`, updated in place; None for zeros."""
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.conv_dim, self.n_heads], -1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias

        # One token without gradients: one step of the recurrence, in place.
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            y = fuse(layer_step, x)(state, xBC[:, 0], dt[:, 0], weight, bias, self.dt_bias,
                                    self.A_log, self.D)
            return self.out_proj(self.norm(y.flatten(1)[:, None], z))

        # Else the convolution and the scan. A backward may need the old state, so it is copied.
        conv, S = state or (None, None)
        if state is not None and torch.is_grad_enabled():
            conv, S = conv.clone(), S.clone()
        xBC, conv = fuse(causal_conv1d, x)(xBC, weight, bias, initial_states=conv, seq_idx=seq_idx)
        xs, B, C = self.split_groups(xBC)
        dt = F.softplus(dt.to(accumulator(x)) + self.dt_bias)               # (b, t, h)
        y, S = ssd(xs, dt, -self.A_log.to(dt.dtype).exp(), B, C, self.D, initial_states=S,
                   seq_idx=seq_idx, chunk_size=self.chunk_size)
        if state is not None:
            state.conv.copy_(conv)
            state.ssm.copy_(S)
        return self.out_proj(self.norm(y.flatten(2), z))


# ------------------------------------------------------------------------------------------------
# python ssm.py: the error of every form against fp64 (the file's last line calls `main`)


def random_inputs(b, t, h, p, g, n, dtype=torch.float32, device="cpu"):
    """x, dt, A, B, C, D as in a new layer, all with requires_grad; dt, A and D fp32 or fp64."""
    x, B, C = (torch.randn(*s, dtype=dtype) for s in ((b, t, h, p), (b, t, g, n), (b, t, g, n)))
    empty = lambda *shape: torch.empty(*shape, dtype=accumulator(x))
    dt = empty(b, t, h).uniform_(math.log(1e-3), math.log(0.1)).exp_()
    A, D = -empty(h).uniform_(1, 16), empty(h).normal_()
    return [m.to(device).requires_grad_() for m in (x, dt, A, B, C, D)]


def relative_error(value, truth):
    """RMS of the difference divided by RMS of the truth, in fp64."""
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def agreement(form, dtype, device="cpu", shape=(2, 300, 4, 64, 2, 32)):
    """{tensor: relative error} of a form against ssd_recurrent in fp64 on the same inputs."""
    b, t, h, p, g, n = shape
    inputs = random_inputs(*shape, dtype=dtype, device=device)
    inputs.append(torch.randn_like(inputs[1].new_empty(b, h, p, n)))
    dy, results = torch.randn_like(inputs[0]), []
    for backend, cast in ((form, lambda m: m), ("recurrent", lambda m: m.double())):
        leaves = [cast(m.detach()).requires_grad_() for m in inputs]
        y, S = ssd(*leaves[:6], initial_states=leaves[6], backend=backend)
        grads = torch.autograd.grad([y, S], leaves, [cast(dy), torch.ones_like(S)])
        results.append([y, S, *grads])
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"]
    return dict(zip(names, map(relative_error, *results)))


def main(argv=None):
    import argparse
    import json
    parser = argparse.ArgumentParser(description="Errors of the Mamba-2 scan against fp64.")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1])
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    print("relative error against the fp64 recurrence on the same rounded inputs")
    forms = ["recurrent float32", "quadratic float32", "minimal float32", "chunked float64",
             "chunked float32", "chunked bfloat16"]
    x, B = (torch.empty(1, 1, 1, size, device=args.device) for size in (64, 32))
    if on_cuda(x) and unsupported(x, B) is None:
        forms += ["triton float32", "triton bfloat16"]
    largest = {}
    for form in forms:
        name, dtype = form.split()
        errors = agreement(name, getattr(torch, dtype), args.device)
        if not largest:
            print(" " * 20 + "".join(f"{tensor:>9s}" for tensor in errors))
        print(f"{form:20s}" + "".join(f"{e:9.1e}" for e in errors.values()), flush=True)
        largest[form] = max(errors.values())
    print(json.dumps(dict(agreement=largest)))


# ------------------------------------------------------------------------------------------------
# From here on: GPUs only (a reader may stop here). The scan in Triton

# Memory traffic limits the scan. At the 9B's shape (h 128, p 80, n 128, g 8, bf16) the forward
# reads x, B, C and dt and writes y, 45 kB per token; the backward moves 70 kB. An H100 moves 3.35
# TB/s and computes 990 TFLOP/s: 45 kB take 13.5 ns, their 8.7 MFLOP take 8.7 ns.
#
# Usually each step of the algorithm is a kernel, and states and scores, which are larger than x,
# pass through memory. Here one program walks one head's tokens, a tile of 64 at a time, with the
# state (n, p) in registers:
#
#     M = (C B^T) * decays * dt          (l, l)    a tile's scores, in registers
#     y = M x + into * (C S) + D x       (l, p)    written once
#     S = keep S + B^T (out * x)         (n, p)    stays where it is
#
# x is read once. Each of a group's heads computes C B^T again (29% more multiplications than once
# per group) from operands in L2, and the result never leaves the SM. Only b h programs run: the 128
# heads of the 9B fill an H100's 132 SMs, but a small model with one sequence leaves most idle.
#
# The backward takes several kernels: dB and dC are sums over a group's heads, which atomics would
# add in another order each time. A chunk is two tiles. The kernels, in order:
#
#     states      program = n-tile, head       S entering every chunk, from x, B
#     states      the same, last chunk first   R = dS leaving every chunk, and <S, R>, from dy, C, S
#     dx          tile, group; loops heads     dx, ddt, dcs, and dG, the sum of dscores over heads
#     dC, then dB tile, group; loops heads     dG B + sum_h (into dy) S^T; the rest of dcs
#
# S and R are the largest part of the traffic; with chunks of one tile they would be twice as large.
# They take 41 kB of scratch per token, twice x, during a layer's backward. A chunk's three score
# tiles (two on the diagonal, one below) never leave the SM. The one below takes a second pass over
# the heads, which finds x, dy and dx in L2, as registers hold the gradients of one tile only (one
# pass spilled 1.2 kB per thread, two spill 0.1 to 0.6 kB). Carrying R and S to the chunk's middle
# would save the second pass, but then each pair of tokens adds two differently rounded terms to the
# decays' gradient, which no longer cancel: dA was off by 6% in bf16. Only inputs are saved.
#
# Bytes per token there, each tensor once per kernel (mamba_ssm at e9594ce with chunks of 256):
#                 compulsory   mamba_ssm            here
#     forward     45,312       147,712  3.3 x        49,920  1.1 x
#     backward    70,144       538,880  7.7 x       305,408  4.4 x
#
# Further choices:
#   * Softplus, A and the cumulative sum are left to torch and autograd, as (b, h, t).
#   * Head dims are sums of two powers of two, 80 = 64 + 16: padding to 128 would be 1.6 x the work.
#   * No accumulator is transposed before a dot, which Triton 3.4 to 3.7.0 miscompiles on Hopper
#     (fla-org/flash-linear-attention issue 640): scores needed as (j, i) are computed as (j, i).
#   * maxnreg=255: without it, ptxas sometimes picks 128 or 40 registers and spills kilobytes.
#   * 64-bit offsets for row, head and time, 32-bit inside a tile.

# Triton is imported if torch is built for CUDA, or if TRITON_INTERPRET asks for its interpreter.
TRITON = (bool(torch.version.cuda or "TRITON_INTERPRET" in os.environ)
          and importlib.util.find_spec("triton") is not None)
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
if TRITON:
    import triton
    import triton.language as tl
jit, constexpr = (triton.jit, tl.constexpr) if TRITON else (lambda kernel: kernel, None)


@jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")        # fp32 operands: no TF32


@jit
def _decay(late, early):
    """From one cumulative sum to a later one; at most 1, though parallel sums are not monotone."""
    return tl.exp(tl.minimum(late - early, 0.0))


@jit
def _read(m, rows, stride, cols, ok):
    """A tile of m; rows beyond the end are 0, whatever memory holds there."""
    return tl.load(m + rows[:, None] * stride + cols[None, :], mask=ok[:, None], other=0.0)


@jit
def _write(m, rows, stride, cols, ok, value):
    tl.store(m + rows[:, None] * stride + cols[None, :], value.to(m.dtype.element_ty),
             mask=ok[:, None])


@jit
def _update_state(S, V, U, keep, w):
    """Some columns of a state (n, p) after one more tile: keep S + U^T (w V), fp32."""
    return _dot(tl.trans(U), (V * w[:, None]).to(U.dtype), keep * S)


@jit
def _tile_output(S, xl, M, Bl, Cl, into, out, keep):
    """Some columns of a head for one tile: y without D x, and the state after it."""
    Y = _dot(M, xl, into[:, None] * _dot(Cl, S.to(Cl.dtype)))
    return Y, _update_state(S, xl, Bl, keep, out)


@jit
def _tile_decays(cs, dt, doc, line, documents, k, TILE: constexpr, PACKED: constexpr):
    """Tile k's cumulative sums, dt and decays: from its start, to its end (times dt), across it."""
    at, i = line + k * TILE, tl.arange(0, TILE)
    l, d = tl.load(cs + at + i), tl.load(dt + at + i)
    begin = tl.load(cs + at - 1, mask=k % 2 > 0, other=0.0)     # each chunk's sums start at 0
    end = tl.load(cs + at + TILE - 1)
    into, out, keep = _decay(l, begin), _decay(end, l) * d, _decay(end, begin)
    if PACKED:
        docs = doc + documents + k * TILE
        own, before, after = tl.load(docs + 1 + i), tl.load(docs), tl.load(docs + TILE)
        into = tl.where(own == before, into, 0.0)
        out = tl.where(own == after, out, 0.0)
        keep = tl.where(before == after, keep, 0.0)
    return l, d, into, out, keep


@jit
def _scan_kernel(x, B, C, cs, dt, doc, D, y, S_in, S_out, t, T, h, r,
                 x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, P0: constexpr, P1: constexpr,
                 N: constexpr, TILE: constexpr, PACKED: constexpr):
    """Program (head, row) walks its tiles; see the essay above.

    x (b, t, h, p), B, C (b, t, g, n) by strides; cs, dt (b, h, T) fp32, T whole chunks, cs summed
    from each chunk's start; doc (b, 1 + T), its first column is for what is before the tokens;
    S_in (b, h, p, n); writes y (b, t, h, p) and S_out (b, h, p, n)."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    P: constexpr = P0 + P1
    i, n, p0 = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    x += row * x_b + head * x_h
    y += row * t * h * P + head * P
    B += row * B_b + head // r * B_g
    C += row * C_b + head // r * C_g
    line, at = (row * h + head) * T, (row * h + head) * P * N
    S_in, S_out = S_in + at, S_out + at
    at0, at1 = n[:, None] + p0[None, :] * N, n[:, None] + p1[None, :] * N
    S0 = tl.load(S_in + at0)
    if P1 > 0:
        S1 = tl.load(S_in + at1)
    skip = tl.load(D + head)

    for k in range(0, tl.cdiv(t, TILE)):
        ok = i < t - k * TILE
        Bl, Cl = _read(B, i, B_t, n, ok), _read(C, i, C_t, n, ok)
        x0 = _read(x, i, x_t, p0, ok)
        G = _dot(Cl, tl.trans(Bl))
        l, d, into, out, keep = _tile_decays(cs, dt, doc, line, row * (T + 1), k, TILE, PACKED)
        causal = i[:, None] >= i[None, :]
        if PACKED:
            own = tl.load(doc + row * (T + 1) + 1 + k * TILE + i)
            causal = causal & (own[:, None] == own[None, :])
        E = tl.where(causal, _decay(l[:, None], l[None, :]) * d[None, :], 0.0)

        # M is (i, j), target by source. The head's columns follow in one or two parts.
        M = (G * E).to(x0.dtype)
        Y, S0 = _tile_output(S0, x0, M, Bl, Cl, into, out, keep)
        _write(y, i, h * P, p0, ok, Y + skip * x0)
        if P1 > 0:
            x1 = _read(x, i, x_t, p1, ok)
            Y, S1 = _tile_output(S1, x1, M, Bl, Cl, into, out, keep)
            _write(y, i, h * P, p1, ok, Y + skip * x1)
        x, y = x + TILE * x_t, y + TILE * h * P
        B, C = B + TILE * B_t, C + TILE * C_t

    tl.store(S_out + n[:, None] + p0[None, :] * N, S0)
    if P1 > 0:
        tl.store(S_out + n[:, None] + p1[None, :] * N, S1)


@jit
def _states_kernel(V, U, cs, dt, doc, first, states, last, other, inner, t, T, h, r,
                   V_b, V_t, V_h, U_b, U_t, U_g, P0: constexpr, P1: constexpr, N: constexpr,
                   BN: constexpr, TILE: constexpr, PACKED: constexpr, REVERSE: constexpr):
    """Program (n-tile, head, row) walks all tiles; writes each chunk's edge state and the last one.

    Forward, V = x and U = B: the state that enters a chunk. REVERSE, V = dy and U = C: R, the
    gradient of the state that leaves it, and inner = <S, R> with S = other, the state that enters.
    first, last (b, h, p, n) fp32; states, other (b, c, h, p, n); inner (b, c, h, n-tiles)."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, tiles = tl.program_id(2).to(tl.int64), T // TILE
    P: constexpr = P0 + P1
    i, n, p0 = tl.arange(0, TILE), part * BN + tl.arange(0, BN), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    V += row * V_b + head * V_h
    U += row * U_b + head // r * U_g
    line, at = (row * h + head) * T, (row * h + head) * P * N
    at0, at1 = n[:, None] + p0[None, :] * N, n[:, None] + p1[None, :] * N
    S0 = tl.load(first + at + at0)
    if P1 > 0:
        S1 = tl.load(first + at + at1)

    for step in range(0, tiles):
        k = tiles - 1 - step if REVERSE else step
        if step % 2 == 0:
            place = (row * (tiles // 2) + k // 2) * h + head
            edge = states + place * P * N
            tl.store(edge + at0, S0.to(states.dtype.element_ty))
            if P1 > 0:
                tl.store(edge + at1, S1.to(states.dtype.element_ty))
            if REVERSE:
                product = tl.sum(S0 * tl.load(other + place * P * N + at0))
                if P1 > 0:
                    product += tl.sum(S1 * tl.load(other + place * P * N + at1))
                tl.store(inner + place * tl.num_programs(0) + part, product)

        start, ok = (k * TILE).to(tl.int64), i < t - k * TILE
        Ul, v0 = _read(U + start * U_t, i, U_t, n, ok), _read(V + start * V_t, i, V_t, p0, ok)
        _, _, into, out, keep = _tile_decays(cs, dt, doc, line, row * (T + 1), k, TILE, PACKED)
        w = into if REVERSE else out
        S0 = _update_state(S0, v0, Ul, keep, w)
        if P1 > 0:
            S1 = _update_state(S1, _read(V + start * V_t, i, V_t, p1, ok), Ul, keep, w)

    tl.store(last + at + at0, S0)
    if P1 > 0:
        tl.store(last + at + at1, S1)


@jit
def _dx_kernel(x, dy, B, C, cs, dt, doc, D, R, dx, dG, ddt, dcs, dcs_late, dend, dD, t, T, h, g, r,
               x_b, x_t, x_h, y_b, y_t, y_h, B_b, B_t, B_g, C_b, C_t, C_g,
               P0: constexpr, P1: constexpr, N: constexpr, TILE: constexpr, PACKED: constexpr):
    """Program (tile, group, row) loops over the group's heads; scores are (j, i): source, target.

    dG (b, tiles, g, 2, TILE, TILE) is their gradient summed over heads, for targets in the same
    tile and in the chunk's next tile. The gradient of cs comes in parts: dcs (b, h, T) from tokens
    as sources, and as targets inside the tile; dcs_late as targets of the tile before them; dend
    (b, tiles, h) for the chunk's last position. dD (b, tiles, h)."""
    k, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    P: constexpr = P0 + P1
    i, n, p0 = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    start, head = (k * TILE).to(tl.int64), group * r
    ok = i < t - k * TILE
    causal, diagonal = i[:, None] <= i[None, :], i[:, None] == i[None, :]
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g
    x += row * x_b + start * x_t + head * x_h
    dy += row * y_b + start * y_t + head * y_h
    dx += (row * t + start) * h * P + head * P
    R += ((row * (tl.num_programs(0) // 2) + k // 2) * h + head) * P * N
    line, spot = (row * h + head) * T + start, (row * tl.num_programs(0) + k) * h + head
    dG += ((row * tl.num_programs(0) + k) * g + group) * 2 * TILE * TILE
    dG += i[:, None] * TILE + i[None, :]
    to_end = (2 - k % 2) * TILE - 1                             # the chunk's last position
    moves = (i < tl.minimum(to_end, t - 1 - k * TILE)).to(tl.float32)   # 0 at the chunk's end
    if PACKED:
        docs = doc + row * (T + 1) + 1 + k * TILE
        own, after = tl.load(docs + i), tl.load(docs + to_end)
        causal = causal & (own[:, None] == own[None, :])

    # Targets in the same tile; then, from the chunk's first tile, targets in its second.
    for late in tl.static_range(2):
        if late == 0 or k % 2 == 0:
            seen = i < t - k * TILE - late * TILE
            Bj = _read(B, i, B_t, n, ok)
            G = _dot(Bj, tl.trans(_read(C + late * TILE * C_t, i, C_t, n, seen)))
            dGs = tl.zeros((TILE, TILE), tl.float32)
            for m in range(0, r):
                at = line + m * T + i
                l, d = tl.load(cs + at), tl.load(dt + at)
                dys = dy + m * y_h + late * TILE * y_t
                x0, g0 = _read(x + m * x_h, i, x_t, p0, ok), _read(dys, i, y_t, p0, seen)
                W = _dot(x0, tl.trans(g0))                      # dM
                if P1 > 0:
                    x1, g1 = _read(x + m * x_h, i, x_t, p1, ok), _read(dys, i, y_t, p1, seen)
                    W = _dot(x1, tl.trans(g1), W)
                E = _decay(tl.load(cs + at + late * TILE)[None, :], l[:, None])
                if late == 0:
                    tl.store(dD + spot + m, tl.sum(tl.where(diagonal, W, 0.0)))
                    E = tl.where(causal, E, 0.0)
                elif PACKED:
                    E = tl.where(own[:, None] == tl.load(docs + TILE + i)[None, :], E, 0.0)
                M = (G * E).to(x0.dtype)
                W *= E                                          # dM * decays
                dGs += W * d[:, None]
                W *= G                                          # dM * decays * scores
                du = tl.sum(W, 1)

                if late == 0:                       # add the state that leaves the chunk
                    W = tl.where(diagonal, 0.0, W)              # the diagonal does not decay
                    dl = tl.sum(W * d[:, None], 0) - d * tl.sum(W, 1)
                    tail = _decay(tl.load(cs + line + m * T + to_end), l)
                    if PACKED:
                        tail = tl.where(own == after, tail, 0.0)
                    skip, Rm = tl.load(D + head + m), R + m * P * N
                    v0 = _dot(Bj, tl.load(Rm + n[:, None] + p0[None, :] * N)) * tail[:, None]
                    through_R = tl.sum(v0 * x0, 1)
                    v0 = _dot(M, g0, v0)
                    _write(dx + m * P, i, h * P, p0, ok, v0 * d[:, None] + skip * g0)
                    if P1 > 0:
                        v1 = _dot(Bj, tl.load(Rm + n[:, None] + p1[None, :] * N)) * tail[:, None]
                        through_R += tl.sum(v1 * x1, 1)
                        v1 = _dot(M, g1, v1)
                        _write(dx + m * P, i, h * P, p1, ok, v1 * d[:, None] + skip * g1)
                    crossing = d * through_R * moves
                    tl.store(ddt + at, du + through_R)
                    tl.store(dcs + at, dl - crossing)
                    tl.store(dend + spot + m, tl.sum(crossing))
                else:                               # add to what the first pass wrote
                    tl.store(dcs_late + at + TILE, tl.sum(W * d[:, None], 0))
                    tl.store(ddt + at, tl.load(ddt + at) + du)
                    tl.store(dcs + at, tl.load(dcs + at) - d * du)
                    v0 = _dot(M, g0) * d[:, None] + _read(dx + m * P, i, h * P, p0, ok)
                    _write(dx + m * P, i, h * P, p0, ok, v0)
                    if P1 > 0:
                        v1 = _dot(M, g1) * d[:, None] + _read(dx + m * P, i, h * P, p1, ok)
                        _write(dx + m * P, i, h * P, p1, ok, v1)
            tl.store(dG + late * TILE * TILE, dGs.to(dG.dtype.element_ty))
            tl.debug_barrier()


@jit
def _dBC_kernel(V, own, other, cs, dt, doc, S, dG, out, dcs, dcs_late, dend, inner, t, T, h, g, r,
                V_b, V_t, V_h, own_b, own_t, own_g, other_b, other_t, other_g,
                P0: constexpr, P1: constexpr, N: constexpr, TILE: constexpr, PACKED: constexpr,
                FOR_B: constexpr):
    """Program (tile, group, row) loops over the group's heads: dC, or dB if FOR_B; no atomics.

    dC: V = dy, own = C, other = B, S the states that entered; completes dcs.
    dB: V = x, own = B, other = C, S = R."""
    k, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    P: constexpr = P0 + P1
    i, n, p0 = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    start, head = (k * TILE).to(tl.int64), group * r
    ok, early = i < t - k * TILE, k % 2 == 0

    # Through the scores: dG is (j, i), dB takes its rows and dC its columns.
    other += row * other_b + start * other_t + group * other_g
    at = ((row * tl.num_programs(0) + k) * g + group) * 2 * TILE * TILE
    scores = i[:, None] * TILE + i[None, :] if FOR_B else i[:, None] + i[None, :] * TILE
    acc = _dot(tl.load(dG + at + scores), _read(other, i, other_t, n, ok))
    step = TILE if FOR_B else -TILE                             # the chunk's other tile
    if early == FOR_B:
        if not FOR_B:
            at -= g * 2 * TILE * TILE
        rows = _read(other + step * other_t, i, other_t, n, i + step < t - k * TILE)
        acc = _dot(tl.load(dG + at + TILE * TILE + scores), rows, acc)

    # Through the states, head by head.
    V += row * V_b + start * V_t + head * V_h
    chunk = (row * (tl.num_programs(0) // 2) + k // 2) * h + head
    S += chunk * P * N                                          # `chunk` includes the head
    line, spot = (row * h + head) * T + start, (row * tl.num_programs(0) + k) * h + head
    to_end = (2 - k % 2) * TILE - 1                             # the chunk's last position
    if PACKED:
        docs = doc + row * (T + 1) + k * TILE
        document = tl.load(docs + 1 + i)
        before, after = tl.load(docs - k % 2 * TILE), tl.load(docs + 1 + to_end)
    if not FOR_B:
        Ci = _read(own + row * own_b + start * own_t + group * own_g, i, own_t, n, ok)
    for _ in range(0, r):
        l, end = tl.load(cs + line + i), tl.load(cs + line + to_end)
        w = _decay(end, l) * tl.load(dt + line + i) if FOR_B else _decay(l, 0.0)
        keep = _decay(end, 0.0)
        if PACKED:
            w = tl.where(document == (after if FOR_B else before), w, 0.0)
            keep = tl.where(before == after, keep, 0.0)
        v0 = _read(V, i, V_t, p0, ok)
        S0 = tl.load(S + n[None, :] + p0[:, None] * N)
        from_state = _dot((v0 * w[:, None]).to(v0.dtype), S0)
        if P1 > 0:
            v1 = _read(V, i, V_t, p1, ok)
            S1 = tl.load(S + n[None, :] + p1[:, None] * N)
            from_state = _dot((v1 * w[:, None]).to(v1.dtype), S1, from_state)
        acc += from_state

        if not FOR_B:
            dl = tl.load(dcs + line + i) + tl.sum(from_state * Ci, 1)
            if not early:                   # the chunk's last position is in every decay to its end
                dl += tl.load(dcs_late + line + i)
                total = tl.load(dend + spot) + tl.load(dend + spot - h)
                total += keep * tl.load(inner + chunk)
                dl += tl.where(i == TILE - 1, total, 0.0)
            tl.store(dcs + line + i, dl)
        V, S, line = V + V_h, S + P * N, line + T
        spot, chunk = spot + 1, chunk + 1
    _write(out + ((row * t + start) * g + group) * N, i, g * N, n, ok, acc)


# (warps, pipeline stages) of each kernel: for 16-bit inputs by the GPU's generation (8: A10G, A100;
# 9: H100, H200), and for fp32. Registers are the limit: 8 warps with 255 per thread fill an SM.
# Chosen from the compiler's report (tests/aot.py), not by time: least spill, then deepest pipeline.
OPTIONS = {
    "_scan_kernel": {8: (8, 2), 9: (8, 3), "fp32": (8, 1)},     # a third stage spills less on 9
    "_states_kernel": {8: (4, 1), 9: (4, 3), "fp32": (8, 1)},   # no spills; two programs per SM
    "_dx_kernel": {8: (8, 1), 9: (8, 1), "fp32": (8, 1)},       # a second stage may spill twice
    "_dBC_kernel": {8: (8, 2), 9: (8, 2), "fp32": (8, 1)},      # no spills
}


def generation(device):
    """The first digit of a CUDA device's compute capability; 8 for other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def launch(kernel, grid, x, *arguments, **constants):
    """Run a kernel with the options for x's dtype, on x's device, current or not."""
    column = generation(x.device) if x.element_size() == 2 else "fp32"
    warps, stages = OPTIONS[kernel.__name__][column]
    stages = stages if constants["N"] <= 128 else 1     # a state of 256 leaves no room for a second
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, num_warps=warps, num_stages=stages, maxnreg=255, **constants)


def strides(*tensors):
    """Every tensor's strides but the last, which is 1."""
    return [stride for m in tensors for stride in m.stride()[:-1]]


def split_head_dim(p):
    """p as two powers of two, each 0 or at least 16: 80 -> (64, 16), 64 -> (64, 0); else None."""
    p0 = 1 << p.bit_length() - 1
    p1 = p - p0
    return (p0, p1) if p0 >= 16 and (p1 == 0 or p1 >= 16 and p1.bit_count() == 1) else None


def _states(V, U, cs, dt, doc, first, constants, other=None):
    """The states at chunks' edges (b, c, h, p, n), the last one, <S, R>; backwards if other."""
    b, t, h, p = V.shape
    n, T = U.shape[3], cs.shape[2]
    width, chunks = min(n, 64), T // (2 * constants["TILE"])
    states, last = V.new_empty(b, chunks, h, p, n), torch.empty_like(first)
    inner = cs.new_empty(b, chunks, h, n // width)
    launch(_states_kernel, (n // width, h, b), V, U, cs, dt, doc, first, states, last, other, inner,
           t, T, h, h // U.shape[2], *strides(V, U), BN=width, REVERSE=other is not None,
           **constants)
    return states, last, inner.sum(3)


class _TritonScan(torch.autograd.Function):
    """The kernels in order: x (b, t, h, p), cs, dt (b, h, T), B, C (b, t, g, n), D (h,), S0 (b, h,
    p, n), doc (b, 1 + T) or None -> y, final states. cs and dt have a gradient each."""

    @staticmethod
    def forward(ctx, x, cs, dt, B, C, D, S0, doc, constants):
        ctx.save_for_backward(x, cs, dt, B, C, D, S0, doc)
        ctx.constants = constants
        b, t, h, p = x.shape
        y, S = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(S0)
        launch(_scan_kernel, (h, b), x, B, C, cs, dt, doc, D, y, S0, S, t, cs.shape[2], h,
               h // B.shape[2], *strides(x, B, C), **constants)
        return y, S

    @staticmethod
    def backward(ctx, dy, dS):
        first_derivatives_only("ssd_triton", "ssd_minimal")
        x, cs, dt, B, C, D, S0, doc = ctx.saved_tensors
        b, t, h, p = x.shape
        g, T, constants = B.shape[2], cs.shape[2], ctx.constants
        tile, dy = constants["TILE"], walkable(dy)

        S, _, _ = _states(x, B, cs, dt, doc, S0, constants)
        R, dS0, inner = _states(dy, C, cs, dt, doc, dS.contiguous(), constants, other=S)

        dx, dB, dC = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, B, C))
        ddt, dcs, dcs_late = (torch.empty_like(cs) for _ in range(3))
        dG = x.new_empty(b, T // tile, g, 2, tile, tile)
        dend, dD = cs.new_empty(2, b, T // tile, h)
        grid, sizes = (T // tile, g, b), (t, T, h, g, h // g)
        launch(_dx_kernel, grid, x, dy, B, C, cs, dt, doc, D, R, dx, dG, ddt, dcs, dcs_late, dend,
               dD, *sizes, *strides(x, dy, B, C), **constants)
        launch(_dBC_kernel, grid, dy, C, B, cs, dt, doc, S, dG, dC, dcs, dcs_late, dend, inner,
               *sizes, *strides(dy, C, B), FOR_B=False, **constants)
        launch(_dBC_kernel, grid, x, None, C, cs, dt, doc, R, dG, dB, None, None, None, None,
               *sizes, *strides(x, B, C), FOR_B=True, **constants)
        return dx, dcs, ddt, dB, dC, dD.sum((0, 1)), dS0, None, None


def walkable(m):
    """m (b, t, heads, .), copied unless its last stride is 1 and 32-bit offsets are enough."""
    near = m.stride(1) < 2 ** 24 and m.stride(2) * m.shape[2] < 2 ** 31
    return m if m.stride(3) == 1 and near else m.contiguous()


def unsupported(x, B):
    """Why the kernels cannot take these inputs, in words, or None."""
    n, p = B.shape[3], x.shape[3]
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels take float32, float16 and bfloat16"
    most = 16384 if x.element_size() == 2 else 12288            # what an A10G's shared memory holds
    if split_head_dim(p) is None or n not in (16, 32, 64, 128, 256) or p * n > most:
        return (f"head dim {p} with state {n}; the kernels take head dims of 16 to 256 that are a "
                f"power of two or a sum of two (48, 80, 96), states of 16, 32, 64, 128 or 256, "
                f"and at most {most} state elements per head in {str(x.dtype)[6:]}")
    if not TRITON:
        return "triton is not loaded: that needs a CUDA build of torch, or TRITON_INTERPRET=1"
    if not x.is_cuda and not INTERPRETED:
        return f"x is on {x.device}; the kernels run on CUDA, elsewhere with TRITON_INTERPRET=1"
    if x.is_cuda and generation(x.device) not in (8, 9):
        return (f"a GPU of compute capability {generation(x.device)}.x; the kernels are made for "
                f"8.x and 9.x (A10G, A100, H100, H200)")
    return None


def ssd_triton(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128):
    """The scan by GPU kernels, forward and backward; repeated runs give the same bits. (torch lists
    its own cumsum on CUDA, which is used here, as not deterministic.)

    Arguments, results and errors as in `ssd_recurrent`, and ValueError for what `unsupported` says.
    dt, A, D and the states are read as fp32. A chunk is two tiles; chunk_size is not used."""
    S0, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    reason = unsupported(x, B)
    devices = {m.device for m in (x, dt, A, B, C, D, initial_states, seq_idx) if m is not None}
    if len(devices) > 1:
        reason = f"inputs are on {', '.join(sorted(map(str, devices)))}: all must be on one device"
    if reason:
        raise ValueError(reason)

    # Tiles are half as long where registers or shared memory do not hold 64 tokens.
    (p0, p1), n = split_head_dim(x.shape[3]), B.shape[3]
    tile = 32 if x.element_size() == 4 or n > 128 and generation(x.device) < 9 else 64
    constants = dict(P0=p0, P1=p1, N=n, TILE=tile, PACKED=doc is not None)

    # (b, h, T) of whole chunks; padding has dt = 0: it neither decays nor adds.
    padding = -x.shape[1] % (2 * tile)
    dt = F.pad(dt.float().transpose(1, 2), (0, padding)).contiguous()
    cs = (dt * A.float()[:, None]).unflatten(2, (-1, 2 * tile)).cumsum(3).flatten(2)
    if doc is not None:
        doc = torch.cat([doc[:, :1], doc, doc[:, -1:].expand(-1, padding)], 1).int()
    D = x.new_zeros(x.shape[2], dtype=torch.float32) if D is None else D.float()
    return _TritonScan.apply(walkable(x), cs, dt, walkable(B), walkable(C), D.contiguous(),
                             S0.contiguous(), doc, constants)


BACKENDS |= {"recurrent": ssd_recurrent, "quadratic": ssd_quadratic, "minimal": ssd_minimal,
             "triton": ssd_triton}

if __name__ == "__main__":
    main()
