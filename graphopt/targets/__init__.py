"""Target profiles, one TOML file each; ``graphopt.target`` reads them."""
