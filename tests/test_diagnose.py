"""diagnose.py against scipy, plain least squares, transformers' attention maps, and sequences that are really
shorter. Run: pytest tests/test_diagnose.py"""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from paper import diagnose
from data import IGNORED, Processor
from density import image_densities
from paper.diagnose import READINGS, Seen, deciles, design, gram, regression, resamples, semi_partial, spearman
from model import Qwen3VL, to_hybrid
from synthdoc import World

ROOT = Path(diagnose.__file__).parents[1]


@pytest.fixture(scope="module")
def models():
    """The embedded teacher, a fresh hybrid of it, and two encoded pages of 21 and 100 visual tokens."""
    teacher = Qwen3VL.from_pretrained(ROOT / "tiny", torch.float32).requires_grad_(False)
    processor = Processor(ROOT / "tiny")
    processor.min_pixels = 3 * 7 * 16 ** 2
    pages = [processor.encode(World("eval", 5, "receipt", cells=c)[0]) for c in ((3, 7), (10, 10))]
    return teacher, to_hybrid(teacher).requires_grad_(False), pages


def embedded(model, page):
    return model.embed(page.ids[None], None, page.pixels, page.grids)


def made_up(n, seed=0, layers=3):
    """n pages of random measurements, whose drift depends on all four predictors."""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        T = int(rng.integers(24, 40))
        visual = np.zeros(T, bool)
        visual[3:3 + int(rng.integers(12, 20))] = True
        rho, attention = rng.gamma(2, 0.1, visual.sum()), rng.gamma(1, 0.02, (layers, T))
        density = np.full(T, 0.4)
        density[visual] = rho
        drift = density + 0.2 * visual + 0.1 * np.arange(layers)[:, None] + attention + rng.gamma(2, 0.1, (layers, T))
        out.append(Seen(visual, rho, drift, rng.gamma(9, 1, (layers, T)), drift / 9, attention,
                        np.sort(rng.normal(0.5, 1, 10)), rho + rng.normal(0, 0.1, len(rho)),
                        rng.gamma(1, 1, (2, len(rho))) * rho, lambda values: values[None], {},
                        (Image.new("RGB", (9, 9)), "question?", "answer")))
    return out


# ---------------------------------------------------------------------------------------------------------
# Statistics


def test_spearman_is_pearsons_of_mean_ranks_and_undefined_for_a_constant():
    rng = np.random.default_rng(0)

    def ranks(x):                                         # by counting: how many are less, and half of the equals
        return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])
    for n, values in ((5, 3), (40, 6), (40, 10 ** 6), (300, 12)):
        x, y = rng.integers(0, values, (2, n)).astype(float)
        assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-12)
    assert math.isnan(spearman(np.ones(9), rng.normal(size=9)))


@pytest.mark.parametrize("name", READINGS)
def test_unique_r_squared_is_the_squared_part_correlation(name):
    """A predictor's unique share is the squared correlation of the target with what the others leave of it."""
    pages = made_up(6)
    rows = np.concatenate([np.stack(design(one, [0, 2], **READINGS[name])) for one in pages], axis=1)
    joint, unique, slopes = semi_partial(sum(gram(design(one, [0, 2], **READINGS[name])) for one in pages))
    X, y = np.vstack([np.ones(rows.shape[1]), rows[:-1]]).T, rows[-1]
    residual = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
    assert joint == pytest.approx(1 - residual.var() / y.var(), abs=1e-10)
    z = [stats.zscore(row) if row.std() else 0 * row for row in rows]
    np.testing.assert_allclose(slopes, np.linalg.lstsq(np.stack(z[:4], 1), z[4], rcond=None)[0], atol=1e-10)
    for k in range(4):
        others = np.delete(X, k + 1, axis=1)
        left = X[:, k + 1] - others @ np.linalg.lstsq(others, X[:, k + 1], rcond=None)[0]
        if X[:, k + 1].std() == 0:                        # token type among visual positions only
            assert unique[k] == pytest.approx(0, abs=1e-10)
        else:
            assert unique[k] == pytest.approx(stats.pearsonr(left, y).statistic ** 2, abs=1e-10)


@pytest.mark.parametrize("name, text, text_too, layers, relative", [
    ("all positions and layers", 2, True, [0, 1, 2], False), ("text at the visual mean", 1, True, [0, 1, 2], False),
    ("visual positions only", 2, False, [0, 1, 2], False), ("drift over residual size", 2, True, [0, 1, 2], True),
    ("replaced layers only", 2, True, [0, 2], False)])
