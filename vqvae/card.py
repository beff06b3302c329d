"""The model card of an exported folder: a README.md that says what the model is, for hubs and for people.

B batch, C channels, H W pixels, h w code grid, K codes.
"""

from collections.abc import Mapping
from typing import Any

from vqvae.autoencoder import SLOTS, Autoencoder
from vqvae.config import Config
from vqvae.errors import printable
from vqvae.metrics import METRICS
from vqvae.registry import brief

CARD = "README.md"
UNSTATED = "other"  # the hubs' word for a license that is none of those they know


def model_card(
    content: Mapping[str, Any],
    model: Autoencoder,
    usage: str,
    *,
    library: str,
    evaluation: Mapping[str, Any] | None = None,
    license: str = UNSTATED,
) -> str:
    """The card of a model, given its checkpoint's content, as Markdown with the metadata that hubs read.

    `usage` is Markdown that says how to use the files; `library` and `license` are identifiers of a hub.
    """
    sections = [
        _metadata(library, license),
        f"# {_plain(content['run'])}",
        _what(content, model),
        f"## Use\n\n{usage}",
        f"## Training\n\n{_training(content)}",
        f"## Evaluation\n\n{_metrics(evaluation)}",
        f"## License\n\n{_license(license)}",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(library: str, license: str) -> str:
    named = ["license_name: not-stated"] if license == UNSTATED else []
    tags = ["tags:", "- vqvae", "- image-tokenizer"]
    return "\n".join(["---", f"license: {license}", *named, f"library_name: {library}", *tags, "---"])


def _what(content: Mapping[str, Any], model: Autoencoder) -> str:
    config, shape = Config.from_dict(content["config"]), "x".join(map(str, model.image_shape))
    chosen = {name: _plain(brief(slot, getattr(config, name))) for name, slot in SLOTS.items()}
    parameters = sum(p.numel() for p in model.parameters())
    rows = {
        "image": f"{shape} (channels, rows, columns)",
        "latent": model.bottleneck.describe(),
        "parameters": f"{parameters:,}",
    }
    kind = "tokenizer" if model.discrete is not None else "autoencoder"
    return f"An image {kind}, trained with vqvae.\n\n{_table(('property', 'value'), rows | chosen)}"


def _training(content: Mapping[str, Any]) -> str:
    config, data = content["config"], content["data"]
    examples = data.get("examples", {})
    rows = {
        "data": f"{_plain(data['name'])}" + (f" ({_plain(data['note'])})" if data["note"] else ""),
        **{f"examples, {split}": f"{count:,}" for split, count in examples.items()},
        "steps": f"{content['step']:,}",
    }
    if content["step"]:
        rows |= {"batch size": str(config["batch_size"]), "learning rate": config["lr"], "seed": str(config["seed"])}
    return _table(("setting", "value"), rows)


def _metrics(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "Not evaluated."
    numbers = {key: value for key, value in evaluation.items() if type(value) in (int, float)}
    rows = {
        name: (_number(numbers[name]) + (f" ± {_number(numbers[f'{name}_se'])}" if numbers.get(f"{name}_se") else ""))
        for name in METRICS
        if name in numbers
    }
    images = f"On {numbers['images']:,} held-out examples" if "images" in numbers else "On held-out examples"
    explained = {name: f"{value} | {_plain(METRICS[name].explanation)}" for name, value in rows.items()}
    table = _table(("metric", "value | what it is"), explained, columns=3)
    protocol = [f"Protocol: {_plain(evaluation['protocol'])}."] if "protocol" in evaluation else []
    return "\n\n".join([f"{images}; ± is the standard error.", table, *protocol])


def _license(license: str) -> str:
    if license != UNSTATED:
        return f"The weights are under the license {license}. The data may have terms of their own."
    return "The publisher of the weights stated no license. The data may have terms of their own."


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _table(head: tuple[str, str], rows: Mapping[str, str], columns: int = 2) -> str:
    lines = [head, ("---",) * columns, *rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: object) -> str:
    """Text of a checkpoint as Markdown shows it unchanged, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#|~" else c for c in printable(str(text)))
