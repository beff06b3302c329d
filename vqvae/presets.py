"""Published set-ups, each written as the flags it stands for."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Settings that differ from the defaults, written as on the command line, and where they are published."""

    source: str
    settings: dict[str, Any]
    prior: dict[str, Any] | None = None  # settings of the second stage, if there is one
    differs: tuple[str, ...] = ()  # what is not as in the source, each with its reason


# flags of a preset of two stages that apply to the second stage only, and to both
OF_THE_PRIOR = ("prior", "conditional", "patience")
OF_BOTH_STAGES = (
    "batch_size", "accumulate", "clip", "ema_weights", "shuffle", "validation", "device", "precision", "compile",
    "seed", "on_nan", "data_shards", "log_dir", "plot_dir", "log_every", "checkpoint_every", "save_every", "max_steps",
    "max_minutes",
)  # fmt: skip
ADAM = {"optimizer": "adamw"}
WHOLE = ADAM | {"validation": "test"}  # of sources that train on the whole training split and watch the test split
WATCHED = "evaluated after each epoch and chooses best.pt, because the source holds out nothing else"
VAE_2D = WHOLE | {
    "nets": "mlp",
    "bottleneck": "gaussian latents=2",
    "likelihood": "gaussian",
    "prior": "normal",
    "objective": "elbo reduction=sum",
    "lr": "cosine:2e-3:0",
    "batch_size": 64,
    "epochs": 60,
    "precision": "fp32",  # points need more digits than bfloat16 has, and such small nets gain nothing from it
}
IMAGE_VAE = WHOLE | {
    "nets": "conv-vae",
    "bottleneck": "gaussian latents=16",
    "likelihood": "logit-gaussian",
    "prior": "normal",
    "objective": "elbo reduction=sum",
    "lr": "1e-3",
}

VAE_2D_DIFFERS = (
    "60 epochs from a rate of 2e-3, because after 10 at 1e-3 some seeds still do not use the latent",
    "test points of their own, because the source's are training points",
)
IMAGE_VAE_DIFFERS = (
    "the encoder reads the middle of each level (u = 0.5), so that the latent is a function of the image; the target "
    "gets fresh noise in each step. In the source both have the noise that was drawn once for each image",
    "16 latents at a rate of 1e-3, as its README says; its code has 32 and 5e-4 for CIFAR-10",
)
VLAE_DIFFERS = (*IMAGE_VAE_DIFFERS, "a tanh keeps log s of the flow within ±4, so that no step makes it overflow")

SONNET = ADAM | {"bottleneck": "vq beta=0.25 warmup=no spread=0", "lr": "3e-4"}
SONNET_NOTE = "with our k-means start and revival (without: --bottleneck vq init=fan-in revive=0)"

HENRHOI_VQVAE = WHOLE | {
    "dataset": "cifar10",
    "nets": "henrhoi",
    "likelihood": "mse pixels=symmetric variance=0.125",
    "bottleneck": "vq num_codes=128 code_dim=256 codebook=gradient init=uniform revive=0 warmup=no beta=1 "
    "weight=5.3333 projection=no",
    "lr": "1e-3",
    "epochs": 40,
}

PROBABILISTIC = WHOLE | {
    "dataset": "mnist-binary",
    "nets": "mnist-conv",
    "likelihood": "bernoulli",
    "prior": "transformer layers=6 width=16",
    "lr": "1e-3",
    "epochs": 22,
    "max_steps": 10_000,
}
SUM = "probabilistic reduction=sum"
STOPPED = f"{SUM} stop_gradient_for_prior=yes"
LATE, FROZEN = "iaf_startup_steps=5000", "iaf_startup_steps=5000 stop_training_encoder_after_startup=yes"
ROY = "categorical init=normal revive=0 num_samples=10 average_samples=yes"
GUMBEL = "gumbel init=normal revive=0 num_samples=10 temperature=0.5 beta=0.05"

