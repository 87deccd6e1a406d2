// How loops are compiled.
#pragma once

#if __has_include(<features.h>)
#include <features.h>  // says whether the C library is glibc
#endif

// For several instruction sets, of which the loader picks one: glibc's can, musl's cannot.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
// AVX2 by itself has no instruction for a product and a sum, AVX-512F none for half and quarter vectors: the
// rest of a loop would be rounded in another way than its body.
#if __GNUC__ >= 12
#define USF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define USF_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define USF_CLONES
#endif

// What is inlined into a loop that is compiled for several instruction sets is compiled for them too.
#if defined(__GNUC__)
#define USF_INLINE inline __attribute__((always_inline))
#define USF_LAMBDA __attribute__((always_inline))
#else
#define USF_INLINE inline
#define USF_LAMBDA
#endif
