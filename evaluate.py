"""Answers and metrics: teacher against students, as in the paper's Tables 1, 2 and 4 (Sect. 5, C.1).

    python evaluate.py tiny out/c3 out/c4                the embedded world, 500 questions a suite
    python evaluate.py TEACHER STUDENT --bench docvqa_val=DATA.parquet --bench ai2d=ROWS.jsonl
    python evaluate.py TEACHER STUDENT --resume          goes on after an interruption
    python evaluate.py --rescore out/eval/answers-*.jsonl      scores again, without a model

From top to bottom: questions, answers, the table with paired bootstrap intervals, the gallery
(Fig. 6); prompts and metrics are in parts/benchmarks.py. A record is one answer of one model, a
dict: benchmark, id, part, question, image (references), gold, row (what the metric reads), run,
answer, parsed, unparsed, score (0..1; None where this kind of question is not scored).
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import BadSample, Sample, collate, processor_of
from model import Config, Qwen3VL, device_of, dtype_of
from parts import images
from parts.benchmarks import BENCHMARKS, EMBEDDED, HARNESS_TOKENS, SYSTEM
from synthdoc import World

# ---- Questions: a benchmark's rows as (record, Sample) -------------------------------------------


def json_rows(file):
    """The objects of a JSONL file. Raises ValueError that names the line which is none."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise ValueError(f"{file} line {number} is not a JSON object")
                yield row


