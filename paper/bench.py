"""Efficiency (Sect. 5.4, A.5): Table 7 and Fig. 5 on whatever device is here, and others beside it.

    python -m paper.bench contexts                  # by context: first token, decode step, memory
    python -m paper.bench contexts --model 8b --transformers                        # on a GPU
    python -m paper.bench train                     # a training step of c1 to c5, by stage
    python -m paper.bench train --model 8b --rows 4 --recompute
    python -m paper.bench against                   # the same work by transformers
    python -m paper.bench scan --ssd-minimal FILE   # mamba2.ssd, and other scans

--model is a checkpoint's folder, one with only a config.json (weights are then random), or one of
tiny, wide, 2b and 8b. The last line is JSON, which results/bench.json keeps under command, model
and device.

    contenders  on a CPU a process each, which take turns, so that a busy machine is unfair to none;
                on a GPU one after the other, as two large models do not fit. What one cannot do is
                said in a sentence, and the rest goes on
    time        medians. With one CPU thread (OMP_NUM_THREADS, 1 unless set) processor time, which
                no other work lengthens; else the wall clock, the GPU having finished
    peak        of one call. CPU: resident memory beyond that of the process before the model was
                built (Linux only); GPU: max_memory_allocated. By context: weights, and what is
                added to them after 64 tokens, as code loaded on first use would hide the embedded
                model's
    states      real ones at batch 1 up to --prefill-upto positions. Else the recurrent state is
                that of a short prompt (its size and cost never change), and keys and values random
    floor       the least time, at the rates of a large copy and a large matrix product, measured
                first. Decode step: decoder weights, cache and states are read once. Prefill: its
                products
"""
import argparse
import gc
import importlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from importlib.metadata import distributions
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402  (after the number of threads is set)

from distill import DEFAULTS  # noqa: E402
from model import device_of, dtype_of  # noqa: E402
from paper.contenders import (GB, ROOT, SCANS, Reader, Scanner, Trainer, folder_of,  # noqa: E402
                              TransformersReader, TransformersTrainer)
from parts.fast import kernel  # noqa: E402

HOURS = {"c1": 150, "c2": 158, "c3": 160, "c4": 165, "c5": 260}      # Table 7: H100, 2 B tokens
SPEEDUP = {4096: 1.47, 32768: 2.84, 131072: 4.12}         # Sect. 5.4: throughput over the teacher's
SHARES = {1: 0.1, 2: 0.3, 3: 0.6}                         # of the token budget, by stage

# ---- Measuring ----


class Took(NamedTuple):
    seconds: float
    start: int               # bytes held before the call
    peak: int                # the most held during it
    answer: object           # a tensor becomes a numpy array


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def resident(field):
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


HERE = dict(contender=None, empty=0)      # in this process, and the bytes it had before


def make(opt, kind, *args):
    """Puts the contender kind(opt, *args) into this process."""
    HERE["contender"] = None
    if opt.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        # What any contender imports, all do: code is not what is compared.
        for library in getattr(opt, "libraries", ()):
            importlib.import_module(library)
        HERE["empty"] = resident("VmRSS")
    HERE["contender"] = kind(opt, *args)


def perform(opt, task, *values):
    """make, or a method of the contender in this process -> Took, or what went wrong."""
    cuda = opt.device == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")                # VmHWM starts anew
        start = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        begin = now(opt.device)
        answer = task(opt, *values) if task is make else getattr(HERE["contender"], task)(*values)
        seconds = now(opt.device) - begin
        peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
        if isinstance(answer, torch.Tensor):              # numpy goes between processes as it is
            answer = answer.detach().float().cpu().numpy()
        return Took(seconds, start - HERE["empty"], peak - HERE["empty"], answer)
    except Exception as error:                            # of any kind: the others go on
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    free(opt)                                             # the error holds no tensors any more
    return sentence


def free(opt):
    gc.collect()
    if opt.device == "cuda":
        torch.cuda.empty_cache()


