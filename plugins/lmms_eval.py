"""This project's models inside lmms-eval, for all the benchmarks that it has (Sect. 5.1).

    pip install lmms-eval==0.7.3
    python -m plugins.lmms_eval --model qwen3_vl --model_args pretrained=out/c4 --tasks docvqa_val

The flags are lmms-eval's own. It chooses a task's prompt by the model's name, so ours is called
`qwen3_vl`: teacher, students and the stock model then see the same prompt.
--model_args: pretrained=FOLDER, dtype, min_pixels, max_pixels, system_prompt.
"""
import sys

import torch
from lmms_eval.api.model import lmms

from data import Sample, collate
from evaluate import answer, full_processor
from model import Qwen3VL
from parts.benchmarks import HARNESS_TOKENS, SYSTEM


class Chat(lmms):
    """lmms-eval's chat form, the default: a request carries a function that makes messages.

    A turn is (role, [PIL image or text])."""
    is_simple = False

    def __init__(self, pretrained, batch_size=1, device="cuda", dtype="bfloat16",
                 system_prompt=SYSTEM, min_pixels=None, max_pixels=None, max_batch_size=None):
        super().__init__()
        self.device, self.batch_size = torch.device(device), int(batch_size)
        self.system_turn = [("system", [system_prompt])] if system_prompt else []
        self.model = Qwen3VL.from_pretrained(pretrained, dtype=getattr(torch, dtype), device=device)
        self.processor = full_processor(pretrained)
        self.processor = self.processor.bounded(*HARNESS_TOKENS)
        if not hasattr(self.processor, "min_pixels"):     # tiles have no bounds in pixels
            if min_pixels or max_pixels:
                raise ValueError(f"{pretrained} cuts pictures into tiles: it has neither min_pixels "
                                 "nor max_pixels")
            return
        # The stock chat model looks at images in full, the stock simple one at 1.6 megapixels.
        least, most = self.processor.min_pixels, self.processor.max_pixels
        if self.is_simple:
            least, most = 256 * 28 * 28, 1605632
        self.processor.min_pixels = int(min_pixels or least)
        self.processor.max_pixels = int(max_pixels or most)

    def to_sample(self, turns):
        messages, images = [], []
        for role, parts in self.system_turn + turns:
            messages.append(dict(role=role, content=[
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in parts]))
            images += [part.convert("RGB") for part in parts if not isinstance(part, str)]
        return Sample("request", messages, images)

    def simple_turns(self, images, text):
        return [("user", [*(images or []), text.replace("<image>", "")])]

    def chat_turns(self, messages):
        return [(message["role"], [part["text"] if part["type"] == "text" else part["url"]
                                   for part in message["content"]]) for message in messages]

    def unpack(self, request):
        """-> document, its function for later rounds, generation settings, the first turns."""
        *first, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        if self.is_simple:
            text, settings, images_of, *more = first
            return doc, more and more[0], settings, self.simple_turns(images_of(doc), text)
        _, messages_of, settings = first
        return doc, messages_of, settings, self.chat_turns(messages_of(doc))

    def replies(self, asked):
        """[(settings, turns)] -> replies, greedy whatever the task asks for (C.1)."""
        replies = [""] * len(asked)
        limits = [settings.get("max_new_tokens", 128) for settings, _ in asked]
        for limit in sorted(set(limits)):                  # a batch shares one limit
            rows = [i for i in range(len(asked)) if limits[i] == limit]
            samples = [self.to_sample(asked[i][1]) for i in rows]
            texts = answer(self.model, self.processor, samples, self.batch_size, limit, "lmms-eval")
            for i, text in zip(rows, texts):
                # Of the stock models only the simple one heeds stop strings, and never blank lines.
                stops = asked[i][0].get("until") if self.is_simple else None
                for stop in [stops] if isinstance(stops, str) else stops or ():
                    text = text.split(stop)[0] if stop not in ("", "\n\n") else text
                replies[i] = text
        return replies

    def generate_until(self, requests):
        return self.replies([self.unpack(request)[2:] for request in requests])

    def generate_until_multi_round(self, requests):
        """A list of replies for each request. The task makes round k from those before, or ends."""
        return [self.rounds(*self.unpack(request)) for request in requests]

    def rounds(self, doc, next_round, settings, turns):
        said, info = [], None
        while True:
            said += self.replies([(settings, turns)])
            new = next_round(doc, round_idx=len(said), previous_output=[*said],
                             previous_round_info=info)
            if not isinstance(new, tuple):                 # a task of one round
                return said
            *question, is_last, corrected, info = new      # the task may correct what was said
            said = list(corrected or said)
            if is_last:
                return said
            turns = self.simple_turns(*question) if self.is_simple else self.chat_turns(*question)

    @torch.inference_mode()
    def loglikelihood(self, requests):
        """(mean negative log-likelihood of the target, is it the greedy one), as stock models."""
        results = []
        for text, target, images_of, doc_id, task, split in (r.args for r in requests):
            doc = self.task_dict[task][split][doc_id]
            target = target if isinstance(target, str) else target(doc)
            sample = self.to_sample(self.simple_turns(images_of(doc), text))
            sample = sample.answered([{"type": "text", "text": target}])
            batch = collate([self.processor.encode(sample)], self.processor.pad_id).to(self.device)
            logits = self.model(batch.ids, None, batch.pixels, batch.grids)[:, :-1]  # (1, T - 1, V)
            labels = batch.labels[:, 1:]                                             # (1, T - 1)
            logits, labels = logits[labels >= 0].float(), labels[labels >= 0]        # the target's
            loss = torch.nn.functional.cross_entropy(logits, labels).item()
            results.append((loss, bool((logits.argmax(-1) == labels).all())))
        return results


class Simple(Chat):
    """lmms-eval's simple form (--force_simple): a request carries a text and its images."""
    is_simple = True


def manifest():
    """Our classes for lmms-eval's registry; can be an entry point of its group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest
    return ModelManifest("qwen3_vl", chat_class_path="plugins.lmms_eval.Chat",
                         simple_class_path="plugins.lmms_eval.Simple")


def main():
    # lmms-eval imports Hugging Face's `evaluate`, a name that our evaluate.py has too. Ours,
    # imported above, gives it up; this folder, which `python -m` searches first, is now searched
    # last.
    del sys.modules["evaluate"]
    sys.path.append(sys.path.pop(0))
    from lmms_eval.cli.dispatch import main as lmms_eval_main
    from lmms_eval.models import MODEL_REGISTRY_V2
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    sys.argv[0] = "lmms-eval"
    lmms_eval_main()


if __name__ == "__main__":
    from plugins.lmms_eval import main as run              # under the name that the registry knows
    run()
