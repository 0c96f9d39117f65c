"""The loop that distill.py and sft_dpo.py share: flags, processes, steps. Nothing to run here.

An objective is anything with

    parameters()                    -> {name: parameter} that train
    prepare(progress)               -> label, and (begin, end) of the learning rate's schedule, in
                                       shares of the budget
    loss(batch, label, backward)    -> loss sum, count, {name: sum for the log} of one micro-batch

and `run` trains it over a token budget. Sums and counts are added over micro-batches and ranks
before they are divided, so neither accumulation nor the number of processes changes a step. A run
that was killed goes on from its last checkpoint with the same command, on CPUs to the same bits:
the order of the data, dropout and the log depend on (seed, step) alone. Processes come from
torchrun; one process needs none. parts/ has what many processes share, a run's folder, and the
memory that a run needs.
"""
import argparse
import math
import os
import signal
import sys
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import BadSamples, Plan, fetch, loader, processor_of, read_data
from model import Config, Qwen3VL, device_of, dtype_of, find_tensors
from parts.memory import estimate_memory
from parts.ranks import (Ranks, clip_gradients, gather_shard, load_like, reduce_gradients,
                         split_sharded)
from parts.runs import (Interruptible, append_log, cut_log, find_checkpoint, fingerprints,
                        ignore_signals, lock, read_state, refuse_changes, save_checkpoint)

# --------------------------------------------------------------------------------------------------
# Settings: every field is a flag


def setting(default, why, choices=None, low=-math.inf, high=math.inf, decides=True):
    """decides: whether it changes what a run ends with; what does not may change when it goes on."""
    return field(default=default, metadata=dict(help=why, choices=choices, low=low, high=high,
                                                decides=decides))


@dataclass
class Settings:
    """Of any run; a script adds its own. None means: by the DEFAULTS of the script."""
    data: str = setting("", "JSONL file or recipe (data.py); empty: the embedded world (synthdoc.py)")
    out: str = setting("", "folder of the run; empty: out/<cond>", decides=False)
    tokens: Optional[int] = setting(None, "token budget of the run", low=1)
    batch_tokens: Optional[int] = setting(None, "tokens of one optimiser step, all ranks", low=1)
    micro_tokens: Optional[int] = setting(None, "padded tokens a device processes at once", low=1)
    lr: Optional[float] = setting(None, "peak learning rate", low=0)
    warmup: float = setting(0.01, "share of the budget over which the learning rate rises",
                            low=0, high=0.99)
    floor: float = setting(0.1, "the cosine ends at this share of the peak", low=0, high=1)
    weight_decay: float = setting(0.01, "of matrices; norms, biases, other vectors have none", low=0)
    clip: float = setting(1.0, "bound of the gradient's norm", low=1e-9)
    seed: int = setting(0, "of the initialisation, the order of the data, and dropout", low=0)
    save_every: int = setting(50, "steps between checkpoints; stage borders are saved too", low=1,
                              decides=False)
    workers: int = setting(0, "processes that read data ahead", low=0, decides=False)
    threads: int = setting(0, "CPU threads of a process; 0: the cores divided among this node's "
                           "processes", low=0, decides=False)
    device: str = setting("", "cuda or cpu; empty: cuda where there is one, and cpu for the embedded "
                              "world", decides=False)
    dtype: str = setting("", "of frozen weights and activations; empty: bfloat16 on cuda, else "
                         "float32", ["", "bfloat16", "float32", "float64"])
    shard: bool = setting(False, "split the decoder's weights and optimiser state among the devices "
                          "(FSDP2)", decides=False)
    recompute: bool = setting(False, "recompute layers in the backward pass wherever one graph "
                              "passes them all (not in Stages 1/2 fed the teacher's stream): less "
                              "memory, a third more time", decides=False)
    skip_bad: bool = setting(False, "leave out unusable samples, up to 0.1 % (or ten), instead of "
                             "stopping", decides=False)
    dry_run: bool = setting(False, "say what the run would need, and stop", decides=False)


