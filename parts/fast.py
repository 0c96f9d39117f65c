"""The fast forms of what mamba2.py, gdn.py and model.py show plainly. Nothing here is needed to
follow the method.

    ssd_scan      mamba2.chunked_ssd        on a CPU a chunk at a time, with a backward pass
    delta_scan    gdn.chunked_delta_rule    written by hand; on a GPU a block of chunks at once
    convolve      the short convolution over whole sequences
    norm_rotate, SwiGLU, gate_heads, ...    chains of elementwise steps, on a GPU one kernel each

Autograd would keep every Q x Q matrix of a scan. Both forms keep the inputs and a few states, and
compute the rest anew in the backward pass. On a CPU a chunk stays in cache, which is what makes it
fast. On a GPU a loop over chunks costs its launches, whatever a chunk holds: there a block of n
chunks is one more batch dimension, and only the state between them is handed on. Products are then
of the inputs' dtype, with sums in fp32.

On a GPU, `fused` functions are compiled by torch.compile (HEED_COMPILE=0 leaves them as they are),
and where mamba-ssm or causal-conv1d is installed their kernels are used (HEED_KERNELS=0 leaves them
out).

Letters: B batch, T positions, H heads, G key/value groups, P head dim, N state dim, Q chunk, n
chunks in a block, bh = B * H, rows = bh * n; a dot stands for P or N.
"""
import importlib
import os
import warnings
from functools import partial, wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def compiling(like):
    return like.is_cuda and os.environ.get("HEED_COMPILE", "1") != "0"


def fused(f=None, *, training=True):
    """On a GPU, f by torch.compile: its elementwise steps become one kernel. Elsewhere f itself,
    and with training=False wherever gradients are recorded. The first argument is a tensor. Where
    nothing can be compiled (no C compiler, say), f stays as it is, with a warning."""
    if f is None:
        return partial(fused, training=training)
    compiled = None

    @wraps(f)
    def run(*args):
        nonlocal compiled
        if not compiling(args[0]) or torch.is_grad_enabled() and not training:
            return f(*args)
        if compiled is None:
            compiled = torch.compile(f, dynamic=True)
            try:
                return compiled(*args)
            except Exception as error:                    # of many kinds, and none of them f's own
                warnings.warn(f"{f.__name__} runs uncompiled: {error}")
                compiled = f
        return compiled(*args)
    return run


def outside_autocast(backward):
    """Whoever calls backward() inside an autocast region would else have its products in another
    dtype."""
    @wraps(backward)
    def run(ctx, *grads):
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)
    return run