def test_rows_of_the_regression_are_as_each_reading_says(name, text, text_too, layers, relative):
    one, rows = made_up(1)[0], []
    rho = dict(zip(np.flatnonzero(one.visual), one.rho))
    for k in layers:
        for p in range(len(one.visual)):
            if p in rho or text_too:
                y = one.drift[k, p] / (one.size[k, p] if relative else 1)
                rows.append([rho.get(p, text * np.mean(one.rho)), float(p in rho), k + 1, one.attention[k, p], y])
    np.testing.assert_allclose(np.stack(design(one, [0, 2], **READINGS[name]), 1), rows)


def test_the_bootstrap_fits_every_resample_of_pages_anew():
    pages, fit = made_up(12), []
    for counts in resamples(12)[:20].astype(int):
        rows = np.concatenate([np.stack(design(pages[i], [0]))
                               for i, n in enumerate(counts) for _ in range(n)], axis=1)
        X, y = np.vstack([np.ones(rows.shape[1]), rows[:-1]]).T, rows[-1]

        def r2(X):
            return 1 - (y - X @ np.linalg.lstsq(X, y, rcond=None)[0]).var() / y.var()
        fit.append([r2(X), *(r2(X) - r2(np.delete(X, k + 1, axis=1)) for k in range(4))])
    grams = np.stack([gram(design(one, [0])) for one in pages])
    joint, unique, _ = semi_partial(np.tensordot(resamples(12)[:20], grams, 1))
    np.testing.assert_allclose(np.column_stack([joint, unique]), fit, atol=1e-10)


def test_intervals_agree_with_scipys_bootstrap_over_pages():
    values = np.random.default_rng(3).gamma(2, 1, (50, 10)) * np.arange(1, 11)
    ours = diagnose.by_decile(values)
    theirs = stats.bootstrap((values[:, 0], values[:, 9]), lambda a, b, axis=-1: b.mean(axis) / a.mean(axis),
                             paired=True, vectorized=True, method="percentile", n_resamples=4000, rng=0)
    assert ours["ratio"][0] == pytest.approx(values[:, 9].mean() / values[:, 0].mean())
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    np.testing.assert_allclose(ours["ratio"][1:], theirs.confidence_interval, atol=0.08 * width)


def test_a_predictor_that_alone_makes_the_drift_explains_it_all():
    pages = made_up(8)
    for one in pages:
        density = np.full(len(one.visual), 2 * one.rho.mean())
        density[one.visual] = one.rho
        one.drift = np.tile(3 * density + 1, (3, 1))
    fit = regression(pages, [0], {})
    np.testing.assert_allclose(fit["joint"], 1, atol=1e-9)
    assert fit["density_largest"] == 1 and fit["unique"]["density"][1] > 0.3
    for one in pages:                                     # a student that does not drift: nothing is largest
        one.drift = np.zeros_like(one.drift)
    fit = regression(pages, [0], {})
    assert fit["density_largest"] == 0 and math.isnan(fit["joint"][0])


def test_deciles_are_equal_in_size_and_ordered_by_density():
    rho = np.random.default_rng(1).gamma(2, 1, 107)
    group = deciles(rho)
    assert set(np.bincount(group)) <= {10, 11}
    assert all(rho[group == g].max() < rho[group == g + 1].min() for g in range(9))
    assert deciles(np.zeros(20)).tolist() == sorted([*range(10)] * 2)


def test_fisher_ranks_are_scipys_per_page_in_the_densest_quarter_and_between_layers():
    pages = made_up(7)
    found = diagnose.fisher_ranks(pages, [0, 2])
    overall = [stats.spearmanr(one.rho, one.fisher.sum(0)).statistic for one in pages]
    dense = [one.rho >= np.sort(one.rho)[-math.ceil(len(one.rho) / 4)] for one in pages]
    top = [stats.spearmanr(one.rho[d], one.fisher.sum(0)[d]).statistic for one, d in zip(pages, dense)]
    between = np.mean([stats.spearmanr(*one.fisher).statistic for one in pages])
    np.testing.assert_allclose(found["overall"]["values"], overall)
    np.testing.assert_allclose(found["overall"]["percentiles"], np.percentile(overall, (5, 95)))
    np.testing.assert_allclose(found["top_quarter"]["values"], top)
    assert found["between_layers"]["mean"] == found["between_layers"]["pairs"]["1, 3"] == pytest.approx(between)


# ---------------------------------------------------------------------------------------------------------
# Measurements


