"""Phase 1 of HEED: a Qwen3-VL teacher becomes a 3:1 Mamba-2/attention hybrid (Sect. 4, App. B.1, C.3).

    torchrun distill.py --cond c4                                   # the embedded world, some minutes on two cores
    torchrun --nproc-per-node 8 distill.py --cond c4 --teacher Qwen3-VL-8B-Instruct --data mix.json
    python distill.py --cond c4 --teacher Qwen3-VL-8B-Instruct --data mix.json --dry-run
    python distill.py --help                                        # every setting, with its reason

Three stages share one token budget. Stage 1 warms up what is new in the mixers, Stage 2 trains the whole mixers,
both by aligning residual streams (Eq. 4 and 5); Stage 3 is knowledge distillation on the logits (Eq. 1). Only
mixers train, so teacher and student share all other modules and walk the decoder in lockstep, layer by layer:

    error[p] = mean over replaced layers l of || s[l+1, p] - r[l+1, p] ||^2            the residual drift
    loss     = mean over positions p of w[p] * error[p]                                C3: w = 1.  C4: w = density

    code      paper                       shape
    r, s      r^theta, r^theta-hat        (B, T, D)   teacher's residual stream, and what the student's layer makes
                                                      of its own stream, or of the teacher's (--feed)
    o_t, o_s  O, O-hat                    (B, T, D)   mixer outputs after W_O, before the residual sum (C2)
    w         w(p), Eq. 3                 (B, T)      sums to the number of real positions in every row
    replaced  S; streams are read at S* = S + 1, the output of each replaced layer

How a run goes through its steps, on many devices and over interruptions, is loop.py's concern.
"""
import copy
import hashlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import IGNORED, BadSample, collate, read_data
from density import (WEIGHTS, CacheError, DensityCache, cache_key, draw_map, fingerprint, image_densities, image_sha,
                     records, write_cache)
from loop import Ranks, Settings, load_model, needs, parse, run, setting, shard, start
from model import Config, Qwen3VL, causal_mask_needed, device_of, dtype_of, to_hybrid
from synthdoc import World

# ---------------------------------------------------------------------------------------------------------
# Table 10: what Stages 1 and 2 align, and with which weight. Stage 3 is the same for all.


@dataclass(frozen=True)
class Cond:
    align: Optional[str]                 # None: Stages 1/2 are skipped; "output": mixer outputs; "residual": streams
    weight: str = "uniform"              # a row of density.WEIGHTS
    mixer: str = "mamba2"
    layers: str = "sum"                  # of gradient weights: "sum" over S* (Eq. 7), "each" its own, or the "middle" one
    note: str = ""


CONDS = {
    "c1":          Cond(None,                              note="KD only, as Mamba-in-Llama"),
    "c2":          Cond("output",                          note="HSA: attention-output MSE, as mmMamba"),
    "c3":          Cond("residual",                        note="RSA: uniform residual MSE, Eq. 4"),
    "c4":          Cond("residual", "density",             note="HEED: density-weighted residual MSE, Eq. 5"),
    "c5":          Cond("residual", "fisher",              note="HEED-G: gradient weights, Eq. 7"),
    "c6":          Cond("residual", "density", "gdn",      note="HEED-GDN: Gated DeltaNet"),
    "no-residual": Cond("output",   "density",             note="Table 8, -Residual: C2 with density"),
    "no-density":  Cond("residual", "modality",            note="Table 8, -Density: text/visual boost only"),
    "ld":          Cond("residual", "fisher", layers="each",   note="Table 8, +LD: gradient weights by layer"),
    "sl":          Cond("residual", "fisher", layers="middle", note="Table 8, +SL: one layer's gradient"),
    "topk":        Cond("residual", "topk",                note="A.8: 5 x on the k % densest positions"),
    "random":      Cond("residual", "random",              note="A.8: 5 x on k % random positions"),
    "shuffled":    Cond("residual", "shuffled",            note="control: C4's weights, patches in random order"),
}

# ---------------------------------------------------------------------------------------------------------
# Settings: every field is a flag; those of any training run stand in loop.py


