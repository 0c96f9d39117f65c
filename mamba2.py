"""The Mamba-2 mixer that takes attention's place in three of four decoder layers (Sect. 4.1, C.3).

Attention's own weights carry over by state space duality ("SSD weight transfer"): linear attention,
y_t = sum_{s<=t} (C_t . B_s) x_s, is attention without softmax if C, B, x are its queries, keys and values:
W_Q -> C, W_K -> B, W_V -> x, W_O -> the output projection. Mamba-2 adds a decay and a step, and turns the sum
into a recurrence whose state does not grow with the context. Per head,

    S_t = a_t S_{t-1} + dt_t x_t B_t^T          the state, P x N; a_t = exp(dt_t A) with A < 0
    y_t = S_t C_t + D x_t                       the output, P

`step` is this line by line; `ssd` computes it for whole sequences, chunk by chunk, in linear time. There is
nothing to run here: `torchrun distill.py --cond c4` trains this mixer, `python bench.py scan` times `ssd`.

    code     what it is                                                           shape
    x        values, one per key/value group                                      (B, T, G, P)
    B        keys, one per key/value group                                        (B, T, G, N)
    C        queries, one per head                                                (B, T, H, N)
    dt       the paper's Delta, from its projector W_gamma: how much of x enters  (B, T, H)
    A        decay rate (negative)                                                (H,)
    D        skip from x straight to y                                            (H,)
    state    S above, in fp32                                                     (B, H, P, N)

Shape letters: B batch, T positions, D model width, H heads, P head dim, N state dim (here N = P), G key/value
groups, Q chunk. Head h reads group h // (H / G), as in grouped-query attention.
"""
import importlib
import math
import os
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------
# The state space: one step, then whole sequences


