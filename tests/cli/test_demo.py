"""The demo: tables, JSON, saved folders, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pissa_kernels.cli import main as cli
from pissa_kernels.examples import demo
from pissa_kernels.examples.inputs import SENTENCES, model_inputs
from pissa_kernels.examples.layers import Choice
from pissa_kernels.examples.measure import worst_reconstruction
from pissa_kernels.peft.saving import save as saving

from ..support.checkpoints import witness
from ..support.models import build, output
from ..support.mounts import BindMounts


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pissa_kernels", *map(str, arguments)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-gpt2"
    build("gpt2").save_pretrained(folder)
    return folder


def test_the_real_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("demo", "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "stderr has only errors if it is not a terminal"
    record = json.loads(done.stdout)
    assert record["holds"]
    assert len(record["layers"]) == 37
    assert all(layer["converged"] and layer["rank"] == 16 for layer in record["layers"])
    ours, exact, rough = record["runs"][:3]
    assert [run["name"] for run in record["runs"][:3]] == ["pissa_kernels pissa", "PEFT pissa", "PEFT pissa_niter_4"]
    assert abs(ours["energy_lost"]) <= 1e-6
    assert rough["energy_lost"] > 1e-3
    assert exact["seconds"] > 0
    original = transformers.BertModel.from_pretrained(demo.demo_model()).eval()
    residual = transformers.BertModel.from_pretrained(out).eval()
    loaded = peft.PeftModel.from_pretrained(residual, out, subfolder="pissa_init", is_trainable=True).eval()
    ids = {"input_ids": torch.arange(1000, 1024)[None]}
    with torch.no_grad():
        before, after = original(**ids).last_hidden_state, loaded(**ids).last_hidden_state
    assert (after - before).norm() <= 3e-6 * before.norm()
    assert loaded.peft_config["default"].init_lora_weights is True
    assert not list(out.parent.glob(".out.*")), "no temporary folder is left"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conv1d_model_saved_and_loaded(gpt2: Path, dtype: str, tmp_path: Path) -> None:
    done = run("demo", gpt2, "--rank", 4, "--dtype", dtype, "--no-compare", "--out", tmp_path / "a" / "b")
    assert done.returncode == 0, done.stderr
    assert "small-gpt2: 8 layers, rank 4, pissa, " + dtype in done.stdout
    assert "output unchanged" in done.stdout
    assert "transformer.h.1.mlp.c_proj" in done.stdout
    report = run("report", tmp_path / "a" / "b")
    assert report.returncode == 0, report.stderr
    assert report.stdout.partition("\n\n")[0] in done.stdout, "the table that the demo printed"
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "b", dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "a" / "b" / "pissa_init").eval()
    original = transformers.AutoModelForCausalLM.from_pretrained(gpt2, dtype=dtype).eval()
    expected = output(original)
    own = (output(original.double()) - expected).norm()  # rounding of the dtype's arithmetic alone
    assert (output(loaded) - expected).norm() <= 2 * own


def test_a_tokenizer_without_a_padding_token(tmp_path: Path) -> None:
    """As for Llama and GPT-2: sentences of two lengths cannot be put into one batch."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    build("gpt2").save_pretrained(tmp_path)
    words = sorted({word for sentence in SENTENCES for word in sentence.replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
    model, loaded = demo.load_model(tmp_path, "auto")
    assert loaded is not None
    assert loaded.pad_token is None
    assert demo.run_demo(tmp_path, rank=4, compare=False).holds
    assert model_inputs(model, loaded)["input_ids"].shape[0] == 1


@pytest.mark.slow
def test_target_modules_and_niter(gpt2: Path) -> None:
    done = run(
        "demo", gpt2, "--target-modules", "c_attn", "--init", "pissa_niter_2", "--rank", 8, "--json", "--no-compare"
    )
    record = json.loads(done.stdout)
    assert [layer["name"] for layer in record["layers"]] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]
    assert record["init"] == "pissa_niter_2"
    assert len(record["layers"][0]["singular_values"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo", "/nowhere"], 2, "/nowhere is not a model folder: it has no config.json"),
        (["demo", "--init", "pissa_16"], 2, "init_lora_weights should be 'pissa' or"),
        (["demo", "--rank", "0"], 2, "must be 1 or more"),
        (["demo", "--rank", "x"], 2, "invalid"),
        (["demo", "GPT2", "--target-modules", "nope", "--no-compare"], 1, "nope"),
        (["demo", "GPT2", "--out", "GPT2"], 2, "exists and is not an empty folder"),
        (["demo", "GPT2", "--out", "GPT2/new/out"], 2, "small-gpt2, which is read and must not be written to"),
        ([], 2, "COMMAND"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], code: int, words: str, gpt2: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(gpt2.iterdir())}
    done = run(*(argument.replace("GPT2", str(gpt2)) for argument in arguments))
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert {path: path.read_bytes() for path in sorted(gpt2.iterdir())} == before


def test_out_in_the_model_folder_is_refused_before_the_model_is_loaded(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in sorted(gpt2.iterdir())}
    (tmp_path / "link").symlink_to(gpt2)
    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for out in (gpt2 / "out", gpt2 / "new" / "out", tmp_path / "link" / "out"):
        with pytest.raises(FileExistsError, match="small-gpt2, which is read and must not be written to"):
            demo.run_demo(gpt2, out=out)
    for out in (gpt2, gpt2.parent, tmp_path / "link"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            demo.run_demo(gpt2, out=out)
    assert {path: path.read_bytes() for path in sorted(gpt2.iterdir())} == before


def test_an_out_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("the model was loaded"))
    words = {
        "file": "file exists and is not a folder; choose another name",
        "file/out": "file/out cannot be made: .*/file is not a folder",
        "dangling": "dangling is a symbolic link to nowhere, which does not exist; make that folder, or choose another",
        "dangling/out": "dangling/out cannot be made: .*/dangling is a symbolic link that leads nowhere",
        "mounted": "mounted is a mount point, which cannot be replaced; choose a folder in it",
    }
    with BindMounts() as mount:
        mount.add(tmp_path / "disk", tmp_path / "mounted")
        before = witness(tmp_path)
        for out, found in words.items():
            with pytest.raises((FileExistsError, NotADirectoryError), match=found):
                demo.run_demo(gpt2, out=tmp_path / out)
            assert witness(tmp_path) == before


def test_a_changed_output_exits_1(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong decomposition is reported as wrong."""
    inject = demo.inject

    def spoiled(*arguments: Any) -> tuple[Any, float]:
        model, seconds = inject(*arguments)
        if arguments[2] == "pissa":
            layer = model.base_model.model.transformer.h[0].attn.c_attn
            layer.lora_B["default"].weight.data[0, 0] += 0.01
        return model, seconds

    monkeypatch.setattr(demo, "inject", spoiled)
    assert cli.main(["demo", str(gpt2), "--no-compare", "--rank", "4"]) == 1
    assert "output CHANGED" in capsys.readouterr().out


def test_a_failed_save_leaves_nothing(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(saving.os, "replace", fail)
    assert cli.main(["demo", str(gpt2), "--no-compare", "--rank", "4", "--out", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_reconstruction_is_measured_against_the_bound() -> None:
    from pissa_kernels import patch_peft

    original = build("llama", torch.bfloat16)
    with patch_peft():
        adapted, _ = demo.inject(original, 4, "pissa", Choice(["q_proj"]))
    assert 0.5 <= worst_reconstruction(original, adapted) <= 1
    weight = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0, dtype=torch.bfloat16))
    assert worst_reconstruction(original, adapted) > 1


@pytest.mark.slow
def test_a_rank_above_the_width_of_a_layer_is_clipped(gpt2: Path) -> None:
    done = run("demo", str(gpt2), "--rank", "97", "--no-compare")
    assert done.returncode == 0, done.stderr
    assert "transformer.h.0.attn.c_attn" in done.stderr
    assert "rank" in done.stderr
    assert "exclude_modules" in done.stderr
