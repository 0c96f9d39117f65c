"""Which positions a hybrid loses, and which ones the answer needs: the diagnosis of Sect. 3, A.7
and B.3.

    python -m paper.diagnose --student out/c1           # the embedded world, 64 pages, some minutes
    python -m paper.diagnose --student out/c1 out/c3 out/c4         # the same, and the drift of two more beside it
    python -m paper.diagnose --teacher Qwen3-VL-8B-Instruct --student out/c1 --data heldout.jsonl
    --images 1000

Each sample with an image (a page) goes once through teacher and student side by side (drift,
attention), once backward through the teacher (the Fisher weights that density stands in for), and
often through the teacher with positions hidden (importance). The rest is statistics, in numpy. It
prints a table of the paper's figures beside ours; that, results.json with all figures, and two
pictures go to paper/results/diagnose.

    code        paper                  shape    unit
    drift       delta_{l,p}, Sect. 3.1 (L, T)   length of student's minus teacher's residual; row l-1 is layer l = 1..L
    size        || r_{l,p} ||          (L, T)   length of the teacher's residual
    attention   teacher attention      (L, T)   what a position receives, a share in 0..1
    rho         rho(p), Eq. 2          (N,)     density of the page's N visual positions, in reading order
    together    a, Fig. 3B             (10,)    nats per answer token: a tenth of the visual positions is hidden
    alone       a_p, Sect. 3.1         (N,)     nats per answer token: one position is hidden
    fisher      || g_{l,p} ||^2, Eq. 7 (S, N)   (nats per unit of residual)^2; S replaced layers, read at S*

The paper writes a_{l,p}; here a position is hidden in all layers at once, so a has no l.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from tqdm import tqdm

from data import IGNORED, BadSample, processor_of, read_data
from density import densities
from distill import drift as squared_drift
from fisher import fisher_scores
from model import Qwen3VL, device_of, dtype_of
from parts.images import read_image
from synthdoc import SUITES, World

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

GROUPS = 10                                               # deciles of density
DRAWS = 1000                                              # bootstrap resamples (A.7)

# --------------------------------------------------------------------------------------------------
# Measuring one page


@dataclass
class Seen:
    """One page's measurements, as in the table above; numpy, float64."""
    name: str
    source: str
    visual: np.ndarray              # (T,) bool
    rho: np.ndarray
    drift: np.ndarray
    size: np.ndarray
    attention: np.ndarray
    together: np.ndarray
    alone: Optional[np.ndarray]     # None where it was not measured: it costs a pass for every position
    fisher: np.ndarray
    image: Image.Image           # the page's first image, and its height and width in visual tokens
    grid: tuple
    said: tuple = ("", "")          # question and answer
    others: dict = field(default_factory=dict)         # {student: drift (L, T)} of the further ones


