"""synthdoc.py: pages that are pure functions of (split, seed, index), and answers that a reader of the page's marks
finds too. Run: pytest tests/test_synthdoc.py"""
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import synthdoc
from synthdoc import COLOURS, REGIMES, SHAPES, SUITES, World, near_miss

ROOT = Path(synthdoc.__file__).parent
FAMILIES = [family for families in (SUITES | REGIMES).values() for family in families]


def digest(sample):
    words = json.dumps([sample.id, sample.source, sample.messages, sample.chosen, sample.rejected])
    return hashlib.sha256(words.encode() + b"".join(i.tobytes() for i in sample.images)).hexdigest()


def test_a_sample_is_a_pure_function_of_split_seed_and_index():
    """Another process with another hash seed, which draws in another order, draws the same bits."""
    worlds = [("train", 0, None), ("train", 1, None), ("eval", 0, "reading"), ("eval", 0, "reasoning")]
    ours = [digest(World(*w, pairs=w[2] is not None)[i]) for w in worlds for i in range(9)]
    code = ("import sys; sys.path[:0] = ['tests']; from test_synthdoc import *\n"
            f"print(*[digest(World(*w, pairs=w[2] is not None)[i]) for w in {worlds[::-1]} for i in range(9)[::-1]])")
    theirs = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONHASHSEED": "77"}).stdout.split()
    assert ours == theirs[::-1] and len(set(ours)) == len(ours)


def test_splits_share_no_digit_and_no_page(monkeypatch):
    images, labels = synthdoc.scans()
    drawn, stamp, seen = {"train": set(), "eval": set()}, synthdoc.stamp, {}
    for split in drawn:
        monkeypatch.setattr(synthdoc, "stamp", lambda page, rng, which, *rest: (
            drawn[split].update(which.tolist()), stamp(page, rng, which, *rest)))
        for i in range(1500):
            World(split, 0, "digits", cells=(3, 7))[i]
        for family in FAMILIES:
            for i in range(60):
                page = World(split, 0, family)[i].images[0].tobytes()
                assert seen.setdefault(page, split) == split
    assert len(drawn["train"]) > 1000 and len(drawn["eval"]) > 450
    assert max(drawn["train"]) < len(labels) - 500 <= min(drawn["eval"])
    scans = {split: {images[n].tobytes() for n in numbers} for split, numbers in drawn.items()}
    assert not scans["train"] & scans["eval"]             # nor the same scan under two numbers


# ---------------------------------------------------------------------------------------------------------
# A reader of marks: characters that touch are words, words on one height are lines


def words(page):
    """[(line, x, word)] from the marks of single characters; handwriting counts as text."""
    found = []
    for what, x0, y0, x1, y1 in page.marks:
        char = what.removeprefix("written ")
        if " " in char:
            continue
        for word in found:
            if word[1] == y0 and word[2] == x0:
                word[2], word[3] = x1, word[3] + char
                break
        else:
            found.append([x0, y0, x1, char])
    return [(round(y0 / 16), x0, text) for x0, y0, x1, text in found]


def lines(page):
    rows = {}
    for row, x, word in words(page):
        rows.setdefault(row, []).append((x, word))
    return [[word for _, word in sorted(rows[row])] for row in sorted(rows)]


