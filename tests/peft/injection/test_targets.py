"""What is refused before PEFT wraps a module; ranks of small layers; modules in several places; replicated layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.injection.wrapping import unwrap_aliases
from pissa_kernels.peft.layers.replicated import check_separate

from ...support.models import TARGETS, build, output
from ...support.reference import energy_deficit, realistic


def config(targets: Any, **changes: Any) -> peft.LoraConfig:
    settings = {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa", "target_modules": targets}
    return peft.LoraConfig(**(settings | changes))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def train(model: nn.Module) -> None:
    """Move the trainable parameters."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def siglip() -> Any:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return seeded(lambda: t.SiglipVisionModel(t.SiglipVisionConfig(hidden_size=32, intermediate_size=64, **settings)))


def vit() -> Any:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "num_labels": 2}
    return seeded(lambda: t.ViTForImageClassification(t.ViTConfig(hidden_size=32, intermediate_size=64, **settings)))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))


def pooled(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).pooler_output


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).logits


def assert_refused(model: nn.Module, settings: peft.LoraConfig, words: str, kind: type[Exception] = ValueError) -> None:
    """Refused with these words; the model has the modules and the weights that it had."""
    names = [name for name, _ in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pk.patch_peft() as report, pytest.raises(kind, match=words) as caught:
        peft.get_peft_model(model, settings)
    assert "\n" not in str(caught.value)
    assert report.layers == []
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Readers of a weight


def test_the_pooling_head_of_siglip_is_refused_and_can_be_left_out() -> None:
    model = siglip()
    expected = pooled(model)
    assert_refused(
        model,
        config("all-linear"),
        r"^layer 'head\.attention\.out_proj': MultiheadAttention 'head\.attention' reads.*"
        r"exclude_modules=\['head\.attention\.out_proj'\]",
    )
    with pk.patch_peft() as report:
        adapted = peft.get_peft_model(model, config("all-linear", exclude_modules=["head.attention.out_proj"]))
    assert len(report.layers) == 8
    assert difference(pooled(adapted), expected) <= 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_layers_before_a_refused_one_are_unchanged(dora: bool) -> None:
    names = [name for name, module in siglip().named_modules() if isinstance(module, nn.Linear)]
    assert names[-3:].count("head.attention.out_proj") == 1
    assert_refused(siglip(), config("all-linear", use_dora=dora), "out_proj")


def test_the_projection_of_an_attention_alone_is_refused() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.MultiheadAttention(32, 2))
    words = r"^layer '1\.out_proj': .*exclude_modules=\['1\.out_proj'\], or adapt the attention itself, .*\['1'\]"
    assert_refused(net, config(["0", "out_proj"]), words)


@pytest.mark.parametrize("target", ["linear1", "linear2", "out_proj", "self_attn"])
def test_the_fast_path_of_an_encoder_is_refused(target: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    before = encoder(ROWS)
    assert_refused(encoder, config([target]), rf"^layer 'layers\.0\..*{target}': .*exclude_modules")
    assert torch.equal(encoder(ROWS), before)


def test_the_feed_forward_part_of_a_decoder_is_right() -> None:
    decoder = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True).eval()
    before = decoder(ROWS, ROWS).detach()
    with pk.patch_peft() as report:
        model = peft.get_peft_model(decoder, config(["linear1", "linear2"]))
    assert len(report.layers) == 2
    assert difference(model(ROWS, ROWS).detach(), before) <= 1e-6


class Unconditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).to(self.head.weight.dtype)
        return nn.functional.linear(x, self.head.weight, self.head.bias)


class Conditional(Unconditional):
    fused = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return nn.functional.linear(self.first(x), self.head.weight, self.head.bias)
        return self.head(self.first(x))


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Conditional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.block.first.weight.T


def test_a_module_that_reads_the_weight_of_a_child_is_refused() -> None:
    assert_refused(Unconditional(), config(["first", "head"]), r"^layer 'head': the model \(Unconditional\) reads")
    assert_refused(nn.Sequential(Inside()), config(["first"]), r"^layer '0\.block\.first': Inside '0' reads")


