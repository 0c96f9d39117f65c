"""Attention's keys and values while a model generates, and the step that is captured once and
replayed.

    KVCache       grows with the text: what prefill fills, and what decoding on a CPU goes on with
    FixedCache    has its full size from the start, so that a step moves no memory and asks nothing
                  of the host
    Replayed      a step on fixed buffers, on CUDA captured as one graph: a step of a large model is
                  a thousand small kernels, and launching them takes longer than running them
    sample        the next tokens

Nothing here knows the model: a step is a function, and a mixer's state any NamedTuple of tensors of
constant shape.

Letters: B batch, T new positions, S positions so far, G key/value groups, H heads, P head dim.
"""
import warnings
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F


class KVCache(NamedTuple):
    """The buffers have room to spare and are written in place: a state is used once."""
    k: torch.Tensor                 # (B, G, capacity, P)
    v: torch.Tensor                 # (B, G, capacity, P)
    mask: Optional[torch.Tensor]    # (B, length) bool; None while nothing was ever padded
    length: int


def append(state, k, v, mask):
    """New keys and values (B,G,T,P) at the end of a KVCache or None; it grows by an eighth, so that
    decoding rarely copies."""
    new = k.shape[2]
    if state is None:
        return KVCache(k, v, mask, new)
    length, total = state.length, state.length + new
    buffers = []
    for old, fresh in ((state.k, k), (state.v, v)):
        if old.shape[2] < total:
            grown = old.new_empty(*old.shape[:2], total + max(256, total // 8), old.shape[3])
            grown[:, :, :length] = old[:, :, :length]
            old = grown
        old[:, :, length:total] = fresh
        buffers.append(old)
    if mask is not None or state.mask is not None:
        ones = torch.ones(len(k), 1, dtype=torch.bool, device=k.device)
        mask = torch.cat([ones.expand(-1, length) if state.mask is None else state.mask,
                          ones.expand(-1, new) if mask is None else mask], dim=1)
    return KVCache(*buffers, mask, total)


# --------------------------------------------------------------------------------------------------
# Fixed buffers: a row's keys stand at its front, without its padding, so lengths differ and no mask
# is needed


class Slots(NamedTuple):
    """Where each row stands; the layers share it, and `Replayed` counts it on after each step."""
    next: torch.Tensor     # (B,) int64  of the buffers flattened over rows, where the next key goes
    used: torch.Tensor              # (B,) int32  keys of the row, with that one
    starts: torch.Tensor            # (B + 1,) int32  where each row's buffer begins
    rows: torch.Tensor              # (B + 1,) int32  0, 1, ..., B: one query a row


class FixedCache(NamedTuple):
    k: torch.Tensor                 # (B, capacity, G, P)
    v: torch.Tensor                 # (B, capacity, G, P)
    slots: Slots


def attend_fixed(cache, q, k, v):
    """One query a row, q (B,H,1,P), after its key and value (B,G,1,P) have been stored ->
    (B,H,1,P)."""
    slots, capacity = cache.slots, cache.k.shape[1]
    keys, values = cache.k.flatten(0, 1), cache.v.flatten(0, 1)        # views, (B * capacity, G, P)
    keys.index_copy_(0, slots.next, k[:, :, 0])
    values.index_copy_(0, slots.next, v[:, :, 0])
    if q.is_cuda and q.dtype.itemsize == 2:               # flash attention, which splits long rows
        y = torch.ops.aten._flash_attention_forward(
            q[:, :, 0], keys, values, slots.rows, slots.starts, 1, capacity, 0.0, False, False,
            seqused_k=slots.used)[0]
        return y[:, :, None]
    see = torch.arange(capacity, device=q.device) < slots.used[:, None]              # (B, capacity)
    grouped = q.view(len(q), k.shape[1], -1, q.shape[3])  # the queries of a group share its keys
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)                   # (B, G, capacity, P)
    y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=see[:, None, None])
    return y.reshape(q.shape)


def longest(states):
    return max((s.length for s in states if isinstance(s, KVCache)), default=0)


def tensors(states):
    """All tensors of a list of NamedTuples that a step returns anew."""
    return [t for state in states if not isinstance(state, FixedCache) for t in state]


