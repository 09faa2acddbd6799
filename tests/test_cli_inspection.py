"""`graphc dump`, `profile`, `explain`, `export`: networks of the zoo and of users' files."""

import json

import pytest

from graphc.cli import main

NETWORK = """
import graphc as gc

def network():
    g = gc.Graph("mine")
    x, target = g.input("x", ("N", "T", 4)), g.input("target", ("N", "T", 1))
    y = gc.nn.linear(gc.tanh(gc.nn.linear(x, 8, name="fc1")), 1, name="fc2")
    g.output(y=y, loss=gc.mse_loss(y, target))
    return g

graph = network()
text = "no graph"
if __name__ == "__main__":
    raise SystemExit("only its networks are wanted")
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(NETWORK)
    return path


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("name", ["network", "graph"])
def test_dump_of_a_users_file(mine, name, tmp_path, capsys):
    out = tmp_path / "dump"
    command = ["dump", f"{mine}:{name}", "--train", "--batch", 4, "--dim", "T=3", "--runs", 2]
    assert run(*command, "--threads", 1, "--out", out) == 0
    assert capsys.readouterr().out.strip() == f"open {out / 'index.html'}"
    assert "f32[4,3,4]" in next((out / "passes").glob("01_*.txt")).read_text()
    assert (out / "trace.json").exists()


def test_profile(mine, tmp_path, capsys):
    files = tmp_path / "profile.json", tmp_path / "trace.json"
    command = ["profile", f"{mine}:graph", "--dim", "T=3", "--runs", 2, "--threads", 1]
    assert run(*command, "--json", files[0], "--trace", files[1]) == 0
    shown = capsys.readouterr().out
    assert "of roof" in shown and "fc1" in shown and "measuring adds" in shown
    assert json.loads(files[0].read_text())["graph"] == "mine"
    assert json.loads(files[1].read_text())["traceEvents"]


def test_explain(mine, capsys):
    assert run("explain", f"{mine}:graph", "--dim", "T=2", "--threads", 1) == 0
    assert "Neighbours kept apart" in capsys.readouterr().out


def test_export(mine, tmp_path, capsys):
    pytest.importorskip("onnx")
    for name in ("net.onnx", "net.graphml", "net.dot"):
        assert run("export", f"{mine}:graph", "--out", tmp_path / name) == 0
        assert (tmp_path / name).stat().st_size > 300
    assert run("export", f"{mine}:graph", "--weights", "w", "--out", tmp_path / "net.dot") == 1
    assert "only .onnx files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "network, message",
    [
        ("nothing", "choose from lenet, mlp"),
        ("{mine}:absent", "has the graphs graph"),
        ("{mine}:text", "is str, not a graph"),
        ("absent.py:graph", "there is no file absent.py"),
    ],
)
def test_networks_that_are_not_there(mine, network, message, capsys):
    assert run("explain", network.format(mine=mine)) == 1
    assert message in capsys.readouterr().err


def test_dimensions_are_name_and_size(mine, capsys):
    assert run("explain", f"{mine}:graph", "--dim", "T") == 1
    assert "write NAME=SIZE" in capsys.readouterr().err
