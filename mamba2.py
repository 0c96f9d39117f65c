"""The Mamba-2 mixer that takes attention's place in three of four decoder layers (Sect. 4.1, C.3).

Attention's own weights carry over by state space duality ("SSD weight transfer"): linear attention,
y_t = sum_{s<=t} (C_t . B_s) x_s, is attention without softmax if C, B, x are its queries, keys and
values: W_Q -> C, W_K -> B, W_V -> x, W_O -> the output projection. Mamba-2 adds a decay and a step,
and turns the sum into a recurrence whose state does not grow with the context. Per head,

    S_t = a_t S_{t-1} + dt_t x_t B_t^T          the state, P x N; a_t = exp(dt_t A) with A < 0
    y_t = S_t C_t + D x_t                       the output, P

`step` is this line by line, `chunked_ssd` the same for whole sequences in linear time. `ssd` is
what the mixer calls: it runs parts/fast.py's form of the second, which gives the same numbers and
gradients sooner. There is nothing to run here: `torchrun distill.py --cond c4` trains this mixer.

    code     what it is                                                           shape
    x        values, one per key/value group                                      (B, T, G, P)
    B        keys, one per key/value group                                        (B, T, G, N)
    C        queries, one per head                                                (B, T, H, N)
    dt       the paper's Delta, from its projector W_gamma: how much of x enters  (B, T, H)
    A        decay rate (negative)                                                (H,)
    D        skip from x straight to y                                            (H,)
    state    S above, in fp32                                                     (B, H, P, N)

Shape letters: B batch, T positions, D model width, H heads, P head dim, N state dim (here N = P), G
key/value groups, Q chunk. Head h reads group h // (H / G), as in grouped-query attention.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.fast import convolve, convolve_one, fused, gate_heads, mamba_ssm_step, norm_scale, ssd_scan, step_size

# --------------------------------------------------------------------------------------------------
# The state space: one step, then whole sequences


@fused(training=False)
def step(x, dt, A, B, C, D, state):
    """One position: x (B,G,P), dt (B,H), B (B,G,N), C (B,H,N) -> y (B,H,P), state."""
    x, B = (z.repeat_interleave(C.shape[1] // z.shape[1], dim=1) for z in (x, B))  # groups to heads
    decay = torch.exp(dt * A)[..., None, None]                                        # (B, H, 1, 1)
    state = decay * state + (dt[..., None] * x)[..., :, None] * B[..., None, :]       # (B, H, P, N)
    y = (state @ C[..., None].to(state.dtype)).squeeze(-1) + D[:, None] * x             # (B, H, P)
    return y.to(x.dtype), state


def chunked_ssd(x, dt, A, B, C, D, state, Q):
    """`step` over T positions, Q at a time, as matrix products: -> y (B,T,H,P), the last state.

    Within a chunk this is causal attention with a decay in the place of softmax; from chunk to
    chunk the state is handed on. Arguments as `ssd` has them, in one dtype.
    """
    y = []
    for x, dt, B, C in zip(*(z.split(Q, dim=1) for z in (x, dt, B, C))):
        x, B = (z.repeat_interleave(C.shape[2] // z.shape[2], dim=2) for z in (x, B))   # groups to heads
        x, dt, B, C = (z.transpose(1, 2) for z in (x, dt[..., None], B, C))           # (B, H, Q, .)
        total = (dt * A[:, None, None]).cumsum(2)      # log of the decay from before the chunk to t
        # The decay from s to t. The difference comes before exp: each exp alone may be 0.
        causal = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril()
        L = (total - total.mT).masked_fill(~causal, -math.inf).exp()                  # (B, H, Q, Q)
        inside = (L * (C @ B.mT)) @ (dt * x)              # what entered in this chunk
        before = total.exp() * (C @ state.mT)             # what the state holds from before it
        y.append((inside + before + D[:, None, None] * x).transpose(1, 2))            # (B, Q, H, P)
        to_end = (total[:, :, -1:] - total).exp()
        state = total[:, :, -1:].exp() * state + (to_end * dt * x).mT @ B             # (B, H, P, N)
    return torch.cat(y, dim=1), state


def ssd(x, dt, A, B, C, D=None, state=None, mask=None, chunk=None):
    """The recurrence over any T positions, from any state: -> y (B,T,H,P), the state (B,H,P,N).

    x (B,T,G,P), dt (B,T,H) >= 0, A (H,) < 0, B (B,T,G,N), C (B,T,H,N); D (H,) and state (B,H,P,N),
    None for zeros; mask (B,T) bool or None: at padding dt is set to zero, so that nothing enters or
    decays the state (y there is meaningless). Decays and states are fp32, or fp64 for fp64 inputs;
    y has x's dtype. Cost and memory are linear in T: H T (2 Q (N + P) + 4 N P) operations forward;
    chunk: Q. Raises ValueError if shapes do not agree.
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
        if T > 1:
            return ssd_scan(x, dt, A, B, C, D, state, chunk)
        one = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
        y, state = mamba_ssm_step(*one) or step(*one)
        return y[:, None], state


