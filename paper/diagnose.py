"""Which positions a hybrid loses, and which ones the answer needs: the diagnosis of Sect. 3, A.7
and B.3.

    python -m paper.diagnose --student out/c1           # the embedded world, 64 pages, some minutes
    python -m paper.diagnose --student out/c1 out/c3 out/c4         # and the drift of two more
    python -m paper.diagnose --teacher Qwen3-VL-8B-Instruct --student out/c1 --data heldout.jsonl

Each sample with an image (a page) goes once through teacher and student side by side (drift,
attention), once backward through the teacher (the Fisher weights that density stands in for), and
often through the teacher with positions hidden (importance). The rest is statistics, in numpy. It
prints a table of the paper's figures beside ours; that, results.json with all figures, and two
pictures go to paper/results/diagnose.

    code        paper                  shape    unit
    drift       delta_{l,p}, Sect. 3.1 (L, T)   length of student's minus teacher's residual;
                                                row l-1 is layer l = 1..L
    size        || r_{l,p} ||          (L, T)   length of the teacher's residual
    turn        -                      (L, T)   1 - cosine of student's and teacher's residual
    attention   teacher attention      (L, T)   what a position receives, a share in 0..1
    rho         rho(p), Eq. 2          (N,)     density of the N visual positions, in reading order
    together    a, Fig. 3B             (10,)    how far the answer's score falls, nats a token, when
                                                a tenth of the visual positions is hidden
    alone       a_p, Sect. 3.1         (N,)     the same, when one position is hidden
    fisher      || g_{l,p} ||^2, Eq. 7 (S, N)   (nats per unit of residual)^2; S replaced layers,
                                                read at S*

The paper writes a_{l,p}; here a position is hidden in all layers at once, so a has no l.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Callable, Optional

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
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

SEED = 1                                                  # of the world; evaluate.py asks about 0
GROUPS = 10                                               # deciles of density
DRAWS = 1000                                              # bootstrap resamples (A.7)

# --------------------------------------------------------------------------------------------------
# Measuring one page


@dataclass
class Seen:
    """One page's measurements, as in the table above; numpy, float64."""
    visual: np.ndarray              # (T,) bool
    rho: np.ndarray
    drift: np.ndarray
    size: np.ndarray
    turn: np.ndarray
    attention: np.ndarray
    together: np.ndarray
    alone: Optional[np.ndarray]     # None where not measured: it costs a pass for every position
    fisher: np.ndarray
    on_page: Callable               # (N,) -> (rows, columns), of the first image
    others: dict                    # {student: (drift, turn)} of the further ones
    shown: tuple                    # the first image, the question and its answer


