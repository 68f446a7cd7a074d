"""Inputs for one forward pass of a model of transformers: from its processor, or seeded random ones from its config."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .measure import model_outputs

SENTENCES = [
    "The principal components of a weight matrix carry most of its energy.",
    "A frozen residual keeps the output of the model where it was.",
]
ROWS = len(SENTENCES)
TOKENS = 16  # of a random text
SIDE = 64  # of an image, for models that take any size
SAMPLES = 8000  # of a random waveform
TEXT, IMAGE, AUDIO = ("text", "decoder", "encoder"), ("vision", "image", "backbone", "encoder"), ("audio", "encoder")
# In M-RoPE's token types, text is 0.
PLACEHOLDERS = {"image": 1, "audio": 3}

# Tensors, and switches.
Inputs = dict[str, Any]


def model_inputs(model: Any, processor: Any) -> Inputs:
    """The first inputs that the model takes, those for most of its modalities before the others.

    Args:
        model: a model of transformers.
        processor: its tokenizer, image processor, feature extractor, or a processor of several; None for none.

    Raises:
        ValueError: it takes none of the inputs that can be made.
    """
    failures = []
    for inputs in _candidates(model, processor):
        failure = _failure(model, inputs)
        if failure is None:
            return inputs
        failures.append(failure)
    raise ValueError(
        f"the demo cannot make inputs for {type(model).__name__}, whose main input is {model.main_input_name}"
        f"{f' ({failures[0]})' if failures else ''}; pissa-kernels init initializes a checkpoint without inputs"
    )


def _failure(model: Any, inputs: Inputs) -> str | None:
    """Why a model does not take these inputs; None where it does."""
    try:
        model_outputs(model, inputs)
    except Exception as error:  # whatever a model raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _candidates(model: Any, processor: Any) -> Iterator[Inputs]:
    names = set(inspect.signature(model.forward).parameters)
    generator = torch.Generator().manual_seed(0)
    makers: tuple[Callable[[], Inputs], ...] = (
        lambda: _from_processor(processor, names, generator),
        lambda: _from_config(model, names, generator, frames_first=False),
        lambda: _from_config(model, names, generator, frames_first=True),
        lambda: {"input_ids": _token_ids(model.config, generator)} if "input_ids" in names else {},
        lambda: dict(model.dummy_inputs),
    )
    for make in makers:
        made: Inputs = {}
        with contextlib.suppress(Exception):  # whatever processors and configs of other kinds raise
            made = make()
            if made and "decoder_input_ids" in names - made.keys():
                rows = len(next(iter(made.values())))
                made["decoder_input_ids"] = _decoder_ids(model.config, generator, rows)
        if made:
            taken = {name: _like(model, value) for name, value in made.items() if name in names}
            yield taken | ({"use_cache": False} if "use_cache" in names else {})


def _like(model: Any, value: Tensor) -> Tensor:
    """A tensor on the model's device, and in its dtype if it is a floating-point one."""
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def _from_processor(processor: Any, names: set[str], generator: torch.Generator) -> Inputs:
    """What the processor makes of sentences, noisy images and a noisy waveform, as far as the model takes them."""
    parts = _parts(processor)
    tokenizer, extractor = parts.get("tokenizer"), parts.get("feature_extractor")
    given: dict[str, Any] = {}
    rows = ROWS
    if tokenizer is not None and "input_ids" in names:
        padded = tokenizer.pad_token is not None  # without padding, a batch has one sentence
        rows = ROWS if padded else 1
        mark = getattr(processor, "image_token", None) if "pixel_values" in names else None
        given |= {"text": [f"{mark or ''}{sentence}" for sentence in SENTENCES[:rows]], "padding": padded}
    if "image_processor" in parts and "pixel_values" in names:
        from PIL import Image

        pixels = torch.randint(0, 256, (rows, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        given["images"] = [Image.fromarray(picture.numpy()) for picture in pixels]
    if extractor is not None and names & {"input_features", "input_values"}:
        sound = torch.randn(rows, extractor.sampling_rate, generator=generator).numpy()
        given["raw_speech" if extractor is processor else "audio"] = list(sound)
        given["sampling_rate"] = extractor.sampling_rate
    if not given:
        return {}
    kept = {"input_ids", "attention_mask"} if processor is tokenizer else names - {"labels"}
    made = processor(**given, return_tensors="pt")
    return {name: value for name, value in made.items() if name in kept and isinstance(value, Tensor)}


def _parts(processor: Any) -> dict[str, Any]:
    """The tokenizer, the image processor and the feature extractor that a processor has, or is."""
    from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

    if isinstance(processor, ProcessorMixin):
        found = {name: getattr(processor, name, None) for name in ("tokenizer", "image_processor", "feature_extractor")}
        return {name: part for name, part in found.items() if part is not None}
    if isinstance(processor, PreTrainedTokenizerBase):
        return {"tokenizer": processor}
    if isinstance(processor, FeatureExtractionMixin):
        return {"feature_extractor": processor}
    return {} if processor is None else {"image_processor": processor}


def _from_config(model: Any, names: set[str], generator: torch.Generator, *, frames_first: bool) -> Inputs:
    """Random inputs in the shapes that the config gives.

    Args:
        model: the model.
        names: arguments of its forward pass.
        generator: for the values.
        frames_first: whether ``input_features`` are (batch, frames, features) and not (batch, features, frames), and
            ``pixel_values`` several images, where the config has a number of them.
    """
    config = model.config
    made: Inputs = {}
    if "image_grid_thw" in names:
        made |= _patches(config, generator)
    elif "pixel_values" in names or "pixel_values_videos" in names:
        made |= _pixels(config, names, generator, frames_first)
    if "input_features" in names:
        made["input_features"] = _features(config, generator, frames_first)
    if "input_values" in names:
        made["input_values"] = _waveforms(config, generator)
    if "past_values" in names:
        shape = (ROWS, _setting(config, "context_length"), _setting(config, "num_input_channels", "input_size") or 1)
        made["past_values"] = torch.randn(shape, generator=generator)
    if "input_ids" in names:
        made |= _text(model, names, generator, made)
    return made


def _text(model: Any, names: set[str], generator: torch.Generator, others: Inputs) -> Inputs:
    """Token ids, with as many placeholders as the model makes features of the other inputs."""
    before, after = _token_ids(model.config, generator).chunk(2, dim=1)
    counts = {kind: _feature_count(model, kind, others) // ROWS for kind in PLACEHOLDERS} if others else {}
    marks = [
        torch.full((ROWS, count), _setting(model.config, *_placeholder(kind)))
        for kind, count in counts.items()
        if count
    ]
    if not marks:
        return {"input_ids": torch.cat([before, after], dim=1)}
    types = [torch.full((ROWS, count), PLACEHOLDERS[kind]) for kind, count in counts.items()]
    types = [torch.zeros_like(before), *types, torch.zeros_like(after)]
    made = {"input_ids": torch.cat([before, *marks, after], dim=1), "mm_token_type_ids": torch.cat(types, dim=1)}
    return {name: value for name, value in made.items() if name in names}


def _placeholder(kind: str) -> tuple[str, str]:
    """Names of the setting that holds the token in whose place a feature goes."""
    return f"{kind}_token_id", f"{kind}_token_index"


def _feature_count(model: Any, kind: str, others: Inputs) -> int:
    """Number of features that a model makes of images or sounds, for all rows; 0 where it has no place for them."""
    make = getattr(model, f"get_{kind}_features", None)
    if make is None or _setting(model.config, *_placeholder(kind)) is None:
        return 0
    taken = inspect.signature(make).parameters
    with torch.no_grad():
        found = make(**{name: _like(model, value) for name, value in others.items() if name in taken})
    pooled = getattr(found, "pooler_output", found)
    return sum(math.prod(each.shape[:-1]) for each in (pooled if isinstance(pooled, (list, tuple)) else [pooled]))


def _token_ids(config: Any, generator: torch.Generator, rows: int = ROWS, parts: tuple[str, ...] = TEXT) -> Tensor:
    """Random ids that mean text, with the end of the text where models look for it."""
    size = _setting(config, "vocab_size", parts=parts)
    places = _setting(config, "max_position_embeddings", "n_positions", "max_target_positions", parts=parts) or TOKENS
    special = _special_tokens(config)
    allowed = torch.tensor([token for token in range(size) if token not in special])
    chosen = torch.randint(0, len(allowed), (rows, min(TOKENS, max(places - 4, 1))), generator=generator)
    ids = allowed[chosen]
    end = _setting(config, "eos_token_id", parts=parts)
    end = end[0] if isinstance(end, list) else end
    if end is not None and 0 <= end < size:
        ids[:, -1] = end
    return ids


def _decoder_ids(config: Any, generator: torch.Generator, rows: int) -> Tensor:
    parts = ("decoder", *TEXT)
    ids = _token_ids(config, generator, rows, parts)
    starts = (_setting(config, name, parts=parts) for name in ("decoder_start_token_id", "bos_token_id"))
    ids[:, 0] = next((start for start in starts if start is not None), 0)
    return ids


def _pixels(config: Any, names: set[str], generator: torch.Generator, frames_first: bool) -> Inputs:
    size = _setting(config, "image_size", "crop_size", parts=IMAGE) or SIDE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = [_setting(config, "num_channels", "in_channels", "in_chans", parts=IMAGE) or 3, height, width]
    name = "pixel_values" if "pixel_values" in names else "pixel_values_videos"
    if frames_first or name == "pixel_values_videos":
        shape.insert(0, _setting(config, "num_frames", "frames_per_clip", parts=IMAGE) or 1)
    return {name: torch.randn(ROWS, *shape, generator=generator)}


def _patches(config: Any, generator: torch.Generator) -> Inputs:
    """Flattened patches of one small image for each row, as the processors of Qwen2-VL and its successors make them."""
    side = 2 * (_setting(config, "spatial_merge_size", parts=IMAGE) or 1)
    channels = _setting(config, "in_channels", "in_chans", parts=IMAGE) or 3
    values = channels * (_setting(config, "temporal_patch_size", parts=IMAGE) or 1)
    values *= _setting(config, "patch_size", parts=IMAGE) ** 2
    patches = torch.randn(ROWS * side * side, values, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]] * ROWS)}


