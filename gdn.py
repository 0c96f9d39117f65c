"""The Gated DeltaNet mixer of condition C6 (A.3): the same slot, interface and weight transfer as mamba2.py.

Mamba-2 adds every value to its state, so what is stored under like keys piles up. The gated delta rule (Yang
et al., "Gated Delta Networks", arXiv 2412.06464) first looks up what the state answers to the new key, and
stores only what is missing. Per head, with keys and queries of unit length,

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T           the state, P x N
        = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T           the same: what k_t finds is put right
    y_t = S_t q_t                                                   the output, P

`step` is the second line as it stands; `delta_rule` computes it for whole sequences, chunk by chunk, in
linear time. Nothing to run here: `torchrun distill.py --cond c4 --mixer gdn` is C6, and trains this mixer.

    code     what it is                                                           shape
    q        queries, one per head: unit length / sqrt(P)                         (B, T, H, N)
    k        keys, one per key/value group: unit length                           (B, T, G, N)
    v        values, one per key/value group                                      (B, T, G, P)
    log_a    log of the decay a, at most 0                                        (B, T, H)
    beta     b above, 0 to 1: how much of the error is corrected                  (B, T, H)
    state    S above, in fp32                                                     (B, H, P, N)

Shape letters: B batch, T positions, D model width, H heads, P head dim, N state dim (here N = P), G key/value
groups, Q chunk. Head h reads group h // (H / G), as in grouped-query attention.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mamba2 import causal_conv, heads, kernel, unheads

# ---------------------------------------------------------------------------------------------------------
# The delta rule: one step, then whole sequences


def step(q, k, v, log_a, beta, state):
    """One position of the rule: q (B,H,N), k (B,G,N), v (B,G,P), log_a, beta (B,H) -> y (B,H,P), state."""
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))       # groups to heads
    state = torch.exp(log_a)[..., None, None] * state                                   # (B, H, P, N)
    error = v - (state @ k[..., None]).squeeze(-1)                                      # (B, H, P)
    state = state + (beta[..., None] * error)[..., :, None] * k[..., None, :]
    return (state @ q[..., None]).squeeze(-1), state


def delta_rule(q, k, v, log_a, beta, state=None, mask=None, chunk=None):
    """The rule over any T positions, from any state: -> y (B,T,H,P), the state after them (B,H,P,N).

    q (B,T,H,N), k (B,T,G,N) of length 1, v (B,T,G,P), log_a (B,T,H) <= 0, beta (B,T,H) in 0..1; state
    (B,H,P,N), None for zeros; mask (B,T) bool or None: at padding beta and log_a are set to zero, so that
    nothing enters or decays the state (y there is meaningless). Decays and states are fp32, or fp64 for fp64
    inputs; y has v's dtype. Cost and memory are linear in T. Raises ValueError if shapes do not agree.
    """
    (b, T, H, N), (G, P) = q.shape, v.shape[2:]
    if H % G or k.shape != (b, T, G, N) or v.shape[:2] != (b, T) or {log_a.shape, beta.shape} != {(b, T, H)}:
        shapes = ", ".join(str(tuple(z.shape)) for z in (q, k, v, log_a, beta))
        raise ValueError("delta_rule wants q (B,T,H,N), k (B,T,G,N), v (B,T,G,P), log_a and beta (B,T,H), "
                         f"G | H; got {shapes}")
    work = torch.promote_types(v.dtype, torch.float32)
    log_a, beta = log_a.to(work), beta.to(work)
    state = v.new_zeros(b, H, P, N, dtype=work) if state is None else state.to(work)
    if mask is not None:
        log_a, beta = (z.masked_fill(~mask[..., None], 0.0) for z in (log_a, beta))
    with torch.autocast(v.device.type, enabled=False):
        if fused := kernel("fla.ops.gated_delta_rule", v):
            return fused_rule(fused, q, k, v, log_a, beta, state)
        if T == 1:
            y, state = step(*(z[:, 0].to(work) for z in (q, k, v, log_a, beta)), state)
            return y[:, None].to(v.dtype), state
        rows = (z.mT.reshape(b * H, T, 1) for z in (log_a, beta))
        y, state = ChunkedDeltaRule.apply(q, k, v, *rows, state.flatten(0, 1), chunk or min(64, max(32, P)))
        return y, state.view(b, H, P, N)


class Chunk(NamedTuple):
    """Q positions, batch and heads as one dimension (bh = B * H), with what both passes need of them."""
    q: torch.Tensor          # (bh, Q, N)
    k: torch.Tensor          # (bh, Q, N)
    v: torch.Tensor          # (bh, Q, P)
    beta: torch.Tensor       # (bh, Q, 1)
    L: torch.Tensor          # (bh, Q, Q)  decay from s to t: exp(sum of log a over s+1..t); 0 for s > t
    start: torch.Tensor      # (bh, Q, 1)  decay from before the chunk to t
    end: torch.Tensor        # (bh, Q, 1)  decay from t to the end of the chunk
    M: torch.Tensor          # (bh, Q, Q)  L * q k^T: what attention would call its weights
    K: torch.Tensor          # (bh, Q, Q)  L * k k^T: how much of what s stored key t finds


def cut(at, q, k, v, log_a, beta):
    """The Chunk at positions `at` (a slice)."""
    q, k, v = (heads(z, at, q.shape[2], beta.dtype) for z in (q, k, v))
    total = log_a[:, at].cumsum(1)                                                    # (bh, Q, 1)
    L = (total - total.mT).exp_().tril_()                                             # as in mamba2.cut
    return Chunk(q, k, v, beta[:, at], L, total.exp(), (total[:, -1:] - total).exp_(),
                 torch.bmm(q, k.mT).mul_(L), torch.bmm(k, k.mT).mul_(L))


class ChunkedDeltaRule(torch.autograd.Function):
    """The rule with positions taken Q at a time, as matrix products and one triangular solve.

    Let p_t = v_t - a_t S_{t-1} k_t be the error at t: what t stores is b_t p_t k_t^T. Within a chunk that
    starts from S, unrolling the state gives p_t = v_t - start_t S k_t - sum_{s<t} K_ts b_s p_s, a unit lower
    triangular system: (I + tril(K, -1) diag(b)) p = v - start * (k S^T). Once p is known the chunk is linear
    attention over the values b p, and goes as in mamba2.ChunkedSSD: a chunk stays in cache, and the backward
    pass keeps the inputs, p, and the state before each chunk, and computes the rest anew.

    The system is solved, not inverted by a product of powers of K: for like keys these grow to binomial size.

    q (B,T,H,N), k (B,T,G,N), v (B,T,G,P), log_a and beta (bh,T,1), state (bh,P,N).
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, beta, state, chunk):
        (b, T, H, _), P = q.shape, v.shape[3]
        y, states, errors = v.new_empty(b, T, H, P), [state], state.new_empty(b * H, T, P)
        for t in range(0, T, chunk):
            at = slice(t, t + chunk)
            c = cut(at, q, k, v, log_a, beta)
            p = c.v - torch.bmm(c.k, state.mT).mul_(c.start)                          # (bh, Q, P)
            p = torch.linalg.solve_triangular(c.K * c.beta.mT, p, upper=False, unitriangular=True)
            u = c.beta * p
            out = torch.bmm(c.q, state.mT).mul_(c.start).baddbmm_(c.M, u)
            y[:, at] = out.view(b, H, -1, P).transpose(1, 2)
            state = (state * c.start[:, -1:]).baddbmm_((u * c.end).mT, c.k)           # (bh, P, N)
            states.append(state)
            errors[:, at] = p
        ctx.save_for_backward(q, k, v, log_a, beta, errors, *states)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        q, k, v, log_a, beta, errors, *states = ctx.saved_tensors
        dq, dk, dv, dlog_a, dbeta = (torch.empty_like(z) for z in (q, k, v, log_a, beta))
        for i in reversed(range(len(states) - 1)):
            at = slice(i * ctx.chunk, (i + 1) * ctx.chunk)
            c, before, after, p = cut(at, q, k, v, log_a, beta), states[i], states[i + 1], errors[:, at]
            u, g = c.beta * p, heads(dy, at, q.shape[2], beta.dtype)                  # (bh, Q, P)
            du = torch.bmm(c.k, dstate.mT).mul_(c.end).baddbmm_(c.M.mT, g)            # of y and the state;
            # what t stores also bears on the later errors, by the system above, transposed:
            w = torch.linalg.solve_triangular((c.K * c.beta).mT, du, upper=True, unitriangular=True)
            e = c.beta * w                                                            # that of p, and so of v
            dM = torch.bmm(g, u.mT).mul_(c.L)                                         # of q k^T
            dK = torch.bmm(e, u.mT).mul_(c.L).tril_(-1)                               # of -k k^T
            early, late = g * c.start, e * c.start
            # Keys are written to the state, and read it for the error: `read` is the gradient of -k in that.
            read = torch.bmm(late, before).baddbmm_(dK, c.k)                          # (bh, Q, N)
            write = torch.bmm(u, dstate).mul_(c.end).baddbmm_(dM.mT, c.q).baddbmm_(dK.mT, c.k, alpha=-1)
            find = torch.bmm(early, before).baddbmm_(dM, c.k)                         # of q, (bh, Q, N)
            # The log-decay summed up to t scales all that t reads and divides all that t writes. The whole
            # chunk's also scales the state that it hands on.
            dtotal = (c.q * find - c.k * (read + write)).sum(-1, keepdim=True)        # (bh, Q, 1)
            dtotal[:, -1] += (after * dstate).sum((1, 2))[:, None]
            dlog_a[:, at] = dtotal.flip(1).cumsum(1).flip(1)                          # undoes the cumsum
            dbeta[:, at] = (p * w).sum(-1, keepdim=True)
            dq[:, at], dk[:, at], dv[:, at] = unheads(find, q), unheads(write - read, k), unheads(e, v)
            dstate = (dstate * c.start[:, -1:]).baddbmm_(early.mT, c.q).baddbmm_(late.mT, c.k, alpha=-1)
        return dq, dk, dv, dlog_a, dbeta, dstate, None


