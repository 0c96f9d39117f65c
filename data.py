"""Samples: files on disk become padded batches for distillation, SFT, DPO and evaluation (App. C.2-C.5).

    python data.py check TRAIN.jsonl MIX.json    read every line and every image header, say what is wrong
    python data.py convert *.parquet FOLDER      parquet (needs pyarrow) to FOLDER/data.jsonl and image files

The way of a sample, which is also this file from top to bottom:

    line of a file --to_sample--> Sample --Processor.encode--> Encoded --collate--> Batch
                                   |
                                   +--Processor.length--> Plan: which samples make a step, and who takes them

What decides the order is arithmetic on (seed, epoch, position): no generator's state, no clock, no worker.
A sample that cannot be used raises BadSample, one sentence that names file and line; nothing ever stands in
for it.

Letters: B batch rows, T positions, C channels (3), p patch_size, t temporal_patch_size, m spatial_merge_size,
gh and gw an image's height and width in patches; of its n = gh·gw patches every m·m become a visual token.
"""
import argparse
import bisect
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from tqdm import tqdm

MAX_TEXT_TOKENS = 4096               # App. C.3: pure text is truncated here,
MAX_TOKENS = 8192                    #           vision-text is capped here,
MAX_VISUAL_TOKENS = 2500             #           and one image has at most this many visual tokens
MAX_IMAGE_PIXELS = 80_000_000        # a file that claims more is refused unread; Pillow warns from 89 million
MAX_ASPECT = 200                     # Qwen's own limit
IGNORED = -100                       # the label of a position that is not supervised
RELEASED = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "rescale_factor": 1 / 255,
            "image_mean": [.5, .5, .5], "image_std": [.5, .5, .5]}    # the released settings

# Table 12: samples by source. A recipe gives each source a file; these names need no weight of their own.
TABLE12 = {"fineweb-edu": 600_000, "dclm": 200_000, "grit": 200_000, "llava-onevision": 100_000,
           "cambrian-ocr": 80_000, "sharegpt-4o": 50_000, "synthdog": 50_000, "benchmark-train": 50_000,
           "obelics": 10_000}


class BadSample(Exception):
    """A sample that cannot be used; the message is one sentence with the file's name and line."""


class NoPreference(BadSample):
    """Rated answers of which none is better, or that do not fit within the caps beside their prompt: not broken,
    but no pair either. Left out by loader() whatever --skip-bad says, and not counted."""


def unwritable(text):
    """Half of a surrogate pair, as a cut emoji leaves behind: JSON may hold it, no encoding can."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def is_text(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


@dataclass
class Sample:
    """One example. `messages` is [{"role", "content"}] with content a list of {"type": "text", "text": str}
    and {"type": "image"}; the image parts consume `images` in order. Running text has the single role
    "document": no template, every text token supervised. For DPO `messages` ends with the user's turn, and
    `chosen` and `rejected` are the contents of two answers to it. Raises BadSample on what the template has
    no place for."""
    id: str
    messages: list
    images: list = field(default_factory=list)     # PIL images or paths; (width, height) will do for length()
    source: str = ""                               # which data set, for the log
    chosen: list | None = None
    rejected: list | None = None
    where: str = ""                                # "train.jsonl line 7", for complaints

    def __post_init__(self):
        images, where = 0, self.where or self.id
        for message in self.messages:
            role, parts = message["role"], message["content"]
            if role not in ("system", "user", "assistant", "document"):
                raise BadSample(f"{where} has the unknown role {role!r}.")
            for part in parts:
                if part["type"] != "image" and not is_text(part):
                    raise BadSample(f"{where} has a content part that is neither text nor image.")
            images += (shown := sum(p["type"] == "image" for p in parts))
            if shown and role in ("system", "assistant"):
                raise BadSample(f"{where} has an image in the {role}'s turn; only a user shows one.")
        if (self.chosen is None) != (self.rejected is None):
            raise BadSample(f"{where} has one of chosen and rejected without the other.")
        for part in [*(self.chosen or ()), *(self.rejected or ())]:
            if not is_text(part):
                raise BadSample(f"{where} has a chosen or rejected answer that is not text.")
        contents = [m["content"] for m in self.messages] + [self.chosen or [], self.rejected or []]
        if any(unwritable(part.get("text", "")) for content in contents for part in content):
            raise BadSample(f"{where} has text that is not Unicode (half of a surrogate pair).")
        if not self.messages or images != len(self.images):
            raise BadSample(f"{where} has {len(self.messages)} messages with {images} image markers, and "
                            f"{len(self.images)} images.")

    def answered(self, content):
        """The prompt with an assistant's answer, e.g. sample.answered(sample.chosen)."""
        return replace(self, messages=self.messages + [{"role": "assistant", "content": content}],
                       chosen=None, rejected=None)

    def rows(self):
        """The rows this makes in a batch: itself, or the chosen and the rejected answer of a pair."""
        return [self] if self.chosen is None else [self.answered(self.chosen), self.answered(self.rejected)]


