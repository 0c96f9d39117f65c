"""Efficiency (Sect. 5.4, A.5: Table 7 and Fig. 5): teacher and hybrid side by side, and both against others.

    python bench.py                                     # by context: first token, decode step, memory, cache
    python bench.py --model wide --contexts 32768 131072 524288 --budget 6
    python bench.py train                               # a training step of c1 to c5, relative to c1
    python bench.py against                             # prefill, decode, distillation against transformers
    python bench.py head                                # Stage 3's logits in chunks and all at once, on the CPU
    python bench.py growth                              # a step against tokens, rows, processes
    python bench.py step --model 2b                     # one real step at 2B shape beside --dry-run's promise
    python bench.py scan --ssd-minimal PATH             # mamba2.ssd against others, forward + backward

--model is a checkpoint's folder, one with only a config.json (weights are then drawn at random), or a row of
SHAPES. The last line is JSON, also kept in results/bench.json with the pictures beside it. What is measured:

    side by side   every contender lives in a process of its own, and they take turns, one pass each, so that
                   a busy machine is unfair to none
    time           with one CPU thread (OMP_NUM_THREADS, 1 unless set) the process's processor time, which no
                   other work lengthens; with more threads, or on a GPU, the wall clock
    peak           CPU: the most memory resident since the model stood, less that of the process before it was
                   built; GPU: torch.cuda.max_memory_allocated. By context: weights, and what is added to them
                   after 64 tokens, as code that is loaded on first use would hide the embedded model's
    states         real ones at batch 1 up to --prefill-upto positions. Else the recurrent state is that of a
                   short prompt (its size and cost never change), and attention's full-length cache is random
"""
import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
import types
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402  (after the number of threads is set)
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import distill  # noqa: E402
import loop  # noqa: E402
from data import IGNORED, Plan, Processor, Sample, collate, loader, texts  # noqa: E402
from mamba2 import ssd  # noqa: E402
from model import Attention, Config, KVCache, Qwen3VL, device_of, dtype_of, to_hybrid  # noqa: E402
from synthdoc import World  # noqa: E402

HERE, GB, ROOM = Path(__file__).parents[1], 2 ** 30, 256      # ROOM: positions a random cache leaves for decoding
SHAPES = {                # what differs from the embedded teacher's config.json: in text, in vision
    "wide": (dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8,
                  num_key_value_heads=2, head_dim=64, mrope_section=[12, 10, 10]), dict(out_hidden_size=512)),
    "2b": (dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
                num_attention_heads=16, num_key_value_heads=8, head_dim=128, mrope_section=[24, 20, 20]),
           dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=16,
                out_hidden_size=2048, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17])),
}
PAPER = {"c1": 1.00, "c2": 1.05, "c3": 1.07, "c4": 1.10, "c5": 1.73}      # Table 7: GPU hours relative to c1
SHARES = {1: 0.1, 2: 0.3, 3: 0.6}                         # of the token budget, by stage

# ---------------------------------------------------------------------------------------------------------
# Contenders: a process each, which builds what it needs once and then does what it is asked


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def resident(field):
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in bytes. Linux only."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def forget_peak(device):
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")     # Linux: VmHWM starts anew from VmRSS
    else:
        torch.cuda.reset_peak_memory_stats()


