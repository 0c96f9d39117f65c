"""The loop that distill.py and sft_dpo.py share: flags, processes, sharding, checkpoints, steps. Nothing to run here.

An objective is anything with

    parameters()                    -> {name: parameter} that train
    prepare(progress)               -> label and (begin, end) of the learning rate's schedule, in shares of the budget
    loss(batch, label, backward)    -> loss sum, count, {name: sum for the log} of one micro-batch

and `run` trains it over a token budget. Sums and counts are added over micro-batches and ranks before they are
divided, so neither accumulation nor the number of processes changes a step. A run that was killed goes on from its last
checkpoint with the same command, on CPUs to the same bits: the order of the data, dropout and the log depend on (seed,
step) alone. Processes come from torchrun; one process needs none.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import BadSamples, Plan, Processor, loader, read_data
from model import Config, Qwen3VL, device_of, dtype_of, find_tensors

# ---------------------------------------------------------------------------------------------------------
# Settings: every field is a flag


def setting(default, why, choices=None, low=-math.inf, high=math.inf, decides=True):
    """decides: whether it can change what a run ends with; what cannot may change when a run goes on."""
    return field(default=default, metadata=dict(help=why, choices=choices, low=low, high=high, decides=decides))


@dataclass
class Settings:
    """Of any run; a script adds its own. None means: by the DEFAULTS of the script."""
    data: str = setting("", "JSONL file or recipe (data.py); empty: the embedded world (synthdoc.py)")
    out: str = setting("", "folder of the run; empty: out/<cond>", decides=False)
    tokens: Optional[int] = setting(None, "token budget of the run", low=1)
    batch_tokens: Optional[int] = setting(None, "tokens of one optimiser step, over all ranks", low=1)
    micro_tokens: Optional[int] = setting(None, "padded tokens that one device processes at once", low=1)
    lr: Optional[float] = setting(None, "peak learning rate", low=0)
    warmup: float = setting(0.01, "share of the budget over which the learning rate rises", low=0, high=0.99)
    floor: float = setting(0.1, "the cosine ends at this share of the peak", low=0, high=1)
    weight_decay: float = setting(0.01, "of matrices; norms, biases and other vectors have none", low=0)
    clip: float = setting(1.0, "bound of the gradient's norm", low=1e-9)
    seed: int = setting(0, "of the initialisation, the order of the data, and dropout", low=0)
    save_every: int = setting(50, "steps between checkpoints; stage borders are saved too", low=1, decides=False)
    workers: int = setting(0, "processes that read data ahead", low=0, decides=False)
    threads: int = setting(0, "CPU threads of a process; 0: the cores divided among this node's processes", low=0,
                           decides=False)
    device: str = setting("", "cuda or cpu; empty: cuda where there is one", decides=False)
    dtype: str = setting("", "of frozen weights and activations; empty: bfloat16 on cuda, else float32",
                         ["", "bfloat16", "float32", "float64"])
    shard: bool = setting(False, "split the decoder's weights and optimiser state among the devices (FSDP2)",
                          decides=False)
    recompute: bool = setting(False, "recompute layers in the backward pass wherever one graph passes them all (not in "
                              "Stages 1/2 fed the teacher's stream): less memory, a third more time", decides=False)
    skip_bad: bool = setting(False, "leave out unusable samples, up to 0.1 % (or ten), instead of stopping", decides=False)
    dry_run: bool = setting(False, "say what the run would need, and stop", decides=False)


def parse(kind, defaults, argv=None, description=""):
    """Command line -> settings of the dataclass `kind`, where None becomes the default of the data's column.
    Exits with a sentence on what is out of bounds."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in fields(kind):
        flag, why = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=why)
        else:
            cast = {"tokens": int, "batch_tokens": int, "micro_tokens": int, "lr": float}.get(f.name, type(f.default))
            shown = f"{defaults[f.name][0]} embedded, {defaults[f.name][1]} real" if f.name in defaults else f.default
            parser.add_argument(flag, type=cast, default=f.default, choices=f.metadata["choices"],
                                help=f"{why} [{shown}]")
    s = kind(**vars(parser.parse_args(argv)))
    for name, (embedded, real) in defaults.items():
        if getattr(s, name) is None:
            setattr(s, name, real if s.data else embedded)
    for f in fields(kind):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            sys.exit(f"--{f.name.replace('_', '-')} {value} is not between {low} and {high}")
    if 0 < s.tokens < s.batch_tokens:
        sys.exit(f"--tokens {s.tokens} is less than the {s.batch_tokens} of one step (--batch-tokens)")
    return s


