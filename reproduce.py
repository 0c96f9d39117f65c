"""The paper's tables at laptop scale: every run, every seed, paired differences -> RESULTS.md.

    python reproduce.py table1 ledger               # run what is missing, then write RESULTS.md
    python reproduce.py --write                     # only write RESULTS.md from results/*.json
    python reproduce.py table1 --seeds 5 --jobs 2   # two runs of one thread each

A run is one `distill.py` command in a process of its own and one judgement of its student on evaluation pages, which
training never draws. What is kept of it is results/<run>.json: the command's flags and one 0 or 1 per question, so
that any two runs can be paired. A run with its file is not repeated, and one that was interrupted goes on from its
checkpoint. All conditions have the same budget, settings, data order and initial mixers for the same seed; nothing
was chosen by looking at these pages.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from synthdoc import SUITES

TOKENS, QUESTIONS = 400_000, 500                          # of every run; a suite
HERE = Path(__file__).parent

# name: (flags beside --cond, what it stands beside in the paper)
TABLES = {
    "table1": ("Tables 1 and 9: the ladder", {c: f"--cond {c}" for c in ("c1", "c2", "c3", "c4")}),
    "ledger": ("Ledger 3 and 4: initialisation and feed", {
        f"{c}-{name}": f"--cond {c} {flags}" for c in ("c1", "c3", "c4")
        for name, flags in (("paper", "--init paper"), ("teacher", "--feed teacher"))
        if not (c == "c1" and name == "teacher")}),       # c1 has no Stages 1/2 to feed
    "table5": ("Table 5: gradient weights and Gated DeltaNet", {c: f"--cond {c}" for c in ("c5", "c6")}),
    "table8": ("Table 8: ablations", {c: f"--cond {c}" for c in ("no-residual", "no-density", "ld", "sl")}),
    "a8": ("A.8: 5 x weight on k % of the positions", {
        f"{c}{k}": f"--cond {c} --k {k}" for k in (10, 25, 50) for c in ("topk", "random")}),
}
# (better, worse) as the paper has it, and the paper's difference on OCRBench v2
PAIRS = [("c2", "c1", 2.6), ("c3", "c2", 1.4), ("c4", "c3", 4.7), ("c5", "c4", 0.6), ("c6", "c4", 0.7),
         ("c4", "no-residual", 2.5), ("c4", "no-density", 2.6), ("c4", "ld", 0.6), ("c4", "sl", 1.1),
         ("topk10", "random10", 2.5), ("topk25", "random25", 5.2), ("topk50", "random50", 4.7)]


def judge(folder):
    """-> {family: string of 0 and 1, a question each}, the evaluation world's first QUESTIONS a suite."""
    import torch
    from data import Processor
    from evaluate import evaluate_models
    torch.set_num_threads(1)
    records = evaluate_models({"model": folder}, Processor(folder), QUESTIONS, dtype=torch.float32)["model"]
    marks = {}
    for r in records:
        marks[r["part"]] = marks.get(r["part"], "") + str(int(r["score"]))
    return marks


