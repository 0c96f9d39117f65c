"""Density: a loss weight per position, from the frozen vision tower (Sect. 4.2, Algorithm 1, B.2).

A patch that looks like its neighbours (sky, margin, wall) gets little weight in the residual
alignment, one that differs from them (a letter, a chart mark, an edge) gets much. Nothing is
trained and the student gains nothing to carry.

    python density.py page.png photo.jpg --out maps             # Fig. 2 for pictures of your own
    python density.py page.png --teacher Qwen3-VL-2B-Instruct   # by any teacher's tower
    python density.py --cache rho.cache --data train.jsonl --teacher Qwen3-VL-8B-Instruct

    code     paper    shape
    v        v_p      (n, h, w, C)  unit patch features, last ViT block, before the merger
    rho      rho(p)   (n_visual,)   one per visual token, images one after another;
                      (B, T)        then one per position (`to_positions`)
    visual   V(x)     (B, T) bool   image positions
    mask              (B, T) bool   real positions (False on padding): the T of "sum_p w(p) = T"
    tilde    rho~(p)  (B, T)        rho after min-max, in [0, 1]
    w        w(p)     (B, T) fp32   weights; every row sums to its number of real positions
"""
import argparse
import hashlib
import math
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from data import BadSample, Sample, each, processor_of, read_data
from model import Qwen3VL, device_of, dtype_of
from parts.cache import Cache, contents, dequantise, quantise, tower_fingerprint, write_cache
from parts.images import read_image
from parts.picture import draw_map

# ---- From features to density (Eq. 2) ------------------------------------------------------------

