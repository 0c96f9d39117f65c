"""The paper's tables at laptop scale: every run, every seed, paired differences ->
paper/RESULTS.md.

    python -m paper.reproduce                # the whole programme: what is missing, then RESULTS.md
    python -m paper.reproduce table1 ledger               # two of its tables
    python -m paper.reproduce --write                # only write RESULTS.md from results/runs.jsonl
    python -m paper.reproduce table1 --seeds 5 --jobs 2   # two runs of one thread each
    python -m paper.reproduce table1 --again      # the same runs once more: how far do they repeat?

A run is one command of distill.py or sft_dpo.py in a process of its own and one judgement of its
student on evaluation pages, which training never draws. What is kept of it is one line of
results/runs.jsonl: its settings and one 0 or 1 per question, so that any two runs can be paired. A
run with its line is not repeated, a line made under other settings is refused, and a run that was
interrupted goes on from its checkpoint. All conditions have the same budget, settings, data order
and initial mixers for the same seed. Settings were chosen on training pages; one choice, what
student layers read in Stages 1/2, was taken up again after evaluation pages had shown no gain of
C4, and decided on training pages too (ledger 4).
"""
import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache
from pathlib import Path
from threading import Lock

import matplotlib
import numpy as np
from scipy import stats

from synthdoc import CELL, REGIMES, SUITES, World

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

TOKENS, QUESTIONS = 250_000, 2_000                        # of a distillation; a suite
SFT = ["--lr", "1e-3"]           # chosen for students of TOKENS; the default serves longer runs too
HERE = Path(__file__).parents[1]

# table: (what it stands beside in the paper, {run: flags of distill.py, or the phase that follows
# another run})
TABLES = {
    "table1": ("Tables 1 and 9: the ladder", {c: f"--cond {c}" for c in ("c1", "c2", "c3", "c4")}),
    "table2": ("Tables 2 and 4: after SFT and DPO", {
        f"{c}-{phase}": phase for c in ("c1", "c2", "c3", "c4") for phase in ("sft", "dpo")}),
    "ledger": ("Ledger 3, 4, 5, 7: initialisation, feed, what Stage 3 trains, min-max", {
        f"{c}-{name}": f"--cond {c} {flags}" for c in ("c1", "c3", "c4")
        for name, flags in (("paper", "--init paper"), ("own", "--feed own"), ("full", "--stage3 full"))
        if not (c == "c1" and name == "own")} | {
            "c2-own": "--cond c2 --feed own", "no-density-own": "--cond no-density --feed own", "c4-visual": "--cond c4 --minmax visual"}),       # c1 aligns no stream
    "table5": ("Table 5: gradient weights and Gated DeltaNet", {c: f"--cond {c}" for c in ("c5", "c6")} | {
        "c5-beta": "--cond c5 --fisher-text beta", "c5-root": "--cond c5 --fisher-power 0.5"}),
    "table6": ("Table 6: a teacher of InternVL's architecture (tiny/internvl)", {
        "teacher-internvl": "--teacher tiny/internvl"} | {
        f"{c}-internvl": f"--cond {c} --teacher tiny/internvl" for c in ("c1", "c2", "c3", "c4")} | {
        "c4-internvl-sft": "sft", "c4-internvl-dpo": "dpo"}),
    "table8": ("Table 8: ablations", {c: f"--cond {c}" for c in ("no-residual", "no-density", "ld", "sl")}),
    "control": ("A control that the paper lacks: C4's own weights on the page's patches in random order", {
        "shuffled": "--cond shuffled"}),
    "square": ("Two controls that the paper lacks: C4's ranking of patches, or its shares of text and image, alone", {
        f"{c}-only{end}": f"--cond {c}-only{flags}" for end, flags in (("", ""), ("-own", " --feed own"))
        for c in ("rank", "share")}),
    "a8": ("A.8: 5 x weight on k % of the positions (k = 0 is c3 here; the paper's 50.5, which it calls C1)", {
        f"{c}{k}": f"--cond {c} --k {k}" for k in (10, 25, 50) for c in ("topk", "random")}),
    "budget": ("Where density helps: token budget", {
        f"{c}-{k}k": f"--cond {c} --tokens {k}000" for k in (100, 175, 350, 500, 1000) for c in ("c3", "c4")}),
    "pages": ("Where density helps: visual tokens of a page", {
        f"{c}-page{n}": f"--cond {c} --page {n}" if c != "teacher" else f"--page {n}"
        for n in (7, 14) for c in ("teacher", "c3", "c4")}),
    "state": ("Where density helps: attention in every second or eighth layer", {
        f"{c}-keep{k}": f"--cond {c} --keep-every {k}" for k in (2, 8) for c in ("c3", "c4")}),
    "regimes": ("Appendix A: pages on which density misranks, by family", {
        f"{c}-regimes": f"--cond {c} --suite regimes" for c in ("c1", "c3", "c4", "c5")}),
}
BELOW = "<!-- `python -m paper.reproduce --write` writes all that follows from results/runs.jsonl -->"
CONDITIONS = ("table1", "table5", "table8", "control", "square")      # of the first figure, and by family
PHASES = ("sft", "dpo")
TEACHERS = ("teacher", "teacher-page7", "teacher-page14", "teacher-internvl")
# Runs of five seeds, for the README's claims lean on them; the others have three.
FIVE = {*TABLES["table1"][1], *TABLES["control"][1], *TABLES["square"][1], "no-density",
        *(f"{c}-own" for c in ("c2", "c3", "c4", "no-density")),
        *(f"{c}-{k}k" for k in (100, 175, 350, 500) for c in ("c3", "c4"))}
