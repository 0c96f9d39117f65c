"""What only a GPU can show: its scans against the recurrence in fp64, its answers against the CPU's, its training steps
against each other. Run on a machine with one: pytest -m gpu"""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test_gdn
import test_mamba2
from data import Processor, collate, processor_of
from gdn import delta_rule
from mamba2 import ssd
from model import Qwen3VL, to_hybrid
from parts import fast
from synthdoc import World
from test_mamba2 import padding, rand, relative

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.gpu
SHORT = {"ssd": ("x", "B", "C"), "delta": ("q", "k", "v")}           # arguments that are bf16 in a bf16 model
RULES = {"ssd": (ssd, test_mamba2), "delta": (delta_rule, test_gdn)}


def arguments(rule, dtype, T):
    """The inputs of test_mamba2 or test_gdn at a width that GPUs like, rounded to dtype and held in fp64."""
    a = RULES[rule][1].inputs(b=2, T=T, H=8, G=2, P=64, N=64)
    return {k: v.to(dtype).double() if k in SHORT[rule] else v for k, v in a.items()}


def on_gpu(rule, a, dtype):
    return {k: v.to("cuda", dtype if k in SHORT[rule] else torch.float32).requires_grad_() for k, v in a.items()}


@pytest.fixture(params=["plain", "kernels"])
def kernels(request, monkeypatch):
    """Both ways, where the packages are installed."""
    monkeypatch.setenv("HEED_KERNELS", "1" if request.param == "kernels" else "0")
    return request.param


def need(rule, kernels):
    if kernels == "kernels":
        pytest.importorskip("mamba_ssm", reason="the kernels are not installed")
        if rule == "delta":
            pytest.skip("there are no kernels for the delta rule")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("kind", ["left", "right"])
def test_outputs_states_and_gradients_equal_the_recurrence(rule, dtype, bound, kind, kernels):
    """From a state, over many chunks and a short last one, with padding; all gradients, inside autocast too."""
    need(rule, kernels)
    bound = max(bound, 8e-3) if kernels == "kernels" else bound      # their products are TF32
    f, T = RULES[rule][0], 300
    a, mask = arguments(rule, dtype, T), padding(kind, T)
    weight, weight_state = rand(2, T, 8, 64, seed=7), rand(2, 8, 64, 64, seed=8)

    def results(f, leaves, weight, weight_state, mask):
        y, state = f(**leaves, mask=mask)
        y = y * mask[..., None, None].to(y.device)
        return [y, state, *torch.autograd.grad((y * weight).sum() + (state * weight_state).sum(), list(leaves.values()))]
    exact = results(RULES[rule][1].naive, {k: v.requires_grad_() for k, v in a.items()}, weight, weight_state, mask)
    with torch.autocast("cuda", torch.bfloat16):
        ours = results(f, on_gpu(rule, a, dtype), weight.float().cuda(), weight_state.float().cuda(), mask.cuda())
    for name, got, expected in zip(["y", "state", *a], ours, exact):
        assert relative(got.double().cpu(), expected) < bound, name


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_states_are_handed_over(rule, kernels):
    """A sequence in two pieces and one position: as in one."""
    need(rule, kernels)
    f, a = RULES[rule][0], on_gpu(rule, arguments(rule, torch.float32, 200), torch.float32)
    cut = lambda at: {k: v[:, at] if v.dim() > 2 and k != "state" else v for k, v in a.items() if k != "state"}
    whole, state = f(**a)
    pieces, carried = [], a["state"]
    for at in (slice(0, 130), slice(130, 199), slice(199, 200)):
        y, carried = f(**cut(at), state=carried)
        pieces.append(y)
    assert relative(torch.cat(pieces, 1), whole) < 5e-3 and relative(carried, state) < 5e-3


def test_blocks_of_chunks_are_used(monkeypatch):
    seen = []
    monkeypatch.setattr(fast, "chunks_at_once", lambda bh, Q, f=fast.chunks_at_once: seen.append(f(bh, Q)) or seen[-1])
    monkeypatch.setenv("HEED_KERNELS", "0")
    ssd(**on_gpu("ssd", arguments("ssd", torch.float32, 300), torch.float32))
    assert seen and seen[0] > 1


# ---------------------------------------------------------------------------------------------------------
# The model


def asked(n=6):
    world, processor = World("eval", 0), Processor(ROOT / "tiny")
    rows = []
    for i in range(n):
        sample = world[i]
        rows.append(processor.encode(type(sample)(sample.id, sample.messages[:1], sample.images), add_generation_prompt=True))
    return collate(rows, processor.pad_id, side="left")