def read(page, question):
    """The answer, found in the marks without a look at how the page was made."""
    text, shapes = lines(page), [(*what.split(), (x0 + x1) / 2, (y0 + y1) / 2) for what, x0, y0, x1, y1 in page.marks
                                 if what.split()[0] in COLOURS]
    if m := re.fullmatch(r"What is the price of (\w+)\?|What is the (\w+)\?", question):
        [answer] = [" ".join(line[1:]) for line in text if line[0] == (m[1] or m[2])]
        return answer
    if m := re.fullmatch(r"What is the value of (\w+)\?", question):
        [(below, x)] = [(row, x) for row, x, word in words(page) if word == m[1]]
        [answer] = [word for row, x1, word in words(page) if abs(x1 - x) < 8 and row < below]
        return answer
    if question == "Which month has a value?":
        [answer] = [word for _, _, word in words(page) if word.isalpha()]
        return answer
    if question == "What does the sign say?":
        return " ".join(word for line in text for word in line)
    if question in ("Which number is on the sign?", "Which number is handwritten?"):
        return text[-1][-1]
    if m := re.fullmatch(r"What color is the (\w+)\?", question):
        [answer] = [colour for colour, shape, *_ in shapes if shape == m[1]]
        return answer
    if m := re.fullmatch(r"What shape is (\w+)\?", question):
        [answer] = [shape for colour, shape, *_ in shapes if colour == m[1]]
        return answer
    if question == "How many shapes are there?":
        return str(len(shapes))
    m = re.fullmatch(r"Is (\w+) at the (left|top) or at the (right|bottom)\?", question)
    [(x, y)] = [(x, y) for colour, _, x, y in shapes if colour == m[1]]
    height, width = page.canvas.shape[:2]
    return m[2] if (x < width / 2 if m[2] == "left" else y < height / 2) else m[3]


@pytest.mark.parametrize("cells", [(10, 10), (4, 8), (3, 7)])
def test_answers_agree_with_the_marks_and_the_marks_with_the_pixels(cells):
    asked = Counter()
    for family in FAMILIES:
        world = World("eval", 5, family, cells=cells, questions=9)
        for i in range(40):
            page = world.page(world.rng(i), family)
            pixels = np.asarray(page.image, float)
            assert page.image.size == (16 * cells[1], 16 * cells[0])
            for question, answer in page.questions:
                assert read(page, question) == answer, (family, i, question)
                asked[family] += 1
            for what, x0, y0, x1, y1 in page.marks:
                spot = pixels[max(0, y0):y1, max(0, x0):x1]
                if what.split()[0] in COLOURS:            # the middle of a shape has its colour
                    assert abs(pixels[(y0 + y1) // 2, (x0 + x1) // 2] - COLOURS[what.split()[0]]).max() <= 20
                elif what != ".":                         # ink stands out from the paper
                    assert np.ptp(spot.mean(-1)) > 40, (family, i, what)
    assert min(asked.values()) >= 40 and set(asked) == set(FAMILIES)


def test_a_small_page_has_relations_to_ask_about_and_a_smaller_one_is_refused():
    assert World("train", 0, "relation", cells=(3, 7))[0].source == "relation"
    for cells in ((2, 9), (9, 6)):
        with pytest.raises(ValueError, match="too small"):
            World("train", cells=cells)
    for wrong in (("test", 0), ("train", 0, "poems")):
        with pytest.raises(ValueError, match="no split .* or suite"):
            World(*wrong)
    with pytest.raises(IndexError):
        World("train", length=5)[5]


def test_families_are_balanced():
    for suite, families in (SUITES | REGIMES).items():
        found = Counter(World("eval", 0, suite, cells=(3, 7))[i].source for i in range(100))
        assert found == {family: 100 // len(families) for family in families}
    world = World("train", 0)
    found = Counter(world.family(world.rng(i), i) for i in range(20_000))
    for suite, share in synthdoc.TRAIN_SHARES.items():
        families = SUITES.get(suite, ["text"])
        for family in families:
            assert found[family] == pytest.approx(20_000 * share / len(families), rel=0.1), family
    assert World("train", 0)[[world.family(world.rng(i), i) for i in range(99)].index("text")].images == []


def test_a_near_miss_differs_in_one_place():
    rng, seen = np.random.default_rng(0), Counter()
    for family in FAMILIES:
        for i in range(60):
            sample = World("train", 2, family, pairs=True)[i]
            assert len(sample.messages) == 1
            right, wrong = sample.chosen[0]["text"], sample.rejected[0]["text"]
            for miss in (wrong, near_miss(rng, right)):
                sets = SHAPES, list(COLOURS), ["left", "right"], ["top", "bottom"]
                closed = [words for words in sets if right in words]
                if closed:
                    assert miss in closed[0] and miss != right
                else:
                    [(a, b)] = [(a, b) for a, b in zip(right, miss, strict=True) if a != b]
                    assert a.isdigit() == b.isdigit() and a.isalpha() == b.isalpha()
                seen[bool(closed)] += 1
    assert min(seen.values()) > 100