FLAGS = {"teacher": ""} | {name: flags for _, rows in TABLES.values() for name, flags in rows.items()}
COLUMNS = SUITES | {family: [family] for family in REGIMES["regimes"]}
# Differences to show: (a, b): the paper's a - b in points: fine-grained average, reasoning average,
# OCRBench v2
PAIRS = {
    ("c2", "c1"): (3.33, 0.50, 2.6), ("c3", "c2"): (0.85, 0.45, 1.4), ("c4", "c3"): (3.50, 0.35, 4.7),
    ("c4", "c2"): (4.35, 0.80, 6.1), ("c4", "c1"): (7.68, 1.30, 8.7), ("c1", "teacher"): (-11.35, -1.40, -13.3),
    ("c4", "teacher"): (-3.67, -0.10, -4.6),
    **{(f"{c}-sft", c): () for c in ("c1", "c2", "c3", "c4")}, ("c4-sft", "c3-sft"): (),
    **{(f"{c}-dpo", f"{c}-sft"): () for c in ("c1", "c2", "c3", "c4")},
    ("c1-dpo", "c1"): (4.83, -1.45, 7.1), ("c2-dpo", "c2"): (3.42, -0.97, 6.4), ("c3-dpo", "c3"): (4.35, -0.15, 6.7),
    ("c4-dpo", "c4"): (3.73, 0.95, 4.7), ("c4-dpo", "c3-dpo"): (2.88, 1.45, 2.7), ("c4-dpo", "teacher"): (0.06, 0.85, 0.1),
    ("c5", "c4"): (0.6,), ("c6", "c4"): (0.7,),
    ("c2-internvl", "c1-internvl"): (2.8,), ("c3-internvl", "c2-internvl"): (0.5,),
    ("c4-internvl", "c3-internvl"): (3.2,), ("c4-internvl", "c1-internvl"): (6.5,),
    ("c1-internvl", "teacher-internvl"): (-9.4,), ("c4-internvl", "teacher-internvl"): (-2.9,),
    ("c4-internvl-dpo", "teacher-internvl"): (-0.6,),
    ("c4", "no-residual"): (2.5,), ("c4", "no-density"): (2.6,), ("c4", "ld"): (0.6,), ("c4", "sl"): (1.1,),
    ("no-density", "c3"): (2.1,), ("c4", "shuffled"): (), ("shuffled", "c3"): (),
    **{(f"{a}{end}", f"{b}{end}"): () for end in ("", "-own") for a, b in (
        ("rank-only", "c3"), ("share-only", "c3"), ("c4", "rank-only"), ("c4", "share-only"))},
    ("c5-beta", "c5"): (), ("c5-root", "c5"): (), ("c5-beta", "c4"): (), ("c5-root", "c4"): (),
    **{(f"{c}-{name}", c): () for name in ("own", "full", "paper") for c in ("c1", "c2", "c3", "c4")},
    ("c3-own", "c2-own"): (), ("c4-own", "c3-own"): (), ("c4-visual", "c4"): (),
    ("no-density-own", "c3-own"): (), ("c4-own", "no-density-own"): (),
    ("topk10", "random10"): (2.5,), ("topk25", "random25"): (5.2,), ("topk50", "random50"): (4.7,),
    ("topk10", "c3"): (3.5,), ("topk25", "c3"): (7.5,), ("topk50", "c3"): (8.2,),
    ("random10", "c3"): (1.0,), ("random25", "c3"): (2.3,), ("random50", "c3"): (3.5,), ("c4", "topk10"): (5.2,),
    **{(f"c4-{end}", f"c3-{end}"): () for end in ("100k", "175k", "350k", "500k", "1000k", "page7", "page14", "keep2", "keep8")},
    ("c3-regimes", "c1-regimes"): (), ("c4-regimes", "c3-regimes"): (), ("c5-regimes", "c4-regimes"): (),
}