@torch.no_grad()
def patch_density(features, h, w, merge):
    """Eq. 2 for one image, or for n of the same size one after another.

    features (n*h*w, C): patches in merge-block order, i.e. flattened from (h/merge, w/merge, merge,
    merge). Returns (n * h/merge * w/merge,) fp32 in raster order: the loss is on visual tokens, so
    each gets the mean rho of its merge block, the patches of C.5's "pre-projector layer".
    N(p) contains p, which cannot matter: with m the mean cosine to the other 8, rho = 1 - (1 + 8m)/9
    = 8/9 (1 - m), and 8/9 cancels in the min-max. Raises ValueError if features fill no images.
    """
    if h % merge or w % merge or len(features) == 0 or len(features) % (h * w):
        raise ValueError(f"{len(features)} patches do not fill {h}x{w} images in {merge}x{merge} blocks")
    v = F.normalize(features.float(), dim=-1)                 # (n*h*w, C)    v_p / |v_p|
    v = rearrange(v, "(n y x i j) c -> n (y i) (x j) c", y=h // merge, x=w // merge, i=merge, j=merge)
    # The sum over q goes inside the product, so one shifted sum serves the nine cosines of a patch.
    window = _sum3(_sum3(v, 1), 2)                            # (n, h, w, C)  sum of v_q over N(p)
    rho = 1 - window.mul_(v).sum(-1) / 9                      # (n, h, w)     Eq. 2
    # A patch of zeros has no direction, so it stands out from nothing; the formula would say 1.
    rho = rho.masked_fill(v.norm(dim=-1) < 0.5, 0)
    return reduce(rho, "n (y i) (x j) -> (n y x)", "mean", i=merge, j=merge)


def _sum3(v, dim):
    """v[i-1] + v[i] + v[i+1] along dim, reflected at the ends: v[-1] is v[1], v[n] is v[n-2]."""
    n = v.shape[dim]
    if n == 1:                                                # nothing to reflect
        return 3 * v
    total = v.clone()                                         # in place: 4x faster than gathering
    total.narrow(dim, 1, n - 1).add_(v.narrow(dim, 0, n - 1))
    total.narrow(dim, 0, n - 1).add_(v.narrow(dim, 1, n - 1))
    total.narrow(dim, 0, 1).add_(v.narrow(dim, 1, 1))
    total.narrow(dim, n - 1, 1).add_(v.narrow(dim, n - 2, 1))
    return total


def image_densities(features, grids, merge):
    """Eq. 2 for a batch: features (n_patches, C), grids (n_images, 3) of t, h, w in patches, each
    frame a picture of its own -> (n_visual,) fp32 in the order of the visual tokens. Raises
    ValueError if features do not fill the grids or are not finite."""
    sizes = [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
    if sum(h * w for h, w in sizes) != len(features):
        raise ValueError(f"{len(features)} patches do not fill the grids {grids.tolist()}")
    pieces, start = [features.new_zeros(0, dtype=torch.float32)], 0
    # Neighbours in the list of equal size share a call, up to what stays in a processor's cache.
    for (h, w), run in groupby(sizes):
        end = start + h * w * len(list(run))
        for part in features[start:end].split(max(1, 4096 // (h * w)) * h * w):
            pieces.append(patch_density(part, h, w, merge))
        start = end
    rho = torch.cat(pieces)
    if not torch.isfinite(rho).all():             # else min-max would make the whole sample uniform
        raise ValueError("features are not finite: are pixels or the vision tower damaged?")
    return rho


def densities(teacher, seen, grids):
    """rho (n_visual,) of what the teacher's tower gave, a VisionOut. Where tokens have no place, the
    tower makes it of the patches'."""
    rho = image_densities(seen.patches, grids, teacher.config.vision.spatial_merge_size)
    return teacher.visual.pooled(rho, seen, grids) if hasattr(teacher.visual, "pooled") else rho


# ---- From density to weights (Eq. 3, Algorithm 1) ------------------------------------------------

@dataclass(frozen=True)
class Weighting:
    """What weight functions read: distill.py has a flag for each. Raises ValueError."""
    tau: float = 0.5         # temperature of Eq. 3: smaller is more concentrated
    beta: float = 2.0        # text's density over the mean visual density (Algorithm 1, line 3)
    minmax: str = "all"      # over which positions line 4 normalises: see density_weights
    k: float = 25.0          # per cent of positions that topk and random raise (A.8)
    seed: int = 0            # of random and shuffled
    fisher_text: str = "own"      # gradient scores of text: its own, or "beta" times the visual mean
    fisher_power: float = 1.0     # gradient scores to this power: 1 is Eq. 7, |g|^2

    def __post_init__(self):
        if self.minmax not in ("all", "visual") or not self.tau > 0:
            raise ValueError(f"minmax must be all or visual and tau > 0, not {self.minmax} and {self.tau}")
        if self.fisher_text not in ("own", "beta"):
            raise ValueError(f"fisher_text must be own or beta, not {self.fisher_text}")


FLAT = 1e-5      # a smaller range of rho is fp32 rounding: stretched to [0, 1], w would be noise
BOOST = 5.0      # what topk and random multiply the weight of their positions by (A.8)


def visual_positions(ids, config):
    """V(x): ids of any shape -> bool."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)


def visual_mean(z, visual):
    """The mean of z (..., T) over the visual positions of each row (..., 1); 0 where there are none."""
    return (z * visual).sum(-1, keepdim=True) / visual.sum(-1, keepdim=True).clamp(min=1)


def to_positions(rho, visual):
    """rho (n_visual,) -> (B, T) fp32: each at its visual position, elsewhere the mean of the row.

    The "per-image mean" of Algorithm 1, line 3, is taken over the whole sample, like the
    normalisation of C.5: a blank page beside a full one stays light. Rows without an image get 0
    throughout; rho may be None where no row has one.
    """
    rho = torch.zeros(0, device=visual.device) if rho is None else rho
    if rho.numel() != visual.sum():
        raise ValueError(f"{rho.numel()} densities for {visual.sum().item()} visual positions")
    dense = torch.zeros(visual.shape, device=rho.device).masked_scatter(visual, rho.float())    # (B, T)
    return torch.where(visual, dense, visual_mean(dense, visual))


def normalise_weights(raw, mask):
    """The right half of Eq. 3, of every weight: raw (..., B, T) >= 0 -> fp32, where a row sums to
    its real positions and padding is 0. A row of zeros becomes uniform."""
    raw = raw.float() * mask                                  # (..., B, T)
    total = raw.sum(-1, keepdim=True)                         # (..., B, 1)
    count = mask.sum(-1, keepdim=True)                        # (B, 1)  T of each sample
    return torch.where(total > 0, raw * (count / total.clamp(min=1e-38)), mask.float())


def density_weights(rho, visual, mask, names=None, s=Weighting()):
    """Algorithm 1, condition C4: rho, visual and mask (B, T) -> w (B, T).

    minmax="all" (Algorithm 1): the text value enters before the min-max. minmax="visual" (Sect.
    4.2): the range is that of visual positions, and the text value is clamped into it, or on a nearly
    even image text's weight would go to infinity. Where all scores are the same, w is uniform.
    """
    score = torch.where(visual, rho, s.beta * rho)            # (B, T)  line 3: text has beta * mean
    over = mask if s.minmax == "all" else visual
    low = score.masked_fill(~over, math.inf).amin(1, keepdim=True)      # (B, 1)
    high = score.masked_fill(~over, -math.inf).amax(1, keepdim=True)    # (B, 1)
    tilde = ((score - low) / (high - low)).clamp(0, 1)        # (B, T)  line 4
    tilde = torch.where(high - low > FLAT, tilde, 1)          # nothing to rank: exactly uniform
    raw = torch.exp((tilde - 1) / s.tau)                      # (B, T)  Eq. 3; the -1 cancels
    return normalise_weights(raw, mask)                       # (B, T)  line 5


# ---- Other weights, of the same form: C3, C5, and the controls of A.6 and A.8 --------------------

def uniform_weights(rho, visual, mask, names=None, s=Weighting()):
    """C3: 1 at every real position."""
    return mask.float()


def fisher_weights(scores, visual, mask, names=None, s=Weighting()):
    """C5, HEED-G (Eq. 7): w in proportion to |g|^2, with no exponential; scores (B, T), or where
    layers keep their own (S, B, T), -> w of that shape. B.2 stores scores of visual positions alone
    and gives text beta times their mean: fisher_text="beta" (ledger 20)."""
    if not ((torch.isfinite(scores) & (scores >= 0)) | ~mask).all():
        raise ValueError("gradient scores must be finite and non-negative")
    scores = scores.masked_fill(~mask, 0)
    if s.fisher_text == "beta":
        scores = torch.where(visual, scores, s.beta * visual_mean(scores, visual))
    return normalise_weights(scores ** s.fisher_power, mask)


def modality_weights(rho, visual, mask, names=None, s=Weighting()):
    """-Density (Table 8), "text/visual modality boost only": Algorithm 1, all patches at one rho.

    Which one drops out: patches at m and text at beta * m (beta > 1) become rho~ = 0 and 1, so text
    weighs exp(1/tau) times as much. The argument rho is not read.
    """
    even = torch.ones(visual.shape, device=visual.device)
    return density_weights(even, visual, mask, s=replace(s, minmax="all"))


def topk_weights(rho, visual, mask, names=None, s=Weighting()):
    """A.8: BOOST times the weight on the top k % of visual positions by rho; ties to the earlier.
    The rest is "unchanged" up to the factor that keeps sum w = T: only where w goes differs."""
    score = rho.masked_fill(~visual, -math.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)   # (B, T)  0 = densest
    chosen = rank < (visual.sum(1, keepdim=True) * s.k / 100).round()          # (B, T)
    return normalise_weights(1 + (BOOST - 1) * chosen, mask)


def random_weights(rho, visual, mask, names=None, s=Weighting()):
    """A.8, random control: as many positions as topk_weights takes, at random. rho is not read."""
    draws = torch.cat(drawn_by_name(visual, names, s.seed)).to(visual.device)
    return topk_weights(to_positions(draws, visual), visual, mask, s=s)


def shuffled_weights(rho, visual, mask, names=None, s=Weighting()):
    """A control that the paper lacks: C4's weights on the wrong patches. Each sample's rho is in
    random order: text, range and every weight stay, only their places on the page are lost."""
    rows = zip(rho, visual, drawn_by_name(visual, names, s.seed))
    mixed = [row[seen][draw.argsort().to(row.device)] for row, seen, draw in rows]
    return density_weights(to_positions(torch.cat(mixed), visual), visual, mask, s=s)


def rank_weights(rho, visual, mask, names=None, s=Weighting()):
    """A control that the paper lacks, half of what C4 does: its ranking of the patches, while text
    and image keep the shares of the weight that C3 gives them."""
    return normalise_weights(density_weights(rho, visual, mask, s=s), visual) + (mask & ~visual)


def share_weights(rho, visual, mask, names=None, s=Weighting()):
    """The other half: text and image share the weight as in C4, and every patch has the same."""
    w = density_weights(rho, visual, mask, s=s)
    return torch.where(visual, visual_mean(w, visual), w)


def drawn_by_name(visual, names, seed):
    """A uniform random number for every visual position -> list of (n,), one per sample: by seed
    and sample name alone, so the same in every epoch, batch and padding, as density is."""
    if names is None or len(names) != len(visual):
        raise ValueError(f"random weights are drawn by sample name: {len(visual)} rows, names {names}")
    draws = []
    for name, n in zip(names, visual.sum(1).tolist()):
        key = int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:7], "little")
        draws.append(torch.rand(n, generator=torch.Generator().manual_seed(key)))
    return draws


# fn(rho (B, T), visual (B, T), mask (B, T), names [B], settings) -> w (B, T). A weight of your own is
# one function and one row.
WEIGHTS = {
    "uniform":  uniform_weights,     # C2, C3
    "density":  density_weights,     # C4              tau, beta, minmax
    "fisher":   fisher_weights,      # C5              fisher_text, fisher_power, beta
    "modality": modality_weights,    # -Density (A.6)  tau, beta
    "topk":     topk_weights,        # A.8             k
    "random":   random_weights,      # A.8 control     k, seed
    "shuffled": shuffled_weights,    # control         tau, beta, minmax, seed
    "rank":     rank_weights,        # control         tau, beta, minmax
    "share":    share_weights,       # control         tau, beta, minmax
}

# ---- The commands: pictures (Fig. 2), and a corpus into a cache ----------------------------------

def sample_density(teacher, processor, sample):
    """A sample through processor and tower -> Encoded, rho (n_visual,) on the CPU."""
    encoded, like = processor.encode(sample), next(teacher.visual.parameters())
    with torch.no_grad():
        seen = teacher.visual(encoded.pixels.to(like), encoded.grids.to(like.device))
    try:
        rho = densities(teacher, seen, encoded.grids)
    except ValueError as error:
        raise ValueError(f"{sample.where or sample.id}: {error}") from None
    return encoded, rho.cpu()


def draw_sample(teacher, processor, sample, path):
    """Writes the map of a sample's only image. -> its rho (n_visual,)"""
    encoded, rho = sample_density(teacher, processor, sample)
    image = read_image(sample.images[0])                 # upright and on white, as the tower saw it
    draw_map(image, processor.as_map(rho, encoded.grids, image.size)).save(path)
    return rho


def draw_files(paths, teacher, processor, folder):
    """Writes FOLDER/NAME.density.png for every picture."""
    if len({Path(path).stem for path in paths}) < len(paths):
        raise ValueError("two pictures have the same name, and so would their drawings")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in map(Path, paths):
        sample = Sample(path.name, [{"role": "user", "content": [{"type": "image"}]}], [path], "cli")
        target = Path(folder) / f"{path.stem}.density.png"
        rho = draw_sample(teacher, processor, sample, target)
        print(f"{target}: {len(rho)} visual tokens, rho {rho.min():.3f} to {rho.max():.3f}")


def quantisation_error(rho, visual, mask, s=Weighting()):
    """Largest |w4 / w - 1| at one sample's real positions, w4 from 4-bit rho; visual, mask (1, T).

    Half a step is 1/30 of rho~, so exp(rho~/tau) is off by a factor of exp(1/(30 tau)) at most, and
    w, whose sum may be off the other way, by exp(1/(15 tau)): 14.3 % at tau = 0.5.
    """
    exact = to_positions(rho, visual)
    coarse = exact.masked_scatter(visual, dequantise(*quantise(rho)))    # text keeps the exact mean
    w, w4 = (density_weights(score, visual, mask, s=s) for score in (exact, coarse))
    return (w4 / w - 1)[mask].abs().max().item()


def cache_density(path, samples, teacher, processor, skip=False):
    """Writes rho of every sample that has an image; says how coarse four bits are."""
    errors = [0.0]

    def record(name, sample):
        if sample.images:
            encoded, rho = sample_density(teacher, processor, sample)
            visual = visual_positions(encoded.ids, teacher.config)[None]
            errors.append(quantisation_error(rho, visual, torch.ones_like(visual)))
            return name, contents(sample, encoded, "density"), encoded.grids, rho

    made_with = tower_fingerprint(teacher, processor)
    write_cache(path, each(samples, record, skip), made_with)
    print(Cache(path, made_with))
    print(f"4 bits move w by at most {100 * max(errors):.1f} %")


def main():
    parser = argparse.ArgumentParser(description="Draw density maps, or cache a corpus's density.")
    flag = parser.add_argument
    flag("images", nargs="*", help="pictures to draw")
    flag("--teacher", default=str(Path(__file__).parent / "tiny"), help="model folder")
    flag("--out", default=".", help="folder for the drawings")
    flag("--cache", help="write a cache to this file")
    flag("--data", help="the JSONL corpus or recipe it is made from")
    flag("--skip-bad", action="store_true", help="leave out unusable samples, up to 0.1 %% (or ten)")
    flag("--dtype", default="", choices=["", "bfloat16", "float32", "float64"],
         help="as distill.py's: a cache serves runs in the dtype it was made in")
    args = parser.parse_args()
    if bool(args.cache) != bool(args.data) or not (args.images or args.cache):
        parser.error("give pictures to draw, or --cache FILE together with --data FILE")

    device = device_of()
    try:
        teacher = Qwen3VL.from_pretrained(args.teacher, dtype_of(args.dtype, device), device)
        processor = processor_of(args.teacher)
        if args.images:
            draw_files(args.images, teacher, processor, args.out)
        if args.cache:
            cache_density(args.cache, read_data(args.data), teacher, processor, args.skip_bad)
    except (BadSample, ValueError, OSError) as error:
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
