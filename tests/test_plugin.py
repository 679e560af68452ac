"""Finding, checking and loading the plugin library: by TensorRT's real registries, and where something is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from socket_trt import __version__, native
from socket_trt.engine import plugin
from socket_trt.errors import MissingDependencyError
from socket_trt.onnx.schema import socket_attention_schema
from tests.plugin_harness import REPOSITORY, attributes, fields_of, lean_directories, plugin_library

NO_LEAN = "no lean runtimes of TensorRT in build/tensorrt-lean (make tensorrt-lean)"
LEAN = list(lean_directories())
EACH_LEAN = pytest.mark.parametrize(
    "directory", LEAN or [pytest.param(Path(), marks=pytest.mark.skip(reason=NO_LEAN))], ids=lambda d: d.name
)


def test_the_lean_runtimes_are_there() -> None:
    if not LEAN:
        pytest.skip(NO_LEAN)
    assert {directory.name.split(".")[0] for directory in LEAN} == {"10", "11"}


def observe(directory: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """What tests/lean_registry.py sees with this lean runtime, and what it writes to stderr."""
    fields = {name: value for name, (_, value) in fields_of(attributes()).items()}
    result = subprocess.run(
        [sys.executable, "-m", "tests.lean_registry", json.dumps(fields)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(directory), str(REPOSITORY)])} | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@EACH_LEAN
def test_the_real_registry(directory: Path) -> None:
    """TensorRT's own registry and Python bindings load the library, list the creator, create, refuse."""
    path = plugin_library(int(directory.name.split(".")[0]))
    seen, errors = observe(directory)
    assert seen["tensorrt"] == directory.name
    assert Path(seen["path"]) == path
    assert seen["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen["release"] == __version__
    assert seen["log"] == [f"SocketAttention {__version__} from {path}"]
    assert seen["again"]
    assert ["SocketAttention", "1", "socket"] in seen["listed"]

    schema = socket_attention_schema().attributes
    kinds = {"FLOAT": "FLOAT32", "INT": "INT32"}
    assert dict(seen["fields"]) == {
        name: kinds[attribute.type.name] for name, attribute in schema.items() if not name.startswith("plugin_")
    }, "the fields are the ONNX schema's attributes"

    assert seen["core"] == ["SocketAttention", "1", "socket"]
    assert seen["build"] == ["PLUGIN_V3ONE_BUILD", 2, 5]
    expected = " ".join(f"{name}={value:.9g}" for name, value in attributes(temperature=0.300000012).items())
    assert seen["metadata"] == f"socket-trt {__version__} {expected}"
    assert seen["refused"]
    assert "SocketAttention (layer): field 'page_size' is 17, expected a power of two" in errors
    assert seen["refused at run time"]
    assert "the runtime phase takes the one field 'serialized'" in errors


@EACH_LEAN
def test_a_library_of_another_tensorrt_is_refused(directory: Path) -> None:
    major = directory.name.split(".")[0]
    other = plugin_library({"10": 11, "11": 10}[major])
    seen, _ = observe(directory, SOCKET_TRT_PLUGIN=str(other))
    assert seen["error"] == f"{other} is for TensorRT {21 - int(major)}, but TensorRT {directory.name} is installed"


@EACH_LEAN
def test_the_library_itself_refuses_another_tensorrt(directory: Path) -> None:
    """As `trtexec --dynamicPlugins` would load it, past the package's own checks."""
    major = int(directory.name.split(".")[0])
    code = (
        "import sys, tensorrt_lean_bindings as t; r = t.get_plugin_registry(); r.load_library(sys.argv[1]);"
        "print(r.get_creator('SocketAttention', '1', 'socket'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(plugin_library(21 - major))],
        env=os.environ | {"PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "None"
    assert f"for TensorRT {21 - major}, it was loaded by TensorRT {major}: load libsocket_trt_plugin_{major}.so" in (
        result.stderr
    )


@pytest.mark.parametrize("order", ["TensorRT first", "TensorRT later"])
@EACH_LEAN
def test_opening_the_autoload_library_registers_the_plugin(directory: Path, order: str) -> None:
    """As Polygraphy opens plugin libraries: with ctypes, and before it imports TensorRT."""
    plugin_library(int(directory.name.split(".")[0]))
    lines = ["import ctypes, sys", "import tensorrt_lean_bindings as trt", "ctypes.CDLL(sys.argv[1])"]
    if order == "TensorRT later":
        lines[1:] = reversed(lines[1:])
    lines.append("print(trt.get_plugin_registry().get_creator('SocketAttention', '1', 'socket').plugin_namespace)")
    libraries = {"LD_LIBRARY_PATH": str(directory / "tensorrt_lean_libs")} if order == "TensorRT later" else {}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(plugin.find_autoload(directory.name))],
        env=os.environ | {"PYTHONPATH": str(directory)} | libraries,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "socket", result.stderr
    assert result.stderr == ""


def test_the_autoload_library_says_that_there_is_no_tensorrt() -> None:
    plugin_library(11)
    code = f"import ctypes; ctypes.CDLL({str(plugin.find_autoload('11.0'))!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TensorRT 11 is neither loaded nor on LD_LIBRARY_PATH (libnvinfer.so.11)" in result.stderr


class FakeRegistry:
    """A registry with the functions of TensorRT 8.6's or of 10's, which loads what it is told it loads."""

    def __init__(self, creator: object, getter: str) -> None:
        self.registered: object = None
        self.paths: list[str] = []
        self._creator = creator
        setattr(self, getter, self._get)

    def _get(self, name: str, version: str, namespace: str) -> object:
        assert (name, version, namespace) == ("SocketAttention", "1", "socket")
        return self.registered

    def load_library(self, path: str) -> None:
        self.paths.append(path)
        self.registered = self._creator


Fake = Callable[..., tuple[ModuleType, FakeRegistry]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """TensorRT modules whose registries are fakes."""
    monkeypatch.setattr(plugin, "_loaded", {})

    def make(version: str, names: list[str] | None) -> tuple[ModuleType, FakeRegistry]:
        creator = None if names is None else SimpleNamespace(field_names=[SimpleNamespace(name=n) for n in names])
        registry = FakeRegistry(creator, "get_plugin_creator" if version.startswith("8") else "get_creator")
        module = ModuleType("tensorrt")
        module.__dict__.update(__version__=version, get_plugin_registry=lambda: registry)
        return module, registry

    return make


@pytest.mark.parametrize("version", ["8.6.0", "10.16.1.11", "11.4.0.106"])
def test_loads_once_through_each_versions_registry(version: str, fake: Fake) -> None:
    path = plugin_library(int(version.split(".")[0]))
    module, registry = fake(version, list(attributes()))
    loaded = plugin.load_plugin(module)
    assert plugin.load_plugin(module) is loaded
    assert registry.paths == [str(path)]


def test_what_the_registry_answers_is_checked(fake: Fake) -> None:
    path = plugin_library(11)
    module, registry = fake("11.4.0", None)
    with pytest.raises(MissingDependencyError, match=f"does not accept {path}"):
        plugin.load_plugin(module)
    module, registry = fake("11.4.0", ["scale", "tau"])
    with pytest.raises(MissingDependencyError, match=r"takes the fields \['scale', 'tau'\]"):
        plugin.load_plugin(module)
    module, registry = fake("11.4.0", list(attributes()))
    registry.registered = object()
    with pytest.raises(MissingDependencyError, match="another library has registered"):
        plugin.load_plugin(module)
    assert registry.paths == []


def test_unfit_libraries_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = plugin_library(11)
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(MissingDependencyError, match="does not load"):
        plugin.check_library(tmp_path / "text.so", "11.4.0")
    kernels = path.parent / native.LIBRARY
    with pytest.raises(MissingDependencyError, match=r"is no plugin library of socket-trt: run 'cmake"):
        plugin.check_library(kernels, "11.4.0")
    assert plugin.check_library(path, "11.4.0") == __version__
    with pytest.raises(MissingDependencyError, match=r"is for TensorRT 11, but TensorRT 8\.6\.0 is installed"):
        plugin.check_library(path, "8.6.0")
    monkeypatch.setattr(plugin, "__version__", "9.9")
    with pytest.raises(MissingDependencyError, match=rf"is of release {__version__}, this package is 9\.9"):
        plugin.check_library(path, "11.4.0")


def test_finds_what_the_variable_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(plugin.PLUGIN_VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"libsocket_trt_plugin_10\.so does not exist"):
        plugin.find_plugin("10.16.1")
    library = tmp_path / plugin.library_name(10)
    library.touch()
    assert plugin.find_plugin("10.16.1") == library
    with pytest.raises(MissingDependencyError, match=r"libsocket_trt_autoload_10\.so does not lie beside"):
        plugin.find_autoload("10.16.1")
    monkeypatch.setenv(plugin.PLUGIN_VARIABLE, str(library))
    assert plugin.find_plugin("10.0.0") == library


def test_finds_a_library_beside_the_package_before_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(plugin.PLUGIN_VARIABLE, raising=False)
    places = [tmp_path / "package", tmp_path / "build"]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(plugin, "_directories", lambda: places)
    with pytest.raises(MissingDependencyError, match=r"libsocket_trt_plugin_8\.so is not built: run 'cmake"):
        plugin.find_plugin("8.6.0")
    for place in reversed(places):
        (place / plugin.library_name(8)).touch()
        assert plugin.find_plugin("8.6.0") == place / plugin.library_name(8)


@pytest.mark.parametrize("version", ["7.2.1", "9.3.0", "12.0", "unknown"])
def test_a_tensorrt_without_plugin(version: str) -> None:
    with pytest.raises(MissingDependencyError, match="use TensorRT 8, 10, 11"):
        plugin.find_plugin(version)
