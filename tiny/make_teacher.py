"""How the embedded teacher was made: a Qwen3-VL of 2.9 M parameters that reads the pages of synthdoc.py.

    torchrun --nproc-per-node 2 tiny/make_teacher.py --out tiny       # the log of the run is tiny/make_teacher.log

It is exactly Qwen3-VL's architecture (DeepStack, merger, interleaved MRoPE, QK-norm) in small numbers, with its own
byte-level BPE tokenizer that has Qwen's special tokens and template. Training everything at once from nothing does
not work at this scale: the decoder cannot learn to look anything up before the tower can tell characters apart.
So there are two lessons:

    eyes    the vision tower and the merger name what each patch shows (character, handwritten digit, coloured
            shape, or nothing), from the marks that a page's drawing leaves behind; half of the pages are drills
            crowded with random characters, for sparse pages hold little to name
    pages   the decoder and the mergers answer questions, several on each page, and copy out what is written,
            which supervises every character on it; the tower itself rests, and joins in again for the last fifth

The log is of one run of 91 minutes whose batches changed on the way: one process with 48 pages, from step 1,060 with 24
to 40, from step 1,480 two processes with 32 each; it shared its two cores with other work.

Pages vary in size, so that position table and rotary learn to interpolate. A run goes on from --out's train.pt when
there is one. Evaluation pages (split "eval") and the handwritten digits held out for them are never drawn.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import Processor, Sample, collate
from model import Config, Qwen3VL, TextConfig, VisionConfig
from synthdoc import CHARS, COLOURS, SHAPES, World, blank, dark, scans, scene, stamp, write

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
CLASSES = ["nothing"] + list(CHARS) + [f"written {d}" for d in range(10)] + [f"{c} {s}" for c in COLOURS for s in SHAPES]
INDEX = {name: i for i, name in enumerate(CLASSES)}
SIZES = [(4, 8), (6, 8), (8, 8), (10, 10)]                # rows and columns of cells; the last is the evaluation's


def make_tokenizer(path):
    """Byte-level BPE over the world's questions and sentences; digits stay single, as in Qwen's tokenizer."""
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    world = World("train", 0, questions=9)

    def corpus():
        for i in range(3000):
            for m in world[i].messages:
                yield m["role"] + "\n" + "".join(p.get("text", "") for p in m["content"])
    trainer = trainers.BpeTrainer(vocab_size=768, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(path))
    return tokenizer


def write_folder(out):
    """config.json and what goes with it: everything of the model folder but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(out / "tokenizer.json")
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL}
    config = Config(
        text=TextConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=384,
                        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                        rope_theta=1000.0, mrope_section=[6, 5, 5], max_position_embeddings=4096),
        vision=VisionConfig(depth=3, hidden_size=96, intermediate_size=384, num_heads=4, patch_size=8,
                            out_hidden_size=128, num_position_embeddings=400, deepstack_visual_indexes=[0, 1, 2]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True, eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
    files = {
        "config.json": config.to_json(),
        "generation_config.json": dict(do_sample=False, eos_token_id=config.eos_token_id,
                                       pad_token_id=ids["<|endoftext|>"]),
        "preprocessor_config.json": dict(
            image_processor_type="Qwen2VLImageProcessor", size=dict(shortest_edge=48 * 112, longest_edge=640 * 640),
            patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
            model_max_length=4096, clean_up_tokenization_spaces=False)}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    return config


# ---------------------------------------------------------------------------------------------------------


def drill(rng, cells, crowded):
    """Random strings: all over the page to train the eyes, or up to three of them to be copied out."""
    rows, cols = cells
    page, images = blank(rng, cells, 6), scans()[0]
    chosen = range(rows) if crowded else sorted(rng.choice(rows, int(rng.integers(1, min(4, rows + 1))), replace=False))
    for row in chosen:
        ink, length = dark(rng), int(rng.integers(2, 2 * cols + 1)) if crowded else int(rng.integers(2, 7))
        col = int(rng.integers(0, cols - (length + 1) // 2 + 1))
        if crowded and rng.random() < 0.25:
            which = rng.integers(0, len(images) - 500, length // 2)
            stamp(page, rng, which, row, col, ink)
            continue
        if rng.random() < 0.3:                            # light on dark, as signs are
            page.canvas[row * 16:row * 16 + 16, col * 16:(col * 2 + length) * 8] = rng.integers(20, 110, 3)
            ink = rng.integers(225, 256, 3)
        text = "".join(rng.choice(list(CHARS), length))
        write(page, rng, text, int(row), col, ink)
        page.lines.append(text)
    return page


class Lessons(World):
    """Training pages with a further exercise, to copy out the page, and the names of what each patch shows."""

    def exercise(self, index, eyes):
        rng = self.rng(index)
        family = self.family(rng, index)
        if eyes:
            page = [lambda: drill(rng, self.cells, True), lambda: scene(rng, self.cells, "train"),
                    lambda: self.page(rng, "receipt" if family == "text" else family)][rng.choice(3, p=[.5, .2, .3])]()
            page.questions = [("", "")]
        elif family == "text":
            return self.sample(index), None
        elif rng.random() < 0.2:
            page = drill(rng, self.cells, False)
        else:
            page = self.page(rng, family)
        if not eyes and page.lines and (not page.questions or rng.random() < 0.5):
            page.questions.insert(0, ("Read the page.", " ".join(page.lines)))
        messages = []
        for i, (question, answer) in enumerate(page.questions):
            messages += [{"role": "user", "content": [{"type": "image"}] * (i == 0) + [{"type": "text", "text": question}]},
                         {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return Sample(id=str(index), messages=messages, images=[page.image], source=family), self.patch_names(page)

    def patch_names(self, page, patch=8):
        """The class under each patch's centre, in merge-block order: (patches,) int64."""
        rows, cols = (2 * n for n in self.cells)
        names = torch.zeros(rows, cols, dtype=torch.long)
        for what, x0, y0, x1, y1 in page.marks:
            r0, r1 = (max(0, math.ceil((y - patch / 2) / patch)) for y in (y0, y1))
            c0, c1 = (max(0, math.ceil((x - patch / 2) / patch)) for x in (x0, x1))
            names[r0:r1, c0:c1] = INDEX[what]
        return names.view(rows // 2, 2, cols // 2, 2).transpose(1, 2).flatten()


class Batches(torch.utils.data.IterableDataset):
    """Endless batches of one page size each, so that the tower runs one call."""

    def __init__(self, processor, first, size, seed, eyes):
        self.processor, self.first, self.size, self.seed, self.eyes = processor, first, size, seed, eyes

    def __iter__(self):
        torch.set_num_threads(1)
        worlds = [Lessons("train", self.seed, cells=s) for s in SIZES]
        step = self.first
        while True:
            world = worlds[np.random.default_rng(step).choice(len(SIZES), p=[.3, .2, .2, .3])]
            lessons = [world.exercise(step * self.size + i, self.eyes) for i in range(4 * self.size)]
            encoded = sorted(((self.processor.encode(sample), names) for sample, names in lessons),
                             key=lambda pair: len(pair[0].ids))            # else half of a batch would be padding
            for i in np.random.default_rng(step).permutation(4) * self.size:
                rows, names = zip(*encoded[i:i + self.size])
                yield step, collate(rows, self.processor.pad_id), [n for n in names if n is not None]
                step += 1


class Heads(nn.Module):
    """The exercise's own heads: what a patch shows, from its features and from its visual token."""

    def __init__(self, c):
        super().__init__()
        self.patch = nn.Linear(c.vision.hidden_size, len(CLASSES))
        self.token = nn.Linear(c.vision.out_hidden_size, 4 * len(CLASSES))

    def forward(self, out, names):
        weight = torch.ones(len(CLASSES))
        weight[0] = 0.1                                   # most of a page is empty
        a = F.cross_entropy(self.patch(out.patches), names, weight)
        b = F.cross_entropy(self.token(out.tokens).view(-1, len(CLASSES)), names, weight)
        return a + b, (self.patch(out.patches).argmax(-1) == names)[names > 0].float().mean()


def initialise(model):
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            fan = p[0].numel()
            nn.init.normal_(p, std=0.02 if "embed" in name and "proj" not in name else fan ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")):
                p.data *= 0.4
            if "deepstack" in name and "fc2" in name:
                p.data.zero_()
        elif "norm" not in name:
            p.data.zero_()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: the update of a matrix U S V^T is U V^T, found by five Newton-Schulz steps
    (Jordan et al. 2024), here in fp32 and for all matrices of one shape at once. Like AdamW in cost, and ahead."""

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
    inner = {n for n, p in named if p.dim() == 2 and ("layers." in n or "blocks." in n or "merger" in n)}
    return [Muon([p for n, p in named if n in inner], lr=0.02),
            torch.optim.AdamW([p for n, p in named if n not in inner], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", default="tiny")
    p.add_argument("--minutes", type=float, default=100, help="of the whole schedule, 'eyes' included")
    p.add_argument("--eyes", type=float, default=0.15, help="share of the time for the first lesson")
    p.add_argument("--batch", type=int, default=48)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    out, rank, world = Path(a.out), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    if rank == 0:
        config = write_folder(out)
    if world > 1:
        dist.barrier()
    config = Config.from_folder(out)
    processor, model, heads = Processor(out), Qwen3VL(config), Heads(config)
    initialise(model)
    model.folder = out
    opts = optimisers(model, heads)
    peaks = [o.param_groups[0]["lr"] for o in opts]
    state = dict(step=0, spent=0.0)
    if (out / "train.pt").exists():
        stored = torch.load(out / "train.pt")
        model.load_state_dict(stored["model"])
        heads.load_state_dict(stored["heads"])
        [o.load_state_dict(s) for o, s in zip(opts, stored["opts"])]
        state = stored["state"]
    log = open(out / "make_teacher.log", "a")
    clock, saved, recent = time.time(), time.time(), []
    eyes, loader = None, None
    while True:
        done = state["spent"] / 60 / a.minutes
        if done >= 1:
            break
        if (done < a.eyes) != eyes:                       # a lesson begins
            eyes = done < a.eyes
            loader = iter(torch.utils.data.DataLoader(Batches(processor, state["step"], a.batch, a.seed + 1000 * rank, eyes),
                                                      batch_size=None))
        step, batch, names = next(loader)
        here = done / a.eyes if eyes else (done - a.eyes) / (1 - a.eyes)
        rest = not eyes and here < 0.8                    # the tower rests
        for part in (model.visual.patch_embed, model.visual.pos_embed, model.visual.blocks):
            part.requires_grad_(not rest)
        for o, peak in zip(opts, peaks):
            warm = min(1, (step + 1) / 50, 0.1 + 30 * here if not eyes else 1)
            o.param_groups[0]["lr"] = peak * warm * (1 - 0.9 * here)
        seen = model.visual(batch.pixels, batch.grids) if names else None
        loss, right, exact = torch.zeros(()), torch.zeros(()), torch.zeros(())
        if not rest and names:
            naming, right = heads(seen, torch.cat(names))
            loss = naming * (1 if eyes else 0.1)
        if not eyes:
            hidden = model.hidden(batch.ids, batch.mask, None, batch.grids, seen)[:, :-1]
            target = batch.labels[:, 1:]
            logits = model.lm_head(hidden[target >= 0])
            target = target[target >= 0]
            loss = loss + F.cross_entropy(logits, target)
            exact = (logits.argmax(-1) == target).float().mean()
        loss.backward()
        now = time.time()
        spent = share([*model.parameters(), *heads.parameters()], now - clock, world)
        clock = now
        norm = nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        state = dict(step=step + 1, spent=state["spent"] + spent)
        recent.append((loss.item(), right.item(), exact.item()))
        if step % 50 == 49 and rank == 0:
            mean = [sum(c) / len(recent) for c in zip(*recent)]
            line = dict(step=step + 1, batch=a.batch * world, minutes=round(state["spent"] / 60, 2),
                        lesson="eyes" if eyes else "pages", loss=round(mean[0], 4), patches_named=round(mean[1], 4),
                        tokens_right=round(mean[2], 4), grad_norm=round(norm.item(), 2))
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            recent = []
        if time.time() - saved > 120 and rank == 0:
            save(out, model, heads, opts, state)
            saved = time.time()
    if rank == 0:
        save(out, model, heads, opts, state)


def share(parameters, seconds, world):
    """Means over the processes of all gradients (in place) and of the seconds, so that schedules agree."""
    if world == 1:
        return seconds
    parameters = [p for p in parameters if p.requires_grad]     # resting ones stay without: Muon would move them
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
    torch.save(dict(model=model.state_dict(), heads=heads.state_dict(), opts=[o.state_dict() for o in opts],
                    state=state), out / "train.tmp")
    os.replace(out / "train.tmp", out / "train.pt")
    half = Qwen3VL(model.config)                          # stored in bf16, as the released checkpoints are
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
