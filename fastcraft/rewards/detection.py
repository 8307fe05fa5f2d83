"""How sure a detector is of a face or a hand: MediaPipe's, which needs the ``detectors`` extra."""

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fastcraft.errors import MissingDependencyError, UserError
from fastcraft.rewards.base import Reward
from fastcraft.rewards.checks import checked_number
from fastcraft.rewards.clip_tower import Towers
from fastcraft.rewards.preprocess import to_bytes
from fastcraft.rewards.tensor_files import ReleasedFile, find_file, first_line


class DetectionReward(Reward):
    """The confidence of the surest detection in each picture; ``floor`` where nothing is found.

    Pictures without a detection are counted, see `counts`. No gradient: the detector runs on the CPU, outside torch.

    Args:
        detector: MediaPipe's task; see `open_detector`.
        floor: score of a picture in which nothing is found.
        source: the model's file.
    """

    uses_prompt = False
    differentiable = False
    loads_weights = True

    def __init__(self, detector: Any, *, floor: float = 0.0, source: str = "") -> None:
        super().__init__()
        self.detector = detector
        weakref.finalize(self, detector.close)  # by itself MediaPipe closes too late, and complains at exit
        self.floor = checked_number(self.name, "floor", floor)
        self.source = source
        self.num_scored = self.num_none_found = 0
        self.freeze()

    @classmethod
    def build(cls, path: str, *, towers: Towers, threshold: float = 0.5, **options: Any) -> Self:
        """``path`` is MediaPipe's model file, or a folder with it; empty = the published one, downloaded once.

        ``threshold`` is the confidence in (0, 1) below which MediaPipe reports nothing.
        """
        if not 0 < checked_number(cls.name, "threshold", threshold) < 1:
            raise UserError(f"rewards: option threshold of {cls.name!r} must lie in (0, 1), got {threshold}")
        mediapipe = _mediapipe(cls.name)
        file = str(find_file(path, cls.files[0], reward=cls.name))
        try:
            detector = cls.open_detector(mediapipe, file, threshold)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"rewards: {cls.name!r} cannot use {file!r} as its model: {first_line(error)}") from error
        return cls(detector, source=file, **options)

    @staticmethod
    @abstractmethod
    def open_detector(mediapipe: Any, file: str, threshold: float) -> Any:
        """MediaPipe's task for single pictures."""

    @staticmethod
    @abstractmethod
    def confidences(result: Any) -> list[float]:
        """Of everything found in one picture."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Model and floor."""
        return {"model": self.source, "floor": self.floor}

    @property
    def counts(self) -> Mapping[str, int]:
        """Pictures scored since the reward was made, and those in which nothing was found."""
        return {"scored": self.num_scored, "none found": self.num_none_found}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """``(B, 3, H, W)`` in ``[0, 1]`` to ``(B,)`` float32; ``prompts`` are ignored."""
        mediapipe = _mediapipe(self.name)
        scores = []
        for picture in to_bytes(images):
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=picture)
            confidences = self.confidences(self.detector.detect(image))
            self.num_scored += 1
            self.num_none_found += not confidences
            scores.append(max(confidences, default=self.floor))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


class FaceReward(DetectionReward):
    """Confidence of MediaPipe's face detector (BlazeFace, short range) in the surest face.

    Official preprocessing: MediaPipe's own, which gets the whole picture, rounded to 8 bits.

    Source: Bazarevsky et al. 2019, arXiv:1907.05047.
    """

    name = "face"
    score_range = "[threshold, 1], or floor where no face is found"
    files = (
        ReleasedFile(
            name="blaze_face_short_range.tflite",
            url="https://storage.googleapis.com/mediapipe-models/face_detector/blaze_face_short_range/float16/1/"
            "blaze_face_short_range.tflite",
        ),
    )

    @staticmethod
    def open_detector(mediapipe: Any, file: str, threshold: float) -> Any:
        """MediaPipe's ``FaceDetector``."""
        vision = mediapipe.tasks.vision
        base = mediapipe.tasks.BaseOptions(model_asset_path=file)
        options = vision.FaceDetectorOptions(base_options=base, min_detection_confidence=threshold)
        return vision.FaceDetector.create_from_options(options)

    @staticmethod
    def confidences(result: Any) -> list[float]:
        """Each face's score."""
        return [float(detection.categories[0].score) for detection in result.detections]


class HandReward(DetectionReward):
    """Confidence of MediaPipe's hand landmarker in the clearest hand.

    The library reports how sure it is which hand it sees, left or right, for hands that pass its detector at
    ``threshold``; a blurred or misshapen hand lowers it, and one that is not taken for a hand gives ``floor``.

    Official preprocessing: MediaPipe's own, which gets the whole picture, rounded to 8 bits.

    Source: Zhang et al. 2020, arXiv:2006.10214.
    """

    name = "hand"
    score_range = "[0.5, 1], or floor where no hand is found"
    files = (
        ReleasedFile(
            name="hand_landmarker.task",
            url="https://storage.googleapis.com/mediapipe-models/hand_landmarker/hand_landmarker/float16/1/"
            "hand_landmarker.task",
        ),
    )

    @staticmethod
    def open_detector(mediapipe: Any, file: str, threshold: float) -> Any:
        """MediaPipe's ``HandLandmarker`` for up to four hands."""
        vision = mediapipe.tasks.vision
        base = mediapipe.tasks.BaseOptions(model_asset_path=file)
        options = vision.HandLandmarkerOptions(
            base_options=base,
            num_hands=4,
            min_hand_detection_confidence=threshold,
            min_hand_presence_confidence=threshold,
        )
        return vision.HandLandmarker.create_from_options(options)

    @staticmethod
    def confidences(result: Any) -> list[float]:
        """Each hand's score."""
        return [float(hand[0].score) for hand in result.handedness]


def _mediapipe(reward: str) -> Any:
    try:
        import mediapipe
    except ImportError as error:
        raise MissingDependencyError(
            f"rewards: {reward!r} needs the package mediapipe: pip install 'fastcraft[detectors]'"
        ) from error
    return mediapipe
