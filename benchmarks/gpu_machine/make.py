"""Engine directories to compile, validate and time on another machine: one with a GPU but no network and no PyTorch.

    python benchmarks/gpu_machine/make.py OUTPUT [NAME ...]

`tiny` and a small random model of every family, with PyTorch's answers recorded, and graphs of Llama-3-8B's shapes, with
32 layers and with one: what `run.sh` and `serving.sh` beside this file take, 50 MB in all.  Needs what `socket-trt validate`
needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from socket_trt.models.presets import find_preset
from tests.families import CONFIGS, GPU_CHANGES, save_checkpoint

# A budget so small that a short prompt is already sparse.
SMALL = ["--page-size", "32", "--sink", "32", "--window", "32", "--budget", "0.05", "--min-length", "0"]
SMALL += ["--max-seq-len", "1024", "--max-batch-size", "4"]

SERVING = ["--max-seq-len", "65536", "--max-batch-size", "16"]
# Longer contexts than the model was made for: its shapes are wanted, not its answers.
LARGE: dict[str, tuple[int, list[str]]] = {
    "llama3-8b": (32, ["--max-seq-len", "524288", "--max-batch-size", "4"]),
    "llama3-8b-1layer": (
        1,
        ["--planes", "10", "--temperature", "0.4", "--max-seq-len", "147456", "--max-batch-size", "1"],
    ),
    "llama3-8b-serving": (32, SERVING),
    "llama3-8b-serving-dense": (32, [*SERVING, "--attention", "dense"]),
}


def socket_trt(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "socket_trt.cli.main", *map(str, arguments)], check=True)


def build(engine: Path, model: str | Path, *options: str) -> None:
    shutil.rmtree(engine, ignore_errors=True)
    common = ("--backend", "tensorrt", "--no-plan", "--dtype", "float16")
    socket_trt("build", "--output", engine, "--model", model, *common, *options)


def make_family(name: str, engine: Path, scratch: Path) -> None:
    """A small model, its checkpoint moved into the engine directory."""
    dtype = torch.bfloat16 if name in ("llama3", "qwen2") else torch.float16
    checkpoint = save_checkpoint(name, scratch / name, dtype=dtype, changes=GPU_CHANGES[name])
    build(engine, checkpoint, *SMALL)
    shutil.copytree(checkpoint, engine / "checkpoint", dirs_exist_ok=True)

    def move(manifest: dict[str, Any]) -> None:
        manifest["weights"]["directory"] = manifest["model"]["checkpoint"] = "checkpoint"

    _change_manifest(engine, move)


def _change_manifest(engine: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((engine / "build.json").read_text())
    change(manifest)
    (engine / "build.json").write_text(json.dumps(manifest, indent=2))


def make_large(name: str, engine: Path, scratch: Path) -> None:
    layers, options = LARGE[name]
    model = scratch / name
    model.mkdir()
    config = find_preset("llama3-8b").config | {"num_hidden_layers": layers, "max_position_embeddings": 2**20}
    (model / "config.json").write_text(json.dumps(config))
    # Sparse at every length, or a case at 18K tokens would time dense attention against itself.
    socket = ("--budget", "0.03,1024", "--min-length", "0")
    build(engine, model, "--random-weights", "--graph-only", *socket, *options)
    _change_manifest(engine, lambda manifest: manifest["model"].update(name=name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    names = ["tiny", *CONFIGS, *LARGE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(names)}")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.names or names:
            engine = arguments.output / name
            if name in LARGE:
                make_large(name, engine, Path(scratch))
                continue
            if name == "tiny":
                build(engine, "tiny", *SMALL)
            else:
                make_family(name, engine, Path(scratch))
            socket_trt("validate", "--record", engine)


if __name__ == "__main__":
    main()
