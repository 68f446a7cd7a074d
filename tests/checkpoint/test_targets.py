"""Which layers init adapts: all that was asked for, nothing else, and only those whose adapter the model uses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_model

import pissa_kernels as pk
from pissa_kernels.checkpoint.options import AdapterOptions
from pissa_kernels.checkpoint.selection import read_past
from pissa_kernels.cli import main as cli

from ..support.checkpoints import layers, tensors
from ..support.refusing import refused

QUERY = "model.layers.0.self_attn.q_proj"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def loaded(out: Path, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    base = auto.from_pretrained(out, dtype=torch.float32, **options)
    return peft.PeftModel.from_pretrained(base, out, subfolder="pissa_init").eval()


def adapted(model: Any) -> list[str]:
    """The layers that PEFT adapts."""
    kind = peft.tuners.lora.LoraLayer
    return [name.removeprefix("base_model.model.") for name, layer in model.named_modules() if isinstance(layer, kind)]


# What is asked for


@pytest.mark.parametrize("options", [["all-linear", "lm_head"], ["lm_head", "All-Linear"]])
def test_all_linear_and_a_name_are_both_adapted(options: list[str], pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["init", str(pristine), str(out), "--rank", "4", "--target-modules", *options]) == 0
    found = [layer["name"] for layer in layers(out)]
    assert [name.rpartition(".")[2] for name in found] == [*LINEAR, "lm_head"]
    assert adapted(loaded(out)) == found


def test_options_that_are_given_twice_add_up(pristine: Path, tmp_path: Path) -> None:
    names = ["--target-modules", "q_proj", "--target-modules", "v_proj", "--rank-pattern", "q_proj=2"]
    assert (
        cli.main(["init", str(pristine), str(tmp_path / "out"), "--rank", "4", *names, "--rank-pattern", "v_proj=3"])
        == 0
    )
    assert [(layer["name"][-6:], layer["rank"]) for layer in layers(tmp_path / "out")] == [("q_proj", 2), ("v_proj", 3)]


def test_a_module_that_is_no_target_may_be_excluded(pristine: Path, tmp_path: Path) -> None:
    report = pk.init_checkpoint(
        pristine, tmp_path / "out", rank=4, exclude_modules=["lm_head", "act_fn"], progress=False
    )
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == LINEAR


@pytest.mark.parametrize(
    "pattern",
    [
        {"v_proj": 2, ".*_proj": 3},
        {"v_proj": 2, "model.layers.0.self_attn.[qv]_proj": 3},
        {"v_proj": 2, "down_proj": 3},
    ],
)
def test_the_order_of_a_pattern_survives_loading(pattern: dict[str, int], pristine: Path, tmp_path: Path) -> None:
    """PEFT sorts the keys when it saves, and the first that matches decides."""
    options = {"rank": 4, "rank_pattern": pattern, "alpha_pattern": {key: 5 * rank for key, rank in pattern.items()}}
    report = pk.init_checkpoint(pristine, tmp_path / "out", **options, progress=False)
    model = loaded(tmp_path / "out")
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", **{k: v for k, v in options.items() if k != "rank"}
    )
    wanted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(pristine), config)
    for layer in report.layers:
        peers = [m.get_submodule(f"base_model.model.{layer.name}") for m in (model, wanted)]
        assert len({(peer.r["default"], peer.scaling["default"]) for peer in peers}) == 1
        assert (layer.rank, layer.scaling) == (peers[0].r["default"], peers[0].scaling["default"])


def test_a_block_is_left_out_as_the_message_says(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the regular expression") as caught:
        pk.init_checkpoint(pristine, tmp_path / "out", rank=4, exclude_modules="self_attn", progress=False)
    [expression] = re.findall(r"regular expression '(.*)' leaves", str(caught.value))
    assert expression == r"(.*\.)?self_attn\..*"
    report = pk.init_checkpoint(pristine, tmp_path / "out", rank=4, exclude_modules=expression, progress=False)
    assert [layer.name.rpartition(".")[2] for layer in report.layers] == LINEAR[4:]


def test_a_block_without_targets_may_be_excluded(pristine: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": "q_proj", "exclude_modules": "mlp", "progress": False}
    assert len(pk.init_checkpoint(pristine, tmp_path / "out", rank=4, **options).layers) == 1


# What is refused. By name: options, words of the message

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no targets": ({"target_modules": []}, ValueError, "target_modules is empty; give names of modules, or None"),
    "no targets in a tuple": ({"target_modules": ()}, ValueError, "target_modules is empty"),
    "an empty name": ({"target_modules": ["q_proj", ""]}, ValueError, "target_modules has an empty name"),
    "a name twice": ({"target_modules": ["q_proj", "v_proj", "q_proj"]}, ValueError, "names 'q_proj' twice"),
    "all-linear excluded": ({"exclude_modules": ["all-linear"]}, ValueError, "exclude_modules takes .* not all-linear"),
    "all-linear among the excluded": ({"exclude_modules": ["q_proj", "all-linear"]}, ValueError, "not all-linear"),
    "an expression beside names": (
        {"target_modules": ["q_proj", ".*v_proj"]},
        ValueError,
        r"target_modules takes names, or one regular expression alone, and '\.\*v_proj' is one",
    ),
    "an expression beside all-linear": ({"target_modules": ["all-linear", "lm_.*"]}, ValueError, "one beside others"),
    "two excluded expressions": (
        {"exclude_modules": ["q.*", "v.*"]},
        ValueError,
        "exclude_modules takes names, or one",
    ),
    "a bad expression": ({"target_modules": "(q_proj"}, ValueError, r"target_modules: '\(q_proj' is not a regular exp"),
    "a glob": ({"target_modules": "*_proj"}, ValueError, r"'\*_proj' is not a regular expression: .*; any characters"),
    "a bad excluded expression": (
        {"exclude_modules": "[a"},
        ValueError,
        r"exclude_modules: '\[a' is not a regular exp",
    ),
    "a bad key": (
        {"rank_pattern": {"(q": 2}},
        ValueError,
        r"rank_pattern: the pattern '\(q' is not a regular expression",
    ),
    "a name of five": (
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_prj", "up_proj"]},
        ValueError,
        "target_modules: 'o_prj' not found in the model; did you mean 'o_proj' or ",
    ),
    "upper case": ({"target_modules": "Q_PROJ"}, ValueError, "'Q_PROJ' not found in the model; did you mean 'q_proj'"),
    "a long name": (
        {"target_modules": "model.layer.0.self_attn.q_proj"},
        ValueError,
        f"did you mean '{QUERY}'",
    ),
    "a name beside all-linear": ({"target_modules": ["all-linear", "lm_haed"]}, ValueError, "did you mean 'lm_head'"),
    "nothing near": (
        {"target_modules": "xyz"},
        ValueError,
        "'xyz' not found in the model; its linear layers are q_proj k",
    ),
    "commas": ({"target_modules": "q_proj,v_proj"}, ValueError, "not found in the model; separate names with spaces"),
    "an end of names": (
        {"target_modules": "q_proj|v_proj"},
        ValueError,
        "has to match a whole name, such as 'model.lay",
    ),
    "a block": (
        {"target_modules": "mlp"},
        ValueError,
        r"LlamaMLP, .*here --target-modules gate_proj up_proj down_proj$",
    ),
    "everything": (
        {"target_modules": ".*"},
        ValueError,
        "layer 'model' is a LlamaModel, which '.*' of target_modules ma",
    ),
    "an excluded name": (
        {"exclude_modules": ["q_proj", "lm_haed"]},
        ValueError,
        "exclude_modules: 'lm_haed' not found",
    ),
    "an excluded block": (
        {"exclude_modules": ["q_proj", "self_attn"]},
        ValueError,
        r"exclude_modules: 'self_attn' matches 'model\.layers\.0\.self_attn', and PEFT would adapt the layers inside, "
        r"such as 'model\.layers\.0\.self_attn\.k_proj'; the regular expression .* leaves them out",
    ),
    "an expression for a block": ({"exclude_modules": ".*layers.0"}, ValueError, "PEFT would adapt the layers inside"),
    "both": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": "self_attn.v_proj"},
        ValueError,
        "exclude_modules leaves out every module that 'v_proj' matches",
    ),
    "a rank of nothing": (
        {"rank_pattern": {"q_prj": 2}},
        ValueError,
        "rank_pattern: 'q_prj' matches no .*mean 'q_proj'",
    ),
    "an alpha of nothing": (
        {"alpha_pattern": {"tpyo": 2}},
        ValueError,
        "alpha_pattern: 'tpyo' matches no module of the",
    ),
    "the end of a name": ({"rank_pattern": {"proj": 2}}, ValueError, "rank_pattern: 'proj' matches no module"),
    "a rank of no target": (
        {"rank_pattern": {"lm_head": 2}},
        ValueError,
        "'lm_head' matches 'lm_head', and none of them",
    ),
    "a rank of an excluded layer": (
        {"rank_pattern": {"q_proj": 2}, "exclude_modules": "q_proj"},
        ValueError,
        f"rank_pattern: 'q_proj' matches '{QUERY}', and none of them is adapted",
    ),
    "a hidden rank": (
        {"rank_pattern": {".*proj": 3, "q_proj": 2}},
        ValueError,
        rf"rank_pattern: 'q_proj' decides for no layer, because '\.\*proj' comes first and matches '{QUERY}'",
    ),
    "rank of the wrong type": ({"rank": "8"}, TypeError, r"rank must be an integer, got '8' \(str\)"),
    "rank True": ({"rank": True}, TypeError, r"rank must be an integer, got True \(bool\)"),
    "rank 8.0": ({"rank": 8.0}, TypeError, r"rank must be an integer, got 8\.0 \(float\)"),
    "rank 0": ({"rank": 0}, ValueError, "rank must be 1 or more, got 0"),
    "a huge rank": ({"rank": 10**20}, ValueError, "rank must be from 1 to 2147483647, got 100000000000000000000"),
    "rank None": ({"rank": None}, TypeError, "rank must be an integer, got None"),
    "a pattern's rank 0": (
        {"rank_pattern": {"q_proj": 0}},
        ValueError,
        r"rank_pattern\['q_proj'\] must be 1 or more, got 0",
    ),
    "a pattern's rank of 2.5": (
        {"rank_pattern": {"q_proj": 2.5}},
        TypeError,
        r"rank_pattern\['q_proj'\] must be an int",
    ),
    "a pattern that is a list": (
        {"rank_pattern": [("q_proj", 2)]},
        TypeError,
        "rank_pattern must map names of modules",
    ),
    "a key that is no name": ({"alpha_pattern": {3: 2}}, TypeError, "alpha_pattern must have names .* got 3"),
    "alpha 0": ({"alpha": 0}, ValueError, "alpha must be a finite number above 0, got 0"),
    "alpha NaN": ({"alpha": math.nan}, ValueError, "alpha must be a finite number above 0, got nan"),
    "alpha inf": ({"alpha": math.inf}, ValueError, "alpha must be a finite number above 0, got inf"),
    "a huge alpha": ({"alpha": 10**400}, ValueError, "alpha must be a finite number above 0, got 1000"),
    "alpha of the wrong type": ({"alpha": "16"}, TypeError, r"alpha must be a number, got '16' \(str\)"),
    "a pattern's alpha": ({"alpha_pattern": {"q_proj": -1}}, ValueError, r"alpha_pattern\['q_proj'\] must be a finite"),
    "a large seed": ({"seed": 2**64}, ValueError, "seed must be from -9223372036854775808 to 18446744073709551615"),
    "seed 1.5": ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    "a number for a name": (
        {"target_modules": 3},
        TypeError,
        "target_modules must be a name or a list of names, got 3",
    ),
    "a number among names": ({"target_modules": ["q_proj", 3]}, TypeError, "target_modules must be names of .* got 3"),
    "a dict of names": ({"exclude_modules": {"q_proj": 1}}, TypeError, "exclude_modules must be a name or a list of"),
    "rsLoRA": ({"use_rslora": "no"}, TypeError, "use_rslora must be True or False, got 'no'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_options(what: str, pristine: Path, tmp_path: Path) -> None:
    options, error, words = REFUSED[what]
    with pytest.raises(error, match=words) as caught:
        pk.init_checkpoint(pristine, tmp_path / "out", **{"rank": 4, "progress": False, **options})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--target-modules", "(q_proj"],
            r"argument --target-modules: '\(q_proj' is not a regular expression: missing \)",
        ),
        (["--exclude-modules", "q_proj", "[a"], r"argument --exclude-modules: '\[a' is not a regular expression"),
        (["--rank-pattern", "(q=2"], r"argument --rank-pattern: the pattern '\(q' is not a regular expression"),
        (["--rank-pattern", "q_proj=2", "q_proj=3"], "argument --rank-pattern: 'q_proj' is given twice"),
        (
            ["--alpha-pattern", "q_proj=2", "--alpha-pattern", "q_proj=2"],
            "argument --alpha-pattern: 'q_proj' is given tw",
        ),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["init", str(pristine), str(tmp_path / "out"), *arguments])
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1
    assert re.search(words, found[0])
    assert list(tmp_path.iterdir()) == []


# Layers whose weight another module reads


def siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("excluded", [None, ["k_proj"], r".*\.k_proj"])
def test_a_layer_that_multihead_attention_reads_is_left_out(excluded: Any, tmp_path: Path) -> None:
    base, out, layer = siglip(tmp_path / "base"), tmp_path / "out", "head.attention.out_proj"
    report = pk.init_checkpoint(base, out, rank=4, exclude_modules=excluded, progress=False)
    why = "MultiheadAttention 'head.attention' reads the weight of this layer without calling the layer"
    assert list(report.layers_left_out) == [layer]
    assert report.layers_left_out[layer].startswith(why)
    assert report.notes == (
        "left out of all-linear, as another module reads the weight without calling the layer: "
        f"{layer} (read by MultiheadAttention 'head.attention')",
    )
    assert torch.equal(tensors(out)[f"{layer}.weight"], tensors(base)[f"{layer}.weight"])
    model, pixels = loaded(out, transformers.AutoModel), torch.randn(2, 3, 16, 16)
    assert adapted(model) == [layer.name for layer in report.layers]
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(base).eval()(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model(pixel_values=pixels).pooler_output, expected)
    assert pk.verify_checkpoint(base, out, progress=False) == []


def test_it_is_named_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, arguments = siglip(tmp_path / "source" / "base"), ["--rank", "4", "--json"]
    found = []
    for more in ["--dry-run"], []:
        assert cli.main(["init", str(base), str(tmp_path / "out"), *arguments, *more]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("left out of all-linear, as another module reads the weight")
        record = json.loads(captured.out.splitlines()[-1])
        found.append({key: record[key] for key in ("left_out", "layers_left_out", "notes")})
        assert record["notes"] == captured.err.splitlines()
    assert found[0] == found[1]
    assert list(found[0]["layers_left_out"]) == ["head.attention.out_proj"]


@pytest.mark.parametrize("names", [["out_proj"], ["all-linear", "head.attention.out_proj"], [r".*\.(out|q)_proj"]])
def test_it_is_refused_by_name(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = siglip(tmp_path / "source" / "base")
    words = (
        r"layer 'head\.attention\.out_proj': MultiheadAttention 'head\.attention' reads the weight of this layer .* "
        r"Leave the layer out with --exclude-modules head\.attention\.out_proj"
    )
    refused(capsys, words, base, tmp_path / "out", "--target-modules", *names)


def test_attention_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = siglip(tmp_path / "source" / "base")
    words = r"layer 'head\.attention' is a MultiheadAttention: nn\.MultiheadAttention computes with its weights"
    refused(capsys, words, base, tmp_path / "out", "--target-modules", "head.attention")


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(32, 24)
        self.post_init()

    def forward(self, x):
        return self.head(self.encoder(x))
"""


