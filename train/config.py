"""The settings of the training loop, the same for every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from imgtok.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): of a matrix a product of two thin ones is trained, which is added to it."""

    rank: PositiveInt = 16
    """Columns of the thin matrices."""
    alpha: PositiveFloat = 32.0
    """The product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("*attention.*", "*.mlp.*")
    """Patterns of the linear layers that get adapters, by their names in the model."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and how carefully to train; the `training` section of every training job."""

    steps: NonNegativeInt
    """Optimizer steps of the whole run; 0 saves the untrained model, the control to compare with."""
    batch_size: PositiveInt
    """Images per process and micro-batch; a step sees batch_size x accumulate x processes images."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW."""
    accumulate: PositiveInt = 1
    """Micro-batches whose gradients are averaged into one optimizer step."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment, both below 1."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's decoupled weight decay, on tensors of two or more dimensions."""
    mup_base_width: NonNegativeInt = 0
    """muP: matrices that read the network's width w learn at this / w of the rate, so that a rate found at one width
    suits another; for models that are made for it. 0 gives every parameter the same rate."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient, measured for each group of parameters by itself (a discriminator is a group of its
    own); 0 never clips."""
    warmup: NonNegativeInt = 0
    """Steps below the peak at the start: step s < warmup has (s + 1) / (warmup + 1) of the peak. A run that would end
    before them warms up for a tenth of its steps."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """How the rate falls after the warm-up."""
    final_rate: Fraction = 0.0
    """Rate of the last step as a fraction of the peak (cosine and linear)."""
    decay_from: Fraction = 0.0
    """Fraction of the steps at which the fall begins; never before the warm-up ends."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights and optimizer stay fp32. fp16 needs a GPU."""
    ema: Fraction = 0.999
    """Decay of the averaged weights, below 1; 0 keeps none."""
    ema_warmup: bool = True
    """Begin with a smaller decay, min(ema, (1 + s) / (10 + s)) after step s, so that short runs do not keep their first
    weights in the average; false has the decay `ema` from the first step, as published recipes do."""
    freeze: tuple[str, ...] = ()
    """Patterns (such as encoder.*) of the parameters that are frozen, by their names in the model: they get no
    gradient, no moments of the optimizer, and stay as they are in the averaged weights too."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters of a generator, and what starts afresh, in place of its weights, such as lora={}; the
    finished model has them merged into its weights. It takes peft: pip install 'imgtok[finetune]'. null is none."""
    compile: bool = False
    """Compile the model's forward pass, all but its random draws, with torch.compile."""
    seed: NonNegativeInt = 0
    """Seed of everything random in training: order of the data, noise, dropout of tokens."""
    threads: PositiveInt | None = None
    """CPU threads of torch per process; null leaves torch's choice."""
    num_workers: NonNegativeInt = 0
    """Processes that prepare batches, per training process; 0 prepares them in the training process."""
    log_every: PositiveInt = 50
    """Steps between lines of log.jsonl (means over those steps); the first step is always logged."""
    preview_every: NonNegativeInt = 1000
    """Steps between pictures in samples/; 0 draws them only before the first and after the last step."""
    validate_every: PositiveInt | None = None
    """Steps between validations: the loss of held-out images with the averaged weights, with the same noise each time;
    the first is before the first step and the last after the last one. null never validates."""
    num_validation: PositiveInt = 256
    """Held-out images of a validation, from all over those that there are, or all of them if there are fewer."""
    validation_seed: NonNegativeInt = 0
    """Seed of what is drawn in a validation: noise, times, dropout of tokens and conditions."""
    validation_scores: tuple[Literal["psnr", "oracle", "fd_lite0"], ...] = ()
    """What else a validation measures of the averaged weights: psnr, of reconstructions at every rate; of generators
    oracle, how often drawn shapes are read as their class, and fd_lite0, the Frechet distance of drawn images from
    held-out ones in features of EfficientNet-Lite0."""
    num_scored: PositiveInt = 64
    """Images that the validation's scores are measured on."""
    best: str | None = None
    """Keep the model in best/ whenever this figure of a validation is better than ever before, such as loss, loss/mse,
    psnr@4 or oracle; null keeps none."""
    patience: PositiveInt | None = None
    """End the run after so many validations in which `best`, or else the loss, was no better; null does all steps."""
    save_every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved, and so are the one at which a signal ends the run and
    those whose model goes into best/."""
    save_minutes: PositiveFloat | None = None
    """Minutes after which a checkpoint is written whatever `save_every` says; null leaves it at that."""
    keep: PositiveInt = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    resume: bool = True
    """Continue from the newest complete checkpoint in the output folder, if there is one."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    """Where the log goes besides log.jsonl."""

    def __post_init__(self) -> None:
        check(self)
        if max(self.betas) >= 1:
            raise ValueError(f"betas must be below 1, given {list(self.betas)}")
        for name in ("validation_scores", "best", "patience"):
            if getattr(self, name) and self.validate_every is None:
                raise ValueError(
                    f"{name}: nothing is measured without validation: say after how many steps, such as "
                    f"training.validate_every=500, or leave {name} out"
                )
        if self.ema >= 1:
            raise ValueError(f"ema must be below 1 (such as 0.999; 0 switches it off), given {self.ema}")

    @property
    def warmup_steps(self) -> int:
        """`warmup`, or a tenth of the steps where it does not end before them: a short trial of a long recipe."""
        return self.warmup if self.warmup < self.steps else self.steps // 10