def fused_rule(fla, q, k, v, log_a, beta, state):
    """`delta_rule` by flash-linear-attention. q comes scaled, beta and log_a masked. The kernels want as many
    heads of k as of q, so k and v are repeated, head by whole head, and hold the state as (B,H,N,P); the
    one-step kernel has no backward pass, so it serves decoding only. These arguments are tested against
    reference functions; the kernels themselves await their first run on a GPU."""
    k, v = (z.repeat_interleave(q.shape[2] // z.shape[2], dim=2) for z in (k, v))       # (B, T, H, ·)
    decode = q.shape[1] == 1 and not torch.is_grad_enabled()
    run = fla.fused_recurrent_gated_delta_rule if decode else fla.chunk_gated_delta_rule
    y, state = run(q=q.to(v.dtype), k=k.to(v.dtype), v=v, g=log_a, beta=beta, scale=1.0,
                   initial_state=state.mT.contiguous(), output_final_state=True)
    return y.to(v.dtype), state.mT.to(log_a.dtype)


# ---------------------------------------------------------------------------------------------------------
# The mixer


class State(NamedTuple):
    conv: torch.Tensor       # (B, 3, (2G + H) P)  the convolution's last inputs: v, k, q side by side
    delta: torch.Tensor      # (B, H, P, N) fp32


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet with the weights of one attention layer.

        q, k, v = q_norm(W_Q h), k_norm(W_K h), W_V h           inherited; no RoPE
        v, k, q = conv(v, k, q)                                 depthwise, causal, over four positions
        q, k    = q / |q| / sqrt(P), k / |k|                    keys of unit length keep the rule stable
        y       = delta_rule(q, k, v, log_a, beta)              beta = sigmoid(W_beta h + bias),
                                                                log_a = -exp(A_log) softplus(W_a h + decay_bias)
        out     = W_O (silu(W_G h + bias) * RMSNorm_head(y))    W_O inherited

    As in mamba2.Mamba2, what is not inherited is N(0, 0.02) noise around a start that makes the layer a
    useful linear attention, or around zero with `init="paper"` (beta 1/2, half the state gone after one
    position). conv, gate_proj and out_norm start as there. The other default starts:

        beta_proj   W_beta 0, its bias such that beta goes from 1/2 (first head) to 1/64 (last) in even
                    ratios. The state answers a key with a running average over about the last 1/beta values
                    stored under it: few and sharp in the first head, broad as attention's in the last. As
                    beta goes to 0 the rule becomes linear attention, which sums; but its first outputs are
                    then so small that the epsilon of the norm shows
        decay_proj  W_a 0, and decay_bias such that softplus gives 1/16 (first head) to 1/4096 (last) in even
                    ratios: memory half-lives of 11 to 2,800 tokens, where a large image has about 2,500
        A_log       0: A = -1. Unlike in Mamba-2 nothing ties decay to gain: keys make room for themselves
    """
    INHERITED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    FP32 = ("decay_bias", "A_log")     # in every model, as in mamba2.py

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        D, H = config.hidden_size, config.num_attention_heads
        G, P = config.num_key_value_heads, config.head_dim
        if H % G:
            raise ValueError(f"{H} heads cannot share {G} key/value groups evenly")
        self.q_proj = nn.Linear(D, H * P, bias=False)
        self.k_proj = nn.Linear(D, G * P, bias=False)
        self.v_proj = nn.Linear(D, G * P, bias=False)
        self.o_proj = nn.Linear(H * P, D, bias=False)
        self.q_norm = nn.RMSNorm(P, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(P, config.rms_norm_eps)
        self.conv = nn.Parameter(torch.zeros((H + 2 * G) * P, 4))
        self.beta_proj = nn.Linear(D, H)
        self.decay_proj = nn.Linear(D, H, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(H))    # apart, to be added in fp32
        self.A_log = nn.Parameter(torch.zeros(H))
        self.gate_proj = nn.Linear(D, H * P)                                            # W_G
        self.out_norm = nn.Parameter(torch.ones(H * P))
        if not self.conv.is_meta:
            self.init_new()

    @torch.no_grad()
    def init_new(self, init="default", generator=None):
        """Fill every parameter that is not inherited. Drawn on the CPU in fp32: the same on any device."""
        if init not in ("default", "paper"):
            raise ValueError(f"no init {init!r}: choose default or paper")
        H, G, P = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        beta = torch.logspace(math.log10(1 / 2), math.log10(1 / 64), H)
        decay = torch.logspace(math.log10(1 / 16), math.log10(1 / 4096), H)
        value_size = self.v_proj.weight.float().view(G, -1).norm(dim=1) / P ** 0.5      # (G,)
        starts = {                                                                      # where not zero
            "conv": torch.tensor([0.0, 0.0, 0.0, 1.0]),
            "beta_proj.bias": torch.logit(beta),
            "decay_bias": decay + torch.log(-torch.expm1(-decay)),                 # softplus backwards
            "gate_proj.bias": torch.tensor(1.278464542761),
        } if init == "default" else {}
        for name, p in self.named_parameters():
            if name.split(".")[0] in self.INHERITED or name == "out_norm":
                continue
            noise = torch.empty(p.shape, dtype=torch.float32, device="cpu")
            nn.init.trunc_normal_(noise, std=0.02, a=-0.04, b=0.04, generator=generator)
            p.copy_(noise + starts.get(name, torch.tensor(0.0)))
        self.out_norm.copy_((0.5 * value_size).repeat_interleave(H // G * P) if init == "default"
                            else torch.ones(H * P))

    @classmethod
    def from_attention(cls, attention, init="default", generator=None):
        """A mixer on the attention's device and in its dtype, with clones of its weights (Sect. 4.1)."""
        like = attention.q_proj.weight
        with torch.device("meta"):
            mixer = cls(attention.config, attention.layer)
        mixer = mixer.to(like.dtype)
        for name in cls.FP32:
            getattr(mixer, name).data = getattr(mixer, name).data.to(torch.promote_types(like.dtype, torch.float32))
        mixer = mixer.to_empty(device=like.device)
        for name in cls.INHERITED:
            getattr(mixer, name).load_state_dict(getattr(attention, name).state_dict())
        mixer.init_new(init, generator)
        return mixer

    def forward(self, x, mask=None, state=None, rope=None):                             # (B, T, D); no rope
        b, T, _ = x.shape
        H, G, P = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        q = self.q_norm(self.q_proj(x).view(b, T, H, P))                                # (B, T, H, P)
        k = self.k_norm(self.k_proj(x).view(b, T, G, P))                                # (B, T, G, P)
        v = self.v_proj(x)                                                              # (B, T, GP)
        # v's dtype for all: on GPUs, autocast lets norms answer in fp32.
        u = torch.cat([v, k.flatten(2).to(v.dtype), q.flatten(2).to(v.dtype)], dim=-1)  # (B, T, (2G+H)P)
        u, conv = causal_conv(u, self.conv, mask, state and state.conv)
        v, k, q = (z.unflatten(-1, (-1, P)) for z in u.split([G * P, G * P, H * P], dim=-1))
        k, q = (F.rms_norm(z, (P,), eps=1e-6).to(v.dtype) * P ** -0.5 for z in (k, q))  # to unit length
        wide = torch.promote_types(x.dtype, torch.float32)
        beta = torch.sigmoid(self.beta_proj(x).to(wide))                                # (B, T, H)
        log_a = -torch.exp(self.A_log.to(wide)) * F.softplus(
            self.decay_proj(x).to(wide) + self.decay_bias.to(wide))
        y, delta = delta_rule(q * P ** -0.5, k, v, log_a, beta, state and state.delta, mask)
        y = F.rms_norm(y, (P,), eps=self.config.rms_norm_eps).flatten(2) * self.out_norm
        return self.o_proj(y * F.silu(self.gate_proj(x))), State(conv, delta)           # (B, T, D)
