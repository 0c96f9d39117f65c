"""Qwen3-VL (dense), and its conversion into a hybrid: one file from checkpoint to answer.

The teacher of the HEED paper (Sect. 4.1): a vision Transformer whose patch features are merged 2x2
into visual tokens, a Qwen3 decoder that reads them among the text tokens, and DeepStack, which adds
features of earlier ViT blocks to the first decoder layers. Module names equal the released
checkpoints' tensor names, so loading is strict and needs no mapping. `to_hybrid` exchanges three of
four attention modules for a linear-time mixer; the student shares every other module with its
teacher *by reference*, so both cost one set of weights.

    from model import Qwen3VL, to_hybrid
    teacher = Qwen3VL.from_pretrained("tiny")      # or a folder of a released Qwen3-VL-2B/4B/8B/32B
    student = to_hybrid(teacher, mixer="mamba2")        # or "gdn", or your own "mymixer.py:MyMixer"

What sits in a decoder layer's `self_attn` slot is a *mixer*; attention is one, Mamba-2 another:

    forward(x, mask=None, state=None, rope=None) -> (y, state)       # x, y (B, T, D)

    code         what it is                                          shape
    ids          token ids, image placeholders included              (B, T)
    mask         True at real positions, False at padding            (B, T) bool, or None
    pixels       flattened patches of all images, in reading order   (patches, 3 * 2 * ps * ps)
    grids        [t, h, w] of each image, counted in patches         (images, 3)
    rope         cos and sin of the interleaved MRoPE angles         2 x (B, T, P)
    r (paper)    the residual stream: a decoder layer's input        (B, T, D)

Shape letters everywhere: B batch, T positions, D model width, H heads, P head dim, G key/value
groups, N visual patches (here) or state dim (in mixers), V vocabulary.
"""
import copy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from parts.checkpoint import (as_stored, copy_companions, device_of, dtype_of,  # noqa: F401
                              find_tensors, read_weights, write_folder)
from parts.config import Config, TextConfig, VisionConfig, read_object  # noqa: F401
from parts.decoding import FixedCache, KVCache, Replayed, append, attend_fixed, sample  # noqa: F401
from parts.fast import SwiGLU, norm_rotate, rms_norm, rotate
from parts.mixers import mixer_class

# --------------------------------------------------------------------------------------------------
# The vision tower: patches in, visual tokens out


class VisionOut(NamedTuple):
    tokens: torch.Tensor            # (visual tokens, D)  replace the placeholder embeddings
    deepstack: list                 # of (visual tokens, D), added after decoder layers 0, 1, 2, ...
    patches: torch.Tensor           # (patches, Dv)  last ViT block: what density.py measures


def block_order(h, w, m):
    """Rows and columns of an h x w patch grid, every m * m consecutive patches one token."""
    both = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return rearrange(both, "two (bh mh) (bw mw) -> two (bh bw mh mw)", mh=m, mw=m)


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(c.in_channels, c.hidden_size, kernel, stride=kernel)

    def forward(self, pixels):                                                      # (N, 3*2*ps*ps)
        # Kernel = stride, so the convolution is a matrix product, which is far faster in bf16.
        weight = self.proj.weight.flatten(1)
        return F.linear(pixels.to(weight.dtype), weight, self.proj.bias)


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, rope, lengths):                                                # (N, Dv)
        q, k, v = rearrange(self.qkv(x), "n (three h p) -> three n h p", three=3, h=self.heads)
        cos, sin = (t[:, None] for t in rope)                                           # (N, 1, P)
        q, k = (rotate(t.float(), cos, sin).to(t.dtype) for t in (q, k))
        if len(set(lengths)) == 1:                       # frames of one size: a single batched call
            parts = [rearrange(t, "(f n) h p -> f h n p", n=lengths[0]) for t in (q, k, v)]
            y = rearrange(F.scaled_dot_product_attention(*parts), "f h n p -> (f n) (h p)")
        else:                                             # a patch sees only its own frame
            frames = zip(*(rearrange(t, "n h p -> 1 h n p").split(lengths, dim=2) for t in (q, k, v)))
            y = [F.scaled_dot_product_attention(*frame) for frame in frames]
            y = rearrange(torch.cat(y, dim=2), "1 h n p -> n (h p)")
        return self.proj(y)


class VisionMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.linear_fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.attn = VisionAttention(c)
        self.mlp = VisionMLP(c)

    def forward(self, x, rope, lengths):
        x = x + self.attn(self.norm1(x), rope, lengths)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """m x m patches -> one token of width D. The main merger normalises before the shuffle,
    DeepStack's after."""

    def __init__(self, c, norm_after):
        super().__init__()
        self.width = c.hidden_size * c.spatial_merge_size ** 2
        self.norm_after = norm_after
        self.norm = nn.LayerNorm(self.width if norm_after else c.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, c.out_hidden_size)

    def forward(self, x):                                                               # (N, Dv)
        x = self.norm(x.view(-1, self.width) if self.norm_after else x).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))  # the exact GELU; ViT blocks have tanh's


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Embedding(c.num_position_embeddings, c.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = Merger(c, norm_after=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(c, norm_after=True) for _ in c.deepstack_visual_indexes)

    def positions(self, h, w):
        """Learned position embedding of an h x w grid: bilinear in a square table, corners aligned."""
        side, device = round(self.config.num_position_embeddings ** 0.5), self.pos_embed.weight.device
        row, col = block_order(h, w, self.config.spatial_merge_size)
        y, x = (torch.linspace(0, side - 1, n)[i].to(device) for n, i in ((h, row), (w, col)))
        y0, x0 = y.floor().long(), x.floor().long()
        y1, x1 = (y0 + 1).clamp(max=side - 1), (x0 + 1).clamp(max=side - 1)
        fy, fx = (y - y0)[:, None], (x - x0)[:, None]
        table = self.pos_embed                                                   # (side * side, Dv)
        top = (1 - fx) * table(y0 * side + x0) + fx * table(y0 * side + x1)
        bottom = (1 - fx) * table(y1 * side + x0) + fx * table(y1 * side + x1)
        return ((1 - fy) * top + fy * bottom).to(table.weight.dtype)                   # (h * w, Dv)

    def rotary(self, h, w, device):
        half = self.config.hidden_size // self.config.num_heads // 2
        inverse = 1e4 ** (-torch.arange(0, half, 2).float() / half)
        row, col = block_order(h, w, self.config.spatial_merge_size)
        angle = torch.cat((row[:, None] * inverse, col[:, None] * inverse), dim=-1)
        return torch.cat((angle, angle), dim=-1).to(device)                       # (h * w, P), fp32

    def places(self, pixels, grids):
        """-> position embeddings (N, Dv), the rotary cos and sin (N, P) each, patches per frame."""
        frames = [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
        lengths = [h * w for h, w in frames]
        if sum(lengths) != len(pixels):
            raise ValueError(f"grids describe {sum(lengths)} patches, but pixels has "
                             f"{len(pixels)} rows")
        m = self.config.spatial_merge_size
        if odd := [f"{h} x {w}" for h, w in frames if h % m or w % m]:
            raise ValueError(f"a grid of {odd[0]} patches has no whole {m} x {m} blocks")
        places = {f: self.positions(*f) for f in set(frames)}
        angles = {f: self.rotary(*f, pixels.device) for f in set(frames)}
        angle = torch.cat([angles[f] for f in frames])
        return torch.cat([places[f] for f in frames]), (angle.cos(), angle.sin()), lengths

    def forward(self, pixels, grids):
        """pixels (patches, 3*2*ps*ps) in merge-block order, grids (images, 3) -> VisionOut."""
        places, rope, lengths = self.places(pixels, grids)
        x, deepstack = self.patch_embed(pixels) + places, []                            # (N, Dv)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, lengths)
            if i in self.config.deepstack_visual_indexes:
                j = self.config.deepstack_visual_indexes.index(i)
                deepstack.append(self.deepstack_merger_list[j](x))
        return VisionOut(self.merger(x), deepstack, x)


# --------------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)         # in fp32, rounded, then times weight


class Attention(nn.Module):
    """Grouped-query attention with QK-norm: the mixer whose weights seed all others. Other teachers'
    have none, or biases."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        d, p = config.hidden_size, config.head_dim
        h, g = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, h * p, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, g * p, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, g * p, bias=config.qkv_bias)
        self.o_proj = nn.Linear(h * p, d, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(p, config.rms_norm_eps)
            self.k_norm = RMSNorm(p, config.rms_norm_eps)

    def project(self, x):
        """x (B,T,D) -> q (B,H,T,P), k and v (B,G,T,P)."""
        return (f(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
                for f in (self.q_proj, self.k_proj, self.v_proj))

    def heads(self, x, rope):
        """As `project`; q and k are normalised and rotated."""
        q, k, v = self.project(x)
        cos, sin = (t[:, None] for t in rope)                                         # (B, 1, T, P)
        if not self.config.qk_norm:
            return rotate(q, cos, sin), rotate(k, cos, sin), v
        return (norm_rotate(q, self.q_norm.weight, cos, sin, self.q_norm.eps),
                norm_rotate(k, self.k_norm.weight, cos, sin, self.k_norm.eps), v)

    def forward(self, x, mask=None, state=None, rope=None):                             # (B, T, D)
        q, k, v = self.heads(x, rope)
        if isinstance(state, FixedCache):                 # one step of a replayed decoding
            y = attend_fixed(state, q, k, v)                                          # (B, H, 1, P)
        else:
            state = append(state, k, v, mask)
            k, v = state.k[:, :, :state.length], state.v[:, :, :state.length]         # (B, G, S, P)
            y = attend(q, k, v, state.mask)                                           # (B, H, T, P)
        return self.o_proj(y.transpose(1, 2).flatten(2)), state                         # (B, T, D)


def attend(q, k, v, mask):
    """Causal attention of the last T of S positions. q (B,H,T,P), k and v (B,G,S,P), mask (B,S)."""
    T, S, G = q.shape[2], k.shape[2], k.shape[1]
    if mask is None and q.is_cuda and q.dtype.itemsize == 2:
        # Flash attention, which groups heads itself, and splits the keys of a single query.
        causal = causal_lower_right(T, S) if 1 < T < S else None
        return F.scaled_dot_product_attention(q, k, v, causal, is_causal=T == S > 1, enable_gqa=True)
    if T == 1:                                            # decode: a group's queries share its keys
        see = None if mask is None else (mask | ~mask[:, -1:])[:, None, None, :]        # as below
        grouped = q.view(len(q), G, -1, q.shape[3])                                # (B, G, H/G, P)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=see).reshape(q.shape)
    k, v = (t.repeat_interleave(q.shape[1] // G, dim=1) for t in (k, v))               # whole heads
    if mask is None and S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    see = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:                        # a padded query sees all, lest its softmax be empty
        see = see & (mask[:, None, None, :] | ~mask[:, None, S - T:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=see)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))    # silu(gate) * up


class DecoderLayer(nn.Module):
    def __init__(self, config, layer, mixer=Attention):
        super().__init__()
        self.self_attn = mixer(config, layer)             # its checkpoint name, whoever sits in it
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask=None, rope=None, state=None):
        """-> next residual stream (B,T,D), the mixer's output before the residual sum (B,T,D), the
        new state."""
        o, state = self.self_attn(self.input_layernorm(x), mask, state, rope)
        x = x + o
        return x + self.mlp(self.post_attention_layernorm(x)), o, state


class TextModel(nn.Module):
    def __init__(self, config, hybrid):
        super().__init__()
        replaced = set(hybrid["layers"]) if hybrid else ()
        mixer = mixer_class(hybrid["mixer"]) if hybrid else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layer = config.Layer or DecoderLayer
        self.layers = nn.ModuleList(layer(config, i, mixer if i in replaced else Attention)
                                    for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.visual = c.Tower(c) if c.Tower else VisionTower(c.vision)
        self.language_model = TextModel(c.text, c.hybrid)


# --------------------------------------------------------------------------------------------------
# Positions: interleaved multimodal RoPE


def mrope_positions(ids, mask, grids, config):
    """Time, row and column of every token.

    A text token takes (p, p, p); an image of h x w merged patches takes (p, p + row, p + column)
    and the text goes on at p + max(h, w). Padding is not counted.

    Args: ids (B, T), mask (B, T) bool or None, grids (images, 3) or None.
    Returns: (3, B, T) int64 positions and (B,) the position of the token that comes next.
    Raises ValueError when the placeholders do not match the grids.
    """
    B, T = ids.shape
    m = config.vision.spatial_merge_size
    grids = [] if grids is None else grids.tolist()
    frames = iter([(h // m, w // m) for t, h, w in grids for _ in range(t)])
    visual = ((ids == config.image_token_id) | (ids == config.video_token_id)).tolist()
    real = [[True] * T] * B if mask is None else mask.tolist()
    positions, after = torch.zeros(3, B, T, dtype=torch.long), []
    for b in range(B):
        kept = [t for t in range(T) if real[b][t]]
        columns, p, i = [], 0, 0
        while i < len(kept):
            if not visual[b][kept[i]]:
                run = 1
                while i + run < len(kept) and not visual[b][kept[i + run]]:
                    run += 1
                columns.append((p + torch.arange(run)).expand(3, run))
                p += run
            else:
                h, w = next(frames, (0, 0))
                run = h * w
                if run == 0:
                    raise ValueError(f"row {b}: there is no image for the placeholder at token "
                                     f"{kept[i]}")
                if not all(visual[b][t] for t in kept[i:i + run]) or i + run > len(kept):
                    raise ValueError(f"row {b}: the image at token {kept[i]} has a merged grid of "
                                     f"{h} x {w}, but fewer than {run} placeholders")
                row, col = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
                columns.append(p + torch.stack((torch.zeros_like(row), row, col)))
                p += max(h, w)
            i += run
        if columns:
            positions[:, b, torch.tensor(kept)] = torch.cat(columns, dim=1)
        after.append(p)
    if next(frames, None) is not None:
        raise ValueError("there are more image grids than images in the token ids")
    return positions.to(ids.device), torch.tensor(after, device=ids.device)


def mrope(positions, config, dtype):
    """cos and sin, each (B, T, P), of positions (3, B, T): frequencies interleaved T H W T H W ...
    T T."""
    P = config.head_dim
    inverse = 1 / config.rope_theta ** (torch.arange(0, P, 2, device=positions.device).float() / P)
    angle = positions[..., None].float() * inverse                                  # (3, B, T, P/2)
    mixed = angle[0].clone()
    for axis in (1, 2):
        stop = 3 * config.mrope_section[axis]
        mixed[..., axis:stop:3] = angle[axis][..., axis:stop:3]
    mixed = torch.cat((mixed, mixed), dim=-1)
    return mixed.cos().to(dtype), mixed.sin().to(dtype)                           # angles stay fp32


# --------------------------------------------------------------------------------------------------
# The model


class Embedded(NamedTuple):
    x: torch.Tensor                 # (B, T, D)  the residual stream before layer 0
    deepstack: list                 # of (B, T, D), zero off the images; [j] is added after layer j
    rope: tuple                     # cos, sin: (B, T, P) each
    next_position: torch.Tensor     # (B,)  of the token that comes after these


def causal_mask_needed(mask):
    """What the layers must be told about padding: None when it is only on the right.

    Every mixer is causal, so a real position never sees what stands right of it; without a state to
    keep, right padding needs no mask at all, which is the fast path of training.
    """
    return None if mask is None or bool(mask[:, 0].all()) else mask


class Qwen3VL(nn.Module):
    """Where config is another teacher's, `config.Tower` and its like take the places of the classes
    above; all else is the same."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.folder, self.sampling = None, {}      # where it was loaded from; its generation_config
        self.replayed = None           # the last decoding step that was captured (`start_decoding`)
        self.recompute = False             # in training: keep only each layer's input (`run_layer`)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight

    visual = property(lambda self: self.model.visual)
    layers = property(lambda self: self.model.language_model.layers)
    norm = property(lambda self: self.model.language_model.norm)

    def rope(self, positions, dtype):
        return (self.config.rope or mrope)(positions, self.config.text, dtype)

    def embed(self, ids, mask=None, pixels=None, grids=None, vision=None):
        """Tokens and images -> the residual stream before layer 0, and what the layers need with
        it.

        vision: a VisionOut of these images, when it was computed before (teacher and student share
        it).
        """
        if ids.numel() == 0:
            raise ValueError(f"there is nothing to read: ids have shape {tuple(ids.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape):
            raise ValueError(f"mask must be bool of shape {tuple(ids.shape)}, but is {mask.dtype} "
                             f"of {tuple(mask.shape)}")
        if vision is None and (pixels is None) != (grids is None):
            raise ValueError("pixels and grids belong together, but only one of them is given")
        x = self.model.language_model.embed_tokens(ids)                                 # (B, T, D)
        places = self.config.positions or mrope_positions
        positions, next_position = places(ids, mask, grids, self.config)
        rope = self.rope(positions, x.dtype)
        if vision is None and pixels is not None:
            vision = self.visual(pixels, grids)
        deepstack = []
        if vision is not None:
            at = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
            at = (at if mask is None else at & mask)[..., None]                         # (B, T, 1)
            x = x.masked_scatter(at, vision.tokens.to(x.dtype))
            zeros = torch.zeros_like(x)
            deepstack = [zeros.masked_scatter(at, f.to(x.dtype)) for f in vision.deepstack]
        return Embedded(x, deepstack, rope, next_position)

    def run_layer(self, layer, *inputs):
        """A decoder layer's outputs. With `recompute`, what its backward pass needs is computed
        anew, not kept."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def decode(self, x, deepstack, rope, mask, states):
        """One chunk through all layers. states: one per layer (None at the start). -> hidden (B, T,
        D), states."""
        fresh = []
        for i, layer in enumerate(self.layers):
            x, _, state = layer(x, mask, rope, states[i])
            if i < len(deepstack):
                x = x + deepstack[i]
            fresh.append(state)
        return x, fresh

    def hidden(self, ids, mask=None, pixels=None, grids=None, vision=None):
        """The normalised last hidden states (B, T, D), before the head. Padding on the left or on
        the right."""
        x, deepstack, rope, _ = self.embed(ids, mask, pixels, grids, vision)
        mask = causal_mask_needed(mask)
        for i, layer in enumerate(self.layers):
            x = self.run_layer(layer, x, mask, rope)[0]
            if i < len(deepstack):
                x = x + deepstack[i]
        return self.norm(x)

    def forward(self, ids, mask=None, pixels=None, grids=None):
        """-> logits (B, T, V)."""
        return self.lm_head(self.hidden(ids, mask, pixels, grids))

    @torch.inference_mode()
    def prefill(self, ids, mask=None, pixels=None, grids=None, chunk=None):
        """Reads a prompt, `chunk` positions at a time, padded on any side. -> logits after each
        row's last token (B, V), states, the next positions (B,)."""
        B, T = ids.shape
        x, deepstack, rope, next_position = self.embed(ids, mask, pixels, grids)
        end = torch.arange(T, device=ids.device).expand(B, T)                           # (B, T)
        end = (end if mask is None else torch.where(mask, end, 0)).amax(1)              # (B,)
        states, last = [None] * len(self.layers), torch.zeros_like(x[:, 0])
        for a in range(0, T, chunk or T):
            at = slice(a, min(T, a + (chunk or T)))
            h, states = self.decode(x[:, at], [f[:, at] for f in deepstack],
                                    tuple(t[:, at] for t in rope),
                                    None if mask is None else mask[:, at], states)
            here = (end >= a) & (end < at.stop)
            row = h[torch.arange(B), (end - a).clamp(0, at.stop - a - 1)]
            last = torch.where(here[:, None], row, last)
        return self.lm_head(self.norm(last)), states, next_position

    @torch.inference_mode()
    def step(self, tokens, states, position):
        """One more token for every row. tokens (B,), position (B,) -> logits (B, V), states."""
        x = self.model.language_model.embed_tokens(tokens[:, None])
        rope = self.rope(position[None, :, None].expand(3, -1, 1), x.dtype)
        h, states = self.decode(x, [], rope, None, states)
        return self.lm_head(self.norm(h[:, 0])), states

    @torch.inference_mode()
    def start_decoding(self, states, position, steps, graph=None):
        """After `prefill`: -> a function tokens (B,) -> logits (B, V), for up to so many steps.

        graph: on fixed buffers, on CUDA as one captured graph; the logits are then in a buffer that
        the next call overwrites, `states` is emptied, and the last graph is kept, to serve the next
        prompt that fits. None: on CUDA.
        """
        if graph or graph is None and position.is_cuda:
            weights = tuple(p.data_ptr() for p in self.parameters())
            if self.replayed is None or not self.replayed.fits(states, position, steps, weights):
                self.replayed = None                      # its memory first
                self.replayed = Replayed(self.step, states, position, steps, weights)
                return self.replayed
            return self.replayed.load(states, position)

        def step(tokens):
            nonlocal states, position
            logits, states = self.step(tokens, states, position)
            position = position + 1
            return logits
        return step

    @torch.inference_mode()
    def generate(self, ids, mask=None, pixels=None, grids=None, max_new_tokens=64, chunk=None,
                 generator=None, temperature=0.0, top_p=1.0, top_k=0, graph=None):
        """Answers, greedy by default; `**model.sampling` samples as the checkpoint suggests.

        ids (B, T) padded on either side, mask (B, T). graph: as in `start_decoding`. Returns B
        lists of new token ids, without the eos. Raises ValueError on a negative temperature or
        chunk, and when the weights give no finite logits.
        """
        if temperature < 0 or chunk is not None and chunk < 1:
            raise ValueError("temperature must be at least 0 and chunk at least 1, got "
                             f"{temperature} and {chunk}")
        logits, states, position = self.prefill(ids, mask, pixels, grids, chunk)
        if not torch.isfinite(logits).all():
            raise ValueError("the model's logits are not finite: are its weights damaged?")
        answers, done, step = [[] for _ in range(len(ids))], [False] * len(ids), None
        for n in range(max_new_tokens):
            token = sample(logits, temperature, top_p, top_k, generator)                # (B,)
            for b, t in enumerate(token.tolist()):
                done[b] = done[b] or t in self.config.eos_token_id
                if not done[b]:
                    answers[b].append(t)
            if all(done) or n + 1 == max_new_tokens:
                break
            step = step or self.start_decoding(states, position, max_new_tokens - 1, graph)
            logits = step(token)
        return answers

    # -- to and from a folder

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """Loads a folder of config.json and safetensors, single or sharded, in `dtype` (default: as
        stored). What mixers name in FP32 is never rounded below it (`in_dtype`). Raises one
        ValueError that names all that is wrong.
        """
        config = Config.from_folder(folder)
        with torch.device("meta"):
            model = cls(config)
        head, embeddings = "lm_head.weight", "model.language_model.embed_tokens.weight"
        tied = (head, embeddings) if config.tie_word_embeddings else ()
        shapes = {k: v.shape for k, v in model.state_dict().items() if k not in tied[:1]}
        state = read_weights(folder, shapes, lambda name: dtype and model.dtype_in(name, dtype),
                             device, tied, config.stored)
        model.load_state_dict({**state, head: state[embeddings]} if tied else state, assign=True)
        if lost := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
            raise ValueError(f"{folder}: {', '.join(lost)} of a mixer are in no file; buffers must "
                             "be persistent")
        if tied:                                          # assign made two Parameters of one tensor
            model.lm_head.weight = model.model.language_model.embed_tokens.weight
        model.folder = Path(folder)
        if (path := model.folder / "generation_config.json").is_file():
            stored = read_object(path)
            if stored.get("do_sample"):                   # else greedy, as transformers reads it
                names = ("temperature", "top_p", "top_k")
                model.sampling = {k: stored[k] for k in names if stored.get(k) is not None}
        return model.eval()

    def save_pretrained(self, folder, shard_bytes=5 * 2 ** 30):
        """Writes config.json and safetensors (what transformers loads, unless it is a hybrid), and
        copies the tokenizer and image settings of the folder this model came from. Each file
        appears whole or not at all."""
        state = {k: v for k, v in self.state_dict().items()
                 if not (self.config.tie_word_embeddings and k == "lm_head.weight")}
        write_folder(folder, self.config.to_json(), as_stored(state, self.config.stored), shard_bytes)
        if self.folder and self.folder.resolve() != Path(folder).resolve():
            copy_companions(self.folder, folder)

    def dtype_in(self, name, dtype):
        """The dtype of a parameter in a model of `dtype`."""
        owner, _, last = name.rpartition(".")
        fp32 = last in getattr(self.get_submodule(owner), "FP32", ())
        return torch.promote_types(dtype, torch.float32) if fp32 else dtype

    def in_dtype(self, dtype):
        """As Module.to(dtype), except for what mixers name in FP32."""
        for name, p in self.named_parameters():
            p.data = p.data.to(self.dtype_in(name, dtype))
        return self


# --------------------------------------------------------------------------------------------------
# From a teacher to a hybrid

def reshell(module, **children):
    """A module with some children exchanged, which shares all the others, and its parameters, by
    reference."""
    shell = copy.copy(module)
    for name, value in vars(module).items():    # its own tables: a hook on one is none on the other
        if isinstance(value, dict):
            shell.__dict__[name] = value.copy()
    shell._modules.update(children)
    return shell


def to_hybrid(teacher, mixer="mamba2", keep_every=4, init="default", seed=0):
    """The student f_theta-hat: attention stays in every `keep_every`-th layer (3, 7, ... of 0-based
    4), all the other layers S get a mixer made from that layer's attention (Sect. 4.1). Only the
    mixers own new weights.

    Raises ValueError when the teacher is a hybrid, or when no layer would keep attention or none be
    replaced.
    """
    layers = teacher.layers
    if teacher.config.hybrid:
        raise ValueError("this model is a hybrid already: a teacher has attention in all layers")
    replaced = [i for i in range(len(layers)) if (i + 1) % keep_every != 0]
    if not 0 < len(replaced) < len(layers):
        raise ValueError(f"keep_every {keep_every} on {len(layers)} layers replaces "
                         f"{len(replaced)} of them; a hybrid needs both kinds")
    kind, fresh = mixer_class(mixer), list(layers)
    for i in replaced:
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        made = kind.from_attention(layers[i].self_attn, init, generator)
        fresh[i] = reshell(layers[i], self_attn=made)
    text = reshell(teacher.model.language_model, layers=nn.ModuleList(fresh))
    student = reshell(teacher, model=reshell(teacher.model, language_model=text))
    student.config = copy.copy(teacher.config)
    student.config.hybrid = {"mixer": mixer, "layers": replaced}
    return student
