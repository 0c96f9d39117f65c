"""density.py against loops in plain numpy, written from the paper's lines."""
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from density import WEIGHTS, Weighting, image_densities, patch_density, quantisation_error, sample_density, to_positions
from parts.cache import Cache, CacheError, dequantise, fingerprint, image_sha, quantise, write_cache
from parts.picture import draw_map

RNG = np.random.default_rng(0)


# --- oracles -----------------------------------------------------------------------------------------------

def loop_rho(raster, with_self=True):
    """Eq. 2, patch by patch: raster (h, w, C) -> (h, w)."""
    h, w, _ = raster.shape
    pad = [(1, 1) if n > 1 else (0, 0) for n in (h, w)] + [(0, 0)]
    padded = np.pad(raster, pad, mode="reflect")
    padded = np.pad(padded, [(1, 1) if n == 1 else (0, 0) for n in (h, w)] + [(0, 0)], mode="edge")
    rho = np.zeros((h, w))
    for y in range(h):
        for x in range(w):
            cosines = []
            for dy in range(3):
                for dx in range(3):
                    if with_self or (dy, dx) != (1, 1):
                        p, q = raster[y, x], padded[y + dy, x + dx]
                        cosines.append(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
            rho[y, x] = 1 - np.mean(cosines)
    return rho


class Tower:
    """A vision tower that sees the same features in every picture."""

    def __init__(self, features):
        self.features = features

    def parameters(self):
        return iter([self.features])

    def __call__(self, pixels, grids):
        return SimpleNamespace(patches=self.features)


def loop_tokens(rho, merge):
    """(h, w) -> one mean per merge block, raster order over blocks."""
    h, w = rho.shape
    return [rho[y:y + merge, x:x + merge].mean() for y in range(0, h, merge) for x in range(0, w, merge)]


def loop_merge_order(raster, merge):
    """(h, w, C) -> (h*w, C): blocks in raster order, patches in raster order inside each block."""
    h, w, _ = raster.shape
    return np.array([raster[y + i, x + j] for y in range(0, h, merge) for x in range(0, w, merge)
                     for i in range(merge) for j in range(merge)])


def loop_weights(rho, visual, tau=0.5, beta=2.0, minmax="all"):
    """Algorithm 1 for one sample without padding: rho of its visual positions, visual a list of bools."""
    if not any(visual):
        return np.ones(len(visual))
    values, score = list(rho), []
    for is_visual in visual:
        score.append(values.pop(0) if is_visual else beta * np.mean(rho))
    pool = score if minmax == "all" else list(rho)
    low, high = min(pool), max(pool)
    if high == low:
        return np.ones(len(visual))
    w = np.exp(np.clip((np.array(score) - low) / (high - low), 0, 1) / tau)
    return w * len(visual) / w.sum()


def picture(h, w, channels=16):
    """Random features with common ground, so that densities are spread out and not all near 1."""
    return RNG.normal(size=(h, w, channels)) * RNG.uniform(0.1, 2, (h, w, 1)) + 1


def batch():
    """Rows: two images and padding on both sides, constant rho, text only, image only, all padding."""
    T = 16
    visual, mask = np.zeros((5, T), bool), np.zeros((5, T), bool)
    mask[0, 2:14], visual[0, 3:7], visual[0, 9:12] = True, True, True
    mask[1, :9], visual[1, 2:6] = True, True
    mask[2, :11] = True
    mask[3, 4:], visual[3, 4:] = True, True
    rho = RNG.uniform(0.02, 0.6, visual.sum()).astype(np.float32)
    rho[7:11] = 0.25
    rows = np.split(rho, np.cumsum(visual.sum(1))[:-1])
    return torch.tensor(rho), torch.tensor(visual), torch.tensor(mask), rows


NAMES = ["a", "b", "c", "d", "e"]


def weigh(kind, rho, visual, mask, names=None, **options):
    """w of a kind, from one rho per visual token."""
    return WEIGHTS[kind](to_positions(rho, visual), visual, mask, names, Weighting(**options))


def density_weights(rho, visual, mask, **options):
    return weigh("density", rho, visual, mask, **options)


# --- Eq. 2 -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w, merge", [(2, 2, 2), (2, 6, 2), (6, 4, 2), (8, 10, 2), (3, 6, 3), (1, 4, 1),
                                         (5, 1, 1), (1, 1, 1)])
