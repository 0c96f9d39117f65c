"""LoRA: low-rank adapters around frozen linear layers (C.5, for DPO).

    W becomes W + (alpha / r) B A                         A (r, in), B (out, r)
"""
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x). B starts at zero: at first, nothing changes."""

    def __init__(self, base, rank, alpha, dropout, generator=None):
        super().__init__()
        self.base, self.scale, self.dropout, self.on = base, alpha / rank, dropout, True
        like = base.weight
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)    # U(+-1 / sqrt(in)): PEFT
        # fp32 masters, as all that trains: in bf16 small updates would be rounded away.
        wide = torch.promote_types(like.dtype, torch.float32)
        b = torch.zeros(base.out_features, rank, device=like.device, dtype=wide)
        self.A = nn.Parameter(a.to(like.device, wide))                              # (r, in)
        self.B = nn.Parameter(b)                                                    # (out, r)

    def forward(self, x):                                                           # (..., in)
        y = self.base(x)                                                            # (..., out)
        if not self.on:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A)           # (..., r)
        return y + self.scale * F.linear(low, self.B)

    @torch.no_grad()
    def merged(self):
        """The plain layer again. Summed in fp32, rounded once: in bf16, W swallows small updates."""
        delta = self.scale * (self.B @ self.A)                                      # (out, in)
        self.base.weight.copy_(self.base.weight.to(delta.dtype) + delta)
        return self.base


def exchange(model, chosen, make):
    """Puts make(module) in the place of every submodule for which chosen(name, module)."""
    for name, module in [(n, m) for n, m in model.named_modules() if chosen(n, m)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module))


def merge_adapters(model):
    exchange(model, lambda name, m: isinstance(m, LoRA), LoRA.merged)
    return model.eval()


@contextmanager
def adapters_off(model):
    """Inside, the model is the one that the adapters were added to."""
    adapters = [m for m in model.modules() if isinstance(m, LoRA)]
    try:
        for m in adapters:
            m.on = False
        yield
    finally:
        for m in adapters:
            m.on = True
