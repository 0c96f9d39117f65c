"""The way of a sample: from files on disk to padded batches (App. C.2 to C.5).

    python data.py check TRAIN.jsonl MIX.json    read every line and image header, say what is wrong
    python data.py convert *.parquet FOLDER      parquet (needs pyarrow) to data.jsonl and images

    line of a file --formats.py--> Sample --Processor.encode--> Encoded --collate--> Batch
                                     +--Processor.length--> Plan: what makes a step, who takes it

What decides the order is arithmetic on (seed, epoch, position): no generator's state, no clock, no
worker. A sample that cannot be used raises BadSample, one sentence that names file and line.

Letters: B batch rows, T positions, C channels (3), p patch_size, t temporal_patch_size, m
spatial_merge_size, gh and gw an image's height and width in patches; of its n = gh·gw patches every
m·m become a visual token (other teachers' files say how theirs come about).
"""
import argparse
import bisect
import copy
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm

from formats import (JSONL, BadSample, NoPreference, Sample, convert, read_recipe,  # noqa: F401
                     texts)
from parts.config import config_class
from parts.images import check_size, flattened, open_image, read_image, upright_size  # noqa: F401

MAX_TEXT_TOKENS = 4096               # App. C.3: pure text is truncated here,
MAX_TOKENS = 8192                    #           vision-text is capped here,
MAX_VISUAL_TOKENS = 2500             #           and one image has at most this many visual tokens
TEXT_SHARE = 1 / 4                   # of MAX_TOKENS: what several large images leave to their text
IGNORED = -100                       # the label of a position that is not supervised


@dataclass
class Encoded:
    id: str
    ids: torch.Tensor                    # (T,) int64
    labels: torch.Tensor                 # (T,) int64: the token AT a supervised position, else -100
    pixels: torch.Tensor | None          # (n over all images, C·t·p·p) float32, by merge block
    grids: torch.Tensor | None           # (images, 3) int64: 1, gh, gw
    source: str = ""
    cut: int = 0                         # text tokens that went to meet the caps
    rho: torch.Tensor | None = None      # (T,) scores from a cache, if Processor.scores is set


@dataclass
class Batch:
    ids: torch.Tensor                    # (B, T) int64
    mask: torch.Tensor                   # (B, T) bool, True at real positions
    labels: torch.Tensor                 # (B, T) int64
    pixels: torch.Tensor | None          # (n over all images of all rows, in row order, C·t·p·p)
    grids: torch.Tensor | None           # (images of all rows, in row order, 3)
    names: list
    sources: list
    rho: torch.Tensor | None = None      # (B, T) scores from a cache; 0 where there are none
    # The rest is set by loader().
    weight: float = 1.0                  # of its sums: 0 for a stand-in that keeps ranks in step
    last: bool = True                    # ends a step
    cursor: dict | None = None           # where to resume once that step is done
    bad: list = field(default_factory=list)

    def _tensors(self, f):
        tensors = {k: x for k, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **{k: f(x) for k, x in tensors.items()})

    def to(self, device):
        return self._tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self):
        return self._tensors(torch.Tensor.pin_memory)


# ---- Processor: Qwen3-VL's image processing, chat template and tokenisation ----------------------

