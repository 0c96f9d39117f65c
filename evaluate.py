"""Answers and metrics: a table of teacher against students, as in the paper's Tables 1, 2 and 4 (Sect. 5, A.2, C.1).

    python evaluate.py tiny out/c3 out/c4                        the embedded world's suites, 500 questions each
    python evaluate.py TEACHER STUDENT --bench docvqa_val=DATA.parquet --bench ai2d=ROWS.jsonl --device cuda
    python evaluate.py --rescore out/eval/answers-*.jsonl        scores again, without a model
    python evaluate.py --lmms-eval --model qwen3_vl --model_args pretrained=out/c4 --tasks docvqa_val,chartqa

Prompts, answer lengths and metrics are those of lmms-eval 0.7.3 under its prompt key `qwen3_vl`. Two benchmarks that
it has judged by GPT are scored by rules here and say so; OCRBench v2 gets a score by type and a coverage instead of
a headline. Where lmms-eval draws a letter at random or takes the most similar choice, the answer counts as unparsed:
wrong, and the rate is shown. Every reply is greedy (C.1) and is kept with all that its metric needs.

From top to bottom: metrics (reply, row of the data set) -> Verdict; BENCHMARKS; reading; answering; the table with
paired bootstrap intervals; the gallery (Fig. 6); the plugin for lmms-eval itself.
"""
import argparse
import ast
import copy
import glob
import itertools
import json
import math
import re
import string
import sys
import textwrap
import types
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import Processor, Sample, collate
from model import Qwen3VL

# ---------------------------------------------------------------------------------------------------------
# Metrics: pure functions of a reply (stripped) and a row


class Verdict(NamedTuple):
    score: Optional[float]          # 0..1; None where this kind of question is not scored here
    parsed: Optional[str]           # what the metric read from the reply; None where it found nothing


def edits(a, b):
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def anls(reply, row):
    """1 - edit distance / length to the closest answer, 0 below 0.5. Lengths are taken before normalisation."""
    def far(answer):
        a, b = (" ".join(s.lower().split()) for s in (answer, reply))
        return edits(a, b) / max(len(answer.upper()), len(reply.upper()), 1)
    score = 1 - min(map(far, row["answers"]))
    return Verdict(score if score >= 0.5 else 0.0, reply or None)


def relaxed(reply, row):
    """ChartQA: numbers within 5 %, all else equal but for case. "50%" is 0.5, so it does not equal "50"."""
    def number(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None
    got, gold = number(reply), number(row["answer"])
    if got is not None and gold:
        return Verdict(float(abs(got - gold) / abs(gold) <= 0.05), reply)
    return Verdict(float(reply.lower() == row["answer"].lower()), reply or None)


# EvalAI's normaliser restores an apostrophe that was left out: "dont" -> "don't", "shouldnt've" -> "shouldn't've".
SHORT = ("ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
         "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
         "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
         "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
         "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
         "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
         "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll "
         "you're you've 'ow's'at").split()
APOSTROPHES = {word[:i] + word[i + 1:]: word for word in SHORT for i, c in enumerate(word) if c == "'"}
APOSTROPHES["somebody'd"] = "somebodyd"                    # the one entry that goes the other way
DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                  "0 0 1 2 3 4 5 6 7 8 9 10".split()))


def evalai(text):
    """EvalAI's answer normalisation, order of steps included."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    clean = text
    for mark in ";/[]\"{}()=+\\_-><@`!":                   # beside a space it goes, inside a word it parts
        clean = clean.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    clean = re.sub(r"\.(?!\d)", "", clean, count=32)       # 32: upstream passes re.UNICODE where the count belongs
    words = [DIGITS.get(word, word) for word in clean.split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(reply, row):
    """TextVQA: min(1, matches / 3), averaged over leaving out each of the ten answers in turn."""
    got, answers = evalai(reply), [evalai(a) for a in row["answers"]]
    equal, n = answers.count(got), len(answers)
    score = ((n - equal) * min(1, equal / 3) + equal * min(1, (equal - 1) / 3)) / n
    return Verdict(score, got or None)


def exact(reply, row):
    """The embedded world: equal but for white space."""
    got = " ".join(reply.split())
    return Verdict(float(got == " ".join(row["answer"].split())), got or None)


# -- multiple choice: four data sets, four ways of finding the letter

SAID = [f"{start}{noun} is" for noun, starts in (
    ("answer", ("", "the ", "correct ", "the correct ", "best ", "the best ")), ("choice", ("", "the ", "correct ",
    "the correct ")), ("option", ("correct ", "the correct ", "best ", "the best "))) for start in starts]
SAID += ["i choose", "i select", "i pick", "my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是",
         "答案为", "选", "答えは"]


def bare(reply, marks):
    for mark in marks:                                     # in this order: ".'" and "'." are not stripped alike
        reply = reply.strip(mark)
    return f" {reply} "


def ranked_letter(reply, choices):
    """The letter in the most telling form; among equals, the last one. "A cat is on the mat, D" gives A."""
    text = bare(reply.strip(), ",.!?;:'\"")
    core, low, found = text.strip(), text.lower(), []      # found: (rank, position, letter)
    for c in choices:
        found += [(rank, text.rfind(form), c) for rank, form in
                  ((6, f"({c})"), (5, f"{c}."), (4, f"{c}:"), (3, f"{c})"), (2, f"{c} "))]
        found += [(7, text.find(c, low.find(phrase) + len(phrase)), c) for phrase in SAID if phrase in low]
        if core.startswith(c) and not core[1:2].isalpha():
            found.append((10, 0, c))
        if core.endswith(c) and not core[-2:-1].isalpha():
            found.append((9, len(text), c))
    found = [f for f in found if f[1] >= 0] or [(0, text.rfind(c), c) for c in choices if c in text]
    return max(found)[2] if found else None


def mmstar(reply, row):
    got = ranked_letter(reply, "ABCD")
    return Verdict(float(got == row["answer"].strip().upper()), got)


def mmbench(reply, row):
    """MMBench's rules: a lone letter, a letter with punctuation, an option's text; then the ranked letter, as in
    lmms-eval's mmbench_en_dev_static, in place of the GPT judge."""
    options = {c: str(row.get(c, "nan")) for c in "ABCD" if row.get(c, "nan") is not None
               and row.get(c, "nan") == row.get(c, "nan")}             # only None and a float nan are left out
    words, got = set(reply.split()), None
    for before, after in [("", "")] + [("", s) for s in (".", ",", ":", ")", ").")] + [("(", ")"), ("(", ").")] + \
            [(":", s) for s in ("", ",", ".", ")", ").")]:
        hits = [c for c in "ABCDE" if before + c + after in words]
        article = not before + after and "A" in words and len(reply.split()) > 3
        if len(hits) == 1 and not article:
            got = hits[0]
            break
    if got is None:
        said = [c for c, text in options.items() if text.lower() in reply.lower()]
        got = said[0] if len(said) == 1 else ranked_letter(reply, sorted(options))
    return Verdict(float(got == row["answer"]), got)


