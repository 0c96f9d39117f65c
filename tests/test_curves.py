"""curves.py draws what the logs hold, line by line, and refuses folders without one."""
import json

import pytest

from paper import curves


def test_every_line_of_a_log_is_drawn_where_it_stands(tmp_path, monkeypatch):
    logs = {}
    for name, scale in (("c3", 1.0), ("c4", 0.5)):
        (tmp_path / name).mkdir()
        logs[name] = [dict(tokens=100 * (i + 1), stage=f"stage {1 + i // 3}", lr=1e-3 * i, loss=scale * (9 - i),
                           **({"drift": scale * (20 - i)} if i < 6 else {"kl": scale / (i + 1)})) for i in range(9)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, logs[name])) + "\n")
    drawn = []
    monkeypatch.setattr(curves.plt, "close", lambda figure: drawn.append(figure))
    curves.main([str(tmp_path / "c3"), str(tmp_path / "c4"), "--out", str(tmp_path / "a.png")])
    axes = drawn[0].axes
    assert [axis.get_ylabel() for axis in axes] == list(curves.PANELS.values())
    for axis, key in zip(axes, ("loss", "drift", "kl", "lr")):
        lines = [line for line in axis.lines if not line.get_label().startswith("_")]
        for line, log in zip(lines, logs.values()):
            there = [entry for entry in log if key in entry]
            assert line.get_xdata().tolist() == [entry["tokens"] for entry in there]
            assert line.get_ydata().tolist() == [entry[key] for entry in there]
        borders = {line.get_xdata()[0] for line in axis.lines if line.get_label().startswith("_")}
        assert borders == {300, 600} and len(lines) == 2


@pytest.mark.parametrize("log", [None, "", "nonsense", "[]", '{"x": 1}'])
def test_a_folder_without_a_log_is_refused_in_one_sentence(tmp_path, log):
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    with pytest.raises(SystemExit, match="is no folder of a run"):
        curves.main([str(tmp_path), "--out", str(tmp_path / "a.png")])