def test_layers_of_torch_encoders_are_left_out(tmp_path: Path) -> None:
    """In eval mode they read the weights of all their layers (the fast path)."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "own.py").write_text(CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (base / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map})
    )
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=True)
    save_model(transformers.AutoModel.from_config(config, trust_remote_code=True), str(base / "model.safetensors"))
    report = pk.init_checkpoint(base, out, rank=4, trust_remote_code=True, progress=False)
    inside = ("self_attn.out_proj", "linear1", "linear2")
    assert list(report.layers_left_out) == [f"encoder.layers.{index}.{name}" for index in (0, 1) for name in inside]
    assert [layer.name for layer in report.layers] == ["head"]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(base, trust_remote_code=True).eval()(x)
        torch.testing.assert_close(loaded(out, transformers.AutoModel, trust_remote_code=True)(x), expected)


@pytest.mark.parametrize("names", [["all-linear"], ["all-linear", "lm_head"]])
def test_experts_are_no_linear_layers(names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT counts a router and fused experts among all-linear."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    base = tmp_path / "source" / "base"
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).save_pretrained(base)
    words = r"layer 'model\.layers\.0\.mlp\.\w+' is a Mixtral.*here --target-modules k_proj o_proj q_proj v_proj"
    refused(capsys, words, base, tmp_path / "out", "--target-modules", *names)


def test_a_reader_under_a_condition_is_named(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=3, n_head=4)
    model = transformers.BloomForCausalLM(config)
    names = [
        f"transformer.h.{index}.{name}" for index in range(3) for name in ("self_attention.dense", "mlp.dense_4h_to_h")
    ]
    left_out, [note] = read_past(model, names, AdapterOptions())
    assert left_out == {}
    assert note.startswith("another module reads the weight under some condition without its adapter")
    assert note.endswith("(read by BloomMLP 'transformer.h.1.mlp') and 2 more")


# Layers that are narrower than the rank


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=60, num_labels=3
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"query": 5}, "alpha": 8, "use_rslora": True}])
def test_a_narrow_layer_gets_the_rank_that_it_has(options: dict[str, Any], classifier: Path, tmp_path: Path) -> None:
    """The head of a classifier has three rows. The hook limits its rank in the same way."""
    out, ids = tmp_path / "out", torch.arange(20).reshape(2, 10)
    report = pk.init_checkpoint(classifier, out, rank=16, progress=False, **options)
    ranks = {layer.name.rpartition(".")[2]: layer.rank for layer in report.layers}
    assert ranks["classifier"] == 3
    assert ranks["query"] == options.get("rank_pattern", {}).get("query", 16)
    assert ranks["key"] == 16
    assert {layer.scaling for layer in report.layers if layer.name.endswith(("key", "classifier"))} == {
        8 / 4 if options else 1.0
    }
    assert report.notes == (
        "narrower than the rank, and get all the rank that they have: classifier (rank 3 instead of 16)",
    )
    auto = transformers.AutoModelForSequenceClassification
    with torch.no_grad():
        expected = auto.from_pretrained(classifier).eval()(ids).logits
        found = loaded(out, auto)(ids).logits
    assert (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank-pattern", "classifier=4"), r"layer 'classifier', weight \(3, 32\): .* 1 ≤ r ≤ 3, got r=4"),
        (("--rank", "49"), r"layer 'bert\S+', weight \(\d+, \d+\): .* 1 ≤ r ≤ 32, got r=49"),
    ],
)
def test_a_rank_that_was_asked_for_is_not_lowered(
    options: tuple[str, ...], words: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, words, classifier, tmp_path / "out", *options, left=("model",))