def test_a_read_under_a_condition_is_warned_of() -> None:
    net = Conditional()
    before = net(ROWS).detach()
    with pk.patch_peft(), pytest.warns(UserWarning, match=r"^layer 'head' \(read by the model \(Conditional\)\): "):
        model = peft.get_peft_model(net, config(["first", "head"]))
    assert difference(model(ROWS).detach(), before) <= 1e-6


def mamba() -> Any:
    return t.MambaForCausalLM(t.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, state_size=4))


def wavlm() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return t.WavLMModel(t.WavLMConfig(**sizes))


@pytest.mark.parametrize(("make", "target"), [(mamba, "dt_proj"), (wavlm, "k_proj")])
def test_readers_in_transformers_are_refused(make: Any, target: str) -> None:
    assert_refused(make(), config([target], r=2), rf"^layer '.*{target}': .* reads the weight")


def test_all_layers_of_common_architectures_pass_without_a_warning() -> None:
    t5 = t.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, vocab_size=40)  # reads a weight's dtype
    bases = [build(name, layers=1) for name in ("gpt2", "llama", "mistral", "bert")]
    for base in [*bases, t.T5ForConditionalGeneration(t5)]:
        fan_in_fan_out = base.config.model_type == "gpt2"
        with pk.patch_peft() as report, warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning, message=".*(PiSSA|residual|exclude_modules)")
            peft.get_peft_model(base, config("all-linear", r=4, fan_in_fan_out=fan_in_fan_out))
        assert report.layers


# Options and parameters


def test_all_linear_adapts_the_experts_that_peft_targets_with_it() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    model = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(vocab_size=40, **sizes, **heads, **experts)).eval()
    before = output(model)
    with pk.patch_peft() as report:
        adapted = peft.get_peft_model(model, config("all-linear"))
    parts = {layer.name: len(layer.parts) for layer in report.layers}
    experts = "model.layers.0.mlp.experts"
    assert (parts[f"{experts}.gate_up_proj"], parts[f"{experts}.down_proj"]) == (4, 4)
    assert {name.rpartition(".")[2] for name in parts} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert difference(output(adapted), before) <= 1e-6


def variants() -> dict[str, Any]:
    lora = peft.tuners.lora.config
    blocks = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
    found = {"alora_invocation_tokens": [1, 2], "arrow_config": peft.ArrowConfig()}
    for option, kind, arguments in (
        ("use_bdlora", "BdLoraConfig", blocks),
        ("monteclora_config", "MontecloraConfig", {}),
        ("kasa_config", "KasaConfig", {}),
    ):
        if hasattr(lora, kind):
            found[option] = getattr(lora, kind)(**arguments)
    return found


@pytest.mark.parametrize("option", sorted(variants()))
def test_variants_that_do_not_start_at_the_weight_are_refused(option: str) -> None:
    settings = config(["q_proj", "v_proj"], task_type="CAUSAL_LM", **{option: variants()[option]})
    assert_refused(build("llama"), settings, rf"^init_lora_weights='pissa' cannot be combined with {option}: ")


@pytest.mark.parametrize("training", [False, True])
def test_velora_is_right(training: bool) -> None:
    kind = getattr(peft.tuners.lora.config, "VeloraConfig", None)
    if kind is None:
        pytest.skip("this version of PEFT has no VeLoRA")
    base = build("llama")
    before = output(base)
    with pk.patch_peft():
        model = peft.get_peft_model(base, config(["q_proj", "v_proj"], velora_config=kind(num_groups=4)))
    model.train(training)
    assert difference(output(model), before) <= 1e-6


