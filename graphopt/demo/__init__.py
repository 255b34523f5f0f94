"""The model, data and recipe of ``graphopt demo``; made by ``tools/make_fixtures.py``."""