class Replayed:
    """step(tokens (B,), states, position (B,)) -> (logits, states), on buffers that stay where they
    are.

    Called with tokens it returns the logits (B,V) after them, in a buffer that the next call
    overwrites. A mixer whose state changes its shape, or that asks something of the host, cannot be
    captured: its steps then run as they come.
    """

    def __init__(self, step, states, position, room, weights):
        """states: a list, emptied layer by layer as it is copied; room: how many steps may follow;
        weights: what must not have moved for the capture to be used again."""
        self.step, self.weights, self.graph, self.states = step, weights, None, [None] * len(states)
        self.capacity = -(-(longest(states) + room) // 256) * 256       # whole blocks of 256
        self.position, self.tokens = position.clone(), torch.zeros_like(position)
        whole = torch.arange(len(position) + 1, device=position.device, dtype=torch.int32)
        self.slots = Slots(torch.zeros_like(position), whole[:-1] + 1, whole * self.capacity, whole)
        self.load(states, position)
        self.capture()

    def fits(self, states, position, room, weights):
        """Whether another prompt can be decoded in these buffers, by the captured step."""
        return (self.weights == weights and len(position) == len(self.position)
                and self.logits is not None and longest(states) + room <= self.capacity)

    def load(self, states, position):
        """Puts a prompt's states into the buffers, which the first prompt makes."""
        self.left = self.capacity - longest(states)       # steps that there is room for
        self.position.copy_(position)
        for i, state in enumerate(states):
            if isinstance(state, KVCache):
                shape = (len(position), self.capacity, state.k.shape[1], state.k.shape[3])
                self.states[i] = self.states[i] or FixedCache(
                    state.k.new_zeros(shape), state.v.new_zeros(shape), self.slots)
                self.fill(self.states[i], state)
            elif self.states[i] is None:
                self.states[i] = type(state)(*(t.clone() for t in state))
            else:
                for old, new in zip(self.states[i], state):
                    old.copy_(new)
            states[i] = None
        return self

    def fill(self, fixed, state):
        for buffer, grown in ((fixed.k, state.k), (fixed.v, state.v)):
            real = grown[:, :, :state.length].transpose(1, 2)                         # (B, S, G, P)
            if state.mask is not None:  # real keys to the front; they were rotated where they stood
                order = (~state.mask).byte().argsort(dim=1, stable=True)[..., None, None]
                real = real.gather(1, order.expand_as(real))
            buffer[:, :state.length] = real
        held = state.length if state.mask is None else state.mask.sum(1)
        self.slots.used[:] = held + 1
        self.slots.next[:] = self.slots.starts[:-1] + held

    def capture(self):
        """One step to learn the shapes, and on CUDA a second one as a graph; the buffers are as
        before."""
        kept = [t.clone() for t in tensors(self.states)]
        side = torch.cuda.Stream() if self.position.is_cuda else None
        if side:                       # a capture wants what it uses for the first time done before
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.logits, fresh = self.step(self.tokens, self.states, self.position)
        if side:
            torch.cuda.current_stream().wait_stream(side)
        if [t.shape for t in tensors(fresh)] != [t.shape for t in kept]:
            self.logits = None                            # states that grow: no buffers for them
        elif side:
            try:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.advance()
            except RuntimeError as error:
                self.graph = None
                warnings.warn(f"a decoding step cannot be captured, and runs as it comes: {error}")
        for old, new in zip(tensors(self.states), kept):
            old.copy_(new)

    def advance(self):
        logits, fresh = self.step(self.tokens, self.states, self.position)
        for counter in (self.position, self.slots.next, self.slots.used):
            counter += 1
        if self.logits is None:
            self.states = fresh
            return logits
        for old, new in zip(tensors(self.states), tensors(fresh)):
            old.copy_(new)
        return self.logits.copy_(logits)

    @torch.inference_mode()
    def __call__(self, tokens):
        if self.left <= 0:
            raise RuntimeError(f"there is no room for another step: all {self.capacity} are taken")
        self.left -= 1
        self.tokens.copy_(tokens)
        if not self.graph:
            return self.advance()
        self.graph.replay()
        return self.logits


def sample(logits, temperature, top_p, top_k, generator=None):
    """Next tokens (B,) from logits (B, V): the argmax at temperature 0, else the top-k, then top-p
    nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p               # the first token over the bound stays in,
        outside[:, 0] = False                             # and the likeliest at any bound
        logits = logits.masked_fill(outside.gather(-1, index.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