@dataclass
class Encoded:
    id: str
    ids: torch.Tensor                    # (T,) int64
    labels: torch.Tensor                 # (T,) int64: the token AT a supervised position, else -100
    pixels: torch.Tensor | None          # (n over all images, C·t·p·p) float32, in merge-block order
    grids: torch.Tensor | None           # (images, 3) int64: 1, gh, gw
    source: str = ""
    cut: int = 0                         # text tokens that went to meet the caps
    rho: torch.Tensor | None = None      # (T,) scores from a cache, where Processor.scores was given


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
    weight: float = 1.0                  # of its sums and counts: 0 for a stand-in that keeps ranks in step
    last: bool = True                    # ends a step
    cursor: dict | None = None           # where to resume once that step is done
    bad: list = field(default_factory=list)

    def _tensors(self, f):
        return replace(self, **{name: f(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)})

    def to(self, device):
        return self._tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self):
        return self._tensors(torch.Tensor.pin_memory)


# ------------------------------------------------------------------------------------------------------------
# Images

@contextmanager
def located(where):
    """Puts the sample's place before the sentence of a BadSample raised inside."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{where}: {error}") from None


def decoded(step, image, name):
    """step(image), any complaint made a BadSample: broken files let Pillow raise nearly anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # of size (our own limit is lower) and of odd metadata
            return step(image)
    except FileNotFoundError:
        raise BadSample(f"image file {name} is missing.") from None
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample(f"{name} cannot be read as an image ({type(error).__name__}: {error}).") from None


def open_image(path):
    """A file with its header read and nothing decoded."""
    return decoded(Image.open, path, str(path))


def flattened(image):
    """Any mode -> RGB, transparency composited on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image)
    return image.convert("RGB")


def refuse_size(width, height, name):
    if width * height > MAX_IMAGE_PIXELS:
        raise BadSample(f"{name} has {width} x {height} pixels, above the limit of {MAX_IMAGE_PIXELS:,}.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(f"{name} has {width} x {height} pixels, a ratio above {MAX_ASPECT}.")


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Qwen's target size: sides are multiples of `factor`, the area within bounds, the shape nearly kept."""
    h, w = (round(side / factor) * factor for side in (height, width))              # half to even
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


# ------------------------------------------------------------------------------------------------------------
# Processor: Qwen3-VL's image processing, chat template and tokenisation

