"""InternVL-3.5 (its dense sizes) as a teacher: what it does otherwise than Qwen3-VL (Table 6).

    torchrun distill.py --cond c4 --teacher InternVL3_5-8B-HF --data mix.json

A picture is cut into square tiles, 1 to 12 in the grid nearest to its shape, and a thumbnail of the
whole where they are more than one. InternViT sees each tile by itself, 2 x 2 patches make a visual
token ("pixel shuffle"), and a Qwen3 decoder with plain RoPE reads them. Decoder, mixers, training
and evaluation are model.py's and its neighbours'. Both published layouts are read and written:
transformers' (-HF, model_type internvl) and the original one (internvl_chat).

    code        what it is                                             shape
    pixels      patches of all tiles, by merge block                   (patches, 3 * ps * ps)
    grids       [1, side, side] of each tile, counted in patches       (tiles, 3)
    patches     last block, without the class token: what Eq. 2 reads  (patches, Dv)
    tokens      after the projector, tile by tile, row by row          (patches / 4, D)

Density is of a tile: neighbours end at its border, for its features know no other tile.
"""
import copy
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import data
from model import VisionOut, block_order
from parts import config as base
from parts.checkpoint import find_tensors
from parts.images import read_image

MERGE = 2                            # downsample_ratio 0.5: patches on a side of a visual token
CONTEXT = "<IMG_CONTEXT>"            # the placeholder of a visual token

# --------------------------------------------------------------------------------------------------
# config.json, and the names of the tensors


