"""plugins/lmms_eval.py inside lmms-eval's own registry, and its command beside Hugging Face's `evaluate`."""
import copy
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_evaluate import folder, harness, mixed_samples  # noqa: F401  (fixtures)

from data import Sample
from evaluate import answer
from parts.benchmarks import SYSTEM

ROOT = Path(__file__).resolve().parents[1]


def test_lmms_eval_runs_our_models_under_the_prompt_key_of_qwen3_vl(harness, folder):
    models = harness("lmms_eval.models")
    harness("lmms_eval.api.model")                         # our classes' base
    from plugins.lmms_eval import manifest
    models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    arguments = f"pretrained={folder},dtype=float32,min_pixels=256,max_pixels=65536"
    extra = dict(batch_size=3, device="cpu")
    chat = models.get_model("qwen3_vl").create_from_arg_string(arguments, extra)
    simple = models.get_model("qwen3_vl", force_simple=True).create_from_arg_string(arguments, extra)
    assert not chat.is_simple and simple.is_simple
    samples = [s for s in mixed_samples() if s.images]
    docs = [dict(images=s.images, text=s.messages[0]["content"][-1]["text"]) for s in samples]
    for m in (chat, simple):
        m.task_dict = {"t": {"test": docs}}

    def visual(doc):
        return doc["images"]

    def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        turn = [{"role": "user", "content": [{"type": "image", "url": i} for i in doc["images"]]
                 + [{"type": "text", "text": doc["text"] + (previous_output or [""])[-1]}]}]
        return turn if round_idx is None else (turn, round_idx == 2, previous_output, None)

    def request(*args):
        return types.SimpleNamespace(args=args)

    limits = [{"max_new_tokens": 6 + i % 2} for i in range(len(docs))]
    asked = [Sample(s.id, [dict(role="system", content=[{"type": "text", "text": SYSTEM}]), *s.messages],
                      s.images)
             for s in samples]
    expected = [answer(chat.model, chat.processor, [s], 1, g["max_new_tokens"])[0]
                for s, g in zip(asked, limits)]
    as_chat = [request("", messages, g, i, "t", "test") for i, g in enumerate(limits)]
    as_simple = [request(d["text"], g, visual, i, "t", "test") for i, (d, g) in enumerate(zip(docs, limits))]
    assert chat.generate_until(as_chat) == expected and simple.generate_until(as_simple) == expected
    rounds = chat.generate_until_multi_round([request("", messages, limits[0], 0, "t", "test")])[0]
    second = copy.deepcopy(asked[0])
    second.messages[1]["content"][-1]["text"] += expected[0]
    assert rounds == [expected[0], answer(chat.model, chat.processor, [second], 1, 6)[0]]
    # The mean negative log-likelihood of a continuation and its end, token by token.
    target = "cat"
    asked_of = request(docs[0]["text"], lambda d: target, visual, 0, "t", "test")
    loss, greedy = simple.loglikelihood([asked_of])[0]
    e = chat.processor.encode(asked[0], add_generation_prompt=True)
    tail = torch.tensor(chat.processor.tokenize(target) + [258])
    logits = chat.model(torch.cat([e.ids, tail])[None], None, e.pixels, e.grids)[0].detach()
    logits = logits[len(e.ids) - 1:-1]
    assert loss == pytest.approx(-logits.log_softmax(-1)[torch.arange(len(tail)), tail].mean().item(),
                                 rel=1e-5)
    assert greedy == bool((logits.argmax(-1) == tail).all())


LMMS_EVAL = {                                              # a package as small as the command needs it
    "evaluate/__init__.py": "",                            # Hugging Face's
    "lmms_eval/__init__.py": "",
    "lmms_eval/api/__init__.py": "",
    "lmms_eval/api/model.py": "class lmms: pass",
    "lmms_eval/cli/__init__.py": "",
    "lmms_eval/cli/dispatch.py": """
import evaluate, importlib, sys
from lmms_eval.models import MODEL_REGISTRY_V2
def main():
    of = MODEL_REGISTRY_V2.manifest
    chat, simple = (getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
                    for path in (of["chat_class_path"], of["simple_class_path"]))
    print(evaluate.__file__, sys.argv, of[0], chat.is_simple, simple.is_simple, chat.__init__.__globals__["answer"])
""",
    "lmms_eval/models/__init__.py": """
class MODEL_REGISTRY_V2:
    def register_manifest(manifest, overwrite):
        MODEL_REGISTRY_V2.manifest = manifest
""",
    "lmms_eval/models/registry_v2.py": "def ModelManifest(name, **paths): return {0: name, **paths}"}


def test_the_command_gives_lmms_eval_hugging_faces_evaluate_and_our_classes(tmp_path):
    for name, text in LMMS_EVAL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    run = subprocess.run([sys.executable, "-m", "plugins.lmms_eval", "--model", "qwen3_vl"], cwd=ROOT, text=True,
                         capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{tmp_path}/evaluate/__init__.py ['lmms-eval', '--model', 'qwen3_vl'] qwen3_vl "
                                 "False True <function answer"), run.stdout
