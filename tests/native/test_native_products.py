"""The products in `csrc/`, on each of the CPU's units for which there are any."""

import math

import pytest
import torch
from fuzz_native import same_bits

from tropd_kernels import native
from tropd_kernels.backends import engine_for
from tropd_kernels.products import NativeFloatProducts, NativeProducts, TorchProducts, products_for

if native.WHY_NOT is not None:
    pytest.skip(f"no native kernels: {native.WHY_NOT}", allow_module_level=True)

ops = torch.ops.tropd_native


@pytest.fixture(
    params=native.BF16_PRODUCTS
    or [pytest.param(None, marks=pytest.mark.skip(reason="this CPU's products are torch's"))]
)
def multiplier(request, monkeypatch):
    """Multiplies on each of the CPU's units as if it were the only one, and leaves the best one in
    use."""
    monkeypatch.setattr(native, "BF16_PRODUCTS", [request.param])
    before = ops.use_products(request.param)
    yield request.param
    assert ops.use_products(before) == request.param


#: m, n, k: a tile is 6 x 64, a panel 2048 deep; on AMX 32 x 32, 512 deep; on AVX2 6 x 16, 256 deep,
#: in blocks of 96 x 128 of up to 510 tokens.
SHAPES = [
    (1, 1, 1), (1, 1, 2), (2, 3, 1), (5, 63, 7), (6, 64, 32), (7, 65, 33), (13, 129, 31),
    (97, 5, 48), (3, 70, 2047), (2, 66, 2049), (8, 3, 4101), (290, 33, 66), (34, 600, 513),
    (530, 3, 1100), (1100, 1090, 40),
]  # fmt: skip


def integers(rows, cols, low=-8, dtype=torch.bfloat16, lead=0, gap=0):
    """Small enough that every sum of their products is exact in float32. `gap` columns of NaN after
    each row, `lead` before."""
    whole = torch.full((rows, lead + cols + gap), math.nan, dtype=dtype)
    part = whole[:, lead : lead + cols]
    return part.copy_(torch.randint(low, 9, (rows, cols)))


def product(operator, a, b) -> torch.Tensor:
    left = a.double().T if operator == "gemm_tn" else a.double()
    return left @ (b.double().T if operator == "gemm_nt" else b.double())


def operands(operator, m, n, k, make):
    return make(*((k, m) if operator == "gemm_tn" else (m, k))), make(
        *((n, k) if operator == "gemm_nt" else (k, n))
    )


products = pytest.mark.parametrize("operator", ["gemm_nt", "gemm_nn", "gemm_tn"])


