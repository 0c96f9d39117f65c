"""Gradient weights: C5, which is HEED-G, and its ablations +LD and +SL (Eq. 7; A.3, B.2, B.3).

Density guesses which positions matter. Here the teacher is asked: a position's score is the squared
gradient of the teacher's own loss by the residual stream there. That takes a backward pass of the
teacher per sample, with the same result in every epoch, so B.2 computes it once and keeps it:

    python distill.py --cond c5 --data mix.json --teacher T --write-cache scores        # once
    torchrun distill.py --cond c5 --data mix.json --teacher T --density-cache scores    # every run

R_x is the teacher's negative log-likelihood of sample x; S counts the replaced layers.
density.fisher_weights turns scores into w.
"""
from functools import partial

import torch

from data import IGNORED, BadSample, collate, each, following
from density import visual_positions
from model import causal_mask_needed
from parts.cache import Cache, CacheError, contents, fingerprint, tower_fingerprint, write_cache
from parts.logits import token_logps

def fisher_scores(teacher, replaced, e, mask, labels):
    """The empirical Fisher's diagonal, || d R_x / d r[l, p] ||^2 at S* (B.3) -> (S, B, T) fp32.

    e: the Embedded of a batch; labels (B, T) are the corpus's own, so this is the fixed-label view.
    """
    with torch.enable_grad():
        # Weights are frozen: the backward pass goes through activations alone, down to e.x.
        r, streams = e.x.detach().requires_grad_(), []
        for i, layer in enumerate(teacher.layers):
            r = teacher.run_layer(layer, r, mask, e.rope)[0]
            if i in replaced:
                streams.append(r)                        # where lockstep compares, before DeepStack
            if i < len(e.deepstack):
                r = r + e.deepstack[i]
        # R_x. A sum over samples, so that one backward pass serves all rows and none mixes.
        target = following(labels)
        rows = target != IGNORED
        nll = -token_logps(teacher.norm(r)[rows], target[rows], teacher.lm_head).sum()
        gradients = torch.autograd.grad(nll, streams)
    return torch.stack([g.float().square().sum(-1) for g in gradients])


def position_scores(teacher, replaced, layers, e, batch):
    """rho of a batch: (B, T), the "sum" over layers (Eq. 7) or the "middle" layer's (+SL); or (S, B,
    T), where "each" has its own (+LD)."""
    g = fisher_scores(teacher, replaced, e, causal_mask_needed(batch.mask), batch.labels)
    return dict(sum=g.sum(0), each=g, middle=g[len(g) // 2])[layers]


# ---- The cache, and how a run reads one, of density too ------------------------------------------

def cache_fingerprint(cond, teacher, student, processor):
    """What cached scores depend on besides the sample: for gradients, all of the teacher, and S."""
    tower = tower_fingerprint(teacher, processor)
    if cond.weight == "density":
        return tower
    settings = dict(layers=cond.layers, replaced=student.config.hybrid["layers"], tower=tower)
    return fingerprint(teacher, settings)


def write_scores(path, cond, teacher, student, processor, samples, check, skip=False):
    """One teacher backward pass per sample -> a cache; check(sample) raises BadSample. Scores are
    even ratios apart: down to 1e-4 of a sample's largest, off by a factor of 1.36 at most."""
    replaced = student.config.hybrid["layers"]

    def record(name, sample):
        check(sample)
        encoded = processor.encode(sample)
        batch = collate([encoded], processor.pad_id).to(teacher.lm_head.weight.device)
        with torch.no_grad():
            e = teacher.embed(batch.ids, batch.mask, batch.pixels, batch.grids)
        rho = position_scores(teacher, replaced, cond.layers, e, batch)[batch.mask]
        return name, contents(sample, encoded, "fisher"), encoded.grids, rho

    made_with = cache_fingerprint(cond, teacher, student, processor)
    write_cache(path, each(samples, record, skip), made_with, "fisher")
    print(Cache(path, made_with, "fisher"))


def open_scores(path, cond, teacher, student, processor):
    """The cache as what a Processor calls: (sample, encoded) -> its row of batch.rho."""
    made_with = cache_fingerprint(cond, teacher, student, processor)
    return partial(cached_scores, Cache(path, made_with, cond.weight), teacher.config)


def cached_scores(cache, config, sample, encoded):
    """A row of batch.rho (T,), in 4 bits what would be computed now. Raises BadSample."""
    density = cache.kind == "density"
    if density and not sample.images:                     # not in the cache; as to_positions has it
        return torch.zeros(encoded.ids.shape)
    try:
        made_from = contents(sample, encoded, cache.kind)
        values, mean = cache.record(encoded.id, made_from, encoded.grids)
    except CacheError as error:
        raise BadSample(str(error)) from None
    # Density has one value per visual token; text reads the mean of before they were rounded.
    rho = torch.full(encoded.ids.shape, mean)
    rho[visual_positions(encoded.ids, config) if density else slice(None)] = values
    return rho
