"""Directories that are there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from socket_trt.errors import SocketTrtError


def check_replaceable(
    output: Path, force: bool, replaceable: Callable[[Path], bool], kind_not: str, error_type: type[SocketTrtError]
) -> None:
    """Raise `error_type` where `output` exists and may not be replaced; arguments as `staged` has them."""
    if not output.exists():
        return
    if not force:
        raise error_type(f"{output}: exists; give --force to replace it, or another place")
    if not output.is_dir() or (any(output.iterdir()) and not replaceable(output)):
        raise error_type(f"{output}: exists and is {kind_not}; --force replaces only those")


@contextlib.contextmanager
def staged(
    output: Path, force: bool, replaceable: Callable[[Path], bool], kind_not: str, error_type: type[SocketTrtError]
) -> Iterator[Path]:
    """A directory that becomes `output` when the block ends well, and vanishes when it does not.

    force        replace an existing `output`, if it is empty or `replaceable`
    replaceable  whether a directory is one of the kind that is written; `kind_not`: what it is if not

    Raises `error_type`, before the block, where `output` exists and may not be replaced, and where it cannot be
    written.
    """
    check_replaceable(output, force, replaceable, kind_not, error_type)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise error_type(f"{output}: cannot be written ({error.strerror}); give another place") from None
    try:
        yield stage
        stage.chmod(0o755)  # mkdtemp's own mode keeps others out
        if output.exists():
            shutil.rmtree(output)
        stage.rename(output)
    except OSError as error:
        raise error_type(f"{output}: writing failed ({error.strerror or error}); nothing was kept") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
