"""The settings of reward back-propagation, by which its methods differ."""

from dataclasses import dataclass
from typing import Literal

from fastcraft.errors import UserError
from fastcraft.objectives.base import Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class BackpropSettings:
    """What tells the methods apart: the recipe's section [objective], besides its name."""

    backprop_steps: int = 5
    """K, denoising steps that carry gradient."""
    truncation: Literal["last", "random", "single", "spaced"] = "last"
    """Which K steps. last: the last K (TextCraftor, DRaFT); random: a random number of last steps for each sample,
    mean K (AlignProp); single: one of the last K, ending with its x0 estimate (ReFL); spaced: K at equal distances
    (DRTune)."""
    truncation_std: float = 0.0
    """Standard deviation, in steps, of AlignProp's random truncation point."""
    input_grad: bool = True
    """false = stop-gradient on the latents entering the UNet (DRTune). Changes the gradient."""
    uncond_grad: bool = True
    """false = stop-gradient on the unconditional noise prediction. Changes the gradient."""
    straight_through_clamp: bool = False
    """true = where a picture is clamped to [0, 1], the gradient passes as if it were not; otherwise it is zero there.
    Changes the gradient. The clamp after a reward's resize is that reward's option ``clamp``."""
    early_stop_steps: int = 0
    """DRTune: the trajectory ends, with an x0 estimate, up to this many steps early, at random; 0 = never."""
    low_variance_draws: int = 1
    """DRaFT-LV: noisings of the final latents whose last-step gradients are averaged; needs backprop_steps 1."""
    loss: Literal["negative_reward", "hinge"] = "negative_reward"
    """negative_reward: -mean(total); hinge: mean(relu(hinge_margin - total)) (ReFL)."""
    hinge_margin: float = 2.0
    """Reward above which the hinge loss is zero."""
    loss_scale: float = 1.0
    """Multiplies the loss (ReFL 1e-3, AlignProp 0.01)."""
    normalize_rewards: Literal["none", "running_std", "gradient_share"] = "none"
    """running_std divides each reward by the running standard deviation of its scores before weighting; gradient_share
    scales it so that its gradient at the picture has norm weight / sum of weights in every micro-batch."""
    anchor_weight: float = 0.0
    """Weight of mean squared distance between trained and original embeddings; 0 = off."""

    def __post_init__(self) -> None:
        for name, least in (
            ("backprop_steps", 1), ("truncation_std", 0), ("early_stop_steps", 0), ("low_variance_draws", 1),
            ("anchor_weight", 0),
        ):  # fmt: skip
            if not getattr(self, name) >= least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.loss_scale > 0:
            raise UserError(f"loss_scale must be greater than 0, got {self.loss_scale}")
        if self.low_variance_draws > 1 and (self.backprop_steps > 1 or self.truncation != "last"):
            raise UserError(
                "low_variance_draws above 1 needs backprop_steps = 1 and truncation = 'last', got "
                f"backprop_steps = {self.backprop_steps}, truncation = {self.truncation!r}"
            )
        if self.early_stop_steps and self.truncation != "spaced":
            raise UserError(f"early_stop_steps needs truncation = 'spaced', got {self.truncation!r}")

    @property
    def needs(self) -> Needs:
        """What these settings ask of the rest of a run."""
        return Needs(
            reward_gradients=True,
            backprop_steps=self.backprop_steps,
            input_grad=self.input_grad,
            uncond_grad=self.uncond_grad,
            fixed_prefix=self.truncation == "last",
            original_embeds=self.anchor_weight > 0,
            straight_through_clamp=self.straight_through_clamp,
            normalize_rewards=self.normalize_rewards,
        )

    def check(self, *, num_inference_steps: int, prefix_by: str) -> None:
        """Raise `UserError` where the settings do not fit the sampler's T or who conditions the prefix."""
        for name, most in (("backprop_steps", num_inference_steps), ("early_stop_steps", num_inference_steps - 1)):
            if getattr(self, name) > most:
                raise UserError(
                    f"{name} must be at most {most} with {num_inference_steps} denoising steps, got "
                    f"{getattr(self, name)}"
                )
        if self.truncation == "random" and prefix_by != "trained":
            raise UserError(
                "truncation = 'random' needs a prefix by the trained encoder (samples start at different steps), got "
                f"{prefix_by!r}"
            )
