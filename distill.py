"""Phase 1 of HEED: a Qwen3-VL teacher becomes a 3:1 Mamba-2/attention hybrid (Sect. 4, B.1, C.3).

    torchrun distill.py --cond c4                    # the embedded world, some minutes on two cores
    torchrun --nproc-per-node 8 distill.py --cond c4 --teacher Qwen3-VL-8B-Instruct --data mix.json
    python distill.py --cond c4 --teacher Qwen3-VL-8B-Instruct --data mix.json --dry-run
    python distill.py --help                         # every setting, with its reason

Three stages share one token budget. Stage 1 warms up what is new in the mixers, Stage 2 trains the
whole mixers, both by aligning residual streams (Eq. 4 and 5); Stage 3 is knowledge distillation on
the logits (Eq. 1). Only mixers train, so teacher and student share all other modules and walk the
decoder in lockstep:

    error[p] = mean over replaced layers l of || s[l+1, p] - r[l+1, p] ||^2     the residual drift
    loss     = mean over positions p of w[p] * error[p]                  C3: w = 1.  C4: w = density

    code      paper                 shape
    r, s      r^theta, r^theta-hat  (B, T, D)  teacher's residual stream, and what the student's layer
                                               makes of its own stream, or of the teacher's (--feed)
    o_t, o_s  O, O-hat              (B, T, D)  mixer outputs after W_O, before the residual sum (C2)
    rho       rho(p), Eq. 2         (B, T)     density or gradient scores: what w is made of
    w         w(p), Eq. 3           (B, T)     sums to the number of real positions in every row
    replaced  S; streams are read at S* = S + 1, the output of each replaced layer

density.py and fisher.py say where weights come from, loop.py how a run goes through its steps.
"""
import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F

from data import IGNORED, BadSample, following, read_data
from density import WEIGHTS, Weighting, densities, draw_sample, to_positions, visual_positions
from fisher import open_scores, position_scores, write_scores
from loop import (Checked, Settings, claim, load_model, load_parameters, one_sentence, parse, print_needs,
                  run, setting, start_processes)
from model import Config, Qwen3VL, causal_mask_needed, device_of, dtype_of, to_hybrid
from parts.logits import in_chunks
from parts.ranks import shard
from parts.runs import last_checkpoint, tensor_bytes, writing
from synthdoc import World

# ---- Table 10: what Stages 1 and 2 align, and with which weight. Stage 3 is the same for all. ----

@dataclass(frozen=True)
class Cond:
    align: Optional[str]        # "output" of mixers, "residual" streams; None: Stages 1/2 are skipped
    weight: str = "uniform"     # a row of density.WEIGHTS
    mixer: str = "mamba2"
    layers: str = "sum"         # of gradients: "sum" over S* (Eq. 7), "each" its own, or the "middle"
    note: str = ""


CONDS = {
    "c1":          Cond(None,                     note="KD only, as Mamba-in-Llama"),
    "c2":          Cond("output",                 note="HSA: attention-output MSE, as mmMamba"),
    "c3":          Cond("residual",               note="RSA: uniform residual MSE, Eq. 4"),
    "c4":          Cond("residual", "density",    note="HEED: density-weighted MSE, Eq. 5"),
    "c5":          Cond("residual", "fisher",     note="HEED-G: gradient weights, Eq. 7"),
    "c6":          Cond("residual", "density", "gdn",          note="HEED-GDN: Gated DeltaNet"),
    "no-residual": Cond("output",   "density",    note="Table 8, -Residual: C2 with density"),
    "no-density":  Cond("residual", "modality",   note="Table 8, -Density: text/visual boost only"),
    "ld":          Cond("residual", "fisher", layers="each",   note="Table 8, +LD: layers' own"),
    "sl":          Cond("residual", "fisher", layers="middle", note="Table 8, +SL: one layer's"),
    "topk":        Cond("residual", "topk",       note="A.8: 5 x on the k % densest positions"),
    "random":      Cond("residual", "random",     note="A.8: 5 x on k % random positions"),
    "shuffled":    Cond("residual", "shuffled",   note="control: C4's weights on other patches"),
    "rank-only":   Cond("residual", "rank",       note="control: C4's ranking, C3's shares"),
    "share-only":  Cond("residual", "share",      note="control: C4's shares, all patches alike"),
}

# ---- Settings: every field is a flag; those of any training run stand in loop.py -----------------