def causal_conv(u, weight, mask=None, memory=None):
    """Depthwise causal convolution along each row's real positions: -> (B,T,E), the new memory
    (B,W-1,E).

    u (B,T,E); weight (E,W), the current position's tap last; memory: the last W-1 real inputs so
    far, oldest first, or None for zeros. Wherever a row's padding stands in this chunk, its first
    real position follows right after the memory, and its last real one ends the new memory; a row
    of padding leaves it unchanged.
    """
    b, T, E = u.shape
    weight, before = weight.to(u.dtype), weight.shape[1] - 1                   # masters may be fp32
    if mask is None:
        memory = u.new_zeros(b, before, E) if memory is None else memory
        if T == 1:                                # decoding: one product, a tenth of the time below
            return convolve_one(u, memory, weight)
        u = torch.cat([memory, u], dim=1)
        memory = u[:, T:]                                                              # (B, W-1, E)
    else:
        # The memory is put right before each row's first real position, and read off after its last
        # one.
        taps = torch.arange(before, device=u.device)
        first = mask.int().argmax(1, keepdim=True)                               # (B, 1), 0 if none
        after = first + mask.sum(1, keepdim=True)
        u = F.pad(u.masked_fill(~mask[..., None], 0.0), (0, 0, before, 0))           # (B, W-1+T, E)
        if memory is not None:
            u = u.scatter(1, (first + taps)[..., None].expand(-1, -1, E), memory)
        memory = u.gather(1, (after + taps)[..., None].expand(-1, -1, E))
    return convolve(u, weight), memory


# --------------------------------------------------------------------------------------------------
# The mixer