def parquet_rows(file):
    try:
        import pyarrow.parquet                             # optional: only for parquet
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=32):
            yield from batch.to_pylist()
    except (ImportError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from None


def read_rows(path):
    """Yields (row, FILE#NUMBER) of JSONL or parquet: a file, a folder or a pattern."""
    pattern = f"{path}/*" if Path(path).is_dir() else str(path)
    files = [str(path)] if Path(path).is_file() else sorted(glob(pattern))
    files = [file for file in files if file.endswith((".jsonl", ".parquet"))]
    if not files:
        raise FileNotFoundError(f"{path} has no .jsonl or .parquet file")
    for file in files:
        rows = json_rows(file) if file.endswith(".jsonl") else parquet_rows(file)
        for number, row in enumerate(rows):
            yield row, f"{file}#{number}"


def read_image(cell, folder):
    """A row's image (a path, bytes, or parquet's {"bytes", "path"}) -> RGB, upright."""
    cell = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(cell, (str, bytes)):
        raise ValueError(f"{cell!r} is neither a path nor a file's bytes")
    source = BytesIO(cell) if isinstance(cell, bytes) else Path(folder) / cell
    return images.read_image(source, on_white=False)       # transparent pixels as in lmms-eval


def find_image(reference):
    """The image that a record names: FILE#ROW#COLUMN, or synthdoc:SUITE:SEED:PAGE:INDEX."""
    if reference.startswith("synthdoc:"):
        _, suite, *numbers = reference.split(":")
        seed, page, index = map(int, numbers)
        return World("eval", seed, suite, (page, page))[index].images[0]
    file, number, column = reference.rsplit("#", 2)
    row, _ = next(itertools.islice(read_rows(file), int(number), None))
    return read_image(row[column], Path(file).parent)


def embedded_questions(suite, n, seed, page):
    """The first question of each page of `page` x `page` cells, with its picture."""
    world = World("eval", seed, suite, (page, page))
    for i in range(n or 500):
        sample = world[i]
        prompt, gold = sample.messages[0], sample.messages[1]["content"][0]["text"]
        record = dict(benchmark=suite, id=sample.id, part=sample.source,
                      image=[f"synthdoc:{suite}:{seed}:{page}:{i}"],
                      question="".join(part.get("text", "") for part in prompt["content"]),
                      gold=gold, row={"answer": gold})
        yield record, Sample(sample.id, [prompt], sample.images, sample.source)


def file_questions(name, path, n):
    """The first n rows (None: all). Images come before the text, as in lmms-eval.

    Raises ValueError that names the row, and the column that it lacks."""
    for number, (row, place) in enumerate(itertools.islice(read_rows(path), n)):
        try:
            record, cells = file_record(name, row, number, place)
        except KeyError as lacking:
            raise ValueError(f"{place}: {name} needs a column {lacking}, "
                             f"not in {sorted(row)}") from None
        except Exception as error:                         # a row may hold anything
            raise ValueError(f"{place} is no question of {name}: {error}") from None
        try:
            shown = [read_image(cell, Path(place).parent) for cell in cells]
        except ValueError as error:
            raise ValueError(f"{place}: its image cannot be read: {error}") from None
        content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": record["question"]}]
        messages = [dict(role="system", content=[{"type": "text", "text": SYSTEM}]),
                    dict(role="user", content=content)]
        yield record, Sample(record["id"], messages, shown, name, where=place)


def file_record(name, row, number, place):
    """A row -> its record, and its image cells."""
    bench = BENCHMARKS[name]
    if not isinstance(row.get("question", ""), str):
        raise TypeError(f"its question is {row['question']!r}")
    question, columns = bench.ask(row), bench.images(row)
    cells = [row[column] for column in columns]
    kept = [c.rstrip("?") for c in bench.keep.split() if c[-1] != "?" or c[:-1] in row]
    kept = {column: row[column] for column in kept}
    if isinstance(kept.get("answers"), str):
        kept["answers"] = [kept["answers"]]
    record = dict(benchmark=name, id=str(row.get(bench.id, number)), part=bench.part(row),
                  question=question, image=[f"{place}#{column}" for column in columns],
                  gold=bench.gold(row), row=kept)
    # What cannot be scored, merged with its rotated copies or written shows before it is asked.
    bench.metric("", kept)
    tally([{**record, "score": 0.0}], bench.overall)
    json.dumps(record, ensure_ascii=False).encode()
    return record, cells


# ---- Answers -------------------------------------------------------------------------------------


def full_processor(folder):
    """A Processor that cuts no question short: training's caps are not for evaluation."""
    return processor_of(folder, max_tokens=262144, max_text_tokens=262144,
                        max_visual_tokens=HARNESS_TOKENS[1])


def harness_processor(processor):
    """The same with lmms-eval's bounds on an image, for questions from files."""
    return processor.bounded(*HARNESS_TOKENS)


def answer(model, processor, samples, batch_size=16, max_new_tokens=32, label="answers",
           eager=False):
    """Greedy replies to a list of samples whose last turn is the user's, in their order.

    A batch may mix image sizes, and samples without an image. eager: without CUDA graphs.
    Raises data.BadSample."""
    device, replies = next(model.parameters()).device, [""] * len(samples)
    graph = {"graph": False} if eager else {}
    # Rows of like length share a batch: few padded positions. The longest come first: what does
    # not fit in memory fails at once.
    lengths = [processor.length(sample, add_generation_prompt=True) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: -lengths[i])
    for start in tqdm(range(0, len(order), batch_size), desc=label, leave=False, disable=None):
        rows = order[start:start + batch_size]
        encoded = [processor.encode(samples[i], add_generation_prompt=True) for i in rows]
        batch = collate(encoded, processor.pad_id, side="left").to(device)
        mask = None if batch.mask.all() else batch.mask
        ids = model.generate(batch.ids, mask, batch.pixels, batch.grids,
                             max_new_tokens=max_new_tokens, **graph)
        for i, tokens in zip(rows, ids):
            replies[i] = processor.decode(tokens)
    return replies


def with_score(record):
    """A record with its `answer` -> parsed, unparsed and score added. Needs no model."""
    metric = BENCHMARKS[record["benchmark"]].metric
    score, parsed = metric(record["answer"].strip(), record["row"])
    return {**record, "parsed": parsed, "unparsed": parsed is None, "score": score}


def evaluate_models(models, processor, n=None, benches=None, seed=0, batch_size=16,
                    max_new_tokens=None, device="cpu", dtype=None, keep=None, page=10,
                    resume=False, eager=False):
    """Asks every model the same questions. Returns {name: [records]}, what `table` takes.

    models: {name: a Qwen3VL, or a folder that is loaded when its turn comes}.
    benches: {benchmark: path, or None for an embedded suite}, by default reading and reasoning.
    n: questions of each (None: 500 embedded ones, all of a file). page: cells on a page's side.
    max_new_tokens: a cap below each benchmark's own. eager: without CUDA graphs.
    keep: a folder in which answers-MODEL.jsonl grows as replies come, for they may take hours.
    resume: go on after the answers in `keep`; ValueError if they are to other questions."""
    benches, results = benches or dict.fromkeys(EMBEDDED[:2]), {}
    for name, path in benches.items():             # a missing column shows before the first answer
        if path is not None and next(file_questions(name, path, 1), None) is None:
            raise ValueError(f"{path} has no row")
    answered = {name: resumed_answers(keep, name, benches) if resume else [] for name in models}
    for model_name, model in models.items():
        weights = ""
        if not isinstance(model, torch.nn.Module):
            weights = fingerprint(model, dtype)
            model = Qwen3VL.from_pretrained(model, dtype=dtype, device=device)
        if keep and not resume:                    # not before a model could be loaded
            write_answers(keep, model_name, [])
        was_training, results[model_name] = model.training, []
        model.eval()
        for name, path in benches.items():
            limit = min(BENCHMARKS[name].new_tokens, max_new_tokens or math.inf)
            questions = (embedded_questions(name, n, seed, page) if path is None else
                         file_questions(name, path, n))
            sees = processor if path is None else harness_processor(processor)
            run, label = f"{weights} {limit}", f"{model_name}: {name}"
            records = [r for r in answered[model_name] if r["benchmark"] == name]
            skip_answered(questions, records, run, keep)
            while window := list(itertools.islice(questions, 8 * batch_size)):     # images at once
                asked, samples = zip(*window)
                replies = answer(model, sees, samples, batch_size, limit, label, eager)
                new = [with_score({**record, "run": run, "answer": reply})
                       for record, reply in zip(asked, replies)]
                records += new
                if keep:
                    write_answers(keep, model_name, new, append=True)
            results[model_name] += records
        model.train(was_training)
    return results


def fingerprint(folder, dtype):
    """A mark of a folder's weights, by size and time, and of their precision."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
             for file in sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256(repr((files, dtype)).encode()).hexdigest()[:12]


def resumed_answers(folder, model, benches):
    """A model's records in `folder`, which must be to `benches`. Cuts off an unfinished line."""
    file = folder / f"answers-{model}.jsonl"
    if not file.exists():
        return []
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    records = [record for record, _ in read_answers(file)]
    if others := {record["benchmark"] for record in records} - set(benches):
        raise ValueError(f"{folder} holds answers to {', '.join(sorted(others))} too: ask for all "
                         "of it, or choose another --out")
    return records


def skip_answered(questions, old, run, folder):
    """Takes the questions that the records `old` answer off the front.

    Raises ValueError where a record answers another question, or was made by another run."""
    for record in old:
        asked, _ = next(questions, ({"id": None}, None))   # None: there are fewer questions now
        asked = {**asked, "run": run}                      # as JSON, where NaN equals NaN
        if any(json.dumps(record.get(key)) != json.dumps(asked[key]) for key in asked):
            raise ValueError(f"{folder} holds an answer to another question, or of other weights "
                             f"or settings, than {record['model']} has here ({record['benchmark']} "
                             f"{record['id']}): go on with the same, or start anew without "
                             "--resume")


def read_answers(file):
    """Yields the records of an answers-MODEL.jsonl, scored anew, and whether a score changed."""
    fields = {"model", "benchmark", "id", "part", "question", "image", "gold", "row", "answer"}
    for record in json_rows(file):
        try:
            if not fields <= set(record) or "/" in record["model"]:     # it becomes a file's name
                raise ValueError
            new = with_score(record)
        except Exception:                                  # a row may hold anything
            raise ValueError(f"{file} is not a file of answers that this script wrote") from None
        yield new, new["score"] != record.get("score")


def write_answers(folder, model, records, append=False):
    folder.mkdir(parents=True, exist_ok=True)
    file, new = folder / f"answers-{model}.jsonl", folder / f"answers-{model}.new"
    with open(file if append else new, "a" if append else "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"model": model, **record}, ensure_ascii=False) + "\n"
                         for record in records)
    if not append:                                 # whole or not at all: hours may be in it
        os.replace(new, file)


# ---- The table: scores, paired differences, parts ------------------------------------------------


class Tally(NamedTuple):
    ids: list
    scores: np.ndarray              # (n,) in 0..1
    weights: np.ndarray             # (n,), sum 1: the benchmark's score is weights @ scores
    parts: np.ndarray               # (n,) str: resampling keeps the size of each


def tally(records, overall):
    """The scored questions of one benchmark and one model, each with its weight in the score."""
    scored = [r for r in records if r["score"] is not None]
    if overall == "circular":       # copies of a question with rotated options must all be right
        least = {}
        for r in scored:
            key = str(int(r["id"]) % 10 ** 6)              # copies are 1e6 apart
            least[key] = min(r["score"], least.get(key, 1.0))
        scored = [dict(id=key, score=score) for key, score in least.items()]
    parts = [str(r["part"]) if overall == "parts" else "" for r in scored]
    sizes = Counter(parts)
    weights = [1 / (len(sizes) * sizes[part]) for part in parts]
    return Tally([r["id"] for r in scored], np.array([r["score"] for r in scored], float),
                 np.array(weights), np.array(parts))


def resample(a, b, draws, seed):
    """Paired bootstrap: (draws,) differences b - a of two tallies, resampled within parts."""
    if a.ids != b.ids:
        raise ValueError(f"a paired comparison needs the same questions: one model has "
                         f"{len(a.ids)}, the other {len(b.ids)}, {len(set(a.ids) & set(b.ids))} in "
                         "common")
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    gain = a.weights * (b.scores - a.scores)
    for part in sorted(set(a.parts)):
        values = gain[a.parts == part]
        total += [values[rng.integers(0, len(values), len(values))].sum() for _ in range(draws)]
    return total


def averages(values):
    """{benchmark: number or array} -> {fine, reasoning, all: (count, mean)} of the table's rows."""
    rows, groups = defaultdict(list), defaultdict(list)
    for name, value in values.items():                     # MMMU-Pro's two halves are one row
        rows[BENCHMARKS[name].group, BENCHMARKS[name].title].append(value)
    for (group, _), halves in rows.items():
        for g in (group, "all"):
            groups[g].append(sum(halves) / len(halves))
    return {g: (len(groups[g]), sum(groups[g]) / len(groups[g]))
            for g in ("fine", "reasoning", "all") if g in groups}


def by_benchmark(records):
    groups = {name: [r for r in records if r["benchmark"] == name] for name in BENCHMARKS}
    return {name: group for name, group in groups.items() if group}


def compare(first, second, draws=2000, seed=0):
    """Two models' records -> {benchmark or average: (second - first, low, high)}, in points.

    low and high bound the 95 % interval."""
    first, second, changes = by_benchmark(first), by_benchmark(second), {}
    if list(first) != list(second):
        raise ValueError(f"the models answered {list(first)} and {list(second)}")
    for name in first:
        if all(r["score"] is not None for r in first[name] + second[name]):
            a, b = (tally(of[name], BENCHMARKS[name].overall) for of in (first, second))
            drawn = resample(a, b, draws, [seed, zlib.crc32(name.encode())])
            changes[name] = np.append(b.weights @ b.scores - a.weights @ a.scores, drawn)
    # Averages are linear: of the differences themselves, which stand first, and of every draw.
    changes.update({f"avg {group}": mean for group, (_, mean) in averages(changes).items()})
    return {key: tuple(100 * float(x) for x in (change[0], *np.percentile(change[1:], (2.5, 97.5))))
            for key, change in changes.items()}


def benchmark_summary(name, records):
    """One model on one benchmark -> overall score and those of the parts, 0..100; coverage."""
    t, parts = tally(records, BENCHMARKS[name].overall), defaultdict(list)
    for r in records:
        if None not in (r["part"], r["score"]):
            parts[r["part"]].append(r["score"])
    coverage = np.mean([r["score"] is not None for r in records])
    return dict(score=100 * float(t.weights @ t.scores) if coverage == 1 else None,
                questions=len(records), coverage=coverage,
                missing=sorted({str(r["part"]) for r in records if r["score"] is None}),
                unparsed=np.mean([r["unparsed"] for r in records]),
                parts={part: dict(score=100 * np.mean(scores), questions=len(scores))
                       for part, scores in sorted(parts.items())})


def summary(results):
    """{model: records} -> everything that the table shows, as one dict for JSON."""
    s = dict(models=list(results), scores={}, averages={}, unparsed={}, differences={})
    for model, records in results.items():
        one = {name: benchmark_summary(name, rs) for name, rs in by_benchmark(records).items()}
        means = averages({name: of["score"] for name, of in one.items() if of["score"] is not None})
        s["scores"][model], s["averages"][model] = one, means
        s["unparsed"][model] = np.mean([r["unparsed"] for r in records])
    for a, b in itertools.combinations(results, 2):
        s["differences"][f"{b} - {a}"] = compare(results[a], results[b])
    return s


def table(results):
    """{model: records} -> Markdown: benchmarks by models with averages, differences, parts."""
    s, lines = summary(results), []
    for head, *rows in (score_rows(s), difference_rows(s), part_rows(s)):
        if rows:
            rows = [head, ["---"] * len(head), *rows]
            lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]
    return "\n".join(lines)