def to_heads(z, H, Q, dtype):
    """z (B,T,G,.) or (B,T,H,.) -> (rows,Q,.): groups are repeated to heads."""
    z = z.transpose(1, 2)[:, :, None].to(dtype)                                    # (B, G, 1, T, .)
    return z.expand(-1, -1, H // z.shape[1], -1, -1).reshape(-1, Q, z.shape[-1])


def sum_groups(z, like):
    """The gradient of `to_heads` for one chunk: z (bh,Q,.) summed over each group's heads, for like
    (B,T,G,.)."""
    z = z.view(like.shape[0], like.shape[2], -1, *z.shape[1:])                   # (B, G, H/G, Q, .)
    return (z.sum(2) if z.shape[2] > 1 else z[:, :, 0]).transpose(1, 2)               # (B, Q, G, .)


# --------------------------------------------------------------------------------------------------
# On a CPU: a chunk at a time


class Chunk(NamedTuple):
    """Q positions, batch and heads as one dimension. Mamba-2's C, B, x and dt are q, k, v and gain,
    as the delta rule's beta is."""
    q: torch.Tensor          # (bh, Q, N)
    k: torch.Tensor          # (bh, Q, N)
    v: torch.Tensor          # (bh, Q, P)
    gain: torch.Tensor       # (bh, Q, 1)
    L: torch.Tensor          # (bh, Q, Q)  decay from s to t: exp(sum of log a over s+1..t); or 0
    start: torch.Tensor      # (bh, Q, 1)  decay from before the chunk to t
    end: torch.Tensor        # (bh, Q, 1)  decay from t to the end of the chunk
    M: torch.Tensor          # (bh, Q, Q)  L * q k^T: what attention would call its weights


def make_chunk(at, q, k, v, log_a, gain):
    """The Chunk at positions `at` (a slice)."""
    q, k, v = (to_heads(z[:, at], q.shape[2], z[:, at].shape[1], gain.dtype) for z in (q, k, v))
    total = log_a[:, at].cumsum(1)                                                    # (bh, Q, 1)
    # Differences first, then exp: exp(total_t) / exp(total_s) would be 0 / 0 under strong decay.
    # Above the diagonal exp may overflow, but tril_ writes its zeros over whatever is there.
    L, end = (total - total.mT).exp_().tril_(), (total[:, -1:] - total).exp_()
    return Chunk(q, k, v, gain[:, at], L, total.exp(), end, torch.bmm(q, k.mT).mul_(L))


def read(c, state, u):
    """What Chunk c reads (bh,Q,P): causal attention to what enters, u (bh,Q,P), with decay in the
    place of softmax; and the state before."""
    return torch.bmm(c.q, state.mT).mul_(c.start).baddbmm_(c.M, u)


def carry(c, state, late):
    """The state (bh,P,N) after Chunk c, which adds late (bh,Q,P), u decayed to the chunk's end."""
    return (state * c.start[:, -1:]).baddbmm_(late.mT, c.k)


def read_backward(c, state, u, g, dstate):
    """g: the gradient of what was read, dstate: of the state after the chunk -> of q k^T, q and u;
    and g as it reaches back to the chunk's start."""
    dM, early = torch.bmm(g, u.mT).mul_(c.L), g * c.start                             # (bh, Q, Q)
    dq = torch.bmm(early, state).baddbmm_(dM, c.k)                                    # (bh, Q, N)
    return dM, dq, torch.bmm(c.k, dstate.mT).mul_(c.end).baddbmm_(c.M.mT, g), early


def decay_backward(dtotal, after, dstate):
    """The gradient of log_a (bh,Q,1) from that of its sum up to t, which scales all that t reads
    and divides all that t writes; the whole chunk's also scales the state that it hands on."""
    dtotal[:, -1] += (after * dstate).sum((1, 2))[:, None]
    return dtotal.flip(1).cumsum(1).flip(1)


class ChunkedSSD(torch.autograd.Function):
    """C (B,T,H,N), B (B,T,G,N), x (B,T,G,P), log_a = dt A and dt (bh,T,1), D (bh,1,1), state
    (bh,P,N), Q. The backward pass keeps the inputs and the state before every fourth chunk."""
    SPAN = 4                                                # chunks from one kept state to the next

    @staticmethod
    def forward(ctx, C, B, x, log_a, dt, D, state, Q):
        (b, T, H, _), P = C.shape, x.shape[3]
        y, kept = x.new_empty(b, T, H, P), []
        for t in range(0, T, Q):
            if t % (ChunkedSSD.SPAN * Q) == 0 and any(ctx.needs_input_grad):
                kept.append(state)
            at = slice(t, t + Q)
            c = make_chunk(at, C, B, x, log_a, dt)
            y[:, at] = sum_groups(read(c, state, c.gain * c.v).addcmul_(D, c.v), y)
            state = carry(c, state, c.gain * c.end * c.v)
        ctx.save_for_backward(C, B, x, log_a, dt, D, *kept, state)
        ctx.Q = Q
        return y, state

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy, dstate):
        C, B, x, log_a, dt, D, *kept, after = ctx.saved_tensors
        dC, dB, dx, dlog_a, ddt, dD = (torch.zeros_like(z) for z in (C, B, x, log_a, dt, D))
        T, span = x.shape[1], ctx.Q * ChunkedSSD.SPAN
        for first in reversed(range(0, T, span)):
            # Forward once more through this span, to have each chunk and the state before it.
            ats = [slice(t, t + ctx.Q) for t in range(first, min(first + span, T), ctx.Q)]
            chunks, states = [make_chunk(at, C, B, x, log_a, dt) for at in ats], [kept.pop()]
            for c in chunks[:-1]:
                states.append(carry(c, states[-1], c.gain * c.end * c.v))
            for at, c, before in reversed(list(zip(ats, chunks, states))):
                u, g = c.gain * c.v, to_heads(dy[:, at], C.shape[2], c.v.shape[1], dt.dtype)
                dM, dq, du, early = read_backward(c, before, u, g, dstate)
                dk = torch.bmm(u * c.end, dstate).baddbmm_(dM.mT, c.q)                # (bh, Q, N)
                ddt[:, at] = (c.v * du).sum(-1, keepdim=True)
                dtotal = (c.q * dq).sum(-1, keepdim=True) - c.gain * ddt[:, at]       # (bh, Q, 1)
                dlog_a[:, at] = decay_backward(dtotal, after, dstate)
                dD += (g * c.v).sum((1, 2), keepdim=True)
                dx[:, at] = sum_groups(du.mul_(c.gain).addcmul_(D, g), x)
                dB[:, at], dC[:, at] = sum_groups(dk, B), sum_groups(dq, C)
                dstate = (dstate * c.start[:, -1:]).baddbmm_(early.mT, c.q)           # (bh, P, N)
                after = before
        return dC, dB, dx, dlog_a, ddt, dD, dstate, None