DVQ = WHOLE | {
    "dataset": "cifar10",
    "nets": "deepmind",
    "likelihood": "mse variance=0.0632704",
    "augment": "crop-flip",
    "lr": "quarter-cosine:3e-4:1.25e-6:1200000",
    "weight_decay": 1e-4,
    "epochs": 98,
}
DVQ_GUMBEL = DVQ | {
    "bottleneck": "gumbel posterior=linear num_codes=512 code_dim=64 entropy=exact "
    "temperature=quarter-cosine:1:0.0625:150000",
}
HENRHOI_SOURCE = "github.com/henrhoi/vae-pytorch"
DVQ_SOURCE = "github.com/karpathy/deep-vector-quantization"
DVQ_LENGTH = "98 epochs, as in its figure, end early in its schedules: shorten the schedules with them"
DVQ_NOISE = "evaluation takes the most likely code without noise, so that it can be repeated; the source adds noise"
HENRHOI_DIFFERS = (
    "pixels in [-1, 1], as its README says; its code adds noise and takes logits, which an MSE does not need",
)
PATIENCE = "the prior stops after 5 epochs without a better validation metric, on a tenth of the training images"
PIXELCNN_DIFFERS = (
    *HENRHOI_DIFFERS,
    PATIENCE,
    "channel layer norm, because batch norm over positions lets a code see later ones in training",
)
GATED_DIFFERS = (
    *HENRHOI_DIFFERS,
    PATIENCE,
    "the first layer is a gated one of type A, and the head ReLU, 1x1, ReLU, 1x1, both as in 1606.05328; the source "
    "begins and ends with a plain masked 7x7 convolution",
)
PROBABILISTIC_DIFFERS = (
    "the first codes count as much as an average batch and fade, because the nearly uniform assignments of the first "
    "steps would give all codes one mean; counts are smoothed by Laplace's rule (in the source by adding 1e-5)",
    "5x5 convolutions of stride 2 pad 2 pixels on each side; SAME pads 1 and 2, which shifts their grid by a pixel",
    "weights start at unit gain, because soft assignments stay uniform where features hardly depend on the image",
)

SQVAE_SOURCE = "github.com/sony/sqvae, vision (2205.07547)"
SQVAE_FIGURES = (
    "Published figures use the nearest code. Their MSE is a squared error summed over an image. Their perplexity is "
    "averaged over batches of 32 images, and so below that of the whole split. VQ-WAE (2302.05917) prints SQ-VAE "
    "with 512 codes on every data set: --codes 512"
)
SQVAE = {
    # data set: codes, variance of the quantization at the start, nets, 10,000 of the training images
    "mnist": (128, 11, "sqvae", "0.1666667"),
    "fashion-mnist": (256, 11, "sqvae", "0.1666667"),
    "cifar10": (512, 21, "sqvae middle=yes", "0.2"),
}
# best.pt, chosen by the validation split, is the published model
SQVAE_LENGTH = ADAM | {"batch_size": 32, "epochs": 100, "lr": "plateau:1e-3:0.5:3"}
SQVAE_VALIDATION = "its 10,000 validation images are the last ones; here they are drawn from the whole training split"
SQVAE_DIFFERS = (
    SQVAE_VALIDATION,
    "validation scores a hard draw, with the running mean of the pixels' variance, because that is a bound; the source "
    "scores the nearest code, with the variance of each batch",
)


def _sqvae(data: str) -> Preset:
    codes, variance, nets, validation = SQVAE[data]
    settings = {
        "dataset": data,
        "validation": validation,
        "nets": nets,
        "bottleneck": f"stochastic num_codes={codes} code_dim=64 variance={variance}",
        "likelihood": "mse variance=learned pixels=sigmoid",
        "objective": "elbo reduction=sum",
    }
    source = f"{SQVAE_SOURCE}: Gaussian SQ-VAE I, K = {codes}. {SQVAE_FIGURES}"
    return Preset(source, settings | SQVAE_LENGTH, differs=SQVAE_DIFFERS)


