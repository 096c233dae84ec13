"""Mamba-2: the scan in three forms, its backward by hand, one-token decode, the layer.

A Mamba-2 head keeps a matrix-valued state and forgets it at a rate it computes from the input:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          S (p, n), A < 0 a scalar per head
    y_t = S_t C_t + D x_t

which is linear attention with decay: unrolled, y_t is a sum over s <= t of (C_t . B_s) times the
decay between s and t times dt_s x_s. Everything below is that one sentence, evaluated four ways.

    ssd_recurrent   token by token             O(t) work, no matmuls       the definition
    ssd_quadratic   the (t, t) score matrix    O(t^2) work, all matmuls    the insight
    ssd_chunked     quadratic inside chunks,   O(t l) work, all matmuls    trains and prefills
                    recurrent between them
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

Left out: sequence parallelism; double backward through ssd_chunked (the other two have it).

    python ssm.py               agreement and speed tables, out/ssm.png    45 s on 2 cores
    python ssm.py --quick       the same with fewer lengths                10 s
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

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
    With W = dM * M, strictly lower since the diagonal's exponent is the constant 0, and
    w_i = <u_i, tail_i B_i R>:

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

    backend: "auto", "chunked", "quadratic" or "recurrent"; "auto" is "chunked" until the GPU
    kernels are here.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    extra = dict(chunk_size=chunk_size) if backend in ("auto", "chunked") else {}
    form = BACKENDS.get(backend, ssd_chunked)
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
    return _ConvSilu.apply(x, weight, bias, before, documents(seq_idx)), final_states


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

    The order and the groups both matter: with one group the difference is invisible, and every
    Mamba-2 checkpoint before Nemotron-H had one. weight (d,); eps float.
    """
    if y.shape[-1] % n_groups:
        raise ValueError(f"{y.shape[-1]} channels cannot form {n_groups} groups of equal size")
    rows = y.reshape(-1, y.shape[-1]), z.reshape(-1, y.shape[-1])
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
        dt = F.softplus(dt.to(accumulator(x)) + self.dt_bias)                # (b, t, h)
        A = -self.A_log.to(dt.dtype).exp()

        # One token with a state: the recurrence itself, everything in place.
        if t == 1 and ssm_state is not None:
            xs, B, C = self.split_groups(self.conv_step(xBC[:, 0], conv_state))
            y = ssd_step(ssm_state, xs, dt[:, 0], A, B, C, self.D)
            return self.out_proj(self.norm(y.view(b, 1, -1), z))

        # Any number of tokens: the chunked scan, from the given state or from zeros.
        weight = self.conv1d.weight.squeeze(1)
        xBC, conv_final = causal_conv1d(xBC, weight, self.conv1d.bias, initial_states=conv_state,
                                        seq_idx=seq_idx)
        xs, B, C = self.split_groups(xBC)
        y, ssm_final = ssd(xs, dt, A, B, C, self.D, initial_states=ssm_state, seq_idx=seq_idx,
                           chunk_size=self.chunk_size)
        if ssm_state is not None:
            conv_state.copy_(conv_final)
            ssm_state.copy_(ssm_final)
        return self.out_proj(self.norm(y.flatten(2), z))

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
# Triton fast path: not written yet. It will add `ssd_triton` to BACKENDS and mirror _ChunkedScan.

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


def main(argv=None):
    import argparse
    import json
    import pathlib
    parser = argparse.ArgumentParser(description="Agreement and speed of the Mamba-2 scan's forms.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out", help="folder for ssm.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="lengths to 1024 and one chunk size")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
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