class ChunkedDeltaRule(torch.autograd.Function):
    """q (B,T,H,N), k (B,T,G,N), v (B,T,G,P), log_a and beta (bh,T,1), state (bh,P,N), Q.

    gdn.chunked_delta_rule says what is solved; once the errors p are known, u = beta p enters. The
    backward pass keeps the inputs, p, and the state before each chunk. The system is solved, not
    inverted by a product of powers of K: for like keys these grow to binomial size.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, beta, state, Q):
        (b, T, H, _), P = q.shape, v.shape[3]
        y, states, errors = v.new_empty(b, T, H, P), [state], state.new_empty(b * H, T, P)
        for t in range(0, T, Q):
            at = slice(t, t + Q)
            c = make_chunk(at, q, k, v, log_a, beta)
            p = c.v - torch.bmm(c.k, state.mT).mul_(c.start)                          # (bh, Q, P)
            K = torch.bmm(c.k, c.k.mT).mul_(c.L)        # how much of what s stored key t finds
            p = torch.linalg.solve_triangular(K * c.gain.mT, p, upper=False, unitriangular=True)
            u = c.gain * p
            y[:, at] = sum_groups(read(c, state, u), y)
            state = carry(c, state, u * c.end)
            states.append(state)
            errors[:, at] = p
        ctx.save_for_backward(q, k, v, log_a, beta, errors, *states)
        ctx.Q = Q
        return y, state

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy, dstate):
        q, k, v, log_a, beta, errors, *states = ctx.saved_tensors
        dq, dk, dv, dlog_a, dbeta = (torch.empty_like(z) for z in (q, k, v, log_a, beta))
        for i in reversed(range(len(states) - 1)):
            at, before, after = slice(i * ctx.Q, (i + 1) * ctx.Q), states[i], states[i + 1]
            c, p = make_chunk(at, q, k, v, log_a, beta), errors[:, at]
            u, g = c.gain * p, to_heads(dy[:, at], q.shape[2], p.shape[1], beta.dtype)
            dM, find, du, early = read_backward(c, before, u, g, dstate)
            # What t stores also bears on the later errors, by the same system, transposed.
            K = torch.bmm(c.k, c.k.mT).mul_(c.L)
            w = torch.linalg.solve_triangular((K * c.gain).mT, du, upper=True, unitriangular=True)
            e = c.gain * w                                              # that of p, and so of v
            dK, late = torch.bmm(e, u.mT).mul_(c.L).tril_(-1), e * c.start            # of -k k^T
            # Keys are written to the state, and read it for the error: the gradient of -k in that.
            found = torch.bmm(late, before).baddbmm_(dK, c.k)                         # (bh, Q, N)
            write = torch.bmm(u, dstate).mul_(c.end).baddbmm_(dM.mT, c.q)
            write.baddbmm_(dK.mT, c.k, alpha=-1)
            dtotal = (c.q * find - c.k * (found + write)).sum(-1, keepdim=True)       # (bh, Q, 1)
            dlog_a[:, at] = decay_backward(dtotal, after, dstate)
            dbeta[:, at] = (p * w).sum(-1, keepdim=True)
            dq[:, at], dk[:, at] = sum_groups(find, q), sum_groups(write - found, k)
            dv[:, at] = sum_groups(e, v)
            dstate = (dstate * c.start[:, -1:]).baddbmm_(early.mT, c.q)
            dstate.baddbmm_(late.mT, c.k, alpha=-1)                                   # (bh, P, N)
        return dq, dk, dv, dlog_a, dbeta, dstate, None


# --------------------------------------------------------------------------------------------------
# On a GPU: blocks of n chunks, each a plain function that autograd differentiates


def decays(total):
    """total (rows,n,1), the log of the decay from the front to t -> (rows,n,n), the decay from s to
    t, and 0 for s > t. The mask comes before exp, which would overflow above the diagonal and make
    its gradient no number."""
    n = total.shape[1]
    above = torch.ones(n, n, dtype=torch.bool, device=total.device).triu(1)
    return (total - total.mT).masked_fill(above, float("-inf")).exp()


@fused
def decayed(z, total):
    """z (rows,Q,Q) times the decay within a chunk."""
    return (z * decays(total)).to(z.dtype)


@fused
def scaled(x, C, dt, total):
    """-> what each position adds, as this chunk reads it and as the chunk's end has it; what reads
    the state before."""
    u = x * dt                                                                        # (rows, Q, P)
    inside, late = u.to(x.dtype), (u * (total[:, -1:] - total).exp()).to(x.dtype)
    return inside, late, (C * total.exp()).to(C.dtype)


@fused
def finished(y, D, x, state, added, w):
    """y + D x, both (B,H,T,P); and the state after all chunks (bh,P,N), from the one before them
    and what each added (bh,n,P,N), by their decays w (bh,n+1), in fp32."""
    w = w[..., None, None]
    return (y + D[:, None, None] * x).to(y.dtype), w[:, 0] * state + (w[:, 1:] * added).sum(1)


def between(total, n):
    """Decays among n chunks, from total (bh*n,Q,1): of what chunk s - 1 added (s = 0: the state
    before all of them) to the state before chunk t (bh,n,n), and to the state after the last
    (bh,n+1)."""
    each = F.pad(total[:, -1].view(-1, n), (1, 0)).cumsum(1)                          # (bh, n + 1)
    return decays(each[:, :n, None]), (each[:, -1:] - each).exp()


def ssd_block(x, dt, B, C, state, A, D, Q):
    """mamba2.chunked_ssd over n = T / Q chunks at once, the chunks as a batch dimension: -> y
    (B,T,H,P), the state."""
    (b, T, _, P), (H, N), n = x.shape, C.shape[2:], x.shape[1] // Q
    x, B, C = (to_heads(z, H, Q, z.dtype) for z in (x, B, C))                         # (rows, Q, .)
    total = (dt * A).mT.reshape(-1, Q, 1).cumsum(1)                                   # (rows, Q, 1)
    u, u_end, C_start = scaled(x, C, dt.mT.reshape(-1, Q, 1), total)
    added = torch.bmm(u_end.mT, B).view(b * H, n, P, N)
    # The state before each chunk is a decaying sum of what those before it added: one small
    # product.
    to_each, to_last = between(total, n)
    earlier = torch.cat([state.flatten(0, 1)[:, None].to(added.dtype), added[:, :-1]], 1).flatten(2)
    before = torch.bmm(to_each.to(added.dtype), earlier).view(-1, P, N)               # (rows, P, N)
    inside = decayed(torch.bmm(C, B.mT), total)                                       # (rows, Q, Q)
    y = torch.baddbmm(torch.bmm(C_start, before.mT), inside, u)
    y, x = (z.view(b, H, T, P) for z in (y, x))
    y, state = finished(y, D, x, state.flatten(0, 1), added, to_last)
    return y.transpose(1, 2), state.view(b, H, P, N)


def delta_block(q, k, v, log_a, beta, state, Q):
    """gdn.chunked_delta_rule over n = T / Q chunks at once: -> y (B,T,H,P), the state (B,H,P,N).

    The errors p = solve(v - start * (k S^T)) are linear in the state S. Solved for v and for start
    * k they need no S yet, and the state after a chunk is S F + U: what is left to do chunk after
    chunk is that one product.
    """
    (b, T, H, N), P, n, low = q.shape, v.shape[3], q.shape[1] // Q, v.dtype
    q, k, v = (to_heads(z, H, Q, low) for z in (q, k, v))                             # (rows, Q, .)
    total = log_a.mT.reshape(-1, Q, 1).cumsum(1)                                      # (rows, Q, 1)
    beta, start, whole = beta.mT.reshape(-1, Q, 1), total.exp(), total[:, -1:]
    system = decayed(torch.bmm(k, k.mT), total) * beta.mT                       # (rows, Q, Q), fp32
    right = torch.cat([v, k * start], 2).to(system.dtype)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    v, w = solved.split([P, N], 2)                                                   # p = v - w S^T
    stored = beta * (whole - total).exp()
    U = torch.bmm((stored * v).to(low).mT, k).to(state.dtype).view(b, H, n, P, N)
    keep = torch.diag_embed(whole.exp().expand(-1, 1, N)[:, 0])                       # (rows, N, N)
    keep = keep - torch.bmm((stored * w).to(low).mT, k)                               # F above
    states = [state]
    for f, u in zip(keep.view(b, H, n, N, N).unbind(2), U.unbind(2)):
        states.append(states[-1] @ f + u)                                             # (B, H, P, N)
    before = torch.stack(states[:-1], 2).view(-1, P, N).to(low)                       # (rows, P, N)
    p = v.to(low) - torch.bmm(w.to(low), before.mT)
    inside = decayed(torch.bmm(q, k.mT), total)
    y = torch.baddbmm(torch.bmm((q * start).to(low), before.mT), inside, (beta * p).to(low))
    return y.view(b, H, T, P).transpose(1, 2), states[-1]


class BlockScan(torch.autograd.Function):
    """block(*sequences, state, *constants, Q) from block to block; sequences (B,T,...), constants
    the rest.

    Keeps its inputs and the state before each block. The backward pass runs a block once more, with
    a graph, and differentiates it: so there is one block's graph at a time.
    """

    @staticmethod
    def forward(ctx, block, Q, n, sequences, *inputs):
        ctx.block, ctx.Q, ctx.sequences = block, Q, sequences
        ctx.blocks = [slice(t, t + n * Q) for t in range(0, inputs[0].shape[1], n * Q)]
        ys, states = [], [inputs[sequences]]
        for at in ctx.blocks:                             # the last may have fewer chunks
            pieces = [z[:, at] for z in inputs[:sequences]]
            y, state = block(*pieces, states[-1], *inputs[sequences + 1:], Q)
            ys.append(y)
            states.append(state)
        ctx.save_for_backward(*inputs, *states[1:-1])
        return torch.cat(ys, 1), states[-1]

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy, dstate):
        saved, m = ctx.saved_tensors, ctx.sequences
        inputs = saved[:len(saved) - len(ctx.blocks) + 1]
        states = [inputs[m], *saved[len(inputs):]]
        grads = [torch.zeros_like(z) for z in inputs]
        for at, state in zip(reversed(ctx.blocks), reversed(states)):
            pieces = [*(z[:, at] for z in inputs[:m]), state, *inputs[m + 1:]]
            leaves = [z.detach().requires_grad_() for z in pieces]
            with torch.enable_grad():
                outputs = ctx.block(*leaves, ctx.Q)
            found = torch.autograd.grad(outputs, leaves, (dy[:, at], dstate))
            for i, g in enumerate(found):
                if i < m:
                    grads[i][:, at] = g
                elif i > m:
                    grads[i] += g
            dstate = found[m]
        grads[m] = dstate
        return None, None, None, None, *grads


def whole_chunks(Q, *sequences):
    """(B,T,...) each, with zeros behind up to a multiple of Q: they add nothing, decay nothing."""
    short = -sequences[0].shape[1] % Q
    return [F.pad(z, (0, 0) * (z.dim() - 2) + (0, short)) if short else z for z in sequences]


def chunks_at_once(bh, Q):
    """n: as many as keep each kind of Q x Q matrices of a block within 32 MB in bf16."""
    return max(1, 2 ** 24 // (bh * Q * Q))


# --------------------------------------------------------------------------------------------------
# The scans


def ssd_scan(x, dt, A, B, C, D, state, Q=None, n=None):
    """mamba2.ssd for T > 1: arguments checked and masked, dt, A, D and state in fp32 at least. Q
    positions a chunk: about P on a CPU, as work within chunks then costs as much as work between
    them. n: chunks in a block; None: as many as fit, and on a CPU no blocks."""
    (b, T, _, P), H = x.shape, C.shape[2]
    if kernels := kernel("mamba_ssm.ops.triton.ssd_combined", x):
        return mamba_ssm_scan(kernels, x, dt, A, B, C, D, state)
    Q = Q or (128 if x.is_cuda else min(64, max(32, P)))
    if x.is_cuda or n:
        n, padded = n or chunks_at_once(b * H, Q), whole_chunks(Q, x, dt, B, C)
        y, state = BlockScan.apply(ssd_block, Q, n, 4, *padded, state, A, D)
        return y[:, :T], state
    rows = dt.mT.reshape(b * H, T, 1)
    A, D = (z.repeat(b).view(-1, 1, 1) for z in (A, D))
    y, state = ChunkedSSD.apply(C, B, x, rows * A, rows, D, state.flatten(0, 1), Q)
    return y, state.unflatten(0, (b, H))


def delta_scan(q, k, v, log_a, beta, state, Q=None, n=None):
    """gdn.delta_rule for T > 1: arguments checked and masked, log_a, beta and state in fp32 at
    least; Q and n as above."""
    b, T, H = log_a.shape
    Q = Q or min(64, max(32, v.shape[3]))
    if v.is_cuda or n:
        n, padded = n or chunks_at_once(b * H, Q), whole_chunks(Q, q, k, v, log_a, beta)
        y, state = BlockScan.apply(delta_block, Q, n, 5, *padded, state)
        return y[:, :T], state
    rows = (z.mT.reshape(b * H, T, 1) for z in (log_a, beta))
    y, state = ChunkedDeltaRule.apply(q, k, v, *rows, state.flatten(0, 1), Q)
    return y, state.unflatten(0, (b, H))


# --------------------------------------------------------------------------------------------------
# The short convolution, and the MLP's gate


def depthwise(u, weight):
    """u (B,T+W-1,E), weight (E,W) -> (B,T,E). A 2-d convolution of height 1: faster than PyTorch's
    1-d."""
    return F.conv2d(u.mT[:, :, None], weight[:, None, None], groups=len(weight))[:, :, 0].mT


@fused
def tap_gradients(dy, u, taps):
    """dy (B,T,E), u (B,T+W-1,E) -> (E,W)."""
    return torch.stack([(dy * u[:, j:j + dy.shape[1]]).sum((0, 1)) for j in range(taps)], dim=1)


class Depthwise(torch.autograd.Function):
    """`depthwise` with a gradient that takes a fifth of the time of PyTorch's own on CPUs at T =
    4,096."""

    @staticmethod
    def forward(ctx, u, weight):
        ctx.save_for_backward(u, weight)
        with torch.autocast(u.device.type, enabled=False):    # in u's dtype, as the backward pass
            return depthwise(u, weight)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy):
        (u, weight), du = ctx.saved_tensors, None
        before = weight.shape[1] - 1
        if ctx.needs_input_grad[0]:
            du = depthwise(F.pad(dy, (0, 0, before, before)), weight.flip(1))
        return du, tap_gradients(dy, u, before + 1)


def convolve(u, weight):
    """u (B,T+W-1,E), weight (E,W), the current position's tap last -> (B,T,E)."""
    if kernels := kernel("causal_conv1d", u):
        return kernels.causal_conv1d_fn(u.mT, weight).mT[:, weight.shape[1] - 1:]
    return Depthwise.apply(u, weight)


