"""Phases 2 and 3 of HEED: a distilled student becomes a finished model (Sect. 5.4, C.2, C.4, C.5).

    torchrun sft_dpo.py sft --model out/c4                          # supervised fine-tuning  -> out/c4-sft
    torchrun sft_dpo.py dpo --model out/c4-sft                      # preference optimisation -> out/c4-dpo
    torchrun --nproc-per-node 8 sft_dpo.py sft --model out/c4 --data sft.json --shard
    python sft_dpo.py dpo --model out/c4-sft --data pairs.jsonl --dry-run
    python sft_dpo.py sft --help                                    # every setting, with its reason

Both phases are an objective for the loop of loop.py: what trains, and the loss of one micro-batch.

    SFT    - sum over answer tokens of log pi(token | all before it), over the number of such tokens
    DPO    - log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r))), over the number of pairs

    code          paper                                                           shape
    pi_c, pi_r    log pi_theta(answer | prompt), of chosen and rejected answers   (pairs,)
    ref_c, ref_r  the same by the SFT checkpoint: this model, its adapters off    (pairs,)
    A, B          LoRA: the layer's W becomes W + (alpha / r) B A                 (r, in), (out, r)

What the paper calls the vision encoder is the ViT: patch embedding, positions and blocks (C.3 lists the
projector apart from it). It never trains here; the mergers, Qwen3-VL's projector, do, unless --no-projector.
Shape letters: B batch, T positions, D model width, V vocabulary, n supervised positions.
"""
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import IGNORED, BadSample, NoPreference, Processor, read_data
from distill import following, token_logps
from loop import Ranks, Settings, load_model, needs, parse, run, setting, shard, start
from model import Config, Qwen3VL, dtype_of
from synthdoc import World

# ---------------------------------------------------------------------------------------------------------
# Settings, Table 11: every field is a flag


@dataclass
class SFTSettings(Settings):
    model: str = setting("out/c4", "folder to start from: a distilled student, or a plain Qwen3-VL")
    out: str = setting("", "folder of the run; empty: out/<model>-sft")
    tokens: Optional[int] = setting(None, "token budget; 0: one epoch, by the mean of 500 samples", low=0)
    warmup: float = setting(0.03, "share of the budget over which the learning rate rises", low=0, high=0.99)
    floor: float = setting(0.0, "the cosine ends at this share of the peak; C.4 names none", low=0, high=1)
    cap: int = setting(8192, "tokens of a sample; text is cut, image tokens never are", low=1)
    visual_tokens: int = setting(2500, "most visual tokens of an image; a larger one is scaled down", low=1)
    projector: bool = setting(True, "the mergers train too; --no-projector freezes the whole tower")
    questions: int = setting(256, "evaluation questions a suite at the end, embedded world; 0: none", low=0)


@dataclass
class DPOSettings(SFTSettings):
    model: str = setting("out/c4-sft", "folder of the SFT model: where to start from, and the reference")
    out: str = setting("", "folder of the run; empty: out/<model, without -sft>-dpo")
    weight_decay: float = setting(0.0, "C.5", low=0)
    cap: int = setting(4096, "tokens of chosen and rejected together, prompts included: half for each", low=2)
    visual_tokens: int = setting(1536, "of an image; leaves text a quarter of half the cap", low=1)
    beta: float = setting(0.1, "how dearly departures from the reference are paid", low=0)
    rank: int = setting(32, "r of LoRA", low=1)
    alpha: float = setting(64.0, "the adapters' product is scaled by alpha / r")
    dropout: float = setting(0.05, "on the adapters' input, not on the layer's", low=0, high=0.99)


SFT_DEFAULTS = {                # embedded world, real data (Table 11)
    "tokens":       (150_000,           0),
    "batch_tokens": (1_250,             1_000_000),
    "micro_tokens": (1_250,             16_384),
    "lr":           (1e-3,              5e-6),
}
DPO_DEFAULTS = {
    "tokens":       (100_000,           0),
    "batch_tokens": (2_500,             500_000),
    "micro_tokens": (2_500,             16_384),
    "lr":           (1e-4,              1e-6),
}

