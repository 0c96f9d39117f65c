"""What bench.py measures: models that read, write, train and scan, ours and others'; and what these
must hold, read and compute at the least, whoever does it. A contender's methods are its tasks.

    Reader, TransformersReader      prompts, decode steps, answers
    Trainer, TransformersTrainer    a distillation step; theirs is the obvious way
    Scanner                         mamba2.ssd; state-spaces' ssd_minimal_discrete (mamba_ssm/
                                    modules/ssd_minimal.py of github.com/state-spaces/mamba, read
                                    from where you keep it) and Triton kernels; transformers'
                                    stand-in for these

Letters: B batch, T positions, D model width, H heads, G key/value groups, P head dim, V vocabulary.
"""
import json
import os
import shutil
import sys
import types
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

import distill
import loop
import mamba2
from data import IGNORED, Batch, Plan, Processor, collate, following, loader
from model import Attention, Config, KVCache, Qwen3VL, TextConfig, VisionConfig, to_hybrid
from synthdoc import World

ROOT, GB = Path(__file__).parents[1], 2 ** 30
PROGRESS = {1: 0.05, 2: 0.2, 3: 0.7}      # shares of the budget in the midst of each stage
ROOM, TOKEN = 256, 20     # positions that a random cache leaves for decoding, and what comes there
QUESTIONS, ANSWER = 16, 32                                # pages answered at once, tokens of each
SHAPES = {                # what differs from the embedded teacher: text, vision, tied embeddings
    "wide": (dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, head_dim=64,
                  num_attention_heads=8, num_key_value_heads=2, mrope_section=[12, 10, 10]),
             dict(out_hidden_size=512), True),
    "2b": (dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, head_dim=128,
                num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                mrope_section=[24, 20, 20]),
           dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=16,
                out_hidden_size=2048, num_position_embeddings=2304,
                deepstack_visual_indexes=[5, 11, 17]), True),
    "8b": (asdict(TextConfig()), asdict(VisionConfig()), False),
}

# ---- Models and what they read ----


def folder_of(model, scratch):
    """model; where that has no tokenizer, scratch with its shape and the embedded tokenizer."""
    tiny = Config.from_folder(ROOT / "tiny")
    if model == "tiny":
        return str(ROOT / "tiny")
    if model in SHAPES:
        text, vision, tied = SHAPES[model]
        config = replace(tiny, text=replace(tiny.text, **text), tie_word_embeddings=tied,
                         vision=replace(tiny.vision, **vision))
    elif (Path(model) / "tokenizer.json").is_file():
        return str(model)
    else:
        bare = Config.from_folder(model)
        config = replace(tiny, text=bare.text, vision=bare.vision,
                         tie_word_embeddings=bare.tie_word_embeddings)
    (Path(scratch) / "config.json").write_text(json.dumps(config.to_json()))
    shutil.copy(ROOT / "tiny" / "tokenizer.json", scratch)
    return str(scratch)


def build(opt):
    """The checkpoint in opt.folder, or random weights of its shape where it holds none."""
    dtype = getattr(torch, opt.dtype)
    if Config.from_folder(opt.folder).Tower:
        raise SystemExit(f"{opt.folder} is no Qwen3-VL, whose operations and pictures are counted here")
    if any(Path(opt.folder).glob("model*.safetensors")):
        return Qwen3VL.from_pretrained(opt.folder, dtype, opt.device)
    with torch.device("meta"):
        model = Qwen3VL(Config.from_folder(opt.folder))
    model = model.to(dtype).to_empty(device=opt.device).eval()
    if model.config.tie_word_embeddings:                  # to_empty made two of one
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(name.endswith("weight"))
    return model.requires_grad_(False)


