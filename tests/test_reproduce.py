"""reproduce.py: what a run keeps, the order of runs that build on each other, and the figures of RESULTS.md."""
import json
import multiprocessing
import re
import subprocess

import numpy as np
import pytest
from PIL import ImageChops
from scipy import stats

from paper import reproduce
from synthdoc import REGIMES, SUITES, World, blank


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Runs reproduce.one without training: every command is noted, and its model folder made."""
    noted = []

    def run(command, stdout=None, **options):
        noted.append(command[1:])
        if "--judge" in command:
            marks = {f: "10" for suite in command[command.index("--judge") + 3:] for f in (SUITES | REGIMES)[suite]}
            return subprocess.CompletedProcess(command, 0, stdout=f"a warning\n{json.dumps(marks)}\n")
        folder = tmp_path / "out" / "reproduce" / command[command.index("--out") + 1].split("/")[-1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").touch()
    monkeypatch.setattr(reproduce.subprocess, "run", run)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    return noted


def test_a_run_brings_what_it_builds_on_and_is_never_repeated(commands, tmp_path):
    results = tmp_path / "runs.jsonl"
    reproduce.one("c4-dpo", 3, results)
    trained = [(c[0], c[1]) for c in commands if c[0] != "-m"]
    assert trained == [("distill.py", "--tokens"), ("sft_dpo.py", "sft"), ("sft_dpo.py", "dpo")]
    starts = [c[c.index("--model") + 1].split("/")[-1] for c in commands if "--model" in c]
    assert starts == ["c4-seed3", "c4-sft-seed3"]
    assert all(c[c.index("--seed") + 1] == "3" for c in commands if c[0] != "-m")
    assert list(reproduce.read(results)) == [(f"c4{end}", 3, False) for end in ("", "-dpo", "-sft")]
    reproduce.one("c4", 3, results)
    reproduce.one("c4-sft", 3, results)
    assert len(commands) == 6
    (tmp_path / "out" / "reproduce" / "c4-seed3" / "model.safetensors").unlink()        # as in a fresh clone
    reproduce.one("c4", 3, results)
    assert len(commands) == 6
    reproduce.one("c4", 3, results, wanted="folder")
    assert [c[0] for c in commands[6:]] == ["distill.py"] # but not judged twice


def test_flags_of_a_run_come_after_the_common_ones(commands, tmp_path):
    results = tmp_path / "runs.jsonl"
    reproduce.one("c3-500k", 0, results)
    assert [commands[0][i + 1] for i, word in enumerate(commands[0]) if word == "--tokens"] == ["250000", "500000"]
    reproduce.one("c4-regimes", 0, results)
    asked = [c[c.index("--judge") + 2:] for c in commands if "--judge" in c]
    assert asked == [["10", "reading", "reasoning"], ["10", "regimes"]] and "regimes" in commands[2]
    reproduce.one("teacher-page14", 0, results)          # is judged as it is, on pages of that size
    assert commands[4:] == [["-m", "paper.reproduce", "--judge", str(tmp_path / "tiny"), "14", "reading", "reasoning"]]


def test_a_result_of_other_settings_is_refused(commands, tmp_path, monkeypatch):
    """Its own or those of the run it goes on from; a setting that is newer than the file is none of these."""
    results = tmp_path / "runs.jsonl"
    reproduce.one("c4-sft", 1, results)
    reproduce.refuse_stale(results)
    stored = reproduce.read(results)["c4-sft", 1, False]
    assert stored["settings"]["lr"] == 1e-3 and stored["settings"]["from"]["cond"] == "c4"
    del stored["settings"]["from"]["page"]
    reproduce.keep(results, stored)                       # of two lines for one run the later counts
    reproduce.refuse_stale(results)
    stored["settings"]["from"]["feed"] = "own"
    reproduce.keep(results, stored)
    with pytest.raises(SystemExit, match="c4-sft, seed 1 in runs.jsonl was made under other settings .feed own there, teacher now"):
        reproduce.refuse_stale(results)


def append(path, name):
    for seed in range(200):
        reproduce.keep(path, dict(run=name, seed=seed, again=False, marks={f: name * 400 for f in SUITES["reading"]}))


def test_lines_of_many_jobs_do_not_mix(tmp_path):
    jobs = [multiprocessing.get_context("fork").Process(target=append, args=(tmp_path / "runs.jsonl", name)) for name in "01"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    found = reproduce.read(tmp_path / "runs.jsonl")
    assert len(found) == 400 and all(set(d["marks"]["receipt"]) == {name} for (name, _, _), d in found.items())


def test_the_command_alone_runs_the_whole_programme_and_no_run_twice(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "where", lambda marks: {})
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--jobs", "1"])
    reproduce.main()
    made = {f"{name}-seed{seed}" for name, seed, _ in reproduce.read(tmp_path / "paper" / "results" / "runs.jsonl")}
    every = {name for _, rows in reproduce.TABLES.values() for name in rows}
    assert made == {"teacher-seed0"} | {
        f"{name}-seed{seed}" for name in every
        for seed in range(1 if name.startswith("teacher") else 5 if re.fullmatch(
            r"c[1-4]|c[234]-own|no-density(-own)?|shuffled|(rank|share)-only(-own)?|c[34]-(100|175|350|500)k", name) else 3)}
    assert sum("--judge" in c for c in commands) == len(made)
    for words in (["table9"], ["--seeds", "0"]):
        monkeypatch.setattr("sys.argv", ["reproduce.py", *words])
        with pytest.raises(SystemExit):
            reproduce.main()


def test_means_and_errors_are_scipys(tmp_path):
    values = np.random.default_rng(0).normal(3, 2, 7)
    mean, deviation, error = reproduce.mean_error(values)
    assert np.allclose([mean, deviation, error], [values.mean(), stats.tstd(values), stats.sem(values)])
    assert reproduce.mean_error([2.5]) == (2.5, None, None)


def test_fullness_counts_the_cells_that_were_drawn_on(monkeypatch):
    """On pages without texture, whatever differs from the page's tint was drawn."""
    monkeypatch.setattr("synthdoc.blank", lambda rng, cells, texture: blank(rng, cells, 0))
    found, world = reproduce.fullness("reasoning", 40), World("eval", 0, "reasoning")
    for share, i in zip(found, range(40)):
        image = world[i].images[0]
        plain = image.copy()
        plain.paste(max(image.getcolors(1 << 16))[1], (0, 0, *image.size))
        drawn = np.asarray(ImageChops.difference(image, plain)).max(-1) > 0
        cells = drawn.reshape(10, 16, 10, 16).any((1, 3)).mean()
        assert cells - 0.12 <= share <= cells + 0.05      # marks are boxes: corners of circles, edges of cells