@dataclass
class VisionConfig:
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 448            # of a tile, in pixels
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    spatial_merge_size, temporal_patch_size, in_channels = MERGE, 1, 3
    side = property(lambda self: self.image_size // self.patch_size)
    tokens = property(lambda self: (self.side // MERGE) ** 2)                       # of a tile


PARTS = {      # layout: where tower, projector, decoder and head are
    "hf": ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model."),
    "nested": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", ""),
    "chat": ("vision_model.", "mlp1.", "language_model.model.", "language_model."),
}
RENAMED = {    # our name in the tower or projector: transformers', the original one
    "cls_token": ("embeddings.cls_token", "embeddings.class_embedding"),
    "position_embeddings": ("embeddings.position_embeddings",
                            "embeddings.position_embedding"),
    "projection.": ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    "layers.": ("encoder.layer.", "encoder.layers."),
    "norm1.": ("layernorm_before.", "norm1."), "norm2.": ("layernorm_after.", "norm2."),
    "lambda_1": ("lambda_1", "ls1"), "lambda_2": ("lambda_2", "ls2"),
    "attn.proj.": ("attention.projection_layer.", "attn.proj."),
    "layer_norm.": ("layer_norm.", "0."), "linear_1.": ("linear_1.", "1."),
    "linear_2.": ("linear_2.", "3."),
}
PATTERN = re.compile("|".join(rf"(?<![a-z_0-9]){re.escape(name)}" for name in RENAMED))


@dataclass
class Config(base.OtherConfig):
    layout: str = "hf"

    positions = staticmethod(base.counted_positions)

    @classmethod
    def read(cls, path, raw):
        chat = raw["model_type"] == "internvl_chat"
        decoder = "llm_config" if chat else "text_config"
        text, rope = base.with_rope(path, base.part(raw, decoder))
        vision = base.part(raw, "vision_config")
        base.demand(path, (text, "model_type", "qwen3"), (text, "hidden_act", "silu"),
                    (text, "attention_bias", False), (text, "use_sliding_window", False),
                    (rope, "rope_type", "default"), (rope, "type", "default"),
                    (vision, "hidden_act", "gelu"), (vision, "norm_type", "layer_norm"),
                    (vision, "use_qk_norm", False), (vision, "qk_normalization", False),
                    (vision, "use_mask_token", False), (vision, "use_mean_pooling", True),
                    (vision, "use_absolute_position_embeddings", True),
                    (raw, "downsample_ratio", 0.5), (raw, "projector_hidden_act", "gelu"),
                    (raw, "vision_feature_layer", -1), (raw, "select_layer", -1),
                    (raw, "vision_feature_select_strategy", "default"), (raw, "ps_version", "v2"),
                    (raw, "use_thumbnail", True))
        for key in ("image_size", "patch_size"):         # [448, 448] in transformers' layout
            sides = vision.get(key)
            if isinstance(sides, list) and len(sides) == 2 and sides[0] == sides[1]:
                vision = {**vision, key: sides[0]}
        half = text.get("head_dim")
        # Plain RoPE is the multimodal one with all frequencies on one axis.
        text["mrope_section"] = [half // 2 if type(half) is int else 0, 0, 0]
        image = base.token_id(path, CONTEXT) if chat else raw.get("image_token_id")
        config = cls(base.fill(base.TextConfig, text, f"{path}, {decoder}"),
                     base.fill(VisionConfig, vision, f"{path}, vision_config"),
                     image_token_id=image, video_token_id=image, layout=layout(path, chat),
                     raw=raw, **base.ends_and_hybrid(path, raw, text))
        config.vision.qkv_bias = bool(vision.get("qkv_bias", vision.get("attention_bias")))
        t, v = config.text, config.vision
        base.check_decoder(config, path)
        base.insist(path, [
            (t.head_dim % 2 == 0, "head_dim is odd"),
            (v.hidden_size % v.num_attention_heads == 0,
             "vision hidden_size is no multiple of num_attention_heads"),
            (v.image_size % (MERGE * v.patch_size) == 0,
             f"image_size is no multiple of {MERGE} times patch_size"),
            (raw.get("image_seq_length", v.tokens) == v.tokens,
             f"image_seq_length is {raw.get('image_seq_length')}, but a tile has {v.tokens} "
             "tokens")])
        return config

    def stored(self, name):
        tower, projector, decoder, head = PARTS[self.layout]
        if not name.startswith("model.visual."):
            inner = name.removeprefix("model.language_model.")
            return [head + name if inner == name else decoder + inner]
        inner, original = name.removeprefix("model.visual."), self.layout == "chat"
        home = projector if inner.startswith("merger.") else tower
        inner = inner.removeprefix("merger.")
        inner = PATTERN.sub(lambda found: RENAMED[found[0]][original], inner)
        if original or ".attn.qkv." not in inner:
            return [home + inner]
        return [home + inner.replace(".attn.qkv.", f".attention.{part}_proj.") for part in "qkv"]


def layout(path, chat):
    """Which names a folder's tensors have: transformers writes "hf", and itself has "nested"."""
    if chat:
        return "chat"
    nested = any(name.startswith("model.") for name in find_tensors(path.parent)[0])
    return "nested" if nested else "hf"


# --------------------------------------------------------------------------------------------------
# The vision tower: tiles in, visual tokens out


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=c.qkv_bias)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x):                                                       # (tiles, 1 + n, Dv)
        q, k, v = rearrange(self.qkv(x), "b n (three h p) -> three b h n p", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "b h n p -> b n (h p)"))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.attn, self.mlp = Attention(c), MLP(c)
        self.lambda_1 = nn.Parameter(torch.full((c.hidden_size,), 0.1))     # layer scale
        self.lambda_2 = nn.Parameter(torch.full((c.hidden_size,), 0.1))

    def forward(self, x):
        x = x + self.lambda_1 * self.attn(self.norm1(x))
        return x + self.lambda_2 * self.mlp(self.norm2(x))


class Merger(nn.Module):
    """The pixel shuffle, which lays the four patches of a block side by side, and the projector.
    Patches come by merge block, so the shuffle is a view."""

    def __init__(self, c, width):
        super().__init__()
        self.wide = c.hidden_size * MERGE ** 2
        self.layer_norm = nn.LayerNorm(self.wide)
        self.linear_1 = nn.Linear(self.wide, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):                                                               # (N, Dv)
        return self.linear_2(F.gelu(self.linear_1(self.layer_norm(x.reshape(-1, self.wide)))))


class Tower(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config.vision
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + c.side ** 2, c.hidden_size))
        self.projection = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.merger = Merger(c, config.text.hidden_size)

    def forward(self, pixels, grids):
        """pixels (patches, 3*ps*ps) by merge block, grids (tiles, 3) -> VisionOut."""
        side, tiles = self.config.side, len(grids)
        whole = all(grid == [1, side, side] for grid in grids.tolist())
        if not whole or len(pixels) != tiles * side ** 2:
            raise ValueError(f"each tile must have {side} x {side} patches; got {len(pixels)} "
                             f"patches for grids {grids.tolist()[:3]}")
        weight = self.projection.weight.flatten(1)         # kernel = stride: a matrix product
        x = F.linear(pixels.to(weight.dtype), weight, self.projection.bias)             # (N, Dv)
        row, col = block_order(side, side, MERGE)
        at = torch.cat((torch.zeros(1, dtype=torch.long), 1 + row * side + col))
        x = torch.cat((self.cls_token.expand(tiles, -1, -1), x.view(tiles, side ** 2, -1)), dim=1)
        x = x + self.position_embeddings[:, at.to(x.device)]                    # (tiles, 1 + n, Dv)
        for block in self.layers:
            x = block(x)
        x = x[:, 1:].flatten(0, 1)                                                  # (N, Dv)
        return VisionOut(self.merger(x), [], x)


# --------------------------------------------------------------------------------------------------
# Pictures and template


