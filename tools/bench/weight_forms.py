"""What uint8 weights take and damage beside 7-bit int8 ones: of all layers together, and on how many layers they pay.

    python tools/bench/weight_forms.py [--models a,b]

Times are those of layers in the runtime's profile of whole models, damage is of each layer alone. ``hull``: layers for
which uint8 lies below the line from 7 bits to float, so that some price of damage would choose it if the layer stood
alone. Needs the models of ``make models``, and an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fetch_models import MODELS
from placement import CACHE, prepared

from graphopt.judge import timed_feeds
from graphopt.model import clone
from graphopt.passes.quantize_static import QuantizeStatic
from graphopt.search.measured import Search
from graphopt.search.sensitivity import sensitivity

FORMS = ("auto", "u8")


def row(name: str) -> str:
    """One model, Markdown."""
    original, exact, context = prepared(name)
    feeds, prices, damages = timed_feeds(original, context), {}, {}
    for form in FORMS:
        step, rules = QuantizeStatic(weights=form), clone(exact)
        step.run(rules, context)
        search = Search(original, exact, rules, step, context, feeds)
        pricing = search.pricing(given=False)
        pricing.observe([rules], feeds, 1.5)
        prices[form] = pricing.prices()
        damages[form] = {d.layer: d.damage for d in sensitivity(exact, step, context, samples=4)}
    layers = [unit.name for unit in search.units if unit.layer]
    narrow, wide = (prices[form].in_integers for form in FORMS)
    floats = prices["auto"].in_float
    pays = [
        n
        for n in layers
        if damages["u8"][n] < damages["auto"][n]
        and wide[n] < floats[n]
        and (wide[n] - narrow[n]) * damages["auto"][n]
        < (floats[n] - narrow[n]) * (damages["auto"][n] - damages["u8"][n])
    ]
    spent = [sum(side[n] for n in layers) / 1e3 for side in (narrow, wide, floats)]
    done = [sum(damages[form][n] for n in layers) for form in FORMS]
    times = " | ".join(f"{us:.0f} us" for us in spent)
    return f"| {name} | {times} | {done[1] / done[0]:.2f} | {len(pays)} of {len(layers)} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated names (default: all that are fetched)")
    options = parser.parse_args()
    wanted = options.models.split(",") if options.models else [m.name for m in MODELS]
    print("| model | layers, 7 bits | uint8 | float | damage of uint8 over 7 bits | hull |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in (n for n in wanted if (CACHE / n / "evaluation.npz").is_file()):
        print(row(name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
