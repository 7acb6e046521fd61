"""How much of what is private the scrubber finds, and what it takes for private by mistake.

    python -m benchmarks.bench_privacy --plants 20000 --seed 7

The corpus is made from the seed: see `tests/test_data/privacy_corpus.py`. Prints a table by kind
and, as its last line, the figures as JSON. `--show 20` prints misses and mistakes; they are
invented values, so that is safe.
"""

import argparse
import json
import time

from dflash_data.privacy.detectors import KINDS
from tests.test_data.privacy_corpus import Score, make_corpus, score


def main() -> None:
    """Make the corpus, score the detectors and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plants", type=int, default=20_000, help="and as many look-alikes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, help="misses and mistakes to print")
    options = parser.parse_args()
    samples = list(make_corpus(options.plants, seed=options.seed))
    begin = time.perf_counter()
    total = score(iter(samples))
    seconds = time.perf_counter() - begin
    for sample in total.missed[: options.show]:
        print("missed", sample.kind, repr(sample.text)[:160])
    for sample, kind in total.wrong[: options.show]:
        print("wrong ", kind, "in", sample.kind, repr(sample.text)[:160])
    print(table(total))
    print(json.dumps(figures(total) | {"seed": options.seed, "seconds": round(seconds, 2)}))


def table(total: Score) -> str:
    """Give one line by kind."""
    lines = ["kind              planted  recall  exact   found  precision"]
    for kind in KINDS:
        exact = total.exact[kind] / max(1, total.planted[kind])
        lines.append(
            f"{kind:16} {total.planted[kind]:8}  {total.recall(kind):6.4f}  {exact:6.4f}"
            f"  {total.found[kind]:6}  {total.precision(kind):9.4f}"
        )
    return "\n".join(lines)


def figures(total: Score) -> dict[str, object]:
    """Give what the issue asks for: recall and precision by kind and over all."""
    return {
        "plants": total.planted.total(),
        "recall": {kind: round(total.recall(kind), 5) for kind in KINDS},
        "precision": {kind: round(total.precision(kind), 5) for kind in KINDS},
        "precision_overall": round(total.right.total() / max(1, total.found.total()), 5),
    }


if __name__ == "__main__":
    main()
