"""The embedded world: documents and scenes drawn with Pillow, with questions and exact answers.

The paper distils on public samples (Table 12) and judges by ten benchmarks in two groups (Sect.
5.1): fine-grained perception, where a few patches carry the answer, and reasoning, which a
blurred picture would serve as well. This file draws both kinds in miniature, so that the whole
method runs with nothing to download:

    suite      family    page                                       question -> answer
    reading    receipt   an item and its price, shop, date          price of milk? -> 4.75
               form      fields filled with names, cities, codes    what is the code? -> k7q2
               sign      one sign before a softly textured wall     what does it say? -> gate 417
               chart     bars, one with a value and a name          value of may? -> 37
               digits    real handwriting: 8 x 8 scans of digits    which number? -> 508
    reasoning  colour    large shapes                               colour of the circle? -> red
               shape                                                which shape is red? -> circle
               count                                                how many shapes? -> 3
               relation                                             red at the top or bottom? -> top
    regimes    smooth    blurred shapes among sharp lines of text   colour of the circle? -> red
               textured  a receipt among blocks of hard noise       price of milk? -> 4.75
    (text)     text      no page                                    plain English, all supervised

    python synthdoc.py out.png            # a contact sheet of every family

In the regimes density should misrank positions (App. A, "where HEED helps less"): the answer
stands in a smooth place, or what stands out is of no use. The training mixture has none of them;
`distill.py --suite regimes` trains on them alone. The teacher, which never saw such pages,
answers nine of ten.

The world asks for no more than a teacher of 2.9 M parameters can master. So a page holds one
value of a kind, and a shape is compared with the page: look-ups among lines of one kind and
comparisons of two shapes stayed at chance through 150 minutes of lessons.

Every sample is a pure function of (split, seed, index). The splits share neither random streams
nor handwritten digits: of the scans (tiny/digits.npz: 1,797 of the UCI optical digits, CC BY 4.0,
as shipped with scikit-learn) the last 500 are for evaluation only.

A page is a grid of cells: 16 x 16 pixels are one visual token of the embedded teacher (patch 8,
merge 2) and hold one line's height and two characters. Text starts at a cell, jittered by up to 2
pixels.
"""
import sys
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from formats import Sample, texts

CELL = 16                     # pixels: the side of a visual token
CHARS = "abcdefghijklmnopqrstuvwxyz0123456789."
ITEMS = ("milk bread apple tea rice salt fish eggs soap pasta honey juice lemon onion cocoa butter "
         "cheese sugar flour grapes").split()
FIELDS = "name city code street room team color title".split()
NAMES = ("anna boris clara david elena frank greta henry irene jonas karla louis maria nils olga "
         "peter").split()
CITIES = "oslo paris rome vienna lima cairo delhi kyoto quebec berlin madrid dublin".split()
STREETS = "oak elm pine mill lake hill park river".split()
SIGNS = "gate exit dock hall lift ward track store studio museum garage office".split()
ADJECTIVES = "fresh cold old cheap good small".split()
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
SHAPES = "circle square triangle".split()
COLOURS = dict(red=(208, 44, 44), green=(40, 150, 66), blue=(48, 88, 205), yellow=(233, 196, 40),
               purple=(140, 60, 170), black=(36, 36, 40))
SUITES = dict(reading="receipt form sign chart digits".split(),
              reasoning="colour shape count relation".split())
REGIMES = dict(regimes="smooth textured".split())     # neither trained on nor asked by default
TRAIN_SHARES = dict(reading=0.55, reasoning=0.30, text=0.15)  # of the samples it trains on
HELD_OUT_DIGITS = 500


@dataclass
class Page:
    """A picture under construction, and what stands where (the marks teach the vision tower)."""
    canvas: np.ndarray                                    # (height, width, 3) float32, 0..255
    marks: list = field(default_factory=list)             # (what, x0, y0, x1, y1) in pixels
    questions: list = field(default_factory=list)         # (question, answer)
    lines: list = field(default_factory=list)             # all that is written, in reading order
    shapes: list = field(default_factory=list)            # scenes: (colour, shape, its cell)

    @property
    def cells(self):
        return self.canvas.shape[0] // CELL, self.canvas.shape[1] // CELL

    @property
    def image(self):
        return Image.fromarray(self.canvas.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=None)
