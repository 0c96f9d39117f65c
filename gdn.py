"""The Gated DeltaNet mixer of condition C6 (A.3): the same slot, interface and weight transfer as
mamba2.py.

Mamba-2 adds every value to its state, so what is stored under like keys piles up. The gated delta
rule (Yang et al., "Gated Delta Networks", arXiv 2412.06464) first looks up what the state answers
to the new key, and stores only what is missing. Per head, with keys and queries of unit length,

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T           the state, P x N
        = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T           the same: what k_t finds is put right
    y_t = S_t q_t                                                   the output, P

`step` is the second line as it stands, `chunked_delta_rule` the same for whole sequences in linear
time. `delta_rule` is what the mixer calls: it runs parts/fast.py's form of the second, which gives
the same numbers and gradients sooner. Nothing to run here: `torchrun distill.py --cond c6` trains
this mixer.

    code     what it is                                                           shape
    q        queries, one per head: unit length / sqrt(P)                         (B, T, H, N)
    k        keys, one per key/value group: unit length                           (B, T, G, N)
    v        values, one per key/value group                                      (B, T, G, P)
    log_a    log of the decay a, at most 0                                        (B, T, H)
    beta     b above, 0 to 1: how much of the error is corrected                  (B, T, H)
    state    S above, in fp32                                                     (B, H, P, N)

Shape letters: B batch, T positions, D model width, H heads, P head dim, N state dim (here N = P), G
key/value groups, Q chunk. Head h reads group h // (H / G), as in grouped-query attention.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba2 import RecurrentMixer
from parts.fast import delta_scan, fused

# --------------------------------------------------------------------------------------------------
# The delta rule: one step, then whole sequences


@fused(training=False)
def step(q, k, v, log_a, beta, state):
    """One position of the rule: q (B,H,N), k (B,G,N), v (B,G,P), log_a, beta (B,H) -> y (B,H,P),
    state."""
    k, v_ = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1).to(state.dtype) for z in (k, v))
    state = torch.exp(log_a)[..., None, None] * state                                 # (B, H, P, N)
    error = v_ - (state @ k[..., None]).squeeze(-1)                                     # (B, H, P)
    state = state + (beta[..., None] * error)[..., :, None] * k[..., None, :]
    return (state @ q[..., None].to(state.dtype)).squeeze(-1).to(v.dtype), state


def chunked_delta_rule(q, k, v, log_a, beta, state, Q):
    """`step` over T positions, Q at a time, as matrix products and one triangular solve: -> y
    (B,T,H,P), the state.

    Let p_t = v_t - a_t S_{t-1} k_t be the error at t: what t stores is b_t p_t k_t^T. Within a
    chunk that starts from S, unrolling the state gives p_t = v_t - start_t S k_t - sum_{s<t} K_ts
    b_s p_s, a unit lower triangular system. Once p is known, the chunk is linear attention over the
    values b p, as in mamba2.chunked_ssd. Arguments as `delta_rule` has them, in one dtype.
    """
    y = []
    for q, k, v, log_a, beta in zip(*(z.split(Q, dim=1) for z in (q, k, v, log_a, beta))):
        k, v = (z.repeat_interleave(q.shape[2] // z.shape[2], dim=2) for z in (k, v))   # groups to heads
        q, k, v, log_a, beta = (z.transpose(1, 2) for z in (q, k, v, log_a[..., None], beta[..., None]))
        total = log_a.cumsum(2)          # (B, H, Q, 1)  log of the decay from before the chunk to t
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        L = (total - total.mT).masked_fill(~causal, -math.inf).exp()     # (B, H, Q, Q), from s to t
        start, to_end = total.exp(), (total[:, :, -1:] - total).exp()
        K = (L * (k @ k.mT)).tril(-1)                     # how much of what s stored key t finds
        found = start * (k @ state.mT)        # and what it finds in the state from before the chunk
        p = torch.linalg.solve_triangular(K * beta.mT, v - found, upper=False, unitriangular=True)
        y.append((start * (q @ state.mT) + (L * (q @ k.mT)) @ (beta * p)).transpose(1, 2))      # (B, Q, H, P)
        state = total[:, :, -1:].exp() * state + (to_end * beta * p).mT @ k           # (B, H, P, N)
    return torch.cat(y, dim=1), state


def delta_rule(q, k, v, log_a, beta, state=None, mask=None, chunk=None):
    """The rule over any T positions, from any state: -> y (B,T,H,P), the state after them
    (B,H,P,N).

    q (B,T,H,N), k (B,T,G,N) of length 1, v (B,T,G,P), log_a (B,T,H) <= 0, beta (B,T,H) in 0..1;
    state (B,H,P,N), None for zeros; mask (B,T) bool or None: at padding beta and log_a are set to
    zero, so that nothing enters or decays the state (y there is meaningless). Decays and states are
    fp32, or fp64 for fp64 inputs; y has v's dtype. Cost and memory are linear in T; chunk: Q.
    Raises ValueError if shapes do not agree.
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
        if T > 1:
            return delta_scan(q, k, v, log_a, beta, state, chunk)
        y, state = step(*(z[:, 0] for z in (q, k, v, log_a, beta)), state)
        return y[:, None], state