def ai2d(reply, row):
    """A letter with a full stop at the start, or the letter alone, whatever its case and punctuation."""
    found = re.match(r"\s*([A-Z])\.", reply)
    got = (found[1] if found else reply).lower().translate(str.maketrans("", "", string.punctuation))
    letters = string.ascii_lowercase[:len(row["options"])]
    return Verdict(float(got == letters[int(row["answer"])]), got.upper() if got and got in letters else None)


def mmmu(reply, row):
    """MMMU-Pro, standard: (A), else "A ", else "A.", else in a longer reply an option's text; the last one counts."""
    options = dict(zip(string.ascii_uppercase, ast.literal_eval(row["options"])))
    text = bare(reply, ",.!?;:'")
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):        # upstream's own odd third row
        if hits := [c for c in options if form.format(c) in text]:
            where = [text.rfind(place.format(c)) for c in hits]
            break
    else:
        hits = [c for c, said in options.items() if len(text.split()) > 5 and said.lower() in text.lower()]
        where = [text.lower().rfind(options[c].lower()) for c in hits]
    got = hits[int(np.argmax(where))] if hits else None
    return Verdict(float(got == row["answer"]), got)


def mmmu_vision(reply, row):
    return Verdict(float(reply == row["answer"]), reply if re.fullmatch("[A-J]", reply) else None)


def mathvista(reply, row):
    """Typed equality. lmms-eval has GPT reduce a reply to a value first; here the reply must be one: a choice or its
    letter, or a number. Its fall-back, the most similar choice, is a guess and counts as unparsed."""
    kind, got = row["answer_type"], None
    if row["question_type"] == "multi_choice":
        by_letter = dict(zip(string.ascii_uppercase, row["choices"]))
        inside = re.search(r"\(([a-zA-Z])\)", reply)
        said = inside[1].upper() if inside else reply
        ahead = None if inside else re.match(r"([A-Z])[.:)]", reply)
        got = by_letter.get(said) or (said if said in row["choices"] else by_letter.get(ahead[1]) if ahead else None)
    elif kind in ("integer", "float"):
        try:
            got = str(int(float(reply)) if kind == "integer" else round(float(reply), int(row["precision"])))
        except (ValueError, OverflowError):
            got = None
    else:
        got = reply or None
    return Verdict(float(got is not None and got.strip() == str(row["answer"]).strip()), got)


# -- OCRBench v2: a table of its own, by type of question


def flat(text):
    return text.strip().replace("\n", " ")


def tight(text):
    return flat(text).replace(" ", "")


def untagged(text):
    return tight(re.sub(r"\\text\{([^{}]*)\}", r"\1", text))


def contains(reply, answers, clean, parts=lambda a: 0, few=1):
    """1 if an answer of fewer than `few` parts is in the reply ("1" is in "12345"); longer ones by ANLS >= 0.5."""
    best, reply = 0.0, clean(reply)
    for answer in (clean(str(a)) for a in answers):
        if parts(answer) < few:
            best = max(best, float(answer in reply))
        else:
            alike = 1 - edits(reply, answer) / max(len(reply), len(answer), 1)
            best = max(best, alike if alike >= 0.5 else 0.0)
    return best


def ocr_vqa(reply, row, chinese=False):
    answers = row["answers"]
    if row.get("eval") == "multiple choice":
        return float("".join(filter(str.isalpha, reply)) == answers[0])
    if row.get("eval") == "case sensitive":
        return contains(reply, answers, flat, lambda a: len(a.split()), 5)
    if chinese:
        return contains(reply, answers, lambda s: tight(s.lower()), lambda a: len(a.split(",")), 4)
    return contains(reply, answers, lambda s: flat(s.lower()), lambda a: len(a.split()), 5)


