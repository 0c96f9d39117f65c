"""Answers and metrics: teacher against students in a table like the paper's 1, 2 and 4 (Sect. 5, A.2, C.1).

    python evaluate.py tiny out/c3 out/c4                     the embedded world, 500 questions a suite
    python evaluate.py TEACHER STUDENT --bench docvqa_val=DATA.parquet --bench ai2d=ROWS.jsonl --device cuda
    python evaluate.py --rescore out/eval/answers-*.jsonl     scores again, without a model

benchmarks.py has the prompts and metrics. Every reply is greedy (C.1) and kept with what its metric needs.

From top to bottom: reading; answering; the table with paired bootstrap intervals; the gallery (Fig. 6).
plugins/lmms_eval.py has our models inside lmms-eval itself.
"""
import argparse
import copy
import glob
import hashlib
import itertools
import json
import math
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from parts.benchmarks import BENCHMARKS, EMBEDDED, HARNESS_TOKENS, SYSTEM
from data import BadSample, Processor, Sample, collate
from model import Config, Qwen3VL, device_of, dtype_of

# ---------------------------------------------------------------------------------------------------------
# Reading: a benchmark's questions as (record, Sample)


def json_rows(file):
    with open(file, encoding="utf-8-sig") as lines:        # -sig: some editors write a byte-order mark
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"{file} line {number} is not a JSON object")
                yield row


def rows_of(path):
    """Yields (row, FILE#NUMBER) of JSONL or parquet, a file, folder or pattern. Raises FileNotFoundError, and ValueError
    that names the line which is no JSON object."""
    found = [str(path)] if Path(path).is_file() else sorted(glob.glob(f"{path}/*" if Path(path).is_dir() else str(path)))
    files = [f for f in found if f.endswith((".jsonl", ".parquet"))]
    if not files:
        raise FileNotFoundError(f"{path} has no .jsonl or .parquet file")
    for file in files:
        if file.endswith(".jsonl"):
            rows = json_rows(file)
        else:
            import pyarrow.parquet                         # optional: only for parquet
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=32)
            rows = (row for batch in batches for row in batch.to_pylist())
        for i, row in enumerate(rows):
            yield row, f"{file}#{i}"


def opened(cell, folder):
    """An image cell (path, bytes, or a parquet file's {"bytes", "path"}) -> RGB, as lmms-eval converts it."""
    cell = cell.get("bytes") or cell["path"] if isinstance(cell, dict) else cell
    image = Image.open(BytesIO(cell) if isinstance(cell, bytes) else Path(folder) / cell)
    return ImageOps.exif_transpose(image).convert("RGB")   # as the package datasets does on decoding


def picture(reference):
    """The image that a record names: FILE#ROW#COLUMN, or synthdoc:SUITE:SEED:PAGE:INDEX."""
    if reference.startswith("synthdoc:"):
        from synthdoc import World
        _, suite, seed, page, index = reference.split(":")
        return World("eval", int(seed), suite, (int(page), int(page)))[int(index)].images[0]
    file, row, column = reference.rsplit("#", 2)
    cell = next(itertools.islice(rows_of(file), int(row), None))[0][column]
    return opened(cell, Path(file).parent)


def embedded_questions(suite, n, seed, page):
    """The first question of each page of `page` x `page` cells, with its picture."""
    from synthdoc import World
    world = World("eval", seed, suite, cells=(page, page))
    for i in range(n or 500):
        sample = world[i]
        prompt, gold = sample.messages[0], sample.messages[1]["content"][0]["text"]
        text = "".join(part.get("text", "") for part in prompt["content"])
        yield (dict(benchmark=suite, id=sample.id, part=sample.source, image=[f"synthdoc:{suite}:{seed}:{page}:{i}"],
                    question=text, gold=gold, row={"answer": gold}),
               Sample(sample.id, [prompt], sample.images, sample.source))