def work(pipe, make, opt, args):
    """The child: make gives {task: function}; with an answer come its seconds and the peak bytes so far."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cpu = opt.device == "cpu"
    for library in getattr(opt, "libraries", ()):         # of any contender, for all: code is not what is compared
        importlib.import_module(library)
    empty = resident("VmRSS") if cpu else 0
    tasks = make(opt, *args)
    forget_peak(opt.device)
    pipe.send("ready")
    for task, values in iter(pipe.recv, None):
        begin = now(opt.device)
        answer = tasks[task](*values)
        seconds = now(opt.device) - begin
        pipe.send((seconds, resident("VmHWM") - empty if cpu else torch.cuda.max_memory_allocated(), answer))


class Child:
    def __init__(self, make, opt, *args):
        context, self.name = multiprocessing.get_context("spawn"), f"{make.__name__}{args}"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, make, opt, args), daemon=True)
        self.process.start()
        theirs.close()                                    # so that its death is heard

    def hear(self):
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit(f"{self.name} died; was there too little memory?")

    def __call__(self, task, *values):
        """-> seconds, peak bytes, answer."""
        self.pipe.send((task, values))
        return self.hear()


def start(opt, contenders):
    """{name: (make, arguments)} -> {name: Child}, each ready."""
    children = {name: Child(make, opt, *args) for name, (make, *args) in contenders.items()}
    for child in children.values():
        child.hear()
    return children


def end(children):
    for child in children.values():
        child.pipe.send(None)
        child.process.join()


def take_turns(children, rounds, task, *values):
    """-> {name: [(seconds, peak, answer), a round each]}; in a round every child does the task once."""
    rows = [{name: child(task, *values) for name, child in children.items()} for _ in range(rounds)]
    return {name: [row[name] for row in rows] for name in children}


def typical(rounds):
    """-> the median of the seconds, and the last peak."""
    return statistics.median(r[0] for r in rounds), rounds[-1][1]


# ---------------------------------------------------------------------------------------------------------
# Models and pages


def folder_of(model, scratch):
    """model itself; where it has no tokenizer, scratch with its shape and the embedded tokenizer and ids."""
    tiny = Config.from_folder(HERE / "tiny")
    if model in SHAPES:
        text, vision = SHAPES[model]
        config = replace(tiny, text=replace(tiny.text, **text), vision=replace(tiny.vision, **vision))
    elif (Path(model) / "tokenizer.json").is_file():
        return str(model)
    else:
        bare = Config.from_folder(model)
        config = replace(tiny, **{n: getattr(bare, n) for n in ("text", "vision", "tie_word_embeddings")})
    (Path(scratch) / "config.json").write_text(json.dumps(config.to_json()))
    shutil.copy(HERE / "tiny" / "tokenizer.json", scratch)
    return str(scratch)


def build(folder, opt):
    """The checkpoint, or random weights of its shape where it holds none."""
    dtype = getattr(torch, opt.dtype)
    if any(Path(folder).glob("model*.safetensors")):
        return Qwen3VL.from_pretrained(folder, dtype, opt.device)
    with torch.device("meta"):
        model = Qwen3VL(Config.from_folder(folder))
    model = model.to(dtype).to_empty(device=opt.device).eval()
    if model.config.tie_word_embeddings:                  # to_empty made two of one
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(name.endswith("weight"))
    return model


def page(width, height):
    """A picture of a document: the README in print."""
    lines = textwrap.wrap((HERE / "README.md").read_text(), max(10, width // 6))[:height // 17]
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).multiline_text((12, 8), "\n".join(lines), "black", ImageFont.load_default(12))
    return image


def document(folder, rows, text, visual):
    """Batch of equal rows: a page of about `visual` visual tokens (0: none), a question of about `text`
    tokens and a short answer."""
    processor = Processor(folder, 10 ** 6, 10 ** 7, 10 ** 7)
    processor.min_pixels, processor.max_pixels = processor.factor ** 2, 10 ** 8
    side = round(visual ** 0.5) * processor.factor
    phrase = "the price of tea "
    question = texts(phrase * round(8 * text / len(processor.tokenize(8 * phrase))))
    asked = [{"type": "image"}] * bool(visual) + question
    sample = Sample(id="page", images=[page(side, side)] * bool(visual), source="bench", messages=[
        {"role": "user", "content": asked}, {"role": "assistant", "content": texts("four ninety five")}])
    return collate([processor.encode(sample)] * rows, processor.pad_id)


def world_batch(folder, tokens):
    """A micro-batch of the embedded world, as distill.py draws it."""
    world, processor = World("train", 0), Processor(folder)
    return next(iter(loader(world, processor, Plan(world, processor, 0, tokens, tokens))))


def questions(opt):
    """Evaluation pages of the embedded world, each with a question: a left-padded batch of opt.rows."""
    world, processor = World("eval", 0, "reading"), Processor(opt.folder)
    samples = [replace(world[i], messages=world[i].messages[:1]) for i in range(opt.rows)]
    encoded = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
    return collate(encoded, processor.pad_id, side="left").to(opt.device)


# ---------------------------------------------------------------------------------------------------------
# By context (Table 7, Fig. 5)


def cache_bytes(text, mixers, T, width, rows=1):
    """What decoding carries along after T positions. Attention's keys and values grow with T; the states
    (fp32) and last convolution inputs of `mixers` Mamba-2 layers do not. width: bytes of a number."""
    H, G, P = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    attention, mixer = 2 * G * T * P * width, H * P * P * 4 + 3 * (2 * G + H) * P * width
    return rows * (attention * (text.num_hidden_layers - mixers) + mixer * mixers)


def largest_batch(budget, weights, row):
    """Rows that fit beside the weights; all in bytes."""
    return max(0, int((budget - weights) // row))


def held(states):
    """What cache_bytes counts, on the tensors; room to spare in attention's buffers does not count."""
    return sum((t[:, :, :s.length] if isinstance(s, KVCache) else t).numel() * t.element_size()
               for s in states for t in s if isinstance(t, torch.Tensor))


def randomised(state, T, rows):
    """One row's state -> that of `rows`: attention's cache random and T long, a recurrent state repeated."""
    if not isinstance(state, KVCache):
        return type(state)(*(t.repeat(rows, *[1] * (t.dim() - 1)) for t in state))
    shape = (1, state.k.shape[1], T + ROOM, state.k.shape[3])
    return KVCache(*(torch.randn(shape, dtype=t.dtype, device=t.device).repeat(rows, 1, 1, 1)
                     for t in (state.k, state.v)), None, T)


@contextmanager
def clocked(model, device):
    """{kind of module: seconds}, which hooks fill while the model runs. They cost time of their own, on a GPU much,
    so that speeds are measured without them."""
    spent, begun, hooks = {}, [], []

    def after(kind, *_):
        spent[kind] = spent.get(kind, 0) + now(device) - begun.pop()
    for layer in model.layers:
        kind = "attention" if isinstance(layer.self_attn, Attention) else "mixers"
        for module, name in ((layer.self_attn, kind), (layer.mlp, "MLP")):
            hooks += [module.register_forward_pre_hook(lambda *_: begun.append(now(device))),
                      module.register_forward_hook(partial(after, name))]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def compile_steps(model):
    """Compiles the mixers' one-position step, a dozen small operations. MLPs gain nothing, attention's cache
    grows, and in prefill the loop over chunks would be unrolled."""
    for mixer in (layer.self_attn for layer in model.layers if not isinstance(layer.self_attn, Attention)):
        plain, fast = mixer.forward, torch.compile(mixer.forward, dynamic=False)
        mixer.forward = lambda x, *a, plain=plain, fast=fast: (fast if x.shape[1] == 1 else plain)(x, *a)


