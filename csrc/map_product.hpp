// Matrices applied to the channels of maps, whose positions lie side by side, and sums over positions of
// outer products. Maps become panels a block at a time, in the cache; nothing else is copied.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layer.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// (images, channels, positions), from one image and from one channel to the next, positions side by side; or
// `rows`: from one position to the next, channels side by side.
struct MapView {
    const float* data;
    std::int64_t image, next;
    bool rows = false;

    const float* at(std::int64_t i, std::int64_t position) const {
        return data + i * image + position * (rows ? next : 1);
    }
};

// What is not zero of a matrix, or what is wanted of it.
enum class Triangle { whole, lower, upper };

// The columns of `columns` in which a triangle has something in `count` rows from the first on.
struct Reach {
    int first, last;

    Reach(Triangle part, int row, int count, int columns)
        : first(part == Triangle::upper ? std::min(row, columns) : 0),
          last(part == Triangle::lower ? std::min(row + count, columns) : columns) {}
};

// Finishes a tile of which a row is a channel: out = ending(sums + bias of the row). `mask` has the strides
// of `out`.
struct StoreMaps {
    float* out;
    std::int64_t stride;
    const float* bias;  // or null
    Ending ending;
    const float* mask;

    template <class V, int count>
    USF_INLINE void operator()(V (&sums)[count][2], int row, int column, int width) const {
        constexpr int lanes = sizeof(V) / sizeof(float);
        using U = typename Vector<lanes>::unaligned;
        for (int i = 0; i < count; ++i) {
            const std::int64_t at = (row + i) * stride + column;
            const float shift = bias ? bias[row + i] : 0.0f;
            V value[2] = {sums[i][0] + shift, sums[i][1] + shift};
            if (ending == Ending::relu)  // in this order NaN stays NaN
                for (V& half : value) half = half < 0 ? V{} : half;
            if (width == 2 * lanes) {
                for (int half = 0; half < 2; ++half) {
                    if (ending == Ending::masked)
                        value[half] =
                            *reinterpret_cast<const U*>(mask + at + half * lanes) <= 0 ? V{} : value[half];
                    *reinterpret_cast<U*>(out + at + half * lanes) = value[half];
                }
            } else {
                float values[2 * lanes];
                std::memcpy(values, value, sizeof(values));
                for (int j = 0; j < width; ++j)
                    out[at + j] = ending == Ending::masked && mask[at + j] <= 0 ? 0.0f : values[j];
            }
        }
    }
};

// Blocks of neighbouring positions, of whole panels, so many that all threads have some.
struct PositionBlocks {
    std::int64_t positions, length, each, count;  // of a block; blocks of an image, and of all

    PositionBlocks(std::int64_t images, std::int64_t positions, std::int64_t most, int threads)
        : positions(positions) {
        const std::int64_t width = Panels::best_width(), panels = (positions + width - 1) / width;
        const std::int64_t fair = (images * panels + threads - 1) / threads;
        length = std::max<std::int64_t>(1, std::min({most / width, fair, panels})) * width;
        each = (positions + length - 1) / length, count = images * each;
    }
    // Calls body(image, first position, positions).
    template <class Body>
    void at(std::int64_t i, Body&& body) const {
        const std::int64_t first = i % each * length;
        body(i / each, first, static_cast<int>(std::min(length, positions - first)));
    }
};

// Rows of a matrix that pass together, while they are in the first cache.
constexpr int together = 48;

// out[b, o, p] = ending(sum over c of matrix[o, c] x[b, c, p] + bias[o]), dense, of maps x; the matrix is
// `part` of one, with zeros elsewhere.
inline void map_product(const MatrixView& matrix, Triangle part, int outputs, int inputs, const MapView& x,
                        std::int64_t images, std::int64_t positions, const float* bias, Ending ending,
                        const float* mask, float* out, int threads) {
    const int width = Panels::best_width();
    const PositionBlocks blocks(images, positions, cache_numbers / std::max(inputs, 1), threads);
    team_for(blocks.count, threads, [&](std::int64_t i) {
        blocks.at(i, [&](std::int64_t image, std::int64_t first, int count) {
            const std::int64_t columns = Panels::padded(count, width);
            float* const panels = scratch_of_thread().points[0].at_least(columns * inputs);
            fill_panels({x.at(image, first), x.next, true}, count, inputs, width, panels);
            const Panels whole{panels, nullptr, count, inputs, width};
            for (int o = 0; o < outputs; o += together) {
                const std::int64_t at = (image * outputs + o) * positions + first;
                const StoreMaps store{out + at, positions, bias ? bias + o : nullptr, ending,
                                      mask ? mask + at : nullptr};
                const int rows = std::min(together, outputs - o);
                const Reach reach(part, o, rows, inputs);
                const Panels weights = whole.of_inputs(reach.first, reach.last);
                const float* const from = matrix.at(o, reach.first);
                if (matrix.transposed)
                    multiply(Columns{from, matrix.stride}, rows, weights, store);
                else
                    multiply(Inputs{from, matrix.stride}, rows, weights, store);
            }
        });
    });
}

// out[o, c] = sum over images and positions of a[b, o, p] x[b, c, p], of which a triangle is all that is
// wanted; beyond its blocks it is 0. The same bits whenever it is computed by as many threads.
inline void outer_product(const MapView& a, const MapView& x, Triangle part, int outputs, int inputs,
                          std::int64_t images, std::int64_t positions, float* out, int threads) {
    static thread_local Floats memory;
    const int width = Panels::best_width();
    const std::int64_t size = std::int64_t{outputs} * inputs;
    const PositionBlocks blocks(images, positions, chain, threads);
    const int groups = workers_for(blocks.count, threads);
    float* const sums = memory.at_least(groups * size);
    team_for(groups, threads, [&](std::int64_t group) {
        float* const mine = sums + group * size;
        std::fill_n(mine, size, 0.0f);
        const std::int64_t last = blocks.count * (group + 1) / groups;
        for (std::int64_t i = blocks.count * group / groups; i < last; ++i)
            blocks.at(i, [&](std::int64_t image, std::int64_t first, int count) {
                float* const panels = scratch_of_thread().points[0].at_least(
                    std::int64_t{Panels::padded(inputs, width)} * count);
                fill_panels({x.at(image, first), x.next, x.rows}, inputs, count, width, panels);
                const Panels whole{panels, nullptr, inputs, count, width};
                const int step = part == Triangle::whole ? outputs : together;
                for (int o = 0; o < outputs; o += step) {
                    const int rows = std::min(step, outputs - o);
                    const Reach reach(part, o, rows, inputs);
                    const int column = reach.first / width * width;
                    const Panels weights = whole.of_outputs(column, reach.last);
                    const Add add{mine + std::int64_t{o} * inputs + column, inputs, 1.0f};
                    const float* const from = a.at(image, first) + o * (a.rows ? 1 : a.next);
                    if (a.rows)
                        multiply(Columns{from, a.next}, rows, weights, add);
                    else
                        multiply(Inputs{from, a.next}, rows, weights, add);
                }
            });
    });
    team_for(outputs, threads, [&](std::int64_t o) {
        for (std::int64_t i = o * inputs; i < (o + 1) * inputs; ++i) {
            float sum = sums[i];
            for (int group = 1; group < groups; ++group) sum += sums[group * size + i];
            out[i] = sum;
        }
    });
}

}  // namespace usf
#endif
