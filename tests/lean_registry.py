"""What TensorRT's Python bindings see of the plugin: run with a lean runtime on PYTHONPATH, prints one JSON object."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tensorrt_lean_bindings as trt

from socket_trt.engine.plugin import load_plugin
from socket_trt.errors import MissingDependencyError


class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(message)


def create(creator: Any, fields: dict[str, float], phase: Any) -> Any:
    values = {n: np.array([v], np.float32 if isinstance(v, float) else np.int32) for n, v in fields.items()}
    kinds = {np.dtype(np.float32): trt.PluginFieldType.FLOAT32, np.dtype(np.int32): trt.PluginFieldType.INT32}
    collection = trt.PluginFieldCollection([trt.PluginField(n, v, kinds[v.dtype]) for n, v in values.items()])
    return creator.create_plugin("layer", collection, phase)


def observe(fields: dict[str, float]) -> dict[str, object]:
    registry = trt.get_plugin_registry()
    seen: dict[str, object] = {"tensorrt": trt.__version__}
    logger = Logger()
    plugin = load_plugin(trt, logger)
    seen |= {"path": str(plugin.path), "sha256": plugin.sha256, "release": plugin.release, "log": logger.lines}
    seen["again"] = load_plugin(trt) is plugin
    seen["listed"] = [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators]
    creator = registry.get_creator("SocketAttention", "1", "socket")
    seen["fields"] = [[field.name, field.type.name] for field in creator.field_names]

    made = create(creator, fields, trt.TensorRTPhase.BUILD)
    core = made.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = made.get_capability_interface(trt.PluginCapabilityType.BUILD)
    seen["core"] = [core.plugin_name, core.plugin_version, core.plugin_namespace]
    seen["build"] = [build.interface_info.kind, build.interface_info.major, build.num_outputs]
    seen["metadata"] = build.metadata_string
    # Python can call the properties of a plugin made in C++, but none of its methods: plugins/tensorrt/harness does.
    assert made.get_capability_interface(trt.PluginCapabilityType.RUNTIME).interface_info.kind == "PLUGIN_V3ONE_RUNTIME"
    seen["refused"] = create(creator, fields | {"page_size": 17}, trt.TensorRTPhase.BUILD) is None
    seen["refused at run time"] = create(creator, fields, trt.TensorRTPhase.RUNTIME) is None
    return seen


if __name__ == "__main__":
    try:
        print(json.dumps(observe(json.loads(sys.argv[1]))))
    except MissingDependencyError as error:
        print(json.dumps({"error": str(error)}))