class Processor:
    """Reads tokenizer.json, config.json and, if it is there, preprocessor_config.json of a model's folder.

    Pixels are bit-identical to transformers' Qwen2VLImageProcessorPil and ids equal Qwen3VLProcessor's, with
    three exceptions made on purpose. What is transparent shows white, not what lies under it. Text is text: a
    literal "<|im_end|>" in a message is spelled out and never becomes the special token. And an answer is tokenised
    on its own, so that the tokens of the prompt (which ends in "<|im_start|>assistant\\n") are a prefix of those of
    prompt and answer, whatever the answer; this differs only if the answer begins with white space that has a line
    break in it."""

    def __init__(self, folder, max_visual_tokens=MAX_VISUAL_TOKENS, max_tokens=MAX_TOKENS,
                 max_text_tokens=MAX_TEXT_TOKENS):
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
        config = json.loads((folder / "config.json").read_text())
        settings = folder / "preprocessor_config.json"
        settings = RELEASED | (json.loads(settings.read_text()) if settings.exists() else {})
        vision = config["vision_config"]
        self.patch, self.merge = vision["patch_size"], vision["spatial_merge_size"]
        self.temporal = vision["temporal_patch_size"]
        for name, value in (("patch_size", self.patch), ("merge_size", self.merge)):
            if settings.get(name, value) != value:
                raise ValueError(f"{folder}: {name} is {settings[name]} in preprocessor_config.json, but "
                                 f"{value} in config.json.")
        self.factor = self.patch * self.merge                # a visual token is factor x factor pixels
        self.max_visual_tokens = max_visual_tokens
        self.max_tokens, self.max_text_tokens = max_tokens, max_text_tokens
        self.min_pixels = settings.get("min_pixels") or settings["size"]["shortest_edge"]
        self.max_pixels = min(settings.get("max_pixels") or settings["size"]["longest_edge"],
                              max_visual_tokens * self.factor ** 2)
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"{folder}: an image has at least {self.min_pixels} pixels, but "
                             f"{max_visual_tokens} visual tokens hold {self.max_pixels} only.")
        # A byte has 256 values, so rescaling and normalising are one table, rounded as transformers rounds
        # (the product in float64, the rest in float32).
        scaled = (np.arange(256) * settings["rescale_factor"]).astype(np.float32)
        mean, std = (np.array(settings[key], np.float32)[:, None] for key in ("image_mean", "image_std"))
        self.table = (scaled - mean) / std                                                      # (C, 256)

        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                           # the package raises nothing more special
            raise ValueError(f"{folder}/tokenizer.json cannot be read: {error}") from None
        self.tokenizer.encode_special_tokens = True          # "text is text", see above
        self.special = {}
        for name, key in (("im_start", None), ("im_end", None), ("endoftext", None),
                          ("image_pad", "image_token_id"), ("vision_start", "vision_start_token_id"),
                          ("vision_end", "vision_end_token_id")):
            self.special[name] = ours = self.tokenizer.token_to_id(f"<|{name}|>")
            if ours is None or key and config[key] != ours:
                raise ValueError(f"{folder}: <|{name}|> is token {ours} in tokenizer.json, but "
                                 f"{config.get(key, 'needed')} in config.json.")
        self.pad_id = self.special["endoftext"]
        self.scores = None                                               # (sample, Encoded) -> Encoded.rho, from a cache
        self.header, self.newline = self.tokenize("assistant\n"), self.tokenize("\n")

    def __setstate__(self, state):                           # a pickled Tokenizer forgets this switch
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def tokenize(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    # -- images

    def target(self, size, name):
        """(width, height) -> (height, width) after resizing. Refuses by the header, before any decoding."""
        width, height = size
        refuse_size(width, height, name)
        h, w = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        if h * w > self.max_visual_tokens * self.factor ** 2:            # a long strip under a low limit
            raise BadSample(f"{name} with {width} x {height} pixels needs {h * w // self.factor ** 2} visual "
                            f"tokens, above the limit of {self.max_visual_tokens}.")
        return h, w

    def visual_tokens(self, source, name="an image"):
        """Visual tokens of a path, PIL image or (width, height), from the header alone. (The orientation that
        cameras note in EXIF may exchange the sides; the count stays.)"""
        if isinstance(source, (str, Path)):
            with open_image(source) as image:
                return self.visual_tokens(image.size, str(source))
        h, w = self.target(source if isinstance(source, tuple) else source.size, name)
        return h * w // self.factor ** 2

    def patches(self, source, name="an image"):
        """Path or PIL image -> pixels (n, C·t·p·p) float32 in merge-block order, and the grid [1, gh, gw].

        Like transformers, turns a file upright by its EXIF orientation and takes a PIL image as it is. Of an
        animation the first frame counts."""
        if isinstance(source, (str, Path)):
            with open_image(source) as image:
                self.target(image.size, str(source))
                return self.patches(decoded(ImageOps.exif_transpose, image, str(source)), str(source))
        h, w = self.target(source.size, name)
        image = decoded(flattened, source, name).resize((w, h), Image.Resampling.BICUBIC)
        p, m, gh, gw = self.patch, self.merge, h // self.patch, w // self.patch
        x = np.asarray(image).reshape(gh // m, m, p, gw // m, m, p, 3)                  # rows, columns, C
        x = x.transpose(0, 3, 1, 4, 6, 2, 5).reshape(gh * gw, 3, 1, p * p)              # (n, C, 1, p·p)
        pixels = np.empty((gh * gw, 3, self.temporal, p * p), np.float32)               # (n, C, t, p·p)
        for c in range(3):
            pixels[:, c] = self.table[c][x[:, c]]            # a still picture fills all t frames
        return pixels.reshape(gh * gw, -1), [1, gh, gw]

    # -- text

    def segments(self, sample, visual, add_generation_prompt=False):
        """The sample as runs [ids, supervised, is_text]; `visual` has the number of tokens of each image.

        The released template, which has no default system prompt:
            <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>Question<|im_end|>\\n
            <|im_start|>assistant\\nAnswer<|im_end|>\\n
        Special tokens split the text before BPE sees it, so a run between two of them is tokenised by itself,
        and neighbouring texts are joined first: "user\\n" and a question are one run. A document is its runs
        and <|endoftext|>."""
        s, out, text, visual = self.special, [], "", iter(visual)

        def put(ids, supervised=False, is_text=False):
            if ids:
                out.append([ids, supervised, is_text])

        for message in sample.messages:
            role = message["role"]
            learn, chat = role in ("assistant", "document"), role != "document"
            if chat:
                put([s["im_start"]])
            if role == "assistant":
                put(self.header)
            text = role + "\n" if not learn else ""
            for part in message["content"] + [None]:
                if part and part["type"] == "text":
                    text += part["text"]
                    continue
                put(self.tokenize(text), learn, True)        # a run ends at an image or with the message
                text = ""
                if part:
                    put([s["vision_start"]] + [s["image_pad"]] * next(visual) + [s["vision_end"]])
            put([s["im_end" if chat else "endoftext"]], learn)
            put(self.newline if chat else [])
        put([s["im_start"]] + self.header if add_generation_prompt else [])
        return out

    def shorten(self, segments, limit, where):
        """Cuts the tail of the longest text, again and again, until `limit` holds; -> number of tokens that
        went. Image tokens are never touched. An answer that lost its tail no longer teaches where to stop."""
        excess = cut = max(0, sum(len(ids) for ids, *_ in segments) - limit)
        while excess:
            texts = [i for i, (_, _, is_text) in enumerate(segments) if is_text]
            at = max(texts, key=lambda i: len(segments[i][0]), default=None)
            room = 0 if at is None else len(segments[at][0]) - len(self.header) - 1    # "user\n" stays
            if room <= 0:
                raise BadSample(f"{where} is {excess} tokens above the cap of {limit} even without its text.")
            ids = segments[at][0]
            segments[at][0] = ids[:len(ids) - min(room, excess)]
            segments[at + 1][1] = False
            excess -= min(room, excess)
        return cut

    def length(self, sample, add_generation_prompt=False):
        """The number of tokens encode() will make, without decoding a pixel. Raises BadSample."""
        where = sample.where or sample.id
        with located(where):
            visual = [self.visual_tokens(image, f"image {k + 1}") for k, image in enumerate(sample.images)]
        segments = self.segments(sample, visual, add_generation_prompt)
        self.shorten(segments, self.max_tokens if visual else self.max_text_tokens, where)
        return sum(len(ids) for ids, *_ in segments)

    def encode(self, sample, add_generation_prompt=False):
        """Sample -> Encoded, within the caps. Raises BadSample."""
        where = sample.where or sample.id
        with located(where):
            images = [self.patches(image, f"image {k + 1}") for k, image in enumerate(sample.images)]
        visual = [len(pixels) // self.merge ** 2 for pixels, _ in images]
        segments = self.segments(sample, visual, add_generation_prompt)
        cut = self.shorten(segments, self.max_tokens if visual else self.max_text_tokens, where)
        ids = torch.tensor([i for run, *_ in segments for i in run])                            # (T,)
        learn = torch.tensor([learn for run, learn, _ in segments for _ in run])                # (T,)
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in images])) if images else None
        grids = torch.tensor([grid for _, grid in images]) if images else None
        encoded = Encoded(sample.id, ids, torch.where(learn, ids, IGNORED), pixels, grids, sample.source, cut)
        encoded.rho = self.scores(sample, encoded) if self.scores else None
        return encoded