INTERVAL = "{:+.2f} [{:+.2f}, {:+.2f}]"


def score_rows(s):
    models, scores, means = s["models"], s["scores"], s["averages"]
    first, rows = models[0], [["", "n", *models]]
    for group, heading in (("fine", "Fine-grained "), ("reasoning", "Reasoning "), ("all", "")):
        names = [name for name in scores[first] if BENCHMARKS[name].group == group]
        for title in dict.fromkeys(BENCHMARKS[name].title for name in names):
            halves = [name for name in names if BENCHMARKS[name].title == title]
            cells = [[scores[m][name]["score"] for name in halves] for m in models]
            rows.append([title, sum(scores[first][name]["questions"] for name in halves)]
                        + ["by type" if None in c else f"{np.mean(c):.1f}" for c in cells])
        if group in means[first]:
            rows.append([f"{heading}Avg. ({means[first][group][0]})", ""]
                        + [f"{means[m][group][1]:.2f}" for m in models])
    gains = [s["differences"][f"{m} - {first}"].get("avg all") for m in models[1:]]
    if gains and gains[0]:
        rows.append([f"Δ vs. {first}", "", "-"] + [INTERVAL.format(*gain) for gain in gains])
    unparsed = [f"{100 * s['unparsed'][m]:.1f} %" for m in models]
    return rows + [["unparsed, counted wrong", "", *unparsed]]