@contextmanager
def located(where):
    """A complaint about an image becomes a BadSample that says which sample shows it."""
    try:
        yield
    except ValueError as error:
        raise BadSample(f"{where}: {error}") from None


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Qwen's target size: sides are multiples of `factor`, the area within bounds, the shape nearly
    kept."""
    h, w = (round(side / factor) * factor for side in (height, width))            # half to even
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor)
                for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


class Processor:
    """Reads tokenizer.json, config.json and, if there, preprocessor_config.json of a model's folder.

    Pixels are bit-identical to transformers' Qwen2VLImageProcessorPil and ids equal
    Qwen3VLProcessor's, but for three exceptions made on purpose. What is transparent shows white.
    Text is text: a literal "<|im_end|>" in a message never becomes the special token. And an answer
    is tokenised on its own, so that the tokens of a prompt are a prefix of those of prompt and
    answer; this differs only where an answer begins with white space that has a line break in it.

    Other teachers' are derived from this one, in their own files: `processor_of` chooses."""
    RELEASED = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "rescale_factor": 1 / 255,
                "image_mean": [.5, .5, .5], "image_std": [.5, .5, .5]}    # the released settings
    SPECIAL = dict(image_pad=("<|image_pad|>", "image_token_id"),         # and its field of config.json
                   vision_start=("<|vision_start|>", "vision_start_token_id"),
                   vision_end=("<|vision_end|>", "vision_end_token_id"), im_start=("<|im_start|>", ""),
                   im_end=("<|im_end|>", ""), endoftext=("<|endoftext|>", ""))
    DECIDES = ("patch", "merge", "temporal", "min_pixels", "max_pixels")  # what the tower sees, besides `table`
    after_image = ""                                 # text that the template has after each image,
    thought = []                                     # and ids before the last answer

    def __init__(self, folder, max_visual_tokens=MAX_VISUAL_TOKENS, max_tokens=MAX_TOKENS,
                 max_text_tokens=MAX_TEXT_TOKENS):
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
        config = json.loads((folder / "config.json").read_text())
        settings = folder / "preprocessor_config.json"
        settings = self.RELEASED | (json.loads(settings.read_text()) if settings.exists() else {})
        self.max_visual_tokens = max_visual_tokens
        self.max_tokens, self.max_text_tokens = max_tokens, max_text_tokens
        self.read_settings(folder, config, settings)
        # A byte has 256 values, so rescaling and normalising are one table, rounded as transformers
        # rounds (the product in float64, the rest in float32).
        scaled = (np.arange(256) * settings["rescale_factor"]).astype(np.float32)
        mean = np.array(settings["image_mean"], np.float32)[:, None]
        std = np.array(settings["image_std"], np.float32)[:, None]
        self.table = (scaled - mean) / std                                                # (C, 256)

        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                       # the package raises nothing more special
            raise ValueError(f"{folder}/tokenizer.json cannot be read: {error}") from None
        self.tokenizer.encode_special_tokens = True      # "text is text", see above
        self.special = {}
        for name, (token, key) in self.SPECIAL.items():
            self.special[name] = self.tokenizer.token_to_id(token)
            if self.special[name] is None or key and config.get(key) != self.special[name]:
                raise ValueError(f"{folder}: {token} is token {self.special[name]} in "
                                 f"tokenizer.json, but {config.get(key, 'needed')} in config.json.")
        # A placeholder is one only where the template puts it, whatever its file says of it.
        self.tokenizer.add_special_tokens([self.SPECIAL["image_pad"][0]])
        self.pad_id = self.special["endoftext"]
        self.scores = None                               # (sample, Encoded) -> rho, from a cache
        self.header, self.newline = self.tokenize("assistant\n"), self.tokenize("\n")

    def read_settings(self, folder, config, settings):
        """What decides the size of an image."""
        vision = config["vision_config"]
        self.patch, self.merge = vision["patch_size"], vision["spatial_merge_size"]
        self.temporal = vision["temporal_patch_size"]
        for name, value in (("patch_size", self.patch), ("merge_size", self.merge)):
            if settings.get(name, value) != value:
                raise ValueError(f"{folder}: {name} is {settings[name]} in "
                                 f"preprocessor_config.json, but {value} in config.json.")
        self.factor = self.patch * self.merge           # a visual token is factor x factor pixels
        self.min_pixels = settings.get("min_pixels") or settings["size"]["shortest_edge"]
        self.max_pixels = min(settings.get("max_pixels") or settings["size"]["longest_edge"],
                              self.max_visual_tokens * self.factor ** 2)
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"{folder}: an image has at least {self.min_pixels} pixels, but "
                             f"{self.max_visual_tokens} visual tokens hold {self.max_pixels} only.")

    limit = property(lambda self: self.max_pixels)       # of one image: here counted in pixels

    def bounded(self, least, most):
        """A copy whose images have so many visual tokens."""
        other = copy.copy(self)
        other.min_pixels, other.max_pixels = (n * self.factor ** 2 for n in (least, most))
        return other

    def __setstate__(self, state):                       # a pickled Tokenizer forgets this switch
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def tokenize(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def target(self, size, max_pixels):
        """(width, height) -> (height, width) after resizing to at most `max_pixels`."""
        return smart_resize(size[1], size[0], self.factor, self.min_pixels, max_pixels)

    def visual_tokens(self, size, max_pixels):
        return math.prod(self.target(size, max_pixels)) // self.factor ** 2

    def patches(self, source, max_pixels=None):
        """Path or PIL image -> pixels (n, C·t·p·p) float32 by merge block, grid [1, gh, gw]."""
        image = read_image(source)
        h, w = self.target(image.size, max_pixels or self.limit)
        return self.cut(image.resize((w, h), Image.Resampling.BICUBIC))

    def cut(self, image):
        """An image of whole merge blocks -> its patches and grid, as above."""
        (w, h), p, m = image.size, self.patch, self.merge
        gh, gw = h // p, w // p
        x = np.asarray(image).reshape(gh // m, m, p, gw // m, m, p, 3)        # rows, columns, C
        x = x.transpose(0, 3, 1, 4, 6, 2, 5).reshape(gh * gw, 3, 1, p * p)    # (n, C, 1, p·p)
        pixels = np.empty((gh * gw, 3, self.temporal, p * p), np.float32)     # (n, C, t, p·p)
        for c in range(3):
            pixels[:, c] = self.table[c][x[:, c]]            # a still picture fills all t frames
        return pixels.reshape(gh * gw, -1), [1, gh, gw]

    def size(self, image):
        """(width, height) of a path, a PIL image or a (width, height), from the header alone."""
        size, name = getattr(image, "size", image), "the image"
        if isinstance(image, (str, Path)):
            name = str(image)
            with open_image(image) as file:
                size = upright_size(file, name)
        check_size(*size, name)
        tokens = self.visual_tokens(size, self.limit)
        if tokens > self.max_visual_tokens:      # a strip: its short side has one token at least
            raise ValueError(f"{name} with {size[0]} x {size[1]} pixels needs {tokens} visual "
                             f"tokens, above the limit of {self.max_visual_tokens}.")
        return size

    def shared_limit(self, sizes):
        """The pixels that each image of a sample may have: the cap is on the whole sample (C.3), so
        several images that would take more than 1 - TEXT_SHARE of it get one lower limit, the
        largest at which they do not. A single image has its own limit, MAX_VISUAL_TOKENS.

        The text does not enter, or a prompt would show other images with another answer."""
        def tokens(limit):                       # and those that stand around each image
            return sum(len(self.image_run(n, size, limit)) for n, size in enumerate(sizes))

        room, limit = int((1 - TEXT_SHARE) * self.max_tokens), self.limit
        if len(sizes) < 2 or tokens(limit) <= room:
            return limit
        limits = self.limits()
        at = bisect.bisect_left(limits, -room, key=lambda limit: -tokens(limit))
        return limits[min(at, len(limits) - 1)]

    def limits(self):
        """All limits of an image, from the largest."""
        token = self.factor ** 2                                                      # in pixels
        return [*range(self.limit // token * token, self.min_pixels, -token), self.min_pixels]

    def as_map(self, rho, grids, size, limit=None):
        """The densities of a sample's first image, of (width, height) in the file, on its page ->
        (rows, columns). limit: of that image, if several share the cap."""
        rows, columns = (n // self.merge for n in grids[0, 1:].tolist())
        return rho[:rows * columns].view(rows, columns)

    def image_run(self, number, size, limit):
        """What stands for a sample's image of that number, counted from 0: ids."""
        s, tokens = self.special, self.visual_tokens(size, limit)
        return [s["vision_start"]] + [s["image_pad"]] * tokens + [s["vision_end"]]

    def runs(self, sample, images, add_generation_prompt=False):
        """The sample as runs [ids, supervised, is_text]; `images` has the ids of each image.

        The released template, which has no default system prompt:
            <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>Question<|im_end|>\\n
            <|im_start|>assistant\\nAnswer<|im_end|>\\n
        Special tokens split the text before BPE sees it, so what stands between two of them is
        tokenised by itself: "user\\n" and a question are one run. A document is its runs and
        <|endoftext|>."""
        s, runs, text, images = self.special, [], "", iter(images)

        def put(ids, supervised=False, is_text=False):
            if ids:
                runs.append([ids, supervised, is_text])

        for message in sample.messages:
            role = message["role"]
            learn, chat = role in ("assistant", "document"), role != "document"
            if chat:
                put([s["im_start"]])
            if role == "assistant":
                put(self.header + (self.thought if message is sample.messages[-1] else []))
            text = role + "\n" if not learn else ""
            for part in message["content"] + [None]:
                if part and part["type"] == "text":
                    text += part["text"]
                    continue
                put(self.tokenize(text), learn, True)        # a run ends at an image or a message
                text = self.after_image if part else ""
                if part:
                    put(next(images))
            put([s["im_end" if chat else "endoftext"]], learn)
            put(self.newline if chat else [])
        put([s["im_start"]] + self.header + self.thought if add_generation_prompt else [])
        return runs

    def shorten(self, runs, cap, where):
        """Cuts the tail of the longest text, again and again, until `cap` holds; -> how many tokens
        went. Image tokens are never touched."""
        excess = cut = max(0, sum(len(ids) for ids, *_ in runs) - cap)
        while excess:
            texts = [i for i, (_, _, is_text) in enumerate(runs) if is_text]
            longest = max(texts, key=lambda i: len(runs[i][0]), default=None)
            ids = [] if longest is None else runs[longest][0]
            room = min(excess, len(ids) - len(self.header) - 1)      # "user\n" stays
            if room <= 0:
                raise BadSample(f"{where} is {excess} tokens above the cap of {cap} even without "
                                "its text.")
            runs[longest][0] = ids[:len(ids) - room]
            runs[longest + 1][1] = False         # a cut answer must not teach to stop there
            excess -= room
        return cut

    def layout(self, sample, add_generation_prompt):
        """-> the runs within the caps, the tokens that went for it, and the limit of an image."""
        where = sample.where or sample.id
        cap = self.max_tokens if sample.images else self.max_text_tokens
        with located(where):
            sizes = [self.size(image) for image in sample.images]
        limit = self.shared_limit(sizes)
        images = [self.image_run(n, size, limit) for n, size in enumerate(sizes)]
        runs = self.runs(sample, images, add_generation_prompt)
        return runs, self.shorten(runs, cap, where), limit

    def length(self, sample, add_generation_prompt=False):
        """The number of tokens encode() will make, without decoding a pixel. Raises BadSample."""
        return sum(len(ids) for ids, *_ in self.layout(sample, add_generation_prompt)[0])

    def encode(self, sample, add_generation_prompt=False):
        """Sample -> Encoded, within the caps. Raises BadSample."""
        runs, cut, limit = self.layout(sample, add_generation_prompt)
        with located(sample.where or sample.id):
            images = [self.patches(image, limit) for image in sample.images]
        ids = torch.tensor([i for ids, *_ in runs for i in ids])                          # (T,)
        learn = torch.tensor([learn for ids, learn, _ in runs for _ in ids])              # (T,)
        pixels = torch.from_numpy(np.concatenate([x for x, _ in images])) if images else None
        grids = torch.cat([torch.tensor(grid).view(-1, 3) for _, grid in images]) if images else None
        labels = torch.where(learn, ids, IGNORED)
        encoded = Encoded(sample.id, ids, labels, pixels, grids, sample.source, cut)
        encoded.rho = self.scores(sample, encoded) if self.scores else None
        return encoded


def processor_of(folder, **caps):
    """The Processor of a model's folder: the one above, or that of another teacher's file."""
    return (config_class(folder)[0].Processor or Processor)(folder, **caps)


def encode_rows(processor, sample):
    """Sample -> list of Encoded: one, or a pair's two, supervised only where their answers differ.
    Raises BadSample; NoPreference if the caps cut the prompts of a pair to different lengths."""
    rows = [processor.encode(row) for row in sample.rows()]
    if len(rows) == 2:
        prompts = []
        for row in rows:
            learned = row.labels != IGNORED
            start = int((learned & ~learned.roll(1)).nonzero()[-1])  # where the last answer begins
            row.labels[:start] = IGNORED
            prompts.append(row.ids[:start])
        if not torch.equal(*prompts):
            raise NoPreference(f"{sample.where or sample.id} has a prompt that leaves no room for "
                               "its answers.")
    return rows


def collate(encoded, pad_id, side="right"):
    """list of Encoded -> Batch, padded on the right (training) or on the left (generation)."""
    B, T = len(encoded), max(len(e.ids) for e in encoded)
    ids, labels = torch.full((B, T), pad_id), torch.full((B, T), IGNORED)
    mask, rho = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T)
    for b, e in enumerate(encoded):
        row = slice(0, len(e.ids)) if side == "right" else slice(T - len(e.ids), T)
        ids[b, row], labels[b, row], mask[b, row] = e.ids, e.labels, True
        rho[b, row] = 0 if e.rho is None else e.rho
    seen = [e for e in encoded if e.pixels is not None]
    pixels = torch.cat([e.pixels for e in seen]) if seen else None
    grids = torch.cat([e.grids for e in seen]) if seen else None
    return Batch(ids, mask, labels, pixels, grids, [e.id for e in encoded],
                 [e.source for e in encoded], rho)


def following(labels):
    """The label of the next token, which is what a position predicts: (B, T) -> (B, T)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


# ---- The order: the same for any number of workers and ranks -------------------------------------

def scramble(x):
    """A fixed bijection on 64-bit integers that leaves no pattern (SplitMix64's finaliser)."""
    x = np.atleast_1d(np.asarray(x, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=32)
def order(n, seed, epoch):
    """(n,) a permutation of 0..n-1: a pure function of its arguments, on every machine."""
    key = scramble(scramble(seed % 2 ** 64) ^ np.uint64(epoch))
    return np.argsort(scramble(np.arange(n, dtype=np.uint64) ^ key), kind="stable")


class Mixture:
    """Several sequences of samples as one, in exact proportions (to rounding). An epoch has
    `samples` slots, by default as many as all sources hold; a source that is too small comes round
    again in a new order, and of one that is too large the next epoch takes the next part. Index
    epoch * len + slot is an epoch's sample in the slot. A source's slots are neighbours."""
    endless = True

    def __init__(self, sources, weights, samples=None, seed=0):
        self.sources, self.names, self.seed = sources, list(sources), seed     # {name: sequence}
        samples = samples or sum(map(len, sources.values()))
        exact = [samples * weights[name] / sum(weights.values()) for name in sources]
        self.quota = [math.floor(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: self.quota[i] - exact[i])
        for which in by_remainder[:samples - sum(self.quota)]:
            self.quota[which] += 1
        self.ends = np.cumsum(self.quota).tolist()

    def __len__(self):
        return self.ends[-1]

    def locate(self, index):
        """-> the source's name, and the index within it."""
        epoch, slot = divmod(index, len(self))
        which = bisect.bisect_right(self.ends, slot)
        name, n = self.names[which], len(self.sources[self.names[which]])
        drawn = epoch * self.quota[which] + slot - (self.ends[which] - self.quota[which])
        turn, position = divmod(drawn, n)                    # how often the source came round
        return name, int(order(n, self.seed + 1000 * (which + 1), turn)[position])

    def __getitem__(self, index):
        name, inner = self.locate(index)
        sample = self.sources[name][inner]
        return replace(sample, id=f"{name}/{sample.id}", source=name)


def read_data(path):
    """A recipe, or a file of samples: whichever it is."""
    if Path(path).suffix == ".json":
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if file.read(64).lstrip().startswith("{"):
                return Mixture(*read_recipe(path))
    data = JSONL(path)
    if not len(data):
        raise ValueError(f"{path} holds no sample.")
    return data


# ---- Batches: which samples make a step, cut into micro-batches, and loaded ----------------------

class BadSamples:
    """What becomes of samples that cannot be used. Without `skip` the first one ends the run. With
    it they are left out and counted; more than `limit` of all (`grace` at least) end the run."""

    def __init__(self, skip=False, limit=0.001, grace=10_000):
        self.skip, self.limit, self.grace = skip, limit, grace
        self.seen, self.bad, self.first = 0, 0, []

    def saw(self, samples, complaints=(), weight=1):
        """`samples` more were looked at; each of these complaints stands for `weight` samples."""
        self.seen += samples
        self.bad += weight * len(complaints)
        self.first = list(dict.fromkeys(self.first + list(complaints)))[:5]
        if complaints and not self.skip:
            raise BadSample(complaints[0])
        if self.bad > self.limit * max(self.seen, self.grace):
            raise BadSample(f"{self.bad} of {self.seen} samples cannot be used, above the limit of "
                            f"{self.limit:.1%}; the first: {' '.join(self.first)}")


def each(samples, make, skip=False):
    """make(name, sample) of every sample of a corpus, once, under its name in a run (a mixture draws
    its sources in rounds), unless it is None. What cannot be used is as `skip` says, and counted."""
    bad, parts = BadSamples(skip), getattr(samples, "sources", {}).items()
    sources = {f"{name}/": source for name, source in parts} or {"": samples}
    places = [(prefix, i) for prefix, source in sources.items() for i in range(len(source))]
    for prefix, i in tqdm(places, unit=" samples"):
        made = None
        try:
            sample = sources[prefix][i]
            made = make(prefix + sample.id, sample)
            bad.saw(1)
        except BadSample as error:
            bad.saw(1, [str(error)])
        if made is not None:
            yield made
    if bad.bad:
        print(f"{bad.bad} of {bad.seen} samples were left out; the first: {' '.join(bad.first)}")


class Micro(NamedTuple):
    """One micro-batch of one rank, before it is loaded."""
    draws: tuple             # epoch * n + index of each sample; empty: a stand-in
    last: bool               # ends its step
    cursor: dict             # where the next step begins


def pack(batch, micro_tokens, world):
    """[(length, draw)] -> lists of them, longest first, each of at most `micro_tokens` = rows x its
    longest (a longer sample stays alone), and a multiple of `world` in number: the widest is halved
    until it is, and once all are single samples empty ones are added."""
    micros = []
    for item in sorted(batch, reverse=True):
        if micros and micros[-1][0][0] * (len(micros[-1]) + 1) <= micro_tokens:
            micros[-1].append(item)
        else:
            micros.append([item])
    while len(micros) % world:
        if divisible := [micro for micro in micros if len(micro) > 1]:
            widest = max(divisible, key=lambda micro: len(micro) * micro[0][0])
            at, half = micros.index(widest), len(widest) // 2
            micros[at:at + 1] = [widest[:half], widest[half:]]
        else:
            micros.append([])
    return micros


def fetch(dataset, draw):
    """The sample of a draw. A dataset with `endless = True` has other samples in later epochs, and
    is given the draw itself."""
    return dataset[draw if getattr(dataset, "endless", False) else draw % len(dataset)]


class Plan:
    """Which samples make each step: an endless iterable of Micro for one rank, a pure function of
    (seed, cursor). Raises BadSample as `bad` decides, ValueError for an empty data set.

    A step takes the next samples of the order until all ranks together have `batch_tokens` tokens;
    rank, world and workers do not enter. Every rank computes this and takes each world-th
    micro-batch, so that what runs at one time is of like length. A sample whose length cannot be
    told is no part of the step, one that fails in decoding is absent from it: in every run alike."""

    def __init__(self, dataset, processor, seed, batch_tokens, micro_tokens, rank=0, world=1,
                 cursor=None, bad=None):
        if not len(dataset):
            raise ValueError("The data set is empty.")
        self.dataset, self.processor, self.seed = dataset, processor, seed
        self.batch_tokens, self.micro_tokens = batch_tokens, micro_tokens
        self.rank, self.world = rank, world
        self.cursor, self.bad = cursor or {"epoch": 0, "position": 0}, bad or BadSamples()

    def gather(self, cursor):
        """-> [(length, draw)] of the step at `cursor`, and the cursor after it."""
        n, epoch, position = len(self.dataset), cursor["epoch"], cursor["position"]
        batch, tokens, misses = [], 0, 0
        while tokens < self.batch_tokens:
            if position == n:
                epoch, position = epoch + 1, 0
            draw = epoch * n + int(order(n, self.seed, epoch)[position])
            position += 1
            try:
                lengths = [self.processor.length(row) for row in fetch(self.dataset, draw).rows()]
                batch.append((max(lengths) * len(lengths), draw))    # a pair, padded to its longer
                tokens += sum(lengths)
                self.bad.saw(1)
            except BadSample as error:
                misses += 1
                if not isinstance(error, NoPreference):
                    self.bad.saw(1, [str(error)])
                if misses >= n and not batch:
                    raise BadSample(f"None of the {n} samples can be used, for instance: "
                                    f"{error}") from None
        return batch, {"epoch": epoch, "position": position}

    def __iter__(self):
        cursor = self.cursor
        while True:
            batch, cursor = self.gather(cursor)
            mine = pack(batch, self.micro_tokens, self.world)[self.rank::self.world]
            for k, micro in enumerate(mine):
                yield Micro(tuple(draw for _, draw in micro), k + 1 == len(mine), cursor)


class Fetch(torch.utils.data.Dataset):
    """Micro -> Batch; what a worker does."""

    def __init__(self, dataset, processor):
        self.dataset, self.processor = dataset, processor

    def __getitem__(self, micro):
        encoded, bad, pad = [], [], self.processor.pad_id
        for draw in micro.draws:
            try:
                encoded += encode_rows(self.processor, fetch(self.dataset, draw))
            except NoPreference:
                pass
            except BadSample as error:
                bad.append(str(error))
        stand_in = Encoded("", torch.tensor([pad]), torch.tensor([IGNORED]), None, None)
        return replace(collate(encoded or [stand_in], pad), weight=float(bool(encoded)),
                       last=micro.last, cursor=micro.cursor, bad=bad)


def loader(dataset, processor, plan, workers=0, pin_memory=False, worker_init_fn=None):
    """Endless iterator of Batch: the plan's micro-batches in the plan's order, whatever the number
    of workers. `batch.last` ends a step, after which a Plan with cursor=batch.cursor goes on."""
    batches = torch.utils.data.DataLoader(
        Fetch(dataset, processor), batch_size=None, sampler=plan, num_workers=workers,
        pin_memory=pin_memory, worker_init_fn=worker_init_fn,
        generator=torch.Generator())                         # or it would advance the global one
    for batch in batches:
        # A fault that shows in decoding is seen by one rank only, and stands for `world` of them.
        plan.bad.saw(0, batch.bad, weight=plan.world)
        yield batch


# ---- Commands ------------------------------------------------------------------------------------

def check(path):
    """Reads every line and image header, prints the first complaints; -> how many are bad."""
    data, bad = read_data(path), 0
    sources = [*data.sources.values()] if isinstance(data, Mixture) else [data]
    for source, i in ((source, i) for source in sources for i in range(len(source))):
        try:
            sample = source[i]
            last = "assistant" if sample.chosen is not None else sample.messages[-1]["role"]
            if last not in ("assistant", "document"):
                raise BadSample(f"{sample.where} ends without an answer: it teaches nothing.")
            with located(sample.where):
                for file in sample.images:
                    open_image(file).close()
        except NoPreference:
            pass
        except BadSample as error:
            bad += 1
            if bad <= 20:
                print(error)
    print(f"{path}: {sum(map(len, sources))} samples, of which {bad} cannot be used.")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check data files, or make JSONL of parquet.")
    parser.add_argument("command", choices=["check", "convert"])
    parser.add_argument("paths", nargs="+")
    args = parser.parse_args()
    if args.command == "convert" and len(args.paths) < 2:
        parser.error("give parquet files and the folder to write to")
    try:
        converts = args.command == "convert"
        bad = convert(args.paths[:-1], args.paths[-1]) if converts else sum(map(check, args.paths))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(1 if bad else 0)
