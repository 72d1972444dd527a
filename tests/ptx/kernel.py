"""PTX, read and translated to NumPy.

A register is a variable that holds one unsigned integer a thread; what it means is said by each
instruction that reads it, as in the PTX. An instruction becomes one assignment, in two versions:
for all threads, and for those of a mask `m`, where the others keep what they had.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType

import numpy as np

from . import PtxError
from .arithmetic import U32, U64, UNSIGNED
from .memory import GlobalMemory
from .program import Program

COMPARISONS = {
    "eq": "({a} == {b})", "lt": "({a} < {b})", "le": "({a} <= {b})", "gt": "({a} > {b})",
    "ge": "({a} >= {b})", "lo": "({a} < {b})", "ls": "({a} <= {b})", "hi": "({a} > {b})",
    "hs": "({a} >= {b})", "ne": "(({a} < {b}) | ({a} > {b}))", "neu": "({a} != {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))", "ltu": "~({a} >= {b})", "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})", "geu": "~({a} < {b})", "num": "(({a} == {a}) & ({b} == {b}))",
    "nan": "(({a} != {a}) | ({b} != {b}))",
}  # fmt: skip
#: Of operands that are all of the instruction's type, as is the result.
FORMULAS = {
    "add": "{a} + {b}", "sub": "{a} - {b}", "and": "{a} & {b}", "or": "{a} | {b}",
    "xor": "{a} ^ {b}", "not": "~{a}", "neg": "-{a}", "abs": "np.abs({a})",
    "max": "np.fmax({a}, {b})", "min": "np.fmin({a}, {b})",
    "max3": "np.fmax(np.fmax({a}, {b}), {c})", "min3": "np.fmin(np.fmin({a}, {b}), {c})",
    "popc": "popc({a})", "ex2": "ex2({a})", "rcp": "rcp({a})", "fma": "fma({a}, {b}, {c})",
}  # fmt: skip
EXCHANGES = ("shfl", "redux", "ldmatrix", "stmatrix")
#: Words of an instruction's name, beside its types, that are known to change nothing here, or are
#: looked at. With any other it would compute something else.
MODIFIERS = {name: {"rn", "ftz"} for name in FORMULAS} | {
    "mul": {"rn", "ftz", "lo", "hi", "wide"}, "mad": {"lo", "wide"}, "ex2": {"approx", "ftz"},
    "rcp": {"approx", "ftz"}, "div": {"rn", "full", "approx"}, "cvt": {"rn"}, "cvta": {"local"},
    "setp": set(COMPARISONS), "shfl": {"sync", "bfly", "idx"},
    "redux": {"sync", "add", "max", "min"},
    "ldmatrix": {"sync", "aligned", "m8n8", "x1", "x2", "x4", "shared"},
    "stmatrix": {"sync", "aligned", "m8n8", "x1", "x2", "x4", "shared"},
    "ld": {"global", "shared", "param", "v2", "v4"}, "st": {"global", "shared", "v2", "v4"},
}  # fmt: skip


@dataclass(frozen=True)
class Type:
    """letter: u, s, b (bits), f, bf or pred; fx2 of two float32 numbers in 64 bits."""

    letter: str
    width: int

    @classmethod
    def named(cls, word: str) -> Type | None:
        """f32, say; None of a word that names no type."""
        if word == "pred":
            return cls("pred", 1)
        found = re.fullmatch(r"(bf|[usbf])(8|16|32|64)(x2)?", word)
        if not found:
            return None
        letter, width, two = found.groups()
        return cls(letter + "x2", 2 * int(width)) if two else cls(letter, int(width))

    @property
    def dtype(self) -> str:
        return {"s": "i", "f": "f"}.get(self.letter, "u") + str(self.width)

    def of_bits(self, bits: str) -> str:
        if self.letter in ("s", "f"):
            return f"{bits}.view({self.dtype})"
        return f"from_bf16({bits})" if self.letter == "bf" else bits

    def to_bits(self, number: str) -> str:
        if self.letter in ("s", "f"):
            return f"({number}).view(u{self.width})"
        return f"to_bf16({number})" if self.letter == "bf" else f"({number})"


@dataclass
class Block:
    """Instructions that run together. gathers: it begins with an exchange. end: "bra" to `target`
    or "ret", both where `condition` holds; "bar"; or "", and it goes on to the next block. name: in
    tracebacks."""

    gathers: bool = False
    lines: list[Line] = field(default_factory=list)
    end: str = ""
    condition: str | None = None
    target: str | None = None
    name: str = ""

    @cached_property
    def code(self) -> CodeType:
        return self._compiled(None)

    @cached_property
    def masked(self) -> CodeType:
        return self._compiled("m")

    @cached_property
    def leaves(self) -> CodeType:
        """The condition, where there is one."""
        return compile(self.condition or "True", self.name, "eval")

    def _compiled(self, mask: str | None) -> CodeType:
        """When a program comes by: most blocks never run with a mask, and compiling takes longer
        than running a block once."""
        return compile("\n".join(line.source(mask) for line in self.lines), self.name, "exec")


@dataclass
class Line:
    """names: registers that get the value, if any. guard: a register that says for which threads.
    value: may contain {mask}."""

    names: list[str]
    guard: str | None
    value: str

    def source(self, mask: str | None) -> str:
        where = " & ".join(g for g in (self.guard, mask) if g)
        value = self.value.replace("{mask}", where or "None")
        if not self.names:
            return value
        names = ", ".join(self.names)
        if not where:
            return f"{names} = {value}"
        if len(self.names) == 1:
            return f"{names} = np.where({where}, {value}, {names})"
        return f"{names} = chosen({where}, {value}, ({names}))"


class Kernel:
    """A kernel's PTX, ready to run. shared: bytes of shared memory of a program."""

    def __init__(self, ptx: str, shared: int):
        self.name = re.search(r"\.entry\s+(\w+)", ptx)[1]
        self.shared = shared
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", ptx)[1])
        head, body = re.search(r"\.entry(.*?)\n\{(.*)\n\}", ptx, re.S).groups()
        self.parameters = re.findall(r"\.param\s+\.[bus](\d+)\b.*?\b(\w+_param_\d+)", head)
        stack = re.search(r"\.local .*__local_depot0\[(\d+)\]", body)
        self.stack = int(stack[1]) if stack else 0
        self.registers = {"SP": U64(0), "SPL": U32(0), "tmp": U32(0), "_": U32(0)}
        for type_, prefix, count in re.findall(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>", body):
            width = Type.named(type_).width
            zero = np.bool_(False) if width == 1 else UNSIGNED[width](0)
            self.registers |= {f"{prefix}{i}": zero for i in range(int(count))}
        self.constants: dict[str, object] = {}
        self.labels: dict[str, int] = {}
        self.blocks = [Block()]
        for statement in _statements(body):
            self._read(statement)
        for i, block in enumerate(self.blocks):
            block.name = f"<block {i} of {self.name}>"

    def run(self, grid, arguments: list[int], extents: list[tuple[int, int, str]]) -> None:
        """arguments: pointers and integers; those missing at the end are 0. extents: those of
        `GlobalMemory`."""
        memory = GlobalMemory(extents)
        arguments = arguments + [0] * (len(self.parameters) - len(arguments))
        parameters = {
            name: _constant(value, int(width))
            for (width, name), value in zip(self.parameters, arguments, strict=True)
        }
        grid = (*grid, 1, 1)[:3]
        for number, index in enumerate(np.ndindex(*grid)):
            try:
                with np.errstate(all="ignore"):
                    Program(self, memory, parameters, number, index, grid).run()
            except Exception as error:
                error.add_note(f"{self.name}, program {index} of {grid}")
                raise

    # --- reading

    def _read(self, statement: str) -> None:
        block = self.blocks[-1]
        if label := re.fullmatch(r"(\$?\w+):", statement):
            self.labels[label[1]] = len(self.blocks)
            self.blocks.append(Block())
            return
        guard, opcode, rest = re.fullmatch(
            r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S
        ).groups()
        guard = guard and guard.replace("!", "~").replace("%", "")
        name, *words = opcode.split(".")
        if name in ("bra", "ret", "exit"):
            block.end, block.condition = "bra" if name == "bra" else "ret", guard
            block.target = rest.strip()
            self.blocks.append(Block())
        elif name in ("bar", "barrier"):
            if "warp" in words:
                return
            if guard or rest.strip() != "0":
                raise PtxError(f"unknown instruction: {statement}")
            block.end = "bar"
            self.blocks.append(Block())
        else:
            if name in EXCHANGES and guard:
                raise PtxError(f"an exchange of some threads: {statement}")
            if name in EXCHANGES and not block.gathers:
                block = Block(gathers=True)
                self.blocks.append(block)
            try:
                names, value = self._translated(name, words, _operands(rest))
            except (KeyError, ValueError, TypeError, IndexError, AttributeError):
                raise PtxError(f"unknown instruction: {statement}") from None
            block.lines.append(Line(names, guard, value))

    def _translated(self, name, words, operands) -> tuple[list[str], str]:
        """The registers that get a value, and the value."""
        types = [type_ for type_ in map(Type.named, words) if type_]
        if not {w for w in words if not Type.named(w)} <= MODIFIERS.get(name, set()):
            raise ValueError
        own = getattr(self, f"_{name}", None)
        if own is not None:
            names, value = own(words, types, *operands)
            names = [_register(n) for n in names]
            if not set(names) <= set(self.registers):
                raise ValueError
            return names, value
        target, *sources = operands
        type_ = types[0]
        # add.f32.bf16: all but the last operand are of the narrower type
        of = [types[-1]] * (len(sources) - 1) + [type_]
        numbers = [t.of_bits(self._bits(s, t.width)) for t, s in zip(of, sources)]
        if "ftz" in words:
            numbers = [f"flush({number})" for number in numbers]
        if type_.letter == "fx2":
            how = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply", "fma": "fma"}[name]
            return [_register(target)], f"pairs({how}, {', '.join(numbers)})"
        formula = FORMULAS[name + "3" if name in ("max", "min") and len(numbers) == 3 else name]
        if len(numbers) != len(set(re.findall(r"\{\w\}", formula))):
            raise ValueError
        value = formula.format(**dict(zip("abc", numbers)))
        if "ftz" in words:
            value = f"flush({value})"
        return [_register(target)], type_.to_bits(value)

    def _bits(self, operand: str, width: int) -> str:
        """An operand, as bits."""
        operand = operand.strip()
        if special := re.fullmatch(r"%(tid|ctaid|nctaid)\.([xyz])", operand):
            return f"{special[1]}_{special[2]}"
        if _register(operand) in self.registers:
            return _register(operand)
        if hexadecimal := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", operand):
            value = int(hexadecimal[1], 16)
        else:  # both memories begin at 0
            value = 0 if operand in ("global_smem", "__local_depot0") else int(operand, 0)
        if width == 1:
            return f"np.bool_({value != 0})"
        name = f"k{width}_{value % (1 << width)}"
        self.constants[name] = _constant(value, width)
        return name

    # --- instructions that have a form of their own: (registers, value)

    def _ld(self, words, types, registers, address):
        names, (type_,) = _group(registers), types
        if "param" in words:
            width = 8 * self.registers[_register(names[0])].nbytes
            signed = f".view(i{type_.width}).astype(i{width})" if type_.letter == "s" else ""
            return names, f"{address.strip('[] ')}{signed}.astype(u{width})"
        space, at = self._address(words, address)
        return names, f"load_{space}({at}, {type_.width // 8}, {len(names)}, {{mask}})"

    def _st(self, words, types, address, registers):
        (type_,) = types
        values = "".join(f"{self._bits(r, type_.width)}, " for r in _group(registers))
        space, at = self._address(words, address)
        return [], f"store_{space}({at}, ({values}), {type_.width // 8}, {{mask}})"

    def _address(self, words, address) -> tuple[str, str]:
        """Without a space it is the stack's: the spaces of all other pointers are known."""
        space = next((w for w in words if w in ("global", "shared")), "local")
        base, _, offset = address.strip("[] ").partition("+")
        base = self._bits(base, 32 if space == "shared" else 64)
        return space, f"{base}.astype(u64) + {self._bits(offset or '0', 64)}"

    def _ldmatrix(self, words, types, registers, address):
        names = _group(registers)
        _, at = self._address(["shared"], address)
        return names, f"ldmatrix({at}, {len(names)}, {{mask}})"

    def _stmatrix(self, words, types, address, registers):
        values = "".join(f"{self._bits(r, 32)}, " for r in _group(registers))
        _, at = self._address(["shared"], address)
        return [], f"stmatrix({at}, ({values}), {{mask}})"

    def _shfl(self, words, types, target, value, by, clamp, members):
        if words[1] not in ("bfly", "idx") or (clamp, members) != ("31", "-1"):
            raise ValueError
        return [
            target
        ], f"shuffle({self._bits(value, 32)}, {self._bits(by, 32)}, {words[1] == 'bfly'})"

    def _redux(self, words, types, target, value, members):
        how = {"add": "np.add", "max": "np.fmax", "min": "np.fmin"}[words[1]]
        number = types[0].of_bits(self._bits(value, 32))
        return [target], types[0].to_bits(f"reduced({how}, {number}, {self._bits(members, 32)})")

    def _mov(self, words, types, target, source):
        (type_,) = types
        if target.startswith("{"):
            names = _group(target)
            part = type_.width // len(names)
            bits = self._bits(source, type_.width)
            parts = (
                f"({bits} >> {self._bits(str(part * i), type_.width)}).astype(u{part}), "
                for i in range(len(names))
            )
            return names, f"({''.join(parts)})"
        if source.startswith("{"):
            members = _group(source)
            part = type_.width // len(members)
            return [target], " | ".join(
                f"({self._bits(m, part)}.astype(u{type_.width})"
                f" << {self._bits(str(part * i), type_.width)})"
                for i, m in enumerate(members)
            )
        return [target], self._bits(source, type_.width)

    def _cvt(self, words, types, target, *sources):
        to, of = types
        # A register may be wider than what is read of it.
        numbers = [of.of_bits(f"{self._bits(s, of.width)}.astype(u{of.width})") for s in sources]
        if to.letter in ("bfx2", "fx2"):
            half = "to_bf16({})" if to.letter == "bfx2" else "({}).astype(f16).view(u16)"
            high, low = (half.format(number) + ".astype(u32)" for number in numbers)
            return [target], f"{low} | ({high} << {self._bits('16', 32)})"
        (number,) = numbers
        if to.letter in ("u", "s") and of.letter not in ("u", "s"):
            raise ValueError
        return [target], to.to_bits(
            f"({number}).astype({'f32' if to.letter == 'bf' else to.dtype})"
        )

    def _cvta(self, words, types, target, source):
        return [target], _register(source)

    def _setp(self, words, types, target, a, b):
        (type_,) = types
        a, b = (type_.of_bits(self._bits(s, type_.width)) for s in (a, b))
        return [target], COMPARISONS[words[0]].format(a=a, b=b)

    def _selp(self, words, types, target, a, b, condition):
        (type_,) = types
        a, b = (self._bits(s, type_.width) for s in (a, b))
        return [target], f"np.where({_register(condition)}, {a}, {b})"

    def _shl(self, words, types, target, value, by):
        return self._shift("<<", types, target, value, by)

    def _shr(self, words, types, target, value, by):
        return self._shift(">>", types, target, value, by)

    def _shift(self, operator, types, target, value, by):
        (type_,) = types
        number = type_.of_bits(self._bits(value, type_.width))
        return [target], type_.to_bits(
            f"{number} {operator} {self._bits(by, 32)}.astype({type_.dtype})"
        )

    def _bfe(self, words, types, target, value, position, length):
        (type_,) = types
        number = type_.of_bits(self._bits(value, type_.width))
        return [target], type_.to_bits(f"bit_field({number}, {int(position)}, {int(length)})")

    def _mul(self, words, types, target, a, b, c=None):
        """And mad, of integers alone, with c."""
        (type_,) = types
        a, b = (type_.of_bits(self._bits(s, type_.width)) for s in (a, b))
        if type_.letter == "fx2":
            return [target], f"pairs(np.multiply, {a}, {b})"
        if type_.letter == "f":
            product = f"flush(flush({a}) * flush({b}))" if "ftz" in words else f"{a} * {b}"
            return [target], type_.to_bits(product)
        wide = Type(type_.letter, type_.width * {"lo": 1, "hi": 2, "wide": 2}[words[0]])
        if words[0] == "hi":
            if c or wide.width > 64:
                raise ValueError
            by, product = self._bits(str(type_.width), wide.width), f"{a}.astype({wide.dtype})"
            product = f"{product} * {b}.astype({wide.dtype}) >> {by}.astype({wide.dtype})"
            return [target], type_.to_bits(f"({product}).astype({type_.dtype})")
        c = f" + {wide.of_bits(self._bits(c, wide.width))}" if c else ""
        return [target], wide.to_bits(f"{a}.astype({wide.dtype}) * {b}.astype({wide.dtype}){c}")

    _mad = _mul

    def _div(self, words, types, target, a, b):
        (type_,) = types
        a, b = (type_.of_bits(self._bits(s, type_.width)) for s in (a, b))
        if type_.letter != "f":
            raise ValueError
        how = {"rn": "{} / {}", "full": "divide({}, {})", "approx": "divide_roughly({}, {})"}
        return [target], type_.to_bits(how[words[0]].format(a, b))


def _register(operand: str) -> str:
    return operand.strip().removeprefix("%")


def _constant(value: int, width: int):
    return UNSIGNED[width](value % (1 << width))


def _group(registers: str) -> list[str]:
    return [r.strip() for r in registers.strip("{} ").split(",")]


def _statements(body: str):
    """Labels with their colon, instructions without their semicolon."""
    for line in re.sub(r"//[^\n]*", "", body).splitlines():
        line = line.strip()
        if label := re.match(r"(\$?\w+):", line):
            yield label[0]
            line = line[label.end() :].strip()
        if scope := re.fullmatch(r"\{ \.reg \.b32 tmp;(.*)\}", line):
            line = scope[1]
        if not line.startswith("."):  # declarations, pragmas, line numbers
            yield from filter(None, map(str.strip, line.split(";")))


def _operands(text: str) -> list[str]:
    """Split at the commas that no brace holds."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+", text)]