def test_weight_norm_is_refused() -> None:
    net = nn.Sequential(nn.Linear(32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        nn.utils.weight_norm(net[0])
    assert_refused(net, config(["0"]), "^layer '0', .*computed from other parameters")


# Small layers


@pytest.mark.parametrize("rslora", [False, True])
def test_the_rank_of_a_small_layer_is_limited(rslora: bool) -> None:
    model, settings = vit(), config("all-linear", use_rslora=rslora, lora_alpha=16)
    expected, W = scores(model), model.classifier.weight.detach().double()
    with pk.patch_peft() as report, pytest.warns(UserWarning, match="the rank exceeds") as caught:
        adapted = peft.get_peft_model(model, settings)
    told = [str(warning.message) for warning in caught if "the rank exceeds" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("layer 'classifier', weight (2, 32): rank 2 instead of 8: ")
    assert "rank_pattern" in told[0]
    assert "exclude_modules" in told[0]
    assert {layer.name: layer.rank for layer in report.layers}["classifier"] == 2
    assert {layer.rank for layer in report.layers if layer.name != "classifier"} == {8}
    layer = adapted.base_model.model.classifier
    other = adapted.base_model.model.get_submodule(report.layers[0].name)
    assert layer.scaling["default"] == pytest.approx(other.scaling["default"], rel=1e-15)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.shape, B.shape) == ((2, 32), (2, 2))
    assert energy_deficit(W, A.detach()) <= 1e-6
    assert difference(scores(adapted), expected) <= 1e-6


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {".*dense": 4, "classifier": 16}}, {"r": 64}])
def test_an_adapter_of_limited_rank_loads_everywhere(patterns: dict[str, Any], tmp_path: Path) -> None:
    with pk.patch_peft(), pytest.warns(UserWarning, match="the rank exceeds"):
        model = peft.get_peft_model(vit(), config("all-linear", **patterns))
    pk.save_pissa(model, tmp_path / "residual")
    train(model)
    trained = scores(model)
    assert difference(trained, scores(vit())) > 1e-3
    model.save_pretrained(tmp_path / "trained")
    initial = str(tmp_path / "residual" / "pissa_init")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    with pk.patch_peft(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the rank exceeds")
        ours = peft.PeftModel.from_pretrained(vit(), tmp_path / "trained").eval()
    assert difference(scores(ours), trained) <= 1e-6
    stock = peft.PeftModel.from_pretrained(vit(), tmp_path / "trained").eval()
    assert difference(scores(stock), trained) <= 1e-4
    plain = peft.PeftModel.from_pretrained(vit(), tmp_path / "plain").eval()
    assert difference(scores(plain), trained) <= 1e-5
    residual = t.ViTForImageClassification.from_pretrained(tmp_path / "residual").eval()
    started = peft.PeftModel.from_pretrained(residual, tmp_path / "residual", subfolder="pissa_init").eval()
    assert difference(scores(started), scores(vit())) <= 1e-5


def test_a_refusal_takes_back_the_limited_ranks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.attention = nn.Linear(32, 3), nn.MultiheadAttention(32, 2)
            self.attention.in_proj_weight.data = self.attention.in_proj_weight.data.to(torch.float64)

    settings = config(["small", "attention"], rank_pattern={"nothing": 3})
    assert_refused(Net(), settings, "layer 'attention'", TypeError)
    assert (settings.rank_pattern, settings.alpha_pattern) == ({"nothing": 3}, {})


# Modules in several places


class Shared(nn.Module):
    """One layer under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.first.weight.data = realistic(32, 32).float() / 4
        self.alias = self.first
        self.listed = nn.ModuleList([self.first, nn.Linear(32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.listed[0](self.alias(self.first(x))) + self.listed[1](x)


def test_a_module_with_several_names_is_initialized_once(tmp_path: Path) -> None:
    net = seeded(Shared)
    before = net(ROWS).detach()
    with pk.patch_peft() as report:
        model = peft.get_peft_model(net, config(["first"]))
    assert [layer.name for layer in report.layers] == ["first"]
    inner = model.base_model.model
    assert inner.first is inner.alias is inner.listed[0]
    assert type(inner.listed[1]) is nn.Linear
    assert difference(model(ROWS).detach(), before) <= 1e-6
    with torch.no_grad(), pk.original_model(model):
        assert difference(model(ROWS), before) <= 1e-6
    train(model)
    trained = model(ROWS).detach()
    model.save_pretrained(tmp_path)
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(seeded(Shared), tmp_path)
    assert torch.equal(loaded(ROWS), trained)


def test_the_module_comes_back_under_every_name() -> None:
    net = seeded(Shared)
    first = net.first
    with pk.patch_peft():
        model = peft.get_peft_model(net, config(["first"]))
    train(model)
    trained = model(ROWS).detach()
    merged = model.merge_and_unload()
    unwrap_aliases(merged)
    assert merged.first is merged.alias is merged.listed[0] is first
    assert difference(merged(ROWS).detach(), trained) <= 1e-6


def test_a_refusal_takes_back_every_name() -> None:
    class Attending(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2)
            self.attention.in_proj_weight.data = self.attention.in_proj_weight.data.to(torch.float64)

    net = Attending()
    assert_refused(net, config(["first", "attention"]), "layer 'attention'", TypeError)
    assert net.alias is net.first
    assert net.listed[0] is net.first


def test_a_block_that_is_repeated_is_initialized_once() -> None:
    block = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    net = nn.Sequential(block, block, block)
    before = net(ROWS).detach()
    with pk.patch_peft() as report:
        model = peft.get_peft_model(net, config(["0.0"]))
    assert len(report.layers) == 1
    assert difference(model(ROWS).detach(), before) <= 1e-6


# Replicated layers


def replicated(**changes: Any) -> peft.LoraConfig:
    return config(TARGETS["llama"], layer_replication=[(0, 2), (1, 2)], **changes)


def replicated_output(**changes: Any) -> torch.Tensor:
    """What the longer model computes before PiSSA."""
    return output(peft.get_peft_model(build("llama"), replicated(init_lora_weights=True, **changes)).eval())


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init_lora_weights": "pissa_niter_4"}])
@pytest.mark.parametrize("batch", [True, False])
def test_replicated_layers_share_the_residual(changes: dict[str, Any], batch: bool) -> None:
    base = build("llama")
    weights = [
        module.weight.detach().double() for module in base.model.layers[1].mlp.children() if hasattr(module, "weight")
    ]
    with pk.patch_peft(batch=batch) as report:
        model = peft.get_peft_model(base, replicated(**changes)).eval()
    assert [layer.name for layer in report.layers].count("model.layers.2.mlp.up_proj") == 1
    assert len(report.layers) == 3 * 7
    expected = replicated_output(**{key: value for key, value in changes.items() if key == "use_dora"})
    assert difference(output(model), expected) <= 2e-6
    second, third = (model.base_model.model.model.layers[index].mlp for index in (1, 2))
    for name, W in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
        one, other = getattr(second, name), getattr(third, name)
        assert one.weight is other.weight
        assert one.lora_A["default"].weight.data_ptr() != other.lora_A["default"].weight.data_ptr()
        for layer in (one, other):
            A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            assert (W - layer.weight.double() - B @ A).norm() <= 1e-6 * W.norm()


def test_replicated_layers_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama"), replicated()).eval()
    train(model)
    trained = output(model)
    with torch.no_grad(), pk.original_model(model):
        assert difference(output(model), replicated_output()) <= 2e-6
    model.save_pretrained(tmp_path)
    with pk.patch_peft() as report:
        loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert len(report.layers) == 3 * 7
    assert torch.equal(output(loaded), trained)


def test_replicated_layers_are_not_merged() -> None:
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama"), replicated())
    with pytest.raises(ValueError, match=r"^layer 'model\.layers\.2\..*shares its weight with 'model\.layers\.1\."):
        check_separate(model)
    with pk.patch_peft():
        check_separate(peft.get_peft_model(build("llama"), config(TARGETS["llama"])))
        check_separate(peft.get_peft_model(seeded(Shared), config(["first"])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_pattern": {"layers.2.mlp.up_proj": 4}}, "shares its weight with .*layer_replication.*equal settings"),
        ({"alpha_pattern": {"layers.2.mlp.up_proj": 4}}, "shares its weight with .*layer_replication.*equal settings"),
        ({"layers_to_transform": [0, 1]}, r"tied to model\.layers\.2\..*every copy"),
    ],
)
def test_replicated_layers_that_cannot_share_are_refused(changes: dict[str, Any], words: str) -> None:
    base = build("llama")
    weights = [layer.mlp.up_proj.weight for layer in base.model.layers]
    before = [weight.detach().clone() for weight in weights]
    with pk.patch_peft() as report, pytest.raises(ValueError, match=rf"^layer 'model\.layers\.\d\..*{words}"):
        peft.get_peft_model(base, replicated(**changes))
    assert report.layers == []
    assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
