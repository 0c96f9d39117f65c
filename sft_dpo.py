"""Phases 2 and 3 of HEED: a distilled student becomes a finished model (Sect. 5.4, C.2, C.4, C.5).

    torchrun sft_dpo.py sft --model out/c4                    # supervised fine-tuning  -> out/c4-sft
    torchrun sft_dpo.py dpo --model out/c4-sft                # preference optimisation -> out/c4-dpo
    torchrun --nproc-per-node 8 sft_dpo.py sft --model out/c4 --data sft.json --shard
    python sft_dpo.py dpo --model out/c4-sft --data pairs.jsonl --dry-run
    python sft_dpo.py sft --help                              # every setting, with its reason

Both phases are an objective for the loop of loop.py: what trains, and the loss of a micro-batch.

    SFT    - sum over answer tokens of log pi(token | all before it), over the number of such tokens
    DPO    - log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r))), over the number of pairs

    code          paper                                                           shape
    pi_c, pi_r    log pi_theta(answer | prompt), of chosen and rejected answers   (pairs,)
    ref_c, ref_r  the same by the SFT checkpoint: this model, its adapters off    (pairs,)
    A, B          LoRA: the layer's W becomes W + (alpha / r) B A                 (r, in), (out, r)

The paper's vision encoder is the ViT: patch embedding, positions and blocks. It never trains here;
the mergers, Qwen3-VL's projector (C.3 lists it apart), do, unless --no-projector.
Shape letters: B batch, T positions, D model width, V vocabulary, n supervised positions.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import IGNORED, BadSample, NoPreference, following, processor_of, read_data
from loop import (Checked, Settings, claim, load_model, load_parameters, one_sentence, parse,
                  print_needs, run, setting, start_processes)
from model import Config, Qwen3VL, dtype_of
from parts.logits import token_logps
from parts.lora import LoRA, adapters_off, exchange, merge_adapters
from parts.ranks import shard
from parts.runs import last_checkpoint, tensor_bytes, writing
from synthdoc import World

# ---- Settings, Table 11: every field is a flag ---------------------------------------------------


@dataclass
class SFTSettings(Settings):
    model: str = setting("out/c4", "folder to start from: a distilled student, or a plain Qwen3-VL")
    out: str = setting("", "folder of the run; empty: out/<model>-sft", decides=False)
    tokens: Optional[int] = setting(None, "token budget; 0: one epoch, by the mean of 500 samples",
                                    low=0)
    warmup: float = setting(0.03, "share of the budget over which the learning rate rises",
                            low=0, high=0.99)
    floor: float = setting(0.0, "the cosine ends at this share of the peak; C.4 names none",
                           low=0, high=1)
    cap: int = setting(8192, "tokens of a sample; text is cut, image tokens never are", low=1)
    visual_tokens: int = setting(2500, "most visual tokens of an image; larger ones are scaled down",
                                 low=1)
    projector: bool = setting(True, "the mergers train too; --no-projector freezes the whole tower")
    questions: int = setting(256, "evaluation questions a suite at the end, embedded world; 0: none",
                             low=0, decides=False)


@dataclass
class DPOSettings(SFTSettings):
    model: str = setting("out/c4-sft", "folder of the SFT model: the start, and the reference")
    out: str = setting("", "folder of the run; empty: out/<model, without -sft>-dpo",
                       decides=False)
    weight_decay: float = setting(0.0, "C.5", low=0)
    cap: int = setting(4096, "tokens of chosen and rejected together, prompts included: half for "
                       "each", low=2)
    visual_tokens: int = setting(1536, "of an image; leaves text a quarter of half the cap", low=1)
    beta: float = setting(0.1, "how dearly departures from the reference are paid", low=0)
    rank: int = setting(32, "r of LoRA", low=1)
    alpha: float = setting(64.0, "the adapters' product is scaled by alpha / r")
    dropout: float = setting(0.05, "on the adapters' input, not on the layer's", low=0, high=0.99)


SFT_DEFAULTS = {                # embedded world, real data (Table 11)
    "tokens":       (150_000,           0),
    "batch_tokens": (1_250,             1_000_000),
    "micro_tokens": (1_250,             16_384),
    "lr":           (3e-4,              5e-6),
}
DPO_DEFAULTS = {
    "tokens":       (100_000,           0),
    "batch_tokens": (2_500,             500_000),
    "micro_tokens": (2_500,             16_384),
    "lr":           (1e-4,              1e-6),
}

# ---- Losses --------------------------------------------------------------------------------------


def answer_logps(model, batch, vision=None):
    """log p of all supervised tokens of a batch, row by row -> (n,), and how many each row has (B,).
    vision: what model.visual gave, if it was asked already."""
    target = following(batch.labels)                                                # (B, T)
    at = target != IGNORED                                                          # (B, T)
    pixels = None if vision else batch.pixels
    hidden = model.hidden(batch.ids, batch.mask, pixels, batch.grids, vision)       # (B, T, D)
    return token_logps(hidden[at], target[at], model.lm_head), at.sum(1)


def dpo_loss(pi_c, pi_r, ref_c, ref_r, beta):
    """Summed log-probabilities, four of (pairs,) -> losses, rewards of chosen, of rejected."""
    # beta log(pi / ref) is the reward that pi is optimal for, up to a term that both answers share.
    chosen, rejected = beta * (pi_c - ref_c), beta * (pi_r - ref_r)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


# ---- What trains ---------------------------------------------------------------------------------


def in_vision_encoder(name, projector):
    """Whether a parameter or module is of what stays frozen: the mergers only if not `projector`."""
    return name.startswith("model.visual") and not (projector and "merger" in name)


def add_adapters(model, s):
    """LoRA on every linear layer outside the vision encoder but the head, which may be the embedding
    table as well. A mixer must call its projections as modules: `proj.weight` has no adapter."""
    generator = torch.Generator().manual_seed(s.seed)

    def adapted(name, module):
        outside = name != "lm_head" and not in_vision_encoder(name, s.projector)
        return isinstance(module, nn.Linear) and outside
    exchange(model, adapted, lambda layer: LoRA(layer, s.rank, s.alpha, s.dropout, generator))
    return model.train()


# ---- The objectives: what loop.py asks of a phase ------------------------------------------------


class SFT:
    """Everything but the vision encoder trains, as fp32 masters. Rows of a batch are samples of
    their own, padded on the right: neither attention nor state passes from one to another."""
    label, pairs = "sft", False                           # pairs: what its samples are

    def __init__(self, s, model):
        self.s, self.model = s, model
        for name, p in model.named_parameters():
            p.requires_grad_(not in_vision_encoder(name, s.projector))
            if p.requires_grad:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    def parameters(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, progress):
        return self.label, (0, 1)

    def loss(self, batch, label, backward=lambda part: part):
        logps, counts = answer_logps(self.model, batch)
        return backward(-logps.sum()), int(counts.sum()), {}

    def result(self):
        return self.model.in_dtype(dtype_of(self.s.dtype, self.model.lm_head.weight.device)).eval()


class DPO(SFT):
    """Adapters train; the reference is the model without them, so that there is no second copy."""
    label, pairs = "dpo", True

    def __init__(self, s, model):
        self.s, self.model = s, model.requires_grad_(False)
        add_adapters(model, s)

    def loss(self, batch, label, backward=lambda part: part):
        vision = None
        if batch.pixels is not None and not self.s.projector:    # policy and reference see the same
            vision = self.model.visual(batch.pixels, batch.grids)
        with torch.no_grad(), adapters_off(self.model):
            ref = self.pair_logps(batch, vision)                                    # (pairs, 2)
        pi = self.pair_logps(batch, vision)                                         # (pairs, 2)
        losses, chosen, rejected = dpo_loss(*pi.unbind(1), *ref.unbind(1), self.s.beta)
        terms = {"rewards/chosen": chosen, "rewards/rejected": rejected,
                 "rewards/margins": chosen - rejected,
                 "rewards/accuracies": (chosen > rejected).float(),
                 "logps/chosen": pi[:, 0].detach(),
                 "logps/rejected": pi[:, 1].detach()}
        return backward(losses.sum()), len(pi), {name: x.sum() for name, x in terms.items()}

    def pair_logps(self, batch, vision):
        """log pi(answer | prompt) -> (pairs, 2): rows alternate between chosen and rejected."""
        logps, counts = answer_logps(self.model, batch, vision)
        rows = torch.stack([row.sum() for row in logps.split(counts.tolist())])     # (B,)
        return rows[:len(rows) // 2 * 2].view(-1, 2)      # a stand-in's single row is no pair

    def result(self):
        return merge_adapters(self.model)


class Phase(NamedTuple):
    settings: type
    defaults: dict
    objective: type
    seed: int                                             # of its embedded pages: all are new


PHASES = {"sft": Phase(SFTSettings, SFT_DEFAULTS, SFT, 1000),
          "dpo": Phase(DPOSettings, DPO_DEFAULTS, DPO, 2000)}

# ---- Data ----------------------------------------------------------------------------------------


def check_kind(sample, pairs, embedded):
    """Raises BadSample for what is not meant for a phase: DPO takes pairs, SFT all else. Of the
    embedded world, running text, which answers no question, is left out without complaint."""
    if embedded and sample.messages[0]["role"] == "document":
        raise NoPreference(f"{sample.id} is running text")
    if (sample.chosen is not None) != pairs:
        what = "has no chosen and rejected answer" if pairs else "is a preference pair, not for SFT"
        raise BadSample(f"{sample.where or sample.id} {what}.")


def read_samples(s, phase):
    pairs = phase.objective.pairs
    data = read_data(s.data) if s.data else World("train", s.seed + phase.seed, pairs=pairs)
    return Checked(data, partial(check_kind, pairs=pairs, embedded=not s.data))


def caps(s, phase):
    """The Processor's: of a row, and a pair has two."""
    tokens = s.cap // 2 if phase.objective.pairs else s.cap
    return dict(max_visual_tokens=s.visual_tokens, max_tokens=tokens, max_text_tokens=tokens)