def parse(kind, defaults, argv=None, description=""):
    """Command line -> settings of the dataclass `kind`; what is None there becomes the first value
    of `defaults` on the embedded world, the second on real data. Exits with a sentence on what is
    out of bounds."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in fields(kind):
        flag, options = flag_of(f.name), dict(default=f.default)
        usual = shown = f.default
        if f.name in defaults:
            usual, real = defaults[f.name]
            shown = f"{usual} embedded, {real} real"
        if isinstance(usual, bool):
            options |= dict(action=argparse.BooleanOptionalAction, help=f.metadata["help"])
        else:
            options |= dict(type=type(usual), choices=f.metadata["choices"],
                            help=f"{f.metadata['help']} [{shown}]")
        options["help"] = options["help"].replace("%", "%%")
        parser.add_argument(flag, **options)
    s = kind(**vars(parser.parse_args(argv)))
    for name, (embedded, real) in defaults.items():
        if getattr(s, name) is None:
            setattr(s, name, real if s.data else embedded)
    if not (s.data or s.device):                          # a model so small is all launches on a GPU
        s.device = "cpu"
    for f in fields(kind):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            sys.exit(f"{flag_of(f.name)} {value} is not between {low} and {high}")
    if 0 < s.tokens < s.batch_tokens:
        sys.exit(f"--tokens {s.tokens} is less than the {s.batch_tokens} of one step (--batch-tokens)")
    return s


def flag_of(name):
    return "--" + name.replace("_", "-")


@contextmanager
def one_sentence(*errors):
    """Errors of these kinds, which flags, files and samples cause, end the program in a sentence; so
    does Ctrl-C."""
    try:
        yield
    except errors as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what was saved", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


# --------------------------------------------------------------------------------------------------
# Processes, and what each loads


def start_processes(s):
    """Threads, device and process group from torchrun's environment; one process needs no group."""
    env = os.environ
    kind = device_of(s.device).type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # torchrun gives several processes one thread each, and a single one all cores: both set anew.
    torch.set_num_threads(s.threads or max(1, cores // int(env.get("LOCAL_WORLD_SIZE", 1))))
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(env.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # The device decides the dtype, also of a model that is built on the CPU to be sharded.
    s.dtype = s.dtype or str(dtype_of(s.dtype, device)).removeprefix("torch.")
    ranks = Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), device)
    if ranks.world > 1:
        # Hours, for the others wait while rank 0 writes 100 GB, or judges.
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=3))
    return ranks


def claim(out, ranks, make=False):
    """Keeps a run's folder from other processes: a second run into it ends, on all ranks. Without
    `make` a folder that is not there is let be, so this may be asked before anything is loaded."""
    def take():
        ranks.lock = ranks.lock or lock(Path(out), make)
    ranks.first(take)


def load_model(s, flag, device, **caps):
    """The model in the folder that the setting `flag` names, and its processor with these caps."""
    folder = Path(getattr(s, flag))
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            sys.exit(f"--{flag} {folder}: there is no {file}; give the folder of a downloaded "
                     "checkpoint")
    model = Qwen3VL.from_pretrained(folder, dtype_of(s.dtype, device), device)
    return model, processor_of(folder, **caps)


class Checked:
    """The samples of a data set that a run is meant for: check(sample) raises BadSample on others."""
    endless = True                       # is given the draw itself (data.fetch), and hands it on

    def __init__(self, data, check):
        self.data, self.check = data, check

    def __len__(self):
        return len(self.data)

    def __getitem__(self, draw):
        sample = fetch(self.data, draw)
        self.check(sample)
        return sample


# --------------------------------------------------------------------------------------------------
# Parts of a step


def learning_rate(s, progress):
    """Linear warm-up, then a cosine from the peak to `floor` of it."""
    if progress < s.warmup:
        return s.lr * progress / s.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - s.warmup) / (1 - s.warmup)))
    return s.lr * (s.floor + (1 - s.floor) * cosine)


def groups(parameters, decay):
    """AdamW's groups: matrices decay, norms, biases and other vectors do not. Shards apart."""
    return [dict(params=[p for p in part if (p.dim() >= 2) == matrix], weight_decay=decay * matrix)
            for part in split_sharded(parameters) for matrix in (True, False)]


def accumulate(objective, batches, label, device, autocast):
    """Adds up the gradients of one step's micro-batches on this rank.

    -> {name: sum} with tokens, count, loss and the objective's own; all its samples' names; those
    whose loss was not finite; the cursor at which the next step's data begin.
    """
    sums, names, suspects = {"tokens": 0, "count": 0, "loss": 0.0}, [], []
    for batch in batches:
        batch = batch.to(device)

        def backward(part, weight=batch.weight):          # 0 for a stand-in that keeps ranks in step
            with torch.autocast(device.type, enabled=False):
                (part * weight).backward()
            return part.detach()
        with autocast:
            loss, count, terms = objective.loss(batch, label, backward)
        names += batch.names
        if not torch.isfinite(loss):
            suspects += batch.names
        entries = dict(tokens=int(batch.mask.sum()), count=count, loss=loss, **terms)
        for name, value in entries.items():
            sums[name] = sums.get(name, 0) + value * batch.weight
        if batch.last:
            return sums, names, suspects, batch.cursor