def _features(config: Any, generator: torch.Generator, frames_first: bool) -> Tensor:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim")
    bins = _setting(config, *names, parts=AUDIO)
    length = TOKENS * 8 if frames_first else 2 * _setting(config, "max_source_positions", parts=AUDIO)  # a stride of 2
    made = torch.randn(ROWS, length, bins, generator=generator)
    return made if frames_first else made.mT.contiguous()


def _waveforms(config: Any, generator: torch.Generator) -> Tensor:
    """A waveform of each row, or a spectrogram for models that take one under this name."""
    bins, length = _setting(config, "num_mel_bins", parts=AUDIO), _setting(config, "max_length", parts=AUDIO)
    shape = (length, bins) if bins and length else (SAMPLES,)
    return torch.randn(ROWS, *shape, generator=generator)


def _special_tokens(config: Any) -> set[int]:
    found: set[int] = set()
    for part in _configs(config, ()):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                found.update(value if isinstance(value, list) else () if value is None else (value,))
    return found


def _setting(config: Any, *names: str, parts: tuple[str, ...] = ()) -> Any:
    """The first setting of these names in a config and the configs in it; None if there is none.

    Args:
        config: the model's config.
        names: names of the setting in different architectures.
        parts: words in the names of the configs to look into first.
    """
    for found in _configs(config, parts):
        for name in names:
            value = getattr(found, name, None)
            if value is not None:
                return value
    return None


def _configs(config: Any, parts: tuple[str, ...]) -> Iterator[Any]:
    from transformers import PreTrainedConfig

    inner = [(name, value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]
    first = [value for part in parts for name, value in inner if part in name]
    for value in first:
        yield from _configs(value, parts)
    yield config
    for _, value in inner:
        if not any(value is other for other in first):
            yield from _configs(value, parts)
