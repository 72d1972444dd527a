"""`python -m examples.demo`: load, write, compare, train, show.

Exits with 0 when the fused loss agrees with float64 within the stated tolerance, 1 when it does
not, and 2 when something is missing or an argument makes no sense.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from examples.demo import DemoError

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "build" / "demo"
NEEDED = ("torch", "transformers", "rich", "matplotlib")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise DemoError(f"these packages are missing: `pip install {' '.join(missing)}`")
        if options.output.exists() and not options.output.is_dir():
            raise DemoError(f"--output must be a folder, and {options.output} is a file")
        from examples.demo.run import run  # takes seconds: a mistake above is answered at once

        return run(
            steps=options.steps,
            new_tokens=options.tokens,
            seed=options.seed,
            device_name=options.device,
            cache=CACHE,
            output=options.output,
        )
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
        return int(text)

    def seed(text: str) -> int:
        if not text.isdecimal() or int(text) >= 2**32:
            raise argparse.ArgumentTypeError(f"expected a number from 0 to 2^32 - 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="A real model, eager against fused, and a short training run. Offline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=24, help="training steps")
    parser.add_argument("--tokens", type=positive, default=24, help="longest completion, in tokens")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling and the gate's draws")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, default=CACHE, help="folder for demo.html, demo.png and demo.json"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
