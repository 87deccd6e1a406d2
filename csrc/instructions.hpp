// Macros that compile loops for several instruction sets.
#pragma once

#if __has_include(<features.h>)
#include <features.h>  // says whether the C library is glibc
#endif

// USF_CLONES compiles a function for several instruction sets, of which the loader picks one. glibc's loader
// can do that, musl's cannot.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
// Use levels rather than features: AVX2 alone has no fused multiply-add, and AVX-512F has none for half and
// quarter vectors, so that the remainder of a loop would be rounded differently from its body.
#if __GNUC__ >= 12
#define USF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define USF_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define USF_CLONES
#endif

// Functions called by such loops must be inlined, to be compiled for the same instruction sets.
#if defined(__GNUC__)
#define USF_INLINE inline __attribute__((always_inline))
#define USF_LAMBDA __attribute__((always_inline))
#else
#define USF_INLINE inline
#define USF_LAMBDA
#endif
