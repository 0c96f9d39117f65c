"""What may go wrong around a run: a second run in its folder, damaged checkpoints, changed inputs, signals,
a full disk. Whatever happens, the same command then ends with the bits of a run that nothing happened to.
Run: pytest tests/test_loop.py"""
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill
import loop
import sft_dpo
from parts import runs
from test_distill import SERVER, SMALL, checkpoint, documents, log, same_end, settings, teacher, train

ROOT = Path(loop.__file__).parent
FINISH = distill.finish                                   # train() puts nothing in its place
EIGHT = dict(tokens=2400)                                 # eight steps; a checkpoint every two


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):                
    """The folder of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("straight")
        train(settings(teacher, out, **EIGHT), patch)
    return out


class Died(Exception):
    pass


def begin_and_die(argv, monkeypatch, step=6):
    """A run that dies before it has written the log of this step."""
    real = loop.append_log

    def mortal(out, entry):
        if entry["step"] == step:
            raise Died
        real(out, entry)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_log", mortal)
        with pytest.raises(Died):
            train(argv, patch)


def refusal(argv, monkeypatch):
    """The one sentence that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        train(argv, monkeypatch)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def steps(out):
    """The checkpoints of a folder, the last one first."""
    last = (out / "latest").read_text()
    return sorted((path.name for path in out.glob("step_*")), key=lambda name: (name != last, name))


# -- processes ---------------------------------------------------------------------------------------------


def work(argv, environment, said, pause):
    """What a process does: distill.py on small pages, in a process group of its own, with what it says in a file.
    pause: seconds that every micro-batch takes."""
    os.setsid()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    distill.World, distill.finish, loss = SMALL, lambda *args: None, distill.Distillation.loss

    def slow(*args):
        time.sleep(pause)
        return loss(*args)
    distill.Distillation.loss = slow
    distill.main(argv)


def begin(argv, out, world=1, pause=0.0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port)
        args = argv, {k: str(v) for k, v in env.items()}, out / f"said{rank}", pause
        processes.append(SERVER.Process(target=work, args=args))
        processes[-1].start()
    return processes


def await_lines(out, count, processes):
    """Returns when the run in `out` has logged so many steps."""
    for _ in range(60_000):
        if (out / "log.jsonl").exists() and len(log(out)) >= count:
            return
        assert all(p.is_alive() for p in processes), (out / "said0").read_text()
        time.sleep(0.001)
    raise TimeoutError(out)


def ended(processes):
    for p in processes:
        p.join(60)
    return [p.exitcode for p in processes]


