"""The benchmarks of Sect. 5.1: how each asks, and how it scores a reply. Nothing to run here; evaluate.py asks.

Prompts, answer lengths and metrics are those of lmms-eval 0.7.3 under its prompt key `qwen3_vl`. Where it has
GPT judge (MMBench, MathVista), rules score here and the title says so; OCRBench v2 gets a score by type and a
coverage instead of a headline. Where lmms-eval draws a letter at random or takes the most similar choice, the answer
is unparsed: wrong, and the rate is shown.

From top to bottom: metrics, (reply, row of the data set) -> Verdict; then BENCHMARKS, a row for each.
"""
import ast
import functools
import json
import re
import string
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

import numpy as np

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
    """1 - edit distance / length to the closest answer, 0 below 0.5. Lengths: before normalisation."""
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


# EvalAI's normaliser restores an apostrophe that was left out: "dont" -> "don't", "yall'll" -> "y'all'll".
SHORT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll
    they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've 'ow's'at""".split()
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
    clean = re.sub(r"\.(?!\d)", "", clean, count=32)       # 32 is re.UNICODE, passed where the count belongs
    words = [DIGITS.get(word, word) for word in clean.split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(reply, row):
    """TextVQA: min(1, matches / 3), averaged over leaving out each of the ten answers in turn."""
    got, answers = evalai(reply), [evalai(a) for a in row["answers"]]
    equal, n = answers.count(got), len(answers)
    score = ((n - equal) * min(1, equal / 3) + equal * min(1, (equal - 1) / 3)) / n
    return Verdict(score, got if reply else None)


def exact(reply, row):
    """The embedded world: equal but for white space."""
    got = " ".join(reply.split())
    return Verdict(float(got == " ".join(row["answer"].split())), got or None)


# -- multiple choice: four data sets, four ways of finding the letter

SAID = ["answer is", "the answer is", "correct answer is", "the correct answer is", "best answer is",
        "the best answer is", "correct option is", "the correct option is", "best option is",
        "the best option is", "choice is", "the choice is", "correct choice is", "the correct choice is",
        "my answer is", "my choice is", "i choose", "i select", "i pick", "옵션", "정답은", "답은",
        "답:", "答案是", "答案为", "选", "答えは"]
BESIDE = "X X. X, X: X) X). (X) (X). :X :X, :X. :X) :X).".split()      # MMBench's ways of writing a letter X


def bare(reply, marks):
    for mark in marks:                                     # one after the other, so ".'" and "'." differ
        reply = reply.strip(mark)
    return f" {reply} "


def ranked_letter(reply, choices):
    """The letter in the most telling form; among equals, the last one. "A cat is on the mat, D" gives A."""
    text = bare(reply.strip(), ",.!?;:'\"")
    core, low, found = text.strip(), text.lower(), []      # found: (rank, position, letter)
    for c in choices:
        found += [(rank, text.rfind(form), c)
                  for rank, form in ((6, f"({c})"), (5, f"{c}."), (4, f"{c}:"), (3, f"{c})"), (2, f"{c} "))]
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


def given(value):
    """A cell that is neither None nor a float nan."""
    return value is not None and value == value


def mmbench(reply, row):
    """MMBench's rules: a letter, alone or punctuated, else an option's text; then the ranked letter in place
    of GPT (lmms-eval's mmbench_en_dev_static). A missing option is the text "nan", and may be found."""
    options = {c: str(row.get(c, "nan")) for c in "ABCD" if given(row.get(c, "nan"))}
    words = reply.split()
    for form in BESIDE:
        hits = [c for c in "ABCDE" if form.replace("X", c) in words]
        article = form == "X" and "A" in words and len(words) > 3
        if len(hits) == 1 and not article:
            return Verdict(float(hits[0] == row["answer"]), hits[0])
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
    """MMMU-Pro, standard: (A), else "A ", else "A.", else, in a longer reply, an option's text. The last
    counts, and of letters with a full stop the last that also stands alone."""
    options = dict(zip(string.ascii_uppercase, ast.literal_eval(row["options"])))
    text = bare(reply, ",.!?;:'")
    for form, place in (("(X)", "(X)"), ("X ", " X "), ("X.", " X ")):     # found by, ordered by
        if hits := [c for c in options if form.replace("X", c) in text]:
            where = [text.rfind(place.replace("X", c)) for c in hits]
            break
    else:
        hits = [c for c, said in options.items() if len(text.split()) > 5 and said.lower() in text.lower()]
        where = [text.lower().rfind(options[c].lower()) for c in hits]
    got = hits[int(np.argmax(where))] if hits else None
    return Verdict(float(got == row["answer"]), got)


def mmmu_vision(reply, row):
    return Verdict(float(reply == row["answer"]), reply if re.fullmatch("[A-J]", reply) else None)


def mathvista(reply, row):
    """Typed equality. lmms-eval has GPT reduce a reply to a value first; here the reply must be one: a choice
    or its letter, or a number. Its fall-back, the most similar choice, is a guess and counts as unparsed."""
    kind, got = row["answer_type"], None
    if row["question_type"] == "multi_choice":
        by_letter = dict(zip(string.ascii_uppercase, row["choices"]))
        inside = re.search(r"\(([a-zA-Z])\)", reply)
        said = inside[1].upper() if inside else reply
        ahead = None if inside else re.match(r"([A-Z])[.:)]", reply)
        got = by_letter.get(said) or (said if said in row["choices"] else None)
        got = by_letter.get(ahead[1]) if got is None and ahead else got
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
    """1 if an answer of fewer than `few` parts is in the reply ("1" is in "12345"); else by ANLS."""
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
    """Exact: the answer is in the reply. Regression: 1 - relative error of its first number, if above 0.5."""
    answers = [flat(str(a).lower()) for a in row["answers"]]
    if row["eval"] == "exact match":
        return max(float(a in reply) for a in answers)
    first = re.search(r"\d+", reply)
    n = int(first[0]) if first and row["eval"] == "regression" else 0
    alike = [1 - abs(n - int(a)) / int(a) if 0 < n < 2 * int(a) else 0.0 for a in answers]
    return max(s if s > 0.5 else 0.0 for s in alike)


def fields_of(reply):
    """A reply's key-value pairs: JSON or a Python dict, fenced or not, else what looks like `key: value`."""
    fence = re.search(r"```(?:python|json)?\n(.*?)\n```", reply, re.DOTALL | re.IGNORECASE)
    text = fence[1] if fence else reply.strip()
    for parse in (json.loads, ast.literal_eval):
        try:
            got = parse(text)
            break
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            got = re.findall(r"""([\w\s]+)(?:["']\s*)?[:=]\s*["']?([^\n,"'{}]+)""", text)
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
    except (TypeError, ValueError, OverflowError):
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
    """None for open answers (BLEU, METEOR); else the answer's letters, in one of ten ways of listing them."""
    if "简答" in row["question"]:
        return None
    return max(float(by.join(row["answers"][0]) in reply)
               for by in ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和"))


OCR_TYPES = {
    **dict.fromkeys(["APP agent en", "ASCII art classification en", "math QA en", "reasoning VQA en",
                     "science QA en", "text recognition en", "document classification en", "cognition VQA en",
                     "diagram QA en"], ocr_vqa),
    **dict.fromkeys(["cognition VQA cn", "reasoning VQA cn"], functools.partial(ocr_vqa, chinese=True)),
    **dict.fromkeys(["key information extraction en", "key information mapping en",
                     "key information extraction cn"], ocr_fields),
    "handwritten answer extraction cn": ocr_handwritten,
    "formula recognition en": lambda reply, row: contains(reply, row["answers"], tight),
    "formula recognition cn": lambda reply, row: contains(reply, row["answers"], untagged),
    "text counting en": ocr_counting,
    "VQA with position en": ocr_position,
    "text grounding en": ocr_grounding,
}       # not scored: tables, charts, documents (tree distances), whole pages, translation (METEOR), spotting


def ocrbench(reply, row):
    score = OCR_TYPES.get(row["type"], lambda *_: None)(reply, row)
    return Verdict(score, reply or None)


# ---------------------------------------------------------------------------------------------------------
# The benchmarks: one row each

LETTER = "Answer with the option's letter from the given choices directly"
ONLY = "Answer with the option letter only."
SINGLE = "\nAnswer the question using a single word or phrase."
SYSTEM = "You are a helpful assistant."                    # lmms-eval's; the embedded world has none
HARNESS_TOKENS = (4, 16384)                                # of its least and greatest image, before the model's own


def listed(options):
    return "\n".join(f"{c}. {text}" for c, text in zip(string.ascii_uppercase, options))


def ask_mmmu(row):
    start = f"Question: {row['question']}" if "question" in row else \
        "Question: analyze the image and answer the associated question."
    return f"{start}\nOptions:\n{listed(ast.literal_eval(row['options']))}\n{ONLY}"


def mmmu_images(row):
    named = set(re.findall(r"<image (\d+)>", row["question"] + row["options"]))
    return [f"image_{i}" for i in sorted(named)]


def ask_mmbench(row):
    options = [f"{c}. {row[c]}" for c in "ABCDE" if row.get(c) and given(row[c]) and row[c] != "nan"]
    hint = f"{row['hint']} " if given(row.get("hint")) and row["hint"] != "nan" else ""
    choices = "\n".join(["There are several options:"] + options)
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
    title: str                          # of the table's row; MMMU-Pro's two halves share one
    group: str                          # fine or reasoning (Sect. 5.1)
    new_tokens: int                     # lmms-eval's; 128 is its Qwen3-VL default where a task names none
    metric: Callable                    # (reply, row) -> Verdict
    keep: str                           # the columns that the metric reads; "?" where they may be absent
    ask: Callable = None                # row -> prompt
    id: str = ""                        # column; else the line number
    images: Callable = lambda row: ["image"]               # row -> columns
    part: Callable = lambda row: None                      # row -> name of a part that is also scored alone
    overall: str = "mean"               # or parts: the mean of the parts; circular; types: no overall score
    gold: Callable = lambda row: row.get("answers", row.get("answer"))


BENCHMARKS = {
    "reading": Benchmark("reading", "fine", 16, exact, "answer"),
    "ocrbench_v2": Benchmark(
        "OCRBench v2", "fine", 128, ocrbench, "type question answers eval? bbox?",
        lambda row: row["question"].strip(), "id", part=lambda row: row["type"], overall="types"),
    "docvqa_val": Benchmark(
        "DocVQA", "fine", 32, anls, "answers", lambda row: row["question"] + SINGLE, "questionId"),
    "chartqa": Benchmark(
        "ChartQA", "fine", 16, relaxed, "answer",
        lambda row: row["question"] + "\nAnswer the question with a single word.",
        part=lambda row: "human" if row["type"] == "human_test" else "augmented"),
    "textvqa_val": Benchmark(
        "TextVQA", "fine", 128, vqa_accuracy, "answers",
        lambda row: row["question"].capitalize() + SINGLE, "question_id"),
    "infovqa_val": Benchmark(
        "InfoVQA", "fine", 32, anls, "answers", lambda row: row["question"] + SINGLE, "questionId"),
    "ai2d": Benchmark(
        "AI2D", "fine", 16, ai2d, "options answer",
        lambda row: f"{row['question']}\n{listed(row['options'])}\n{LETTER}.",
        gold=lambda row: string.ascii_uppercase[int(row["answer"])]),
    "reasoning": Benchmark("reasoning", "reasoning", 16, exact, "answer"),
    "regimes": Benchmark("regimes", "fine", 16, exact, "answer"),
    "mmmu_pro_standard": Benchmark(
        "MMMU-Pro", "reasoning", 256, mmmu, "options answer", ask_mmmu, "id", mmmu_images),
    "mmmu_pro_vision": Benchmark("MMMU-Pro", "reasoning", 256, mmmu_vision, "answer", ask_mmmu, "id"),
    "mmstar": Benchmark(
        "MMStar", "reasoning", 128, mmstar, "answer",
        lambda row: f"Question: {row['question'].strip().replace(' Please answer yes or no.', '')}{ONLY}",
        "index", part=lambda row: row["l2_category"], overall="parts"),
    "mmbench_en_dev": Benchmark(
        "MMBench (no judge)", "reasoning", 1024, mmbench, "A? B? C? D? answer", ask_mmbench, "index",
        overall="circular"),
    "mathvista_testmini": Benchmark(
        "MathVista (no judge)", "reasoning", 16384, mathvista,
        "question_type answer_type choices precision answer", ask_mathvista, "pid",
        lambda row: ["decoded_image"], part=lambda row: row["answer_type"]),
}
EMBEDDED = ("reading", "reasoning", "regimes")            # the first two are asked by default