def measure(opt, contenders, calls):
    """contenders {name: (class, *arguments)}; calls [(place, task, *values)], for each of them.

    -> {place: {name: {task: [Took of each call]}}}. After an error a contender skips the rest of
    that place, a string or a tuple."""
    results, lost, together = {}, set(), opt.device == "cpu"
    for group in [list(contenders)] if together else [[name] for name in contenders]:
        pools = {n: ProcessPoolExecutor(1, get_context("spawn")) for n in group if together}
        for place, task, *values in [("make", make), *calls]:
            for name in group:
                if not lost.isdisjoint({(name, place), (name, "make")}):
                    continue
                work = (opt, task, *(contenders[name] if task is make else values))
                try:
                    took = pools[name].submit(perform, *work).result() if pools else perform(*work)
                except BrokenProcessPool:
                    took = "its process died; was there too little memory?"
                if isinstance(took, Took):
                    rounds = results.setdefault(place, {}).setdefault(name, {})
                    rounds.setdefault(task, []).append(took)
                else:
                    lost.add((name, place))
                    print(f"{name}, {place}: {took}", flush=True)
        for pool in pools.values():
            pool.shutdown()
        HERE["contender"] = None
        free(opt)
    results.pop("make", None)
    return results


def median(rounds):
    return statistics.median(took.seconds for took in rounds)


def device_rates(opt):
    """-> what a large copy (reads and writes) and a large product reach, a second: bytes and
    operations."""
    n, size = (8192, 2 ** 31) if opt.device == "cuda" else (1024, 2 ** 28)
    a = torch.randn(n, n, device=opt.device).to(getattr(torch, opt.dtype))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=opt.device) for _ in range(2))

    def fastest(f):
        times = []
        for _ in range(8):
            begin = now(opt.device)
            f()
            times.append(now(opt.device) - begin)
        return min(times)
    rates = dict(bandwidth=2 * size / fastest(lambda: target.copy_(source)),
                 products=2 * n ** 3 / fastest(lambda: a @ a))
    print(f"{device_name(opt)}: a copy moves {rates['bandwidth'] / 1e9:,.0f} GB/s, a product in "
          f"{opt.dtype} does {rates['products'] / 1e12:,.3g} TFLOP/s", flush=True)
    return rates


def say(label, row):
    """A row of figures: seconds, bytes, and numbers without a unit."""
    shown = (f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)))
    print(f"{label}:", ", ".join(shown), flush=True)


# ---- By context (Table 7's right half, Fig. 5) ----


def contexts(opt):
    rates, table = device_rates(opt), {T: {} for T in opt.contexts}
    contenders = dict(teacher=(Reader, "teacher"), hybrid=(Reader, "hybrid"))
    if opt.transformers:
        contenders["transformers"] = (TransformersReader,)
    places = [(T, at) for T in opt.contexts for at in ("batch 1", "equal memory")]
    # New processes for each place on a CPU, whose allocator keeps what was freed.
    for group in [[place] for place in places] if opt.device == "cpu" else [places]:
        found = measure(opt, contenders, [c for place in group for c in reading(opt, *place)])
        for T, at in group:
            rows = table[T][at] = {}
            for name, took in found.get((T, at), {}).items():
                if "step" in took:
                    rows[name] = figures(opt, took, rates, rows.get("teacher"))
            if {"teacher", "hybrid"} <= rows.keys():
                rows["ratios"] = compared(rows["teacher"], rows["hybrid"])
            for name, row in rows.items():
                say(f"{T}, {at}, {name}", row)
    draw_contexts(opt, table)
    return dict(rates=rates, contexts=table)


def reading(opt, T, at):
    """The calls of one place."""
    real = T <= opt.prefill_upto and at == "batch 1"
    yield (T, at), "prefill", 64                          # loads code and allocates scratch
    yield (T, at), "rest"
    repeats = opt.repeats + (opt.device == "cuda")        # a GPU's first one chooses kernels
    for _ in range(repeats * real):
        yield (T, at), "prefill", T
    yield (T, at), "begin", 0 if real else T, at == "equal memory"
    for _ in range(opt.steps + 2):
        yield (T, at), "step"


def figures(opt, took, rates, teacher):
    """One row of the table.

    took: {task: [Took]} of one contender at one context. teacher: its row, which knows the weights
    and floors of transformers' model too."""
    _, *prefills = took["prefill"]
    base = (prefills or took["begin"])[0].start           # weights, code, scratch
    known = {k: teacher[k] for k in ("weights", "reads", "flops")} if teacher else {}
    r = known | took["begin"][0].answer
    seconds = median(took["step"][2:])                    # the first may enlarge the cache
    r.update(step=seconds, step_floor=r["reads"] / rates["bandwidth"],
             tokens_s=r["batch"] / seconds, peak=r["weights"] + took["step"][-1].peak - base)
    if prefills:
        rounds = prefills[opt.device == "cuda":]
        r.update(first_token=median(rounds), first_token_floor=r["flops"] / rates["products"],
                 prefill_peak=r["weights"] + rounds[-1].peak - base)
    return r


