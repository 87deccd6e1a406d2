// Attention whose heads are mixed before and after the softmax (N. Shazeer, Z. Lan, Y. Cheng, N. Ding, L.
// Hou, "Talking-Heads Attention", arXiv:2003.02436). It takes a few queries at a time: their scores, of all
// heads and keys, stay in the second-level cache from the first product to the last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

struct TalkingHeads {
    int tokens, heads, width;     // channels of a head
    const float *before, *after;  // [heads, heads], of the scores' binary logarithms and of their softmax
    const float* bias;            // [heads], of the latter; that of the former does not change a softmax

    int channels() const { return heads * width; }
};

// to[g, j] = sum over h of weights[g, h] from[h, j] for some g and some vectors of j, in registers.
template <int lanes, int vectors, int rows, class T>
USF_INLINE void mix_tile(const float* weights, int heads, const float* from, std::ptrdiff_t apart, T* to,
                         std::ptrdiff_t to_apart) {
    using V = typename Vector<lanes>::type;
    using U = typename Vector<lanes>::unaligned;
    V sums[rows][vectors] = {};
    for (int h = 0; h < heads; ++h, from += apart) {
        V x[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) x[v] = *reinterpret_cast<const U*>(from + v * lanes);
#pragma GCC unroll 4
        for (int g = 0; g < rows; ++g)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[g][v] += weights[g * heads + h] * x[v];
    }
#pragma GCC unroll 4
    for (int g = 0; g < rows; ++g)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store<lanes>(sums[g][v], to + g * to_apart + v * lanes);
}
template <int lanes, int vectors, class T>
USF_INLINE void mix_columns(const float* weights, int heads, const float* from, std::ptrdiff_t apart, T* to,
                            std::ptrdiff_t to_apart) {
    int g = 0;
    for (; g + 4 <= heads; g += 4)
        mix_tile<lanes, vectors, 4>(weights + g * heads, heads, from, apart, to + g * to_apart, to_apart);
    for (; g < heads; ++g)
        mix_tile<lanes, vectors, 1>(weights + g * heads, heads, from, apart, to + g * to_apart, to_apart);
}
// The same for all g and `count` of j, a multiple of the lanes.
template <class T>
void mix(const float* weights, int heads, const float* from, std::ptrdiff_t apart, std::int64_t count, T* to,
         std::ptrdiff_t to_apart) {
    with_lanes(best_lanes(), [&]<int lanes>() USF_LAMBDA {
        constexpr int vectors = lanes == 16 ? 4 : 2;
        std::int64_t j = 0;
        for (; j + vectors * lanes <= count; j += vectors * lanes)
            mix_columns<lanes, vectors>(weights, heads, from + j, apart, to + j, to_apart);
        for (; j < count; j += lanes)
            mix_columns<lanes, 1>(weights, heads, from + j, apart, to + j, to_apart);
    });
}

// Puts 2^(value - largest value) in the place of each value; returns the sum.
USF_CLONES inline float exponentiate(float* values, std::int64_t n) {
    float most[16];
    std::fill_n(most, 16, -std::numeric_limits<float>::infinity());
    std::int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int lane = 0; lane < 16; ++lane) most[lane] = std::max(most[lane], values[j + lane]);
    for (int lane = 0; j < n; ++j, ++lane) most[lane] = std::max(most[lane], values[j]);
    const float largest = *std::max_element(most, most + 16);
    for (j = 0; j < n; ++j) values[j] = power_of_two(values[j] - largest);
    return sum(values, n);
}

// Words of pairs of tokens: to[o] = (first[o], second[o]), zeros for o >= count and without a second token.
USF_CLONES inline void pair_tokens(const BFloat16* __restrict first, const BFloat16* __restrict second,
                                   int count, int width, std::uint32_t* __restrict to) {
    for (int o = 0; o < count; ++o)
        to[o] = first[o].bits | (second ? std::uint32_t{second[o].bits} << 16 : 0u);
    std::fill(to + count, to + width, 0u);
}

// Keys and values of an image in panels, head by head, from rows [tokens, queries | keys | values].
template <class T>
class KeysAndValues {
public:
    static constexpr bool pairs = std::is_same_v<T, BFloat16>;

    KeysAndValues(const TalkingHeads& by, const T* rows, int threads, Floats& memory)
        : by_(by),
          key_size_(std::int64_t{padded(by.tokens)} * key_depth()),
          value_size_(std::int64_t{padded(by.width)} * value_depth()) {
        const int constants = padded(by.width), tokens = padded(by.tokens);
        keys_ = memory.at_least(by.heads * (key_size_ + value_size_ + constants) + tokens);
        values_ = keys_ + by.heads * key_size_;
        constants_ = values_ + by.heads * value_size_;
        zeros_ = constants_ + by.heads * constants;
        std::fill_n(zeros_, tokens, 0.0f);
        team_for(by.heads, threads, [&](std::int64_t head) {
            const T* const keys = rows + by.channels() + head * by.width;
            const T* const values = keys + by.channels();
            fill_keys(keys, keys_ + head * key_size_);
            fill_values(values, values_ + head * value_size_);
            add_up(values, by.bias[head], constants_ + head * constants);
        });
    }
    Panels keys(int head) const { return panels(keys_ + head * key_size_, zeros_, by_.tokens, key_depth()); }
    // With what the bias of the second mixture adds, which is a multiple of the sum of all values.
    Panels values(int head) const {
        return panels(values_ + head * value_size_, constants_ + head * padded(by_.width), by_.width,
                      value_depth());
    }

private:
    int padded(int outputs) const { return Panels::padded(outputs, width_); }
    int key_depth() const { return pairs ? words_of(by_.width) : by_.width; }
    int value_depth() const { return pairs ? words_of(by_.tokens) : by_.tokens; }
    std::ptrdiff_t apart() const { return std::ptrdiff_t{3} * by_.channels(); }
    Panels panels(const float* data, const float* bias, int outputs, int depth) const {
        return {data, bias, outputs, depth, width_, depth, pairs};
    }

