"""Ways to multiply bfloat16 on a CPU with a float32 result: the table in csrc/README.md.

    python -m benchmarks.products

For the shapes of one chunk (512 tokens, vocabulary 151,936, width 1024) prints TFLOP/s of the three
products, runs interleaved:

    upcast    float32 products of operands upcast in tiles (the `torch` backend without bf16 mode)
    bf16 mode the same with oneDNN's bf16 compute mode
    AMX, AVX512-BF16, AVX2    csrc/gemm_*.cpp, where the CPU has them; d_logits in bf16, for AVX2
              in float32
    float32   torch's `mm` of float32 operands that nothing had to upcast
    2048      the same of 2048 x 2048 x 2048: what this CPU reaches in float32
    mm        torch's bf16 `mm`, which rounds its result to bf16: the bar, not a candidate
"""

import argparse
from collections.abc import Sequence

import torch

from benchmarks.dtypes import bf16_units
from benchmarks.measure import interleaved_times, machine
from tropd_kernels import native, products


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--mm", action=argparse.BooleanOptionalAction,
        help="with torch's bf16 mm; default: where the CPU multiplies bf16 in hardware, since "
        "elsewhere it takes minutes a product",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None):
    args = parse(arguments)
    if args.mm is None:
        args.mm = bf16_units() is not None
        if not args.mm:
            print("no mm: torch multiplies bf16 by plain loops here; --mm takes it all the same")
    for name, fact in machine("cpu").items():
        print(f"{name}: {fact}")
    measure_products(args)


def measure_products(args):
    n, v, h = args.tokens, args.vocab_size, args.hidden_size
    hidden = torch.randn(n, h).bfloat16()
    weight = torch.randn(v, h).bfloat16()
    d_logits = torch.randn(n, v).bfloat16()
    logits, rounded = torch.empty(n, v), torch.empty(n, v, dtype=torch.bfloat16)
    d_weight = torch.zeros(v, h)

    def three(variant: products.TorchProducts, d: torch.Tensor):
        return {
            "logits": lambda: variant.logits_into(logits, hidden, weight),
            "d_hidden": lambda: variant.d_hidden(d, weight),
            "d_weight": lambda: variant.d_weight(d_weight, d, hidden, d_weight),
        }

    def without_bf16_mode(run):
        def call():
            before, products.bf16_in_hardware = products.bf16_in_hardware, lambda: False
            try:
                run()
            finally:
                products.bf16_in_hardware = before

        return call

    def on_units(name, run):
        def call():
            before = torch.ops.tropd_native.use_products(name)
            try:
                run()
            finally:
                torch.ops.tropd_native.use_products(before)

        return call

    wide_hidden, wide_weight, wide_d = hidden.float(), weight.float(), d_logits.float()
    square, square_out = torch.randn(2048, 2048), torch.empty(2048, 2048)
    torch_products = products.TorchProducts(torch.bfloat16, "cpu")
    upcast = three(torch_products, wide_d)
    variants = {"upcast": {what: without_bf16_mode(run) for what, run in upcast.items()}}
    if products.bf16_in_hardware():
        variants["bf16 mode"] = upcast
    for name in native.BF16_PRODUCTS:
        kind, d = (
            (products.NativeFloatProducts, wide_d)
            if name == "AVX2"
            else (products.NativeProducts, d_logits)
        )
        ours = three(kind(torch.bfloat16, "cpu"), d)
        variants[name] = {what: on_units(name, run) for what, run in ours.items()}
    if args.mm:
        variants["mm"] = {
            "logits": lambda: torch.mm(hidden, weight.t(), out=rounded),
            "d_hidden": lambda: torch.mm(d_logits, weight),
            "d_weight": lambda: torch.mm(d_logits.t(), hidden),
        }
    variants["float32"] = {
        "logits": lambda: torch.mm(wide_hidden, wide_weight.t(), out=logits),
        "d_hidden": lambda: torch.mm(wide_d, wide_weight),
        "d_weight": lambda: d_weight.addmm_(wide_d.t(), wide_hidden),
    }
    named = {
        f"{variant} {what}": run for variant, runs in variants.items() for what, run in runs.items()
    }
    named["2048"] = lambda: torch.mm(square, square.t(), out=square_out)
    times = interleaved_times(named, args.repeats, device="cpu")
    work = 2 * n * v * h / 1e12
    print(f"\nTFLOP/s, {n} x {v} x {h}, median of {args.repeats}")
    print(f"{'':12}{'logits':>10}{'d_hidden':>10}{'d_weight':>10}")
    for variant, runs in variants.items():
        rates = [work / times[f"{variant} {what}"].median for what in runs]
        print(f"{variant:12}" + "".join(f"{rate:>10.3f}" for rate in rates))
    print(f"{'2048':12}{2 * 2048**3 / 1e12 / times['2048'].median:>10.3f}")


if __name__ == "__main__":
    main()
