// The row kernels on AVX-512. Every header is included before the target is set: what the library's
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

#define TROPD_ISA avx512
#define TROPD_NAME "AVX-512"
#define TROPD_KERNELS kernels_avx512
#define TROPD_BYTES 64
#include "target.h"
TROPD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "vectors.h"
#include "row_kernels.h"
TROPD_TARGET_END
#endif