def epoch_tokens(data, processor, probes=500):
    """About how many tokens a data set has, by evenly spaced samples. BadSample if none is usable."""
    lengths, complaint = [], None
    probed = sorted({k * len(data) // probes for k in range(probes)})
    for i in probed:
        try:
            lengths.append(sum(processor.length(row) for row in data[i].rows()))
        except BadSample as error:
            complaint = error
    if not lengths:
        raise BadSample(f"None of {min(probes, len(data))} samples can be used, for instance: "
                        f"{complaint}")
    return round(sum(lengths) / len(probed) * len(data))  # what is left out has no tokens


# ---- The run -------------------------------------------------------------------------------------


def build(s, phase, device):
    """-> the objective around a freshly loaded model, and the processor with the phase's caps."""
    model, processor = load_model(s, "model", device, **caps(s, phase))
    model.recompute = s.recompute
    return phase.objective(s, model), processor


def finish(s, model):
    """Saves the model, and judges it beside the one it started from."""
    from evaluate import evaluate_models, full_processor, table     # judging is not needed to train
    out = Path(s.out)
    with writing(out, tensor_bytes(model.state_dict())):
        model.save_pretrained(out)
    print(f"{out} holds the model and log.jsonl. python evaluate.py {s.model} {out} judges it"
          + (" (--bench NAME=FILE)." if s.data else "."))
    if s.questions and not s.data:
        models, like = {Path(s.model).name: s.model, out.name: model}, model.lm_head.weight
        report = table(evaluate_models(models, full_processor(s.model), s.questions,
                                       device=like.device, dtype=like.dtype))
        (out / "table.md").write_text(report + "\n")
        print(f"\n{report}\n")


def dry_run(s, phase):
    """What the run would need, from the config alone."""
    with torch.device("meta"):
        model = Qwen3VL(Config.from_folder(s.model))
    trained = phase.objective(s, model).parameters()
    frozen = {name: p for name, p in model.named_parameters() if name not in trained}
    if not s.tokens and Path(s.data).is_file() and (Path(s.model) / "tokenizer.json").is_file():
        s.tokens = epoch_tokens(read_samples(s, phase), processor_of(s.model, **caps(s, phase)))
    millions = [sum(p.numel() for p in part.values()) / 1e6 for part in (frozen, trained)]
    print(f"{s.model}: {millions[0]:,.1f} M parameters stay frozen, {millions[1]:,.1f} M train")
    print_needs(s, s.model, frozen, trained)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if not argv or argv[0] not in PHASES:
        sys.exit(f"usage: sft_dpo.py {'|'.join(PHASES)} --model FOLDER (sft_dpo.py --help: more)")
    phase = PHASES[argv[0]]
    s = parse(phase.settings, phase.defaults, argv[1:], __doc__.split("\n")[0])
    s.out = s.out or f"out/{Path(s.model).name.removesuffix('-sft')}-{argv[0]}"
    if Path(s.out).resolve() == Path(s.model).resolve():
        sys.exit(f"--out {s.out} is the folder of --model: choose another")
    with one_sentence(BadSample, ValueError, OSError):
        if s.dry_run:
            return dry_run(s, phase)
        ranks = start_processes(s)
        claim(s.out, ranks)                               # a second run ends before it loads
        objective, processor = build(s, phase, torch.device("cpu") if s.shard else ranks.device)
        data = read_samples(s, phase)
        s.tokens = s.tokens or epoch_tokens(data, processor)
        if s.tokens < s.batch_tokens:                     # the schedule would end before a first step
            sys.exit(f"the data has about {s.tokens:,} tokens, less than one step: give "
                     f"--batch-tokens {max(1, s.tokens // 20)} or so")
        if s.shard:
            shard(ranks, objective.model)
        claim(s.out, ranks, make=True)
    with one_sentence(BadSample, OSError):
        run(s, objective, processor, data, ranks, betas=(0.9, 0.999))
    with one_sentence(OSError):
        if ranks.rank == 0 and s.shard:                   # whole tensors are in the last checkpoint
            objective, _ = build(s, phase, torch.device("cpu"))
            load_parameters(last_checkpoint(Path(s.out)), objective.parameters())
        if ranks.rank == 0:
            finish(s, objective.result())
        ranks.end()


if __name__ == "__main__":
    main()
