// Vectors of floats, functions compiled for their instructions, and memory for them.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "instructions.hpp"

namespace usf {

// Memory for floats, aligned for the longest vectors. Its contents are lost when it grows.
class Floats {
public:
    static constexpr std::size_t alignment = 64;

    float* at_least(std::size_t size) {
        if (size > size_) {
            data_.reset(
                static_cast<float*>(::operator new(size * sizeof(float), std::align_val_t(alignment))));
            size_ = size;
        }
        return data_.get();
    }
    const float* data() const { return data_.get(); }

private:
    struct Free {
        void operator()(float* p) const { ::operator delete(p, std::align_val_t(alignment)); }
    };
    std::unique_ptr<float, Free> data_;
    std::size_t size_ = 0;
};

}  // namespace usf

#if defined(__GNUC__)  // also clang: vectors as built-in types
#define USF_PRODUCTS 1

// Clang rejects assembly with longer vectors than those of the enclosing function, even if that is inlined
// into a function for longer vectors.
#if defined(__x86_64__) && !defined(__clang__)
#define USF_VECTOR_ASSEMBLY 1
#endif

namespace usf {

template <int lanes>
struct Vector {
    typedef float type __attribute__((vector_size(4 * lanes)));
    typedef float unaligned __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
};

inline int most_lanes = 16;  // tests set fewer, to run the code of other processors

// Number of lanes of the longest vectors that this processor has.
inline int best_lanes() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("fma")) return 4;
    if (most_lanes >= 16 && __builtin_cpu_supports("avx512f")) return 16;
    if (most_lanes >= 8 && __builtin_cpu_supports("avx2")) return 8;
#endif
    return 4;
}

// Number of rows, times two vectors, of a tile that the registers hold.
constexpr int rows_of_tile(int lanes) {
#if defined(__aarch64__)
    if (lanes == 4) return 8;
#endif
    return lanes == 16 ? 12 : lanes == 8 ? 6 : 4;
}

// Calls body.operator()<lanes>(), compiled for the instructions of vectors with this number of lanes.
// AVX-512F alone has no fused multiply-add for shorter vectors, in which some bodies end.
#if defined(__x86_64__)
template <class Body>
__attribute__((target("avx512f,fma"))) void with_avx512([[maybe_unused]] const Body& body) {
#ifndef USF_WITHOUT_AVX512
    body.template operator()<16>();
#endif
}
template <class Body>
__attribute__((target("avx2,fma"))) void with_avx2(const Body& body) {
    body.template operator()<8>();
}
#endif
template <class Body>
void with_lanes([[maybe_unused]] int lanes, const Body& body) {
#if defined(__x86_64__)
    if (lanes == 16) return with_avx512(body);
    if (lanes == 8) return with_avx2(body);
#endif
    body.template operator()<4>();
}

}  // namespace usf
#endif