# --------------------------------------------------------------------------------------------------
# Chains of elementwise steps


@fused
def silu_times(gate, up):
    return F.silu(gate) * up


@fused
def silu_times_backward(d, gate, up):
    return torch.ops.aten.silu_backward(d * up, gate), d * F.silu(gate)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs: autograd would keep silu(gate) too, a tenth of a
    step's memory."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return silu_times(gate, up)

    @staticmethod
    @outside_autocast
    def backward(ctx, d):
        return silu_times_backward(d, *ctx.saved_tensors)


def norm_then_round(x, weight, eps):
    """RMSNorm as transformers has it: in fp32, rounded to x's dtype, then times weight."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight


def norm_in_one(x, weight, eps):
    """The same in one kernel, which rounds once; for a GPU in half precision."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


norm_one_position = fused(norm_then_round, training=False)       # a third of the time, for one row


def rms_norm(x, weight, eps):
    """x / sqrt(mean of squares + eps) * weight over the last dimension."""
    if not x.is_cuda or x.dtype.itemsize > 2:
        return norm_then_round(x, weight, eps)
    if x.shape[1] == 1 and compiling(x) and not torch.is_grad_enabled():    # a step of decoding
        return norm_one_position(x, weight, eps)
    return norm_in_one(x, weight, eps)


