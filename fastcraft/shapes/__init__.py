"""The bundled miniature world: pictures drawn by code, captions, a judge, and a small model trained on them."""

from pathlib import Path

FOLDER = Path(__file__).parent
PIPELINE = FOLDER / "weights" / "pipeline"
"""The bundled text-to-image model, a diffusers folder."""
REWARD = FOLDER / "weights" / "reward"
"""The bundled CLIP and its aesthetic head."""
