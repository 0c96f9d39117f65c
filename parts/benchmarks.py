"""The benchmarks of Sect. 5.1: how each asks, and how it scores a reply; evaluate.py asks.

Prompts, answer lengths and metrics are those of lmms-eval 0.7.3 under its prompt key `qwen3_vl`.
Where it has GPT judge (MMBench, MathVista), rules score here and the title says so. Where it draws
a letter or takes the most similar choice, the answer is unparsed, which counts as wrong. Some types
of OCRBench v2 are scored by lmms-eval itself, if it is installed; without it the table has a score
by type and a coverage. BENCHMARKS, at the end, has a row for each.
"""
import ast
import contextlib
import functools
import io
import json
import math
import re
import string
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

import numpy as np

# ---- Metrics: pure functions of a reply (stripped) and a row -------------------------------------


class Verdict(NamedTuple):
    score: Optional[float]          # 0..1; None where this kind of question is not scored here
    parsed: Optional[str]           # what the metric read from the reply; None: it found nothing


def levenshtein(a, b):
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def anls(reply, row):
    """1 - edit distance / length to the closest answer; 0 below 0.5."""
    def distance(answer):
        a, b = (" ".join(s.lower().split()) for s in (answer, reply))
        # lmms-eval takes the lengths before it normalises.
        return levenshtein(a, b) / max(len(answer.upper()), len(reply.upper()), 1)
    score = 1 - min(map(distance, row["answers"]))
    return Verdict(score if score >= 0.5 else 0.0, reply or None)