def test_patch_density_is_equation_2_with_reflected_padding(h, w, merge):
    raster = picture(h, w)
    ours = patch_density(torch.tensor(loop_merge_order(raster, merge), dtype=torch.float32), h, w, merge)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours, loop_tokens(loop_rho(raster), merge), atol=2e-6)


def test_a_distinct_patch_is_dense_and_a_plain_page_is_not():
    page = np.ones((8, 8, 16))
    page[5, 2] = -1
    rho = patch_density(torch.tensor(loop_merge_order(page, 2)), 8, 8, 2)
    assert rho.argmax() == 2 * 4 + 1 and abs(rho[3]) < 1e-6


def test_several_images_and_frames_keep_to_themselves_and_their_order():
    grids = torch.tensor([[1, 4, 6], [1, 4, 6], [1, 2, 2], [3, 4, 4], [30, 12, 12], [1, 4, 6]])
    rasters = [picture(h, w) for t, h, w in grids.tolist() for _ in range(t)]
    features = torch.tensor(np.concatenate([loop_merge_order(r, 2) for r in rasters]))
    expected = np.concatenate([loop_tokens(loop_rho(r), 2) for r in rasters])
    np.testing.assert_allclose(image_densities(features, grids, 2), expected, atol=2e-6)
    assert len(image_densities(features[:0], grids[:0], 2)) == 0


def test_features_in_bf16_are_computed_in_fp32_and_features_are_left_alone():
    raster = torch.tensor(loop_merge_order(picture(6, 6), 2)).bfloat16()
    full = raster.float()
    assert torch.equal(patch_density(raster, 6, 6, 2), patch_density(full, 6, 6, 2))
    assert torch.equal(full, raster.float())


def test_whether_a_patch_is_its_own_neighbour_cannot_change_the_weights():
    raster = picture(8, 6)
    ours = patch_density(torch.tensor(loop_merge_order(raster, 2)), 8, 6, 2).double()
    without = torch.tensor(loop_tokens(loop_rho(raster, with_self=False), 2))
    torch.testing.assert_close(ours, without * 8 / 9, atol=2e-6, rtol=0)
    visual = torch.tensor([[False] * 3 + [True] * 12 + [False] * 2])
    for minmax in ("all", "visual"):
        both = [density_weights(r, visual, torch.ones_like(visual), minmax=minmax) for r in (ours, without)]
        torch.testing.assert_close(*both, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape, h, w, merge", [((24, 8), 4, 4, 2), ((6, 8), 3, 2, 2), ((0, 8), 2, 2, 2)])
def test_patches_that_do_not_fill_the_grid_are_refused(shape, h, w, merge):
    with pytest.raises(ValueError, match=f"{shape[0]} patches do not fill"):
        patch_density(torch.ones(shape), h, w, merge)
    with pytest.raises(ValueError, match="do not fill"):
        image_densities(torch.ones(shape), torch.tensor([[2, h, w]]), merge)
    with pytest.raises(ValueError, match="20 patches do not fill the grids"):
        image_densities(torch.ones(20, 8), torch.tensor([[1, 4, 4]]), 2)


def test_a_patch_of_zeros_is_as_dense_as_one_that_equals_its_neighbours():
    """Eq. 2 has no cosine for it. Every other patch is as the loop has it, with cosine 0 to a patch of zeros."""
    raster = picture(6, 8)
    raster[1, 2], raster[5, 7], raster[4, 7] = 0, 0, 1e-30
    stand_in = np.concatenate([raster, np.zeros((6, 8, 1))], -1)            # a direction that nothing shares
    for y, x in ((1, 2), (5, 7), (4, 7)):
        stand_in[y, x] = np.eye(17)[16]
    expected = loop_rho(stand_in)
    # Of (4, 7) and (5, 7) the stand-ins would be alike; to the patches around them it makes no difference.
    for y, x in ((1, 2), (5, 7), (4, 7)):
        expected[y, x] = 0
    ours = patch_density(torch.tensor(loop_merge_order(raster, 1), dtype=torch.float32), 6, 8, 1)
    np.testing.assert_allclose(ours.view(6, 8), expected, atol=2e-6)
    blank = image_densities(torch.zeros(16, 8), torch.tensor([[1, 4, 4]]), 2)
    assert torch.equal(blank, torch.zeros(4))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused_by_name(wrong, tmp_path):
    grids = torch.tensor([[1, 4, 4], [1, 2, 2]])
    features = torch.tensor(RNG.normal(size=(20, 8)))
    assert torch.isfinite(image_densities(features, grids, 2)).all()
    features[17, 3] = wrong
    with pytest.raises(ValueError, match="features are not finite"):
        image_densities(features, grids, 2)
    config = SimpleNamespace(vision=SimpleNamespace(spatial_merge_size=2), image_token_id=1)
    encoded = SimpleNamespace(pixels=features, grids=grids)
    with pytest.raises(ValueError, match="page 7: .*not finite"):
        sample_density(SimpleNamespace(visual=Tower(features), config=config),
                       SimpleNamespace(encode=lambda sample: encoded), SimpleNamespace(id="page 7", where=""))


# --- Algorithm 1 and the controls --------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"minmax": "visual"}, {"tau": 0.1}, {"beta": 0.5},
                                     {"beta": 5, "minmax": "visual"}])