def step(x, dt, A, B, C, D, state):
    """One position of the recurrence above: x (B,G,P), dt (B,H), B (B,G,N), C (B,H,N) -> y (B,H,P), state."""
    x, B = (z.repeat_interleave(C.shape[1] // z.shape[1], dim=1) for z in (x, B))       # groups to heads
    decay = torch.exp(dt * A)[..., None, None]                                          # (B, H, 1, 1)
    state = decay * state + (dt[..., None] * x)[..., :, None] * B[..., None, :]         # (B, H, P, N)
    return (state @ C[..., None]).squeeze(-1) + D[:, None] * x, state                   # (B, H, P)


def ssd(x, dt, A, B, C, D=None, state=None, mask=None, chunk=None):
    """The recurrence over any T positions, from any state: -> y (B,T,H,P), the state after them (B,H,P,N).

    x (B,T,G,P), dt (B,T,H) >= 0, A (H,) < 0, B (B,T,G,N), C (B,T,H,N); D (H,) and state (B,H,P,N), None for
    zeros; mask (B,T) bool or None: at padding dt is set to zero, so that nothing enters or decays the state
    (y there is meaningless). Decays and states are fp32, or fp64 for fp64 inputs; y has x's dtype. Cost and
    memory are linear in T: H T (2 Q (N + P) + 4 N P) operations forward. Chunks of about P positions are
    best, as work within chunks then costs as much as work between them; GPUs want fewer, larger ones. Raises
    ValueError if shapes do not agree.
    """
    (b, T, G, P), (H, N) = x.shape, C.shape[2:]
    if H % G or B.shape != (b, T, G, N) or dt.shape != (b, T, H):
        shapes = ", ".join(str(tuple(z.shape)) for z in (x, dt, B, C))
        raise ValueError(f"ssd wants x (B,T,G,P), dt (B,T,H), B (B,T,G,N), C (B,T,H,N), G | H; got {shapes}")
    work = torch.promote_types(x.dtype, torch.float32)
    dt, A = dt.to(work), A.to(work)
    D = torch.zeros_like(A) if D is None else D.to(work)
    state = x.new_zeros(b, H, P, N, dtype=work) if state is None else state.to(work)
    if mask is not None:
        dt = dt.masked_fill(~mask[..., None], 0.0)
    with torch.autocast(x.device.type, enabled=False):
        if T == 1:
            run = step if torch.is_grad_enabled() else fused_step
            y, state = run(x[:, 0].to(work), dt[:, 0], A, B[:, 0].to(work), C[:, 0].to(work), D, state)
            return y[:, None].to(x.dtype), state
        if fused := kernel("mamba_ssm.ops.triton.ssd_combined", x):
            return fused_scan(fused, x, dt, A, B, C, D, state)
        rows = dt.mT.reshape(b * H, T, 1)
        A, D = (z.repeat(b).view(-1, 1, 1) for z in (A, D))
        chunk = chunk or (256 if x.is_cuda else min(64, max(32, P)))
        y, state = ChunkedSSD.apply(x, rows, rows * A, B, C, D, state.flatten(0, 1), chunk)
        return y, state.view(b, H, P, N)


class Chunk(NamedTuple):
    """Q positions, batch and heads as one dimension (bh = B * H), with what both passes need of them."""
    x: torch.Tensor          # (bh, Q, P)
    B: torch.Tensor          # (bh, Q, N)
    C: torch.Tensor          # (bh, Q, N)
    dt: torch.Tensor         # (bh, Q, 1)
    L: torch.Tensor          # (bh, Q, Q)  decay from s to t: exp(sum of log a over s+1..t); 0 for s > t
    start: torch.Tensor      # (bh, Q, 1)  decay from before the chunk to t
    end: torch.Tensor        # (bh, Q, 1)  decay from t to the end of the chunk
    M: torch.Tensor          # (bh, Q, Q)  L * C B^T: what attention would call its weights


def heads(z, at, H, dtype):
    """Positions `at` of z (B,T,G,·) or (B,T,H,·) -> (bh,Q,·): groups repeat to heads for one chunk only."""
    z = z[:, at].transpose(1, 2)[:, :, None].to(dtype)                                # (B, G, 1, Q, ·)
    return z.expand(-1, -1, H // z.shape[1], -1, -1).reshape(-1, *z.shape[3:])


def unheads(z, like):
    """The gradient of `heads`: z (bh,Q,·) summed over each group's heads, -> (B,Q,G,·) for like (B,T,G,·)."""
    z = z.view(like.shape[0], like.shape[2], -1, *z.shape[1:])                        # (B, G, H/G, Q, ·)
    return (z.sum(2) if z.shape[2] > 1 else z[:, :, 0]).transpose(1, 2)


def cut(at, x, dt, log_a, B, C):
    """The Chunk at positions `at` (a slice)."""
    x, B, C = (heads(z, at, C.shape[2], dt.dtype) for z in (x, B, C))
    total = log_a[:, at].cumsum(1)                                                    # (bh, Q, 1)
    # Differences first, then exp: exp(total_t) / exp(total_s) would be 0 / 0 under strong decay. Above the
    # diagonal exp may overflow, but tril_ writes its zeros over whatever is there.
    L = (total - total.mT).exp_().tril_()                                             # (bh, Q, Q)
    start, end = total.exp(), (total[:, -1:] - total).exp()                           # (bh, Q, 1)
    return Chunk(x, B, C, dt[:, at], L, start, end, torch.bmm(C, B.mT).mul_(L))


def advance(c, state):
    """The state (bh,P,N) after Chunk c."""
    return (state * c.start[:, -1:]).baddbmm_((c.dt * c.end * c.x).mT, c.B)


class ChunkedSSD(torch.autograd.Function):
    """The recurrence with positions taken Q at a time, as matrix products.

    Within a chunk, M (dt x) with M = L * C B^T is causal attention, decay in the place of softmax; from chunk
    to chunk the state is handed on. Batch and heads go through a chunk together, and a chunk stays in cache:
    hence the speed. Autograd would keep every L and M; the backward pass written here keeps the inputs and
    the state before every fourth chunk, and computes the rest anew.

    x (B,T,G,P), dt and log_a = dt A (bh,T,1), B (B,T,G,N), C (B,T,H,N), D (bh,1,1), state (bh,P,N).
    """
    SPAN = 4                                                  # chunks from one kept state to the next

    @staticmethod
    def forward(ctx, x, dt, log_a, B, C, D, state, chunk):
        (b, T, _, P), H = x.shape, C.shape[2]
        y, kept = x.new_empty(b, T, H, P), []
        for t in range(0, T, chunk):
            if t % (ChunkedSSD.SPAN * chunk) == 0 and any(ctx.needs_input_grad):
                kept.append(state)
            at = slice(t, t + chunk)
            c = cut(at, x, dt, log_a, B, C)
            out = torch.bmm(c.C, state.mT).mul_(c.start).baddbmm_(c.M, c.dt * c.x).addcmul_(D, c.x)
            y[:, at] = unheads(out, y)
            state = advance(c, state)
        ctx.save_for_backward(x, dt, log_a, B, C, D, *kept, state)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, log_a, B, C, D, *kept, after = ctx.saved_tensors
        dx, ddt, dlog_a, dB, dC, dD = (torch.zeros_like(z) for z in (x, dt, log_a, B, C, D))
        span = ctx.chunk * ChunkedSSD.SPAN
        for first in reversed(range(0, x.shape[1], span)):
            ats = [slice(t, t + ctx.chunk) for t in range(first, min(first + span, x.shape[1]), ctx.chunk)]
            cuts, states = [cut(at, x, dt, log_a, B, C) for at in ats], [kept.pop()]
            for c in cuts[:-1]:
                states.append(advance(c, states[-1]))
            for at, c, before in reversed(list(zip(ats, cuts, states))):
                u, g = c.dt * c.x, heads(dy, at, C.shape[2], dt.dtype)                # (bh, Q, P)
                early, late = g * c.start, u * c.end
                dG = torch.bmm(g, u.mT).mul_(c.L)                                     # (bh, Q, Q), G = C B^T
                dc = torch.bmm(early, before).baddbmm_(dG, c.B)                       # (bh, Q, N)
                db = torch.bmm(late, dstate).baddbmm_(dG.mT, c.C)                     # (bh, Q, N)
                du = torch.bmm(c.B, dstate.mT).mul_(c.end).baddbmm_(c.M.mT, g)        # (bh, Q, P)
                ddt[:, at] = (c.x * du).sum(-1, keepdim=True)
                # The log-decay summed up to t scales all that C_t reads and divides all that u_t writes: its
                # gradient is C_t.dC_t - u_t.du_t. The whole chunk's also scales the state that it hands on.
                dtotal = (c.C * dc).sum(-1, keepdim=True) - c.dt * ddt[:, at]         # (bh, Q, 1)
                dtotal[:, -1] += (after * dstate).sum((1, 2))[:, None]
                dlog_a[:, at] = dtotal.flip(1).cumsum(1).flip(1)                      # undoes the cumsum
                dD += (g * c.x).sum((1, 2), keepdim=True)
                dx[:, at] = unheads(du.mul_(c.dt).addcmul_(D, g), x)
                dB[:, at], dC[:, at] = unheads(db, B), unheads(dc, C)
                dstate = (dstate * c.start[:, -1:]).baddbmm_(early.mT, c.C)           # (bh, P, N)
                after = before
        return dx, ddt, dlog_a, dB, dC, dD, dstate, None


# ---------------------------------------------------------------------------------------------------------
# The short convolution, and the optional kernels


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
    def backward(ctx, dy):
        (u, weight), T = ctx.saved_tensors, dy.shape[1]
        before = weight.shape[1] - 1
        du = depthwise(F.pad(dy, (0, 0, before, before)), weight.flip(1)) if ctx.needs_input_grad[0] else None
        return du, torch.stack([(dy * u[:, j:j + T]).sum((0, 1)) for j in range(before + 1)], dim=1)


def causal_conv(u, weight, mask=None, memory=None):
    """Depthwise causal convolution along each row's real positions: -> (B,T,E), the new memory (B,W-1,E).

    u (B,T,E); weight (E,W), the current position's tap last; memory: the last W-1 real inputs so far, oldest
    first, or None for zeros. Wherever a row's padding stands in this chunk, its first real position follows
    right after the memory, and its last real one ends the new memory; a row of padding leaves it unchanged.
    """
    b, T, E = u.shape
    weight, before = weight.to(u.dtype), weight.shape[1] - 1                            # masters may be fp32
    if mask is None:
        u = F.pad(u, (0, 0, before, 0)) if memory is None else torch.cat([memory, u], dim=1)
        memory = u[:, T:]                                                               # (B, W-1, E)
        if T == 1:                                        # decoding: one product, a tenth of the time below
            return (u * weight.mT).sum(1, keepdim=True), memory
    else:
        taps = torch.arange(before, device=u.device)
        first = mask.int().argmax(1, keepdim=True)                                      # (B, 1), 0 if none
        after = first + mask.sum(1, keepdim=True)
        u = F.pad(u.masked_fill(~mask[..., None], 0.0), (0, 0, before, 0))              # (B, W-1+T, E)
        if memory is not None:
            u = u.scatter(1, (first + taps)[..., None].expand(-1, -1, E), memory)
        memory = u.gather(1, (after + taps)[..., None].expand(-1, -1, E))
    fused = kernel("causal_conv1d", u)
    if fused:
        return fused.causal_conv1d_fn(u.mT, weight).mT[:, before:], memory
    return Depthwise.apply(u, weight), memory


def kernel(module, like):
    """A module of fused kernels where it can serve: CUDA tensors, package installed, HEED_KERNELS not 0."""
    if not like.is_cuda or os.environ.get("HEED_KERNELS", "1") == "0":
        return None
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def fused_scan(ssd_combined, x, dt, A, B, C, D, state):
    """`ssd` by mamba-ssm. dt comes masked and after softplus, so the kernel's dt_bias and dt_softplus stay
    off. It wants as many groups of B as of C, so x and B are repeated, head by whole head. These arguments
    and those below are tested against reference functions; the kernels themselves await their first run on a
    GPU."""
    x, B = (z.repeat_interleave(C.shape[2] // z.shape[2], dim=2) for z in (x, B))       # (B, T, H, ·)
    y, state = ssd_combined.mamba_chunk_scan_combined(x, dt, A, B, C.contiguous(), chunk_size=256, D=D,
                                                      initial_states=state, return_final_states=True)
    return y.to(x.dtype), state.to(dt.dtype)


def fused_step(x, dt, A, B, C, D, state):
    """`step` by mamba-ssm where it can serve; that kernel has no backward pass and writes state in place."""
    fused = kernel("mamba_ssm.ops.triton.selective_state_update", x)
    if not fused:
        return step(x, dt, A, B, C, D, state)
    x, B = (z.repeat_interleave(C.shape[1] // z.shape[1], dim=1) for z in (x, B))       # (B, H, ·)
    P, N, state = x.shape[-1], B.shape[-1], state.clone()
    dt, A = dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N)
    return fused.selective_state_update(state, x, dt, A, B, C, D=D[:, None].expand(-1, P)), state


# ---------------------------------------------------------------------------------------------------------
# The mixer


class State(NamedTuple):
    conv: torch.Tensor       # (B, 3, (2G + H) P)  the convolution's last inputs: x, B, C side by side
    ssm: torch.Tensor        # (B, H, P, N) fp32


class Mamba2(nn.Module):
    """Mamba-2 with the weights of one attention layer.

        C, B, x = q_norm(W_Q h), k_norm(W_K h), W_V h           inherited; no RoPE; C is divided by sqrt(P)
        x, B, C = conv(x, B, C)                                 depthwise, causal, over four positions
        y       = ssd(x, softplus(W_gamma h + dt_bias), -exp(A_log), B, C, D)
        out     = W_O (silu(W_G h + bias) * RMSNorm_head(y))    W_O inherited

    The paper draws all that is not inherited from N(0, 0.02) (C.3). Taken literally, conv and thus x, B and C
    almost vanish, and half the state is gone after one position: the layer is nearly dead while W_QKVO are
    frozen (Stage 1). So by default the same noise is laid around a start that makes the layer a long-memory
    linear attention; `init="paper"` lays it around zero (README's ledger, entry 3). The default starts:

        conv        1 at the current position: x, B, C pass through. No SiLU follows, as it would bend them
        A_log       0: A = -1. Gain dt and decay exp(-dt) then belong together: the state is a running average
                    of x B^T, as attention's output is an average of values, whatever T
        dt_proj     W_gamma 0, and dt_bias such that dt goes from 1/16 (first head) to 1/4096 (last) in even
                    ratios: memory half-lives of 11 to 2,800 tokens, where a large image has about 2,500
        gate_proj   W_G 0, its bias 1.278...: silu(bias) = 1, an open gate
        D           0: attention has no skip, and learns one soon enough if it wants it
        out_norm    softmax fixed the size of attention's output; here, a norm per head does. It starts at
                    half the size W_V gives to a unit-size input, for averages are smaller than what they
                    average. A norm, not one of the paper's matrices: no noise, and 1 with `init="paper"`
    """
    INHERITED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    FP32 = ("dt_bias", "A_log")        # in every model: bf16 has steps of 6 % at -8, and dt is an exponential of that

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
        self.dt_proj = nn.Linear(D, H, bias=False)                                      # W_gamma
        self.dt_bias = nn.Parameter(torch.zeros(H))       # apart, to be added in fp32
        self.A_log = nn.Parameter(torch.zeros(H))
        self.D = nn.Parameter(torch.zeros(H))
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
        dt = torch.logspace(math.log10(1 / 16), math.log10(1 / 4096), H)
        value_size = self.v_proj.weight.float().view(G, -1).norm(dim=1) / P ** 0.5      # (G,)
        starts = {                                                                      # where not zero
            "conv": torch.tensor([0.0, 0.0, 0.0, 1.0]),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),                          # softplus backwards
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
        v = self.v_proj(x)                                                              # (B, T, GP)
        C = self.q_norm(self.q_proj(x).view(b, T, H, P)) * P ** -0.5                    # (B, T, H, P)
        B = self.k_norm(self.k_proj(x).view(b, T, G, P))                                # (B, T, G, P)
        # v's dtype for all: on GPUs, autocast lets norms answer in fp32.
        u = torch.cat([v, B.flatten(2).to(v.dtype), C.flatten(2).to(v.dtype)], dim=-1)  # (B, T, (2G+H)P)
        u, conv = causal_conv(u, self.conv, mask, state and state.conv)
        v, B, C = (z.unflatten(-1, (-1, P)) for z in u.split([G * P, G * P, H * P], dim=-1))
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(self.dt_proj(x).to(wide) + self.dt_bias.to(wide))               # (B, T, H)
        y, ssm = ssd(v, dt, -torch.exp(self.A_log.to(wide)), B, C, self.D, state and state.ssm, mask)
        y = F.rms_norm(y, (P,), eps=self.config.rms_norm_eps).flatten(2) * self.out_norm
        return self.o_proj(y * F.silu(self.gate_proj(x))), State(conv, ssm)             # (B, T, D)