def attention_received(attention, x, rope, chunk=256):
    """The attention that each position receives, mean over heads and over the queries that may look
    at it, which are its own and all later ones. x (1, T, D), normalised -> (T,) in 0..1. Only chunk
    x T scores exist at once.

    Sect. 3 names "teacher attention concentration" without a formula. Without the mean over queries
    the first positions would lead simply because more queries see them.
    """
    q, k = (heads[0] for heads in attention.heads(x, rope)[:2])                         # (H, T, P), (G, T, P)
    k, T = k.repeat_interleave(len(q) // len(k), dim=0), x.shape[1]
    at, total = torch.arange(T, device=x.device), torch.zeros(T, device=x.device)
    for a in range(0, T, chunk):
        scores = (q[:, a:a + chunk] @ k.mT).float() / q.shape[-1] ** 0.5             # (H, chunk, T)
        total += scores.masked_fill(at > at[a:a + chunk, None], -math.inf).softmax(-1).mean(0).sum(0)
    return total / (T - at)


@torch.no_grad()
def walk(teacher, student, e, own):
    """Both models through all layers, each on its own stream. e, own: their embeddings of one page.

    -> drift, size, attention, each (L, T). As in Eq. 4, streams are read where a layer ends, before
    DeepStack adds to them; unlike there, kept layers are read too, for they carry on what earlier
    ones lost.
    """
    r, s, rows = e.x, own.x, []                                                         # (1, T, D)
    for i, (theirs, ours) in enumerate(zip(teacher.layers, student.layers)):
        seen = attention_received(theirs.self_attn, theirs.input_layernorm(r), e.rope)
        r, s = theirs(r, None, e.rope)[0], ours(s, None, own.rope)[0]
        rows.append(torch.stack([squared_drift(s, r)[0].sqrt(), r[0].float().norm(dim=-1), seen]))
        if i < len(e.deepstack):
            r, s = r + e.deepstack[i], s + own.deepstack[i]
    return torch.stack(rows, dim=1)                                                     # (3, L, T)


@torch.no_grad()
def answer_scores(teacher, e, labels, hidden, at_once=4096):
    """Mean log-probability of the page's answer tokens (nats), once for every row of `hidden` (n,
    T) bool -> (n,).

    A hidden position computes as before, but no later position can attend to it, in any layer. This
    is what the mask does to padding, so the mask is all that changes: position numbers stay, as if
    nothing were missing.
    """
    following = F.pad(labels[1:], (0, 1), value=IGNORED)
    rows, scores = following != IGNORED, []
    for part in hidden.split(max(1, at_once // len(labels))):
        def repeat(t):
            return t.expand(len(part), *t.shape[1:])
        r, rope = repeat(e.x), tuple(map(repeat, e.rope))                               # (n, T, D)
        for i, layer in enumerate(teacher.layers):
            r = layer(r, ~part, rope)[0]
            if i < len(e.deepstack):
                r = r + e.deepstack[i]
        log_p = teacher.lm_head(teacher.norm(r[:, rows])).float().log_softmax(-1)       # (n, answer tokens, V)
        target = following[rows].expand(len(part), -1)[..., None]
        scores.append(log_p.gather(-1, target)[..., 0].mean(1))
    return torch.cat(scores)


def deciles(rho, groups=GROUPS):
    """The group of every position of a page: 0 the least dense tenth, 9 the densest, equal in size
    to one. (N,) int.

    Within a page, so that a group can be hidden together, and hard pages do not pass for dense
    ones. Equal densities go in reading order.
    """
    rank = np.argsort(np.argsort(rho, kind="stable"))
    return rank * groups // len(rho)


def measure(teacher, student, page, image, each, said=("", ""), others=None):
    """An Encoded page with image and answer -> Seen. each: also hide every visual position by
    itself. others: further students {name: model}, of which only the drift is measured."""
    c, weight, others = teacher.config, teacher.lm_head.weight, others or {}
    ids, labels, grids = (t.to(weight.device) for t in (page.ids, page.labels, page.grids))
    pixels, visual = page.pixels.to(weight.device, weight.dtype), ids == c.image_token_id     # (T,)
    with torch.no_grad():
        vision = teacher.visual(pixels, grids)
        e = teacher.embed(ids[None], None, None, grids, vision)
        own = [m.embed(ids[None], None, pixels, grids) for m in (student, *others.values())]     # after SFT their own
    m = c.vision.spatial_merge_size
    rho = densities(teacher, vision, page.grids).cpu()                                        # (N,)
    where, group = visual.nonzero()[:, 0], torch.from_numpy(deciles(rho.numpy())).to(weight.device)
    hidden = torch.zeros(1 + GROUPS + each * len(where), len(ids), dtype=torch.bool, device=weight.device)
    hidden[1 + group, where] = True
    if each:
        hidden[1 + GROUPS + torch.arange(len(where), device=weight.device), where] = True
    score = answer_scores(teacher, e, labels, hidden)
    fall = (score[:1] - score[1:]).cpu().double().numpy()      # a: how far the answer's score falls
    fisher = fisher_scores(teacher, student.config.hybrid["layers"], e, None, labels[None])[:, 0, visual]
    drift, size, attention = walk(teacher, student, e, own[0]).cpu().double().numpy()
    further = {name: walk(teacher, m, e, x)[0].cpu().double().numpy() for (name, m), x in zip(others.items(), own[1:])}
    return Seen(page.id, page.source, visual.cpu().numpy(), rho.double().numpy(), drift, size, attention,
                fall[:GROUPS], fall[GROUPS:] if each else None, fisher.cpu().double().numpy(), image,
                (int(page.grids[0, 1]) // m, int(page.grids[0, 2]) // m), said, further)


# --------------------------------------------------------------------------------------------------
# Statistics: numpy arrays in, numbers out


def spearman(x, y):
    """Rank correlation of (n,) and (n,); nan if one of them is constant."""
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    return math.nan if constant else float(stats.spearmanr(x, y).statistic)


def gram(columns):
    """Z^T Z of Z = [1, columns]: all that a least-squares fit needs to know of a page's rows. (k+1,
    k+1)."""
    Z = np.stack([np.ones_like(columns[0]), *columns])
    return Z @ Z.T


def correlations(g):
    """Gram matrices (..., k+1, k+1) of [1, columns] -> correlations (..., k, k); those of a
    constant are 0, its own too. To regress on standardised predictors, as Sect. 3.2 does, is to
    solve with these."""
    c = g[..., 1:, 1:] - g[..., 1:, :1] * g[..., :1, 1:] / g[..., :1, :1]
    variance, square = (np.diagonal(m, axis1=-2, axis2=-1) for m in (c, g[..., 1:, 1:]))
    inverse = np.where(variance > 1e-12 * square, 1 / np.sqrt(np.maximum(variance, 1e-300)), 0)
    return c * inverse[..., :, None] * inverse[..., None, :]


def fit(c, keep):
    """The last column regressed on the columns `keep`, from correlations (..., k, k) -> R^2 (...),
    slopes in standard deviations (..., len(keep)). Where predictors are collinear, the shortest
    slopes; R^2 does not depend on it. R^2 is nan if the last column is constant."""
    A, b = c[..., keep, :][..., keep], c[..., keep, -1]
    slopes = (np.linalg.pinv(A, 1e-9, True) @ b[..., None])[..., 0]
    return np.where(c[..., -1, -1] > 0, (b * slopes).sum(-1), np.nan), slopes


def semi_partial(g):
    """Gram matrices of [1, k predictors, target] -> joint R^2 (...); (..., k), what each predictor
    explains that the others do not, R^2 with all of them minus R^2 without it (Sect. 3.2); and the
    joint fit's slopes (..., k)."""
    c = correlations(g)
    every = list(range(c.shape[-1] - 1))
    joint, slopes = fit(c, every)
    without = np.stack([fit(c, [i for i in every if i != k])[0] for k in every], axis=-1)
    return joint, np.maximum(joint[..., None] - without, 0), slopes       # below 0 by rounding only


def resamples(n, draws=DRAWS, seed=0):
    """Bootstrap over n pages (A.7): how often each resample has each page, (draws, n). As the Gram
    matrix of a resample is the sum of its pages', `resamples(n) @ grams` fits them all anew,
    exactly."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)


def interval(value, drawn):
    """-> [value, ends of the 95 % interval]."""
    drawn = drawn[np.isfinite(drawn)]
    return [float(value), *map(float, np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan))]


# --------------------------------------------------------------------------------------------------
# The diagnosis: a list of Seen -> figures

PREDICTORS = ("density", "token type", "layer depth", "teacher attention")


@dataclass(frozen=True)
class Reading:
    """Where Sect. 3.2 leaves a choice. The first row of READINGS is what the table shows."""
    text: float = 2.0               # density of a text position over the page's visual mean; 2 is beta of Algorithm 1
    text_too: bool = True        # or visual positions alone, which have no token type to tell apart
    relative: bool = False          # drift over the length of the teacher's residual
    replaced: bool = False          # only the outputs of replaced layers (S*)


READINGS = {
    "all positions and layers":  Reading(),
    "text at the visual mean":   Reading(text=1.0),
    "visual positions only":     Reading(text_too=False),
    "drift over residual size":  Reading(relative=True),
    "replaced layers only":      Reading(replaced=True),
}


def design(one, reading, replaced):
    """A page's rows of the token-level regression: four predictors and the drift, each (rows,)."""
    L, T = one.drift.shape
    density = np.full(T, reading.text * one.rho.mean())
    density[one.visual] = one.rho
    layers = np.array(replaced if reading.replaced else range(L))
    where = np.ones(T, bool) if reading.text_too else one.visual
    target = one.drift / one.size if reading.relative else one.drift
    columns = (density, one.visual.astype(float), layers[:, None] + 1.0, one.attention[layers], target[layers])
    return [np.broadcast_to(c, (len(layers), T))[:, where].ravel() for c in columns]


def regression(pages, reading, replaced):
    """-> joint and unique R^2 with intervals; slopes, for an R^2 does not say whether drift rises
    or falls; and the share of resamples in which density has the largest unique R^2."""
    grams = np.stack([gram(design(one, reading, replaced)) for one in pages])           # (n, 6, 6)
    joint, unique, slopes = semi_partial(grams.sum(0))
    joints, uniques, _ = semi_partial(np.tensordot(resamples(len(pages)), grams, 1))    # (draws,), (draws, 4)
    return dict(joint=interval(joint, joints),
                unique={name: interval(unique[k], uniques[:, k]) for k, name in enumerate(PREDICTORS)},
                slopes=dict(zip(PREDICTORS, slopes.tolist())),
                density_largest=float((uniques[:, :1] > uniques[:, 1:]).all(1).mean()))


def by_decile(values):
    """values (n, 10), a row for each page -> mean over pages with its interval for each decile, and
    top over bottom."""
    means, drawn = values.mean(0), resamples(len(values)) @ values / len(values)
    rows = [interval(m, d) for m, d in zip(means, drawn.T)]
    apart = rows[0][1] > 0                                # a bottom that may be 0 has no ratio
    ratio = interval(means[-1] / means[0], drawn[:, -1] / drawn[:, 0]) if apart else [math.nan] * 3
    return dict(means=rows, ratio=ratio, pages=len(values))


def in_groups(one, values):
    """values (N,) -> (10,) means over the deciles of density."""
    group = deciles(one.rho)
    return np.bincount(group, values) / np.bincount(group)


def spread(values):
    """Over pages: mean, 5th and 95th percentile, and the values, without those that are not
    defined."""
    values = np.array([v for v in values if math.isfinite(v)])
    if not len(values):
        return dict(mean=math.nan, percentiles=[math.nan] * 2, values=[])
    return dict(mean=float(values.mean()), percentiles=np.percentile(values, (5, 95)).tolist(), values=values.tolist())


def fisher_ranks(pages, replaced):
    """B.3: does density rank the visual positions of a page as the gradient does, and does each
    layer as the others?"""
    def top(one):
        dense = np.argsort(-one.rho, kind="stable")[:math.ceil(len(one.rho) / 4)]
        return spearman(one.rho[dense], one.fisher.sum(0)[dense])
    pairs = {f"{a + 1}, {b + 1}": spread([spearman(one.fisher[i], one.fisher[j]) for one in pages])["mean"]
             for i, a in enumerate(replaced) for j, b in enumerate(replaced) if i < j}
    known = [v for v in pairs.values() if math.isfinite(v)] or [math.nan]
    return dict(overall=spread([spearman(one.rho, one.fisher.sum(0)) for one in pages]),         # Eq. 7's sum
                top_quarter=spread([top(one) for one in pages]),
                between_layers=dict(mean=float(np.mean(known)), least=min(known), most=max(known), pairs=pairs))


def diagnose(pages, replaced):
    """All figures of Sect. 3 and B.3, from at least two pages, as one dict for JSON."""
    if len(pages) < 2:
        raise ValueError(f"a bootstrap over pages needs at least 2 of them, but there are {len(pages)}")
    drifts = np.stack([[in_groups(one, row[one.visual]) for row in one.drift] for one in pages])  # (n, L, 10)
    others = {name: np.stack([in_groups(one, one.others[name].mean(0)[one.visual]) for one in pages])
              for name in pages[0].others}
    alone = [one for one in pages if one.alone is not None]
    lines = {"densest tenth": drifts[..., -1], "least dense tenth": drifts[..., 0],
             "text": np.stack([one.drift[:, ~one.visual].mean(1) for one in pages])}
    importance = dict(together=by_decile(np.stack([one.together for one in pages])))
    if len(alone) > 1:
        importance["alone"] = by_decile(np.stack([in_groups(one, one.alone) for one in alone]))
        importance["alone"]["spearman"] = spread([spearman(one.rho, one.alone) for one in alone])
    return dict(pages=len(pages), replaced=list(replaced), drift=by_decile(drifts.mean(1)),
                drift_of_others={name: by_decile(v) for name, v in others.items()},
                drift_by_layer={name: v.mean(0).tolist() for name, v in lines.items()}, importance=importance,
                regression={name: regression(pages, reading, replaced) for name, reading in READINGS.items()},
                fisher=fisher_ranks(pages, replaced))


# --------------------------------------------------------------------------------------------------
# The table: the paper's figures beside ours

PAPER = {"density": "0.30 [0.27, 0.33]", "token type": "0.10 (and 0.04 to 0.06)", "layer depth": "0.08",
         "teacher attention": "0.05", "joint": "0.53"}


def table(results):
    """Markdown. The paper's four unique R^2 add up to its joint one, as they would for predictors
    that are not correlated at all; ours need not."""
    main, fisher = results["regression"]["all positions and layers"], results["fisher"]

    def shown(x, form="{:.2f}"):
        return "not defined" if not math.isfinite(x[0]) else " ".join(
            [form.format(x[0]), "[" + ", ".join(form.format(v) for v in x[1:]) + "]"])

    def tenths(x):
        top, bottom = x["means"][-1], x["means"][0]
        if math.isfinite(x["ratio"][0]):
            return f"{top[0]:.3g} / {bottom[0]:.3g} = {shown(x['ratio'], '{:.3g}')}"
        return f"{shown(top, '{:.3f}')} / {shown(bottom, '{:.3f}')}: the lower may be 0"

    def ranked(x):
        return shown([x["mean"], *x["percentiles"]])
    rows = [("drift, densest / least dense tenth (Fig. 3A)", "0.281 / 0.078 = 3.6", tenths(results["drift"])),
            *((f"the same of {name}", "-", tenths(v)) for name, v in results["drift_of_others"].items()),
            ("answer score, a tenth hidden (Fig. 3B), nats", "0.143 / 0.041 = 3.5",
             tenths(results["importance"]["together"]))]
    if one := results["importance"].get("alone"):
        rows += [("answer score, one position hidden, nats", "-", tenths(one)),
                 ("Spearman of density and that, within a page [5th, 95th]", "-", ranked(one["spearman"]))]
    rows += [(f"unique R² of {name}", PAPER[name], f"{shown(main['unique'][name])}, slope {main['slopes'][name]:+.2f}")
             for name in PREDICTORS]
    rows += [("joint R²", PAPER["joint"], shown(main["joint"])),
             ("density is the largest, share of resamples", "all", f"{100 * main['density_largest']:.1f} %"),
             *((f"the same five R², {name}", "-", ", ".join(f"{v[0]:.2f}" for v in (*r["unique"].values(), r["joint"])))
               for name, r in results["regression"].items() if r is not main),
             ("Spearman of density and Fisher weight [5th, 95th]", "0.63 [0.49, 0.74]", ranked(fisher["overall"])),
             ("the same in the densest quarter", "0.71", ranked(fisher["top_quarter"])),
             ("Spearman of Fisher weights between layers [least, most]", "0.73 [0.61, 0.88]",
              shown([fisher["between_layers"][k] for k in ("mean", "least", "most")]))]
    rows = [(f"{results['pages']} pages", "the paper", "here"), ("---",) * 3, *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --------------------------------------------------------------------------------------------------
# Pictures

# Okabe and Ito's colours, which the colour-blind tell apart
RED, BLUE, GREEN, OCHRE, PALE = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#c4c4cc"
TENTHS = np.arange(1, GROUPS + 1)
PAPER_TENTHS = {"drift": (0.078, 0.281), "together": (0.041, 0.143)}  # Fig. 3: least dense, densest


def draw_charts(results, path):
    """A to C: Fig. 3 with its inset. D: B with single positions. E: drift by layer. F: B.3."""
    figure, axes = plt.subplots(3, 2, figsize=(9, 10), layout="constrained")
    importance, student = results["importance"], results["student"]
    fall = "fall of the teacher's answer score, nats a token"
    drawn = draw_tenths(axes[0, 0], {student: results["drift"]} | results["drift_of_others"])
    axes[0, 0].set(title="A  Residual drift", ylabel=f"|student − teacher|, mean over layers\n({drawn} pages)")
    drawn = draw_tenths(axes[0, 1], {"a tenth hidden": importance["together"]}, PAPER_TENTHS["together"])
    axes[0, 1].set(title="B  Importance of a tenth", ylabel=f"{fall}\n({drawn} pages)")
    if alone := importance.get("alone"):
        drawn = draw_tenths(axes[1, 1], {"one position hidden": alone})
        axes[1, 1].set(title="D  Importance of one position", ylabel=f"{fall}\n({drawn} pages)")
    draw_explained(axes[1, 0], results["regression"]["all positions and layers"])

    lines, layers = results["drift_by_layer"], np.arange(1, len(results["drift_by_layer"]["text"]) + 1)
    for (name, ys), colour in zip(lines.items(), (RED, BLUE, GREEN)):
        axes[2, 0].plot(layers, ys, "o-", color=colour, ms=4, label=name)
    kept = [i for i in layers if i - 1 not in results["replaced"]]
    axes[2, 0].plot(kept, np.zeros(len(kept)), "^", color="black", clip_on=False, label="keeps attention")
    axes[2, 0].set(title=f"E  Residual drift of {student} by layer", xlabel="layer", ylabel="|student − teacher|",
                   ylim=(0, None))
    axes[2, 0].legend(fontsize=8)

    edges = np.linspace(-1, 1, 21)
    names = {"overall": "all visual positions", "top_quarter": "densest quarter"}
    axes[2, 1].hist([[v for v in results["fisher"][key]["values"] if v is not None and math.isfinite(v)] for key in names],
                    edges, color=[RED, BLUE], label=list(names.values()))
    for mean, colour, style in ((0.63, RED, "--"), (0.71, BLUE, ":")):
        axes[2, 1].axvline(mean, color=colour, ls=style, lw=1.5, label=f"the paper's mean, {mean}")
    axes[2, 1].set(title="F  Density and Fisher weight", xlabel="Spearman's rank correlation within a page", ylabel="pages")
    axes[2, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set(size=10, weight="bold")
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
        axis.set_visible(axis.has_data())
    figure.savefig(path, dpi=100, metadata={"Software": None})    # the same figures, the same bytes
    plt.close(figure)


def draw_tenths(axis, named, paper=None):
    """Means by tenth of the visual positions with their 95 % intervals; the paper's outer tenths
    where they are of the same unit. -> of how many pages."""
    named = {name: figures for name, figures in named.items() if figures}
    for (name, figures), colour in zip(named.items(), (RED, BLUE, GREEN, OCHRE)):
        mean, low, high = np.array(figures["means"], dtype=float).T
        axis.fill_between(TENTHS, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(TENTHS, mean, "o-", color=colour, ms=4, label=name)
    if paper:
        axis.plot((1, GROUPS), paper, "D", color="black", mfc="none", label="the paper")
    axis.set(xlabel="tenth of the visual positions, 1 the least dense", xticks=TENTHS)
    axis.legend(fontsize=8)
    return min(figures["pages"] for figures in named.values())


def draw_explained(axis, fit):
    """What each predictor explains of drift that the others do not, beside the paper's."""
    rows = np.array([*fit["unique"].values(), fit["joint"]], dtype=float)
    places = np.arange(len(rows))
    axis.bar(places - 0.2, rows[:, 0], 0.38, color=RED, label="here, 95 % interval",
             yerr=np.abs(rows[:, 1:] - rows[:, :1]).T, error_kw=dict(lw=1, capsize=3))
    axis.bar(places + 0.2, [float(v.split()[0]) for v in PAPER.values()], 0.38, color=PALE, label="the paper")
    axis.set_xticks(places, ["density", "token type", "layer depth", "attention", "all four"])
    axis.set(title="C  What explains drift", ylabel="share of its variance (semi-partial R²)")
    axis.legend(fontsize=8)


def draw_pages(pages, path, count=4):
    """The first pages: picture, density, drift (mean over layers) and importance, one square per
    visual token; above each its question and answer. Of several images the first."""
    pages = pages[:count]
    head = ["density", "drift"] + ["importance"] * (pages[0].alone is not None)
    figure, axes = plt.subplots(len(pages), len(head) + 1, figsize=(2.2 * len(head) + 2.4, 2.5 * len(pages)),
                                squeeze=False, layout="constrained")
    for row, one in zip(axes, pages):
        (h, w), maps = one.grid, (one.rho, one.drift[:, one.visual].mean(0), one.alone)
        question, answer = (" ".join(text.split())[:48] for text in one.said)
        row[0].imshow(one.image)
        row[0].set_title(f"{question} {answer}", size=7)
        for axis, name, values in zip(row[1:], head, maps):
            if values is not None:
                axis.imshow(values[:h * w].reshape(h, w), cmap="Greys")
            axis.set_title(f"{name}{' (not measured)' * (values is None)}", size=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.supxlabel("Each map is white at its least value and black at its largest.", size=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# Command line


def load(a):
    """-> teacher, {name: student}, processor; or a ValueError that says why these cannot be
    compared."""
    device = device_of(a.device)
    dtype = dtype_of(a.dtype, device)
    teacher, *students = (Qwen3VL.from_pretrained(f, dtype, device).requires_grad_(False)
                          for f in (a.teacher, *a.student))
    if teacher.config.Tower:
        raise ValueError(f"--teacher {a.teacher} is no Qwen3-VL, of whose grid of patches the maps are drawn")
    for folder, student in zip(a.student, students):
        if teacher.config.hybrid or not student.config.hybrid:
            raise ValueError(f"--teacher {a.teacher} must be a model with attention in all layers, and --student "
                             f"{folder} a hybrid that distill.py saved")
        ours, theirs = student.visual.blocks.state_dict(), teacher.visual.blocks.state_dict()
        if student.config.text != teacher.config.text or ours.keys() != theirs.keys() or \
                not all(torch.equal(ours[k], theirs[k]) for k in ours):
            raise ValueError(f"--student {folder} does not come from --teacher {a.teacher}: their decoders' settings or "
                             "their vision towers differ")
    named = {Path(folder).name: student for folder, student in zip(a.student, students)}
    if len(named) < len(students):
        raise ValueError("--student: folders are told apart by their last part, which two of them share")
    return teacher, named, processor_of(a.teacher)


def pages(a, processor):
    """Samples with an answer and at least ten visual tokens, for a decile must hold one: (Encoded,
    first image, its last question and answer). In the embedded world half are for reading and half
    for reasoning, from a seed that evaluate.py does not ask about."""
    if a.data:
        data = read_data(a.data)
        samples = (data[i] for i in range(len(data)))
    else:
        worlds = [World("eval", a.seed, suite) for suite in SUITES]
        samples = (worlds[i % len(worlds)][i // len(worlds)] for i in range(10 ** 6))
    for sample in samples:
        page = processor.encode(sample) if sample.images else None
        if page and (page.ids == processor.special["image_pad"]).sum() >= GROUPS and (page.labels != IGNORED).any():
            first = sample.images[0]
            image = read_image(first)
            image.thumbnail((400, 400))                   # a copy, for draw_pages
            texts = [part["text"] for m in sample.messages for part in m["content"] if part["type"] == "text"]
            yield page, image, (["", *texts[-2:]])[-2:]


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default="tiny", help="model folder")
    p.add_argument("--student", required=True, nargs="+", help="folder of a hybrid made from that teacher; the paper "
                   "takes C1; of further ones only the drift is shown beside it")
    p.add_argument("--data", help="file of held-out samples (data.py); default: the embedded world")
    p.add_argument("--images", type=int, default=64, help="pages to look at; the paper has 1,000")
    p.add_argument("--alone", type=int, default=16,
                   help="of these, pages where each visual position is hidden by itself: a teacher pass for each")
    p.add_argument("--seed", type=int, default=1, help="of the embedded world; evaluate.py asks about 0")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, else float32")
    p.add_argument("--out", type=Path, default=Path("paper/results/diagnose"))
    a = p.parse_args(arguments)
    try:                                            # user errors end in a sentence, not a traceback
        if a.images < 2 or a.alone < 0:
            raise ValueError(f"--images must be at least 2 and --alone at least 0, but are {a.images} and {a.alone}")
        teacher, students, processor = load(a)
        (first, student), *others = students.items()
        seen, found = [], pages(a, processor)
        for n in tqdm(range(a.images), unit=" pages"):
            if (page := next(found, None)) is None:
                print(f"{a.data} has only {n} samples with an answer and at least {GROUPS} visual tokens")
                break
            encoded, image, said = page
            seen.append(measure(teacher, student, encoded, image, n < a.alone, said, dict(others)))
        results = dict(teacher=str(a.teacher), student=first, data=a.data or f"embedded world, seed {a.seed}",
                       **diagnose(seen, student.config.hybrid["layers"]))
    except (ValueError, OSError, BadSample) as error:
        sys.exit(str(error))
    a.out.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(results), parse_constant=lambda _: None)         # JSON has no nan
    (a.out / "results.json").write_text(json.dumps(plain, indent=1) + "\n")
    (a.out / "table.md").write_text((text := table(results)) + "\n", encoding="utf-8")
    draw_charts(results, a.out / "charts.png")
    draw_pages(seen, a.out / "pages.png")
    print(f"{text}\n\n{a.out} holds results.json, table.md, charts.png and pages.png")


if __name__ == "__main__":
    main()
