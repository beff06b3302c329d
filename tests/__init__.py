"""A package of its own: torch-fidelity installs one of the same name, which a mere folder would not shadow."""