# ---------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device

    def sum(self, t):
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def wait(self):
        if self.world > 1:
            dist.barrier()


def start(s):
    """Threads, device and process group from torchrun's environment; one process needs no group."""
    env = os.environ
    kind = device_of(s.device).type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # torchrun gives several processes one thread each, and a single one all cores: both are set on purpose here.
    torch.set_num_threads(s.threads or max(1, cores // int(env.get("LOCAL_WORLD_SIZE", 1))))
    device = torch.device(kind, int(env.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    s.dtype = s.dtype or str(dtype_of(s.dtype, device)).removeprefix("torch.")    # also of what stays on the CPU
    ranks = Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), device)
    if ranks.world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo",
                                timeout=timedelta(hours=3))         # others wait while rank 0 writes 100 GB, or judges
    return ranks


def load_model(s, flag, device, **caps):
    """The model in the folder that the setting `flag` names, and its processor with these caps."""
    folder = Path(getattr(s, flag))
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            sys.exit(f"--{flag} {folder}: there is no {file}; give the folder of a downloaded Qwen3-VL checkpoint")
    return Qwen3VL.from_pretrained(folder, dtype_of(s.dtype, device), device), Processor(folder, **caps)


# ---------------------------------------------------------------------------------------------------------
# Sharding, where one device cannot hold what trains: --shard


def shard(ranks, *models):
    """Splits each mixer and each MLP among the ranks, with its gradients and optimiser state; models may share them.

    It is put together on every rank while it runs, and gradients are summed as they are split again. Embeddings,
    head, norms and the vision tower stay whole: ranks call some of those a different number of times in a step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if ranks.world == 1:
        for model in models:
            model.to(ranks.device)
        return
    warnings.filterwarnings("ignore", message=".*returned a view tensor")               # the state, unused in training
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))                          # takes each part from the CPU
    layers = [layer for model in models for layer in model.layers]
    for unit in dict.fromkeys(part for layer in layers for part in (layer.self_attn, layer.mlp)):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        unit.set_reduce_scatter_divide_factor(1.0)        # a sum; newer versions can also do it as one on CPUs
        getattr(unit, "set_force_sum_reduction_for_comms", lambda on: None)(True)
    for model in models:
        model.to(ranks.device)


def apart(parameters):
    """-> the whole ones, the sharded ones: two kinds of tensors that no one operation may mix."""
    return [[p for p in parameters if hasattr(p, "full_tensor") == sharded] for sharded in (False, True)]


def whole(t, ranks):
    """A shard put together, on rank 0 (None elsewhere); any other tensor as it is."""
    if not hasattr(t, "full_tensor"):
        return t
    t = t.full_tensor()
    return t.cpu() if ranks.rank == 0 else None


def placed(t, like):
    """A checkpoint's tensor where `like` is, and split as it is."""
    if t.dim() and hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(t.to(like.device), like.device_mesh, like.placements)
    # Copies, for t is a view of the checkpoint's file, which a later save removes. AdamW counts steps on the CPU.
    return t.to(like.device, copy=True) if t.dim() else t.clone()


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: a step_N folder appears whole, then `latest` names it; the one before is kept


def save_checkpoint(out, step, state):
    folder, temporary, latest = out / f"step_{step}", out / f"step_{step}.tmp", out / "latest"
    before = latest.read_text() if latest.exists() else ""
    if folder.name == before:                             # a stage border right after a save: nothing is new
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / "state.pt", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    if folder.exists():                                   # left by a run that died before `latest` moved
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    with open(out / "latest.tmp", "w") as f:
        f.write(folder.name)
        f.flush()
        os.fsync(f.fileno())
    os.replace(out / "latest.tmp", latest)
    for old in out.glob("step_[0-9]*"):
        if old.name not in (folder.name, before):
            shutil.rmtree(old)


def load_checkpoint(out, s):
    """The state that `latest` names, or None. Exits when the folder holds a run with other settings."""
    if not (out / "latest").exists():
        if (out / "config.json").exists():
            sys.exit(f"{out} holds a model that no run of this script began: choose another --out")
        return None
    if not (out / (out / "latest").read_text() / "state.pt").is_file():
        sys.exit(f"{out} has lost its last checkpoint: what is in it cannot be gone on from; choose another --out")
    state = torch.load(out / (out / "latest").read_text() / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    ours = asdict(s)
    theirs = {f.name: f.default for f in fields(s)} | state["settings"]                 # a newer flag had its default
    changed = [f"--{f.name.replace('_', '-')} {theirs[f.name]} there, {ours[f.name]} here" for f in fields(s)
               if f.metadata["decides"] and theirs[f.name] != ours[f.name]]
    if changed:
        sys.exit(f"{out} holds a run with other settings ({'; '.join(changed)}): go on with those, or choose another "
                 "--out")
    return state


# ---------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(s, progress):
    """Linear warm-up, then a cosine from the peak to `floor` of it."""
    if progress < s.warmup:
        return s.lr * progress / s.warmup
    return s.lr * (s.floor + (1 - s.floor) * 0.5 * (1 + math.cos(math.pi * (progress - s.warmup) / (1 - s.warmup))))


def groups(parameters, decay):
    """AdamW's groups: matrices decay; norms, biases and other vectors do not. Shards are groups of their own."""
    return [dict(params=[p for p in part if (p.dim() >= 2) == matrix], weight_decay=decay * matrix)
            for part in apart(parameters) for matrix in (True, False)]


def reduce_gradients(ranks, parameters, count):
    """Gradients of the sum of losses over all ranks, divided by the count over all ranks."""
    for p in parameters:
        if p.requires_grad and p.grad is None:            # no use for it in this rank's samples
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in apart(parameters)[0] if p.grad is not None]
    if ranks.world > 1 and grads:                         # those of shards are sums already
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, total in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(total.view_as(g))
    for p in parameters:
        if p.grad is not None:
            p.grad /= count


def clip_gradients(ranks, parameters, bound):
    """Scales gradients whose norm is above `bound` down to it. -> the norm before, over whole tensors and shards."""
    whole_grads, shards = ([p.grad for p in part if p.grad is not None] for part in apart(parameters))
    shards = [g.to_local() for g in shards]
    squares = [torch.nn.utils.get_total_norm(part).to(ranks.device) ** 2 for part in (whole_grads, shards)]
    norm = (squares[0] + ranks.sum(squares[1])).sqrt()
    if norm > bound:
        torch._foreach_mul_(whole_grads + shards, (bound / norm).item())
    return norm


def stop_if_broken(ranks, suspects, names, norm, step):
    """All ranks stop before the optimiser's step when a loss or the gradient is no finite number.

    suspects: this rank's samples whose micro-batch had such a loss; names: all its samples of the step, to be named
    when every loss was finite but the gradient's norm is not. The norm is the same on all ranks.
    """
    found = ranks.sum(torch.tensor(float(len(suspects)), device=ranks.device)).item()
    if not found and torch.isfinite(norm):
        return
    concerned = [suspects if found else names]
    if ranks.world > 1:
        parts, concerned = concerned[0], [None] * ranks.world
        dist.all_gather_object(concerned, parts)
    sys.exit(f"step {step}: the {'loss' if found else 'gradient'} is not finite; nothing was stepped. Samples of the "
             f"micro-batches concerned: {', '.join(n for part in concerned for n in part if n)}")


def run(s, objective, processor, dataset, ranks, betas=(0.9, 0.95)):
    """Trains objective.parameters() over a budget of s.tokens tokens, resuming and saving in s.out.

    objective: parameters() -> {name: parameter}; prepare(progress) -> (label, span of the schedule);
    loss(batch, label, backward) -> (sum, count, {name: sum}), as Distillation.loss. Sums and counts are added over
    micro-batches and ranks before they are divided, so that neither accumulation nor the number of processes changes
    a step.
    """
    out, named = Path(s.out), objective.parameters()
    parameters = list(named.values())
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(groups(parameters, s.weight_decay), lr=s.lr, betas=betas, eps=1e-8)
    step, tokens, cursor, log_size, label, bad = 0, 0, None, 0, None, BadSamples(s.skip_bad)
    if state := load_checkpoint(out, s):
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(placed(state["parameters"][name], p))
        for name, moments in state["optimiser"].items() if state["tokens"] < s.tokens else ():
            optimiser.state[named[name]] = {k: placed(v, named[name]) for k, v in moments.items()}
        step, tokens, cursor, log_size, label = (state[k] for k in ("step", "tokens", "cursor", "log_size", "label"))
        vars(bad).update(state["bad"])
        del state                                         # else a second copy of all that trains stays in memory
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a") as f:
            f.truncate(min(log_size, f.tell()))           # lines after the checkpoint are written again
    if tokens >= s.tokens:
        return
    plan = Plan(dataset, processor, s.seed, s.batch_tokens, s.micro_tokens, ranks.rank, ranks.world, cursor, bad)
    batches = iter(loader(dataset, processor, plan, s.workers, pin_memory=ranks.device.type == "cuda"))
    bar = tqdm(total=s.tokens, initial=tokens, unit=" tokens", unit_scale=True, disable=ranks.rank > 0,
               smoothing=0.1, dynamic_ncols=True)
    # Without its cache of cast weights, which would keep a whole copy of what is sharded until the context ends.
    half = dtype_of(s.dtype, ranks.device) == torch.bfloat16
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half, cache_enabled=not s.shard)

    barren = 0                                            # steps in a row without anything to learn from

    def save():
        values = {n: whole(p.detach(), ranks) for n, p in named.items()}
        moments = {n: {k: whole(v, ranks) for k, v in optimiser.state[p].items()}
                   for n, p in named.items() if p in optimiser.state}
        if ranks.rank == 0:
            save_checkpoint(out, step, dict(
                parameters=values, optimiser=moments, step=step, tokens=tokens, cursor=cursor,
                log_size=(out / "log.jsonl").stat().st_size, label=label,
                bad=dict(seen=bad.seen, bad=bad.bad, first=bad.first), settings=asdict(s)))
        ranks.wait()

    while tokens < s.tokens:
        before, (label, (begin, end)) = label, objective.prepare(tokens / s.tokens)
        if before not in (None, label):
            save()
        torch.manual_seed(((s.seed * 1_000_003 + step) * 1_000_003 + ranks.rank) % 2 ** 63)         # dropout
        sums, names, suspects, last = {"tokens": 0, "count": 0, "loss": 0.0}, [], [], False
        while not last:                                   # the micro-batches of one step
            batch = next(batches).to(ranks.device)
            last, cursor, names = batch.last, batch.cursor, names + batch.names

            def backward(part, weight=batch.weight):      # weight 0: a stand-in so that all ranks do as many
                with torch.autocast(ranks.device.type, enabled=False):
                    (part * weight).backward()
                return part.detach()
            with autocast:
                loss, count, terms = objective.loss(batch, label, backward)
            if not torch.isfinite(loss):
                suspects += batch.names
            entries = dict(tokens=int(batch.mask.sum()), count=count, loss=loss, **terms)
            for name, value in entries.items():
                sums[name] = sums.get(name, 0) + value * batch.weight
        total = ranks.sum(torch.tensor([float(v) for v in sums.values()], dtype=torch.float64, device=ranks.device))
        sums = dict(zip(sums, total.tolist()))
        barren = 0 if sums["count"] else barren + 1
        if barren == 20:                                  # broken samples may leave a step without, but not so many
            sys.exit(f"step {step + 1}: for {barren} steps no sample had anything to learn from (no supervised position, or "
                     f"pairs without room for their answers){': ' * bool(names)}{', '.join(names[:5])}")
        count = max(sums["count"], 1)
        reduce_gradients(ranks, parameters, count)
        norm = clip_gradients(ranks, parameters, s.clip)
        stop_if_broken(ranks, suspects, names, norm, step + 1)
        done = ((tokens + s.batch_tokens) / s.tokens - begin) / (end - begin)           # never 0 in the first step
        rate = learning_rate(s, min(1.0, done))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int(sums["tokens"])
        line = dict(step=step, tokens=tokens, stage=label, lr=rate, grad_norm=norm.item(),
                    **{k: v / count for k, v in sums.items() if k not in ("tokens", "count")})
        if ranks.rank == 0:                               # no times in the log: a resumed run writes the same lines
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        bar.set_description(label)
        bar.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)
        bar.update(int(sums["tokens"]))
        if step % s.save_every == 0 or tokens >= s.tokens:
            save()
    bar.close()
    if ranks.rank == 0 and bad.bad:
        print(f"{bad.bad} of {bad.seen} samples could not be used and were left out; the first: {' '.join(bad.first)}")


