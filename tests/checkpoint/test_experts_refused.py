"""What init refuses of target_parameters and of stacks of experts: in one line, and nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Interleave, WeightConverter

import pissa_kernels as pk
from pissa_kernels.checkpoint.options import AdapterOptions

from ..support.checkpoints import tensors
from ..support.experts import BOTH, moe, saved
from ..support.refusing import refused

W1 = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
NAME = r"model\.layers\.0\.mlp\.experts\.gate_up_proj"


@pytest.fixture(scope="module")
def pristine_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(moe("mixtral", torch.bfloat16, layers=1), tmp_path_factory.mktemp("moe") / "model", shard="1GB")


@pytest.fixture
def model(pristine_moe: Path, tmp_path: Path) -> Path:
    """One file, to be spoilt."""
    folder = tmp_path / "source" / "model"
    folder.mkdir(parents=True)
    for path in pristine_moe.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    values = load_file(model / "model.safetensors")
    change(values)
    save_file(values, model / "model.safetensors", {"format": "pt"})


def rename(values: dict[str, torch.Tensor], old: str, new: str) -> None:
    values[new] = values.pop(old)


def stack_twice(values: dict[str, torch.Tensor]) -> None:
    values["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(11, 48, 40, dtype=torch.bfloat16)


# by name: what is done to the checkpoint, words of the message
SPOILT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "an expert is missing": (
        lambda values: values.pop(W1.format(5)),
        rf"layer '{NAME}': 10 tensors match '\.experts\.\*\.w1\.weight', where the model has 11 experts: there is none "
        "of expert 5",
    ),
    "an expert has another number": (
        lambda values: rename(values, W1.format(5), W1.format(17)),
        rf"layer '{NAME}': 11 tensors match .*: there is none of expert 5",
    ),
    "an expert is there twice": (
        lambda values: values.update({W1.format("05"): values[W1.format(5)].clone()}),
        rf"layer '{NAME}': 12 tensors match .*: some experts have several",
    ),
    "one by one and fused": (stack_twice, rf"layer '{NAME}': transformers loads it from 23 tensors"),
    "a narrow expert": (
        lambda values: values.update({W1.format(5): torch.zeros(24, 39, dtype=torch.bfloat16)}),
        rf"layer '{NAME}': tensor '.*experts\.5\.w1\.weight' has shape \(24, 39\), others have \(24, 40\)",
    ),
    "all experts have more rows": (
        lambda values: values.update({W1.format(e): torch.zeros(26, 40, dtype=torch.bfloat16) for e in range(11)}),
        rf"layer '{NAME}': each expert has tensors of shape \(26, 40\) and \(24, 40\), and the model has \(48, 40\)",
    ),
    "integers": (
        lambda values: values.update({name: value.to(torch.int8) for name, value in values.items() if "w1" in name}),
        rf"layer '{NAME}': '.*w1.weight' is I8 and '.*w3.weight' is BF16; the adapter of its experts has one dtype",
    ),
    "all are integers": (
        lambda values: values.update({name: value.to(torch.int8) for name, value in values.items() if ".w" in name}),
        rf"layer '{NAME}': tensor '.*' is I8; PiSSA takes F32, F16 and BF16",
    ),
    "several dtypes": (
        lambda values: values.update({W1.format(3): values[W1.format(3)].float()}),
        rf"layer '{NAME}': '.*' is BF16 and '.*\.3\.w1\.weight' is F32",
    ),
    "NaN": (
        lambda values: values[W1.format(3)].fill_(float("nan")),
        rf"layer '{NAME}\[3\]', weight \(48, 40\): .*; the unfinished result is deleted: repair the weight, or leave "
        "the layer out of --target-parameters",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_experts(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = SPOILT[what]
    edit(model, change)
    refused(capsys, words, model, tmp_path / "out", "--target-parameters", "gate_up_proj")


# by name: options, words of the message
ARGUMENTS: dict[str, tuple[Sequence[str], str]] = {
    "no such name": (
        ["--target-parameters", "mlp.w1"],
        r"target_parameters: 'mlp\.w1' not found in the model; its stacks of matrices are "
        r"experts\.gate_up_proj experts\.down_proj",
    ),
    "a name that is near": (["--target-parameters", "gate_up_prj"], "did you mean 'gate_up_proj'"),
    "an expression": (["--target-parameters", ".*gate_up_proj"], "is a regular expression"),
    "twice": (["--target-parameters", "gate_up_proj", "gate_up_proj"], "names 'gate_up_proj' twice"),
    "two dimensions": (
        ["--target-parameters", "gate.weight"],
        r"'gate\.weight' matches 'model\.layers\.0\.mlp\.gate\.weight', which has shape \(11, 40\); it takes stacks of",
    ),
    "a linear layer": (["--target-parameters", "q_proj.weight"], r"q_proj\.weight', which has shape \(40, 40\)"),
    "a norm": (["--target-parameters", "input_layernorm.weight"], r"which has shape \(40,\)"),
    "nothing to exclude": (
        ["--target-parameters", "gate_up_proj", "--exclude-modules", "q_proj"],
        "exclude_modules leaves out modules, and target_parameters alone adapts none",
    ),
    "rank of a stack too high": (
        ["--target-parameters", "gate_up_proj", "--rank-pattern", "gate_up_proj=41"],
        rf"layer '{NAME}', 11 weights of \(48, 40\): .*1 ≤ r ≤ 40, got r=41",
    ),
    "a pattern of another parameter": (
        ["--target-parameters", "gate_up_proj", "--rank-pattern", "experts.down_proj=2"],
        r"rank_pattern: 'experts\.down_proj' matches .*, and none of them is adapted",
    ),
    "all-linear beside it": (
        ["--target-parameters", "gate_up_proj", "--target-modules", "all-linear"],
        r"here --target-modules k_proj o_proj q_proj v_proj, and stacks of matrices with --target-parameters "
        r"experts\.down_proj experts\.gate_up_proj",
    ),
    "all-linear by itself": (
        ["--target-modules", "all-linear"],
        r"--target-parameters experts\.down_proj experts\.gate_up_proj",
    ),
    "nothing": ([], r"layer 'model\.layers\.0\.mlp\.\w+' is a Mixtral.*--target-parameters experts\.down_proj"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_refused_options(what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = ARGUMENTS[what]
    refused(capsys, words, model, tmp_path / "out", *arguments)


def test_options_by_themselves() -> None:
    assert AdapterOptions(target_modules=(), target_parameters=("a",)).target_parameters == ("a",)
    with pytest.raises(TypeError, match="target_parameters must be names of parameters, got 3"):
        AdapterOptions(target_parameters=(3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_parameters has an empty name"):
        AdapterOptions(target_parameters=("",))
    with pytest.raises(ValueError, match="target_modules is empty"):
        AdapterOptions(target_modules=())


def test_names_that_peft_takes_for_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dense layer of DeepSeek has a down_proj; PEFT adapts the experts' stack in its place."""
    base = saved(moe("deepseek_v3"), tmp_path / "source" / "model")
    names = ["--target-modules", "q_a_proj", "down_proj"]
    refused(capsys, r"is a DeepseekV3\w+ whose down_proj has shape \(11, 40, 24\)", base, tmp_path / "out", *names)
    more = ["--target-parameters", "mlp.experts.down_proj"]
    refused(capsys, "PEFT adapts the parameters down_proj in place of", base, tmp_path / "out", *names, *more)