def compared(teacher, hybrid):
    """Table 7's columns: the hybrid's over the teacher's, of first_token the reverse. ceiling is
    what tokens_s would be if both were at their floors."""
    keys = ["tokens_s", "held", "peak"] + ["prefill_peak"] * ("prefill_peak" in teacher)
    r = {k: hybrid[k] / teacher[k] for k in keys}
    if "first_token" in teacher:
        r["first_token"] = teacher["first_token"] / hybrid["first_token"]
    floors = teacher["step_floor"] / hybrid["step_floor"]
    return r | dict(ceiling=floors * hybrid["batch"] / teacher["batch"])


INKS = {"teacher": ("#606876", "s"), "hybrid": ("#d05c24", "o"), "transformers": ("#2f6fb2", "^")}


def draw_contexts(opt, table):
    """bench-contexts-MODEL.png: Fig. 5, floors dotted, and the paper's speed-up beside ours."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels = {"first_token": ("time to first token, and its floor (dotted)", "s"),
              "step": ("decode step at batch 1, and its floor (dotted)", "s"),
              "peak": ("peak memory of decoding at batch 1", "B")}
    for ax, (key, (title, unit)) in zip(axes.flat, panels.items()):
        for name, (ink, marker) in INKS.items():
            rows = [at["batch 1"].get(name, {}) for at in table.values()]
            ys, floors = ([r.get(k, math.nan) for r in rows] for k in (key, key + "_floor"))
            if any(rows):
                ax.plot(table.keys(), ys, color=ink, marker=marker, label=name)
                ax.plot(table.keys(), floors, color=ink, ls=":")
        ax.set(yscale="log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 4, 6, 8)),
                     major_formatter=EngFormatter(unit), minor_formatter=NullFormatter())
        ax.set_title(title, loc="left")
    last = axes.flat[3]
    for at, style in (("batch 1", "o-"), ("equal memory", "D--")):
        ratios = [row[at].get("ratios", {}).get("tokens_s", math.nan) for row in table.values()]
        last.plot(table.keys(), ratios, style, color=INKS["hybrid"][0], label=at)
    last.plot(*zip(*SPEEDUP.items()), "kx", label="the paper (vLLM, H100)")
    last.set_title("tokens/s, hybrid over teacher", loc="left")
    last.set_ylim(bottom=0)
    for ax in axes.flat:
        ticks = sorted({*table, *(SPEEDUP if ax is last else ())})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{T // 1024}k" if T >= 1024 else T for T in ticks])
        ax.set_xlabel("context, tokens")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    path = Path(opt.out) / f"bench-contexts-{Path(opt.model).name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


# ---- Training (Table 7's left half) ----


def train(opt):
    """A micro-batch and an update, by condition and stage; Stage 3 is the same for all."""
    rates, stages, table = device_rates(opt), {}, {}
    places = [(c, n) for n in SHARES for c in HOURS if (n < 3) == (c != "c1")]
    calls = [(place, "counts", *place) for place in places]
    for _ in range(opt.repeats + 1):                      # conditions take turns
        for place in places:
            calls += [(place, "micro", *place), (place, "update")]
    for (c, n), took in measure(opt, {"train": (Trainer, *HOURS)}, calls).items():
        if len(took["train"].get("update", ())) > opt.repeats:
            stages[c, n] = stage_figures(opt, rates, **took["train"])
            say(f"{c if n < 3 else 'all'}, stage {n}", stages[c, n])
    for c in HOURS:
        mine = {n: stages[p] for n in SHARES if (p := ("c1" if n == 3 else c, n)) in stages}
        if len(mine) == (1 if c == "c1" else 3):
            each = weighted({n: 1 / r["tokens_s"] for n, r in mine.items()})
            over = each / table["c1"]["seconds_token"] if table else 1.0
            table[c] = dict(stages=mine, seconds_token=each, hours=2e9 * each / 3600,
                            paper_hours=HOURS[c], over_c1=over,
                            paper_over_c1=HOURS[c] / HOURS["c1"])
            say(f"{c}, all stages 10/30/60", table[c])
    stages = {f"{c} {n}": r for (c, n), r in stages.items()}
    return dict(rates=rates, conditions=table, stages=stages)


def stage_figures(opt, rates, counts, micro, update):
    """In a run of real data a step has many micro-batches, whose tokens share one update."""
    (tokens, flops), (_, *micro), (_, *update) = counts[0].answer, micro, update
    seconds, final = median(micro), median(update)
    each = seconds / tokens + final / (DEFAULTS["batch_tokens"][1] if opt.rows else tokens)
    return dict(tokens=tokens, seconds=seconds, update=final, tokens_s=1 / each,
                flops=flops / tokens, share=flops / seconds / rates["products"],
                peak=max(t.peak for t in micro + update), loss=float(micro[-1].answer[0]))


def weighted(costs):
    """{stage: cost} -> their mean over a run's budget, split 10/30/60; c1 has Stage 3 only."""
    return sum(SHARES[n] * t for n, t in costs.items()) / sum(SHARES[n] for n in costs)


