"""The fast forms of what mamba2.py, gdn.py and model.py show plainly. Nothing here is needed to follow the method.

    ssd_scan       mamba2.chunked_ssd, with a backward pass written by hand
    delta_scan     gdn.chunked_delta_rule, likewise
    depthwise      the short convolution over whole sequences
    swiglu         silu(gate) * up, which keeps only its two inputs

Autograd would keep every Q x Q matrix of a scan. The backward passes here keep the inputs and a few states, and compute
the rest anew.

Both scans take a *block* of n chunks at a time. Within chunks all is matrix products; from chunk to chunk a state is
handed on. On a CPU n is 1, so that a chunk stays in cache. On a GPU n is as large as memory allows: a loop over chunks
costs its launches there, whatever a chunk holds. Products are then of the inputs' dtype, with sums in fp32.

Where mamba-ssm, causal-conv1d or flash-linear-attention is installed, a GPU uses their kernels, unless HEED_KERNELS=0.

Letters: B batch, T positions, H heads, G key/value groups, P head dim, N state dim, Q chunk, n chunks in a block,
bh = B * H, rows = bh * n; a dot stands for P or N. `low` is the dtype of products, fp32 (or fp64) that of all else.
"""
import importlib
import os
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------
# Blocks of chunks


def blocks(T, Q, n):
    """Slices that cover T positions: n chunks of Q each, then fewer, then what is left and shorter than Q."""
    whole = T - T % Q
    borders = [*range(0, whole, n * Q), whole] + [T] * (T > whole)
    return [slice(a, b) for a, b in zip(borders, borders[1:])]


