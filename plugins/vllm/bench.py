"""Teacher and hybrid inside vLLM, side by side (Sect. 5.4; figures in paper/efficiency.md).

    python -m plugins.vllm.bench tiny 512x1 4096x1 4096x8 32768x1        # context x rows
    python -m plugins.vllm.bench wide 512x1 4096x1 4096x8 --compile

Needs an environment with vLLM and the plugin. Both engines live in this process, read the same
random text and take turns, so that a busy machine is unfair to none. On a CPU with one thread
(OMP_NUM_THREADS, 1 unless set) seconds are processor time, which no other work lengthens; else the
wall clock. Settings are vLLM's own, but for prefix caching, which is off, as a text is read more
than once, and compilation, which is off without --compile.

    first     seconds until all rows have their first token
    step      seconds of a decode step of all rows: the median of STEPS
    held      what a row keeps in fp32, keys, values and states: hybrid over teacher
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
import torch  # noqa: E402  (after the number of threads is set)
from vllm import LLM, SamplingParams  # noqa: E402

from model import Config, to_hybrid  # noqa: E402
from paper.contenders import ROOT, build, folder_of  # noqa: E402

STEPS, ROOM = 16, 512                   # steps measured; room for tokens of rows that began earlier


def folders(shape, longest, into):
    """Writes the teacher of that shape and its hybrid -> {"teacher": folder, "hybrid": folder}."""
    with tempfile.TemporaryDirectory() as scratch:
        source = SimpleNamespace(folder=folder_of(shape, scratch), dtype="float32", device="cpu")
        teacher = build(source)
    teacher.folder = ROOT / "tiny"                        # whose tokenizer and settings are copied
    teacher.config.text.max_position_embeddings = longest
    for kind, model in (("teacher", teacher), ("hybrid", to_hybrid(teacher))):
        model.save_pretrained(Path(into) / kind)
    return {kind: str(Path(into) / kind) for kind in ("teacher", "hybrid")}


def now():
    return time.process_time() if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter()


def request(llm, prompts):
    """-> (seconds until each row has its first token, median seconds of a step after that)."""
    engine, waiting, times = llm.llm_engine, {str(i) for i in range(len(prompts))}, []
    wanted = SamplingParams(temperature=0, max_tokens=ROOM, ignore_eos=True)
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, wanted)
    begin = now()
    while waiting:
        waiting -= {o.request_id for o in engine.step() if o.outputs[0].token_ids}
    first = now() - begin
    for _ in range(STEPS):
        start = now()
        if len(engine.step()) < len(prompts):             # none may have come to its end
            raise RuntimeError(f"rows ended before the last had begun: ROOM is {ROOM}")
        times.append(now() - start)
    engine.abort_request([str(i) for i in range(len(prompts))])
    return first, statistics.median(times)


def held(config, context, replaced):
    """Bytes that a row keeps: keys and values at each position, or a layer's states."""
    t = config.text
    H, G, P = t.num_attention_heads, t.num_key_value_heads, t.head_dim
    keys, states = 4 * 2 * G * P * context, 4 * (3 * (2 * G + H) * P + H * P * P)
    return (t.num_hidden_layers - replaced) * keys + replaced * states


def compare(llms, config, context, rows, repeats):
    """One line of the table."""
    draw, took = torch.Generator().manual_seed(0), {kind: [] for kind in llms}
    prompts = torch.randint(8, 250, (rows, context), generator=draw).tolist()
    for _ in range(repeats):
        for kind, llm in llms.items():
            took[kind].append(request(llm, prompts))
    medians = [statistics.median(times) for kind in llms for times in zip(*took[kind])]
    first, step, new_first, new_step = medians
    share = held(config, context, len(config.hybrid["layers"])) / held(config, context, 0)
    print(f"| {context} | {rows} | {first:.3f} s | {new_first:.3f} s | {first / new_first:.2f} x "
          f"| {1000 * step:.2f} ms | {1000 * new_step:.2f} ms | {step / new_step:.2f} x "
          f"| {share:.2f} x |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=("tiny", "wide"), help="the embedded one, or a wider one")
    parser.add_argument("points", nargs="+", help="CONTEXTxROWS")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many")
    parser.add_argument("--compile", action="store_true", help="as vllm serve does")
    opt = parser.parse_args()
    points = [[int(n) for n in point.split("x")] for point in opt.points]
    longest = max(context for context, _ in points) + ROOM
    with tempfile.TemporaryDirectory() as into:
        llms = {kind: LLM(model=folder, dtype="float32", max_model_len=longest,
                          max_num_seqs=max(rows for _, rows in points),
                          enforce_eager=not opt.compile, enable_prefix_caching=False,
                          limit_mm_per_prompt={"image": 0, "video": 0})
                for kind, folder in folders(opt.shape, longest, into).items()}
        config = Config.from_folder(Path(into) / "hybrid")
    for llm in llms.values():
        request(llm, [[9] * 300])                         # what is loaded on first use
    print(f"{opt.shape}, OMP_NUM_THREADS {os.environ['OMP_NUM_THREADS']}"
          f"{', compiled' if opt.compile else ''}; hybrid beside teacher, and teacher / hybrid\n")
    print("| context | rows | first | | | step | | | held |\n|" + "---|" * 9)
    for context, rows in points:
        compare(llms, config, context, rows, opt.repeats)


if __name__ == "__main__":
    main()