def judge(folder, page, suites):
    """-> {family: string of 0 and 1, a question each}, the evaluation world's first QUESTIONS a
    suite."""
    import torch
    from data import processor_of
    from evaluate import evaluate_models
    torch.set_num_threads(1)
    benches, processor = dict.fromkeys(suites), processor_of(folder)
    records = evaluate_models({"model": folder}, processor, QUESTIONS, benches, dtype=torch.float32,
                              page=page)["model"]
    marks = {}
    for r in records:
        marks[r["part"]] = marks.get(r["part"], "") + str(int(r["score"]))
    return marks


def parent_of(name):
    """The run whose student a phase goes on from: c4 -> c4-sft -> c4-dpo."""
    phase = FLAGS[name]
    return name.removesuffix("-" + phase) + ("-sft" if phase == "dpo" else "")


def command(name, seed, out):
    """The script and the flags that train a run."""
    if FLAGS[name] in PHASES:
        words = ["sft_dpo.py", FLAGS[name], "--model", str(out.with_name(f"{parent_of(name)}-seed{seed}"))]
        words += SFT * (FLAGS[name] == "sft")
    else:
        words = ["distill.py", "--tokens", str(TOKENS), *FLAGS[name].split()]
    return [*words, "--seed", str(seed), "--questions", "0", "--threads", "1", "--out", str(out)]


def settings_of(name, seed):
    """All settings that decide a run's result, defaults filled in, with those of the run that it
    goes on from."""
    from distill import DEFAULTS, DistillSettings
    from loop import parse
    from sft_dpo import PHASES as phases
    if name in TEACHERS:
        return {"page": page_of(name), "teacher": folder_of(name)}
    script, *words = command(name, seed, HERE / "out" / name)
    kind, defaults = DistillSettings, DEFAULTS
    if script == "sft_dpo.py":
        kind, defaults = phases[words[0]].settings, phases[words.pop(0)].defaults
    chosen = parse(kind, defaults, words)
    chosen = {f.name: getattr(chosen, f.name) for f in fields(kind) if f.metadata["decides"] and f.name != "model"}
    return chosen if script == "distill.py" else {**chosen, "from": settings_of(parent_of(name), seed)}


def page_of(name):
    return int(FLAGS[name].split("--page ")[1].split()[0]) if "--page" in FLAGS[name] else 10


def folder_of(teacher):
    return FLAGS[teacher].split()[1] if "--teacher" in FLAGS[teacher] else "tiny"


def differences(theirs, ours):
    """What two settings differ in. One that the older lacks had today's default, or it would have
    been a change; one that is known to the older alone no longer decides anything."""
    found = []
    for k in theirs.keys() & ours.keys():
        if isinstance(theirs[k], dict):
            found += differences(theirs[k], ours[k])
        elif theirs[k] != ours[k]:
            found.append(f"{k} {theirs[k]} there, {ours[k]} now")
    return found


# --------------------------------------------------------------------------------------------------
# runs.jsonl: a line a run, appended by any number of jobs; of two lines for one run the later
# counts


def read(results):
    """-> {(run, seed, again): what was stored}, in the order of their names."""
    lines = map(json.loads, results.read_text().splitlines() if results.exists() else [])
    stored = {(d["run"], d["seed"], d["again"]): d for d in lines}
    return dict(sorted(stored.items()))