def difference_rows(s):
    """Every model against the first one and against its neighbour on the left."""
    first, *others = s["models"]
    pairs = [f"{m} - {first}" for m in others] + [f"{b} - {a}" for a, b in zip(others, others[1:])]
    changes = [s["differences"][pair] for pair in pairs]
    rows = [["points, 95 % interval", *pairs]]
    for key in changes[0] if changes else ():
        rows.append([key] + [INTERVAL.format(*change[key]) for change in changes])
    return rows


def part_rows(s):
    models, rows = [s["scores"][m] for m in s["models"]], [["part", "n", *s["models"]]]
    for name, first in models[0].items():
        for part, one in first["parts"].items() if len(first["parts"]) > 1 else ():
            rows.append([f"{name}: {part}", one["questions"]]
                        + [f"{of[name]['parts'][part]['score']:.1f}" for of in models])
        if first["coverage"] < 1:
            rows.append([f"{name}: coverage", first["questions"]]
                        + [f"{100 * of[name]['coverage']:.1f} %" for of in models])
            rows.append([f"{name}: not scored: {', '.join(first['missing'])}", ""]
                        + [len(of[name]["missing"]) for of in models])
    return rows


# ---- The galleries: where the models disagree, and what all students fail ------------------------


def disagreements(results, k):
    """Up to k questions, each as a record of every model, drawn evenly from the ways of differing,
    lest one student look worse than another. Those in which the first model is right come first."""
    ways = defaultdict(list)
    for row in zip(*results.values()):
        scores = tuple(record["score"] for record in row)
        if len(set(scores)) > 1 and row[0]["image"]:
            ways[scores].append(row)
    order = sorted(ways, key=lambda scores: (-scores[0], sum(scores)))
    turns = itertools.zip_longest(*(ways[scores] for scores in order))
    return [row for turn in turns for row in turn if row][:k]


