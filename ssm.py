"""Mamba-2: the scan in three forms, its backward by hand, one-token decode, the layer.

A Mamba-2 head keeps a matrix-valued state and forgets it at a rate it computes from the input:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          S (p, n), A < 0 a scalar per head
    y_t = S_t C_t + D x_t

which is linear attention with decay: unrolled, y_t is a sum over s <= t of (C_t . B_s) times the
decay between s and t times dt_s x_s. Everything below is that one sentence, evaluated five ways.

    ssd_recurrent   token by token             O(t) work, no matmuls       the definition
    ssd_quadratic   the (t, t) score matrix    O(t^2) work, all matmuls    the insight
    ssd_chunked     quadratic inside chunks,   O(t l) work, all matmuls    trains and prefills
                    recurrent between them
    ssd_triton      chunked, on a GPU          one pass over memory        the same, faster there
    ssd_step        one token, in place        O(1) work and memory        decodes

Source: Mamba-2, arXiv 2405.21060 (the scan: section 6; the layer: section 7). Shapes and names
follow state-spaces/mamba at e9594ce. The released Nemotron-H models use this layer unchanged.

Glossary
    b batch | t time steps | h heads | p head dim | n state size | l length of a chunk
    g groups | r = h / g heads that share a group's B and C
    x input | dt step size, softplus applied | A decay rate (h,) | D skip (h,) | z output gate
    B, C input and output maps: attention's keys and queries | S state (b, h, p, n)
    u = dt x, what enters the state | a = dt A, log of a step's decay | L = exp(segment sums of a)
    seq_idx (b, t): a change of value starts a new document and empties the state

Choices, and where others differ
  * Heads of one group read the same B and C. They are never copied to heads: every product with B
    or C is one batched matmul a group with the group's heads side by side. (transformers 5.23
    repeats both; at the 9B's 128 heads on 8 groups that is 16 times the memory.)
  * Mask before exp. exp first and mask after gives inf * 0 = NaN in the backward. One `minimum`
    with a mask of 0 and -inf masks and keeps the exponent at or below 0 in the same pass.
  * dt has no lower clamp. The kernels have none; transformers' torch path floors dt at 0.001 in
    prefill and not in decode, so that its own two paths disagree.
  * dt, A, cumulative sums, decays and states are fp32 whatever x is (fp64 if x is fp64); matmul
    operands have x's dtype, as in the CUDA kernels. bf16 sums cost 2% in the decays.
  * A chunk's scores live only while the chunk is worked on: memory is O(l) scores plus one state
    per chunk, and what a step touches stays in the CPU's cache.
  * Differences of fp32 cumulative sums lose digits after a huge step: y is off by 4e-5 behind one
    dt = 100 at A = -16, by 6e-3 behind dt = 10000.
  * seq_idx resets at every *change*: 0 1 0 are three documents. (mamba_ssm compares values.)
    initial_states belong to the document at position 0.
  * The kernels (second half of the file) are checked in Triton's interpreter and by ahead-of-time
    compilation for A10G and H100. Their speed has not been measured.

Left out: sequence parallelism; double backward through ssd_chunked and ssd_triton (the other two
have it).

    python ssm.py               agreement and speed tables, out/ssm.png    45 s on 2 cores
    python ssm.py --quick       the same with fewer lengths                10 s
    python ssm.py --bench       bytes, FLOPs and rooflines of the kernels; on a GPU their times
"""

import importlib.util
import math
import os
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Triton is imported where torch is built for CUDA, or where its interpreter is asked for.
TRITON = (bool(torch.version.cuda or "TRITON_INTERPRET" in os.environ)
          and importlib.util.find_spec("triton") is not None)
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
if TRITON:
    import triton
    import triton.language as tl
    jit, constexpr = triton.jit, tl.constexpr
else:
    jit, constexpr = lambda kernel: kernel, None        # the kernels are then never called
KERNEL_DEVICES = {"cuda"}                               # where the layer chooses them by itself


def fused(x):
    """Whether the layer's Triton kernels take x; under torch.compile the compiler fuses instead."""
    return (TRITON and x.device.type in KERNEL_DEVICES and x.dtype != torch.float64
            and not torch.compiler.is_compiling())

# ------------------------------------------------------------------------------------------------
# What every form shares


def accumulator(x):
    """The dtype for sums, decays and states: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def discretize(x, dt, A):
    """One step's input u = dt x (b, t, h, p) and log-decay a = dt A <= 0 (b, t, h); fp32."""
    dtype = accumulator(x)
    dt = dt.to(dtype)
    return x.to(dtype) * dt[..., None], dt * A.to(dtype)


def documents(seq_idx):
    """seq_idx (b, t) -> the number of changes so far, equal inside a document; None -> None."""
    if seq_idx is None:
        return None
    changed = (seq_idx[:, 1:] != seq_idx[:, :-1]).long()
    return F.pad(changed, (1, 0)).cumsum(1)


