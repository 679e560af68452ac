"""The files that benchmarks write."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def gpu_slug(gpu: str) -> str:
    """The GPU's name without maker and memory: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.sub(r"\bNVIDIA\b|\b\d+GB\b|\bHBM\w*", " ", gpu).split()
    return "-".join(words).lower()


def write_results(stem: Path, results: dict[str, Any] | list[dict[str, Any]], text: str) -> None:
    """STEM.json with the results and STEM.md with the text made of them; each is there as a whole or not at all."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
        partial = stem.with_name(f".{stem.name}.partial")
        partial.write_text(content)
        partial.replace(stem.with_suffix(suffix))


def output_directory(description: str | None) -> Path | None:
    """The directory for results that the command line of a benchmark without other options names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory for the results; without it they are only printed")
    output: Path | None = parser.parse_args().output
    return output