# --------------------------------------------------------------------------------------------------
# The mixer


class State(NamedTuple):
    conv: torch.Tensor     # (B, 3, (2G + H) P)  the convolution's last inputs: v, k, q side by side
    delta: torch.Tensor      # (B, H, P, N) fp32


class GatedDeltaNet(RecurrentMixer):
    """Gated DeltaNet with the weights of one attention layer.

        q, k, v = q_norm(W_Q h), k_norm(W_K h), W_V h           inherited; no RoPE
        v, k, q = conv(v, k, q)                                 depthwise, causal, over four positions
        q, k    = q / |q| / sqrt(P), k / |k|                    keys of unit length keep the rule stable
        y       = delta_rule(q, k, v, log_a, beta)              beta = sigmoid(W_beta h + bias),
                                                                log_a = -exp(A_log) softplus(W_a h +
                                                                decay_bias)
        out     = W_O (silu(W_G h + bias) * RMSNorm_head(y))    W_O inherited

    As in mamba2.Mamba2, what is not inherited is N(0, 0.02) noise around a start that makes the
    layer a useful linear attention, or around zero with `init="paper"` (beta 1/2, half the state
    gone after one position). conv, gate_proj and out_norm start as there. The other default starts:

        beta_proj   W_beta 0, its bias such that beta goes from 1/2 (first head) to 1/64 (last) in even
                    ratios. The state answers a key with a running average over about the last
                    1/beta values stored under it: few and sharp in the first head, broad as
                    attention's in the last. As beta goes to 0 the rule becomes linear attention,
                    which sums; but its first outputs are then so small that the epsilon of the norm
                    shows
        decay_proj  W_a 0, and decay_bias such that softplus gives 1/16 (first head) to 1/4096 (last) in even
                    ratios: memory half-lives of 11 to 2,800 tokens, where a large image has about
                    2,500
        A_log       0: A = -1. Unlike in Mamba-2 nothing ties decay to gain: keys make room for themselves
    """
    FP32 = ("decay_bias", "A_log")     # as in mamba2.py

    def __init__(self, config, layer):
        super().__init__(config, layer)
        D, H, P = config.hidden_size, config.num_attention_heads, config.head_dim
        self.beta_proj = nn.Linear(D, H)
        self.decay_proj = nn.Linear(D, H, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(H))    # apart, to be added in fp32
        self.A_log = nn.Parameter(torch.zeros(H))
        self.gate_proj = nn.Linear(D, H * P)                                            # W_G
        self.out_norm = nn.Parameter(torch.ones(H * P))
        if not self.conv.is_meta:
            self.init_new()

    def starts(self):
        H = self.config.num_attention_heads
        beta = torch.logspace(math.log10(1 / 2), math.log10(1 / 64), H)
        decay = torch.logspace(math.log10(1 / 16), math.log10(1 / 4096), H)
        return {"conv": torch.tensor([0.0, 0.0, 0.0, 1.0]),
                "beta_proj.bias": torch.logit(beta),
                "decay_bias": decay + torch.log(-torch.expm1(-decay)),          # softplus backwards
                "gate_proj.bias": torch.tensor(1.278464542761)}

    def forward(self, x, mask=None, state=None, rope=None):                     # (B, T, D); no rope
        P = self.config.head_dim
        q, k = self.queries_keys(x)                                              # (B, T, H or G, P)
        q, k, v, conv = self.convolved(q, k, self.v_proj(x), mask, state and state.conv)
        k, q = (F.rms_norm(z, (P,), eps=1e-6).to(v.dtype) * P ** -0.5 for z in (k, q))  # to unit length
        wide = torch.promote_types(x.dtype, torch.float32)
        beta = torch.sigmoid(self.beta_proj(x).to(wide))                                # (B, T, H)
        log_a = -torch.exp(self.A_log.to(wide)) * F.softplus(
            self.decay_proj(x).to(wide) + self.decay_bias.to(wide))
        y, delta = delta_rule(q * P ** -0.5, k, v, log_a, beta, state and state.delta, mask)
        return self.gated(x, y), State(conv, delta)                                     # (B, T, D)