def _prepare(x, dt, A, B, C, D, initial_states, seq_idx):
    """Check shapes, name what is wrong; returns the state to start from and document numbers."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    if not b * t:
        raise ValueError(f"x has shape {tuple(x.shape)}: at least one row and one token are needed")
    wanted = dict(dt=(dt, (b, t, h)), A=(A, (h,)), B=(B, (b, t, g, n)), C=(C, (b, t, g, n)),
                  D=(D, (h,)), initial_states=(initial_states, (b, h, p, n)),
                  seq_idx=(seq_idx, (b, t)))
    for name, (value, shape) in wanted.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, x {tuple(x.shape)} and B "
                             f"{tuple(B.shape)} ask for {shape}")
    if h % g:
        raise ValueError(f"{h} heads cannot share {g} groups: heads must be a multiple of groups")
    if initial_states is None:
        initial_states = x.new_zeros(b, h, p, n, dtype=accumulator(x))
    return initial_states.to(accumulator(x)), documents(seq_idx)


# ------------------------------------------------------------------------------------------------
# The scan, slowest form first


def ssd_recurrent(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None):
    """The definition, one token at a time (Mamba-2, equation 1 with scalar A; section 3.1).

    x (b, t, h, p) float; dt (b, t, h) positive, softplus applied; A (h,) negative; B, C (b, t, g,
    n); D (h,) or None; initial_states (b, h, p, n) or None for zeros; seq_idx (b, t) int or None.
    Returns y (b, t, h, p) in x's dtype and the final states (b, h, p, n), fp32 (fp64 if x is).
    Raises ValueError on shapes that do not fit. Gradients flow to every float input and from both
    outputs.
    """
    S, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    u, a = discretize(x, dt, A)
    B, C = B.to(u.dtype), C.to(u.dtype)

    S, ys = S.view(b, g, h // g, p, n), []                      # heads of a group side by side
    for i in range(t):
        decay = a[:, i].exp()                                               # (b, h)
        if doc is not None and i > 0:
            decay = decay * (doc[:, i] == doc[:, i - 1])[:, None]
        ui = u[:, i].view(b, g, h // g, p)
        S = decay.view(b, g, h // g, 1, 1) * S + torch.einsum("bgrp,bgn->bgrpn", ui, B[:, i])
        ys.append(torch.einsum("bgrpn,bgn->bgrp", S, C[:, i]).reshape(b, h, p))
    y = torch.stack(ys, 1)                                                  # (b, t, h, p)

    if D is not None:
        y = y + x * D[:, None]
    return y.to(x.dtype), S.reshape(b, h, p, n)


def segment_sum(a):
    """a (..., t) -> (..., t, t): [i, j] = a_{j+1} + ... + a_i, 0 on the diagonal, -inf above.

    Sums masked terms instead of subtracting two cumulative sums, so that no digits cancel.
    """
    t = a.shape[-1]
    lower = torch.ones(t, t, dtype=torch.bool, device=a.device).tril()
    steps = a[..., :, None].expand(*a.shape, t).masked_fill(~lower.tril(-1), 0)
    return steps.cumsum(-2).masked_fill(~lower, -torch.inf)


def ssd_quadratic(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None):
    """The attention form: y = (L * C B^T) u, decays L for softmax (Mamba-2, section 3.2).

    Arguments, results and errors as in `ssd_recurrent`. O(t^2) time and memory: for reading and
    testing.
    """
    S0, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    b, t, h, p = x.shape
    g, n = B.shape[2:]
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
    S0 = S0.view(b, g, h // g, p, n)
    y = y + torch.einsum("bign,bgrpn,bgri->bigrp", C, S0, start)
    S = start[..., -1, None, None] * S0
    S = S + torch.einsum("bgrj,bjgrp,bjgn->bgrpn", L[..., -1, :], u, B)

    y = y.reshape(b, t, h, p)
    if D is not None:
        y = y + x * D[:, None]
    return y.to(x.dtype), S.reshape(b, h, p, n)


def ssd_chunked(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128):
    """The algorithm (Mamba-2, section 6): attention inside chunks, the recurrence between them.

    Arguments, results and errors as in `ssd_recurrent`; the result does not depend on chunk_size,
    and t need not be a multiple of it. Time O(t l), memory O(t + l^2). The backward is derived by
    hand (`_ChunkedScan`).
    """
    S0, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    keep_states = torch.is_grad_enabled()
    return _ChunkedScan.apply(x, dt, A, B, C, D, S0, doc, max(1, min(chunk_size, x.shape[1])),
                              keep_states)


class _Chunk:
    """One chunk's slice of the inputs, heads gathered by group, and its four kinds of decay."""

    def __init__(self, x, dt, A, B, C, doc, start, stop):
        b, _, h, p = x.shape
        self.span = s = slice(start, stop)
        self.sizes = b, stop - start, h, p, B.shape[2]
        self.x, self.dt = x[:, s], dt[:, s].to(accumulator(x))
        self.u, a = discretize(self.x, self.dt, A)                  # (b, l, h, p), (b, l, h)
        self.B, self.C = (m[:, s].transpose(1, 2).flatten(0, 1) for m in (B, C))     # (b g, l, n)

        # Decay between two positions, from the chunk's start, to its end, and across all of it.
        a = a.cumsum(1)
        at = a.transpose(1, 2).contiguous()                                 # (b, h, l)
        causal = at.new_full((stop - start, stop - start), -torch.inf).triu(1)
        self.L = at[..., :, None] - at[..., None, :]
        self.L = torch.minimum(self.L, causal, out=self.L).exp_()   # (b, h, l, l): mask, then exp
        self.head, self.tail = a.exp(), (a[:, -1:] - a).clamp_(max=0).exp_()     # (b, l, h) each
        if doc is not None:
            before, doc = doc[:, max(start - 1, 0), None], doc[:, s]
            self.L *= (doc[:, :, None] == doc[:, None, :])[:, None]
            self.head *= (doc == before)[..., None]
            self.tail *= (doc == doc[:, -1:])[..., None]
        self.all = self.head[:, -1]                                         # (b, h)

    def by_group(self, m):
        """(b, l, h, p) -> (b g, l, r p): a group's heads side by side, to multiply B and C."""
        b, l, h, p, g = self.sizes
        return m.reshape(b, l, g, h // g * p).transpose(1, 2).reshape(b * g, l, -1)

    def by_head(self, m):
        """(b, l, h, p) -> (b h, l, p), for products with the scores."""
        return m.transpose(1, 2).reshape(-1, m.shape[1], m.shape[3])

    def ungroup(self, m):
        """(b g, l, r p) -> (b, l, h, p), the inverse of `by_group`."""
        b, l, h, p, g = self.sizes
        return m.view(b, g, l, -1).transpose(1, 2).reshape(b, l, h, p)

    def unhead(self, m):
        """(b h, l, p) -> (b, l, h, p), the inverse of `by_head`."""
        b, l, h, p, _ = self.sizes
        return m.view(b, h, l, p).transpose(1, 2)

    def times_scores(self, m, scores):
        """m (b, h, l, l) *= scores (b g, l, l), in place, every head with its group's scores."""
        b, l, h, _, g = self.sizes
        m.view(b * g, h // g, l, l).mul_(scores[:, None])
        return m


class _ChunkedScan(torch.autograd.Function):
    """The chunked scan and its gradient.

    With S the state entering a chunk, G = C B^T its scores, M = G * L, all products over a chunk:

        y  = M u  +  head * (C S^T)  +  D x         (1) inside the chunk, (4) from the state
        S' = all * S  +  (tail * u)^T B             (3) the recurrence, (2) the chunk's own state

    Given dy and R = dS', the transposes of the same products, last chunk first:

        du = M^T dy + tail * (B R^T)          dG = sum over a group's heads of (dy u^T) * L
        dC = dG B   + (head * dy) S           dB = dG^T C + (tail * u) R
        R  <- all * R + (head * dy)^T C       the gradient of the state that entered

    The log-decays a enter through exp of differences of their cumulative sum c, and d exp = exp.
    With W = dM * M, strictly lower since the diagonal's exponent is the constant 0, and, for the
    same reason without the last position, w_i = <u_i, tail_i B_i R>:

        dc_i = sum_j W_ij - sum_j W_ji + <dy_i, head_i C_i S> - w_i
        dc_last += sum_i w_i + all <R, S>     tail and all also read the last sum
        da = reverse cumulative sum of dc     dA = sum of dt da
        ddt = <du, x> + A da                  dx = dt du + D dy

    Only the inputs and each chunk's entering state are saved; scores are computed again.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, S0, doc, chunk_size, keep_states):
        b, t, h, p = x.shape
        g, n = B.shape[2:]
        starts = range(0, t, chunk_size)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        S = S0.reshape(b * g, h // g * p, n).clone()
        entering = S.new_empty(len(starts) if keep_states else 0, *S.shape)

        for i, start in enumerate(starts):
            k = _Chunk(x, dt, A, B, C, doc, start, min(start + chunk_size, t))
            if keep_states:
                entering[i] = S

            # (1) inside the chunk: scores times values, one matmul a head
            G = k.C @ k.B.transpose(1, 2)                                   # (b g, l, l)
            M = k.times_scores(k.L, G).to(x.dtype).flatten(0, 1)            # (b h, l, l)
            yk = k.unhead(M @ k.by_head(k.u.to(x.dtype)))                   # (b, l, h, p)

            # (4) what the entering state adds to the output, one matmul a group
            from_state = k.ungroup(k.C @ S.to(x.dtype).transpose(1, 2))
            yk = torch.addcmul(yk.to(S.dtype), from_state.to(S.dtype), k.head[..., None])
            y[:, k.span] = yk if D is None else yk.addcmul_(k.x.to(S.dtype), D[:, None])

            # (2) the state that the chunk itself leaves, and (3) the recurrence
            left = k.by_group((k.u * k.tail[..., None]).to(x.dtype))        # (b g, l, r p)
            S.view(b, h, p, n).mul_(k.all[..., None, None])
            S += left.transpose(1, 2) @ k.B

        ctx.save_for_backward(x, dt, A, B, C, D, doc, entering)
        ctx.chunk_size = chunk_size
        return y, S.view(b, h, p, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        x, dt, A, B, C, D, doc, entering = ctx.saved_tensors
        b, t, h, p = x.shape
        g, n = B.shape[2:]
        dx, dB, dC = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, B, C))
        ddt = torch.empty_like(dt, dtype=dS.dtype, memory_format=torch.contiguous_format)
        dA = A.new_zeros(h, dtype=dS.dtype)
        dD = None if D is None else torch.einsum("bthp,bthp->h", dy, x).to(D.dtype)
        R = dS.reshape(b * g, h // g * p, n).clone()

        for i in reversed(range(len(entering))):
            k = _Chunk(x, dt, A, B, C, doc, i * ctx.chunk_size, min((i + 1) * ctx.chunk_size, t))
            S, dyk = entering[i], dy[:, k.span]
            Sx, Rx = S.to(x.dtype), R.to(x.dtype)

            # Through (1): gradients of scores, values and the decays between positions.
            G = k.C @ k.B.transpose(1, 2)
            dyh, uh = k.by_head(dyk), k.by_head(k.u.to(x.dtype))            # (b h, l, p)
            dM = (dyh @ uh.transpose(1, 2)).view_as(k.L).to(k.L.dtype).mul_(k.L)     # dM * L
            dG = dM.view(b * g, h // g, *G.shape[1:]).sum(1).to(x.dtype)
            M = k.times_scores(k.L, G)
            du = k.unhead(M.to(x.dtype).flatten(0, 1).transpose(1, 2) @ dyh)
            W = k.times_scores(dM, G)
            W.diagonal(dim1=-2, dim2=-1).zero_()
            dc = (W.sum(-1) - W.sum(-2)).transpose(1, 2)                    # (b, l, h)

            # Through (4) and (2): what the state gave to y, and what u gave to the state.
            dyd = dyk * k.head[..., None]
            dc += (dyd * k.ungroup(k.C @ Sx.transpose(1, 2))).sum(-1)
            from_R = k.ungroup(k.B @ Rx.transpose(1, 2)) * k.tail[..., None]
            du = du + from_R
            w = from_R.mul_(k.u).sum(-1)
            w[:, -1] = 0                        # its exponent is 0 as well
            dc -= w
            dc[:, -1] += w.sum(1) + k.all * (R * S).view(b, h, p * n).sum(-1)

            left, dyd = k.by_group((k.u * k.tail[...,
                                                 None]).to(x.dtype)), k.by_group(dyd.to(x.dtype))
            dC[:, k.span] = (dG @ k.B + dyd @ Sx).view(b, g, -1, n).transpose(1, 2)
            dB[:, k.span] = (dG.transpose(1, 2) @ k.C + left @ Rx).view(b, g, -1, n).transpose(1, 2)

            # Through (3): on to the chunk before.
            R.view(b, h, p, n).mul_(k.all[..., None, None])
            R += dyd.transpose(1, 2) @ k.C

            # From u and a to x, dt and A.
            da = dc.flip(1).cumsum(1).flip(1)
            ddt[:, k.span] = (du * k.x).sum(-1) + da * A
            dA += (da * k.dt).sum((0, 1))
            du = du * k.dt[..., None]
            dx[:, k.span] = du if D is None else du.addcmul_(dyk.to(du.dtype), D[:, None])

        ddt, dA, dS0 = ddt.to(dt.dtype), dA.to(A.dtype), R.view(b, h, p, n)
        return dx, ddt, dA, dB, dC, dD, dS0, None, None, None


BACKENDS = {"recurrent": ssd_recurrent, "quadratic": ssd_quadratic, "chunked": ssd_chunked}


def ssd(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128,
        backend="auto"):
    """The scan by the best form for the device. Arguments, results and errors as in
    `ssd_recurrent`.

    backend: "auto", "chunked", "quadratic", "recurrent" or "triton". "auto" is "triton" for 16-bit
    inputs on CUDA in shapes that its kernels take, else "chunked": without the matrix units, in
    fp32, the kernels are there to be checked.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = fused(x) and x.element_size() == 2 and unsupported(x, B) is None
        backend = "triton" if fits else "chunked"
    extra = dict(chunk_size=chunk_size) if backend in ("chunked", "triton") else {}
    form = BACKENDS[backend]
    return form(x, dt, A, B, C, D, initial_states=initial_states, seq_idx=seq_idx, **extra)


def ssd_step(state, x, dt, A, B, C, D=None):
    """One token. state (b, h, p, n) is updated in place; x (b, h, p), dt (b, h), B, C (b, g, n) ->
    y (b, h, p).

    The same discretisation as the scan, so that decode continues a prefill exactly. O(1) in the
    context length.
    """
    b, h, p, n = state.shape
    g = B.shape[1]
    u, a = discretize(x, dt, A)
    flat = state.view(b * g, h // g * p, n)

    state.mul_(a.exp()[..., None, None])
    flat.addcmul_(u.reshape(b * g, -1, 1).to(state.dtype), B.reshape(b * g, 1, n).to(state.dtype))
    y = torch.bmm(C.reshape(b * g, 1, n).to(state.dtype), flat.transpose(1, 2)).view(b, h, p)
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), D[:, None].to(y.dtype))
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------
# The causal convolution, the gated norm, the layer


def causal_conv1d(x, weight, bias, *, initial_states=None, seq_idx=None):
    """silu(depthwise causal convolution): y_t = silu(bias + sum_k weight[:, w-1-k] x_{t-k}), k < w.

    x (b, t, channels), any strides; weight (channels, width); bias (channels,) or None;
    initial_states (b, channels, width - 1): the inputs just before x, oldest first, or None for
    zeros; seq_idx (b, t): taps do not reach into another document. Returns (y (b, t, channels) in
    x's dtype, final_states (b, channels, width - 1), the last inputs of this call, which continue
    it as the next call's initial_states).
    """
    b, t, channels = x.shape
    width = weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"weight has {weight.shape[0]} channels, x has {channels}")
    if initial_states is None:
        initial_states = x.new_zeros(b, channels, width - 1)
    before = initial_states.to(x.dtype).transpose(1, 2)  # (b, width - 1, channels)
    tail = torch.cat([before, x[:, max(0, t - width + 1):]], 1)
    final_states = tail[:, tail.shape[1] - width + 1:].transpose(1, 2)
    bias = weight.new_zeros(channels) if bias is None else bias
    form = _ConvSiluTriton if fused(x) and width < 8 else _ConvSilu
    return form.apply(x, weight, bias, before, documents(seq_idx)), final_states


class _ConvSilu(torch.autograd.Function):
    """Width-many multiply-adds over (t, channels), one sequence at a time so that the row stays in
    cache.

    torch's own depthwise conv1d needs (b, channels, t), and its backward on a CPU is eight times
    slower. Saves the inputs alone; the sum before the SiLU is computed again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, before, doc):
        ctx.save_for_backward(x, weight, bias, before, doc)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i in range(len(x)):
            window, masks = _window(x, before, doc, i, weight.shape[1])
            y[i] = F.silu(_taps(window, weight, bias, masks), inplace=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, before, doc = ctx.saved_tensors
        t, width = x.shape[1], weight.shape[1]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dbefore = torch.empty_like(before, memory_format=torch.contiguous_format)
        taps = weight.t().to(accumulator(x)).contiguous()                   # (width, channels)
        dtaps, dbias = torch.zeros_like(taps), torch.zeros_like(taps[0])

        for i in range(len(x)):
            window, masks = _window(x, before, doc, i, width)
            dsum = torch.ops.aten.silu_backward(dy[i].to(taps.dtype),
                                                _taps(window, weight, bias, masks))
            dbias += dsum.sum(0)
            dwindow = torch.zeros_like(window)
            for k in range(width):
                d = dsum if masks is None else dsum * masks[k]
                dwindow[k:k + t].addcmul_(d, taps[k])
                dtaps[k] += (d * window[k:k + t]).sum(0)
            dbefore[i], dx[i] = dwindow[:width - 1], dwindow[width - 1:]
        return dx, dtaps.t().to(weight.dtype), dbias.to(bias.dtype), dbefore, None


def _window(x, before, doc, i, width):
    """Row i with the inputs before it, (width - 1 + t, channels), and per tap a (t, 1) mask or
    None.
    """
    window = torch.cat([before[i], x[i]]).to(accumulator(x))
    if doc is None:
        return window, None
    t = x.shape[1]
    reach = F.pad(doc[i], (width - 1, 0), value=0)  # what came before belongs to document 0
    return window, [(reach[k:k + t] == doc[i])[:, None] for k in range(width)]


def _taps(window, weight, bias, masks):
    """bias + sum over taps of weight * shifted window: (t, channels)."""
    t = len(window) - weight.shape[1] + 1
    taps = weight.t().to(window.dtype).contiguous()
    out = bias.to(window.dtype).expand(t, -1).clone()
    for k in range(len(taps)):
        out.addcmul_(window[k:k + t] if masks is None else window[k:k + t] * masks[k], taps[k])
    return out


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last axis, which is kept."""
    norm = torch.linalg.vector_norm(x, 2, -1, True)
    return torch.addcmul(x.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt()


def gated_group_norm(y, z, weight, n_groups, eps):
    """Gate, then RMSNorm each of n_groups slices, then weight: y, z (..., d) -> (..., d) in y's
    dtype.

    The order and the groups both matter, and a wrong grouping is invisible with one group, as the
    first Mamba-2 checkpoints have it. weight (d,); eps float.
    """
    if y.shape[-1] % n_groups:
        raise ValueError(f"{y.shape[-1]} channels cannot form {n_groups} groups of equal size")
    rows = y.reshape(-1, y.shape[-1]), z.reshape(-1, y.shape[-1])
    if fused(y):
        return _GatedGroupNormTriton.apply(*rows, weight, n_groups, eps).view(y.shape)
    if len(rows[0]) <= NORM_ROWS and not torch.is_grad_enabled():
        v, _, _ = _GatedGroupNorm.normalise(*rows, n_groups, eps)
        return v.flatten(1).mul_(weight).to(y.dtype).view(y.shape)
    return _GatedGroupNorm.apply(*rows, weight, n_groups, eps).view(y.shape)


NORM_ROWS = 512     # rows that the norm works on at a time


class _GatedGroupNorm(torch.autograd.Function):
    """Saves y and z; a block of rows at a time, so that temporaries never leave the cache.

    With s = y silu(z), v = s / rms(s) and m = dout * weight:  ds = (m - v mean(m v)) / rms(s).
    """

    @staticmethod
    def forward(ctx, y, z, weight, n_groups, eps):
        ctx.save_for_backward(y, z, weight)
        ctx.n_groups, ctx.eps = n_groups, eps
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for i in range(0, len(y), NORM_ROWS):
            rows = slice(i, i + NORM_ROWS)
            v, _, _ = _GatedGroupNorm.normalise(y[rows], z[rows], n_groups, eps)
            out[rows] = v.flatten(1).mul_(weight)
        return out

    @staticmethod
    def normalise(y, z, n_groups, eps):
        """v (rows, groups, d / groups), 1 / rms (rows, groups, 1), silu(z) (rows, d)."""
        gate = F.silu(z.to(accumulator(y)))
        s = (y * gate).view(len(y), n_groups, -1)
        scale = inverse_rms(s, eps)
        return s.mul_(scale), scale, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, weight = ctx.saved_tensors
        dy, dz = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (y, z))
        dweight = torch.zeros_like(weight, dtype=accumulator(y))
        for i in range(0, len(y), NORM_ROWS):
            rows = slice(i, i + NORM_ROWS)
            v, scale, gate = _GatedGroupNorm.normalise(y[rows], z[rows], ctx.n_groups, ctx.eps)
            d = dout[rows].to(v.dtype)
            dweight += (d * v.flatten(1)).sum(0)
            m = (d * weight).view_as(v)
            ds = (m - v * (m * v).mean(-1, keepdim=True)).mul_(scale).flatten(1)
            dy[rows] = ds * gate
            dz[rows] = torch.ops.aten.silu_backward(ds.mul_(y[rows]), z[rows].to(v.dtype))
        return dy, dz, dweight.to(weight.dtype), None, None


ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """nn.Linear without bias whose weight follows the input's dtype: fp32 masters, bf16 matmuls,
    no autocast. A few fp32 rows on a CPU, which is decoding, go to oneDNN: 1.7 to 2.2 times as
    fast as the library that torch asks first (one row, AMD EPYC).
    """

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        weight = self.weight
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        few_rows = x.numel() <= 16 * weight.shape[1] and x.dtype == torch.float32 and x.is_cpu
        eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if few_rows and eager and ONEDNN:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return F.linear(x, weight)