# ---------------------------------------------------------------------------------------------------------
# Losses


def answer_logps(model, batch, vision=None):
    """log p of every supervised token of a batch, row by row -> (n,), and how many each row has (B,)."""
    target = following(batch.labels)
    at = target != IGNORED                                                              # (B, T)
    hidden = model.hidden(batch.ids, batch.mask, None if vision else batch.pixels, batch.grids, vision)
    return token_logps(hidden[at], target[at], model.lm_head), at.sum(1)


def dpo_loss(pi_c, pi_r, ref_c, ref_r, beta):
    """Summed log-probabilities, four of (pairs,) -> losses, rewards of chosen, of rejected, each (pairs,)."""
    chosen, rejected = beta * (pi_c - ref_c), beta * (pi_r - ref_r)       # implicit rewards, up to a constant
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


# ---------------------------------------------------------------------------------------------------------
# LoRA: low-rank adapters around frozen linear layers


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x). B starts at zero: at first, nothing changes."""

    def __init__(self, base, rank, alpha, dropout, generator=None):
        super().__init__()
        self.base, self.scale, self.dropout, self.on = base, alpha / rank, dropout, True
        like = base.weight
        a = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5), generator=generator)
        wide = torch.promote_types(like.dtype, torch.float32)             # masters, as all that trains
        self.A = nn.Parameter(a.to(like.device, wide))                                  # (r, in)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=like.device, dtype=wide))

    def forward(self, x):                                                               # (..., in)
        y = self.base(x)                                                                # (..., out)
        if not self.on:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A)               # (..., r)
        return y + self.scale * F.linear(low, self.B)

    @torch.no_grad()
    def merged(self):
        """The plain layer again. Summed in fp32 and rounded once: in bf16, W swallows small updates."""
        delta = self.scale * (self.B @ self.A)                                          # (out, in)
        self.base.weight.copy_(self.base.weight.to(delta.dtype) + delta)
        return self.base


def in_vision_encoder(name, projector):
    """Whether a parameter or module is of what stays frozen. The mergers are only without `projector`."""
    return name.startswith("model.visual") and not (projector and "merger" in name)


def exchange(model, chosen, make):
    """Puts make(module) in the place of every submodule for which chosen(name, module)."""
    for name, module in [(n, m) for n, m in model.named_modules() if chosen(n, m)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module))


def add_adapters(model, s):
    """LoRA on every linear layer outside the vision encoder: attention, mixers, MLPs, mergers. Not on the
    head, which may be the embedding table as well; nor on convolutions, norms and decay rates, which are no
    linear layers. A mixer must call its projections as modules: one that reads `proj.weight` finds none."""
    generator = torch.Generator().manual_seed(s.seed)
    exchange(model, lambda name, m: isinstance(m, nn.Linear) and name != "lm_head"
             and not in_vision_encoder(name, s.projector),
             lambda layer: LoRA(layer, s.rank, s.alpha, s.dropout, generator))
    return model.train()


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


# ---------------------------------------------------------------------------------------------------------
# The objectives: what loop.py asks of a phase


class SFT:
    """Everything but the vision encoder trains, as fp32 masters. Rows of a batch are samples of their own,
    padded on the right: no attention and no state passes from one to another."""

    def __init__(self, s, model):
        self.s, self.model = s, model
        for name, p in model.named_parameters():
            p.requires_grad_(not in_vision_encoder(name, s.projector))
            if p.requires_grad:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @staticmethod
    def caps(s):
        return dict(max_visual_tokens=s.visual_tokens, max_tokens=s.cap, max_text_tokens=s.cap)

    def parameters(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, progress):
        return "sft", (0, 1)

    def loss(self, batch, label, backward=lambda part: part):
        logps, counts = answer_logps(self.model, batch)
        return backward(-logps.sum()), int(counts.sum()), {}

    def result(self):
        return self.model.in_dtype(dtype_of(self.s.dtype, self.model.lm_head.weight.device)).eval()


class DPO:
    """Adapters train; the reference is the model without them, so that there is no second copy."""

    def __init__(self, s, model):
        self.s, self.model = s, model.requires_grad_(False)
        add_adapters(model, s)

    @staticmethod
    def caps(s):                                          # of one row: a pair has two
        return dict(max_visual_tokens=s.visual_tokens, max_tokens=s.cap // 2, max_text_tokens=s.cap // 2)

    def parameters(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, progress):
        return "dpo", (0, 1)

    def loss(self, batch, label, backward=lambda part: part):
        vision = None
        if batch.pixels is not None and not self.s.projector:
            vision = self.model.visual(batch.pixels, batch.grids)         # all frozen: once for both
        with torch.no_grad(), adapters_off(self.model):
            ref = self.summed(batch, vision)                                            # (pairs, 2)
        pi = self.summed(batch, vision)
        losses, chosen, rejected = dpo_loss(*pi.unbind(1), *ref.unbind(1), self.s.beta)
        terms = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                 "rewards/accuracies": (chosen > rejected).float(), "logps/chosen": pi[:, 0].detach(),
                 "logps/rejected": pi[:, 1].detach()}
        return backward(losses.sum()), len(pi), {name: value.sum() for name, value in terms.items()}

    def summed(self, batch, vision):
        """log pi(answer | prompt) -> (pairs, 2): rows alternate between chosen and rejected answers."""
        logps, counts = answer_logps(self.model, batch, vision)
        rows = torch.stack([row.sum() for row in logps.split(counts.tolist())])         # (B,)
        return rows[:len(rows) // 2 * 2].view(-1, 2)      # a stand-in's single row is no pair

    def result(self):
        return merge_adapters(self.model)


class Phase(NamedTuple):
    settings: type
    defaults: dict
    objective: type
    seed: int                                             # of its pages in the embedded world: all are new


PHASES = {"sft": Phase(SFTSettings, SFT_DEFAULTS, SFT, 1000),
          "dpo": Phase(DPOSettings, DPO_DEFAULTS, DPO, 2000)}

# ---------------------------------------------------------------------------------------------------------
# Data


class Suited:
    """A data set of which a phase takes what is meant for it: DPO pairs, SFT all else. The rest is refused;
    the embedded world's running text, which answers no question, is left out without complaint."""

    def __init__(self, data, pairs, embedded):
        self.data, self.pairs, self.embedded = data, pairs, embedded
        self.endless = getattr(data, "endless", False)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.check(self.data[index])

    def peek(self, index):
        return self.check(getattr(self.data, "peek", self.data.__getitem__)(index))

    def check(self, sample):
        if self.embedded and sample.messages[0]["role"] == "document":
            raise NoPreference(f"{sample.id} is running text")
        if (sample.chosen is not None) != self.pairs:
            what = "has no chosen and rejected answer" if self.pairs else "is a preference pair, not for SFT"
            raise BadSample(f"{sample.where or sample.id} {what}.")
        return sample