def reader(opt, name, rows=1):
    """A child that reads and writes: the teacher, the hybrid made from it, or opt.hybrid's checkpoint."""
    model = build(opt.hybrid or opt.folder if name == "hybrid" else opt.folder, opt)
    model = to_hybrid(model, opt.mixer) if name == "hybrid" and not opt.hybrid else model
    if opt.compile:
        compile_steps(model)
    run = {}

    def prefill(T):
        run.clear()                                       # the last state must not count towards the peak
        ids = torch.randint(10, model.config.text.vocab_size, (1, T), device=opt.device)
        ids[(ids == model.config.image_token_id) | (ids == model.config.video_token_id)] = 9
        logits, run["states"], run["position"] = model.prefill(ids, chunk=opt.chunk)
        run["token"] = logits.argmax(-1)

    @torch.inference_mode()
    def fill(T):
        prefill(16)
        run["states"] = [randomised(s, T, rows) for s in run["states"]]
        run["position"], run["token"] = (t.repeat(rows) for t in (run["position"] + T - 16, run["token"]))

    def step():
        logits, run["states"] = model.step(run["token"], run["states"], run["position"])
        run["token"], run["position"] = logits.argmax(-1), run["position"] + 1

    def shares(steps):
        """The part of a step's time that each kind of module takes."""
        with clocked(model, opt.device) as spent:
            begin = now(opt.device)
            for _ in range(steps):
                step()
            total = now(opt.device) - begin
        return {kind: seconds / total for kind, seconds in spent.items()}
    return dict(prefill=prefill, fill=fill, step=step, shares=shares, held=lambda: held(run["states"]),
                forget=lambda: forget_peak(opt.device),
                mixers=lambda: sum(not isinstance(s, KVCache) for s in run["states"]),
                reads=lambda: held(run["states"]) + sum(p.numel() * p.element_size() for part in (
                    model.layers, model.norm, model.lm_head) for p in part.parameters()),
                weights=lambda: sum(p.numel() * p.element_size() for p in model.parameters()))


def side_by_side(opt, T, sizes):
    """{name: figures} of one context, the contenders being given with their batch sizes."""
    children, result = start(opt, {name: (reader, name, rows) for name, rows in sizes.items()}), {}
    real = T <= opt.prefill_upto and max(sizes.values()) == 1
    take_turns(children, 1, "prefill", 64)                # loads code and allocates scratch once
    warm = take_turns(children, 1, "weights")
    filled = take_turns(children, opt.repeats if real else 1, "prefill" if real else "fill", T)
    take_turns(children, 1, "forget")                     # what follows is decoding's own peak
    take_turns(children, 2, "step")                       # the first may have to enlarge the cache
    for name, rounds in take_turns(children, opt.steps, "step").items():
        seconds, peak = typical(rounds)
        child, rows, (_, before, weights) = children[name], sizes[name], warm[name][0]
        result[name] = dict(batch=rows, step=seconds, tokens_s=rows / seconds, peak=weights + peak - before,
                            step_shares=child("shares", 4)[2], weights=weights, held=child("held")[2],
                            mixers=child("mixers")[2], reads=child("reads")[2])
        if real:
            first, most = typical(filled[name])
            result[name].update(first_token=first, prefill_peak=weights + most - before)
    end(children)
    return result


def at_context(opt, T):
    """One context: {"batch 1": {name: figures}, "equal memory": the same at the largest batch that fits}."""
    text, width = Config.from_folder(opt.folder).text, getattr(torch, opt.dtype).itemsize
    names, sizes = ["teacher", "hybrid"][T > opt.teacher_upto:], {}
    one = side_by_side(opt, T, dict.fromkeys(names, 1))
    for name, r in one.items():
        r["counted"] = cache_bytes(text, r["mixers"], T + opt.steps + 2, width)
        row = cache_bytes(text, r["mixers"], T + ROOM, width)
        sizes[name] = largest_batch(opt.budget * GB, r["weights"], row)
    fits = {name: rows for name, rows in sizes.items() if rows}
    return {"batch 1": one, "equal memory": side_by_side(opt, T, fits) if fits else {}}


def compared(teacher, hybrid):
    """Table 7's columns: speeds as the hybrid's over the teacher's, and so memory. ceiling: what tokens_s would be if a
    step cost nothing but reading the decoder's weights, caches and states once."""
    keys = ("tokens_s", "held", "peak", "prefill_peak")
    r = {key: hybrid[key] / teacher[key] for key in keys if key in teacher}
    r["ceiling"] = hybrid["batch"] / teacher["batch"] * teacher["reads"] / hybrid["reads"]
    if "first_token" in teacher:
        r["first_token"] = teacher["first_token"] / hybrid["first_token"]
    return r


def contexts(opt):
    """Table 7's right half and Fig. 5: a row per context and model, and the curves."""
    table = {}
    heads = ("first s", "step ms", "tokens/s", "peak MB", "cache MB", "counted")
    print(f"{'context':>8}{'at':>13}{'':8}{'batch':>6}" + "".join(f"{h:>10}" for h in heads))
    for T in opt.contexts:
        table[T] = at_context(opt, T)
        for at, rows in table[T].items():
            for name, r in rows.items():
                cells = (r.get("first_token", math.nan), 1e3 * r["step"], r["tokens_s"], r["peak"] / 1e6,
                         r["held"] / 1e6, r.get("counted", math.nan) / 1e6)
                print(f"{T:8}{at:>13}{name:>8}{r['batch']:6}" + "".join(f"{c:10.2f}" for c in cells) + "   "
                      + ", ".join(f"{k} {100 * v:.0f} %" for k, v in r["step_shares"].items()), flush=True)
            if len(rows) == 2:
                rows["ratios"] = compared(*rows.values())
                print(f"{'ratios':>27}   " + ", ".join(f"{k} {v:.3f}" for k, v in rows["ratios"].items()))
    print(f"Prefilled states: those at batch 1 up to {opt.prefill_upto} positions. In others, attention's"
          " cache is random.")
    curves = {"tokens_s": ("tokens/s, batch 1", 1), "first_token": ("time to first token, s", 1),
              "peak": ("peak memory of decoding, MB", 1e-6), "held": ("cache and states, MB", 1e-6)}
    plot(opt, [(title, "context", {n: [(T, t["batch 1"][n][key] * scale) for T, t in table.items()
                                       if key in t["batch 1"].get(n, ())] for n in ("teacher", "hybrid")})
               for key, (title, scale) in curves.items()])
    return table


