"""Every command on small random teachers of the other kinds, each against its own repetition, its frozen parts or
what it must refuse; what these teachers compute is held to oracles in their own files. Run: pytest tests/test_teachers.py"""
import importlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distill
import sft_dpo
from data import processor_of, read_data
from density import cache_density
from evaluate import answer
from model import Qwen3VL
from paper import diagnose

# Of each, besides its mixers and decoder: what SFT must move and what it must leave.
KINDS = {"internvl": ({"merger.linear_1.weight"}, "layers."),
         "glm4v": ({"merger.proj.weight", "merger.downsample.weight"}, "blocks."),
         "minicpmv": ({"merger.query", "merger.proj", "merger.attn.in_proj_weight"}, "layers.")}
SIZE = ("--tokens", 900, "--batch-tokens", 300, "--micro-tokens", 300)


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, tmp_path_factory):
    """The test file of a kind, with a folder that it made."""
    kind = importlib.import_module(f"test_{request.param}")
    kind.folder = tmp_path_factory.mktemp(request.param)
    kind.make(kind.folder)
    return kind


def command(main, *flags):
    main([str(f) for f in flags] + ["--device", "cpu", "--threads", "1", "--dtype", "float32"])


def lines(teacher, folder, pairs=False):
    """Eight pictures with a question each, so large that a sample fits the batch."""
    rows, step = [], teacher.STEP
    for i in range(8):
        teacher.picture(3 * step + step * i, 5 * step // 2, i).save(folder / f"{i}.png")
        user = dict(role="user", content=f"<image>What is {i}?")
        row = dict(id=f"n{i}", images=[f"{i}.png"])
        rows.append(row | (dict(messages=[user], chosen=f"It is {i}.", rejected="No.") if pairs else
                           dict(messages=[user, dict(role="assistant", content=f"It is {i}.")])))
    file = folder / ("pairs.jsonl" if pairs else "data.jsonl")
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.parametrize("cond", ["c1", "c2", "c3", "c4", "c5", "c6"])
def test_conditions_run(teacher, tmp_path, cond):
    run = ("--cond", cond, "--teacher", teacher.folder, "--data", lines(teacher, tmp_path), "--out", tmp_path / "out")
    command(distill.main, *run, *SIZE)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert len(log) >= 3 and all(np.isfinite(line["loss"]) for line in log)
    student, before = (Qwen3VL.from_pretrained(folder) for folder in (tmp_path / "out", teacher.folder))
    assert student.config.hybrid["mixer"] == ("gdn" if cond == "c6" else "mamba2")
    assert all(torch.equal(p, before.visual.state_dict()[n]) for n, p in student.visual.state_dict().items())


def test_resume_sft_dpo_answers_diagnosis_world_and_dry_run(teacher, tmp_path, capsys, monkeypatch):
    data, pairs = lines(teacher, tmp_path), lines(teacher, tmp_path, pairs=True)
    run = ("--cond", "c4", "--teacher", teacher.folder, "--data", data, "--save-every", 1, *SIZE)
    command(distill.main, *run, "--out", tmp_path / "straight")
    steps, step = [0], torch.optim.AdamW.step

    def dying(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", dying)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        command(distill.main, *run, "--out", tmp_path / "c4")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    command(distill.main, *run, "--out", tmp_path / "c4")
    straight, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("straight", "c4"))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[n], resumed[n]) for n in straight)

    command(sft_dpo.main, "sft", "--model", tmp_path / "c4", "--data", data, "--out", tmp_path / "sft", *SIZE)
    command(sft_dpo.main, "dpo", "--model", tmp_path / "sft", "--data", pairs, "--out", tmp_path / "dpo", *SIZE)
    before, after, last = (Qwen3VL.from_pretrained(tmp_path / f) for f in ("c4", "sft", "dpo"))
    old = before.visual.state_dict()
    moved = {n for n, p in after.visual.state_dict().items() if not torch.equal(old[n], p)}
    must, not_these = KINDS[teacher.__name__.removeprefix("test_")]
    assert must <= moved and not any(n.startswith(not_these) for n in moved)
    changed = [not torch.equal(a, b) for a, b in zip(after.layers.parameters(), last.layers.parameters())]
    assert sum(changed) > 10
    assert len(answer(last, processor_of(tmp_path / "dpo"), teacher.SAMPLES, max_new_tokens=3)) == 3

    diagnose.main(["--teacher", str(teacher.folder), "--student", str(tmp_path / "sft"), "--data", data, "--images", "3",
                   "--alone", "2", "--device", "cpu", "--out", str(tmp_path / "diagnosis")])
    assert json.loads((tmp_path / "diagnosis/results.json").read_text())["pages"] == 3
    assert (tmp_path / "diagnosis/pages.png").is_file()

    world = ("--cond", "c4", "--teacher", teacher.folder, "--tokens", 2000, "--batch-tokens", 1000, "--page", 7)
    command(distill.main, *world, "--micro-tokens", 1000, "--questions", 2, "--out", tmp_path / "world")
    assert len(list((tmp_path / "world/density").glob("*.png"))) == 6 and "reading" in (tmp_path / "world/table.md").read_text()
    command(distill.main, *run, "--dry-run")
    assert "3 of 4 attention layers replaced" in capsys.readouterr().out


def test_a_density_cache_serves_this_teacher_and_no_other_cutting_of_pictures(teacher, tmp_path):
    data, cache, processor = lines(teacher, tmp_path), tmp_path / "rho.cache", processor_of(teacher.folder)
    model = Qwen3VL.from_pretrained(teacher.folder)
    cache_density(cache, read_data(data), model, processor)
    run = ("--cond", "c4", "--teacher", teacher.folder, "--data", data, "--density-cache", cache, *SIZE)
    command(distill.main, *run, "--out", tmp_path / "a")
    assert (tmp_path / "a/model.safetensors").is_file()
    cache_density(cache, read_data(data), model, processor.bounded(4, 20))
    with pytest.raises(SystemExit, match="rho.cache was made with another model or preprocessing"):
        command(distill.main, *run, "--out", tmp_path / "b")