def chunks_at_once(device, bh, Q):
    """n: one on a CPU; on a GPU as many as keep all Q x Q matrices of a block within 64 MB in fp32."""
    return max(1, 2 ** 24 // (bh * Q * Q)) if device.type == "cuda" else 1


def product_dtype(inputs, work):
    """`low`: on a GPU the inputs' own dtype, which its matrix units want; on a CPU the scan's fp32."""
    return inputs.dtype if inputs.is_cuda else work


def to_heads(z, at, Q, H, dtype):
    """Positions `at` of z (B,T,G,.) or (B,T,H,.) -> (rows,Q,.): groups are repeated to heads for one block only."""
    z = z[:, at].transpose(1, 2)[:, :, None].to(dtype)                                # (B, G, 1, nQ, .)
    return z.expand(-1, -1, H // z.shape[1], -1, -1).reshape(-1, Q, z.shape[-1])


def sum_groups(z, at, like):
    """The gradient of `to_heads`: z (rows,Q,.) summed over each group's heads -> (B,nQ,G,.) for like (B,T,G,.)."""
    z = z.reshape(like.shape[0], like.shape[2], -1, at.stop - at.start, z.shape[-1])     # (B, G, H/G, nQ, .)
    return (z.sum(2) if z.shape[2] > 1 else z[:, :, 0]).transpose(1, 2)


def product(a, b):
    """a @ b for (rows,.,.), its sums and its result in fp32 where a and b are shorter."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype.itemsize < 4 else torch.bmm(a, b)


def add_product(total, a, b):
    """total + a @ b, in place."""
    return total.add_(product(a, b)) if a.dtype != total.dtype else total.baddbmm_(a, b)


def decays(log_a):
    """Of one chunk in each row, log_a (rows,Q,1) -> L, start, end.

    L (rows,Q,Q) is the decay from s to t, exp(sum of log_a over s+1..t), and 0 for s > t; start (rows,Q,1) that from
    before the chunk to t, end (rows,Q,1) that from t to the chunk's end. Differences first, then exp: exp(total_t) /
    exp(total_s) would be 0 / 0 under strong decay. Above the diagonal exp may overflow, but tril_ writes its zeros over
    whatever is there.
    """
    total = log_a.cumsum(1)                                                           # (rows, Q, 1)
    return (total - total.mT).exp_().tril_(), total.exp(), (total[:, -1:] - total).exp()


def decays_between(log_a, n):
    """W (bh,n+1,n+1): decay of what chunk s added (s = 0: the state before them) to the state after chunk t."""
    each = log_a.view(-1, n, log_a.shape[1]).sum(2)                                   # (bh, n)
    total = F.pad(each, (1, 0)).cumsum(1)[..., None]                                  # (bh, n + 1, 1)
    return (total - total.mT).exp_().tril_()


def outside_autocast(backward):
    """Whoever calls backward() inside an autocast region would else have its products in another dtype."""
    @wraps(backward)
    def run(ctx, *grads):
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)
    return run


# ---------------------------------------------------------------------------------------------------------
# Mamba-2


class Chunks(NamedTuple):
    """A block, and what both passes need of it."""
    x: torch.Tensor          # (rows, Q, P)
    B: torch.Tensor          # (rows, Q, N)
    C: torch.Tensor          # (rows, Q, N)
    dt: torch.Tensor         # (rows, Q, 1)
    log_a: torch.Tensor      # (rows, Q, 1)
    L: torch.Tensor          # (rows, Q, Q)  as in `decays`, with start and end
    start: torch.Tensor      # (rows, Q, 1)
    end: torch.Tensor        # (rows, Q, 1)
    M: torch.Tensor          # (rows, Q, Q)  L * C B^T: what attention would call its weights
    D: torch.Tensor          # (rows, 1, 1)


def make_chunks(at, Q, x, dt, log_a, B, C, D):
    """The Chunks at positions `at` (a slice)."""
    Q, H = min(Q, at.stop - at.start), C.shape[2]
    low, n = product_dtype(x, dt.dtype), (at.stop - at.start) // Q
    x, B, C = (to_heads(z, at, Q, H, low) for z in (x, B, C))
    dt, log_a = (z[:, at].reshape(-1, Q, 1) for z in (dt, log_a))
    L, start, end = decays(log_a)
    return Chunks(x, B, C, dt, log_a, L, start, end, product(C, B.mT).mul_(L), D.repeat_interleave(n, 0))


def ssd_states(c, state):
    """The state (bh,P,N) before a block -> before each of its chunks and after each, (rows,P,N), and after the last."""
    n, low = len(c.x) // len(state), c.x.dtype
    u = (c.dt * c.end * c.x).to(low)
    if n == 1:
        after = add_product(state * c.start[:, -1:], u.mT, c.B)
        return state, after, after
    added = product(u.mT, c.B).view(len(state), n, -1)                                # (bh, n, P * N)
    states = torch.bmm(decays_between(c.log_a, n), torch.cat([state.flatten(1)[:, None], added], 1))
    states = states.unflatten(2, state.shape[1:])                                     # (bh, n + 1, P, N)
    return states[:, :n].flatten(0, 1), states[:, 1:].flatten(0, 1), states[:, n]


class SSDScan(torch.autograd.Function):
    """x (B,T,G,P), dt and log_a = dt A (bh,T,1), B (B,T,G,N), C (B,T,H,N), D (bh,1,1), state (bh,P,N), Q and n.

    Within a chunk, M (dt x) with M = L * C B^T is causal attention, decay in the place of softmax.
    """

    @staticmethod
    def forward(ctx, x, dt, log_a, B, C, D, state, Q, n):
        y, kept = x.new_empty(*x.shape[:2], C.shape[2], x.shape[3]), []
        ctx.group = 4 if n == 1 else 1                        # blocks from one kept state to the next
        ctx.blocks = blocks(x.shape[1], Q, n)
        for i, at in enumerate(ctx.blocks):
            if i % ctx.group == 0 and any(ctx.needs_input_grad):
                kept.append(state)
            c = make_chunks(at, Q, x, dt, log_a, B, C, D)
            before, _, state = ssd_states(c, state)
            low = c.x.dtype
            out = product(c.C, before.to(low).mT).mul_(c.start)                       # (rows, Q, P)
            out = add_product(out, c.M.to(low), (c.dt * c.x).to(low)).addcmul_(c.D, c.x)
            y[:, at] = sum_groups(out, at, y)
        ctx.save_for_backward(x, dt, log_a, B, C, D, *kept)
        ctx.Q = Q
        return y, state

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy, dstate):
        saved = ctx.saved_tensors                             # asked for once: checkpointing gives them out once
        inputs, kept = saved[:6], list(saved[6:])
        grads = [torch.zeros_like(z) for z in inputs]
        for first in reversed(range(0, len(ctx.blocks), ctx.group)):
            state, group = kept.pop(), []
            for at in ctx.blocks[first:first + ctx.group]:    # forward once more, from the kept state
                c = make_chunks(at, ctx.Q, *inputs)
                before, after, state = ssd_states(c, state)
                group.append((at, c, before, after))
            while group:
                dstate = ssd_block_backward(*group.pop(), dy, dstate, inputs, grads)
        return *grads, dstate, None, None


def ssd_block_backward(at, c, before, after, dy, dstate, inputs, grads):
    """Writes one block's gradients into `grads`. dstate (bh,P,N): that of the state after it -> of the state before."""
    (x, _, _, B, C, _), (dx, ddt, dlog_a, dB, dC, dD) = inputs, grads
    low, n, bh = c.x.dtype, len(c.x) // len(dstate), len(dstate)
    g = to_heads(dy, at, c.x.shape[1], C.shape[2], low)                               # (rows, Q, P)
    u = c.dt * c.x
    early, late = g * c.start, u * c.end
    if n == 1:
        dafter, dbefore = dstate, add_product(dstate * c.start[:, -1:], early.to(low).mT, c.C)
    else:                                                     # the chain of `ssd_states`, backwards
        added = product(early.to(low).mT, c.C).view(bh, n, -1)
        chain = torch.cat([added, dstate.flatten(1)[:, None]], 1)
        chain = torch.bmm(decays_between(c.log_a, n).mT, chain).unflatten(2, dstate.shape[1:])
        dafter, dbefore = chain[:, 1:].flatten(0, 1), chain[:, 0]
    dG = product(g, u.to(low).mT).mul_(c.L).to(low)                                   # (rows, Q, Q), G = C B^T
    dc = add_product(product(early.to(low), before.to(low)), dG, c.B)                 # (rows, Q, N)
    db = add_product(product(late.to(low), dafter.to(low)), dG.mT, c.C)               # (rows, Q, N)
    du = add_product(product(c.B, dafter.to(low).mT).mul_(c.end), c.M.to(low).mT, g)  # (rows, Q, P)
    dt_part = (c.x * du).sum(-1, keepdim=True)
    # The log-decay summed up to t scales all that C_t reads and divides all that u_t writes: its gradient is
    # C_t.dC_t - u_t.du_t. The whole chunk's also scales the state that it hands on.
    dtotal = (c.C * dc).sum(-1, keepdim=True) - c.dt * dt_part                        # (rows, Q, 1)
    dtotal[:, -1] += (after * dafter).sum((1, 2))[:, None]
    ddt[:, at] = dt_part.view(bh, -1, 1)
    dlog_a[:, at] = dtotal.flip(1).cumsum(1).flip(1).view(bh, -1, 1)                  # undoes the cumsum
    dD += (g * c.x).reshape(bh, -1, g.shape[2]).sum((1, 2), keepdim=True)
    dx[:, at] = sum_groups(du.mul_(c.dt).addcmul_(c.D, g), at, x)
    dB[:, at], dC[:, at] = sum_groups(db, at, B), sum_groups(dc, at, C)
    return dbefore


def ssd_scan(x, dt, A, B, C, D, state, Q=None, n=None):
    """mamba2.ssd for T > 1: arguments checked and masked, dt, A, D and state in fp32 at least. Q positions a chunk,
    about P on a CPU, as work within chunks then costs as much as work between them; n chunks at once."""
    (b, T, _, P), H = x.shape, C.shape[2]
    if fused := kernel("mamba_ssm.ops.triton.ssd_combined", x):
        return mamba_ssm_scan(fused, x, dt, A, B, C, D, state)
    Q = Q or (128 if x.is_cuda else min(64, max(32, P)))
    n = n or chunks_at_once(x.device, b * H, Q)
    rows = dt.mT.reshape(b * H, T, 1)
    A, D = (z.repeat(b).view(-1, 1, 1) for z in (A, D))
    y, state = SSDScan.apply(x, rows, rows * A, B, C, D, state.flatten(0, 1), Q, n)
    return y, state.unflatten(0, (b, H))


# ---------------------------------------------------------------------------------------------------------
# Gated DeltaNet


class DeltaChunks(NamedTuple):
    """A block, and what both passes need of it."""
    q: torch.Tensor          # (rows, Q, N)
    k: torch.Tensor          # (rows, Q, N)
    v: torch.Tensor          # (rows, Q, P)
    beta: torch.Tensor       # (rows, Q, 1)
    L: torch.Tensor          # (rows, Q, Q)  as in `decays`, with start and end
    start: torch.Tensor      # (rows, Q, 1)
    end: torch.Tensor        # (rows, Q, 1)
    M: torch.Tensor          # (rows, Q, Q)  L * q k^T: what attention would call its weights
    K: torch.Tensor          # (rows, Q, Q)  L * k k^T: how much of what s stored key t finds


def make_delta_chunks(at, Q, q, k, v, log_a, beta):
    """The DeltaChunks at positions `at` (a slice)."""
    Q, H, low = min(Q, at.stop - at.start), q.shape[2], product_dtype(v, beta.dtype)
    q, k, v = (to_heads(z, at, Q, H, low) for z in (q, k, v))
    log_a, beta = (z[:, at].reshape(-1, Q, 1) for z in (log_a, beta))
    L, start, end = decays(log_a)
    return DeltaChunks(q, k, v, beta, L, start, end, product(q, k.mT).mul_(L), product(k, k.mT).mul_(L))


def solve(c, right, transposed=False):
    """The unit lower triangular system (I + tril(K,-1) diag(beta)) p = right, or the transposed one."""
    if transposed:
        return torch.linalg.solve_triangular((c.K * c.beta).mT, right, upper=True, unitriangular=True)
    return torch.linalg.solve_triangular(c.K * c.beta.mT, right, upper=False, unitriangular=True)


def delta_states(c, state, p=None):
    """The state (bh,P,N) before a block -> before each chunk and after each, (rows,P,N), the errors p (rows,Q,P), and
    how one chunk's state bears on the next, (bh,n,N,N), or None for a single chunk, whose p may be known already."""
    bh, low, whole = len(state), c.k.dtype, c.start[:, -1:]
    n = len(c.k) // bh
    if n == 1:
        p = solve(c, c.v - product(c.k, state.mT).mul_(c.start)) if p is None else p
        return state, (state * whole).baddbmm_((c.beta * p * c.end).mT, c.k.to(p.dtype)), p, None
    # p = solve(v - start * (k S^T)) is linear in S: solved for v and for start * k, it needs no S yet, and the state
    # after a chunk is S F + U. What is left to do chunk after chunk is that one product.
    v, w = solve(c, torch.cat([c.v, c.start * c.k], 2)).split([c.v.shape[2], c.k.shape[2]], 2)
    stored = c.beta * c.end
    U = product((stored * v).to(low).mT, c.k).view(bh, n, *state.shape[1:])
    F_ = (torch.diag_embed(whole.expand(-1, 1, c.k.shape[2])[:, 0])
          - product((stored * w).to(low).mT, c.k)).unflatten(0, (bh, n))
    states = [state]
    for i in range(n):
        states.append(torch.baddbmm(U[:, i], states[-1], F_[:, i]))
    before, after = (torch.stack(s, 1).flatten(0, 1) for s in (states[:-1], states[1:]))
    return before, after, v - product(w.to(low), before.to(low).mT), F_


class DeltaScan(torch.autograd.Function):
    """q (B,T,H,N), k (B,T,G,N), v (B,T,G,P), log_a and beta (bh,T,1), state (bh,P,N), Q and n.

    Let p_t = v_t - a_t S_{t-1} k_t be the error at t: what t stores is b_t p_t k_t^T. Within a chunk that starts from
    S, unrolling the state gives p_t = v_t - start_t S k_t - sum_{s<t} K_ts b_s p_s, a unit lower triangular system.
    Once p is known the chunk is linear attention over the values b p, and goes as in SSDScan. The system is solved,
    not inverted by a product of powers of K: for like keys these grow to binomial size.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, beta, state, Q, n):
        y, kept = v.new_empty(*q.shape[:3], v.shape[3]), []
        ctx.blocks = blocks(q.shape[1], Q, n)
        for at in ctx.blocks:
            c = make_delta_chunks(at, Q, q, k, v, log_a, beta)
            before, after, p, _ = delta_states(c, state)
            kept += [state, p.contiguous() if n == 1 else None]       # a solution's columns lie apart
            low = c.k.dtype
            out = product(c.q, before.to(low).mT).mul_(c.start)                       # (rows, Q, P)
            y[:, at] = sum_groups(add_product(out, c.M.to(low), (c.beta * p).to(low)), at, y)
            state = after.unflatten(0, (len(state), -1))[:, -1]
        ctx.save_for_backward(q, k, v, log_a, beta, *kept)
        ctx.Q = Q
        return y, state

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy, dstate):
        saved = ctx.saved_tensors
        inputs, kept = saved[:5], list(saved[5:])
        grads = [torch.empty_like(z) for z in inputs]
        for at in reversed(ctx.blocks):
            c = make_delta_chunks(at, ctx.Q, *inputs)
            p, state = kept.pop(), kept.pop()
            dstate = delta_block_backward(at, c, state, p, dy, dstate, inputs, grads)
        return *grads, dstate, None, None


def delta_block_backward(at, c, state, p, dy, dstate, inputs, grads):
    """Writes one block's gradients into `grads`. dstate (bh,P,N): that of the state after it -> of the state before."""
    (q, k, v, _, _), (dq, dk, dv, dlog_a, dbeta) = inputs, grads
    low, bh, n, whole = c.k.dtype, len(dstate), len(c.k) // len(dstate), c.start[:, -1:]
    before, after, p, F_ = delta_states(c, state, p)
    u, g = c.beta * p, to_heads(dy, at, c.k.shape[1], q.shape[2], low)                # (rows, Q, P)
    early = g * c.start
    if n > 1:                                                 # the chain of `delta_states`, backwards
        e = c.beta * solve(c, product(c.M.to(low).mT, g), transposed=True)
        added = product(early.to(low).mT, c.q) - product((e * c.start).to(low).mT, c.k)
        added, chain = added.unflatten(0, (bh, n)), [dstate]
        for i in reversed(range(n)):
            chain.append(torch.baddbmm(added[:, i], chain[-1], F_[:, i].mT))
        dafter = torch.stack(chain[n - 1::-1], 1).flatten(0, 1)
    else:
        dafter = dstate
    du = add_product(product(c.k, dafter.to(low).mT).mul_(c.end), c.M.to(low).mT, g)  # of y and the state;
    w = solve(c, du, transposed=True)                         # what t stores also bears on the later errors
    e = c.beta * w                                                                    # of p, and so of v
    late = e * c.start
    dM = product(g, u.to(low).mT).mul_(c.L).to(low)                                   # of q k^T
    dK = product(e.to(low), u.to(low).mT).mul_(c.L).tril_(-1).to(low)                 # of -k k^T
    # Keys are written to the state, and read it for the error: `read` is the gradient of -k in that.
    read = add_product(product(late.to(low), before.to(low)), dK, c.k)                # (rows, Q, N)
    write = add_product(product(u.to(low), dafter.to(low)).mul_(c.end), dM.mT, c.q)
    write = write.sub_(product(dK.mT, c.k)) if low != write.dtype else write.baddbmm_(dK.mT, c.k, alpha=-1)
    find = add_product(product(early.to(low), before.to(low)), dM, c.k)               # of q, (rows, Q, N)
    # The log-decay summed up to t scales all that t reads and divides all that t writes. The whole chunk's also
    # scales the state that it hands on.
    dtotal = (c.q * find - c.k * (read + write)).sum(-1, keepdim=True)                # (rows, Q, 1)
    dtotal[:, -1] += (after * dafter).sum((1, 2))[:, None]
    dlog_a[:, at] = dtotal.flip(1).cumsum(1).flip(1).view(bh, -1, 1)                  # undoes the cumsum
    dbeta[:, at] = (p * w).sum(-1, keepdim=True).view(bh, -1, 1)
    dq[:, at], dk[:, at] = sum_groups(find, at, q), sum_groups(write - read, at, k)
    dv[:, at] = sum_groups(e, at, v)
    if n > 1:
        return chain[n]
    return (dstate * whole).baddbmm_(early.mT, c.q.to(early.dtype)).baddbmm_(late.mT, c.k.to(late.dtype), alpha=-1)


def delta_scan(q, k, v, log_a, beta, state, Q=None, n=None):
    """gdn.delta_rule for T > 1: arguments checked and masked, log_a, beta and state in fp32 at least."""
    b, T, H = log_a.shape
    Q = Q or min(64, max(32, v.shape[3]))
    n = n or chunks_at_once(v.device, b * H, Q)
    rows = (z.mT.reshape(b * H, T, 1) for z in (log_a, beta))
    y, state = DeltaScan.apply(q, k, v, *rows, state.flatten(0, 1), Q, n)
    return y, state.unflatten(0, (b, H))


# ---------------------------------------------------------------------------------------------------------
# The short convolution, and the MLP's gate


def depthwise(u, weight):
    """u (B,T+W-1,E), weight (E,W) -> (B,T,E). A 2-d convolution of height 1: faster than PyTorch's 1-d."""
    return F.conv2d(u.mT[:, :, None], weight[:, None, None], groups=len(weight))[:, :, 0].mT


class Depthwise(torch.autograd.Function):
    """`depthwise` with a gradient that takes a fifth of the time of PyTorch's own on CPUs at T = 4,096."""

    @staticmethod
    def forward(ctx, u, weight):
        ctx.save_for_backward(u, weight)
        with torch.autocast(u.device.type, enabled=False):    # the backward pass has u's dtype, so this must too
            return depthwise(u, weight)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy):
        (u, weight), T = ctx.saved_tensors, dy.shape[1]
        before = weight.shape[1] - 1
        du = depthwise(F.pad(dy, (0, 0, before, before)), weight.flip(1)) if ctx.needs_input_grad[0] else None
        return du, torch.stack([(dy * u[:, j:j + T]).sum((0, 1)) for j in range(before + 1)], dim=1)


def convolve(u, weight):
    """u (B,T+W-1,E), weight (E,W), the current position's tap last -> (B,T,E)."""
    if fused := kernel("causal_conv1d", u):
        return fused.causal_conv1d_fn(u.mT, weight).mT[:, weight.shape[1] - 1:]
    return Depthwise.apply(u, weight)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs: autograd would keep silu(gate) too, a tenth of a step's memory."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @outside_autocast
    def backward(ctx, d):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d * up, gate), d * F.silu(gate)