def keep(results, stored):
    """Appends one line, in one write under a lock, so that jobs do not mix theirs."""
    with open(results, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(stored) + "\n")
    print(f"{stored['run']}, seed {stored['seed']}: "
          f"{', '.join(f'{s} {v:.1f}' for s, v in scores(stored['marks']).items())}", flush=True)


def refuse_stale(results):
    for (name, seed, _), stored in read(results).items():
        if name in FLAGS and (changed := differences(stored["settings"], settings_of(name, seed))):
            sys.exit(f"{name}, seed {seed} in {results.name} was made under other settings ({', '.join(changed)}): "
                     "remove its line to run it again")


busy = defaultdict(Lock)                                # a run that two others wait for is run once


def one(name, seed, results, wanted="result", again=False):
    """Trains and judges one student, unless its result is there, or its folder when that is
    `wanted`."""
    with busy[name, seed]:
        judged = (name, seed, again) in read(results)
        out = HERE / "out" / ("again" if again else "reproduce") / f"{name}-seed{seed}"
        if judged and (wanted == "result" or (out / "model.safetensors").exists()):
            return
        if FLAGS[name] in PHASES:
            one(parent_of(name), seed, results, "folder", again)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{out}.txt", "a") as log:
            if name not in TEACHERS:
                words = command(name, seed, out)
                subprocess.run([sys.executable, *words], cwd=HERE, env=environment, check=True, stdout=log, stderr=log)
            if judged:                                    # before; only its folder was wanted
                return
            suites = SUITES | REGIMES if name == "teacher" else REGIMES if "--suite regimes" in FLAGS[name] else SUITES
            words = [str(HERE / folder_of(name) if name in TEACHERS else out), str(page_of(name)), *suites]
            marks = subprocess.run([sys.executable, "-m", "paper.reproduce", "--judge", *words], cwd=HERE,
                                   env=environment, check=True, stdout=subprocess.PIPE, stderr=log, text=True).stdout
        keep(results, dict(run=name, seed=seed, again=again, flags=FLAGS[name], settings=settings_of(name, seed),
                           marks=json.loads(marks.splitlines()[-1])))


# --------------------------------------------------------------------------------------------------


def scores(marks):
    """Exact match in per cent of one run: of each suite, but of the regimes by family, for they
    differ in kind."""
    return {name: 100 * np.mean([int(c) for f in families for c in marks[f]]) for name, families in COLUMNS.items()
            if set(families) <= set(marks)}


def mean_error(values):
    """Mean, standard deviation over seeds, standard error of the mean (None for a single seed)."""
    values = np.array(values)
    if len(values) < 2:
        return values.mean(), None, None
    return values.mean(), values.std(ddof=1), values.std(ddof=1) / math.sqrt(len(values))


def spread(value, error, sign=""):
    return f"{value:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def told_apart(mean, error, n):
    """A mark where the 95 % t-interval of a mean over n seeds excludes 0."""
    return " †" if error is not None and abs(mean) > stats.t.ppf(0.975, n - 1) * error else ""


def difference(values):
    """Mean and standard error of differences, one per seed, marked where it is told apart from 0."""
    mean, _, error = mean_error(values)
    return spread(mean, error, "+") + told_apart(mean, error, len(values))


