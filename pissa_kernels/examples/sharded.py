"""PiSSA on a model that FSDP2 or DeepSpeed ZeRO-3 shards after it, from get_peft_model to a plain LoRA:

    accelerate launch --config_file CONFIG -m pissa_kernels.examples.sharded --output DIR

CONFIG is fsdp2.yaml or zero3.yaml in pissa_kernels/examples/configs; the code is the same for both. The model learns to
count, from a tiny Llama of random weights unless --model names another one. Each printed line compares logits.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import pissa_kernels as pk

from ..numerics import UNIT_ROUNDOFF
from . import count, new_folder, quiet
from .measure import ROUNDOFFS, relative_difference

LEARNING_RATE, BATCH, TOKENS = 1e-3, 4, 12
# Two processes cannot share these sizes evenly.
TINY = {
    "hidden_size": 66,
    "intermediate_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 131,
}


@dataclass
class Result:
    """What the example measured; a difference is ‖y' − y‖_F/‖y‖_F, for the logits y of some sequences.

    Attributes:
        initialized: difference of the sharded, untrained model from the base model, the largest of any process.
        losses: loss of each step, averaged over the processes.
        trained: difference of the trained model from the base model.
        original: difference of the trained model under ``original_model`` from the base model, the largest of any
            process.
        reloaded, converted: difference of that model, in one process, from the trained model.
        allowed: what rounding explains between two models that are equal otherwise.
    """

    initialized: float
    losses: list[float]
    trained: float
    original: float
    reloaded: float
    converted: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether every model computes what it should. NaN does not."""
        exact = (self.initialized, self.original, self.reloaded, self.converted)
        return all(difference <= self.allowed for difference in exact)


def is_first() -> bool:
    """Whether this is the first of the processes that ``accelerate launch`` has started."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator() -> Any:
    """The accelerator that the config file of ``accelerate launch`` describes.

    accelerate needs to be told the backend of CPUs, and has FSDP for what it takes for several GPUs only.
    """
    import accelerate

    if not torch.accelerator.is_available():
        state = accelerate.PartialState(backend="gloo")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            state.distributed_type = accelerate.DistributedType.MULTI_GPU
    return accelerate.Accelerator()


def make_tiny_model(folder: Path) -> None:
    """Save a Llama whose random weights are large enough for logits that depend on the tokens before."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def load(model: str) -> Any:
    """The base model. Under ZeRO-3, from_pretrained partitions it."""
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()


def vocabulary_of(model: str) -> int:
    """Number of tokens of a model."""
    return int(transformers.AutoConfig.from_pretrained(model).get_text_config().vocab_size)


def sequences(vocabulary: int, number: int) -> Tensor:
    """What the model learns: tokens in arithmetic progression, (number, tokens)."""
    start = torch.arange(number)[:, None]
    return (start + (1 + start % 3) * torch.arange(TOKENS)) % vocabulary


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of some sequences, on the CPU. Each process holds a part of the weights, so all of them call this."""
    model.eval()
    return model(input_ids=ids.to(model.device)).logits.float().cpu()  # type: ignore[no-any-return]


def train(accelerator: Any, model: Any, optimizer: Any, loader: Any, steps: int) -> list[float]:
    """Train on the same sequences in every step. Returns the losses, averaged over the processes."""
    model.train()
    losses = []
    for _ in range(steps):
        for batch in loader:
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            losses.append(float(accelerator.gather(loss.detach().reshape(1)).mean()))
    return losses


def loaded_alone(name: str, ids: Tensor, out: Path) -> list[Tensor]:
    """Logits of the saved adapter under the hook, and of the plain LoRA without it, in a process that knows no other.

    In a process that runs DeepSpeed, transformers partitions whatever it loads, and waits for the others to do so too.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_loaded, name, ids, out).result()


def _loaded(name: str, ids: Tensor, out: Path) -> list[Tensor]:
    quiet()
    with pk.patch_peft():
        adapted = peft.PeftModel.from_pretrained(load(name), out / "adapter")
    return [logits(model, ids) for model in (adapted, peft.PeftModel.from_pretrained(load(name), out / "lora"))]


