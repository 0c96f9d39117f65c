"""MiniCPM-V 4.5 as a teacher: what it does otherwise than Qwen3-VL (Table 6).

    torchrun distill.py --cond c4 --teacher MiniCPM-V-4_5 --data mix.json

A picture is seen whole (its overview), and where it has more pixels than 448 x 448 in up to nine
slices too, each of about that size in the picture's shape. A SigLIP tower sees each of them by
itself, and 64 learned queries read its patches (the resampler), so that a slice is 64 tokens
whatever its size. A Qwen3 decoder with plain RoPE reads them. Decoder, mixers, training and
evaluation are model.py's and its neighbours'. Still pictures only: the temporal positions that the
resampler adds to a video's frames are left out. "Slices" below include the overview, the first.

    code        what it is                                             shape
    pixels      patches of all slices, row by row                      (patches, 3 * ps * ps)
    grids       [1, h, w] of each slice, counted in patches            (slices, 3)
    patches     after the tower's last norm: what Eq. 2 reads          (patches, Dv)
    tokens      after the resampler, slice by slice                    (slices * Q, D)
    share       how much a query attends to each patch, mean of heads  (slices, Q, h * w)

Density: a patch's rho (Eq. 2) is over its neighbours in the same slice, for its features know no
other; a query has no neighbours. Its rho is the mean of the slice's patches, weighted by its
attention to them (`pooled`). The other reading, the plain mean for all queries of a slice, is not implemented.

More shape letters: Q queries of a slice, Dv width of the tower.
"""
import math
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import data
from formats import texts
from internvl import TiledProcessor
from model import VisionOut
from parts import config as base
from parts.images import read_image

HEAD = 128                           # width of a head of the resampler's attention
UNKNOWN = "<unk>"                    # the placeholder of a visual token

# --------------------------------------------------------------------------------------------------
# config.json, and the names of the tensors