def ocr_counting(reply, row):
    """Exact: the answer is in the reply. Regression: 1 - relative error of the reply's first number, if above 0.5."""
    answers = [flat(str(a).lower()) for a in row["answers"]]
    if row["eval"] == "exact match":
        return max(float(a in reply) for a in answers)
    first = re.search(r"\d+", reply)
    n = int(first[0]) if first and row["eval"] == "regression" else 0
    alike = [1 - abs(n - int(a)) / int(a) if 0 < n < 2 * int(a) else 0.0 for a in answers]
    return max(s if s > 0.5 else 0.0 for s in alike)


def fields_of(reply):
    """A reply's key-value pairs: JSON or a Python dict, fenced or not, else whatever looks like `key: value`."""
    fence = re.search(r"```(?:python|json)?\n(.*?)\n```", reply, re.DOTALL | re.IGNORECASE)
    text = fence[1] if fence else reply.strip()
    for parse in (json.loads, ast.literal_eval):
        try:
            got = parse(text)
            break
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            got = re.findall(r"""([\w\s]+)["']?\s*[:=]\s*["']?([^\n,"'{}]+)""", text)
            got = {key.strip(): value for key, value in got}
    if not isinstance(got, dict) or not all(isinstance(key, str) for key in got):
        return {}
    return {key.strip(): str(value).strip() for key, value in got.items()}


def ocr_fields(reply, row):
    """Key information: the share of all keys, named or asked for, whose value is one of the accepted ones."""
    gold = row["answers"][0]
    if isinstance(gold, str):
        try:
            gold = json.loads(gold.strip('"'))
        except ValueError:
            gold = ast.literal_eval(gold.strip('"'))
    accepted = {key: [tight(str(v).lower()) for v in (values if isinstance(values, list) else [values])]
                for key, values in gold.items()}
    got = {key: tight(value.lower()) for key, value in fields_of(reply).items()}
    keys = set(accepted) | set(got)
    return sum(key in got and got[key] in accepted.get(key, ()) for key in keys) / max(len(keys), 1)


def iou(a, b):
    try:
        a, b = ([int(v) for v in box] for box in (a, b))
    except (TypeError, ValueError):
        return 0.0
    w, h = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - w * h
    return w * h / union if union else 0.0


def ocr_position(reply, row):
    got, at = fields_of(reply), 0.0
    try:
        at = iou(ast.literal_eval(got["bbox"]), row["bbox"])
    except (KeyError, ValueError, SyntaxError, TypeError, IndexError):
        pass
    return 0.5 * ("answer" in got and ocr_vqa(got["answer"], {"answers": row["answers"]})) + 0.5 * at


def ocr_grounding(reply, row):
    number = r"\s*(\d+)\s*"
    boxes = re.findall(rf"[(\[]{number},{number},{number},{number}[)\]]", reply)
    boxes = [box for box in boxes if all(int(v) <= 1000 for v in box)]
    return iou(boxes[-1], row["answers"]) if boxes else 0.0