def file_questions(name, path, n):
    """The first n rows (None: all). Images come before the text, as in lmms-eval.

    Raises ValueError naming the column that a row lacks."""
    bench = BENCHMARKS[name]
    for number, (row, reference) in enumerate(itertools.islice(rows_of(path), n)):
        try:
            text, columns = bench.ask(row), bench.images(row)
            try:
                images = [opened(row[c], Path(reference).parent) for c in columns]
            except (OSError, ValueError, AttributeError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{reference}: its image cannot be read: {error}") from None
            kept = [c.rstrip("?") for c in bench.keep.split() if c[-1] != "?" or c[:-1] in row]
            kept = {c: [row[c]] if c == "answers" and isinstance(row[c], str) else row[c] for c in kept}
            part, gold = bench.part(row), bench.gold(row)
            bench.metric("", kept)                         # what cannot be scored shows before it is answered
        except KeyError as lacking:
            raise ValueError(f"{reference}: {name} needs a column {lacking}, not in {sorted(row)}") from None
        except (TypeError, AttributeError, IndexError, ZeroDivisionError, SyntaxError, ValueError) as error:
            raise ValueError(f"{reference} is no question of {name}: {error}") from None
        record = dict(benchmark=name, id=str(row.get(bench.id, number)), part=part, question=text,
                      image=[f"{reference}#{c}" for c in columns], gold=gold, row=kept)
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        yield record, Sample(record["id"], [dict(role="system", content=[{"type": "text", "text": SYSTEM}]),
                                            dict(role="user", content=content)], images, name)


# ---------------------------------------------------------------------------------------------------------
# Answering


def answer(model, processor, samples, batch_size=16, max_new_tokens=32, label="answers"):
    """Greedy replies to a list of samples whose last turn is the user's, in their order.

    Rows of like length share a batch, longest first: few padded positions, and what does not fit in memory
    fails at once. A batch may mix image sizes, and samples without an image. Raises data.BadSample."""
    device, replies = next(model.parameters()).device, [""] * len(samples)
    lengths = [processor.length(sample, add_generation_prompt=True) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: -lengths[i])
    for at in tqdm(range(0, len(order), batch_size), desc=label, leave=False, disable=None):
        rows = order[at:at + batch_size]
        encoded = [processor.encode(samples[i], add_generation_prompt=True) for i in rows]
        batch = collate(encoded, processor.pad_id, side="left").to(device)
        mask = None if batch.mask.all() else batch.mask
        ids = model.generate(batch.ids, mask, batch.pixels, batch.grids, max_new_tokens=max_new_tokens)
        for i, tokens in zip(rows, ids):
            replies[i] = processor.decode(tokens)
    return replies


def weights_of(folder, dtype):
    """A mark of a folder's weights by size and time, and of their precision: answers of others are not to be gone on."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256(repr((files, dtype)).encode()).hexdigest()[:12]


def judged(record):
    """A record with its `answer`, scored: adds parsed, unparsed and score. Needs no model."""
    score, parsed = BENCHMARKS[record["benchmark"]].metric(record["answer"].strip(), record["row"])
    return {**record, "parsed": parsed, "unparsed": parsed is None, "score": score}


def evaluate_models(models, processor, n=None, benches=None, seed=0, batch_size=16, max_new_tokens=None,
                    device="cpu", dtype=None, keep=None, page=10, resume=False):
    """Asks every model the same questions. Returns {name: [records]}, what `table` and `gallery` take.

    models: {name: a Qwen3VL, or a folder that is loaded when its turn comes}. benches: {benchmark: path, or
    None for an embedded suite}, by default reading and reasoning. n: questions of each (None: 500 embedded ones, all of
    a file). max_new_tokens: a cap below each benchmark's own. keep: a folder in which answers-MODEL.jsonl grows as
    the replies come, for they may take hours. page: cells on a side of an embedded page. resume: go on after the answers
    that `keep` holds; raises ValueError if they are to other questions."""
    results, benches = {}, benches or dict.fromkeys(EMBEDDED[:2])
    for name, path in benches.items():                     # a missing column shows before the first answer
        if path is not None and next(file_questions(name, path, 1), None) is None:
            raise ValueError(f"{path} has no row")
    held = {name: kept_answers(keep / f"answers-{name}.jsonl") if resume else [] for name in models}
    if strange := {r["benchmark"] for records in held.values() for r in records} - set(benches):
        raise ValueError(f"{keep} holds answers to {', '.join(sorted(strange))} too: ask for all of it, or choose another "
                         "--out")
    for model_name, model in models.items():
        stamp = "" if isinstance(model, torch.nn.Module) else weights_of(model, dtype)
        if not isinstance(model, torch.nn.Module):
            model = Qwen3VL.from_pretrained(model, dtype=dtype, device=device)
        if keep:                                           # not before a model could be loaded
            keep.mkdir(parents=True, exist_ok=True)
            write_answers(keep, model_name, held[model_name])      # without a line that was cut off
        was_training, results[model_name] = model.training, []
        model.eval()
        for name, path in benches.items():
            eyes, limit = copy.copy(processor), min(BENCHMARKS[name].new_tokens, max_new_tokens or math.inf)
            if path is not None:
                eyes.min_pixels, eyes.max_pixels = (n * eyes.factor ** 2 for n in HARNESS_TOKENS)
            asked = embedded_questions(name, n, seed, page) if path is None else file_questions(name, path, n)
            for old in [r for r in held[model_name] if r["benchmark"] == name]:
                new = {**next(asked, ({},))[0], "run": f"{stamp} {limit}"}
                if any(old.get(k) != v for k, v in json.loads(json.dumps(new)).items()):
                    raise ValueError(f"{keep} holds an answer to another question, or of other weights or settings, than "
                                     f"{model_name} has here ({name} {old.get('id')}): go on with the same, or start anew "
                                     "without --resume")
                results[model_name].append(judged(old))
            while window := list(itertools.islice(asked, 8 * batch_size)):     # so many images at once
                records, samples = zip(*window)
                replies = answer(model, eyes, samples, batch_size, limit, f"{model_name}: {name}")
                new = [judged({**r, "run": f"{stamp} {limit}", "answer": reply}) for r, reply in zip(records, replies)]
                results[model_name] += new
                if keep:
                    write_answers(keep, model_name, new, "a")
        model.train(was_training)
    return results


# ---------------------------------------------------------------------------------------------------------
# The table


class Tally(NamedTuple):
    ids: list
    scores: np.ndarray              # (n,) in 0..1
    weights: np.ndarray             # (n,), sum 1: the benchmark's score is weights @ scores
    strata: np.ndarray              # (n,) int: resampling keeps the size of each


def tally(records, overall):
    """The scored questions of one benchmark and one model, each with its weight in the overall score."""
    scored = [r for r in records if r["score"] is not None]
    if overall == "circular":       # copies of a question with rotated options, 1e6 apart, must all be right
        least = {}
        for r in scored:
            key = str(int(r["id"]) % 10 ** 6)
            least[key] = min(r["score"], least.get(key, 1.0))
        ids, scores, parts = list(least), list(least.values()), [0] * len(least)
    else:
        ids, scores = [r["id"] for r in scored], [r["score"] for r in scored]
        parts = [r["part"] if overall == "parts" else 0 for r in scored]
    sizes = Counter(parts)
    names = sorted(sizes, key=str)
    return Tally(ids, np.array(scores, float), np.array([1 / (len(sizes) * sizes[p]) for p in parts]),
                 np.array([names.index(p) for p in parts], int))


def resampled(a, b, draws=2000, seed=0):
    """Paired bootstrap: (draws,) differences b - a of two tallies over resampled questions, by stratum."""
    if a.ids != b.ids:
        raise ValueError(f"a paired comparison needs the same questions: one model has {len(a.ids)}, the"
                         f" other {len(b.ids)}, {len(set(a.ids) & set(b.ids))} in common")
    rng, gain, out = np.random.default_rng(seed), a.weights * (b.scores - a.scores), np.zeros(draws)
    for stratum in range(a.strata.max(initial=-1) + 1):
        values = gain[a.strata == stratum]
        out += [values[rng.integers(0, len(values), len(values))].sum() for _ in range(draws)]
    return out


def averages(values):
    """{benchmark: value or array} -> the group means and the overall mean over the table's rows. Linear."""
    rows = defaultdict(list)
    for name, value in values.items():
        rows[BENCHMARKS[name].group, BENCHMARKS[name].title].append(value)
    rows = {key: sum(v) / len(v) for key, v in rows.items()}
    groups = {g: [v for (group, _), v in rows.items() if g == group] for g in ("fine", "reasoning")}
    groups["all"] = list(rows.values())
    return {g: (len(v), sum(v) / len(v)) for g, v in groups.items() if v}


def by_benchmark(records):
    groups = {name: [r for r in records if r["benchmark"] == name] for name in BENCHMARKS}
    return {name: group for name, group in groups.items() if group}


def compare(first, second, draws=2000, seed=0):
    """Two models' records -> {benchmark or average: (second - first, low, high)}: points, 95 % interval."""
    first, second, change, spread = by_benchmark(first), by_benchmark(second), {}, {}
    if list(first) != list(second):
        raise ValueError(f"the models answered different benchmarks: {list(first)} and {list(second)}")
    for name in first:
        bench = BENCHMARKS[name]
        a, b = tally(first[name], bench.overall), tally(second[name], bench.overall)
        if bench.overall != "types" and a.ids:
            spread[name] = resampled(a, b, draws, [seed, zlib.crc32(name.encode())])
            change[name] = float(b.weights @ b.scores - a.weights @ a.scores)
    mean_change, mean_spread = averages(change), averages(spread)
    change.update({f"avg {g}": v for g, (_, v) in mean_change.items()})
    spread.update({f"avg {g}": v for g, (_, v) in mean_spread.items()})
    return {key: tuple(100 * float(x) for x in (change[key], *np.percentile(spread[key], (2.5, 97.5))))
            for key in change}


def standing(records, bench):
    """One model on one benchmark -> overall score and those of the parts, 0..100; coverage; unparsed."""
    t, parts = tally(records, bench.overall), defaultdict(list)
    for r in records:
        if r["part"] is not None and r["score"] is not None:
            parts[r["part"]].append(r["score"])
    return dict(score=100 * float(t.weights @ t.scores) if t.ids and bench.overall != "types" else None,
                questions=len(records), coverage=np.mean([r["score"] is not None for r in records]),
                unparsed=np.mean([r["unparsed"] for r in records]),
                parts={p: dict(score=100 * np.mean(s), questions=len(s)) for p, s in sorted(parts.items())})


def summary(results):
    """{model: records} -> everything that the table shows, as one dict for JSON."""
    scores = {model: {name: standing(of, BENCHMARKS[name]) for name, of in by_benchmark(records).items()}
              for model, records in results.items()}
    means = {model: averages({name: one["score"] for name, one in of.items() if one["score"] is not None})
             for model, of in scores.items()}
    return dict(models=list(results), scores=scores, averages=means,
                unparsed={model: np.mean([r["unparsed"] for r in of]) for model, of in results.items()},
                differences={f"{b} - {a}": compare(results[a], results[b])
                             for a, b in itertools.combinations(results, 2)})


def markdown(head, rows):
    rows = [head, ["---"] * len(head), *rows] if rows else []
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""] * bool(rows)


