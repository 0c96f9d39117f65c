"""How the embedded teacher was made: a Qwen3-VL of 2.9 M parameters that reads synthdoc.py's pages.

    torchrun --nproc-per-node 2 tiny/make_teacher.py --out out/teacher
    torchrun --nproc-per-node 2 tiny/make_teacher.py --out out/internvl --like internvl

It is exactly Qwen3-VL's architecture (DeepStack, merger, interleaved MRoPE, QK-norm) in small
numbers, with its own byte-level BPE tokenizer that has Qwen's special tokens and template. Training
everything at once from nothing does not work at this scale: the decoder cannot learn to look
anything up before the tower can tell characters apart. So there are three lessons, the rows of
LESSONS:

    eyes       the vision tower and the merger name what each patch shows (character, handwritten
               digit, coloured shape, or nothing) and where each token stands; half of the pages are
               drills crowded with random characters, for sparse pages hold little to name
    pages      everything learns to answer questions, many on each page, and to copy out what is
               written, which supervises every character on it; naming goes on beside it
    questions  the tower rests; smaller batches, and more pages of the kinds that are harder

Where things stand is half of reading: so the position table starts as sines and cosines, the tokens
must keep them, and the rotary base is 100, for with Qwen's 5,000,000 and 16 frequencies
neighbouring rows look alike. Pages vary in size, so that position table and rotary learn to
interpolate. Evaluation pages (split "eval") and the handwritten digits held out for them are never
drawn. A run goes on from --out's train.pt when there is one.

make_teacher.log is of one run, two processes on two cores. In its first 66 minutes pages also held
several values of one kind (up to four items with prices; four named bars) and asked for one of
them, and until minute 81 two shapes were to be compared (above or below?): both stayed at chance.
Then the world became what synthdoc.py says. The lesson "questions" came in three parts, of 15
minutes with a third of scenes, 10 with more of them, and 6 with digits and places as below.

With --like internvl the same lessons grow a teacher of InternVL's architecture, which stands in
tiny/internvl: one run of the command above, with its log, while other programs took some of the two
cores. A page is cut into tiles of 5 x 5 cells, and a token learns its place in its tile: no tile
knows where on the page it is.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import Sample, collate, processor_of
from formats import texts
from model import Config, Qwen3VL, TextConfig, VisionConfig, VisionOut
from synthdoc import (CHARS, COLOURS, HELD_OUT_DIGITS, SHAPES, World, blank, colour, count, dark,
                      plain_text, relation, scans, scene, shape, stamp, write)

BATCH = 32                                                # pages a process takes at once
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
MARKERS = {"qwen3_vl": SPECIAL, "internvl": SPECIAL[:3] + ["<img>", "</img>", "<IMG_CONTEXT>"]}
TILE = 80                                                 # pixels on a side of InternVL's: 5 x 5 cells
CLASSES = ["nothing", *CHARS, *(f"written {d}" for d in range(10)),
           *(f"{c} {s}" for c in COLOURS for s in SHAPES)]
INDEX = {name: i for i, name in enumerate(CLASSES)}
SIZES = {"qwen3_vl": [(4, 8), (6, 8), (8, 8), (10, 10)],  # of pages in cells; the evaluation's last
         "internvl": [(5, 10), (5, 15), (10, 15), (10, 10)]}                # whole tiles


def make_tokenizer(path, special=SPECIAL):
    """Byte-level BPE over the world's questions and sentences; digits stay single, as Qwen's."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    world = World("train", 0, questions=9)

    def corpus():
        for i in range(3000):
            for m in world[i].messages:
                yield m["role"] + "\n" + "".join(p.get("text", "") for p in m["content"])
    trainer = trainers.BpeTrainer(vocab_size=768, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(path))