def test_density_weights_are_algorithm_1_sample_by_sample(options):
    rho, visual, mask, rows = batch()
    ours = density_weights(rho, visual, mask, **options)
    for b in range(len(mask)):
        expected = loop_weights(rows[b].astype(float), visual[b][mask[b]].tolist(), **options)
        np.testing.assert_allclose(ours[b][mask[b]], expected, rtol=2e-5)


def test_text_reads_the_mean_that_stands_at_its_positions():
    """A cache gives the one from before it rounded the values."""
    rho, visual, mask, rows = batch()
    doubled = torch.tensor([2 * r.mean() if len(r) else 0.0 for r in rows])
    given = WEIGHTS["density"](torch.where(visual, to_positions(rho, visual), doubled[:, None]), visual, mask)
    torch.testing.assert_close(given, density_weights(rho, visual, mask, beta=4.0))
    assert not torch.allclose(given, density_weights(rho, visual, mask))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_kind_of_weight_sums_to_the_real_positions_and_is_zero_on_padding(kind):
    rho, visual, mask, _ = batch()
    w = weigh(kind, rho, visual, mask, NAMES)
    assert w.dtype == torch.float32 and w.shape == mask.shape
    assert (w[~mask] == 0).all() and (w[mask] > 0).all()
    torch.testing.assert_close(w.sum(1), mask.sum(1).float())
    torch.testing.assert_close(w[2], mask[2].float())                       # no image: uniform


@pytest.mark.parametrize("kind", ["uniform", "modality", "random"])
def test_kinds_without_a_density_need_no_rho_and_a_batch_of_text_needs_none_either(kind):
    rho, visual, mask, _ = batch()
    assert torch.equal(WEIGHTS["uniform"](None, visual, mask, NAMES), mask.float())
    garbage = torch.full_like(rho, 7.0)
    assert torch.equal(weigh(kind, garbage, visual, mask, NAMES), WEIGHTS[kind](None, visual, mask, NAMES))
    assert torch.equal(weigh("density", None, torch.zeros_like(visual), mask, NAMES), mask.float())


def test_degenerate_densities_give_finite_weights():
    mask = torch.ones(1, 6, dtype=torch.bool)
    visual = torch.tensor([[False, True, True, True, True, False]])
    flat = torch.full((4,), 0.3)
    assert torch.equal(density_weights(flat, mask[:, :4], mask[:, :4]), torch.ones(1, 4))
    assert torch.equal(density_weights(flat, visual, mask, minmax="visual"), torch.ones(1, 6))
    w = density_weights(flat, visual, mask)                                 # Algorithm 1: text 2m is above m
    torch.testing.assert_close(w[0, 0] / w[0, 1], torch.tensor(2.0).exp())
    rounding = torch.tensor([0, 1e-7, 3e-7, -1e-7])                         # a blank page in fp32
    assert torch.equal(density_weights(rounding, visual, mask), torch.ones(1, 6))
    for tau in (1e-3, 1e3):
        for minmax in ("all", "visual"):
            assert density_weights(torch.rand(4), visual, mask, tau=tau, minmax=minmax).isfinite().all()
    for wrong in ({"tau": 0}, {"minmax": "image"}):
        with pytest.raises(ValueError, match="minmax must be"):
            density_weights(flat, visual, mask, **wrong)
    with pytest.raises(ValueError, match="3 densities for 4 visual positions"):
        density_weights(flat[:3], visual, mask)