@dataclass
class DistillSettings(Settings):
    teacher: str = setting("tiny", "folder of a checkpoint of Qwen3-VL or another teacher (README)")
    cond: str = setting("c4", "a row of CONDS", list(CONDS))
    mixer: str = setting("", "mamba2, gdn or FILE.py:CLASS; empty: as the condition says")
    keep_every: int = setting(4, "attention stays in every so-many-th layer (ledger 1)", low=2)
    init: str = setting("default", "of what is new; paper: N(0, 0.02) (ledger 3)", ["default", "paper"])
    feed: str = setting("teacher", "whose stream a student layer reads in Stages 1/2 (ledger 4)",
                        ["teacher", "own"])
    stages: str = setting("10/30/60", "per cent of the budget for Stages 1, 2 and 3")
    stage3: str = setting("mixers", "what Stage 3 trains: 4.1 says the full model, C.3 only mixers "
                          "(ledger 5)", ["mixers", "full"])
    schedule: str = setting("whole", "one cosine over the budget, or one per stage (ledger 13)",
                            ["whole", "stage"])
    kl: str = setting("answers", "positions of the KL term: supervised ones, or all that predict text; "
                      "their number divides both terms (ledger 11)", ["answers", "text"])
    lambda_kl: float = setting(1.0, "Eq. 1", low=0)
    lambda_ce: float = setting(0.1, "Eq. 1", low=0)
    tau: float = setting(Weighting.tau, "temperature of Eq. 3", low=1e-6)
    beta: float = setting(Weighting.beta, "text's density over the mean visual density", low=0)
    minmax: str = setting(Weighting.minmax, "normalise before or after text enters (ledger 7)",
                          ["all", "visual"])
    k: float = setting(Weighting.k, "per cent of positions that topk and random raise (A.8)", low=0,
                       high=100)
    fisher_text: str = setting(Weighting.fisher_text, "gradient scores of text: its own, or beta times "
                               "the visual mean (ledger 20)", ["own", "beta"])
    fisher_power: float = setting(Weighting.fisher_power, "gradient scores to this power", low=0)
    density_cache: str = setting("", "file that `density.py --cache` wrote for this data and "
                                 "teacher; for gradient weights, that --write-cache wrote")
    write_cache: str = setting("", "only write the condition's gradient scores to this file, for "
                               "later runs (B.2)", decides=False)
    suite: str = setting("", "of the embedded world to train on; empty: its mixture",
                         ["", "reading", "reasoning", "regimes"])
    page: int = setting(10, "cells on a side of the embedded world's pages: visual tokens", low=7)
    questions: int = setting(256, "evaluation questions a suite at the end; 0 or --data: none", low=0,
                             decides=False)


DEFAULTS = {                    # embedded world, real data (Table 11)
    "tokens":       (600_000,           2_000_000_000),
    "batch_tokens": (1_250,             2_000_000),
    "micro_tokens": (1_250,             16_384),
    "lr":           (2e-3,              1e-4),
}


def stage_shares(text):
    """--stages -> the budget's shares of Stages 1, 2 and 3, in per cent. Raises ValueError."""
    numbers = re.fullmatch("/".join(3 * [r"(\d+\.?\d*)"]), text)
    shares = [float(share) for share in numbers.groups()] if numbers else []
    if abs(sum(shares) - 100) > 1e-6:
        raise ValueError(f"--stages {text}: three shares that sum to 100 are needed, as 10/30/60")
    return shares


# ---- Stages 1 and 2: teacher and student in lockstep ---------------------------------------------

def drift(s, r):
    """|| s - r ||^2 at every position: (B, T, D) x 2 -> (B, T), in fp32 at least."""
    d = s.to(torch.promote_types(s.dtype, torch.float32)) - r
    return d.square().sum(-1)


def lockstep(teacher, student, replaced, e, mask, align="residual", feed="teacher"):
    """Both models through the decoder side by side: yields the error (B, T) of each replaced layer.

    e: the Embedded they share. align: "residual" compares the streams after each replaced layer (Eq.
    4 before its sums over l and p), "output" what the mixers put out (C2). feed: whose stream a
    replaced layer reads. The teacher's lets each learn from clean input; in the student's own,
    errors add up as they do at inference. No stack of streams is kept.
    """
    r = s = e.x                                                         # (B, T, D)
    for i, (teacher_layer, student_layer) in enumerate(zip(teacher.layers, student.layers)):
        with torch.no_grad():
            r_next, o_t, _ = teacher_layer(r, mask, e.rope)
        # On the teacher's stream, a layer that is not replaced does what the teacher's did.
        s_next, o_s = r_next, o_t
        if feed == "own":
            s_next, o_s, _ = student.run_layer(student_layer, s, mask, e.rope)
        elif i in replaced:
            s_next, o_s, _ = student_layer(r, mask, e.rope)
        if i in replaced:
            yield drift(s_next, r_next) if align == "residual" else drift(o_s, o_t)
        if i == max(replaced):                            # nothing is compared further up
            return
        # DeepStack: the tower's features of other depths are added between the first layers. It is
        # the same for both models, so the layers' errors are taken before.
        if i < len(e.deepstack):
            r_next, s_next = r_next + e.deepstack[i], s_next + e.deepstack[i]
        r, s = r_next, s_next