def attention_received(attention, x, rope, chunk=256):
    """The attention that each position receives, mean over heads and over the queries that may look
    at it, which are its own and all later ones. x (1, T, D), normalised -> (T,) in 0..1. Only chunk
    x T scores exist at once.

    Sect. 3 names "teacher attention concentration" without a formula. Without the mean over queries
    the first positions would lead simply because more queries see them.
    """
    q, k = (heads[0] for heads in attention.heads(x, rope)[:2])                # (H or G, T, P)
    k, T = k.repeat_interleave(len(q) // len(k), dim=0), x.shape[1]
    at, total = torch.arange(T, device=x.device), torch.zeros(T, device=x.device)
    for a in range(0, T, chunk):
        scores = (q[:, a:a + chunk] @ k.mT).float() / q.shape[-1] ** 0.5             # (H, chunk, T)
        shares = scores.masked_fill(at > at[a:a + chunk, None], -math.inf).softmax(-1)
        total += shares.mean(0).sum(0)
    return total / (T - at)


@torch.no_grad()
def walk(teacher, student, e, own):
    """Both models through all layers, each on its own stream. e, own: their embeddings of one page.

    -> drift, size, turn, attention, each (L, T). As in Eq. 4, streams are read where a layer ends,
    before DeepStack adds to them; unlike there, kept layers are read too, for they carry on what
    earlier ones lost.
    """
    r, s, rows = e.x, own.x, []                                                         # (1, T, D)
    for i, (theirs, ours) in enumerate(zip(teacher.layers, student.layers)):
        seen = attention_received(theirs.self_attn, theirs.input_layernorm(r), e.rope)
        r, s = theirs(r, None, e.rope)[0], ours(s, None, own.rope)[0]
        drift, size = squared_drift(s, r)[0].sqrt(), r[0].float().norm(dim=-1)          # (T,)
        turn = 1 - F.cosine_similarity(s[0].float(), r[0].float(), dim=-1)
        rows.append(torch.stack([drift, size, turn, seen]))
        if i < len(e.deepstack):
            r, s = r + e.deepstack[i], s + own.deepstack[i]
    return torch.stack(rows, dim=1)                                                     # (4, L, T)


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
        log_p = teacher.lm_head(teacher.norm(r[:, rows])).float().log_softmax(-1)  # (n, answer, V)
        target = following[rows].expand(len(part), -1)[..., None]
        scores.append(log_p.gather(-1, target)[..., 0].mean(1))
    return torch.cat(scores)


def deciles(rho):
    """The group of every position of a page: 0 the least dense tenth, 9 the densest, equal in size
    to one. (N,) int.

    Within a page, so that a group can be hidden together, and hard pages do not pass for dense
    ones. Equal densities go in reading order.
    """
    rank = np.argsort(np.argsort(rho, kind="stable"))
    return rank * GROUPS // len(rho)


def measure(teacher, students, page, on_page, shown, each):
    """An Encoded page with image and answer -> Seen. students: {name: model}; of all but the first
    only drift and turn are measured. each: also hide every visual position by itself."""
    c, weight, (first, *names) = teacher.config, teacher.lm_head.weight, students
    device = weight.device
    ids, labels, grids = (t.to(device) for t in (page.ids, page.labels, page.grids))
    pixels, visual = page.pixels.to(device, weight.dtype), ids == c.image_token_id            # (T,)
    with torch.no_grad():
        vision = teacher.visual(pixels, grids)
        e = teacher.embed(ids[None], None, None, grids, vision)
        walked = {}                                       # {student: (4, L, T)}
        for name, student in students.items():
            own = student.embed(ids[None], None, pixels, grids)      # after SFT not the teacher's
            walked[name] = walk(teacher, student, e, own).cpu().double().numpy()
    rho = densities(teacher, vision, page.grids).double().cpu().numpy()               # (N,)
    where, group = visual.nonzero()[:, 0], torch.from_numpy(deciles(rho)).to(device)
    single = torch.arange(len(where) if each else 0, device=device)
    hidden = torch.zeros(1 + GROUPS + len(single), len(ids), dtype=torch.bool, device=device)
    hidden[1 + group, where] = True
    hidden[1 + GROUPS + single, where[single]] = True
    score = answer_scores(teacher, e, labels, hidden)
    fall = (score[:1] - score[1:]).cpu().double().numpy()      # a: how far the answer's score falls
    fisher = fisher_scores(teacher, students[first].config.hybrid["layers"], e, None, labels[None])
    fisher = fisher[:, 0, visual].cpu().double().numpy()                                  # (S, N)
    return Seen(visual.cpu().numpy(), rho, *walked[first], together=fall[:GROUPS],
                alone=fall[GROUPS:] if each else None, fisher=fisher,
                on_page=on_page, others={name: walked[name][[0, 2]] for name in names}, shown=shown)


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


def resamples(n):
    """Bootstrap over n pages (A.7): how often each resample has each page, (draws, n). As the Gram
    matrix of a resample is the sum of its pages', `resamples(n) @ grams` fits them all anew,
    exactly."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)


def interval(value, drawn):
    """-> [value, ends of the 95 % interval]."""
    drawn = drawn[np.isfinite(drawn)]
    ends = np.percentile(drawn, (2.5, 97.5)).tolist() if len(drawn) else [math.nan] * 2
    return [float(value), *ends]


# --------------------------------------------------------------------------------------------------
# The diagnosis: a list of Seen -> figures

PREDICTORS = ("density", "token type", "layer depth", "teacher attention")
READINGS = {              # where Sect. 3.2 leaves a choice: `design`'s; the table shows the first
    "all positions and layers": dict(),
    "text at the visual mean": dict(text=1.0),
    "visual positions only": dict(text_too=False),
    "drift over residual size": dict(relative=True),
    "replaced layers only": dict(every_layer=False),
}


def design(one, replaced, text=2.0, text_too=True, relative=False, every_layer=True):
    """A page's rows of the token-level regression: four predictors and the drift, each (rows,).

    text: density of a text position over the page's visual mean; 2 is beta of Algorithm 1. Visual
    positions alone have no token type to tell apart. relative: drift over the length of the
    teacher's residual. replaced: the layers of S*.
    """
    L, T = one.drift.shape
    density = np.full(T, text * one.rho.mean())
    density[one.visual] = one.rho
    layers = np.array(range(L) if every_layer else replaced)
    where = np.ones(T, bool) if text_too else one.visual
    target = one.drift / one.size if relative else one.drift
    columns = (density, one.visual.astype(float), layers[:, None] + 1.0, one.attention[layers],
               target[layers])
    return [np.broadcast_to(c, (len(layers), T))[:, where].ravel() for c in columns]


def regression(pages, replaced, reading):
    """-> joint and unique R^2 with intervals; slopes, for an R^2 does not say whether drift rises
    or falls; and the share of resamples in which density has the largest unique R^2."""
    grams = np.stack([gram(design(one, replaced, **reading)) for one in pages])         # (n, 6, 6)
    joint, unique, slopes = semi_partial(grams.sum(0))                            # (), (4,), (4,)
    joints, uniques, _ = semi_partial(np.tensordot(resamples(len(pages)), grams, 1))
    return dict(joint=interval(joint, joints),
                unique=dict(zip(PREDICTORS, map(interval, unique, uniques.T))),
                slopes=dict(zip(PREDICTORS, slopes.tolist())),
                density_largest=float((uniques[:, :1] > uniques[:, 1:]).all(1).mean()))


def by_decile(values):
    """values (n, 10), a row for each page -> mean over pages with its interval for each decile, and
    top over bottom."""
    means, drawn = values.mean(0), resamples(len(values)) @ values / len(values)
    rows = [interval(m, d) for m, d in zip(means, drawn.T)]
    ratio = [math.nan] * 3                                # a bottom that may be 0 has none
    if rows[0][1] > 0:
        ratio = interval(means[-1] / means[0], drawn[:, -1] / drawn[:, 0])
    return dict(means=rows, ratio=ratio, pages=len(values))


def in_groups(one, values):
    """values (N,) -> (10,) means over the deciles of density."""
    group = deciles(one.rho)
    return np.bincount(group, values) / np.bincount(group)


MEASURES = {"length": "", "relative": ", over the residual's length", "turn": ", as 1 - cosine"}


def drift_by_decile(pages, other=None):
    """A student's drift, mean over layers, by three measures: its length, as the paper's delta has
    it; over the length of the teacher's residual; and by direction alone. Lengths of streams differ
    from position to position, and where a stream is long a small turn is a long way."""
    rows = {measure: [] for measure in MEASURES}
    for one in pages:
        drift, turn = one.others[other] if other else (one.drift, one.turn)
        for measure, values in zip(MEASURES, (drift, drift / one.size, turn)):
            rows[measure].append(in_groups(one, values.mean(0)[one.visual]))
    return {measure: by_decile(np.stack(values)) for measure, values in rows.items()}


def spread(values):
    """Over pages: mean, 5th and 95th percentile, and the values, without those that are not
    defined."""
    values = np.array([v for v in values if math.isfinite(v)])
    if not len(values):
        return dict(mean=math.nan, percentiles=[math.nan] * 2, values=[])
    return dict(mean=float(values.mean()), percentiles=np.percentile(values, (5, 95)).tolist(),
                values=values.tolist())


def fisher_ranks(pages, replaced):
    """B.3: does density rank the visual positions of a page as the gradient does (Eq. 7's sum over
    layers), and does each layer as the others?"""
    def top(one):
        dense = np.argsort(-one.rho, kind="stable")[:math.ceil(len(one.rho) / 4)]
        return spearman(one.rho[dense], one.fisher.sum(0)[dense])
    pairs = {f"{replaced[i] + 1}, {replaced[j] + 1}":
             spread([spearman(one.fisher[i], one.fisher[j]) for one in pages])["mean"]
             for i, j in combinations(range(len(replaced)), 2)}
    known = [v for v in pairs.values() if math.isfinite(v)] or [math.nan]
    return dict(overall=spread([spearman(one.rho, one.fisher.sum(0)) for one in pages]),
                top_quarter=spread([top(one) for one in pages]),
                between_layers=dict(mean=float(np.mean(known)), least=min(known), most=max(known),
                                    pairs=pairs))


def diagnose(pages, replaced):
    """All figures of Sect. 3 and B.3 as one dict for JSON. On at least two pages every position was
    hidden by itself."""
    alone = [one for one in pages if one.alone is not None]
    if len(alone) < 2:
        raise ValueError(f"a bootstrap over pages needs at least 2, but there are {len(alone)}")
    drifts, sizes = (np.stack([[in_groups(one, row[one.visual]) for row in getattr(one, what)]
                               for one in pages]) for what in ("drift", "size"))        # (n, L, 10)
    lines = {"densest tenth": drifts[..., -1], "least dense tenth": drifts[..., 0],         # (n, L)
             "text": np.stack([one.drift[:, ~one.visual].mean(1) for one in pages])}
    single = by_decile(np.stack([in_groups(one, one.alone) for one in alone]))
    single["spearman"] = spread([spearman(one.rho, one.alone) for one in alone])
    return dict(pages=len(pages), replaced=list(replaced), drift=drift_by_decile(pages),
                drift_of_others={name: drift_by_decile(pages, name) for name in pages[0].others},
                size_by_layer={"densest tenth": sizes.mean(0)[:, -1].tolist(),
                               "least dense tenth": sizes.mean(0)[:, 0].tolist()},
                drift_by_layer={name: v.mean(0).tolist() for name, v in lines.items()},
                importance=dict(together=by_decile(np.stack([one.together for one in pages])),
                                alone=single),
                regression={name: regression(pages, replaced, r) for name, r in READINGS.items()},
                fisher=fisher_ranks(pages, replaced))


# --------------------------------------------------------------------------------------------------
# The table: the paper's figures beside ours

PAPER = {"density": "0.30 [0.27, 0.33]", "token type": "0.10 (and 0.04 to 0.06)",
         "layer depth": "0.08", "teacher attention": "0.05", "joint": "0.53"}


def shown(x, form="{:.2f}"):
    """A value and the ends of its interval."""
    value, low, high = map(form.format, x)
    return f"{value} [{low}, {high}]" if math.isfinite(x[0]) else "not defined"


def tenths(x):
    """What `by_decile` found: the densest over the least dense."""
    top, bottom = x["means"][-1], x["means"][0]
    if math.isfinite(x["ratio"][0]):
        return f"{top[0]:.3g} / {bottom[0]:.3g} = {shown(x['ratio'], '{:.3g}')}"
    return f"{shown(top, '{:.3f}')} / {shown(bottom, '{:.3f}')}: the lower may be 0"


def ranked(x):
    """What `spread` found."""
    return shown([x["mean"], *x["percentiles"]])


def table(results):
    """Markdown. The paper's four unique R^2 add up to its joint one, as they would for predictors
    that are not correlated at all; ours need not."""
    importance, fisher = results["importance"], results["fisher"]
    main, *others = results["regression"].values()
    between = fisher["between_layers"]
    rows = [(f"{results['pages']} pages", "the paper", "here"), ("---",) * 3,
            ("drift, densest / least dense tenth (Fig. 3A)", "0.281 / 0.078 = 3.6",
             tenths(results["drift"]["length"]))]
    students = {"": results["drift"]}
    students |= {f" of {name}": figures for name, figures in results["drift_of_others"].items()}
    rows += [(f"the same{of}{words}", "-", tenths(figures[measure]))
             for measure, words in MEASURES.items() for of, figures in students.items()
             if of or words]
    sizes = zip(*results["size_by_layer"].values())
    rows += [("length of the teacher's residual, by layer", "-",
              ", ".join(f"{top:.0f} / {bottom:.0f}" for top, bottom in sizes)),
             ("answer score, a tenth hidden (Fig. 3B), nats", "0.143 / 0.041 = 3.5",
              tenths(importance["together"])),
             ("answer score, one position hidden, nats", "-", tenths(importance["alone"])),
             ("Spearman of density and that, within a page [5th, 95th]", "-",
              ranked(importance["alone"]["spearman"]))]
    rows += [(f"unique R² of {name}", PAPER[name],
              f"{shown(main['unique'][name])}, slope {main['slopes'][name]:+.2f}")
             for name in PREDICTORS]
    rows += [("joint R²", PAPER["joint"], shown(main["joint"])),
             ("density is the largest, share of resamples", "all",
              f"{100 * main['density_largest']:.1f} %")]
    rows += [(f"the same five R², {name}", "-",
              ", ".join(f"{v[0]:.2f}" for v in (*r["unique"].values(), r["joint"])))
             for name, r in zip([*results["regression"]][1:], others)]
    rows += [("Spearman of density and Fisher weight [5th, 95th]", "0.63 [0.49, 0.74]",
              ranked(fisher["overall"])),
             ("the same in the densest quarter", "0.71", ranked(fisher["top_quarter"])),
             ("Spearman of Fisher weights between layers [least, most]", "0.73 [0.61, 0.88]",
              shown([between["mean"], between["least"], between["most"]]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# --------------------------------------------------------------------------------------------------
# Pictures

# Okabe and Ito's colours, which the colour-blind tell apart
COLOURS = RED, BLUE, GREEN, OCHRE, PINK = "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7"
PALE = "#c4c4cc"
TENTHS = np.arange(1, GROUPS + 1)


def draw_charts(results, path):
    """A to C: Fig. 3 with its inset. D: B with single positions. E: drift by layer. F: B.3."""
    figure, axes = plt.subplots(3, 2, figsize=(9, 10), layout="constrained")
    importance, student = results["importance"], results["student"]
    fall = "fall of the teacher's answer score, nats a token"
    students = {student: results["drift"]} | results["drift_of_others"]
    draw_tenths(axes[0, 0], "A  Residual drift over the residual's length",
                "|student − teacher| / |teacher|",
                {name: figures["relative"] for name, figures in students.items()})
    axes[0, 0].plot((1, GROUPS), (0.078, 0.281), "D", color="black", mfc="none", label="the paper")
    draw_tenths(axes[0, 1], "B  Importance of a tenth", fall,
                {"a tenth hidden": importance["together"]})
    axes[0, 1].plot((1, GROUPS), (0.041, 0.143), "D", color="black", mfc="none", label="the paper")
    draw_explained(axes[1, 0], [*results["regression"].values()][0])
    draw_tenths(axes[1, 1], "D  Importance of one position", fall,
                {"one position hidden": importance["alone"]})
    draw_layers(axes[2, 0], f"E  Residual drift of {student} by layer", results["drift_by_layer"],
                results["replaced"])
    draw_ranks(axes[2, 1], results["fisher"])
    for axis in axes.flat:
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set(size=10, weight="bold")
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    figure.savefig(path, dpi=100, metadata={"Software": None})    # the same figures, the same bytes
    plt.close(figure)


def draw_tenths(axis, title, unit, named):
    """Means by tenth of the visual positions with their 95 % intervals."""
    for (name, figures), colour in zip(named.items(), COLOURS):
        mean, low, high = np.array(figures["means"]).T
        axis.fill_between(TENTHS, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(TENTHS, mean, "o-", color=colour, ms=4, label=name)
    axis.set(title=title, ylabel=f"{unit}\n({figures['pages']} pages)", xticks=TENTHS,
             xlabel="tenth of the visual positions, 1 the least dense")


def draw_explained(axis, fit):
    """What each predictor explains of drift that the others do not, beside the paper's."""
    rows = np.array([*fit["unique"].values(), fit["joint"]])
    places = np.arange(len(rows))
    axis.bar(places - 0.2, rows[:, 0], 0.38, color=RED, label="here, 95 % interval",
             yerr=np.abs(rows[:, 1:] - rows[:, :1]).T, error_kw=dict(lw=1, capsize=3))
    axis.bar(places + 0.2, [float(v.split()[0]) for v in PAPER.values()], 0.38, color=PALE,
             label="the paper")
    axis.set_xticks(places, ["density", "token type", "layer depth", "attention", "all four"])
    axis.set(title="C  What explains drift", ylabel="share of its variance (semi-partial R²)")


def draw_layers(axis, title, lines, replaced):
    layers = np.arange(1, len(lines["text"]) + 1)
    for (name, ys), colour in zip(lines.items(), (RED, BLUE, GREEN)):
        axis.plot(layers, ys, "o-", color=colour, ms=4, label=name)
    kept = [i for i in layers if i - 1 not in replaced]
    axis.plot(kept, np.zeros(len(kept)), "^", color="black", clip_on=False, label="keeps attention")
    axis.set(title=title, xlabel="layer", ylabel="|student − teacher|", ylim=(0, None))


def draw_ranks(axis, fisher):
    axis.hist([fisher[key]["values"] for key in ("overall", "top_quarter")], np.linspace(-1, 1, 21),
              color=[RED, BLUE], label=["all visual positions", "densest quarter"])
    for mean, colour, style in ((0.63, RED, "--"), (0.71, BLUE, ":")):
        axis.axvline(mean, color=colour, ls=style, lw=1.5, label=f"the paper's mean, {mean}")
    axis.set(title="F  Density and Fisher weight", ylabel="pages",
             xlabel="Spearman's rank correlation within a page")


def draw_pages(pages, path):
    """Picture, density, drift (mean over layers) and importance of up to four pages, one square per
    visual token; above each its question and answer. Of several images the first."""
    pages = [one for one in pages if one.alone is not None][:4]
    figure, axes = plt.subplots(len(pages), 4, figsize=(9, 2.5 * len(pages)), layout="constrained")
    for row, one in zip(axes, pages):
        image, *said = one.shown
        row[0].imshow(image)
        row[0].set_title(" ".join(" ".join(text.split())[:48] for text in said), size=7)
        maps = dict(density=one.rho, drift=one.drift[:, one.visual].mean(0), importance=one.alone)
        for axis, (name, values) in zip(row[1:], maps.items()):
            axis.imshow(one.on_page(values), cmap="Greys")
            axis.set_title(name, size=8)
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
    teacher, *students = (
        Qwen3VL.from_pretrained(folder, dtype_of("", device), device).requires_grad_(False)
        for folder in (a.teacher, *a.student))

    def frozen(model):                                    # of the tower; SFT trains the mergers
        return {n: p for n, p in model.visual.state_dict().items() if "merger" not in n}
    tower = frozen(teacher)
    for folder, student in zip(a.student, students):
        if teacher.config.hybrid or not student.config.hybrid:
            raise ValueError(f"--teacher {a.teacher} must be a model with attention in all layers, "
                             f"and --student {folder} a hybrid that distill.py saved")
        own = frozen(student)
        if student.config.text != teacher.config.text or own.keys() != tower.keys() or \
                not all(torch.equal(own[k], tower[k]) for k in own):
            raise ValueError(f"--student {folder} does not come from --teacher {a.teacher}: their "
                             "decoders' settings or their vision towers differ")
    named = {Path(folder).name: student for folder, student in zip(a.student, students)}
    if len(named) < len(students):
        raise ValueError("--student: folders are told apart by their last part, which two of them "
                         "share")
    return teacher, named, processor_of(a.teacher)


def pages(data, processor):
    """Samples with an answer and at least ten visual tokens, for a decile must hold one: (Encoded,
    what lays out values on its first image, (that image, its last question and answer)). data: a
    file, or None for the embedded world, half for reading and half for reasoning."""
    if data:
        rows = read_data(data)
        samples = (rows[i] for i in range(len(rows)))
    else:
        samples = chain.from_iterable(zip(*(World("eval", SEED, suite) for suite in SUITES)))
    for sample in samples:
        page = processor.encode(sample) if sample.images else None
        if not page or (page.labels == IGNORED).all() or \
                (page.ids == processor.special["image_pad"]).sum() < GROUPS:
            continue
        sizes = [processor.size(image) for image in sample.images]
        where = page.grids, sizes[0], processor.shared_limit(sizes)

        def on_page(values, where=where):
            return processor.as_map(torch.from_numpy(values), *where).numpy()
        image = read_image(sample.images[0])
        image.thumbnail((400, 400))                       # a copy, for draw_pages
        said = ["", *(part["text"] for m in sample.messages for part in m["content"]
                      if part["type"] == "text")]
        yield page, on_page, (image, *said[-2:])


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default="tiny", help="model folder")
    p.add_argument("--student", required=True, nargs="+", help="folder of a hybrid made from that "
                   "teacher; the paper takes C1; of further ones only the drift is shown beside it")
    p.add_argument("--data", help="file of held-out samples (data.py); default: the embedded world")
    p.add_argument("--images", type=int, default=64, help="pages to look at; the paper has 1,000")
    p.add_argument("--alone", type=int, default=16, help="of these, pages where each visual "
                   "position is hidden by itself: a teacher pass for each")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda where there is one")
    p.add_argument("--out", type=Path, default=Path("paper/results/diagnose"))
    a = p.parse_args(arguments)
    try:                                            # user errors end in a sentence, not a traceback
        if min(a.images, a.alone) < 2:
            raise ValueError("--images and --alone must be at least 2, but are "
                             f"{a.images} and {a.alone}")
        teacher, students, processor = load(a)
        found = islice(pages(a.data, processor), a.images)
        seen = [measure(teacher, students, *page, n < a.alone)
                for n, page in enumerate(tqdm(found, total=a.images, unit=" pages"))]
        (first, student), *_ = students.items()
        results = dict(teacher=a.teacher, student=first,
                       data=a.data or f"embedded world, seed {SEED}",
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