# ---- Against transformers: the same weights and inputs ----


def against(opt):
    """slower: their time over ours; memory: ours over theirs. difference: of the first answers or
    losses, relative to ours, for unless they agree nothing is compared."""
    opt.libraries = [f"transformers.models.{m}.modeling_{m}" for m in ("qwen3_vl", "mamba2")]
    readers = {"ours": (Reader, "teacher"), "transformers": (TransformersReader,)}
    trainers = {"ours": (Trainer, "c3"), "transformers": (TransformersTrainer, True),
                "their model, our scan": (TransformersTrainer, False)}
    again = range(opt.repeats + 1)
    asks = [("generate", "generate") for _ in again]
    learns = [(f"stage {n}", "train", n) for n in SHARES for _ in again]
    table = {}
    for place, took in (measure(opt, readers, asks) | measure(opt, trainers, learns)).items():
        table[place] = {}
        for name, tasks in took.items():
            (rounds,), (first,) = tasks.values(), took.get("ours", tasks).values()
            a, b = first[0].answer, rounds[0].answer
            table[place][name] = dict(
                seconds=median(rounds[1:] or rounds), peak=max(t.peak for t in rounds),
                difference=float(abs(b - a).max() / abs(a).max()))
    stages = [table.get(f"stage {n}", {}) for n in SHARES]
    table["10/30/60"] = {name: dict(
        seconds=weighted({n: rows[name]["seconds"] for n, rows in zip(SHARES, stages)}),
        peak=max(rows[name]["peak"] for rows in stages))
        for name in trainers if all(name in rows for rows in stages)}
    for place, rows in table.items():
        for name, row in rows.items():
            ours = rows.get("ours", row)
            row.update(slower=row["seconds"] / ours["seconds"], memory=ours["peak"] / row["peak"])
            say(f"{place}, {name}", row)
    return table


# ---- The scan ----


def scan(opt):
    """Forward, and forward with backward: time, and memory that is added to the inputs."""
    triton = kernel("mamba_ssm.ops.triton.ssd_combined", torch.empty(0, device=opt.device))
    have = dict(ours=True, ssd_minimal=opt.ssd_minimal, Triton=triton,
                transformers=importlib.util.find_spec("transformers"))
    contenders = {" ".join([row, *[str(chunk)] * bool(chunk)]): (Scanner, row, chunk)
                  for row, (_, chunks) in SCANS.items() if have[row] for chunk in chunks}
    calls = [("scan", task) for task in (opt.repeats + 1) * ["forward", "both"]]
    table = {}
    for name, took in measure(opt, contenders, calls).get("scan", {}).items():
        if len(took.get("both", ())) <= opt.repeats:
            continue
        # A CPU's allocator keeps what was freed, so there only the first run shows what it takes.
        rounds = took["forward"] + took["both"] if opt.device == "cpu" else took["both"][1:]
        table[name] = dict(forward=median(took["forward"][1:]), both=median(took["both"][1:]),
                           added=max(t.peak for t in rounds) - min(t.start for t in rounds))
        ours = table.get("ours", table[name])
        table[name] |= {f"{key}_over_ours": table[name][key] / max(1e-9, ours[key])
                        for key in ("both", "added")}
        say(name, table[name])
    return table


# ---- Records, and the command line ----