def stop_if_broken(ranks, suspects, names, norm, step):
    """All ranks stop before the optimiser's step when a loss or the gradient is no finite number.

    suspects: this rank's samples whose micro-batch had such a loss; names: all its samples of the
    step, named when every loss was finite but the gradient's norm, alike on all ranks, is not.
    """
    found = ranks.sum(torch.tensor(float(len(suspects)), device=ranks.device)).item()
    if not found and torch.isfinite(norm):
        return
    concerned = [suspects if found else names]
    if ranks.world > 1:
        parts, concerned = concerned[0], [None] * ranks.world
        dist.all_gather_object(concerned, parts)
    sys.exit(f"step {step}: the {'loss' if found else 'gradient'} is not finite; nothing was "
             "stepped. Samples of the micro-batches concerned: "
             f"{', '.join(n for part in concerned for n in part if n)}")


def stop_if_barren(barren, names, step):
    """One step may have broken samples alone; so many in a row, and the data teach nothing."""
    if barren == 20:
        sys.exit(f"step {step}: for {barren} steps no sample had anything to learn from (no supervised "
                 "position, or pairs without room for their answers)"
                 f"{': ' * bool(names)}{', '.join(names[:5])}")


# --------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Progress:
    """How far a run has come; a checkpoint has it beside parameters and optimiser."""
    step: int = 0
    tokens: int = 0
    cursor: Optional[dict] = None        # where the next step's data begin (data.Plan)
    label: Optional[str] = None          # what objective.prepare called the last step
    log_size: int = 0                    # bytes of log.jsonl up to here


def load_parameters(state, named):
    """Copies a checkpoint's parameters (runs.last_checkpoint gives one) into {name: parameter}."""
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(load_like(state["parameters"][name], p))


def resume(s, ranks, inputs, named, optimiser, bad):
    """Sets parameters, optimiser and the counts of bad samples as the last checkpoint has them.
    -> Progress."""
    folder = ranks.first(find_checkpoint, Path(s.out))
    if folder is None:
        return Progress()
    state = read_state(folder)
    ranks.first(refuse_changes, s, inputs, state)
    load_parameters(state, named)
    if state["tokens"] < s.tokens:                        # else there are no more steps
        for name, moments in state["optimiser"].items():
            p = named[name]
            optimiser.state[p] = {k: load_like(v, p) for k, v in moments.items()}
    vars(bad).update(state["bad"])
    return Progress(**{f.name: state[f.name] for f in fields(Progress)})


def save(s, ranks, inputs, named, optimiser, bad, at):
    """A checkpoint has whole tensors: any number of ranks may go on from it, sharded or not."""
    values = {n: gather_shard(p.detach(), ranks) for n, p in named.items()}
    moments = {n: {k: gather_shard(v, ranks) for k, v in optimiser.state[p].items()}
               for n, p in named.items() if p in optimiser.state}

    def write():
        at.log_size = (Path(s.out) / "log.jsonl").stat().st_size
        counts = dict(seen=bad.seen, bad=bad.bad, first=bad.first)
        save_checkpoint(Path(s.out), at.step, dict(parameters=values, optimiser=moments, **vars(at),
                                                   bad=counts, settings=asdict(s), inputs=inputs))
    ranks.first(write)


def run(s, objective, processor, dataset, ranks, betas=(0.9, 0.95)):
    """Trains objective.parameters() over s.tokens tokens, resuming and saving in s.out."""
    named, inputs = objective.parameters(), ranks.first(fingerprints, s)
    for p in named.values():
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(groups(named.values(), s.weight_decay), s.lr, betas, eps=1e-8)
    bad = BadSamples(s.skip_bad)
    at = resume(s, ranks, inputs, named, optimiser, bad)
    ranks.first(cut_log, Path(s.out), at.log_size)        # later lines are written again
    if at.tokens >= s.tokens:
        return
    plan = Plan(dataset, processor, s.seed, s.batch_tokens, s.micro_tokens, ranks.rank, ranks.world,
                at.cursor, bad)
    cuda = ranks.device.type == "cuda"
    batches = loader(dataset, processor, plan, s.workers, cuda, ignore_signals)
    bar = tqdm(total=s.tokens, initial=at.tokens, unit=" tokens", unit_scale=True,
               disable=ranks.rank > 0, smoothing=0.1, dynamic_ncols=True)
    with Interruptible(ranks.rank == 0) as interrupted, closing(batches), bar:
        train(s, objective, ranks, optimiser, batches, at, bar, interrupted,
              save=lambda: save(s, ranks, inputs, named, optimiser, bad, at))
    if ranks.rank == 0 and bad.bad:
        print(f"{bad.bad} of {bad.seen} samples could not be used and were left out; the first: "
              f"{' '.join(bad.first)}")