def test_a_second_run_into_a_folder_is_refused_until_the_first_is_dead(teacher, tmp_path, straight, monkeypatch):
    out, argv = tmp_path / "out", settings(teacher, tmp_path / "out", **EIGHT)
    first = begin(argv, out, pause=2.0)                   # eight steps: long enough for all below
    await_lines(out, 1, first)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "build", None)             # refused before anything is loaded
        said = refusal(argv, patch)
    assert f"{out} is in use by process {first[0].pid} on {socket.gethostname()}" in said
    second = begin(argv, tmp_path / "elsewhere", world=2)  # as torchrun starts them
    assert ended(second) == [1, 1]
    said = [(tmp_path / "elsewhere" / f"said{rank}").read_text() for rank in (0, 1)]
    assert "is in use by" in said[0] and "Traceback" not in "".join(said)
    assert first[0].is_alive()
    first[0].kill()                                       # SIGKILL: nobody cleans up
    ended(first)
    train(argv, monkeypatch)
    same_end(out, straight)


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys):
    import fcntl

    def unsupported(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert runs.lock(tmp_path, make=False)
    assert "cannot be locked here ([Errno 95] Operation not supported)" in capsys.readouterr().out


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_signal_ends_a_run_after_its_step(teacher, tmp_path, straight, monkeypatch, number, workers):
    """Sent to the whole process group, as a terminal and a scheduler do, so also to the process that reads data; and
    twice in quick succession, as when torchrun hands on what its processes have got already."""
    out, argv = tmp_path / "out", settings(teacher, tmp_path / "out", workers=workers, save_every=99, **EIGHT)
    process = begin(argv, out, pause=0.2)
    await_lines(out, 2, process)
    os.killpg(process[0].pid, number)
    time.sleep(0.05)
    os.killpg(process[0].pid, number)
    assert ended(process) == [128 + number]
    said, done = (out / "said0").read_text(), len(log(out))
    assert f"stopped after step {done}, which is saved in {out}: the same command" in said and "Traceback" not in said
    assert 2 <= done < len(log(straight)) and checkpoint(out)["step"] == done
    train(settings(teacher, out, **EIGHT), monkeypatch)
    same_end(out, straight)


def test_all_ranks_stop_after_the_same_step_when_one_gets_a_signal(teacher, tmp_path, straight, monkeypatch):
    out, argv = tmp_path / "out", settings(teacher, tmp_path / "out", micro_tokens=100, save_every=99, **EIGHT)
    processes = begin(argv, out, world=2, pause=0.1)
    await_lines(out, 2, processes)
    os.kill(processes[1].pid, signal.SIGTERM)             # the one that writes no checkpoints
    assert ended(processes) == [143, 143]
    said, done = [(out / f"said{rank}").read_text() for rank in (0, 1)], len(log(out))
    assert f"stopped after step {done}" in said[0] and "Traceback" not in "".join(said)
    assert done < len(log(straight)) and checkpoint(out)["step"] == done
    assert ended(begin(argv, out, world=2)) == [0, 0]
    for ours, theirs in zip(log(out), log(straight), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_a_second_ctrl_c_ends_a_run_at_once(teacher, tmp_path, straight, monkeypatch):
    out, argv = tmp_path / "out", settings(teacher, tmp_path / "out", **EIGHT)
    begin_and_die(argv, monkeypatch, step=4)
    process = begin(argv, out, pause=60)                  # it goes on from step 2, and takes a minute to step 3
    while not (out / "said0").exists() or b"tokens/s" not in (out / "said0").read_bytes():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process[0].pid, signal.SIGINT)
    time.sleep(1.3)
    assert process[0].is_alive()
    os.kill(process[0].pid, signal.SIGINT)
    process[0].join(5)
    assert process[0].exitcode == 130 and "Traceback" not in (out / "said0").read_text()
    train(argv, monkeypatch)
    same_end(out, straight)


def test_ctrl_c_while_a_model_loads_is_one_sentence(teacher, tmp_path, monkeypatch, capsys):
    for main, argv in ((distill.main, settings(teacher, tmp_path / "out")),
                       (sft_dpo.main, ["sft", "--model", str(teacher), "--out", str(tmp_path / "sft")])):
        def interrupted(*args, **caps):
            raise KeyboardInterrupt
        monkeypatch.setattr(distill, "load_model", interrupted)
        monkeypatch.setattr(sft_dpo, "load_model", interrupted)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            main(argv)
        assert stop.type is SystemExit and stop.value.code == 130
        assert "interrupted: the same command" in capsys.readouterr().err


# -- checkpoints -------------------------------------------------------------------------------------------


def cut(out, last):
    os.truncate(out / last / "state.pt", 5000)


def flip(out, last):
    """One bit of an optimiser's moment, deep in the file: nothing but a checksum sees it."""
    state = torch.load(out / last / "state.pt", weights_only=True)
    moment = list(state["optimiser"].values())[-1]["exp_avg"].numpy().tobytes()
    content = bytearray((out / last / "state.pt").read_bytes())
    content[content.index(moment) + len(moment) // 2] ^= 1
    (out / last / "state.pt").write_bytes(content)


def empty(out, last):
    (out / last / "state.pt").write_bytes(b"")


def lose(out, last):
    shutil.rmtree(out / last)


def other(out, last):
    torch.save([1, 2], out / last / "state.pt")


def blank(out, last):
    (out / "latest").write_bytes(b"\0" * len(last))       # what a crashed file system leaves of a short file
    shutil.rmtree(out / last)


DAMAGE = {cut: "is damaged (state.pt cannot be read", flip: "is damaged (the checksum of",
          empty: "is damaged (state.pt cannot be read", lose: "is damaged (there is no state.pt)",
          other: "is damaged (it has no parameters)", blank: "is damaged (there is no state.pt)"}


def test_a_run_goes_back_over_a_damaged_checkpoint_and_says_so(teacher, tmp_path, straight, monkeypatch, capsys):
    died = tmp_path / "died"
    begin_and_die(settings(teacher, died, **EIGHT), monkeypatch)
    last, before = steps(died)
    for harm, says in DAMAGE.items():
        out = tmp_path / harm.__name__
        shutil.copytree(died, out)
        harm(out, last)
        argv = settings(teacher, out, **EIGHT)
        capsys.readouterr()
        train(argv, monkeypatch)
        said = capsys.readouterr().out
        assert says in said and f"going back to {before}" in said and (harm is blank or last in said), harm
        same_end(out, straight)
        train(argv, monkeypatch)                          # and all is well again
        assert "damaged" not in capsys.readouterr().out
    out = tmp_path / "twice"                              # dead again, after it has saved that step anew
    shutil.copytree(died, out)
    flip(out, last)
    begin_and_die(settings(teacher, out, **EIGHT), monkeypatch)
    assert steps(out) == [last, before] and "damaged" in capsys.readouterr().out
    train(settings(teacher, out, **EIGHT), monkeypatch)
    assert "damaged" not in capsys.readouterr().out
    same_end(out, straight)
    out = tmp_path / "both"
    shutil.copytree(died, out)
    cut(out, last), flip(out, before)
    said = refusal(settings(teacher, out, **EIGHT), monkeypatch)
    assert all(f"{step} is damaged" in said for step in (last, before)) and "choose another --out" in said


def test_a_full_disk_is_one_sentence_and_costs_nothing(teacher, tmp_path, straight, monkeypatch):
    """The kernel refuses what goes beyond a limit on the size of files, in the middle of a checkpoint."""
    out, argv = tmp_path / "out", settings(teacher, tmp_path / "out", **EIGHT)
    size = (straight / (straight / "latest").read_text() / "state.pt").stat().st_size
    begin_and_die(argv, monkeypatch, step=4)
    kept, before = steps(out), checkpoint(out)["step"]

    def limited(argv, bytes_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
        try:
            return refusal(argv, monkeypatch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = limited(argv, size // 2)
    needed = int(said.split("needs about ")[1].split(" bytes")[0].replace(",", ""))
    assert f"{out}/step_" in said and "cannot be written (File too large)" in said and "stays" in said
    assert 0.7 * size < needed <= size
    assert steps(out) == kept and checkpoint(out)["step"] == before and not list(out.glob("*.tmp"))
    monkeypatch.setattr(loop, "tqdm", partial(loop.tqdm, file=io.StringIO()))            # not pytest's file
    said = limited(argv, checkpoint(out)["log_size"] + 50)
    assert f"{out}/log.jsonl cannot be written (File too large)" in said
    train(argv, monkeypatch)
    same_end(out, straight)
    model = (teacher / "model.safetensors").stat().st_size
    monkeypatch.setattr(sys.modules[__name__], "train", lambda argv, patch: distill.main(argv))
    monkeypatch.setattr(distill, "finish", FINISH)
    said = limited(argv, model // 2)                      # all steps are done; the student is to be written
    assert f"{out} cannot be written (" in said and ("File too large" in said or "os error 27" in said)
    assert not (out / "model.safetensors").exists() and steps(out) == steps(straight)


# -- inputs ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_files_it_began_with_and_no_others(teacher, tmp_path, monkeypatch):
    """Each input in turn becomes another under its name, is refused by name, and is put back."""
    model = tmp_path / "model"
    shutil.copytree(teacher, model)
    source = documents(tmp_path)
    recipe = tmp_path / "mix.json"
    recipe.write_text(json.dumps(dict(sources=[dict(name="a", path=source.name)])))
    few = dict(tokens=400, batch_tokens=50, cond="c3")
    out = {kind: tmp_path / kind for kind in ("file", "recipe")}
    for kind, data in (("file", source), ("recipe", recipe)):
        begin_and_die(settings(model, out[kind], data=data, **few), monkeypatch, step=3)
    lines = source.read_text().splitlines(keepends=True)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-5] ^= 64
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    longer, shorter, edited = lines + lines[:1], lines[:-1], [lines[0].replace("word", "ward", 1), *lines[1:]]
    assert len("".join(edited)) == len("".join(lines))
    for kind, file, content in (
            ("file", source, "".join(longer).encode()), ("file", source, "".join(shorter).encode()),
            ("file", source, "".join(edited).encode()), ("recipe", source, "".join(edited).encode()),
            ("recipe", recipe, recipe.read_bytes().replace(b"}]}", b'}], "seed": 3}')),
            ("file", model / "tokenizer.json", json.dumps(tokenizer, indent=1).encode()),
            ("file", model / "preprocessor_config.json", (model / "preprocessor_config.json").read_bytes() + b"\n"),
            ("recipe", model / "model.safetensors", weights)):
        before = file.read_bytes()
        assert before != bytes(content)
        file.write_bytes(content)
        data = source if kind == "file" else recipe
        said = refusal(settings(model, out[kind], data=data, **few), monkeypatch)
        assert f"began with another {file}: go on" in said
        file.write_bytes(before)
    for kind, data in (("file", source), ("recipe", recipe)):
        train(settings(model, out[kind], data=data, **few), monkeypatch)
        train(settings(model, tmp_path / f"{kind} again", data=data, **few), monkeypatch)
        same_end(out[kind], tmp_path / f"{kind} again")


def test_all_files_that_settings_name_are_looked_at(teacher, tmp_path):
    for name in ("rho", "mine.py", "d.jsonl"):
        (tmp_path / name).write_text(name)
    named = SimpleNamespace(teacher=str(teacher), density_cache=str(tmp_path / "rho"), data=str(tmp_path / "d.jsonl"),
                            mixer=f"{tmp_path}/mine.py:Mine")
    found = runs.fingerprints(named)
    assert {Path(file).name for file in found} == {"rho", "mine.py", "d.jsonl", "config.json", "tokenizer.json",
                                                   "preprocessor_config.json", "model.safetensors"}
    for name in ("rho", "mine.py"):
        (tmp_path / name).write_text(name.upper())
        assert runs.fingerprints(named)[str(tmp_path / name)] != found[str(tmp_path / name)]
    assert runs.fingerprints(SimpleNamespace(data="", mixer="gdn", teacher="")) == {}


def test_a_fingerprint_of_a_terabyte_is_quick_and_sees_its_length_and_both_ends(tmp_path):
    file = tmp_path / "huge"
    with open(file, "wb") as f:
        f.truncate(10 ** 12)                              # a hole: it takes no room
    before, begins = runs.fingerprint(file), time.time()
    assert runs.fingerprint(file) == before and time.time() - begins < 2

    def changed(at):
        with open(file, "r+b") as f:
            f.seek(at)
            f.write(b"x")
            f.flush()
            different = runs.fingerprint(file) != before
            f.seek(at)
            f.write(b"\0")
        return different
    assert changed(0) and changed(10 ** 12 - 1)
    assert not changed(10 ** 9)                           # as its docstring says
    os.truncate(file, 10 ** 12 - 1)
    assert runs.fingerprint(file) != before


def test_checkpoints_from_before_there_were_fingerprints_go_on(teacher, tmp_path, straight, monkeypatch):
    """What a checkpoint held then: these names and no others. Written by hand as it was."""
    out, argv = tmp_path / "out", settings(teacher, tmp_path / "out", **EIGHT)
    begin_and_die(argv, monkeypatch)
    state = checkpoint(out)
    old = {k: state[k] for k in ("parameters", "optimiser", "step", "tokens", "cursor", "log_size", "label", "bad",
                                 "settings")}
    assert set(state) - set(old) == {"inputs"} and old["settings"]["tokens"] == 2400
    torch.save(old, out / (out / "latest").read_text() / "state.pt")
    train(argv, monkeypatch)
    same_end(out, straight)


# -- the command -------------------------------------------------------------------------------------------


def test_help_is_help_and_a_wrong_word_is_a_usage_line(capsys):
    ran = subprocess.run([sys.executable, ROOT / "sft_dpo.py", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "torchrun sft_dpo.py dpo" in ran.stdout and not ran.stderr
    sft_dpo.main(["-h"])
    assert capsys.readouterr().out == ran.stdout
    for words in ([], ["sfo"]):
        with pytest.raises(SystemExit, match="usage: sft_dpo.py sft.dpo --model FOLDER"):
            sft_dpo.main(words)
    with pytest.raises(SystemExit) as stop:
        sft_dpo.main(["dpo", "--help"])
    assert stop.value.code == 0 and "--beta" in capsys.readouterr().out


def test_the_embedded_world_runs_on_the_cpu_unless_told_otherwise(monkeypatch):
    """On a machine with a GPU, too: two cores are faster than its launches. Real data takes the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = lambda *flags: loop.parse(distill.DistillSettings, distill.DEFAULTS, list(flags)).device
    assert device() == "cpu" and device("--device", "cuda") == "cuda" and device("--data", "x.jsonl") == ""