def encode_rows(processor, sample):
    """Sample -> list of Encoded: one, or a pair's two, which supervise only the answer that differs. Raises
    BadSample; NoPreference if the caps cut the prompts of a pair to different lengths."""
    rows = [processor.encode(row) for row in sample.rows()]
    if len(rows) == 2:
        prompts = []
        for row in rows:
            learned = row.labels != IGNORED
            start = int((learned & ~learned.roll(1)).nonzero()[-1])      # where the last answer begins
            row.labels[:start] = IGNORED
            prompts.append(row.ids[:start])
        if not torch.equal(*prompts):
            raise NoPreference(f"{sample.where or sample.id} has a prompt that leaves no room for its answers.")
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
    return Batch(ids, mask, labels, torch.cat([e.pixels for e in seen]) if seen else None,
                 torch.cat([e.grids for e in seen]) if seen else None,
                 [e.id for e in encoded], [e.source for e in encoded], rho)


# ------------------------------------------------------------------------------------------------------------
# Readers: the fields of one line -> the fields of a Sample

def texts(string):
    return [{"type": "text", "text": string}]


def marked(string, images=()):
    """Text with <image> markers -> content parts; `images` that no marker mentions come first."""
    pieces = string.split("<image>")
    parts = [{"type": "image"} for _ in images] if len(pieces) == 1 else []
    for k, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (k > 0) + (texts(piece) if piece else [])
    return parts


def tidy(string):
    """LLaVA's convention puts a line break between <image> and the question. It is a separator, not text."""
    return string.replace("<image>\n", "<image>").replace("\n<image>", "<image>")


def listed(value):
    """A field that holds nothing, one thing or a list of things -> a list."""
    return value if isinstance(value, list) else [value] if value else []


def only(fields, allowed, what, needed=()):
    if unknown := sorted(set(fields) - set(allowed)):
        raise ValueError(f"unknown field {', '.join(unknown)} in {what}")
    if missing := sorted(set(needed) - set(fields)):
        raise ValueError(f"no field {', '.join(missing)} in {what}")