def train(s, objective, ranks, optimiser, batches, at, bar, interrupted, save):
    """Steps from `at` on, which it moves, until the budget is spent or the run interrupted."""
    parameters = list(objective.parameters().values())
    # Without autocast's cache of cast weights, which would keep a whole copy of what is sharded.
    half = dtype_of(s.dtype, ranks.device) == torch.bfloat16
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, half, cache_enabled=not s.shard)
    barren = 0                                            # steps in a row with nothing to learn from
    while at.tokens < s.tokens:
        before = at.label
        at.label, (begin, end) = objective.prepare(at.tokens / s.tokens)
        if before not in (None, at.label):                # a stage border
            save()
        # Dropout depends on (seed, step, rank) alone: a run that goes on draws the same.
        torch.manual_seed(((s.seed * 1_000_003 + at.step) * 1_000_003 + ranks.rank) % 2 ** 63)
        sums, names, suspects, at.cursor = accumulate(objective, batches, at.label, ranks.device,
                                                      autocast)
        sums["signals"] = interrupted.signal              # all ranks must stop after the same step
        values = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64)
        sums = dict(zip(sums, ranks.sum(values.to(ranks.device)).tolist()))
        tokens, count, stop = int(sums.pop("tokens")), sums.pop("count"), sums.pop("signals")

        barren = 0 if count else barren + 1
        stop_if_barren(barren, names, at.step + 1)
        reduce_gradients(ranks, parameters, max(count, 1))
        norm = clip_gradients(ranks, parameters, s.clip)
        stop_if_broken(ranks, suspects, names, norm, at.step + 1)
        # A step has the rate of its end, as planned: never 0 in the first step.
        done = ((at.tokens + s.batch_tokens) / s.tokens - begin) / (end - begin)
        rate = learning_rate(s, min(1.0, done))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        at.step, at.tokens = at.step + 1, at.tokens + tokens
        line = dict(step=at.step, tokens=at.tokens, stage=at.label, lr=rate, grad_norm=norm.item(),
                    **{name: total / max(count, 1) for name, total in sums.items()})
        if ranks.rank == 0:
            append_log(Path(s.out), line)                 # no times: gone on from, it is the same log
        bar.set_description(at.label)
        bar.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)
        bar.update(tokens)
        if stop or at.step % s.save_every == 0 or at.tokens >= s.tokens:
            save()
        if stop:
            bar.close()
            interrupted.end(at.step, s.out)


# --------------------------------------------------------------------------------------------------
# What a run needs: --dry-run


def print_needs(s, folder, frozen, trained, drifts=0):
    """Prints steps, memory and missing files of a run from the model in `folder`; the arguments
    are those of estimate_memory."""
    folder, GB = Path(folder), 2 ** 30
    device = device_of(s.device, here=False)
    world = int(os.environ.get("WORLD_SIZE", 1)) if s.shard else 1
    sizes = estimate_memory(Config.from_folder(folder).text, frozen, trained, s.micro_tokens,
                            dtype_of(s.dtype, device).itemsize, world, s.shard, s.recompute, drifts)
    print(f"{s.tokens:,} tokens in about {math.ceil(s.tokens / s.batch_tokens):,} steps of "
          f"{s.batch_tokens:,}" if s.tokens else
          f"one epoch in steps of {s.batch_tokens:,} tokens; how many, the data will tell")
    print(f"each device needs about {sum(sizes.values()) / GB:,.2f} GB: "
          + ", ".join(f"{k} {v / GB:,.2f}" for k, v in sizes.items()))
    if s.shard:
        masters = sum(p.numel() for p in trained.values()) * 4 / GB
        print(f"while it is built, each process also holds about {masters:,.2f} GB of masters in "
              "the machine's own memory")
    names = ("config.json", "tokenizer.json", "preprocessor_config.json")
    missing = [f for f in names if not (folder / f).is_file()] + find_tensors(folder)[1]
    if s.data and not Path(s.data).is_file():
        missing.append(s.data)
    elif s.data:
        print(f"{s.data}: {len(read_data(s.data)):,} samples")
    print(f"missing: {', '.join(missing) or 'nothing'}")