def test_modality_boost_is_algorithm_1_on_the_mean_density():
    rho, visual, mask, rows = batch()
    ours = weigh("modality", rho, visual, mask)
    assert torch.equal(ours, weigh("modality", rho, visual, mask, minmax="visual"))      # or it would be uniform
    for b in (0, 1, 3):
        even = np.full(len(rows[b]), rows[b].mean(), dtype=float)
        expected = loop_weights(even, visual[b][mask[b]].tolist())
        np.testing.assert_allclose(ours[b][mask[b]], expected, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 10, 25, 50, 100])
def test_top_k_and_random_take_the_same_number_and_top_k_the_densest(k):
    rho, visual, mask, rows = batch()
    top, drawn = (weigh(kind, rho, visual, mask, NAMES, k=k) for kind in ("topk", "random"))
    for b in (0, 1, 3):
        count = round(len(rows[b]) * k / 100)
        dense = np.zeros(mask.shape[1], bool)
        dense[np.flatnonzero(visual[b])[np.argsort(-rows[b], kind="stable")[:count]]] = True
        raw = np.where(dense, 5.0, 1.0) * mask[b].numpy()
        np.testing.assert_allclose(top[b], raw * mask[b].sum().item() / raw.sum(), rtol=1e-5)
        assert torch.equal(drawn[b].sort().values, top[b].sort().values)
        assert (drawn[b][mask[b] & ~visual[b]] == drawn[b][mask[b]].min()).all()


def test_random_masks_depend_on_seed_and_name_and_on_nothing_else():
    visual = torch.zeros(2, 40, dtype=torch.bool)
    visual[:, 4:36] = True
    mask = torch.ones_like(visual)
    w = WEIGHTS["random"](None, visual, mask, ["left", "right"])
    swapped = WEIGHTS["random"](None, visual, mask, ["right", "left"])
    assert torch.equal(w, swapped.flip(0)) and not torch.equal(w[0], w[1])
    padded = (torch.nn.functional.pad(m[:1], (3, 5)) for m in (visual, mask))
    alone = WEIGHTS["random"](None, *padded, ["left"])
    assert torch.equal(alone[0, 3:-5], w[0])
    assert not torch.equal(WEIGHTS["random"](None, visual, mask, ["left", "right"], Weighting(seed=1))[0], w[0])
    spread = [WEIGHTS["random"](None, visual, mask, [f"{i}", "x"])[0] > 2 for i in range(400)]
    assert (torch.stack(spread).float().mean(0)[4:36] - 0.25).abs().max() < 0.1         # 4.6 standard errors
    with pytest.raises(ValueError, match="drawn by sample name: 2 rows"):
        WEIGHTS["random"](None, visual, mask, ["left"])


def test_shuffled_weights_are_those_of_algorithm_1_in_other_places():
    """Each row by the slow loop on its own densities, sorted; text in place; nothing from a neighbour's row."""
    rho, visual, mask, rows = batch()
    w = weigh("shuffled", rho, visual, mask, NAMES)
    for b in (0, 1, 3):
        seen = visual[b][mask[b]]
        expected = torch.tensor(np.asarray(loop_weights(rows[b], seen.tolist())), dtype=torch.float32)
        got = w[b][mask[b]]
        torch.testing.assert_close(got[~seen], expected[~seen])
        torch.testing.assert_close(got[seen].sort().values, expected[seen].sort().values)
        assert len(rows[b]) < 5 or not torch.allclose(got, expected)
    assert torch.equal(w, weigh("shuffled", rho, visual, mask, NAMES))
    assert not torch.equal(w, weigh("shuffled", rho, visual, mask, NAMES, seed=1))


def test_c4_falls_into_its_ranking_and_its_shares():
    """By the slow loop: each control keeps one half of what Algorithm 1 does, and C3's for the other."""
    rho, visual, mask, rows = batch()
    rank, share = (weigh(kind, rho, visual, mask) for kind in ("rank", "share"))
    for b in range(4):
        seen = visual[b][mask[b]].numpy()
        whole = np.asarray(loop_weights(rows[b], seen.tolist()))
        patches = whole[seen] if seen.any() else np.ones(0)
        expected = {"rank": np.ones(len(whole)), "share": whole.copy()}
        expected["rank"][seen] = patches / patches.mean() if len(patches) else patches
        expected["share"][seen] = patches.mean() if len(patches) else patches
        for name, w in (("rank", rank), ("share", share)):
            np.testing.assert_allclose(w[b][mask[b]], expected[name], rtol=1e-5)
    assert not rank[~mask].any() and not share[~mask].any()


