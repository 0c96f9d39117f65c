"""README.md keeps its word: its anchors point where they say, its commands parse, its worked example works."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from paper import reproduce
from model import Config, Qwen3VL, TextConfig, VisionConfig, to_hybrid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_equation_is_where_docs_say():
    rows = re.findall(r"\| \[`([\w/]+\.py)`\]\(\.\./([\w/]+\.py)\) \| `([^`]+)` \|", (ROOT / "docs/method.md").read_text())
    assert len(rows) >= 15
    for file, target, code in rows:
        assert file == target and (ROOT / file).read_text().count(code) == 1, f"{file} does not hold {code} once"


def test_every_condition_of_the_code_stands_in_the_table_of_docs():
    from distill import CONDS
    rows = re.findall(r"^\| `([\w-]+)` \| ([\w ]+?) \| (\S+) \| (\w+) \|", (ROOT / "docs/method.md").read_text(), re.M)
    words = {None: "skipped", "output": "mixer outputs", "residual": "residual streams"}
    assert {name: (words[c.align], c.weight if c.align else "–", c.mixer) for name, c in CONDS.items()} == \
        {name: tuple(row) for name, *row in rows}


def test_every_file_that_is_named_exists():
    for page in ("README.md", "docs/method.md", "docs/notes.md", "docs/recipes.md", "paper/RESULTS.md", "paper/efficiency.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links {target}"


def test_every_difference_that_is_quoted_in_words_stands_in_the_tables():
    """Runs' differences with their errors, in README and at the head of RESULTS.md, as reproduce.py writes them."""
    words, results = (ROOT / "paper/RESULTS.md").read_text().split(reproduce.BELOW)
    quoted = re.findall(r"(\S+) −\s(\S+)\sis\s(\S+ ± [\d.]+\d)\sand\s(\S+ ± [\d.]+\d)", README + words)
    assert len(quoted) >= 20
    for better, worse, *values in quoted:
        better = better.lstrip("(")
        assert re.search(rf"\| {better} − {worse} \| \d+ \| {re.escape(values[0])}(?: †)? \| {re.escape(values[1])}(?: †)? \|", results), (better, worse)


def test_every_command_of_the_readme_uses_flags_that_exist():
    commands = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    scripts = {}
    for line in commands:
        words = shlex.split(line.split("#")[0].replace("&&", ";"))
        for at, word in enumerate(words):
            script = word.endswith(".py") and (ROOT / word).exists()
            if script or words[at - 1:at] == ["-m"]:
                stop = words.index(";", at) if ";" in words[at:] else len(words)
                sub = [w for w in words[at + 1:at + 2] if word == "sft_dpo.py"]
                flags = {w.split("=")[0] for w in words[at + 1:stop] if w.startswith("--")}
                scripts.setdefault((*["-m"] * (not script), word, *sub), set()).update(flags)
    assert ("distill.py",) in scripts
    for command, flags in scripts.items():
        if command[:2] == ("-m", "plugins.lmms_eval"):    # its flags are lmms-eval's
            continue
        shown = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        known = set(re.findall(r"--[a-z0-9-]+", shown.stdout))
        assert flags <= known, f"{command} has no {flags - known}"


EXAMPLE = f"{ROOT}/examples/mean_mixer.py:MeanMixer"


def test_the_worked_mixer_is_what_it_says_and_keeps_its_state():
    torch.manual_seed(0)
    text = TextConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=8, mrope_section=[2, 1, 1])
    vision = VisionConfig(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=4, out_hidden_size=32,
                          num_position_embeddings=16, deepstack_visual_indexes=[0])
    teacher = Qwen3VL(Config(text=text, vision=vision, image_token_id=49, video_token_id=48)).double().eval()
    student = to_hybrid(teacher, EXAMPLE)
    mixer, x = student.layers[0].self_attn, torch.randn(2, 7, 32, dtype=torch.double)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        y, state = mixer(x, mask)
        for b in range(2):                                # the plain definition, one row and position at a time
            real = x[b, mask[b]]
            for t in range(len(real)):
                v = torch.stack([teacher.layers[0].self_attn.v_proj(h) for h in real[:t + 1]]).mean(0)
                heads = torch.cat([v[8 * (h // 2):8 * (h // 2) + 8] for h in range(4)])
                want = teacher.layers[0].self_attn.o_proj(heads * torch.sigmoid(mixer.gate(real[t])))
                assert torch.allclose(y[b, mask[b]][t], want, atol=1e-12)
        a, half = mixer(x[:, :3], mask[:, :3])
        b, end = mixer(x[:, 3:], mask[:, 3:], half)
    assert torch.allclose(torch.cat((a, b), 1)[mask], y[mask], atol=1e-12)
    assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(end, state))


def test_the_worked_mixer_trains(tmp_path):
    """Through all three stages, as its own words command it, and loads again."""
    import distill
    distill.main(["--cond", "c4", "--mixer", EXAMPLE, "--tokens", "8000", "--questions", "0", "--threads", "1",
                  "--out", str(tmp_path)])
    losses = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in losses} == {"stage 1", "stage 2", "stage 3"}
    assert losses[-1]["kl"] < losses[[line["stage"] for line in losses].index("stage 3")]["kl"]
    student = Qwen3VL.from_pretrained(tmp_path)
    assert type(student.layers[0].self_attn).__name__ == "MeanMixer"


def test_the_readme_has_no_unfinished_place():
    assert "@" not in README.replace("@@", "@") and "TBD" not in README


def test_failures_sorted_by_hand_are_as_the_words_count_them():
    kinds = [json.loads(line)["kind"] for line in (ROOT / "paper/results/failures.jsonl").read_text().splitlines()]
    words = re.search(r"## What both C1 and C4 fail\n(.*?)\n## ", (ROOT / "paper/RESULTS.md").read_text(), re.S)[1]
    shares = [int(n) for n in re.findall(r"(\d+) %", words)]
    order = ["F2", "character", "place", "object", "guess", "field"]
    assert len(kinds) == 50 and shares == [75, *(2 * kinds.count(kind) for kind in order)] and set(kinds) == set(order)