def norm_scale(x, weight, eps, scale):
    """RMSNorm over heads, times a constant, in x's dtype, where autocast would have fp32."""
    if x.is_cuda and x.dtype.itemsize == 2:
        return norm_in_one(x, weight * scale, eps)
    return (F.rms_norm(x, x.shape[-1:], weight, eps) * scale).to(x.dtype)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate(x, cos, sin):
    """Half-split rotary embedding; cos and sin broadcast against x."""
    return x * cos + rotate_half(x) * sin


norm_then_rotate = fused(lambda x, weight, cos, sin, eps: rotate(
    norm_then_round(x, weight, eps), cos, sin), training=False)


def norm_rotate(x, weight, cos, sin, eps):
    """RMSNorm over heads, then the rotary embedding: x (B,H,T,P), cos and sin (B,1,T,P). In
    training on a GPU not compiled: the backward pass of a norm takes long to make."""
    if x.is_cuda and torch.is_grad_enabled():
        return rotate(rms_norm(x, weight, eps), cos, sin)
    return norm_then_rotate(x, weight, cos, sin, eps)


@fused
def gate_heads(y, gate, weight, eps):
    """silu(gate) * RMSNorm(y) * weight, normalised over each head: y (B,T,H,P), gate (B,T,HP),
    weight (HP,)."""
    return (F.rms_norm(y, y.shape[-1:], eps=eps).flatten(2) * weight * F.silu(gate)).to(gate.dtype)