def test_gradient_scores_of_text_can_be_beta_times_the_visual_mean_and_tempered():
    _, visual, mask, _ = batch()
    scores = torch.rand(3, *mask.shape).masked_fill(~mask, float("nan"))    # +LD: each layer for itself
    w = WEIGHTS["fisher"](scores, visual, mask, s=Weighting(fisher_text="beta", fisher_power=0.5, beta=3.0))
    for layer in range(3):
        for b in range(4):
            s, seen = scores[layer, b][mask[b]].numpy(), visual[b][mask[b]].numpy()
            s = np.where(seen, s, 3 * s[seen].mean()) if seen.any() else np.ones(len(s))   # no image: uniform
            np.testing.assert_allclose(w[layer, b][mask[b]], np.sqrt(s) / np.sqrt(s).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="fisher_text must be own or beta"):
        Weighting(fisher_text="none")


def test_gradient_scores_become_weights_in_proportion():
    rho, visual, mask, rows = batch()
    scores = torch.rand(mask.shape).masked_fill(~mask, float("nan"))        # padding may hold anything
    w = WEIGHTS["fisher"](scores, visual, mask)
    for b in range(4):
        s = scores[b][mask[b]]
        torch.testing.assert_close(w[b][mask[b]], s / s.mean())
    layers = torch.stack([scores, scores.square()])                         # +LD: each layer for itself
    assert torch.equal(WEIGHTS["fisher"](layers, visual, mask),
                       torch.stack([w, WEIGHTS["fisher"](scores.square(), visual, mask)]))
    dense = to_positions(rho, visual)                       # one per visual position: text beta * mean
    w = WEIGHTS["fisher"](torch.where(visual, dense, 2 * dense), visual, mask)
    raw = np.where(visual[0], 0, 2 * rows[0].mean())
    raw[visual[0].numpy()] = rows[0]
    np.testing.assert_allclose(w[0][mask[0]], (raw / raw[mask[0]].mean())[mask[0]], rtol=1e-5)
    full = torch.ones(1, 3).bool()
    assert torch.equal(WEIGHTS["fisher"](torch.zeros(1, 3), full, full), torch.ones(1, 3))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and non-negative"):
            WEIGHTS["fisher"](torch.tensor([[1.0, bad]]), full[:, :2], full[:, :2])


# --- the cache ---------------------------------------------------------------------------------------------

PRINT = fingerprint({"w": torch.ones(2)}, {"size": 1})


def corpus():
    """(id, sha, grids, values): odd and even counts, two images, constant, one value, no grids."""
    grids = [[[1, 4, 6]], [[1, 4, 6], [2, 6, 6]], [[1, 8, 4]], [[1, 2, 2]], None]
    counts = [6, 24, 8, 1, 37]
    values = [torch.tensor(RNG.uniform(0.01, 0.7, n), dtype=torch.float32) for n in counts]
    values[2][:] = 0.125
    shas = [image_sha([Image.new("L", (2, 2), i)]) for i in range(5)]
    return [(f"s{i}", *record) for i, record in enumerate(zip(shas, grids, values))]


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "c", corpus(), PRINT)
    return tmp_path / "c"


