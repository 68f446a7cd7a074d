"""Models that the demo takes: inputs, layers, bounds, and what it says of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from pissa_kernels.cli.main import main
from pissa_kernels.examples import initializers
from pissa_kernels.examples.demo import run_demo
from pissa_kernels.examples.inputs import SENTENCES, model_inputs
from pissa_kernels.examples.layers import choose_layers
from pissa_kernels.examples.loading import load_model

from ..support.architectures import ARCHITECTURES, GROUPED, IMAGE, TEXT

pytestmark = pytest.mark.usefixtures("one_thread_and_few_collections")


def saved(name: str, folder: Path, *processors: Any) -> Path:
    for part in (ARCHITECTURES[name].build(), *processors):
        part.save_pretrained(folder)
    return folder


def inputs_of(folder: Path) -> dict[str, torch.Tensor]:
    return model_inputs(*load_model(folder, "auto"))


def word_tokenizer(*others: str) -> Any:
    """A tokenizer of the words of the demo's sentences, with id 98 for the last of ``others``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for sentence in SENTENCES for word in sentence.replace(".", " .").split()})
    names = ["<pad>", "?", *words]
    vocabulary = {word: index for index, word in enumerate(names)} | dict.fromkeys(others, 98)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", pad_token="<pad>", additional_special_tokens=list(others)
    )


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """The one line with which the demo refuses its arguments."""
    capsys.readouterr()
    assert main(["demo", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pissa-kernels: error: ")
    return line


# Inputs


def test_an_image_processor_makes_the_inputs(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    pixels = inputs_of(saved("vit", tmp_path, processor))["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.abs().max() <= 1, "normalized from bytes"


def test_the_processor_is_saved_with_the_model(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    out = tmp_path / "out"
    result = run_demo(saved("vit", tmp_path / "model", processor), rank=4, compare=False, out=out)
    assert result.holds
    assert transformers.AutoImageProcessor.from_pretrained(out).size == {"height": 32, "width": 32}


def test_an_image_processor_of_another_model_is_passed_over(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
    assert inputs_of(saved("vit", tmp_path, processor))["pixel_values"].shape == (2, 3, 32, 32)


def test_a_feature_extractor_makes_the_inputs(tmp_path: Path) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=1000)
    assert inputs_of(saved("wav2vec2", tmp_path, extractor))["input_values"].shape == (2, 1000)


def test_a_processor_of_text_and_images_makes_the_inputs(tmp_path: Path) -> None:
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        tokenizer=word_tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    inputs = inputs_of(saved("llava", tmp_path, processor))
    assert (inputs["input_ids"] == 98).sum(dim=1).tolist() == [16, 16]
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert (inputs["input_ids"][0, 16:] != 98).all(), "the sentence follows"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_are_the_same_in_every_run(dtype: str, tmp_path: Path) -> None:
    folder = saved("clip", tmp_path)
    model, processor = load_model(folder, dtype)
    first, second = model_inputs(model, processor), model_inputs(model, processor)
    assert first.keys() == second.keys() == {"input_ids", "pixel_values"}
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["pixel_values"].dtype == model.dtype


def test_a_model_of_other_inputs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.DecisionTransformerConfig(
        hidden_size=16, n_layer=1, n_head=2, state_dim=3, act_dim=2, n_inner=16
    )
    transformers.DecisionTransformerModel(config).save_pretrained(tmp_path)
    line = one_line(capsys, tmp_path)
    assert "cannot make inputs for DecisionTransformerModel, whose main input is states" in line
    assert "pissa-kernels init" in line


# Classes


def config_without(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}), encoding="utf-8")


def test_a_class_that_transformers_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama", tmp_path / "model")
    config_without(folder, architectures=["LlamaForNothing"])
    assert "config.json names the class LlamaForNothing, which transformers" in one_line(capsys, folder)


def test_a_quantized_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama", tmp_path / "model")
    config_without(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantized (gptq); PiSSA takes the float checkpoint" in one_line(capsys, folder)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "model.safetensors is a Git LFS pointer and not the file itself",
    ),
    "a download cut short": (
        lambda folder: os.truncate(folder / "model.safetensors", 20_000), "model.safetensors is damaged or truncated"
    ),
    "layers without end": (
        lambda folder: config_without(folder, num_hidden_layers=10**7), "num_hidden_layers is 10000000, but the check"
    ),
    "a config of other sizes": (
        lambda folder: config_without(folder, vocab_size=7), "has shape (99, 32), and the model of config.json has one"
    ),
    "a string for a size": (
        lambda folder: config_without(folder, hidden_size="x"), "config.json: transformers makes no model of it: Stri"
    ),
    "a string for classes": (
        lambda folder: config_without(folder, architectures="LlamaModel"), "architectures is 'LlamaModel'; accepted is"
    ),
    "a class of no model": (
        lambda folder: config_without(folder, architectures=["Trainer"]), "names the class Trainer, which transformers"
    ),
    "weights of another model": (
        lambda folder: save_file({"x": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"}),
        "does not have the weights of LlamaForCausalLM: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_models_are_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama", tmp_path / "model")
    damage, words = DAMAGED[what]
    damage(folder)
    assert words in one_line(capsys, folder, "--rank", 4)


@pytest.mark.slow
def test_warnings_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As that of a layer that is narrower than the rank."""
    folder = saved("llama", tmp_path / "model")
    command = [sys.executable, "-m", "pissa_kernels", "demo", str(folder), "--rank", "1000", "--no-compare"]
    assert subprocess.run(command, check=False).returncode == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("pissa-kernels: warning: ") for line in lines)
    command += ["--target-modules", "embed_tokens"]
    assert subprocess.run(command, check=False).returncode == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "is a Embedding, and the demo compares linear layers" in line


def test_without_a_class_the_model_has_no_head(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    config_without(folder, architectures=None)
    model, _ = load_model(folder, "auto")
    assert type(model) is transformers.LlamaModel
    assert run_demo(folder, rank=4, compare=False).holds


# Layers


def test_all_linear_and_a_name() -> None:
    model = ARCHITECTURES["llama"].build()
    chosen = set(choose_layers(model, ["all-linear", "lm_head"], called=()).target_modules)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert chosen == linear


def test_a_name_that_no_module_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama", tmp_path)
    assert "'typo'" in one_line(capsys, folder, "--target-modules", "q_proj", "typo")
    assert "is not a regular expression" in one_line(capsys, folder, "--target-modules", "(q_proj")


def test_a_regular_expression(tmp_path: Path) -> None:
    result = run_demo(saved("llama", tmp_path), rank=4, target_modules=r".*\.0\..*_proj", compare=False)
    assert len(result.layers) == 7
    assert result.holds


def test_a_layer_that_is_named_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("siglip_vision", tmp_path)
    for others in ("fc1", "all-linear"):
        line = one_line(capsys, folder, "--target-modules", others, "head.attention.out_proj")
        assert "'head.attention' reads the weight of this layer" in line
    assert "embed_tokens" in one_line(capsys, saved("llama", tmp_path / "llama"), "--target-modules", "embed_tokens")


def test_a_model_without_linear_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    assert "ResNetModel has no linear layer that PiSSA could initialize" in one_line(capsys, tmp_path)


@pytest.mark.parametrize("named", ["linear", "long.linear"])
def test_a_left_out_layer_whose_name_ends_others(named: str) -> None:
    """PEFT takes a name for every module that ends with it, so names alone would leave out too much."""

    class Reading(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.MultiheadAttention(8, 2).out_proj
            self.long = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 8)})
            if named == "long.linear":
                self.long.linear.weight = self.linear.weight
            self.other = torch.nn.Linear(8, 8)

        def get_output_embeddings(self) -> None: ...

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.long["linear"](torch.nn.functional.linear(x, self.linear.weight)))

    import peft

    choice = choose_layers(Reading(), "all-linear", called=())
    config = peft.LoraConfig(r=2, target_modules=choice.target_modules, exclude_modules=choice.exclude_modules)
    adapted = peft.inject_adapter_in_model(config, Reading())
    layers = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    expected = {"other", "long.linear"} if named == "linear" else {"other"}
    assert layers == expected
    assert choice.left_out.keys() == {"linear", "long.linear", "other"} - expected


def test_shared_experts_beside_fused_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT takes the names of shared experts' layers for those of the fused experts."""
    config = transformers.DeepseekV3Config(
        **TEXT, moe_intermediate_size=24, num_experts_per_tok=2, n_routed_experts=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    assert main(["demo", str(tmp_path), "--rank", "4", "--no-compare"]) == 0
    printed = capsys.readouterr().out
    assert "left out: model.layers.*.mlp.experts: DeepseekV3Experts keeps the weights of all experts" in printed
    (line,) = [line for line in printed.splitlines() if "PEFT takes its name for that of fused experts" in line]
    assert "model.layers.*.mlp.shared_experts.gate_proj" in line
    assert "model.layers.1.self_attn.q_b_proj" in printed


def test_a_layer_whose_weight_is_read_under_some_condition(tmp_path: Path) -> None:
    """Jamba's mixer calls one layer, or reads its weight, as its type tells."""
    config = transformers.JambaConfig(
        **GROUPED, num_experts=2, mamba_d_state=4, mamba_dt_rank=8, attn_layer_period=2, attn_layer_offset=1,
        use_mamba_kernels=False,
    )  # fmt: skip
    transformers.JambaForCausalLM(config).save_pretrained(tmp_path)
    result = run_demo(tmp_path, rank=4, compare=False)
    assert result.holds
    assert not result.rounding_measured
    assert "model.layers.0.mamba.dt_proj" in result.left_out
    assert "model.layers.0.mamba.in_proj" in {layer.name for layer in result.layers}


def test_layers_that_the_inputs_do_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("llava", tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no images today")

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "get_image_features", fail)
    assert main(["demo", str(folder), "--rank", "4", "--no-compare"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not called with these inputs")]
    assert "model.vision_tower.encoder.layers.*.mlp.fc1" in line
    assert "model.language_model" not in line


# Bounds


def test_rounding_that_a_model_amplifies_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Large attention scores in many layers let differences grow tenfold. A wrong adapter is found all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 12}))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=4 * parameter.shape[1] ** -0.5)
    model.save_pretrained(tmp_path)
    result = run_demo(tmp_path, rank=4, compare=False)
    simple = 8 * 2.0**-24 * len(result.layers) ** 0.5
    assert simple < result.output_moved <= result.output_allowed < 50 * simple
    assert result.rounding_measured
    assert result.holds
    # by how much the output moves when weights are rounded: those of the model in another precision
    with torch.no_grad():
        ids = {"input_ids": torch.arange(5, 21)[None]}
        exact = model.eval().double()(**ids).logits
        own = float((model.float()(**ids).logits.double() - exact).norm() / exact.norm())
    assert own > simple / 8, "the model amplifies rounding without any adapter"
    assert main(["demo", str(tmp_path), "--rank", "4", "--no-compare"]) == 0
    assert "rounding, measured on this model, which amplifies it," in capsys.readouterr().out


def test_a_wrong_adapter_of_a_vision_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pissa_kernels.examples import demo

    inject = demo.inject

    def spoiled(*arguments: Any) -> Any:
        model, seconds = inject(*arguments)
        if arguments[2] == "pissa":
            model.base_model.model.vit.layers[0].attention.q_proj.lora_B["default"].weight.data *= 1.01
        return model, seconds

    monkeypatch.setattr(demo, "inject", spoiled)
    result = run_demo(saved("vit", tmp_path), rank=4, compare=False)
    assert not result.output_holds
    assert result.reconstruction > 1


def test_a_model_that_returns_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**IMAGE))
    model.embeddings.cls_token.data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    assert "returns NaN in last_hidden_state without an adapter" in one_line(capsys, tmp_path)


# PEFT's own


def test_an_initializer_of_peft_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inject = initializers.inject

    def failing(model: Any, rank: int, init: Any, choice: Any) -> Any:
        if init == "pissa":
            raise RuntimeError("linalg.svd:\nno convergence")
        return inject(model, rank, init, choice)

    monkeypatch.setattr(initializers, "inject", failing)
    monkeypatch.setattr(initializers, "patch_peft", lambda: pytest.fail("ours is not timed again"))
    monkeypatch.setattr(initializers, "REPEAT_BELOW_SECONDS", 0)
    assert main(["demo", str(saved("vit", tmp_path)), "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert "PEFT pissa fails: RuntimeError: linalg.svd: no convergence" in printed.splitlines()
    (row,) = [line for line in printed.splitlines() if line.startswith("PEFT pissa ")][:1]
    assert row.split() == ["PEFT", "pissa", "fails"]