@dataclass
class VisionConfig:
    hidden_size: int = 1152                  # Dv
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    image_size: int = 980            # what the table of positions stands for, in pixels
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    query_num: int = 64                      # Q

    spatial_merge_size, temporal_patch_size, in_channels = 1, 1, 3
    side = property(lambda self: self.image_size // self.patch_size)                # of the table
    tokens = property(lambda self: self.query_num)                                  # of a slice


STORED = {     # how a parameter's name begins: in the released files
    "model.visual.merger.": "resampler.",
    "model.visual.post_layernorm.": "vpm.post_layernorm.",
    "model.visual.layers.": "vpm.encoder.layers.",
    "model.visual.": "vpm.embeddings.",
    "model.language_model.": "llm.model.",
    "lm_head.": "llm.lm_head.",
}


@dataclass
class Config(base.OtherConfig):
    positions = staticmethod(base.counted_positions)

    @classmethod
    def read(cls, path, raw):
        text, rope = base.with_rope(path, raw)           # the decoder's fields stand at the top
        vision, slices = base.part(raw, "vision_config"), base.part(raw, "slice_config")
        patch = vision.get("patch_size", raw.get("patch_size"))
        if str(raw.get("version")) != "4.5":
            raise ValueError(f"{path}: version is {raw.get('version')!r}, but of MiniCPM-V only "
                             "4.5 is implemented")
        base.demand(path, (raw, "hidden_act", "silu"), (raw, "attention_bias", False),
                    (raw, "use_sliding_window", False), (raw, "num_experts", 0, None),
                    (rope, "rope_type", "default"), (rope, "type", "default"),
                    ({"drop_vision_last_layer": True} | raw, "drop_vision_last_layer", False),
                    (raw, "slice_mode", True), (raw, "use_image_id", True),
                    (vision, "hidden_act", "gelu_pytorch_tanh"), (vision, "num_channels", 3),
                    (raw, "patch_size", patch), (slices, "patch_size", patch))
        half = text.get("head_dim")
        # Plain RoPE is the multimodal one with all frequencies on one axis.
        text["mrope_section"] = [half // 2 if type(half) is int else 0, 0, 0]
        # Left out where they have their default, as in the released file.
        vision = {"layer_norm_eps": 1e-6, **vision, "query_num": raw.get("query_num", 64)}
        image = base.token_id(path, UNKNOWN)
        config = cls(base.fill(base.TextConfig, text, path),
                     base.fill(VisionConfig, vision, f"{path}, vision_config"),
                     image_token_id=image, video_token_id=image, raw=raw,
                     **base.ends_and_hybrid(path, raw, raw))
        t, v = config.text, config.vision
        numbers = {"max_slice_nums": None, "scale_resolution": 448} | slices
        base.check_decoder(config, path)
        base.insist(path, [
            (t.head_dim % 2 == 0, "head_dim is odd"),
            (t.hidden_size % HEAD == 0, f"hidden_size is no multiple of the resampler's {HEAD}"),
            (t.hidden_size != v.hidden_size, "hidden_size is the tower's too, for which the "
             "resampler has no kv_proj: that is not implemented"),
            (v.hidden_size % v.num_attention_heads == 0,
             "vision hidden_size is no multiple of num_attention_heads"),
            (v.image_size >= v.patch_size, "vision image_size is less than patch_size"),
            *((type(numbers[key]) is int and numbers[key] > 0, f"slice_config's {key} is "
               f"{numbers[key]!r}, but must be a positive whole number")
              for key in ("max_slice_nums", "scale_resolution"))])
        return config

    def stored(self, name):
        ours = next(start for start in STORED if name.startswith(start))
        return [STORED[ours] + name.removeprefix(ours)]


# --------------------------------------------------------------------------------------------------
# The vision tower: slices in, visual tokens out


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, width = c.num_attention_heads, c.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):                                                       # (slices, n, Dv)
        q, k, v = (rearrange(f(x), "s n (h p) -> s h n p", h=self.heads)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(y, "s h n p -> s n (h p)"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def sines(h, w, width):
    """The places of an h x w grid as sines and cosines: -> (h * w, width), fp32. The first half is
    of the column and the second of the row, as in the released code."""
    inverse = 1e4 ** -(torch.arange(width // 4) / (width / 4))
    row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    angles = [place[:, None] * inverse for place in (column, row)]              # (h * w, width / 4)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)


class CrossAttention(nn.Module):
    """Written out, for the shares are wanted too; weights lie as in nn.MultiheadAttention."""

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key, value):                       # (slices, Q, D), 2 x (slices, n, D)
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (rearrange(F.linear(*part), "s n (h p) -> s h n p", p=HEAD) for part in parts)
        share = (q / HEAD ** 0.5 @ k.mT).softmax(dim=-1)                        # (slices, H, Q, n)
        return self.out_proj(rearrange(share @ v, "s h n p -> s n (h p)")), share.mean(1)


class Resampler(nn.Module):
    """Q learned queries attend to the patches of a slice. Its name in the tower is `merger`, by
    which sft_dpo.py knows what trains."""

    def __init__(self, c, width):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(c.query_num, width))
        self.kv_proj = nn.Linear(c.hidden_size, width, bias=False)
        self.attn = CrossAttention(width)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, width))

    def attend(self, x, h, w):
        """x (slices, h * w, Dv) -> (slices, Q, D), and `share`. Only the keys know places."""
        x = self.ln_kv(self.kv_proj(x))                                         # (slices, n, D)
        query = self.ln_q(self.query).expand(len(x), -1, -1)                    # (slices, Q, D)
        return self.attn(query, x + sines(h, w, x.shape[-1]).to(x), x)

    def forward(self, x, h, w):
        return self.ln_post(self.attend(x, h, w)[0]) @ self.proj                # (slices, Q, D)


def bucket(n, side):
    """Into which of a table's `side` parts each of n patches in a row falls. side * i // n is
    meant, but the released code rounds fractions: of 25, 49, 50, 55 or 58 patches some fall one
    lower."""
    inner = torch.arange(1 / side, 1, 1 / side)
    step = (1 / torch.tensor(n)).item()                                         # fp32
    return torch.bucketize(torch.arange(0, 1 - 1e-6, step), inner, right=True)


def batches(x, grids):
    """Neighbouring slices of one size go through the tower together: x (patches, ...) -> one after
    another (slices, h * w, ...), h, w."""
    start = 0
    for (_, h, w), run in groupby(grids.tolist()):
        end = start + h * w * len(list(run))
        yield x[start:end].unflatten(0, (-1, h * w)), h, w
        start = end


class Tower(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config.vision
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.position_embedding = nn.Embedding(c.side ** 2, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.merger = Resampler(c, config.text.hidden_size)

    def places(self, h, w):
        """Indices into the table: the same fraction of its sides as of the slice's. -> (h * w,)"""
        row, column = bucket(h, self.config.side), bucket(w, self.config.side)
        return (row[:, None] * self.config.side + column).flatten()

    def forward(self, pixels, grids):
        """pixels (patches, 3*ps*ps) row by row, grids (slices, 3) -> VisionOut."""
        if (grids[:, 0] != 1).any():
            raise ValueError("a grid of several frames is a video, which is not implemented")
        if grids.prod(1).sum() != len(pixels):
            raise ValueError(f"grids describe {grids.prod(1).sum()} patches, but pixels has "
                             f"{len(pixels)} rows")
        weight, tokens, patches = self.patch_embedding.weight.flatten(1), [], []
        for x, h, w in batches(pixels.to(weight.dtype), grids):
            # Kernel = stride, so the convolution is a matrix product.
            x = F.linear(x, weight, self.patch_embedding.bias)                  # (slices, n, Dv)
            x = x + self.position_embedding(self.places(h, w).to(x.device))
            for block in self.layers:
                x = block(x)
            x = self.post_layernorm(x)
            tokens.append(self.merger(x, h, w).flatten(0, 1))
            patches.append(x.flatten(0, 1))
        return VisionOut(torch.cat(tokens), [], torch.cat(patches))

    @torch.no_grad()
    def pooled(self, rho, seen, grids):
        """rho (patches,) -> (slices * Q,): each query's, by its attention."""
        pieces = []
        for (x, h, w), (r, *_) in zip(batches(seen.patches, grids), batches(rho, grids)):
            share = self.merger.attend(x, h, w)[1]                              # (slices, Q, n)
            pieces.append((share.to(r) @ r[..., None]).flatten())
        return torch.cat(pieces)


# --------------------------------------------------------------------------------------------------
# Pictures and template


def whole(length, unit):
    """The multiple of `unit` that is nearest, and at least one."""
    return max(round(length / unit) * unit, unit)                               # half to even


def fit(width, height, side, patch):
    """-> (width, height) of about side x side pixels in nearly the same shape, in whole patches."""
    ratio = width / height
    height = int(side / math.sqrt(ratio))
    return whole(int(height * ratio), patch), whole(height, patch)


def best_grid(size, side, most):
    """(columns, rows) of up to `most` slices, one more or less than the pixels of (width, height)
    call for, in the shape nearest to its own; of equals the first. None where one is enough."""
    width, height = size
    count = min(math.ceil(width * height / side ** 2), most)
    if count <= 1:
        return None
    counts = [n for n in (count - 1, count, count + 1) if 1 < n <= most]
    grids = [(c, n // c) for n in counts for c in range(1, n + 1) if n % c == 0]
    return min(grids, key=lambda g: abs(math.log(width / height) - math.log(g[0] / g[1])))


class Processor(TiledProcessor):
    """Pixels and ids are those of the released processor and its chat() without thinking, with the
    exceptions that data.Processor makes:

        <|im_start|>user\\n<image_id>0</image_id><image><unk>...</image>    the overview,
        <slice><unk>...</slice><slice><unk>...</slice>\\n                   a row of slices,
        <slice><unk>...</slice><slice><unk>...</slice>\\n                   and the next
        Question<|im_end|>\\n
        <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nAnswer<|im_end|>\\n

    The parts of a message are joined by line breaks. Only the last answer has the empty thought.
    Answers stay as they are, where chat() strips the last one and cuts at a thought's end."""
    RELEASED = {"norm_mean": [.5, .5, .5], "norm_std": [.5, .5, .5], "rescale_factor": 1 / 255}
    SPECIAL = data.Processor.SPECIAL | dict(
        image_pad=(UNKNOWN, ""), vision_start=("<image>", ""), vision_end=("</image>", ""),
        slice_start=("<slice>", ""), slice_end=("</slice>", ""),
        id_start=("<image_id>", ""), id_end=("</image_id>", ""))
    DECIDES = ("patch", "merge", "temporal", "side", "max_tiles")

    def __init__(self, folder, *args, **caps):
        super().__init__(folder, *args, **caps)
        self.thought = self.tokenize("<think>\n\n</think>\n\n")

    def read_settings(self, folder, config, settings):
        vision, slices = Config.from_folder(folder).vision, config["slice_config"]
        self.patch, self.merge, self.temporal = vision.patch_size, 1, 1
        self.side, self.tokens = slices.get("scale_resolution", 448), vision.tokens
        self.most = slices["max_slice_nums"]
        for name, value in (("patch_size", self.patch), ("image_feature_size", self.tokens),
                            ("max_slice_nums", self.most), ("scale_resolution", self.side),
                            ("slice_mode", True), ("use_image_id", True)):
            if settings.get(name, value) != value:
                raise ValueError(f"{folder}: {name} is {settings[name]} in "
                                 f"preprocessor_config.json, but {value} in config.json.")
        settings.update(image_mean=settings["norm_mean"], image_std=settings["norm_std"])
        self.limit_tiles(folder)

    def visual_tokens(self, size, max_tiles):
        grid = best_grid(size, self.side, max_tiles)
        return (1 + math.prod(grid or [0])) * self.tokens

    def patches(self, source, max_tiles=None):
        """Path or PIL image -> pixels (n, 3 * p * p) float32, and a grid for each slice."""
        image, bicubic = read_image(source), Image.Resampling.BICUBIC
        slices = [image.resize(fit(*image.size, self.side, self.patch), bicubic)]
        if grid := best_grid(image.size, self.side, max_tiles or self.limit):
            columns, rows = grid
            w, h = fit(whole(image.width, columns) / columns, whole(image.height, rows) / rows,
                       self.side, self.patch)
            large = image.resize((columns * w, rows * h), bicubic)
            slices += [large.crop((x, y, x + w, y + h)) for y in range(0, rows * h, h)
                       for x in range(0, columns * w, w)]
        pixels, grids = zip(*map(self.cut, slices))
        return np.concatenate(pixels), list(grids)

    def image_run(self, number, size, max_tiles):
        s, pads = self.special, [self.special["image_pad"]] * self.tokens
        columns, rows = best_grid(size, self.side, max_tiles) or (0, 0)
        ids = [s["id_start"], *self.tokenize(str(number)), s["id_end"]]
        ids += [s["vision_start"], *pads, s["vision_end"]]
        for row in range(rows):
            ids += self.newline if row else []
            ids += [s["slice_start"], *pads, s["slice_end"]] * columns
        return ids

    def runs(self, sample, images, add_generation_prompt=False):
        messages = []
        for message in sample.messages:
            parts = message["content"]
            if message["role"] != "document":
                parts = [p for part in parts for p in (*texts("\n"), part)][1:]
            messages.append(message | {"content": parts})
        return super().runs(replace(sample, messages=messages), images, add_generation_prompt)

    def as_map(self, rho, grids, size, limit=None):
        """A query has no place, so each slice shows its queries' mean; the overview is left out."""
        grid = best_grid(size, self.side, limit or self.limit)
        means = rho.view(-1, self.tokens).mean(1)                               # (slices,)
        columns, rows = grid or (1, 1)
        return means[bool(grid):][:columns * rows].view(rows, columns)


Config.Tower, Config.Processor = Tower, Processor