def write_folder(out, like="qwen3_vl"):
    """config.json and what goes with it: everything of the model folder but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        make_tokenizer(out / "tokenizer.json", MARKERS[like])
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in MARKERS[like]}
    make = internvl_folder if like == "internvl" else qwen3_vl_folder
    config, pictures = make(ids, tokenizer.get_vocab_size())
    eos, end = ids["<|im_end|>"], ids["<|endoftext|>"]
    files = {
        "config.json": config,
        "generation_config.json": dict(do_sample=False, eos_token_id=[eos, end], pad_token_id=end),
        "preprocessor_config.json": pictures,
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
            pad_token="<|endoftext|>", model_max_length=4096, clean_up_tokenization_spaces=False)}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def qwen3_vl_folder(ids, vocabulary):
    """-> config.json and preprocessor_config.json"""
    config = Config(
        text=TextConfig(vocab_size=vocabulary, hidden_size=128, intermediate_size=384,
                        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=32, rope_theta=100.0, mrope_section=[6, 5, 5],
                        max_position_embeddings=4096),
        vision=VisionConfig(depth=3, hidden_size=96, intermediate_size=384, num_heads=4,
                            patch_size=8, out_hidden_size=128, num_position_embeddings=400,
                            deepstack_visual_indexes=[0, 1, 2]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True, eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
    return config.to_json(), dict(
        image_processor_type="Qwen2VLImageProcessor", patch_size=8, temporal_patch_size=2,
        size=dict(shortest_edge=48 * 112, longest_edge=640 * 640), merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3)


def internvl_folder(ids, vocabulary):
    """-> config.json and preprocessor_config.json"""
    # A base of 1,000: one axis of positions goes further than three did.
    text = dict(model_type="qwen3", vocab_size=vocabulary, hidden_size=128, intermediate_size=384,
                num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
                rope_parameters=dict(rope_type="default", rope_theta=1000.0),
                max_position_embeddings=4096, tie_word_embeddings=True)
    vision = dict(model_type="internvl_vision", hidden_size=96, num_hidden_layers=3,
                  num_attention_heads=4, intermediate_size=384, image_size=[TILE, TILE],
                  patch_size=[8, 8], attention_bias=True, layer_norm_eps=1e-6, hidden_act="gelu")
    config = dict(architectures=["InternVLForConditionalGeneration"], model_type="internvl",
                  text_config=text, vision_config=vision, image_token_id=ids["<IMG_CONTEXT>"],
                  image_seq_length=25, tie_word_embeddings=True)
    return config, dict(
        image_processor_type="GotOcr2ImageProcessor", size=dict(height=TILE, width=TILE),
        min_patches=1, max_patches=12, crop_to_patches=True, image_mean=[0.5] * 3,
        image_std=[0.5] * 3)


# --------------------------------------------------------------------------------------------------
# Lessons: what is drawn, asked and named


def drill(rng, cells, crowded):
    """Random strings: all over the page to train the eyes, or up to three to be copied out."""
    (rows, cols), page = cells, blank(rng, cells, 6)
    chosen = range(rows)
    if not crowded:
        chosen = sorted(rng.choice(rows, int(rng.integers(1, min(4, rows + 1))), replace=False))
    for row in chosen:
        ink, length = dark(rng), int(rng.integers(2, 2 * cols + 1 if crowded else 7))
        col = int(rng.integers(0, cols - (length + 1) // 2 + 1))
        if crowded and rng.random() < 0.25:
            known = len(scans()[0]) - HELD_OUT_DIGITS
            stamp(page, rng, rng.integers(0, known, length // 2), row, col, ink)
            continue
        if rng.random() < 0.3:                            # light on dark, as signs are
            panel = page.canvas[row * 16:row * 16 + 16, col * 16:(col * 2 + length) * 8]
            panel[:] = rng.integers(20, 110, 3)
            ink = rng.integers(225, 256, 3)
        text = "".join(rng.choice(list(CHARS), length))
        write(page, rng, text, int(row), col, ink)
        page.lines.append(text)
    return page


class Lesson(NamedTuple):
    name: str
    until: float                 # share of the time at which it ends
    rate: float                  # of the peak learning rates, at its start; falls to a hundredth
    divide: int                  # the batch by this: circuits want many steps more than calm ones
    tower: bool                  # whether the vision tower trains
    pages: dict                  # kinds of pages


LESSONS = [
    Lesson("eyes", 0.08, 1.0, 1, True,
           dict(crowd=.5, scene=.2, receipt=.14, chart=.07, form=.03, sign=.03, digits=.03)),
    Lesson("pages", 0.88, 1.0, 1, True,
           dict(receipt=.22, chart=.22, scene=.22, form=.08, sign=.08, digits=.08, drill=.05,
                text=.05)),
    Lesson("questions", 1.0, 0.5, 2, False,
           dict(scene=.55, receipt=.05, chart=.05, form=.1, sign=.05, digits=.17, text=.03)),
]


class Lessons(World):
    """Training pages with many questions each, or one to copy out the page, and the names of what
    each patch shows."""

    def exercise(self, index, lesson):
        rng, eyes = self.rng(index), lesson.name == "eyes"
        kind = str(rng.choice(list(lesson.pages), p=list(lesson.pages.values())))
        if kind == "text":
            document = {"role": "document", "content": texts(plain_text(rng))}
            return Sample(id=str(index), messages=[document], images=[], source=kind), None
        if kind in ("crowd", "drill"):
            page = drill(rng, self.cells, crowded=kind == "crowd")
        elif kind == "scene":
            page = scene(rng, self.cells, "train")
            for ask, most in ((colour, 1), (shape, 2), (count, 1), (relation, 4)):
                asked = ask(page)
                page.questions += [asked[i] for i in rng.permutation(len(asked))[:most]]
            page.questions = [page.questions[i] for i in rng.permutation(len(page.questions))]
        else:
            page = self.page(rng, kind)
        if not eyes and page.lines and (not page.questions or rng.random() < 0.25):
            page.questions.insert(0, ("Read the page.", " ".join(page.lines)))
        messages = []
        for question, answer in page.questions if not eyes else [("", "")]:
            messages += [{"role": "user", "content": texts(question)},
                         {"role": "assistant", "content": texts(answer)}]
        messages[0]["content"].insert(0, {"type": "image"})
        sample = Sample(id=str(index), messages=messages, images=[page.image], source=kind)
        return sample, self.patch_names(page)

    def patch_names(self, page, patch=8):
        """The class under each patch's centre, in merge-block order: (patches,) int64."""
        rows, cols = (2 * n for n in self.cells)
        names = torch.zeros(rows, cols, dtype=torch.long)
        for what, x0, y0, x1, y1 in page.marks:
            r0, r1 = (max(0, math.ceil((y - patch / 2) / patch)) for y in (y0, y1))
            c0, c1 = (max(0, math.ceil((x - patch / 2) / patch)) for x in (x0, x1))
            names[r0:r1, c0:c1] = INDEX[what]
        return names.view(rows // 2, 2, cols // 2, 2).transpose(1, 2).flatten()


def batches(processor, step, size, seed, lesson, sizes):
    """From a step on without end: its number, a Batch of one page size, so that the tower runs one
    call, the names of each page's patches, and the rows and columns of its cells."""
    worlds = [Lessons("train", seed, cells=s, questions=9) for s in sizes]
    while True:
        world = worlds[np.random.default_rng(step).choice(len(sizes), p=[.3, .25, .2, .25])]
        lessons = [world.exercise(step * size + i, lesson) for i in range(4 * size)]
        # By length, else half of a batch would be padding.
        encoded = sorted(((processor.encode(sample), names) for sample, names in lessons),
                         key=lambda pair: len(pair[0].ids))
        for i in np.random.default_rng(step).permutation(4) * size:
            rows, names = zip(*encoded[i:i + size])
            named = [n for n in names if n is not None]
            yield step, collate(rows, processor.pad_id), named, world.cells
            step += 1


# --------------------------------------------------------------------------------------------------
# Training


def waves(x, most):
    """Sines and cosines of places x in 0..1, one to `most` half waves over the page: (..., 2 *
    most)."""
    angle = math.pi * x[..., None] * torch.arange(1, most + 1)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def places(rows, cols, most):
    """The waves of each row and column of a grid, side by side: (R,), (C,) -> (R, C, 4 * most)."""
    down, across = waves(rows, most)[:, None], waves(cols, most)[None]
    return torch.cat((down.expand(-1, len(cols), -1), across.expand(len(rows), -1, -1)), dim=-1)


def on_the_page(seen, processor, pages, cells):
    """The tokens and patches of `pages` pages of one size in the order of cells, row by row, not
    tile by tile; a thumbnail's are left out."""
    of_each = len(seen.tokens) // pages
    tokens = seen.tokens.view(pages, of_each, -1)
    patches = seen.patches.view(pages, of_each, 4, -1)
    order = processor.as_map(torch.arange(of_each), None, (16 * cells[1], 16 * cells[0])).flatten()
    return VisionOut(tokens[:, order].flatten(0, 1), [], patches[:, order].flatten(0, 2))


class Heads(nn.Module):
    """The exercise's own heads: what a patch shows, from its features and from its visual token,
    and where it is."""

    def __init__(self, c):
        super().__init__()
        self.tiled = c.Tower is not None
        self.patch = nn.Linear(c.vision.hidden_size, len(CLASSES))
        self.token = nn.Linear(c.text.hidden_size, 4 * len(CLASSES))
        self.place = nn.Linear(c.text.hidden_size, 24)

    def forward(self, out, names, grid):
        """grid: rows and columns of cells of every page in the batch."""
        weight = torch.ones(len(CLASSES))
        weight[0] = 0.1                                   # most of a page is empty
        a = F.cross_entropy(self.patch(out.patches), names, weight)
        b = F.cross_entropy(self.token(out.tokens).view(-1, len(CLASSES)), names, weight)
        tile = (TILE // 16,) * 2 if self.tiled else grid
        place = places(*((2 * torch.arange(n) + 0.5) / (2 * n - 1) for n in tile), most=6)
        place = place.repeat(grid[0] // tile[0], grid[1] // tile[1], 1)
        c = (self.place(out.tokens).view(-1, *place.shape) - place).square().mean()
        return a + b + c, (self.patch(out.patches).argmax(-1) == names)[names > 0].float().mean()


def initialise(model):
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            fan = p[0].numel()
            nn.init.normal_(p, std=0.02 if "embed" in name and "proj" not in name else fan ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight",
                              "mlp.linear_fc2.weight", "mlp.fc2.weight")):
                p.data *= 0.4
            if "deepstack" in name and "fc2" in name:
                p.data.zero_()
        elif "norm" not in name:
            p.data.fill_("lambda" in name)
    # Rows and columns as waves in half of the channels.
    if model.config.Tower:
        model.visual.cls_token.data.normal_(std=0.02)
        table = model.visual.position_embeddings.data[0].normal_(std=0.02)[1:]
    else:
        table = model.visual.pos_embed.weight.data
    side, most = round(len(table) ** 0.5), table.shape[1] // 8
    along = torch.linspace(0, 1, side)
    table.view(side, side, -1)[..., :4 * most] = 0.5 * places(along, along, most)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: the update of a matrix U S V^T is U V^T, found by five steps of
    Newton and Schulz (Jordan et al. 2024), here in fp32 and for all matrices of one shape at once.
    Like AdamW in cost, and ahead."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, cols), ps in shapes.items():
                moments = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in ps]
                for m, p in zip(moments, ps):
                    m.lerp_(p.grad, 0.05)
                x = torch.stack([p.grad.lerp(m, 0.95) for m, p in zip(moments, ps)])
                x = x.mT if rows > cols else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    s = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
                x = (x.mT if rows > cols else x) * max(1, rows / cols) ** 0.5
                for p, u in zip(ps, x):
                    p.mul_(1 - 0.01 * group["lr"]).sub_(group["lr"] * u)


def optimisers(model, heads):
    """Muon turns the matrices of the blocks and mergers, AdamW the rest."""
    named = [*model.named_parameters(), *heads.named_parameters()]
    inner = {n for n, p in named
             if p.dim() == 2 and any(part in n for part in ("layers.", "blocks.", "merger"))}
    rest = [p for n, p in named if n not in inner]
    return [Muon([p for n, p in named if n in inner], lr=0.02),
            torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def losses(model, heads, processor, lesson, batch, names, cells):
    """-> the loss, and the shares of patches and of tokens that are right."""
    loss, named, exact = torch.zeros(()), torch.zeros(()), torch.zeros(())
    seen = model.visual(batch.pixels, batch.grids) if names else None
    if names and lesson.tower:
        shown = on_the_page(seen, processor, len(names), cells) if heads.tiled else seen
        naming, named = heads(shown, torch.cat(names), cells)
        loss = naming * (1 if lesson.name == "eyes" else 0.2)
    if lesson.name != "eyes":
        hidden = model.hidden(batch.ids, batch.mask, None, batch.grids, seen)[:, :-1]
        target = batch.labels[:, 1:]
        logits, target = model.lm_head(hidden[target >= 0]), target[target >= 0]
        loss = loss + F.cross_entropy(logits, target)
        exact = (logits.argmax(-1) == target).float().mean()
    return loss, named, exact


def average(parameters, seconds, world):
    """Means over the processes of all gradients (in place) and of the seconds, so that schedules
    agree."""
    if world == 1:
        return seconds
    # Resting ones stay without a gradient: Muon would move them.
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([seconds])])
    dist.all_reduce(flat)
    flat /= world
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters] + [1])):
        p.grad.copy_(g.view_as(p))
    return flat[-1].item()


