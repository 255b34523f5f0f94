"""Scripts that run in the interpreter of a framework, one per front end; graphopt need not be installed there."""
