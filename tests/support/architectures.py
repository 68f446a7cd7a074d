"""Tiny models of many architectures, built from their configs: text, vision, speech, several modalities, experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, **TOKENS, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SEQ2SEQ = {
    **TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
WAVE = {
    **SMALL, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TEXT_AND_IMAGE = {
    "text_config": {**TEXT, "projection_dim": 32},
    "vision_config": {**IMAGE, "projection_dim": 32},
    "projection_dim": 32,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Architecture:
    """A tiny model.

    Attributes:
        model: name of its class in transformers.
        config: name of its config's class.
        options: arguments of the config.
        targets: modules to adapt, where ``init`` does not take all linear layers.
        exclude: modules to leave out, where ``init`` does not take them.
        left_out: names of the layers that ``demo`` leaves out, the last two parts of each.
    """

    model: str
    config: str
    options: Mapping[str, Any]
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def build(self) -> Any:
        """The model, with seeded random weights, in evaluation mode.

        Weights and biases are large enough that every layer has a part in the output. Initial weights of transformers
        are so small that a wrong one would hardly be noticed beside the residual stream.
        """
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.options)
            model = getattr(transformers, self.model)(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
                elif parameter.ndim >= 2 and "parametrizations" not in name and not name.endswith("A_log"):
                    torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return model.eval()


def _same(name: str, head: str, options: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture(f"{name}{head}", f"{name}Config", options, **more)


ARCHITECTURES: dict[str, Architecture] = {
    # text
    "gpt2": _same("GPT2", "LMHeadModel", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": _same("GPTNeoX", "ForCausalLM", TEXT),
    "opt": _same(
        "OPT", "ForCausalLM",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bloom": _same("Bloom", "ForCausalLM", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": _same("Llama", "ForCausalLM", GROUPED),
    "mistral": _same("Mistral", "ForCausalLM", GROUPED),
    "qwen2": _same("Qwen2", "ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": _same("Qwen3", "ForCausalLM", GROUPED),
    "gemma2": _same("Gemma2", "ForCausalLM", GROUPED),
    "phi3": _same("Phi3", "ForCausalLM", GROUPED),
    "bert": _same("Bert", "Model", TEXT),
    "roberta": _same("Roberta", "ForMaskedLM", TEXT),
    "distilbert": _same(
        "DistilBert", "ForSequenceClassification",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
        exclude=("classifier",),
    ),
    "albert": _same("Albert", "ForMaskedLM", {**TEXT, "embedding_size": 16}),
    "deberta_v2": _same(
        "DebertaV2", "ForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        exclude=("classifier",),
    ),
    # experts, state space
    "mixtral": _same(
        "Mixtral", "ForCausalLM", {**EXPERTS, "num_local_experts": 4}, targets=ATTENTION, left_out=("mlp.experts",)
    ),
    "qwen3_moe": _same(
        "Qwen3Moe", "ForCausalLM", {**EXPERTS, "num_experts": 4}, targets=ATTENTION, left_out=("mlp.experts",)
    ),
    "mamba": _same(
        "Mamba", "ForCausalLM", {**TOKENS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        exclude=("out_proj", "dt_proj"), left_out=("mixer.out_proj", "mixer.dt_proj"),
    ),
    # encoder and decoder
    "t5": _same("T5", "ForConditionalGeneration", T5),
    "mt5": _same("MT5", "ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": _same("Bart", "ForConditionalGeneration", SEQ2SEQ),
    # vision
    "vit": _same("ViT", "ForImageClassification", {**IMAGE, "num_labels": 8}),
    "dinov2": _same("Dinov2", "Model", IMAGE),
    "siglip_vision": _same(
        "SiglipVision", "Model", IMAGE, exclude=("head.attention.out_proj",), left_out=("attention.out_proj",)
    ),
    "clip_vision": _same("CLIPVision", "Model", IMAGE),
    "swin": _same(
        "Swin", "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
         "num_labels": 8},
    ),
    "resnet": _same(
        "ResNet", "ForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 8},
    ),
    "convnext": _same(
        "ConvNext", "ForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 8},
    ),
    "depth_anything": Architecture(
        "DepthAnythingForDepthEstimation", "DepthAnythingConfig",
        {
            "backbone_config": {
                **SMALL, "model_type": "dinov2", "image_size": 32, "patch_size": 8, "reshape_hidden_states": False,
                "out_indices": [1, 2], "apply_layernorm": True,
            },
            "reassemble_hidden_size": 32, "patch_size": 8, "reassemble_factors": [2, 1],
            "neck_hidden_sizes": [16, 16], "fusion_hidden_size": 16, "head_hidden_size": 8,
        },
    ),
    "detr": Architecture(
        "DetrForObjectDetection", "DetrConfig",
        {
            "backbone_config": {
                "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                "layer_type": "basic", "out_features": ["stage2"],
            },
            "use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": 32, "encoder_layers": 1,
            "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "num_queries": 6,
        },
        exclude=("class_labels_classifier",),
    ),
    # speech
    "whisper": _same(
        "Whisper", "ForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20,
         "decoder_start_token_id": 1},
    ),
    "wav2vec2": _same("Wav2Vec2", "ForCTC", WAVE),
    "hubert": _same("Hubert", "Model", WAVE),
    # several modalities
    "clip": _same("CLIP", "Model", TEXT_AND_IMAGE),
    "siglip": _same(
        "Siglip", "Model", TEXT_AND_IMAGE,
        exclude=("vision_model.head.attention.out_proj",), left_out=("attention.out_proj",),
    ),
    "blip": _same(
        "Blip", "ForConditionalGeneration",
        {"text_config": {**TEXT, "encoder_hidden_size": 32}, "vision_config": IMAGE, "projection_dim": 32},
        exclude=("predictions.decoder",), left_out=("predictions.decoder",),
    ),
    "llava": _same(
        "Llava", "ForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_token_id": 98, "image_seq_length": 16,
        },
    ),
    "qwen2_vl": _same(
        "Qwen2VL", "ForConditionalGeneration",
        {
            "text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4,
                              "mlp_ratio": 2},
            "image_token_id": 95, "video_token_id": 96, "vision_start_token_id": 97, "vision_end_token_id": 98,
        },
    ),
}  # fmt: skip


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs that reach every layer of an architecture."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(5, 90, (2, 12), generator=generator)
    text, image = {"input_ids": ids}, {"pixel_values": noise(2, 3, 32, 32)}
    decoder = {"decoder_input_ids": torch.randint(5, 90, (2, 6), generator=generator)}
    if name in ("t5", "mt5", "bart"):
        return text | decoder
    if name in ("vit", "dinov2", "siglip_vision", "clip_vision", "swin", "resnet", "convnext", "depth_anything"):
        return image
    if name == "detr":
        return {"pixel_values": noise(2, 3, 64, 64)}
    if name == "whisper":
        return {"input_features": noise(2, 8, 40)} | decoder
    if name in ("wav2vec2", "hubert"):
        return {"input_values": noise(2, 400)}
    if name in ("clip", "siglip", "blip"):
        return text | image
    if name == "llava":
        return {"input_ids": torch.cat([ids, torch.full((2, 16), 98)], dim=1)} | image
    if name == "qwen2_vl":
        # a grid of 4×4 patches, of which four at a time become one token
        marked = torch.cat([ids, torch.full((2, 4), 95)], dim=1)
        types = (marked == 95).int()
        patches, grid = noise(2 * 16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]] * 2)
        return {"input_ids": marked, "mm_token_type_ids": types, "pixel_values": patches, "image_grid_thw": grid}
    return text


def outputs(name: str, model: Any) -> dict[str, torch.Tensor]:
    """Every floating-point tensor that a model returns for :func:`inputs`, in float64."""

    def tensors(where: str, value: Any) -> dict[str, torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return {where: value.double()} if value.is_floating_point() else {}
        items: Any = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (tuple, list)):
            items = enumerate(value)
        return {key: tensor for part, item in items for key, tensor in tensors(f"{where}.{part}", item).items()}

    with torch.no_grad():
        return tensors(name, model(**inputs(name)))


def difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    """Largest ‖found − expected‖/‖expected‖ of any output."""
    assert expected
    assert expected.keys() == found.keys()
    return max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())


def save_with_remote_code(folder: Path) -> Path:
    """Save a Llama whose config names classes in a Python file beside it."""
    ARCHITECTURES["llama"].build().save_pretrained(folder)
    (folder / "modeling_own.py").write_text("raise RuntimeError('the code of the checkpoint ran')\n", encoding="utf-8")
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    path.write_text(json.dumps(record), encoding="utf-8")
    return folder
