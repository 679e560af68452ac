"""What an engine is compared with: PyTorch's answers, computed here or recorded where PyTorch is."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from socket_trt import names
from socket_trt.config import OperatorAttributes, code_bits
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.errors import EngineError
from socket_trt.validation.scenario import Scenario
from socket_trt.validation.selection_probe import Arrays, cache_slots, decode_rows, written_codes

REFERENCE_FILE = "reference.npz"
GREEDY_PROMPT, GREEDY_TOKENS = 512, 24

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """One operator's inputs in one step, as the PyTorch model gave them, and the attributes they call for."""

    layer: int
    step: int
    inputs: Arrays
    attributes: OperatorAttributes


@dataclasses.dataclass(frozen=True)
class ExpectedSet:
    """Tokens that each head of a decode row attends to, and those whose score decides too narrowly to tell: bool
    [Hq, T] twice.
    """

    expected: Bools
    excused: Bools


@dataclasses.dataclass(frozen=True)
class GreedyText:
    """Tokens of a greedy generation, and the logits [tokens, V] that each was the best of."""

    prompt: list[int]
    tokens: list[int]
    logits: Floats

    def gap(self, index: int, other: int) -> float:
        """How far the logit of another token lies below that of the `index`th one."""
        row = self.logits[index]
        return float(abs(row[self.tokens[index]] - row[other]))


class Reference(ABC):
    """PyTorch's answers to a scenario."""

    @property
    @abstractmethod
    def calls(self) -> Sequence[OperatorCall]:
        """Every layer's operator in every step, step by step."""

    @abstractmethod
    def logits(self) -> list[Floats]:
        """Logits [B, V] of every step, of transformers' own model and attention."""

    @abstractmethod
    def rounding(self) -> float:
        """How far those logits are at most from the same model's in float64; 0 for a model too large to ask."""

    @abstractmethod
    def outputs(self, call: OperatorCall) -> Arrays:
        """The operator's outputs, named as `names.OPERATOR_OUTPUTS`."""

    @abstractmethod
    def bits(self, call: OperatorCall, margin: float) -> tuple[Bools, Bools]:
        """Sign of every projection of the step's keys in float64, and whether it is clear of zero: [tokens, Hkv, L, R].

        Clear: |w . k| > margin |w| |k|.
        """

    @abstractmethod
    def sets(self, call: OperatorCall, margin: float) -> dict[int, ExpectedSet]:
        """What decode rows attend to, by row; rows that leave nothing out are not there.

        Excused: scores within margin, relative, of the threshold.
        """

    @abstractmethod
    def greedy(self) -> GreedyText:
        """Transformers' generation."""


def greedy_prompt(manifest: Manifest, scenario: Scenario) -> list[int]:
    tokens: list[int] = scenario.tokens[0][: min(GREEDY_PROMPT, manifest.max_seq_len - GREEDY_TOKENS)].tolist()
    return tokens


@dataclasses.dataclass(frozen=True)
class Margins:
    """Margins of `Reference.bits` and `Reference.sets`, which a recording fixes."""

    projection: float
    score: float