class RecurrentMixer(nn.Module):
    """What Mamba2 and gdn.GatedDeltaNet share: attention's weights, and how new parameters begin.

    The paper draws all that is not inherited from N(0, 0.02) (C.3). Taken literally, conv and thus
    values, keys and queries almost vanish, and half the state is gone after one position: the layer
    is nearly dead while W_QKVO are frozen (Stage 1). So by default the same noise is laid around a
    start that makes the layer a long-memory linear attention (`starts`); `init="paper"` lays it
    around zero (docs/method.md, ledger 3).
    """
    INHERITED = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    FP32 = ()                          # parameters that no model rounds below fp32

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        D, H = config.hidden_size, config.num_attention_heads
        G, P = config.num_key_value_heads, config.head_dim
        if H % G:
            raise ValueError(f"{H} heads cannot share {G} key/value groups evenly")
        self.q_proj = nn.Linear(D, H * P, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * P, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * P, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * P, D, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(P, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(P, config.rms_norm_eps)
        self.conv = nn.Parameter(torch.zeros((H + 2 * G) * P, 4))

    @torch.no_grad()
    def init_new(self, init="default", generator=None):
        """Fill every parameter that is not inherited. Drawn on the CPU in fp32: the same on any
        device."""
        if init not in ("default", "paper"):
            raise ValueError(f"no init {init!r}: choose default or paper")
        starts = self.starts() if init == "default" else {}
        for name, p in self.named_parameters():
            if name.split(".")[0] in self.INHERITED or name == "out_norm":
                continue
            noise = torch.empty(p.shape, dtype=torch.float32, device="cpu")
            nn.init.trunc_normal_(noise, std=0.02, a=-0.04, b=0.04, generator=generator)
            p.copy_(noise + starts.get(name, torch.tensor(0.0)))
        # Softmax fixed the size of attention's output; here, a norm per head does. It is none of
        # the paper's matrices, so it gets no noise, and is 1 with init="paper". By default it
        # starts at half the size that W_V gives to a unit-size input, for averages are smaller than
        # what they average.
        H, G, P = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        value_size = self.v_proj.weight.float().view(G, -1).norm(dim=1) / P ** 0.5      # (G,)
        self.out_norm.copy_((0.5 * value_size).repeat_interleave(H // G * P) if init == "default"
                            else torch.ones(H * P))

    @classmethod
    def from_attention(cls, attention, init="default", generator=None):
        """A mixer on the attention's device and in its dtype, with clones of its weights (Sect.
        4.1)."""
        like = attention.q_proj.weight
        with torch.device("meta"):
            mixer = cls(attention.config, attention.layer)
        mixer = mixer.to(like.dtype)
        for name in cls.FP32:
            p = getattr(mixer, name)
            p.data = p.data.to(torch.promote_types(like.dtype, torch.float32))
        mixer = mixer.to_empty(device=like.device)
        for name in cls.INHERITED:
            if hasattr(attention, name):                  # without QK-norm two are missing
                getattr(mixer, name).load_state_dict(getattr(attention, name).state_dict())
        mixer.init_new(init, generator)
        return mixer

    def queries_keys(self, x, scale=1.0):
        """x (B,T,D) -> normalised queries times `scale` (B,T,H,P) and keys (B,T,G,P). No RoPE: a
        recurrence knows the order of what it reads."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        if not self.config.qk_norm:
            return self.q_proj(x).view(heads) * scale, self.k_proj(x).view(heads)
        return (norm_scale(self.q_proj(x).view(heads), self.q_norm.weight, self.q_norm.eps, scale),
                norm_scale(self.k_proj(x).view(heads), self.k_norm.weight, self.k_norm.eps, 1.0))

    def convolved(self, q, k, v, mask, memory):
        """The short convolution over values, keys and queries side by side -> q, k, v (B,T,.,P),
        the new memory."""
        H, G, P = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        u = torch.cat([v, k.flatten(2), q.flatten(2)], dim=-1)                     # (B, T, (2G+H)P)
        u, memory = causal_conv(u, self.conv, mask, memory)
        v, k, q = (z.unflatten(-1, (-1, P)) for z in u.split([G * P, G * P, H * P], dim=-1))
        return q, k, v, memory

    def gated(self, x, y):
        """The output of a layer: W_O (silu(W_G x + bias) * RMSNorm_head(y)), for y (B,T,H,P)."""
        return self.o_proj(gate_heads(y, self.gate_proj(x), self.out_norm, self.config.rms_norm_eps))   # (B, T, D)


class State(NamedTuple):
    conv: torch.Tensor     # (B, 3, (2G + H) P)  the convolution's last inputs: x, B, C side by side
    ssm: torch.Tensor        # (B, H, P, N) fp32


class Mamba2(RecurrentMixer):
    """Mamba-2 with the weights of one attention layer.

        C, B, x = q_norm(W_Q h), k_norm(W_K h), W_V h           inherited; no RoPE; C is divided by sqrt(P)
        x, B, C = conv(x, B, C)                                 depthwise, causal, over four positions
        y       = ssd(x, softplus(W_gamma h + dt_bias), -exp(A_log), B, C, D)
        out     = W_O (silu(W_G h + bias) * RMSNorm_head(y))    W_O inherited

    The default starts, where they are not zero (all get noise, as RecurrentMixer says):

        conv        1 at the current position: x, B, C pass through. No SiLU follows, as it would bend them
        dt_bias     such that dt goes from 1/16 (first head) to 1/4096 (last) in even ratios: memory half-lives
                    of 11 to 2,800 tokens, where a large image has about 2,500. W_gamma is 0
        gate_proj   W_G 0, its bias 1.278...: silu(bias) = 1, an open gate

    A_log is 0: A = -1. Gain dt and decay exp(-dt) then belong together: the state is a running
    average of x B^T, as attention's output is an average of values, whatever T. D is 0: attention
    has no skip, and learns one soon enough if it wants it.
    """
    FP32 = ("dt_bias", "A_log")      # bf16 has steps of 6 % at -8, and dt is an exponential of that

    def __init__(self, config, layer):
        super().__init__(config, layer)
        D, H, P = config.hidden_size, config.num_attention_heads, config.head_dim
        self.dt_proj = nn.Linear(D, H, bias=False)                                      # W_gamma
        self.dt_bias = nn.Parameter(torch.zeros(H))       # apart, to be added in fp32
        self.A_log = nn.Parameter(torch.zeros(H))
        self.D = nn.Parameter(torch.zeros(H))
        self.gate_proj = nn.Linear(D, H * P)                                            # W_G
        self.out_norm = nn.Parameter(torch.ones(H * P))
        if not self.conv.is_meta:
            self.init_new()

    def starts(self):
        dt = torch.logspace(math.log10(1 / 16), math.log10(1 / 4096), self.config.num_attention_heads)
        return {"conv": torch.tensor([0.0, 0.0, 0.0, 1.0]),
                "dt_bias": dt + torch.log(-torch.expm1(-dt)),                   # softplus backwards
                "gate_proj.bias": torch.tensor(1.278464542761)}

    def forward(self, x, mask=None, state=None, rope=None):                     # (B, T, D); no rope
        v = self.v_proj(x)                                                              # (B, T, GP)
        C, B = self.queries_keys(x, self.config.head_dim ** -0.5)            # attention's own scale
        C, B, v, conv = self.convolved(C, B, v, mask, state and state.conv)      # (B, T, H or G, P)
        dt, A = step_size(self.dt_proj(x), self.dt_bias, self.A_log)    # softplus(...), -exp(A_log)
        y, ssm = ssd(v, dt, A, B, C, self.D, state and state.ssm, mask)
        return self.gated(x, y), State(conv, ssm)                                       # (B, T, D)
