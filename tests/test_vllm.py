"""plugins/vllm: vLLM gives a student's own tokens, however it cuts, batches and caches them.

Needs an environment with vLLM, and in it `pip install ./plugins/vllm pytest`, for which
plugins/vllm/verify.sh is there. The oracle is model.py in fp32. Four minutes for two mixers, most
of them vLLM's starts.

    pytest tests/test_vllm.py
    HEED_STUDENTS="out/c4 out/c6" pytest tests/test_vllm.py        # trained students
"""
import base64
import contextlib
import gc
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

for package, command in (("vllm", "vllm==0.32.0"), ("heed_vllm", "./plugins/vllm")):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install {command})", allow_module_level=True)

# The engine in this process, so that tests see what it does; a small cache; torch's threads.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1",
                  VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR",
                  HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from data import collate  # noqa: E402
from evaluate import full_processor  # noqa: E402
from formats import Sample, texts  # noqa: E402
from model import Qwen3VL, to_hybrid  # noqa: E402
from synthdoc import World  # noqa: E402

ROOT = Path(__file__).parents[1]
NEW = 12                                 # tokens of an answer: both sides ignore its end
PAGES = 40
TRAINED = os.environ.get("HEED_STUDENTS", "").split()


@pytest.fixture(scope="module", params=TRAINED or ["mamba2", "gdn"])
def folder(request, tmp_path_factory):
    """A trained student, or one far from its start in each new parameter, so that each shows."""
    folder = tmp_path_factory.mktemp("student") / "student"
    if TRAINED:
        shutil.copytree(request.param, folder, ignore=shutil.ignore_patterns("step_*", "density"))
        shutil.copy(ROOT / "tiny/chat_template.jinja", folder)      # which older students lack
        return folder
    student = to_hybrid(Qwen3VL.from_pretrained(ROOT / "tiny", torch.float32), request.param)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in student.config.hybrid["layers"]:
            for name, p in student.layers[i].self_attn.named_parameters():
                p += torch.randn(p.shape, generator=draw) * p.std(correction=0).clamp(0.05, 0.3)
    student.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked():
    """40 evaluation pages of both suites and two sizes; then a text alone, and two pictures."""
    suites, sides = ("reading", "reasoning"), (10, 7)
    worlds = [World("eval", 0, suite, (n, n)) for suite in suites for n in sides]
    samples = [world[i] for i in range(PAGES // 4) for world in worlds]
    samples = [Sample(s.id, s.messages[:1], s.images) for s in samples]
    text, picture = texts("What is the price of tea?"), [{"type": "image"}]
    both = picture + texts("What is the shop?") + picture + texts(" or the date?")
    for i, s in enumerate(samples):
        s.id = f"page {i}"
    return samples + [Sample("text", [dict(role="user", content=text)]), Sample(
        "two", [dict(role="user", content=both)], samples[0].images + samples[1].images)]


@pytest.fixture(scope="module")
def processor(folder):
    return full_processor(folder)


@pytest.fixture(scope="module")
def ours(folder, processor):
    """A function: samples -> of each the greedy tokens and their log-probabilities, by model.py."""
    model = Qwen3VL.from_pretrained(folder, torch.float32)
    model.config.eos_token_id = []

    @torch.no_grad()
    def say(sample):
        batch = collate([processor.encode(sample, add_generation_prompt=True)], processor.pad_id)
        tokens = model.generate(batch.ids, None, batch.pixels, batch.grids, max_new_tokens=NEW)[0]
        ids = torch.cat((batch.ids, torch.tensor([tokens])), dim=1)
        logits = model(ids, None, batch.pixels, batch.grids)[0, -NEW - 1:-1]           # (NEW, V)
        return tokens, logits.log_softmax(-1)[range(NEW), tokens].tolist()
    known = {}                                            # by the samples' ids and words

    def all_of(samples):
        keys = [(s.id, str(s.messages)) for s in samples]
        known.update({key: say(s) for key, s in zip(keys, samples) if key not in known})
        return [known[key] for key in keys]
    return all_of


def prompt(sample):
    """As vLLM takes it: the template's text, where one placeholder stands for each picture."""
    words = "".join("<|vision_start|><|image_pad|><|vision_end|>" if part["type"] == "image" else
                    part["text"] for part in sample.messages[0]["content"])
    whole = {"prompt": f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"}
    return whole | ({"multi_modal_data": {"image": list(sample.images)}} if sample.images else {})


@contextlib.contextmanager
def engine(folder, **settings):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    llm = None
    try:
        llm = LLM(model=str(folder), **dict(
            dtype="float32", max_model_len=512, max_num_seqs=4, block_size=32, enforce_eager=True,
            limit_mm_per_prompt={"image": 2, "video": 0}) | settings)
        yield llm
    finally:
        if llm:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(tokens=NEW):
    from vllm import SamplingParams
    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)


def answers(llm, samples):
    """-> of each sample the tokens and their log-probabilities; and how many tokens of its prompt
    came from vLLM's cache."""
    outputs, said = llm.generate([prompt(s) for s in samples], greedy(), use_tqdm=False), []
    for output in outputs:
        tokens, steps = output.outputs[0].token_ids, output.outputs[0].logprobs
        said.append((list(tokens), [step[t].logprob for t, step in zip(tokens, steps)]))
    return said, [output.num_cached_tokens for output in outputs]


def same(theirs, ours):
    for i, ((a, p), (b, q)) in enumerate(zip(theirs, ours, strict=True)):
        assert a == b, f"sample {i}: {a} is not {b}"
        assert max(abs(x - y) for x, y in zip(p, q)) < 1e-3, f"sample {i}: log-probabilities"


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder) as llm:                           # prefix caching is vLLM's default
        yield llm


def test_one_by_one(llm, asked, ours):
    wanted = ours(asked)
    assert len({tuple(tokens) for tokens, _ in wanted}) > 25         # they do not all say the same
    same([answers(llm, [sample])[0][0] for sample in asked], wanted)


def test_batches_of_unequal_lengths_from_an_empty_cache(llm, asked, ours):
    """Ten for four places: prompts are read beside requests that decode, and slots change hands."""
    llm.reset_prefix_cache()
    for start in range(0, len(asked), 10):
        samples = asked[start:start + 10]
        same(answers(llm, samples)[0], ours(samples))


def test_a_prompt_that_begins_as_an_earlier_one(llm, asked, ours):
    """A second question about a page that was seen: keys, values and states come from the cache.
    vLLM keeps the states at the end of a block, which it makes 64 tokens long for this shape, as
    the block's keys and values must take at least as many bytes as a layer's states."""
    llm.reset_prefix_cache()
    first = asked[:16:2]                                  # the larger pages: more than a block
    again = []
    for i, s in enumerate(first):
        question = [{"type": "image"}, *texts(f"Say what page {i} tells us.")]
        again.append(Sample(s.id, [dict(role="user", content=question)], s.images))
    theirs, cached = answers(llm, first)
    same(theirs, ours(first))
    assert not any(cached)
    theirs, cached = answers(llm, again)
    same(theirs, ours(again))
    assert set(cached) == {64}


def test_an_aborted_request_leaves_nothing_behind(llm, asked, ours):
    """Four are stopped while they decode, one while it waits; the next ones get their places."""
    llm.reset_prefix_cache()
    loop = llm.llm_engine
    for i in range(5):
        loop.add_request(f"left {i}", prompt(asked[i]), greedy(200))
    for _ in range(6):
        loop.step()
    ids = [request for request in loop.output_processor.request_states]
    assert len(ids) == 5
    loop.abort_request(ids, internal=True)
    assert not loop.has_unfinished_requests()
    same(answers(llm, asked[4:16])[0], ours(asked[4:16]))


@pytest.mark.parametrize("chunk, cached", [(16, False), (64, False), (16, True)])
def test_prefill_in_chunks(folder, asked, ours, chunk, cached, monkeypatch):
    """Prompts of 80 to 240 tokens, so many tokens a step, beside requests that decode."""
    from heed_vllm import model
    sizes, run = [], model.Mixer.conv_ssm_forward

    def seen(self, **arrays):
        metadata = model.get_forward_context().attn_metadata
        if metadata is not None:
            mine = metadata[self.prefix]
            sizes.append((mine.num_decode_tokens, mine.num_prefill_tokens))
        run(self, **arrays)
    monkeypatch.setattr(model.Mixer, "conv_ssm_forward", seen)
    samples = asked[:12] + asked[-2:]
    with engine(folder, max_num_batched_tokens=chunk, enable_prefix_caching=cached) as llm:
        same(answers(llm, samples)[0], ours(samples))
        same([answers(llm, [sample])[0][0] for sample in samples[:4]], ours(samples[:4]))
    assert max(map(sum, sizes)) <= chunk and any(steps and read for steps, read in sizes)


def mixers(model):
    layers = model.language_model.model.layers
    return {i: layers[i].self_attn for i in model.config.hybrid["layers"]}


def test_a_layer_keeps_states_of_our_sizes_and_types_or_keys(llm, folder, asked, processor):
    student = Qwen3VL.from_pretrained(folder, torch.float32)
    batch = collate([processor.encode(asked[0], add_generation_prompt=True)], processor.pad_id)
    states = student.prefill(batch.ids, None, batch.pixels, batch.grids)[1]
    theirs, = llm.apply_model(lambda model: {i: m.kv_cache for i, m in mixers(model).items()})
    assert list(theirs) == student.config.hybrid["layers"]
    for i, slots in theirs.items():                       # a row is a slot there, a sample here
        there, here = ([(t.shape[1:], t.dtype) for t in of] for of in (slots, states[i]))
        assert there == here
    known = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    parts = [name.split(".") for name in known if name.startswith("language_model.model.layers.")]
    assert sorted(int(part[3]) for part in parts) == list(range(8))        # one cache each


def test_bf16_keeps_in_fp32_what_ours_keeps(folder, asked, ours):
    student, named = Qwen3VL.from_pretrained(folder, torch.bfloat16), {}
    for i in student.config.hybrid["layers"]:
        named |= {(i, n): p.dtype for n, p in student.layers[i].self_attn.named_parameters()}
    with engine(folder, dtype="bfloat16") as llm:
        theirs, = llm.apply_model(lambda model: {
            (i, n): p.dtype for i, m in mixers(model).items() for n, p in m.named_parameters()})
        assert {k for k, d in theirs.items() if d == torch.float32} == \
            {k for k, d in named.items() if d == torch.float32} != set()
        said = answers(llm, asked)[0]
    off = [abs(p[0] - q[0]) for (a, p), (b, q) in zip(said, ours(asked)) if a[0] == b[0]]
    assert len(off) > 0.8 * len(asked) and sum(off) / len(off) < 0.1      # of the first tokens


def test_without_pictures_no_vision_tower_is_built(folder, asked, ours):
    with engine(folder, limit_mm_per_prompt={"image": 0, "video": 0}) as llm:
        assert llm.apply_model(lambda model: len(list(model.visual.parameters()))) == [0]
        same(answers(llm, asked[-2:-1])[0], ours(asked[-2:-1]))


def broken(folder, path, config=None, drop=(), add=()):
    """A copy of a student with something changed."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, path)
    text = json.loads((path / "config.json").read_text())
    state = load_file(path / "model.safetensors")
    text["hybrid"] |= config or {}
    state = {name: t for name, t in state.items() if name not in drop} | dict(add)
    (path / "config.json").write_text(json.dumps(text))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


AT = "model.language_model.layers.1.self_attn."


@pytest.mark.parametrize("change, words", [
    # Of the first two vLLM itself would say nothing: it stacks the one, and skips spare biases.
    (dict(drop=[AT + "k_proj.weight"]), f"missing tensor {AT}k_proj.weight$"),
    (dict(add={AT + "conv.bias": torch.zeros(256)}), f"unexpected tensor {AT}conv.bias$"),
    (dict(drop=[AT + "out_norm"]), f"missing tensor {AT}out_norm$"),
    (dict(add={AT + "conv": torch.zeros(256, 3)}), f"^{AT}conv does not fit"),
    (dict(config={"mixer": "mean.py:Mean"}),
     "the mixer 'mean.py:Mean' is not served by vLLM, only mamba2 and gdn"),
    (dict(config={"layers": [0, 8]}), r"hybrid has layers \[0, 8\], of 8"),
])
def test_a_folder_that_is_not_served_is_refused_by_name(folder, tmp_path, change, words):
    path = broken(folder, tmp_path / "student", **change)
    with pytest.raises(ValueError, match="(?m)" + words), engine(path):
        pass


@pytest.mark.parametrize("settings, words", [
    (dict(tensor_parallel_size=2), "tensor parallelism"),
    (dict(pipeline_parallel_size=2), "pipeline parallelism"),
    (dict(enable_lora=True), "adapters"), (dict(quantization="fp8"), "quantisation"),
    (dict(speculative_config=dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)),
     "speculative decoding"),
    (dict(mamba_cache_dtype="float16"), "--mamba-cache-dtype"),
    (dict(mamba_ssm_cache_dtype="float16"), "--mamba-ssm-cache-dtype")])
def test_settings_that_are_not_served_are_refused(folder, settings, words):
    from vllm.engine.arg_utils import EngineArgs
    with pytest.raises(ValueError, match=f"HEED's hybrids are served without {words}"):
        EngineArgs(model=str(folder), **settings).create_engine_config()


def test_another_vllm_is_refused_where_its_interface_differs(monkeypatch):
    import heed_vllm
    import vllm.model_executor.layers.mamba.ops.causal_conv1d as operations
    assert heed_vllm.installed() in heed_vllm.TESTED
    monkeypatch.setattr(heed_vllm, "installed", lambda: "9.9.9")
    assert heed_vllm.differences() == []
    heed_vllm.register()
    monkeypatch.setattr(operations, "causal_conv1d_fn", lambda x, weight, bias: x)
    monkeypatch.delattr(operations, "causal_conv1d_update")
    words = ("tested with vLLM 0.32.0, and this is 9.9.9, which differs where it matters: "
             "causal_conv1d_fn knows no conv_states, .*; .*causal_conv1d_update")
    with pytest.raises(ImportError, match=words):
        heed_vllm.register()


def serve(folder, port, into):
    """`vllm serve FOLDER` in a process. The package vllm-cpu lacks the name by which vLLM's command
    asks for its own version, and so does not start by itself: it gets one."""
    environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        (said := into / f"vllm-{version}.dist-info").mkdir()
        (said / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
        environment["PYTHONPATH"] = str(into)
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--host", "127.0.0.1",
               "--port", str(port), "--dtype", "float32", "--max-model-len", "512",
               "--enforce-eager"]
    with open(into / "log", "w") as log:
        return subprocess.Popen(command, env=environment, cwd=into, stdout=log, stderr=log)


def test_a_server_answers_about_a_picture(folder, tmp_path, asked, ours):
    """Through HTTP, with the picture as a data URL, by the folder's own template."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    picture = io.BytesIO()
    asked[0].images[0].save(picture, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, asked[0].messages[0]["content"][1]]
    body = dict(messages=[dict(role="user", content=content)], temperature=0, max_tokens=NEW,
                ignore_eos=True, return_token_ids=True)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    server = serve(folder, port, tmp_path)
    try:
        reply, until = None, time.time() + 900            # many jobs may share the machine
        while reply is None and time.time() < until:
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                reply = json.load(urllib.request.urlopen(request, timeout=60))
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:                 # nobody listens yet
                time.sleep(1)
        assert reply, "no answer in 15 minutes: " + (tmp_path / "log").read_text()[-2000:]
        assert reply["choices"][0]["token_ids"] == ours(asked[:1])[0][0]
    finally:
        server.terminate()
        server.wait(60)
