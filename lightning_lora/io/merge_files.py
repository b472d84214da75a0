"""Merging an adapter folder into the files of its base model, a layer in memory at a time, without the model's code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, MergeError, listing
from lightning_lora.io import adapter_file
from lightning_lora.io.adapter_file import CONFIG, WEIGHTS, AdapterFile
from lightning_lora.io.adapter_folder import as_here, fill
from lightning_lora.io.base_files import MODEL_CONFIG, BaseFiles
from lightning_lora.io.description import CHANCE
from lightning_lora.io.experts import refuse_stacks
from lightning_lora.io.export import merged_metadata, refuse_adapter_folder
from lightning_lora.io.fingerprint import Comparison, compare
from lightning_lora.io.fitting import plan_for
from lightning_lora.io.keys import PREFIX
from lightning_lora.io.notes import tell
from lightning_lora.io.shards import Made, Part, write_shards
from lightning_lora.model.merge import merged
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.base import dense_weight
from lightning_lora.nn.kinds import as_base

Quantizer = Callable[[nn.Module, str], nn.Module]
"""Quantizes a layer as a few words say: ``nf4/64 double-quantized``."""

_COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")
_LARGEST_COPIED = 100 * 2**20
_TRANSPOSED = "transposed linear"


@dataclass
class MergeReport:
    """What was merged.

    Attributes:
        layers: Names of the layers.
        trained_on: How the base was stored in training, of each layer.
        drift: Where a layer was merged into another weight than the one trained on: the relative difference of the two.
        started: Those of them of which only a bound of it is known, for what they were trained on is not on disk.
    """

    layers: list[str]
    trained_on: dict[str, str]
    drift: dict[str, float] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)


@torch.no_grad()
def merge_files(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    quantizer: Quantizer,
    onto: str = "trained",
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    allow_base_mismatch: bool = False,
) -> MergeReport:
    """Write the merged model to ``out``, with the base's own names, config and tokenizer.

    Args:
        base: Folder of the base model, in safetensors.
        adapter: Adapter folder.
        out: Folder for the merged model.
        quantizer: Makes of a dense layer the one that was trained on.
        onto: ``"trained"`` adds the update to the weight it was trained on, which over a quantized base is the
            dequantized one; ``"original"`` to the weight in the files, and reports how far that is from it.
        max_shard_size: Bytes of a file at most, or such as ``"5GB"``.
        dtype: What to store floating-point tensors in; None keeps the files'.
        allow_base_mismatch: Whether to merge into a base that is not the one trained on.

    Raises:
        AdapterError: If the adapter is damaged, or does not belong to this base.
        MergeError: If a merged weight is not finite, the update would change a tied weight, or the weight that was
            trained on cannot be made again from the files.
        OSError: If there is no room; what was in ``out`` before is untouched.
    """
    if onto not in ("trained", "original"):
        raise ValueError(f"onto must be 'trained' or 'original', got {onto!r}")
    if out.resolve() == base.resolve():
        raise MergeError(f"{out} is the base model's folder; choose another")
    refuse_adapter_folder(out)
    files = BaseFiles(base)
    job = _Job(files, _checked(files, adapter), onto, dtype, quantizer)
    job.refuse_lost_base()
    for unknown in job.check_base(adapter, allow_mismatch=allow_base_mismatch):
        tell(f"{adapter}: not checked: {unknown}")
    metadata = merged_metadata(onto=onto, trained_on=job.report.trained_on)
    rest = _rest(files, dtype)
    write_shards(out, list(job.parts()), max_shard_size=max_shard_size, metadata=metadata, beside=rest)
    return job.report


def _checked(files: BaseFiles, adapter: Path) -> tuple[AdapterFile, Mapping[str, AdapterConfig], set[str]]:
    """Read the adapter and compare it with the base's names and shapes.

    Returns:
        The adapter, the config of each layer, and the layers whose weight is stored transposed.
    """
    try:
        file = adapter_file.read(adapter)
        refuse_stacks(file)
        transposed = _transposed(files, file)
        skeleton = files.skeleton(file.adapters, transposed=transposed)
        plain = replace(file, settings={**file.settings, "fan_in_fan_out": False})
        plan_for(skeleton, as_here(skeleton, plain))
        _refuse_tied(files, file)
        whole = as_here(skeleton, adapter_file.load(adapter, plain))
        return whole, plan_for(skeleton, whole).layers, transposed  # some of it is known from the values alone
    except AdapterError as error:
        raise AdapterError(f"{adapter}: {error}") from None


def _transposed(files: BaseFiles, file: AdapterFile) -> set[str]:
    """The adapted layers whose weight is stored transposed: what the header says, or all that could be."""
    if not file.settings.get("fan_in_fan_out"):
        return set()
    kinds = (file.metadata or {}).get("kinds", _TRANSPOSED)
    said = {path for path in file.adapters if (kinds.get(path) if isinstance(kinds, dict) else kinds) == _TRANSPOSED}
    embeddings = {path for path in said if any("embedding" in leaf for leaf in file.adapters[path])}
    return {path for path in said - embeddings if getattr(files.outline.get(f"{path}.weight"), "ndim", 0) == 2}


def _refuse_tied(files: BaseFiles, file: AdapterFile) -> None:
    """Refuse to change one of two weights that the model's config ties: loading would undo it, or change both."""
    if not files.config.get("tie_word_embeddings"):
        return
    weights = [key for key in file.others if not key.endswith(".bias")]  # which nothing ties
    changed = [*file.adapters, *(key.removeprefix(PREFIX).rpartition(".")[0] for key in weights)]
    tied = [path for path in changed if path.rpartition(".")[2] in ("lm_head", "embed_tokens", "wte", "embed_in")]
    if tied:
        raise MergeError(
            f"{listing(tied)} shares its weight with another layer ({MODEL_CONFIG} says tie_word_embeddings), and the "
            "update is of one of them. Untie them in the base first: save it with tie_word_embeddings=False and both "
            "weights"
        )


