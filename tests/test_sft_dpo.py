"""sft_dpo.py against transformers, TRL, PEFT and closed forms; its runs against the same runs killed, cut
otherwise, on two processes and sharded. Run: pytest tests/test_sft_dpo.py"""
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import distill
import sft_dpo
from data import BadSample, Sample, collate, encode_rows
from loop import Checked
from model import Config, Qwen3VL, TextConfig, VisionConfig, dtype_of, to_hybrid
from parts.ranks import Ranks, shard
from synthdoc import World

SPECIAL = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end",
                                      "image_pad", "video_pad")]
SMALL = partial(World, cells=(3, 7), questions=2)         # pages of 21 visual tokens


def write_model(folder):
    """A random Qwen3-VL of 4 layers with a tokenizer of single bytes, in `folder`/plain, and a hybrid of it
    whose layers 0 and 2 are Mamba-2, in `folder`/hybrid."""
    plain = folder / "plain"
    plain.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(plain / "tokenizer.json"))
    at = {token: len(letters) + i for i, token in enumerate(SPECIAL)}
    model = Qwen3VL(Config(
        TextConfig(len(letters) + len(SPECIAL), 32, 48, 4, 2, 1, 16, rope_theta=1e3, mrope_section=[4, 2, 2]),
        VisionConfig(2, 24, 32, 2, 8, 2, 2, 32, 64, [0, 1]), at["<|image_pad|>"], at["<|video_pad|>"],
        at["<|vision_start|>"], at["<|vision_end|>"], True, [at["<|im_end|>"]]))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(float("norm" in name and name.endswith("weight")), 0.1, generator=generator)
    (plain / "preprocessor_config.json").write_text(json.dumps(dict(
        size=dict(shortest_edge=1024, longest_edge=640 ** 2), patch_size=8, merge_size=2)))
    model.save_pretrained(plain)
    model.folder = plain
    to_hybrid(model, keep_every=2).save_pretrained(folder / "hybrid")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models"))


def settings(phase, model, out, **changes):
    """Four steps of about 400 tokens, in float64, without dropout."""
    kind, defaults = sft_dpo.PHASES[phase].settings, sft_dpo.PHASES[phase].defaults
    flags = dict(model=model, out=out, tokens=1600, batch_tokens=400, micro_tokens=10_000, lr=1e-3,
                 save_every=2, threads=1, dtype="float64")
    flags |= (dict(rank=4, alpha=8, dropout=0) if phase == "dpo" else {}) | changes
    return distill.parse(kind, defaults, argv(flags))


