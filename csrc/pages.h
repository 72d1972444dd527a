// Pages of memory, made and given back.

#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace tropd {

// Makes all pages that these bytes touch, and leaves what they hold: a fault for each fresh one, when it
// is first written, takes longer.
inline void make_pages(void* from, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = reinterpret_cast<uintptr_t>(from);
  const uintptr_t low = first / page * page;
  madvise(reinterpret_cast<void*>(low), first + bytes - low, MADV_POPULATE_WRITE);
#else
  (void)from, (void)bytes;
#endif
}

// Tells the system about the pages within these bytes; false where there are none, or it will not hear.
inline bool advise(void* from, int64_t bytes, int advice) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = reinterpret_cast<uintptr_t>(from);
  const uintptr_t low = (first + page - 1) / page * page, high = (first + bytes) / page * page;
  return low < high && madvise(reinterpret_cast<void*>(low), high - low, advice) == 0;
}

}  // namespace tropd