def ocr_handwritten(reply, row):
    """None for open answers (BLEU and METEOR); else the letters of the answer, in one of ten ways of listing them."""
    if "简答" in row["question"]:
        return None
    return max(float(by.join(row["answers"][0]) in reply)
               for by in ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和"))


OCR_TYPES = {
    **dict.fromkeys(["APP agent en", "ASCII art classification en", "math QA en", "reasoning VQA en", "diagram QA en",
                     "science QA en", "text recognition en", "document classification en", "cognition VQA en"],
                    ocr_vqa),
    **dict.fromkeys(["cognition VQA cn", "reasoning VQA cn"], lambda reply, row: ocr_vqa(reply, row, chinese=True)),
    **dict.fromkeys(["key information extraction en", "key information mapping en", "key information extraction cn"],
                    ocr_fields),
    "handwritten answer extraction cn": ocr_handwritten,
    "formula recognition en": lambda reply, row: contains(reply, row["answers"], tight),
    "formula recognition cn": lambda reply, row: contains(reply, row["answers"], untagged),
    "text counting en": ocr_counting,
    "VQA with position en": ocr_position,
    "text grounding en": ocr_grounding,
}       # the other types: tables and charts (TEDS), documents, whole pages and translation (BLEU, METEOR), spotting


def ocrbench(reply, row):
    score = OCR_TYPES.get(row["type"], lambda *_: None)(reply, row)
    return Verdict(score, reply or None)


# ---------------------------------------------------------------------------------------------------------
# The benchmarks: one row each

LETTER = "Answer with the option's letter from the given choices directly"
SINGLE = "\nAnswer the question using a single word or phrase."
SYSTEM = "You are a helpful assistant."                    # lmms-eval's, before every question but the embedded ones
HARNESS_PIXELS = (256 * 28 * 28, 1605632)                  # its least and greatest image


def listed(options):
    return "\n".join(f"{c}. {text}" for c, text in zip(string.ascii_uppercase, options))


def ask_mmmu(row):
    start = f"Question: {row['question']}" if "question" in row else \
        "Question: analyze the image and answer the associated question."
    return f"{start}\nOptions:\n{listed(ast.literal_eval(row['options']))}\nAnswer with the option letter only."


def mmmu_images(row):
    named = set(re.findall(r"<image (\d+)>", row["question"] + row["options"]))
    return [f"image_{i}" for i in sorted(named)]


def ask_mmbench(row):
    options = {c: row[c] for c in "ABCDE" if row.get(c) and row[c] == row[c] and row[c] != "nan"}
    hint = row.get("hint")
    hint = f"{hint} " if hint is not None and hint == hint and hint != "nan" else ""
    choices = "\n".join(["There are several options:"] + [f"{c}. {text}" for c, text in options.items()])
    return f"{hint}{row['question']} {choices}\n\n{LETTER}."


def ask_mathvista(row):
    places = {1: "one decimal place", 2: "two decimal places"}.get(int(row.get("precision") or 0))
    hint = f"{LETTER}." if row["question_type"] == "multi_choice" else {
        "integer": "Answer the question using a single integer number.",
        "float": f"Answer the question using a single floating-point number with {places}.",
        "list": "Answer the question using a Python list."}[row["answer_type"]]
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    return "\n".join(s for s in (row["question"] + unit, listed(row["choices"] or ()), hint) if s).strip()


@dataclass(frozen=True)
class Benchmark:
    title: str                                             # of the table's row; MMMU-Pro's two halves share one
    group: str                                             # fine or reasoning (Sect. 5.1)
    new_tokens: int
    metric: Callable                                       # (reply, row) -> Verdict
    keep: str                                              # the columns the metric reads
    ask: Callable = None                                   # row -> prompt
    images: Callable = lambda row: ["image"]               # row -> columns
    id: str = ""                                           # column; the line number where there is none
    part: Callable = None                                  # row -> name of a part that is also scored alone
    overall: str = "mean"                                  # or parts: their mean; circular; types: no overall score
    gold: Callable = lambda row: row.get("answers", row.get("answer"))


def single(title, **more):
    return Benchmark(title, "fine", 32, anls, "answers", lambda row: row["question"] + SINGLE, **more)


BENCHMARKS = {
    "reading": Benchmark("reading", "fine", 16, exact, "answer"),
    "ocrbench_v2": Benchmark("OCRBench v2", "fine", 128, ocrbench, "type question answers eval bbox",
                             lambda row: row["question"].strip(), id="id", part=lambda row: row["type"],
                             overall="types"),
    "docvqa_val": single("DocVQA", id="questionId"),
    "chartqa": Benchmark("ChartQA", "fine", 16, relaxed, "answer",
                         lambda row: row["question"] + "\nAnswer the question with a single word.",
                         part=lambda row: "human" if row["type"] == "human_test" else "augmented"),
    "textvqa_val": Benchmark("TextVQA", "fine", 128, vqa_accuracy, "answers",
                             lambda row: row["question"].capitalize() + SINGLE, id="question_id"),
    "infovqa_val": single("InfoVQA", id="questionId"),
    "ai2d": Benchmark("AI2D", "fine", 16, ai2d, "options answer",
                      lambda row: f"{row['question']}\n{listed(row['options'])}\n{LETTER}.",
                      gold=lambda row: string.ascii_uppercase[int(row["answer"])]),
    "reasoning": Benchmark("reasoning", "reasoning", 16, exact, "answer"),
    "mmmu_pro_standard": Benchmark("MMMU-Pro", "reasoning", 256, mmmu, "options answer", ask_mmmu, mmmu_images, id="id",
                                   part=lambda row: "standard"),
    "mmmu_pro_vision": Benchmark("MMMU-Pro", "reasoning", 256, mmmu_vision, "answer", ask_mmmu, id="id",
                                 part=lambda row: "vision"),
    "mmstar": Benchmark("MMStar", "reasoning", 128, mmstar, "answer",
                        lambda row: "Question: " + row["question"].strip().replace(" Please answer yes or no.", "")
                        + "Answer with the option letter only.", id="index", part=lambda row: row["l2_category"],
                        overall="parts"),
    "mmbench_en_dev": Benchmark("MMBench (no judge)", "reasoning", 1024, mmbench, "A B C D answer", ask_mmbench,
                                id="index", overall="circular"),
    "mathvista_testmini": Benchmark("MathVista (no judge)", "reasoning", 16384, mathvista,
                                    "question_type answer_type choices precision answer", ask_mathvista,
                                    lambda row: ["decoded_image"], id="pid"),
}
EMBEDDED = ("reading", "reasoning")


# ---------------------------------------------------------------------------------------------------------
# Reading: a benchmark's questions as (record, Sample)


def rows_of(path):
    """Yields (row, reference) from a JSONL or parquet file, a folder or a pattern. Raises FileNotFoundError."""
    found = sorted(glob.glob(f"{path}/*" if Path(path).is_dir() else str(path)))
    files = [f for f in found if f.endswith((".jsonl", ".parquet"))]
    if not files:
        raise FileNotFoundError(f"{path} has no .jsonl or .parquet file")
    for file in files:
        if file.endswith(".jsonl"):
            with open(file, encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
        else:
            import pyarrow.parquet                         # optional: only for parquet
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=32)
            rows = (row for batch in batches for row in batch.to_pylist())
        for i, row in enumerate(rows):
            yield row, f"{file}#{i}"


def opened(cell, folder):
    """An image cell (path, bytes, or the {"bytes", "path"} of a parquet file) -> RGB, as lmms-eval converts it."""
    cell = cell.get("bytes") or cell["path"] if isinstance(cell, dict) else cell
    return Image.open(BytesIO(cell) if isinstance(cell, bytes) else Path(folder) / cell).convert("RGB")


def picture(reference):
    """The image that a record names: FILE#ROW#COLUMN, or synthdoc:SUITE:SEED:INDEX."""
    if reference.startswith("synthdoc:"):
        from synthdoc import World
        _, suite, seed, index = reference.split(":")
        return World("eval", int(seed), suite)[int(index)].images[0]
    file, row, column = reference.rsplit("#", 2)
    cell = next(itertools.islice(rows_of(file), int(row), None))[0][column]
    return opened(cell, Path(file).parent)


def embedded_questions(suite, n, seed):
    from synthdoc import World
    world = World("eval", seed, suite)
    for i in range(n or 500):
        sample = world[i]
        prompt, gold = sample.messages[0], sample.messages[1]["content"][0]["text"]        # the first question only
        yield dict(benchmark=suite, id=sample.id, part=sample.source, image=[f"synthdoc:{suite}:{seed}:{i}"],
                   question="".join(p.get("text", "") for p in prompt["content"]), gold=gold, row={"answer": gold}), \
            Sample(sample.id, [prompt], sample.images, sample.source)


def file_questions(name, path, n):
    """The first n rows (None: all). Images come before the text, as in lmms-eval.

    Raises ValueError naming the columns that a row lacks."""
    bench = BENCHMARKS[name]
    for number, (row, reference) in enumerate(itertools.islice(rows_of(path), n)):
        try:
            text, columns = bench.ask(row), bench.images(row)
            images = [opened(row[c], Path(reference).parent) for c in columns]
            record = dict(benchmark=name, id=str(row.get(bench.id, number)), part=bench.part and bench.part(row),
                          image=[f"{reference}#{c}" for c in columns], question=text, gold=bench.gold(row),
                          row={c: row[c] for c in bench.keep.split() if c in row or c not in ("eval", "bbox", *"ABCD")})
        except KeyError as lacking:
            raise ValueError(f"{reference}: {name} needs a column {lacking}, the row has {sorted(row)}") from None
        messages = [("system", [{"type": "text", "text": SYSTEM}]),
                    ("user", [{"type": "image"}] * len(images) + [{"type": "text", "text": text}])]
        yield record, Sample(record["id"], [dict(role=r, content=c) for r, c in messages], images, name)


# ---------------------------------------------------------------------------------------------------------
# Answering


@torch.inference_mode()
def answer(model, processor, samples, batch_size=16, max_new_tokens=32, label="answers"):
    """Greedy replies to a list of samples whose last turn is the user's, in their order.

    Rows of like length share a batch, longest first: the fewest padded positions, and what does not fit in memory
    fails at once. A batch may mix image sizes and samples without an image. Raises data.BadSample."""
    device, replies = next(model.parameters()).device, [""] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: -processor.length(samples[i], add_generation_prompt=True))
    for at in tqdm(range(0, len(order), batch_size), desc=label, leave=False, disable=None):
        rows = order[at:at + batch_size]
        batch = collate([processor.encode(samples[i], add_generation_prompt=True) for i in rows], processor.pad_id,
                        side="left").to(device)
        ids = model.generate(batch.ids, None if batch.mask.all() else batch.mask, batch.pixels, batch.grids,
                             max_new_tokens=max_new_tokens)
        for i, tokens in zip(rows, ids):
            replies[i] = processor.decode(tokens)
    return replies


