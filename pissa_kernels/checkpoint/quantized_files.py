"""Files of a quantized result: the headers of its shards, its config.json and its index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..files.folder import INDEX, Checkpoint
from ..files.header import Header, TensorInfo, lay_out
from .placement import CONFIG
from .quantization import QuantizationPlan


def result_header(header: Header, plan: QuantizationPlan | None) -> Header:
    """The header of a shard of the result: the source's own, unless a weight in it becomes quantized."""
    weights = plan.weights if plan is not None else {}
    if plan is None or not weights.keys() & header.tensors.keys():
        return header
    tensors: list[TensorInfo] = []
    for name, info in header.tensors.items():
        tensors += plan.tensors(weights[name]).values() if name in weights else [info]
    return lay_out(tensors, header.metadata)


def quantized_texts(checkpoint: Checkpoint, shards: Mapping[str, Header], entries: Mapping[str, Any]) -> dict[str, str]:
    """config.json and the index of a quantized result.

    Args:
        checkpoint: the source.
        shards: headers of the result's shards, by name.
        entries: what is added to config.json.
    """
    config = json.loads((checkpoint.folder / CONFIG).read_text(encoding="utf-8"))
    found = {CONFIG: {**config, **entries}}
    if INDEX in checkpoint.others:
        found[INDEX] = _quantized_index(json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8")), shards)
    return {name: json.dumps(record, indent=2, sort_keys=True) + "\n" for name, record in found.items()}


def _quantized_index(index: Mapping[str, Any], shards: Mapping[str, Header]) -> dict[str, Any]:
    """The source's index with the tensors that the shards of the result have."""
    size = sum(info.nbytes for header in shards.values() for info in header.tensors.values())
    weight_map = {name: shard for shard, header in shards.items() for name in header.tensors}
    metadata = index["metadata"] if isinstance(index["metadata"], dict) else {}
    return {**index, "metadata": {**metadata, "total_size": size}, "weight_map": weight_map}
