"""Files that a command is to write."""

from __future__ import annotations

import os
from pathlib import Path

from socket_trt.errors import ConfigError


def check_outputs(output: Path | None, plot_file: Path | None) -> None:
    """Raise ConfigError for a file that could not be written, before an hour is spent on what it is for."""
    for option, file in (("--output", output), ("--plot", plot_file)):
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise ConfigError(f"{option} {file}: cannot be written; give a file in a directory that can be")
    if plot_file is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = FigureCanvasBase.get_supported_filetypes()
        if plot_file.suffix.lstrip(".").lower() not in kinds:
            raise ConfigError(f"--plot {plot_file}: give a file that ends in one of {', '.join(sorted(kinds))}")
