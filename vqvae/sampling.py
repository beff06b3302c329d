"""The options of samplers, for the command line and for `sample`: ranges, defaults and explanations.

This module imports no torch, because `--help` prints them.
"""

from typing import Any

from vqvae.registry import Option, Range

OPTIONS = {  # by name; a default of None stands for the prior's own
    option.name: option
    for option in (
        Option(
            "temperature", float, 1.0, (Range(0, below=1000),),
            "temperature of sampling; below 1, samples are likelier and less varied, and at 0 each code is the "
            "likeliest (default: 1)",
        ),
        Option("top_k", int, 0, (Range(0),), "sample among the K likeliest codes (default: 0, all)"),
        Option(
            "top_p", float, 1.0, (Range(above=0, high=1),),
            "sample among the fewest likeliest codes that have this probability together (default: 1, all)",
        ),
        Option(
            "guidance", float, 1.0, (Range(0, below=1000),),
            "strength of the class, for a conditional prior trained with label_drop; above 1, samples are more typical "
            "of it (default: 1)",
        ),
        Option("steps", int, None, (Range(1),), "steps of sampling from a masked prior (default: 8)"),
        Option(
            "choice_temperature", float, None, (Range(0),),
            "noise in the order in which a masked prior keeps codes; 1e9 makes it random (default: 4.5)",
        ),
    )
}  # fmt: skip


def checked(name: str, value: Any) -> Any:
    """The value of an option in its type. Raises `OptionError`, a ValueError, for one out of range."""
    return OPTIONS[name].convert(value)
