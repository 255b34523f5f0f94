"""graphopt's passes: one per file, named as its file, listed in ``graphopt.registry``."""