def judged(record):
    """A record with `answer`, scored: adds parsed, unparsed, score. Needs no model."""
    score, parsed = BENCHMARKS[record["benchmark"]].metric(record["answer"].strip(), record["row"])
    if parsed is None and score is not None:
        score = 0.0
    return {**record, "parsed": parsed, "unparsed": parsed is None, "score": score}


def evaluate_models(models, processor, n=None, benches=None, seed=0, batch_size=16, max_new_tokens=None,
                    device="cpu", dtype=None):
    """Asks every model the same questions.

    models: {name: Qwen3VL, or a folder that is loaded when its turn comes}. benches: {benchmark: path, or None for an
    embedded suite}, by default both suites. n: questions per benchmark (None: 500 embedded, all of a file).
    max_new_tokens: a cap below each benchmark's own. Returns {name: [records]}, what `table` and `gallery` take."""
    results, benches = {}, benches or dict.fromkeys(EMBEDDED)
    for model_name, model in models.items():
        if not isinstance(model, torch.nn.Module):
            model = Qwen3VL.from_pretrained(model, dtype=dtype, device=device)
        was_training, records = model.training, []
        model.eval()
        for name, path in benches.items():
            eyes = copy.copy(processor)
            if path is not None:
                eyes.min_pixels, eyes.max_pixels = HARNESS_PIXELS
            asked = file_questions(name, path, n) if path is not None else embedded_questions(name, n, seed)
            cap = min(BENCHMARKS[name].new_tokens, max_new_tokens or math.inf)
            while window := list(itertools.islice(asked, 8 * batch_size)):         # as many images as are held at once
                replies = answer(model, eyes, [s for _, s in window], batch_size, cap, f"{model_name} {name}")
                records += [judged({**record, "answer": reply}) for (record, _), reply in zip(window, replies)]
        model.train(was_training)
        results[model_name] = records
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
        raise ValueError(f"a paired comparison needs the same questions: one model has {len(a.ids)}, the other "
                         f"{len(b.ids)}, {len(set(a.ids) & set(b.ids))} in common")
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
    groups = {g: [v for (group, _), v in rows.items() if g in (group, "all")] for g in ("fine", "reasoning")}
    groups["all"] = list(rows.values())
    return {g: (len(v), sum(v) / len(v)) for g, v in groups.items() if v}


