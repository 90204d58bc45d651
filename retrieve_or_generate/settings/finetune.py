"""What CLIP is trained on, how, and how what it learned is measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retrieve_or_generate.settings.base import Settings


class MixSettings(Settings):
    """A training set drawn from two sources: at the scale's size, by count, or weighed in the loss."""

    of: tuple[str, str] = Field(..., description="the two sources, both of which the experiment lists")
    share: float | None = Field(
        None, gt=0, lt=1, description="of the first in a set of as many images as the scale says; null: half"
    )
    counts: tuple[Annotated[int, Field(ge=1)] | None, Annotated[int, Field(ge=1)] | None] | None = Field(
        None, description="in place of share: images of each, whatever the scale; null: as many as the scale says"
    )
    gamma: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="batches of equal halves, their loss γ of the first's and 1 − γ of the second's; null: one set, one loss",
    )

    @model_validator(mode="after")
    def _two(self) -> MixSettings:
        if self.of[0] == self.of[1]:
            raise ValueError(f"of names {self.of[0]!r} twice")
        if self.counts and self.share is not None:
            raise ValueError("give share or counts, not both")
        return self

    @property
    def first_share(self) -> float:
        """Of the first source, where the mixture goes by share."""
        return 0.5 if self.share is None else self.share

    @property
    def words(self) -> str:
        """What a training set of it holds, for the report."""
        first, second = self.of
        if self.counts is None:
            drawn = f"{100 * self.first_share:.3g} % of the images {first}, the others {second}"
        else:
            sizes = zip(self.counts, self.of, strict=True)
            drawn = " and ".join(f"{count:,} {one}" if count else f"n {one}" for count, one in sizes) + " images"
        if self.gamma is None:
            return drawn
        weighed = f"the loss {self.gamma:g} of the {first} half's and {1 - self.gamma:g} of the {second} half's"
        return f"{drawn}, half of each batch from each, {weighed}"


class AdversarialSettings(Settings):
    """Training on images that are changed so that the model errs (PGD)."""

    epsilon: float = Field(..., gt=0, le=255, description="most that a channel of a pixel changes, of 255")
    steps: int = Field(3, ge=1, description="of the attack; each costs as much as an update")
    step_size: float | None = Field(None, gt=0, description="of 255; null: 2.5 ε over the steps")

    @property
    def length(self) -> float:
        """Of one step, of 255."""
        return self.step_size or 2.5 * self.epsilon / self.steps


class FinetuneSettings(Settings):
    """How CLIP is adapted to a training set."""

    model: str | None = Field(
        None, description="what is fine-tuned, with a text tower or without (timm:NAME); null: the experiment's model"
    )
    recipe: Literal["equal_updates", "paper"] = Field(
        "equal_updates",
        description="equal updates at all scales; paper: 30 epochs, 500 warm-up steps, batch 512, rates 5e-4, 1e-5, 1e-6, a look "
        "at val each epoch, float32, unless said otherwise",
    )
    updates: int = Field(32, ge=0, description="optimizer steps, whatever the scale (recipe: equal_updates)")
    epochs: int = Field(30, ge=1, description="passes over the set (recipe: paper)")
    batch_size: int = Field(48, ge=1, description="images per update")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4,), min_length=1, description="tried in turn, chosen on val"
    )
    loss: Literal["cross_entropy", "contrastive"] = Field(
        "cross_entropy",
        description="of the head; contrastive: images against captions of their classes, the text tower trained too (FLYP)",
    )
    head_learning_rate_factor: float = Field(1.0, gt=0, description="head's rate relative to the tower's")
    weight_decay: float = Field(0.1, ge=0, description="AdamW")
    warmup_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of updates with rising rate (recipe: paper: 500 steps)"
    )
    evaluations: int = Field(2, ge=1, description="evenly spaced looks at val; the best is kept")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of the tower's products; weights are float32"
    )
    adversarial: AdversarialSettings | None = Field(
        None, description="train on attacked images: how far they are changed, or epsilon alone; null: on the images"
    )
    wise_ft: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (1.0,),
        min_length=1,
        description="share of the tuned weights, the rest being those before (WiSE-FT); several are chosen from on val",
    )
    checkpoint_every: int = Field(
        0, ge=0, description="updates between two savings of a trial under way; 0: it is saved when it is terminated"
    )
    preprocess: Literal["square", "paper"] = Field(
        "square",
        description="what of a picture is shown, of every source and the task: its central square; paper: all of it, with white "
        "borders",
    )
    working_size: int | None = Field(
        None,
        ge=8,
        description="side in pixels that training images are kept at; null: the model's (the paper: 256 for 224)",
    )
    flip: bool = Field(False, description="mirror half of the training images, drawn anew in each update")
    compile: bool = Field(
        False, description="compile the tower first: a minute, then faster (on a GPU); changes speed and last bits"
    )

    @field_validator("adversarial", mode="before")
    @classmethod
    def _epsilon_alone(cls, given: Any) -> Any:
        alone = isinstance(given, int | float) and not isinstance(given, bool)
        return {"epsilon": given} if alone else given

    @model_validator(mode="after")
    def _attacks_the_head(self) -> FinetuneSettings:
        if self.adversarial and self.loss != "cross_entropy":
            raise ValueError("adversarial goes with loss: cross_entropy, whose head it attacks")
        return self

    @model_validator(mode="after")
    def _says_how_long(self) -> FinetuneSettings:
        """A length that the recipe does not read is not passed over."""
        other, own = ("epochs", "updates") if self.recipe == "equal_updates" else ("updates", "epochs")
        if getattr(self, other) != type(self).model_fields[other].default:
            raise ValueError(f"{other} goes with another recipe; with recipe: {self.recipe} say {own}")
        return self

    @field_validator("wise_ft", mode="before")
    @classmethod
    def _one_share(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int | float) else given

    @model_validator(mode="before")
    @classmethod
    def _recipe_below(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("recipe") != "paper":
            return given
        return _PAPER_FINETUNE | {"evaluations": given.get("epochs", _PAPER_FINETUNE["evaluations"])} | given


_PAPER_FINETUNE: dict[str, Any] = {  # 2406.05184, section D.4, and its released configurations
    "batch_size": 512,
    "learning_rates": (5e-4, 1e-5, 1e-6),
    "evaluations": 30,
    "precision": "float32",
}


class ProbeSettings(Settings):
    """A linear classifier on frozen features of the task's own training images."""

    recipe: Literal["regression", "paper"] = Field(
        "regression", description="multinomial regression solved for each C; paper: a layer trained by AdamW"
    )
    inverse_regularisation: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.1, 1.0, 10.0, 100.0, 1000.0),
        min_length=1,
        description="C of scikit-learn's LogisticRegression, chosen on val",
    )
    learning_rate: float = Field(1e-2, gt=0, description="AdamW's peak (recipe: paper; 1e-3 for its ImageNet)")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's (recipe: paper; 0 for its ImageNet)")
    epochs: int = Field(200, ge=1, description="passes over the features (recipe: paper; 40 for its ImageNet)")
    batch_size: int = Field(256, ge=1, description="images per update (recipe: paper)")
