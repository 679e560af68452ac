"""Where a model comes from: a preset, a hub id, a directory on disk, or random weights of a known configuration."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from socket_trt.errors import CheckpointError, ModelError
from socket_trt.models.families import check_supported
from socket_trt.models.presets import PRESETS, TINY, find_preset

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# What an engine directory keeps of the checkpoint besides its weights.
COMPANIONS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
# A preset and the checkpoint given for it must agree on these.
_SHAPE_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model to build.  `checkpoint` is None where its weights are to be drawn at random."""

    name: str
    family: str
    config: PretrainedConfig
    checkpoint: Path | None

    @property
    def is_tiny(self) -> bool:
        return self.name == TINY


def resolve_model(model: str, checkpoint: Path | None = None, random_weights: bool = False) -> ModelSource:
    """Find what `--model`, `--checkpoint` and `--random-weights` mean together.

    model: a preset's exact name, a hub id (owner/name), or a checkpoint's directory.
    checkpoint: a directory that holds the model's weights, instead of a download.
    Raises ModelError or CheckpointError: unknown name, unsupported architecture, missing files, hub out of reach.
    """
    if checkpoint is not None and random_weights:
        raise ModelError("--checkpoint and --random-weights exclude each other")
    known = PRESETS.get(model)
    local = Path(model).expanduser()
    if checkpoint is not None:
        directory: Path | None = checkpoint
    elif known is None and local.is_dir():
        directory = local
    elif known is not None and (random_weights or known.hub_id is None):
        directory = None
    else:
        hub_id = known.hub_id if known is not None else model
        if hub_id is None or not _HUB_ID.fullmatch(hub_id):
            find_preset(model)  # raises with the nearest names
        directory = download(str(hub_id), weights=not random_weights)

    if directory is not None:
        config = load_config(directory)
        where = str(directory)
    else:
        assert known is not None
        config, where = preset_config(known.config), model
    family = check_supported(config, where)
    if known is not None and directory is not None:
        _check_same_shape(model, preset_config(known.config), config, where)
    return ModelSource(model, family, config, None if random_weights else directory)


def preset_config(fields: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**fields)


def load_config(directory: Path) -> PretrainedConfig:
    """config.json of a checkpoint.  Raises CheckpointError where there is none, ModelError where it names no known type."""
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a checkpoint's directory holds config.json beside its weights")
    try:
        fields = json.loads(path.read_text())
        return AutoConfig.for_model(**fields)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"{path}: not a model configuration ({error})") from None
    except (ValueError, KeyError):
        kind = fields.get("model_type")
        raise ModelError(f"{path}: architecture '{kind}' is not known to the installed transformers") from None


def download(hub_id: str, weights: bool) -> Path:
    """A snapshot of a hub repository, from the local cache where it is complete.  Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = COMPANIONS + (_WEIGHTS if weights else [])
    hint = "give a local copy with --checkpoint DIR, or try the model's shapes with --random-weights"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id}: gated; accept its licence on the hub and log in (hf auth login), or {hint}"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{hub_id}: no such model on the hub, or it is private (hf auth login); else {hint}"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{hub_id}: the hub cannot be reached ({reason}); {hint}") from None


def stop_token_ids(config: PretrainedConfig, directory: Path | None) -> list[int]:
    """Tokens that end a text: generation_config.json's, else config.json's."""
    path = directory / "generation_config.json" if directory is not None else None
    ids = json.loads(path.read_text()).get("eos_token_id") if path is not None and path.is_file() else None
    ids = config.eos_token_id if ids is None else ids
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, list) else [int(ids)]


def _check_same_shape(name: str, preset: PretrainedConfig, config: PretrainedConfig, where: str) -> None:
    for field in _SHAPE_FIELDS:
        wanted, found = getattr(preset, field), getattr(config, field)
        if wanted != found:
            raise ModelError(
                f"{where}: not {name}: {field} is {found}, {name} has {wanted}; give the directory itself as --model"
            )