# ---- Stage 3: knowledge distillation on the logits -----------------------------------------------

def kd_sums(student_hidden, teacher_hidden, target, student_head, teacher_head, chunk=512):
    """Sums over n rows of KL(teacher || student) and of CE, at temperature 1, in fp32 at least.

    hidden (n, D) each, target (n,) with IGNORED where only the teacher speaks.
    """
    def sums(h_s, h_t, y):
        high = torch.promote_types(h_s.dtype, torch.float32)
        log_q = student_head(h_s).to(high).log_softmax(-1)              # (chunk, V)
        ce = F.nll_loss(log_q, y, reduction="sum", ignore_index=IGNORED)
        with torch.no_grad():
            log_p = teacher_head(h_t).to(high).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(), ce

    # A sum over nothing keeps the graph when no row is supervised.
    kl = ce = student_hidden.sum() * 0.0
    for a, b in in_chunks(sums, chunk, student_hidden, teacher_hidden, target):
        kl, ce = kl + a, ce + b
    return kl, ce


# ---- The objective that loop.py trains; sft_dpo.py has two more ----------------------------------

class Distillation:
    def __init__(self, s, teacher, student):
        self.s, self.cond, self.teacher, self.student = s, CONDS[s.cond], teacher, student
        self.replaced, self.shares = student.config.hybrid["layers"], stage_shares(s.stages)
        for p in [*teacher.parameters(), *student.parameters()]:
            p.requires_grad_(False)
        # What the two do not share: the mixers, and with --stage3 full all but the vision tower.
        shared = {id(p) for p in teacher.parameters()}
        at = [f"layers.{i}.self_attn." for i in self.replaced]
        own = {n: p for n, p in student.named_parameters() if id(p) not in shared}
        self.mixers = {n: p for n, p in own.items() if any(place in n for place in at)}
        self.others = {n: p for n, p in own.items() if n not in self.mixers}
        if self.cond.align and self.shares[0] and not any(map(self.is_new, self.mixers)):
            raise ValueError("the mixer inherits all its parameters, so Stage 1 has nothing to train: give "
                             "it no share, for instance --stages 0/40/60")

    def parameters(self):
        return {**self.mixers, **self.others}

    def is_new(self, name):
        """Whether a mixer's parameter is new (W_G, W_gamma, A, conv, ...), not inherited."""
        layer, inner = name.split("layers.")[1].split(".self_attn.")
        inherited = self.student.layers[int(layer)].self_attn.INHERITED
        return not any(inner == name or inner.startswith(name + ".") for name in inherited)

    def prepare(self, progress):
        """Opens what trains at this share of the budget. -> label, and the span of the learning
        rate's schedule, in shares of the budget."""
        borders = [0, self.shares[0] / 100, (self.shares[0] + self.shares[1]) / 100, 1]
        stage = 1 + (progress >= borders[1]) + (progress >= borders[2])
        if self.cond.align is None:                      # C1: Stage 3 has the whole budget
            stage, borders = 3, [0, 0, 0, 1]
        # Stage 1 keeps W_Q, W_K, W_V and W_O as they were inherited; Stage 3 trains what Stage 2
        # does, and with --stage3 full all else but the tower.
        for name, p in self.mixers.items():
            p.requires_grad_(stage > 1 or self.is_new(name))
        for p in self.others.values():
            p.requires_grad_(stage == 3)
        span = (0, 1) if self.s.schedule == "whole" else borders[stage - 1:stage + 1]
        return f"stage {stage}", span

    def loss(self, batch, label, backward=lambda part: part):
        """One micro-batch -> loss sum (to be divided by the count), count, other sums for the log.

        backward(part) differentiates a part of the loss and returns its value. It is called as soon
        as a part is there, which frees its activations. By default the caller gets the graphs.
        """
        with torch.no_grad():                            # the tower is frozen: once for both models
            seen = batch.pixels is not None
            vision = self.teacher.visual(batch.pixels, batch.grids) if seen else None
        return (self.kd if label == "stage 3" else self.align)(batch, vision, backward)

    def align(self, batch, vision, backward):
        """Stages 1 and 2: Eq. 4 or Eq. 5, times the count T of real positions."""
        with torch.no_grad():
            # The weights first: they come from the teacher alone, and no gradient passes them.
            e = self.teacher.embed(batch.ids, batch.mask, None, batch.grids, vision)
            visual = visual_positions(batch.ids, self.student.config)
            rho = batch.rho if self.s.density_cache else self.scores(batch, vision, visual, e)
            w = WEIGHTS[self.cond.weight](rho, visual, batch.mask, batch.names, self.s)
            w = w.expand(len(self.replaced), *batch.ids.shape)      # (S, B, T), as +LD has one each
        mask = causal_mask_needed(batch.mask)
        errors = lockstep(self.teacher, self.student, self.replaced, e, mask, self.cond.align, self.s.feed)
        # Fed the teacher's stream, each layer's error is a graph of its own: differentiated before
        # the walk goes on, it leaves memory that does not grow with depth. Fed the student's, one
        # graph passes all layers and is differentiated at the end.
        one_by_one, loss, plain = self.s.feed == "teacher", 0.0, 0.0
        for w_l, error in zip(w, errors):                               # (B, T) each
            part = (w_l * error).sum() / len(self.replaced)           # all that C3 and C4 differ in
            loss = loss + (backward(part) if one_by_one else part)
            plain = plain + error.detach() / len(self.replaced)
        loss, plain = loss if one_by_one else backward(loss), plain[batch.mask]
        # For the log, without w, so that conditions compare. Ledger 15: is drift in few positions?
        top = plain.topk(max(1, len(plain) // 100)).values.sum()
        return loss, len(plain), dict(drift=plain.sum(), drift_top1=top)

    def scores(self, batch, vision, visual, e):
        """rho, computed now: density (B, T), or gradient scores (B, T), in +LD (S, B, T)."""
        if self.cond.weight == "fisher":
            return position_scores(self.teacher, self.replaced, self.cond.layers, e, batch)
        if vision is None:
            return to_positions(None, visual)
        try:
            return to_positions(densities(self.teacher, vision, batch.grids), visual)
        except ValueError as error:
            raise BadSample(f"one of {', '.join(batch.names)}: {error}") from None

    def kd(self, batch, vision, backward):
        """Stage 3: Eq. 1, times the number of positions."""
        # Logits are needed at few positions, those that predict an answer: only they pass the head.
        target = following(batch.labels)                                # (B, T)
        rows = target != IGNORED
        if self.s.kl == "text":                        # all whose next token is text, answer or not
            text = batch.mask[:, 1:] & ~visual_positions(batch.ids[:, 1:], self.student.config)
            rows = F.pad(text, (0, 1))
        inputs = (batch.ids, batch.mask, None, batch.grids, vision)
        with torch.no_grad():
            h_t = self.teacher.hidden(*inputs)[rows]                    # (n, D)
        h_s = self.student.hidden(*inputs)[rows]
        kl, ce = kd_sums(h_s, h_t, target[rows], self.student.lm_head, self.teacher.lm_head)
        loss = self.s.lambda_kl * kl + self.s.lambda_ce * ce            # Eq. 1, one count for both
        return backward(loss), len(h_s), dict(kl=kl.detach(), ce=ce.detach())


# ---- The run: teacher in, student and its report out ---------------------------------------------

def convert(s, teacher):
    """The student, whose mixers are fp32 masters; all else is shared with the teacher and frozen,
    unless --stage3 full gives it an own copy of all but the vision tower."""
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
    teacher.recompute = s.recompute                       # the student's too
    return teacher, convert(s, teacher), processor


def finish(s, teacher, student, processor):
    """Saves the merged student, judges it beside its teacher, draws density maps of some pages."""
    from evaluate import evaluate_models, table           # judging is not needed to train
    out = Path(s.out)
    student = student.in_dtype(next(teacher.parameters()).dtype)
    with writing(out, tensor_bytes(student.state_dict())):
        student.save_pretrained(out)
    if s.data:
        print(f"The student is in {out}. python evaluate.py {s.teacher} {out} --bench NAME=FILE judges it.")
        return
    draw_pages(teacher, processor, out / "density", s.page)
    if s.questions:
        benches = {s.suite: None} if s.suite else None
        report = table(evaluate_models({"teacher": teacher, s.cond: student}, processor, s.questions,
                                       benches, page=s.page))
        (out / "table.md").write_text(report + "\n")
        print(f"\n{report}\n")
    print(f"{out} holds the student (loads like its teacher), log.jsonl"
          f"{', table.md' * bool(s.questions)}, and density maps in density/.")


def draw_pages(teacher, processor, folder, page, count=3):
    """Fig. 2 for evaluation pages: where the weight of C4 goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for suite in ("reading", "reasoning"):
        for sample in (World("eval", 0, suite, (page, page))[i] for i in range(count)):
            draw_sample(teacher, processor, sample, folder / f"{sample.source}.png")


def refuse_pair(sample):
    """Distillation would learn from the rejected answer of a preference pair too."""
    if sample.chosen is not None:
        raise BadSample(f"{sample.where or sample.id} is a preference pair, which is for "
                        "`sft_dpo.py dpo` alone.")


def check(s):
    """Refuses flags that contradict each other, before anything is loaded. Raises ValueError."""
    cond, data, write, read = CONDS[s.cond], s.data, s.write_cache, s.density_cache
    gradient = cond.weight == "fisher" and cond.layers != "each"
    for wrong, sentence in (
        (data and (s.suite or s.page != 10), "--suite and --page are of the embedded world, not --data"),
        ((write or read) and not data, "caches are of files: --write-cache and --density-cache need --data"),
        (write and read, "--write-cache makes a file, --density-cache reads one: give one of them"),
        (write and not gradient,
         f"--write-cache is for one gradient score a position (c5, sl), not {s.cond}"),
        (write and int(os.environ.get("WORLD_SIZE", 1)) > 1, "--write-cache runs as one process"),
        (read and not (gradient or cond.weight == "density"),
         f"--density-cache is for one density or score a position, not {s.cond}"),
        (read and not Path(read).is_file(), f"--density-cache {read}: there is no such file"),
    ):
        if wrong:
            raise ValueError(sentence)


def dry_run(s):
    """What the run would need, from the config alone: no weights are read."""
    dtype = dtype_of(s.dtype, device_of(s.device, here=False))
    with torch.device("meta"):
        teacher = Qwen3VL(Config.from_folder(s.teacher)).to(dtype)
    objective = Distillation(s, teacher, convert(s, teacher))
    aligns, mixers = objective.cond.align is not None, objective.mixers
    frozen, trained = dict(teacher.named_parameters()), objective.parameters()
    new = {n: p for n, p in mixers.items() if objective.is_new(n)}
    size, *counts = (sum(p.numel() for p in part.values()) / 1e6
                     for part in (frozen, new, mixers, trained))
    print(f"{s.teacher}: {size:,.1f} M frozen parameters, {len(objective.replaced)} of "
          f"{len(teacher.layers)} attention layers replaced")
    for stage, count in enumerate(counts if aligns else (0, 0, counts[2]), 1):
        print(f"Stage {stage} " + (f"trains {count:,.1f} M parameters" if count else "is skipped"))
    print_needs(s, s.teacher, frozen, trained, drifts=int(aligns and s.feed == "own"))


def main(argv=None):
    s = parse(DistillSettings, DEFAULTS, argv, __doc__.split("\n")[0])
    s.out = s.out or f"out/{s.cond}"
    with one_sentence(ValueError, OSError, BadSample):
        check(s)
        if s.dry_run:
            return dry_run(s)
        ranks, cond = start_processes(s), CONDS[s.cond]
        if not s.write_cache:
            claim(s.out, ranks)                           # a second run ends before it loads
        world = World("train", s.seed, s.suite or None, cells=(s.page, s.page))
        data = read_data(s.data) if s.data else world
        teacher, student, processor = build(s, torch.device("cpu") if s.shard else ranks.device)
        if s.write_cache:
            return write_scores(s.write_cache, cond, teacher, student, processor, data, refuse_pair, s.skip_bad)
        if s.density_cache:                               # its fingerprint is of weights not yet split
            processor.scores = open_scores(s.density_cache, cond, teacher, student, processor)
        if s.shard:
            shard(ranks, teacher, student)
        objective = Distillation(s, teacher, student)
        claim(s.out, ranks, make=True)
    with one_sentence(BadSample, OSError):
        run(s, objective, processor, Checked(data, refuse_pair) if s.data else data, ranks)
    with one_sentence(OSError):
        if ranks.rank == 0:
            if s.shard:                                   # whole tensors are in the last checkpoint
                teacher, student, processor = build(s, torch.device("cpu"))
                whole = Distillation(s, teacher, student).parameters()
                load_parameters(last_checkpoint(Path(s.out)), whole)
            finish(s, teacher, student, processor)
        ranks.end()


if __name__ == "__main__":
    main()
