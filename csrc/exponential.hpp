// Exponentials and tanh without branches, for loops over numbers and for vectors of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "instructions.hpp"
#include "vectors.hpp"

namespace usf {

// e^x = power * (1 + rest) with a power of 2, for |x| <= 87, without branches, so that loops of it vectorise.
struct Exponential {
    float power, rest;
};
USF_INLINE Exponential exponential(float x) {
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
    const float n = (x * 1.44269504f + to_integer) - to_integer;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;                                   // minimax on [-ln 2 / 2, ln 2 / 2]
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23), p * r * r + r};
}

// e^x within 2 units in the last place for |x| <= 87.
inline float fast_exp(float x) {
    const auto [power, rest] = exponential(std::min(std::max(x, -87.0f), 87.0f));
    return (rest + 1.0f) * power;
}

// Below, V is float or a vector of floats.
template <class V>
struct BitsOf {
#ifdef USF_PRODUCTS
    typedef std::uint32_t type __attribute__((vector_size(sizeof(V))));
#endif
};
template <>
struct BitsOf<float> {
    using type = std::uint32_t;
};

// x within [-most, most]; NaN stays NaN.
template <class V>
USF_INLINE V limited(V x, float most) {
    const V above = V{} + most, below = V{} - most;
#ifdef USF_VECTOR_ASSEMBLY
    if constexpr (sizeof(V) >= 32) {  // GCC would compare, then blend
        asm("vmaxps %1, %2, %0" : "=v"(x) : "v"(x), "v"(below));
        asm("vminps %1, %2, %0" : "=v"(x) : "v"(x), "v"(above));
        return x;
    }
#endif
    x = x < below ? below : x;
    return x > above ? above : x;
}

// 1 / x within 1 unit in the last place or so, for |x| from 2^-100 to 2^100.
template <class V>
USF_INLINE V reciprocal(V x) {
#ifdef USF_VECTOR_ASSEMBLY
    if constexpr (sizeof(V) == 64) {  // a division takes longer than Newton's step
        V y;
        asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x));
        return y + y * (1.0f - x * y);
    }
#endif
    return 1.0f / x;
}

// 2^x within 2.2 units in the last place (2 with fused multiply-add) for |x| <= most <= 126, and as if x were
// `most` or minus that beyond. A larger `most` is 126, but no limit at all for vectors of AVX-512, which are
// faster without. NaN gives NaN.
template <class V>
USF_INLINE V power_of_two(V x, float most = 126) {
    const auto fraction = [](V r) USF_LAMBDA {  // 2^r, minimax on [-1/2, 1/2]
        V p = 1.326952130e-3f * r + 9.671291336e-3f;
        p = p * r + 5.550710857e-2f;
        p = p * r + 2.402224690e-1f;
        p = p * r + 6.931470037e-1f;
        return p * r + 1.0f;
    };
#ifdef USF_VECTOR_ASSEMBLY
    if constexpr (sizeof(V) == 64) {
        V whole, power;
        if (most <= 126) x = limited(x, most);
        asm("vrndscaleps $0, %1, %0" : "=v"(whole) : "v"(x));
        const V p = fraction(x - whole);
        asm("vscalefps %1, %2, %0" : "=v"(power) : "v"(whole), "v"(p));
        return power;
    }
#endif
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
    const V within = limited(x, std::min(most, 126.0f)), shifted = within + to_integer;
    const V p = fraction(within - (shifted - to_integer));
    using Bits = typename BitsOf<V>::type;
    // Not std::bit_cast: compiled without inlining, it takes and returns vectors by another convention.
    return p * __builtin_bit_cast(V, (__builtin_bit_cast(Bits, shifted) << 23) + 0x3f800000u);
}
constexpr float log2_e = 1.44269504f;

// tanh x with an absolute error of at most 2^-22. NaN gives NaN.
template <class V>
USF_INLINE V fast_tanh(V x) {
    const V power = power_of_two(2 * log2_e * x, 43);
    return (power - 1.0f) * reciprocal(power + 1.0f);
}

}  // namespace usf
