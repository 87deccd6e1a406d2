// Grey levels as unsigned integers of the same order, and a radix sort of positions by them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "parallel.hpp"

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

template <class Key>
struct KeyRange {
    Key low = static_cast<Key>(~Key(0)), high = 0;  // empty

    void include(Key key) {
        low = std::min(low, key);
        high = std::max(high, key);
    }
};

// Stable LSD radix sort: orders `items` by key_of(item), ascending; all keys lie in `range`. `spare` is a
// second buffer of the same size; the sorted items end up in the returned one of the two. Only as many bits
// as the range has are looked at, so quantised and nearly constant maps take one pass.
template <class Item, class Key, class KeyOf>
Item* radix_sort(Item* items, Item* spare, std::size_t n, KeyRange<Key> range, KeyOf key_of,
                 std::vector<std::uint32_t>& histogram) {
    const int bits = std::bit_width(static_cast<std::uint64_t>(range.high - range.low));
    if (bits == 0) return items;
    const int widest = n < 1500 ? 8 : 11;  // bits per pass; a histogram should be smaller than its data
    const int passes = (bits + widest - 1) / widest, digit = (bits + passes - 1) / passes;
    const std::size_t bins = std::size_t{1} << digit;
    const std::uint64_t mask = bins - 1;
    histogram.assign(bins * passes, 0);
    for (std::size_t i = 0; i < n; ++i) {
        std::uint64_t k = static_cast<Key>(key_of(items[i]) - range.low);
        for (int pass = 0; pass < passes; ++pass, k >>= digit) ++histogram[pass * bins + (k & mask)];
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
            const Item item = items[i];
            const std::uint64_t k = static_cast<Key>(key_of(item) - range.low);
            spare[offset[(k >> shift) & mask]++] = item;
        }
        std::swap(items, spare);
    }
    return items;
}

// Neighbouring items of an array.
struct Run {
    std::size_t begin, size;
};

// A key and its original place.
template <class Key>
struct Placed {
    Key key;
    std::int32_t place;
};

// Sorts the keys of some runs of an array, ascending and stable; all lie in `range`. It works in parallel and
// within the caches: one pass by the highest bits gathers the runs, then groups of neighbouring buckets are
// sorted separately. Calls placed(i, sorted[i]) for every i while it is in the cache.
template <class Key, class Visit>
void sort_runs(const Key* keys, const std::vector<Run>& runs, KeyRange<Key> range, Placed<Key>* sorted,
               int threads, Visit&& placed) {
    constexpr std::size_t bins = 2048, group_size = std::size_t{1} << 14;
    std::size_t n = 0;
    for (const Run& run : runs) n += run.size;
    const int bits = std::bit_width(static_cast<std::uint64_t>(range.high - range.low));
    const int shift = std::max(bits - 11, 0);
    const auto bucket = [&](Key key) { return static_cast<std::uint64_t>(Key(key - range.low)) >> shift; };
    const std::size_t blocks = n < 16 * group_size ? 1 : 32;  // blocks of neighbouring runs
    const auto first_run = [&](std::size_t block) { return runs.size() * block / blocks; };
    std::vector<std::uint32_t> offset(blocks * bins, 0);  // per block and bucket
    const auto visit = [&](auto&& use) {
        parallel_for(static_cast<std::int64_t>(blocks), threads, [&](int, std::int64_t block) {
            std::uint32_t* own = &offset[block * bins];
            for (std::size_t r = first_run(block); r < first_run(block + 1); ++r)
                for (std::size_t i = runs[r].begin; i < runs[r].begin + runs[r].size; ++i)
                    use(own[bucket(keys[i])], i);
        });
    };
    visit([](std::uint32_t& count, std::size_t) { ++count; });
    std::vector<std::size_t> group = {0};
    std::uint32_t sum = 0;
    for (std::size_t b = 0; b < bins; ++b) {
        for (std::size_t block = 0; block < blocks; ++block)
            sum += std::exchange(offset[block * bins + b], sum);
        if (sum - group.back() >= group_size || (b + 1 == bins && sum > group.back())) group.push_back(sum);
    }
    visit([&](std::uint32_t& next, std::size_t i) {
        sorted[next++] = {keys[i], static_cast<std::int32_t>(i)};
    });
    struct Scratch {
        Buffer<Placed<Key>> spare;
        std::vector<std::uint32_t> histogram;
    };
    const auto groups = static_cast<std::int64_t>(group.size()) - 1;
    std::vector<Scratch> scratch(workers_for(groups, threads));
    parallel_for(groups, threads, [&](int worker, std::int64_t g) {
        Placed<Key>* items = sorted + group[g];
        const std::size_t count = group[g + 1] - group[g];
        if (shift > 0) {
            KeyRange<Key> inner;
            for (std::size_t i = 0; i < count; ++i) inner.include(items[i].key);
            const Placed<Key>* last = radix_sort(
                items, scratch[worker].spare.reserve(count), count, inner,
                [](const Placed<Key>& item) { return item.key; }, scratch[worker].histogram);
            if (last != items) std::copy_n(last, count, items);
        }
        for (std::size_t i = group[g]; i < group[g + 1]; ++i) placed(i, sorted[i]);
    });
}

}  // namespace usf