@dataclass
class DistillSettings(Settings):
    teacher: str = setting("tiny", "folder of a Qwen3-VL checkpoint")
    cond: str = setting("c4", "a row of CONDS", list(CONDS))
    mixer: str = setting("", "mamba2, gdn or FILE.py:CLASS; empty: as the condition says")
    keep_every: int = setting(4, "attention stays in every so-many-th layer (ledger 1)", low=2)
    init: str = setting("default", "of the mixers' new parameters; paper: all N(0, 0.02) (ledger 3)", ["default", "paper"])
    feed: str = setting("teacher", "whose stream a student layer reads in Stages 1/2 (ledger 4)", ["teacher", "own"])
    stages: str = setting("10/30/60", "per cent of the budget for Stages 1, 2 and 3")
    stage3: str = setting("mixers", "what Stage 3 trains: 4.1 says the full model, C.3 only mixers (ledger 5)",
                          ["mixers", "full"])
    schedule: str = setting("whole", "one cosine over the whole budget, or one per stage (ledger 13)", ["whole", "stage"])
    kl: str = setting("answers", "positions of the KL term: supervised ones, or all that predict text; their number divides both "
                     "terms (ledger 11)",
                      ["answers", "text"])
    lambda_kl: float = setting(1.0, "Eq. 1", low=0)
    lambda_ce: float = setting(0.1, "Eq. 1", low=0)
    tau: float = setting(0.5, "temperature of Eq. 3", low=1e-6)
    beta: float = setting(2.0, "text density over the mean visual density (Algorithm 1)", low=0)
    minmax: str = setting("all", "normalise before or after the text value enters (ledger 7)", ["all", "visual"])
    density_cache: str = setting("", "file that `density.py --cache` wrote for this data and teacher; for conditions with "
                                     "gradient weights, that --write-cache wrote")
    write_cache: str = setting("", "only write the condition's gradient weights to this file, for later runs (B.2)",
                               decides=False)
    suite: str = setting("", "of the embedded world to train on; empty: its mixture",
                         ["", "reading", "reasoning", "regimes"])
    page: int = setting(10, "cells on a side of the embedded world's pages; a cell is a visual token", low=7)
    k: float = setting(25.0, "per cent of positions that the topk and random weights raise (A.8)", low=0, high=100)
    questions: int = setting(256, "evaluation questions a suite at the end, on the embedded world; 0: none", low=0,
                             decides=False)


DEFAULTS = {                    # embedded world, real data (Table 11)
    "tokens":       (600_000,           2_000_000_000),
    "batch_tokens": (1_250,             2_000_000),
    "micro_tokens": (1_250,             16_384),
    "lr":           (2e-3,              1e-4),
}


# ---------------------------------------------------------------------------------------------------------
# Losses: tensors in, sums out. They are divided once, by the count over all ranks and micro-batches.


def drift(s, r):
    """|| s - r ||^2 at every position: (B, T, D) x 2 -> (B, T), in fp32 at least."""
    d = s.to(torch.promote_types(s.dtype, torch.float32)) - r
    return d.square().sum(-1)


def lockstep(teacher, student, replaced, e, mask, align="residual", feed="teacher"):
    """Teacher and student through the decoder side by side: yields the error (B, T) of each replaced layer.

    e: the Embedded they share. align: "residual" compares the streams after each replaced layer (Eq. 4 before its
    sums over l and p), "output" what the mixers put out (C2). feed: a replaced layer reads the teacher's stream, so
    that each learns from clean input, or the student's own, where errors add up as they do at inference. No stack of
    streams is kept, and the walk ends at the last replaced layer. Fed the teacher's, each error is a graph of its
    own: one that is differentiated before the next is asked for leaves memory that does not grow with depth.
    """
    r = s = e.x                                                                         # (B, T, D)
    for i, (teacher_layer, student_layer) in enumerate(zip(teacher.layers, student.layers)):
        with torch.no_grad():
            r_next, o_t, _ = teacher_layer(r, mask, e.rope)
        s_next, o_s = r_next, o_t
        if feed == "own":                                 # one graph through all layers
            s_next, o_s, _ = student.run_layer(student_layer, s, mask, e.rope)
        elif i in replaced:
            s_next, o_s, _ = student_layer(r, mask, e.rope)
        if i in replaced:
            yield drift(s_next, r_next) if align == "residual" else drift(o_s, o_t)
        if i == max(replaced):
            return
        if i < len(e.deepstack):
            r_next, s_next = r_next + e.deepstack[i], s_next + e.deepstack[i]
        r, s = r_next, s_next