def joint_failures(results, k=50):
    """Up to k questions that every model but the first gets wrong, evenly from all of them; A.10
    sorts fifty by hand."""
    rows = [row for row in zip(*results.values())
            if row[0]["image"] and all(record["score"] == 0 for record in row[1:])]
    return [rows[i * len(rows) // k] for i in range(k)] if len(rows) > k else rows


def write_failures(models, rows, path):
    """A line for each question, with its answers and an empty "kind", which a person fills in."""
    with open(path, "w") as file:
        for row in rows:
            first, answers = row[0], {m: record["answer"] for m, record in zip(models, row)}
            line = dict(kind="", part=first["part"], question=first["question"],
                        gold=first["gold"], answers=answers, id=first["id"])
            file.write(json.dumps(line) + "\n")


def gallery(models, rows, path):
    """Writes a picture like Fig. 6, a question a row: image, question, gold, and each model's answer
    in green (right) or red. rows: each a record of every model."""
    side, width = 170, 230 + 190 * max(2, len(models))     # of an image; of the sheet
    sheet = Image.new("RGB", (width, max(1, len(rows)) * (side + 20) + 10), "white")
    pen, big, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)

    def write(x, y, text, fill, columns, lines):
        text = textwrap.wrap(str(text), columns, max_lines=lines, placeholder=" ...")
        pen.multiline_text((x, y), "\n".join(text or ["(nothing)"]), fill=fill, font=big, spacing=3)

    if not rows:
        pen.text((10, 10), "There is no such question.", fill="black", font=big)
    for i, row in enumerate(rows):
        top, image = 10 + i * (side + 20), find_image(row[0]["image"][0])
        scale = side / max(image.size)
        image = image.resize([max(1, round(length * scale)) for length in image.size],
                             Image.Resampling.LANCZOS)
        sheet.paste(image, (10 + (side - image.width) // 2, top + (side - image.height) // 2))
        write(200, top, row[0]["question"], "black", (width - 210) // 8, 3)
        write(200, top + 66, f"gold: {row[0]['gold']}", "black", (width - 210) // 8, 1)
        for x, model, record in zip(itertools.count(200, 190), models, row):
            right = record["score"] >= 0.5
            colour, verdict = ((24, 118, 60), "right") if right else ((186, 36, 36), "wrong")
            pen.rectangle([x, top + 92, x + 180, top + side], outline=colour, width=2)
            pen.text((x + 8, top + 97), f"{model}: {verdict}", fill=colour, font=small)
            write(x + 8, top + 116, record["answer"], colour, 20, 3)
        pen.line([10, top + side + 9, width - 10, top + side + 9], fill=(215, 215, 215))
    sheet.save(path)


# ---- Command line --------------------------------------------------------------------------------


def report(results, folder):
    """Writes answers-MODEL.jsonl, results.json, results.md, and of several models gallery.png and
    failures.png with failures.jsonl; prints the table."""
    for name, records in results.items():
        write_answers(folder, name, records)
    (folder / "results.json").write_text(json.dumps(summary(results), indent=1) + "\n")
    (folder / "results.md").write_text(text := table(results), encoding="utf-8")
    print(text + f"written to {folder}")
    if len(results) > 1:
        models, failures = list(results), joint_failures(results)
        write_failures(models, failures, folder / "failures.jsonl")
        try:
            gallery(models, disagreements(results, 8), folder / "gallery.png")
            gallery(models, failures, folder / "failures.png")
        except Exception as error:                 # answers may be scored far from their images
            print(f"no gallery: {error}")


def rescored(files):
    """answers-*.jsonl files -> {model: records}, scored anew; says how many scores changed."""
    results, pairs = defaultdict(list), [pair for file in files for pair in read_answers(file)]
    if not pairs:
        raise ValueError(f"{', '.join(files)}: no answers")
    for record, _ in pairs:
        results[record["model"]].append(record)
    print(f"{sum(changed for _, changed in pairs)} of {len(pairs)} scores changed")
    return results


def named_folders(models):
    """Paths of model folders -> {name: path}, by as much of the path as tells them apart.

    Raises ValueError, before anything is loaded, where one is no model or they cannot be compared."""
    folders = [Path(m).resolve() for m in models]
    for folder in folders:
        Config.from_folder(folder)
        if (folder / "tokenizer.json").read_bytes() != (folders[0] / "tokenizer.json").read_bytes():
            raise ValueError(f"{folder} has another tokenizer.json than {folders[0]}: judge them "
                             "one by one")
    last = [folder.name for folder in folders]
    return {name if last.count(name) == 1 else str(m).strip("/").replace("/", "-"): m
            for name, m in zip(last, models)}


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", help="model folders, the teacher first")
    p.add_argument("--bench", action="append", default=[], metavar="NAME=PATH",
                   help=f"instead of the embedded suites; names: {', '.join(BENCHMARKS)}")
    p.add_argument("--n", type=int, help="the first n questions of each (default: 500 embedded; "
                   "all of a file)")
    p.add_argument("--seed", type=int, default=0, help="of the embedded world")
    p.add_argument("--page", type=int, default=10, help="cells on a side of an embedded page")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, help="a cap below each benchmark's own length")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                   help="default: bfloat16 on cuda, else float32")
    p.add_argument("--eager", action="store_true", help="decode without CUDA graphs")
    p.add_argument("--out", type=Path,
                   help="default: out/eval; of --rescore: where the first file is")
    p.add_argument("--resume", action="store_true", help="go on after the answers that --out holds")
    p.add_argument("--rescore", nargs="+", metavar="FILE", help="answers-*.jsonl to score again")
    return p


def main(arguments=None):
    p = flags()
    a = p.parse_args(arguments)
    if a.rescore and (a.models or a.bench or len(set(a.rescore)) < len(a.rescore)):
        p.error("--rescore takes files of answers, each once, and no models or benchmarks")
    if not a.rescore and not a.models:
        p.error("give at least one model folder")
    for name, least in dict(n=1, batch_size=1, max_new_tokens=1, seed=0).items():
        if (value := getattr(a, name)) is not None and value < least:
            p.error(f"--{name.replace('_', '-')} must be at least {least}, but is {value}")
    benches = {name: path or None for name, _, path in (b.partition("=") for b in a.bench)}
    for name, path in benches.items():
        if name not in BENCHMARKS or (path is None) != (name in EMBEDDED):
            p.error(f"--bench {name}: give NAME=PATH, or {' or '.join(EMBEDDED)} alone; the names "
                    f"are {', '.join(BENCHMARKS)}")
    if len({Path(m).resolve() for m in a.models}) < len(a.models) or len(benches) < len(a.bench):
        p.error("each model and each benchmark can be named once")
    try:
        if a.rescore:
            results, folder = rescored(a.rescore), a.out or Path(a.rescore[0]).parent
        else:
            folder, device = a.out or Path("out/eval"), device_of(a.device)
            results = evaluate_models(
                named_folders(a.models), full_processor(a.models[0]), a.n, benches, a.seed,
                a.batch_size, a.max_new_tokens, device, dtype_of(a.dtype, device), folder, a.page,
                a.resume, a.eager)
        report(results, folder)
    except (BadSample, ValueError, OSError) as error:      # user errors end in a sentence
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; with --resume the same command goes on after the last answers")


if __name__ == "__main__":
    main()
