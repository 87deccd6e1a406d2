// Matrices and rows in bfloat16, two numbers in a word as wide as a float: processors with an instruction for
// such pairs multiply both in the time of one, and add them up in float32.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "amx.hpp"
#include "half.hpp"
#include "vectors.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Whether this processor has the instruction, and the compiler accepts it.
inline bool multiplies_pairs() {
#ifdef USF_VECTOR_ASSEMBLY
    return best_lanes() == 16 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// Calls body.operator()<lanes>(), compiled for the vectors of processors that have the instruction.
template <class Body>
void with_pairs([[maybe_unused]] const Body& body) {
#ifdef USF_VECTOR_ASSEMBLY
    with_avx512(body);
#endif
}

// Number of words for so many numbers, padded with zeros to whole rows of tiles with AMX, else to vectors.
inline int words_of(int numbers) {
    const int words = has_amx() ? tile_words : 8;
    return (numbers + 2 * words - 1) / (2 * words) * words;
}

// Memory for rows of words, and for rows that products read after the last one.
inline float* rows_of_words(Floats& memory, std::int64_t rows, int words) {
    constexpr int behind = 2 * tile_rows - 1;
    return memory.at_least((rows + behind) * words);
}

// Adds x times the weights of some outputs, of one vector or two, to a tile's sums.
struct Singles {
    template <int vectors, class V>
    static USF_INLINE void add(V (&sums)[2], const float* x, const V& left, const V& right) {
        sums[0] += *x * left;
        if constexpr (vectors == 2) sums[1] += *x * right;
    }
};

// The same for x and weights in pairs. It uses assembly since intrinsics are inlined only into functions for
// the same instructions, which the functions around tiles are not.
struct Pairs {
    template <int vectors, class V>
    static USF_INLINE void add([[maybe_unused]] V (&sums)[2], [[maybe_unused]] const float* x,
                               [[maybe_unused]] const V& left, [[maybe_unused]] const V& right) {
#ifdef USF_VECTOR_ASSEMBLY
        typedef std::int32_t Words __attribute__((vector_size(sizeof(V))));
        typedef std::int32_t Word __attribute__((may_alias));
        const Words both = *reinterpret_cast<const Word*>(x) - Words{};
        V first = sums[0], second = sums[1];  // GCC keeps an array in memory if asm writes to it
        asm("vdpbf16ps %2, %1, %0" : "+v"(first) : "v"(left), "v"(both));
        if constexpr (vectors == 2) asm("vdpbf16ps %2, %1, %0" : "+v"(second) : "v"(right), "v"(both));
        sums[0] = first, sums[1] = second;
#endif
    }
};

// Stores a vector as floats, or rounded to the nearest bfloat16 numbers.
template <int lanes>
USF_INLINE void store(typename Vector<lanes>::type values, float* to) {
    *reinterpret_cast<typename Vector<lanes>::unaligned*>(to) = values;
}
template <int lanes>
USF_INLINE void store(typename Vector<lanes>::type values, BFloat16* to) {
#ifdef USF_VECTOR_ASSEMBLY
    if constexpr (lanes == 16) {
        std::uint16_t __attribute__((vector_size(2 * lanes))) rounded;
        asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(values));
        std::memcpy(to, &rounded, sizeof(rounded));
        return;
    }
#endif
    for (int i = 0; i < lanes; ++i) narrow(values[i], to[i]);
}

template <int lanes>
USF_INLINE void round_numbers(const float* from, std::int64_t count, BFloat16* to) {
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        store<lanes>(*reinterpret_cast<const typename Vector<lanes>::unaligned*>(from + i), to + i);
    for (; i < count; ++i) narrow(from[i], to[i]);
}
inline void round_to(const float* from, std::int64_t count, BFloat16* to) {
    with_lanes(best_lanes(), [&]<int lanes>() USF_LAMBDA { round_numbers<lanes>(from, count, to); });
}
// Rounds rows of `numbers` numbers to rows of words.
inline void round_rows(const float* from, std::ptrdiff_t stride, int rows, int numbers, float* to) {
    const int words = words_of(numbers);
    with_lanes(best_lanes(), [&]<int lanes>() USF_LAMBDA {
        for (int r = 0; r < rows; ++r, from += stride, to += words) {
            auto* const out = reinterpret_cast<BFloat16*>(to);
            round_numbers<lanes>(from, numbers, out);
            for (int i = numbers; i < 2 * words; ++i) out[i] = {};
        }
    });
}

// Contiguous rows of `numbers` numbers as rows of words for a product: themselves if they can be, else a
// copy.
inline const float* as_words(const BFloat16* from, int rows, int numbers, Floats& memory) {
    const int words = words_of(numbers);
    if (numbers == 2 * words && !has_amx()) return reinterpret_cast<const float*>(from);
    float* const copy = rows_of_words(memory, rows, words);
    auto* out = reinterpret_cast<BFloat16*>(copy);
    for (int r = 0; r < rows; ++r, from += numbers, out += 2 * words)
        std::fill(std::copy_n(from, numbers, out), out + 2 * words, BFloat16{});
    return copy;
}

// Converts contiguous panels of floats, input after input, to panels of pairs of inputs.
inline void pair_panels(const float* panels, std::size_t count, int inputs, int width, float* to) {
    const int words = words_of(inputs);
    for (std::size_t p = 0; p < count; ++p, panels += std::ptrdiff_t{width} * inputs)
        for (int i = 0; i < 2 * words; i += 2)
            for (int o = 0; o < width; ++o) {
                BFloat16 pair[2] = {};
                for (int j = 0; j < 2 && i + j < inputs; ++j) narrow(panels[(i + j) * width + o], pair[j]);
                *to++ = std::bit_cast<float>(pair);
            }
}

}  // namespace usf
#endif