def following(labels):
    """The label of the next token at every position, which is what a position predicts: (B, T) -> (B, T)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def fisher_scores(teacher, replaced, e, mask, labels):
    """The empirical Fisher's diagonal, || d R_x / d r[l, p] ||^2 at S* (B.3), of all samples of a batch at once.

    R_x is the teacher's negative log-likelihood of x's supervised tokens. -> (S, B, T) fp32; rows do not mix, for
    the loss is a sum over samples. Weights are frozen: this is one backward pass through activations alone.
    """
    with torch.enable_grad():
        r, streams = e.x.detach().requires_grad_(), []
        for i, layer in enumerate(teacher.layers):
            r = teacher.run_layer(layer, r, mask, e.rope)[0]
            if i in replaced:
                streams.append(r)
            if i < len(e.deepstack):
                r = r + e.deepstack[i]
        target = following(labels)
        rows = target != IGNORED
        nll = -token_logps(teacher.norm(r)[rows], target[rows], teacher.lm_head).sum()
        gradients = torch.autograd.grad(nll, streams)
    return torch.stack([g.float().square().sum(-1) for g in gradients])


def token_logps(hidden, target, head, chunk=512):
    """log p of each target: hidden (n, D), target (n,) -> (n,), in fp32 at least. The n x V logits never
    exist at once: each chunk of rows is recomputed in the backward pass."""
    def piece(h, y):
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))            # (chunk, V)
        return -F.cross_entropy(logits, y, reduction="none")
    parts = [checkpoint(piece, hidden[i:i + chunk], target[i:i + chunk], use_reentrant=False, preserve_rng_state=False)
             for i in range(0, len(target), chunk)]
    return torch.cat(parts or [hidden.sum(-1)])           # no supervised row: (0,), still tied to the graph


def kd_sums(student_hidden, teacher_hidden, target, student_head, teacher_head, chunk=512):
    """Sum of KL(teacher || student) and sum of CE over n rows; the n x V logits never exist at once.

    hidden (n, D), target (n,) with IGNORED where only the teacher speaks. Each chunk of rows is recomputed in the
    backward pass, so what is kept is the hidden states alone. T = 1; logarithms in fp32.
    """
    def piece(h_s, h_t, y):
        high = torch.promote_types(h_s.dtype, torch.float32)
        log_q = student_head(h_s).to(high).log_softmax(-1)                              # (chunk, V)
        ce = F.nll_loss(log_q, y, reduction="sum", ignore_index=IGNORED)
        with torch.no_grad():
            log_p = teacher_head(h_t).to(high).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(), ce

    kl = ce = student_hidden.sum() * 0.0                  # keeps the graph when no row is supervised
    for i in range(0, len(target), chunk):
        a, b = checkpoint(piece, student_hidden[i:i + chunk], teacher_hidden[i:i + chunk], target[i:i + chunk],
                          use_reentrant=False, preserve_rng_state=False)
        kl, ce = kl + a, ce + b
    return kl, ce


# ---------------------------------------------------------------------------------------------------------
# The objective: what trains when, and the loss of one micro-batch. sft_dpo.py has two more of the same form.


class Distillation:
    def __init__(self, s, teacher, student):
        self.s, self.cond, self.teacher, self.student = s, CONDS[s.cond], teacher, student
        self.replaced = student.config.hybrid["layers"]
        try:
            self.shares = [float(share) for share in s.stages.split("/")]
        except ValueError:
            self.shares = []
        if len(self.shares) != 3 or min(self.shares) < 0 or not abs(sum(self.shares) - 100) < 1e-6:
            raise ValueError(f"--stages {s.stages}: three shares that sum to 100 are needed, such as 10/30/60")
        for p in [*teacher.parameters(), *student.parameters()]:
            p.requires_grad_(False)
        teacher_ids = {id(p) for p in teacher.parameters()}
        self.mixers = {n: p for n, p in student.named_parameters()
                       if any(f"layers.{i}.self_attn." in n for i in self.replaced)}
        self.others = {n: p for n, p in student.named_parameters() if id(p) not in teacher_ids and n not in self.mixers}
        if self.cond.align and self.shares[0] and not any(map(self.is_new, self.mixers)):
            raise ValueError("the mixer inherits all its parameters, so Stage 1 has nothing to train: give it no "
                             "share, for instance --stages 0/40/60")
        options = dict(density=dict(tau=s.tau, beta=s.beta, minmax=s.minmax), modality=dict(tau=s.tau, beta=s.beta),
                       topk=dict(k=s.k), random=dict(k=s.k, seed=s.seed),
                       shuffled=dict(tau=s.tau, beta=s.beta, minmax=s.minmax, seed=s.seed))
        self.weigh = partial(WEIGHTS[self.cond.weight], **options.get(self.cond.weight, {}))
        self.cache = None                                 # a density.DensityCache, set by main

    def parameters(self):
        return {**self.mixers, **self.others}

    def is_new(self, name):
        """Whether a mixer's parameter is new (W_G, W_gamma, A, conv, ...) or inherited from attention."""
        layer, inner = name.split("layers.")[1].split(".self_attn.")
        inherited = self.student.layers[int(layer)].self_attn.INHERITED
        return not any(inner == name or inner.startswith(name + ".") for name in inherited)

    def stage(self, progress):
        """The stage (1, 2, 3) at this share of the budget, and the shares at which it begins and ends."""
        if self.cond.align is None:
            return 3, 0, 1
        borders = [0, self.shares[0] / 100, (self.shares[0] + self.shares[1]) / 100, 1]
        n = 1 + (progress >= borders[1]) + (progress >= borders[2])
        return n, borders[n - 1], borders[n]

    def prepare(self, progress):
        """Opens what trains now. -> label, where the learning rate's schedule begins and ends, in shares of the budget."""
        stage, *span = self.stage(progress)
        for name, p in self.mixers.items():
            p.requires_grad_(stage > 1 or self.is_new(name))
        for p in self.others.values():
            p.requires_grad_(stage == 3)
        return f"stage {stage}", (0, 1) if self.s.schedule == "whole" else span

    def scores(self, batch, e):
        """Fisher scores as the condition uses them: (1 or S, B, T)."""
        scores = fisher_scores(self.teacher, self.replaced, e, causal_mask_needed(batch.mask), batch.labels)
        return dict(sum=scores.sum(0)[None], each=scores, middle=scores[len(scores) // 2][None])[self.cond.layers]

    def weights(self, batch, vision, e):
        """w of the condition: (B, T), or (S, B, T) where layers have their own."""
        c = self.student.config
        visual = (batch.ids == c.image_token_id) | (batch.ids == c.video_token_id)
        rho, options = torch.zeros(0, device=batch.ids.device), {}
        if self.cond.weight == "fisher":
            if self.cache and batch.weight == 0:          # a stand-in is no sample
                return batch.mask.float()
            if self.cache:
                found = [self.cache.get(key[0], contents(batch, b), key[2]) for b, key in enumerate(batch.keys)]
                return self.weigh(torch.cat(found).to(batch.ids.device), visual, batch.mask)
            w = [self.weigh(layer[batch.mask], visual, batch.mask) for layer in self.scores(batch, e)]
            return w[0] if len(w) == 1 else torch.stack(w)
        if self.cache and vision is not None:             # density from the cache
            found = [self.cache.record(*key) if key[2] is not None else None for key in batch.keys]
            rho = torch.cat([f.values for f in found if f]).to(rho.device)
            options = dict(means=torch.tensor([f.mean if f else 0.0 for f in found], device=rho.device))
        elif vision is not None:
            rho = image_densities(vision.patches, batch.grids, c.vision.spatial_merge_size)
        return self.weigh(rho, visual, batch.mask, batch.names, **options)

    def loss(self, batch, label, backward=lambda part: part):
        """One micro-batch -> loss sum (to be divided by the count), count, other sums for the log.

        backward: takes the gradient of a part of the loss, as soon as the part is there, and returns its value. By
        default parts keep their graphs, and the caller differentiates their sum.
        """
        with torch.no_grad():                             # the tower is frozen: once for both models
            vision = None if batch.pixels is None else self.teacher.visual(batch.pixels, batch.grids)
        if label == "stage 3":
            return self.kd(batch, vision, backward)
        with torch.no_grad():
            e = self.teacher.embed(batch.ids, batch.mask, None, batch.grids, vision)
            w = self.weights(batch, vision, e)                                          # (B, T)
        joint, loss, plain = self.s.feed == "own", 0.0, 0.0                             # joint: one graph for all layers
        errors = lockstep(self.teacher, self.student, self.replaced, e, causal_mask_needed(batch.mask),
                          self.cond.align, self.s.feed)
        for w_l, error in zip(w.expand(len(self.replaced), *w.shape[-2:]), errors):     # (B, T) each
            part = (w_l * error).sum() / len(self.replaced)             # Eq. 4 / Eq. 5: all that C3 and C4 differ in
            loss = loss + (part if joint else backward(part))
            plain = plain + error.detach() / len(self.replaced)
        plain = plain[batch.mask]
        top = plain.topk(max(1, len(plain) // 100)).values.sum()        # ledger 15: a few huge positions?
        return backward(loss) if joint else loss, int(batch.mask.sum()), dict(drift=plain.sum(), drift_top1=top)

    def kd(self, batch, vision, backward):
        target = following(batch.labels)
        rows = target != IGNORED
        if self.s.kl == "text":
            c, ids = self.student.config, batch.ids[:, 1:]
            rows = F.pad(batch.mask[:, 1:] & (ids != c.image_token_id) & (ids != c.video_token_id), (0, 1))
        inputs = (batch.ids, batch.mask, None, batch.grids, vision)
        with torch.no_grad():
            h_t = self.teacher.hidden(*inputs)[rows]                                    # (n, D)
        h_s = self.student.hidden(*inputs)[rows]
        kl, ce = kd_sums(h_s, h_t, target[rows], self.student.lm_head, self.teacher.lm_head)
        loss = self.s.lambda_kl * kl + self.s.lambda_ce * ce                            # Eq. 1
        return backward(loss), int(rows.sum()), dict(kl=kl.detach(), ce=ce.detach())    # one count for both


# ---------------------------------------------------------------------------------------------------------
# Gradient weights of a corpus, once for many runs (B.2): in density.py's 4-bit format, one score per position


def contents(batch, b):
    """sha256 (hex) of what row b's scores depend on besides the model: its images, token ids and labels."""
    real = batch.mask[b].cpu()
    rows = torch.stack([batch.ids[b].cpu()[real], batch.labels[b].cpu()[real]])
    return hashlib.sha256((batch.keys[b][1] or "").encode() + rows.numpy().tobytes()).hexdigest()


def scores_key(objective, processor):
    """The fingerprint of a cache of scores: the whole teacher, the processor, and the layers S that are read."""
    layers = dict(layers=objective.cond.layers, replaced=objective.replaced, tower=cache_key(objective.teacher, processor))
    return fingerprint(objective.teacher, layers)


def write_scores(path, objective, processor, dataset):
    """One teacher backward pass per sample (Eq. 7) -> a cache that --density-cache reads, in which scores are even
    ratios apart: down to 1e-4 of a sample's largest, off by a factor of 1.36 at most."""
    key = scores_key(objective, processor)

    def record(name, sample):
        if sample.chosen is not None:
            raise BadSample(f"{sample.where or name} is a preference pair, which has no one answer to take a gradient of.")
        batch = collate([processor.encode(sample)], processor.pad_id).to(objective.teacher.lm_head.weight.device)
        with torch.no_grad():
            e = objective.teacher.embed(batch.ids, batch.mask, batch.pixels, batch.grids)
        return name, contents(batch, 0), batch.grids, objective.scores(batch, e)[0][batch.mask]
    write_cache(path, records(dataset, record, objective.s.skip_bad), key, kind="fisher")
    cache = DensityCache(path, key, kind="fisher")
    print(f"{path}: {cache.n_records} samples, {cache.n_values} positions, {cache.bytes_per_value():.3f} bytes each")


# ---------------------------------------------------------------------------------------------------------
# The run: teacher in, student and its report out


class Answered:
    """A corpus whose preference pairs are refused: distillation would learn from the rejected answer too."""

    def __init__(self, data):
        self.data, self.endless = data, getattr(data, "endless", False)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        sample = self.data[index]
        if sample.chosen is not None:
            raise BadSample(f"{sample.where or sample.id} is a preference pair, which is for `sft_dpo.py dpo` alone.")
        return sample


def convert(s, teacher):
    """The student, whose mixers are fp32 masters; everything else is shared with the teacher and frozen, unless
    --stage3 full gives it an own copy of all but the vision tower."""
    student = to_hybrid(teacher, s.mixer or CONDS[s.cond].mixer, s.keep_every, s.init, s.seed)
    own = [student.layers[i].self_attn for i in student.config.hybrid["layers"]]
    if s.stage3 == "full":
        own = [copy.deepcopy(student.model.language_model), copy.deepcopy(student.lm_head)]
        student.model.language_model, student.lm_head = own
        if student.config.tie_word_embeddings:
            student.lm_head.weight = student.model.language_model.embed_tokens.weight
    for module in own:
        module.to(torch.promote_types(teacher.lm_head.weight.dtype, torch.float32))
    return student


def build(s, device):
    """-> teacher, student, processor."""
    teacher, processor = load_model(s, "teacher", device)
    teacher.recompute = s.recompute                       # also the student's; the teacher's for Fisher scores
    return teacher, convert(s, teacher), processor


def finish(s, teacher, student, processor):
    """Saves the merged student, judges it beside its teacher, and draws density maps of some pages."""
    from evaluate import evaluate_models, table           # judging is not needed to train
    out, kind = Path(s.out), next(teacher.parameters()).dtype
    student.in_dtype(kind).save_pretrained(out)
    if s.data:
        print(f"The student is in {out}. python evaluate.py {s.teacher} {out} --bench NAME=FILE judges it.")
        return
    draw_pages(teacher, processor, out / "density", s.page)
    held = "the student (loads like its teacher), log.jsonl"
    if s.questions:
        benches = {s.suite: None} if s.suite else None
        results = evaluate_models({"teacher": teacher, s.cond: student}, processor, s.questions, benches,
                                  page=s.page)
        report = table(results)
        (out / "table.md").write_text(report + "\n")
        print(f"\n{report}\n")
        held += ", table.md"
    print(f"{out} holds {held}, and density maps in density/.")


def draw_pages(teacher, processor, folder, page, count=3):
    """Fig. 2 for evaluation pages: where the weight of C4 goes."""
    folder.mkdir(parents=True, exist_ok=True)
    m = teacher.config.vision.spatial_merge_size
    for suite in ("reading", "reasoning"):
        for sample in (World("eval", 0, suite, (page, page))[i] for i in range(count)):
            e = processor.encode(sample)
            device, kind = teacher.lm_head.weight.device, teacher.lm_head.weight.dtype
            with torch.inference_mode():
                features = teacher.visual(e.pixels.to(device, kind), e.grids).patches
            _, h, w = e.grids[0].tolist()
            rho = image_densities(features, e.grids, m).view(h // m, w // m)
            draw_map(sample.images[0], rho).save(folder / f"{sample.source}.png")


def check(s):
    """Refuses flags that contradict each other, before anything is loaded. Raises ValueError."""
    cond, caches = CONDS[s.cond], s.write_cache or s.density_cache
    gradient = cond.weight == "fisher" and cond.layers != "each"
    if s.data and (s.suite or s.page != 10):
        raise ValueError("--suite and --page are of the embedded world, which --data takes the place of")
    if caches and not s.data:
        raise ValueError("a cache is of files: --write-cache and --density-cache need --data")
    if s.write_cache and s.density_cache:
        raise ValueError("--write-cache makes a file for later runs, --density-cache reads one: give one of them")
    if s.write_cache and not gradient:
        raise ValueError(f"--write-cache is for gradient weights with one score per position (c5, sl), not {s.cond}")
    if s.write_cache and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--write-cache writes one file: start it as one process")
    if s.density_cache and not (gradient or cond.weight == "density"):
        raise ValueError(f"--density-cache serves conditions with one density or score per position, not {s.cond}")
    if s.density_cache and not Path(s.density_cache).is_file():
        raise ValueError(f"--density-cache {s.density_cache}: there is no such file")


def dry_run(s):
    """What the run would need, from the config alone: no weights are read, so it works before the download ends."""
    device = device_of(s.device, here=False)
    with torch.device("meta"):
        teacher = Qwen3VL(Config.from_folder(s.teacher)).to(dtype_of(s.dtype, device))
    objective = Distillation(s, teacher, convert(s, teacher))
    new, mixers, trained, frozen = (sum(p.numel() for p in parameters) for parameters in (
        [p for n, p in objective.mixers.items() if objective.is_new(n)], objective.mixers.values(),
        objective.parameters().values(), teacher.parameters()))
    print(f"{s.teacher}: {frozen / 1e6:,.1f} M frozen parameters, {len(objective.replaced)} of {len(teacher.layers)} "
          "attention layers replaced")
    for stage, count in enumerate((new, mixers, trained) if objective.cond.align else (0, 0, trained), 1):
        print(f"Stage {stage} trains {count / 1e6:,.1f} M parameters" if count else f"Stage {stage} is skipped")
    joint = objective.cond.align is not None and s.feed == "own"
    needs(s, s.teacher, dict(teacher.named_parameters()), objective.parameters(), drifts=int(joint))


def main(argv=None):
    s = parse(DistillSettings, DEFAULTS, argv, __doc__.split("\n")[0])
    s.out = s.out or f"out/{s.cond}"
    try:                                                  # user errors end in a sentence, not a traceback
        check(s)
        if s.dry_run:
            return dry_run(s)
        ranks = start(s)
        dataset = read_data(s.data) if s.data else World("train", s.seed, s.suite or None, cells=(s.page, s.page))
        teacher, student, processor = build(s, torch.device("cpu") if s.shard else ranks.device)
        if s.write_cache or s.density_cache:
            processor.sha = image_sha
        if s.write_cache:
            return write_scores(s.write_cache, Distillation(s, teacher, student), processor, dataset)
        cache, kind = None, CONDS[s.cond].weight
        if s.density_cache:                               # its fingerprint is of whole weights, so before they are split
            key = cache_key(teacher, processor) if kind == "density" else \
                scores_key(Distillation(s, teacher, student), processor)
            cache = DensityCache(s.density_cache, key, kind)
        if s.shard:
            shard(ranks, teacher, student)
        objective = Distillation(s, teacher, student)
        objective.cache = cache
    except (ValueError, OSError, BadSample) as error:
        sys.exit(str(error))
    try:
        run(s, objective, processor, Answered(dataset) if s.data else dataset, ranks)
    except (BadSample, CacheError) as error:
        sys.exit(str(error))
    if ranks.rank == 0:
        if s.shard:                                       # a checkpoint holds whole tensors: read the last one
            teacher, student, processor = build(s, torch.device("cpu"))
            run(s, Distillation(s, teacher, student), processor, dataset, Ranks(0, 1, torch.device("cpu")))
        finish(s, teacher, student, processor)
    ranks.wait()
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
