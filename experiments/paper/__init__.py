"""The figures and claims of Medha's paper (arXiv 2409.17264), computed by the simulator: ``convoy paper``."""
