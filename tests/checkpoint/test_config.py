"""config.json: what transformers cannot make a model of is refused in one line, and a missing class is found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import pissa_kernels as pk
from pissa_kernels.checkpoint.plan import plan_checkpoint
from pissa_kernels.checkpoint.targets import AdapterOptions

from ..support.checkpoints import tied_llama
from ..support.models import build, output
from ..support.refusing import refused

# by name: changes of the config, and words of the message
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a string for a flag": ({"use_cache": "true"}, "'use_cache' expected bool, got str"),
    "null for a size": ({"num_hidden_layers": None}, "'num_hidden_layers' expected int, got NoneType"),
    "a negative size": ({"hidden_size": -1}, "transformers makes no model of it: .*hidden size .-1"),
    "fewer layers than none": ({"num_hidden_layers": -1}, "num_hidden_layers is -1, which is negative"),
    "no heads": ({"num_attention_heads": 0}, "transformers makes no model of it: ZeroDivisionError"),
    "a size above all tensors": ({"hidden_size": 10**30}, "hidden_size is 10{30}, but all tensors together have only"),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 10{9}, but the checkpoint has only 12"),
    "more layers than tensors": ({"num_hidden_layers": 9000}, "more than 11200 modules and parameters, and few"),
    "a size inside": ({"text_config": {"n_embd": 10**9}}, r"text_config\.n_embd is 10{9}, but"),
    "an unknown activation": ({"hidden_act": "grelu"}, "hidden_act is 'grelu', which it does not know"),
    "an unknown rope": ({"rope_scaling": {"type": "x"}}, r"rope_scaling\.type is 'x', which it does not know"),
    "an unknown dtype": ({"dtype": "float99"}, "AttributeError module 'torch' has no attribute 'float99'"),
    "an unknown model": ({"model_type": "llamma"}, "has model type `llamma` but Transformers does not recognize"),
    "a number for a model": ({"model_type": 3}, "transformers makes no model of it"),
    "an unknown class": ({"architectures": ["LlamaForCausalLLM"]}, "names the class LlamaForCausalLLM, which"),
    "no class of a model": ({"architectures": ["Trainer"]}, "names the class Trainer, which transformers"),
    "a function for a class": ({"architectures": ["pipeline"]}, "names the class pipeline, which transformers"),
    "a class of another model": ({"architectures": ["WhisperModel"]}, "transformers makes no model of it"),
    "a string for classes": ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; accepted"),
    "a number among classes": ({"architectures": [7]}, r"architectures is \[7\]; accepted is a list"),
    "an empty quantization": ({"quantization_config": {}}, "quantization_config is empty, and transformers refuses it"),
    "a list for a quantization": ({"quantization_config": [1]}, r"is quantized \(quantization_config\)"),
}
# what is no object at all
BROKEN = {
    "an array": "[1]",
    "a number": "3",
    "cut short": '{"model_type": "llama"',
    "nested": "[" * 100_000,
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("changes", WRONG)
def test_wrong_values_are_one_line(
    changes: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | WRONG[changes][0]))
    began = time.perf_counter()
    words = WRONG[changes][1]
    refused(capsys, words if words.startswith("is quant") else rf"{path}:? .*{words}", model, tmp_path / "out")
    assert time.perf_counter() - began < 20


def test_tensors_of_other_shapes_are_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 101}))
    words = r"tensor 'model\.embed_tokens\.weight' has shape \(100, 32\), and the model of config.json has one of shape"
    refused(capsys, words, model, tmp_path / "out")


def test_an_empty_config_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_bytes(b"")
    refused(capsys, f"{model}/config.json is empty; download it again", model, tmp_path / "out")


@pytest.mark.parametrize("text", BROKEN)
def test_broken_configs_are_one_line(
    text: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "config.json"
    path.write_bytes(BROKEN[text].encode(errors="surrogateescape"))
    refused(capsys, f"{path} is not the config of a model: ", model, tmp_path / "out")


def test_lists_in_auto_map_are_for_tokenizers(model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    record = json.loads(path.read_text())
    record["auto_map"] = {"AutoTokenizer": ["tokenization.Slow", None]}
    path.write_text(json.dumps(record))
    assert len(pk.init_checkpoint(model, tmp_path / "out", rank=2, progress=False).layers) == 7


def no_class(folder: Path) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    del record["architectures"]
    path.write_text(json.dumps(record))


def classes() -> dict[str, Any]:
    """Models whose class is to be found again."""
    t = transformers
    vision = t.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = {"vocab_size": 50, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    bert = build("bert", width=32, layers=1).config
    return {
        "LlamaForCausalLM": build("llama", width=32, layers=1),
        "tied LlamaForCausalLM": tied_llama(),
        "BertModel": t.BertModel(bert),
        "BertForMaskedLM": t.BertForMaskedLM(bert),
        "BertForSequenceClassification": t.BertForSequenceClassification(bert),
        "GPT2LMHeadModel": build("gpt2", width=32, layers=1),
        "T5ForConditionalGeneration": t.T5ForConditionalGeneration(t.T5Config(**text)),
        "ViTForImageClassification": t.ViTForImageClassification(vision),
    }


@pytest.mark.parametrize("name", list(classes()))
def test_a_missing_class_is_found_by_the_tensors(name: str, tmp_path: Path) -> None:
    """Without a class, transformers makes its base model, on whose module names PEFT would find no layer later."""
    original = classes()[name].eval()
    original.save_pretrained(tmp_path / "model")
    with_class = plan_checkpoint(tmp_path / "model", tmp_path / "out", AdapterOptions(rank=2))
    no_class(tmp_path / "model")
    without = plan_checkpoint(tmp_path / "model", tmp_path / "out", AdapterOptions(rank=2))
    assert [target.name for target in without.adapter.targets] == [target.name for target in with_class.adapter.targets]
    assert without.adapter.config["task_type"] == with_class.adapter.config["task_type"]


def test_the_adapter_of_a_missing_class_fits_what_people_load(tmp_path: Path) -> None:
    original = tied_llama()
    original.save_pretrained(tmp_path / "model")
    no_class(tmp_path / "model")
    report = pk.init_checkpoint(tmp_path / "model", tmp_path / "out", rank=4, progress=False)
    assert report.notes == ("config.json names no class; the tensors are those of LlamaForCausalLM, which is taken",)
    residual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out", subfolder="pissa_init").eval()
    expected = output(original)
    assert (output(residual) - expected).norm() < 2e-6 * expected.norm()  # the residual has the adapter's layers now
    assert (output(loaded) - expected).norm() < 2e-6 * expected.norm()


# The class that a config names where the tensors are those of another, and the class that people load.
OTHERS = {
    "a head in the file alone": ("LlamaForCausalLM", "LlamaModel", transformers.AutoModelForCausalLM),
    "a head in the config alone": ("LlamaModel", "LlamaForCausalLM", transformers.AutoModel),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_class_of_the_tensors_is_taken_if_another_is_named(case: str, tmp_path: Path) -> None:
    stored, named, loader = OTHERS[case]
    original = getattr(transformers, stored)(build("llama", width=32, layers=1).config).eval()
    original.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [named]}))
    report = pk.init_checkpoint(tmp_path / "model", tmp_path / "out", rank=4, progress=False)
    assert report.notes == (f"config.json names {named}; the tensors are those of {stored}, which is taken",)
    residual = loader.from_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(residual, tmp_path / "out", subfolder="pissa_init").eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected, found = original(input_ids=ids)[0], loaded(input_ids=ids)[0]
    assert (found - expected).norm() < 2e-6 * expected.norm()


def test_a_tied_head_under_the_names_of_the_model_without_it(tmp_path: Path) -> None:
    """As in the checkpoint of GPT-2: the class that the config names is right, although it adds a prefix."""
    build("gpt2", width=32, layers=1).transformer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    job = plan_checkpoint(tmp_path / "model", tmp_path / "out", AdapterOptions(rank=2))
    assert job.notes() == ()
    assert all(target.name.startswith("transformer.h.") for target in job.adapter.targets)


def test_kernels_of_attention_are_not_needed(model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_attn_implementation": "flash_attention_2"}))
    assert len(plan_checkpoint(model, tmp_path / "out", AdapterOptions(rank=2)).adapter.targets) == 7


def test_remote_code_that_ends_the_process(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", leave)
    refused(capsys, "config.json: transformers makes no model of it: SystemExit 3", model, tmp_path / "out")


def test_a_class_that_nothing_fits_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_class(model)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    refused(
        capsys,
        f"{path} names no class, and none of model type 'llama' has the checkpoint's tensors; add the class as "
        r'"architectures" \(LlamaForCausalLM, ',
        model,
        tmp_path / "out",
    )


def test_the_default_device_is_as_before(model: Path, tmp_path: Path) -> None:
    plan_checkpoint(model, tmp_path / "out", AdapterOptions(rank=2))
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.nn.Linear(2, 2).weight.device == torch.device("cpu")