def test_where_pairs_the_same_questions_of_the_same_seed():
    rng = np.random.default_rng(1)

    def marks(p):
        return {f: "".join(map(str, rng.binomial(1, p, reproduce.QUESTIONS // len(families))))
                for families in SUITES.values() for f in families}
    runs = {"c3": {s: marks(.3) for s in (0, 1, 2)}, "c4": {s: marks(.6) for s in (1, 2, 3)}}
    groups = reproduce.where(runs)
    chart = groups["by family"]["chart"]
    plain = [100 * (runs["c4"][s]["chart"].count("1") - runs["c3"][s]["chart"].count("1")) / 400 for s in (1, 2)]
    assert np.allclose(chart, plain)
    halves = groups["on the emptier and the fuller half of each family's pages"]
    for suite, families in SUITES.items():                # question i is the i // n-th of its family
        full, emptier = reproduce.fullness(suite, reproduce.QUESTIONS), []
        for j, family in enumerate(families):
            pages = sorted(range(reproduce.QUESTIONS // len(families)), key=lambda k: full[k * len(families) + j])
            change = [int(runs["c4"][1][family][k]) - int(runs["c3"][1][family][k]) for k in pages[:len(pages) // 2]]
            emptier.append(100 * np.mean(change))
        assert len(emptier) > 1 and np.isclose(halves[f"{suite}, emptier"][0], np.mean(emptier))


def test_results_show_each_run_and_each_paired_difference_once(tmp_path, monkeypatch):
    rng, found = np.random.default_rng(2), {}
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    results = tmp_path / "paper" / "results" / "runs.jsonl"
    results.parent.mkdir(parents=True)
    for name, suites in (("c3", SUITES), ("c4", SUITES), ("c3-regimes", REGIMES), ("c4-regimes", REGIMES)):
        for seed in range(3):
            marks = {f: "".join(map(str, rng.binomial(1, .5, reproduce.QUESTIONS // len(families))))
                     for families in suites.values() for f in families}
            found[name, seed] = {f: 100 * np.mean(list(map(int, m))) for f, m in marks.items()}
            reproduce.keep(results, dict(run=name, seed=seed, again=False, flags="", marks=marks))
    page = tmp_path / "paper" / "RESULTS.md"
    for _ in range(2):                                    # words above the tables stay, tables are written anew
        reproduce.write(results)
        text = page.read_text()
        page.write_text("Mine.\n" + text.removeprefix("Mine.\n"))
    assert text.startswith("Mine.\n<!--") and text.count("# The tables") == 1
    assert text.count("| c4 − c3 |") == text.count("| c4-regimes − c3-regimes |") == 1
    gains = [[found["c4-regimes", s][f] - found["c3-regimes", s][f] for s in range(3)] for f in REGIMES["regimes"]]
    cells = " | ".join(f"{np.mean(g):+.1f} ± {stats.sem(g):.1f}" + " †" * int(stats.ttest_1samp(g, 0).pvalue < 0.05)
                       for g in gains)
    assert f"| c4-regimes − c3-regimes | 3 | {cells} |" in text
    reading = [np.mean([found["c3", s][f] for f in SUITES["reading"]]) for s in range(3)]
    assert f"| c3 | `--cond c3` | 3 | {np.mean(reading):.1f} ± {stats.tstd(reading):.1f} |" in text
    assert "once more" not in text


def test_a_repetition_is_kept_apart_and_compared(commands, tmp_path, monkeypatch):
    """The same command into a folder of its own; what changed is summed up as a root mean square."""
    results = tmp_path / "paper" / "results" / "runs.jsonl"
    results.parent.mkdir(parents=True)
    marks = {f: "1" * 10 for families in SUITES.values() for f in families}
    for seed in (0, 1):
        reproduce.keep(results, dict(run="c4", seed=seed, again=False, flags="", marks=marks,
                                     settings=reproduce.settings_of("c4", seed)))
    monkeypatch.setattr(reproduce, "where", lambda marks: {})
    monkeypatch.setattr("sys.argv", ["reproduce.py", "table1", "table8", "--again", "--seeds", "5", "--jobs", "1"])
    reproduce.main()
    outs = [c[c.index("--out") + 1] for c in commands if "--out" in c]
    assert outs == [str(tmp_path / "out" / "again" / f"c4-seed{seed}") for seed in (0, 1)]
    assert list(reproduce.read(results)) == [("c4", seed, again) for seed in (0, 1) for again in (False, True)]
    stored = reproduce.read(results)["c4", 0, True]
    stored["marks"] = marks | {"digits": "1" * 5 + "0" * 5}
    reproduce.keep(results, stored)
    reproduce.write(results)
    text = (tmp_path / "paper" / "RESULTS.md").read_text()
    assert "| c4 | 0 | 100.0, 90.0 | 100.0, 100.0 |" in text and "| c4 | 1 | 100.0, 50.0 | 100.0, 50.0 |" in text
    assert f"| 2 runs | {((10 ** 2 + 50 ** 2) / 2) ** .5:.1f} | {(50 ** 2 / 2) ** .5:.1f} |" in text