def one(name, flags, seed, results):
    """Distils and judges one student, unless its result is there."""
    file = results / f"{name}-seed{seed}.json"
    if file.exists():
        return
    out = HERE / "out" / "reproduce" / f"{name}-seed{seed}"
    command = [sys.executable, "distill.py", *flags.split(), "--seed", str(seed), "--tokens", str(TOKENS),
               "--out", str(out), "--questions", "0", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{out}.txt" if out.parent.mkdir(parents=True, exist_ok=True) is None else os.devnull, "a") as log:
        subprocess.run(command, cwd=HERE, env=environment, check=True, stdout=log, stderr=log)
        marks = subprocess.run([sys.executable, "reproduce.py", "--judge", str(out)], cwd=HERE, env=environment,
                               check=True, stdout=subprocess.PIPE, stderr=log, text=True).stdout
    stored = dict(run=name, flags=flags, seed=seed, tokens=TOKENS, marks=json.loads(marks.splitlines()[-1]))
    file.with_suffix(".tmp").write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(file.with_suffix(".tmp"), file)
    print(f"{name} seed {seed}: {', '.join(f'{s} {v:.1f}' for s, v in scores(stored['marks']).items())}", flush=True)


# ---------------------------------------------------------------------------------------------------------


def scores(marks):
    """Suites' exact match in per cent, from the marks of one run."""
    return {suite: 100 * np.mean([int(c) for f in families for c in marks[f]]) for suite, families in SUITES.items()}


def mean_error(values):
    """Mean, standard deviation over seeds, standard error of the mean (None for a single seed)."""
    values = np.array(values)
    if len(values) < 2:
        return values.mean(), None, None
    return values.mean(), values.std(ddof=1), values.std(ddof=1) / math.sqrt(len(values))


def spread(value, error, sign=""):
    return f"{value:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def write(results):
    """RESULTS.md from results/*.json."""
    runs = {}
    for file in sorted(results.glob("*.json")):
        stored = json.loads(file.read_text())
        runs.setdefault(stored["run"], {})[stored["seed"]] = scores(stored["marks"])
    lines = ["# Results on the embedded world", "",
             f"Written by `python reproduce.py --write` from `results/`. Exact match in per cent on {QUESTIONS} "
             f"evaluation questions a suite; students after {TOKENS:,} tokens; ± is the standard deviation over seeds "
             "in the tables and the standard error of the paired difference below them.", ""]

    def row(name, flags):
        seeds = runs.get(name, {})
        if seeds:
            cells = [spread(*mean_error([v[s] for v in seeds.values()])[:2]) for s in SUITES]
            lines.append(f"| {name} | `{flags}` | {len(seeds)} | " + " | ".join(cells) + " |")
    for key, (title, rows) in TABLES.items():
        if any(name in runs for name in rows):
            lines += [f"## {title}", "", "| run | flags | seeds | " + " | ".join(SUITES) + " |", "|---" * (3 + len(SUITES)) + "|"]
            row("teacher", "")
            for name, flags in rows.items():
                row(name, flags)
            lines.append("")
    lines += ["## Paired differences", "", "Same seed, data order and initial mixers on both sides.", "",
              "| difference | seeds | " + " | ".join(SUITES) + " | the paper, OCRBench v2 |", "|---" * (3 + len(SUITES)) + "|"]
    for a, b, paper in PAIRS:
        if shared := sorted(set(runs.get(a, ())) & set(runs.get(b, ()))):
            cells = []
            for s in SUITES:
                mean, _, error = mean_error([runs[a][k][s] - runs[b][k][s] for k in shared])
                cells.append(spread(mean, error, "+"))
            lines.append(f"| {a} − {b} | {len(shared)} | " + " | ".join(cells) + f" | {paper:+.1f} |")
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("tables", nargs="*", choices=[[], *TABLES], help=f"of {', '.join(TABLES)}")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--write", action="store_true", help="only write RESULTS.md")
    p.add_argument("--judge", metavar="FOLDER", help="print one model's marks (what a run calls)")
    a = p.parse_args()
    if a.judge:
        return print(json.dumps(judge(a.judge)))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    if not a.write:
        if not (results / "teacher-seed0.json").exists():
            stored = dict(run="teacher", flags="", seed=0, tokens=0, marks=judge(HERE / "tiny"))
            (results / "teacher-seed0.json").write_text(json.dumps(stored, indent=1) + "\n")
        with ThreadPoolExecutor(a.jobs) as pool:          # seed by seed, so that a short evening has whole seeds
            for done in [pool.submit(one, name, flags, seed, results) for seed in range(a.seeds)
                         for table in a.tables for name, flags in TABLES[table][1].items()]:
                done.result()
    write(results)


if __name__ == "__main__":
    main()