@fused(training=False)
def step_size(raw, bias, A_log):
    """Mamba-2's dt (B,T,H) and A (H,), in fp32 at least."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    return F.softplus(raw.to(wide) + bias.to(wide)), -torch.exp(A_log.to(wide))


@fused(training=False)
def convolve_one(u, memory, weight):
    """The convolution at one position: u (B,1,E), memory (B,W-1,E), weight (E,W) -> (B,1,E), the
    new memory."""
    u = torch.cat([memory, u], dim=1)
    return (u * weight.mT).sum(1, keepdim=True), u[:, 1:]


# --------------------------------------------------------------------------------------------------
# The optional kernels. What they are given is held, in tests, to functions of theirs that run on a
# CPU.


def kernel(module, like):
    """A module of fused kernels where it can serve: CUDA tensors, package installed, HEED_KERNELS
    not 0."""
    if not like.is_cuda or os.environ.get("HEED_KERNELS", "1") == "0":
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def mamba_ssm_scan(kernels, x, dt, A, B, C, D, state):
    """`ssd_scan` by mamba-ssm. dt comes masked and after softplus, so the kernel's dt_bias and
    dt_softplus stay off. It wants as many groups of B as of C, so x and B are repeated, head by
    whole head."""
    x, B = (z.repeat_interleave(C.shape[2] // z.shape[2], dim=2) for z in (x, B))     # (B, T, H, .)
    y, state = kernels.mamba_chunk_scan_combined(x, dt, A, B, C.contiguous(), chunk_size=256, D=D,
                                                 initial_states=state, return_final_states=True)
    return y.to(x.dtype), state.to(dt.dtype)


def mamba_ssm_step(x, dt, A, B, C, D, state):
    """mamba2.step by mamba-ssm, or None where it cannot serve. The kernel writes the state in place
    and has no backward pass. dt and A are expanded, with strides of 0, by which it knows that they
    are one number for a head; it then asks for a dt_bias of the same kind."""
    kernels = kernel("mamba_ssm.ops.triton.selective_state_update", x)
    if not kernels or torch.is_grad_enabled():
        return None
    x, B = (z.repeat_interleave(C.shape[1] // z.shape[1], dim=1) for z in (x, B))       # (B, H, .)
    (x, B, C), y_dtype = (z.to(state.dtype) for z in (x, B, C)), x.dtype
    P, N, state = x.shape[-1], B.shape[-1], state.clone()
    dt, A = dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N)
    D, bias = (z[:, None].expand(-1, P) for z in (D, torch.zeros_like(D)))
    y = kernels.selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=bias)
    return y.to(y_dtype), state
