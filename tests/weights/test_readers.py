"""Weights of one part from everything that people keep them in."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from fastcraft.errors import UserError
from fastcraft.trained.lora import TEXT_TARGETS
from fastcraft.weights.export import export_lora, export_text_encoder, export_unet
from fastcraft.weights.keymap import to_flat, to_prefixed
from fastcraft.weights.parts import apply_weights, part_weights
from fastcraft.weights.readers import read_weights
from fastcraft.weights.verify import outputs, same


@pytest.fixture
def modules(make_text_model):
    return [name for name, _ in make_text_model().named_modules()]


@pytest.fixture
def unet_modules(make_unet):
    return [name for name, _ in make_unet().named_modules()]


def write(form, state, folder):
    """A file of whole weights in one of the forms that are around."""
    file = folder / {"bin": "pytorch_model.bin", "textcraftor": "tc_text.pth"}.get(form, "some.safetensors")
    prefixed = {name: tensor.contiguous() for name, tensor in to_prefixed(state).items()}
    if form == "flat":
        save_file(to_flat(prefixed), file)
    elif form == "prefixed":
        save_file(prefixed, file)
    elif form == "bin":
        torch.save(prefixed, file)
    elif form == "checkpoint":
        file = file.with_suffix(".pt")
        torch.save({"state_dict": prefixed, "step": 7}, file)
    else:
        ids = {"module.text_model.embeddings.position_ids": torch.arange(77)}
        torch.save({f"module.{name}": tensor for name, tensor in prefixed.items()} | ids, file)
    return file


@pytest.mark.parametrize("form", ["flat", "prefixed", "bin", "checkpoint", "textcraftor"])
def test_files_of_whole_weights(form, make_text_model, modules, tmp_path):
    trained, fresh = make_text_model(seed=5), make_text_model()
    file = write(form, trained.state_dict(), tmp_path)
    read = read_weights(file, "text", modules)
    assert read.lora is None
    assert read.source == str(file)
    apply_weights(fresh, read)
    assert same(fresh.state_dict(), trained.state_dict())


def test_folders_of_models_and_of_pipelines(base_pipeline, make_text_model, make_unet, modules, unet_modules, tmp_path):
    text, unet = make_text_model(), make_unet()
    for path in (base_pipeline, base_pipeline / "text_encoder", str(base_pipeline)):
        assert same(read_weights(path, "text", modules).whole, to_flat(text.state_dict()))
    for path in (base_pipeline, base_pipeline / "unet"):
        assert same(read_weights(path, "unet", unet_modules).whole, dict(unet.state_dict()))
    unet.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same(read_weights(tmp_path / "shards", "unet", unet_modules).whole, dict(unet.state_dict()))
    unet.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert same(read_weights(tmp_path / "half", "unet", unet_modules).whole, dict(unet.half().state_dict()))


def test_exports_and_run_directories(
    make_lora, make_unet_lora, make_unet, make_text_model, tokenizer_folder, input_ids, unet_call, modules,
    unet_modules, tmp_path,
):  # fmt: skip
    """The whole weights of a run; its adapters where there are no whole weights, or by the file's name."""
    text, unet = make_lora(), make_unet_lora()
    out = tmp_path / "run" / "export"
    export_text_encoder(text, tokenizer_folder, out, reference_ids=input_ids)
    export_lora({"text": text, "unet": unet}, out, reference_ids=input_ids, reference_call=unet_call)
    for path in (tmp_path / "run", out):
        assert read_weights(path, "text", modules).whole is not None
        own, scaling = read_weights(path, "unet", unet_modules).lora, read_weights(path, "unet", unet_modules).scaling
        assert own.keys() == part_weights(unet).lora.keys()
        assert set(scaling.values()) == {1.0}
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        fresh, fresh_text = make_unet(), make_text_model()
        apply_weights(fresh, read_weights(out / "lora" / file, "unet", unet_modules))
        apply_weights(fresh_text, read_weights(out / "lora" / file, "text", modules))
        torch.testing.assert_close(outputs(fresh, unet_call), outputs(unet, unet_call), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs(fresh_text, input_ids), outputs(text, input_ids), rtol=1e-4, atol=1e-5)
    export_unet(unet, out, reference_call=unet_call)
    fresh = make_unet()
    apply_weights(fresh, read_weights(tmp_path / "run", "unet", unet_modules))
    torch.testing.assert_close(outputs(fresh, unet_call), outputs(unet, unet_call), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers by the old name
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_adapters_of_peft(form, make_text_model, modules, input_ids, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(TEXT_TARGETS), init_lora_weights=False, use_rslora=True)
    trained = get_peft_model(make_text_model(), config)
    trained.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if form == "bin":  # as releases of old wrote it, with the level that transformers had
        state = {
            n.replace(".model.", ".model.text_model.", 1): x for n, x in trained.state_dict().items() if "lora" in n
        }
        torch.save({n.replace(".default", ""): x for n, x in state.items()}, tmp_path / "adapter_model.bin")
        file.unlink()
        file = tmp_path / "adapter_model.bin"
    for path in (tmp_path, file):
        read, fresh = read_weights(path, "text", modules), make_text_model()
        assert set(read.scaling.values()) == {3.0}
        apply_weights(fresh, read)
        torch.testing.assert_close(outputs(fresh, input_ids), outputs(trained, input_ids), rtol=1e-4, atol=1e-5)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"must have its adapter_config\.json beside it"):
        read_weights(file, "text", modules)


def test_what_is_refused(make_text_model, make_unet, modules, unet_modules, tmp_path):
    text = make_text_model()
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.out.0.bias": torch.zeros(1)}, tmp_path / "sd.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "objects.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    for path, message in (
        ("nothing", "nothing: there is no such file or folder"),
        ("empty", "must hold text_encoder, lora, an adapter or a file of weights, got nothing"),
        ("sd.safetensors", r"must hold the weights of one part, got a checkpoint of a whole model"),
        ("list.pt", "must hold named tensors, got list"),
        ("objects.pth", "must hold nothing but tensors"),
        ("cut.safetensors", "cut.safetensors: cannot be read"),
        ("notes.txt", r"must end in \.safetensors, \.bin"),
        ("adapter", r"must hold adapter_model\.safetensors or adapter_model\.bin, got adapter_config\.json"),
        ("shards", r"files must lie beside the index, got \['\.\./x\.bin'\]"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_weights(tmp_path / path, "text", modules)
        assert "\n" not in str(caught.value)
    save_file(to_flat(make_unet().state_dict()), file)
    with pytest.raises(UserError, match=r"must hold weights of part 'text', got 'conv_in\.bias'"):
        read_weights(file, "text", modules)
    with pytest.raises(UserError, match="part: must be one of"):
        read_weights(file, "vae", modules)
    state = dict(text.state_dict())
    state.pop("final_layer_norm.bias")
    save_file(state, file)
    with pytest.raises(UserError, match=r"model\.safetensors: must hold exactly .* missing: final_layer_norm\.bias"):
        apply_weights(text, read_weights(file, "text", modules))