def argv(flags):
    return [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def objective(phase, model, out="", **changes):
    """-> the objective, a batch of four rows of unlike lengths, the processor."""
    s = settings(phase, model, out, **changes)
    made, processor = sft_dpo.build(s, sft_dpo.PHASES[phase], torch.device("cpu"))
    world = SMALL("train", 3, pairs=phase == "dpo")
    rows = []
    for i in range(20):
        if world[i].images and len(rows) < 4:
            rows += encode_rows(processor, world[i])
    return made, to_dtype(collate(rows, processor.pad_id), s), processor


def for_transformers(batch, config):
    return dict(input_ids=batch.ids, attention_mask=batch.mask.long(), pixel_values=batch.pixels,
                image_grid_thw=batch.grids, mm_token_type_ids=(batch.ids == config.image_token_id).int())


def to_dtype(batch, s):
    return replace(batch, pixels=batch.pixels.to(getattr(torch, s.dtype)))


def stir(model, seed=0):
    """Adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, sft_dpo.LoRA):
            m.B.data.normal_(0, 0.1, generator=generator)


class Killed(Exception):
    pass


def train(phase, s, ranks=Ranks(0, 1, torch.device("cpu")), stop=math.inf):
    """A whole run on small pages, killed in its step number `stop`. -> the last checkpoint's parameters."""
    made, processor = sft_dpo.build(s, sft_dpo.PHASES[phase], ranks.device)
    pairs = phase == "dpo"
    data = Checked(SMALL("train", 5, pairs=pairs), partial(sft_dpo.check_kind, pairs=pairs, embedded=True))
    if s.shard:
        shard(ranks, made.model)
    return run(s, made, processor, data, ranks, stop)


def train_distill(s, ranks=Ranks(0, 1, torch.device("cpu")), stop=math.inf):
    teacher, student, processor = distill.build(s, ranks.device)
    if s.shard:
        shard(ranks, teacher, student)
    return run(s, distill.Distillation(s, teacher, student), processor, SMALL("train", 5), ranks, stop)


def run(s, made, processor, data, ranks, stop):
    steps, loss = [1], made.loss

    def dies(batch, label, backward):
        if steps[0] >= stop:
            raise Killed
        steps[0] += batch.last
        return loss(batch, label, backward)
    made.loss = dies
    try:
        distill.run(s, made, processor, data, ranks, betas=(0.9, 0.999))
    except Killed:
        pass
    return state(s.out)["parameters"] if ranks.rank == 0 else None


def state(out):
    out = Path(out)
    return torch.load(out / (out / "latest").read_text() / "state.pt")


def assert_close(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    worst = max((a[n] - b[n]).abs().max().item() for n in a)
    assert worst < tolerance, worst


# -- SFT ---------------------------------------------------------------------------------------------------


def test_sft_loss_and_gradients_equal_transformers(folder):
    transformers = pytest.importorskip("transformers")
    made, batch, _ = objective("sft", folder / "plain", dtype="float32")
    total, count, _ = made.loss(batch, "sft")
    (total / count).backward()
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder / "plain", dtype=torch.float32, attn_implementation="sdpa")
    out = theirs(**for_transformers(batch, made.model.config), labels=batch.labels)
    out.loss.backward()
    assert 0 < count < batch.mask.sum()                    # prompts are masked
    torch.testing.assert_close(total / count, out.loss, rtol=1e-5, atol=0)
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in made.parameters().items():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_neither_attention_nor_state_passes_between_rows_of_a_batch(folder, kind):
    made, batch, _ = objective("sft", folder / kind)
    with torch.no_grad():
        together, counts = sft_dpo.answer_logps(made.model, batch)
        patches = (batch.grids.prod(1)).tolist()
        alone = []
        for b, (pixels, grid) in enumerate(zip(batch.pixels.split(patches), batch.grids)):
            T = int(batch.mask[b].sum())
            row = replace(batch, ids=batch.ids[b:b + 1, :T], mask=batch.mask[b:b + 1, :T],
                          labels=batch.labels[b:b + 1, :T], pixels=pixels, grids=grid[None])
            alone.append(sft_dpo.answer_logps(made.model, row)[0])
        ids = batch.ids.clone()
        ids[1][batch.labels[1] >= 0] = 65                  # another answer in row 1
        changed = sft_dpo.answer_logps(made.model, replace(batch, ids=ids))[0].split(counts.tolist())
    assert len({int(n) for n in batch.mask.sum(1)}) > 1    # padding is there
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)
    rows = together.split(counts.tolist())
    assert not torch.equal(rows[1], changed[1])
    assert all(torch.equal(rows[b], changed[b]) for b in (0, 2, 3))