def as_transformers(model, own=False):
    """transformers' model on the same tensors, or with own=True on copies."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration as Theirs
    config, device = model.config.to_json(), model.lm_head.weight.device
    config = Qwen3VLConfig(**{k: v for k, v in config.items()
                              if k not in ("architectures", "model_type")})
    with torch.device("meta"):
        theirs = Theirs._from_config(config, attn_implementation="sdpa")
    state = {k: v.clone() if own else v for k, v in model.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    for name, buffer in list(theirs.named_buffers()):     # rotary frequencies are in no checkpoint
        if "inv_freq" in name:
            owner, _, last = name.rpartition(".")
            n, theta = len(buffer), 1e4 if "visual" in name else model.config.text.rope_theta
            frequencies = theta ** -(torch.arange(n, device=device).float() / n)
            theirs.get_submodule(owner).register_buffer(last, frequencies, persistent=False)
    return theirs.requires_grad_(False).eval()


def random_ids(config, rows, T):
    ids = torch.randint(10, config.text.vocab_size, (rows, T))
    return ids.masked_fill_((ids == config.image_token_id) | (ids == config.video_token_id), 9)


def random_batch(config, rows, text, visual):
    """Batch of equal rows: an image of about `visual` tokens, then `text` supervised ones."""
    torch.manual_seed(0)                                  # the same for all contenders
    v, side = config.vision, round(visual ** 0.5)         # of the square image, in visual tokens
    seen = side ** 2 + 2
    ids = random_ids(config, rows, seen + text)
    ids[:, 0], ids[:, 1:seen - 1], ids[:, seen - 1] = \
        config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    labels = ids.clone()
    labels[:, :seen] = IGNORED
    side *= v.spatial_merge_size                          # in patches
    patch = v.in_channels * v.temporal_patch_size * v.patch_size ** 2
    pixels, grids = torch.randn(rows * side ** 2, patch), torch.tensor([[1, side, side]] * rows)
    names = ["page"] * rows
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), labels, pixels, grids, names, names)


def world_batch(opt):
    """A micro-batch of the embedded world, as distill.py draws it."""
    world, processor = World("train", 0), Processor(opt.folder)
    plan = Plan(world, processor, 0, opt.tokens, opt.tokens)
    return replace(next(iter(loader(world, processor, plan))), last=True).to(opt.device)


def questions(opt):
    """Evaluation pages of the embedded world, each with one: a left-padded batch."""
    world, processor = World("eval", 0, "reading"), Processor(opt.folder)
    samples = [replace(world[i], messages=world[i].messages[:1]) for i in range(QUESTIONS)]
    encoded = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
    return collate(encoded, processor.pad_id, side="left").to(opt.device)


# ---- What must be held, read and computed ----


def row_bytes(states, T):
    """What decoding carries along for one row after T positions, by a prompt's states; after 0 what
    does not grow."""
    return sum(2 * T * s.k[0, :, :1].nbytes if isinstance(s, KVCache)
               else sum(t[0].nbytes for t in s) for s in states)


def held(states):
    """Bytes of states, without the room to spare in their buffers."""
    return sum((t[:, :, :s.length] if isinstance(s, KVCache) else t).numel() * t.element_size()
               for s in states for t in s if isinstance(t, torch.Tensor))


def largest_batch(budget, weights, row):
    """Rows that fit beside the weights; all in bytes."""
    return max(0, int((budget - weights) // row))


def matrices(*modules):
    """Weights that every position is multiplied with."""
    linear = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.numel() for m in linear)


def mixing_flops(layers, T):
    """What mixers compute beside linear layers: causal attention, or mamba2.ssd in chunks of P."""
    total = 0
    for mixer in (layer.self_attn for layer in layers):
        P = mixer.config.head_dim
        each = 2 * T if isinstance(mixer, Attention) else 8 * P
        total += mixer.config.num_attention_heads * T * P * each
    return total


def forward_flops(layers, T):
    return 2 * T * matrices(*layers) + mixing_flops(layers, T)


def tower_flops(tower, grids):
    c, lengths = tower.config, [h * w for t, h, w in grids.tolist() for _ in range(t)]
    linear = sum(lengths) * matrices(tower.blocks)
    mergers = matrices(tower.merger, tower.deepstack_merger_list)
    linear += sum(lengths) // c.spatial_merge_size ** 2 * mergers
    return 2 * linear + 4 * c.depth * c.hidden_size * sum(n ** 2 for n in lengths)


def step_flops(o, batch, stage):
    """Of a micro-batch of the Distillation `o`: for each weight and position two forward, two for
    the gradient of what goes in, where that leads to a mixer, and two for the weight's own, where
    it trains."""
    (rows, T), c = batch.ids.shape, o.student.config.text
    teacher, student = list(o.teacher.layers), list(o.student.layers)
    mixed = [student[i] for i in o.replaced]
    total = 2 * T * sum(p.numel() for p in o.mixers.values() if p.requires_grad and p.dim() > 1)
    if stage == 3:
        # The student forward, once more with --recompute, and back, where mixing costs twice.
        total += forward_flops(teacher, T) + mixing_flops(student, T)
        total += forward_flops(student, T) * (2 + o.student.recompute)
        # Both logits are made twice, and the student's differentiated.
        supervised = (batch.labels[:, 1:] != IGNORED).sum().item() / rows
        total += 5 * 2 * supervised * c.vocab_size * c.hidden_size
    else:
        total += forward_flops(teacher[:max(o.replaced) + 1], T)
        total += forward_flops(mixed, T) + 2 * mixing_flops(mixed, T)
        back = len(mixed) * c.num_attention_heads * c.head_dim * c.hidden_size           # W_O
        if o.cond.align == "residual":
            back += matrices(*(layer.mlp for layer in mixed))
        total += 2 * T * back
        if o.cond.weight == "fisher":                     # the teacher there and back
            total += forward_flops(teacher, T) * (2 + o.teacher.recompute)
            total += mixing_flops(teacher, T)
    return rows * total + tower_flops(o.teacher.visual, batch.grids)


# ---- Reading and writing ----


def lengthen(states, T, rows, shared):
    """A short prompt's states -> those of `rows` rows after T positions: recurrent states repeated,
    keys and values random. shared: one row stands for all, for who copies them into own buffers."""
    longer, keys = [], None
    for s in states:
        if not isinstance(s, KVCache):
            longer.append(type(s)(*(t.repeat(rows, *[1] * (t.dim() - 1)) for t in s)))
            continue
        if keys is None or not shared:
            shape = (1, s.k.shape[1], T + (0 if shared else ROOM), s.k.shape[3])
            keys = [torch.randn(shape, dtype=t.dtype, device=t.device) for t in (s.k, s.v)]
            keys = [t.expand(rows, -1, -1, -1) if shared else t.repeat(rows, 1, 1, 1) for t in keys]
        longer.append(KVCache(*keys, None, T))
    return longer


class Reader:
    """The teacher, or the hybrid made from it."""

    def __init__(self, opt, name):
        self.opt, self.model = opt, build(opt)
        if name == "hybrid":
            self.model = to_hybrid(self.model)
        self.model.config.eos_token_id = []               # no answer ends early
        self.graph, self.asked = opt.device == "cuda", None

    def rest(self):
        """Drops the last states, which must not count in what follows."""
        self.states = self.decode = self.model.replayed = None

    def prefill(self, T):
        self.rest()
        ids = random_ids(self.model.config, 1, T).to(self.opt.device)
        logits, self.states, self.position = self.model.prefill(ids, chunk=self.opt.chunk or None)
        return logits[0]

    @torch.inference_mode()
    def begin(self, T, full):
        """Readies decoding after T positions; 0: after those that prefill has read. full: of as
        many rows as opt.budget holds, else of one."""
        text, rows = self.model.config.text, 1
        decoder = sum(p.nbytes for part in (self.model.layers, self.model.norm, self.model.lm_head)
                      for p in part.parameters())
        weights = sum(p.nbytes for p in self.model.parameters())
        if full:
            self.prefill(16)
            # Replayed steps keep recurrent states three times more.
            row = row_bytes(self.states, T + ROOM) + 3 * self.graph * row_bytes(self.states, 0)
            rows = largest_batch(self.opt.budget * GB, weights, row)
        if not rows:
            raise ValueError(f"{self.opt.budget:.3g} GB do not hold the weights and one row")
        while not self.lengthened(T, rows):               # what was counted leaves out scratch
            rows -= max(1, rows // 16)
        T = T or int(self.position[0])
        flops = forward_flops(self.model.layers, T) + 2 * text.hidden_size * text.vocab_size
        return dict(batch=rows, weights=weights, reads=decoder + self.held, held=self.held,
                    flops=flops)

    def lengthened(self, T, rows):
        """Whether there is memory for so many rows."""
        try:
            if T:
                self.prefill(16)
                self.states = lengthen(self.states, T, rows, self.graph)
                self.position = (self.position + T - 16).repeat(rows)
            self.held, self.tokens = held(self.states), torch.full_like(self.position, TOKEN)
            states, self.states = self.states, None       # start_decoding empties the list
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self.decode = self.model.start_decoding(
                    states, self.position, self.opt.steps + 2, self.graph)
            for sentence in (str(w.message) for w in said):
                if "out of memory" in sentence:           # for the capture, though the buffers fit
                    raise torch.OutOfMemoryError(sentence)
                print(sentence)
            return True
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        return False

    def step(self):
        return self.decode(self.tokens)[0]

    def generate(self):
        self.asked = a = self.asked or questions(self.opt)
        return torch.tensor(self.model.generate(a.ids, a.mask, a.pixels, a.grids, ANSWER,
                                                graph=self.graph))


class TransformersReader:
    """The teacher by transformers, a row at a time."""

    def __init__(self, opt):
        model = build(opt)
        self.opt, self.config, self.model = opt, model.config, as_transformers(model)
        self.model.generation_config.eos_token_id = None
        self.asked = None

    def rest(self):
        self.cache = None

    @torch.inference_mode()
    def prefill(self, T):
        self.rest()
        ids = random_ids(self.config, 1, T).to(self.opt.device)
        self.model.model.rope_deltas, self.position = None, T
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.token = torch.full((1, 1), TOKEN, device=self.opt.device)
        return out.logits[0, -1]

    def begin(self, T, full):
        if full:
            raise ValueError("it is measured with one row only")
        if T:
            self.prefill(16)
            self.position = T
            for layer in self.cache.layers:
                shape = (1, layer.keys.shape[1], T, layer.keys.shape[3])
                layer.keys, layer.values = (torch.randn(shape, dtype=t.dtype, device=t.device)
                                            for t in (layer.keys, layer.values))
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return dict(batch=1, held=size)

    @torch.inference_mode()
    def step(self):
        where = torch.full((3, 1, 1), self.position, device=self.opt.device)
        self.position += 1
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True,
                         position_ids=where)
        return out.logits[0, -1]

    def generate(self):
        self.asked = self.asked or questions(self.opt)
        ids = self.model.generate(**their_inputs(self.asked, self.config), max_new_tokens=ANSWER,
                                  do_sample=False)
        return ids[:, self.asked.ids.shape[1]:]


def their_inputs(b, config):
    return dict(input_ids=b.ids, attention_mask=b.mask.long(), pixel_values=b.pixels,
                image_grid_thw=b.grids, mm_token_type_ids=(b.ids == config.image_token_id).int())


# ---- Training ----


class Trainer:
    """A micro-batch and the update after it, as loop.train has them, at a rate that leaves the
    student alone. It is the same student for all conditions, and AdamW's moments exist from the
    start, as in every step of a run but its first."""

    def __init__(self, opt, *conds):
        def settings(cond):
            flags = dict(teacher=opt.folder, cond=cond, device=opt.device, dtype=opt.dtype)
            flags = [word for name, value in flags.items() for word in ("--" + name, value)]
            return loop.parse(distill.DistillSettings, distill.DEFAULTS, flags)
        self.s, self.ranks = settings(conds[0]), loop.Ranks(0, 1, torch.device(opt.device))
        teacher = build(opt)
        student = distill.convert(self.s, teacher)
        teacher.recompute = student.recompute = opt.recompute
        self.objectives = {c: distill.Distillation(settings(c), teacher, student) for c in conds}
        self.parameters = list(self.objectives[conds[0]].parameters().values())
        for p in self.parameters:
            p.requires_grad_(True)
        groups = loop.groups(self.parameters, self.s.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=1e-12, betas=(0.9, 0.95))
        self.autocast = torch.autocast(opt.device, torch.bfloat16, enabled=opt.dtype == "bfloat16")
        self.batch = world_batch(opt) if not opt.rows else \
            random_batch(teacher.config, opt.rows, opt.text, opt.visual).to(opt.device)
        self.update(1)                                    # gradients of zero make moments of zero

    def micro(self, cond, stage):
        """-> the loss, by position."""
        self.optimiser.zero_grad(set_to_none=True)        # those of a step that failed
        objective = self.objectives[cond]
        label, _ = objective.prepare(PROGRESS[stage])
        sums, *_ = loop.accumulate(objective, [self.batch], label, self.ranks.device, self.autocast)
        self.count = sums["count"]
        return torch.stack([sums["loss"] / self.count])

    def update(self, count=None):
        """-> the gradient's norm."""
        loop.reduce_gradients(self.ranks, self.parameters, count or self.count)
        norm = loop.clip_gradients(self.ranks, self.parameters, self.s.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def train(self, stage):
        loss = self.micro(next(iter(self.objectives)), stage)
        self.update()
        return loss

    def counts(self, cond, stage):
        """-> tokens and floating-point operations of a micro-batch."""
        self.objectives[cond].prepare(PROGRESS[stage])
        return int(self.batch.mask.sum()), step_flops(self.objectives[cond], self.batch, stage)


class Slot(nn.Module):
    """Our mixer in transformers' attention slot, computing with our scan or with transformers'."""

    def __init__(self, mixer, their_scan):
        super().__init__()
        self.mixer, self.scan = mixer, self.other if their_scan else mamba2.ssd

    @staticmethod
    def other(x, dt, A, B, C, D, state, mask):
        y = transformers_scan(64)(x, dt, A, B, C)
        return y + (D[:, None] * x.repeat_interleave(C.shape[2] // x.shape[2], 2)).to(y.dtype), None

    def forward(self, hidden_states, **_):
        with patch("mamba2.ssd", self.scan):
            return self.mixer(hidden_states)[0], None


class TransformersTrainer:
    """The obvious way: transformers' teacher, a second full copy with exchanged layers, all logits.
    In Stages 1 and 2 its layers read what the teacher's read, and one backward pass follows."""

    def __init__(self, opt, their_scan):
        source = build(opt)
        hybrid = to_hybrid(source)
        self.opt, self.S = opt, hybrid.config.hybrid["layers"]
        mixers = {i: hybrid.layers[i].self_attn.float().requires_grad_() for i in self.S}
        self.teacher, self.student = as_transformers(source), as_transformers(source, own=True)
        self.layers, self.read, self.made = self.student.model.language_model.layers, {}, {}
        for i, mixer in mixers.items():
            self.layers[i].self_attn = Slot(mixer, their_scan)
            self.teacher.model.language_model.layers[i].register_forward_hook(
                partial(self.see, i), with_kwargs=True)
        self.named = [named for mixer in mixers.values() for named in mixer.named_parameters()]
        self.inherited, self.parameters = mixers[self.S[0]].INHERITED, [p for _, p in self.named]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-12, betas=(0.9, 0.95))
        self.batch = world_batch(opt)
        self.inputs = dict(their_inputs(self.batch, source.config), use_cache=False)

    def see(self, i, layer, args, given, out):
        self.read[i], self.made[i] = args[0] if args else given["hidden_states"], out

    def loss(self, stage):
        with torch.no_grad():
            t = self.teacher(**self.inputs)
        if stage < 3:
            made = [self.layers[i](self.read[i], position_embeddings=None) for i in self.S]
            error = [distill.drift(y, self.made[i]) for i, y in zip(self.S, made)]
            return torch.stack(error).mean(0)[self.batch.mask].mean()
        target = following(self.batch.labels)
        log_q = self.student(**self.inputs).logits.float().log_softmax(-1)
        log_p = t.logits.float().log_softmax(-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        ce = F.nll_loss(log_q.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
        return kl[target != IGNORED].mean() + 0.1 * ce

    def train(self, stage):
        for n, p in self.named:
            p.requires_grad_(stage > 1 or not n.startswith(self.inherited))
        with torch.autocast(self.opt.device, torch.bfloat16, enabled=self.opt.dtype == "bfloat16"):
            loss = self.loss(stage)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return torch.stack([loss.detach()])


# ---- The scan ----


def our_scan(chunk, path, kernels="0"):
    def run(x, dt, A, B, C):
        with patch.dict(os.environ, HEED_KERNELS=kernels):
            return mamba2.ssd(x, dt, A, B, C, chunk=chunk)[0]
    return run


def as_heads(x, dt, A, B, C):
    """What the others want: as many groups as heads, and fp32 for all."""
    x, B = (z.repeat_interleave(C.shape[2] // z.shape[2], 2) for z in (x, B))
    return x.float(), dt, A, B.float(), C.float()


def ssd_minimal(chunk, path):
    """The listing as a module, without the kernel that it imports for a test of its own."""
    module, stub = types.ModuleType("ssd_minimal"), types.ModuleType("stub")
    stub.mamba_chunk_scan_combined = None
    parts = "mamba_ssm", "ops", "triton", "ssd_combined"
    names = [".".join(parts[:n]) for n in (1, 2, 3, 4)]
    with patch.dict(sys.modules, dict.fromkeys(names, stub)):
        exec(compile(Path(path).read_text(), path, "exec"), module.__dict__)

    def run(*args):
        x, dt, A, B, C = as_heads(*args)
        pad = -x.shape[1] % chunk                         # the listing wants whole chunks
        X, A, B, C = (F.pad(z, (0, 0) * (z.dim() - 2) + (0, pad))
                      for z in (x * dt[..., None], dt * A, B, C))
        return module.ssd_minimal_discrete(X, A, B, C, chunk)[0][:, :x.shape[1]].to(args[0].dtype)
    return run


def transformers_scan(chunk, path=None):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
    return lambda x, *args: scan(*as_heads(x, *args), chunk).to(x.dtype)


SCANS = {                 # how to make the function, chunk sizes to try
    "ours": (our_scan, (None,)),
    "Triton": (partial(our_scan, kernels="1"), (None,)),
    "ssd_minimal": (ssd_minimal, (64, 128, 256)),
    "transformers": (transformers_scan, (64, 128, 256)),
}


class Scanner:
    """One row of SCANS on random inputs with decays from quick to slow."""

    def __init__(self, opt, row, chunk):
        self.f = SCANS[row][0](chunk, opt.ssd_minimal)
        torch.manual_seed(0)
        T, G, (H, P) = opt.T, 8, (32, 128) if opt.device == "cuda" else (8, 64)
        x, B, C, weight = (torch.randn(1, T, n, P) for n in (G, G, H, H))
        x, B, C, weight = (z.to(getattr(torch, opt.dtype)) for z in (x, B, C / P ** 0.5, weight))
        dt, A = F.softplus(torch.randn(1, T, H) - 4), -torch.exp(torch.rand(H))
        x, dt, A, B, C, self.weight = (z.to(opt.device) for z in (x, dt, A, B, C, weight))
        self.args = [z.requires_grad_() for z in (x, dt, A, B, C)]

    @torch.no_grad()
    def forward(self):
        self.f(*self.args)

    def both(self):
        y = self.f(*self.args)
        torch.autograd.grad(y, self.args, self.weight.to(y.dtype))