def by_benchmark(records):
    groups = {name: [r for r in records if r["benchmark"] == name] for name in BENCHMARKS}
    return {name: group for name, group in groups.items() if group}


def compare(first, second, draws=2000, seed=0):
    """Two models' records -> {benchmark or average: (second - first, low, high)} in points, 95 % intervals."""
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


def summary(results):
    """{model: records} -> everything the table shows, as one dict for JSON; scores in 0..100."""
    out = dict(models=list(results), benchmarks={}, averages={}, unparsed={}, differences={})
    for model, records in results.items():
        values = {}
        for name, group in by_benchmark(records).items():
            bench, t = BENCHMARKS[name], tally(group, BENCHMARKS[name].overall)
            entry = out["benchmarks"].setdefault(name, dict(title=bench.title, group=bench.group, models={}))
            parts = defaultdict(list)
            for r in group:
                if r["part"] is not None and r["score"] is not None:
                    parts[r["part"]].append(r["score"])
            score = float(t.weights @ t.scores) if bench.overall != "types" and t.ids else None
            entry["models"][model] = dict(
                score=None if score is None else 100 * score, questions=len(group),
                coverage=sum(r["score"] is not None for r in group) / len(group),
                unparsed=sum(r["unparsed"] for r in group) / len(group),
                parts={p: dict(score=100 * sum(s) / len(s), questions=len(s)) for p, s in sorted(parts.items())})
            if score is not None:
                values[name] = 100 * score
        out["averages"][model] = {g: dict(benchmarks=n, score=v) for g, (n, v) in averages(values).items()}
        out["unparsed"][model] = sum(r["unparsed"] for r in records) / max(len(records), 1)
    for a, b in itertools.combinations(results, 2):
        out["differences"][f"{b} - {a}"] = compare(results[a], results[b])
    return out


def table(results):
    """{model: records} -> Markdown: benchmarks by models, averages, differences with intervals, parts, coverage."""
    s = summary(results)
    models, first = s["models"], s["models"][0]
    lines = ["| | n | " + " | ".join(models) + " |", "|---" * (len(models) + 2) + "|"]

    def put(title, n, cells):
        lines.append(f"| {title} | {n} | " + " | ".join(cells) + " |")

    def average(title, group):
        if group in s["averages"][first]:
            put(f"{title} ({s['averages'][first][group]['benchmarks']})", "",
                [f"{s['averages'][m][group]['score']:.2f}" for m in models])

    for group, heading in (("fine", "Fine-grained"), ("reasoning", "Reasoning")):
        titles = dict.fromkeys(b["title"] for b in s["benchmarks"].values() if b["group"] == group)
        if titles:
            put(f"*{heading}*", "", [""] * len(models))
        for title in titles:
            both = [b["models"] for b in s["benchmarks"].values() if b["title"] == title]
            cells = [[b[m]["score"] for b in both] for m in models]
            put(title, sum(b[first]["questions"] for b in both),
                ["by type" if None in c else f"{sum(c) / len(c):.1f}" for c in cells])
        average(f"{heading} Avg.", group)
    average("Avg.", "all")
    for other in models[1:] if "all" in s["averages"][first] else ():
        change = {m: s["differences"][f"{m} - {first}"]["avg all"] for m in models[1:]}
        put(f"Δ vs. {first}", "", ["-"] + ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*change[m]) for m in models[1:]])
        break
    put("unparsed, counted wrong", "", [f"{100 * s['unparsed'][m]:.1f} %" for m in models])
    return "\n".join(lines + differences_table(s) + parts_table(s)) + "\n"


