"""This file makes tests a package, because torch-fidelity installs a package of the same name."""