def device_name(opt):
    if opt.device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [row.split(":")[1].strip() for row in info.splitlines() if row.startswith("model name")]
    return named[0] if named else platform.processor() or "CPU"


def record(opt, result):
    """Keeps the result in bench.json under command, model and device; prints it as the last
    line."""
    path, device = Path(opt.out) / "bench.json", f"{device_name(opt)}, {opt.dtype}"
    model = Path(opt.model).name if opt.command != "scan" else f"T {opt.T}"
    packages = ("torch", "transformers", "mamba-ssm", "triton")
    new = dict(date=date.today().isoformat(), threads=torch.get_num_threads(),
               versions={d.name: d.version for d in distributions() if d.name in packages},
               switches={k: v for k, v in os.environ.items() if k.startswith("HEED_")},
               asked={k: getattr(opt, k) for k, (of, *_) in FLAGS.items() if opt.command in of},
               result=result)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.setdefault(opt.command, {}).setdefault(model, {})[device] = new
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps({opt.command: {model: {device: new}}}))


COMMANDS = dict(contexts=contexts, train=train, against=against, scan=scan)
EVERY = "contexts train against scan"
FLAGS = {                 # flag: (commands, default, what it is)
    "model": ("contexts train against", "tiny", "a checkpoint or config.json's folder, or a shape"),
    "contexts": ("contexts", [4096, 32768, 131072], "positions before the first decode step"),
    "prefill_upto": ("contexts", 32768, "contexts up to this one are read in full"),
    "budget": ("contexts", 0.0, "GB for all at equal memory; 0: the GPU's memory, on a CPU 4"),
    "transformers": ("contexts", False, "transformers' model as a third contender"),
    "chunk": ("contexts", 0, "positions a prefill takes at once; 0: all, on a CPU 512"),
    "steps": ("contexts", 16, "decode steps"),
    "rows": ("train", 0, "of a random micro-batch; 0: a batch of the embedded world"),
    "text": ("train", 1022, "text tokens of a random row"),
    "visual": ("train", 1024, "visual tokens of a random row"),
    "tokens": ("train against", 5000, "of the embedded world's batch"),
    "recompute": ("train", False, "as in distill.py: less memory, more time"),
    "T": ("scan", 16384, "positions"),
    "ssd_minimal": ("scan", "", "where ssd_minimal.py is"),
    "repeats": (EVERY, 2, "rounds"),
    "device": (EVERY, "", "cuda or cpu; default: cuda where there is one"),
    "dtype": (EVERY, "", "of weights and activations; default: float32, on a GPU bfloat16"),
    "out": (EVERY, str(ROOT / "paper/results"), "folder of bench.json"),
}


def parse(argv):
    parser = argparse.ArgumentParser("bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        one = commands.add_parser(command, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, (of, default, why) in FLAGS.items():
            flag, many = "--" + name.replace("_", "-"), isinstance(default, list)
            if command in of and default is False:
                one.add_argument(flag, help=why, action="store_true")
            elif command in of:
                one.add_argument(flag, help=why, default=default, nargs="+" if many else None,
                                 type=int if many else type(default))
    others = {name: default for name, (_, default, _) in FLAGS.items()}
    opt = parser.parse_args(argv, argparse.Namespace(**others))
    if opt.ssd_minimal and not Path(opt.ssd_minimal).is_file():
        parser.error(f"--ssd-minimal {opt.ssd_minimal}: there is no such file")
    try:
        opt.device = device_of(opt.device).type
    except ValueError as error:
        parser.error(str(error))
    opt.dtype = str(dtype_of(opt.dtype, opt.device)).removeprefix("torch.")
    cuda = opt.device == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory / GB if cuda else 4.0
    opt.budget, opt.chunk = opt.budget or memory, opt.chunk or (0 if cuda else 512)
    return opt


def main(argv):
    opt = parse(argv)
    # One thread can be timed on a busy machine. Beside a GPU, the CPU only draws mixers' weights.
    cpu = opt.device == "cpu"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]) if cpu else os.cpu_count())
    Path(opt.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            opt.folder = folder_of(opt.model, scratch)
        except (OSError, ValueError) as error:
            sys.exit(f"--model {opt.model}: {error}")
        record(opt, COMMANDS[opt.command](opt))


if __name__ == "__main__":
    main(sys.argv[1:])