def run(model_name: str | None, steps: int, rank: int, out: Path) -> Result | None:
    """Initialize, shard, train, save, reload and convert, with files in ``out``. None in processes but the first."""
    from accelerate.utils import broadcast_object_list

    # The reference: the base model in one process. Once accelerate has set up ZeRO-3, it would be partitioned.
    name = model_name or str(out / "model")
    expected = None
    if is_first():
        if model_name is None:
            make_tiny_model(out / "model")
        expected = logits(load(name), sequences(vocabulary_of(name), BATCH))
    accelerator = make_accelerator()
    (expected,) = broadcast_object_list([expected])
    data = sequences(vocabulary_of(name), BATCH * accelerator.num_processes)
    ids = data[:BATCH]

    def difference(model: Any) -> float:
        """Difference of a sharded model from the base model, the largest of any process."""
        own = torch.tensor([relative_difference(expected, logits(model, ids))], device=accelerator.device)
        return float(accelerator.gather(own).max())

    # 1. The adapter, in every process, while each has the whole weights (ZeRO-3: one of them at a time).
    config = peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="pissa", target_modules="all-linear")
    with pk.patch_peft() as report:
        model = peft.get_peft_model(load(name), config)

    # 2. Sharding, after it.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)  # type: ignore[arg-type, var-annotated]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    initialized = difference(model)

    # 3. Training, and the original model as for a reference policy.
    losses = train(accelerator, model, optimizer, loader, steps)
    trained, moved = logits(model, ids), difference(model)
    unwrapped = accelerator.unwrap_model(model)
    with pk.original_model(unwrapped):
        original = difference(model)

    # 4. Saving: all processes collect the tensors, the first one writes them.
    main = accelerator.is_main_process
    state = accelerator.get_state_dict(model)
    unwrapped.save_pretrained(out / "adapter", state_dict=state, is_main_process=main)
    how = f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}, {accelerator.device.type}"
    accelerator.end_training()
    if not main:
        return None

    # 5. The adapter in one process, under the hook; and as a plain LoRA of the base model, without it.
    pk.convert_adapter(out / "adapter", out / "adapter", out / "lora")
    reloaded, converted = loaded_alone(name, ids, out)
    u = UNIT_ROUNDOFF[transformers.AutoConfig.from_pretrained(name).dtype or torch.float32]
    result = Result(
        initialized=initialized,
        losses=losses,
        trained=moved,
        original=original,
        reloaded=relative_difference(trained, reloaded),
        converted=relative_difference(trained, converted),
        allowed=ROUNDOFFS * u * math.sqrt(len(report.layers)),
    )
    print(f"{how}: {len(report.layers)} layers, rank {rank}")
    print(lines(result))
    return result


def lines(result: Result) -> str:
    """The printed lines."""
    losses = f"loss {result.losses[0]:.3f} at the first step, {result.losses[-1]:.3f} at the last"
    rows = [
        ("initialized, sharded", result.initialized, "the base model, in every process"),
        (f"trained for {len(result.losses)} steps", result.trained, f"the base model; {losses}"),
        ("original_model", result.original, "the base model, in every process"),
        ("loaded in one process", result.reloaded, "the trained model"),
        ("converted to a plain LoRA", result.converted, "the trained model"),
    ]
    text = "\n".join(f"{what:26} {value:.1e} from {of}" for what, value, of in rows)
    return text + ("" if result.holds else f"\nabove {result.allowed:.1e}, which is what rounding explains")


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="accelerate launch --config_file CONFIG -m pissa_kernels.examples.sharded",
        description=f"{summary.rstrip(':')}. CONFIG is fsdp2.yaml or zero3.yaml in pissa_kernels/examples/configs.",
    )
    folder = new_folder if is_first() else Path  # the first process may have written to it already
    parser.add_argument("--output", type=folder, required=True, help="folder for the adapter and the plain LoRA")
    parser.add_argument("--model", help="folder or name of a causal language model (default: a tiny one is made)")
    parser.add_argument("--steps", type=count, default=8, help="steps of the optimizer (default: 8)")
    parser.add_argument("--rank", type=count, default=8, help="rank of the adapter (default: 8)")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("it is started by accelerate launch, with a config file")
    quiet()
    # DeepSpeed calls torch.distributed by names that torch replaces
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    result = run(arguments.model, arguments.steps, arguments.rank, arguments.output)
    return 0 if result is None or result.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