def table(results):
    """{model: records} -> Markdown: benchmarks by models with averages, differences with intervals, parts."""
    s = summary(results)
    models = s["models"]
    of = [s["scores"][m] for m in models]                  # of[i][benchmark]: one model's standing
    rows, seen = [], of[0]

    def mean(title, group):
        if group in s["averages"][models[0]]:
            count = s["averages"][models[0]][group][0]
            rows.append([f"{title} ({count})", ""] + [f"{s['averages'][m][group][1]:.2f}" for m in models])

    for group, heading in (("fine", "Fine-grained"), ("reasoning", "Reasoning")):
        here = [name for name in seen if BENCHMARKS[name].group == group]
        for title in dict.fromkeys(BENCHMARKS[name].title for name in here):
            names = [name for name in here if BENCHMARKS[name].title == title]
            cells = [[model[name]["score"] for name in names] for model in of]
            rows.append([title, sum(seen[name]["questions"] for name in names)]
                        + ["by type" if None in c else f"{np.mean(c):.1f}" for c in cells])
        mean(f"{heading} Avg.", group)
    mean("Avg.", "all")
    change = [s["differences"][f"{m} - {models[0]}"].get("avg all") for m in models[1:]]
    if change and change[0]:
        rows.append([f"Δ vs. {models[0]}", "", "-"] + [INTERVAL.format(*d) for d in change])
    rows.append(["unparsed, counted wrong", ""] + [f"{100 * s['unparsed'][m]:.1f} %" for m in models])
    return "\n".join(markdown(["", "n", *models], rows) + difference_table(s) + part_table(s))