def relaxed_accuracy(reply, row):
    """ChartQA: numbers within 5 %, all else equal but for case. "50%" is 0.5, which is not "50"."""
    def number(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None
    got, gold = number(reply), number(row["answer"])
    if got is not None and gold:
        return Verdict(float(abs(got - gold) / abs(gold) <= 0.05), reply)
    return Verdict(float(reply.lower() == row["answer"].lower()), reply or None)


# EvalAI's normaliser restores an apostrophe that was left out: "dont" -> "don't".
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've 'ow's'at""".split()
APOSTROPHES = {word[:i] + word[i + 1:]: word
               for word in CONTRACTIONS for i, c in enumerate(word) if c == "'"}
APOSTROPHES["somebody'd"] = "somebodyd"                    # the one entry that goes the other way
NUMBER_WORDS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                        "0 0 1 2 3 4 5 6 7 8 9 10".split()))


def normalise_evalai(text):
    """EvalAI's answer normalisation, order of steps included."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    clean = text
    for mark in ";/[]\"{}()=+\\_-><@`!":           # beside a space it goes, inside a word it parts
        clean = clean.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    # 32 is re.UNICODE, which the original passes where the count belongs.
    clean = re.sub(r"\.(?!\d)", "", clean, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in clean.split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(reply, row):
    """TextVQA: min(1, matches / 3), averaged over leaving out each of the ten answers in turn."""
    got, answers = normalise_evalai(reply), [normalise_evalai(a) for a in row["answers"]]
    equal, n = answers.count(got), len(answers)
    score = ((n - equal) * min(1, equal / 3) + equal * min(1, (equal - 1) / 3)) / n
    return Verdict(score, got if reply else None)


def exact_match(reply, row):
    """The embedded world: equal but for white space."""
    got = " ".join(reply.split())
    return Verdict(float(got == " ".join(row["answer"].split())), got or None)


# ---- Multiple choice: every data set has its own way of finding the letter -----------------------

ANSWER_PHRASES = [
    "answer is", "the answer is", "correct answer is", "the correct answer is", "best answer is",
    "the best answer is", "correct option is", "the correct option is", "best option is",
    "the best option is", "choice is", "the choice is", "correct choice is",
    "the correct choice is", "my answer is", "my choice is", "i choose", "i select", "i pick",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
LETTER_FORMS = "X X. X, X: X) X). (X) (X). :X :X, :X. :X) :X).".split()    # MMBench's, of letter X


def strip_marks(reply, marks):
    for mark in marks:                             # one after the other, so ".'" and "'." differ
        reply = reply.strip(mark)
    return f" {reply} "


def ranked_letter(reply, choices):
    """The letter in the most telling form, and of equals the last one.

    "A cat is on the mat, D" gives A."""
    text = strip_marks(reply.strip(), ",.!?;:'\"")
    core, low, found = text.strip(), text.lower(), []      # found: (rank, position, letter)
    for c in choices:
        forms = f"{c} ", f"{c})", f"{c}:", f"{c}.", f"({c})"
        found += [(rank, text.rfind(form), c) for rank, form in enumerate(forms, 2)]
        found += [(7, text.find(c, low.find(phrase) + len(phrase)), c)
                  for phrase in ANSWER_PHRASES if phrase in low]
        if core.startswith(c) and not core[1:2].isalpha():
            found.append((10, 0, c))
        if core.endswith(c) and not core[-2:-1].isalpha():
            found.append((9, len(text), c))
    found = [f for f in found if f[1] >= 0] or [(0, text.rfind(c), c) for c in choices if c in text]
    return max(found)[2] if found else None


def mmstar(reply, row):
    got = ranked_letter(reply, "ABCD")
    return Verdict(float(got == row["answer"].strip().upper()), got)


def present(value):
    """A cell that is neither None nor a float nan."""
    return value is not None and value == value


def mmbench(reply, row):
    """MMBench's rules: a letter, alone or punctuated, else an option's text; then the ranked letter
    in place of GPT (lmms-eval's mmbench_en_dev_static). A missing option is the text "nan", and may
    be found."""
    options = {c: str(row.get(c, "nan")) for c in "ABCD" if present(row.get(c, "nan"))}
    words = reply.split()
    for form in LETTER_FORMS:
        hits = [c for c in "ABCDE" if form.replace("X", c) in words]
        article = form == "X" and "A" in words and len(words) > 3
        if len(hits) == 1 and not article:
            return Verdict(float(hits[0] == row["answer"]), hits[0])
    said = [c for c, text in options.items() if text.lower() in reply.lower()]
    got = said[0] if len(said) == 1 else ranked_letter(reply, sorted(options))
    return Verdict(float(got == row["answer"]), got)


def ai2d(reply, row):
    """A letter with a full stop at the start, or alone, whatever its case and punctuation."""
    found = re.match(r"\s*([A-Z])\.", reply)
    got = (found[1] if found else reply).lower()
    got = got.translate(str.maketrans("", "", string.punctuation))
    letters = string.ascii_lowercase[:len(row["options"])]
    return Verdict(float(got == letters[int(row["answer"])]),
                   got.upper() if got and got in letters else None)


def mmmu(reply, row):
    """MMMU-Pro, standard: (A), else "A ", else "A.", else, in a longer reply, an option's text. The
    last counts, and of letters with a full stop the last that also stands alone."""
    options = dict(zip(string.ascii_uppercase, ast.literal_eval(row["options"])))
    text = strip_marks(reply, ",.!?;:'")
    for form, place in (("(X)", "(X)"), ("X ", " X "), ("X.", " X ")):     # found by, ordered by
        if hits := [c for c in options if form.replace("X", c) in text]:
            where = [text.rfind(place.replace("X", c)) for c in hits]
            break
    else:
        hits = [c for c, option in options.items()
                if len(text.split()) > 5 and option.lower() in text.lower()]
        where = [text.lower().rfind(options[c].lower()) for c in hits]
    got = hits[int(np.argmax(where))] if hits else None
    return Verdict(float(got == row["answer"]), got)


def mmmu_vision(reply, row):
    return Verdict(float(reply == row["answer"]), reply if re.fullmatch("[A-J]", reply) else None)


def mathvista(reply, row):
    """Typed equality. lmms-eval has GPT reduce a reply to a value first; here the reply must be
    one: a choice or its letter, or a number."""
    kind, got = row["answer_type"], None
    if row["question_type"] == "multi_choice":
        by_letter = dict(zip(string.ascii_uppercase, row["choices"]))
        inside = re.search(r"\(([a-zA-Z])\)", reply)
        said = inside[1].upper() if inside else reply
        ahead = None if inside else re.match(r"([A-Z])[.:)]", reply)
        got = by_letter.get(said) or (said if said in row["choices"] else None)
        got = by_letter.get(ahead[1]) if got is None and ahead else got
    elif kind in ("integer", "float"):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(reply)
            got = str(int(value) if kind == "integer" else round(value, int(row["precision"])))
    else:
        got = reply or None
    return Verdict(float(got is not None and got.strip() == str(row["answer"]).strip()), got)


# ---- OCRBench v2: a table of its own, by type of question ----------------------------------------


def one_line(text):
    return text.strip().replace("\n", " ")


def without_spaces(text):
    return one_line(text).replace(" ", "")


def without_text_tags(text):
    return without_spaces(re.sub(r"\\text\{([^{}]*)\}", r"\1", text))


def contained_or_alike(reply, answers, clean, few=math.inf, separator=None):
    """1 if an answer of fewer than `few` words is in the reply ("1" in "12345"); else by ANLS."""
    best, reply = 0.0, clean(reply)
    for answer in (clean(str(a)) for a in answers):
        if len(answer.split(separator)) < few:
            best = max(best, float(answer in reply))
        else:
            alike = 1 - levenshtein(reply, answer) / max(len(reply), len(answer), 1)
            best = max(best, alike if alike >= 0.5 else 0.0)
    return best


def ocr_vqa(reply, row, chinese=False):
    answers = row["answers"]
    if row.get("eval") == "multiple choice":
        return float("".join(filter(str.isalpha, reply)) == answers[0])
    if row.get("eval") == "case sensitive":
        return contained_or_alike(reply, answers, one_line, 5)
    if chinese:
        return contained_or_alike(reply, answers, lambda s: without_spaces(s.lower()), 4, ",")
    return contained_or_alike(reply, answers, lambda s: one_line(s.lower()), 5)


def ocr_counting(reply, row):
    """Exact: the answer is in the reply. Regression: 1 - relative error of its first number, or 0
    if that is not above 0.5."""
    answers = [one_line(str(a).lower()) for a in row["answers"]]
    if row["eval"] == "exact match":
        return max(float(a in reply) for a in answers)
    first = re.search(r"\d+", reply)
    n = int(first[0]) if first and row["eval"] == "regression" else 0
    alike = [1 - abs(n - int(a)) / int(a) if 0 < n < 2 * int(a) else 0.0 for a in answers]
    return max(s if s > 0.5 else 0.0 for s in alike)


def parse_fields(reply):
    """A reply's key-value pairs: JSON or a Python dict, fenced or not, else all `key: value`."""
    fence = re.search(r"```(?:python|json)?\n(.*?)\n```", reply, re.DOTALL | re.IGNORECASE)
    text = fence[1] if fence else reply.strip()
    pairs = re.findall(r"""([\w\s]+)(?:["']\s*)?[:=]\s*["']?([^\n,"'{}]+)""", text)
    got = {key.strip(): value for key, value in pairs}
    for parse in (ast.literal_eval, json.loads):   # the last one that can has the say
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            got = parse(text)
    if not isinstance(got, dict) or not all(isinstance(key, str) for key in got):
        return {}
    return {key.strip(): str(value).strip() for key, value in got.items()}


def ocr_fields(reply, row):
    """Key information: the share of all keys, named or asked for, that have an accepted value."""
    gold = row["answers"][0]
    if isinstance(gold, str):
        try:
            gold = json.loads(gold.strip('"'))
        except ValueError:
            gold = ast.literal_eval(gold.strip('"'))
    lists = {key: value if isinstance(value, list) else [value] for key, value in gold.items()}
    accepted = {key: [without_spaces(str(value).lower()) for value in values]
                for key, values in lists.items()}
    got = {key: without_spaces(value.lower()) for key, value in parse_fields(reply).items()}
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
    got, overlap, right = parse_fields(reply), 0.0, 0.0
    with contextlib.suppress(KeyError, ValueError, SyntaxError, TypeError, IndexError):
        overlap = iou(ast.literal_eval(got["bbox"]), row["bbox"])
    if "answer" in got:
        right = ocr_vqa(got["answer"], {"answers": row["answers"]})
    return 0.5 * right + 0.5 * overlap


def ocr_grounding(reply, row):
    number = r"\s*(\d+)\s*"
    boxes = re.findall(rf"[(\[]{number},{number},{number},{number}[)\]]", reply)
    boxes = [box for box in boxes if all(int(v) <= 1000 for v in box)]
    return iou(boxes[-1], row["answers"]) if boxes else 0.0


@functools.cache
def lmms_eval_scorer():
    """lmms-eval's function for all types, if it, what it imports and NLTK's WordNet are there."""
    try:
        from lmms_eval.tasks.ocrbench_v2.utils import ocrbench_v2_process_results
        from nltk.corpus import wordnet
        wordnet.ensure_loaded()
        return ocrbench_v2_process_results
    except (ImportError, LookupError, OSError):    # OSError: WordNet lacks a file
        return None


def ocr_by_lmms_eval(reply, row):
    """Tables, charts and documents (tree distances), whole pages, translations and open answers
    (BLEU, METEOR), spotting: by lmms-eval itself; None, not scored, without it."""
    lacks_boxes = row["type"] == "text spotting en" and not {"bbox_list", "content"} <= set(row)
    if lmms_eval_scorer() is None or lacks_boxes:
        return None
    with contextlib.redirect_stdout(io.StringIO()):        # it prints
        return float(lmms_eval_scorer()(row, [reply])["ocrbench_v2_accuracy"]["score"])


def ocr_handwritten(reply, row):
    """The answer's letters, in one of ten ways of listing them; open answers are another matter."""
    if "简答" in row["question"]:
        return ocr_by_lmms_eval(reply, row)
    return max(float(by.join(row["answers"][0]) in reply)
               for by in ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和"))


OCR_TYPES = {                                              # all others: ocr_by_lmms_eval
    **dict.fromkeys(["APP agent en", "ASCII art classification en", "math QA en",
                     "reasoning VQA en", "science QA en", "text recognition en",
                     "document classification en", "cognition VQA en", "diagram QA en"], ocr_vqa),
    **dict.fromkeys(["cognition VQA cn", "reasoning VQA cn"],
                    functools.partial(ocr_vqa, chinese=True)),
    **dict.fromkeys(["key information extraction en", "key information mapping en",
                     "key information extraction cn"], ocr_fields),
    "handwritten answer extraction cn": ocr_handwritten,
    "formula recognition en": lambda reply, row: contained_or_alike(
        reply, row["answers"], without_spaces),
    "formula recognition cn": lambda reply, row: contained_or_alike(
        reply, row["answers"], without_text_tags),
    "text counting en": ocr_counting,
    "VQA with position en": ocr_position,
    "text grounding en": ocr_grounding,
}


def ocrbench(reply, row):
    return Verdict(OCR_TYPES.get(row["type"], ocr_by_lmms_eval)(reply, row), reply or None)


# ---- The benchmarks: one row each ----------------------------------------------------------------

LETTER = "Answer with the option's letter from the given choices directly"
ONLY = "Answer with the option letter only."
SINGLE = "\nAnswer the question using a single word or phrase."
SYSTEM = "You are a helpful assistant."                    # the embedded world has none
HARNESS_TOKENS = (4, 16384)                                # of its least and its greatest image


def lettered(options):
    return "\n".join(f"{c}. {text}" for c, text in zip(string.ascii_uppercase, options))


def ask_mmmu(row):
    start = f"Question: {row['question']}" if "question" in row else \
        "Question: analyze the image and answer the associated question."
    return f"{start}\nOptions:\n{lettered(ast.literal_eval(row['options']))}\n{ONLY}"


def mmmu_images(row):
    named = set(re.findall(r"<image (\d+)>", row["question"] + row["options"]))
    return [f"image_{i}" for i in sorted(named)]


def ask_mmbench(row):
    options = [f"{c}. {row[c]}" for c in "ABCDE"
               if row.get(c) and present(row[c]) and row[c] != "nan"]
    hint = f"{row['hint']} " if present(row.get("hint")) and row["hint"] != "nan" else ""
    choices = "\n".join(["There are several options:"] + options)
    return f"{hint}{row['question']} {choices}\n\n{LETTER}."


def ask_mmstar(row):
    return f"Question: {row['question'].strip().replace(' Please answer yes or no.', '')}{ONLY}"


def ask_mathvista(row):
    places = {1: "one decimal place", 2: "two decimal places"}.get(int(row.get("precision") or 0))
    hint = f"{LETTER}." if row["question_type"] == "multi_choice" else {
        "integer": "Answer the question using a single integer number.",
        "float": f"Answer the question using a single floating-point number with {places}.",
        "list": "Answer the question using a Python list."}[row["answer_type"]]
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    parts = row["question"] + unit, lettered(row["choices"] or ()), hint
    return "\n".join(part for part in parts if part).strip()


@dataclass(frozen=True)
class Benchmark:
    title: str                          # of the table's row; MMMU-Pro's two halves share one
    group: str                          # fine or reasoning (Sect. 5.1)
    new_tokens: int                     # lmms-eval's; 128 where a task names none (of Qwen3-VL)
    metric: Callable                    # (reply, row) -> Verdict
    keep: str                           # columns that the metric reads; "?": where they are there
    ask: Callable = None                # row -> prompt
    id: str = ""                        # column; else the line number
    images: Callable = lambda row: ["image"]               # row -> columns
    part: Callable = lambda row: None                      # row -> a part that is also scored alone
    overall: str = "mean"               # or parts: the mean of the parts; or circular (MMBench)
    gold: Callable = lambda row: row.get("answers", row.get("answer"))


BENCHMARKS = {
    "reading": Benchmark("reading", "fine", 16, exact_match, "answer"),
    "ocrbench_v2": Benchmark(
        "OCRBench v2", "fine", 128, ocrbench,
        "type question answers eval? bbox? bbox_list? content?",
        lambda row: row["question"].strip(), "id", part=lambda row: row["type"]),
    "docvqa_val": Benchmark(
        "DocVQA", "fine", 32, anls, "answers", lambda row: row["question"] + SINGLE, "questionId"),
    "chartqa": Benchmark(
        "ChartQA", "fine", 16, relaxed_accuracy, "answer",
        lambda row: row["question"] + "\nAnswer the question with a single word.",
        part=lambda row: "human" if row["type"] == "human_test" else "augmented"),
    "textvqa_val": Benchmark(
        "TextVQA", "fine", 128, vqa_accuracy, "answers",
        lambda row: row["question"].capitalize() + SINGLE, "question_id"),
    "infovqa_val": Benchmark(
        "InfoVQA", "fine", 32, anls, "answers", lambda row: row["question"] + SINGLE, "questionId"),
    "ai2d": Benchmark(
        "AI2D", "fine", 16, ai2d, "options answer",
        lambda row: f"{row['question']}\n{lettered(row['options'])}\n{LETTER}.",
        gold=lambda row: string.ascii_uppercase[int(row["answer"])]),
    "reasoning": Benchmark("reasoning", "reasoning", 16, exact_match, "answer"),
    "regimes": Benchmark("regimes", "fine", 16, exact_match, "answer"),
    "mmmu_pro_standard": Benchmark(
        "MMMU-Pro", "reasoning", 256, mmmu, "options answer", ask_mmmu, "id", mmmu_images),
    "mmmu_pro_vision": Benchmark(
        "MMMU-Pro", "reasoning", 256, mmmu_vision, "answer", ask_mmmu, "id"),
    "mmstar": Benchmark(
        "MMStar", "reasoning", 128, mmstar, "answer", ask_mmstar, "index",
        part=lambda row: row["l2_category"], overall="parts"),
    "mmbench_en_dev": Benchmark(
        "MMBench (no judge)", "reasoning", 1024, mmbench, "A? B? C? D? answer", ask_mmbench,
        "index", overall="circular"),
    "mathvista_testmini": Benchmark(
        "MathVista (no judge)", "reasoning", 16384, mathvista,
        "question_type answer_type choices precision answer", ask_mathvista, "pid",
        lambda row: ["decoded_image"], part=lambda row: row["answer_type"]),
}
EMBEDDED = ("reading", "reasoning", "regimes")            # the first two are asked by default
