"""distill.py against independent computations: the losses by hooks and numpy, a step by another number of
processes, a run that is killed by one that is not. Run: pytest tests/test_distill.py"""
import copy
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import density
import distill
import fisher
import loop
from data import BadSample, Fetch, Micro, Processor, Sample, collate
from model import Config, Qwen3VL, TextConfig, VisionConfig
from synthdoc import World

ROOT = Path(distill.__file__).parent
SPECIAL = [f"<|{name}|>" for name in
           ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")]
NEW = {"conv", "dt_proj.weight", "dt_bias", "A_log", "D", "gate_proj.weight", "gate_proj.bias", "out_norm"}


def SMALL(*args, **options):
    """The embedded world on pages of 21 visual tokens, whatever size is asked for."""
    return World(*args, **{**options, "cells": (3, 7), "questions": 1})


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The folder of a random Qwen3-VL of 4 layers with a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("teacher")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    at = {token: len(letters) + i for i, token in enumerate(SPECIAL)}
    config = Config(
        text=TextConfig(vocab_size=len(letters) + len(SPECIAL), hidden_size=32, intermediate_size=48,
                        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                        rope_theta=1e3, mrope_section=[4, 2, 2]),
        vision=VisionConfig(depth=2, hidden_size=24, intermediate_size=32, num_heads=2, patch_size=8,
                            out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        image_token_id=at["<|image_pad|>"], video_token_id=at["<|video_pad|>"], tie_word_embeddings=True,
        vision_start_token_id=at["<|vision_start|>"], vision_end_token_id=at["<|vision_end|>"],
        eos_token_id=[at["<|im_end|>"]])
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        size=dict(shortest_edge=1024, longest_edge=640 ** 2), patch_size=8, merge_size=2)))
    model, generator = Qwen3VL(config), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        mean = float("norm" in name and name.endswith("weight"))
        p.data.normal_(mean, p[0].numel() ** -0.5 if p.dim() > 1 else 0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


def settings(folder, out, **changes):
    """Command line of a run of five steps of about 300 tokens, which crosses both stage borders."""
    flags = dict(teacher=folder, out=out, tokens=1500, batch_tokens=300, micro_tokens=10_000, stages="40/20/40",
                 save_every=2, threads=1, questions=0, lr=1e-3) | changes
    return [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in flags.items()]


def load(teacher, tmp_path, **changes):
    """-> settings, teacher, student and processor as distill.py builds them, in float64."""
    argv = settings(teacher, tmp_path, dtype="float64", **changes)
    s = distill.parse(distill.DistillSettings, distill.DEFAULTS, argv)
    return s, *distill.build(s, torch.device("cpu"))


def train(argv, monkeypatch):
    """distill.py in this process on small pages, without the report at the end."""
    monkeypatch.setattr(distill, "World", SMALL)
    monkeypatch.setattr(distill, "finish", lambda *args: None)
    distill.main(argv)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def checkpoint(out):
    return torch.load(Path(out) / (Path(out) / "latest").read_text() / "state.pt", weights_only=True)


def three_rows(processor):
    """A padded batch: one image, two images of other sizes, no image."""
    pages = [World("train", 3, "receipt", cells=c)[0].images[0] for c in ((3, 7), (4, 7), (3, 8))]
    shows = [[0], [1, 2], []]
    samples = [Sample(id=f"s{i}", images=[pages[k] for k in show], messages=[
        {"role": "user", "content": [{"type": "image"}] * len(show) + [{"type": "text", "text": "what? " * (i + 1)}]},
        {"role": "assistant", "content": [{"type": "text", "text": "that is " + "so " * (5 * i)}]}])
        for i, show in enumerate(shows)]
    encoded = [processor.encode(s) for s in samples]
    return collate(encoded, processor.pad_id), [collate([e], processor.pad_id) for e in encoded]


# ---------------------------------------------------------------------------------------------------------
# Stages 1 and 2


class Streams:
    """What goes in and out of every decoder layer and mixer while the model runs, by hooks; with `forced`, each
    replaced layer reads that stream in place of its own."""

    def __init__(self, model, batch, forced=None):
        self.inputs, self.outputs, self.mixed = {}, {}, {}
        handles = []
        for i, layer in enumerate(model.layers):
            handles += [layer.register_forward_pre_hook(partial(self.before, i, forced)),
                        layer.register_forward_hook(lambda m, a, y, i=i: self.outputs.update({i: y[0]})),
                        layer.self_attn.register_forward_hook(lambda m, a, y, i=i: self.mixed.update({i: y[0]}))]
        model(batch.ids, batch.mask, batch.pixels, batch.grids)
        for handle in handles:
            handle.remove()

    def before(self, i, forced, module, args):
        args = (args[0] if forced is None else forced[i], *args[1:])
        self.inputs[i] = args[0]
        return args


def densities_by_loops(model, batch):
    """Eq. 2 in numpy: of each row its visual positions and their rho, from a hook on the last ViT block."""
    kept = []
    handle = model.visual.blocks[-1].register_forward_hook(lambda m, a, y: kept.append(y.detach().numpy()))
    model.visual(batch.pixels, batch.grids)
    handle.remove()
    features, grids, rows = kept[0], iter(batch.grids.tolist()), []
    for row in batch.ids.numpy():
        seen, rho = np.flatnonzero(row == model.config.image_token_id), []
        while len(rho) < len(seen):
            _, h, wide = next(grids)
            v, features = features[:h * wide], features[h * wide:]
            v = (v / np.linalg.norm(v, axis=1, keepdims=True)).reshape(h // 2, wide // 2, 2, 2, -1)
            v = v.transpose(0, 2, 1, 3, 4).reshape(h, wide, -1)
            around = np.pad(v, ((1, 1), (1, 1), (0, 0)), mode="reflect")
            near = np.array([[[around[y + dy, x + dx] @ v[y, x] for dy in range(3) for dx in range(3)]
                              for x in range(wide)] for y in range(h)]).mean(-1)
            rho += list((1 - near).reshape(h // 2, 2, wide // 2, 2).mean((1, 3)).flatten())
        rows.append((seen, np.array(rho)))
    return rows


def weights_by_loops(model, batch, kind="density"):
    """w (B, T) in numpy, row by row: Algorithm 1, or what A.6 and A.8 put in its place."""
    w = np.zeros(batch.ids.shape)
    for b, (seen, rho) in enumerate(densities_by_loops(model, batch)):
        raw = np.ones(T := int(batch.mask[b].sum()))
        if len(seen) and kind == "density":               # tau 0.5, beta 2
            score = np.full(T, 2 * rho.mean())
            score[seen] = rho
            raw = np.exp((score - score.min()) / (score.max() - score.min()) / 0.5)
        elif len(seen) and kind in ("rank", "share"):     # one half of C4 each
            c4, image = weights_by_loops(model, batch)[b, :T], np.isin(np.arange(T), seen)
            even = c4[image].mean()
            raw = np.where(image, c4 / even, 1) if kind == "rank" else np.where(image, even, c4)
        elif len(seen) and kind == "modality":            # text at rho~ = 1, every patch at 0
            raw[:] = np.exp(1 / 0.5)
            raw[seen] = 1
        elif len(seen) and kind == "topk":                # 5 times on the densest quarter
            raw[seen[np.argsort(-rho, kind="stable")[:round(len(seen) * 0.25)]]] = 5
        w[b, :T] = raw * T / raw.sum()
    return w


@pytest.mark.parametrize("feed", ["own", "teacher"])
@pytest.mark.parametrize("cond", ["c2", "c3", "c4"])
def test_alignment_is_the_sum_over_hooked_streams(teacher, tmp_path, cond, feed):
    """Eq. 4, Eq. 5 and C2's loss, value and gradient, on padded rows with one, two and no image and DeepStack."""
    s, f, g, processor = load(teacher, tmp_path, cond=cond, feed=feed, keep_every=2)
    objective, (batch, _) = distill.Distillation(s, f, g), three_rows(processor)
    objective.prepare(0.5)                                # Stage 2: all of the mixers
    loss, count, terms = objective.loss(batch, "stage 2")
    with torch.no_grad():
        theirs = Streams(f, batch)
    ours = Streams(g, batch, theirs.inputs if feed == "teacher" else None)
    w = torch.tensor(weights_by_loops(f, batch)) if cond == "c4" else batch.mask.double()
    read = "mixed" if cond == "c2" else "outputs"
    errors = [((getattr(ours, read)[i] - getattr(theirs, read)[i]) ** 2).sum(-1) for i in (0, 2)]
    expected = (w * sum(errors)).sum() / 2                                              # |S*| = 2; T is the count
    assert g.config.hybrid["layers"] == [0, 2] and count == int(batch.mask.sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if cond == "c4" else 1e-12)
    assert terms["drift"].item() == pytest.approx((batch.mask * sum(errors)).sum().item() / 2, rel=1e-12)
    names = list(objective.mixers)
    grads = (torch.autograd.grad(x, list(objective.mixers.values()), retain_graph=True) for x in (loss, expected))
    for name, a, b in zip(names, *grads):
        assert (a - b).abs().max() <= (1e-6 if cond == "c4" else 1e-9) * b.abs().max(), name


# What each condition compares, with which weight, and its mixer: Table 10, Tables 5 and 8, A.8.
COMPARED = {
    "c2": ("mixed", "ones", "Mamba2"), "c3": ("outputs", "ones", "Mamba2"), "c4": ("outputs", "density", "Mamba2"),
    "c5": ("outputs", "sum", "Mamba2"), "c6": ("outputs", "density", "GatedDeltaNet"),
    "no-residual": ("mixed", "density", "Mamba2"), "no-density": ("outputs", "modality", "Mamba2"),
    "ld": ("outputs", "each", "Mamba2"), "sl": ("outputs", "middle", "Mamba2"),
    "topk": ("outputs", "topk", "Mamba2"), "random": ("outputs", "random", "Mamba2"),
    "shuffled": ("outputs", "shuffled", "Mamba2"),
    "rank-only": ("outputs", "rank", "Mamba2"), "share-only": ("outputs", "share", "Mamba2")}


@pytest.mark.parametrize("cond", distill.CONDS)
def test_every_condition_compares_what_the_papers_tables_say(teacher, tmp_path, cond):
    """The loss of Stages 1/2 by hooks and numpy; gradient scores are those that finite differences hold."""
    assert set(distill.CONDS) == {"c1", *COMPARED}
    s, f, g, processor = load(teacher, tmp_path, cond=cond)
    objective, (batch, _) = distill.Distillation(s, f, g), three_rows(processor)
    if cond == "c1":                                      # Stages 1/2 are skipped
        assert {objective.prepare(share)[0] for share in (0, 0.2, 0.9)} == {"stage 3"}
        return
    read, kind, mixer = COMPARED[cond]
    assert {type(g.layers[i].self_attn).__name__ for i in range(3)} == {mixer}
    assert type(g.layers[3].self_attn).__name__ == "Attention"
    with torch.no_grad():
        theirs = Streams(f, batch)
        ours = Streams(g, batch, theirs.inputs)
        e = f.embed(batch.ids, batch.mask, batch.pixels, batch.grids)
    errors = [((getattr(ours, read)[i] - getattr(theirs, read)[i]) ** 2).sum(-1) for i in (0, 1, 2)]
    used = [None]
    with pytest.MonkeyPatch.context() as patch:
        real = density.WEIGHTS[distill.CONDS[cond].weight]
        patch.setitem(density.WEIGHTS, distill.CONDS[cond].weight, lambda *a: used.append(real(*a)) or used[-1])
        loss = objective.loss(batch, "stage 2")[0].item()
    if kind in ("sum", "each", "middle"):
        scores = fisher.fisher_scores(f, [0, 1, 2], e, None, batch.labels)
        scores = dict(sum=scores.sum(0)[None].expand(3, -1, -1), each=scores, middle=scores[1:2].expand(3, -1, -1))[kind]
        w = [x * batch.mask / (x * batch.mask).sum(1, keepdim=True) * batch.mask.sum(1, keepdim=True) for x in scores]
    elif kind in ("random", "shuffled"):                  # another control's weights, in other places of its rows
        w, other = [used[-1]] * 3, weights_by_loops(f, batch, dict(random="topk", shuffled="density")[kind])
        assert np.allclose(np.sort(w[0], 1), np.sort(other, 1), atol=1e-5) and not np.allclose(w[0], other, atol=1e-2)
    else:
        w = [torch.tensor(weights_by_loops(f, batch, kind))] * 3
    expected = sum((x * error).sum() for x, error in zip(w, errors)) / 3
    assert loss == pytest.approx(expected.item(), rel=2e-6)


def test_fisher_scores_are_finite_differences_of_the_teachers_loss(teacher, tmp_path):
    """B.3: nudge one entry of the stream after layer l at position p, and see the loss of the full logits move."""
    _, f, _, processor = load(teacher, tmp_path, cond="c5")
    batch, alone = three_rows(processor)
    with torch.no_grad():
        e = f.embed(batch.ids, batch.mask, batch.pixels, batch.grids)
    scores = fisher.fisher_scores(f, [0, 1, 2], e, None, batch.labels)                 # (S, B, T)

    def loss(row, layer, p, nudge):
        handle = f.layers[layer].register_forward_hook(
            lambda m, a, out: (out[0].index_add(1, torch.tensor([p]), nudge[None, None]), *out[1:]))
        with torch.no_grad():
            logits = f(row.ids, None, row.pixels, row.grids)[0, :-1]
        handle.remove()
        return torch.nn.functional.cross_entropy(logits, row.labels[0, 1:], ignore_index=-100, reduction="sum")
    for b, p in ((0, 7), (1, 30), (2, 3)):
        for layer in (0, 2):
            g = torch.stack([(loss(alone[b], layer, p, d) - loss(alone[b], layer, p, -d)) / 4e-3
                             for d in 2e-3 * torch.eye(32, dtype=torch.double)])     # norms are fp32
            assert scores[layer, b, p].item() == pytest.approx(g.square().sum().item(), rel=1e-2)


def weights(s, f, g, processor, samples, cache=""):
    """w (B, T), or (S, B, T), as a run has it: by a spy on the row of density.WEIGHTS."""
    s.density_cache, kind, found = str(cache), distill.CONDS[s.cond].weight, []
    if cache:
        processor.scores = fisher.open_scores(cache, distill.CONDS[s.cond], f, g, processor)
    batch = collate([processor.encode(x) for x in samples], processor.pad_id)
    with pytest.MonkeyPatch.context() as patch:
        real = density.WEIGHTS[kind]
        patch.setitem(density.WEIGHTS, kind, lambda *args: found.append(real(*args)) or found[0])
        distill.Distillation(s, f, g).loss(batch, "stage 2")
    processor.scores = None
    return found[0]


def test_a_density_cache_gives_the_weights_of_the_live_tower_and_no_others(teacher, tmp_path):
    s, f, g, processor = load(teacher, tmp_path, cond="c4")
    samples = [World("train", 3, "receipt", cells=(3, 7))[i] for i in range(3)]
    samples.insert(1, Sample("talk", [dict(role="document", content=[dict(type="text", text="no image")])]))
    density.cache_density(tmp_path / "rho", samples, f, processor)
    live, kept = (weights(s, f, g, processor, samples, cache) for cache in ("", tmp_path / "rho"))
    real = live > 0
    assert not torch.equal(kept, live) and (kept / live - 1)[real].abs().max() < 0.155      # B.2's 4 bits
    assert torch.equal(kept[1], real[1].float()) and real.sum(1).tolist() == kept.sum(1).round().tolist()
    samples[2].images = samples[3].images
    with pytest.raises(BadSample, match="image's bytes"):
        weights(s, f, g, processor, samples, tmp_path / "rho")


def test_the_cache_that_density_py_writes_for_a_recipe_serves_a_run(teacher, tmp_path, monkeypatch):
    """One source is too small and comes round again; both have samples of the same name."""
    for name, seed, count in (("a", 5, 2), ("b", 6, 4)):
        lines = []
        for i in range(count):
            page = World("train", seed, "receipt", cells=(3, 7))[i]
            page.images[0].save(tmp_path / f"{name}{i}.png")
            lines.append(dict(id=f"page {i}", messages=page.messages[:2], images=[f"{name}{i}.png"]))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [dict(name=n, path=f"{n}.jsonl", weight=1) for n in "ab"]
    (tmp_path / "mix.json").write_text(json.dumps(dict(sources=sources, samples=6)))
    made = ["density.py", "--teacher", str(teacher), "--cache", str(tmp_path / "rho"), "--data", str(tmp_path / "mix.json")]
    monkeypatch.setattr(sys, "argv", made)
    density.main()
    run = ["--teacher", teacher, "--data", tmp_path / "mix.json", "--density-cache", tmp_path / "rho", "--tokens", 600,
           "--batch-tokens", 200, "--micro-tokens", 200, "--threads", 1, "--stages", "50/50/0"]
    distill.main([*map(str, run), "--out", str(tmp_path / "run")])
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 3
    with pytest.raises(SystemExit, match="made with another"):
        distill.main([*map(str, run), "--dtype", "float64", "--out", str(tmp_path / "other")])


def test_cached_gradient_weights_are_the_live_ones_and_no_other_texts(teacher, tmp_path, monkeypatch):
    """C5 from the file that --write-cache made, beside finite-difference-tested scores; rows with and without image."""
    lines = []
    for i in range(4):
        page = World("train", 5, "receipt", cells=(3, 7))[i]
        page.images[0].save(tmp_path / f"{i}.png")
        lines.append(dict(id=f"page {i}", messages=page.messages[:2], images=[f"{i}.png"]))
    lines.append(dict(id="talk", messages=[dict(role="user", content="who?"), dict(role="assistant", content="me and you")]))
    data, cache = tmp_path / "d.jsonl", tmp_path / "scores"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ["--teacher", teacher, "--data", data, "--tokens", 600, "--batch-tokens", 200, "--micro-tokens", 200,
           "--threads", 1, "--stages", "50/50/0", "--cond", "c5", "--out", tmp_path / "run"]
    distill.main([*map(str, run), "--write-cache", str(cache)])
    s = distill.parse(distill.DistillSettings, distill.DEFAULTS, [*map(str, run)])
    f, g, processor = distill.build(s, torch.device("cpu"))
    samples = list(distill.read_data(str(data))[i] for i in range(5))
    live, kept = (weights(s, f, g, processor, samples, file) for file in ("", cache))
    mask = live > 0
    real = mask & (live > 1e-3 * live.amax(1, keepdim=True))             # below, a weight is floored
    assert not torch.equal(kept, live) and (kept / live)[real].log().abs().max() < 2 * np.log(1.36)
    torch.testing.assert_close(kept.sum(1), (kept > 0).sum(1).float())
    monkeypatch.setattr(fisher, "fisher_scores", None)   # a run with the cache never looks back
    stand_in = Fetch(samples, processor)[Micro((), True, {})]               # for ranks that ran out of samples
    assert torch.equal(density.WEIGHTS["fisher"](stand_in.rho, None, stand_in.mask), stand_in.mask.float())
    assert stand_in.weight == 0 and distill.Distillation(s, f, g).loss(stand_in, "stage 2")[1] == 1
    distill.main([*map(str, run), "--density-cache", str(cache)])
    assert {line["stage"] for line in log(tmp_path / "run")} == {"stage 1", "stage 2"}
    data.write_text(data.read_text().replace("me and you", "you and me"))
    with pytest.raises(SystemExit, match="sample 'talk': images, tokens or labels are not"):
        distill.main([*map(str, run[:-1]), str(tmp_path / "other"), "--density-cache", str(cache)])
    with pytest.raises(SystemExit, match="c5, sl.*not ld"):
        distill.main([*map(str, run[:-3]), "ld", "--out", str(tmp_path / "ld"), "--write-cache", str(cache)])


def test_padding_adds_nothing(teacher, tmp_path):
    """A padded batch is the sum of its rows alone, and what stands in the padding does not matter."""
    s, f, g, processor = load(teacher, tmp_path)
    objective, (batch, rows) = distill.Distillation(s, f, g), three_rows(processor)
    for label in ("stage 2", "stage 3"):
        loss, count, _ = objective.loss(batch, label)
        alone = [objective.loss(row, label) for row in rows]
        assert count == sum(n for _, n, _ in alone)
        assert loss.item() == pytest.approx(sum(x.item() for x, *_ in alone), rel=1e-6)    # w is fp32
        batch.ids[~batch.mask] = 65
        assert objective.loss(batch, label)[0].item() == loss.item()


def gradients(objective, batch, label, parts):
    """-> {mixer parameter: gradient}, and the most bytes alive on the way; parts: one by one, as the loop does it."""
    def backward(part):
        part.backward()
        return part.detach()
    objective.prepare(0.5)
    objective.loss(batch, label)                          # what is made on first use is not counted
    with Peak() as count:
        loss, *_ = objective.loss(batch, label, **dict(backward=backward) if parts else {})
        if not parts:
            loss.backward()
    grads = {n: p.grad for n, p in objective.mixers.items()}
    for p in objective.mixers.values():
        p.grad = None
    return grads, count.peak


def test_layers_that_are_fed_the_teachers_stream_are_differentiated_one_at_a_time(teacher, tmp_path):
    """The gradients of the whole sum; and three times the layers need hardly more memory, where one graph needs it."""
    peaks = {}
    for layers in (4, 12):
        s, f, _, processor = load(teacher, tmp_path)
        f.model.language_model.layers.extend([copy.deepcopy(f.layers[i % 4]) for i in range(layers - 4)])
        objective, (batch, _) = distill.Distillation(s, f, distill.convert(s, f)), three_rows(processor)
        (one, peaks[layers]), (all_, joint) = (gradients(objective, batch, "stage 2", parts) for parts in (True, False))
        assert one.keys() == all_.keys() and len(objective.replaced) == layers * 3 // 4
        for name in one:
            torch.testing.assert_close(one[name], all_[name], rtol=1e-12, atol=0)
    size = sum(g.nbytes for g in one.values())            # gradients themselves are as many as the layers
    assert peaks[12] - size < 1.1 * peaks[4] and joint - size > 4 * peaks[4]


@pytest.mark.parametrize("label, feed", [("stage 2", "own"), ("stage 3", "teacher")])
def test_recompute_gives_the_same_gradients_in_less_memory(teacher, tmp_path, label, feed):
    kept, again = (gradients(distill.Distillation(s, f, g), three_rows(processor)[0], label, parts=True)
                   for s, f, g, processor in (load(teacher, tmp_path, feed=feed, **flag) for flag in ({}, dict(recompute=True))))
    for name in kept[0]:
        torch.testing.assert_close(again[0][name], kept[0][name], rtol=1e-12, atol=0)
    assert again[1] < 0.7 * kept[1]


# ---------------------------------------------------------------------------------------------------------
# Stage 3


class Peak(TorchDispatchMode):
    """The largest number of bytes in tensors alive at one time among those made under it, gradients included."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([t.untyped_storage() for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                       for x in ((args, kwargs), out))
        for storage in made:                              # a view of what was there before is not made here
            if storage._cdata not in {old._cdata for old in given}:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def plain_kd(h_s, h_t, y, head_s, head_t):
    """Eq. 1's two sums with all logits at once, by PyTorch's own losses."""
    high = torch.promote_types(h_s.dtype, torch.float32)
    logits = head_s(h_s).to(high)
    with torch.no_grad():
        log_p = head_t(h_t).to(high).log_softmax(-1)
    return (F.kl_div(logits.log_softmax(-1), log_p, reduction="sum", log_target=True),
            F.cross_entropy(logits, y, reduction="sum", ignore_index=-100))


def kd_case(n, D, V, dtype):
    torch.manual_seed(0)
    head_s, head_t = (torch.nn.Linear(D, V, bias=False, dtype=dtype) for _ in range(2))
    y = torch.randint(0, V, (n,))
    y[::3] = -100
    return torch.randn(n, D, dtype=dtype, requires_grad=True), torch.randn(n, D, dtype=dtype), y, head_s, head_t


def test_chunked_kd_equals_full_logits_and_their_gradients():
    case = h, h_t, y, head, _ = kd_case(41, 12, 300, torch.float64)
    for of in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.1)):
        results = []
        for form in (plain_kd, partial(distill.kd_sums, chunk=7)):
            kl, ce = form(*case)
            results.append([kl, ce, *torch.autograd.grad(of[0] * kl + of[1] * ce, [h, head.weight])])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    kl, _ = distill.kd_sums(h, h.detach(), y, head, head, chunk=7)                      # KL(p || p)
    assert abs(kl.item()) < 1e-12 and torch.autograd.grad(kl, h)[0].abs().max() < 1e-12
    kl, ce = distill.kd_sums(h[:0], h_t[:0], y[:0], head, head)                         # no row is supervised
    assert kl.item() == ce.item() == 0 and torch.equal(torch.autograd.grad(kl + ce, h)[0], torch.zeros_like(h))


def test_chunked_kd_needs_an_eighth_of_the_memory():
    """Sixteen chunks, as the default of 512 rows makes of 8,192 tokens. Bytes are counted, not sampled."""
    peaks = []
    for form in (plain_kd, partial(distill.kd_sums, chunk=64)):
        case = kd_case(1024, 8, 4096, torch.float32)
        for head in case[3:]:
            head.requires_grad_(False)
        with Peak() as count:
            kl, ce = form(*case)
            (kl + 0.1 * ce).backward()
        peaks.append(count.peak)
    assert peaks[0] > 4 * 1024 * 4096 * 4 and peaks[1] <= peaks[0] / 8


# ---------------------------------------------------------------------------------------------------------
# Runs


def test_c4_without_contrast_is_c3(teacher, tmp_path, monkeypatch):
    """At tau = 1e9 every weight is 1: the same bits as C3; at tau = 0.5 others."""
    for name, changes in {"c3": {}, "c4": dict(tau=1e9), "c4-sharp": {}}.items():
        train(settings(teacher, tmp_path / name, cond=name[:2], **changes), monkeypatch)
    c3, flat, sharp = (checkpoint(tmp_path / n)["parameters"] for n in ("c3", "c4", "c4-sharp"))
    assert log(tmp_path / "c3") == log(tmp_path / "c4") != log(tmp_path / "c4-sharp")
    assert all(torch.equal(c3[n], flat[n]) for n in c3)
    assert not any(torch.equal(c3[n], sharp[n]) for n in c3 if n.endswith("proj.weight"))


@pytest.mark.parametrize("cond", distill.CONDS)
def test_every_condition_runs(teacher, tmp_path, monkeypatch, cond):
    train(settings(teacher, tmp_path, cond=cond, tokens=600, stages="50/0/50"), monkeypatch)
    lines = log(tmp_path)
    assert [l["stage"] for l in lines] == (["stage 3"] * 2 if cond == "c1" else ["stage 1", "stage 3"])
    assert all(np.isfinite(l["loss"]) for l in lines)


@pytest.mark.parametrize("stage3", ["mixers", "full"])
def test_each_stage_moves_its_parameters_and_no_others(teacher, tmp_path, monkeypatch, stage3):
    """10/30/60 of the tokens; Stage 1 the new parameters, Stage 2 the mixers, Stage 3 those or all but the tower."""
    seen, built = [], []                                  # (stage, copies of all the student's parameters)
    prepare, build = distill.Distillation.prepare, distill.build

    def spied(self, progress):
        label, _ = out = prepare(self, progress)
        seen.append((label, {n: p.detach().clone() for n, p in self.student.named_parameters()}))
        return out
    monkeypatch.setattr(distill.Distillation, "prepare", spied)
    monkeypatch.setattr(distill, "build", lambda *args: built.append(build(*args)) or built[-1])
    train(settings(teacher, tmp_path, tokens=6000, stages="10/30/60", stage3=stage3), monkeypatch)
    f, g, _ = built[0]

    names = set(seen[0][1])
    mixers = {n for n in names if re.search(r"layers\.[012]\.self_attn\.", n)}
    trains = {"stage 1": {n for n in mixers if n.split("self_attn.")[1] in NEW}, "stage 2": mixers,
              "stage 3": mixers if stage3 == "mixers" else {n for n in names if ".visual." not in n}}
    last = {n: p.detach() for n, p in g.named_parameters()}
    for (label, before), (_, after) in zip(seen, seen[1:] + [("", last)]):
        assert {n for n in names if not torch.equal(before[n], after[n])} == trains[label], label
    begins = [0] + [line["tokens"] for line in log(tmp_path)[:-1]]
    assert [l["stage"] for l in log(tmp_path)] == [f"stage {1 + (t >= 600) + (t >= 2400)}" for t in begins]

    fresh = Qwen3VL.from_pretrained(teacher).state_dict()
    assert all(torch.equal(fresh[n], p) for n, p in f.state_dict().items())             # the teacher stays as it was
    assert all(torch.equal(fresh[n], last[n]) for n in names - trains["stage 3"])


@pytest.mark.parametrize("schedule", ["whole", "stage"])
def test_the_rate_of_every_step_is_that_of_its_place_in_the_schedule(teacher, tmp_path, monkeypatch, schedule):
    """A cosine to a tenth of the peak, over the run or over each stage; a step has the rate of its end, as planned."""
    train(settings(teacher, tmp_path, schedule=schedule, warmup=0, cond="c3", tokens=3000), monkeypatch)
    lines, begins = log(tmp_path), [0]
    for line in lines:
        at, share = begins[-1], dict(zip(("stage 1", "stage 2", "stage 3"), ((0, .4), (.4, .6), (.6, 1))))[line["stage"]]
        a, b = (0, 1) if schedule == "whole" else share
        x = min(1, ((at + 300) / 3000 - a) / (b - a))
        assert line["lr"] == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * x)) / 2), rel=1e-9)
        begins.append(line["tokens"])
    assert len(lines) > 8


def test_schedule_and_decay_follow_the_recipe(teacher, tmp_path):
    s, f, g, _ = load(teacher, tmp_path, tokens=1000, batch_tokens=1)
    rates = [loop.learning_rate(s, t / 1000) for t in (0, 5, 10, 505, 1000)]
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 0.55e-3, 1e-4])                     # 1 % warm-up, cosine to 10 %
    groups = loop.groups(list(g.parameters()), 0.01)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    vectors = ("norm.weight", "norm", "bias", "A_log", "self_attn.D")
    for name, p in g.named_parameters():
        if "layers.0.self_attn" in name:
            assert decay[id(p)] == (0.0 if name.endswith(vectors) else 0.01), name


def test_the_recipe_is_table_11s_and_c3s(teacher, tmp_path, monkeypatch):
    """Spelled from the paper: the settings of a run on real data, and what the optimiser of a small one was given."""
    s = distill.parse(distill.DistillSettings, distill.DEFAULTS, ["--data", "mix.json"])
    paper = dict(tokens=2_000_000_000, batch_tokens=2_000_000, lr=1e-4, warmup=0.01, floor=0.1, weight_decay=0.01, clip=1.0,
                 stages="10/30/60", keep_every=4, lambda_kl=1.0, lambda_ce=0.1, tau=0.5, beta=2.0, minmax="all")
    assert {name: getattr(s, name) for name in paper} == paper
    assert density.Weighting() == density.Weighting(tau=0.5, beta=2.0, minmax="all", k=25.0) and density.BOOST == 5
    steps, seeds = [], []
    step, loss = torch.optim.AdamW.step, distill.Distillation.loss

    def spied(self, *args):
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        kinds = {(p.dim() >= 2, g["weight_decay"]) for g in self.param_groups for p in g["params"]}
        rules = {(g["betas"], g["eps"], g["lr"]) for g in self.param_groups}
        steps.append((torch.stack([p.grad.norm() for p in used]).norm().item(), kinds, rules))
        return step(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    monkeypatch.setattr(distill.Distillation, "loss", lambda *args: seeds.append(torch.initial_seed()) or loss(*args))
    for name, changes in dict(a={}, b={}, c=dict(seed=1), loose=dict(clip=1e6)).items():
        train(settings(teacher, tmp_path / name, tokens=3000, **changes), monkeypatch)
    lines = log(tmp_path / "a")
    for line, (norm, kinds, rules) in zip(lines, steps):
        assert kinds == {(True, 0.01), (False, 0.0)} and rules == {((0.9, 0.95), 1e-8, line["lr"])}
        assert norm == pytest.approx(min(1.0, line["grad_norm"]), rel=1e-4)
        if line["stage"] == "stage 3":                    # Eq. 1
            assert line["loss"] == pytest.approx(1.0 * line["kl"] + 0.1 * line["ce"], rel=1e-6)
    assert min(line["grad_norm"] for line in lines) > 2   # all were clipped; below the bound, nothing is scaled
    loose = log(tmp_path / "loose")
    assert [norm for norm, *_ in steps[-len(loose):]] == pytest.approx([line["grad_norm"] for line in loose], rel=1e-4)
    n, other = len(lines), len(log(tmp_path / "c"))       # C.1: a fixed seed for dropout, another draw in each step
    assert len(set(seeds[:n])) == n and seeds[n:2 * n] == seeds[:n]
    assert not set(seeds[2 * n:2 * n + other]) & set(seeds[:n])


@pytest.mark.parametrize("init", ["default", "paper"])
@pytest.mark.parametrize("cond", ["c4", "c6"])
def test_every_layers_mixer_has_a_draw_of_its_own_that_the_seed_fixes(teacher, tmp_path, cond, init):
    drawn = []
    for seed in (0, 0, 1):
        _, _, g, _ = load(teacher, tmp_path, cond=cond, init=init, seed=seed)
        drawn.append([g.layers[i].self_attn.gate_proj.weight for i in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1]))
    assert len({tuple(w.flatten().tolist()) for w in drawn[0] + drawn[2]}) == 6


# ---------------------------------------------------------------------------------------------------------
# Processes. They come from a server that has imported torch, each with a fresh interpreter's state.

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed", "torch.utils.data", "tokenizers", "numpy", "PIL.Image"])


def work(argv, environment, errors, poison=None):
    """What a process does: distill.py on small pages. poison: (sample, "loss" | "gradient") that becomes NaN."""
    os.environ.update(environment)
    distill.World, distill.finish, loss = SMALL, lambda *args: None, distill.Distillation.loss

    def poisoned(self, batch, label, backward):
        def spoilt(part):
            if poison[0] in batch.names and poison[1] == "loss":
                part = part * float("nan")
            elif poison[0] in batch.names:
                part.register_hook(lambda g: g * float("nan"))
            return backward(part)
        return loss(self, batch, label, spoilt)
    if poison:
        distill.Distillation.loss = poisoned
    try:
        distill.main(argv)
    except SystemExit as stop:
        errors.write_text(stop.code)
        raise


def begin(argv, out, world=1, **kwargs):
    """Starts `world` processes, with the environment torchrun gives them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port)
        processes.append(SERVER.Process(target=work, kwargs=kwargs, args=(argv, {k: str(v) for k, v in env.items()},
                                                                         out / f"errors{rank}")))
        processes[-1].start()
    return processes


def ended(processes):
    for p in processes:
        p.join(120)
    return [p.exitcode for p in processes]


@pytest.mark.parametrize("cond, rel", [("c3", 1e-12), ("c4", 1e-7)])       # the weights of C4 are fp32
def test_ranks_and_accumulation_do_not_change_a_step(teacher, tmp_path, monkeypatch, cond, rel):
    """Three float64 steps, one in each stage: in one piece, in micro-batches, on two processes."""
    argv = dict(cond=cond, dtype="float64", tokens=1800, batch_tokens=600, stages="33/33/34", kl="text")
    outs = [tmp_path / name for name in ("whole", "pieces", "ranks")]
    train(settings(teacher, outs[0], **argv), monkeypatch)
    train(settings(teacher, outs[1], micro_tokens=150, **argv), monkeypatch)
    assert ended(begin(settings(teacher, outs[2], micro_tokens=150, **argv), outs[2], world=2)) == [0, 0]
    whole, *others = (checkpoint(out)["parameters"] for out in outs)
    logs = [log(out) for out in outs]
    assert [l["stage"] for l in logs[0]] == ["stage 1", "stage 2", "stage 3"]
    for theirs, lines in zip(others, logs[1:]):
        for a, b in zip(logs[0], lines):
            assert all(a[k] == pytest.approx(b[k], rel=rel) for k in a if k not in ("stage", "drift_top1")), (a, b)
        for n, p in whole.items():
            assert (p - theirs[n]).abs().max() <= rel * p.abs().max(), n


def same_end(out, whole):
    """Same log, byte by byte, and same parameters and optimiser, bit by bit."""
    ours, theirs = checkpoint(out), checkpoint(whole)
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert all(torch.equal(p, theirs["parameters"][n]) for n, p in ours["parameters"].items())
    assert set(ours["optimiser"]) == set(theirs["optimiser"]) == set(ours["parameters"])
    for name, moments in ours["optimiser"].items():
        assert all(torch.equal(value, theirs["optimiser"][name][k]) for k, value in moments.items())
    assert ours["cursor"] == theirs["cursor"] and ours["step"] == theirs["step"]


class Died(BaseException):
    pass


def test_a_run_that_dies_at_any_step_of_a_save_goes_on(teacher, tmp_path, monkeypatch):
    """Every write, rename and removal of every save, at stage borders and between, is in turn the last thing done."""
    whole, calls, last = tmp_path / "whole", [], [None]

    def mortal(name, real, half):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == last[0]:
                half(*args)
                raise Died
            return real(*args, **kwargs)
        return call

    def part_of_file(state, f):
        f.write(b"PK\x03\x04 and no more")

    def part_of_folder(folder, **kwargs):
        for file in Path(folder).glob("*"):
            file.unlink()
    for module, name, half in ((torch, "save", part_of_file), (shutil, "rmtree", part_of_folder),
                               *((os, n, lambda *args: None) for n in ("fsync", "rename", "replace"))):
        monkeypatch.setattr(module, name, mortal(name, getattr(module, name), half))
    short = dict(tokens=900, stages="20/40/40")           # saves at a border, at both, and at the end
    train(settings(teacher, whole, **short), monkeypatch)
    total = list(calls)
    assert [l["stage"][-1] for l in log(whole)] == ["1", "2", "3"] and total.count("save") == 3
    for n in range(1, len(total) + 1):
        out = tmp_path / str(n)
        calls.clear()
        last[0] = n
        with pytest.raises(Died):
            train(settings(teacher, out, **short), monkeypatch)
        last[0] = None
        train(settings(teacher, out, **short), monkeypatch)
        same_end(out, whole)
        assert not list(out.glob("*.tmp"))


def test_kill_9_at_any_instant_then_the_same_command_ends_with_the_same_bits(teacher, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    changes = dict(tokens=6000, save_every=1)
    train(settings(teacher, whole, **changes), monkeypatch)
    rng, kills = np.random.default_rng(int.from_bytes(os.urandom(4), "little")), 0

    def lines(folder):
        return (folder / "log.jsonl").read_bytes().count(b"\n") if (folder / "log.jsonl").exists() else -1

    def reached(share):                                   # a random instant after this share of the run
        return lines(out) >= share * lines(whole) and rng.random() < 0.02

    def saving():
        return list(out.glob("step_*.tmp"))
    for moment in (partial(reached, 0), saving, partial(reached, 0.3), partial(reached, 0.6), saving):
        process = begin(settings(teacher, out, **changes), out)[0]
        while process.is_alive() and not moment():
            time.sleep(0.001)
        process.kill()                                    # SIGKILL
        kills += ended([process]) == [-signal.SIGKILL]
    assert ended(begin(settings(teacher, out, **changes), out)) == [0]
    assert kills >= 4
    same_end(out, whole)


def test_other_settings_do_not_go_on_with_a_run(teacher, tmp_path, monkeypatch):
    train(settings(teacher, tmp_path), monkeypatch)
    kept = checkpoint(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train(settings(teacher, tmp_path, lr=2e-3, feed="own"), monkeypatch)
    assert all(x in stop.value.code for x in (str(tmp_path), "--lr 0.001 there, 0.002 here", "--feed", "--out"))
    train(settings(teacher, tmp_path, save_every=7, workers=1), monkeypatch)             # these are free to change
    same = checkpoint(tmp_path)
    assert all(torch.equal(p, same["parameters"][n]) for n, p in kept["parameters"].items())


# ---------------------------------------------------------------------------------------------------------
# What goes wrong


def documents(folder, count=6, bad=None):
    """A JSONL file of short texts doc-1 ..., and one picture; `bad`, a line or a sample, stands on line 4."""
    World("train", 0, "sign")[0].images[0].save(folder / "good.png")
    parts = [[dict(type="text", text="word " * (9 + i))] for i in range(1, count + 1)]
    lines = [json.dumps(dict(id=f"doc-{i}", messages=[dict(role="document", content=part)]))
             for i, part in enumerate(parts, 1)]
    if bad is not None:
        lines[3] = bad if isinstance(bad, str) else json.dumps(bad)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_all_ranks_before_the_step(teacher, tmp_path, what):
    """Two processes, one of which meets the poisoned sample; nobody steps, and its name is said."""
    out, data = tmp_path / "out", documents(tmp_path)
    argv = settings(teacher, out, data=data, tokens=4000, batch_tokens=200, micro_tokens=100, save_every=1)
    assert ended(begin(argv, out, world=2, poison=("doc-5", what))) == [1, 1]
    messages = [(out / f"errors{rank}").read_text() for rank in (0, 1)]
    step = len(log(out)) + 1
    assert messages[0] == messages[1] and f"step {step}: the {what} is not finite" in messages[0]
    assert "doc-5" in messages[0] and (what == "gradient" or messages[0].count("doc-") <= 2)
    if step > 1:
        assert checkpoint(out)["step"] == step - 1
    assert not (out / f"step_{step}").exists()


def broken(folder, kind):
    image = folder / "bad.png"
    if kind == "truncated":
        image.write_bytes((folder / "good.png").read_bytes()[:200])
    elif kind == "bomb":
        header = bytearray((folder / "good.png").read_bytes()[:64])
        header[16:24] = (60_000).to_bytes(4, "big") * 2                                 # IHDR's width and height
        header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
        image.write_bytes(bytes(header))
    return dict(images=[image.name], messages=[
        dict(role="user", content=[dict(type="image"), dict(type="text", text="what?")]),
        dict(role="assistant", content=[dict(type="text", text="this")])])


@pytest.mark.parametrize("kind", ["json", "field", "missing", "truncated", "bomb"])
def test_a_bad_sample_is_one_sentence_with_file_and_line(teacher, tmp_path, monkeypatch, capsys, kind):
    documents(tmp_path)
    bad = {"json": '{"id": "doc-4", "messages": [', "field": dict(id="doc-4", messages=[], colour="red")}
    data = documents(tmp_path, bad=bad.get(kind) or broken(tmp_path, kind))
    argv = dict(data=data, tokens=2000, batch_tokens=100)
    with pytest.raises(SystemExit) as stop:
        train(settings(teacher, tmp_path / "stops", **argv), monkeypatch)
    assert "train.jsonl line 4" in stop.value.code and "\n" not in stop.value.code
    if kind not in ("json", "field"):
        assert "bad.png" in stop.value.code
    train(settings(teacher, tmp_path / "skips", skip_bad=True, **argv), monkeypatch)
    said = capsys.readouterr().out
    bad, seen = map(int, re.search(r"(\d+) of (\d+) samples could not be used", said).groups())
    assert bad >= 2 and abs(bad - seen / 6) < 1
    assert "train.jsonl line 4" in said and log(tmp_path / "skips")[-1]["tokens"] >= 2000


def test_data_that_teach_nothing_and_folders_of_others_stop_the_run(teacher, tmp_path, monkeypatch):
    """Questions without an answer; a folder that holds a model; one that lost its checkpoint; an empty file."""
    asked = [dict(messages=[dict(role="user", content="hi there")]) for _ in range(9)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "empty.jsonl").write_text("\n")
    pair = dict(messages=[dict(role="user", content="hi")], chosen="a", rejected="b")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    few = dict(tokens=4000, batch_tokens=20)
    for changes, out, words in (
            (dict(cond="c1", data=str(tmp_path / "asked.jsonl"), **few), "a", "for 20 steps no sample had anything to learn"),
            (dict(data=str(tmp_path / "empty.jsonl")), "b", "holds no sample"),
            (dict(data=str(tmp_path / "pairs.jsonl")), "c", "pairs.jsonl line 1 is a preference pair"),
            ({}, "model", "holds a model that no run of this script began")):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text("{}")
        with pytest.raises(SystemExit) as stop:
            train(settings(teacher, tmp_path / out, **changes), monkeypatch)
        assert words in str(stop.value.code)
    train(settings(teacher, tmp_path / "lost"), monkeypatch)
    for folder in (tmp_path / "lost").glob("step_*"):
        shutil.rmtree(folder)
    with pytest.raises(SystemExit, match="has lost its last checkpoint"):
        train(settings(teacher, tmp_path / "lost"), monkeypatch)


@pytest.mark.parametrize("flags, says", [
    (dict(stages="10/30"), "--stages 10/30"), (dict(stages="10/30/70"), "sum to 100"),
    (dict(stages="nan/30/60"), "--stages"), (dict(stages="10/x/30/60"), "--stages"), (dict(stages="-10/50/60"), "--stages"), (dict(tokens=200), "--tokens 200 is less than the 300"),
    (dict(k=101), "--k 101"), (dict(tau=0), "--tau 0"), (dict(save_every=0), "--save-every 0"), (dict(cond="c9"), 2),
    (dict(keep_every=1), "--keep-every 1"), (dict(keep_every=9), "keep_every 9"),
    (dict(data="d.jsonl", suite="reading", dry_run=True), "--suite and --page"), (dict(density_cache="x"), "need --data"),
    (dict(data="d.jsonl", write_cache="x", dry_run=True), "not c4"), (dict(data="d.jsonl", density_cache="no"), "no such file"),
    (dict(data="d.jsonl", cond="c3", density_cache="no", dry_run=True), "not c3"),
    (dict(mixer="none"), "no mixer 'none'"), (dict(teacher="nowhere"), "nowhere"), (dict(data="nowhere.jsonl"), "nowhere.jsonl")])
def test_wrong_settings_are_refused_before_anything_runs(teacher, tmp_path, monkeypatch, flags, says):
    with pytest.raises(SystemExit) as stop:
        train(settings(teacher, tmp_path / "out", **flags), monkeypatch)
    assert stop.value.code == says or says in stop.value.code
    assert not (tmp_path / "out").exists()


def test_help_and_dry_run_need_no_weights(teacher, tmp_path, capsys):
    """The counts are those of the built student; what is missing is named."""
    with pytest.raises(SystemExit) as stop:
        distill.main(["--help"])
    assert stop.value.code == 0 and "up to 0.1 %" in " ".join(capsys.readouterr().out.split())
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(teacher / "config.json", bare)
    for stage3 in ("mixers", "full"):
        flags = dict(stage3=stage3, data=tmp_path / "no.jsonl", dry_run=True)
        distill.main(settings(bare, tmp_path / "out", **flags))
        said = capsys.readouterr().out
        _, f, g, _ = load(teacher, tmp_path, stage3=stage3)
        mixers = {n: p.numel() for n, p in g.named_parameters() if re.search(r"layers\.[012]\.self_attn\.", n)}
        new = sum(c for n, c in mixers.items() if n.split("self_attn.")[1] in NEW)
        last = sum(mixers.values()) if stage3 == "mixers" else \
            sum(p.numel() for n, p in g.named_parameters() if ".visual." not in n)
        counts = [sum(p.numel() for p in f.parameters()), new, sum(mixers.values()), last]
        assert re.findall(r"[\d,.]+ M\b", said) == [f"{count / 1e6:,.1f} M" for count in counts]
        assert said.strip().splitlines()[-1] == ("missing: tokenizer.json, preprocessor_config.json, missing file "
                                                 f"model.safetensors, {tmp_path}/no.jsonl")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# A mixer of the reader's own

MIXER = '''
from typing import NamedTuple

import torch
import torch.nn as nn


class State(NamedTuple):
    total: torch.Tensor             # (B, G * P)  sum of the values so far
    count: torch.Tensor             # (B, 1)      how many they were


class RunningMean(nn.Module):
    """y_t = W_O (gate * mean of W_V x_s over s <= t): attention that looks at all positions alike."""
    INHERITED = ("v_proj", "o_proj")

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        width = config.num_attention_heads * config.head_dim
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.ones(width))

    @classmethod
    def from_attention(cls, attention, init="default", generator=None):
        mixer = cls(attention.config, attention.layer).to(attention.v_proj.weight)      # its device and dtype
        for name in cls.INHERITED:
            getattr(mixer, name).load_state_dict(getattr(attention, name).state_dict())
        return mixer

    def forward(self, x, mask=None, state=None, rope=None):                             # (B, T, D)
        c, v = self.config, self.v_proj(x)                                              # (B, T, G * P)
        real = x.new_ones(*x.shape[:2], 1) if mask is None else mask[..., None].to(x.dtype)
        total, count = (v * real).cumsum(1), real.cumsum(1)
        if state is not None:
            total, count = total + state.total[:, None], count + state.count[:, None]
        y = (total / count.clamp(min=1)).unflatten(-1, (-1, c.head_dim))                # (B, T, G, P)
        y = y.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, dim=2).flatten(2)
        return self.o_proj(self.gate * y), State(total[:, -1], count[:, -1])
'''


def test_a_mixer_of_the_readers_own_trains_and_answers(teacher, tmp_path, monkeypatch):
    """From its file through all stages, the saved folder and chunked decoding; Stage 1 trains its gate alone."""
    (tmp_path / "mymixer.py").write_text(MIXER)
    mixer, out = f"{tmp_path}/mymixer.py:RunningMean", tmp_path / "out"
    monkeypatch.setattr(distill, "World", SMALL)
    monkeypatch.setattr(distill, "draw_pages", lambda *args: None)
    distill.main(settings(teacher, out, mixer=mixer, tokens=3000))
    lines, found = log(out), checkpoint(out)["parameters"]
    assert {n.split("self_attn.")[1] for n in found} == {"v_proj.weight", "o_proj.weight", "gate"}
    assert [l["loss"] for l in lines if l["stage"] == "stage 3"][-1] < 10 and len({l["stage"] for l in lines}) == 3
    student, processor = Qwen3VL.from_pretrained(out), Processor(out)
    assert type(student.layers[0].self_attn).__name__ == "RunningMean"
    e = processor.encode(SMALL("eval")[0])
    inputs = e.ids[None], None, e.pixels, e.grids
    with torch.no_grad():
        whole, (pieces, _, _) = student(*inputs)[:, -1], student.prefill(*inputs, chunk=5)
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-4)
    (tmp_path / "still.py").write_text(MIXER.replace("nn.Parameter(torch.ones(width))", "1"))
    with pytest.raises(SystemExit, match="Stage 1 has nothing to train"):
        distill.main(settings(teacher, tmp_path / "still", mixer=f"{tmp_path}/still.py:RunningMean"))