def test_a_cache_gives_back_what_was_written_to_half_a_step_and_its_extremes_and_mean_exactly(tmp_path):
    records = corpus()
    write_cache(tmp_path / "c", iter(records), PRINT)
    opened = Cache(tmp_path / "c", PRINT)
    assert (opened.n_records, opened.n_values) == (5, 76)
    for sample_id, sha, grids, values in records:
        back, mean = opened.record(sample_id, bytes.fromhex(sha), grids and torch.tensor(grids))
        assert torch.equal(back, opened.record(sample_id, sha, grids)[0]) and back.shape == values.shape
        assert (back - values).abs().max() <= (values.max() - values.min()) / 30 + 1e-7
        assert back.min() == values.min() and back.max() == values.max()
        assert mean == pytest.approx(values.mean().item(), rel=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    again = pickle.loads(pickle.dumps(opened))              # as a data worker gets it
    assert torch.equal(again.record(*records[1][:3])[0], opened.record(*records[1][:3])[0])


def test_four_bits_move_w_by_no_more_than_the_closed_form_bound():
    for n, text, tau in [(5, 0, 0.5), (64, 10, 0.5), (1000, 80, 0.5), (1000, 300, 0.2)]:
        visual = torch.arange(n + text)[None] < n
        rho = torch.tensor(RNG.beta(1.5, 5, n), dtype=torch.float32)
        error = quantisation_error(rho, visual, torch.ones_like(visual), Weighting(tau=tau))
        exact = to_positions(rho, visual)
        coarse = torch.where(visual, to_positions(dequantise(*quantise(rho)), visual), exact)
        w, w4 = (WEIGHTS["density"](r, visual, torch.ones_like(visual), s=Weighting(tau=tau)) for r in (exact, coarse))
        assert error == pytest.approx((w4 / w - 1).abs().max().item())
        assert 0 < error <= np.exp(1 / 15 / tau) - 1
        if text:                                            # text is exact, so it undoes the rescaling
            before = (w4 / w) * (w[0, -1] / w4[0, -1])
            assert (before - 1).abs().max() <= np.exp(0.5 / 15 / tau) - 1 + 1e-5


def test_fisher_values_of_a_heavy_tail_keep_their_ratios(tmp_path):
    values = torch.tensor(RNG.lognormal(0, 1.5, 500), dtype=torch.float32)
    values[3] = 0
    write_cache(tmp_path / "c", [("x", b"1" * 32, None, values)], PRINT, kind="fisher")
    back = Cache(tmp_path / "c", PRINT, kind="fisher").record("x", b"1" * 32, None)[0]
    floored = values.clamp(min=1e-4 * values.max().item())
    half_step = (floored.max() / floored.min()).log().item() / 30
    assert (back / floored).log().abs().max() <= half_step + 1e-5
    with pytest.raises(CacheError, match="holds fisher values, version 2; wanted density"):
        Cache(tmp_path / "c", PRINT)
    with pytest.raises(CacheError, match="sample 'x': 2 values, not all usable as fisher"):
        write_cache(tmp_path / "d", [("x", b"", None, [1.0, -1.0])], PRINT, kind="fisher")


def test_a_cache_of_another_model_preprocessing_image_or_grid_is_refused_by_name(cache):
    weights = torch.nn.Linear(2, 2)
    same = fingerprint(weights, {"a": 1, "b": 2})
    assert same == fingerprint(dict(reversed(weights.state_dict().items())), {"b": 2, "a": 1})
    assert same != fingerprint(weights.bfloat16(), {"a": 1, "b": 2})
    assert len({fingerprint({"w": torch.ones(2)}, {}), fingerprint({"w": torch.zeros(2)}, {}), PRINT,
                fingerprint({"v": torch.ones(2)}, {}), fingerprint({"w": torch.ones(2, 1)}, {})}) == 5
    with pytest.raises(CacheError, match="c was made with another model or preprocessing"):
        Cache(cache, same)
    opened, (_, sha, grids, _) = Cache(cache, PRINT), corpus()[0]
    other = image_sha([Image.new("L", (2, 2), 99)])
    for name, image, grid, message in [
            ("s9", sha, grids, "c, sample 's9': not in the cache"),
            ("s0", other, grids, "c, sample 's0': the image's bytes are not those"),
            ("s0", sha, [[1, 6, 4]], r"made at grids \[\(1, 4, 6\)\], this run has \[\(1, 6, 4\)\]"),
            ("s0", sha, [[1, 4, 6]] * 2, "made at grids"), ("s0", sha, None, r"this run has \[\]")]:
        with pytest.raises(CacheError, match=message):
            opened.record(name, image, grid)


def test_any_flipped_bit_anywhere_in_the_file_is_refused(cache):
    good, records = cache.read_bytes(), corpus()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(RNG.integers(8))
        cache.write_bytes(damaged)
        with pytest.raises(CacheError, match="is not a density cache|damaged"):
            opened = Cache(cache, PRINT)
            for sample_id, sha, grids, _ in records:
                opened.record(sample_id, sha, grids)


def test_a_truncated_or_grown_file_is_refused(cache):
    good = cache.read_bytes()
    for end in (0, 1, 100, 128, 200, len(good) - 64, len(good) - 1):
        cache.write_bytes(good[:end])
        with pytest.raises(CacheError, match="c is truncated"):
            Cache(cache, PRINT)
    cache.write_bytes(good + b"\0")
    with pytest.raises(CacheError, match="c is truncated or grown"):
        Cache(cache, PRINT)


@pytest.mark.parametrize("kind, command", [
    ("density", "python density.py --cache"), ("fisher", "python distill.py --cond c5 --write-cache")])
def test_a_file_of_the_old_format_is_refused_with_the_command_that_writes_a_new_one(tmp_path, kind, command):
    (tmp_path / "c").write_bytes(b"HEEDrho4" + bytes(500))
    with pytest.raises(CacheError, match=f"c has the format of an earlier version.*`{command}"):
        Cache(tmp_path / "c", PRINT, kind)
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CacheError, match=f"model.safetensors is not a {kind} cache"):
        Cache(tmp_path / "model.safetensors", PRINT, kind)
    with pytest.raises(OSError, match="nowhere"):
        write_cache(tmp_path / "nowhere" / "c", corpus(), PRINT)