@torch.no_grad()
def check_against(base: Path, adapter: Path) -> list[str]:
    """Compare an adapter folder with the files of its base, and return what could not be compared.

    Raises:
        AdapterError: If it is damaged, or does not belong to this base.
    """
    files = BaseFiles(base)
    job = _Job(files, _checked(files, adapter), "trained", None, lambda layer, _: layer)
    return job.check_base(adapter, allow_mismatch=False)


class _Job:
    """One merge: what is read from where, and what is made of it."""

    def __init__(
        self,
        files: BaseFiles,
        checked: tuple[AdapterFile, Mapping[str, AdapterConfig], set[str]],
        onto: str,
        dtype: torch.dtype | None,
        quantizer: Quantizer,
    ) -> None:
        self.files, self.onto, self.dtype, self.quantizer = files, onto, dtype, quantizer
        self.file, self.configs, self.transposed = checked
        stored = {path: self._said("quantization", path, "none") for path in self.configs}
        self.report = MergeReport(list(self.configs), stored)
        self._started = {path for path in stored if self._said("start", path, CHANCE) != CHANCE}

    def refuse_lost_base(self) -> None:
        """Raise ``MergeError`` if the update is to be added to a weight that cannot be made again from the files."""
        lost = [path for path in self._started if self.report.trained_on[path] != "none"]
        if lost and self.onto == "trained":
            raise MergeError(
                f"{listing(sorted(lost))} started in the base weight ({self._said('start', lost[0], CHANCE)}), and the "
                "base was quantized without that start, which an adapter folder does not hold. Merge where it was "
                "trained: export_merged(model, ...), or merge=True of the callback; or into the original weights, "
                "which are at most the quantization error away: --onto original"
            )

    def check_base(self, folder: Path, *, allow_mismatch: bool) -> list[str]:
        """Compare the weights in the files with those the adapter was trained on, one at a time.

        Returns:
            What could not be compared.
        """
        if self.file.metadata is None:
            return ["whether this is the base it was trained on, and whether that was quantized; its file does not say"]
        total = Comparison()
        saved = self.file.metadata.get("base_fingerprint")
        for path in self.configs:
            try:  # fingerprints are of weights as they are stored
                found = compare(saved, {path: self.files.layer(path, self.file.adapters[path], transposed=False)})
            except ValueError as error:
                raise AdapterError(f"{folder}: {WEIGHTS} has a damaged header: {error}") from None
            total.add(found)
        if total.differ and not allow_mismatch:
            raise AdapterError(f"{folder}: {total}. Pass its base, or --allow-base-mismatch")
        return [f"whether {path} is the weight trained on; {why}" for path, why in total.unchecked.items()]

    def parts(self) -> Iterator[Part]:
        """Everything to be written, in the order of the files."""
        weights: dict[str, list[str]] = {}
        for path in self.configs:
            weights.setdefault(self.files.place(path).weight, []).append(path)
        trained = {key.removeprefix(PREFIX): tensor for key, tensor in self.file.others.items()}
        trained |= {self.files.place(path).bias: tensor for path, tensor in self.file.biases.items()}
        for name, outline in self.files.outline.items():
            wanted = self.dtype if self.dtype is not None and outline.is_floating_point() else outline.dtype
            make = partial(self._copy, name, wanted)
            if name in weights:
                make = partial(self._merged, name, weights[name], wanted)
            elif name in trained:
                make = partial(_given, name, trained[name], wanted)
            meta = torch.empty(outline.shape, dtype=wanted, device="meta")
            yield Part({name: meta}, make, computed=name in weights or name in trained)

    def _copy(self, name: str, dtype: torch.dtype) -> Made:
        return [(name, self.files.read(name).to(dtype))]

    def _merged(self, name: str, paths: list[str], dtype: torch.dtype) -> Made:
        """The tensor with the update of the layer it belongs to, or of those of which it holds a third each."""
        if self.files.place(paths[0]).weight == f"{paths[0]}.weight":
            return [(name, self._weight(paths[0], dtype))]
        whole = self.files.read(name).to(dtype, copy=True)
        for path in paths:
            whole[self.files.place(path).rows] = self._weight(path, dtype)
        return [(name, whole)]

    @torch.no_grad()
    def _weight(self, path: str, dtype: torch.dtype) -> Tensor:
        host = AdaptedLayer(as_base(self._base(path)))
        config = self.configs[path]
        adapter = config.build(host.base_layer, device=torch.device("cpu"), dtype=torch.float32)
        fill(adapter, host.kind, self.file.adapters[path])
        host.adapters["default"], host.active = adapter, ("default",)
        weight = dict(merged(host, dtype=dtype).named_parameters())["weight"].detach()
        return weight.t().contiguous() if path in self.transposed else weight

    def _base(self, path: str) -> nn.Module:
        """The layer that the update is added to."""
        layer, words = self._layer(path), self.report.trained_on[path]
        if words == "none":
            return layer
        quantized = self.quantizer(layer, words)
        if self.onto == "trained":
            return quantized
        original, trained = (dense_weight(each, torch.float32) for each in (layer, quantized))
        self.report.drift[path] = float((original - trained).norm() / trained.norm())
        self.report.started += [path] * (path in self._started and path not in self.report.started)
        return layer

    def _layer(self, path: str) -> nn.Module:
        return self.files.layer(path, self.file.adapters[path], transposed=path in self.transposed)

    def _said(self, what: str, path: str, otherwise: str) -> str:
        """What the header says of a layer: descriptions hold one value where all layers agree."""
        value = (self.file.metadata or {}).get(what, otherwise)
        return str(value.get(path, otherwise) if isinstance(value, dict) else value)


def _given(name: str, tensor: Tensor, dtype: torch.dtype) -> Made:
    return [(name, tensor.to(dtype))]


def _rest(files: BaseFiles, dtype: torch.dtype | None) -> dict[str, Callable[[Path], object]]:
    """What to copy along: config and tokenizer, no code and no pickles."""
    rest: dict[str, Callable[[Path], object]] = {}
    for path in sorted(files.folder.iterdir()):
        small = path.is_file() and path.stat().st_size <= _LARGEST_COPIED
        if small and path.suffix in _COPIED and path.name != CONFIG and not path.name.endswith(".index.json"):
            rest[path.name] = partial(shutil.copyfile, path)
    if dtype is not None and files.config:
        config = {**files.config, "dtype": str(dtype).removeprefix("torch.")}
        rest[MODEL_CONFIG] = lambda file: file.write_text(json.dumps(config, indent=2) + "\n")
    return rest
