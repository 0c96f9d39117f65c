"""Losses on the logits, some rows at a time. The n x V logits never exist at once: the head runs on
a chunk of rows, which the backward pass recomputes."""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def in_chunks(loss, chunk, *rows):
    """loss(rows) of `chunk` rows at a time, in a list."""
    return [checkpoint(loss, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(*(t.split(chunk) for t in rows)) if len(piece[0])]


def token_logps(hidden, target, head, chunk=512):
    """log p of each target: hidden (n, D), target (n,) -> (n,), in fp32 at least."""
    def logps(h, y):
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))            # (chunk, V)
        return -F.cross_entropy(logits, y, reduction="none")
    parts = in_chunks(logps, chunk, hidden, target)
    return torch.cat(parts or [hidden.sum(-1)])        # no supervised row: (0,), still in the graph