def read_json(path):
    """A whole JSON file. Raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None


def read_messages(row):
    """The native format, where text is in parts and only text; and Qwen's and LLaMA-Factory's, where content
    is a string with <image> markers, or an image part carries its own path. UltraChat repeats its prompt."""
    only(row, ("id", "source", "images", "messages", "chosen", "rejected", "prompt", "prompt_id"), "the sample")
    images, messages = list(listed(row.get("images"))), []
    for message in row["messages"]:
        only(message, ("role", "content"), "a message")
        parts = message["content"]
        parts = marked(parts) if isinstance(parts, str) else parts
        for part in parts:
            only(part, ("type", "text" if part["type"] == "text" else "image"), "a content part")
        images += [part["image"] for part in parts if "image" in part]
        parts = [{key: part[key] for key in part if key != "image"} for part in parts]
        messages.append({"role": message["role"], "content": parts})
    answers = {key: texts(row[key]) if isinstance(row[key], str) else row[key]
               for key in ("chosen", "rejected") if row.get(key) is not None}
    return dict(messages=messages, images=images, **answers)


def read_llava(row):
    role = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
    system = [{"role": "system", "content": texts(row["system"])}] if row.get("system") else []
    answers = {key: texts(row[key]["value"]) for key in ("chosen", "rejected") if row.get(key) is not None}
    return dict(images=listed(row.get("image")) or listed(row.get("images")),
                messages=system + [{"role": role[turn["from"]], "content": marked(tidy(turn["value"]))}
                                   for turn in row["conversations"]], **answers)


def read_mmpr(row):
    images = listed(row.get("image"))
    return dict(messages=[{"role": "user", "content": marked(tidy(row["question"]), images)}], images=images,
                chosen=texts(row["chosen"]), rejected=texts(row["rejected"]))


def read_rlhfv(row):
    """RLHF-V: the text column is itself JSON with question, chosen and rejected."""
    return read_mmpr(json.loads(row["text"]) | {"image": row.get("image") or row["image_path"]})


def read_vlfeedback(row):
    """VLFeedback, and UltraFeedback before it was binarised: several answers, each rated on several aspects;
    the best mean against the worst."""
    answers, rated = row["completions"], []
    if isinstance(answers, dict):                            # records may be stored as columns
        answers = [dict(zip(answers, values)) for values in zip(*answers.values())]
    for k, answer in enumerate(answers):
        marks = [str(aspect.get("Rating")) for aspect in answer["annotations"].values()]
        marks = [float(mark) for mark in marks if mark.replace(".", "", 1).isdigit()]      # not "N/A"
        if marks:
            rated.append((sum(marks) / len(marks), -k, answer["response"]))
    if not rated or max(rated)[0] == min(rated)[0]:
        raise NoPreference("has no answer that is rated better than another")
    return read_mmpr({"question": row.get("prompt") or row["instruction"],
                      "image": row.get("image") or row.get("img_path"),
                      "chosen": max(rated)[2], "rejected": min(rated)[2]})


def read_ultrafeedback(row):
    """UltraFeedback, binarised: two conversations that differ in their last message."""
    chosen, rejected = ([{"role": m["role"], "content": texts(m["content"])} for m in row[key]]
                        for key in ("chosen", "rejected"))
    if any("<image>" in part["text"] for message in chosen for part in message["content"]):
        raise ValueError("a conversation as chosen and as rejected is text alone, but has <image>")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    if chosen[-1] == rejected[-1]:
        raise NoPreference("has the same answer as chosen and as rejected")
    return dict(messages=chosen[:-1], chosen=chosen[-1]["content"], rejected=rejected[-1]["content"])


def read_interleaved(row):
    """OBELICS: two lists of one length, with a text or an image (here a path) at each place."""
    pairs = [(text, image) for text, image in zip(row["texts"], row["images"], strict=True) if text or image]
    parts = [part for text, _ in pairs for part in (texts(text) if text else [{"type": "image"}])]
    return dict(messages=[{"role": "document", "content": parts}],
                images=[image for text, image in pairs if not text])


def asked(row, question, answer):
    images = listed(row["image"])
    return dict(images=images, messages=[{"role": "user", "content": marked(question, images)},
                                         {"role": "assistant", "content": texts(answer)}])


def read_vqa(row):
    """The benchmarks' training splits (DocVQA, TextVQA, ...): a question and its accepted answers; the first one."""
    return asked(row, row["question"], (listed(row.get("answers")) or listed(row["answer"]))[0])


def read_choices(row):
    """AI2D: options, and the number of the right one. The answer is its letter, as evaluate.py asks for it."""
    options = [f"{chr(65 + i)}. {option}" for i, option in enumerate(row["options"])]
    if not 0 <= (right := int(row["answer"])) < len(options):
        raise ValueError(f"the answer {row['answer']} is none of {len(options)} options")
    hint = "Answer with the option's letter from the given choices directly."
    return asked(row, "\n".join([row["question"], *options, hint]), chr(65 + right))


def read_chartqa(row):
    return asked(row, row["query"], listed(row["label"])[0])


def read_synthdog(row):
    """SynthDoG: a page and all that is written on it, in JSON."""
    written = json.loads(row["ground_truth"])["gt_parse"]["text_sequence"]
    return dict(images=listed(row["image"]), messages=[
        {"role": "user", "content": [{"type": "image"}, *texts("Read all the text in the image.")]},
        {"role": "assistant", "content": texts(written)}])


def read_text(row):
    """FineWeb-Edu, DCLM: running text without a template; every token is supervised, <|endoftext|> too."""
    return dict(messages=[{"role": "document", "content": texts(row["text"])}])


# A line is read by the first row of this table whose columns it has. Published files carry further columns,
# which are ignored; the `messages` formats are strict.
FORMATS = [
    ({"prompt", "chosen", "rejected"}, read_ultrafeedback),              # its messages repeat the chosen ones
    ({"messages"}, read_messages),
    ({"conversations"}, read_llava),
    ({"prompt", "completions"}, read_vlfeedback),
    ({"instruction", "completions"}, read_vlfeedback),
    ({"question", "chosen", "rejected"}, read_mmpr),
    ({"chosen", "rejected"}, read_ultrafeedback),
    ({"question", "image", "options", "answer"}, read_choices),
    ({"query", "image", "label"}, read_chartqa),
    ({"question", "image", "answers"}, read_vqa),
    ({"question", "image", "answer"}, read_vqa),
    ({"image", "ground_truth"}, read_synthdog),
    ({"text", "image"}, read_rlhfv),
    ({"text", "image_path"}, read_rlhfv),
    ({"texts", "images"}, read_interleaved),
    ({"text"}, read_text),
]


