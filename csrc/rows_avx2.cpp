// The row kernels on AVX2. Every header is included before the target is set: what the library's
// headers define inline must not be compiled for instructions that the machine may lack.

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "rows.h"

#define TROPD_ISA avx2
#define TROPD_NAME "AVX2"
#define TROPD_KERNELS kernels_avx2
#define TROPD_BYTES 32
#include "target.h"
TROPD_TARGET_BEGIN("avx2,fma")
#include "vectors.h"
#include "row_kernels.h"
TROPD_TARGET_END
#endif