def dataset_of(s, phase):
    pairs = phase.objective is DPO
    data = read_data(s.data) if s.data else World("train", s.seed + phase.seed, pairs=pairs)
    return Suited(data, pairs, embedded=not s.data)


def one_epoch(data, processor, probes=500):
    """About how many tokens a data set has, by evenly spaced samples. Raises BadSample if none is usable."""
    lengths, complaint = [], None
    probed = sorted({k * len(data) // probes for k in range(probes)})
    for i in probed:
        try:
            lengths.append(sum(processor.length(row) for row in data.peek(i).rows()))
        except BadSample as error:
            complaint = error
    if not lengths:
        raise BadSample(f"None of {min(probes, len(data))} samples can be used, for instance: {complaint}")
    return round(sum(lengths) / len(probed) * len(data))                 # what is left out has no tokens


# ---------------------------------------------------------------------------------------------------------
# The run


def prepared(s, phase, device):
    """-> the objective around a freshly loaded model, and the processor with the phase's caps."""
    model, processor = load_model(s, "model", device, **phase.objective.caps(s))
    model.recompute = s.recompute
    objective = phase.objective(s, model)
    return objective, processor


def loaded(s, phase, ranks):
    """-> data, objective, processor. Sets s.tokens where one epoch was asked for. Raises ValueError, OSError, BadSample."""
    objective, processor = prepared(s, phase, torch.device("cpu") if s.shard else ranks.device)
    data = dataset_of(s, phase)
    s.tokens = s.tokens or one_epoch(data, processor)
    if s.tokens < s.batch_tokens:                         # the schedule would end before its first step
        raise ValueError(f"the data has about {s.tokens:,} tokens, less than one step: give --batch-tokens "
                         f"{max(1, s.tokens // 20)} or so")
    return data, objective, processor


def train(s, phase, ranks, data, objective, processor):
    """-> the finished model, whole and in the run's dtype, on rank 0; None on the others."""
    if s.shard:
        shard(ranks, objective.model)
    run(s, objective, processor, data, ranks, betas=(0.9, 0.999))
    if ranks.rank > 0:
        return None
    if s.shard:                                           # checkpoints hold whole tensors: read the last
        objective = prepared(s, phase, torch.device("cpu"))[0]
        run(s, objective, processor, data, Ranks(0, 1, torch.device("cpu")))
    return objective.result()


def finish(s, model):
    """Saves the model, and judges it beside the one it started from."""
    from evaluate import evaluate_models, full_processor, table           # judging is not needed to train
    out = Path(s.out)
    model.save_pretrained(out)
    print(f"{out} holds the model and log.jsonl. python evaluate.py {s.model} {out} judges it"
          + (" (--bench NAME=FILE)." if s.data else "."))
    if s.questions and not s.data:
        kind = model.lm_head.weight
        models = {Path(s.model).name: s.model, out.name: model}
        results = evaluate_models(models, full_processor(s.model), s.questions, device=kind.device,
                                  dtype=kind.dtype)
        (out / "table.md").write_text(table(results) + "\n")
        print(f"\n{table(results)}\n")


def dry_run(s, phase):
    """What the run would need, from the config alone."""
    c = Config.from_folder(s.model)
    with torch.device("meta"):
        model = Qwen3VL(c)
    objective = phase.objective(s, model)
    named, trained = dict(model.named_parameters()), objective.parameters()
    frozen = {name: p for name, p in named.items() if name not in trained}
    if not s.tokens and Path(s.data).is_file() and (Path(s.model) / "tokenizer.json").is_file():
        s.tokens = one_epoch(dataset_of(s, phase), Processor(s.model, **phase.objective.caps(s)))
    print(f"{s.model}: {sum(p.numel() for p in frozen.values()) / 1e6:,.1f} M parameters stay frozen, "
          f"{sum(p.numel() for p in trained.values()) / 1e6:,.1f} M train")
    needs(s, s.model, frozen, trained)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in PHASES:
        sys.exit(f"usage: sft_dpo.py {'|'.join(PHASES)} --model FOLDER (sft_dpo.py sft --help: all settings)")
    phase = PHASES[argv[0]]
    s = parse(phase.settings, phase.defaults, argv[1:], __doc__.split("\n")[0])
    s.out = s.out or f"out/{Path(s.model).name.removesuffix('-sft')}-{argv[0]}"
    if Path(s.out).resolve() == Path(s.model).resolve():
        sys.exit(f"--out {s.out} is the folder of --model: choose another")
    try:                                                  # user errors end in a sentence, not a traceback
        if s.dry_run:
            return dry_run(s, phase)
        ranks = start(s)
        data, objective, processor = loaded(s, phase, ranks)
    except (BadSample, ValueError, OSError) as error:
        sys.exit(str(error))
    try:
        model = train(s, phase, ranks, data, objective, processor)
    except BadSample as error:
        sys.exit(str(error))
    if model is not None:
        finish(s, model)
    ranks.wait()
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