# ---------------------------------------------------------------------------------------------------------
# What a run needs


def needs(s, folder, frozen, trained, drifts=0):
    """Prints steps, memory and missing files of a run. frozen, trained: {name: parameter}, of any device; drifts:
    how many copies of each layer's stream are kept in fp32 besides (Stages 1/2 with --feed own; fed the teacher's, they
    need a layer's activations at a time, and Stage 3 the most)."""
    c, folder = Config.from_folder(folder).text, Path(folder)
    device = device_of(s.device, here=False)
    width, world = dtype_of(s.dtype, device).itemsize, int(os.environ.get("WORLD_SIZE", 1)) if s.shard else 1

    def share(named):                                     # of the parameters that one device holds
        return sum(p.numel() / (world if re.search(r"language_model.*\.(self_attn|mlp)\.", n) else 1)
                   for n, p in named.items())
    # Bytes kept for the backward pass, a layer and position: norm inputs, what the mixer's linear layers, convolution
    # and scan read, the MLP's gate and up (and their product where it trains), what adapters dropped out. In bf16, what
    # norms read is fp32; where embeddings train, the stream too, and every linear layer keeps a cast of its own.
    # With --recompute the stream alone, and all the rest for one layer at a time.
    D, L, I, HP = c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.num_attention_heads * c.head_dim
    half, whole_stream = width < 4, any("embed_tokens" in n for n in trained)
    products = 2 + any("language_model" in n and ".mlp." in n for n in trained)
    row = (4 * D + 13 * HP + products * I) * width + half * (8 + 22 * whole_stream) * D
    row += any(n.endswith(".A") for n in trained) * (5 * D + HP + I) * (width + 1)
    stream = D * (4 if whole_stream else width)
    kept = L * (stream if s.recompute else row) + row * s.recompute + L * 4 * D * drifts
    casts = share(trained) * 2 * (half and not (s.shard and s.recompute))               # of fp32 masters, to bf16
    rows = dict(frozen=share(frozen) * width, trained=share(trained) * 16,        # master, gradient, two moments
                activations=s.micro_tokens * kept + casts, head=3 * 512 * c.vocab_size * 4)
    GB = 2 ** 30
    print(f"{s.tokens:,} tokens in about {math.ceil(s.tokens / s.batch_tokens):,} steps of {s.batch_tokens:,}"
          if s.tokens else f"one epoch in steps of {s.batch_tokens:,} tokens; how many, the data will tell")
    print(f"each device needs about {sum(rows.values()) / GB:,.2f} GB: "
          + ", ".join(f"{k} {v / GB:,.2f}" for k, v in rows.items()))
    if s.shard:
        print(f"while it is built, each process also holds about {sum(p.numel() for p in trained.values()) * 4 / GB:,.2f}"
              " GB of masters in the machine's own memory")
    missing = [f for f in ("config.json", "tokenizer.json", "preprocessor_config.json") if not (folder / f).is_file()]
    missing += find_tensors(folder)[1]
    if s.data and not Path(s.data).is_file():
        missing.append(s.data)
    elif s.data:
        print(f"{s.data}: {len(read_data(s.data)):,} samples")
    print(f"missing: {', '.join(missing) or 'nothing'}")