def test_attention_received_equals_transformers_maps(models):
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers>=5 is the oracle")
    teacher, student, pages = models
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        ROOT / "tiny", dtype=torch.float32, attn_implementation="eager").eval()
    for page in pages:
        ids, e = page.ids[None], embedded(teacher, page)
        with torch.no_grad():
            maps = theirs(input_ids=ids, pixel_values=page.pixels, image_grid_thw=page.grids, output_attentions=True,
                          mm_token_type_ids=(ids == teacher.config.image_token_id).int()).attentions
        T, x = ids.shape[1], e.x
        for layer, A, streams in zip(teacher.layers, maps, e.deepstack + [0] * 8):      # A (1, H, T, T)
            expected = A[0].mean(0).sum(0) / torch.arange(T, 0, -1)
            got = diagnose.attention_received(layer.self_attn, layer.input_layernorm(x), e.rope, chunk=50)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)
            x = layer(x, None, e.rope)[0] + streams


def test_drift_is_the_distance_of_the_streams_that_hooks_see(models):
    teacher, student, (page, _) = models
    seen = {}
    for name, model in (("r", teacher), ("s", student)):
        hooks = [layer.register_forward_hook(lambda m, i, o, key=(name, k): seen.update({key: o[0].double()}))
                 for k, layer in enumerate(model.layers)]
        with torch.no_grad():
            model(page.ids[None], None, page.pixels, page.grids)
        for hook in hooks:
            hook.remove()
    drift, size, turn, _ = diagnose.walk(teacher, student, embedded(teacher, page), embedded(student, page)).double()
    for k in range(len(teacher.layers)):
        torch.testing.assert_close(drift[k], (seen["s", k] - seen["r", k])[0].norm(dim=-1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(size[k], seen["r", k][0].norm(dim=-1), atol=1e-3, rtol=1e-3)
        dot = (seen["s", k] * seen["r", k])[0].sum(-1) / size[k] / seen["s", k][0].norm(dim=-1)
        torch.testing.assert_close(turn[k], 1 - dot, atol=1e-5, rtol=1e-4)
    assert drift[:, 5:].min() > 0                         # the stand-in student does drift


def test_hiding_positions_equals_a_sequence_without_them(models):
    """Attention is all that mixes positions: out of sight for every later one is the same as gone, if the others
    keep their position numbers. One by one, several at once, and all visual positions of the page."""
    teacher, _, (page, _) = models
    e, visual = embedded(teacher, page), (page.ids == teacher.config.image_token_id).nonzero()[:, 0]
    hidden = torch.zeros(5, len(page.ids), dtype=torch.bool)
    for row, where in zip(hidden[1:], (visual[:1], visual[7:8], visual[2::3], visual)):
        row[where] = True
    got = diagnose.answer_scores(teacher, e, page.labels, hidden, at_once=2 * len(page.ids))
    for score, row in zip(got, hidden):
        keep = ~row
        x = e.x[:, keep]
        for i, layer in enumerate(teacher.layers):
            x = layer(x, None, tuple(t[:, keep] for t in e.rope))[0]
            x = x + e.deepstack[i][:, keep] if i < len(e.deepstack) else x
        labels = F.pad(page.labels[keep][1:], (0, 1), value=IGNORED)
        expected = -F.cross_entropy(teacher.lm_head(teacher.norm(x))[0], labels, ignore_index=IGNORED)
        assert score.item() == pytest.approx(expected.item(), abs=1e-4)
    assert got[0] - got[4] > 0.5                          # the embedded teacher needs its eyes


def test_a_page_is_measured_in_the_order_of_its_positions(models):
    """Groups and single positions are hidden where their density stands, not elsewhere."""
    teacher, student, (page, _) = models
    one = diagnose.measure(teacher, {"c1": student}, page, None, (Image.new("RGB", (7, 3)), "", ""), each=True)
    e, visual = embedded(teacher, page), (page.ids == teacher.config.image_token_id).nonzero()[:, 0]
    needed = int(one.alone.argmax())                      # most others bear nothing on the answer
    rows = [[], [needed], [20], np.flatnonzero(deciles(one.rho) == 9)]
    hidden = torch.zeros(4, len(page.ids), dtype=torch.bool)
    for row, where in zip(hidden, rows):
        row[visual[where]] = True
    base, without, last, densest = diagnose.answer_scores(teacher, e, page.labels, hidden).tolist()
    assert (one.alone[needed], one.alone[20]) == pytest.approx((base - without, base - last), abs=1e-4)
    assert one.alone[needed] > 0.01
    assert one.together[9] == pytest.approx(base - densest, abs=1e-4)
    assert one.fisher.shape == (6, 21) and one.drift.shape == (8, len(page.ids))


# ---------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    models[1].save_pretrained(folder)
    return str(folder)


def test_the_command_writes_table_results_and_pictures(folder, tmp_path, capsys):
    """Beside the student stands another, whose mixers put out nothing; its drift is what hooks on all layers see."""
    silent = Qwen3VL.from_pretrained(folder, torch.float32)
    for i in silent.config.hybrid["layers"]:
        nn.init.zeros_(silent.layers[i].self_attn.o_proj.weight)
    silent.save_pretrained(tmp_path / "silent")
    diagnose.main(["--teacher", str(ROOT / "tiny"), "--student", folder, str(tmp_path / "silent"), "--images", "3",
                   "--alone", "2", "--device", "cpu", "--out", str(tmp_path / "out")])
    said, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    assert "| 0.30 [0.27, 0.33] |" in said and "| 0.63 [0.49, 0.74] |" in said and results["pages"] == 3
    assert results["drift"]["turn"]["ratio"][0] == pytest.approx(
        results["drift"]["turn"]["means"][9][0] / results["drift"]["turn"]["means"][0][0])
    assert "the same of silent, over the residual's length" in said
    teacher, worlds = Qwen3VL.from_pretrained(ROOT / "tiny", torch.float32), [World("eval", 1, suite) for suite in ("reading", "reasoning")]
    expected = {"length": [], "relative": [], "turn": []}
    for sample in (worlds[0][0], worlds[1][0], worlds[0][1]):
        page, streams = Processor(ROOT / "tiny").encode(sample), {}
        for name, model in (("r", teacher), ("s", silent)):
            hooks = [layer.register_forward_hook(lambda _, args, out, key=name: streams.setdefault(key, []).append(out[0]))
                     for layer in model.layers]
            with torch.no_grad():
                model.hidden(page.ids[None], None, page.pixels, page.grids)
            for hook in hooks:
                hook.remove()
        r, s = (torch.stack(streams[key])[:, 0] for key in "rs")                    # (L, T, D)
        lengths = [z.square().sum(-1).sqrt() for z in (s - r, r, s)]
        found = dict(length=lengths[0], relative=lengths[0] / lengths[1], turn=1 - (r * s).sum(-1) / lengths[1] / lengths[2])
        visual = page.ids == teacher.config.image_token_id
        with torch.no_grad():
            rho = image_densities(teacher.visual(page.pixels, page.grids).patches, page.grids, 2)
        for measure, gaps in found.items():
            expected[measure].append([gaps.mean(0)[visual][chunk].mean() for chunk in rho.argsort(stable=True).chunk(10)])
    for measure, values in expected.items():
        shown = [m for m, _, _ in results["drift_of_others"]["silent"][measure]["means"]]
        np.testing.assert_allclose(shown, np.mean(values, 0), rtol=1e-3)
    for name in ("charts.png", "pages.png"):
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 5


def test_pictures_and_table_bear_figures_that_are_not_defined(tmp_path):
    pages = made_up(3)
    for one in pages:
        one.drift, one.turn, one.rho, one.together = 0 * one.drift, 0 * one.turn, 0 * one.rho + 0.1, 0 * one.together
    results = dict(student="c1", **diagnose.diagnose(pages, [0, 1]))
    diagnose.draw_charts(results, tmp_path / "charts.png")
    diagnose.draw_pages(pages, tmp_path / "pages.png")
    assert "not defined" in diagnose.table(results) and Image.open(tmp_path / "charts.png").size == (900, 1000)


def test_what_cannot_be_compared_is_refused_in_one_sentence(folder, models, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    student = Qwen3VL.from_pretrained(other)
    with torch.no_grad():
        student.visual.blocks[0].mlp.linear_fc1.weight[0, 0] += 1
    student.save_pretrained(other)
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n")
    tiny = str(ROOT / "tiny")
    for flags, words in ((["--teacher", tiny, "--student", tiny], "a hybrid that distill.py saved"),
                         (["--teacher", folder, "--student", folder], "attention in all layers"),
                         (["--teacher", tiny, "--student", str(other)], "does not come from"),
                         (["--teacher", tiny, "--student", str(tmp_path)], "is not a model folder"),
                         (["--teacher", tiny, "--student", folder, folder], "which two of them share"),
                         (["--teacher", tiny, "--student", folder, "--images", "1"], "must be at least 2"),
                         (["--teacher", tiny, "--student", folder, "--data", str(tmp_path / "text.jsonl")],
                          "needs at least 2")):
        with pytest.raises(SystemExit) as stop:
            diagnose.main([*flags, "--device", "cpu", "--out", str(tmp_path / "out")])
        assert words in str(stop.value)
