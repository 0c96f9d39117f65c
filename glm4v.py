"""GLM-4.6V-Flash as a teacher: what it does otherwise than Qwen3-VL (Table 6).

    torchrun distill.py --cond c4 --teacher GLM-4.6V-Flash --data mix.json

The tower has RMSNorm and gated MLPs, interpolates its position table bicubically, and merges 2 x 2
patches by a strided convolution. The decoder's attention has biases and no QK-norm and rotates half
of each head; a layer normalises what attention and MLP put out as well as what they read. Decoder,
mixers, training and evaluation are model.py's and its neighbours'. Names are transformers'
(model_type glm4v, or glm46v), so loading needs no mapping but for the convolution, which stands with
the merger here.

    code        what it is                                              shape
    pixels      patches of all images, by merge block                   (patches, 3 * 2 * ps * ps)
    grids       [1, h, w] of each image, counted in patches             (images, 3)
    patches     after post_layernorm, before the convolution: Eq. 2     (patches, Dv)
    tokens      after the merger                                        (patches / 4, D)

An answer comes without thinking: questions end in /nothink, answers begin with an empty thought,
and the next <|user|> ends them.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import data
import model
from model import RMSNorm, VisionOut, block_order
from parts import config as base
from parts.fast import SwiGLU

# --------------------------------------------------------------------------------------------------
# config.json


@dataclass
class TextConfig(base.TextConfig):
    rotary_dim: int = 64                 # of head_dim: the channels that are rotated
    qk_norm, qkv_bias, norms = False, True, 4


@dataclass
class VisionConfig:
    depth: int = 24
    hidden_size: int = 1536
    intermediate_size: int = 13696       # of the merger; the blocks' is out_hidden_size
    num_heads: int = 12
    image_size: int = 336                # of the position table, in pixels
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 4096
    rms_norm_eps: float = 1e-5

    in_channels = 3
    side = property(lambda self: self.image_size // self.patch_size)


@dataclass
class Config(base.OtherConfig):
    @classmethod
    def read(cls, path, raw):
        text, rope = base.with_rope(path, base.part(raw, "text_config"))
        vision = base.part(raw, "vision_config")
        base.demand(path, (text, "model_type", "glm4v_text"), (text, "hidden_act", "silu"),
                    (text, "attention_bias", True), (rope, "rope_type", "default"),
                    (rope, "type", "default"), (vision, "hidden_act", "silu"),
                    (vision, "attention_bias", False),
                    (base.part(vision, "rope_parameters"), "rope_type", "axial"),
                    (base.part(vision, "rope_parameters"), "rope_theta", 10000.0, 10000))
        heads, width = text.get("num_attention_heads"), text.get("hidden_size")
        share = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.5))
        if type(heads) is type(width) is int and heads > 0 and type(share) in (int, float):
            text.setdefault("head_dim", width // heads)  # else `fill` says what is wrong
            text["rotary_dim"] = int(width // heads * share)
        text.setdefault("mrope_section", [8, 12, 12])
        ids = ("image_token_id", "video_token_id")
        config = cls(base.fill(TextConfig, text, f"{path}, text_config"),
                     base.fill(VisionConfig, vision, f"{path}, vision_config"), raw=raw,
                     **{k: raw.get(k) for k in ids}, **base.ends_and_hybrid(path, raw, text))
        t, v = config.text, config.vision
        base.check_decoder(config, path)
        base.insist(path, [
            (t.num_attention_heads * t.head_dim == t.hidden_size,
             "head_dim is not hidden_size over num_attention_heads"),
            (len(t.mrope_section) == 3 and 2 * sum(t.mrope_section) == t.rotary_dim <= t.head_dim,
             "mrope_section does not sum to half of the rotated part of head_dim"),
            (v.hidden_size % (4 * v.num_heads) == 0,
             "vision hidden_size is no multiple of four times num_heads"),
            (v.out_hidden_size == t.hidden_size,
             "out_hidden_size is not text_config's hidden_size")])
        return config

    def stored(self, name):
        return [name.replace("merger.downsample", "downsample")]

    @staticmethod
    def rope(positions, config, dtype):
        """cos and sin, each (B, T, P), of positions (3, B, T): time's frequencies first, then the
        rows', then the columns'; the channels that are not rotated have angle 0."""
        R, half = config.rotary_dim, config.head_dim // 2
        step = torch.arange(0, R, 2, device=positions.device).float() / R
        inverse = 1 / config.rope_theta ** step                                         # (R/2,)
        angle = (positions[..., None].float() * inverse).split(config.mrope_section, dim=-1)
        angle = torch.cat([part[axis] for axis, part in enumerate(angle)], dim=-1)    # (B, T, R/2)
        angle = F.pad(angle, (0, half - R // 2)).repeat(1, 1, 2)                        # (B, T, P)
        return angle.cos().to(dtype), angle.sin().to(dtype)


# --------------------------------------------------------------------------------------------------
# The vision tower


class VisionBlock(model.VisionBlock):
    def __init__(self, c):
        nn.Module.__init__(self)
        self.norm1, self.norm2 = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))
        self.attn = model.VisionAttention(c)
        self.attn.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.attn.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.mlp = model.MLP(replace(c, intermediate_size=c.out_hidden_size))


class Merger(nn.Module):
    """The strided convolution and what follows it: 2 x 2 patches -> one token of width D."""

    def __init__(self, c):
        super().__init__()
        m, D = c.spatial_merge_size, c.out_hidden_size
        self.downsample = nn.Conv2d(c.hidden_size, D, m, stride=m)
        self.proj = nn.Linear(D, D, bias=False)
        self.post_projection_norm = nn.LayerNorm(D)
        self.gate_proj = nn.Linear(D, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(D, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, D, bias=False)

    def forward(self, x):                                                               # (N, Dv)
        # Kernel = stride, and a block's patches are neighbours: a matrix product.
        m = self.downsample.stride[0]
        x = rearrange(x, "(n block) c -> n (c block)", block=m * m)
        x = F.linear(x, self.downsample.weight.flatten(1), self.downsample.bias)      # (N / 4, D)
        x = F.gelu(self.post_projection_norm(self.proj(x)))
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Tower(model.VisionTower):
    def __init__(self, config):
        nn.Module.__init__(self)
        c = self.config = config.vision
        self.embeddings = nn.ModuleDict(
            dict(position_embedding=nn.Embedding(c.side ** 2, c.hidden_size)))
        self.patch_embed = model.PatchEmbed(c)
        self.post_conv_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.post_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.merger = Merger(c)

    def positions(self, h, w):
        """Learned position embedding of an h x w grid: bicubic in a square table, patch centres on
        patch centres."""
        table = self.embeddings["position_embedding"].weight                     # (side * side, Dv)
        row, col = block_order(h, w, self.config.spatial_merge_size)
        at = torch.stack((2 * (col + 0.5) / w - 1, 2 * (row + 0.5) / h - 1), dim=-1)  # x, y: -1..1
        square = rearrange(table.float(), "(y x) c -> 1 c y x", y=self.config.side)
        found = F.grid_sample(square, at.view(1, -1, 1, 2).to(table.device), mode="bicubic",
                              padding_mode="border", align_corners=False)       # (1, Dv, h * w, 1)
        return found[0, :, :, 0].T.to(table.dtype)                                  # (h * w, Dv)

    def forward(self, pixels, grids):
        """pixels (patches, 3*2*ps*ps) in merge-block order, grids (images, 3) -> VisionOut."""
        places, rope, lengths = self.places(pixels, grids)
        x = self.post_conv_layernorm(self.patch_embed(pixels)) + places                 # (N, Dv)
        for block in self.blocks:
            x = block(x, rope, lengths)
        x = self.post_layernorm(x)
        return VisionOut(self.merger(x), [], x)


# --------------------------------------------------------------------------------------------------
# The decoder's layer


class Attention(model.Attention):
    """Rotates pairs of neighbouring channels. Queries and keys are laid out anew alike, even
    channels before odd ones, which no score sees; half-split rotation then turns the same pairs."""

    def project(self, x):
        q, k, v = super().project(x)
        return *(rearrange(t, "... (p two) -> ... (two p)", two=2) for t in (q, k)), v


class MLP(nn.Module):
    """One matrix for gate and up."""

    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(*self.gate_up_proj(x).chunk(2, dim=-1)))


class Layer(model.DecoderLayer):
    """What attention and MLP add to the stream is normalised first. C2 aligns attention's output
    before that norm, C3 and C4 the stream after it."""

    def __init__(self, config, layer, mixer):
        super().__init__(config, layer, Attention if mixer is model.Attention else mixer)
        self.mlp = MLP(config)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, mask=None, rope=None, state=None):
        o, state = self.self_attn(self.input_layernorm(x), mask, state, rope)
        x = x + self.post_self_attn_layernorm(o)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), o, state


# --------------------------------------------------------------------------------------------------
# Pictures and template


class Processor(data.Processor):
    """Pixels and ids are those of transformers' Glm46VProcessor with enable_thinking=False, with
    the exceptions that data.Processor makes; answers stay as they are, where the template strips
    them and cuts at a thought's end. GLM-4.1V has another template, and no /nothink."""
    RELEASED = {"size": {"shortest_edge": 112 * 112, "longest_edge": 9633792},
                "rescale_factor": 1 / 255, "image_mean": [.48145466, .4578275, .40821073],
                "image_std": [.26862954, .26130258, .27577711]}
    SPECIAL = dict(
        image_pad=("<|image|>", "image_token_id"), endoftext=("<|endoftext|>", ""),
        vision_start=("<|begin_of_image|>", "image_start_token_id"),
        vision_end=("<|end_of_image|>", "image_end_token_id"), gmask=("[gMASK]", ""),
        sop=("<sop>", ""), nothink=("/nothink", ""), think=("<think>", ""),
        end_think=("</think>", ""), system=("<|system|>", ""), user=("<|user|>", ""),
        assistant=("<|assistant|>", ""))

    def __init__(self, folder, *args, **caps):
        super().__init__(folder, *args, **caps)
        thought = [self.special["think"], self.special["end_think"]]
        self.header = self.newline + thought + self.newline
        boxes = ("<|begin_of_box|>", "<|end_of_box|>")   # which the released model may write
        self.boxes = {self.tokenizer.token_to_id(token) for token in boxes}
        if self.special["user"] not in self.ends:
            raise ValueError(f"{folder}: <|user|>, which ends an answer, is no eos_token_id.")

    def read_settings(self, folder, config, settings):
        read = Config.from_folder(folder)
        self.ends, frames = read.eos_token_id, read.vision.temporal_patch_size
        # The published bounds count the pixels of all frames, which a still picture fills.
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            settings[key] = settings["size"][edge] // frames
        super().read_settings(folder, config, settings)
        self.published = settings["min_pixels"], settings["max_pixels"]

    def bounded(self, least, most):
        lowest, highest = (pixels // self.factor ** 2 for pixels in self.published)
        return super().bounded(max(least, lowest), min(most, highest))

    def decode(self, ids, skip_special_tokens=True):
        return super().decode([i for i in ids if int(i) not in self.boxes], skip_special_tokens)

    def target(self, size, max_pixels):
        if min(size) < self.factor:                      # grows until its short side has one token
            size = [int(side * (self.factor / min(size))) for side in size]
        return super().target(size, max_pixels)

    def runs(self, sample, images, add_generation_prompt=False):
        """The sample as runs [ids, supervised, is_text]; `images` has the ids of each image.

            [gMASK]<sop><|user|>\\n<|begin_of_image|><|image|>...<|end_of_image|>Question/nothink
            <|assistant|>\\n<think></think>\\nAnswer<|user|>

        without the line break between the two. The user's next turn ends an answer, and <|user|>
        the last one."""
        s, images = self.special, iter(images)
        runs = [[[s["gmask"], s["sop"]], False, False]]

        def put(ids, supervised=False, is_text=False):
            if ids:
                runs.append([ids, supervised, is_text])

        before = None
        for message in sample.messages:
            role = message["role"]
            learn, text = role in ("assistant", "document"), ""
            if role != "document":
                put([s[role]], (before, role) == ("assistant", "user"))
                put(self.header if learn else [])
                text = "" if learn else "\n"
            for part in message["content"] + [None]:
                if part and part["type"] == "text":
                    text += part["text"]
                    continue
                put(self.tokenize(text), learn, True)
                text = ""
                if part:
                    put(next(images))
            put([s["nothink"]] if role == "user" else [])
            before = role
        put([s["endoftext" if before == "document" else "user"]]
            if before in ("document", "assistant") else [], True)
        put([s["assistant"]] + self.header if add_generation_prompt else [])
        return runs


Config.Tower, Config.Processor, TextConfig.Layer = Tower, Processor, Layer
