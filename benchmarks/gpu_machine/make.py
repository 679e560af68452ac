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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.shapes import SHAPES, export
from socket_trt.cli.console import RichProgress
from tests.families import CONFIGS, GPU_CHANGES, save_checkpoint

# A budget so small that a short prompt is already sparse.
SMALL = ["--page-size", "32", "--sink", "32", "--window", "32", "--budget", "0.05", "--min-length", "0"]
SMALL += ["--max-seq-len", "1024", "--max-batch-size", "4"]


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
    manifest = json.loads((engine / "build.json").read_text())
    manifest["weights"]["directory"] = manifest["model"]["checkpoint"] = "checkpoint"
    (engine / "build.json").write_text(json.dumps(manifest, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    names = ["tiny", *CONFIGS, *SHAPES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join(names)}")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.names or names:
            engine = arguments.output / name
            if name in SHAPES:
                export(name, engine, RichProgress(), force=True)
                continue
            if name == "tiny":
                build(engine, "tiny", *SMALL)
            else:
                make_family(name, engine, Path(scratch))
            socket_trt("validate", "--record", engine)


if __name__ == "__main__":
    main()
