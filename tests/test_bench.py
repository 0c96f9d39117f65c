"""What bench.py counts is what tensors hold and operations do, and what it compares is the same computation. No test
is timed."""
import json
import os
import re
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import distill
import mamba2
import sft_dpo
from data import IGNORED, Plan, Processor
from model import Config, KVCache, Qwen3VL, TextConfig, VisionConfig, to_hybrid
from paper import bench, contenders
from test_mamba2 import naive, rand, relative

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


def cache_bytes(text, mixers, T, width, rows=1):
    """By the shapes in mamba2.py and model.py: keys and values of every position, or a state in fp32 and three inputs
    of the convolution, in numbers of `width` bytes."""
    H, G, P = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    attention, mixer = 2 * G * T * P * width, 4 * H * P * P + 3 * (2 * G + H) * P * width
    return rows * ((text.num_hidden_layers - mixers) * attention + mixers * mixer)


def every_byte(states):
    """Independent of contenders.held: the storage behind each tensor, which a prefill in one chunk fills exactly."""
    return sum(t.untyped_storage().nbytes() for s in states for t in s if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_cache_bytes_are_those_of_a_real_prefill(name, hybrid, dtype):
    model, T, rows = made(name, dtype, hybrid), 37, 3
    _, states, position = model.prefill(torch.randint(0, 80, (rows, T)))
    mixers = sum(not isinstance(s, KVCache) for s in states)
    assert mixers == (3 * len(states) // 4 if hybrid else 0)
    counted = cache_bytes(model.config.text, mixers, T, dtype.itemsize, rows)
    assert contenders.held(states) == rows * contenders.row_bytes(states, T) == counted
    attention = [s for s in states if isinstance(s, KVCache)]
    assert every_byte(attention) == contenders.held(attention)
    _, states = model.step(torch.zeros(rows, dtype=torch.long), states, position)         # buffers grow ahead of need
    grown = cache_bytes(model.config.text, mixers, T + 1, dtype.itemsize, rows)
    assert contenders.held(states) == grown
    assert every_byte([s for s in states if isinstance(s, KVCache)]) > grown - counted + contenders.held(attention)


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_largest_batch_fits_its_budget_and_one_more_row_does_not(hybrid):
    model, T = made("grouped", hybrid=hybrid), 500
    _, states, position = model.prefill(torch.randint(0, 80, (1, 5)))
    mixers, weights = sum(not isinstance(s, KVCache) for s in states), sum(p.nbytes for p in model.parameters())
    row = contenders.row_bytes(states, T + contenders.ROOM)
    assert row == cache_bytes(model.config.text, mixers, T + contenders.ROOM, 4)
    budget = weights + 3.7 * row
    rows = contenders.largest_batch(budget, weights, row)

    def allocated(rows):
        filled = contenders.lengthen(states, T, rows, shared=False)
        return weights + sum(t.numel() * t.element_size() for s in filled for t in s if isinstance(t, torch.Tensor))
    assert allocated(rows) <= budget < allocated(rows + 1)
    filled = contenders.lengthen(states, T, rows, shared=False)
    assert contenders.held(filled) == cache_bytes(model.config.text, mixers, T, 4, rows)
    logits, after = model.step(torch.ones(rows, dtype=torch.long), filled, torch.full((rows,), T))
    assert logits.shape == (rows, 90) and torch.isfinite(logits).all()
    assert contenders.held(after) - contenders.held(filled) == cache_bytes(model.config.text, mixers, T + 1, 4, rows) \
        - cache_bytes(model.config.text, mixers, T, 4, rows)
    assert contenders.largest_batch(weights / 2, weights, row) == 0


def test_three_to_one_leaves_a_quarter_of_the_cache_at_128k_at_the_papers_shape():
    text = TextConfig()                                   # Qwen3-VL-8B, bf16; 147,456 bytes a token in 36 layers
    teacher, hybrid = (cache_bytes(text, mixers, 131072, 2) for mixers in (0, 27))
    assert teacher == 147_456 * 131_072
    assert 0.25 < hybrid / teacher < 0.2535               # the rest: 27 states of 2 MB and 3 convolution inputs


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_row_of_random_keys_that_stands_for_all_is_decoded_as_if_each_had_its_own(hybrid):
    """What Reader does on a GPU, on the CPU: buffers of fixed size, filled from one shared row."""
    model, T, rows = made("grouped", hybrid=hybrid), 300, 3
    _, states, position = model.prefill(torch.randint(0, 80, (1, 5)))
    position, token = (position + T - 5).repeat(rows), torch.full((rows,), 7)
    shared = contenders.lengthen(states, T, rows, shared=True)
    keys = [s for s in shared if isinstance(s, KVCache)]
    assert all(s.k is keys[0].k and s.k.untyped_storage().nbytes() == s.k[0].nbytes for s in keys)
    own = [type(s)(*(t.clone() if isinstance(t, torch.Tensor) else t for t in s)) for s in shared]
    fixed, eager = (model.start_decoding(s, position, 4, graph) for s, graph in ((shared, True), (own, False)))
    for _ in range(3):
        assert torch.allclose(fixed(token), eager(token), atol=1e-5)


def reader(name="hybrid", **more):
    opt = dict(folder=str(contenders.ROOT / "tiny"), device="cpu", dtype="float32", chunk=0, steps=3, budget=0.02) | more
    return contenders.Reader(Namespace(**opt), name)


def test_a_reader_fills_its_budget_and_takes_fewer_rows_where_scratch_leaves_no_room():
    r = reader()
    many = r.begin(200, full=True)
    row = cache_bytes(r.model.config.text, 6, 200 + contenders.ROOM, 4)
    assert many["batch"] == int((0.02 * contenders.GB - many["weights"]) / row) > 5
    assert many["held"] == cache_bytes(r.model.config.text, 6, 200, 4, many["batch"])
    assert many["weights"] + many["held"] < 0.02 * contenders.GB and r.position.tolist() == [200] * many["batch"]
    decoder = sum(p.nbytes for n, p in r.model.named_parameters() if "visual" not in n)      # tied: the head is in it
    assert many["reads"] == decoder + many["held"]
    real = r.model.start_decoding
    with mock.patch.object(r.model, "start_decoding", side_effect=[torch.OutOfMemoryError(), torch.OutOfMemoryError(), real]):
        assert r.begin(200, full=True)["batch"] == many["batch"] - 2 * max(1, many["batch"] // 16)
    with pytest.raises(ValueError, match="GB do not hold"):
        reader(budget=0.001).begin(200, full=True)
    with mock.patch.object(r.model, "start_decoding", side_effect=torch.OutOfMemoryError()), \
            pytest.raises(torch.OutOfMemoryError):
        r.begin(200, full=False)


def meta(folder):
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen3VL(Config.from_folder(folder)).parameters())


def test_the_promise_of_a_dry_run_counts_the_parameters_of_the_2b_shape(tmp_path):
    folder = contenders.folder_of("2b", tmp_path)
    assert 2.10e9 < meta(folder) < 2.16e9                 # the released 2B: 2.13 G with tied embeddings
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4        # the same widths, but mixers drawn in no time
    (tmp_path / "config.json").write_text(json.dumps(config))
    with redirect_stdout(StringIO()) as out:
        distill.main(["--dry-run", "--teacher", folder, "--micro-tokens", "500", "--device", "cpu", "--dtype", "float32"])
    parts = re.search(r"needs about [\d.,]+ GB: (.*)", out.getvalue()).group(1).split(", ")
    said = {name: float(size.replace(",", "")) * contenders.GB for name, size in map(str.split, parts)}
    assert said["frozen"] == pytest.approx(4 * meta(folder), abs=0.006 * contenders.GB)
    assert said["head"] == pytest.approx(3 * 512 * 151936 * 4, abs=0.006 * contenders.GB)
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
        with mock.patch.dict(contenders.SHAPES, small=(text, {}, True)):
            contenders.folder_of("small", folder)
        flags = ["--dtype", dtype] + ["--recompute"] * recompute
        model = contenders.build(Namespace(folder=folder, dtype=dtype, device="cpu"))
        model.recompute = recompute
        if phase == "distill":
            s = distill.parse(distill.DistillSettings, distill.DEFAULTS, ["--teacher", str(folder), *flags])
            made, label = distill.Distillation(s, model, distill.convert(s, model)), "stage 3"
        else:
            s = sft_dpo.parse(sft_dpo.PHASES[phase].settings, sft_dpo.PHASES[phase].defaults, ["--model", "x", *flags])
            made, label = sft_dpo.PHASES[phase].objective(s, to_hybrid(model).train()), phase
        made.prepare(0.7)
        batch, weights, storages = contenders.random_batch(model.config, 2, 100, 64), set(), {}
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
        said[layers] = float(re.search(r"activations ([\d.,]+)", capsys.readouterr().out)[1].replace(",", "")) * contenders.GB / 1e6
    ratio = (said[8] - said[4]) / (kept[8] - kept[4])
    assert 0.9 < ratio < 1.4, ratio


def test_a_bare_config_keeps_its_shape_and_takes_the_embedded_token_ids(tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    out.mkdir()
    config = Config(text=TextConfig(vocab_size=999, hidden_size=256, rope_theta=7.0), image_token_id=990, video_token_id=991,
                    vision=VisionConfig(out_hidden_size=256), vision_start_token_id=992, vision_end_token_id=993)
    (bare / "config.json").write_text(json.dumps(config.to_json()))
    read = Config.from_folder(contenders.folder_of(bare, out))
    assert read.text == config.text and read.vision == config.vision
    assert read.tie_word_embeddings == config.tie_word_embeddings
    Processor(out)                                        # accepts the ids
    batch = contenders.random_batch(read, 2, 30, 64)
    assert (batch.ids == read.image_token_id).sum() == 2 * 64 and len(batch.pixels) == 2 * 64 * 4
    assert (batch.labels != IGNORED).sum() == 2 * 30 and batch.ids.shape == (2, 64 + 2 + 30)
    assert contenders.folder_of(contenders.ROOT / "tiny", out) == str(contenders.ROOT / "tiny")


def test_a_run_costs_its_stages_by_their_share_of_the_budget():
    assert bench.weighted({1: 2.0, 2: 3.0, 3: 5.0}) == pytest.approx(0.1 * 2 + 0.3 * 3 + 0.6 * 5)
    assert bench.weighted({3: 5.0}) == 5.0                # c1 spends all of it in Stage 3


def test_the_8b_row_is_the_released_shape(tmp_path):
    assert 8.76e9 < meta(contenders.folder_of("8b", tmp_path)) < 8.78e9


def options(**more):
    """Of a Namespace as `parse` makes it."""
    return bench.parse([more.pop("command"), "--device", "cpu", *(str(w) for k, v in more.items()
                                                                  for w in ("--" + k.replace("_", "-"), v))])


def trainer(*conds, **more):
    opt = options(**(dict(command="train", tokens=400) | more))
    opt.folder = str(contenders.ROOT / "tiny")
    return contenders.Trainer(opt, *conds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_the_first_one_of_a_run(tmp_path, dtype):
    """Loss and norm of the gradient, as distill.py logs them."""
    flags = ["--cond", "c4", "--tokens", "1250", "--micro-tokens", "5000", "--out", tmp_path, "--questions", "0",
             "--dtype", dtype, "--device", "cpu", "--threads", torch.get_num_threads()]
    with redirect_stdout(StringIO()), mock.patch("distill.finish"):
        distill.main([str(f) for f in flags])
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    with mock.patch.object(contenders, "Plan", lambda *a: Plan(*a[:4], 5000)):          # the step is one micro-batch
        t = trainer("c4", tokens=1250, dtype=dtype)
    assert len(t.optimiser.state) == len(t.parameters)    # so that each step costs what a later one does
    loss, norm = t.micro("c4", 1), t.update()
    assert (loss.item(), norm.item()) == pytest.approx((logged["loss"], logged["grad_norm"]), rel=1e-6)
    assert logged["stage"] == "stage 1" and logged["tokens"] == t.counts("c4", 1)[0]


def counted_by_pytorch(f):
    """Its counter knows neither fused attention on CPUs nor in-place products: plain forms take their place."""
    plain = mock.patch("mamba2.ssd_scan", lambda *a: mamba2.chunked_ssd(*a[:-1], 32))
    with plain, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("cond, stage", [("c2", 1), ("c3", 1), ("c3", 2), ("c5", 2), ("c1", 3)])
@pytest.mark.parametrize("recompute", [False, True])
def test_operations_of_a_step_are_those_that_pytorch_counts(cond, stage, recompute):
    """Of random pages; causal attention is counted in full here, so texts are short."""
    t = trainer(cond, rows=2, text=50, visual=49)
    for model in (t.objectives[cond].teacher, t.objectives[cond].student):
        model.recompute = recompute
    counted = t.counts(cond, stage)[1]
    real = counted_by_pytorch(lambda: t.micro(cond, stage))
    assert counted == pytest.approx(real, rel=0.04), counted / real


@pytest.mark.parametrize("name", ["teacher", "hybrid"])
def test_operations_of_a_prefill_are_those_that_pytorch_counts(name):
    r = reader(name)
    real = counted_by_pytorch(lambda: r.prefill(60))
    assert r.begin(0, full=False)["flops"] == pytest.approx(real, rel=0.04)


def test_our_step_and_the_obvious_one_with_transformers_have_the_same_losses():
    pytest.importorskip("transformers")
    opt = options(command="against", tokens=250)
    opt.folder = str(contenders.ROOT / "tiny")
    trainers = [contenders.Trainer(opt, "c3"), contenders.TransformersTrainer(opt, True), contenders.TransformersTrainer(opt, False)]
    for stage in (1, 2, 3):
        ours, theirs, between = (trainer.train(stage).item() for trainer in trainers)
        assert ours > 0
        assert theirs == pytest.approx(ours, rel=2e-4) and between == pytest.approx(ours, rel=2e-4)


def test_both_sides_answer_the_same_questions_with_the_same_tokens(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(contenders, "QUESTIONS", 3)
    monkeypatch.setattr(contenders, "ANSWER", 7)
    opt = options(command="against")
    opt.folder = str(contenders.ROOT / "tiny")
    ours, theirs = contenders.Reader(opt, "teacher"), contenders.TransformersReader(opt)
    assert ours.generate().shape == (3, 7) and torch.equal(ours.generate(), theirs.generate())
    ids = contenders.random_ids(ours.model.config, 1, 24)
    monkeypatch.setattr(contenders, "random_ids", lambda *_: ids)
    assert torch.allclose(ours.prefill(24), theirs.prefill(24), atol=2e-4)
    assert ours.begin(0, False)["held"] == theirs.begin(0, False)["held"]
    for _ in range(2):
        assert torch.allclose(ours.step(), theirs.step(), atol=2e-4)


@pytest.mark.parametrize("row, chunk", [("ours", None), ("transformers", 64)])
def test_scans_of_grouped_heads_equal_the_recurrence(row, chunk):
    """Outputs and gradients, by test_mamba2's recurrence in fp64, on shapes with fewer groups than heads."""
    if row == "transformers":
        pytest.importorskip("transformers")
    f = contenders.SCANS[row][0](chunk, "")
    args, weight = [rand(2, 100, 2, 16, seed=0), F.softplus(rand(2, 100, 4, seed=1) - 4), -rand(4, seed=2).exp(),
                    rand(2, 100, 2, 16, seed=3), rand(2, 100, 4, 16, seed=4) / 4], rand(2, 100, 4, 16, seed=5)

    def there_and_back(f, dtype):
        leaves = [z.to(dtype).requires_grad_() for z in args]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y, leaves, weight.to(dtype))]
    D, state = torch.zeros(4).double(), torch.zeros(2, 4, 16, 16).double()
    exact = there_and_back(lambda *a: naive(*a, D, state)[0], torch.float64)
    for got, expected in zip(there_and_back(f, torch.float32), exact, strict=True):
        assert relative(got.double(), expected) < 1e-5


# ---- Measuring: a contender that fails is said so, and the others go on ----


class Fake:
    def __init__(self, opt, kind):
        if kind == "unmade":
            raise ValueError("no such model")
        self.kind, self.calls = kind, 0

    def work(self, n):
        self.calls += 1
        if self.kind == "weak" and n == 2:
            raise MemoryError("too large")
        if self.kind == "mortal" and n == 2:
            os._exit(1)
        return torch.tensor([n, self.calls])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_one_contender_cannot_do_costs_the_others_nothing(device, capsys, monkeypatch):
    kinds = ["strong", "weak", "unmade"] + ["mortal"] * (device == "cpu")
    if device == "cuda":                                  # one after the other in this process, here without a GPU
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        for name in ("memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: 7)
    calls = [(f"place {n}", "work", n) for n in (1, 2, 2, 3) for _ in range(2)]
    results = bench.measure(Namespace(device=device), {kind: (Fake, kind) for kind in kinds}, calls)
    answers = {kind: [tuple(t.answer) for took in results.values() for t in took.get(kind, {}).get("work", [])]
               for kind in kinds}
    assert answers["strong"] == [(1, 1), (1, 2), (2, 3), (2, 4), (2, 5), (2, 6), (3, 7), (3, 8)]
    assert answers["weak"] == [(1, 1), (1, 2), (3, 4), (3, 5)]                          # place 2 was tried once
    assert answers["unmade"] == []
    said = capsys.readouterr().out
    assert said.count("weak, place 2: MemoryError: too large") == 1 and said.count("no such model") == 1
    if device == "cpu":
        assert answers["mortal"] == [(1, 1), (1, 2)] and "mortal, place 2: its process died" in said


def test_contexts_in_bfloat16_from_the_command_line(tmp_path, capsys):
    flags = "contexts --device cpu --contexts 96 --steps 2 --budget 0.02 --out".split()
    for dtype in ("float32", "bfloat16"):
        bench.main([*flags, str(tmp_path), "--dtype", dtype])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = json.loads((tmp_path / "bench.json").read_text())["contexts"]["tiny"]
    assert len(kept) == 2 and list(last["contexts"]["tiny"].values())[0] in kept.values()
    for run in kept.values():
        at = run["result"]["contexts"]["96"]
        for row in (at[where][name] for where in ("batch 1", "equal memory") for name in ("teacher", "hybrid")):
            assert 0 < row["step_floor"] < row["step"]
            assert row["peak"] >= row["weights"] and row["tokens_s"] == row["batch"] / row["step"]
        assert at["batch 1"]["hybrid"]["first_token"] > at["batch 1"]["hybrid"]["first_token_floor"] > 0
        assert at["equal memory"]["hybrid"]["batch"] > at["equal memory"]["teacher"]["batch"] > 1
    assert (tmp_path / "bench-contexts-tiny.png").stat().st_size > 10_000


def test_training_in_bfloat16_from_the_command_line(tmp_path, capsys):
    bench.main("train --device cpu --dtype bfloat16 --tokens 300 --repeats 1 --out".split() + [str(tmp_path)])
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["train"]["tiny"].values()
    conditions = run["result"]["conditions"]
    assert list(conditions) == ["c1", "c2", "c3", "c4", "c5"] and list(conditions["c1"]["stages"]) == ["3"]
    for c in conditions.values():
        whole = bench.weighted({int(n): 1 / r["tokens_s"] for n, r in c["stages"].items()})
        assert c["over_c1"] == pytest.approx(whole * conditions["c1"]["stages"]["3"]["tokens_s"])
    assert conditions["c5"]["stages"]["2"]["flops"] > conditions["c4"]["stages"]["2"]["flops"]