@pytest.mark.parametrize("phase", ["sft", "dpo"])
@pytest.mark.parametrize("flag", ["projector", "no-projector"])
def test_the_vision_encoder_gets_no_gradient_and_all_else_does(folder, phase, flag):
    made, batch, _ = objective(phase, folder / "hybrid")
    s = replace(made.s, projector=flag == "projector")
    made = sft_dpo.PHASES[phase].objective(s, Qwen3VL.from_pretrained(folder / "hybrid", torch.float64))
    stir(made.model)
    made.loss(batch, phase)[0].backward()
    reached = {n for n, p in made.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    everything = {n for n, _ in made.model.named_parameters()}
    vision = {n for n in everything if n.startswith("model.visual")}
    mergers = {n for n in vision if "merger" in n}
    expected = everything - vision | (mergers if s.projector else set())
    if phase == "dpo":
        expected = {n for n in expected if n.endswith((".A", ".B"))}
        linear = {n for n, m in Qwen3VL(made.model.config).named_modules() if isinstance(m, torch.nn.Linear)
                  and n != "lm_head" and (not n.startswith("model.visual") or s.projector and "merger" in n)}
        assert {n[:-2] for n in expected} == linear and any("dt_proj" in n for n in linear)
    assert reached == expected


# -- DPO ---------------------------------------------------------------------------------------------------


def test_dpo_loss_is_the_closed_form():
    logps = torch.tensor([[-4.0, -90.0], [-6.0, -3.0], [-5.0, -2.0], [-5.0, -80.0]], dtype=torch.float64)
    loss, chosen, rejected = sft_dpo.dpo_loss(*logps, 0.1)
    for k, (c, r) in enumerate([(0.1, -0.1), (-8.8, 7.7)]):
        assert loss[k].item() == pytest.approx(math.log1p(math.exp(r - c)), rel=1e-12)
        assert (chosen[k].item(), rejected[k].item()) == pytest.approx((c, r), rel=1e-12)


def test_dpo_agrees_with_trl_on_transformers_log_probabilities(folder, tmp_path):
    """Loss and rewards of one batch; the oracle's log-probs come from two models in transformers, merged and
    original, so that this also covers adapters, reference, merging, saving, and what is an answer."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    import transformers
    made, batch, processor = objective("dpo", folder / "plain", dtype="float32", beta=0.3)
    stir(made.model)
    total, pairs, terms = made.loss(batch, "dpo")
    made.result().save_pretrained(tmp_path / "merged")

    order = torch.tensor([0, 2, 1, 3])                     # TRL wants all chosen, then all rejected
    def outputs(path):
        model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = model(**for_transformers(batch, model.config)).logits[order]
        logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[order][:, 1:, None])[..., 0]
        zero = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps * (batch.labels[order][:, 1:] >= 0), entropy=zero,
                               mean_logits=zero, is_top1=zero.bool())
    merged, original = outputs(tmp_path / "merged"), outputs(folder / "plain")
    metrics = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda t: t, gather=lambda t: t)
    fake = SimpleNamespace(
        model=torch.nn.Module(), ref_model=lambda **k: original, accelerator=accelerator, _metrics=metrics,
        beta=made.s.beta, loss_types=["sigmoid"], loss_weights=[1.0], f_divergence_type="reverse_kl",
        ld_alpha=None, precompute_ref_logps=False, use_weighting=False, aux_loss_enabled=False,
        _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    patch = pytest.MonkeyPatch()
    patch.setattr(trainer, "disable_gradient_checkpointing", lambda *a: contextlib.nullcontext())
    inputs = dict(input_ids=batch.ids[order], attention_mask=batch.mask[order].long(),
                  completion_mask=(batch.labels[order] >= 0).long())
    loss = trainer.DPOTrainer._compute_loss(fake, lambda **k: merged, inputs, False)
    patch.undo()
    torch.testing.assert_close(total.detach() / pairs, loss, rtol=1e-4, atol=0)
    for name in terms:
        assert (terms[name] / pairs).item() == pytest.approx(metrics["train"][name][0], rel=1e-3), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_dpo_step_is_ln_2_with_zero_rewards_in_spite_of_dropout(folder, dtype):
    made, batch, _ = objective("dpo", folder / "hybrid", dtype="float32", dropout=0.5)
    model = Qwen3VL.from_pretrained(folder / "hybrid", getattr(torch, dtype))
    made = sft_dpo.DPO(replace(made.s, dtype=dtype), model)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with autocast():
        total, pairs, terms = made.loss(batch, "dpo")
    assert pairs == 2 and total.item() == 2 * torch.tensor(math.log(2)).item()
    assert all(terms[f"rewards/{k}"].item() == 0 for k in ("chosen", "rejected", "margins"))
    stir(made.model)                                       # dropout does reach adapters that do something
    with autocast():
        one, two = (sft_dpo.answer_logps(made.model, batch)[0] for _ in range(2))
        with torch.no_grad(), sft_dpo.adapters_off(made.model):
            off, again = (sft_dpo.answer_logps(made.model, batch)[0] for _ in range(2))
    assert not torch.equal(one, two) and torch.equal(off, again) and off.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
def test_lora_equals_peft(bias):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias))
    x = torch.randn(3, 7, 6)
    ours = sft_dpo.LoRA(torch.nn.Linear(6, 5, bias=bias), 4, 8.0, 0.0)
    ours.base.load_state_dict(base[0].state_dict())
    bound = 6 ** -0.5
    assert ours.A.abs().max() <= bound and ours.A.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.4)
    assert not ours.B.any()
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["0"])
    theirs = peft.get_peft_model(base, config)
    layer = theirs.base_model.model[0]
    ours.B.data.normal_()
    layer.lora_A.default.weight.data.copy_(ours.A)
    layer.lora_B.default.weight.data.copy_(ours.B)
    for f in (ours, theirs):
        f(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.A.grad, layer.lora_A.default.weight.grad)
    torch.testing.assert_close(ours.B.grad, layer.lora_B.default.weight.grad)
    torch.testing.assert_close(ours.merged().weight, theirs.merge_and_unload()[0].weight)


def test_merging_adds_in_fp32_and_rounds_once():
    layer = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.uniform_(layer.weight, 0.5, 1)
    layer.bfloat16()
    lora = sft_dpo.LoRA(layer, 2, 4.0, 0.0)
    lora.B.data.normal_(0, 3e-3)
    exact = layer.weight.double() + 2 * lora.B.double() @ lora.A.double()
    error = (lora.merged().weight.double() - exact).abs()
    # To the nearest bf16 number: at most half of the spacing, 2^-8 in [0.5, 1), twice that from 1 on. Factors
    # or product in bf16 miss it at many entries.
    half = torch.where(exact < 1, 2.0 ** -9, 2.0 ** -8)
    assert layer.weight.dtype == torch.bfloat16 and (error <= half * (1 + 1e-4)).all()


def test_merged_saved_and_loaded_a_hybrid_answers_as_with_adapters(folder, tmp_path):
    made, batch, processor = objective("dpo", folder / "hybrid")
    stir(made.model)
    with torch.no_grad():
        adapted = made.model(batch.ids, batch.mask, batch.pixels, batch.grids)
        with sft_dpo.adapters_off(made.model):
            before = made.model(batch.ids, batch.mask, batch.pixels, batch.grids)
    made.result().save_pretrained(tmp_path / "merged")
    again = Qwen3VL.from_pretrained(tmp_path / "merged")   # strict: no tensor more or less
    with torch.no_grad():
        merged = again(batch.ids, batch.mask, batch.pixels, batch.grids)
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - before).abs().max() > 1e-2
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_bf16_trains_fp32_masters(folder, tmp_path):
    """In bf16 itself an update of 1e-6 of a weight's size would be rounded away."""
    s = settings("sft", folder / "hybrid", tmp_path, dtype="bfloat16", lr=1e-6, tokens=800, floor=1)
    trained, before = train("sft", s), Qwen3VL.from_pretrained(folder / "hybrid", torch.bfloat16)
    start = dict(before.named_parameters())
    moved = [(trained[n] - start[n].float()).abs().mean().item() for n in trained]
    assert all(p.dtype == torch.float32 for p in trained.values()) and len(trained) > 40
    assert min(moved) > 1e-8 and max(moved) < 1e-5
    assert state(tmp_path)["label"] == "sft"


# -- the paper's constants ---------------------------------------------------------------------------------

TABLE11 = {                     # with C.4 and C.5; by hand from the paper
    "sft": dict(peak=5e-6, batch=1_000_000, warmup=0.03, decay=0.01, clip=1.0, betas=(0.9, 0.999), eps=1e-8, cap=8192),
    "dpo": dict(peak=1e-6, batch=500_000, warmup=0.03, decay=0.0, clip=1.0, betas=(0.9, 0.999), eps=1e-8, cap=4096,
                beta=0.1, rank=32, alpha=64.0, dropout=0.05)}


class Watched(torch.optim.AdamW):
    """AdamW that keeps what it was made with and, of every step, its rates, gradients and the way it moved."""
    made = []

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rates, self.norms = [], []
        Watched.made.append(self)

    def step(self):
        rates = {group["lr"] for group in self.param_groups}
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.rates.append(rates.pop())
        self.norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        assert not rates
        super().step()


@pytest.mark.parametrize("phase", TABLE11)
def test_a_run_on_real_data_follows_table_11_and_c4_and_c5(folder, tmp_path, monkeypatch, phase):
    """By default, in the optimiser that steps, the batches it steps on, and the model that is trained."""
    paper, name = TABLE11[phase], str(tmp_path / "x.jsonl")
    kind, defaults = sft_dpo.PHASES[phase].settings, sft_dpo.PHASES[phase].defaults
    s = distill.parse(kind, defaults, ["--data", name, "--model", str(folder / "hybrid"), "--threads", "1"])
    assert s.tokens == 0                                   # one epoch
    assert (s.batch_tokens, s.cap, s.weight_decay) == (paper["batch"], paper["cap"], paper["decay"])
    assert dtype_of(s.dtype, torch.device("cuda")) == torch.bfloat16

    # The run itself, of 40 small steps, on losses a hundred times as large so that there is something to clip.
    s = replace(s, tokens=4000, batch_tokens=100, micro_tokens=400, save_every=99, out=str(tmp_path / "out"))
    made, processor = sft_dpo.build(s, sft_dpo.PHASES[phase], torch.device("cpu"))
    before = {n: p.detach().clone() for n, p in made.parameters().items()}
    loss, draws = made.loss, []

    def larger(batch, label, backward):
        draws.append(torch.rand(1, generator=torch.Generator().set_state(torch.get_rng_state())).item())
        return loss(batch, label, lambda part: backward(100 * part))
    made.loss = larger
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    Watched.made.clear()
    monkeypatch.setattr(sft_dpo, "build", lambda *args: (made, processor))
    monkeypatch.setattr(sft_dpo, "read_samples", lambda *args: Checked(
        SMALL("train", 5, pairs=phase == "dpo"), partial(sft_dpo.check_kind, pairs=phase == "dpo", embedded=True)))
    monkeypatch.setattr(sft_dpo, "parse", lambda *args: s)
    monkeypatch.setattr(sft_dpo, "finish", lambda *args: None)
    sft_dpo.main([phase])
    optimiser, = Watched.made
    for group in optimiser.param_groups:
        assert (group["betas"], group["eps"]) == (paper["betas"], paper["eps"])
        assert not group["params"] or group["weight_decay"] == paper["decay"] * (group["params"][0].dim() >= 2)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    ends = [0, *(line["tokens"] for line in log)]
    assert len(log) > 20 and all(75 < b - a < 500 for a, b in zip(ends, ends[1:]))      # one or two samples over
    for rate, done in zip(optimiser.rates, ends):
        at = min(1, (done + 100) / 4000)
        cosine = (1 + math.cos(math.pi * (at - paper["warmup"]) / (1 - paper["warmup"]))) / 2
        share = at / paper["warmup"] if at < paper["warmup"] else cosine
        assert rate == pytest.approx(paper["peak"] * share, rel=1e-9)
    assert optimiser.rates[0] == pytest.approx(paper["peak"] * 0.025 / 0.03)             # within the warm-up
    for norm, line in zip(optimiser.norms, log, strict=True):
        assert norm == pytest.approx(min(line["grad_norm"], paper["clip"]), rel=1e-4)
    assert max(line["grad_norm"] for line in log) > 1.5
    assert len(set(draws)) == len(draws)                   # dropout is new in every step
    assert all(n.endswith((".A", ".B")) for n in before) == (phase == "dpo")
    trained = state(tmp_path / "out")["parameters"]
    assert trained.keys() == before.keys() and any(not torch.equal(p, before[n]) for n, p in trained.items())


def test_dpo_has_the_papers_beta_and_adapters(folder):
    flags = dict(data="x.jsonl", model=folder / "hybrid")
    s = distill.parse(sft_dpo.DPOSettings, sft_dpo.DPO_DEFAULTS, argv(flags))
    made, processor = sft_dpo.build(s, sft_dpo.PHASES["dpo"], torch.device("cpu"))
    paper, adapters = TABLE11["dpo"], [m for m in made.model.modules() if isinstance(m, sft_dpo.LoRA)]
    assert len(adapters) == len({id(m.base) for m in adapters}) > 20
    for m in adapters:
        assert m.A.shape == (paper["rank"], m.base.in_features) and m.B.shape == (m.base.out_features, paper["rank"])
    one = adapters[0]
    one.B.data.normal_()
    x = torch.randn(4, one.base.in_features)
    one.eval()
    added = one(x) - one.base(x)
    torch.testing.assert_close(added, x @ one.A.T @ one.B.T * paper["alpha"] / paper["rank"], rtol=1e-4, atol=1e-5)
    one.train()
    one.A.data, one.B.data = torch.eye(32, one.base.in_features), torch.eye(one.base.out_features, 32)
    ones = torch.ones(20_000, one.base.in_features)
    low = (one(ones) - one.base(ones))[:, :32] / (paper["alpha"] / paper["rank"])
    assert (low.abs() < 0.5).float().mean().item() == pytest.approx(paper["dropout"], abs=0.003)
    for m in adapters:
        assert m.training and m.dropout == paper["dropout"]
    one.B.data.zero_()
    stir(made.model)
    batch = objective("dpo", folder / "hybrid", dtype="float32")[1]
    _, _, terms = made.loss(batch, "dpo")
    with torch.no_grad(), sft_dpo.adapters_off(made.model):
        ref = made.pair_logps(batch, None).sum(0)
    for k, name in enumerate(("chosen", "rejected")):
        assert terms[f"rewards/{name}"].item() == pytest.approx(
            paper["beta"] * (terms[f"logps/{name}"] - ref[k]).item(), rel=1e-3), name
    assert processor.max_tokens == paper["cap"] // 2       # of each: C.5 counts chosen and rejected together


# -- runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_a_killed_run_goes_on_to_the_same_bits(folder, tmp_path, phase):
    more = dict(dropout=0.3) if phase == "dpo" else {}
    at = partial(settings, phase, folder / "hybrid", dtype="float32", **more)
    straight = train(phase, at(tmp_path / "straight"))
    train(phase, at(tmp_path / "killed"), stop=4)          # step 3 was not saved and is done again
    torch.manual_seed(1234)
    resumed = train(phase, at(tmp_path / "killed"))
    assert all(torch.equal(straight[n], resumed[n]) for n in straight)
    logs = [(tmp_path / run / "log.jsonl").read_bytes() for run in ("straight", "killed")]
    assert logs[0] == logs[1] and logs[0].count(b"\n") >= 4
    if phase == "dpo":                                     # and the dropout was not nothing
        without = train(phase, settings(phase, folder / "hybrid", tmp_path / "without", dtype="float32"))
        assert any(not torch.equal(straight[n], without[n]) for n in straight)


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_accumulation_changes_no_step(folder, tmp_path, phase):
    whole = train(phase, settings(phase, folder / "hybrid", tmp_path / "1"))
    parts = train(phase, settings(phase, folder / "hybrid", tmp_path / "2", micro_tokens=150))
    assert_close(whole, parts)
    start = dict(objective(phase, folder / "hybrid")[0].parameters())
    assert all((whole[n] - start[n]).abs().max() > 0 for n in whole)


def test_rows_that_fail_leave_a_stand_in_that_adds_nothing(folder):
    """What a rank computes when it has no sample left: gradients of zero, for the same parameters as ever."""
    for phase in ("sft", "dpo"):
        made, batch, processor = objective(phase, folder / "hybrid")
        pad = torch.tensor([[processor.pad_id]])
        nothing = torch.full((1, 1), -100)
        empty = replace(batch, ids=pad, mask=pad > 0, labels=nothing, pixels=None, grids=None)
        total, count, terms = made.loss(empty, phase)
        total.backward()
        assert total.item() == 0 and count == 0 and not any(terms.values())
        assert terms.keys() == made.loss(batch, phase)[2].keys()
        layers = {n: p for n, p in made.parameters().items() if ".mlp." in n}
        assert layers and all(p.grad is not None and not p.grad.any() for p in layers.values())


def distill_settings(teacher, out, **changes):
    flags = dict(teacher=teacher, out=out, tokens=2000, batch_tokens=400, micro_tokens=10_000, lr=1e-3,
                 stages="34/33/33", keep_every=2, save_every=2, threads=1, dtype="float64") | changes
    return distill.parse(distill.DistillSettings, distill.DEFAULTS, argv(flags))


def jobs(folder, out):
    """What two processes do: name -> (run, settings, step to die in)."""
    def post(phase, name, shard=True, stop=math.inf, **changes):
        s = settings(phase, folder / "hybrid", out / name, micro_tokens=150, **changes)
        return partial(train, phase), replace(s, shard=shard), stop
    stages = replace(distill_settings(folder / "plain", out / "distill"), shard=True)
    return {"sft-whole": post("sft", "sft-whole", shard=False),
            "sft-to-whole": post("sft", "sft-to-whole", stop=4),
            "sft-to-shard": post("sft", "sft-to-shard"),
            "dpo-shard": post("dpo", "dpo-shard", dtype="float32"),
            "distill": (train_distill, stages, math.inf)}


def worker():
    ranks = distill.start_processes(SimpleNamespace(device="cpu", threads=1, dtype=""))
    for function, s, stop in jobs(*map(Path, sys.argv[1:])).values():
        function(s, ranks=ranks, stop=stop)
        ranks.wait()


def test_two_processes_whole_or_sharded_do_what_one_does(folder, tmp_path):
    """SFT, DPO and all three stages of distillation; sharded runs continue whole, and the reverse."""
    one = dict(sft=train("sft", settings("sft", folder / "hybrid", tmp_path / "one-sft", micro_tokens=150)),
               distill=train_distill(distill_settings(folder / "plain", tmp_path / "one-distill")))
    train("dpo", settings("dpo", folder / "hybrid", tmp_path / "one-dpo", dtype="float32"))
    todo = jobs(folder, tmp_path)
    train("sft", replace(todo["sft-to-shard"][1], shard=False), stop=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    env = os.environ | dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                            PYTHONPATH=f"{here.parent}{os.pathsep}{here}", OMP_NUM_THREADS="1")
    run = [sys.executable, "-c", "import test_sft_dpo; test_sft_dpo.worker()", str(folder), str(tmp_path)]
    processes = [subprocess.Popen(run, env=env | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE,
                                  text=True) for r in "01"]
    errors = [p.communicate(timeout=500)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    train("sft", replace(todo["sft-to-whole"][1], shard=False))
    for name in todo:
        if name != "dpo-shard":
            assert_close(one[name.split("-")[0]], state(tmp_path / name)["parameters"])
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
            for name in ("one-dpo", "dpo-shard")]
    for a, b in zip(*logs, strict=True):                   # in float32, where the order of sums shows
        assert a.pop("stage") == b.pop("stage") and a == pytest.approx(b, rel=1e-3, abs=1e-5)


# -- samples, and the command ------------------------------------------------------------------------------


def pair(text="a", chosen="b", rejected="c"):
    return dict(messages=[{"role": "user", "content": text}], chosen=chosen, rejected=rejected)


def test_each_phase_refuses_what_is_meant_for_the_other(tmp_path):
    file = tmp_path / "mixed.jsonl"
    plain = dict(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    file.write_text(json.dumps(plain) + "\n" + json.dumps(pair()) + "\n")
    for phase, good, bad, why in (("sft", 0, 1, "mixed.jsonl line 2 is a preference pair"),
                                  ("dpo", 1, 0, "mixed.jsonl line 1 has no chosen and rejected answer")):
        data = sft_dpo.read_samples(SimpleNamespace(data=str(file), seed=0), sft_dpo.PHASES[phase])
        assert isinstance(data[good], Sample)
        with pytest.raises(BadSample, match=why):
            data[bad]


def test_a_pair_fits_its_cap_and_keeps_its_image(folder):
    """Chosen and rejected together have --cap tokens, of which text goes and image tokens never do."""
    made, _, processor = objective("dpo", folder / "plain", cap=256, visual_tokens=96)
    page = SMALL("train", 0, "receipt", pairs=True)[0]
    long = replace(page, chosen=[{"type": "text", "text": "word " * 100}])
    rows = encode_rows(processor, long)
    assert sum(len(row.ids) for row in rows) <= 256 and rows[0].cut > 0
    for row in rows:
        assert (row.ids == made.model.config.image_token_id).sum() == 21 == len(row.pixels) // 4
    with pytest.raises(BadSample, match="even without its text"):
        small = objective("dpo", folder / "plain", cap=40)[2]
        encode_rows(small, page)


def test_one_epoch_is_the_number_of_tokens(folder, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair("q" * (i % 7))) + "\n" for i in range(50)))
    phase = sft_dpo.PHASES["dpo"]
    s = settings("dpo", folder / "plain", tmp_path, data=file)
    data, processor = sft_dpo.read_samples(s, phase), sft_dpo.build(s, phase, torch.device("cpu"))[1]
    counted = sum(len(row.ids) for i in range(50) for row in encode_rows(processor, data[i]))
    assert sft_dpo.epoch_tokens(data, processor) == counted
    tie = dict(prompt="Q", chosen=[dict(role="user", content="Q"), dict(role="assistant", content="A")])
    with open(file, "a") as more:                         # pairs that are none add rows, and no tokens
        more.writelines(json.dumps(dict(tie, rejected=tie["chosen"])) + "\n" for _ in range(50))
    assert sft_dpo.epoch_tokens(sft_dpo.read_samples(s, phase), processor) == counted
    with pytest.raises(SystemExit, match="less than one step: give --batch-tokens"):
        sft_dpo.main(["dpo", "--model", str(folder / "plain"), "--data", str(file), "--out", str(tmp_path / "small")])