def to_sample(row, folder, where, source):
    """A parsed line -> Sample. Raises BadSample."""
    read = next((read for columns, read in FORMATS if isinstance(row, dict) and columns <= set(row)), None)
    if read is None:
        found = f"the fields {', '.join(sorted(row))}" if isinstance(row, dict) else "no fields"
        raise BadSample(f"{where} has {found}, which fit no known format.")
    try:
        fields = read(row)
        if links := [i for i in fields.get("images", ()) if i.startswith(("http://", "https://"))]:
            raise BadSample(f"{where} has an image by its address ({links[0]}): download it and give its path.")
        shown = [i for column in ("image", "images", "videos", "video") for i in listed(row.get(column)) if i]
        if row.get("videos") or row.get("video") or shown and not fields.get("images"):
            raise BadSample(f"{where} has images or videos that its format has no place for.")
        fields["images"] = [str(folder / image.removeprefix("file://")) for image in fields.get("images", ())]
        name = row.get("id") if read is read_messages else None      # published ids repeat, lines do not
        return Sample(str(name or where), source=row.get("source") or source, where=where, **fields)
    except NoPreference as error:
        raise NoPreference(f"{where} {error}.") from None
    except KeyError as error:
        raise BadSample(f"{where} has no field {error}, or it holds an unknown value.") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise BadSample(f"{where} is malformed: {error}.") from None


class JSONL:
    """A file of samples as a sequence that reads a line when asked for it; one pass at the start finds the
    lines. Also a .json file that is one list, as LLaVA's and LLaMA-Factory's are; that one is kept in memory.
    Image paths are relative to the file's folder, or to `images`. Raises BadSample on reading a bad line,
    ValueError for a parquet file."""

    def __init__(self, path, source=None, images=None):
        self.path, self.rows, self.folder = Path(path), None, Path(images or Path(path).parent)
        self.source = source or self.path.stem
        if self.path.suffix == ".parquet":
            raise ValueError(f"{path} is parquet; first run `python data.py convert {path} FOLDER`.")
        with open(self.path, "rb") as file:
            if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                self.rows = read_json(path)
                return
            file.seek(0)
            ends, blank = [0], []
            for line in file:
                ends.append(ends[-1] + len(line))
                blank.append(line.isspace())
        self.lines = np.flatnonzero(~np.array(blank, bool))              # counted from 0
        self.starts = np.array(ends, np.int64)[self.lines]

    def __len__(self):
        return len(self.rows if self.rows is not None else self.lines)

    def __getitem__(self, index):
        if self.rows is not None:
            where = f"{self.path.name} item {index + 1}"
            return to_sample(self.rows[index], self.folder, where, self.source)
        where = f"{self.path.name} line {self.lines[index] + 1}"
        with open(self.path, "rb") as file:                              # opened anew: workers share no place
            file.seek(self.starts[index])
            try:
                row = json.loads(file.readline())
            except ValueError as error:                                  # bad JSON or bad UTF-8
                raise BadSample(f"{where} is not JSON ({error}).") from None
        return to_sample(row, self.folder, where, self.source)


read_jsonl = JSONL


# ------------------------------------------------------------------------------------------------------------
# The order: arithmetic on (seed, epoch, position), the same for any number of workers and ranks

