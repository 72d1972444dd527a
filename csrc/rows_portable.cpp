// The row kernels on 128-bit vectors: SSE2 on x86-64, NEON on aarch64, plain code elsewhere.

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

#define TROPD_ISA portable
#define TROPD_NAME "portable"
#define TROPD_KERNELS kernels_portable
#define TROPD_BYTES 16
#include "vectors.h"
#include "row_kernels.h"