def test_the_commands_chain_and_leave_what_they_started_from_untouched(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft_dpo, "World", SMALL)
    shutil.copytree(folder / "hybrid", "out/c4")
    before = Path("out/c4/model.safetensors").read_bytes()
    common = "--tokens 1400 --batch-tokens 700 --questions 2 --threads 1 --lr 0.01".split()
    sft_dpo.main(["sft", "--model", "out/c4", *common])
    sft_dpo.main(["dpo", "--model", "out/c4-sft", *common, "--rank", "2"])
    assert Path("out/c4/model.safetensors").read_bytes() == before
    assert "c4-sft" in Path("out/c4-dpo/table.md").read_text()
    lines = [json.loads(line) for line in Path("out/c4-dpo/log.jsonl").read_text().splitlines()]
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
            "logps/rejected"} <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    weights = [Qwen3VL.from_pretrained(f"out/c4{end}") for end in ("", "-sft", "-dpo")]
    frozen = "model.visual.blocks.0.mlp.linear_fc1.weight"
    moved = "model.language_model.layers.0.self_attn.dt_proj.weight"
    a, b, c = (m.get_parameter(frozen) for m in weights)
    assert torch.equal(a, b) and torch.equal(b, c)
    a, b, c = (m.get_parameter(moved) for m in weights)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    capsys.readouterr()
    sft_dpo.main(["dpo", "--model", "out/c4-sft", "--dry-run"])
    assert "missing: nothing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is the folder of --model"):
        sft_dpo.main(["sft", "--model", "out/c4", "--out", "out/c4"])
    with pytest.raises(SystemExit, match="there is no config.json"):
        sft_dpo.main(["sft", "--model", "nowhere"])