class GatedGroupNorm(nn.Module):
    """The layer's output norm; see `gated_group_norm`."""

    def __init__(self, d, n_groups, eps=1e-5):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y, z):
        return gated_group_norm(y, z, self.weight, self.n_groups, self.eps)


class Mamba2(nn.Module):
    """in_proj -> [z, x, B, C, dt]; conv over [x, B, C]; scan; gated norm with z; out_proj (Mamba-2,
    figure 6).

    d_inner = n_heads x head_dim need not be a multiple of d_model: 10240 on 4480 in the 9B.
    Parameter names are those of the released checkpoints. A_log, D and dt_bias stay fp32 whatever
    the rest is.
    """

    def __init__(self, d_model, n_heads, head_dim, d_state, n_groups, d_conv=4, chunk_size=128,
                 eps=1e-5):
        super().__init__()
        if n_heads % n_groups:
            raise ValueError(f"{n_heads} Mamba heads cannot share {n_groups} groups: heads must "
                             f"be a multiple")
        self.n_heads, self.head_dim, self.n_groups = n_heads, head_dim, n_groups
        self.chunk_size = chunk_size
        self.d_inner = n_heads * head_dim
        self.conv_dim = self.d_inner + 2 * n_groups * d_state
        self.in_proj = Linear(d_model, self.d_inner + self.conv_dim + n_heads)
        # holds the weights
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.norm = GatedGroupNorm(self.d_inner, n_groups, eps)
        self.out_proj = Linear(self.d_inner, d_model)
        if not self.dt_bias.is_meta:
            self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self, dt_min=1e-3, dt_max=0.1, dt_floor=1e-4, A_range=(1, 16)):
        """dt log-uniform in [dt_min, dt_max], dt_bias its inverse softplus; A uniform in A_range; D
        = 1.
        """
        dt = (torch.rand_like(self.dt_bias) * math.log(dt_max / dt_min)
              + math.log(dt_min)).exp().clamp(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.uniform_(*A_range).log_()
        self.D.fill_(1)

    def forward(self, x, conv_state=None, ssm_state=None, seq_idx=None):
        """x (b, t, d) -> (b, t, d). The states, (b, conv_dim, d_conv - 1) and fp32 (b, h, p, n), go
        on in place.
        """
        b, t, _ = x.shape
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.conv_dim, self.n_heads], -1)
        weight = self.conv1d.weight.squeeze(1)

        # One token with a state: the recurrence itself, everything in place.
        if t == 1 and ssm_state is not None and self.one_launch(x, ssm_state):
            y = conv_ssd_step(xBC[:, 0], dt[:, 0], conv_state, ssm_state, weight, self.conv1d.bias,
                              self.dt_bias, self.A_log, self.D)
            return self.out_proj(self.norm(y.view(b, 1, -1), z))
        dt = F.softplus(dt.to(accumulator(x)) + self.dt_bias)                # (b, t, h)
        A = -self.A_log.to(dt.dtype).exp()
        if t == 1 and ssm_state is not None:
            xs, B, C = self.split_groups(self.conv_step(xBC[:, 0], conv_state))
            y = ssd_step(ssm_state, xs, dt[:, 0], A, B, C, self.D)
            return self.out_proj(self.norm(y.view(b, 1, -1), z))

        # Any number of tokens: the chunked scan, from the given state or from zeros.
        xBC, conv_final = causal_conv1d(xBC, weight, self.conv1d.bias, initial_states=conv_state,
                                        seq_idx=seq_idx)
        xs, B, C = self.split_groups(xBC)
        y, ssm_final = ssd(xs, dt, A, B, C, self.D, initial_states=ssm_state, seq_idx=seq_idx,
                           chunk_size=self.chunk_size)
        if ssm_state is not None:
            conv_state.copy_(conv_final)
            ssm_state.copy_(ssm_final)
        return self.out_proj(self.norm(y.flatten(2), z))

    def one_launch(self, x, ssm_state):
        """Whether `conv_ssd_step` takes a token: it knows no gradients and walks a whole state."""
        return (fused(x) and not torch.is_grad_enabled() and ssm_state.is_contiguous()
                and self.conv1d.weight.shape[2] > 1)

    def split_groups(self, xBC):
        """(..., conv_dim) -> x (..., h, p), B and C (..., g, n), as views."""
        x, B, C = xBC.split([self.d_inner] + [(self.conv_dim - self.d_inner) // 2] * 2, -1)
        groups = (self.n_groups, -1)
        return x.unflatten(-1, (self.n_heads, self.head_dim)), B.unflatten(-1,
                groups), C.unflatten(-1, groups)

    def conv_step(self, xBC, conv_state):
        """One token through the convolution: xBC (b, conv_dim) -> same; conv_state shifts by one in
        place.
        """
        last = conv_state.transpose(1, 2)  # (b, d_conv - 1, conv_dim)
        window = torch.cat([last, xBC[:, None].to(last.dtype)], 1)
        last.copy_(window[:, 1:])
        taps = self.conv1d.weight.squeeze(1).t()
        out = (window.to(accumulator(xBC)) * taps).sum(1).add_(self.conv1d.bias)
        return F.silu(out, inplace=True).to(xBC.dtype)


# ------------------------------------------------------------------------------------------------
# Triton: the scan

# What is to be moved. At the 9B's shape (h 128, p 80, n 128, g 8, bf16) a token of the forward has
# to read x, B, C, dt and to write y, 45 kB; a token of the backward moves 70 kB. An H100 moves
# 3.35 TB/s and multiplies 990 TFLOP/s: 45 kB take 13.5 ns, their 8.7 MFLOP 8.7 ns. So the scan is a
# walk over memory with matmuls on the way, and a design is good if it moves little.
#
# The usual split is one kernel a step of the algorithm: chunk states, passing, C B^T, output. Each
# hands its result on through memory, and states and scores are larger than x. Here one program
# walks one head's tokens, a tile of 64 at a time, with the state (n, p) in registers:
#
#     M = (C B^T) * decays * dt          (l, l)    a tile's scores, in registers
#     y = M x + into * (C S) + D x       (l, p)    written once
#     S = keep S + B^T (out * x)         (n, p)    stays where it is
#
# x is read once. C B^T is computed again by each of a group's heads (29% more multiplications than
# once a group): its operands come from L2, which the heads of a group share, and its result never
# leaves the SM. What is lost is parallelism over time: there are b h programs. 128 fill an H100's
# 132 SMs; where they are too few, `_states_kernel` first finds the states at segments' starts.
#
# The backward cannot stay in one program: dB and dC are sums over a group's heads, and atomics
# would add them in another order each time. So, in this order:
#
#     states      program = n-tile, head       S entering every chunk of 128, from x, B
#     states      the same, last chunk first   R = dS leaving every chunk, and <S, R>, from dy, C, S
#     dx          tile, group; loops heads     dx, ddt, dcs, and dG, the scores' gradient over heads
#     dC, then dB tile, group; loops heads     dG B + sum_h (into dy) S^T; the rest of dcs
#
# S and R are the largest part of the traffic and halve when the chunk doubles: 128 tokens are two
# tiles of 64, and their three score tiles (two on the diagonal, one below) never leave the SM. The
# tile below has a loop of its own in `_dx_kernel`: registers hold one tile's gradients and not two
# (one loop spilled 1.2 kB a thread, two spill 0.2 to 0.5 kB), and its second look at x, dy and dx
# meets what the first left in L2. Not taken: to carry R and S from the chunk's edge to its middle
# instead of the tile below. It needs no extra loop, but then a pair of tokens enters the decays'
# gradient by two differently rounded ways that no longer cancel: dA was off by 6% in bf16.
# Long sequences go through in spans of SPAN tokens, last first, so that S and R are scratch of a
# fixed size. Only inputs are saved for the backward, dt and its cumulative sums in fp32.
#
# Bytes a token at that shape, counted, every tensor once a kernel (mamba_ssm at e9594ce, chunk 256;
# `python ssm.py --bench` prints ours for each kernel):
#
#                 compulsory   mamba_ssm            here
#     forward     45,312       147,712  3.3 x        49,920  1.1 x     (73,472 with segments)
#     backward    70,144       538,880  7.7 x       305,408  4.4 x
#
# Written for the compiler as much as for the reader:
#   * Softplus, A and the cumulative sum stay in torch, where autograd has them, as (b, h, t).
#   * Head dims are sums of two powers of two, 80 = 64 + 16: padding to 128 would be 1.6 x the work.
#   * No accumulator is transposed on its way into a dot, which Triton 3.4 to 3.7.0 miscompiles on
#     Hopper (fla-org/flash-linear-attention issue 640): what is needed as (j, i) is computed so.
#   * maxnreg=255: left alone, ptxas at times settles on 128 or 40 registers and spills kilobytes.
#   * 64-bit offsets for row, head and time, 32-bit inside a tile.
#   * Exponents are differences of cumulative sums, clamped at 0: parallel sums are not monotone.


@jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")        # fp32 operands: no TF32


@jit
def _between(late, early):
    """Decay from one cumulative sum to a later one, at most 1."""
    return tl.exp(tl.minimum(late - early, 0.0))


@jit
def _read(m, rows, stride, cols, ok):
    """A tile of m, rows beyond the end 0 whatever memory holds."""
    return tl.load(m + rows[:, None] * stride + cols[None, :], mask=ok[:, None], other=0.0)


@jit
def _write(m, rows, stride, cols, ok, value):
    tl.store(m + rows[:, None] * stride + cols[None, :], value.to(m.dtype.element_ty),
             mask=ok[:, None])


@jit
def _onward(S, V, U, keep, w):
    """Some columns of a state (n, p) through one tile: keep S + U^T (w V), fp32."""
    return _dot(tl.trans(U), (V * w[:, None]).to(U.dtype), keep * S)


@jit
def _through(S, xl, M, Bl, Cl, into, out, keep):
    """Some columns of a head through one tile: (y without D x, the state after it)."""
    Y = _dot(M, xl, into[:, None] * _dot(Cl, S.to(Cl.dtype)))
    return Y, _onward(S, xl, Bl, keep, out)


@jit
def _scan_kernel(x, B, C, cs, dt, doc, D, y, S_in, S_out, t, T, h, r, tiles, S_b,
                 x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, P0: constexpr, P1: constexpr,
                 N: constexpr, TILE: constexpr, CHUNK: constexpr, PACKED: constexpr):
    """Program (head, segment, row) walks its segment of `tiles` tiles; see the essay above.

    x (b, t, h, p), B, C (b, t, g, n) by strides; cs, dt (b, h, T) fp32, T whole chunks, cs summed
    from each chunk's start; doc (b, 1 + T), the first column the number before the first token;
    S_in (b, segments, h, p, n), rows S_b apart; writes y (b, t, h, p) and S_out (b, h, p, n).
    """
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    P: constexpr = P0 + P1
    first, last = part * tiles, tl.minimum(part * tiles + tiles, tl.cdiv(t, TILE))
    i, n, p0 = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    start = (first * TILE).to(tl.int64)
    x += row * x_b + start * x_t + head * x_h
    y += (row * t + start) * h * P + head * P
    B += row * B_b + start * B_t + head // r * B_g
    C += row * C_b + start * C_t + head // r * C_g
    cs += (row * h + head) * T
    dt += (row * h + head) * T
    S_in += row * S_b + (part * h + head) * P * N
    S0 = tl.load(S_in + n[:, None] + p0[None, :] * N)
    if P1 > 0:
        S1 = tl.load(S_in + n[:, None] + p1[None, :] * N)
    skip = tl.load(D + head)

    for k in range(first, last):
        ok = i < t - k * TILE
        Bl, Cl = _read(B, i, B_t, n, ok), _read(C, i, C_t, n, ok)
        x0 = _read(x, i, x_t, p0, ok)
        G = _dot(Cl, tl.trans(Bl))

        # Decays: from the tile's start, to its end, across it, between two of its tokens.
        l, d = tl.load(cs + k * TILE + i), tl.load(dt + k * TILE + i)
        begin = tl.load(cs + k * TILE - 1, mask=k * TILE % CHUNK > 0, other=0.0)
        end = tl.load(cs + k * TILE + TILE - 1)
        into, out, keep = _between(l, begin), _between(end, l) * d, _between(end, begin)
        causal = i[:, None] >= i[None, :]
        if PACKED:
            docs = doc + row * (T + 1) + k * TILE
            own, before, after = tl.load(docs + 1 + i), tl.load(docs), tl.load(docs + TILE)
            into = tl.where(own == before, into, 0.0)
            out = tl.where(own == after, out, 0.0)
            keep = tl.where(before == after, keep, 0.0)
            causal = causal & (own[:, None] == own[None, :])
        E = tl.where(causal, _between(l[:, None], l[None, :]), 0.0)

        # (i, j), target by source; then the head's columns in one or two parts.
        M = (G * E * d[None, :]).to(x0.dtype)
        Y, S0 = _through(S0, x0, M, Bl, Cl, into, out, keep)
        _write(y, i, h * P, p0, ok, Y + skip * x0)
        if P1 > 0:
            x1 = _read(x, i, x_t, p1, ok)
            Y, S1 = _through(S1, x1, M, Bl, Cl, into, out, keep)
            _write(y, i, h * P, p1, ok, Y + skip * x1)
        x += TILE * x_t
        y += TILE * h * P
        B += TILE * B_t
        C += TILE * C_t

    if part == tl.num_programs(1) - 1:
        S_out += (row * h + head) * P * N
        tl.store(S_out + n[:, None] + p0[None, :] * N, S0)
        if P1 > 0:
            tl.store(S_out + n[:, None] + p1[None, :] * N, S1)


@jit
def _states_kernel(V, U, cs, dt, doc, first, states, last, other, inner, t, T, h, r, tiles, every,
                   V_b, V_t, V_h, U_b, U_t, U_g, P0: constexpr, P1: constexpr, N: constexpr,
                   BN: constexpr, TILE: constexpr, CHUNK: constexpr, PACKED: constexpr,
                   REVERSE: constexpr):
    """Program (n-tile, head, row) walks `tiles` tiles: the states at every `every`-th of them.

    Forward, V = x and U = B: the state that enters. REVERSE, V = dy and U = C: R, the gradient of
    the state that leaves, and inner = <S, R> with S = other, the state that entered there.
    first, last (b, h, p, n) fp32; states, other (b, c, h, p, n); inner (b, c, h, n-tiles).
    """
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    P: constexpr = P0 + P1
    i, n, p0 = tl.arange(0, TILE), part * BN + tl.arange(0, BN), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    V += row * V_b + head * V_h
    U += row * U_b + head // r * U_g
    cs += (row * h + head) * T
    dt += (row * h + head) * T
    at0 = n[:, None] + p0[None, :] * N
    at1 = n[:, None] + p1[None, :] * N
    first += (row * h + head) * P * N
    S0 = tl.load(first + at0)
    if P1 > 0:
        S1 = tl.load(first + at1)

    for step in range(0, tiles):
        k = tiles - 1 - step if REVERSE else step
        edge = (k + 1) % every == 0 if REVERSE else k % every == 0
        if edge:
            place = (row * tl.cdiv(tiles, every) + k // every) * h + head
            at = states + place * P * N
            tl.store(at + at0, S0.to(states.dtype.element_ty))
            if P1 > 0:
                tl.store(at + at1, S1.to(states.dtype.element_ty))
            if REVERSE:
                product = tl.sum(S0 * tl.load(other + place * P * N + at0))
                if P1 > 0:
                    product += tl.sum(S1 * tl.load(other + place * P * N + at1))
                tl.store(inner + place * tl.num_programs(0) + part, product)

        start = (k * TILE).to(tl.int64)
        ok = i < t - k * TILE
        Ul, v0 = _read(U + start * U_t, i, U_t, n, ok), _read(V + start * V_t, i, V_t, p0, ok)
        l = tl.load(cs + k * TILE + i)
        begin = tl.load(cs + k * TILE - 1, mask=k * TILE % CHUNK > 0, other=0.0)
        end = tl.load(cs + k * TILE + TILE - 1)
        keep = _between(end, begin)
        if REVERSE:
            w = _between(l, begin)
        else:
            w = _between(end, l) * tl.load(dt + k * TILE + i)
        if PACKED:
            docs = doc + row * (T + 1) + k * TILE
            own, before, after = tl.load(docs + 1 + i), tl.load(docs), tl.load(docs + TILE)
            w = tl.where(own == (before if REVERSE else after), w, 0.0)
            keep = tl.where(before == after, keep, 0.0)
        S0 = _onward(S0, v0, Ul, keep, w)
        if P1 > 0:
            S1 = _onward(S1, _read(V + start * V_t, i, V_t, p1, ok), Ul, keep, w)

    last += (row * h + head) * P * N
    tl.store(last + at0, S0)
    if P1 > 0:
        tl.store(last + at1, S1)


@jit
def _dx_kernel(x, dy, B, C, cs, dt, doc, D, R, dx, dG, ddt, dcs, dcs_late, dend, dD, t, T, h, g, r,
               x_b, x_t, x_h, y_b, y_t, y_h, B_b, B_t, B_g, C_b, C_t, C_g, dx_b,
               P0: constexpr, P1: constexpr, N: constexpr, TILE: constexpr, CHUNK: constexpr,
               PACKED: constexpr):
    """Program (tile, group, row), loops over the group's heads.

    Scores are kept (j, i), source by target. dG (b, tiles, g, CHUNK / TILE, TILE, TILE) is their
    gradient summed over heads: targets in the same tile, targets in the chunk's next tile. dcs (b,
    h, T) takes what the tokens give as sources, and get as targets inside the tile; dcs_late what
    they get from the tile before; dend (b, tiles, h) what the chunk's last position gets; dD (b,
    tiles, h).
    """
    k, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    P: constexpr = P0 + P1
    SPREAD: constexpr = CHUNK // TILE                           # tiles a chunk: 1 or 2
    i, n, p0 = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    start, head = (k * TILE).to(tl.int64), group * r
    ok, ok_late = i < t - k * TILE, i < t - k * TILE - TILE
    causal, diagonal = i[:, None] <= i[None, :], i[:, None] == i[None, :]
    B += row * B_b + start * B_t + group * B_g
    C += row * C_b + start * C_t + group * C_g
    x += row * x_b + start * x_t + head * x_h
    dy += row * y_b + start * y_t + head * y_h
    dx += row * dx_b + start * h * P + head * P
    R += ((row * (tl.num_programs(0) // SPREAD) + k // SPREAD) * h + head) * P * N
    line, spot = (row * h + head) * T + start, (row * tl.num_programs(0) + k) * h + head
    dG += ((row * tl.num_programs(0) + k) * g + group) * SPREAD * TILE * TILE
    dG += i[:, None] * TILE + i[None, :]
    to_end = CHUNK - 1 - k % SPREAD * TILE
    moves = (i < tl.minimum(to_end, t - 1 - k * TILE)).to(tl.float32)   # from the end none decays
    if PACKED:
        docs = doc + row * (T + 1) + 1 + k * TILE
        own, after = tl.load(docs + i), tl.load(docs + to_end)
        causal = causal & (own[:, None] == own[None, :])

    # Targets in the same tile, and the state that leaves the chunk.
    Bj = _read(B, i, B_t, n, ok)
    G = _dot(Bj, tl.trans(_read(C, i, C_t, n, ok)))
    dGs = tl.zeros((TILE, TILE), tl.float32)
    for m in range(0, r):
        l, d = tl.load(cs + line + m * T + i), tl.load(dt + line + m * T + i)
        skip = tl.load(D + head + m)

        # W is dM, then times the decays, then times the scores. The diagonal does not see the
        # decay: its exponent is 0.
        x0, g0 = _read(x + m * x_h, i, x_t, p0, ok), _read(dy + m * y_h, i, y_t, p0, ok)
        W = _dot(x0, tl.trans(g0))
        if P1 > 0:
            x1, g1 = _read(x + m * x_h, i, x_t, p1, ok), _read(dy + m * y_h, i, y_t, p1, ok)
            W = _dot(x1, tl.trans(g1), W)
        tl.store(dD + spot + m, tl.sum(tl.where(diagonal, W, 0.0)))
        E = tl.where(causal, _between(l[None, :], l[:, None]), 0.0)
        M = (G * E).to(x0.dtype)
        W *= E
        dGs += W * d[:, None]
        W *= G
        du = tl.sum(W, 1)
        W = tl.where(diagonal, 0.0, W)
        dl = tl.sum(W * d[:, None], 0) - d * tl.sum(W, 1)

        tail = _between(tl.load(cs + line + m * T + to_end), l)
        if PACKED:
            tail = tl.where(own == after, tail, 0.0)
        R0 = tl.load(R + m * P * N + n[:, None] + p0[None, :] * N)
        v0 = _dot(Bj, R0) * tail[:, None]
        through_R = tl.sum(v0 * x0, 1)
        v0 = _dot(M, g0, v0)
        _write(dx + m * P, i, h * P, p0, ok, v0 * d[:, None] + skip * g0)
        if P1 > 0:
            R1 = tl.load(R + m * P * N + n[:, None] + p1[None, :] * N)
            v1 = _dot(Bj, R1) * tail[:, None]
            through_R += tl.sum(v1 * x1, 1)
            v1 = _dot(M, g1, v1)
            _write(dx + m * P, i, h * P, p1, ok, v1 * d[:, None] + skip * g1)
        tl.store(ddt + line + m * T + i, du + through_R)
        crossing = d * through_R * moves
        tl.store(dcs + line + m * T + i, dl - crossing)
        tl.store(dend + spot + m, tl.sum(crossing))
    tl.store(dG, dGs.to(dG.dtype.element_ty))

    # Targets in the next tile of the chunk: on top of what was written, which is still in L2. Two
    # loops, since the registers do not hold both.
    if SPREAD > 1:
        if k % SPREAD == 0:
            tl.debug_barrier()
            Bj = _read(B, i, B_t, n, ok)
            G = _dot(Bj, tl.trans(_read(C + TILE * C_t, i, C_t, n, ok_late)))
            dGs = tl.zeros((TILE, TILE), tl.float32)
            dy += TILE * y_t
            for m in range(0, r):
                l, d = tl.load(cs + line + m * T + i), tl.load(dt + line + m * T + i)
                x0 = _read(x + m * x_h, i, x_t, p0, ok)
                g0 = _read(dy + m * y_h, i, y_t, p0, ok_late)
                W = _dot(x0, tl.trans(g0))
                if P1 > 0:
                    g1 = _read(dy + m * y_h, i, y_t, p1, ok_late)
                    W = _dot(_read(x + m * x_h, i, x_t, p1, ok), tl.trans(g1), W)
                E = _between(tl.load(cs + line + m * T + TILE + i)[None, :], l[:, None])
                if PACKED:
                    E = tl.where(own[:, None] == tl.load(docs + TILE + i)[None, :], E, 0.0)
                M = (G * E).to(x0.dtype)
                W *= E
                dGs += W * d[:, None]
                W *= G
                du = tl.sum(W, 1)
                at = line + m * T + i
                tl.store(dcs_late + at + TILE, tl.sum(W * d[:, None], 0))
                tl.store(ddt + at, tl.load(ddt + at) + du)
                tl.store(dcs + at, tl.load(dcs + at) - d * du)
                v0 = _dot(M, g0) * d[:, None] + _read(dx + m * P, i, h * P, p0, ok)
                _write(dx + m * P, i, h * P, p0, ok, v0)
                if P1 > 0:
                    v1 = _dot(M, g1) * d[:, None] + _read(dx + m * P, i, h * P, p1, ok)
                    _write(dx + m * P, i, h * P, p1, ok, v1)
            tl.store(dG + TILE * TILE, dGs.to(dG.dtype.element_ty))


@jit
def _dBC_kernel(V, own, other, cs, dt, doc, S, dG, out, dcs, dcs_late, dend, inner, t, T, h, g, r,
                V_b, V_t, V_h, own_b, own_t, own_g, other_b, other_t, other_g, out_b,
                P0: constexpr, P1: constexpr, N: constexpr, PARTS: constexpr, TILE: constexpr,
                CHUNK: constexpr, PACKED: constexpr, FOR_B: constexpr):
    """Program (tile, group, row), loops over the group's heads: dC, or FOR_B dB, without atomics.

    dC: V = dy, own = C, other = B, S the states that entered; completes dcs.
    dB: V = x, own = B, other = C, S = R.
    """
    k, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    P: constexpr = P0 + P1
    SPREAD: constexpr = CHUNK // TILE
    early = k % SPREAD + 1 < SPREAD
    i, n, p0 = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, P0)
    p1 = P0 + tl.arange(0, max(P1, 1))
    start, head = (k * TILE).to(tl.int64), group * r
    ok = i < t - k * TILE

    # Through the scores: dG is (j, i), dB takes its rows and dC its columns.
    other += row * other_b + start * other_t + group * other_g
    at = ((row * tl.num_programs(0) + k) * g + group) * SPREAD * TILE * TILE
    scores = i[:, None] * TILE + i[None, :] if FOR_B else i[:, None] + i[None, :] * TILE
    acc = _dot(tl.load(dG + at + scores), _read(other, i, other_t, n, ok))
    if SPREAD > 1:
        step = TILE if FOR_B else -TILE                         # the chunk's other tile
        if early == FOR_B:
            if not FOR_B:
                at -= g * SPREAD * TILE * TILE
            rows = _read(other + step * other_t, i, other_t, n, i + step < t - k * TILE)
            acc = _dot(tl.load(dG + at + TILE * TILE + scores), rows, acc)

    # Through the states, head by head.
    V += row * V_b + start * V_t + head * V_h
    chunk = (row * (tl.num_programs(0) // SPREAD) + k // SPREAD) * h + head
    S += chunk * P * N                                          # chunk counts heads, too
    line, spot = (row * h + head) * T + start, (row * tl.num_programs(0) + k) * h + head
    to_end = CHUNK - 1 - k % SPREAD * TILE
    if PACKED:
        docs = doc + row * (T + 1) + k * TILE
        document = tl.load(docs + 1 + i)
        before, after = tl.load(docs - k % SPREAD * TILE), tl.load(docs + 1 + to_end)
    if not FOR_B:
        Ci = _read(own + row * own_b + start * own_t + group * own_g, i, own_t, n, ok)
    for _ in range(0, r):
        l = tl.load(cs + line + i)
        end = tl.load(cs + line + to_end)
        if FOR_B:
            w = _between(end, l) * tl.load(dt + line + i)
        else:
            w = _between(l, 0.0)
        keep = _between(end, 0.0)
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
                total = tl.load(dend + spot)
                if SPREAD > 1:
                    dl += tl.load(dcs_late + line + i)
                    total += tl.load(dend + spot - h)
                for m in tl.static_range(PARTS):
                    total += keep * tl.load(inner + chunk * PARTS + m)
                dl += tl.where(i == TILE - 1, total, 0.0)
            tl.store(dcs + line + i, dl)
        V += V_h
        S += P * N
        line += T
        spot += 1
        chunk += 1
    _write(out + row * out_b + start * g * N + group * N, i, g * N, n, ok, acc)


# (warps, pipeline stages) of each kernel: for 16-bit inputs by the GPU's generation (8: A10G, A100;
# 9: H100, H200), and for fp32. Registers bind: 8 warps of 255 are all that an SM has. Chosen by
# what the compiler makes of them (tests/aot.py prints it): the least spill, then the deepest
# pipeline. Not by time, which has not been measured.
OPTIONS = {
    # One program an SM: loads must overlap the five dots of a tile. 45 kB of shared memory on
    # generation 8, where a third stage brings nothing; 139 kB on 9, where it spills less.
    "scan": {8: (8, 2), 9: (8, 3), "fp32": (8, 1)},
    # Half the state and one dot: 4 warps hold it without a spill, two or three programs an SM.
    "states": {8: (4, 1), 9: (4, 3), "fp32": (8, 1)},
    # The kernel with most to hold; a second stage doubles its spills.
    "dx": {8: (8, 1), 9: (8, 1), "fp32": (8, 1)},
    # No spills; two stages hide the loads of the next head's state.
    "dBC": {8: (8, 2), 9: (8, 2), "fp32": (8, 1)},
}
SPAN = 16384        # tokens whose states the backward holds at a time: 0.7 GB at the 9B's shape


def gpu(device):
    """(generation, number of multiprocessors) of a CUDA device; of an A10G for the interpreter."""
    if device.type != "cuda":
        return 8, 80
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def launch(kernel, grid, *arguments, **constants):
    """A kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def strides(*tensors):
    """Every tensor's strides but the last, which is 1."""
    return [stride for m in tensors for stride in m.stride()[:-1]]


def options(kernel, x, n):
    """Launch options from the table; a state of 256 leaves no room for a second stage."""
    column = gpu(x.device)[0] if x.element_size() == 2 else "fp32"
    warps, stages = OPTIONS[kernel][column]
    return dict(num_warps=warps, num_stages=stages if n <= 128 else 1, maxnreg=255)


def tile_rows(x, n):
    """Tokens of a tile: 64, or 32 where registers or shared memory do not hold that many."""
    return 32 if x.element_size() == 4 or n > 128 and gpu(x.device)[0] < 9 else 64


def split_head_dim(p):
    """p as two powers of two, the second 0 or at least 16: 80 -> (64, 16), 64 -> (64, 0); else
    None.
    """
    p0 = 1 << p.bit_length() - 1
    p1 = p - p0
    return (p0, p1) if p0 >= 16 and (p1 == 0 or p1 >= 16 and p1.bit_count() == 1) else None


class _TritonScan(torch.autograd.Function):
    """The kernels in order. x (b, t, h, p), cs, dt (b, h, T), B, C (b, t, g, n), D (h,), S0 (b, h,
    p, n), doc (b, 1 + T) int32 or None -> y, final states. cs and dt have gradients of their own.
    """

    @staticmethod
    def forward(ctx, x, cs, dt, B, C, D, S0, doc, constants):
        ctx.save_for_backward(x, cs, dt, B, C, D, S0, doc)
        ctx.constants = constants
        b, t, h, p = x.shape

        # One program a head and row; segments of at least 8 chunks where that leaves a GPU empty.
        chunks = cs.shape[2] // constants["CHUNK"]
        segments = max(1, min(chunks // 8, gpu(x.device)[1] // (b * h)))
        tiles = -(-chunks // segments) * constants["CHUNK"] // constants["TILE"]
        segments = -(-cs.shape[2] // (tiles * constants["TILE"]))
        starts = S0
        if segments > 1:
            starts, _, _ = _states(x, B, cs, dt, doc, S0, tiles, constants, S0.dtype)
        y, S = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(S0)
        launch(_scan_kernel, (h, segments, b), x, B, C, cs, dt, doc, D, y, starts, S, t,
               cs.shape[2], h, h // B.shape[2], tiles, starts.stride(0), *strides(x, B, C),
               **constants, **options("scan", x, B.shape[3]))
        return y, S

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        x, cs, dt, B, C, D, S0, doc = ctx.saved_tensors
        t, dy, R = x.shape[1], walkable(dy), dS.contiguous()
        dx, dB, dC = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, B, C))
        dD, ddt, dcs, dcs_late = torch.zeros_like(D), *(torch.empty_like(cs) for _ in range(3))

        # Long sequences in spans, the last first: only one span's states are in memory.
        spans, entering = range(0, t, SPAN), [S0]
        if len(spans) > 1:
            every = SPAN // ctx.constants["TILE"]
            states, _, _ = _states(x, B, cs, dt, doc, S0, every, ctx.constants, S0.dtype)
            entering = states.unbind(1)
        for start, S in zip(reversed(spans), reversed(entering)):
            span = slice(start, start + SPAN)
            R, dD_span = _span_gradients(
                *(m[:, span] for m in (x, dy, B, C, dx, dB, dC)),
                *(m[:, :, span] for m in (cs, dt, dcs, dcs_late, ddt)),
                None if doc is None else doc[:, start:], D, S.contiguous(), R, ctx.constants)
            dD += dD_span
        return dx, dcs, ddt, dB, dC, dD, R, None, None


def _states(V, U, cs, dt, doc, first, every, constants, dtype, other=None):
    """States at every `every`-th tile (b, c, h, p, n), the last one, and <S, R>; with `other`
    backwards.
    """
    b, t, h, p = V.shape
    n, tiles = U.shape[3], cs.shape[2] // constants["TILE"]
    width = min(n, 64)
    chunks = -(-tiles // every)
    states = V.new_empty(b, chunks, h, p, n, dtype=dtype)
    inner = cs.new_empty(b, chunks, h, n // width)
    last = torch.empty_like(first)
    launch(_states_kernel, (n // width, h, b), V, U, cs, dt, doc, first, states, last, other, inner,
           t, cs.stride(1), h, h // U.shape[2], tiles, every, *strides(V, U), BN=width,
           REVERSE=other is not None, **constants, **options("states", V, n))
    return states, last, inner


def _span_gradients(x, dy, B, C, dx, dB, dC, cs, dt, dcs, dcs_late, ddt, doc, D, S0, dS,
                    constants):
    """The backward of one span: fills dx, dB, dC, dcs, ddt; returns the gradients of S0 and D."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    tile, every = constants["TILE"], constants["CHUNK"] // constants["TILE"]
    tiles = cs.shape[2] // tile

    S, _, _ = _states(x, B, cs, dt, doc, S0, every, constants, x.dtype)
    R, dS0, inner = _states(dy, C, cs, dt, doc, dS, every, constants, x.dtype, other=S)

    dG = x.new_empty(b, tiles, g, every, tile, tile)
    dend, dD = cs.new_empty(2, b, tiles, h)
    sizes = t, cs.stride(1), h, g, h // g
    launch(_dx_kernel, (tiles, g, b), x, dy, B, C, cs, dt, doc, D, R, dx, dG, ddt, dcs, dcs_late,
           dend, dD, *sizes, *strides(x, dy, B, C), dx.stride(0), **constants,
           **options("dx", x, n))
    common = dict(PARTS=inner.shape[3], **constants, **options("dBC", x, n))
    launch(_dBC_kernel, (tiles, g, b), dy, C, B, cs, dt, doc, S, dG, dC, dcs, dcs_late, dend, inner,
           *sizes, *strides(dy, C, B), dC.stride(0), FOR_B=False, **common)
    launch(_dBC_kernel, (tiles, g, b), x, None, C, cs, dt, doc, R, dG, dB, None, None, None, None,
           *sizes, *strides(x, B, C), dB.stride(0), FOR_B=True, **common)
    return dS0, dD.sum((0, 1))


def walkable(m):
    """m (b, t, heads, .) as the kernels read it: unit stride last, a tile's rows and a row's heads
    within 32-bit reach.
    """
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
                f"and at most {most} numbers a head in {str(x.dtype)[6:]}")
    if not TRITON:
        return "triton is not here: it comes with CUDA builds of torch, or with TRITON_INTERPRET=1"
    if not x.is_cuda and not INTERPRETED:
        return f"x is on {x.device}; the kernels run on CUDA, elsewhere with TRITON_INTERPRET=1"
    if x.is_cuda and gpu(x.device)[0] not in (8, 9):
        return (f"a GPU of compute capability {gpu(x.device)[0]}.x; the kernels are made for 8.x "
                f"and 9.x (A10G, A100, H100, H200)")
    return None


def ssd_triton(x, dt, A, B, C, D=None, *, initial_states=None, seq_idx=None, chunk_size=128):
    """The scan by GPU kernels, forward and backward; the same bits every time. (torch counts its
    own cumsum on CUDA, which is used here, among what is not deterministic.)

    Arguments, results and errors as in `ssd_recurrent`; and ValueError, saying what is supported,
    for dtypes, head dims, states and devices that the kernels do not take, and for inputs of
    several devices or x, B and C of several dtypes. dt, A, D and the states are read as fp32.
    chunk_size is how far apart the states are that the backward keeps, as one or two tiles (of 64
    tokens, of 32 in fp32); the results do not depend on it.
    """
    S0, doc = _prepare(x, dt, A, B, C, D, initial_states, seq_idx)
    reason = unsupported(x, B)
    devices = {m.device for m in (x, dt, A, B, C, D, initial_states, seq_idx) if m is not None}
    if len(devices) > 1:
        reason = f"inputs are on {', '.join(sorted(map(str, devices)))}: all must be on one device"
    if not x.dtype == B.dtype == C.dtype:
        reason = f"x is {x.dtype}, B {B.dtype} and C {C.dtype}: they must be of one dtype"
    if reason:
        raise ValueError(reason)

    p0, p1 = split_head_dim(x.shape[3])
    tile = tile_rows(x, B.shape[3])
    chunk = tile if chunk_size < 2 * tile else 2 * tile
    constants = dict(P0=p0, P1=p1, N=B.shape[3], TILE=tile, CHUNK=chunk, PACKED=doc is not None)

    # (b, h, T) of whole chunks; padding has dt = 0: it neither decays nor adds.
    padding = -x.shape[1] % chunk
    dt = F.pad(dt.float().transpose(1, 2), (0, padding)).contiguous()
    cs = (dt * A.float()[:, None]).unflatten(2, (-1, chunk)).cumsum(3).flatten(2)
    if doc is not None:
        doc = torch.cat([doc[:, :1], doc, doc[:, -1:].expand(-1, padding)], 1).int()
    D = x.new_zeros(x.shape[2], dtype=torch.float32) if D is None else D.float()
    return _TritonScan.apply(walkable(x), cs, dt, walkable(B), walkable(C), D.contiguous(),
                             S0.contiguous(), doc, constants)


BACKENDS["triton"] = ssd_triton


# ------------------------------------------------------------------------------------------------
# Triton: what surrounds the scan

# The convolution, the gated norm and the decode step do a few operations a number: they are as fast
# as their bytes. Each reads its inputs once and writes its result once, where torch would write and
# read what is between two operations.


@jit
def _conv_input(x, before, i, start, ch, valid, t, x_t, channels, W: constexpr):
    """Input rows start + i, fp32: x, before its first row the state, elsewhere outside 0."""
    rows, wide = start + i[:, None], valid[None, :]
    v = tl.load(x + i[:, None] * x_t + ch[None, :], mask=(rows >= 0) & (rows < t) & wide,
                other=0.0).to(tl.float32)
    if start < W:
        v += tl.load(before + (rows + W - 1) * channels + ch[None, :],
                     mask=(rows > -W) & (rows < 0) & wide, other=0.0).to(tl.float32)
    return v


@jit
def _document(doc, i, start, t):
    """Document numbers of rows start + i; the rows before belong to document 0."""
    return tl.load(doc + i, mask=(start + i >= 0) & (start + i < t), other=0)


@jit
def _conv_sum(x, w, bias, before, doc, i, start, ch, valid, t, x_t, channels,
              W: constexpr, PACKED: constexpr):
    """bias + sum over m < W of w_m x_{i - m}, for rows start + i and channels ch."""
    total = tl.load(bias + ch, mask=valid, other=0.0).to(tl.float32)[None, :]
    for m in tl.static_range(W):
        tap = tl.load(w + (W - 1 - m) * channels + ch, mask=valid, other=0.0)
        v = _conv_input(x, before, i - m, start, ch, valid, t, x_t, channels, W)
        if PACKED:
            same = _document(doc, i, start, t) == _document(doc, i - m, start, t)
            v = tl.where(same[:, None], v, 0.0)
        total += tap.to(tl.float32)[None, :] * v
    return total


@jit
def _conv_kernel(x, w, bias, before, doc, y, t, channels, x_b, x_t,
                 W: constexpr, TILE: constexpr, WIDTH: constexpr, PACKED: constexpr):
    """Program (tile of tokens, tile of channels, row): y = silu(convolution)."""
    k, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i, ch = tl.arange(0, TILE), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start, valid = k * TILE, ch < channels
    x += row * x_b + start.to(tl.int64) * x_t
    y += (row * t + start) * channels
    if PACKED:
        doc += row * t + start
    before += row * (W - 1) * channels
    total = _conv_sum(x, w, bias, before, doc, i, start, ch, valid, t, x_t, channels, W, PACKED)
    tl.store(y + i[:, None] * channels + ch[None, :],
             (total * tl.sigmoid(total)).to(y.dtype.element_ty),
             mask=(start + i < t)[:, None] & valid[None, :])


@jit
def _conv_backward_kernel(x, w, bias, before, doc, dy, dx, dbefore, dw, t, channels, x_b, x_t,
                          dy_b, dy_t, W: constexpr, TILE: constexpr, WIDTH: constexpr,
                          STEPS: constexpr, PACKED: constexpr):
    """Program (STEPS tiles of tokens, tile of channels, row), rows from -(W - 1) on.

    Writes dx, dbefore (b, W - 1, channels) and its share dw (b, programs, W + 1, channels) of the
    weights' gradients, the bias's last.
    """
    row = tl.program_id(2).to(tl.int64)
    i, ch = tl.arange(0, TILE), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid = ch < channels
    before += row * (W - 1) * channels
    share = (row * tl.num_programs(0) + tl.program_id(0)) * (W + 1) * channels
    dw += share + tl.arange(0, 8)[:, None] * channels + ch[None, :]
    tap = tl.arange(0, 8)[:, None]                              # W + 1 <= 8 rows of gradients
    grads = tl.zeros((8, WIDTH), tl.float32)

    for step in range(0, STEPS):
        start = (tl.program_id(0) * STEPS + step) * TILE - (W - 1)
        far = start.to(tl.int64)
        xs, dys, docs = x + row * x_b + far * x_t, dy + row * dy_b + far * dy_t, doc
        if PACKED:
            docs += row * t + start
        dv = tl.zeros((TILE, WIDTH), tl.float32)
        for s in tl.static_range(W):                            # what row i gives to row i + s
            total = _conv_sum(xs, w, bias, before, docs, i + s, start, ch, valid, t, x_t,
                              channels, W, PACKED)
            there = (start + i + s >= 0) & (start + i + s < t)
            dtotal = tl.load(dys + (i + s)[:, None] * dy_t + ch[None, :],
                             mask=there[:, None] & valid[None, :], other=0.0).to(tl.float32)
            gate = tl.sigmoid(total)
            dtotal *= gate * (1.0 + total * (1.0 - gate))
            if s == 0:
                grads += tl.where(tap == W, tl.sum(dtotal, 0)[None, :], 0.0)
                for m in tl.static_range(W):
                    v = _conv_input(xs, before, i - m, start, ch, valid, t, x_t, channels, W)
                    if PACKED:
                        same = _document(docs, i, start, t) == _document(docs, i - m, start, t)
                        v = tl.where(same[:, None], v, 0.0)
                    grads += tl.where(tap == W - 1 - m, tl.sum(dtotal * v, 0)[None, :], 0.0)
            if PACKED:
                same = _document(docs, i, start, t) == _document(docs, i + s, start, t)
                dtotal = tl.where(same[:, None], dtotal, 0.0)
            taps = tl.load(w + (W - 1 - s) * channels + ch, mask=valid, other=0.0).to(tl.float32)
            dv += taps[None, :] * dtotal

        rows = start + i
        tl.store(dx + (row * t + far) * channels + i[:, None] * channels + ch[None, :],
                 dv.to(dx.dtype.element_ty),
                 mask=((rows >= 0) & (rows < t))[:, None] & valid[None, :])
        tl.store(dbefore + (row * (W - 1) + rows + W - 1)[:, None] * channels + ch[None, :],
                 dv.to(dbefore.dtype.element_ty), mask=(rows < 0)[:, None] & valid[None, :])
    tl.store(dw, grads, mask=(tap <= W) & valid[None, :])


CONV_ROWS = 16      # tokens of a tile: registers hold it and the six rows around it


class _ConvSiluTriton(torch.autograd.Function):
    """`_ConvSilu` in one kernel each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, before, doc):
        doc = None if doc is None else doc.int().contiguous()
        x = x if x.stride(2) == 1 else x.contiguous()
        weight, bias, before = weight.t().contiguous(), bias.contiguous(), before.contiguous()
        ctx.save_for_backward(x, weight, bias, before, doc)
        b, t, channels = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        grid = -(-t // CONV_ROWS), -(-channels // 128), b
        launch(_conv_kernel, grid, x, weight, bias, before, doc, y, t, channels, *strides(x),
               W=len(weight), TILE=CONV_ROWS, WIDTH=128, PACKED=doc is not None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, before, doc = ctx.saved_tensors
        b, t, channels = x.shape
        width, steps = len(weight), 8
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        dx, dbefore = (torch.empty_like(m, memory_format=torch.contiguous_format)
                       for m in (x, before))
        grid = -(-(t + width - 1) // (CONV_ROWS * steps)), -(-channels // 64), b
        dw = weight.new_empty(b, grid[0], width + 1, channels, dtype=torch.float32)
        launch(_conv_backward_kernel, grid, x, weight, bias, before, doc, dy, dx, dbefore, dw, t,
               channels, *strides(x, dy), W=width, TILE=CONV_ROWS, WIDTH=64, STEPS=steps,
               PACKED=doc is not None)
        dw = dw.sum((0, 1))
        return dx, dw[:width].t().to(weight.dtype), dw[width].to(bias.dtype), dbefore, None


@jit
def _norm_kernel(y, z, w, out, eps, y_t, z_t, d, SIZE: constexpr, BLOCK: constexpr):
    """Program (row, group): out = w s / rms(s) with s = y silu(z)."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, ok = tl.program_id(1) * SIZE + c, c < SIZE
    s = tl.load(y + row * y_t + at, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_t + at, mask=ok, other=0.0).to(tl.float32)
    s *= gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(s * s) / SIZE + eps)
    s *= scale * tl.load(w + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * d + at, s.to(out.dtype.element_ty), mask=ok)


@jit
def _norm_backward_kernel(y, z, w, dout, dy, dz, dw, eps, y_t, z_t, dout_t, d, rows,
                          SIZE: constexpr, BLOCK: constexpr, ROWS: constexpr):
    """Program (ROWS rows, group); dw (programs, d) is its share of the weight's gradient."""
    c = tl.arange(0, BLOCK)
    at, ok = tl.program_id(1) * SIZE + c, c < SIZE
    weight = tl.load(w + at, mask=ok, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        v = tl.load(y + row * y_t + at, mask=ok, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_t + at, mask=ok, other=0.0).to(tl.float32)
        m = tl.load(dout + row * dout_t + at, mask=ok, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        s = v * gate * open_
        scale = tl.rsqrt(tl.sum(s * s) / SIZE + eps)
        s *= scale
        share += m * s
        m *= weight
        ds = (m - s * (tl.sum(m * s) / SIZE)) * scale
        tl.store(dy + row * d + at, (ds * gate * open_).to(dy.dtype.element_ty), mask=ok)
        ds *= v * open_ * (1.0 + gate * (1.0 - open_))
        tl.store(dz + row * d + at, ds.to(dz.dtype.element_ty), mask=ok)
    tl.store(dw + tl.program_id(0).to(tl.int64) * d + at, share, mask=ok)


class _GatedGroupNormTriton(torch.autograd.Function):
    """`_GatedGroupNorm` in one kernel each way."""

    @staticmethod
    def forward(ctx, y, z, weight, n_groups, eps):
        y, z = (m if m.stride(1) == 1 else m.contiguous() for m in (y, z))
        weight = weight.contiguous()
        ctx.save_for_backward(y, z, weight)
        ctx.n_groups, ctx.eps = n_groups, eps
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        size = y.shape[1] // n_groups
        launch(_norm_kernel, (len(y), n_groups), y, z, weight, out, eps, *strides(y, z),
               y.shape[1], SIZE=size, BLOCK=power_of_two(size))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, weight = ctx.saved_tensors
        rows, d = y.shape
        dout = dout if dout.stride(1) == 1 else dout.contiguous()
        dy, dz = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (y, z))
        size, block = d // ctx.n_groups, 16
        dw = weight.new_empty(-(-rows // block), d, dtype=torch.float32)
        launch(_norm_backward_kernel, (len(dw), ctx.n_groups), y, z, weight, dout, dy, dz, dw,
               ctx.eps, *strides(y, z, dout), d, rows, SIZE=size, BLOCK=power_of_two(size),
               ROWS=block)
        return dy, dz, dw.sum(0).to(weight.dtype), None, None


def power_of_two(size):
    """The smallest power of two that is at least size."""
    return 1 << (size - 1).bit_length()


@jit
def _conv_token(xBC, conv, w, bias, ch, ok, conv_c, conv_t, W: constexpr):
    """silu(convolution) of some channels of one token, and its input."""
    new = tl.load(xBC + ch, mask=ok, other=0.0)
    total = tl.load(bias + ch, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(w + ch * W + W - 1, mask=ok, other=0.0).to(tl.float32) * new
    for k in tl.static_range(W - 1):
        old = tl.load(conv + ch * conv_c + k * conv_t, mask=ok, other=0.0).to(tl.float32)
        total += tl.load(w + ch * W + k, mask=ok, other=0.0).to(tl.float32) * old
    return total * tl.sigmoid(total), new


@jit
def _conv_shift(conv, ch, ok, new, conv_c, conv_t, W: constexpr):
    """The state moves by one token."""
    for k in tl.static_range(W - 2):
        old = tl.load(conv + ch * conv_c + (k + 1) * conv_t, mask=ok)
        tl.store(conv + ch * conv_c + k * conv_t, old, mask=ok)
    tl.store(conv + ch * conv_c + (W - 2) * conv_t, new.to(conv.dtype.element_ty), mask=ok)


@jit
def _step_kernel(xBC, dt, conv, state, w, bias, dt_bias, A_log, D, y, tickets, h, p, g,
                 xBC_b, dt_b, conv_b, conv_c, conv_t, N: constexpr, BN: constexpr, W: constexpr,
                 BP: constexpr):
    """Program (BP channels of a head, head, row): a layer's token between its two projections.

    A group's B and C are read by all its programs, so the last of them to finish, by ticket, moves
    their convolution state; a head's own channels have one reader. The ticket counts to the number
    of programs and back to 0, whatever their order: nothing depends on it.
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r, n = h // g, tl.arange(0, BN)
    group = head // r
    own = part * BP + tl.arange(0, BP)
    ok, all_n = own < p, n < N
    xBC += row * xBC_b
    conv += row * conv_b
    ch_x, ch_B = head * p + own, h * p + group * N + n
    ch_C = ch_B + g * N
    x, x_new = _conv_token(xBC, conv, w, bias, ch_x, ok, conv_c, conv_t, W)
    B, B_new = _conv_token(xBC, conv, w, bias, ch_B, all_n, conv_c, conv_t, W)
    C, C_new = _conv_token(xBC, conv, w, bias, ch_C, all_n, conv_c, conv_t, W)

    # softplus = max(v, 0) + log(1 + e^-|v|); the quotient makes up for the rounding of 1 + e.
    v = tl.load(dt + row * dt_b + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    e = tl.exp(-tl.abs(v))
    log1p = tl.where(1.0 + e == 1.0, e, tl.log(1.0 + e) * e / tl.maximum(1.0 + e - 1.0, 1e-30))
    step = tl.maximum(v, 0.0) + log1p

    at = state + (row * h + head) * p * N + own[:, None] * N + n[None, :]
    inside = ok[:, None] & all_n[None, :]
    S = tl.load(at, mask=inside, other=0.0)
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    S = tl.exp(step * A) * S + (step * x)[:, None] * B[None, :]
    tl.store(at, S, mask=inside)
    out = tl.sum(S * C[None, :], 1) + tl.load(D + head).to(tl.float32) * x
    tl.store(y + (row * h + head) * p + own, out.to(y.dtype.element_ty), mask=ok)

    tl.debug_barrier()                                          # every thread has read the state
    _conv_shift(conv, ch_x, ok, x_new, conv_c, conv_t, W)
    last = r * tl.num_programs(0) - 1
    if tl.atomic_add(tickets + row * g + group, 1) == last:
        _conv_shift(conv, ch_B, all_n, B_new, conv_c, conv_t, W)
        _conv_shift(conv, ch_C, all_n, C_new, conv_c, conv_t, W)
        tl.store(tickets + row * g + group, 0)


TICKETS = {}        # zeros between launches; one set a stream, whose launches do not overlap


def tickets_for(x, count):
    """Zeros for a launch on the current stream. A CUDA graph gets its own and zeroes them at every
    replay: it is captured on one stream and may be replayed on several.
    """
    zeros = lambda: torch.zeros(count, dtype=torch.int32, device=x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return zeros()
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0, count
    if key not in TICKETS:
        TICKETS[key] = zeros()
    return TICKETS[key]


def conv_ssd_step(xBC, dt, conv_state, ssm_state, weight, bias, dt_bias, A_log, D):
    """One token of a layer between its projections, one launch: convolution, softplus, state, D.

    xBC (b, h p + 2 g n) and dt (b, h) as in_proj gives them; conv_state (b, channels, width - 1)
    and ssm_state (b, h, p, n), contiguous, go on in place; weight (channels, width), bias, dt_bias,
    A_log, D -> y (b, h, p) in xBC's dtype. Equals `causal_conv1d` and `ssd_step`; no gradients.
    """
    b, h, p, n = ssm_state.shape
    g = (xBC.shape[1] - h * p) // (2 * n)
    y = xBC.new_empty(b, h, p)
    tickets = tickets_for(xBC, b * g)
    launch(_step_kernel, (-(-p // 16), h, b), xBC, dt, conv_state, ssm_state, weight, bias,
           dt_bias, A_log, D, y, tickets, h, p, g, *strides(xBC, dt), *conv_state.stride(),
           N=n, BN=power_of_two(n), W=weight.shape[1], BP=16)
    return y


# ------------------------------------------------------------------------------------------------
# python ssm.py: how far every form is from fp64, and what it costs


def ssd_textbook(x, dt, A, B, C, chunk_size=128):
    """The chunked form as the paper lists it, all chunks at once, gradients by autograd: what the
    hand-derived backward is measured against. t must be a multiple of chunk_size."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    c, l, r = t // chunk_size, chunk_size, h // g
    u, a = discretize(x, dt, A)
    u, B, C = u.view(b, c, l, g, r, p), B.reshape(b, c, l, g, n), C.reshape(b, c, l, g, n)
    a = a.view(b, c, l, h).permute(0, 3, 1, 2).cumsum(-1).view(b, g, r, c, l)
    causal = torch.ones(l, l, dtype=torch.bool, device=x.device).tril()

    L = (a[..., :, None] - a[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    scores = torch.einsum("bcign,bcjgn->bgcij", C, B)[:, :, None] * L       # (b, g, r, c, l, l)
    y = torch.einsum("bgrcij,bcjgrp->bcigrp", scores, u)
    states = torch.einsum("bclgn,bgrcl,bclgrp->bcgrpn", B, (a[..., -1:] - a).exp(), u)
    S, entering = torch.zeros_like(states[:, 0]), []
    for i in range(c):
        entering.append(S)
        S = a[..., i, -1, None, None].exp() * S + states[:, i]
    y = y + torch.einsum("bclgn,bcgrpn,bgrcl->bclgrp", C, torch.stack(entering, 1), a.exp())
    return y.reshape(b, t, h, p), S.reshape(b, h, p, n)


def random_inputs(b, t, h, p, g, n, dtype=torch.float32, device="cpu"):
    """x, dt, A, B, C, D as a fresh layer would make them, each asking for a gradient; dt, A, D at
    least fp32.
    """
    fine = torch.promote_types(dtype, torch.float32)
    x, B, C = (torch.randn(*s, dtype=dtype) for s in ((b, t, h, p), (b, t, g, n), (b, t, g, n)))
    dt = torch.empty(b, t, h, dtype=fine).uniform_(math.log(1e-3), math.log(0.1)).exp_()
    A, D = -torch.empty(h, dtype=fine).uniform_(1, 16), torch.randn(h, dtype=fine)
    return [m.to(device).requires_grad_() for m in (x, dt, A, B, C, D)]


def relative_error(value, truth):
    """RMS of the difference over RMS of the truth, in fp64."""
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def agreement(device="cpu", shape=(2, 300, 4, 64, 2, 32)):
    """{form: {tensor: relative error}} against ssd_recurrent in fp64 on the same rounded inputs,
    gradients too.
    """
    b, t, h, p, g, n = shape
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate"]
    rows = {}
    for form, dtype in [(ssd_recurrent, torch.float32), (ssd_quadratic, torch.float32),
                        (ssd_chunked, torch.float64), (ssd_chunked, torch.float32),
                        (ssd_chunked, torch.bfloat16)]:
        inputs = random_inputs(*shape, dtype=dtype, device=device)
        inputs.append(torch.randn_like(inputs[1].new_empty(b, h, p, n)).requires_grad_())
        dy = torch.randn_like(inputs[0])
        results = []
        for f, cast in ((form, lambda m: m), (ssd_recurrent, lambda m: m.double())):
            leaves = [cast(m.detach()).requires_grad_() for m in inputs]
            y, S = f(*leaves[:6], initial_states=leaves[6])
            results.append([y, S,
                            *torch.autograd.grad([y, S], leaves, [cast(dy), torch.ones_like(S)])])
        errors = map(relative_error, *results)
        rows[f"{form.__name__[4:]} {str(dtype)[6:]}"] = dict(zip(names, errors))
    return rows


def median_seconds(f, device="cpu", repeats=5):
    """Median wall time of f() after one warm-up, device synchronised."""
    import time
    sync = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    f()
    times = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        f()
        sync()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


@torch.no_grad()
def time_against_length(lengths, device="cpu", h=8, p=64, g=2, n=64):
    """{form: {t: seconds}} for one sequence, forward; causal attention has the same heads and head
    dim.
    """
    def attention(x, *_):
        q = x.transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)
    forms = {"recurrent": (ssd_recurrent, 1024), "quadratic": (ssd_quadratic, 2048),
             "chunked": (ssd_chunked, 2 ** 30), "attention": (attention, 2 ** 30)}
    table = {name: {} for name in forms}
    for t in lengths:
        inputs = random_inputs(1, t, h, p, g, n, device=device)
        for name, (form, longest) in forms.items():
            if t <= longest:
                table[name][t] = median_seconds(lambda: form(*inputs), device)
    return table


def fitted_slope(times):
    """Exponent e of time ~ t^e, least squares in log-log over the longer half of the lengths."""
    t = sorted(times)[len(times) // 2 - 1:]
    x = torch.tensor([math.log(i) for i in t])
    y = torch.tensor([math.log(times[i]) for i in t])
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / x.square().sum()).item()


def backward_cost(device="cpu", shape=(4, 1024, 16, 64, 1, 128), chunks=(32, 64, 128)):
    """{chunk: {version: (forward, forward + backward) seconds}} of the hand-derived scan and the
    textbook one.
    """
    table = {}
    for chunk in chunks:
        table[chunk] = {}
        for name, form in (("textbook, autograd", ssd_textbook), ("by hand", ssd_chunked)):
            inputs = random_inputs(*shape, device=device)[:5]
            dy = torch.randn_like(inputs[0])
            forward = lambda: form(*inputs, chunk_size=chunk)[0]
            both = lambda: torch.autograd.grad(forward(), inputs, dy)
            table[chunk][name] = median_seconds(forward, device), median_seconds(both, device)
    return table


def plot_times(table, path):
    """Log-log time against length with the fitted exponents in the legend."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, times in table.items():
        axis.loglog(list(times), [1e3 * s for s in times.values()], "o-",
                    label=f"{name}: time ~ t^{fitted_slope(times):.2f}")
    axis.set(xlabel="sequence length t [tokens]", ylabel="forward time [ms]",
             title="The chunked scan is linear in t, attention is not")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------
# python ssm.py --bench: what the kernels move and multiply, and how long that takes


GPUS = {    # GiB as torch reports them, rounded down; GB/s and dense bf16 TFLOP/s of data sheets
    "a10g": (22.06, 600, 70),
    "l4": (22.0, 300, 121),
    "rtx4090": (23.5, 1008, 165),
    "a100": (79.1, 2039, 312),
    "h100": (79.1, 3350, 989),
    "h200": (139.0, 4800, 989),
}
BENCH_SHAPES = {"9B": (128, 80, 8, 128), "8B": (128, 64, 8, 128)}       # h, p, g, n


def scan_costs(h, p, g, n, chunk=128, tile=64):
    """{operation: (compulsory bytes, {kernel: bytes}, FLOPs)} a token, bf16 inputs, fp32 states.

    Compulsory: every input and output once. By kernel: every tensor once a kernel, as if a kernel's
    second reads came from L2. FLOPs: whole tiles, scores per head, as multiplied.
    """
    x, BC, dt, line = 2 * h * p, 2 * g * n, 2 * h, 4 * h        # bf16, bf16, bf16, fp32 (b, h, t)
    S, dG, late = 2 * h * p * n / chunk, 2 * g * tile, 1 - tile / chunk
    dG *= 1 + late
    forward = {"torch": dt + 7 * line, "scan": 2 * x + 2 * BC + 2 * line}
    backward = {"states": x + BC + 2 * line + S, "states back": x + BC + line + 2 * S,
                "dx": 3 * x + 2 * BC + S + (4 + late) * line + dG,
                "dC": x + S + 3 * BC + (3 + late) * line + dG,
                "dB": x + S + 2 * BC + 2 * line + dG, "torch": 18 * line + dt}
    step = {"step": 2 * 4 * h * p * n + 2 * x + 2 * BC + dt + 2 * 3 * (x + 2 * BC)}
    state, scores_x, scores = 2 * h * n * p, 2 * h * tile * p, 2 * tile * n
    return {
        "forward": (2 * x + 2 * BC + dt, forward, 2 * state + scores_x + h * scores),
        "backward": (3 * x + 4 * BC + 2 * dt, backward,
                     5 * state + 2 * (1 + late) * scores_x + 3 * (1 + late) * g * scores),
        "decode": (step["step"], step, 2 * state),
    }


def other_scans():
    """{name: scan(x, dt, A, B, C, D) -> y} of the packages that can be imported."""
    scans = {}
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        scans["mamba_ssm"] = lambda x, dt, A, B, C, D: mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, D=D)
    except ImportError:
        pass
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        def gated_linear_attention(x, dt, A, B, C, D):
            """Heads of their own B and C; dt x as values, dt A as gates; D x outside."""
            k, q = (m.repeat_interleave(x.shape[2] // m.shape[2], 2) for m in (B, C))
            y, _ = chunk_simple_gla(q, k, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)
            return y + (x * D[:, None]).to(x.dtype)
        scans["fla"] = gated_linear_attention
    except ImportError:
        pass
    return scans


def time_scans(shape, t, device):
    """{scan: (forward, backward) seconds} for one bf16 sequence; a scan that disagrees is left
    out."""
    h, p, g, n = shape
    inputs = random_inputs(1, t, h, p, g, n, torch.bfloat16, device)
    scans = {"triton": lambda *leaves: ssd_triton(*leaves)[0],
             "chunked": lambda *leaves: ssd_chunked(*leaves)[0]} | other_scans()
    with torch.no_grad():
        truth = scans["chunked"](*inputs)
    times = {}
    for name, scan in scans.items():
        try:
            with torch.no_grad():
                if (error := relative_error(scan(*inputs), truth)) > 2e-2:
                    print(f"{name} is off by {error:.1e}: not timed")
                    continue
                forward = median_seconds(lambda: scan(*inputs), device)
            y = scan(*inputs)
            backward = median_seconds(
                lambda: torch.autograd.grad(y, inputs, truth, retain_graph=True), device)
            times[name] = forward, backward
        except torch.cuda.OutOfMemoryError:
            print(f"{name} needs more memory than there is at t = {t}: not timed")
    return times


@torch.no_grad()
def time_steps(shape, device):
    """{decode step: seconds} of one token's work between the projections, one row, bf16."""
    h, p, g, n = shape
    layer = Mamba2(64, h, p, n, g).to(device)
    layer.conv1d.bfloat16()
    xBC, dt = torch.randn(1, layer.conv_dim, device=device).bfloat16(), torch.randn(1, h).to(device)
    conv = torch.zeros(1, layer.conv_dim, 3, device=device).bfloat16()
    state, weight = torch.zeros(1, h, p, n, device=device), layer.conv1d.weight.squeeze(1)

    def in_torch():
        x, B, C = layer.split_groups(layer.conv_step(xBC, conv))
        step = F.softplus(dt + layer.dt_bias)
        return ssd_step(state, x, step, -layer.A_log.exp(), B, C, layer.D)
    steps = {"triton": lambda: conv_ssd_step(xBC, dt, conv, state, weight, layer.conv1d.bias,
                                             layer.dt_bias, layer.A_log, layer.D),
             "torch": in_torch}
    try:
        from causal_conv1d import causal_conv1d_update
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        A = -layer.A_log.exp()[:, None, None].expand(h, p, n)
        bias, D = (m[:, None].expand(h, p) for m in (layer.dt_bias, layer.D))

        def in_mamba_ssm():
            mixed = causal_conv1d_update(xBC, conv, weight, layer.conv1d.bias, "silu")
            x, B, C = layer.split_groups(mixed)
            return selective_state_update(state, x, dt[..., None].expand(1, h, p), A, B, C, D,
                                          dt_bias=bias, dt_softplus=True)
        steps["mamba_ssm"] = in_mamba_ssm
    except ImportError:
        pass
    return {name: median_seconds(step, device, repeats=20) for name, step in steps.items()}


def bench(device, lengths):
    """Prints counts, rooflines and times; returns them as a dict for the JSON line."""
    cuda = str(device).startswith("cuda")
    device_name = torch.cuda.get_device_name(device) if cuda else "no CUDA device"
    words = re.split(r"[^a-z0-9]+", device_name.lower().replace("rtx ", "rtx"))
    known = [name for name in GPUS if name in words]
    gpus, result = known or ["a10g", "h100", "h200"], dict(device=device_name)
    print(f"on {device_name}; " + ("medians of 5" if cuda else "times: not measured") + "\n"
          "bytes and FLOPs a token of one layer's scan, bf16; us the longer of compulsory bytes at "
          "the data sheet's bandwidth and FLOPs at its peak, in brackets its share of the time\n")
    for shape, sizes in BENCH_SHAPES.items():
        result[shape] = {}
        scans = {t: time_scans(sizes, t, device) for t in lengths} if cuda else {}
        measured = {"forward": {t: {k: s[0] for k, s in scans[t].items()} for t in scans},
                    "backward": {t: {k: s[1] for k, s in scans[t].items()} for t in scans},
                    "decode": {1: time_steps(sizes, device)} if cuda else {}}
        for operation, (floor, kernels, flops) in scan_costs(*sizes).items():
            moved, seconds = sum(kernels.values()), measured[operation]
            best = {gpu: max(floor / GPUS[gpu][1] / 1e9, flops / GPUS[gpu][2] / 1e12)
                    for gpu in gpus}
            print(f"{shape} {operation:9s} compulsory {floor:10,.0f} B   moved {moved:10,.0f} B "
                  f"({moved / floor:.2f} x)   {flops / 1e6:6.2f} MFLOP")
            print("   " + "   ".join(f"{name} {b:,.0f}" for name, b in kernels.items()))
            for t in lengths if operation != "decode" else [1]:
                row = f"   t {t:7,d}   roofline " + "   ".join(
                    f"{gpu} {1e6 * t * s:9.1f} us" for gpu, s in best.items())
                for name, s in seconds.get(t, {}).items():
                    row += f"   {name} {1e6 * s:9.1f} us"
                    row += f" ({t * best[known[0]] / s:.0%})" if known else ""
                print(row, flush=True)
            result[shape][operation] = dict(compulsory=floor, bytes=moved, flops=flops,
                                            roofline_s=best, seconds=seconds)
    return result


def main(argv=None):
    import argparse
    import json
    import pathlib
    parser = argparse.ArgumentParser(description="Agreement and speed of the Mamba-2 scan's forms.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--out", default="out", help="folder for ssm.png")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--quick", action="store_true", help="lengths to 1024 and one chunk size")
    parser.add_argument("--bench", action="store_true",
                        help="bytes, FLOPs, rooflines of the GPU kernels; on a GPU also times")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    if args.bench:
        lengths = [2048] if args.quick else [2048, 8192, 32768, 131072]
        print(json.dumps(dict(bench=bench(args.device, lengths))))
        return
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)

    print("relative error against the fp64 recurrence, fed the same rounded inputs")
    rows = agreement(args.device)
    print(f"{'form':20s}" + "".join(f"{name:>9s}" for name in next(iter(rows.values()))))
    for form, errors in rows.items():
        print(f"{form:20s}" + "".join(f"{e:9.1e}" for e in errors.values()))

    lengths = [2 ** i for i in range(7, 11 if args.quick else 15)]
    print(f"\nforward ms on {args.device}, {torch.get_num_threads()} threads: 1 sequence, 8 heads "
          f"x 64, state 64")
    table = time_against_length(lengths, args.device)
    print(f"{'t':>10s}" + "".join(f"{t:9d}" for t in lengths))
    for form, times in table.items():
        cells = (f"{1e3 * times[t]:9.2f}" if t in times else f"{'-':>9s}" for t in lengths)
        print(f"{form:>10s}" + "".join(cells) + f"   ~ t^{fitted_slope(times):.2f}")
    picture = pathlib.Path(args.out) / "ssm.png"
    plot_times(table, picture)

    print("\nms of the scan alone at b 4, t 1024, h 16, p 64, n 128, one group: forward, forward "
          "+ backward")
    cost = backward_cost(args.device, chunks=(64,) if args.quick else (32, 64, 128))
    for chunk, versions in cost.items():
        cells = (f"{name} {1e3 * f:6.1f} {1e3 * fb:6.1f}" for name, (f, fb) in versions.items())
        print(f"chunk {chunk:4d}   " + "   ".join(cells))
    best = {name: min(v[name][1] for v in cost.values()) for name in next(iter(cost.values()))}
    print(f"best of each: {', '.join(f'{name} {1e3 * s:.1f}' for name, s in best.items())}; "
          f"ratio {best['textbook, autograd'] / best['by hand']:.2f}\nplot: {picture}")

    print(json.dumps(dict(agreement={form: max(e.values()) for form, e in rows.items()},
                          speed={form: max(t / s for t, s in times.items()) for form,
                                 times in table.items()},
                          scan_ms={name: 1e3 * s for name, s in best.items()})))


if __name__ == "__main__":
    main()