def _sqvaes_vq(data: str) -> Preset:
    codes, _, nets, validation = SQVAE[data]
    settings = {
        "dataset": data,
        "validation": validation,
        "nets": nets,
        "bottleneck": f"vq num_codes={codes} code_dim=64 beta=0.25 init=fan-in revive=0 warmup=no projection=no",
        "likelihood": "mse pixels=sigmoid",
    }
    source = (
        f"VQ-VAE in the protocol of {SQVAE_SOURCE}, whose code has none: Sonnet's EMA codebook and loss, without our "
        f"k-means start and revival (with: --bottleneck vq init=kmeans revive=0.03 warmup=yes)"
    )
    return Preset(source, settings | SQVAE_LENGTH, differs=(SQVAE_VALIDATION,))


def _experiment(text: str, bottleneck: str, objective: str) -> Preset:
    source = f"probabilistic VQ-VAEs on binarized MNIST, experiment {text}"
    settings = PROBABILISTIC | {"bottleneck": bottleneck, "objective": objective}
    return Preset(source, settings, differs=PROBABILISTIC_DIFFERS)


PRESETS = {
    "sonnet-cifar10": Preset(
        "github.com/google-deepmind/sonnet, VQ-VAE example: EMA codebook, batch 32, 10,000 steps on 40,000 images; "
        f"{SONNET_NOTE}",
        SONNET | {"dataset": "cifar10", "validation": "0.2", "batch_size": 32, "epochs": 8, "max_steps": 10_000},
        differs=(
            "its 10,000 validation images are the last ones; here they are drawn from the whole training split",
            "a code that no vector has used yet keeps its vector; in the source it becomes 0",
        ),
    ),
    "sonnet-mnist": Preset(
        "the same nets and codebook on MNIST, 20 epochs at batch 128",
        SONNET | {"dataset": "mnist", "epochs": 20},
    ),
    "henrhoi-vqvae": Preset(
        f"{HENRHOI_SOURCE}: K = 128, D = 256, gradient codebook from ±1/K, pixels in [-1, 1]; its loss divides both "
        "codebook terms by the number of pixels, which weights their means by 64 * 256 / 3072",
        HENRHOI_VQVAE,
        differs=HENRHOI_DIFFERS,
    ),
    "vqvae-pixelcnn": Preset(
        f"{HENRHOI_SOURCE}: its VQ-VAE, then a PixelCNN on the codes",
        HENRHOI_VQVAE,
        ADAM | {"prior": "pixelcnn", "lr": "1e-3", "epochs": 30, "patience": 5, "validation": "0.1"},
        differs=PIXELCNN_DIFFERS,
    ),
    "vqvae-gated-pixelcnn": Preset(
        f"{HENRHOI_SOURCE}: its VQ-VAE, then a Gated PixelCNN on the codes",
        HENRHOI_VQVAE | {"lr": "8e-4", "batch_size": 64, "epochs": 30},
        ADAM
        | {
            "prior": "gated-pixelcnn channels=256 layers=13 kernel=7",
            "lr": "8e-4",
            "batch_size": 64,
            "epochs": 30,
            "patience": 5,
            "validation": "0.1",
        },
        differs=GATED_DIFFERS,
    ),
    **{
        f"vae-2d-{number}": Preset(
            f"{HENRHOI_SOURCE}, 2-D VAE, data set {number}",
            VAE_2D | {"dataset": f"gauss2d set={number}"},
            differs=VAE_2D_DIFFERS,
        )
        for number in (1, 2)
    },
    **{
        f"vae-{data}": Preset(
            f"{HENRHOI_SOURCE}, image VAE, 16 latents",
            IMAGE_VAE | {"dataset": data, "epochs": epochs},
            differs=IMAGE_VAE_DIFFERS,
        )
        for data, epochs in (("cifar10", 50), ("svhn", 20))
    },
    **{
        f"vlae-{data}": Preset(
            f"{HENRHOI_SOURCE}, VAE with an autoregressive-flow prior (the prior half of 1611.02731)",
            IMAGE_VAE | {"dataset": data, "prior": "made-flow", "epochs": 30},
            differs=VLAE_DIFFERS,
        )
        for data in ("cifar10", "svhn")
    },
    "vqvae-bits": Preset(
        "1711.00937, section 4.1, CIFAR-10 in bits/dim: 8x8x10 codes of 512, nets of 256 channels, Adam at 2e-4, "
        "250,000 steps of 128 images. Its authors explain in github.com/google-deepmind/sonnet/issues/131 that each "
        "position has several codebooks, and that a 256-way softmax predicts each channel",
        WHOLE
        | {
            "dataset": "cifar10",
            "nets": "sonnet hidden=256 residual_hidden=256",
            "bottleneck": "grouped groups=10 num_codes=512 code_dim=640 beta=0.25",
            "likelihood": "softmax256",
            "lr": "2e-4",
            "epochs": 641,
            "max_steps": 250_000,
        },
        prior=ADAM
        | {
            "prior": "gated-pixelcnn",
            "lr": "cosine:1e-3:1e-5",
            "epochs": 20,
            "batch_size": 64,
            "validation": "0.1",
        },
        differs=(
            "64 dimensions in each codebook, as in Sonnet's example, because the paper prints none",
            "our k-means start, spread, warm-up of the decay and revival; the paper prints no start",
            "a Gated PixelCNN over the codes, because the paper does not name the prior of this figure",
        ),
    ),
    "dvq-vqvae": Preset(
        f"{DVQ_SOURCE}: K = 512, D = 64, gradient codebook after k-means, its loss times 10, half of Sonnet's MSE / "
        "variance; stops after 98 epochs, as in its figure, early in its rate's 1.2 million steps",
        DVQ
        | {
            "bottleneck": "vq num_codes=512 code_dim=64 codebook=gradient init=kmeans spread=0 revive=0 warmup=no "
            "beta=0.25 weight=10"
        },
        differs=("k-means starts with k-means++ instead of random vectors",),
    ),
    "dvq-gumbel": Preset(
        f"{DVQ_SOURCE}: Gumbel-Softmax on the same nets; its KL weight is 5e-4 on a mean over 8x8 codes, next to a "
        f"mean over 3,072 dimensions: 0.024 on the sum over codes (the bound's is 1). {DVQ_LENGTH}",
        DVQ_GUMBEL | {"objective": "elbo kl_weight=quarter-cosine:0:0.024:5000"},
        differs=(DVQ_NOISE,),
    ),
    "dvq-dalle": Preset(
        f"{DVQ_SOURCE} with DALL-E's objective (2102.12092): dVAE nets of width 64, 4x4 codes, logit-Laplace pixels. "
        "The KL, summed over codes, is weighted up to 6.6 before everything is divided by the dimensions, as "
        "reduction=mean does (192 per code, here and there). DALL-E itself has nets of width 256, K = 8,192, a rate "
        f"from 1e-4, averaged weights and no mirroring. {DVQ_LENGTH}",
        DVQ_GUMBEL
        | {
            "nets": "dalle",
            "likelihood": "logit-laplace",
            "objective": "elbo kl_weight=quarter-cosine:0:6.6:5000",
        },
        differs=(
            DVQ_NOISE,
            "the 1x1 projection to K logits starts as in PyTorch, as the source's does; DALL-E's starts like its other "
            "convolutions, with a variance of 1 / fan-in",
        ),
    ),
    "probabilistic-1": _experiment(
        "1, baseline: the nearest code", "deterministic init=normal revive=0", f"{SUM} entropy_scale=0"
    ),
    "probabilistic-2.1": _experiment(
        "2.1: ten categorical samples averaged (1805.11063), prior and entropy as means over latents",
        ROY,
        f"{STOPPED} entropy_scale=0 sum_over_latents=no",
    ),
    "probabilistic-2.2": _experiment(
        "2.2: 2.1 with the entropy term", f"{ROY} beta=0.05", f"{STOPPED} sum_over_latents=no"
    ),
    "probabilistic-2.3": _experiment("2.3: 2.2 summed over latents, as in the bound", f"{ROY} beta=0.05", STOPPED),
    "probabilistic-2.4": _experiment("2.4: 2.3 with the prior's gradient to the encoder", f"{ROY} beta=0.05", SUM),
    "probabilistic-2.5": _experiment(
        "2.5: 2.2 with a flow on the simplex, trained from step 5,000 with the encoder frozen",
        f"{ROY} beta=0.05 iaf_flows=1",
        f"{STOPPED} sum_over_latents=no {FROZEN}",
    ),
    "probabilistic-3": _experiment("3: Gumbel-Softmax, ten samples, each decoded", GUMBEL, SUM),
    "probabilistic-4.1": _experiment(
        "4.1: 3 with a flow on the simplex, all trained together", f"{GUMBEL} iaf_flows=1", SUM
    ),
    "probabilistic-4.2.1": _experiment(
        "4.2.1: the flow trains from step 5,000, the encoder too", f"{GUMBEL} iaf_flows=1", f"{SUM} {LATE}"
    ),
    "probabilistic-4.2.2": _experiment(
        "4.2.2: the flow trains from step 5,000, the encoder no longer", f"{GUMBEL} iaf_flows=1", f"{SUM} {FROZEN}"
    ),
    "henrhoi-vqvae-svhn": Preset(
        f"{HENRHOI_SOURCE}: the VQ-VAE of henrhoi-vqvae on SVHN, 20 epochs",
        HENRHOI_VQVAE | {"dataset": "svhn", "epochs": 20},
        differs=HENRHOI_DIFFERS,
    ),
    **{f"sqvae-{data}": _sqvae(data) for data in SQVAE},
    **{f"sqvae-{data}-vq": _sqvaes_vq(data) for data in SQVAE},
    "raq-cifar10": Preset(
        "2405.14222, table 9: VQ-VAE with an EMA codebook, K = 512 (128 and 1,024: --codes), 195,000 steps of 128 "
        "images, AdamW at 5e-4. It describes its nets only by 0.49 million parameters, as many as Sonnet's have with "
        "106 channels; its PSNR is that of the mean MSE",
        ADAM
        | {
            "dataset": "cifar10",
            "nets": "sonnet hidden=106 residual_hidden=32",
            "bottleneck": "vq num_codes=512 code_dim=64 beta=0.25",
            "augment": "crop-flip",
            "lr": "5e-4",
            "weight_decay": 1e-2,
            "epochs": 500,
            "max_steps": 195_000,
            "validation": "test",
        },
        differs=(
            "our k-means start, warm-up of the decay and revival, because it prints none",
            "a constant rate, PyTorch's weight decay and Sonnet's beta, because it prints none",
        ),
    ),
}


def describe() -> str:
    """Every preset as the flags it stands for, with its source: what `--list presets` prints."""
    blocks = []
    for name, preset in PRESETS.items():
        stages = [settings for settings in (preset.settings, preset.prior) if settings]
        flags = [" ".join(f"--{key.replace('_', '-')} {value}" for key, value in stage.items()) for stage in stages]
        notes = [f"\n    differs: {text}" for text in preset.differs]
        if preset.settings.get("validation") == "test":
            notes.append(f"\n    test split: {WATCHED}")
        shown = "\n    then ".join(flags)
        blocks.append(f"--preset {name}\n    {preset.source}\n    {shown}{''.join(notes)}")
    prior, both = (", ".join(f"--{key.replace('_', '-')}" for key in keys) for keys in (OF_THE_PRIOR, OF_BOTH_STAGES))
    blocks.append(
        f"With a preset of two stages, {prior} apply to the second one, {both} to both, and other flags to the first."
    )
    return "\n\n".join(blocks)