# ---------------------------------------------------------------------------------------------------------
# The optional kernels. What they are given is held, in tests, to functions of theirs that run on a CPU.


def kernel(module, like):
    """A module of fused kernels where it can serve: CUDA tensors, package installed, HEED_KERNELS not 0."""
    if not like.is_cuda or os.environ.get("HEED_KERNELS", "1") == "0":
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def mamba_ssm_scan(fused, x, dt, A, B, C, D, state):
    """`ssd_scan` by mamba-ssm. dt comes masked and after softplus, so the kernel's dt_bias and dt_softplus stay off.
    It wants as many groups of B as of C, so x and B are repeated, head by whole head."""
    x, B = (z.repeat_interleave(C.shape[2] // z.shape[2], dim=2) for z in (x, B))       # (B, T, H, .)
    y, state = fused.mamba_chunk_scan_combined(x, dt, A, B, C.contiguous(), chunk_size=256, D=D,
                                               initial_states=state, return_final_states=True)
    return y.to(x.dtype), state.to(dt.dtype)


def mamba_ssm_step(x, dt, A, B, C, D, state):
    """mamba2.step by mamba-ssm, or None where it cannot serve. The kernel writes the state in place and has no backward
    pass. dt and A are expanded, with strides of 0, by which it knows that they are one number for a head; it then asks
    for a dt_bias of the same kind."""
    fused = None if torch.is_grad_enabled() else kernel("mamba_ssm.ops.triton.selective_state_update", x)
    if not fused:
        return None
    x, B = (z.repeat_interleave(C.shape[1] // z.shape[1], dim=1) for z in (x, B))       # (B, H, .)
    P, N, state = x.shape[-1], B.shape[-1], state.clone()
    bias = torch.zeros_like(A)[:, None].expand(-1, P)
    dt, A, D = dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N), D[:, None].expand(-1, P)
    return fused.selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=bias), state


def fla_rule(q, k, v, log_a, beta, state):
    """`delta_scan`, or gdn.step where T is 1, by flash-linear-attention; None where it cannot serve.

    q comes scaled, beta and log_a masked. The kernels want as many heads of k as of q, so k and v are repeated, head by
    whole head, and hold the state as (B,H,N,P); the one-step kernel has no backward pass, so it serves decoding only.
    """
    fused = kernel("fla.ops.gated_delta_rule", v)
    if not fused:
        return None
    k, v = (z.repeat_interleave(q.shape[2] // z.shape[2], dim=2) for z in (k, v))       # (B, T, H, .)
    decode = q.shape[1] == 1 and not torch.is_grad_enabled()
    run = fused.fused_recurrent_gated_delta_rule if decode else fused.chunk_gated_delta_rule
    y, state = run(q=q.to(v.dtype), k=k.to(v.dtype), v=v, g=log_a, beta=beta, scale=1.0,
                   initial_state=state.mT.contiguous(), output_final_state=True)
    return y.to(v.dtype), state.mT.to(log_a.dtype)