# ---------------------------------------------------------------------------------------------------------
# Training: a step of distill.py (Table 7, left half)


def settings(opt, cond, *more):
    flags = ["--teacher", opt.folder, "--cond", cond, "--device", opt.device, "--dtype", opt.dtype]
    return distill.parse(distill.DistillSettings, distill.DEFAULTS, [*flags, *more])


def stepper(opt, teacher, cond="c4", ranks=None, flags=()):
    """-> step(batch, stage): an optimiser step of a fresh student, at a rate that leaves its weights alone.
    AdamW's moments exist from the start, as they do in every step of a run but its first."""
    s, ranks = settings(opt, cond, *flags), ranks or distill.Ranks(0, 1, torch.device(opt.device))
    objective = distill.Distillation(s, teacher, distill.convert(s, teacher))
    parameters = list(objective.parameters().values())
    optimiser = torch.optim.AdamW(loop.groups(parameters, s.weight_decay), lr=1e-12, betas=(0.9, 0.95))

    def gradient(part):
        part.backward()
        return part.detach()

    def update(count):
        loop.reduce_gradients(ranks, parameters, count)
        loop.clip_gradients(ranks, parameters, s.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def step(batch, stage):
        label, _ = objective.prepare({1: 0.05, 2: 0.2, 3: 0.7}[stage])
        loss, count, _ = objective.loss(batch, label, gradient)
        update(count)
        return loss.item() / count
    for p in parameters:
        p.requires_grad_(True)
    update(1)                                             # gradients of zero make moments of zero
    step.objective = objective
    return step


def weighted(seconds):
    """{stage: seconds of a step} -> their mean over a run's budget, split 10/30/60; c1 has Stage 3 only."""
    return sum(SHARES[n] * t for n, t in seconds.items()) / sum(SHARES[n] for n in seconds)


def timed(tasks, rounds, device):
    """{key: function} -> {key: median seconds}; all take turns, and the first round only warms up."""
    times = {key: [] for key in tasks}
    for _ in range(rounds + 1):
        for key, f in tasks.items():
            begin = now(device)
            f()
            times[key].append(now(device) - begin)
    return {key: statistics.median(t[1:]) for key, t in times.items()}


def train(opt):
    """A step's time by condition and stage, in one process, in turn, and the density weights' own."""
    teacher, batch = build(opt.folder, opt), world_batch(opt.folder, opt.tokens).to(opt.device)
    steps, table = {cond: stepper(opt, teacher, cond) for cond in PAPER}, {}
    tasks = {(c, n): partial(steps[c], batch, n) for n in SHARES for c in PAPER if (n < 3) == (c != "c1")}
    with torch.no_grad():
        vision = teacher.visual(batch.pixels, batch.grids)
    tasks["density"] = partial(steps["c4"].objective.weights, batch, vision, None)      # e is for c5 only
    t = timed(tasks, opt.repeats, opt.device)
    # Stage 3 is the same code for all conditions, so one time serves them all.
    print(f"seconds a step of {int(batch.mask.sum()):,} tokens in {len(batch.ids)} samples")
    heads = ("stage 1", "stage 2", "stage 3", "10/30/60", "over c1", "paper")
    print(" " * 6 + "".join(f"{h:>10}" for h in heads))
    for c in PAPER:
        seconds = {n: t["c1" if n == 3 else c, n] for n in SHARES if n == 3 or c != "c1"}
        relative = weighted(seconds) / t["c1", 3]
        table[c] = dict(seconds=seconds, weighted=weighted(seconds), relative=relative)
        cells = [*(seconds.get(n, math.nan) for n in SHARES), weighted(seconds), relative, PAPER[c]]
        print(f"{c:6}" + "".join(f"{x:10.3f}" for x in cells))
    table["density"] = (SHARES[1] + SHARES[2]) * t["density"] / table["c3"]["weighted"]
    print(f"density weights: {1e3 * t['density']:.2f} ms a step in Stages 1 and 2, "
          f"{100 * table['density']:.3f} % of c3 in all")
    return table


# ---------------------------------------------------------------------------------------------------------
# Against transformers: the same weights and inputs


def ours(opt):
    model, run, asked = build(opt.folder, opt), {}, questions(opt)
    b = document(opt.folder, 1, opt.text, opt.visual).to(opt.device)
    token, model.config.eos_token_id = torch.tensor([20], device=opt.device), []        # no answer ends early

    def prefill():
        logits, run["states"], run["position"] = model.prefill(b.ids, None, b.pixels, b.grids)
        return logits[0].tolist()

    def step():
        logits, run["states"] = model.step(token, run["states"], run["position"])
        run["position"] = run["position"] + 1
        return logits[0].tolist()

    def generate():
        rows = model.generate(asked.ids, asked.mask, asked.pixels, asked.grids, max_new_tokens=opt.new)
        return [float(t) for row in rows for t in row]
    return dict(prefill=prefill, step=step, generate=generate)


def our_trainer(opt):
    step = stepper(opt, build(opt.folder, opt), "c3")
    batch = world_batch(opt.folder, opt.tokens).to(opt.device)
    return dict(train=lambda stage: step(batch, stage))


def load_theirs(opt):
    from transformers import Qwen3VLForConditionalGeneration
    model = Qwen3VLForConditionalGeneration.from_pretrained(opt.folder, dtype=getattr(torch, opt.dtype),
                                                            attn_implementation="sdpa")
    return model.requires_grad_(False).eval().to(opt.device)


def their_inputs(b, image):
    return dict(input_ids=b.ids, attention_mask=b.mask.long(), pixel_values=b.pixels, image_grid_thw=b.grids,
                mm_token_type_ids=(b.ids == image).int())


def theirs(opt):
    model, run, token = load_theirs(opt), {}, torch.tensor([[20]], device=opt.device)
    b, asked = document(opt.folder, 1, opt.text, opt.visual).to(opt.device), questions(opt)
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def prefill():
        model.model.rope_deltas = None
        out = model(**their_inputs(b, model.config.image_token_id), use_cache=True, logits_to_keep=1)
        run["cache"] = out.past_key_values
        return out.logits[0, -1].tolist()

    @torch.inference_mode()
    def step():
        out = model(input_ids=token, past_key_values=run["cache"], use_cache=True)    # no padding, no mask
        return out.logits[0, -1].tolist()

    def generate():
        inputs = their_inputs(asked, model.config.image_token_id)
        ids = model.generate(**inputs, max_new_tokens=opt.new, do_sample=False)
        return ids[:, asked.ids.shape[1]:].flatten().float().tolist()
    return dict(prefill=prefill, step=step, generate=generate)


class Slot(torch.nn.Module):
    """Our mixer in transformers' attention slot, computing with our scan or with transformers'."""

    def __init__(self, mixer, their_scan):
        super().__init__()
        self.mixer, self.scan = mixer, self.other if their_scan else ssd

    @staticmethod
    def other(x, dt, A, B, C, D, state, mask):
        x, B = (z.repeat_interleave(C.shape[2] // z.shape[2], 2) for z in (x, B))
        return fallback(64)(x, dt, A, B, C) + D[:, None] * x, None

    def forward(self, hidden_states, **_):
        with patch("mamba2.ssd", self.scan):
            return self.mixer(hidden_states)[0], None


def their_trainer(opt, their_scan):
    """The obvious way: transformers' teacher, a second full copy with exchanged layers, all logits. In Stages 1 and 2
    its layers read what hooks saw the teacher's read, and one backward pass follows."""
    teacher, student = load_theirs(opt), load_theirs(opt)
    hybrid = to_hybrid(build(opt.folder, opt))
    S, image = hybrid.config.hybrid["layers"], teacher.config.image_token_id
    mixers = {i: hybrid.layers[i].self_attn.float() for i in S}
    for i, mixer in mixers.items():
        student.model.language_model.layers[i].self_attn = Slot(mixer, their_scan)
    named = [(n, p) for mixer in mixers.values() for n, p in mixer.named_parameters()]
    inherited, parameters = mixers[S[0]].INHERITED, [p for _, p in named]
    optimiser = torch.optim.AdamW(parameters, lr=1e-12, betas=(0.9, 0.95), weight_decay=0.01)
    batch, seen = world_batch(opt.folder, opt.tokens).to(opt.device), {}
    for i in S:
        teacher.model.language_model.layers[i].register_forward_hook(
            lambda m, args, given, out, i=i: seen.update({i: (args[0] if args else given["hidden_states"], out)}),
            with_kwargs=True)

    def train(stage):
        for n, p in named:
            p.requires_grad_(stage > 1 or not n.startswith(inherited))
        both = dict(their_inputs(batch, image), use_cache=False)
        with torch.no_grad():
            t = teacher(**both)
        if stage < 3:
            layers = student.model.language_model.layers
            error = [distill.drift(layers[i](seen[i][0], position_embeddings=None), seen[i][1])
                     for i in S]
            loss = torch.stack(error).mean(0)[batch.mask].mean()
        else:
            s = student(**both)
            target = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
            log_q, log_p = s.logits.float().log_softmax(-1), t.logits.float().log_softmax(-1)
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[target != IGNORED].mean()
            loss = kl + 0.1 * F.nll_loss(log_q.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()
    return dict(train=train)


def against(opt):
    """By turns; how far answers and losses differ is printed, for unless they agree nothing is compared. A peak is
    the most of a part so far: reading, then training."""
    if not any(Path(opt.folder).glob("model*.safetensors")):
        build(opt.folder, opt).save_pretrained(opt.folder)
    opt.libraries = ["transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.models.mamba2.modeling_mamba2"]
    contenders = {"ours": ([ours], [our_trainer]), "transformers": ([theirs], [their_trainer, True]),
                  "transformers, our scan": ([], [their_trainer, False])}
    reading = [("prefill", opt.repeats + 1), ("step", opt.steps), ("generate", opt.repeats + 1)]
    training, table = [("train", opt.repeats + 1, n) for n in SHARES], {}
    print(f"{'':10}{'':24}{'ms':>10}{'x ours':>8}{'peak MB':>10}{'ours / it':>10}")
    for part, tasks in enumerate((reading, training)):
        children = start(opt, {name: makers[part] for name, makers in contenders.items() if makers[part]})
        for task, rounds, *stage in tasks:
            rows, task = take_turns(children, rounds, task, *stage), " ".join(map(str, [task, *stage]))
            table[task] = report(task, {name: typical(r[1:]) for name, r in rows.items()})  # less the warm-up
            a, *others = (torch.tensor(r[0][2]) for r in rows.values())
            worst = max(((b - a).abs().max() / a.abs().max()).item() for b in others)
            print(f"{'':10}largest difference of an answer or loss: {worst:.1e} of it", flush=True)
        end(children)
    table["10/30/60"] = report("10/30/60", {
        name: (weighted({n: table[f"train {n}"][name][0] for n in SHARES}), table["train 3"][name][1])
        for name in contenders})                          # peaks only grow, so the last is that of all stages
    return table


def report(task, rows):
    for name, (seconds, peak) in rows.items():
        print(f"{task:10}{name:24}{1e3 * seconds:10.1f}{seconds / rows['ours'][0]:8.2f}{peak / 1e6:10.0f}"
              f"{rows['ours'][1] / peak:10.2f}", flush=True)
    return rows


def headed(opt, chunked):
    """Eq. 1 on so many rows, forward and backward, through a frozen head of a real vocabulary."""
    torch.manual_seed(0)
    head = torch.nn.Linear(opt.width, opt.vocabulary, bias=False, device=opt.device).requires_grad_(False)
    h_s, h_t = (torch.randn(opt.rows, opt.width, device=opt.device) for _ in range(2))
    target = torch.randint(opt.vocabulary, (opt.rows,), device=opt.device)
    def plain(h_s, h_t, y, *_):
        log_q, log_p = head(h_s).log_softmax(-1), head(h_t).log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum"), F.nll_loss(log_q, y, reduction="sum")

    def run(n=opt.rows):
        kl, ce = (distill.kd_sums if chunked else plain)(h_s[:n].requires_grad_(), h_t[:n], target[:n], head, head)
        (kl + 0.1 * ce).backward()
        return [kl.item(), ce.item()]
    run(2)                                                # loads code and allocates scratch once
    return dict(run=run, rest=lambda: None)


def head(opt):
    """What kd_sums saves beside the plain form; a smaller --rows fits the plain form into less memory."""
    children = start(opt, {"ours": (headed, True), "all logits": (headed, False)})
    rest, rows = take_turns(children, 1, "rest"), take_turns(children, opt.repeats, "run")
    end(children)
    table = {name: (typical(r)[0], typical(r)[1] - rest[name][0][1]) for name, r in rows.items()}
    print(f"{'':10}{f'{opt.rows:,} x {opt.vocabulary:,}':24}{'ms':>10}{'x ours':>8}{'peak MB':>10}{'ours / it':>10}")
    report("head", table)
    print(f"KL and CE: {rows['ours'][0][2]} and {rows['all logits'][0][2]}")
    return table


# ---------------------------------------------------------------------------------------------------------
# Growth, and the arithmetic of --dry-run


def rank(opt, number, world, port):
    """A child that is one of `world` processes of a training step, each with its part of eight rows."""
    for scope in ("", "LOCAL_"):
        os.environ.update({f"{scope}RANK": str(number), f"{scope}WORLD_SIZE": str(world)})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    s = replace(settings(opt, "c4"), threads=int(os.environ["OMP_NUM_THREADS"]))
    step = stepper(opt, build(opt.folder, opt), ranks=distill.start_processes(s))
    batch = document(opt.folder, 8 // world, 128, 64).to(opt.device)
    return dict(step=lambda: step(batch, 2))


def divided(opt, world):
    """Seconds of a step divided among `world` processes: the slowest one's, median of the rounds."""
    port, times = 20000 + (os.getpid() + world) % 10000, []
    children = start(opt, {n: (rank, n, world, port) for n in range(world)})
    for _ in range(opt.repeats + 1):
        for child in children.values():
            child.pipe.send(("step", ()))
        times.append(max(child.hear()[0] for child in children.values()))
    end(children)
    return statistics.median(times[1:])


def growth(opt):
    """A step of c4, Stage 2, against what makes it larger, one thing at a time."""
    step, table = stepper(opt, build(opt.folder, opt)), {}
    sweeps = {"text tokens": {n: (1, n, 0) for n in (512, 1024, 2048, 4096, 8192)},     # rows, text, visual
              "visual tokens": {n: (1, 64, n) for n in (64, 256, 1024, 4096)},
              "rows": {n: (n, 128, 64) for n in (1, 2, 4, 8, 16)}}
    for name, sizes in sweeps.items():
        batches = {n: document(opt.folder, *size).to(opt.device) for n, size in sizes.items()}
        table[name] = timed({n: partial(step, b, 2) for n, b in batches.items()}, opt.repeats, opt.device)
    table["processes that share 8 rows"] = {n: divided(opt, n) for n in opt.processes}
    for name, curve in table.items():
        print(f"seconds a step by {name}: " + ", ".join(f"{n} {t:.3f}" for n, t in curve.items()))
    plot(opt, [("seconds a step", name, {"": list(curve.items())}) for name, curve in table.items()])
    return table


def trainee(opt):
    step = stepper(opt, build(opt.folder, opt))
    batch = document(opt.folder, 1, opt.text, opt.visual).to(opt.device)
    return dict(train=lambda stage: step(batch, stage), tokens=lambda: batch.ids.shape[1])


def promised(opt, tokens):
    """{part: bytes} that distill.py --dry-run names for micro-batches of so many tokens."""
    with redirect_stdout(StringIO()) as said:
        distill.main(["--dry-run", "--teacher", opt.folder, "--micro-tokens", str(tokens),
                      "--device", opt.device, "--dtype", opt.dtype])
    parts = re.search(r"needs about [\d.,]+ GB: (.*)", said.getvalue()).group(1).split(", ")
    return {name: float(size.replace(",", "")) * GB for name, size in map(str.split, parts)}


def step(opt):
    """One optimiser step on one document with the optimiser's state in place: time, peak, and the promise."""
    child = start(opt, {"c4": (trainee,)})
    (_, resting, tokens), (seconds, peak, loss) = child["c4"]("tokens"), child["c4"]("train", opt.stage)
    end(child)
    said = promised(opt, tokens)
    total = sum(said.values())
    print(f"c4, Stage {opt.stage}, one document of {tokens} tokens: {seconds:.1f} s, loss {loss:.4g}, peak "
          f"{peak / GB:.2f} GB, of which {resting / GB:.2f} stood before the step")
    print(f"--dry-run says {total / GB:.2f}: " + ", ".join(f"{k} {v / GB:.2f}" for k, v in said.items())
          + f"; measured / said = {peak / total:.2f}")
    return dict(tokens=tokens, seconds=seconds, peak=peak, resting=resting, said=said)


# ---------------------------------------------------------------------------------------------------------
# The scan: ours, state-spaces' ssd_minimal_discrete (mamba_ssm/modules/ssd_minimal.py of github.com/
# state-spaces/mamba, read from where you keep it), and transformers' stand-in for the kernel


def own(chunk, path=None):
    return lambda x, dt, A, B, C: ssd(x, dt, A, B, C, chunk=chunk)[0]


def minimal(chunk, path):
    """The listing as a module; the fused kernel it imports for its own test is stubbed if absent."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        sys.modules.setdefault(name, types.ModuleType(name)).mamba_chunk_scan_combined = None
    module = types.ModuleType("ssd_minimal")
    exec(compile(Path(path).read_text(), path, "exec"), module.__dict__)

    def run(x, dt, A, B, C):
        pad = -x.shape[1] % chunk                                      # the listing wants whole chunks
        X, A, B, C = (F.pad(z, (0, 0) * (z.dim() - 2) + (0, pad)) for z in (x * dt[..., None], dt * A, B, C))
        return module.ssd_minimal_discrete(X, A, B, C, chunk)[0][:, :x.shape[1]]
    return run


def fallback(chunk, path=None):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    return lambda x, dt, A, B, C: scan(x, dt, A, B, C, chunk)


SCANS = {                                                 # how to make the function, chunk sizes to try
    "ours": (own, (None,)),
    "ssd_minimal": (minimal, (64, 128, 256)),
    "transformers": (fallback, (64, 128, 256)),
}


def scan_inputs(T, opt):
    """As many groups as heads, as the listing wants it; decays from quick to slow."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(opt.batch, T, opt.H, opt.P) for _ in range(3))
    dt = F.softplus(torch.randn(opt.batch, T, opt.H) - 4)
    return [z.requires_grad_() for z in (x, dt, -torch.exp(torch.rand(opt.H)), B, C / opt.P ** 0.5)]


def there_and_back(f, args, weight):
    y = f(*args)
    y.backward(weight)
    for z in args:
        z.grad = None
    return y.detach()


def scanner(opt, row, chunk):
    f, args = SCANS[row][0](chunk, opt.ssd_minimal), scan_inputs(opt.T, opt)
    weight = torch.randn_like(args[0])
    there_and_back(f, scan_inputs(64, opt), weight[:, :64])    # loads code and allocates scratch once
    return dict(run=lambda: there_and_back(f, args, weight).numpy(), rest=lambda: None)


def scan(opt):
    """Forward and backward, peers in turn: the least time, and the memory that a run adds to its inputs."""
    if opt.growth:
        sizes = {2 ** k: scan_inputs(2 ** k, opt) for k in range(12, 18)}
        times = timed({T: partial(there_and_back, own(None), args, torch.ones_like(args[0]))
                       for T, args in sizes.items()}, opt.repeats, "cpu")
        for T, t in times.items():
            print(f"T={T:7} {1e3 * t:8.0f} ms   over T / 2: {t / times.get(T // 2, math.nan):.2f}")
        return times
    have = dict(ours=True, ssd_minimal=opt.ssd_minimal, transformers=importlib.util.find_spec("transformers"))
    children = start(opt, {f"{row} {chunk or ''}": (scanner, row, chunk) for row, (_, chunks) in SCANS.items()
                           if have[row] for chunk in chunks})
    rest = take_turns(children, 1, "rest")
    rows, table = take_turns(children, opt.repeats, "run"), {}
    end(children)
    reference = torch.from_numpy(rows["ours "][0][2])
    for name, rounds in rows.items():
        y = torch.from_numpy(rounds[0][2])
        table[name] = dict(seconds=min(r[0] for r in rounds), bytes=rounds[0][1] - rest[name][0][1],
                           difference=((y - reference).norm() / reference.norm()).item())
    print(f"{'chunk':20}{'ms':>8}{'x ours':>8}{'MB':>8}{'x ours':>8}{'difference':>12}")
    for name, r in table.items():
        print(f"{name:20}{1e3 * r['seconds']:8.0f}{r['seconds'] / table['ours ']['seconds']:8.2f}"
              f"{r['bytes'] / 1e6:8.0f}{r['bytes'] / table['ours ']['bytes']:8.2f}{r['difference']:12.1e}")
    return table


# ---------------------------------------------------------------------------------------------------------
# Pictures, records, and the command line

INKS, INK, RULE = [(96, 104, 118), (208, 92, 36)], (60, 60, 70), (226, 227, 231)


def short(x):
    """4096 -> 4k, 1048576 -> 1M; else three digits."""
    for unit, name in ((2 ** 20, "M"), (2 ** 10, "k")):
        if x >= unit and x % unit == 0:
            return f"{int(x // unit)}{name}"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def axis(values):
    """Rungs of 1, 2, 5, 10 ... that enclose the values, thinned to at most eight."""
    ladder = [m * 10.0 ** e for e in range(-9, 13) for m in (1, 2, 5)]
    low = max(v for v in ladder if v <= min(values))
    high = min(v for v in ladder if v >= max(values) and v > low)
    rungs = [v for v in ladder if low <= v <= high]
    return low, high, rungs[::-(-len(rungs) // 8)]


def plot(opt, panels, w=840, h=560):
    """Log-log lines to results/bench-COMMAND-MODEL.png. panels: [(title, x label, {name: [(x, y)]})]."""
    panels = [p for p in panels if any(p[2].values())]
    sheet = Image.new("RGB", (2 * w, -(-len(panels) // 2) * h), "white")
    pen, font, bold = ImageDraw.Draw(sheet), ImageFont.load_default(22), ImageFont.load_default(26)
    for i, (title, label, series) in enumerate(panels):
        left, right, top, bottom = i % 2 * w + 120, i % 2 * w + w - 50, i // 2 * h + 80, i // 2 * h + h - 100
        xs, ys = ({p[k] for line in series.values() for p in line} for k in (0, 1))
        low, high, rungs = axis(ys)
        wide = math.log(max(xs) / min(xs)) or 1

        def at(x, y):
            return (left + math.log(x / min(xs)) / wide * (right - left),
                    bottom - math.log(y / low) / math.log(high / low) * (bottom - top))
        for y in rungs:
            pen.line([(left, at(min(xs), y)[1]), (right, at(min(xs), y)[1])], RULE, 2)
            pen.text((left - 12, at(min(xs), y)[1]), short(y), INK, font, anchor="rm")
        for x in xs:
            pen.text((at(x, low)[0], bottom + 14), short(x), INK, font, anchor="mt")
        pen.text((left, top - 24), title, "black", bold, anchor="ls")
        pen.text(((left + right) // 2, bottom + 50), label, INK, font, anchor="mt")
        for k, (name, line) in enumerate(series.items()):
            pen.line([at(*p) for p in line], INKS[k], 4, joint="curve")
            for x, y in (at(*p) for p in line):
                pen.ellipse((x - 7, y - 7, x + 7, y + 7), INKS[k])
            pen.text((right - 130 * (len(series) - 1 - k), top - 24), name, INKS[k], font, anchor="rs")
    path = HERE / "paper" / "results" / f"bench-{opt.command}-{Path(opt.model).name}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.resize((w, sheet.height // 2), Image.LANCZOS).save(path)
    print(path)


def record(opt, result):
    """Keeps the result in results/bench.json under its command and model, and prints it as the last line."""
    path = HERE / "paper" / "results" / "bench.json"
    model = "growth" if opt.command == "scan" and opt.growth else Path(getattr(opt, "model", opt.command)).name
    kept = json.loads(path.read_text()) if path.exists() else {}
    asked = {k: v for k, v in vars(opt).items() if k not in ("folder", "command")}
    new = dict(asked=asked, threads=torch.get_num_threads(), torch=torch.__version__, result=result)
    kept.setdefault(opt.command, {})[model] = new
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps({opt.command: {model: new}}))


COMMANDS = {              # command: (function, {flag: (default, what it is)}); a list takes several values
    "contexts": (contexts, dict(
        contexts=([4096, 32768, 131072], "positions before the first decode step"),
        prefill_upto=(32768, "contexts up to this one are read in full; beyond, attention's cache is random"),
        teacher_upto=(131072, "beyond this context the hybrid runs alone"),
        budget=(4.0, "GB for weights, cache and states: at equal memory, the largest batch that fits"),
        chunk=(512, "positions that a prefill takes at once"),
        steps=(16, "decode steps"), repeats=(1, "prefills"),
        compile=(False, "torch.compile the mixers' decode step"),
        mixer=("mamba2", "of the hybrid: mamba2, gdn or FILE.py:CLASS"),
        hybrid=("", "folder of a distilled student, in place of a fresh hybrid of --model"))),
    "train": (train, dict(tokens=(5000, "of the step"), repeats=(5, "rounds"))),
    "against": (against, dict(
        text=(1024, "text tokens of the prompt"), visual=(1024, "visual tokens of its page"),
        rows=(16, "questions that are answered at once"), new=(32, "tokens of each answer"),
        steps=(32, "decode steps"), tokens=(5000, "of the distillation step"), repeats=(3, "rounds"))),
    "head": (head, dict(
        rows=(4096, "supervised positions"), vocabulary=(151936, "rows of the head"), width=(64, "of hidden states"),
        repeats=(1, "rounds"))),
    "growth": (growth, dict(processes=([1, 2], "to divide a step among"), repeats=(3, "rounds"))),
    "step": (step, dict(text=(64, "text tokens of the question"), visual=(440, "visual tokens of the page"),
                        stage=(3, "1, 2 or 3"))),
    "scan": (scan, dict(
        T=(16384, "positions"), H=(8, "heads"), P=(64, "head and state dim"), batch=(1, "rows"),
        repeats=(3, "rounds"), ssd_minimal=("", "where ssd_minimal.py is"),
        growth=(False, "ours alone, T up to 131,072"))),
}


def parse(argv):
    command = argv[0] if argv and argv[0] in COMMANDS else "contexts"
    here = device_of()
    model = dict(model=("tiny", "folder of a checkpoint or a config.json, or one of " + ", ".join(SHAPES)),
                 device=(here.type, "cuda or cpu"),
                 dtype=(str(dtype_of("", here)).removeprefix("torch."), "of weights and activations"))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"bench.py {command}", description=__doc__, formatter_class=raw)
    for name, (default, why) in ((model if command not in ("scan", "head") else {}) | COMMANDS[command][1]).items():
        many = dict(nargs="+") if isinstance(default, list) else {}
        kind = dict(type=type(default[0] if many else default), **many) if default is not False else \
            dict(action="store_true")
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=why, **kind)
    opt = parser.parse_args(argv[1:] if argv[:1] == [command] else argv)
    if getattr(opt, "ssd_minimal", "") and not Path(opt.ssd_minimal).is_file():
        parser.error(f"--ssd-minimal {opt.ssd_minimal}: there is no such file")
    try:
        device_of(getattr(opt, "device", "cpu"))
    except ValueError as error:
        parser.error(str(error))
    return argparse.Namespace(**{"device": "cpu", **vars(opt), "command": command})


def main(argv):
    opt = parse(argv)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            opt.folder = folder_of(opt.model, scratch) if "model" in opt else ""
        except (OSError, ValueError) as error:
            sys.exit(f"--model {opt.model}: {error}")
        record(opt, COMMANDS[opt.command][0](opt))


if __name__ == "__main__":
    main(sys.argv[1:])