def glyph(char):
    """Coverage (16, 8) in 0..1 of one character, centred on its column, narrowed if too wide."""
    font = ImageFont.load_default(13)      # Pillow's own font: the same on every machine
    big = Image.new("L", (24, CELL))
    ImageDraw.Draw(big).text((4, 13), char, fill=255, font=font, anchor="ls")
    box = big.getbbox() or (4, 0, 8, CELL)
    ink = big.crop((box[0], 0, box[2], CELL))
    if ink.width > 8:
        ink = ink.resize((8, CELL), Image.BILINEAR)
    cell = Image.new("L", (8, CELL))
    cell.paste(ink, ((8 - ink.width) // 2, 0))
    return np.asarray(cell, np.float32) / 255


def write(page, rng, text, row, col, ink):
    """Text from cell (row, col) on, two characters a cell, jittered by up to 2 pixels."""
    x0, y0 = col * CELL + int(rng.integers(-2, 3)), row * CELL + int(rng.integers(-2, 3))
    height, width = page.canvas.shape[:2]
    for i, char in enumerate(text):
        x = x0 + 8 * i
        top, left, bottom, right = max(0, y0), max(0, x), min(height, y0 + CELL), min(width, x + 8)
        a = glyph(char)[top - y0:bottom - y0, left - x:right - x, None]
        spot = page.canvas[top:bottom, left:right]
        spot += a * (np.asarray(ink, np.float32) - spot)
        if char != " ":
            page.marks.append((char, x, y0, x + 8, y0 + CELL))


def blank(rng, cells, texture):
    """A light page: one tint, and with `texture` > 0 slow variations of that many grey levels."""
    height, width = cells[0] * CELL, cells[1] * CELL
    tint = rng.integers(222, 253, 3).astype(np.float32)
    coarse = rng.normal(0, texture, (4, 4)).astype(np.float32)
    slow = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    return Page(np.broadcast_to(tint, (height, width, 3)) + slow[..., None])


def dark(rng):
    return rng.integers(0, 90, 3)


def draw(page, paint):
    """Lets `paint(ImageDraw)` work on the canvas."""
    image = page.image
    paint(ImageDraw.Draw(image))
    page.canvas = np.asarray(image, np.float32).copy()


def code(rng):
    """Four characters, letter digit letter digit: no two codes are likely to be alike."""
    letters, digits = CHARS[:26], CHARS[26:36]
    return "".join(str(rng.choice(list(s))) for s in (letters, digits, letters, digits))


def number(rng, digits):
    return str(rng.integers(10 ** (digits - 1), 10 ** digits))


# --------------------------------------------------------------------------------------------------
# Families: each draws a page and lists its questions


def entry(page, rng, label, value, question, row, left, ink, pen):
    """A line of a receipt or form, and what is asked about it."""
    write(page, rng, label, int(row), left, ink)
    write(page, rng, value, int(row), left + 4, pen)
    page.lines.append(f"{label} {value}")
    page.questions.append((question, value))


def receipt(rng, cells, split):
    """One item with its price, and perhaps the shop and the date: no two lines are of one kind."""
    page, (rows, cols), ink = blank(rng, cells, 3), cells, dark(rng)
    item, left = str(rng.choice(ITEMS)), int(rng.integers(0, cols - 7 + 1))
    lines = [("shop", str(rng.choice(SIGNS)), "What is the shop?"),
             ("date", f"{rng.integers(10, 29)} {rng.choice(MONTHS)}", "What is the date?"),
             (item, f"{rng.integers(1, 10)}.{rng.integers(10, 100)}",
              f"What is the price of {item}?")]
    lines = [line for line in lines if line[0] == item or rng.random() < 0.5]
    places = sorted(rng.choice(rows, len(lines), replace=False))
    for line, row in zip(lines, places):
        entry(page, rng, *line, row, left, ink, ink)
    return page


def form(rng, cells, split):
    page, (rows, cols), ink, pen = blank(rng, cells, 3), cells, dark(rng), dark(rng)
    lines, left = int(rng.integers(1, min(3, rows) + 1)), int(rng.integers(0, cols - 7 + 1))
    fill = dict(name=NAMES, city=CITIES, street=STREETS, color=list(COLOURS), title=SIGNS)
    labels = [str(label) for label in rng.choice(FIELDS, lines, replace=False)]
    for label, row in zip(labels, sorted(rng.choice(rows, lines, replace=False))):
        value = {"code": code(rng), "room": number(rng, 3), "team": number(rng, 2)}.get(label) \
            or str(rng.choice(fill[label]))
        entry(page, rng, label, value, f"What is the {label}?", row, left, ink, pen)
    return page


def sign(rng, cells, split):
    page, (rows, cols) = blank(rng, cells, 9), cells
    word, digits = str(rng.choice(SIGNS)), number(rng, 3)
    row, col = int(rng.integers(0, rows - 1)), int(rng.integers(0, cols - 3))
    panel = tuple(int(c) for c in rng.integers(20, 110, 3))
    box = [col * CELL - 3, row * CELL - 2, (col + 4) * CELL + 1, (row + 2) * CELL + 1]
    draw(page, lambda d: d.rectangle(box, fill=panel))
    light = rng.integers(225, 256, 3)
    write(page, rng, word, row, col, light)
    write(page, rng, digits, row + 1, col, light)
    page.lines.append(f"{word} {digits}")
    page.questions += [("What does the sign say?", f"{word} {digits}"),
                       ("Which number is on the sign?", digits)]
    return page


def chart(rng, cells, split):
    """Up to four bars, one of which has a name below and its value above."""
    page, (rows, cols), ink = blank(rng, cells, 2), cells, dark(rng)
    bars = int(rng.integers(1, min(4, cols // 2) + 1))
    left, named = int(rng.integers(0, cols - 2 * bars + 1)), int(rng.integers(bars))
    tint = tuple(int(c) for c in rng.integers(120, 200, 3))
    base = int(rng.integers(2, rows))                              # the row of the name
    heights = rng.integers(1, base, bars)
    for i, height in enumerate(heights):
        col = left + 2 * i
        box = [col * CELL + 2, (base - height) * CELL, col * CELL + 20, base * CELL - 1]
        draw(page, lambda d: d.rectangle(box, fill=tint))
    month, value = str(rng.choice(MONTHS)), number(rng, 2)
    write(page, rng, value, base - int(heights[named]) - 1, left + 2 * named, ink)
    write(page, rng, month, base, left + 2 * named, ink)
    page.lines.append(f"{month} {value}")
    page.questions += [(f"What is the value of {month}?", value),
                       ("Which month has a value?", month)]
    return page


@lru_cache(maxsize=1)
def scans():
    stored = np.load(Path(__file__).parent / "tiny" / "digits.npz")
    return stored["images"].astype(np.float32) / 16, stored["labels"]


def stamp(page, rng, which, row, col, ink):
    """Handwritten digits, by their numbers in the collection, one a cell from (row, col) on."""
    images, labels = scans()
    shift = rng.integers(-1, 2, 2)
    for i, n in enumerate(which):
        scan = np.asarray(Image.fromarray(images[n]).resize((CELL, CELL), Image.BICUBIC)).clip(0, 1)
        y, x = row * CELL, (col + i) * CELL
        spot = page.canvas[y:y + CELL, x:x + CELL]
        spot += np.roll(scan, shift, axis=(0, 1))[..., None] * (ink - spot)
        page.marks.append((f"written {labels[n]}", x, y, x + CELL, y + CELL))


def digits(rng, cells, split):
    page, (rows, cols), labels = blank(rng, cells, 5), cells, scans()[1]
    count, border = int(rng.integers(2, 4)), len(labels) - HELD_OUT_DIGITS
    which = rng.integers(*((0, border) if split == "train" else (border, len(labels))), count)
    row, col = int(rng.integers(0, rows)), int(rng.integers(0, cols - count + 1))
    stamp(page, rng, which, row, col, dark(rng))
    page.lines.append("".join(str(labels[n]) for n in which))
    page.questions.append(("Which number is handwritten?", page.lines[0]))
    return page


def scene(rng, cells, split):
    """One to four large shapes of different colours: what the reasoning families ask about."""
    page, (rows, cols) = blank(rng, cells, 6), cells
    spots = [(y, x) for y in range(0, rows - 2, 3) for x in range(0, cols - 2, 3)]
    n = int(rng.integers(1, min(4, len(spots)) + 1))
    colours = [str(c) for c in rng.choice(list(COLOURS), n, replace=False)]
    shapes = [str(s) for s in rng.choice(SHAPES, n)]
    centres = []
    for colour, shape, i in zip(colours, shapes, rng.choice(len(spots), n, replace=False)):
        side = int(rng.integers(30, 44))
        y, x = (s * CELL + int(rng.integers(0, 48 - side + 1)) for s in spots[i])
        tint = np.array(COLOURS[colour]) + rng.integers(-14, 15, 3)
        fill = tuple(int(c) for c in tint.clip(0, 255))
        box = [x, y, x + side, y + side]
        corners = [(x, y + side), (x + side, y + side), (x + side // 2, y)]
        outline = {"circle": lambda d: d.ellipse(box, fill=fill),
                   "square": lambda d: d.rectangle(box, fill=fill),
                   "triangle": lambda d: d.polygon(corners, fill=fill)}
        draw(page, outline[shape])
        page.marks.append((f"{colour} {shape}", x, y, x + side, y + side))
        centres.append(spots[i])
    page.shapes = list(zip(colours, shapes, centres))
    return page


def colour(page):
    kinds = [s for _, s, _ in page.shapes]
    return [(f"What color is the {s}?", c) for c, s, _ in page.shapes if kinds.count(s) == 1]


def shape(page):
    return [(f"What shape is {c}?", s) for c, s, _ in page.shapes]


def count(page):
    return [("How many shapes are there?", str(len(page.shapes)))]


def relation(page):
    """Whether a shape stands at the page's top or bottom; on a low page, left or right."""
    axis, words = (1, ("left", "right")) if page.cells[0] < 6 else (0, ("top", "bottom"))
    asked = []
    for colour, _, spot in page.shapes:
        middle = (spot[axis] + 1.5) / page.cells[axis]
        if not 0.35 < middle < 0.6:                 # what stands in the middle is not asked for
            question = f"Is {colour} at the {words[0]} or at the {words[1]}?"
            asked.append((question, words[middle > 0.5]))
    return asked


def asked_scene(rng, cells, split, ask):
    """A scene about which `ask` finds something to ask: a lone shape may have no relation."""
    page = None
    while not page or not page.questions:
        page = scene(rng, cells, split)
        page.questions = ask(page)
    return page


def smooth(rng, cells, split):
    """A scene out of focus, and up to three sharp lines of text that nobody asks about."""
    page = asked_scene(rng, cells, split, colour)
    page.canvas = np.asarray(page.image.filter(ImageFilter.GaussianBlur(3)), np.float32).copy()
    shown = {row for _, _, y0, _, y1 in page.marks for row in range(y0 // CELL, y1 // CELL + 1)}
    for row in rng.permutation([row for row in range(cells[0]) if row not in shown])[:3]:
        line = f"{rng.choice(ITEMS)} {code(rng)}"
        write(page, rng, line, int(row), int(rng.integers(0, cells[1] - 6 + 1)), dark(rng))
        page.lines.append(line)
    return page


def textured(rng, cells, split):
    """A receipt, with some blocks of hard noise where no character is near."""
    page = receipt(rng, cells, split)
    corners = [(y, x) for _, x0, y0, x1, y1 in page.marks
               for y in (y0, y1 - 1) for x in (x0, x1 - 1)]
    near = {(y // CELL + dy, x // CELL + dx) for y, x in corners
            for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    for row, col in np.ndindex(cells):
        if (row, col) not in near and rng.random() < 0.08:
            checks = 110 + 125 * rng.integers(0, 2, (4, 4, 1)).repeat(4, 0).repeat(4, 1)
            page.canvas[row * CELL:(row + 1) * CELL, col * CELL:(col + 1) * CELL] = checks
    return page


DRAW = {f.__name__: f for f in (receipt, form, sign, chart, digits)}
DRAW |= {f.__name__: partial(asked_scene, ask=f) for f in (colour, shape, count, relation)}
DRAW |= dict(smooth=smooth, textured=textured)

SENTENCES = [
    "{name} bought {item} and {item2} in {city} .",
    "the {sign} is near the {street} road in {city} .",
    "in {month} {name} sold {n} boxes of {item} .",
    "a {colour} {shape} is printed on the {item} box .",
    "{name} lives in {city} and works at the {sign} .",
    "the {item} is {adj} but the {item2} is not .",
    "every {month} the {sign} opens at {h} and closes late .",
    "{name} and {name2} walk to the {sign} .",
    "please write the {field} on the form .",
    "the price of {item} rose to {h}.{n} in {month} ."]


def plain_text(rng):
    def one(words):                                       # rng.choice(words), but faster
        return words[rng.integers(len(words))]
    lines = []
    for template in rng.choice(SENTENCES, 6):
        lines.append(str(template).format(
            name=one(NAMES), name2=one(NAMES), item=one(ITEMS), item2=one(ITEMS), city=one(CITIES),
            sign=one(SIGNS), street=one(STREETS), month=one(MONTHS), colour=one(list(COLOURS)),
            shape=one(SHAPES), field=one(FIELDS), adj=one(ADJECTIVES), n=number(rng, 2),
            h=int(rng.integers(1, 10))))
    return " ".join(lines).replace(" .", ".")


# --------------------------------------------------------------------------------------------------
# The world


def near_miss(rng, answer):
    """A wrong answer as a poor reader gives it: a word of a closed set or a character changed."""
    for words in (SHAPES, list(COLOURS), ["left", "right"], ["top", "bottom"]):
        if answer in words:
            return str(rng.choice([w for w in words if w != answer]))
    at = int(rng.choice([i for i, c in enumerate(answer) if c in CHARS[:36]]))
    same = CHARS[26:36] if answer[at].isdigit() else CHARS[:26]
    return answer[:at] + str(rng.choice([c for c in same if c != answer[at]])) + answer[at + 1:]


class World:
    """A sequence of data.Sample, each a pure function of (split, seed, index).

    Args: split "train" or "eval"; seed; suite "reading", "reasoning", "regimes", one family's name,
    or None for the training mixture; cells (rows, columns) of a page, 100 visual tokens by default;
    questions per page at most; pairs=True adds chosen and rejected answers (DPO); length of the
    sequence. Raises ValueError on an unknown split or suite."""

    def __init__(self, split, seed=0, suite=None, cells=(10, 10), questions=3, pairs=False,
                 length=1_000_000):
        suites, families = [*SUITES, *REGIMES], [*DRAW, "text"]
        if split not in ("train", "eval") or suite not in (None, *suites, *families):
            raise ValueError(f"no split {split!r} or suite {suite!r}; splits are train and eval, "
                             f"suites are {', '.join(suites)} or one of {', '.join(families)}")
        if cells[0] < 3 or cells[1] < 7:
            raise ValueError(f"a page of {cells[0]} x {cells[1]} cells is too small for a form; "
                             "3 x 7 is the least")
        self.split, self.seed, self.suite, self.cells = split, seed, suite, cells
        self.questions, self.pairs, self.length = questions, pairs, length

    def __len__(self):
        return self.length

    def rng(self, index):
        return np.random.default_rng([zlib.crc32(self.split.encode()), self.seed, index])

    def family(self, rng, index):
        suite = self.suite
        if suite is None:
            suite = str(rng.choice(list(TRAIN_SHARES), p=list(TRAIN_SHARES.values())))
        families = (SUITES | REGIMES).get(suite, [suite])
        return families[index % len(families)]

    def page(self, rng, family):
        page = DRAW[family](rng, self.cells, self.split)
        chosen = rng.permutation(len(page.questions))[:self.questions]
        page.questions = [page.questions[i] for i in chosen]
        return page

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.sample(index)

    @lru_cache(maxsize=256)             # a plan measures a sample shortly before it is loaded
    def sample(self, index):
        rng = self.rng(index)
        family, name = self.family(rng, index), f"{self.split}-{self.seed}-{index}"
        if family == "text":
            messages = [{"role": "document", "content": texts(plain_text(rng))}]
            return Sample(id=name, messages=messages, source=family)
        page, messages = self.page(rng, family), []
        for i, (question, answer) in enumerate(page.questions):
            image = [{"type": "image"}] if i == 0 else []
            messages += [{"role": "user", "content": image + texts(question)},
                         {"role": "assistant", "content": texts(answer)}]
        sample = Sample(id=name, messages=messages, images=[page.image], source=family)
        if self.pairs:
            answer = page.questions[0][1]
            sample.messages = messages[:1]
            sample.chosen, sample.rejected = texts(answer), texts(near_miss(rng, answer))
        return sample


def contact_sheet(path):
    sheet = Image.new("RGB", (len(DRAW) * 168 + 8, 3 * 198 + 8), "white")
    for i, family in enumerate(DRAW):
        for j in range(3):
            sample = World("train", 0, family)[j]
            sheet.paste(sample.images[0], (8 + 168 * i, 8 + 198 * j))
            question, answer = (m["content"][-1]["text"] for m in sample.messages[:2])
            ImageDraw.Draw(sheet).text((8 + 168 * i, 170 + 198 * j), f"{question}\n{answer}",
                                       fill="black", font=ImageFont.load_default(9))
    sheet.save(path)


if __name__ == "__main__":
    contact_sheet(sys.argv[1] if len(sys.argv) > 1 else "world.png")