def test_a_lookup_reads_its_record_and_not_the_file(tmp_path):
    """By the kernel's count of the file's pages that came into memory."""
    write_cache(tmp_path / "c", ((str(i), b"", None, torch.rand(2_000_000)) for i in range(24)), PRINT)
    opened = Cache(tmp_path / "c", PRINT)
    values = opened.record("7", b"", None)[0]
    assert (tmp_path / "c").stat().st_size > 24e6 and len(values) == 2_000_000
    mapped = next(line for line in Path("/proc/self/smaps").read_text().split(str(tmp_path / "c"))[1].splitlines()
                  if line.startswith("Rss"))
    assert int(mapped.split()[1]) < 6000                    # kB of the file that came into memory


@pytest.mark.parametrize("bad, message", [
    (("s0", b"", None, torch.ones(2)), "two samples have the id 's0'"),
    (("new", b"", None, torch.tensor([0.1, float("nan")])), "sample 'new': 2 values"),
    (("new", b"", None, torch.ones(0)), "sample 'new': 0 values")])
def test_a_write_that_fails_half_way_leaves_the_old_cache_untouched(cache, bad, message):
    before = cache.read_bytes()
    with pytest.raises(CacheError, match=message):
        write_cache(cache, corpus() + [bad], PRINT)

    def dies():
        yield from corpus()
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_cache(cache, dies(), PRINT)
    assert cache.read_bytes() == before and [p.name for p in cache.parent.iterdir()] == ["c"]


def test_a_cache_costs_less_per_visual_token_than_the_paper_says(tmp_path):
    sizes = 4 * [(1, 64, 64), (1, 100, 100), (1, 80, 50)]             # 1,024, 2,500 and 1,000 visual tokens
    records = [(str(i), b"", [g], torch.rand(g[1] * g[2] // 4)) for i, g in enumerate(sizes)]
    write_cache(tmp_path / "c", records, PRINT)
    assert 0.5 < Cache(tmp_path / "c", PRINT).bytes_per_value() < 0.65


def test_image_sha_tells_order_borders_and_bytes_apart(tmp_path):
    for name, content in (("a", b"12"), ("b", b"3"), ("c", b"1"), ("d", b"23")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert len({image_sha(images) for images in ([a, b], [b, a], [c, d], [a], [])}) == 5
    assert image_sha([Image.new("L", (2, 3))]) != image_sha([Image.new("L", (3, 2))])


# --- the picture -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(96, 96), (1200, 300), (50, 900)])
def test_the_drawing_shows_the_picture_and_dark_where_it_is_dense(size):
    rho = torch.zeros(4, 4)
    rho[1, 2] = 0.5
    sheet = draw_map(Image.new("RGB", size, (120, 160, 200)), rho)
    pixels = np.asarray(sheet).astype(int)
    panel = [round(side * 560 / max(size)) for side in size]
    middle = sheet.width // 2
    assert tuple(pixels[12 + panel[1] // 2, middle - 6 - panel[0] // 2]) == (120, 160, 200)
    heat = pixels[12:12 + panel[1], middle + 6:middle + 6 + panel[0]].sum(-1)
    ys, xs = ([int((i + 0.5) / 4 * side) for i in range(4)] for side in panel[::-1])
    cells = heat[np.ix_(ys, xs)]
    assert cells.argmin() == 6 and cells.min() < 0.5 * np.median(cells)
