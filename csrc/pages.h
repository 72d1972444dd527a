// Pages of fresh memory, made at once: a fault for each, when it is first written, takes longer.

#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace tropd {

// Of all pages that these bytes touch. What they hold stays.
inline void make_pages(void* from, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = reinterpret_cast<uintptr_t>(from);
  const uintptr_t low = first / page * page;
  madvise(reinterpret_cast<void*>(low), first + bytes - low, MADV_POPULATE_WRITE);
#else
  (void)from, (void)bytes;
#endif
}

}  // namespace tropd
