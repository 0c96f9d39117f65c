"""Density: one loss weight per position, read off the frozen vision tower (Sect. 4.2, Algorithm 1, B.2).

A patch that looks like its neighbours (sky, margin, wall) gets little weight in the residual alignment, one
that differs from them (a letter, a chart mark, an edge) gets much. Nothing is trained and the student gains
nothing to carry. Down the file: Eq. 2 turns features into rho, Algorithm 1 turns rho into w, the controls of
A.6 and A.8 turn other scores into w, a 4-bit cache keeps rho (or C5's gradient scores) for a corpus, and a drawing
shows rho (Fig. 2).

    python density.py page.png photo.jpg --out maps             # Fig. 2 for pictures of your own
    python density.py --cache rho.cache --data train.jsonl --teacher Qwen3-VL-8B-Instruct

    code       paper     shape
    v          v_p       (n, h, w, C)   unit patch features, last ViT block, before the merger; C channels
    rho        rho(p)    (n_visual,)    one per visual token, image after image, row after row of the batch
    visual     V(x)      (B, T) bool    image positions
    mask                 (B, T) bool    real positions (False on padding): the T of "sum_p w(p) = T"
    tilde      rho~(p)   (B, T)         rho after min-max, in [0, 1]
    tau, beta            floats         temperature of Eq. 3; text boost of Algorithm 1, line 3
    w          w(p)      (B, T) fp32    weights; every row sums to its number of real positions

Where the paper leaves a choice, the docstring of the function that makes it says which one, and why.
"""
import argparse
import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ----------------------------------------------------------------------------------------------------------
# From features to density (Eq. 2)

