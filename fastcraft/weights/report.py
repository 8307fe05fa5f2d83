"""What is said of an export, to the person who made it and in the folder itself."""

from dataclasses import dataclass
from pathlib import Path

from fastcraft.durable import write_text

_README = {
    "text_encoder": '- diffusers: `from_pretrained(BASE, text_encoder=CLIPTextModel.from_pretrained("text_encoder"))`\n'
    "- ComfyUI: `text_encoder/model.safetensors` in CLIPLoader\n",
    "text_encoder_2": "- diffusers: "
    '`from_pretrained(BASE, text_encoder_2=CLIPTextModelWithProjection.from_pretrained("text_encoder_2"))`\n',
    "unet": '- diffusers: `from_pretrained(BASE, unet=UNet2DConditionModel.from_pretrained("unet"))`\n',
    "lora": '- diffusers, LoRA: `pipe.load_lora_weights("lora")`\n'
    "- A1111 and ComfyUI, LoRA: `lora/kohya.safetensors`\n",
}


class ExportError(RuntimeError):
    """What was written does not read back as the model that was trained; nothing was put in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """One export, after it was read back.

    ``max_abs_error`` compares what the reloaded export and the trained model compute on the reference: ``what`` is
    "embeddings" of text encoders, "predictions" of a UNet, or both; ``exact`` means equal to the last bit.
    """

    path: Path
    num_tensors: int
    max_abs_error: float
    what: str = "embeddings"

    @property
    def exact(self) -> bool:
        return self.max_abs_error == 0.0

    def __str__(self) -> str:
        agreement = "bit-exact" if self.exact else f"within {self.max_abs_error:.1e}"
        return f"{self.path}: {self.num_tensors} tensors, reloaded, {self.what} {agreement}"


def compared(parts: list[str]) -> str:
    """`ExportReport.what` of these parts."""
    kinds = {"predictions" if part == "unet" else "embeddings" for part in parts}
    return " and ".join(sorted(kinds))


def write_readme(out: Path) -> None:
    """How to load what lies in ``out``."""
    write_text(out / "README.md", "".join(line for name, line in _README.items() if (out / name).is_dir()))
