"""Loading of a model and its processor from a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.config import is_model_class, read_config
from ..checkpoint.model import class_name
from ..files.folder import INDEX, SINGLE, open_checkpoint
from ..files.recognize import check_text

PROCESSOR_FILES = ("*processor*.json", "tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Load a model in evaluation mode, in the class that its config names, and its processor.

    Args:
        folder: the folder of the model.
        dtype: "auto" (as stored) or the name of a dtype.

    Returns:
        The model, and its tokenizer, image processor, feature extractor, or a processor of several; None for none.

    Raises:
        FileNotFoundError: there is no config.json.
        OSError: a file cannot be read.
        TypeError: the model is quantized.
        ValueError: a file is damaged, transformers does not have the class that the config names, or the weights are
            not those of the model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        read_config(open_checkpoint(folder))  # finds damaged files, and sizes that no memory would suffice for
    check_text(folder / "config.json")
    factory = model_class(folder)
    try:
        model, found = factory.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{folder}: transformers does not load it: {type(error).__name__} {error}") from error
    _check_loaded(folder, model, found)
    return model.eval(), _load_processor(folder)


def _check_loaded(folder: Path, model: Any, found: Mapping[str, Any]) -> None:
    """Refuse a model that is made of random numbers instead of the weights in the folder."""
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ValueError(
            f"{folder}: tensor {name!r} has shape {tuple(stored)}, and the model of config.json has one of shape "
            f"{tuple(expected)}; give the config that belongs to the weights"
        )
    missing = sorted(found["missing_keys"])
    if 2 * len(missing) > len(list(model.parameters())):
        raise ValueError(
            f"{folder} does not have the weights of {type(model).__name__}: {missing[0]} and {len(missing) - 1} more "
            "are missing; set the class in config.json (architectures) to that of the weights"
        )


def model_class(folder: Path) -> Any:
    """The class that config.json names; AutoModel, which loads a model without a head, where it names none.

    Raises:
        TypeError, ValueError: as for :func:`load_model`.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ImportError):
        raise
    except Exception as error:
        if "trust_remote_code" not in str(error):
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"{folder / 'config.json'}: transformers makes no model of it: {reason}") from error
        raise ValueError(
            f"{folder / 'config.json'} names Python code that comes with the model, which the demo does not run; "
            "pissa-kernels init --trust-remote-code initializes its checkpoint"
        ) from None
    if getattr(config, "quantization_config", None):
        raise TypeError(f"{folder} is quantized; PiSSA takes the float checkpoint that it was made from")
    name = class_name({"architectures": config.architectures}, folder / "config.json") or "AutoModel"
    if name != "AutoModel" and not is_model_class(getattr(transformers, name, None)):
        raise ValueError(
            f"{folder / 'config.json'} names the class {name}, which transformers {transformers.__version__} does not "
            "have; set its architectures to a class that it has"
        )
    return getattr(transformers, name)


def _load_processor(folder: Path) -> Any:
    import transformers

    if not any(next(folder.glob(pattern), None) for pattern in PROCESSOR_FILES):
        return None  # of nothing, transformers makes an empty tokenizer for some models
    for kind in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
        with contextlib.suppress(Exception):  # whatever files of another kind or version raise
            processor = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if not isinstance(processor, transformers.PreTrainedTokenizerBase) or processor("text")["input_ids"]:
                return processor
    return None
