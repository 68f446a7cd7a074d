"""Loading of a model and its processor from a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

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
        TypeError: the model is quantized.
        ValueError: transformers does not have the class that the config names.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    factory = model_class(folder)
    model = factory.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False).eval()
    return model, _load_processor(folder)


def model_class(folder: Path) -> Any:
    """The class that config.json names; AutoModel, which loads a model without a head, where it names none.

    Raises:
        TypeError, ValueError: as for :func:`load_model`.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder / 'config.json'} names Python code that comes with the model, which the demo does not run; "
            "pissa-kernels init --trust-remote-code initializes its checkpoint"
        ) from None
    if getattr(config, "quantization_config", None):
        raise TypeError(f"{folder} is quantized; PiSSA takes the float checkpoint that it was made from")
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    if not hasattr(transformers, name):
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