INTERVAL = "{:+.2f} [{:+.2f}, {:+.2f}]"


def difference_table(s):
    """Every model against the first one and against its neighbour on the left."""
    models = s["models"]
    pairs = dict.fromkeys([f"{m} - {models[0]}" for m in models[1:]]
                          + [f"{b} - {a}" for a, b in zip(models, models[1:])])
    of = [s["differences"][pair] for pair in pairs]
    return markdown(["points, 95 % interval", *pairs],
                    [[key] + [INTERVAL.format(*d[key]) for d in of] for key in of[0]] if of else [])


def part_table(s):
    of, rows = [s["scores"][m] for m in s["models"]], []
    for name, seen in of[0].items():
        for part, one in seen["parts"].items() if len(seen["parts"]) > 1 else ():
            rows.append([f"{name}: {part}", one["questions"]]
                        + [f"{model[name]['parts'][part]['score']:.1f}" for model in of])
        if seen["coverage"] < 1:
            rows.append([f"{name}: coverage", seen["questions"]]
                        + [f"{100 * model[name]['coverage']:.1f} %" for model in of])
    return markdown(["part", "n", *s["models"]], rows)


# ---------------------------------------------------------------------------------------------------------
# The gallery


def gallery(results, path, k=8):
    """Writes a picture like Fig. 6: up to k questions on which the models differ; image, question, gold, and each
    model's answer in green or red. They are drawn evenly from the ways of differing, lest one student look worse than
    another; those ways come first in which the first model (the teacher) is right."""
    models, right, wrong, ways = list(results), (24, 118, 60), (186, 36, 36), {}
    for row in zip(*results.values()):
        scores = tuple(record["score"] for record in row)
        if len(set(scores)) > 1 and row[0]["image"]:
            ways.setdefault(scores, []).append(row)
    turns = itertools.zip_longest(*(ways[scores] for scores in sorted(ways, key=lambda s: (-s[0], sum(s)))))
    rows = [row for turn in turns for row in turn if row][:k]
    size, width = 170, 230 + 190 * max(2, len(models))
    sheet = Image.new("RGB", (width, max(1, len(rows)) * (size + 20) + 10), "white")
    pen, big, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)

    def write(x, y, text, font, fill, columns, lines):
        text = textwrap.wrap(str(text), columns, max_lines=lines, placeholder=" ...") or ["(nothing)"]
        pen.multiline_text((x, y), "\n".join(text), fill=fill, font=font, spacing=3)

    if not rows:
        pen.text((10, 10), "The models agree on every question.", fill="black", font=big)
    for i, row in enumerate(rows):
        top, image = 10 + i * (size + 20), picture(row[0]["image"][0])
        scale = size / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        sheet.paste(image, (10 + (size - image.width) // 2, top + (size - image.height) // 2))
        write(200, top, row[0]["question"], big, "black", (width - 210) // 8, 3)
        write(200, top + 66, f"gold: {row[0]['gold']}", big, "black", (width - 210) // 8, 1)
        for j, (name, record) in enumerate(zip(models, row)):
            x, colour = 200 + 190 * j, right if record["score"] >= 0.5 else wrong
            pen.rectangle([x, top + 92, x + 180, top + size], outline=colour, width=2)
            verdict = "right" if colour == right else "wrong"
            pen.text((x + 8, top + 97), f"{name}: {verdict}", fill=colour, font=small)
            write(x + 8, top + 116, record["answer"], big, colour, 20, 3)
        pen.line([10, top + size + 9, width - 10, top + size + 9], fill=(215, 215, 215))
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------
# Command line


def full_processor(folder):
    """A Processor that cuts no question short: training's caps are not for evaluation."""
    return Processor(folder, max_tokens=262144, max_text_tokens=262144, max_visual_tokens=HARNESS_TOKENS[1])


def kept_answers(file):
    """The records of an answers-MODEL.jsonl, but for a last line that was cut off."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as lines:
        whole = [line for line in lines if line.endswith("\n") and line.strip()]
    try:
        return [{k: v for k, v in json.loads(line).items() if k != "model"} for line in whole]
    except (ValueError, AttributeError):
        raise ValueError(f"{file} has a line that is no answer") from None


def write_answers(folder, model, records, mode="w"):
    with open(folder / f"answers-{model}.jsonl", mode, encoding="utf-8") as f:
        f.writelines(json.dumps({"model": model, **r}, ensure_ascii=False) + "\n" for r in records)


def report(results, folder):
    """Writes answers-MODEL.jsonl, results.json, results.md and gallery.png; prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in results.items():
        write_answers(folder, name, records)
    (folder / "results.json").write_text(json.dumps(summary(results), indent=1) + "\n")
    (folder / "results.md").write_text(text := table(results), encoding="utf-8")
    print(text + f"written to {folder}")
    if len(results) > 1:
        try:
            gallery(results, folder / "gallery.png")
        except OSError as error:                           # answers may be judged far from their images
            print(f"no gallery: {error}")


def rescored(files):
    """Records of answers-*.jsonl files, judged again -> {model: records}; says how many scores changed."""
    results = defaultdict(list)
    for file in files:
        for record in json_rows(file):
            if not {"model", "benchmark", "answer", "row"} <= set(record):
                raise ValueError(f"{file} is not a file of answers that this script wrote")
            results[record.pop("model")].append(record)
    new = {name: [judged(r) for r in records] for name, records in results.items()}
    changed = sum(a["score"] != b["score"] for name in new for a, b in zip(results[name], new[name]))
    print(f"{changed} of {sum(map(len, new.values()))} scores changed")
    return new


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", help="model folders, the teacher first")
    p.add_argument("--bench", action="append", default=[], metavar="NAME=PATH",
                   help=f"instead of the embedded suites; names: {', '.join(BENCHMARKS)}")
    p.add_argument("--n", type=int,
                   help="the first n questions of each (default: 500 embedded; all of a file)")
    p.add_argument("--seed", type=int, default=0, help="of the embedded world")
    p.add_argument("--page", type=int, default=10, help="cells on a side of an embedded page")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, help="a cap below each benchmark's own length")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32")
    p.add_argument("--out", type=Path, help="default: out/eval; of --rescore: where the first file is")
    p.add_argument("--resume", action="store_true", help="go on after the answers that --out holds")
    p.add_argument("--rescore", nargs="+", metavar="FILE", help="answers-*.jsonl to score again")
    a = p.parse_args(arguments)
    try:
        if a.rescore:
            if a.models or a.bench or len(set(a.rescore)) < len(a.rescore):
                p.error("--rescore takes files of answers, each once, and no models or benchmarks")
            return report(rescored(a.rescore), a.out or Path(a.rescore[0]).parent)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if not a.models:
        p.error("give at least one model folder")
    for flag, value in (("--n", a.n), ("--batch-size", a.batch_size), ("--max-new-tokens", a.max_new_tokens)):
        if value is not None and value < 1:
            p.error(f"{flag} must be at least 1, but is {value}")
    benches = {name: path or None for name, _, path in (b.partition("=") for b in a.bench)}
    for name, path in benches.items():
        if name not in BENCHMARKS or (path is None) != (name in EMBEDDED):
            p.error(f"--bench {name}: give NAME=PATH, or {' or '.join(EMBEDDED)} alone; the names are "
                    f"{', '.join(BENCHMARKS)}")
    folders = [Path(m).resolve() for m in a.models]
    if len(set(folders)) < len(folders) or len(benches) < len(a.bench):
        p.error("each model and each benchmark can be named once")
    names = [f.name if [g.name for g in folders].count(f.name) == 1 else str(m).strip("/").replace("/", "-")
             for f, m in zip(folders, a.models)]
    a.out = a.out or Path("out/eval")
    try:
        for folder in folders:                             # what is missing shows before the first answer
            Config.from_folder(folder)
            if (folder / "tokenizer.json").read_bytes() != (folders[0] / "tokenizer.json").read_bytes():
                raise ValueError(f"{folder} has another tokenizer.json than {folders[0]}: judge them one by one")
        device = device_of(a.device)
        results = evaluate_models(dict(zip(names, a.models)), full_processor(a.models[0]), a.n, benches, a.seed,
                                  a.batch_size, a.max_new_tokens, device, dtype_of(a.dtype, device), a.out,
                                  a.page, a.resume)
    except (BadSample, ValueError, OSError) as error:      # user errors end in a sentence, not a traceback
        sys.exit(str(error))
    report(results, a.out)


if __name__ == "__main__":
    main()