@cache
def fullness(suite, n):
    """Share of the cells that hold a mark (a character, a digit, a shape), of the first n pages of
    a suite."""
    world, shares = World("eval", 0, suite), []
    for i in range(n):
        rng = world.rng(i)
        page = world.page(rng, world.family(rng, i))
        cells = {(y // CELL, x // CELL) for _, x0, y0, x1, y1 in page.marks
                 for y in range(y0 + 4, y1, 8) for x in range(x0 + 4, x1, 8)}
        shares.append(len(cells) / (page.cells[0] * page.cells[1]))
    return np.array(shares)


def where(marks):
    """C4 - C3 in points, by family, fullness of the page, budget, ...: {group: {name: one value a
    seed}}."""
    def shared(a, b):
        return sorted(set(marks.get(a, ())) & set(marks.get(b, ())))

    def gains(a, b, choose):              # of per cents, as in the tables, so that both round alike
        return [choose(marks[a][s]) - choose(marks[b][s]) for s in shared(a, b)]

    groups = {"by family": {f: gains("c4", "c3", lambda m: 100 * np.mean([int(c) for c in m[f]]))
                            for families in SUITES.values() for f in families}}
    rows = groups["on the emptier and the fuller half of each family's pages"] = {}
    for suite, families in SUITES.items():                # within families, or fullness would stand for one of them
        shares = [fullness(suite, QUESTIONS)[i::len(families)].argsort(kind="stable") for i in range(len(families))]
        for name, part in (("emptier", 0), ("fuller", 1)):
            halves = [np.array_split(order, 2)[part] for order in shares]
            rows[f"{suite}, {name}"] = gains("c4", "c3", lambda m: 100 * np.mean([
                np.array([int(c) for c in m[f]])[half].mean() for f, half in zip(families, halves)]))
    axes = {"reading, by token budget": tuple(
                (k, "" if 1000 * k == TOKENS else f"-{k}k") for k in (100, 175, 250, 350, 500, 1000)),
            "reading, by visual tokens of a page": ((49, "-page7"), (100, ""), (196, "-page14")),
            "reading, by share of layers that keep attention": (("1 of 2", "-keep2"), ("1 of 4", ""), ("1 of 8", "-keep8"))}
    for group, ends in axes.items():
        groups[group] = {f"{1000 * name:,}" if "budget" in group else str(name): gains(
            f"c4{end}", f"c3{end}", lambda m: scores(m)["reading"]) for name, end in ends}
    groups["where density misranks (trained on such pages)"] = {
        f: gains("c4-regimes", "c3-regimes", lambda m: 100 * np.mean([int(c) for c in m[f]]))
        for f in REGIMES["regimes"]}
    groups = {group: {name: values for name, values in rows.items() if values} for group, rows in groups.items()}
    return {group: rows for group, rows in groups.items() if len(rows) > 1}


INK, C3, C4 = "#333340", "#0072B2", "#D55E00"             # Okabe and Ito's blue and vermilion


def draw_where(groups, path):
    """Means with whiskers of one standard error, a block for each group; a single seed's mark is
    hollow."""
    rows = [(group, name, values) for group, named in groups.items() for name, values in named.items()]
    figure, axis = plt.subplots(figsize=(8.3, 0.24 * len(rows) + 0.5 * len(groups) + 0.8), layout="constrained")
    y, labels = 0.0, []
    for i, (group, name, values) in enumerate(rows):
        if i == 0 or rows[i - 1][0] != group:             # a heading of its own
            y += 1.7
            axis.text(0, y - 0.85, f"{group[0].upper()}{group[1:]}", transform=axis.get_yaxis_transform(),
                      weight="bold", size=9, va="center")
        mean, _, error = mean_error(values)
        axis.errorbar(mean, y, xerr=error or 0, color=C4 if mean > 0 else C3, marker="o", capsize=2.5, lw=1.4, ms=5,
                      mfc="white" if error is None else None)
        axis.text(1.01, y, f"{difference(values)}  ({len(values)})", transform=axis.get_yaxis_transform(),
                  size=8, va="center")
        labels.append((y, name))
        y += 1
    axis.set_yticks([at for at, _ in labels], [name for _, name in labels], size=8)
    axis.set_ylim(y, 0)
    axis.axvline(0, color=INK, lw=0.8)
    axis.grid(axis="x", color="#e2e3e7", lw=0.6)
    axis.set_xlabel("C4 − C3, points of exact match; right of 0 C4 is better. Whiskers: one standard error; "
                    "at the right mean ± error (seeds), † not 0", size=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    save(figure, path)


def save(figure, path):
    """No date and no version in the file, so that the same figures give the same bytes."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def draw_conditions(runs, path):
    """A row for each condition and a column for each suite: a dot for each seed, a bar at their
    mean; the teacher dashed. The paper's figures are of other benchmarks, so they stand in the
    tables and not on these axes."""
    rows = [name for key in CONDITIONS for name in TABLES[key][1] if name in runs
            and not name.endswith("-own")]
    figure, axes = plt.subplots(1, len(SUITES), figsize=(8.3, 0.3 * len(rows) + 1), sharey=True, layout="constrained")
    for axis, suite in zip(axes, SUITES):
        for y, name in enumerate(rows):
            values, colour = [scored[suite] for scored in runs[name].values()], C4 if name == "c4" else C3
            axis.plot(values, [y] * len(values), "o", color=colour, mfc="none", ms=5)
            axis.plot(np.mean(values), y, "|", color=colour, ms=14, mew=3)
        if "teacher" in runs:
            axis.axvline(runs["teacher"][0][suite], color=INK, ls="--", lw=1)
        axis.set_xlabel(f"{suite}, % exact match")
        axis.grid(axis="x", color="#e2e3e7", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    save(figure, path)


def repeated(results, runs):
    """Rows for runs that were run once more (--again), and the typical size of the change."""
    rows, changes = [], defaultdict(list)
    for (name, seed, again), stored in read(results).items():
        if not again or seed not in runs.get(name, {}):
            continue
        first, second = runs[stored["run"]][stored["seed"]], scores(stored["marks"])
        for suite in SUITES:
            changes[suite].append(second[suite] - first[suite])
        cells = " | ".join(f"{first[suite]:.1f}, {second[suite]:.1f}" for suite in SUITES)
        rows.append(f"| {stored['run']} | {stored['seed']} | {cells} |")
    if rows:
        cells = " | ".join(f"{math.sqrt(np.mean(np.square(changes[suite]))):.1f}" for suite in SUITES)
        rows.append(f"| root mean square of the change | {len(rows)} runs | {cells} |")
    return rows


def by_family(marks):
    """The table of marks by family, for the conditions of the first figure."""
    families, lines = [f for suite in SUITES.values() for f in suite], []
    rows = [n for key in CONDITIONS for n in TABLES[key][1] if not n.endswith("-own")]
    if rows := [name for name in rows if name in marks]:
        lines += ["## By family", "", f"| run | seeds | {' | '.join(families)} |",
                  "|---" * (2 + len(families)) + "|"]
        for name in rows:
            found = [[100 * np.mean([int(c) for c in m[f]]) for m in marks[name].values()]
                     for f in families]
            cells = [spread(*mean_error(values)[:2]) for values in found]
            lines.append(f"| {name} | {len(marks[name])} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def write(results):
    """The tables of RESULTS.md and their figures from results/runs.jsonl."""
    runs, marks = {}, {}
    for (name, seed, again), stored in read(results).items():
        if not again:
            runs.setdefault(name, {})[seed] = scores(stored["marks"])
            marks.setdefault(name, {})[seed] = stored["marks"]
    wanted = programme()
    here = sum(seed in runs.get(name, {}) for name, seed in wanted)
    lines = [BELOW, "", "# The tables", "", f"{here} of the programme's {len(wanted)} runs are here. "
             f"Exact match in per cent on {QUESTIONS} evaluation questions a suite; students after {TOKENS:,} tokens. ± is the standard deviation over seeds "
             "and, of differences, the standard error; these are paired: same seed, data order and, for the same mixer, "
             "initial mixers. † marks a difference whose 95 % t-interval excludes 0, uncorrected for their number. The "
             "paper's three figures are of its fine-grained and reasoning averages and OCRBench v2, one alone is of "
             "OCRBench v2. Seeds 0 to 2 of the first runs were made on an AVX2 machine, the others on AVX-512.", ""]

    if set(TABLES["table1"][1]) & set(runs):
        draw_conditions(runs, HERE / "docs" / "conditions.png")
        lines += ["![Exact match by condition](../docs/conditions.png)", "", "A dot for each seed, a bar at their mean, the "
                      "teacher dashed.", ""]
    home = {name: key for key, (_, rows) in reversed(TABLES.items()) for name in rows}          # its first table
    for key, (title, rows) in TABLES.items():
        if not set(rows) & set(runs) - set(TEACHERS):
            continue
        columns = list(REGIMES["regimes"] if key == "regimes" else SUITES)
        head, line = " | ".join(columns), "|---" * (3 + len(columns)) + "|"
        lines += [f"## {title}", "", f"| run | flags | seeds | {head} |", line]
        for name, flags in (rows if set(TEACHERS) & set(rows) else {"teacher": ""} | rows).items():
            if seeds := [v for v in runs.get(name, {}).values() if set(columns) <= set(v)]:
                cells = [spread(*mean_error([v[c] for v in seeds])[:2]) for c in columns]
                lines.append(f"| {name} | `{flags}` | {len(seeds)} | {' | '.join(cells)} |")
        lines += ["", f"| difference | seeds | {head} | the paper |", line]
        for (a, b), paper in PAIRS.items():
            later = max(home.get(a, key), home.get(b, key), key=list(TABLES).index)       # the teacher is in all tables
            first, second = runs.get(a, {}), runs.get(b, {})
            if b in TEACHERS:                             # it has no seed: the same for all
                second = dict.fromkeys(first if second else (), second.get(0))
            if (shared := sorted(set(first) & set(second))) and later == key and (b != "teacher" or home[a] == key):
                cells = [difference([first[k][c] - second[k][c] for k in shared]) for c in columns]
                cells.append(", ".join(f"{v:+g}" for v in paper))
                lines.append(f"| {a} − {b} | {len(shared)} | {' | '.join(cells)} |")
        lines.append("")
    lines += by_family(marks)
    if again := repeated(results, runs):
        lines += ["## The same runs once more", "", "Same command and seed (`--again`). On the same kind of CPU they "
                  "repeat to the bit; where vector instructions differ, sums are taken in another order, and training "
                  "magnifies the last bit. That part of every difference above is no property of a condition or a seed.",
                  "", "| run | seed | reading, again | reasoning, again |",
                  "|---|---|---|---|", *again, ""]
    if groups := where(marks):
        draw_where(groups, HERE / "docs" / "where.png")
        lines += ["## Where does density help?", "", "![C4 minus C3](../docs/where.png)", "", "Whiskers: one standard "
                  "error over seeds; † as above. Families and halves are parts of the same questions; other groups are runs "
                  "of their own.", ""]
        for group, rows in groups.items():
            lines += [f"| C4 − C3, points, {group} | seeds | |", "|---|---|---|",
                      *(f"| {name} | {len(v)} | {difference(v)} |" for name, v in rows.items()), ""]
    path = HERE / "paper" / "RESULTS.md"            # the words above the tables are written by hand
    words = path.read_text().split(BELOW)[0] if path.exists() else ""
    path.write_text(words + "\n".join(lines).rstrip() + "\n")


def programme(tables=TABLES, seeds=None):
    """[(run, seed)], seed by seed, so that a short evening has whole seeds. The teachers have one."""
    names = [name for table in tables for name in TABLES[table][1] if name not in TEACHERS]
    teachers = [name for name in TEACHERS if name == "teacher" or any(name in TABLES[t][1] for t in tables)]
    numbers = {name: seeds or (5 if name in FIVE else 3) for name in names}
    return [(name, 0) for name in teachers] + [
        (name, seed) for seed in range(max(numbers.values())) for name in names if seed < numbers[name]]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: all")
    p.add_argument("--seeds", type=int, help="default: 5 of FIVE, 3 of the others")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--again", action="store_true", help="repeat runs that have results")
    p.add_argument("--write", action="store_true", help="only write RESULTS.md")
    p.add_argument("--judge", nargs="+", metavar="FOLDER PAGE SUITE", help="print a model's marks (what a run calls)")
    a = p.parse_args()
    if unknown := set(a.tables) - set(TABLES):
        p.error(f"{', '.join(unknown)}: the tables are {', '.join(TABLES)}")
    if a.jobs < 1 or a.seeds is not None and a.seeds < 1:
        p.error("--seeds and --jobs must be at least 1")
    if a.judge:
        return print(json.dumps(judge(a.judge[0], int(a.judge[1]), a.judge[2:])))
    results = HERE / "paper" / "results" / "runs.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    refuse_stale(results)
    if not a.write:
        wanted = programme(a.tables or TABLES, a.seeds)
        if a.again:
            there = read(results)
            wanted = [(n, seed) for n, seed in wanted if n not in TEACHERS and (n, seed, False) in there]
        with ThreadPoolExecutor(a.jobs) as pool:
            runs = {f"{name}-seed{seed}": pool.submit(one, name, seed, results, again=a.again) for name, seed in wanted}
        failed = [name for name, run in runs.items() if run.exception()]
    write(results)
    if not a.write and failed:
        sys.exit(f"failed, for reasons in out/reproduce/NAME.txt: {', '.join(failed)}")


if __name__ == "__main__":
    main()
