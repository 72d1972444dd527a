"""A machine that runs compiled Triton kernels, NVIDIA's PTX, on a CPU.

Triton's interpreter runs a kernel's source; what a GPU runs is what the compiler made of it: which
thread holds what, exchanges through shuffles and shared memory, barriers, predicates, approximate
exponentials. This machine runs that, instruction by instruction, each for all threads of a program
at once. It is strict where a GPU is silent: it raises `PtxError` where

* memory is touched outside the kernel's tensors or unaligned, or shared memory is read before it is
  written;
* two warps, or two programs, touch the same byte, one of them changing it, and no barrier stands
  between;
* a warp's exchange or a barrier is reached by a part of the threads that it needs;
* an instruction is met that it does not know.

It says nothing about time, nor about the order of memory between the threads of one warp. What a
GPU computes by approximation is here one last bit off, up or down (`arithmetic`).

    TROPD_PTX=cuda:90 python -m pytest tests -k triton

| module     | holds                                                     |
|------------|-----------------------------------------------------------|
| launch     | Triton's launches, turned to the machine                  |
| kernel     | PTX, read and translated to NumPy                         |
| program    | one block of threads: branches, barriers, exchanges       |
| memory     | bytes, and who touched them                               |
| arithmetic | what is not one of NumPy's operations                     |

Source: the PTX ISA, NVIDIA's manual.
"""


class PtxError(RuntimeError):
    """What a GPU would have done wrong, or this machine cannot do."""