@pytest.mark.parametrize("mixer", [None, "mamba2", "gdn"])
@pytest.mark.parametrize("graph", [True, False])
def test_answers_equal_the_cpus(mixer, graph, kernels):
    if kernels == "kernels":
        need("ssd" if mixer == "mamba2" else "delta", kernels)
    b, net = asked(), Qwen3VL.from_pretrained(ROOT / "tiny", torch.float32)
    net = to_hybrid(net, mixer) if mixer else net
    expected = net.generate(b.ids, b.mask, b.pixels, b.grids, max_new_tokens=12)
    b, net = b.to("cuda"), net.cuda()
    for _ in range(2):                                    # the second time from the graph that is there
        got = net.generate(b.ids, b.mask, b.pixels, b.grids, max_new_tokens=12, graph=graph)
        assert got == expected if kernels == "plain" else sum(map(len, got)) > 0
    assert not graph or net.replayed.graph is not None


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, "mamba2", "gdn"])
def test_replayed_steps_equal_eager_ones_in_bf16(mixer):
    """Flash attention over the fixed buffers, rows of unequal length, against attention with a mask; bf16's rounding."""
    net = Qwen3VL.from_pretrained(ROOT / "tiny", torch.bfloat16, "cuda")
    net, b = to_hybrid(net, mixer) if mixer else net, asked().to("cuda")
    b.mask[0, :5] = False
    exact = Qwen3VL.from_pretrained(ROOT / "tiny", torch.float32, "cuda")
    exact = to_hybrid(exact, mixer) if mixer else exact
    runs = []
    for model, graph in ((net, True), (net, False), (exact, False)):
        _, states, position = model.prefill(b.ids, b.mask, b.pixels, b.grids)
        step = model.start_decoding(states, position, 10, graph)
        runs.append(torch.stack([step(torch.full((6,), 20 + i, device="cuda")).float() for i in range(10)]))
    rounding = relative(runs[1], runs[2])
    assert relative(runs[0], runs[2]) < 2 * rounding + 1e-3 and rounding < 0.1


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, "mamba2"])
@pytest.mark.parametrize("teacher", ["glm4v", "internvl", "minicpmv"])
def test_other_teachers_read_and_decode_as_on_the_cpu(teacher, mixer, tmp_path, monkeypatch):
    """Towers, positions and the captured step, in fp32; what the CPU computes is held to transformers in their own tests."""
    monkeypatch.setenv("HEED_KERNELS", "0")
    kind = importlib.import_module(f"test_{teacher}")
    kind.make(tmp_path)
    processor, net = processor_of(tmp_path), Qwen3VL.from_pretrained(tmp_path, torch.float32)
    net = to_hybrid(net, mixer) if mixer else net
    rows = [processor.encode(sample, add_generation_prompt=True) for sample in kind.SAMPLES]
    b, runs = collate(rows, processor.pad_id, side="left"), []
    for device, graph in (("cpu", False), ("cuda", True), ("cuda", False)):
        b, net = b.to(device), net.to(device)
        logits, states, position = net.prefill(b.ids, b.mask, b.pixels, b.grids)
        step = net.start_decoding(states, position, 6, graph)
        steps = [step(torch.full_like(position, 20 + i)).float().cpu().clone() for i in range(6)]
        runs.append(torch.stack([logits.float().cpu(), *steps]))
        assert not graph or net.replayed.graph is not None
    assert relative(runs[1], runs[0]) < 1e-3 and relative(runs[2], runs[0]) < 1e-3


def distil(out, *flags, kill_after=None):
    words = [sys.executable, "distill.py", "--device", "cuda", "--tokens", "6000", "--questions", "0", "--save-every", "1",
             "--out", str(out), *flags]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        if kill_after:
            while len((out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []) < kill_after:
                if run.poll() is not None:
                    break
            run.kill()
        said = run.communicate()[0]
    assert kill_after or run.returncode == 0, said[-2000:]
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cond", ["c1", "c2", "c3", "c4", "c5", "c6"])
def test_a_step_of_each_condition_equals_the_cpus_in_fp32(cond, tmp_path, monkeypatch):
    """The first losses of a run: the same numbers but for rounding, in bf16 for bf16's."""
    import distill
    monkeypatch.setenv("HEED_COMPILE", "0")               # compiling takes longer than these runs
    distill.main(["--cond", cond, "--device", "cpu", "--tokens", "6000", "--questions", "0", "--out", str(tmp_path / "cpu")])
    expected = [json.loads(line) for line in (tmp_path / "cpu/log.jsonl").read_text().splitlines()]
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 5e-2)):
        distill.main(["--cond", cond, "--device", "cuda", "--dtype", dtype, "--tokens", "6000", "--questions", "0",
                      "--out", str(tmp_path / dtype)])
        lines = [json.loads(line) for line in (tmp_path / dtype / "log.jsonl").read_text().splitlines()]
        assert len(lines) == len(expected)
        assert abs(lines[0]["loss"] / expected[0]["loss"] - 1) < bound, (dtype, lines[0], expected[0])


@pytest.mark.parametrize("teacher", ["glm4v", "internvl", "minicpmv"])
def test_a_step_on_other_teachers_equals_the_cpus(teacher, tmp_path, monkeypatch):
    import distill
    from test_teachers import SIZE, lines
    monkeypatch.setenv("HEED_COMPILE", "0")
    kind, losses = importlib.import_module(f"test_{teacher}"), []
    kind.make(tmp_path)
    data = lines(kind, tmp_path)
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        out = tmp_path / f"{device}-{dtype}"
        distill.main(["--cond", "c4", "--teacher", str(tmp_path), "--data", data, "--device", device, "--dtype", dtype,
                      "--out", str(out), *map(str, SIZE)])
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert abs(losses[1][0] / losses[0][0] - 1) < 1e-3 and abs(losses[2][0] / losses[0][0] - 1) < 0.1, losses


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HEED_COMPILE", "0")
    whole = distil(tmp_path / "whole")
    distil(tmp_path / "killed", kill_after=2)
    resumed = distil(tmp_path / "killed")
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    assert abs(resumed[-1]["loss"] / whole[-1]["loss"] - 1) < 0.2    # a GPU's sums are not the same to the bit
