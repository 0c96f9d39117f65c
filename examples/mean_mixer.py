"""A mixer of one's own, worked: every position sees the mean of all values up to it, through a gate.

    torchrun distill.py --cond c4 --mixer examples/mean_mixer.py:MeanMixer

A mixer is one class in one file; nothing else needs an edit. What it must have, and what each part is for:

    INHERITED          names of what comes from attention: frozen in Stage 1. All else is new and trains from the start
    from_attention     the weight transfer (Sect. 4.1)
    forward            x (B,T,D), the padding mask, a state -> y (B,T,D), the new state: right for one position (decoding),
                       for any chunk of a prefill, and for whole sequences padded on either side. Padding may neither enter
                       the state nor decay it
    FP32 (optional)    names of parameters that no bf16 model shall round

A state is a NamedTuple of tensors whose shapes do not grow: then decoding on a GPU is captured as one graph.
"""
from typing import NamedTuple

import torch
import torch.nn as nn


class State(NamedTuple):
    total: torch.Tensor          # (B, G * P)  sum of the values so far
    count: torch.Tensor          # (B, 1)      how many they were


class MeanMixer(nn.Module):
    INHERITED = ("v_proj", "o_proj")

    def __init__(self, config, layer):
        super().__init__()
        D, P = config.hidden_size, config.head_dim
        self.G, self.H = config.num_key_value_heads, config.num_attention_heads
        self.v_proj = nn.Linear(D, self.G * P, bias=False)
        self.o_proj = nn.Linear(self.H * P, D, bias=False)
        self.gate = nn.Linear(D, self.H * P)

    @classmethod
    def from_attention(cls, attention, init="default", generator=None):
        mixer = cls(attention.config, attention.layer).to(attention.v_proj.weight)
        for name in cls.INHERITED:
            getattr(mixer, name).load_state_dict(getattr(attention, name).state_dict())
        nn.init.trunc_normal_(mixer.gate.weight, std=0.02, generator=generator)
        return mixer

    def forward(self, x, mask=None, state=None, rope=None):                             # (B, T, D)
        wide = torch.promote_types(x.dtype, torch.float32)           # in bf16, 256 + 1 is 256
        real = torch.ones_like(x[..., :1], dtype=wide) if mask is None else mask[..., None].to(wide)    # (B, T, 1)
        total, count = (self.v_proj(x) * real).cumsum(1), real.cumsum(1)
        if state is not None:
            total, count = total + state.total[:, None], count + state.count[:, None]
        mean = (total / count.clamp(min=1)).to(x.dtype).unflatten(-1, (self.G, -1))     # (B, T, G, P)
        y = mean.repeat_interleave(self.H // self.G, dim=2).flatten(2)                  # (B, T, H * P)
        return self.o_proj(y * torch.sigmoid(self.gate(x))), State(total[:, -1], count[:, -1])
