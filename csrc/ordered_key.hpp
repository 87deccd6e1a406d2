// Grey levels as unsigned integers of the same order, and a radix sort of positions by them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace usf {

template <class T>
struct OrderedKeyOf {
    using type = T;  // unsigned levels are their own keys
};
template <>
struct OrderedKeyOf<float> {
    using type = std::uint32_t;
};
template <>
struct OrderedKeyOf<double> {
    using type = std::uint64_t;
};
template <class T>
using OrderedKey = typename OrderedKeyOf<T>::type;

// a < b exactly when ordered_key(a) < ordered_key(b); -0 and 0 are the same level.
template <class T>
OrderedKey<T> ordered_key(T value) {
    if constexpr (std::is_floating_point_v<T>) {
        using Key = OrderedKey<T>;
        constexpr int sign = 8 * sizeof(Key) - 1;
        const Key bits = std::bit_cast<Key>(value + T(0));
        return bits ^ ((Key(0) - (bits >> sign)) | (Key(1) << sign));
    } else {
        return value;
    }
}

template <class T>
T from_ordered_key(OrderedKey<T> key) {
    if constexpr (std::is_floating_point_v<T>) {
        using Key = OrderedKey<T>;
        constexpr int sign = 8 * sizeof(Key) - 1;
        return std::bit_cast<T>(key ^ (((key >> sign) - Key(1)) | (Key(1) << sign)));
    } else {
        return key;
    }
}

// Stable LSD radix sort: orders `positions` by key[position], ascending. `spare` is a second buffer of the same
// size; the sorted positions end up in the returned one of the two. Only the bits in which the keys differ are
// looked at, so quantised and nearly constant maps take one pass.
template <class Position, class Key>
Position* radix_sort(const Key* key, Position* positions, Position* spare, std::size_t n,
                     std::vector<std::uint32_t>& histogram) {
    if (n < 2) return positions;
    Key low = key[positions[0]], high = low;
    for (std::size_t i = 1; i < n; ++i) {
        low = std::min(low, key[positions[i]]);
        high = std::max(high, key[positions[i]]);
    }
    const int bits = std::bit_width(static_cast<std::uint64_t>(high - low));
    if (bits == 0) return positions;
    const int widest = n < 1500 ? 8 : 11;  // a histogram should stay smaller than what it counts
    const int passes = (bits + widest - 1) / widest, digit = (bits + passes - 1) / passes;
    const std::size_t bins = std::size_t{1} << digit;
    const Key mask = static_cast<Key>(bins - 1);
    histogram.assign(bins * passes, 0);
    for (std::size_t i = 0; i < n; ++i) {
        Key k = key[positions[i]] - low;
        for (int pass = 0; pass < passes; ++pass, k = static_cast<Key>(static_cast<std::uint64_t>(k) >> digit))
            ++histogram[pass * bins + (k & mask)];
    }
    for (int pass = 0; pass < passes; ++pass) {
        std::uint32_t* offset = histogram.data() + pass * bins;
        for (std::uint32_t b = 0, sum = 0; b < bins; ++b) {
            const std::uint32_t count = offset[b];
            offset[b] = sum;
            sum += count;
        }
        const int shift = pass * digit;
        for (std::size_t i = 0; i < n; ++i) {
            const Position p = positions[i];
            const Key k = static_cast<Key>(key[p] - low);
            spare[offset[(k >> shift) & mask]++] = p;
        }
        std::swap(positions, spare);
    }
    return positions;
}

}  // namespace usf