def test_a_single_transposed_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = moe("gpt_oss", experts=1)
    base = saved(model, tmp_path / "source" / "model")
    words = r"down_proj' has shape \(1, 24, 40\), a single matrix stored \(in, out\), to which PEFT adds the change"
    refused(capsys, words, base, tmp_path / "out", "--target-parameters", *BOTH)


def test_a_tied_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(moe("gpt_oss"), tmp_path / "source" / "model")
    made = transformers.GptOssForCausalLM.__init__

    def tied(self: Any, config: Any) -> None:
        made(self, config)
        first, second = (layer.mlp.experts for layer in self.model.layers)
        second.down_proj = first.down_proj

    monkeypatch.setattr(transformers.GptOssForCausalLM, "__init__", tied)
    words = r"layer 'model\.layers\.0\.mlp\.experts\.down_proj': the weight .* is tied to model\.layers\.1.*Leave the "
    refused(capsys, words + "layer out of target_parameters", base, tmp_path / "out", "--target-parameters", *BOTH)


def test_operations_that_are_not_undone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = conversion_mapping.get_checkpoint_conversion_mapping

    def interleaved(model_type: str) -> Any:
        transforms = found(model_type)
        if model_type == "mixtral":
            for transform in transforms:
                if isinstance(transform, WeightConverter) and len(transform.source_patterns) == 2:
                    transform.operations.append(Interleave(dim=1))
        return transforms

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", interleaved)
    words = (
        rf"layer '{NAME}': transformers makes it of 22 tensors by MergeModulelist\(dim=0\), Concatenate\(dim=1\), "
        r"Interleave\(dim=1\); init undoes a stack of the experts .*; leave it out of target_parameters"
    )
    refused(capsys, words, model, tmp_path / "out", "--target-parameters", "gate_up_proj")


def test_quantized_checkpoint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    refused(capsys, r"is quantized \(mxfp4\)", model, tmp_path / "out", "--target-parameters", "gate_up_proj")


# Layouts that are found


def test_transposed_on_loading(tmp_path: Path) -> None:
    """Qwen3-VL's file has (E, in, out), and its model (E, out, in)."""
    text = {
        "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 100, "num_experts": 11, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 10,
        "intermediate_size": 64, "pad_token_id": None,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 40}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": []})
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    base = tmp_path / "model"
    model.save_pretrained(base)

    def transpose(values: dict[str, torch.Tensor]) -> None:
        values |= {name: value.mT.contiguous() for name, value in values.items() if name.endswith(tuple(BOTH))}

    edit(base, transpose)
    (key,) = [name for name in tensors(base) if name.endswith("experts.gate_up_proj")]
    (stack,) = [value for name, value in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    assert tensors(base)[key].shape == (11, 40, 48)
    assert stack.shape == (11, 48, 40)
    report = pk.init_checkpoint(base, tmp_path / "out", rank=4, target_parameters=BOTH, progress=False)
    assert pk.verify_checkpoint(base, tmp_path / "out", progress=False) == []
    assert {layer.shape for layer in report.layers} == {(48, 40), (40, 24)}
    import peft

    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "out" / "pissa_init").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    exact = torch.linalg.svdvals(stack.detach().double())[:, :4]
    (layer,) = [found for found in report.layers if re.search("gate_up_proj$", found.name)]
    found = torch.stack([part.singular_values for part in layer.parts]).double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