def record_reference(
    engine: EngineDirectory, scenario: Scenario, reference: Reference, margins: Margins, seed: int
) -> Path:
    """Write `reference` into the engine directory.  Caches are left out: they follow from the keys and values."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number, logits in enumerate(reference.logits()):
        arrays[f"logits/{number}"] = logits
    arrays["rounding"] = np.array(reference.rounding())
    greedy = reference.greedy()
    arrays |= {"greedy/tokens": np.array(greedy.tokens, np.int32), "greedy/logits": greedy.logits}
    kind = np.uint8 if code_bits(engine.manifest.socket.planes) == 8 else np.uint16
    for number, call in enumerate(reference.calls):
        key, expected = f"call/{number}", reference.outputs(call)
        arrays |= {f"{key}/{name}": call.inputs[name] for name in ("query", "key", "value")}
        arrays[f"{key}/output"] = expected["output"]
        arrays[f"{key}/codes"] = written_codes(expected["code_cache_out"], call.inputs).astype(kind)
        arrays[f"{key}/norms"] = _written(expected["norm_cache_out"], call.inputs)
        bits, clear = reference.bits(call, margins.projection)
        arrays |= {f"{key}/bits": np.packbits(bits), f"{key}/clear": np.packbits(clear)}
        for row, sets in reference.sets(call, margins.score).items():
            arrays |= {f"{key}/expected/{row}": sets.expected, f"{key}/excused/{row}": sets.excused}
    about = {
        "graph": engine.manifest.graph.sha256,
        "seed": seed,
        "margins": dataclasses.asdict(margins),
        "calls": [(call.layer, call.step, call.attributes.as_dict()) for call in reference.calls],
    }
    arrays |= {"planes": reference.calls[0].inputs["planes"], "about": np.array(json.dumps(about))}
    path = engine.path / REFERENCE_FILE
    try:
        np.savez_compressed(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise EngineError(f"{path}: cannot be written ({error.strerror})") from None
    return path


class RecordedReference(Reference):
    """A reference that `record_reference` has written."""

    def __init__(self, engine: EngineDirectory, scenario: Scenario, margins: Margins, seed: int) -> None:
        """Raises EngineError where the recording is of another graph, seed or margins."""
        path = engine.path / REFERENCE_FILE
        try:
            self._arrays = np.load(path, allow_pickle=False)
            about = json.loads(str(self._arrays["about"]))
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(f"{path}: not a recorded reference ({error}); record it again") from None
        wanted = {"graph": engine.manifest.graph.sha256, "seed": seed, "margins": dataclasses.asdict(margins)}
        for name, value in wanted.items():
            if about[name] != value:
                raise EngineError(
                    f"{path}: recorded for another {name}; record it again with socket-trt validate --record"
                )
        self._manifest, self._scenario = engine.manifest, scenario
        self._calls = list(self._replay(about["calls"]))
        self._number = {(call.layer, call.step): number for number, call in enumerate(self._calls)}

    @property
    def calls(self) -> Sequence[OperatorCall]:
        return self._calls

    def _replay(self, calls: list[tuple[int, int, dict[str, Any]]]) -> Iterator[OperatorCall]:
        """Every call with the caches as the steps before it left them."""
        manifest = self._manifest
        shapes = manifest.cache_shapes(self._scenario.num_pages)
        kind = np.float16 if manifest.dtype == "float16" else np.float32
        dtypes = {name: np.int32 if name == "code" else kind for name in names.CACHE_KINDS}
        caches: dict[int, Arrays] = {}
        for number, (layer, step, attributes) in enumerate(calls):
            if layer not in caches:
                caches[layer] = {f"{name}_cache": np.zeros(shapes[name], dtypes[name]) for name in names.CACHE_KINDS}
            own = {name: self._arrays[f"call/{number}/{name}"] for name in ("query", "key", "value")}
            batch = self._scenario.steps[step]
            shared = {name: getattr(batch, name) for name in ("page_table", "past_length", "query_start")}
            inputs = {**own, **caches[layer], **shared, "planes": self._arrays["planes"]}
            inputs = {name: inputs[name] for name in names.OPERATOR_INPUTS}
            yield OperatorCall(layer, step, inputs, OperatorAttributes(**attributes))
            caches[layer] = self._caches_after(number, inputs)

    def _caches_after(self, number: int, inputs: Arrays) -> Arrays:
        caches = {f"{name}_cache": inputs[f"{name}_cache"].copy() for name in names.CACHE_KINDS}
        pages, slots, tokens = cache_slots(inputs)
        caches["key_cache"][pages, :, slots] = inputs["key"][0, :, :tokens].swapaxes(0, 1)
        caches["value_cache"][pages, :, slots] = inputs["value"][0, :, :tokens].swapaxes(0, 1)
        caches["norm_cache"][pages, :, slots] = self._arrays[f"call/{number}/norms"]
        codes = self._arrays[f"call/{number}/codes"]
        caches["code_cache"].view(codes.dtype)[pages, :, :, slots] = codes  # little-endian words
        return caches

    def logits(self) -> list[Floats]:
        return [self._arrays[f"logits/{number}"] for number in range(len(self._scenario.steps))]

    def rounding(self) -> float:
        return float(self._arrays["rounding"]) if "rounding" in self._arrays else 0.0

    def outputs(self, call: OperatorCall) -> Arrays:
        number = self._number[call.layer, call.step]
        caches = self._caches_after(number, call.inputs)
        values = (self._arrays[f"call/{number}/output"], *(caches[f"{name}_cache"] for name in names.CACHE_KINDS))
        return dict(zip(names.OPERATOR_OUTPUTS, values, strict=True))

    def bits(self, call: OperatorCall, margin: float) -> tuple[Bools, Bools]:
        number = self._number[call.layer, call.step]
        shape = (*self._arrays[f"call/{number}/codes"].shape, call.inputs["planes"].shape[1])
        count = int(np.prod(shape))
        packed = (self._arrays[f"call/{number}/{name}"] for name in ("bits", "clear"))
        bits, clear = (np.unpackbits(array, count=count).astype(bool).reshape(shape) for array in packed)
        return bits, clear

    def sets(self, call: OperatorCall, margin: float) -> dict[int, ExpectedSet]:
        key = f"call/{self._number[call.layer, call.step]}"
        return {
            row: ExpectedSet(self._arrays[f"{key}/expected/{row}"], self._arrays[f"{key}/excused/{row}"])
            for row in decode_rows(call.inputs)
            if f"{key}/expected/{row}" in self._arrays
        }

    def greedy(self) -> GreedyText:
        tokens: list[int] = self._arrays["greedy/tokens"].tolist()
        prompt = greedy_prompt(self._manifest, self._scenario)
        return GreedyText(prompt, tokens, self._arrays["greedy/logits"])


def _written(cache: npt.NDArray[Any], inputs: Arrays) -> npt.NDArray[Any]:
    pages, slots, _ = cache_slots(inputs)
    written: npt.NDArray[Any] = cache[pages, :, slots]
    return written