@products
@pytest.mark.parametrize(("lead", "gap"), [(0, 0), (1, 0), (3, 4), (0, 64)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_integers_are_exact_at_any_shape_and_stride(
    operator, shape, lead, gap, multiplier
):
    m, n, k = shape
    a, b = operands(operator, m, n, k, lambda r, c: integers(r, c, lead=lead, gap=gap))
    whole = torch.full((m, lead + n + gap), math.nan)
    out = whole[:, lead : lead + n]
    getattr(ops, operator)(a, b, out, *([False] if operator == "gemm_tn" else []))
    assert torch.equal(out.double(), product(operator, a, b))
    assert whole[:, :lead].isnan().all() and whole[:, lead + n :].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_products_can_add_or_round_once(shape, multiplier):
    m, n, k = shape
    a, b = operands("gemm_tn", m, n, k, integers)
    exact = product("gemm_tn", a, b)
    out = integers(m, n, dtype=torch.float32, lead=1, gap=2)
    expected = out.double() + exact
    ops.gemm_tn(a, b, out, True)
    assert torch.equal(out.double(), expected)
    whole = torch.full((m, n + 3), math.nan, dtype=torch.bfloat16)
    ops.gemm_tn(a, b, whole[:, 1 : n + 1], False)
    assert torch.equal(whole[:, 1 : n + 1], exact.bfloat16())
    assert whole[:, 0].isnan().all() and whole[:, n + 1 :].isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_products_round_once_with_sums(shape, multiplier):
    """As if they were added to the sums, which stay as they are, and then rounded."""
    m, n, k = shape
    a, b = operands("gemm_tn", m, n, k, lambda r, c: torch.randn(r, c).bfloat16())
    around = torch.full((m, n + 3), math.nan)
    sums = around[:, 1 : n + 1].copy_(torch.randn(m, n))
    before, alone = around.clone(), torch.empty(m, n)
    ops.gemm_tn(a, b, alone, False)
    expected = (sums + alone).bfloat16()
    for lead in (1, 0):  # aligned rows are stored by other instructions
        whole = torch.full((m, lead + -(-n // 32) * 32 + 32), math.nan, dtype=torch.bfloat16)
        ops.gemm_tn(a, b, whole[:, lead : lead + n], False, sums)
        assert same_bits(whole[:, lead : lead + n], expected)
        assert whole[:, :lead].isnan().all() and whole[:, lead + n :].isnan().all()
    assert same_bits(around, before)


@products
@pytest.mark.parametrize("wide", ["a", "b", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_float32_take_float32_operands(operator, shape, wide, multiplier):
    """Unrounded, beside bfloat16 too; the others refuse them."""
    m, n, k = shape
    more = [False] if operator == "gemm_tn" else []
    kinds = {name: torch.float32 if wide in (name, "both") else torch.bfloat16 for name in "ab"}
    make = iter(kinds.values())
    a, b = operands(operator, m, n, k, lambda r, c: integers(r, c, dtype=next(make), lead=1, gap=2))
    (a if a.dtype == torch.float32 else b).mul_(257)  # bfloat16 would make 256 of it
    out = torch.full((m, n), math.nan)
    if multiplier == "AVX2":
        getattr(ops, operator)(a, b, out, *more)
        assert torch.equal(out.double(), product(operator, a, b))
    else:
        with pytest.raises(RuntimeError, match="must be bfloat16"):
            getattr(ops, operator)(a, b, out, *more)


@products
def test_products_add_in_float32(operator, multiplier):
    a, b = operands(operator, 70, 100, 3001, lambda r, c: torch.randn(r, c).bfloat16())
    out = torch.empty(70, 100)
    getattr(ops, operator)(a, b, out, *([False] if operator == "gemm_tn" else []))
    exact = product(operator, a, b)
    # A random walk of roundings: sums that were bf16, or half of the terms, are 100 times worse.
    assert float((out - exact).norm() / exact.norm()) < 3001**0.5 * torch.finfo(torch.float32).eps


@products
def test_products_are_the_same_bits_on_any_number_of_threads(operator, multiplier, use_threads):
    a, b = operands(operator, 200, 700, 2100, lambda r, c: torch.randn(r, c).bfloat16())
    results = []
    for threads in (1, 1, 2, 3, 5):
        use_threads(threads)
        results.append(torch.full((200, 700), math.nan))
        getattr(ops, operator)(a, b, results[-1], *([False] if operator == "gemm_tn" else []))
    assert all(same_bits(results[0], each) for each in results)


@pytest.mark.parametrize("operator", ["gemm_nt", "gemm_nn", "gemm_tn"])
def test_products_and_those_of_torch_may_take_turns(operator, multiplier):
    """Both configure the tile units of a CPU that has them, and neither may rely on what it set
    before."""
    a, b = operands(operator, 40, 50, 200, integers)
    left, right = torch.randn(64, 96).bfloat16(), torch.randn(96, 128).bfloat16()
    expected, out = left @ right, torch.empty(40, 50)
    for _ in range(3):
        out.fill_(math.nan)
        getattr(ops, operator)(a, b, out, *([False] if operator == "gemm_tn" else []))
        assert torch.equal(out.double(), product(operator, a, b))
        assert same_bits(left @ right, expected)


def test_where_amx_cannot_be_ours_the_library_s_products_serve(monkeypatch):
    """oneDNN uses the tile units; ours without them would be several times slower."""
    monkeypatch.setattr(native, "CAP", "amx")
    monkeypatch.setattr(ops, "products", lambda: ["AVX512-BF16"])
    for amx, expected in ((True, []), (False, ["AVX512-BF16"])):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert native._bf16_products() == expected
    for units in ("AMX", "AMX emulated"):
        monkeypatch.setattr(ops, "products", lambda units=units: [units, "AVX512-BF16"])
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert native._bf16_products() == [units, "AVX512-BF16"]
    monkeypatch.setattr(native, "BF16_PRODUCTS", [])
    assert type(products_for(engine_for("native"), torch.bfloat16, "cpu")) is TorchProducts
    assert "AVX512-BF16" not in native.description()


def test_on_avx2_d_logits_stay_in_float32_and_on_avx512_torch_multiplies(monkeypatch):
    monkeypatch.setattr(native, "CAP", "amx")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(ops, "products", lambda: ["AVX2"])
    for sets, expected in ((["AVX2", "128-bit"], ["AVX2"]), (["AVX-512", "AVX2"], [])):
        monkeypatch.setattr(ops, "instruction_sets", lambda sets=sets: sets)
        assert native._bf16_products() == expected
    for units, kind, gradient in (
        (["AVX2"], NativeFloatProducts, torch.float32),
        (["AVX512-BF16", "AVX2"], NativeProducts, torch.bfloat16),
        ([], TorchProducts, torch.float32),
    ):
        monkeypatch.setattr(native, "BF16_PRODUCTS", units)
        chosen = products_for(engine_for("native"), torch.bfloat16, "cpu")
        assert type(chosen) is kind and chosen.gradient_dtype == gradient
        assert type(products_for(engine_for("native"), torch.float32, "cpu")) is TorchProducts


def test_unknown_products_are_an_error():
    with pytest.raises(RuntimeError, match="has no products named"):
        ops.use_products("abacus")