def best_grid(size, tile, most):
    """(columns, rows) of at most `most` tiles, in the shape nearest to that of (width, height). Of
    equals the larger, unless it has more than twice the picture's pixels."""
    best, off = (1, 1), float("inf")
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    for c, r in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(size[0] / size[1] - c / r)
        enough = size[0] * size[1] > 0.5 * tile ** 2 * c * r
        if difference < off or difference == off and enough:
            best, off = (c, r), difference
    return best


class TiledProcessor(data.Processor):
    """Of any teacher that cuts a picture into up to `most` tiles of `tokens` visual tokens each, and
    shows the whole beside them. A limit is counted in tiles, without the thumbnail."""
    limit = property(lambda self: self.max_tiles)

    def limit_tiles(self, folder):
        self.max_tiles = self.tiles_within(self.max_visual_tokens)
        if not self.max_tiles:
            raise ValueError(f"{folder}: a tile has {self.tokens} visual tokens, but an image may "
                             f"have {self.max_visual_tokens} only.")

    def limits(self):
        return list(range(self.max_tiles, 0, -1))

    def tiles_within(self, tokens):
        """The most tiles, 0 for none, that have so many tokens with their thumbnail."""
        fits = (n for n in range(1, self.most + 1) if (n + (n > 1)) * self.tokens <= tokens)
        return max(fits, default=0)

    def bounded(self, least, most):
        other = copy.copy(self)                          # `least` is met: a picture has a tile
        other.max_tiles = max(1, self.tiles_within(most))
        return other


class Processor(TiledProcessor):
    """Pixels and ids are those of transformers' InternVLProcessor, with the exceptions that
    data.Processor makes. The template has no system prompt, as that of the -HF folders."""
    RELEASED = {"size": {"height": 448, "width": 448}, "rescale_factor": 1 / 255,
                "image_mean": [.485, .456, .406], "image_std": [.229, .224, .225]}
    SPECIAL = data.Processor.SPECIAL | dict(
        image_pad=(CONTEXT, ""), vision_start=("<img>", ""), vision_end=("</img>", ""))
    DECIDES = ("patch", "merge", "temporal", "tile", "max_tiles")
    after_image = "\n"

    def __init__(self, folder, *args, **caps):
        super().__init__(folder, *args, **caps)
        if self.stated != self.special["image_pad"]:
            raise ValueError(f"{folder}: {CONTEXT} is token {self.special['image_pad']} in "
                             f"tokenizer.json, but {self.stated} in config.json.")

    def read_settings(self, folder, config, settings):
        read, size = Config.from_folder(folder), settings["size"]
        vision, self.stated = read.vision, read.image_token_id
        self.patch, self.merge, self.temporal = vision.patch_size, MERGE, 1
        self.tile, self.tokens = vision.image_size, vision.tokens
        sides = {size.get("height"), size.get("width")} if isinstance(size, dict) else {size}
        if sides != {self.tile}:
            raise ValueError(f"{folder}: size is {size} in preprocessor_config.json, but a tile "
                             f"has {self.tile} pixels in config.json.")
        self.most = settings.get("max_patches", config.get("max_dynamic_patch", 12))
        for least in ("min_patches", "min_dynamic_patch"):
            if settings.get(least, config.get(least, 1)) != 1:
                raise ValueError(f"{folder}: {least} is not 1, which is not implemented.")
        if type(self.most) is not int or self.most < 1:
            raise ValueError(f"{folder}: max_patches is {self.most!r}, but must be a positive "
                             "whole number.")
        self.limit_tiles(folder)

    def visual_tokens(self, size, max_tiles):
        columns, rows = best_grid(size, self.tile, max_tiles)
        return (columns * rows + (columns * rows > 1)) * self.tokens

    def patches(self, source, max_tiles=None):
        """Path or PIL image -> pixels (n, 3 * p * p) float32, and a grid for each tile."""
        image, tile = read_image(source), self.tile
        columns, rows = best_grid(image.size, tile, max_tiles or self.limit)
        whole = image.resize((columns * tile, rows * tile), Image.Resampling.BICUBIC)
        tiles = [whole.crop((x, y, x + tile, y + tile)) for y in range(0, rows * tile, tile)
                 for x in range(0, columns * tile, tile)]
        if len(tiles) > 1:
            tiles.append(image.resize((tile, tile), Image.Resampling.BICUBIC))
        pixels, grids = zip(*map(self.cut, tiles))
        return np.concatenate(pixels), list(grids)

    def as_map(self, rho, grids, size, limit=None):
        """The tiles side by side; the thumbnail is left out."""
        columns, rows = best_grid(size, self.tile, limit or self.limit)
        side = self.tile // self.patch // MERGE
        return rearrange(rho[:columns * rows * side ** 2], "(r c y x) -> (r y) (c x)",
                         r=rows, c=columns, y=side)


Config.Tower, Config.Processor = Tower, Processor
