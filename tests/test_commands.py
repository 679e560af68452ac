"""Command lines of NVIDIA's tools for an engine's plan, as text."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from socket_trt.cli.main import main
from socket_trt.engine.commands import build_commands
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import EngineError
from tests.engines import tiny_engine
from tests.tensorrt_fixtures import OPTIONS, FakeMachine, FakePlugin


def options_of(command: str, name: str) -> list[str]:
    """Values of every `--name=value`."""
    return [part.split("=", 1)[1] for part in shlex.split(command) if part.startswith(f"--{name}=")]


def test_eight_six(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    commands = build_commands(engine)
    trtexec = commands["trtexec"]
    assert options_of(trtexec, "onnx") == [str(engine.path / "network.onnx")]
    assert options_of(trtexec, "saveEngine") == [str(engine.path / "engine.plan")]
    (plugin,) = options_of(trtexec, "dynamicPlugins")
    assert Path(plugin).name == "libsocket_trt_plugin_8.so"
    assert options_of(trtexec, "precisionConstraints") == ["obey"]
    assert {"--fp16", "--skipInference", "--preview=+profileSharing0806"} <= set(shlex.split(trtexec))
    (types,) = options_of(trtexec, "layerPrecisions")
    assert types.startswith("*:fp16,")
    assert types.count(":fp32") == 5 * 6 + 3 + 1  # norms; the rotary table's product, concatenation, cosine and sine
    assert options_of(trtexec, "layerOutputTypes") == [types]
    (largest,) = options_of(trtexec, "maxShapes")
    assert "input_ids:1,position_ids:1,logits_indices:1,page_table:1x32,past_length:1,query_start:2" in largest
    assert "past_key_values.1.norm:129x2x16" in largest
    polygraphy = shlex.split(commands["polygraphy"])
    assert polygraphy[:4] == ["polygraphy", "run", str(engine.path / "network.onnx"), "--trt"]
    # Polygraphy only opens a library: the one that registers the plugin by itself.
    assert polygraphy[polygraphy.index("--plugins") + 1] == plugin.replace("_plugin_", "_autoload_")
    assert polygraphy.count("--trt-opt-shapes") == 3
    assert "page_table:[4,32]" in polygraphy
    assert polygraphy[polygraphy.index("--precision-constraints") + 1] == "obey"
    assert polygraphy[polygraphy.index("--tactic-sources") + 1].startswith("--")
    assert sum(part.endswith(":float32") for part in polygraphy) == 34


def test_eight_six_with_layers_by_plugins(machine: FakeMachine) -> None:
    """Of what is held to float32 only the rotary tables are left: plugins have the norms."""
    machine.install(plugin=FakePlugin(cublas="12.9.1"))
    polygraphy = shlex.split(build_commands(machine.compiled())["polygraphy"])
    assert sum(part.endswith(":float32") for part in polygraphy) == 4


@pytest.mark.parametrize(("version", "strong"), [("10.16.1", True), ("11.4.0", False)])
def test_ten_and_eleven(version: str, strong: bool, machine: FakeMachine) -> None:
    machine.install(version)
    commands = build_commands(machine.compiled())
    parts = shlex.split(commands["trtexec"])
    assert ("--stronglyTyped" in parts) == strong
    assert [part for part in parts if part.startswith("--profile=")] == [f"--profile={i}" for i in range(3)]
    assert len(options_of(commands["trtexec"], "optShapes")) == 3
    assert "--preview=+aliasedPluginIO1003" in parts
    assert not any("precision" in part.lower() or "fp16" in part for part in parts)
    parts = shlex.split(commands["polygraphy"])
    assert ("--strongly-typed" in parts) == strong
    assert parts[parts.index("--preview-features") + 1] == "ALIASED_PLUGIN_IO_10_03"


def test_polygraphy_accepts_the_options(machine: FakeMachine) -> None:
    polygraphy = pytest.importorskip("polygraphy.tools", reason="needs polygraphy")
    machine.install("10.16.1")
    command = shlex.split(build_commands(machine.compiled())["polygraphy"])
    run = polygraphy.TOOL_REGISTRY and next(tool for tool in polygraphy.TOOL_REGISTRY if tool.name == "run")
    import argparse

    parser = argparse.ArgumentParser()
    run.setup_parser(parser.add_subparsers())
    known, unknown = parser.parse_known_args(command[1:])
    assert not unknown
    assert known.model_file.endswith("network.onnx")


def test_command_line(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install()
    engine = machine.compiled()
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_:
            main(["inspect", str(engine.path), "--commands", *arguments])
        assert exit_.value.code == 0
        printed = capsys.readouterr().out
        if arguments:
            assert list(json.loads(printed)) == ["trtexec", "polygraphy"]
        else:
            assert len(printed.strip().split("\n\n")) == 2


def test_without_a_plan() -> None:
    with pytest.raises(EngineError, match="socket-trt compile"):
        build_commands(EngineDirectory.open(tiny_engine(**OPTIONS)))
