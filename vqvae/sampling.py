"""The options of samplers, for the command line and for `sample` of priors: ranges, defaults and explanations.

This module imports no torch, because `--help` prints them.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vqvae.registry import Option, Range


class Sampling(NamedTuple):
    """How a sampler draws. Priors over vectors have a temperature only, and masked priors have all options.

    temperature         divides the logits; at 0, each position gets its likeliest code. It multiplies the deviation of
                        vectors.
    top_k               number of most likely codes to draw from at each position, at most K; 0 for all.
    top_p               draws from the fewest most likely codes that have this probability together (1904.09751), at
                        that temperature and among the top_k; 1 for all.
    guidance            how much stronger the label's influence is: logits are u + guidance (c - u), with the label (c)
                        and without it (u); 1 leaves it, 0 ignores the label. Needs a prior trained with `label_drop`.
    steps               forward passes of a masked prior; at most one per code that is not given.
    choice_temperature  scale of the Gumbel noise in a masked prior's choice of the codes to keep, which falls linearly
                        with the steps, to 0 at the last. A large one, such as 1e9, makes the order random: with as many
                        steps as codes, samples then follow the chain.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    steps: int = 8
    choice_temperature: float = 4.5  # MaskGIT's

    @classmethod
    def of(cls, options: Mapping[str, Any], known: Collection[str]) -> "Sampling":
        """Convert options to their types, for a sampler that takes those in `known`.

        Raises `OptionError`, a ValueError, for a value out of range, and TypeError for another option.
        """
        if others := [name for name in options if name not in known]:
            raise TypeError(f"sample() takes no {others[0]} with this prior; its options are {', '.join(known)}")
        return cls(**{name: OPTIONS[name].convert(value) for name, value in options.items()})


DEFAULTS = Sampling()
OPTIONS = {  # by name; a default of None, of options for masked priors only, stands for the default in `Sampling`
    option.name: option
    for option in (
        Option(
            "temperature", float, DEFAULTS.temperature, (Range(0, below=1000),),
            "temperature of sampling; below 1, samples are likelier and less varied, and at 0 each code is the "
            "likeliest (default: 1)",
        ),
        Option("top_k", int, DEFAULTS.top_k, (Range(0),), "sample among the K likeliest codes (default: 0, all)"),
        Option(
            "top_p", float, DEFAULTS.top_p, (Range(above=0, high=1),),
            "sample among the fewest likeliest codes that have this probability together (default: 1, all)",
        ),
        Option(
            "guidance", float, DEFAULTS.guidance, (Range(0, below=1000),),
            "strength of the class, for a conditional prior trained with label_drop; above 1, samples are more typical "
            "of it (default: 1)",
        ),
        Option("steps", int, None, (Range(1),), f"steps of sampling from a masked prior (default: {DEFAULTS.steps})"),
        Option(
            "choice_temperature", float, None, (Range(0),),
            "noise in the order in which a masked prior keeps codes; 1e9 makes it random "
            f"(default: {DEFAULTS.choice_temperature})",
        ),
    )
}  # fmt: skip