def scramble(x):
    """A fixed bijection on 64-bit integers that leaves no pattern (the finaliser of SplitMix64)."""
    x = np.atleast_1d(np.asarray(x, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=32)
def order(n, seed, epoch):
    """(n,) a permutation of 0..n-1: a pure function of its arguments, on every machine and in every numpy."""
    key = scramble(scramble(seed % 2 ** 64) ^ np.uint64(epoch))
    return np.argsort(scramble(np.arange(n, dtype=np.uint64) ^ key), kind="stable")


class Mixture:
    """Several sequences of samples as one, in exact proportions (to rounding). An epoch has `samples` slots,
    by default as many as all sources hold; a source that is too small comes round again in a new order, and
    of one that is too large the next epoch takes the next part. Index epoch * len + slot is that epoch's
    sample in the slot. The slots of a source are neighbours; Plan permutes them."""
    endless = True

    def __init__(self, sources, weights, samples=None, seed=0):
        self.sources, self.names, self.seed = sources, list(sources), seed       # sources: {name: sequence}
        for name, source in sources.items():
            if not len(source) or not weights[name] > 0:
                raise ValueError(f"source {name} has {len(source)} samples and the weight {weights[name]}; "
                                 "both must be above 0.")
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
        turn, position = divmod(drawn, n)                                   # the source's round, from 0
        return name, int(order(n, self.seed + 1000 * (which + 1), turn)[position])

    def __getitem__(self, index):
        name, inner = self.locate(index)
        sample = self.sources[name][inner]
        return replace(sample, id=f"{name}/{sample.id}", source=name)


def read_recipe(path):
    """{"sources": [{"name", "path", "weight", "images"}], "samples", "seed"} -> Mixture. Paths are relative to the
    recipe's folder; `images` is where those of a source lie, if not beside its file. A weight is a share in samples;
    without one it is Table 12's, if the name is there, or the source's size."""
    path = Path(path)
    recipe = read_json(path)
    only(recipe, ("sources", "samples", "seed"), path, needed=("sources",))
    sources, weights = {}, {}
    for entry in recipe["sources"]:
        only(entry, ("name", "path", "weight", "images"), path, needed=("name", "path"))
        name = entry["name"]
        if name in sources:
            raise ValueError(f"{path} names the source {name} twice.")
        images = path.parent / entry["images"] if "images" in entry else None
        sources[name] = JSONL(path.parent / entry["path"], name, images)
        weights[name] = entry.get("weight", TABLE12.get(name, len(sources[name])))
        if not isinstance(weights[name], (int, float)):
            raise ValueError(f"{path}: the weight of {name} is {weights[name]!r}, not a number.")
    if not sources or not isinstance(recipe.get("samples", 1), int) or recipe.get("samples", 1) < 1:
        raise ValueError(f"{path} needs sources, and samples as a number above 0.")
    return Mixture(sources, weights, recipe.get("samples"), recipe.get("seed", 0))


def read_data(path):
    """A recipe, or a file of samples: whichever it is."""
    if Path(path).suffix == ".json":
        with open(path, encoding="utf-8-sig") as file:
            if file.read(64).lstrip().startswith("{"):
                return read_recipe(path)
    data = JSONL(path)
    if not len(data):
        raise ValueError(f"{path} holds no sample.")
    return data


# ------------------------------------------------------------------------------------------------------------
# Batches: which samples make a step, cut into micro-batches, and loaded

class BadSamples:
    """What becomes of samples that cannot be used. Without `skip` the first one ends the run. With it they
    are left out and counted, and more than `limit` of all samples (taken as `grace` at least) end the run."""

    def __init__(self, skip=False, limit=0.001, grace=10_000):
        self.skip, self.limit, self.grace = skip, limit, grace
        self.seen, self.bad, self.first = 0, 0, []

    def saw(self, samples, complaints=(), weight=1):
        """`samples` more were looked at, with these complaints, each of which stands for `weight` samples."""
        self.seen += samples
        self.bad += weight * len(complaints)
        self.first = list(dict.fromkeys(self.first + list(complaints)))[:5]
        if complaints and not self.skip:
            raise BadSample(complaints[0])
        if self.bad > self.limit * max(self.seen, self.grace):
            raise BadSample(f"{self.bad} of {self.seen} samples cannot be used, above the limit of "
                            f"{self.limit:.1%}; the first: {' '.join(self.first)}")


def each(samples, make, skip=False):
    """make(name, sample) of every sample of a corpus, once, under its name in a run (a mixture draws its sources in
    rounds), unless it is None. What cannot be used is as `skip` says, and at the end it is counted."""
    bad = BadSamples(skip)
    sources = {f"{n}/": source for n, source in getattr(samples, "sources", {}).items()} or {"": samples}
    for prefix, i in tqdm([(p, i) for p, source in sources.items() for i in range(len(source))], unit=" samples"):
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
    """One micro-batch of one rank."""
    draws: tuple             # epoch * n + index of each sample; empty: a stand-in
    last: bool               # ends its step
    cursor: dict             # where the next step begins


def pack(batch, micro_tokens, world):
    """[(length, draw)] -> lists of them, longest first, each of at most `micro_tokens` = rows x its longest
    (a longer sample stays alone), and a multiple of `world` in number: the widest is halved until it is, and
    once all are single samples empty ones are added."""
    micros = []
    for item in sorted(batch, reverse=True):
        if micros and micros[-1][0][0] * (len(micros[-1]) + 1) <= micro_tokens:
            micros[-1].append(item)
        else:
            micros.append([item])
    while len(micros) % world:
        widest = max((x for x in micros if len(x) > 1), key=lambda x: len(x) * x[0][0], default=None)
        if widest:
            at, half = micros.index(widest), len(widest) // 2
            micros[at:at + 1] = [widest[:half], widest[half:]]
        else:
            micros.append([])
    return micros


def fetch(dataset, draw, peek=False):
    """The sample of a draw. A dataset with `endless = True` has other samples in later epochs and gets the
    draw itself; one with peek(i) can describe a sample without its pixels, (width, height) in their place."""
    get = dataset.peek if peek and hasattr(dataset, "peek") else dataset.__getitem__
    return get(draw if getattr(dataset, "endless", False) else draw % len(dataset))


class Plan:
    """Which samples make each step: an endless iterable of Micro for one rank, and a pure function of (seed,
    cursor).

    A step takes the next samples of the order until all ranks together have `batch_tokens` tokens; rank,
    world and workers do not enter. Every rank computes this and takes each world-th micro-batch, so that what
    runs at one time is of like length. A sample whose length cannot be told (a bad line, a missing or broken
    image header) is no part of the step; one that fails in decoding is absent from its micro-batch. Both are
    the same in every run. Raises BadSample as `bad` decides, ValueError for an empty data set."""

    def __init__(self, dataset, processor, seed, batch_tokens, micro_tokens, rank=0, world=1, cursor=None,
                 bad=None):
        if not len(dataset):
            raise ValueError("The data set is empty.")
        self.dataset, self.processor, self.seed = dataset, processor, seed
        self.batch_tokens, self.micro_tokens, self.rank, self.world = batch_tokens, micro_tokens, rank, world
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
                lengths = [self.processor.length(row) for row in fetch(self.dataset, draw, peek=True).rows()]
                batch.append((max(lengths) * len(lengths), draw))        # a pair is padded to its longer row
                tokens += sum(lengths)
                self.bad.saw(1)
            except BadSample as error:
                misses += 1
                if not isinstance(error, NoPreference):
                    self.bad.saw(1, [str(error)])
                if misses >= n and not batch:
                    raise BadSample(f"None of the {n} samples can be used, for instance: {error}") from None
        return batch, {"epoch": epoch, "position": position}

    def step(self, cursor):
        """-> this rank's micro-batches of the step at `cursor`, and the cursor after it."""
        batch, cursor = self.gather(cursor)
        mine = pack(batch, self.micro_tokens, self.world)[self.rank::self.world]
        draws = [tuple(draw for _, draw in micro) for micro in mine]
        return [Micro(x, k + 1 == len(draws), cursor) for k, x in enumerate(draws)], cursor

    def __iter__(self):
        cursor = self.cursor
        while True:
            micros, cursor = self.step(cursor)
            yield from micros


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
        return replace(collate(encoded or [stand_in], pad), weight=float(bool(encoded)), last=micro.last,
                       cursor=micro.cursor, bad=bad)


def loader(dataset, processor, plan, workers=0, pin_memory=False, worker_init_fn=None):
    """Endless iterator of Batch: the plan's micro-batches in the plan's order, whatever the number of
    workers. `batch.last` ends a step, after which a Plan with cursor=batch.cursor goes on."""
    batches = torch.utils.data.DataLoader(
        Fetch(dataset, processor), batch_size=None, sampler=plan, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=worker_init_fn, generator=torch.Generator())                         # starting must not advance the global one
    for batch in batches:
        # A fault that shows in decoding is seen by one rank only, and stands for `world` of them.
        plan.bad.saw(0, batch.bad, weight=plan.world)
        yield batch


# ------------------------------------------------------------------------------------------------------------

def check(path):
    """Reads every line and every image's header, prints the first complaints; -> number of bad samples."""
    data, bad = read_data(path), 0
    sources = [*data.sources.values()] if isinstance(data, Mixture) else [data]
    for source in sources:
        for i in range(len(source)):
            try:
                sample = source[i]
                if sample.chosen is None and sample.messages[-1]["role"] not in ("assistant", "document"):
                    raise BadSample(f"{sample.where} ends without an answer: it teaches nothing.")
                with located(sample.where):
                    for file in sample.images:
                        with open_image(file) as image:
                            refuse_size(*image.size, file)
            except NoPreference:
                pass
            except BadSample as error:
                bad += 1
                if bad <= 20:
                    print(error)
    print(f"{path}: {sum(map(len, sources))} samples, of which {bad} cannot be used.")
    return bad


def convert(paths, folder):
    """Parquet files -> folder/data.jsonl; images, as bytes or {"bytes", "path"}, become files beside it. A field
    that is empty is left out of what it is nested in: parquet gives every part of a message all parts' fields."""
    import pyarrow.parquet
    folder, count = Path(folder), 0
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def saved(value):
        nonlocal count
        if isinstance(value, list):
            return [saved(v) for v in value]
        if isinstance(value, bytes):
            value = {"bytes": value}
        if not (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)):
            return {k: saved(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        name = f"images/{count:08d}{Path(value.get('path') or '').suffix}"
        (folder / name).write_bytes(value["bytes"])
        count += 1
        return name

    with open(folder / "data.jsonl", "w") as out:
        for path in paths:
            for rows in pyarrow.parquet.ParquetFile(path).iter_batches(256):
                for row in rows.to_pylist():
                    out.write(json.dumps({key: saved(value) for key, value in row.items()}, default=str) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check data files, or make JSONL of a parquet file.")
    parser.add_argument("command", choices=["check", "convert"])
    parser.add_argument("paths", nargs="+")
    args = parser.parse_args()
    if args.command == "convert" and len(args.paths) < 2:
        parser.error("give parquet files and the folder to write to")
    try:
        bad = sum(map(check, args.paths)) if args.command == "check" else convert(args.paths[:-1], args.paths[-1])
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(1 if bad else 0)