def save(out, model, heads, opts, state):
    torch.save(dict(model=model.state_dict(), heads=heads.state_dict(), state=state,
                    opts=[o.state_dict() for o in opts]), out / "train.tmp")
    os.replace(out / "train.tmp", out / "train.pt")
    half = Qwen3VL(model.config)                   # stored in bf16, as the released checkpoints are
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(out)


def load(out, model, heads, opts):
    """-> how many steps were taken, and the seconds spent on them."""
    if not (out / "train.pt").exists():
        return dict(step=0, spent=0.0)
    stored = torch.load(out / "train.pt")
    states = (stored["model"], stored["heads"], *stored["opts"])
    for part, state in zip((model, heads, *opts), states):
        part.load_state_dict(state)
    return stored["state"]


def write_log(out, state, lesson, means, norm, pages):
    loss, named, exact = (round(m, 4) for m in means)
    line = json.dumps(dict(
        step=state["step"], batch=pages, minutes=round(state["spent"] / 60, 2), lesson=lesson.name,
        loss=loss, patches_named=named, tokens_right=exact, grad_norm=round(norm, 2)))
    print(line, flush=True)
    with open(out / "make_teacher.log", "a") as log:
        log.write(line + "\n")


def train(out, model, heads, processor, sizes, minutes, rank, world):
    """LESSONS by their shares of the minutes, from where train.pt in `out` stands."""
    opts, lesson, recent = optimisers(model, heads), None, []
    peaks = [o.param_groups[0]["lr"] for o in opts]
    parameters = [*model.parameters(), *heads.parameters()]
    state, saved = load(out, model, heads, opts), time.time()
    clock = saved
    while (done := state["spent"] / 60 / minutes) < 1:
        number = next(i for i, x in enumerate(LESSONS) if done < x.until)
        if LESSONS[number] is not lesson:                 # a lesson begins
            lesson, began = LESSONS[number], LESSONS[number - 1].until if number else 0.0
            size = BATCH // lesson.divide
            drawn = batches(processor, state["step"], size, 1000 * rank + 100 * number, lesson,
                            sizes)
            for name, p in model.visual.named_parameters():
                p.requires_grad_(lesson.tower or "merger" in name)
        step, batch, names, cells = next(drawn)
        here = (done - began) / (lesson.until - began)
        for o, peak in zip(opts, peaks):
            rate = lesson.rate * min(1, 0.02 + 30 * here) * (1 - 0.99 * here)
            o.param_groups[0]["lr"] = peak * rate
        found = losses(model, heads, processor, lesson, batch, names, cells)
        found[0].backward()
        now = time.time()
        spent, clock = average(parameters, now - clock, world), now
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        state = dict(step=step + 1, spent=state["spent"] + spent)
        recent.append([x.item() for x in found])
        if state["step"] % 100 == 0 and rank == 0:
            write_log(out, state, lesson, np.mean(recent, 0).tolist(), norm.item(), size * world)
            recent = []
        if time.time() - saved > 120 and rank == 0:
            save(out, model, heads, opts, state)
            saved = time.time()
    if rank == 0:
        save(out, model, heads, opts, state)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/teacher"))
    p.add_argument("--like", default="qwen3_vl", choices=list(SIZES), help="whose architecture")
    p.add_argument("--minutes", type=float, default=97, help="of all lessons together")
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    if rank == 0:
        write_folder(a.out, a.like)
    if world > 1:
        dist.barrier()
    config = Config.from_folder(a.out)
    model, heads = Qwen3VL(config), Heads(config)
    initialise(model)
    model.folder = a.out
    train(a.out, model, heads, processor_of(a.out), SIZES[a.like], a.minutes, rank, world)


if __name__ == "__main__":
    main()
