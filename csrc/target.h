// Compiles what stands between BEGIN and END for instructions beyond the command line's.

#pragma once
#define TROPD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TROPD_TARGET_BEGIN(features) \
  TROPD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TROPD_TARGET_END TROPD_PRAGMA(clang attribute pop)
#else
#define TROPD_TARGET_BEGIN(features) \
  TROPD_PRAGMA(GCC push_options) TROPD_PRAGMA(GCC target(features))
#define TROPD_TARGET_END TROPD_PRAGMA(GCC pop_options)
#endif
