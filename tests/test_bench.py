"""What bench.py counts is what the tensors hold, and what it compares is the same computation. No test is timed."""
import json
import re
from argparse import Namespace
from unittest import mock

import pytest
import torch

from paper import bench
import distill
import sft_dpo
from model import Config, KVCache, Qwen3VL, TextConfig, VisionConfig, to_hybrid

SHAPES = {                # hidden_size, layers, H, G, P: no two alike, so that no letter can stand for another
    "grouped": (48, 4, 6, 2, 16),
    "single": (32, 8, 3, 1, 8),
}


def made(name, dtype=torch.float32, hybrid=False):
    D, layers, H, G, P = SHAPES[name]
    text = TextConfig(vocab_size=90, hidden_size=D, intermediate_size=40, num_hidden_layers=layers, head_dim=P,
                      num_attention_heads=H, num_key_value_heads=G, mrope_section=[P // 2 - 2, 1, 1])
    vision = VisionConfig(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=D,
                          num_position_embeddings=16, deepstack_visual_indexes=[0])
    torch.manual_seed(0)
    model = Qwen3VL(Config(text=text, vision=vision, image_token_id=88, video_token_id=89)).to(dtype)
    return to_hybrid(model) if hybrid else model


def every_byte(states):
    """Independent of bench.held: the storage behind each tensor, which a prefill in one chunk fills exactly."""
    return sum(t.untyped_storage().nbytes() for s in states for t in s if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_cache_bytes_are_those_of_a_real_prefill(name, hybrid, dtype):
    model, T, rows = made(name, dtype, hybrid), 37, 3
    _, states, position = model.prefill(torch.randint(0, 80, (rows, T)))
    mixers = sum(not isinstance(s, KVCache) for s in states)
    assert mixers == (3 * len(states) // 4 if hybrid else 0)
    counted = bench.cache_bytes(model.config.text, mixers, T, dtype.itemsize, rows)
    assert bench.held(states) == counted
    attention = [s for s in states if isinstance(s, KVCache)]
    assert every_byte(attention) == bench.held(attention)
    _, states = model.step(torch.zeros(rows, dtype=torch.long), states, position)         # buffers grow ahead of need
    grown = bench.cache_bytes(model.config.text, mixers, T + 1, dtype.itemsize, rows)
    assert bench.held(states) == grown
    assert every_byte([s for s in states if isinstance(s, KVCache)]) > grown - counted + bench.held(attention)


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_largest_batch_fits_its_budget_and_one_more_row_does_not(hybrid):
    model, T = made("grouped", hybrid=hybrid), 500
    _, states, position = model.prefill(torch.randint(0, 80, (1, 5)))
    mixers, weights = sum(not isinstance(s, KVCache) for s in states), sum(p.nbytes for p in model.parameters())
    row = bench.cache_bytes(model.config.text, mixers, T + bench.ROOM, 4)
    budget = weights + 3.7 * row
    rows = bench.largest_batch(budget, weights, row)

    def allocated(rows):
        filled = [bench.randomised(s, T, rows) for s in states]
        return weights + sum(t.numel() * t.element_size() for s in filled for t in s if isinstance(t, torch.Tensor))
    assert allocated(rows) <= budget < allocated(rows + 1)
    filled = [bench.randomised(s, T, rows) for s in states]
    assert bench.held(filled) == bench.cache_bytes(model.config.text, mixers, T, 4, rows)
    logits, after = model.step(torch.ones(rows, dtype=torch.long), filled, torch.full((rows,), T))
    assert logits.shape == (rows, 90) and torch.isfinite(logits).all()
    assert bench.held(after) - bench.held(filled) == bench.cache_bytes(model.config.text, mixers, T + 1, 4, rows) \
        - bench.cache_bytes(model.config.text, mixers, T, 4, rows)
    assert bench.largest_batch(weights / 2, weights, row) == 0


def test_three_to_one_leaves_a_quarter_of_the_cache_at_128k_at_the_papers_shape():
    text = TextConfig()                                   # Qwen3-VL-8B, bf16; 147,456 bytes a token in 36 layers
    teacher, hybrid = (bench.cache_bytes(text, mixers, 131072, 2) for mixers in (0, 27))
    assert teacher == 147_456 * 131_072
    assert 0.25 < hybrid / teacher < 0.2535               # the rest: 27 states of 2 MB and 3 convolution inputs


def meta(folder):
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen3VL(Config.from_folder(folder)).parameters())


def test_the_promise_of_a_dry_run_counts_the_parameters_of_the_2b_shape(tmp_path):
    folder = bench.folder_of("2b", tmp_path)
    assert 2.10e9 < meta(folder) < 2.16e9                 # the released 2B: 2.13 G with tied embeddings
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4        # the same widths, but mixers drawn in no time
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = bench.promised(Namespace(folder=folder, device="cpu", dtype="float32"), 500)
    assert said["frozen"] == pytest.approx(4 * meta(folder), abs=0.006 * bench.GB)
    assert said["head"] == pytest.approx(3 * 512 * 151936 * 4, abs=0.006 * bench.GB)
    assert set(said) == {"frozen", "trained", "activations", "head"}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", ["distill", "sft", "dpo"])
def test_a_dry_run_promises_what_a_layer_keeps_for_the_backward_pass(tmp_path, capsys, phase, dtype, recompute):
    """Bytes a position and layer, by hooks on what autograd saves, casts of weights apart: the slope from 4 to 8 layers.
    CPUs keep norms in bf16 where CUDA's autocast has fp32, so the promise may be up to 1.4 times what is counted."""
    kept, said = {}, {}
    for layers in (4, 8):
        (folder := tmp_path / str(layers)).mkdir()
        text = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_hidden_layers=layers)
        with mock.patch.dict(bench.SHAPES, small=(text, {})):
            bench.folder_of("small", folder)
        flags = ["--dtype", dtype] + ["--recompute"] * recompute
        model = bench.build(folder, Namespace(dtype=dtype, device="cpu"))
        model.recompute = recompute
        if phase == "distill":
            s = distill.parse(distill.DistillSettings, distill.DEFAULTS, ["--teacher", str(folder), *flags])
            made, label = distill.Distillation(s, model, distill.convert(s, model)), "stage 3"
        else:
            s = sft_dpo.parse(sft_dpo.PHASES[phase].settings, sft_dpo.PHASES[phase].defaults, ["--model", "x", *flags])
            made, label = sft_dpo.PHASES[phase].objective(s, to_hybrid(model).train()), phase
        made.prepare(0.7)
        batch, weights, storages = bench.document(folder, 2, 100, 64), set(), {}
        for p in (made.student if phase == "distill" else made.model).parameters():
            weights |= {p.untyped_storage().data_ptr()}

        def keep(t):
            if t.untyped_storage().data_ptr() not in weights:
                storages[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())
            return t
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), \
                torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            made.loss(batch, label)
        trained = [p.numel() for n, p in made.parameters().items() if "layers." in n]
        casts = 2 * sum(trained) * (dtype == "bfloat16" and not recompute)
        kept[layers] = (sum(size for _, size in storages.values()) - casts) / batch.mask.sum().item()
        asked = [*flags, "--micro-tokens", "1000000", "--dry-run"]
        distill.main(["--teacher", str(folder), *asked]) if phase == "distill" else \
            sft_dpo.main([phase, "--model", str(folder), *asked])
        said[layers] = float(re.search(r"activations ([\d.,]+)", capsys.readouterr().out)[1].replace(",", "")) * bench.GB / 1e6
    ratio = (said[8] - said[4]) / (kept[8] - kept[4])
    assert 0.9 < ratio < 1.4, ratio


def test_a_bare_config_keeps_its_shape_and_takes_the_embedded_token_ids(tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    out.mkdir()
    config = Config(text=TextConfig(vocab_size=999, hidden_size=256, rope_theta=7.0))
    (bare / "config.json").write_text(json.dumps(config.to_json()))
    read = Config.from_folder(bench.folder_of(bare, out))
    assert read.text == config.text and read.vision == config.vision
    assert read.tie_word_embeddings == config.tie_word_embeddings
    batch = bench.document(out, 2, 30, 64)                # its processor accepts the ids
    assert (batch.ids == read.image_token_id).sum() == 2 * 64 and len(batch.pixels) == 2 * 64 * 4
    assert bench.folder_of(bench.HERE / "tiny", out) == str(bench.HERE / "tiny")


def test_a_run_costs_its_stages_by_their_share_of_the_budget():
    assert bench.weighted({1: 2.0, 2: 3.0, 3: 5.0}) == pytest.approx(0.1 * 2 + 0.3 * 3 + 0.6 * 5)
    assert bench.weighted({3: 5.0}) == 5.0                # c1 spends all of it in Stage 3


def test_our_step_and_the_obvious_one_with_transformers_have_the_same_losses():
    pytest.importorskip("transformers")
    opt = Namespace(folder=str(bench.HERE / "tiny"), device="cpu", dtype="float32", tokens=250)
    trainers = [bench.our_trainer(opt), bench.their_trainer(opt, True), bench.their_trainer(opt, False)]
    for stage in (1, 2, 3):
        ours, theirs, between = (trainer["train"](stage) for trainer in trainers)
        assert ours > 0
        assert theirs == pytest.approx(ours, rel=2e-4) and between == pytest.approx(ours, rel=2e-4)


def test_both_sides_answer_the_same_questions_with_the_same_tokens():
    pytest.importorskip("transformers")
    opt = Namespace(folder=str(bench.HERE / "tiny"), device="cpu", dtype="float32", text=8, visual=16, rows=3, new=7)
    ours, theirs = bench.ours(opt), bench.theirs(opt)
    assert len(ours["generate"]()) == 21 and ours["generate"]() == theirs["generate"]()
    for task in ("prefill", "step", "step"):
        assert ours[task]() == pytest.approx(theirs[task](), abs=2e-4)