@torch.no_grad()
def patch_density(features, h, w, merge):
    """Eq. 2 for one image, or for n of the same size one after another.

    features (n*h*w, C): patches in merge-block order, i.e. flattened from (h/merge, w/merge, merge, merge).
    Returns (n * h/merge * w/merge,) fp32: the mean rho of each merge block in raster order, one per visual
    token. Raises ValueError if the sides are no multiples of merge or the rows do not fill whole images.

    The statistic lives on patches, the loss on visual tokens of merge x merge patches, and the paper is
    silent on the step between. "The final pre-projector layer" (C.5) is read as: rho on patches, then mean.

    Does N(p) contain p? Here yes, |N(p)| = 9, and it cannot matter. With m the mean cosine to the other 8,
    rho = 1 - (1 + 8m)/9 = 8/9 (1 - m). The two readings differ by the factor 8/9, which passes through the
    block mean and through the text value beta * mean(rho), and cancels in the min-max.

    Reflected padding needs two rows to reflect; a lone row or column is its own neighbour on both sides.
    """
    if h % merge or w % merge or len(features) == 0 or len(features) % (h * w):
        raise ValueError(f"{len(features)} patches do not fill {h}x{w} images in {merge}x{merge} blocks")
    v = F.normalize(features.float(), dim=-1)                 # (n*h*w, C)    v_p / |v_p|
    v = rearrange(v, "(n y x i j) c -> n (y i) (x j) c", y=h // merge, x=w // merge, i=merge, j=merge)
    window = _sum3(_sum3(v, 1), 2)                            # (n, h, w, C)  sum of v_q over N(p)
    rho = 1 - window.mul_(v).sum(-1) / 9                      # (n, h, w)     Eq. 2, as v_p . sum of v_q
    return reduce(rho, "n (y i) (x j) -> (n y x)", "mean", i=merge, j=merge)


def _sum3(v, dim):
    """v[i-1] + v[i] + v[i+1] along dim, reflected at both ends: v[-1] means v[1] and v[n] means v[n-2]."""
    n = v.shape[dim]
    if n == 1:
        return 3 * v
    total = v.clone()                                         # in place: 4x faster than gathering
    total.narrow(dim, 1, n - 1).add_(v.narrow(dim, 0, n - 1))
    total.narrow(dim, 0, n - 1).add_(v.narrow(dim, 1, n - 1))
    total.narrow(dim, 0, 1).add_(v.narrow(dim, 1, 1))
    total.narrow(dim, n - 1, 1).add_(v.narrow(dim, n - 2, 1))
    return total


def image_densities(features, grids, merge):
    """Eq. 2 for all images of a batch: features (n_patches, C), grids (n_images, 3) of t, h, w in patches.

    Returns (n_visual,) fp32 in the order of the visual tokens. Each of the t frames is a picture of its own.
    Neighbours in the list of equal size share a call, up to what stays in a processor's cache.
    """
    sizes = [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
    if sum(h * w for h, w in sizes) != len(features):
        raise ValueError(f"{len(features)} patches do not fill the grids {grids.tolist()}")
    pieces, start = [], 0
    for (h, w), run in groupby(sizes):
        end = start + h * w * len(list(run))
        images_at_once = max(1, 4096 // (h * w))
        for part in features[start:end].split(images_at_once * h * w):
            pieces.append(patch_density(part, h, w, merge))
        start = end
    return torch.cat(pieces) if pieces else features.new_zeros(0, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------------
# From density to weights (Eq. 3, Algorithm 1), and the controls

FLAT = 1e-5      # a smaller range of rho is fp32 rounding, and stretching it to [0, 1] would weight noise


def normalise_weights(raw, mask):
    """The right half of Eq. 3, for every kind of weight: each row sums to its real positions, padding is 0.

    raw (B, T) non-negative -> (B, T) fp32. A row whose raw weights are all zero becomes uniform.
    """
    raw = raw.float() * mask                                  # (B, T)
    total = raw.sum(1, keepdim=True)                          # (B, 1)
    count = mask.sum(1, keepdim=True)                         # (B, 1)  T of each sample
    return torch.where(total > 0, raw * (count / total.clamp(min=1e-38)), mask.float())


def scatter_scores(rho, visual, beta, means=None):
    """Algorithm 1, lines 2-3: rho at the visual positions, beta times its mean at all others -> (B, T) fp32.

    The "per-image mean" is taken over the whole sample, like the normalisation of C.5: several images share
    one scale, so a blank page beside a full one stays light. means (B,) replaces the mean of the values given
    (the cache keeps the one from before quantisation). Rows without an image get 0 throughout.
    """
    rho = torch.zeros(0, device=visual.device) if rho is None else rho
    if rho.numel() != visual.sum():
        raise ValueError(f"{rho.numel()} densities for {visual.sum().item()} visual positions")
    dense = torch.zeros(visual.shape, device=rho.device).masked_scatter(visual, rho.float())    # (B, T)
    if means is None:
        means = dense.sum(1) / visual.sum(1).clamp(min=1)     # (B,)
    return torch.where(visual, dense, beta * means[:, None])  # (B, T)


@torch.no_grad()
def density_weights(rho, visual, mask, names=None, *, tau=0.5, beta=2.0, minmax="all", means=None):
    """Algorithm 1, condition C4: rho (n_visual,), visual and mask (B, T) bool -> w (B, T).

    minmax="all" (Algorithm 1): the text value enters before the min-max. minmax="visual" (Sect. 4.2): the
    range is that of the visual positions, and the text value is clamped into it. Eq. 3 wants rho~ in [0, 1],
    and without the clamp a nearly even image (mean far above max - min) would send text's weight to infinity.
    A sample without an image, or with the same score everywhere, is uniform: there is nothing to rank.
    """
    if minmax not in ("all", "visual") or not tau > 0:
        raise ValueError(f'minmax must be "all" or "visual" and tau > 0, got {minmax!r} and {tau}')
    score = scatter_scores(rho, visual, beta, means)          # (B, T)
    over = mask if minmax == "all" else visual
    low = score.masked_fill(~over, math.inf).amin(1, keepdim=True)      # (B, 1)
    high = score.masked_fill(~over, -math.inf).amax(1, keepdim=True)    # (B, 1)
    tilde = ((score - low) / (high - low)).clamp(0, 1)        # (B, T)  line 4
    tilde = torch.where(high - low > FLAT, tilde, 1)          # nothing to rank: exactly uniform
    raw = torch.exp((tilde - 1) / tau)                        # (B, T)  Eq. 3; the -1 cancels, no overflow
    return normalise_weights(raw, mask)                       # (B, T)  line 5


def uniform_weights(rho, visual, mask, names=None):
    """C3: 1 at every real position."""
    return mask.float()


def modality_weights(rho, visual, mask, names=None, *, tau=0.5, beta=2.0):
    """-Density (Table 8), "text/visual modality boost only": Algorithm 1 with every patch at the same rho.

    Which rho drops out: patches at m and text at beta * m (beta > 1) become rho~ = 0 and 1 for any m > 0, so
    a text position weighs exp(1/tau) times a visual one. The argument rho is not read.
    """
    ones = torch.ones(int(visual.sum()), device=visual.device)
    return density_weights(ones, visual, mask, tau=tau, beta=beta)


@torch.no_grad()
def topk_weights(rho, visual, mask, names=None, *, k=25.0, boost=5.0):
    """A.8: boost times the weight on the top k % by rho, rounded to whole positions; ties go to the earlier.

    "k % of positions" is read as visual positions, for only there is rho measured. The rest is "unchanged" up
    to the factor that keeps sum w = T, so that the arms differ in where the budget goes, not in its size.
    """
    score = scatter_scores(rho, visual, beta=0.0).masked_fill(~visual, -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)    # (B, T)  0 = densest
    chosen = rank < (visual.sum(1, keepdim=True) * k / 100).round()     # (B, T)
    return normalise_weights(1 + (boost - 1) * chosen, mask)


def drawn_by_name(visual, names, seed):
    """A uniform random number for every visual position, by (seed, sample name) alone -> list of (n,), one per sample.
    So a sample meets the same draw in every epoch, batch and padding, as it meets the same density."""
    if names is None or len(names) != len(visual):
        raise ValueError(f"random weights are drawn by sample name: {len(visual)} rows, names {names}")
    draws = []
    for name, n in zip(names, visual.sum(1).tolist()):
        key = int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:7], "little")
        draws.append(torch.rand(n, generator=torch.Generator().manual_seed(key)))
    return draws


def random_weights(rho, visual, mask, names=None, *, k=25.0, boost=5.0, seed=0):
    """A.8, random control: as many positions as topk_weights takes, drawn at random. rho is not read."""
    draws = torch.cat(drawn_by_name(visual, names, seed))
    return topk_weights(draws.to(visual.device), visual, mask, k=k, boost=boost)


def shuffled_weights(rho, visual, mask, names=None, *, tau=0.5, beta=2.0, minmax="all", seed=0):
    """A control that the paper lacks: C4's weights on the wrong patches. Each sample's rho is put in random order, so
    text, range and every weight stay, and only their places on the page are lost."""
    draws = drawn_by_name(visual, names, seed)
    parts = rho.split([len(draw) for draw in draws])
    mixed = torch.cat([part[draw.argsort().to(part.device)] for part, draw in zip(parts, draws)])
    return density_weights(mixed, visual, mask, tau=tau, beta=beta, minmax=minmax)


def score_weights(scores, mask):
    """Eq. 7: w proportional to the score itself, no exponential. scores (B, T) non-negative -> w (B, T)."""
    if not (torch.isfinite(scores) & (scores >= 0))[mask].all():
        raise ValueError("gradient scores must be finite and non-negative")
    return normalise_weights(scores.masked_fill(~mask, 0), mask)


@torch.no_grad()
def fisher_weights(scores, visual, mask, names=None, *, beta=2.0):
    """C5 HEED-G (Eq. 7): scores, sum over layers of |g|^2, one per real position, or one per visual position.

    In the second case, which is how B.2 counts its cache, all others get beta times the visual mean.
    """
    if scores is not None and scores.numel() == mask.sum():
        scores = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, scores.float())
    else:
        scores = scatter_scores(scores, visual, beta)
    return score_weights(scores, mask)                        # (B, T)


# One signature: fn(rho (n_visual,), visual (B, T), mask (B, T), names [B], **options) -> w (B, T)
WEIGHTS = {
    "uniform":  uniform_weights,     # C2, C3
    "density":  density_weights,     # C4              tau, beta, minmax, means
    "fisher":   fisher_weights,      # C5              beta
    "modality": modality_weights,    # -Density (A.6)  tau, beta
    "topk":     topk_weights,        # A.8             k, boost
    "random":   random_weights,      # A.8 control     k, boost, seed
    "shuffled": shuffled_weights,    # control         tau, beta, minmax, seed
}

# ----------------------------------------------------------------------------------------------------------
# The 4-bit cache (B.2, C.5): rho of a corpus, or gradient scores, two values per byte
#
#   head     128 bytes: magic, CRC of the rest, version, kind, fingerprint, counts, place and CRC of the index
#   records  64-byte aligned: CRC of the rest, sample, image, low, high, mean, count, grids, nibbles
#   index    per record: sample, offset, size
#
# Little-endian; every byte is under a CRC, the zeros between records too. What is stored is rho between its
# sample's own min and max, not w: w depends on the text, on tau and on beta as well, and those stay free.

MAGIC, VERSION, LEVELS, ALIGN = b"HEEDrho4", 1, 15, 64
HEAD = struct.Struct("<I8s32sQQQQI")    # version, kind, fingerprint, records, values, index at, size, its CRC
RECORD = struct.Struct("<16s16s3fIH")   # sample, image, low, high, mean, count, images; 3 uint16 per image
INDEX = struct.Struct("<16sQI")

# Even steps of whatever goes through exp() are even ratios of w. rho does. Fisher scores are weights already
# (Eq. 7), so their logarithm is stored, floored at 1e-4 of the sample's largest: no weight to speak of.
KINDS = {
    "density": (lambda x: x, lambda x: x),
    "fisher": (lambda x: x.clamp(min=max(1e-4 * x.max().item(), 1e-30)).log(), torch.exp),
}


class CacheError(ValueError):
    """A cache that is damaged or belongs to something else. Names file, sample and what differs."""


class Cached(NamedTuple):
    values: torch.Tensor     # (n,) fp32, dequantised
    mean: float              # before quantisation: what beta multiplies


def fingerprint(weights, preprocessing):
    """sha256 (hex) of what decides rho besides the image: weights (module or state dict) and settings (dict).

    Names, dtypes and shapes count too: a tower in bf16 is not the tower in fp32, so write the cache in the
    precision it is used with.
    """
    state = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    total = hashlib.sha256(json.dumps(preprocessing, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def cache_key(teacher, processor):
    """The fingerprint of a run: vision tower, and the processor's resolution, patches, normalisation."""
    names = ("patch", "merge", "temporal", "min_pixels", "max_pixels")
    settings = {name: getattr(processor, name) for name in names} | {"table": processor.table.tolist()}
    return fingerprint(teacher.visual, settings)


def image_sha(images):
    """sha256 (hex) over a sample's images in order: the bytes of files, the pixels of PIL images."""
    total = hashlib.sha256()
    for image in images:
        drawn = isinstance(image, Image.Image)
        data = f"{image.mode}{image.size}".encode() + image.tobytes() if drawn else Path(image).read_bytes()
        total.update(hashlib.sha256(data).digest())      # one digest each, so no border can move
    return total.hexdigest()


def _sample_key(sample_id):
    return hashlib.sha256(sample_id.encode()).digest()[:16]


def _image_key(sha):
    return (bytes.fromhex(sha) if isinstance(sha, str) else bytes(sha))[:16]


def _grid_list(grids):
    return [tuple(int(n) for n in grid) for grid in (() if grids is None else grids)]


def quantise(values):
    """values (n,) -> levels (n,) uint8 in 0..15, low, high. Both extremes survive exactly."""
    low, high = values.min(), values.max()
    step = (high - low).clamp(min=1e-30) / LEVELS
    return ((values - low) / step).round().to(torch.uint8), low.item(), high.item()


def dequantise(levels, low, high):
    """Inverse of quantise, to within half a step: |error| <= (high - low) / 30."""
    return torch.lerp(torch.tensor(low), torch.tensor(high), levels.float() / LEVELS)


def _pack(sample_id, sha, grids, values, kind):
    """One record as bytes, a multiple of ALIGN."""
    values = torch.as_tensor(values).detach().float().cpu().flatten()
    if not len(values) or not torch.isfinite(values).all() or (kind == "fisher" and values.min() < 0):
        raise CacheError(f"sample {sample_id!r}: {len(values)} values, not all usable as {kind}")
    levels, low, high = quantise(KINDS[kind][0](values))
    nibbles = F.pad(levels, (0, len(levels) % 2)).view(-1, 2)
    sides = [n for grid in _grid_list(grids) for n in grid]
    key, image, mean = _sample_key(sample_id), _image_key(sha), values.mean().item()
    body = RECORD.pack(key, image, low, high, mean, len(values), len(sides) // 3)
    body += struct.pack(f"<{len(sides)}H", *sides)
    body += (nibbles[:, 0] | nibbles[:, 1] << 4).numpy().tobytes()
    body += bytes(-(4 + len(body)) % ALIGN)
    return struct.pack("<I", zlib.crc32(body)) + body


def write_cache(path, records, fingerprint, kind="density"):
    """Write a cache in one pass over records of (sample_id, image_sha, grids (k, 3) or None, values (n,)).

    The file takes its name only when it is whole and on disk; if anything fails before, what stood there
    still stands. A sample without an image has no rho: leave it out. Raises CacheError for two
    samples of one id, and for values that are missing, not finite or (fisher) negative.
    """
    path, index, n_values = Path(path), {}, 0
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(bytes(2 * ALIGN))                      # the head's place; it is written last
            for sample_id, sha, grids, values in records:
                block, key = _pack(sample_id, sha, grids, values, kind), _sample_key(sample_id)
                if key in index:
                    raise CacheError(f"{path}: two samples have the id {sample_id!r}")
                index[key] = (file.tell(), len(block))
                file.write(block)
                n_values += len(values)
            start, table = file.tell(), b"".join(INDEX.pack(key, *place) for key, place in index.items())
            file.write(table)
            head = HEAD.pack(VERSION, kind.encode(), bytes.fromhex(fingerprint), len(index), n_values, start,
                             file.tell(), zlib.crc32(table)).ljust(2 * ALIGN - 12, b"\0")
            file.seek(0)
            file.write(MAGIC + struct.pack("<I", zlib.crc32(head)) + head)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)                # the new name has to reach the disk, too
    os.fsync(folder)
    os.close(folder)


class DensityCache:
    """A cache opened for reading; the file is mapped, so processes of one machine share its pages.

    Opening checks head, size and index; record checks the record it reads. Both raise CacheError.
    """

    def __init__(self, path, fingerprint, kind="density"):
        self.path, self.kind = Path(path), kind
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 2 * ALIGN:
                raise CacheError(f"{path} is truncated: {size} bytes, less than its head")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        head = self.data[12:2 * ALIGN]
        if self.data[:8] != MAGIC:
            raise CacheError(f"{path} is not a density cache")
        if struct.unpack("<I", self.data[8:12])[0] != zlib.crc32(head):
            raise CacheError(f"{path}: the head is damaged (CRC)")
        version, found, made_with, self.n_records, self.n_values, start, whole, crc = HEAD.unpack_from(head)
        found = found.rstrip(b"\0").decode()
        if (version, found) != (VERSION, kind):
            raise CacheError(f"{path} holds {found} values, version {version}; wanted {kind}, {VERSION}")
        if made_with.hex() != fingerprint:
            raise CacheError(f"{path} was made with another model or preprocessing: "
                             f"fingerprint {made_with.hex()[:12]}, this run has {fingerprint[:12]}")
        if size != whole:
            raise CacheError(f"{path} is truncated or grown: {size} bytes, its head says {whole}")
        if zlib.crc32(self.data[start:]) != crc:
            raise CacheError(f"{path}: the index is damaged (CRC)")
        self.index = {key: place for key, *place in INDEX.iter_unpack(self.data[start:])}

    def record(self, sample_id, image_sha, grids):
        """One sample's values and exact mean; CacheError if missing, damaged, of another image or grid."""
        where, wanted = f"{self.path}, sample {sample_id!r}", _sample_key(sample_id)
        if wanted not in self.index:
            raise CacheError(f"{where}: not in the cache")
        offset, size = self.index[wanted]
        block = self.data[offset:offset + size]
        if struct.unpack_from("<I", block)[0] != zlib.crc32(block[4:]):
            raise CacheError(f"{where}: the record is damaged (CRC)")
        key, image, low, high, mean, count, n_images = RECORD.unpack_from(block, 4)
        if key != wanted:
            raise CacheError(f"{where}: the index points at another sample's record")
        if image != _image_key(image_sha):
            what = "the image's bytes are" if self.kind == "density" else "images, tokens or labels are"
            raise CacheError(f"{where}: {what} not those the cache was made from")
        start = 4 + RECORD.size + 6 * n_images
        stored = list(struct.iter_unpack("<3H", block[4 + RECORD.size:start]))
        if stored != _grid_list(grids):
            raise CacheError(f"{where}: made at grids {stored}, this run has {_grid_list(grids)}")
        packed = torch.frombuffer(bytearray(block[start:start + (count + 1) // 2]), dtype=torch.uint8)
        levels = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count]
        return Cached(KINDS[self.kind][1](dequantise(levels, low, high)), mean)

    def get(self, sample_id, image_sha, grids):
        """The values alone, (n,) fp32: what rho is to the functions above."""
        return self.record(sample_id, image_sha, grids).values

    def bytes_per_value(self):
        """File size over stored values, with head, index and alignment (the paper: 500 MB / 360 M = 1.39)."""
        return len(self.data) / max(self.n_values, 1)


def quantisation_error(rho, visual, mask, **options):
    """Largest |w4 / w - 1| over one sample's real positions, w4 from 4-bit rho; visual and mask are (1, T).

    Half a step is 1/30 of rho~, so exp(rho~/tau) is off by at most exp(1/(30 tau)) - 1 (6.9 % at tau = 0.5),
    and w, whose sum may be off the other way, by at most exp(1/(15 tau)) - 1 (14.3 %).
    """
    exact = density_weights(rho, visual, mask, **options)
    coarse = density_weights(dequantise(*quantise(rho)), visual, mask, means=rho.mean()[None], **options)
    return (coarse / exact - 1)[mask].abs().max().item()


# ----------------------------------------------------------------------------------------------------------
# The picture (Fig. 2), and the command line

# rho~:  0                .33              .67            1       bright: like its neighbours, dark: distinct
RAMP = [(255, 249, 232), (246, 180, 106), (178, 58, 92), (26, 12, 56)]


def _colour(tilde):
    """tilde (h, w) in [0, 1] -> (h, w, 3) uint8 along RAMP, which only ever darkens."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(tilde, stops, channel) for channel in zip(*RAMP)], -1).astype(np.uint8)


def draw_map(image, rho, long_side=560):
    """The picture beside its density map, over a strip that says how to read it.

    image: PIL image; rho (h, w): one value per visual token. Returns a PIL image in RGB. The map is min-max
    normalised for this picture and laid over a faint grey print of it, one square per visual token.
    """
    rho = torch.as_tensor(rho).float().cpu().numpy()
    low, high = float(rho.min()), float(rho.max())
    scale, gap, strip = long_side / max(image.size), 12, 40
    size = tuple(max(1, round(side * scale)) for side in image.size)
    photo = image.convert("RGB").resize(size, Image.LANCZOS if scale < 1 else Image.NEAREST)
    heat = Image.fromarray(_colour((rho - low) / max(high - low, FLAT))).resize(size, Image.NEAREST)
    heat = Image.blend(heat, photo.convert("L").convert("RGB"), 0.22)

    sheet = Image.new("RGB", (max(2 * size[0] + 3 * gap, 560), size[1] + 2 * gap + strip), "white")
    middle, row = sheet.width // 2, size[1] + 2 * gap + 8
    sheet.paste(photo, (middle - gap // 2 - size[0], gap))
    sheet.paste(heat, (middle + gap // 2, gap))
    sheet.paste(Image.fromarray(_colour(np.linspace(0, 1, 160)[None].repeat(12, 0))), (middle - 80, row))
    pen, font, ink = ImageDraw.Draw(sheet), ImageFont.load_default(13), (70, 70, 80)
    pen.text((middle - 92, row + 6), f"like its neighbours  {low:.3f}", ink, font, anchor="rm")
    pen.text((middle + 92, row + 6), f"{high:.3f}  distinct", ink, font, anchor="lm")
    return sheet


def _sample_density(teacher, processor, sample):
    """One sample through processor and vision tower: its encoding, and rho (n_visual,) on the CPU."""
    encoded, weight = processor.encode(sample), next(teacher.visual.parameters())
    with torch.no_grad():
        seen = teacher.visual(encoded.pixels.to(weight.device, weight.dtype), encoded.grids.to(weight.device))
    rho = image_densities(seen.patches, encoded.grids, teacher.config.vision.spatial_merge_size)
    return encoded, rho.cpu()


def draw_files(paths, teacher, processor, folder):
    """Write FOLDER/NAME.density.png for every picture."""
    from data import Sample, flattened, open_image
    folder, merge = Path(folder), teacher.config.vision.spatial_merge_size
    if len({Path(path).stem for path in paths}) < len(paths):
        raise ValueError("two pictures have the same name, and so would their drawings")
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(Path, paths):
        messages = [{"role": "user", "content": [{"type": "image"}]}]
        sample = Sample(id=path.name, messages=messages, images=[path], source="cli")
        encoded, rho = _sample_density(teacher, processor, sample)
        _, h, w = encoded.grids[0].tolist()
        target = folder / f"{path.stem}.density.png"
        upright = flattened(ImageOps.exif_transpose(open_image(path)))      # as the tower saw it
        draw_map(upright, rho.view(h // merge, w // merge)).save(target)
        print(f"{target}: {len(rho)} visual tokens, rho {rho.min():.3f} to {rho.max():.3f}")


def records(samples, make, skip=False):
    """make(name, sample) of each sample of a corpus, once, under its name in a run (a mixture draws its sources in
    rounds), unless it is None. skip: samples that cannot be used are left out and counted, as `--skip-bad` does."""
    from data import BadSample, BadSamples
    from tqdm import tqdm
    bad = BadSamples(skip)
    sources = {f"{n}/": source for n, source in getattr(samples, "sources", {}).items()} or {"": samples}
    for prefix, i in tqdm([(p, i) for p, source in sources.items() for i in range(len(source))], unit=" samples"):
        try:
            sample = sources[prefix][i]
            record = make(prefix + sample.id, sample)
        except BadSample as error:
            bad.saw(1, [str(error)])
            continue
        bad.saw(1)
        if record:
            yield record
    if bad.bad:
        print(f"{bad.bad} of {bad.seen} samples were left out; the first: {' '.join(bad.first)}")


def cache_corpus(path, samples, teacher, processor, skip=False):
    """Write rho of every sample that has an image, and say how large and how coarse the cache is."""
    errors, made_with = [], cache_key(teacher, processor)

    def record(name, sample):
        if not sample.images:
            return None
        encoded, rho = _sample_density(teacher, processor, sample)
        visual = (encoded.ids == teacher.config.image_token_id)[None]
        errors.append(quantisation_error(rho, visual, torch.ones_like(visual)))
        return name, image_sha(sample.images), encoded.grids, rho

    write_cache(path, records(samples, record, skip), made_with)
    cache = DensityCache(path, made_with)
    print(f"{path}: {cache.n_records} samples, {cache.n_values} visual tokens, {cache.bytes_per_value():.3f} "
          f"bytes per token; 4 bits move w by at most {100 * max(errors, default=0):.1f} %")


def main():
    parser = argparse.ArgumentParser(description="Draw density maps, or cache the density of a corpus.")
    parser.add_argument("images", nargs="*", help="pictures to draw")
    parser.add_argument("--teacher", default=str(Path(__file__).parent / "tiny"), help="model folder")
    parser.add_argument("--out", default=".", help="folder for the drawings")
    parser.add_argument("--cache", help="write a cache to this file")
    parser.add_argument("--data", help="the JSONL corpus or recipe it is made from")
    parser.add_argument("--skip-bad", action="store_true", help="leave out unusable samples, up to 0.1 %% (or ten)")
    parser.add_argument("--dtype", default="", choices=["", "bfloat16", "float32", "float64"],
                        help="as distill.py's: a cache serves runs in the dtype it was made in")
    args = parser.parse_args()
    if bool(args.cache) != bool(args.data) or not (args.images or args.cache):
        parser.error("give pictures to draw, or --cache FILE together with --data FILE")

    from data import BadSample, Processor, read_data
    from model import Qwen3VL, device_of, dtype_of
    device = device_of()
    try:
        teacher = Qwen3VL.from_pretrained(args.teacher, dtype_of(args.dtype, device), device)
        processor = Processor(args.teacher)
        if args.images:
            draw_files(args.images, teacher, processor, args.out)
        if args.cache:
            cache_corpus(args.cache, read_data(args.data), teacher, processor, args.skip_bad)
    except (BadSample, CacheError, ValueError, OSError) as error:
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