def differences_table(s):
    """Every model against the first, and against its neighbour on the left, benchmark by benchmark."""
    models = s["models"]
    pairs = dict.fromkeys([f"{m} - {models[0]}" for m in models[1:]]
                          + [f"{b} - {a}" for a, b in zip(models, models[1:])])
    if not pairs:
        return []
    names = {"avg fine": "Fine-grained Avg.", "avg reasoning": "Reasoning Avg.", "avg all": "Avg."}
    lines = ["", "| points, 95 % interval | " + " | ".join(pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    return lines + [f"| {names.get(key, key)} | " + " | ".join(
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(*s["differences"][p][key]) for p in pairs) + " |"
        for key in s["differences"][next(iter(pairs))]]


def parts_table(s):
    models, lines = s["models"], []
    for name, entry in s["benchmarks"].items():
        one = entry["models"][models[0]]
        for part, of in one["parts"].items() if len(one["parts"]) > 1 else ():
            cells = [f"{entry['models'][m]['parts'][part]['score']:.1f}" for m in models]
            lines.append(f"| {name}: {part} | {of['questions']} | " + " | ".join(cells) + " |")
        if one["coverage"] < 1:
            lines.append(f"| {name}: coverage | {one['questions']} | " + " | ".join(
                f"{100 * entry['models'][m]['coverage']:.1f} %" for m in models) + " |")
    return ["", "| part | n | " + " | ".join(models) + " |", "|---" * (len(models) + 2) + "|"] + lines if lines else []


# ---------------------------------------------------------------------------------------------------------
# The gallery


def gallery(results, path, k=8):
    """Writes a picture like Fig. 6: up to k questions on which the models differ, those first that the first model
    (the teacher) gets right; image, question, gold, and each model's answer in green or red."""
    models, right, wrong = list(results), (24, 118, 60), (186, 36, 36)
    rows = [r for r in zip(*results.values()) if len({m["score"] for m in r}) > 1 and r[0]["image"]]
    rows = sorted(rows, key=lambda r: (-r[0]["score"], sum(m["score"] for m in r)))[:k]
    size, width = 170, 230 + 190 * max(2, len(models))
    sheet = Image.new("RGB", (width, max(1, len(rows)) * (size + 20) + 10), "white")
    pen, big, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)

    def write(x, y, text, font, fill, columns, lines):
        text = textwrap.wrap(str(text), columns) or ["(nothing)"]
        pen.multiline_text((x, y), "\n".join(text[:lines - 1] + [" ".join(text[lines - 1:])[:columns]]).strip(),
                           fill=fill, font=font, spacing=3)

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
            pen.text((x + 8, top + 97), f"{name}: {'right' if colour == right else 'wrong'}", fill=colour, font=small)
            write(x + 8, top + 116, record["answer"], big, colour, 20, 3)
        pen.line([10, top + size + 9, width - 10, top + size + 9], fill=(215, 215, 215))
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------
# The plugin: this project's models inside lmms-eval


def lmms_eval_manifest():
    """lmms-eval's ModelManifest for these models; also fit to be an entry point of the group `lmms_eval.models`
    (`heed = "evaluate:lmms_eval_manifest"`). It takes the place of `qwen3_vl`, since lmms-eval picks a task's prompt
    by the model's registered name: so teacher, students and the paper's own harness see one and the same prompt.

    --model_args: pretrained=FOLDER, dtype, min_pixels, max_pixels, system_prompt."""
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest

    class Chat(lmms):
        is_simple = False

        def __init__(self, pretrained, batch_size=1, device="cuda", dtype="bfloat16", system_prompt=SYSTEM,
                     min_pixels=HARNESS_PIXELS[0], max_pixels=HARNESS_PIXELS[1], max_batch_size=None):
            super().__init__()
            self.device, self.batch_size, self.system_prompt = torch.device(device), int(batch_size), system_prompt
            self.model = Qwen3VL.from_pretrained(pretrained, dtype=getattr(torch, dtype), device=device)
            self.processor = full_processor(pretrained)
            self.processor.min_pixels, self.processor.max_pixels = int(min_pixels), int(max_pixels)

        def sample(self, turns):
            """Turns [(role, [PIL image or text])] -> Sample, the images before the text as they come."""
            turns = ([("system", [self.system_prompt])] if self.system_prompt else []) + turns
            content = [[{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
                       for _, parts in turns]
            images = [p.convert("RGB") for _, parts in turns for p in parts if not isinstance(p, str)]
            return Sample("request", [dict(role=r, content=c) for (r, _), c in zip(turns, content)], images)

        def turns(self, make, doc, context, **again):
            """A document's turns: `make` is doc_to_messages of a chat model, or doc_to_visual of a simple one."""
            if self.is_simple:
                return [("user", [*(make(doc) or []), context.replace("<image>", "")])]
            return [(m["role"], [p["text"] if p["type"] == "text" else p["url"] for p in m["content"]])
                    for m in make(doc, **again)]

        def reply(self, asked):
            """[(turns, generation settings)] -> replies, batched by length limit. Greedy whatever the task asks."""
            out, limits = [None] * len(asked), [settings.get("max_new_tokens", 128) for _, settings in asked]
            for limit in sorted(set(limits)):
                rows = [i for i, x in enumerate(limits) if x == limit]
                for i, text in zip(rows, answer(self.model, self.processor, [self.sample(asked[i][0]) for i in rows],
                                                self.batch_size, limit, "lmms-eval")):
                    stops = asked[i][1].get("until") or [] if self.is_simple else []
                    for stop in [stops] if isinstance(stops, str) else stops:
                        text = text.split(stop)[0] if stop not in ("", "\n\n") else text
                    out[i] = text
            return out

        def generate_until(self, requests):
            asked = []
            for context, a, b, doc_id, task, split in (r.args for r in requests):
                make, settings = (b, a) if self.is_simple else (a, b)
                asked.append((self.turns(make, self.task_dict[task][split][doc_id], context), settings))
            return self.reply(asked)

        def generate_until_multi_round(self, requests):
            """One conversation at a time: the task makes each next round from the replies so far, until it stops."""
            out = []
            for request in requests:
                *_, doc_id, task, split = request.args
                context, a, b = request.args[:3]
                make, again, settings = (b, request.args[3], a) if self.is_simple else (a, a, b)
                doc, said, info = self.task_dict[task][split][doc_id], [], None
                turns = self.turns(make, doc, context)
                while True:
                    said.append(self.reply([(turns, settings)])[0])
                    new = again(doc, round_idx=len(said), previous_output=list(said), previous_round_info=info)
                    if not isinstance(new, tuple) or new[-3]:                      # a task of one round, or the end
                        said = list(new[-2] or said) if isinstance(new, tuple) else said
                        break
                    said, info = list(new[-2] or said), new[-1]
                    turns = self.turns(lambda _: new[0], doc, new[1] if self.is_simple else "")
                out.append(said)
            return out

        @torch.inference_mode()
        def loglikelihood(self, requests):
            """(mean negative log-likelihood of the continuation, is it the greedy one), as lmms-eval's models do."""
            out = []
            for context, target, visual, doc_id, task, split in (r.args for r in requests):
                doc = self.task_dict[task][split][doc_id]
                target = target if isinstance(target, str) else target(doc)
                sample = self.sample([("user", [*(visual(doc) or []), context.replace("<image>", "")])])
                batch = collate([self.processor.encode(sample.answered([{"type": "text", "text": target}]))],
                                self.processor.pad_id).to(self.device)
                logits, labels = self.model(batch.ids, None, batch.pixels, batch.grids)[:, :-1], batch.labels[:, 1:]
                logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
                out.append((torch.nn.functional.cross_entropy(logits, labels).item(),
                            bool((logits.argmax(-1) == labels).all())))
            return out

    class Simple(Chat):
        is_simple = True

    home = sys.modules["heed_lmms_eval"] = types.ModuleType("heed_lmms_eval")          # where the registry looks
    home.Chat, home.Simple = Chat, Simple
    return ModelManifest("qwen3_vl", simple_class_path="heed_lmms_eval.Simple", chat_class_path="heed_lmms_eval.Chat")


def run_lmms_eval(arguments):
    """lmms-eval's own command line, with our models registered. Hugging Face's package `evaluate`, which lmms-eval
    imports, has this file's name: so this folder leaves the search path while it is looked up."""
    here = Path(__file__).resolve().parent
    path = sys.path[:]
    sys.path[:] = [p for p in path if Path(p or ".").resolve() != here]
    from lmms_eval.cli.dispatch import main as lmms_eval_main
    from lmms_eval.models import MODEL_REGISTRY_V2
    sys.path[:] = path
    MODEL_REGISTRY_V2.register_manifest(lmms_eval_manifest(), overwrite=True)
    sys.argv = ["lmms-eval", *arguments]
    lmms_eval_main()


# ---------------------------------------------------------------------------------------------------------
# Command line


def full_processor(folder):
    """A Processor that cuts no question short: training's caps are not for evaluation."""
    return Processor(folder, max_tokens=262144, max_text_tokens=262144)


def report(results, folder):
    """Writes answers-MODEL.jsonl, results.json, results.md and gallery.png; prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in results.items():
        with open(folder / f"answers-{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"model": name, **r}, ensure_ascii=False) + "\n" for r in records)
    (folder / "results.json").write_text(json.dumps(summary(results), indent=1) + "\n")
    (folder / "results.md").write_text(text := table(results), encoding="utf-8")
    if len(results) > 1:
        gallery(results, folder / "gallery.png")
    print(text + f"written to {folder}")


def rescored(files):
    """Records of answers-*.jsonl files, judged again -> {model: records}; says how many scores changed."""
    results = defaultdict(list)
    for file in files:
        for line in open(file, encoding="utf-8"):
            record = json.loads(line)
            results[record.pop("model")].append(record)
    new = {name: [judged(r) for r in records] for name, records in results.items()}
    changed = sum(a["score"] != b["score"] for name in new for a, b in zip(results[name], new[name]))
    print(f"{changed} of {sum(map(len, new.values()))} scores changed")
    return new


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--lmms-eval" in arguments:
        return run_lmms_eval([a for a in arguments if a != "--lmms-eval"])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", help="model folders, the teacher first")
    p.add_argument("--bench", action="append", default=[], metavar="NAME=PATH", help=f"instead of the embedded suites: "
                   f"{', '.join(n for n in BENCHMARKS if n not in EMBEDDED)}")
    p.add_argument("--n", type=int, help="the first n questions of each (default: 500 embedded ones, all of a file)")
    p.add_argument("--seed", type=int, default=0, help="of the embedded world")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, help="a cap below each benchmark's own length")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    p.add_argument("--out", type=Path, default=Path("out/eval"))
    p.add_argument("--rescore", nargs="+", metavar="FILE", help="answers-*.jsonl to score again")
    a = p.parse_args(arguments)
    if a.rescore:
        return report(rescored(a.rescore), a.out)
    if not a.models:
        p.error("give at least one model folder")
    benches = dict(b.split("=", 1) if "=" in b else (b, None) for b in a.bench) or None
    if wrong := [n for n, path in (benches or {}).items() if n not in BENCHMARKS or (path is None) != (n in EMBEDDED)]:
        p.error(f"{wrong[0]}: give NAME=PATH with one of {', '.join(BENCHMARKS)} (no path for {' and '.join(EMBEDDED)})")
    names = [Path(m).name for m in a.models]
    names = [m.strip("/") .replace("/", "-") if names.count(n) > 1 else n for m, n in zip(a.models, names)]
    results = evaluate_models(dict(zip(names, a.models)), full_processor(a.models[0]), a.n, benches, a.seed,
                              a.batch_size, a.max_new_tokens, a.device, a.dtype and getattr(torch, a.dtype))
    report(results, a.out)


if __name__ == "__main__":
    main()