    void fill_keys(const T* keys, float* to) const {
        constexpr int numbers = pairs ? 2 : 1;  // in a word
        fill_panels({reinterpret_cast<const float*>(keys), apart() / numbers, false}, by_.tokens, key_depth(),
                    width_, to);
    }
    void fill_values(const T* values, float* to) const {
        if constexpr (!pairs) {
            fill_panels({values, apart(), true}, by_.width, by_.tokens, width_, to);
        } else {
            for (int column = 0; column < by_.width; column += width_)
                for (int t = 0; t < 2 * value_depth(); t += 2, to += width_) {
                    const BFloat16* const first = values + t * apart() + column;
                    pair_tokens(first, t + 1 < by_.tokens ? first + apart() : nullptr,
                                t < by_.tokens ? std::min(by_.width - column, width_) : 0, width_,
                                reinterpret_cast<std::uint32_t*>(to));
                }
        }
    }
    void add_up(const T* values, float bias, float* to) const {
        std::fill_n(to, padded(by_.width), 0.0f);
        for (int t = 0; t < by_.tokens; ++t, values += apart())
            for (int c = 0; c < by_.width; ++c) to[c] += widen(values[c]);
        for (int c = 0; c < by_.width; ++c) to[c] *= bias;
    }

    const int width_ = Panels::best_width();
    const TalkingHeads& by_;
    const std::int64_t key_size_, value_size_;
    float *keys_, *values_, *constants_, *zeros_;
};

// Computes the attention of some queries, from their rows to `out` [count, channels].
template <class T>
void attend(const TalkingHeads& by, const KeysAndValues<T>& image, const T* rows, int count, float* out) {
    constexpr bool pairs = KeysAndValues<T>::pairs;
    constexpr int numbers = pairs ? 2 : 1;  // in a word
    const int heads = by.heads, width = (by.tokens + 15) / 16 * 16;
    const std::ptrdiff_t apart = std::ptrdiff_t{heads} * width;
    Scratch& scratch = scratch_of_thread();
    float* const scores = scratch.outputs[0].at_least(count * apart);  // [count, heads, width]
    float* const mixed = scratch.outputs[1].at_least(apart);
    float* const normalised = scratch.values.at_least(heads * heads);
    for (int h = 0; h < heads; ++h) {
        const auto* const queries = reinterpret_cast<const float*>(rows + h * by.width);
        const Panels keys = image.keys(h);
        multiply(Inputs{queries, std::ptrdiff_t{3} * by.channels() / numbers, pairs}, count, keys,
                 Store{scores + h * width, apart, keys.bias, Ending::plain, nullptr});
    }
    for (int q = 0; q < count; ++q) {
        float* const own = scores + q * apart;
        mix(by.before, heads, own, width, width, mixed, width);
        for (int h = 0; h < heads; ++h) {
            const float inverse = 1 / exponentiate(mixed + h * width, by.tokens);
            std::fill(mixed + h * width + by.tokens, mixed + (h + 1) * width, 0.0f);
            for (int g = 0; g < heads; ++g) normalised[g * heads + h] = by.after[g * heads + h] * inverse;
        }
        mix(normalised, heads, mixed, width, width, reinterpret_cast<T*>(own), numbers * width);
    }
    for (int h = 0; h < heads; ++h) {
        const Panels values = image.values(h);
        multiply(Inputs{scores + h * width, apart, pairs}, count, values,
                 Store{out + h * by.width, by.channels(), values.bias, Ending::plain, nullptr});
    }
}

// out[b, n, :] = attention of qkv [b, n, queries | keys | values], all contiguous. Numbers in bfloat16 must
// be a multiple of 16 channels per head, on a processor that multiplies pairs, and has no AMX.
template <class T>
void talking_heads(const TalkingHeads& by, const T* qkv, std::int64_t images, T* out, int threads) {
    constexpr std::int64_t most = 12;  // queries: rows of a product's widest tile
    const std::int64_t tokens = by.tokens, channels = by.channels();
    const std::int64_t some = std::clamp<std::int64_t>(2 * cache_numbers / (by.heads * tokens), 1, most);
    const std::int64_t blocks = (tokens + some - 1) / some;
    static thread_local Floats memory;
    for (std::int64_t b = 0; b < images; ++b, qkv += 3 * tokens * channels, out += tokens * channels) {
        const KeysAndValues<T> image(by, qkv, threads, memory);
        team_for(blocks, threads, [&](std::int64_t i) {
            const std::int64_t first = i * some;
            const int count = static_cast<int>(std::min(some, tokens - first));
            const T* const rows = qkv + first * 3 * channels;
            T* const to = out + first * channels;
            if constexpr (std::is_same_v<T, float>) {
                attend(by, image, rows, count, to);
            } else {
                float* const floats = scratch_of_thread().shares.at_least(count * channels);
                attend(by, image, rows, count, floats);
                round_to(floats, count * channels, to);
            }
        });
    }
}

}  // namespace usf
#endif
